//! What can go wrong with a ring: lost wake-ups, full queues, abandoned operations, memory that goes too early.
#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::cast_possible_truncation, reason = "test code")]

use buf::IoBuf;
use io::{Access, Engine, File, IoThread, OpenHow, Params, RingUse};
use nix::errno::Errno;
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;

const HOW: OpenHow = OpenHow { access: Access::ReadWrite, direct: false, engine: Engine::Ring };

fn wait<T>(f: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(f)
}

fn run<Fut: Future<Output = ()> + 'static>(ring: RingUse, f: impl FnOnce() -> Fut + Send + 'static) {
    let thread = IoThread::start("ring", Params { ring, ..Params::default() }).unwrap();
    wait(async {
        thread.run(f).await.unwrap();
        thread.stop().await;
    });
}

/// Polls once; most operations are under way afterwards.
async fn poll_once<F: Future + ?Sized>(f: &mut Pin<Box<F>>) -> Poll<F::Output> {
    std::future::poll_fn(|cx| Poll::Ready(f.as_mut().poll(cx))).await
}

fn temp(len: u64) -> (tempfile::NamedTempFile, std::path::PathBuf) {
    let file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    file.as_file().set_len(len).unwrap();
    let path = file.path().to_owned();
    (file, path)
}

#[test]
fn a_thread_that_never_sleeps_submits_and_reaps() {
    let (_keep, path) = temp(1 << 20);
    run(RingUse::Auto, move || async move {
        let file = Rc::new(File::open(&path, HOW).await.unwrap());
        let stop = Rc::new(Cell::new(false));
        // One task that is always runnable through its own waker, one through the runtime's yield.
        let spin = tokio::task::spawn_local({
            let stop = Rc::clone(&stop);
            std::future::poll_fn(move |cx| {
                if stop.get() {
                    return Poll::Ready(());
                }
                cx.waker().wake_by_ref();
                Poll::Pending
            })
        });
        let yields = tokio::task::spawn_local({
            let stop = Rc::clone(&stop);
            async move {
                while !stop.get() {
                    tokio::task::yield_now().await;
                }
            }
        });
        for i in 0..200u64 {
            file.write_at(i * 512, &IoBuf::zeroed(512), i % 50 == 0).await.unwrap();
        }
        file.sync_data().await.unwrap();
        stop.set(true);
        spin.await.unwrap();
        yields.await.unwrap();
    });
}

#[test]
fn one_operation_at_a_time_on_an_idle_thread() {
    let (_keep, path) = temp(1 << 20);
    run(RingUse::Auto, move || async move {
        let file = File::open(&path, HOW).await.unwrap();
        for i in 0..500u64 {
            file.write_at(i * 512, &IoBuf::zeroed(512), false).await.unwrap();
        }
    });
}

#[test]
fn more_operations_than_the_queue_has_entries() {
    for ring in [RingUse::Auto, RingUse::Off] {
        let (_keep, path) = temp(0);
        run(ring, move || async move {
            let file = Rc::new(File::open(&path, HOW).await.unwrap());
            let tasks: Vec<_> = (0..5000u64)
                .map(|i| {
                    let file = Rc::clone(&file);
                    tokio::task::spawn_local(async move {
                        let bytes = i.to_le_bytes();
                        file.write_at(i * 8, &IoBuf::copy_of(&bytes), false).await.unwrap();
                    })
                })
                .collect();
            for task in tasks {
                task.await.unwrap();
            }
            let all = std::fs::read(&path).unwrap();
            let want: Vec<u8> = (0..5000u64).flat_map(u64::to_le_bytes).collect();
            assert_eq!(all, want);
        });
    }
}

#[test]
fn abandoned_operations_keep_their_memory_and_are_waited_for() {
    let (_keep, path) = temp(0);
    let (tell, told) = std::sync::mpsc::channel();
    run(RingUse::Auto, move || async move {
        let file = File::open(&path, HOW).await.unwrap();
        let mut taken = Vec::new();
        for i in 0..64u64 {
            let bytes = IoBuf::alloc(4096);
            bytes.fill(0xA0);
            let mut write: Pin<Box<dyn Future<Output = Result<(), Errno>>>> = Box::pin({
                let file = &file;
                let bytes = bytes.clone();
                async move { file.write_at(i * 4096, &bytes, true).await }
            });
            assert!(poll_once(&mut write).await.is_pending());
            drop(write);
            drop(bytes);
            // Memory that the kernel still reads from must not come back from the pool.
            let other = IoBuf::alloc(4096);
            other.fill(0xB1);
            taken.push(other);
        }
        tell.send(()).unwrap();
        // Ends with operations under way: the thread's end waits for them.
    });
    told.recv().unwrap();
    let written = std::fs::read(_keep.path()).unwrap();
    assert_eq!(written.len(), 64 * 4096);
    assert!(written.iter().all(|b| *b == 0xA0), "each abandoned write took the bytes it was given");
}

/// A small generator, so that a failure can be repeated.
struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// Several IOThreads use one `File`; each owns the blocks of its number. One in four operations is dropped under way.
#[test]
fn several_threads_on_one_file_with_dropped_futures() {
    const THREADS: u64 = 4;
    const BLOCKS: u64 = 64;
    const BLOCK: usize = 4096;
    for (ring, direct) in [(RingUse::Auto, true), (RingUse::Auto, false), (RingUse::Off, false)] {
        let (_keep, path) = temp(THREADS * BLOCKS * BLOCK as u64);
        let Ok(file) = wait(File::open(Path::new(&path), OpenHow { direct, ..HOW })) else {
            println!("skipped: no O_DIRECT on {}", path.display());
            continue;
        };
        let file = Arc::new(file);
        let threads: Vec<_> = (0..THREADS)
            .map(|i| IoThread::start(&format!("s{i}"), Params { ring, ..Params::default() }).unwrap())
            .collect();
        let (done, all_done) = std::sync::mpsc::channel();
        for (t, thread) in (0..THREADS).zip(&threads) {
            let (file, done) = (Arc::clone(&file), done.clone());
            thread
                .spawn(move || async move {
                    worker(t, file).await;
                    done.send(()).unwrap();
                })
                .unwrap();
        }
        for _ in 0..THREADS {
            all_done.recv().unwrap();
        }
        wait(async {
            for thread in threads {
                thread.stop().await;
            }
        });
    }

    async fn worker(t: u64, file: Arc<File>) {
        let model = Rc::new(RefCell::new(vec![None::<u8>; BLOCKS as usize]));
        let tasks: Vec<_> = (0..8u64)
            .map(|lane| {
                let (file, model) = (Arc::clone(&file), Rc::clone(&model));
                // Each lane has the blocks `b % 8 == lane`, so that nobody else writes what it reads.
                tokio::task::spawn_local(async move {
                    let mut rng = Rng(t * 1000 + lane + 1);
                    for round in 0..150u64 {
                        let b = rng.below(BLOCKS / 8) * 8 + lane;
                        let at = (b * THREADS + t) * BLOCK as u64;
                        let value = (round % 250 + 1) as u8;
                        match rng.below(4) {
                            0 => {
                                // A read that is dropped under way; its memory is used again at once.
                                let buf = IoBuf::alloc(BLOCK);
                                let mut read = Box::pin(file.read_at(at, &buf));
                                let _ = poll_once(&mut read).await;
                                drop(read);
                                drop(buf);
                                let canary = IoBuf::alloc(BLOCK);
                                canary.fill(0x5A);
                                tokio::task::yield_now().await;
                                assert!(
                                    canary.to_vec().iter().all(|x| *x == 0x5A),
                                    "the kernel wrote into freed memory"
                                );
                            }
                            1 => {
                                let buf = IoBuf::alloc(BLOCK);
                                file.read_at(at, &buf).await.unwrap();
                                let known = model.borrow()[b as usize];
                                if let Some(want) = known {
                                    assert!(buf.to_vec().iter().all(|x| *x == want), "block {b} of {t}");
                                }
                            }
                            2 => {
                                // A write whose buffer is let go of by everybody but the operation.
                                let buf = IoBuf::alloc(BLOCK);
                                buf.fill(value);
                                let file = Arc::clone(&file);
                                let mut write: Pin<Box<dyn Future<Output = _>>> =
                                    Box::pin(async move { file.write_at(at, &buf, false).await });
                                let _ = poll_once(&mut write).await.is_ready() || write.await.is_ok();
                                model.borrow_mut()[b as usize] = Some(value);
                            }
                            _ => {
                                let buf = IoBuf::alloc(BLOCK);
                                buf.fill(value);
                                file.write_at(at, &buf, round % 40 == 0).await.unwrap();
                                model.borrow_mut()[b as usize] = Some(value);
                            }
                        }
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
    }
}

#[test]
fn a_pending_task_ends_a_stop_only_when_it_ends() {
    let thread = IoThread::start("stop", Params::default()).unwrap();
    let (release, released) = tokio::sync::oneshot::channel::<()>();
    let (tell, told) = std::sync::mpsc::channel();
    thread
        .spawn(move || async move {
            released.await.unwrap();
            tell.send("ended").unwrap();
        })
        .unwrap();
    wait(async {
        let mut stop = Box::pin(thread.stop());
        assert!(poll_once(&mut stop).await.is_pending());
        assert!(told.try_recv().is_err());
        release.send(()).unwrap();
        stop.await;
        assert_eq!(told.try_recv(), Ok("ended"));
    });
}
