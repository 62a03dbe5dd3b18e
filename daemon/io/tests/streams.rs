//! Streams: gathered sends, receives into buffers, moves between threads, sockets that are full.
#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::cast_possible_truncation, reason = "test code")]

use buf::IoBuf;
use io::{IoThread, Listener, Params, SendQueue, Stream};
use std::future::Future;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::rc::Rc;

fn on_thread<Fut: Future<Output = ()> + 'static>(f: impl FnOnce() -> Fut + Send + 'static) {
    let thread = IoThread::start("sock", Params::default()).unwrap();
    wait(async {
        thread.run(f).await.unwrap();
        thread.stop().await;
    });
}

fn wait<T>(f: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(f)
}

fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let a = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (a, listener.accept().unwrap().0)
}

/// Frames of a 16-byte header (index, length) and a payload, thousands in flight, in both directions at once.
fn echo(near: OwnedFd, far: impl Read + Write + Send + 'static) {
    const FRAMES: u64 = 3000;
    // The far end returns each byte, in pieces that have nothing to do with the frames.
    let mut far = far;
    let echo = std::thread::spawn(move || {
        let mut piece = vec![0; 7001];
        loop {
            match far.read(&mut piece).unwrap() {
                0 => break,
                n => far.write_all(&piece[..n]).unwrap(),
            }
        }
    });
    on_thread(move || async move {
        let stream = Rc::new(Stream::new(near).unwrap());
        stream.set_nodelay();
        let sender = tokio::task::spawn_local({
            let stream = Rc::clone(&stream);
            async move {
                let mut queue = SendQueue::new();
                for i in 0..FRAMES {
                    let len = (i * 37) % 5000;
                    queue.push_bytes(&i.to_le_bytes());
                    queue.push_bytes(&len.to_le_bytes());
                    let payload = IoBuf::alloc(len as usize);
                    payload.fill(i as u8);
                    queue.push_buf(payload);
                    if i % 50 == 49 {
                        stream.send(&mut queue).await.unwrap();
                    }
                }
                stream.send(&mut queue).await.unwrap();
                assert!(queue.is_empty());
                stream.shutdown_send().unwrap();
            }
        });
        let mut have = Vec::new();
        let room = IoBuf::alloc(64 << 10);
        let mut next = 0u64;
        loop {
            let n = stream.recv(&room).await.unwrap();
            if n == 0 {
                break;
            }
            have.extend(room.slice(0, n).to_vec());
            let mut at = 0;
            while let Some(header) = have.get(at..at + 16) {
                let index = u64::from_le_bytes(header[..8].try_into().unwrap());
                let len = u64::from_le_bytes(header[8..].try_into().unwrap()) as usize;
                let Some(payload) = have.get(at + 16..at + 16 + len) else { break };
                assert_eq!(index, next);
                assert!(payload.iter().all(|b| *b == index as u8));
                next += 1;
                at += 16 + len;
            }
            have.drain(..at);
        }
        assert_eq!((next, have.len()), (FRAMES, 0));
        sender.await.unwrap();
    });
    echo.join().unwrap();
}

#[test]
fn frames_over_unix() {
    let (a, b) = UnixStream::pair().unwrap();
    echo(a.into(), b);
}

#[test]
fn frames_over_tcp() {
    let (a, b) = tcp_pair();
    echo(a.into(), b);
}

#[test]
fn a_connection_moves_between_threads() {
    let (near, mut far) = UnixStream::pair().unwrap();
    far.write_all(b"onetwo").unwrap();
    let threads: Vec<_> = (0..2).map(|i| IoThread::start(&format!("m{i}"), Params::default()).unwrap()).collect();
    let fd = wait(threads[0].run(move || async move {
        let stream = Stream::new(near.into()).unwrap();
        let three = IoBuf::alloc(3);
        stream.recv_exact(&three).await.unwrap();
        assert_eq!(three.to_vec(), b"one");
        stream.into_fd()
    }))
    .unwrap();
    wait(threads[1].run(move || async move {
        let stream = Stream::new(fd).unwrap();
        let (two, one) = (IoBuf::alloc(2), IoBuf::alloc(8));
        // What arrived before the move is announced again on the other event loop.
        assert_eq!(stream.recv_scattered(&[&two, &one]).await.unwrap(), 3);
        assert_eq!((two.to_vec(), one.slice(0, 1).to_vec()), (b"tw".to_vec(), b"o".to_vec()));
        let mut queue = SendQueue::new();
        queue.push_bytes(b"three");
        assert!(stream.try_send(&mut queue).unwrap());
    }))
    .unwrap();
    let mut got = [0; 5];
    far.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"three");
    wait(async {
        for thread in threads {
            thread.stop().await;
        }
    });
}

#[test]
fn a_full_socket_keeps_what_was_not_sent() {
    let (near, mut far) = UnixStream::pair().unwrap();
    on_thread(move || async move {
        let stream = Stream::new(near.into()).unwrap();
        stream.raise_buffers(256 << 10);
        let bytes: Vec<u8> = (0..8u32 << 20).map(|i| (i >> 3) as u8).collect();
        let mut queue = SendQueue::new();
        queue.push_buf(IoBuf::copy_of(&bytes));
        queue.push_bytes(b"end");
        assert!(!stream.try_send(&mut queue).unwrap(), "nobody reads");
        let left = queue.len();
        assert!(left < bytes.len() && left > 0);
        let reader = tokio::task::spawn_blocking(move || {
            let mut all = Vec::new();
            far.read_to_end(&mut all).unwrap();
            all
        });
        stream.send(&mut queue).await.unwrap();
        drop(stream);
        let all = reader.await.unwrap();
        assert_eq!(all.len(), bytes.len() + 3);
        assert_eq!(&all[..bytes.len()], &bytes[..]);
        assert_eq!(&all[bytes.len()..], b"end");
    });
}

#[test]
fn a_gone_peer_is_an_error_not_a_signal() {
    let (near, far) = UnixStream::pair().unwrap();
    on_thread(move || async move {
        let stream = Stream::new(near.into()).unwrap();
        drop(far);
        let mut queue = SendQueue::new();
        queue.push_bytes(b"anybody?");
        let err = stream.send(&mut queue).await.unwrap_err();
        assert_eq!(err.kind(), std::io::ErrorKind::BrokenPipe);
        assert_eq!(queue.len(), 8);
        assert_eq!(stream.recv(&IoBuf::alloc(1)).await.unwrap(), 0);
        let short = stream.recv_exact(&IoBuf::alloc(1)).await.unwrap_err();
        assert_eq!(short.kind(), std::io::ErrorKind::UnexpectedEof);
        assert!(stream.recv(&IoBuf::alloc(0)).await.is_err());
    });
}

#[test]
fn a_listener_accepts_for_any_thread() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    on_thread(move || async move {
        let listener = Listener::new(listener.into()).unwrap();
        for i in 0..3u8 {
            let mut peer = TcpStream::connect(addr).unwrap();
            peer.write_all(&[i]).unwrap();
            let stream = Stream::new(listener.accept().await.unwrap()).unwrap();
            let byte = IoBuf::alloc(1);
            stream.recv_exact(&byte).await.unwrap();
            assert_eq!(byte.to_vec(), [i]);
        }
    });
}

fn send_with(socket: &UnixStream, fd: &OwnedFd) -> rustix::io::Result<usize> {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(100))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = vec![std::os::fd::AsFd::as_fd(fd); 100];
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    sendmsg(socket, &[std::io::IoSlice::new(b"x")], &mut control, SendFlags::empty())
}

#[test]
fn descriptors_end_a_connection_and_are_closed_elsewhere() {
    on_thread(|| async {
        let (near, far) = UnixStream::pair().unwrap();
        let (mut reader, writer) = std::io::pipe().unwrap();
        let writer = OwnedFd::from(writer);
        // Before it is a stream, as on a kernel that cannot refuse them.
        send_with(&far, &writer).unwrap();
        let stream = Stream::new(near.into()).unwrap();
        let error = stream.recv(&IoBuf::alloc(8)).await.unwrap_err();
        assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::PROTO.raw_os_error()));
        if let Ok(1) = send_with(&far, &writer) {
            stream.recv(&IoBuf::alloc(8)).await.unwrap_err();
        }
        drop(writer);
        assert_eq!(reader.read(&mut [0]).unwrap(), 0, "none is left open");
    });
}
