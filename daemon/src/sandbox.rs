//! What the daemon gives up before it serves: which limits hold for which thread, and what the command line leaves open.
//!
//! The steps and their order are the crate `sandbox`'s, the lists of system calls its `policies/daemon.json`. Here is decided
//! what is asked of it: `default` takes nothing that a monitor's command could need later; `strict` leaves what the command
//! line names. The limits of `strict` are found by reading the options' texts, before anything is opened: options that
//! turn out to be wrong are refused later, in their turn.

use crate::cli::{Kind, Step};
use io::threads::{self, Role};
use qapi::keyval::{self, Parsed};
use qapi::opts::Opts;
use qapi::types::control::{SandboxFiles, SandboxInfo, SandboxMode, SandboxOptions};
use qapi::{Error, Result, Value};
use sandbox::files::{Enforcement, Files, Rule};
use sandbox::syscall::{self, Filters, Mode, Refusal};
use sandbox::{Capability, Plan};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Without the option.
pub const DEFAULT: SandboxOptions = SandboxOptions { mode: SandboxMode::Default, paths: None };

/// What a daemon that is run as root keeps, each for a use that QEMU's has as well. Everything else goes.
const KEPT: &[Capability] = &[
    // Images that belong to somebody else.
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_DAC_READ_SEARCH,
    // A stale socket of somebody else's in a folder like /tmp, in the way of ours.
    Capability::CAP_FOWNER,
    // Commands to SCSI devices.
    Capability::CAP_SYS_RAWIO,
    // TCP ports below 1024.
    Capability::CAP_NET_BIND_SERVICE,
    // Memory of rings, on kernels that count it.
    Capability::CAP_IPC_LOCK,
];

/// What the policy calls a role.
const fn name(role: Role) -> &'static str {
    match role {
        Role::Control => "control",
        Role::IoThread => "iothread",
        Role::Worker => "worker",
        Role::Connector => "connector",
        Role::Reservations => "reservations",
        Role::Starter => "starter",
    }
}

/// What will be given up.
#[derive(Debug)]
pub struct Confinement {
    mode: SandboxMode,
    files: Files,
    inet: bool,
    mounts: Mounts,
}

/// What the process that mounts is there for.
#[derive(Debug)]
enum Mounts {
    /// Nobody can ask for an export that mounts.
    None,
    /// A monitor can ask for any.
    All,
    /// The command line names them.
    At(Vec<PathBuf>),
}

/// What was given up.
#[derive(Debug)]
pub struct InForce {
    mode: SandboxMode,
    system_calls: bool,
    files: Enforcement,
    capabilities: Vec<Capability>,
}

impl Default for InForce {
    /// Nothing.
    fn default() -> Self {
        Self { mode: SandboxMode::Off, system_calls: false, files: Enforcement::None, capabilities: Vec::new() }
    }
}

impl InForce {
    /// For `x-query-sandbox`.
    pub fn info(&self) -> SandboxInfo {
        let name = |capability: &Capability| capability.to_string().to_lowercase();
        SandboxInfo {
            mode: self.mode,
            system_calls: self.system_calls,
            files: match self.files {
                Enforcement::Full => SandboxFiles::Full,
                Enforcement::Partial => SandboxFiles::Partial,
                Enforcement::None => SandboxFiles::Unrestricted,
            },
            no_new_privileges: self.mode != SandboxMode::Off,
            capabilities: self.capabilities.iter().map(name).collect(),
            refused: syscall::refused_calls().into_iter().map(str::to_owned).collect(),
        }
    }
}

impl Confinement {
    /// Reads off the options what `strict` leaves open.
    pub fn new(options: &SandboxOptions, steps: &[Step], pidfile: Option<&str>) -> Self {
        let mut named = Named::default();
        if options.mode == SandboxMode::Strict {
            named.own();
            steps.iter().for_each(|step| named.step(step));
            if let Some(path) = pidfile {
                named.existing(path, Rule::Use);
                named.folder(path, Rule::Name);
            }
            for path in options.paths.iter().flatten() {
                named.existing(path, if Path::new(path).is_dir() { Rule::Keep } else { Rule::Use });
            }
        }
        let asks = |step: &Step| match step.kind {
            Kind::Monitor => true,
            Kind::Export => step.value.contains("fuse"),
            _ => false,
        };
        let mounts = match options.mode {
            SandboxMode::Default if steps.iter().any(asks) => Mounts::All,
            SandboxMode::Strict if !named.mountpoints.is_empty() => Mounts::At(named.mountpoints),
            _ => Mounts::None,
        };
        Self { mode: options.mode, files: named.files, inet: named.inet || options.mode != SandboxMode::Strict, mounts }
    }

    /// Whether the process will not open files that nobody named.
    pub fn is_strict(&self) -> bool {
        self.mode == SandboxMode::Strict
    }

    /// Gives it up. Each thread that is started from now on takes on the limits of its role; this one does so when it
    /// calls [`threads::enter`]. The process must have one thread.
    ///
    /// # Errors
    /// The kernel refuses a step, or for `strict` has not what it takes.
    pub fn take_on(&self) -> Result<InForce> {
        let strict = self.mode == SandboxMode::Strict;
        if self.mode == SandboxMode::Off {
            return Ok(InForce::default());
        }
        let failed = |error: sandbox::Error| Error::generic(error.to_string());
        let filters = syscall::supported();
        if !filters {
            let text = "sandbox: the kernel cannot filter system calls";
            if strict {
                return Err(Error::generic(text));
            }
            // Who does not read it can still ask by x-query-sandbox.
            let _ = writeln!(std::io::stderr(), "qemu-storage-daemon: warning: {text}");
        }
        self.start_mounter()?;
        let report = sandbox::confine(&Plan {
            open_files: None,
            secret: strict,
            identity: None,
            capabilities: if strict { &[] } else { KEPT },
            files: strict.then_some(&self.files),
        })
        .map_err(failed)?;
        if strict && report.files == Enforcement::None {
            return Err(Error::generic("sandbox: the kernel has no Landlock"));
        }
        if filters {
            let then = if strict { Refusal::End } else { Refusal::Fail(&syscall::DAEMON) };
            let filters = self.filters();
            syscall::name_refused_calls(then).map_err(failed)?;
            filters.hide_absent_calls().map_err(failed)?;
            let enter = move |role| {
                if role == Role::Starter {
                    settle_allocator();
                }
                filters.enter(name(role)).map_err(std::io::Error::other)
            };
            threads::confine(enter).map_err(|error| Error::io("cannot enter the sandbox", error))?;
        }
        let capabilities = report.capabilities;
        Ok(InForce { mode: self.mode, system_calls: filters, files: report.files, capabilities })
    }

    /// Mounting takes what the next steps take away.
    fn start_mounter(&self) -> Result<()> {
        let places = match &self.mounts {
            Mounts::None => return Ok(()),
            Mounts::All => None,
            Mounts::At(places) => Some(places.clone()),
        };
        if !Path::new("/dev/fuse").exists() {
            return Ok(());
        }
        io::mounter::start(places).map_err(|error| Error::io("cannot start the process that mounts", error))
    }

    fn filters(&self) -> Filters {
        let options: &[_] = if self.inet { &["inet"] } else { &[] };
        syscall::DAEMON.filters(options, Mode::Enforce)
    }
}

/// The first time that an allocator's arena other than the first one shrinks, glibc reads /proc/sys/vm/overcommit_memory,
/// and never again. That must not be tried first by a thread that may open nothing, so it happens here.
fn settle_allocator() {
    // Below the size from which each allocation is a mapping of its own, together above what an arena keeps.
    let blocks: Vec<Vec<u8>> = (0..16).map(|_| Vec::with_capacity(64 << 10)).collect();
    drop(std::hint::black_box(blocks));
}

/// What the command line names, as far as it was read.
#[derive(Debug, Default)]
struct Named {
    files: Files,
    inet: bool,
    mountpoints: Vec<PathBuf>,
}

/// How a path under a key is used.
#[derive(Debug, Clone, Copy)]
enum Usage {
    /// Read and written; it is there.
    Image,
    /// Read and written, made if it is not there.
    Made,
    /// Read.
    Read,
}

/// The keys under which options name files; everything else is a name, a number or a word.
const KEYS: &[(&str, Usage)] = &[
    ("filename", Usage::Image),
    ("mountpoint", Usage::Image),
    ("logfile", Usage::Made),
    ("in", Usage::Image),
    ("out", Usage::Made),
    ("input-path", Usage::Image),
    ("config", Usage::Read),
    ("file", Usage::Read),
    ("dir", Usage::Read),
];

type MakeRule = fn(PathBuf) -> Rule;

/// What the process itself needs, whatever it serves.
const OWN: &[(&str, MakeRule)] = &[
    ("/dev/null", Rule::Use),
    ("/proc/self", Rule::Read),
    ("/proc/sys", Rule::Read),
    ("/sys/dev/block", Rule::Read),
    ("/sys/devices", Rule::Read),
];

/// What resolving names needs.
const NAMES: &[&str] = &[
    "/etc/hosts",
    "/etc/host.conf",
    "/etc/resolv.conf",
    "/etc/nsswitch.conf",
    "/etc/services",
    "/etc/gai.conf",
    "/etc/ld.so.cache",
    "/run/systemd/resolve",
    "/usr/lib",
    "/usr/lib64",
    "/lib",
    "/lib64",
];

/// DNS over TCP, and in that of the resolver's cache.
const DNS: u16 = 53;

impl Named {
    fn own(&mut self) {
        OWN.iter().for_each(|(path, rule)| self.existing(path, rule));
    }

    /// A path that is there; what is not cannot be opened later either, unless its folder is named.
    fn existing(&mut self, path: &str, rule: impl Fn(PathBuf) -> Rule) {
        if let Ok(path) = std::path::absolute(path)
            && path.exists()
            && !self.files.rules.contains(&rule(path.clone()))
        {
            self.files.rules.push(rule(path));
        }
    }

    /// The folder of a path that the process makes.
    fn folder(&mut self, path: &str, rule: impl Fn(PathBuf) -> Rule) {
        if let Some(folder) = std::path::absolute(path).ok().as_deref().and_then(Path::parent).and_then(Path::to_str) {
            self.existing(folder, rule);
        }
    }

    fn step(&mut self, step: &Step) {
        let implied = match step.kind {
            Kind::Blockdev => "driver",
            Kind::Export => "type",
            Kind::Object => "qom-type",
            Kind::NbdServer => "addr",
            Kind::Chardev => {
                // A text that is wrong is refused in its turn.
                if let Ok(opts) = Opts::parse(&step.value, "backend") {
                    self.chardev(&opts);
                }
                return;
            }
            Kind::Monitor | Kind::Sandbox | Kind::Trace | Kind::Unexpected => return,
        };
        let value = match keyval::parse(&step.value, Some(implied)) {
            Ok(Parsed::Json(text)) => qmp::parser::parse(text).ok(),
            Ok(Parsed::Keyval(value)) => Some(value),
            Ok(Parsed::Help(_)) | Err(_) => None,
        };
        if let Some(value) = value {
            let listens = matches!(step.kind, Kind::NbdServer | Kind::Export);
            self.value(&value, listens);
        }
    }

    /// All paths and addresses in an option; `listens` tells what its addresses are for.
    fn value(&mut self, value: &Value, listens: bool) {
        if let Some(list) = value.as_array() {
            list.iter().for_each(|value| self.value(value, listens));
        }
        let Some(object) = value.as_object() else { return };
        let text = |key: &str| object.get(key).and_then(Value::as_str);
        for (key, how) in KEYS {
            if let Some(path) = text(key) {
                self.path(path, *how);
            }
        }
        if let Some(path) = text("path")
            && listens
        {
            self.folder(path, Rule::Name);
        }
        if let Some(path) = text("mountpoint") {
            // As the export names it: without links in its folder.
            let path = Path::new(path);
            let folder =
                path.parent().map(|folder| if folder.as_os_str().is_empty() { Path::new(".") } else { folder });
            let real = folder.and_then(|folder| folder.canonicalize().ok()).zip(path.file_name());
            self.mountpoints.extend(real.map(|(folder, name)| folder.join(name)));
            self.mountpoints.extend(path.canonicalize());
            self.existing("/dev/fuse", Rule::Use);
        }
        if let Some(port) = text("port") {
            self.port(port, text("to"), listens);
        }
        self.files.abstract_sockets |= object.get("abstract").is_some();
        self.inet |= text("cid").is_some();
        object.values().for_each(|value| self.value(value, listens));
    }

    fn chardev(&mut self, opts: &Opts) {
        let server = !matches!(opts.get("server"), None | Some("off"));
        match (opts.get("backend"), opts.get("path")) {
            (Some("socket"), Some(path)) if server => self.folder(path, Rule::Name),
            (Some("socket"), _) => {}
            (_, Some(path)) => self.path(path, Usage::Made),
            _ => {}
        }
        for (key, how) in KEYS {
            if let Some(path) = opts.get(key) {
                self.path(path, *how);
            }
        }
        if let Some(port) = opts.get("port") {
            self.port(port, opts.get("to"), server);
        }
        self.files.abstract_sockets |= opts.get("abstract").is_some();
        self.inet |= opts.get("cid").is_some();
    }

    fn path(&mut self, path: &str, how: Usage) {
        match how {
            Usage::Read => self.existing(path, Rule::Read),
            Usage::Image => self.existing(path, Rule::Use),
            Usage::Made => {
                // To open the whole folder for it would be too much, so it is there when its option's turn comes.
                let made = std::fs::OpenOptions::new().create(true).append(true).open(path);
                drop(made);
                self.existing(path, Rule::Use);
            }
        }
    }

    /// An address of the internet: its ports, and what its name takes to be resolved.
    fn port(&mut self, first: &str, last: Option<&str>, listens: bool) {
        self.inet = true;
        NAMES.iter().for_each(|path| self.existing(path, Rule::Read));
        let number = |text: &str| text.parse::<u16>().ok();
        let ports = number(first).map(|first| first..=last.and_then(number).unwrap_or(first).max(first));
        let list = if listens { &mut self.files.listen } else { &mut self.files.connect };
        list.extend(ports.into_iter().flatten());
        self.files.connect.push(DNS);
    }
}
