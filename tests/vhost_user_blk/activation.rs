//! Sockets that a service manager holds, by name [sd_listen_fds(3)]: a front-end may come before the daemon, and stays through its
//! restarts.

use super::{MIB, byte};
use nix::sys::signal::Signal;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use tests::nbd::{Client, Headers};
use tests::program::under_test;
use tests::vhost::{FrontEnd, protocol};
use tests::{Daemon, Setup, image, on_reference, skip, wait_for};

/// What a service manager does with two sockets: `LISTEN_PID` is the program's own, descriptors come from 3 on.
fn activate(image: &std::path::Path, sockets: [&UnixListener; 2]) -> Daemon {
    let [export, nbd] = sockets.map(|socket| OwnedFd::from(socket.try_clone().unwrap()));
    Setup::new()
        .limit(
            "exec 3<&0 4<&1 </dev/null >/dev/null; \
             export LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=export-disk:nbd",
        )
        .stdio(export, nbd)
        .arg("--blockdev")
        .arg(format!("driver=file,node-name=disk,filename={}", image.display()))
        .line("--nbd-server addr.type=fd,addr.str=nbd --export nbd,id=n,node-name=disk,writable=on")
        .line("--export vhost-user-blk,id=disk,node-name=disk,addr.type=fd,addr.str=export-disk,writable=on")
        .start()
}

#[test]
fn front_ends_wait_for_the_daemon_and_outlive_it() {
    if on_reference() {
        skip!("the reference knows no names of sockets");
    }
    let here = Setup::new().image("disk.img", 8 * MIB);
    let (path, nbd_path, disk) = (here.path("export.sock"), here.path("nbd.sock"), here.path("disk.img"));
    let sockets = [UnixListener::bind(&path).unwrap(), UnixListener::bind(&nbd_path).unwrap()];
    // Both connect to what nobody serves yet.
    let mut front = FrontEnd::connect(&path);
    let early = Client::connect_unix(&nbd_path);
    let mut daemon = activate(&disk, [&sockets[0], &sockets[1]]);
    front.negotiate(u64::MAX, u64::MAX);
    assert_ne!(front.protocol & protocol::INFLIGHT_SHMFD, 0);
    front.share_memory();
    front.make_inflight(1, 128);
    front.add_queue(0, 128);
    front.write(0, &[1; 512]);
    let (mut client, export) = early.open("disk", Headers::Simple);
    assert_eq!((export.size, client.read(0, 512)), (8 * MIB, vec![1; 512]));
    for life in 2..5 {
        daemon.crash();
        wait_for("the image to be free", || tests::locks::read_locked_bytes(&disk).is_empty().then_some(()));
        front.reconnect(&path);
        daemon = activate(&disk, [&sockets[0], &sockets[1]]);
        front.negotiate(u64::MAX, u64::MAX);
        front.share_memory();
        front.set_inflight();
        front.start_queue(0, 0);
        assert_eq!(front.read(0, 512), [byte(life - 1); 512]);
        front.write(0, &[byte(life); 512]);
        let (mut client, _) = Client::connect_unix(&nbd_path).open("disk", Headers::Simple);
        assert_eq!(client.read(0, 512), [byte(life); 512]);
    }
    daemon.stop();
    assert!(path.exists() && nbd_path.exists(), "the sockets are the manager's");
    assert_eq!(image::contents(&disk)[..512], [4; 512]);
}

/// systemd's own activator, which starts the daemon when somebody connects.
#[test]
fn systemd_starts_the_daemon_for_a_front_end() {
    let activator = Path::new("/usr/bin/systemd-socket-activate");
    if on_reference() || !activator.exists() {
        skip!("there is no systemd-socket-activate, or the daemon knows no names of sockets");
    }
    let setup = Setup::of(activator).image("disk.img", 8 * MIB);
    let (path, nbd_path) = (setup.path("export.sock"), setup.path("nbd.sock"));
    let mut daemon = setup
        .arg("-l")
        .arg(&path)
        .arg("-l")
        .arg(&nbd_path)
        .line("--fdname=export-disk:nbd")
        .arg(under_test())
        .line("--blockdev driver=file,node-name=disk,filename=disk.img")
        .line("--nbd-server addr.type=fd,addr.str=nbd --export nbd,id=n,node-name=disk")
        .line("--export vhost-user-blk,id=disk,node-name=disk,addr.type=fd,addr.str=export-disk,writable=on")
        .spawn();
    wait_for("the activator to listen", || {
        assert!(daemon.alive(), "{}", daemon.stderr());
        (daemon.stderr().matches("Listening on").count() == 2).then_some(())
    });
    let mut front = FrontEnd::start(&path, 1, 0);
    front.write(0, &[1; 512]);
    let (mut client, _) = Client::connect_unix(&nbd_path).open("disk", Headers::Simple);
    assert_eq!(client.read(0, 512), [1; 512]);
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait().code(), Some(0));
}
