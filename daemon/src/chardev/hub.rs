//! Up to four devices with one user: what it writes goes to all that have a client, and what any of them receives goes to it.
//!
//! The user has a client while at least one of the devices has one. Devices that always have one, such as files, do not
//! count for that when there are others: a conversation begins when somebody comes who can answer.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use super::queue::{Input, Queue, Sink, Slot, shuttle};
use super::transport::Transport;
use super::{ChardevPort, Common, Connection};

/// Devices of one hub at most.
pub(super) const MAX_DEVICES: usize = 4;

/// A hub that nobody uses yet.
pub(super) struct Hub {
    common: Common,
    devices: Vec<(String, ChardevPort)>,
    used: Rc<Cell<bool>>,
}

impl Hub {
    pub(super) fn new(common: Common, devices: Vec<(String, ChardevPort)>, used: Rc<Cell<bool>>) -> Self {
        Self { common, devices, used }
    }

    /// The devices below.
    pub(super) fn into_devices(self) -> Vec<(String, ChardevPort)> {
        self.devices
    }

    pub(super) fn offers_oob(&self) -> bool {
        self.devices.iter().all(|(_, port)| port.offers_oob())
    }

    /// Begins to serve the devices, for one user.
    pub(super) fn start(self) -> Rc<Slot> {
        self.used.set(true);
        let slot = Rc::new(Slot::default());
        let all_permanent = self.devices.iter().all(|(_, port)| port.is_permanent());
        let outs = self.devices.iter().map(|_| RefCell::default()).collect();
        let running = Rc::new(Running {
            common: self.common,
            slot: slot.clone(),
            outs,
            clients: Cell::new(0),
            left: Cell::new(self.devices.len()),
            ending: Cell::new(false),
            input: RefCell::default(),
        });
        for (at, (_, port)) in self.devices.into_iter().enumerate() {
            let counts = all_permanent || !port.is_permanent();
            tokio::task::spawn_local(running.clone().serve(at, port, counts));
        }
        slot
    }
}

struct Running {
    common: Common,
    slot: Rc<Slot>,
    /// To the client of each device, while it has one.
    outs: Vec<RefCell<Option<Rc<Queue>>>>,
    /// How many clients there are that count.
    clients: Cell<usize>,
    /// How many devices may still have one.
    left: Cell<usize>,
    /// The last client sends nothing more.
    ending: Cell<bool>,
    /// What the clients send, while the user has the connection.
    input: RefCell<Option<Rc<Queue>>>,
}

impl Running {
    async fn serve(self: Rc<Self>, at: usize, mut port: ChardevPort, counts: bool) {
        while let Some(connection) = port.connection().await {
            let out = Rc::new(Queue::default());
            self.set_out(at, Some(out.clone()));
            if counts {
                self.clients.set(self.clients.get() + 1);
            }
            self.offer();
            let result = shuttle(&connection, &out, &Below { hub: &self, counts }).await;
            self.ending.set(false);
            tracing::trace!(target: "chardev_hub_client_closed", at, ?result);
            self.set_out(at, None);
            out.close();
            if counts {
                self.clients.set(self.clients.get() - 1);
            }
            if self.clients.get() == 0 {
                self.slot.withdraw();
                let input = self.input.borrow_mut().take();
                if let Some(input) = input {
                    input.close();
                }
            }
        }
        self.left.set(self.left.get() - 1);
        if self.left.get() == 0 {
            self.slot.end();
        }
    }

    fn set_out(&self, at: usize, out: Option<Rc<Queue>>) {
        if let Some(place) = self.outs.get(at) {
            *place.borrow_mut() = out;
        }
    }

    /// Gives the clients to the user, if there are any that count and it does not have them.
    fn offer(self: &Rc<Self>) {
        let has = self.input.borrow().as_ref().is_some_and(|input| !input.is_closed());
        if has || self.ending.get() || self.clients.get() == 0 {
            return;
        }
        let input = Rc::new(Queue::default());
        *self.input.borrow_mut() = Some(input.clone());
        self.slot.offer(Connection::plain(Line { hub: self.clone(), input: Input(input) }, &self.common));
    }

    fn each_out(&self) -> impl Iterator<Item = Rc<Queue>> {
        self.outs.iter().filter_map(|out| out.borrow().clone())
    }
}

/// Where the bytes of one device go.
struct Below<'a> {
    hub: &'a Running,
    counts: bool,
}

impl Below<'_> {
    /// Whether the user loses its clients with this one.
    fn is_last(&self) -> bool {
        self.counts && self.hub.clients.get() == 1
    }
}

impl Sink for Below<'_> {
    fn poll_room(&self, cx: &mut Context<'_>) -> Poll<()> {
        match &*self.hub.input.borrow() {
            Some(input) => input.poll_room(cx),
            None => Poll::Ready(()),
        }
    }

    fn take(&self, bytes: &[u8]) {
        if let Some(input) = &*self.hub.input.borrow() {
            input.push(bytes);
        }
    }

    fn end(&self) {
        if let (true, Some(input)) = (self.is_last(), &*self.hub.input.borrow()) {
            self.hub.ending.set(true);
            input.close();
        }
    }

    fn is_idle(&self) -> bool {
        !self.is_last() || self.hub.input.borrow().as_ref().is_none_or(|input| Rc::strong_count(input) == 1)
    }
}

/// The clients of all devices, as the user has them.
struct Line {
    hub: Rc<Running>,
    input: Input,
}

impl Transport for Line {
    fn poll_read(&self, cx: &mut Context<'_>, buffer: &mut [u8], _: &mut Vec<OwnedFd>) -> Poll<io::Result<usize>> {
        self.input.0.poll_read(cx, buffer)
    }

    fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        for out in self.hub.each_out() {
            ready!(out.poll_room(cx));
        }
        Poll::Ready(Ok(()))
    }

    fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        // All get the same; the slowest one sets the pace.
        let room = self.hub.each_out().filter_map(|out| out.room()).min().ok_or(io::ErrorKind::BrokenPipe)?;
        let part = bytes.get(..bytes.len().min(room)).unwrap_or_default();
        self.hub.each_out().for_each(|out| out.push(part));
        Ok(part.len())
    }

    fn poll_flushed(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        for out in self.hub.each_out() {
            ready!(out.poll_empty(cx));
        }
        Poll::Ready(Ok(()))
    }

    fn is_gone(&self) -> bool {
        self.input.0.is_closed()
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.input.0.close();
        self.hub.each_out().for_each(|out| out.push(&[]));
        if self.hub.clients.get() > 0 {
            let hub = self.hub.clone();
            tokio::task::spawn_local(async move { hub.offer() });
        }
    }
}
