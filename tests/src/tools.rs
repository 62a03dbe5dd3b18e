//! Running the programs of others: qemu-img, qemu-io, nbdinfo, nbdcopy, nbdsh, fio.

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use crate::daemon::{Ended, spawning};

/// Whether a program is installed.
pub fn installed(name: &str) -> bool {
    std::env::var_os("PATH").is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(name).is_file()))
}

/// Runs a program to its end, for two minutes at most, with nothing on its standard input.
pub fn run(name: &str, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Ended {
    run_in(Path::new("/"), name, args)
}

/// Runs a program like [`run`], in a directory.
pub fn run_in(dir: &Path, name: &str, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Ended {
    let mut command = Command::new("timeout");
    command.args(["-k", "5", "120", name]).args(args).current_dir(dir);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = {
        let _only_one = spawning();
        command.spawn().unwrap_or_else(|error| panic!("start {name}: {error}"))
    };
    let output = child.wait_with_output().unwrap_or_else(|error| panic!("run {name}: {error}"));
    Ended {
        status: output.status,
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Runs a program that must succeed; gives its standard output.
pub fn ok(name: &str, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> String {
    let args: Vec<_> = args.into_iter().map(|arg| arg.as_ref().to_owned()).collect();
    let ended = run(name, &args);
    assert!(ended.status.success(), "{name} {args:?}: {}\n{}{}", ended.status, ended.stdout, ended.stderr);
    ended.stdout
}

/// Runs commands in qemu-io on an image or an address of format raw; all must succeed. Gives its standard output.
pub fn qemu_io(target: &str, commands: &[&str]) -> String {
    let ended = qemu_io_try(target, commands);
    assert!(ended.status.success(), "qemu-io {commands:?} on {target}: {}{}", ended.stdout, ended.stderr);
    ended.stdout
}

/// Runs commands in qemu-io on an image or an address of format raw, and gives how it went.
pub fn qemu_io_try(target: &str, commands: &[&str]) -> Ended {
    let mut args = vec!["-f".to_owned(), "raw".to_owned()];
    for command in commands {
        args.extend(["-c".to_owned(), (*command).to_owned()]);
    }
    args.push(target.to_owned());
    run("qemu-io", args)
}

/// The Python interpreter that has libnbd's module, when there is one.
pub fn python_with_nbd() -> Option<&'static str> {
    static FOUND: OnceLock<Option<&'static str>> = OnceLock::new();
    *FOUND.get_or_init(|| {
        let has = |python: &&str| Path::new(python).is_file() && run(python, ["-c", "import nbd"]).status.success();
        ["/usr/bin/python3", "/usr/local/bin/python3"].into_iter().find(has)
    })
}

/// Runs a script in libnbd's shell, the handle `h` connected to `uri`; gives its standard output. The script fails the
/// test by failing an assertion of its own.
pub fn nbdsh(uri: &str, script: &str) -> String {
    let python = python_with_nbd().expect("python3-libnbd is not installed: apt-get install python3-libnbd");
    ok(python, ["-m", "nbd", "-u", uri, "-c", script])
}

/// Runs a script in libnbd's shell, the handle `h` not connected yet and the address in `uri`.
pub fn nbdsh_unconnected(uri: &str, script: &str) -> String {
    let python = python_with_nbd().expect("python3-libnbd is not installed: apt-get install python3-libnbd");
    ok(python, ["-m", "nbd", "-c", &format!("uri = {uri:?}\n{script}")])
}
