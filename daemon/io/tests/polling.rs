//! A thread that looks for events before it sleeps: no wake-up is lost, and it sleeps in the end.
//!
//! Whether it slept is seen in the runtime's count of sleeps, so that nothing here depends on time.
#![allow(clippy::unwrap_used, reason = "test code")]

use buf::IoBuf;
use io::{Access, Engine, File, IoThread, OpenHow, Params, Polling, Stream};
use std::future::Future;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::Arc;
use tokio::runtime::Handle;

const HOW: OpenHow = OpenHow { access: Access::ReadWrite, direct: false, engine: Engine::Ring };
/// Any sleep is short enough, and the second one makes the window the longest there is.
const ALWAYS: Polling = Polling { max_ns: u64::MAX, grow: u64::MAX, shrink: 1, for_queues: false };
const NEVER: Polling = Polling { max_ns: 0, ..ALWAYS };

fn wait<T>(f: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(f)
}

fn start(polling: Polling) -> Arc<IoThread> {
    IoThread::start("poll", Params { polling, ..Params::default() }).unwrap()
}

/// The thread's event loop, for its count of sleeps.
async fn event_loop(thread: &IoThread) -> Handle {
    thread.run(|| async { Handle::current() }).await.unwrap()
}

fn sleeps(event_loop: &Handle) -> u64 {
    event_loop.metrics().worker_park_count(0)
}

/// Waits until the thread sleeps, having slept more often than `before`.
fn until_asleep(event_loop: &Handle, before: u64) {
    while sleeps(event_loop) <= before {
        std::thread::yield_now();
    }
}

#[test]
fn a_thread_with_a_short_window_sleeps_after_it() {
    wait(async {
        let thread = start(Polling { max_ns: 50_000, grow: 0, shrink: 0, ..NEVER });
        let event_loop = event_loop(&thread).await;
        for _ in 0..100 {
            let before = sleeps(&event_loop);
            thread.run(|| async {}).await.unwrap();
            until_asleep(&event_loop, before);
        }
        thread.stop().await;
    });
}

#[test]
fn no_message_is_lost_between_looking_and_sleeping() {
    // From windows that end before the answer comes to those that end after it.
    for polling in [
        NEVER,
        Polling { max_ns: 1, grow: 0, shrink: 0, ..NEVER },
        Polling { max_ns: 20_000, grow: 0, shrink: 2, ..NEVER },
        ALWAYS,
    ] {
        wait(async {
            let (left, right) = (start(polling), start(polling));
            let (one, other) = UnixStream::pair().unwrap();
            let echo = |socket: UnixStream, first: bool| {
                move || async move {
                    let stream = Rc::new(Stream::new(OwnedFd::from(socket)).unwrap());
                    let mut out = io::SendQueue::default();
                    let buf = IoBuf::alloc(8);
                    for round in 0..300u64 {
                        if first {
                            out.push_buf(IoBuf::copy_of(&round.to_le_bytes()));
                            stream.send(&mut out).await.unwrap();
                        }
                        stream.recv_exact(&buf).await.unwrap();
                        if !first {
                            out.push_buf(IoBuf::copy_of(&round.to_le_bytes()));
                            stream.send(&mut out).await.unwrap();
                        }
                    }
                }
            };
            let (a, b) = tokio::join!(left.run(echo(one, true)), right.run(echo(other, false)));
            a.unwrap();
            b.unwrap();
            left.stop().await;
            right.stop().await;
        });
    }
}

#[test]
fn a_limit_of_gathered_operations_changes_nothing_else() {
    wait(async {
        let thread = start(NEVER);
        let file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        for max in [1, 3, 0, u32::MAX] {
            thread.set_max_batch(max);
            let path = file.path().to_owned();
            thread
                .run(move || async move {
                    let file = Rc::new(File::open(&path, HOW).await.unwrap());
                    let tasks: Vec<_> = (0..600u64)
                        .map(|i| {
                            let file = Rc::clone(&file);
                            tokio::task::spawn_local(async move {
                                file.write_at(i * 8, &IoBuf::copy_of(&i.to_le_bytes()), true).await.unwrap();
                            })
                        })
                        .collect();
                    for task in tasks {
                        task.await.unwrap();
                    }
                })
                .await
                .unwrap();
            let want: Vec<u8> = (0..600u64).flat_map(u64::to_le_bytes).collect();
            assert_eq!(std::fs::read(file.path()).unwrap(), want);
            file.as_file().set_len(0).unwrap();
        }
        thread.stop().await;
    });
}
