//! The vhost-user-blk export [drop-in A.6, vhost-user specification, virtio 1.2 §5.2], against a front-end that can break
//! every rule. A QEMU guest uses the same export in `tests/vm/host-vhost-user-blk`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

mod activation;
mod churn;
mod device;
mod errors;
mod foreign;
mod hostile;
mod lifecycle;
mod lingering;
mod recovery;
mod requests;

use std::path::PathBuf;
use tests::vhost::FrontEnd;
use tests::{Daemon, Setup};

const MIB: u64 = 1 << 20;

/// A daemon that exports a file of 8 MiB, with more options for the export.
fn serving(options: &str) -> Daemon {
    setup(options).start()
}

fn setup(options: &str) -> Setup {
    Setup::new()
        .qmp()
        .image("disk.img", 8 * MIB)
        .line("--blockdev driver=file,node-name=disk,filename=disk.img,discard=unmap")
        .line(&export(options))
}

fn export(options: &str) -> String {
    let comma = if options.is_empty() { "" } else { "," };
    format!("--export vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path=vhost.sock{comma}{options}")
}

fn socket(daemon: &Daemon) -> PathBuf {
    daemon.path("vhost.sock")
}

/// A front-end with everything that is offered.
fn client(daemon: &Daemon) -> FrontEnd {
    FrontEnd::start(&socket(daemon), 1, 0)
}

/// A small number as a byte of data.
fn byte(number: impl TryInto<u8>) -> u8 {
    number.try_into().ok().unwrap()
}
