//! The cookbook's recipes, run as they stand: blocks marked `run` are executed, and what they print is compared with the block
//! marked `output` that follows.
//!
//! A recipe is a section of the page. It runs in a folder of its own, with the programs under test first on the path. A block
//! marked `background` is a daemon: the recipe goes on when the file that `until` names is there (`mount:` and a name: when
//! something is mounted on it), and ends it at its end, or before a block marked `ends`. `needs` names a program or a device
//! without which a recipe is skipped.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use tests::{on_reference, program, skip, tools, wait_for};

const PAGE: &str = include_str!("../../docs/book/src/cookbook.md");

/// A block of the page: what its first line says, and its text.
#[derive(Debug, Clone, PartialEq)]
struct Block {
    info: Vec<String>,
    text: String,
}

impl Block {
    fn has(&self, word: &str) -> bool {
        self.info.iter().any(|other| other == word)
    }
}

/// The recipes by their titles.
fn recipes() -> Vec<(String, Vec<Block>)> {
    let mut all: Vec<(String, Vec<Block>)> = Vec::new();
    let mut lines = PAGE.lines();
    while let Some(line) = lines.next() {
        if let Some(title) = line.strip_prefix("## ") {
            all.push((title.to_owned(), Vec::new()));
        } else if let Some(info) = line.strip_prefix("```") {
            let text: Vec<_> = lines.by_ref().take_while(|line| *line != "```").collect();
            let block = Block { info: info.split(' ').map(str::to_owned).collect(), text: text.join("\n") + "\n" };
            all.last_mut().expect("a title before the first block").1.push(block);
        }
    }
    all
}

/// A process group, ended when it goes out of scope.
struct Background(Child);

impl Background {
    fn end(&mut self) {
        // Only bash waits for what it started; the signal goes to all of them.
        let group = nix::unistd::Pid::from_raw(-i32::try_from(self.0.id()).unwrap());
        let _ = nix::sys::signal::kill(group, nix::sys::signal::Signal::SIGTERM);
        let _ = self.0.wait();
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.end();
    }
}

struct Kitchen {
    dir: tempfile::TempDir,
    bin: tempfile::TempDir,
    daemons: Vec<Background>,
}

impl Kitchen {
    fn new() -> Self {
        let (dir, bin) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let daemon = program::under_test();
        let mut programs = vec![(daemon.to_owned(), "qemu-storage-daemon")];
        programs.push((daemon.with_file_name("qemu-pr-helper"), "qemu-pr-helper"));
        for (program, name) in programs {
            std::os::unix::fs::symlink(program, bin.path().join(name)).unwrap();
        }
        Self { dir, bin, daemons: Vec::new() }
    }

    fn command(&self, block: &Block) -> Command {
        let interpreter = if block.info[0] == "python" { "python3" } else { "bash" };
        let path = format!("{}:{}", self.bin.path().display(), std::env::var("PATH").unwrap_or_default());
        let mut command = Command::new("timeout");
        command.args(["-k", "5", "60", interpreter]);
        // Bash runs the last command in its own place, so that a signal reaches the daemon and its status is the block's.
        let text = if interpreter == "bash" { format!("set -eu\n{}", block.text) } else { block.text.clone() };
        command.args(["-c", &text]).env("PATH", path).current_dir(self.dir.path()).stdin(Stdio::null());
        command.process_group(0);
        command
    }

    fn start(&mut self, block: &Block) {
        let child = self.command(block).stdout(Stdio::null()).spawn().expect("start bash");
        self.daemons.push(Background(child));
        let until = block.info.iter().find_map(|word| word.strip_prefix("until=")).expect("what the block waits for");
        let (mount, name) = until.strip_prefix("mount:").map_or((false, until), |name| (true, name));
        let path = self.dir.path().join(name);
        let is_there = || if mount { is_mounted(&path) } else { path.exists() };
        wait_for("the daemon of a recipe to serve", || is_there().then_some(()));
    }

    fn run(&self, block: &Block) -> String {
        let mut command = self.command(block);
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("start an interpreter");
        let ended = child.wait_with_output().expect("wait for a block");
        let (out, err) = (String::from_utf8_lossy(&ended.stdout), String::from_utf8_lossy(&ended.stderr));
        assert!(ended.status.success(), "{}\n{}: {out}{err}", block.text, ended.status);
        out.replace("\r\n", "\n")
    }
}

/// Whether something is mounted on that file.
fn is_mounted(path: &Path) -> bool {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    mounts.lines().any(|line| line.split(' ').nth(4) == path.to_str())
}

/// Whether a program, or a device by its path, is there.
fn is_there(name: &str) -> bool {
    if name.starts_with('/') { std::fs::File::open(name).is_ok() } else { tools::installed(name) }
}

/// What a block says that it prints: a line `...` stands for anything in one line.
fn agrees(printed: &str, said: &str) -> bool {
    let (mut printed, mut said) = (printed.trim_end().lines(), said.trim_end().lines());
    loop {
        match (printed.next(), said.next()) {
            (None, None) => return true,
            (Some(_), Some("...")) => {}
            (Some(one), Some(other)) if one.trim_end() == other.trim_end() => {}
            _ => return false,
        }
    }
}

fn cook(title: &str) {
    let needed = ["socat", "nbdinfo", "nbdcopy", "qemu-io", "qemu-img", "python3"];
    if let Some(missing) = needed.iter().find(|name| !tools::installed(name)) {
        skip!("{missing} is not installed");
    }
    let recipes = recipes();
    let (_, blocks) = recipes.iter().find(|(other, _)| other == title).expect("the recipe is on the page");
    let needs = blocks.iter().flat_map(|block| &block.info).filter_map(|word| word.strip_prefix("needs="));
    if let Some(missing) = needs.into_iter().find(|name| !is_there(name)) {
        skip!("there is no {missing}");
    }
    let helper = |block: &&Block| block.has("run") && block.text.contains("qemu-pr-helper");
    if on_reference() && blocks.iter().any(|block| block.has("ours") || helper(&block)) {
        skip!("the reference does not have what this recipe needs");
    }
    let mut kitchen = Kitchen::new();
    let mut printed = String::new();
    for block in blocks {
        if block.has("background") {
            kitchen.start(block);
        } else if block.has("run") {
            if block.has("ends") {
                kitchen.daemons.clear();
            }
            printed = kitchen.run(block);
        } else if block.has("output") {
            assert!(agrees(&printed, &block.text), "the page says:\n{}\nbut it is:\n{printed}", block.text);
        }
    }
    check_quiet(kitchen.dir.path());
}

/// Nothing in a recipe's folder says that something has crashed.
fn check_quiet(dir: &Path) {
    let core =
        std::fs::read_dir(dir).unwrap().flatten().any(|entry| entry.file_name().to_string_lossy().starts_with("core"));
    assert!(!core, "a program has crashed");
}

#[test]
fn every_block_is_run_or_says_why_not() {
    let recipes = recipes();
    assert!(recipes.len() > 10);
    for (title, blocks) in &recipes {
        assert!(TITLES.contains(&title.as_str()), "no test runs '{title}'");
        for block in blocks {
            let known = block.has("run") || block.has("output") || (block.has("not-run") && block.info.len() > 3);
            assert!(known, "'{title}': {:?} is neither run, nor output, nor not-run with a reason", block.info);
        }
    }
    assert_eq!(recipes.len(), TITLES.len());
}

macro_rules! recipes {
    ($($test:ident: $title:literal,)*) => {
        const TITLES: &[&str] = &[$($title),*];
        $(#[test]
        fn $test() {
            cook($title);
        })*
    };
}

recipes! {
    monitor: "A monitor on a socket",
    passed_listener: "A monitor whose socket is there before the daemon",
    passed_connection: "QMP over a connection that nobody else can reach",
    given_everything: "A daemon that may open nothing",
    raw_over_nbd: "A raw image over NBD",
    passed_nbd_listener: "An NBD server whose socket is there before the daemon",
    vhost_user_blk: "A qcow2 image as a vhost-user-blk device",
    fuse: "A qcow2 image that appears as a raw image",
    background: "A daemon in the background, ended by its pid file",
    help: "What there is to choose from",
    overlay: "A qcow2 overlay: what is written stays out of the base",
    snapshot: "A snapshot while clients write",
    copy_on_read: "An overlay that fills by itself",
    throttle: "Two exports that share a limit",
    quorum: "Three copies, one of them damaged",
    faults: "A disk that fails",
    compress: "An image that is compressed while it is written",
    log: "Every write, in order",
    reservations: "Persistent reservations for a daemon without privileges",
}
