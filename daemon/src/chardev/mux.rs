//! One device with up to four users: all of them write to it, and what it receives goes to one of them at a time.
//!
//! The client switches with Ctrl-A and `c`; Ctrl-A and `h` lists what else there is. All users see the client come and go.
//! Nothing happens on the device below before there is a user.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::task::{Context, Poll};

use qapi::{Error, Result};
use tokio::time::Instant;

use super::queue::{Input, Queue, Sink, Slot, shuttle};
use super::transport::Transport;
use super::{ChardevPort, Common, Connection};

/// Users of one device at most.
const MAX_USERS: usize = 4;
/// Ctrl-A.
const ESCAPE: u8 = 1;

const HELP: &[&str] = &[
    "C-a h    print this help\n\r",
    "C-a x    exit emulator\n\r",
    "C-a s    save disk data back to file (if -snapshot)\n\r",
    "C-a t    toggle console timestamps\n\r",
    "C-a b    send break (magic sysrq)\n\r",
    "C-a c    switch between console and monitor\n\r",
    "C-a C-a  sends C-a\n\r",
];

/// A multiplexer.
pub(super) struct Mux {
    id: String,
    common: Common,
    /// The device below, until there is a user.
    base: RefCell<Option<(String, ChardevPort)>>,
    /// Whether there are users, as the device below is asked for it.
    used: Rc<Cell<bool>>,
    oob: bool,
    /// Ends the daemon.
    quit: Rc<dyn Fn()>,
    state: RefCell<State>,
    /// To the client below; while there is one.
    out: RefCell<Option<Rc<Queue>>>,
}

#[derive(Default)]
struct State {
    users: Vec<User>,
    focus: usize,
    /// The last byte was the escape character.
    escaped: bool,
    /// Lines start with the time since then.
    timestamps: Option<Instant>,
    in_line: bool,
}

struct User {
    slot: Rc<Slot>,
    /// What the client below sends, while the user has the connection.
    input: Option<Rc<Queue>>,
}

impl Mux {
    pub(super) fn new(
        id: &str,
        common: Common,
        base: (String, ChardevPort),
        used: Rc<Cell<bool>>,
        quit: Rc<dyn Fn()>,
    ) -> Self {
        let oob = base.1.offers_oob();
        let id = id.to_owned();
        let (base, state, out) = (RefCell::new(Some(base)), RefCell::default(), RefCell::default());
        Self { id, common, base, used, oob, quit, state, out }
    }

    pub(super) fn offers_oob(&self) -> bool {
        self.oob
    }

    pub(super) fn is_used(&self) -> bool {
        self.used.get()
    }

    /// The device below and its name, if there was never a user.
    pub(super) fn give_back(&self) -> Option<(String, ChardevPort)> {
        self.base.borrow_mut().take()
    }

    /// Lets one more user in, which has the client's attention from now on.
    ///
    /// # Errors
    /// There are four already.
    pub(super) fn add_user(self: &Rc<Self>) -> Result<Rc<Slot>> {
        let slot = Rc::new(Slot::default());
        {
            let mut state = self.state.borrow_mut();
            if state.users.len() >= MAX_USERS {
                let id = &self.id;
                let text = format!("too many uses of multiplexed chardev '{id}' (maximum is {MAX_USERS})");
                return Err(Error::generic(text));
            }
            state.users.push(User { slot: slot.clone(), input: None });
            state.focus = state.users.len() - 1;
        }
        self.used.set(true);
        let base = self.base.borrow_mut().take();
        if let Some((_, base)) = base {
            tokio::task::spawn_local(self.clone().run(base.started()));
        } else {
            self.offer_all();
        }
        Ok(slot)
    }

    async fn run(self: Rc<Self>, mut base: ChardevPort) {
        while let Some(connection) = base.connection().await {
            let out = Rc::new(Queue::default());
            *self.out.borrow_mut() = Some(out.clone());
            self.offer_all();
            let result = shuttle(&connection, &out, &Below(self.clone())).await;
            tracing::trace!(target: "chardev_mux_client_closed", id = %self.id, ?result);
            *self.out.borrow_mut() = None;
            out.close();
            let inputs: Vec<_> = {
                let mut state = self.state.borrow_mut();
                (state.escaped, state.timestamps, state.in_line) = (false, None, false);
                state.users.iter_mut().map(|user| (user.slot.clone(), user.input.take())).collect()
            };
            for (slot, input) in inputs {
                slot.withdraw();
                if let Some(input) = input {
                    input.close();
                }
            }
        }
        self.state.borrow().users.iter().for_each(|user| user.slot.end());
    }

    /// Gives the client below to all users that do not have it, if there is one.
    fn offer_all(self: &Rc<Self>) {
        let Some(out) = self.out.borrow().clone() else { return };
        for user in &mut self.state.borrow_mut().users {
            if user.input.as_ref().is_none_or(|input| input.is_closed()) {
                let input = Rc::new(Queue::default());
                let line = Line { mux: self.clone(), input: Input(input.clone()), out: out.clone() };
                user.input = Some(input);
                user.slot.offer(Connection::plain(line, &self.common));
            }
        }
    }

    /// Writes to the client below, with the time in front of lines if that is wanted.
    fn write(&self, out: &Queue, bytes: &[u8]) {
        let mut state = self.state.borrow_mut();
        let Some(start) = state.timestamps else {
            out.push(bytes);
            return;
        };
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            if !state.in_line {
                let since = start.elapsed();
                let (seconds, millis) = (since.as_secs(), since.subsec_millis());
                let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
                out.push(format!("[{hours:02}:{minutes:02}:{:02}.{millis:03}] ", seconds % 60).as_bytes());
            }
            out.push(part);
            state.in_line = !part.ends_with(b"\n");
        }
    }

    /// What a byte behind the escape character asks for.
    fn command(&self, byte: u8) {
        let out = self.out.borrow().clone();
        match (byte, out) {
            (b'h' | b'?', Some(out)) => {
                self.write(&out, b"\n\r");
                HELP.iter().for_each(|line| self.write(&out, line.as_bytes()));
            }
            (b'x', Some(out)) => {
                self.write(&out, b"QEMU: Terminated\n\r");
                (self.quit)();
            }
            (b't', _) => {
                let mut state = self.state.borrow_mut();
                state.timestamps = if state.timestamps.is_some() { None } else { Some(Instant::now()) };
                state.in_line = false;
            }
            (b'c', _) => {
                let mut state = self.state.borrow_mut();
                state.focus = (state.focus + 1) % state.users.len().max(1);
            }
            // A break means nothing to a monitor, and there are no temporary snapshots to save.
            _ => {}
        }
    }

    fn send(&self, bytes: &[u8]) {
        let state = self.state.borrow();
        if let Some(input) = state.users.get(state.focus).and_then(|user| user.input.as_ref()) {
            input.push(bytes);
        }
    }
}

/// Where the bytes from below go.
struct Below(Rc<Mux>);

impl Sink for Below {
    fn poll_room(&self, cx: &mut Context<'_>) -> Poll<()> {
        let state = self.0.state.borrow();
        match state.users.get(state.focus).and_then(|user| user.input.as_ref()) {
            Some(input) => input.poll_room(cx),
            None => Poll::Ready(()),
        }
    }

    fn take(&self, bytes: &[u8]) {
        for byte in bytes {
            let escaped = std::mem::replace(&mut self.0.state.borrow_mut().escaped, false);
            match (escaped, *byte) {
                (false, ESCAPE) => self.0.state.borrow_mut().escaped = true,
                (false, byte) | (true, byte @ ESCAPE) => self.0.send(&[byte]),
                (true, byte) => self.0.command(byte),
            }
        }
    }

    fn end(&self) {
        // No user gets this client any more.
        *self.0.out.borrow_mut() = None;
        self.0.state.borrow().users.iter().filter_map(|user| user.input.as_ref()).for_each(|input| input.close());
    }

    fn is_idle(&self) -> bool {
        let state = self.0.state.borrow();
        state.users.iter().filter_map(|user| user.input.as_ref()).all(|input| Rc::strong_count(input) == 1)
    }
}

/// The client below, as one user has it.
struct Line {
    mux: Rc<Mux>,
    input: Input,
    out: Rc<Queue>,
}

impl Transport for Line {
    fn poll_read(&self, cx: &mut Context<'_>, buffer: &mut [u8], _: &mut Vec<OwnedFd>) -> Poll<io::Result<usize>> {
        self.input.0.poll_read(cx, buffer)
    }

    fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.out.poll_room(cx).map(Ok)
    }

    fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        let room = self.out.room().ok_or(io::ErrorKind::BrokenPipe)?;
        let part = bytes.get(..bytes.len().min(room)).unwrap_or_default();
        self.mux.write(&self.out, part);
        Ok(part.len())
    }

    fn poll_flushed(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.out.poll_empty(cx).map(Ok)
    }

    fn is_gone(&self) -> bool {
        self.out.is_closed()
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        // A user that let go of a client which is still there gets it again, as a new one.
        self.input.0.close();
        if !self.out.is_closed() {
            self.out.push(&[]);
            let mux = self.mux.clone();
            // Not from within the drop: whoever offers may be what drops.
            tokio::task::spawn_local(async move { mux.offer_all() });
        }
    }
}
