//! Which program is under test, and what is known about it.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The name of the program in the target directory.
const NAME: &str = "qemu-storage-daemon";

/// The daemon under test: `QSD_UNDER_TEST`, or the workspace's own binary beside the test executable.
pub fn under_test() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        if let Some(path) = std::env::var_os("QSD_UNDER_TEST") {
            return PathBuf::from(path);
        }
        let own = std::env::current_exe().expect("the path of the test executable");
        // target/PROFILE/deps/TEST-HASH or target/PROFILE/NAME
        let found = own.ancestors().skip(1).take(2).map(|dir| dir.join(NAME)).find(|path| path.is_file());
        found.unwrap_or_else(|| {
            panic!("no {NAME} beside {}; run `cargo build --bin {NAME}` first or set QSD_UNDER_TEST", own.display())
        })
    })
}

/// The reference program: `QSD_REFERENCE`, or the installed one; `None` where there is none.
pub fn reference() -> Option<PathBuf> {
    let path = std::env::var_os("QSD_REFERENCE").map_or_else(|| PathBuf::from("/usr/bin").join(NAME), PathBuf::from);
    (path.is_file() && is_reference(&path)).then_some(path)
}

/// Whether the program at `path` is QEMU's.
pub fn is_reference(path: &Path) -> bool {
    let output = Command::new(path).arg("--version").output().expect("run the program under test");
    String::from_utf8_lossy(&output.stdout).contains("QEMU Project developers")
}

/// Whether the program under test is QEMU's.
pub fn on_reference() -> bool {
    static KIND: OnceLock<bool> = OnceLock::new();
    *KIND.get_or_init(|| is_reference(under_test()))
}

/// Says whether the program under test is excused by a listed defect of the reference, and notes it when it is.
/// This project's own daemon is never excused.
pub fn known_defect(id: &str) -> bool {
    let excused = on_reference();
    if excused {
        note("DEFECT", &format!("{id}: the reference is known to fail here"));
    }
    excused
}

/// Writes a line where the person who runs the suite sees it, past the capture of the test harness.
pub fn note(kind: &str, text: &str) {
    let test = std::thread::current().name().unwrap_or("?").to_owned();
    let line = format!("{kind} {test}: {text}\n");
    // A note that cannot be written must not fail the test.
    let _ = std::io::stderr().write_all(line.as_bytes());
    if let Some(path) = std::env::var_os("TESTS_NOTES")
        && let Ok(mut log) = std::fs::OpenOptions::new().append(true).create(true).open(path)
    {
        let _ = log.write_all(line.as_bytes());
    }
}
