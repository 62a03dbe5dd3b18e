//! Starts a helper, ours or the reference, and talks to it byte by byte.

use ipc::fds;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage};
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::Duration;
use tempfile::TempDir;

/// Far above anything that is expected: what takes longer hangs.
const HANGS: Duration = Duration::from_secs(60);

/// This program.
pub const OURS: &str = env!("CARGO_BIN_EXE_qemu-pr-helper");

/// The reference, where it is installed.
pub fn reference() -> Option<&'static str> {
    let path = "/usr/bin/qemu-pr-helper";
    if Path::new(path).exists() {
        return Some(path);
    }
    eprintln!("skipped: {path} (package qemu-system-common) is not installed");
    None
}

/// A running helper with its socket in a folder of its own.
pub struct Helper {
    child: Child,
    pub socket: PathBuf,
    pub folder: TempDir,
    manager: UnixDatagram,
}

impl Helper {
    /// Starts ours and waits until it says that it serves.
    pub fn start(options: &[&str]) -> Self {
        Self::start_by(Command::new(OURS), options)
    }

    /// The same through another command that runs it in the end.
    pub fn start_by(mut command: Command, options: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("socket");
        let notify = folder.path().join("notify");
        let manager = UnixDatagram::bind(&notify).unwrap();
        manager.set_read_timeout(Some(HANGS)).unwrap();
        let child = command
            .args(["-k", socket.to_str().unwrap()])
            .args(options)
            .env("NOTIFY_SOCKET", &notify)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let helper = Self { child, socket, folder, manager };
        helper.heard("READY=1");
        helper
    }

    /// Waits until the service manager hears this.
    pub fn heard(&self, state: &str) {
        let mut buf = [0; 512];
        loop {
            let n = match self.manager.recv(&mut buf) {
                Ok(n) => n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(e) => panic!("no {state} from the helper: {e}"),
            };
            if std::str::from_utf8(&buf[..n]).unwrap().lines().any(|line| line == state) {
                return;
            }
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A line of /proc/PID/status.
    pub fn status(&self, name: &str) -> Vec<String> {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap();
        let value = |text: String| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t").map(str::to_owned));
            line.unwrap_or_default()
        };
        tasks.map(|task| value(std::fs::read_to_string(task.unwrap().path().join("status")).unwrap())).collect()
    }

    /// Waits for a state that no message tells.
    pub fn wait_until(&self, what: &str, state: impl Fn(&Self) -> bool) {
        let begun = std::time::Instant::now();
        while !state(self) {
            assert!(begun.elapsed() < HANGS, "never: {what}");
            std::thread::yield_now();
        }
    }

    /// How many descriptors it has open.
    pub fn open_files(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap().count()
    }

    /// A connection that has not said anything.
    pub fn connect(&self) -> UnixStream {
        connect(&self.socket)
    }

    /// A connection after the negotiation of these features.
    pub fn negotiated(&self, features: u32) -> Client {
        let mut stream = self.connect();
        assert_eq!(read(&mut stream, 4), 0x4000_0000u32.to_be_bytes());
        stream.write_all(&features.to_be_bytes()).unwrap();
        Client(stream)
    }

    pub fn signal(&self, signal: &str) {
        assert!(Command::new("kill").args([signal, &self.pid().to_string()]).status().unwrap().success());
    }

    /// Ends it and returns how it ended and what it wrote.
    pub fn end(mut self) -> (ExitStatus, String) {
        self.signal("-TERM");
        let status = self.child.wait().unwrap();
        let mut text = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        (status, text)
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn connect(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(HANGS)).unwrap();
    stream
}

pub fn read(stream: &mut UnixStream, length: usize) -> Vec<u8> {
    let mut buf = vec![0; length];
    stream.read_exact(&mut buf).unwrap();
    buf
}

/// A client of the classic protocol, byte by byte.
pub struct Client(pub UnixStream);

impl Client {
    /// Sends bytes with a descriptor.
    pub fn send(&self, bytes: &[u8], fd: Option<BorrowedFd<'_>>) {
        assert_eq!(fds::send(self.0.as_fd(), bytes, fd).unwrap(), bytes.len());
    }

    /// Sends bytes with descriptors, as many as they are.
    pub fn send_all(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        let bytes = [std::io::IoSlice::new(bytes)];
        rustix::net::sendmsg(&self.0, &bytes, &mut control, rustix::net::SendFlags::empty()).unwrap();
    }

    /// A reply, header and payload.
    pub fn reply(&mut self) -> Vec<u8> {
        let mut reply = read(&mut self.0, 104);
        let size = u32::from_be_bytes(reply[4..8].try_into().unwrap());
        reply.extend(read(&mut self.0, usize::try_from(size).unwrap()));
        reply
    }

    /// Has the helper closed the connection without a further byte?
    pub fn is_closed(&mut self) -> bool {
        match self.0.read(&mut [0]) {
            Ok(n) => n == 0,
            Err(e) => e.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}

/// Runs ours to its end.
pub fn run(options: &[&str]) -> Output {
    Command::new(OURS).args(options).stdin(Stdio::null()).output().unwrap()
}
