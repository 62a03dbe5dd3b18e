//! When the process has no descriptors left: those who are connected are served, others are as soon as there are some.
//! A test file, and so a process, of its own: the limit holds for all threads.
#![expect(clippy::unwrap_used, clippy::panic, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use block::Facts;
use common::{Server, Setup};
use export::nbd::NbdServerParams;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::fs::File;

#[test]
fn a_server_without_descriptors_serves_who_is_there_and_then_the_others() {
    let server = Server::start(NbdServerParams::default());
    server.export(Setup::new("e", true), 1 << 20, Facts::default());
    let mut early = server.connect();
    early.choose("e");
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, 64, hard).unwrap();
    let mut hoard = Vec::new();
    while let Ok(file) = File::open("/dev/null") {
        hoard.push(file);
    }
    // The client's own descriptor is the last one: the server has none to accept with.
    hoard.pop();
    let mut late = server.connect();
    for _ in 0..100 {
        assert_eq!(early.read(0, 16), Ok(vec![0; 16]));
    }
    hoard.clear();
    assert_eq!(late.choose("e").0, 1 << 20);
    assert_eq!(late.read(0, 16), Ok(vec![0; 16]));
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
}
