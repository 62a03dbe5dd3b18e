//! The command line: the reference's options, then this program's own.

use crate::log::Audit;
use clap::{ArgAction, Parser, ValueEnum};
use std::path::{Path, PathBuf};

/// The socket without `--socket`.
pub const DEFAULT_SOCKET: &str = "/var/run/qemu-pr-helper.sock";

/// The pid file of `--daemon` without `--pidfile`.
pub const DEFAULT_PIDFILE: &str = "/var/run/qemu-pr-helper.pid";

/// What the sandbox does with a refused system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Sandbox {
    /// One line that names the call, and the end of the process.
    Default,
    /// The kernel logs the call and lets it pass; for development.
    Log,
    /// No system call filter and no Landlock; capabilities and user are dropped all the same.
    Off,
}

/// Persistent reservation helper: issues SCSI PERSISTENT RESERVE commands for QEMU and the storage daemon.
#[derive(Debug, Parser)]
// As getopt_long has it: long names may be cut short, and what is given twice counts as given last.
#[command(infer_long_args = true, args_override_self = true)]
#[command(name = "qemu-pr-helper", version, disable_version_flag = true, max_term_width = 100)]
pub struct Options {
    /// Run in the background (and create a pid file).
    #[arg(short, long)]
    pub daemon: bool,

    /// Leave audit lines only for commands that change something.
    #[arg(short, long)]
    pub quiet: bool,

    /// Tell about connections.
    #[arg(short, long)]
    pub verbose: bool,

    /// Pid file; written with this option or with --daemon.
    #[arg(short = 'f', long, value_name = "PATH", help = format!("Pid file when running as a daemon [default: {DEFAULT_PIDFILE}]"))]
    pub pidfile: Option<PathBuf>,

    /// Path of the Unix socket, absolute; not with socket activation.
    #[arg(short = 'k', long, aliases = ["s", "so", "soc", "sock", "socke"], value_name = "PATH", help = format!("Path of the Unix socket, absolute [default: {DEFAULT_SOCKET}]"))]
    pub socket: Option<PathBuf>,

    /// Trace events: [enable=]PATTERN[,events=FILE][,file=FILE], or help.
    #[arg(short = 'T', long, value_name = "SPEC")]
    pub trace: Vec<String>,

    /// User to drop privileges to, by name or number.
    #[arg(short, long, value_name = "USER")]
    pub user: Option<String>,

    /// Group to drop privileges to, by name or number [default: the user's].
    #[arg(short, long, value_name = "GROUP")]
    pub group: Option<String>,

    /// Display version information and exit.
    #[arg(short = 'V', long, action = ArgAction::Version)]
    version: Option<bool>,

    /// Permissions of the socket, in octal [default: as the umask has it].
    #[arg(long, value_name = "MODE", value_parser = mode)]
    pub socket_mode: Option<u32>,

    /// User who owns the socket.
    #[arg(long, value_name = "USER")]
    pub socket_user: Option<String>,

    /// Group of the socket.
    #[arg(long, value_name = "GROUP")]
    pub socket_group: Option<String>,

    /// Security label of the socket's path, as SELinux spells it (user:role:type:level).
    #[arg(long, value_name = "LABEL")]
    pub socket_label: Option<String>,

    /// Seconds until a client is answered, whatever its device does.
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub timeout: u64,

    /// Seconds after which a silent connection is closed; 0 for never.
    #[arg(long, value_name = "SECONDS", default_value_t = 0, value_parser = clap::value_parser!(u64).range(0..=604_800))]
    pub idle_timeout: u64,

    /// The most connections.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub max_connections: u16,

    /// Commands that run at a time, on all devices together.
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub max_commands: u16,

    /// Rules in JSON: who may do what on which device.
    #[arg(long, value_name = "FILE")]
    pub policy: Option<PathBuf>,

    /// A rule: user=, group=, unit=, device=, action=, key= with values joined by '+', parts by ','.
    #[arg(long, value_name = "RULE")]
    pub allow: Vec<String>,

    /// The same, refusing; goes before every --allow.
    #[arg(long, value_name = "RULE")]
    pub deny: Vec<String>,

    /// Which commands leave a line in JSON on standard error [default: all; with --quiet changes].
    #[arg(long, value_name = "WHICH")]
    pub audit: Option<Audit>,

    /// What becomes of a system call that the helper does not need.
    #[arg(long, value_name = "MODE", default_value = "default")]
    pub sandbox: Sandbox,
}

impl Options {
    /// Which commands leave an audit line.
    pub fn audit(&self) -> Audit {
        self.audit.unwrap_or(if self.quiet { Audit::Changes } else { Audit::All })
    }

    /// Is anything said about the socket that is made?
    pub fn shapes_socket(&self) -> bool {
        let texts = [&self.socket_user, &self.socket_group, &self.socket_label];
        self.socket_mode.is_some() || texts.iter().any(|text| text.is_some())
    }

    /// The pid file, if there is to be one.
    pub fn pidfile(&self) -> Option<&Path> {
        self.pidfile.as_deref().or(self.daemon.then_some(Path::new(DEFAULT_PIDFILE)))
    }
}

fn mode(text: &str) -> Result<u32, String> {
    u32::from_str_radix(text, 8).ok().filter(|m| *m <= 0o777).ok_or_else(|| "not a mode from 0 to 777".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<Options, clap::Error> {
        Options::try_parse_from([&["qemu-pr-helper"], args].concat())
    }

    #[test]
    fn reference_options() {
        let o = parse(&["-d", "-q", "-v", "-f/p", "-k", "/s", "-u", "nobody", "-g", "1"]).unwrap();
        assert!(o.daemon && o.quiet && o.verbose);
        assert_eq!((o.pidfile(), o.socket.as_deref()), (Some(Path::new("/p")), Some(Path::new("/s"))));
        assert_eq!((o.user.as_deref(), o.group.as_deref()), (Some("nobody"), Some("1")));
        assert_eq!(o.audit(), Audit::Changes);
        let o = parse(&["--pidfile=/p", "--socket=/s", "--user=x", "--group=y"]).unwrap();
        assert_eq!(o.pidfile(), Some(Path::new("/p")));
        let o = parse(&["-vvq", "-v", "--sock=/a", "--socket", "/b", "--pid", "/p", "--dae", "-T", "a", "-T", "b"]);
        let o = o.unwrap();
        assert_eq!((o.pidfile(), o.socket.as_deref()), (Some(Path::new("/p")), Some(Path::new("/b"))));
        assert!(o.daemon && o.quiet && o.verbose && o.trace == ["a", "b"]);
        assert_eq!(parse(&[]).unwrap().pidfile(), None);
        assert_eq!(parse(&["--daemon"]).unwrap().pidfile(), Some(Path::new(DEFAULT_PIDFILE)));
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for args in
            [&["-Z"][..], &["extra"], &["-k"], &["--help=3"], &["--timeout=0"], &["--socket-mode=999"], &["--audit=x"]]
        {
            assert!(parse(args).is_err(), "{args:?}");
        }
    }
}
