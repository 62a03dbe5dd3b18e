//! A server over disks in memory, on a thread of its own, and a plain client.
#![allow(dead_code, reason = "each test file uses a part of it")]

use block::disk::DiskOptions;
use block::testing::{self, Memory, MemoryDriver};
use block::{Driver, DynDriver, Facts, Graph, IoResult, Mapping, Node, NodeOptions, Span, WriteFlags};
use buf::IoBuf;
use export::nbd::{NbdExportOptions, NbdServer, NbdServerParams};
use io::{IoThread, Listener};
use std::cell::RefCell;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;
use tokio::sync::Semaphore;

/// No step of a test takes this long unless it hangs.
const HANG: Duration = Duration::from_secs(60);

/// What lives on the server's thread.
pub struct Inside {
    pub graph: tokio::sync::Mutex<Graph>,
    pub server: NbdServer,
}

impl Inside {
    pub async fn node(&self, name: &str) -> Arc<Node> {
        Arc::clone(self.graph.lock().await.get(name).unwrap())
    }
}

thread_local! {
    static INSIDE: RefCell<Option<Rc<Inside>>> = const { RefCell::new(None) };
}

pub fn inside() -> Rc<Inside> {
    INSIDE.with(|inside| Rc::clone(inside.borrow().as_ref().unwrap()))
}

/// A server on two unix sockets.
pub struct Server {
    thread: Arc<IoThread>,
    dir: tempfile::TempDir,
}

/// How an export is set up.
pub struct Setup {
    pub name: &'static str,
    pub writable: bool,
    pub threads: Vec<Arc<IoThread>>,
}

impl Setup {
    pub fn new(name: &'static str, writable: bool) -> Self {
        Self { name, writable, threads: Vec::new() }
    }
}

impl Server {
    pub fn start(params: NbdServerParams) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listeners = ["nbd", "nbd2"].map(|name| UnixListener::bind(dir.path().join(name)).unwrap());
        let thread = IoThread::start("server", io::Params::default()).unwrap();
        let this = Self { thread, dir };
        this.run(move || async move {
            let mut server = NbdServer::new(listeners.map(|l| Listener::new(l.into()).unwrap()).into(), params);
            server.accept();
            let inside = Inside { graph: tokio::sync::Mutex::new(testing::graph()), server };
            INSIDE.with(|place| place.replace(Some(Rc::new(inside))));
        });
        this
    }

    /// Runs on the server's thread, and waits for the result.
    pub fn run<T, F, Fut>(&self, work: F) -> T
    where
        T: Send + 'static,
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = T> + 'static,
    {
        self.begin(work).recv_timeout(HANG).expect("the server hangs")
    }

    /// As [`run`](Self::run), without waiting.
    pub fn begin<T, F, Fut>(&self, work: F) -> mpsc::Receiver<T>
    where
        T: Send + 'static,
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = T> + 'static,
    {
        let (done, result) = mpsc::channel();
        self.thread
            .spawn(move || async move {
                let _ = done.send(work().await);
            })
            .unwrap();
        result
    }

    /// Exports a disk of `size` bytes in memory.
    pub fn export(&self, setup: Setup, size: usize, facts: Facts) -> Arc<Memory> {
        let (driver, memory) = MemoryDriver::open(size, facts);
        self.export_driver(setup, SendDriver(driver));
        memory
    }

    pub fn export_driver(&self, setup: Setup, driver: SendDriver) {
        self.run(move || async move {
            let inside = inside();
            let options = NodeOptions { discard: true, ..NodeOptions::default() };
            let mut graph = inside.graph.lock().await;
            let node = graph.adopt(setup.name, driver.0, options).await.unwrap();
            let perms = export::permissions(setup.writable);
            let label = format!("block export '{}'", setup.name);
            let disk = graph.attach(&node, &DiskOptions { label, perms, writethrough: false }).await.unwrap();
            inside
                .server
                .add(NbdExportOptions {
                    id: setup.name.to_owned(),
                    name: setup.name.to_owned(),
                    description: Some("some text".to_owned()),
                    writable: setup.writable,
                    allocation_depth: true,
                    disk,
                    threads: setup.threads,
                })
                .unwrap();
        });
    }

    pub fn path(&self) -> PathBuf {
        self.dir.path().join("nbd")
    }

    /// A place for files of the test.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn uri(&self, name: &str) -> String {
        format!("nbd+unix:///{name}?socket={}", self.path().display())
    }

    pub fn connect(&self) -> Client {
        Client::connect(&self.path())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        self.run(|| async {
            let exports = inside().server.stop().await;
            drop(exports);
            INSIDE.with(|inside| inside.take());
        });
    }
}

/// A driver on its way to the server's thread.
pub struct SendDriver(pub Box<dyn DynDriver>);

/// A medium of ones whose reads wait for permits.
pub struct Holding {
    pub size: u64,
    pub permits: Arc<Semaphore>,
    /// Says that a read has arrived.
    pub arrived: mpsc::Sender<u64>,
}

impl Driver for Holding {
    fn name(&self) -> &'static str {
        "holding"
    }

    fn facts(&self) -> Facts {
        Facts::default()
    }

    async fn length(&self) -> IoResult<u64> {
        Ok(self.size)
    }

    async fn read(&self, at: u64, buf: &IoBuf) -> IoResult {
        let _ = self.arrived.send(at);
        if let Ok(permit) = self.permits.acquire().await {
            permit.forget();
        }
        buf.fill(1);
        Ok(())
    }

    async fn write(&self, _at: u64, _buf: &IoBuf, _flags: WriteFlags) -> IoResult {
        Ok(())
    }

    async fn flush(&self) -> IoResult {
        Ok(())
    }

    async fn map(&self, span: Span, _precise: bool) -> IoResult<Mapping> {
        Ok(Mapping::data(span.len, span.at))
    }
}

/// A client that writes its own bytes. Simple replies.
pub struct Client {
    pub socket: UnixStream,
}

pub const READ: u16 = 0;
pub const WRITE: u16 = 1;
pub const DISC: u16 = 2;
pub const FLUSH: u16 = 3;

impl Client {
    pub fn connect(path: &Path) -> Self {
        let socket = UnixStream::connect(path).unwrap();
        socket.set_read_timeout(Some(HANG)).unwrap();
        socket.set_write_timeout(Some(HANG)).unwrap();
        Self { socket }
    }

    /// Negotiates with EXPORT_NAME; returns the size and the flags.
    pub fn choose(&mut self, export: &str) -> (u64, u16) {
        let mut greeting = [0; 18];
        self.socket.read_exact(&mut greeting).unwrap();
        assert_eq!(&greeting, b"NBDMAGICIHAVEOPT\0\x03");
        let mut out = 3u32.to_be_bytes().to_vec();
        out.extend_from_slice(b"IHAVEOPT\0\0\0\x01");
        out.extend_from_slice(&u32::try_from(export.len()).unwrap().to_be_bytes());
        out.extend_from_slice(export.as_bytes());
        self.socket.write_all(&out).unwrap();
        let mut answer = [0; 10];
        self.socket.read_exact(&mut answer).unwrap();
        (u64::from_be_bytes(answer[..8].try_into().unwrap()), u16::from_be_bytes(answer[8..].try_into().unwrap()))
    }

    pub fn header(command: u16, cookie: u64, at: u64, len: u32) -> Vec<u8> {
        let mut out = 0x2560_9513u32.to_be_bytes().to_vec();
        out.extend_from_slice(&[0, 0]);
        out.extend_from_slice(&command.to_be_bytes());
        out.extend_from_slice(&cookie.to_be_bytes());
        out.extend_from_slice(&at.to_be_bytes());
        out.extend_from_slice(&len.to_be_bytes());
        out
    }

    pub fn send(&mut self, command: u16, cookie: u64, at: u64, len: u32) {
        self.socket.write_all(&Self::header(command, cookie, at, len)).unwrap();
    }

    /// The error and the cookie of the next reply.
    pub fn reply(&mut self) -> (u32, u64) {
        let mut reply = [0; 16];
        self.socket.read_exact(&mut reply).unwrap();
        assert_eq!(reply[..4], 0x6744_6698u32.to_be_bytes());
        (u32::from_be_bytes(reply[4..8].try_into().unwrap()), u64::from_be_bytes(reply[8..].try_into().unwrap()))
    }

    pub fn data(&mut self, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.socket.read_exact(&mut data).unwrap();
        data
    }

    pub fn read(&mut self, at: u64, len: u32) -> Result<Vec<u8>, u32> {
        self.send(READ, 7, at, len);
        match self.reply() {
            (0, 7) => Ok(self.data(usize::try_from(len).unwrap())),
            (error, 7) => Err(error),
            other => panic!("{other:?}"),
        }
    }

    /// Whether the server has closed; what it sent before is dropped.
    pub fn is_closed(&mut self) -> bool {
        let mut rest = [0; 4096];
        loop {
            match self.socket.read(&mut rest) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(e) => return e.kind() == std::io::ErrorKind::ConnectionReset,
            }
        }
    }
}

/// Runs a program; none, with a message, if it is not installed.
pub fn program(command: &mut Command) -> Option<Output> {
    match command.output() {
        Ok(output) => Some(output),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            eprintln!("SKIPPED: {} is not installed", command.get_program().to_string_lossy());
            None
        }
        Err(e) => panic!("{command:?}: {e}"),
    }
}

/// Runs a program that has to succeed; its standard output.
pub fn succeed(command: &mut Command) -> Option<String> {
    let output = program(command)?;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {}\n{out}\n{err}", output.status);
    Some(out.into_owned())
}
