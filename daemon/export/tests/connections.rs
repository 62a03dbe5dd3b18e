//! Connections as their clients see them: drains, resizes, removals, limits, and clients that do not behave.
#![expect(clippy::unwrap_used, clippy::panic, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use block::Facts;
use common::{Client, DISC, FLUSH, Holding, READ, SendDriver, Server, Setup, WRITE, inside};
use export::Export;
use export::nbd::NbdServerParams;
use io::IoThread;
use std::io::{Read, Write};
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::time::Duration;
use tokio::sync::Semaphore;

const MIB: usize = 1 << 20;

fn server() -> Server {
    Server::start(NbdServerParams::default())
}

/// A server whose export `h` holds reads.
fn holding(params: NbdServerParams) -> (Server, Arc<Semaphore>, mpsc::Receiver<u64>) {
    let server = Server::start(params);
    let permits = Arc::new(Semaphore::new(0));
    let (arrived, arrivals) = mpsc::channel();
    let driver = Holding { size: 64 << 20, permits: Arc::clone(&permits), arrived };
    server.export_driver(Setup::new("h", true), SendDriver(Box::new(driver)));
    (server, permits, arrivals)
}

#[test]
fn data_comes_back_on_every_kind_of_thread() {
    let server = server();
    server.export(Setup::new("here", true), MIB, Facts::default());
    let threads = (0..2).map(|i| IoThread::start(&format!("io{i}"), io::Params::default()).unwrap()).collect();
    server.export(Setup { threads, ..Setup::new("there", true) }, MIB, Facts::default());
    for name in ["here", "there", "there", "there"] {
        let mut client = server.connect();
        assert_eq!(client.choose(name), (MIB as u64, 0x0d6d));
        let payload: Vec<u8> = (0..70_000u32).map(|i| u8::try_from(i % 251).unwrap()).collect();
        for (at, len) in [(0, 70_000), (12_345, 4096), (1, 1), (MIB as u64 - 70_000, 70_000)] {
            client.send(WRITE, 1, at, len);
            client.socket.write_all(&payload[..usize::try_from(len).unwrap()]).unwrap();
            assert_eq!(client.reply(), (0, 1));
            assert_eq!(client.read(at, len).unwrap(), payload[..usize::try_from(len).unwrap()]);
        }
        client.send(DISC, 0, 0, 0);
        assert!(client.is_closed());
    }
}

#[test]
fn many_requests_in_one_send_are_all_answered() {
    let server = server();
    server.export(Setup::new("e", true), MIB, Facts::default());
    let mut client = server.connect();
    client.choose("e");
    let mut wire = Vec::new();
    for cookie in 0..1000u64 {
        wire.extend_from_slice(&Client::header(WRITE, cookie, cookie * 512, 512));
        wire.extend_from_slice(&[u8::try_from(cookie % 255).unwrap() + 1; 512]);
    }
    let mut writer = client.socket.try_clone().unwrap();
    let sender = std::thread::spawn(move || writer.write_all(&wire).unwrap());
    let mut cookies: Vec<u64> =
        (0..1000).map(|_| client.reply()).map(|(error, cookie)| cookie + u64::from(error)).collect();
    sender.join().unwrap();
    cookies.sort_unstable();
    assert_eq!(cookies, (0..1000).collect::<Vec<u64>>());
    for cookie in [0u64, 1, 500, 999] {
        assert_eq!(client.read(cookie * 512, 512).unwrap(), [u8::try_from(cookie % 255).unwrap() + 1; 512]);
    }
}

/// A flush covers the writes that were replied to on other connections, as multi-conn promises.
#[test]
fn a_flush_reaches_the_medium_once_for_all_connections() {
    let server = server();
    let memory = server.export(Setup::new("e", true), MIB, Facts::default());
    let (mut a, mut b) = (server.connect(), server.connect());
    a.choose("e");
    b.choose("e");
    let before = memory.flushes.load(Ordering::Relaxed);
    a.send(WRITE, 1, 0, 4);
    a.socket.write_all(b"data").unwrap();
    assert_eq!(a.reply(), (0, 1));
    b.send(FLUSH, 2, 0, 0);
    assert_eq!(b.reply(), (0, 2));
    assert_eq!(memory.flushes.load(Ordering::Relaxed), before + 1);
}

#[test]
fn a_drain_in_the_middle_of_a_header_loses_nothing() {
    let server = server();
    server.export(Setup::new("e", true), MIB, Facts::default());
    let mut client = server.connect();
    client.choose("e");
    let header = Client::header(READ, 9, 4096, 16);
    for cut in [1, 13, 27] {
        client.socket.write_all(&header[..cut]).unwrap();
        let drained = server.run(|| async {
            let inside = inside();
            let node = inside.node("e").await;
            // Requests that arrive from now on wait at the gate.
            inside.graph.lock().await.drain(&node).await
        });
        client.socket.write_all(&header[cut..]).unwrap();
        client.send(READ, 10, 0, 16);
        client.socket.set_nonblocking(true).unwrap();
        let mut byte = [0];
        assert!(client.socket.read(&mut byte).is_err(), "nothing is answered during a drain");
        client.socket.set_nonblocking(false).unwrap();
        server.run(move || async move { drop(drained) });
        let mut cookies = Vec::new();
        for _ in 0..2 {
            let (error, cookie) = client.reply();
            assert_eq!(error, 0);
            client.data(16);
            cookies.push(cookie);
        }
        cookies.sort_unstable();
        assert_eq!(cookies, [9, 10]);
    }
}

#[test]
fn a_resize_under_a_client_is_seen_by_it() {
    let server = server();
    server.export(Setup::new("e", true), MIB, Facts::default());
    let mut client = server.connect();
    assert_eq!(client.choose("e").0, MIB as u64);
    assert_eq!(client.read(MIB as u64, 512), Err(22));
    let resize = |size: u64| {
        server.run(move || async move {
            let inside = inside();
            let node = inside.node("e").await;
            inside.graph.lock().await.resize(&node, size).await.map_err(|e| e.to_string())
        })
    };
    assert_eq!(resize(2 * MIB as u64), Ok(()));
    assert_eq!(client.read(MIB as u64, 512), Ok(vec![0; 512]));
    assert_eq!(server.connect().choose("e").0, 2 * MIB as u64);
    assert_eq!(resize(4096), Ok(()));
    assert_eq!(client.read(4096, 1), Err(22));
    assert_eq!(client.read(0, 4096).map(|d| d.len()), Ok(4096));
}

#[test]
fn removal_completes_what_was_started_and_replies() {
    let (server, permits, arrivals) = holding(NbdServerParams::default());
    let mut client = server.connect();
    client.choose("h");
    client.send(READ, 3, 512, 8);
    assert_eq!(arrivals.recv_timeout(Duration::from_secs(60)), Ok(512));
    let removed = server.begin(|| async {
        let export = inside().server.find("h").unwrap();
        assert_eq!(export.clients(), 1);
        inside().server.remove(&export).await;
        export.clients()
    });
    // The export is gone for others while this client is still being served.
    while server.run(|| async { inside().server.find("h").is_some() }) {}
    let mut late = server.connect();
    let mut greeting = [0; 18];
    late.socket.read_exact(&mut greeting).unwrap();
    late.socket.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x01h").unwrap();
    assert!(late.is_closed());
    assert!(removed.try_recv().is_err(), "it waits for the read");
    permits.add_permits(1);
    assert_eq!(client.reply(), (0, 3));
    assert_eq!(client.data(8), [1; 8]);
    assert!(client.is_closed());
    assert_eq!(removed.recv_timeout(Duration::from_secs(60)), Ok(0));
}

#[test]
fn a_client_that_vanishes_leaves_its_requests_to_end() {
    let (server, permits, arrivals) = holding(NbdServerParams::default());
    let mut client = server.connect();
    client.choose("h");
    for cookie in 0..3 {
        client.send(READ, cookie, 0, 1 << 20);
        arrivals.recv_timeout(Duration::from_secs(60)).unwrap();
    }
    client.socket.write_all(&Client::header(WRITE, 5, 0, 4096)[..20]).unwrap();
    drop(client);
    let closed = server.begin(|| async {
        let export = inside().server.find("h").unwrap();
        export.request_shutdown();
        export.closed().await;
    });
    assert_eq!(server.run(|| async { inside().server.exports()[0].clients() }), 1);
    permits.add_permits(3);
    closed.recv_timeout(Duration::from_secs(60)).unwrap();
}

/// A client that sends requests and reads no reply is not read from any more, and served as soon as it reads.
#[test]
fn a_flood_is_held_back() {
    let server = server();
    server.export(Setup::new("e", true), MIB, Facts::default());
    let mut client = server.connect();
    client.choose("e");
    let mut writer = client.socket.try_clone().unwrap();
    writer.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    let (mut sent, wire) = (0, Client::header(READ, 1, 0, 64 << 10));
    // Until the server, and then the socket, takes no more.
    let partial = loop {
        match writer.write(&wire) {
            Ok(n) if n == wire.len() => sent += 1,
            Ok(n) => break n,
            Err(_) => break 0,
        }
        assert!(sent < 1 << 20, "64 GiB of replies are not kept");
    };
    for _ in 0..sent {
        assert_eq!(client.reply(), (0, 1));
        client.data(64 << 10);
    }
    if partial > 0 {
        client.socket.write_all(&wire[partial..]).unwrap();
        assert_eq!(client.reply(), (0, 1));
        client.data(64 << 10);
    }
    assert_eq!(client.read(0, 4), Ok(vec![0; 4]));
}

/// Neither a removal nor a stop waits for a client that does not take its replies.
#[test]
fn who_does_not_read_holds_nobody_up() {
    let server = server();
    server.export(Setup::new("e", true), MIB, Facts::default());
    let mut client = server.connect();
    client.choose("e");
    for cookie in 0..64 {
        client.send(READ, cookie, 0, 1 << 20);
    }
    // The first reply has come, so the server is at work on the others and cannot send them all.
    assert_eq!(client.reply().0, 0);
    let left = server.run(|| async {
        let export = inside().server.find("e").unwrap();
        inside().server.remove(&export).await;
        export.clients()
    });
    assert_eq!(left, 0);
}

#[test]
fn who_breaks_the_protocol_is_closed_and_others_stay() {
    let server = server();
    server.export(Setup::new("e", true), MIB, Facts::default());
    let mut good = server.connect();
    good.choose("e");
    let mut bad = server.connect();
    bad.choose("e");
    bad.socket.write_all(&[0x55; 28]).unwrap();
    assert_eq!(bad.reply(), (22, 0x5555_5555_5555_5555));
    assert!(bad.is_closed());
    let mut large = server.connect();
    large.choose("e");
    large.send(WRITE, 4, 0, (32 << 20) + 1);
    assert_eq!(large.reply(), (22, 4));
    assert!(large.is_closed());
    let mut garbage = server.connect();
    garbage.socket.write_all(&[0xff; 1000]).unwrap();
    assert!(garbage.is_closed());
    let mut refused = server.connect();
    refused.choose("e");
    refused.send(WRITE, 5, MIB as u64, 70_000);
    refused.socket.write_all(&[9; 70_000]).unwrap();
    assert_eq!(refused.reply(), (22, 5));
    assert_eq!(refused.read(0, 4), Ok(vec![0; 4]), "the payload of a refused write is stepped over");
    assert_eq!(good.read(0, 4), Ok(vec![0; 4]));
}

#[test]
fn connections_are_limited_over_all_listeners() {
    let server = Server::start(NbdServerParams { max_connections: 2, ..NbdServerParams::default() });
    server.export(Setup::new("e", true), MIB, Facts::default());
    let (first, second) = (server.path(), server.file("nbd2"));
    for (one, other) in [(&first, &first), (&first, &second), (&second, &first)] {
        let (mut a, mut b) = (Client::connect(one), Client::connect(one));
        a.choose("e");
        b.choose("e");
        let mut late = Client::connect(other);
        late.socket.set_nonblocking(true).unwrap();
        // The others have been served since, so this one would have been greeted by now.
        a.read(0, 1).unwrap();
        assert_eq!(late.socket.read(&mut [0]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
        late.socket.set_nonblocking(false).unwrap();
        a.send(DISC, 0, 0, 0);
        assert!(a.is_closed());
        assert_eq!(late.choose("e").0, MIB as u64);
    }
}

#[test]
fn a_handshake_takes_only_so_long() {
    let limit = Some(Duration::from_millis(20));
    let server = Server::start(NbdServerParams { handshake_limit: limit, ..NbdServerParams::default() });
    server.export(Setup::new("e", true), MIB, Facts::default());
    let mut slow = server.connect();
    slow.socket.write_all(b"\0\0\0\x03IHAVE").unwrap();
    assert!(slow.is_closed());
    let unlimited = Server::start(NbdServerParams { handshake_limit: None, ..NbdServerParams::default() });
    let mut waiting = unlimited.connect();
    drop(unlimited);
    assert!(waiting.is_closed(), "a stop ends handshakes");
}

#[test]
fn control_says_what_is_wrong() {
    let server = server();
    server.export(Setup::new("e", true), MIB, Facts::default());
    let add = |name: String, description: Option<String>| {
        server.run(move || async move {
            let inside = inside();
            let disk = inside.server.find("e").unwrap().disk().clone();
            let options = export::nbd::NbdExportOptions {
                id: "x".to_owned(),
                name,
                description,
                writable: false,
                allocation_depth: false,
                disk,
                threads: Vec::new(),
            };
            inside.server.add(options).map(|_| ()).map_err(|e| e.to_string())
        })
    };
    assert_eq!(add("e".to_owned(), None), Err("NBD server already has export named 'e'".to_owned()));
    let long = "a".repeat(4097);
    assert_eq!(add(long.clone(), None), Err(format!("export name '{long}' too long")));
    assert_eq!(add("f".to_owned(), Some(long.clone())), Err(format!("description '{long}' too long")));
    assert_eq!(add("a".repeat(4096), Some("b".repeat(4096))), Ok(()));
    assert_eq!(server.connect().choose(&"a".repeat(4096)).1, 0x050f, "read-only");
}
