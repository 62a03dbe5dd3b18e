//! The handshake: options in every order, refused ones, contexts, limits.

use serde_json::json;
use tests::nbd::{Client, Headers, cmd, opt, rep};
use tests::{Setup, wait_for};

const MIB: u64 = 1 << 20;

/// A greeted client of a daemon that serves `disk`.
fn greeted(daemon: &tests::Daemon) -> Client {
    let mut client = daemon.nbd();
    client.greet();
    client
}

fn serving() -> tests::Daemon {
    Setup::new().serving("disk", MIB).start()
}

/// The type of the last reply.
fn last(replies: &[tests::nbd::OptionReply]) -> u32 {
    replies.last().unwrap().kind
}

#[test]
fn export_name_enters_transmission() {
    let daemon = serving();
    let mut client = greeted(&daemon);
    client.send_option(opt::EXPORT_NAME, b"disk");
    let answer = client.take(10);
    assert_eq!(answer[..8], MIB.to_be_bytes());
    let flags = u16::from_be_bytes([answer[8], answer[9]]);
    assert_eq!(flags & 1, 1, "HAS_FLAGS");
    assert_eq!(client.read(0, 16), [0; 16]);
}

#[test]
fn export_name_of_an_unknown_export_ends_the_connection() {
    let daemon = serving();
    let mut client = greeted(&daemon);
    client.send_option(opt::EXPORT_NAME, b"nosuch");
    assert!(client.closed());
}

#[test]
fn go_to_an_unknown_export_is_refused_and_the_connection_stays() {
    let daemon = serving();
    let mut client = greeted(&daemon);
    let refusal = client.go("nosuch").unwrap_err();
    assert_eq!(refusal.kind, rep::ERR_UNKNOWN);
    assert_eq!(client.go("").unwrap_err().kind, rep::ERR_UNKNOWN);
    assert_eq!(client.go("disk").unwrap().size, MIB);
    assert_eq!(client.read(0, 16), [0; 16]);
}

#[test]
fn info_does_not_enter_transmission() {
    let daemon = serving();
    let mut client = greeted(&daemon);
    let info = client.info(opt::INFO, "disk", &[]).unwrap();
    assert_eq!(info.size, MIB);
    // Without asking for sizes there is no constraint for the client to mind; the server tells all the same.
    assert_eq!(
        info.block_sizes.map(|(min, _, max)| (min, max)),
        Some((1, 32 << 20)).or(info.block_sizes.map(|b| (b.0, b.2)))
    );
    let asked = client.info(opt::INFO, "disk", &[3]).unwrap();
    let (min, preferred, max) = asked.block_sizes.unwrap();
    assert!(min.is_power_of_two() && preferred >= min && preferred.is_power_of_two(), "{asked:?}");
    assert_eq!(max, 32 << 20);
    assert_eq!(last(&client.option(opt::ABORT, &[])), rep::ACK);
    assert!(client.closed());
}

#[test]
fn a_name_and_a_description_are_told() {
    let daemon = Setup::new()
        .line("--blockdev null-co,node-name=n,size=1048576")
        .nbd_server()
        .arg("--export")
        .arg("nbd,id=e,node-name=n,name=short,description=what it is")
        .start();
    let mut client = greeted(&daemon);
    assert_eq!(client.info(opt::INFO, "short", &[1, 2]).unwrap().description.as_deref(), Some("what it is"));
    let listed = client.option(opt::LIST, &[]);
    assert_eq!(listed.len(), 2);
    assert_eq!(listed[0].kind, rep::SERVER);
    assert_eq!(listed[0].data, b"\0\0\0\x05shortwhat it is");
}

#[test]
fn exports_are_listed() {
    let daemon = Setup::new()
        .serving("disk", MIB)
        .line("--blockdev null-co,node-name=n,size=4096 --export nbd,id=e2,node-name=n,name=second")
        .start();
    let listed = greeted(&daemon).option(opt::LIST, &[]);
    assert_eq!(last(&listed), rep::ACK);
    let mut names: Vec<_> =
        listed.iter().filter(|reply| reply.kind == rep::SERVER).map(|reply| reply.data[4..].to_vec()).collect();
    names.sort();
    assert_eq!(names, [b"disk".to_vec(), b"second".to_vec()]);
}

#[test]
fn options_that_are_not() {
    let daemon = serving();
    let mut client = greeted(&daemon);
    assert_eq!(last(&client.option(9999, b"whatever")), rep::ERR_UNSUP);
    assert_eq!(last(&client.option(opt::LIST, b"x")), rep::ERR_INVALID);
    assert_eq!(last(&client.option(opt::STRUCTURED_REPLY, b"x")), rep::ERR_INVALID);
    assert_eq!(last(&client.option(opt::GO, b"")), rep::ERR_INVALID);
    assert_eq!(last(&client.option(opt::GO, b"\xff\xff\xff\xffdisk\0\0")), rep::ERR_INVALID);
    assert_eq!(last(&client.option(opt::GO, b"\0\0\0\x04disk\0\x09\0\0")), rep::ERR_INVALID);
    assert_eq!(last(&client.option(opt::SET_META_CONTEXT, b"\0\0\0\x04disk\0\0\0\0")), rep::ERR_INVALID);
    // After all of that the connection still works.
    assert_eq!(client.go("disk").unwrap().size, MIB);
}

#[test]
fn a_starttls_without_credentials_is_refused() {
    let daemon = serving();
    let mut client = greeted(&daemon);
    assert_eq!(last(&client.option(opt::STARTTLS, &[])), rep::ERR_POLICY);
    assert_eq!(client.go("disk").unwrap().size, MIB);
}

#[test]
fn headers_once() {
    let daemon = serving();
    let mut client = greeted(&daemon);
    client.negotiate(Headers::Structured);
    assert_eq!(last(&client.option(opt::STRUCTURED_REPLY, &[])), rep::ERR_INVALID);
    client.negotiate(Headers::Extended);
    assert_eq!(last(&client.option(opt::EXTENDED_HEADERS, &[])), rep::ERR_INVALID);
    // Extended headers include structured replies.
    assert_eq!(last(&client.option(opt::STRUCTURED_REPLY, &[])), rep::ERR_EXT_HEADER_REQD);
}

#[test]
fn contexts_are_listed_and_selected() {
    let daemon = serving();
    let mut client = greeted(&daemon);
    client.negotiate(Headers::Structured);
    let names = |found: Vec<(u32, String)>| found.into_iter().map(|(_, name)| name).collect::<Vec<_>>();
    assert_eq!(names(client.contexts(opt::LIST_META_CONTEXT, "disk", &[]).unwrap()), ["base:allocation"]);
    assert_eq!(names(client.contexts(opt::LIST_META_CONTEXT, "disk", &["base:"]).unwrap()), ["base:allocation"]);
    assert!(client.contexts(opt::LIST_META_CONTEXT, "disk", &["foo:bar"]).unwrap().is_empty());
    assert!(client.set_contexts("disk", &["qemu:dirty-bitmap:nosuch"]).unwrap().is_empty());
    // Asking for a namespace selects nothing.
    assert!(client.set_contexts("disk", &["base:"]).unwrap().is_empty());
    let set = client.set_contexts("disk", &["base:allocation", "qemu:allocation-depth"]).unwrap();
    assert_eq!(set.keys().collect::<Vec<_>>(), ["base:allocation"], "allocation depth is not on in this export");
    assert_eq!(client.set_contexts("nosuch", &["base:allocation"]).unwrap_err().kind, rep::ERR_UNKNOWN);
}

#[test]
fn allocation_depth_is_a_context_where_the_export_says_so() {
    let daemon = Setup::new()
        .image("a.img", MIB)
        .line("--blockdev file,node-name=f,filename=a.img")
        .nbd_server()
        .line("--export nbd,id=e,node-name=f,name=disk,allocation-depth=on")
        .start();
    let mut client = greeted(&daemon);
    client.negotiate(Headers::Structured);
    let mut names: Vec<_> =
        client.set_contexts("disk", &["base:allocation", "qemu:allocation-depth"]).unwrap().into_keys().collect();
    names.sort();
    assert_eq!(names, ["base:allocation", "qemu:allocation-depth"]);
    let listed = client.contexts(opt::LIST_META_CONTEXT, "disk", &["qemu:"]).unwrap();
    assert_eq!(listed.iter().map(|(_, name)| name.as_str()).collect::<Vec<_>>(), ["qemu:allocation-depth"]);
}

#[test]
fn contexts_need_structured_replies() {
    let daemon = serving();
    let mut client = greeted(&daemon);
    assert_eq!(client.set_contexts("disk", &["base:allocation"]).unwrap_err().kind, rep::ERR_INVALID);
    assert_eq!(client.go("disk").unwrap().size, MIB);
}

#[test]
fn contexts_of_another_export_are_forgotten() {
    let daemon = Setup::new()
        .serving("disk", MIB)
        .line("--blockdev null-co,node-name=n,size=4096 --export nbd,id=e2,node-name=n,name=second")
        .start();
    let mut client = greeted(&daemon);
    client.negotiate(Headers::Structured);
    client.set_contexts("second", &["base:allocation"]).unwrap();
    client.go("disk").unwrap();
    assert_eq!(client.simple(cmd::BLOCK_STATUS, 0, 0, 512), super::errno::EINVAL);
}

#[test]
fn old_style_flags_end_the_connection() {
    let daemon = serving();
    let mut client = daemon.nbd();
    client.take(18);
    client.send_raw(&0x8000_0000_u32.to_be_bytes());
    assert!(client.closed());
    // The server goes on.
    greeted(&daemon);
}

#[test]
fn a_client_without_no_zeroes_gets_zeroes() {
    let daemon = serving();
    let mut client = daemon.nbd();
    client.take(18);
    client.send_raw(&1_u32.to_be_bytes());
    client.send_option(opt::EXPORT_NAME, b"disk");
    let answer = client.take(10 + 124);
    assert_eq!(answer[10..], [0; 124]);
    assert_eq!(client.read(0, 16), [0; 16]);
}

#[test]
fn a_client_that_stalls_in_the_handshake_is_dropped() {
    let daemon = Setup::new()
        .line("--blockdev null-co,node-name=n,size=1048576,read-zeroes=on")
        .line("--nbd-server addr.type=unix,addr.path=nbd.sock,handshake-max-seconds=1")
        .line("--export nbd,id=e,node-name=n,name=disk")
        .start();
    let mut stalled = greeted(&daemon);
    let (mut served, _) = daemon.nbd().open("disk", Headers::Simple);
    assert!(stalled.closed());
    // The limit is for the handshake only.
    assert_eq!(served.read(0, 16), [0; 16]);
}

#[test]
fn connections_beyond_the_limit_wait() {
    let daemon = Setup::new()
        .qmp()
        .line("--blockdev null-co,node-name=n,size=1048576,read-zeroes=on")
        .line("--nbd-server addr.type=unix,addr.path=nbd.sock,max-connections=2")
        .line("--export nbd,id=e,node-name=n,name=disk")
        .start();
    let (first, _) = daemon.nbd().open("disk", Headers::Simple);
    let (mut second, _) = daemon.nbd().open("disk", Headers::Simple);
    // The third is in the kernel's queue: it connects, and nobody greets it while two are there.
    let stream = std::os::unix::net::UnixStream::connect(daemon.path("nbd.sock")).unwrap();
    daemon.qmp().ok("query-version", json!({}));
    stream.set_nonblocking(true).unwrap();
    let peek = std::io::Read::read(&mut &stream, &mut [0; 1]);
    assert!(peek.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock));
    stream.set_nonblocking(false).unwrap();
    drop(first);
    let mut third = Client::over_unix(stream);
    third.greet();
    assert_eq!(third.go("disk").unwrap().size, MIB);
    assert_eq!(second.read(0, 16), [0; 16]);
}

#[test]
fn as_many_clients_as_asked_for() {
    let daemon = Setup::new()
        .line("--blockdev null-co,node-name=n,size=1048576,read-zeroes=on")
        .line("--nbd-server addr.type=unix,addr.path=nbd.sock,max-connections=0")
        .line("--export nbd,id=e,node-name=n,name=disk")
        .start();
    let before = daemon.open_fds();
    let mut clients: Vec<_> = (0..200).map(|_| daemon.nbd().open("disk", Headers::Structured).0).collect();
    for client in &mut clients {
        assert_eq!(client.read(4096, 16), [0; 16]);
    }
    drop(clients);
    wait_for("the descriptors of the clients to be closed", || (daemon.open_fds() <= before).then_some(()));
}
