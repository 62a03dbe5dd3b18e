//! The units: systemd's own tools read them, where they are installed.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs, reason = "a test fails by panicking")]

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// What each service may be exposed at most, in tenths, by the measure of `systemd-analyze security`.
const EXPOSURE: &str = "--threshold=15";

fn units() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../systemd")
}

/// A program of systemd, or a line that says that the test is skipped.
fn tool(name: &str) -> Option<Command> {
    let found = Command::new(name).arg("--version").output().is_ok_and(|o| o.status.success());
    if !found {
        eprintln!("skipped: no {name} here");
    }
    found.then(|| Command::new(name))
}

/// The units in a folder of their own, with programs that exist here.
fn copied() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(units()).unwrap() {
        let path = entry.unwrap().path();
        let text = fs::read_to_string(&path).unwrap();
        let text = text.replace("/usr/bin/qemu-pr-helper", env!("CARGO_BIN_EXE_qemu-pr-helper"));
        let text = text.replace("/usr/bin/qemu-storage-daemon", "/bin/true");
        fs::write(folder.path().join(path.file_name().unwrap()), text).unwrap();
    }
    folder
}

fn with(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let all = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut found: Vec<_> = all.filter(|path| path.extension() == Some(OsStr::new(extension))).collect();
    found.sort();
    assert!(!found.is_empty());
    found
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn units_are_well_formed() {
    let Some(mut analyze) = tool("systemd-analyze") else { return };
    let folder = copied();
    let units = [with(folder.path(), "service"), with(folder.path(), "socket")].concat();
    let path = format!("{}:", folder.path().display());
    let output = analyze.args(["verify", "--man=no"]).args(units).env("SYSTEMD_UNIT_PATH", path).output().unwrap();
    assert!(output.status.success() && text(&output).is_empty(), "{}", text(&output));
}

#[test]
fn services_are_hardly_exposed() {
    let folder = copied();
    for unit in with(folder.path(), "service") {
        let Some(mut analyze) = tool("systemd-analyze") else { return };
        let output = analyze.args(["security", "--offline=yes", EXPOSURE]).arg(&unit).output().unwrap();
        assert!(output.status.success(), "{}", text(&output));
        assert!(text(&output).contains("Overall exposure level"), "{}", text(&output));
    }
}

#[test]
fn users_and_folders_can_be_made() {
    let (Some(mut sysusers), Some(mut tmpfiles)) = (tool("systemd-sysusers"), tool("systemd-tmpfiles")) else { return };
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: making users in a folder needs root");
        return;
    }
    let root = tempfile::tempdir().unwrap();
    fs::create_dir_all(root.path().join("etc")).unwrap();
    let root_option = format!("--root={}", root.path().display());
    for (command, file) in
        [(&mut sysusers, "qemu-storage.sysusers.conf"), (tmpfiles.arg("--create"), "qemu-storage.tmpfiles.conf")]
    {
        let output = command.arg(&root_option).arg(units().join(file)).output().unwrap();
        assert!(output.status.success(), "{file}: {}", text(&output));
    }
    let users = fs::read_to_string(root.path().join("etc/passwd")).unwrap();
    assert!(users.contains("qemu-pr-helper:") && users.contains("qemu-storage-daemon:"), "{users}");
    assert!(root.path().join("var/lib/qemu-storage-daemon").is_dir());
}
