//! Starting, watching and ending a daemon in a directory of its own.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::{nbd, program, qmp, wait_for, wait_within};

/// Held while a child is started: a descriptor that one daemon shall inherit must not leak into another child.
pub(crate) fn spawning() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The pid file that tells that a daemon serves.
const PIDFILE: &str = "ready.pid";

/// A daemon to be started: its directory and its options in order. The directory is the daemon's working directory, so
/// options name files in it without a path.
pub struct Setup {
    dir: TempDir,
    program: PathBuf,
    limits: String,
    args: Vec<OsString>,
    fds: Vec<OwnedFd>,
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    refusals: bool,
}

impl Default for Setup {
    fn default() -> Self {
        Self::new()
    }
}

/// How a program that ran to its end went.
#[derive(Debug)]
pub struct Ended {
    /// The exit status.
    pub status: ExitStatus,
    /// All it wrote to standard output.
    pub stdout: String,
    /// All it wrote to standard error.
    pub stderr: String,
}

impl Setup {
    /// The program under test in a new directory.
    pub fn new() -> Self {
        Self::of(program::under_test())
    }

    /// Any program that takes the same options, in a new directory.
    pub fn of(program: &Path) -> Self {
        Self {
            dir: tempfile::Builder::new().prefix("qsd-").tempdir().expect("make a directory"),
            program: program.to_owned(),
            limits: String::new(),
            args: Vec::new(),
            fds: Vec::new(),
            stdin: None,
            stdout: None,
            refusals: false,
        }
    }

    /// Its sandbox may refuse calls; otherwise the test fails when it does.
    pub fn with_refusals(mut self) -> Self {
        self.refusals = true;
        self
    }

    /// A file in the daemon's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Makes a sparse file of `size` bytes in the daemon's directory.
    pub fn image(self, name: &str, size: u64) -> Self {
        let file = File::create(self.path(name)).expect("make an image");
        file.set_len(size).expect("size an image");
        self
    }

    /// Adds an option's text as it is.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds several options, split at spaces.
    pub fn line(mut self, line: &str) -> Self {
        self.args.extend(line.split_whitespace().map(OsString::from));
        self
    }

    /// Adds a QMP monitor on the socket `qmp.sock`.
    pub fn qmp(self) -> Self {
        self.line("--chardev socket,path=qmp.sock,server=on,wait=off,id=qmp --monitor chardev=qmp")
    }

    /// Adds an NBD server on the socket `nbd.sock`.
    pub fn nbd_server(self) -> Self {
        self.line("--nbd-server addr.type=unix,addr.path=nbd.sock")
    }

    /// Adds a `file` node called `node` on the file of that name and `.img`, which is made with `size` bytes, an NBD
    /// server, and a writable export named after the node.
    pub fn serving(self, node: &str, size: u64) -> Self {
        self.image(&format!("{node}.img"), size)
            .line(&format!("--blockdev driver=file,node-name={node},filename={node}.img,discard=unmap"))
            .nbd_server()
            .line(&format!("--export type=nbd,id=exp-{node},node-name={node},name={node},writable=on"))
    }

    /// Runs a piece of shell in front of the daemon in the same process: `ulimit -n 40`.
    pub fn limit(mut self, shell: &str) -> Self {
        self.limits.push_str(shell);
        self.limits.push_str("; ");
        self
    }

    /// Lets the daemon inherit a descriptor; the number in its options is [`AsRawFd::as_raw_fd`] of it.
    pub fn inherit(mut self, fd: OwnedFd) -> Self {
        self.fds.push(fd);
        self
    }

    /// Gives the daemon its standard input and output; otherwise they are `/dev/null` and a file.
    pub fn stdio(mut self, stdin: OwnedFd, stdout: OwnedFd) -> Self {
        self.stdin = Some(stdin);
        self.stdout = Some(stdout);
        self
    }

    fn command(&mut self) -> Command {
        let mut command = if self.limits.is_empty() {
            Command::new(&self.program)
        } else {
            let mut shell = Command::new("/bin/sh");
            shell.arg("-c").arg(format!("{}exec \"$@\"", self.limits)).arg("sh").arg(&self.program);
            shell
        };
        let out = |name: &str| Stdio::from(File::create(self.dir.path().join(name)).expect("make a log"));
        command.args(&self.args).current_dir(self.dir.path());
        command.stdin(self.stdin.take().map_or_else(Stdio::null, Stdio::from));
        command.stdout(self.stdout.take().map_or_else(|| out("stdout"), Stdio::from)).stderr(out("stderr"));
        command
    }

    /// Starts the program and gives it back at once, ready or not.
    pub fn spawn(mut self) -> Daemon {
        let mut command = self.command();
        let _only_one = spawning();
        for fd in &self.fds {
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty())).expect("make a descriptor inheritable");
        }
        let child = command.spawn().unwrap_or_else(|error| panic!("start {}: {error}", self.program.display()));
        for fd in &self.fds {
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).expect("make a descriptor private");
        }
        self.fds.clear();
        Daemon { dir: self.dir, child, ended: None, refusals: self.refusals }
    }

    /// Starts the program and waits until it serves; fails the test when it ends instead.
    pub fn start(self) -> Daemon {
        self.spawn_ready(|daemon| {
            let text = std::fs::read_to_string(daemon.path(PIDFILE)).unwrap_or_default();
            text.trim_end().parse() == Ok(daemon.pid())
        })
    }

    /// Starts the program with the pid file `ready.pid` and waits until `ready` says so.
    pub fn spawn_ready(self, ready: impl Fn(&Daemon) -> bool) -> Daemon {
        let mut daemon = self.line(&format!("--pidfile {PIDFILE}")).spawn();
        wait_for("the daemon to write its pid file", || {
            if let Some(status) = daemon.ended() {
                panic!("the daemon ended with {status} before it served: {}", daemon.stderr());
            }
            ready(&daemon).then_some(())
        });
        daemon
    }

    /// Runs the program to its end; fails the test when it does not end.
    pub fn run(self) -> Ended {
        let mut daemon = self.spawn();
        let status = daemon.wait();
        Ended { status, stdout: daemon.stdout(), stderr: daemon.stderr() }
    }
}

/// A running daemon, killed when it goes out of scope.
pub struct Daemon {
    dir: TempDir,
    child: Child,
    ended: Option<ExitStatus>,
    refusals: bool,
}

impl Daemon {
    /// A file in the daemon's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has written to standard output so far.
    pub fn stdout(&self) -> String {
        read_lossy(&self.path("stdout"))
    }

    /// What it has written to standard error so far.
    pub fn stderr(&self) -> String {
        read_lossy(&self.path("stderr"))
    }

    /// A connection to its monitor, past the negotiation.
    pub fn qmp(&self) -> qmp::Client {
        let mut client = self.qmp_raw();
        client.negotiate();
        client
    }

    /// A connection to its monitor, with the greeting still to come.
    pub fn qmp_raw(&self) -> qmp::Client {
        qmp::Client::connect(&self.path("qmp.sock"))
    }

    /// A connection of our own small NBD client to its server, with the greeting still to come.
    pub fn nbd(&self) -> nbd::Client {
        nbd::Client::connect_unix(&self.path("nbd.sock"))
    }

    /// The address of an export for the programs of others.
    pub fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.path("nbd.sock").display())
    }

    /// Its end, when it has ended.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().expect("wait for the daemon");
        }
        self.ended
    }

    /// Whether it still runs; a test of bad input asks this last.
    pub fn alive(&mut self) -> bool {
        self.ended().is_none()
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> ExitStatus {
        let limit = crate::DEADLINE;
        wait_within(limit, || self.ended()).unwrap_or_else(|| {
            panic!("the daemon did not end; it wrote: {}", self.stderr());
        })
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).expect("a process id");
        kill(Pid::from_raw(pid), signal).expect("send a signal");
    }

    /// Ends it with SIGTERM and checks that it ended as it should; gives what it wrote to standard error.
    pub fn stop(&mut self) -> String {
        self.signal(Signal::SIGTERM);
        let status = self.wait();
        assert!(status.success(), "SIGTERM ended the daemon with {status}: {}", self.stderr());
        self.stderr()
    }

    /// Kills it as a crash would.
    pub fn crash(&mut self) {
        self.signal(Signal::SIGKILL);
        self.wait();
    }

    /// Its user and system time so far, all threads together, in clock ticks.
    pub fn cpu_ticks(&self) -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).expect("read the process's stat");
        let fields = stat.rsplit(')').next().unwrap_or_default();
        // [proc(5)] utime and stime are fields 14 and 15; the text after the name starts with field 3.
        fields.split_whitespace().skip(11).take(2).map(|tick| tick.parse::<u64>().expect("ticks")).sum()
    }

    /// What it has of the system at this moment.
    pub fn usage(&self) -> Usage {
        let status =
            std::fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("read the process's status");
        // [proc(5)] Sizes are in KiB.
        let number = |name: &str| {
            let line =
                status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).expect("a known field");
            line.split_whitespace().next().and_then(|number| number.parse().ok()).expect("a number")
        };
        Usage {
            memory_kib: number("VmRSS"),
            peak_kib: number("VmHWM"),
            threads: number("Threads"),
            descriptors: self.open_fds(),
        }
    }

    /// How many threads it has, and how many mappings of memory.
    pub fn threads_and_mappings(&self) -> (usize, usize) {
        let threads = std::fs::read_dir(format!("/proc/{}/task", self.pid())).expect("list its threads").count();
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", self.pid())).expect("list its mappings");
        (threads, maps.lines().count())
    }

    /// How many descriptors it has open.
    pub fn open_fds(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid())).expect("list its descriptors").count()
    }
}

/// What a process has of the system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Memory that is there, in KiB.
    pub memory_kib: u64,
    /// The most that it ever was.
    pub peak_kib: u64,
    /// Threads.
    pub threads: u64,
    /// Open descriptors.
    pub descriptors: usize,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if self.ended.is_none() {
            // The child is ours and not yet waited for, so its id is still its own.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        if std::thread::panicking() {
            let _ = std::io::Write::write_all(
                &mut std::io::stderr(),
                format!("the daemon's standard error: {}\n", self.stderr()).as_bytes(),
            );
        } else if !self.refusals {
            let said = self.stderr();
            assert!(!said.contains("sandbox: system call"), "the sandbox refused what serving needs: {said}");
        }
    }
}

/// The number of a descriptor for an option.
pub fn number(fd: &OwnedFd) -> i32 {
    fd.as_raw_fd()
}

fn read_lossy(path: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned()
}
