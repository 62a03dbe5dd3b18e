//! Files through the ring, the pool and a foreign runtime: the same bytes in each case.
#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::cast_possible_truncation, reason = "test code")]
#![expect(unsafe_code, reason = "makes a scattered buffer")]

use buf::IoBuf;
use io::{Access, AllocMode, Engine, Extent, File, FileKind, IoThread, OpenHow, Params, RingUse};
use std::future::Future;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Ways to run the same test: engine of the file, and whether the thread has a ring.
const WAYS: [(Engine, RingUse); 3] =
    [(Engine::Ring, RingUse::Auto), (Engine::Ring, RingUse::Off), (Engine::Threads, RingUse::Auto)];

fn on_thread<Fut: Future<Output = ()> + 'static>(ring: RingUse, f: impl FnOnce() -> Fut + Send + 'static) {
    let thread = IoThread::start("test", Params { ring, ..Params::default() }).unwrap();
    if ring == RingUse::Auto {
        assert!(thread.ring_error().is_none(), "{:?}", thread.ring_error());
    } else {
        assert!(thread.ring_error().is_some());
    }
    wait(async {
        thread.run(f).await.unwrap();
        thread.stop().await;
        assert!(thread.spawn(|| async {}).is_err(), "a stopped thread takes nothing");
    });
}

fn wait<T>(f: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(f)
}

fn how(engine: Engine) -> OpenHow {
    OpenHow { access: Access::ReadWrite, direct: false, engine }
}

fn image(bytes: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + i / 251) as u8).collect()
}

async fn read(file: &File, at: u64, len: usize) -> (usize, Vec<u8>) {
    let buf = IoBuf::alloc(len);
    buf.fill(0xEE);
    let n = file.read_at(at, &buf).await.unwrap();
    (n, buf.to_vec())
}

#[test]
fn reads_and_writes_whole_buffers() {
    for (engine, ring) in WAYS {
        let bytes = pattern(100_000);
        let temp = image(&bytes);
        let path = temp.path().to_owned();
        on_thread(ring, move || async move {
            let file = File::open(&path, how(engine)).await.unwrap();
            assert_eq!(read(&file, 0, 100_000).await, (100_000, bytes.clone()));
            let (n, tail) = read(&file, 99_000, 4096).await;
            assert_eq!(n, 1000);
            assert_eq!(&tail[..1000], &bytes[99_000..]);
            assert!(tail[1000..].iter().all(|b| *b == 0), "after the end zeroes");
            assert_eq!(read(&file, 1 << 40, 512).await, (0, vec![0; 512]));

            file.write_at(5, &IoBuf::copy_of(b"hello"), false).await.unwrap();
            file.write_at(200_000, &IoBuf::copy_of(b"far"), true).await.unwrap();
            file.sync_data().await.unwrap();
            file.sync_all().await.unwrap();
            assert_eq!(std::fs::metadata(&path).unwrap().len(), 200_003);
            assert_eq!(&std::fs::read(&path).unwrap()[5..10], b"hello");
            assert_eq!(read(&file, 199_998, 5).await.1, b"\0\0far");

            let stat = file.stat().await.unwrap();
            assert_eq!((stat.kind, stat.size), (FileKind::Regular, 200_003));
            file.set_len(10).await.unwrap();
            assert_eq!(file.stat().await.unwrap().size, 10);
            assert!(file.read_at(u64::MAX, &IoBuf::alloc(1)).await.is_err());
            file.drop_cache(0, 0).await.unwrap();
            file.close().await;
        });
    }
}

#[test]
fn scattered_buffers_beyond_the_iovec_limit() {
    for (engine, ring) in WAYS {
        let temp = image(&[]);
        let path = temp.path().to_owned();
        on_thread(ring, move || async move {
            let file = File::open(&path, how(engine)).await.unwrap();
            let bytes = pattern(3000 * 16);
            let (all, keep) = scattered(3000, 16);
            all.write_at(0, &bytes);
            file.write_at(7, &all, false).await.unwrap();
            assert_eq!(&std::fs::read(&path).unwrap()[7..], &bytes);
            all.fill(0);
            assert_eq!(file.read_at(7, &all).await.unwrap(), bytes.len());
            assert_eq!(all.to_vec(), bytes);
            drop(keep);
        });
    }
}

/// `count` segments of `len` bytes each with gaps between them.
fn scattered(count: usize, len: usize) -> (IoBuf, IoBuf) {
    struct Keep(#[expect(dead_code, reason = "held for its memory")] IoBuf);
    // SAFETY: the segments lie in a pooled buffer that lives as long as this and is only touched through IoBufs.
    unsafe impl buf::Backing for Keep {}
    let block = IoBuf::zeroed(count * len * 2);
    let segments: Vec<_> =
        (0..count).flat_map(|i| block.slice(i * len * 2, len).segments().collect::<Vec<_>>()).collect();
    // SAFETY: Keep holds the block.
    let all = unsafe { IoBuf::from_backing(Arc::new(Keep(block.clone())), &segments) };
    (all, block)
}

#[test]
fn direct_io_meets_the_end_of_the_file() {
    // Not every file system of a test machine has O_DIRECT; the folder of the sources usually does.
    let bytes = pattern(8192 + 1000);
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let mut temp = tempfile::NamedTempFile::new_in(dir).unwrap();
    temp.write_all(&bytes).unwrap();
    let path = temp.path().to_owned();
    on_thread(RingUse::Auto, move || async move {
        let how = OpenHow { direct: true, ..how(Engine::Ring) };
        let Ok(file) = File::open(&path, how).await else {
            println!("skipped: no O_DIRECT on {}", path.display());
            return;
        };
        assert!(file.is_direct());
        let align = file.direct_align().await.unwrap();
        assert!(align.offset >= 512 && align.offset <= 4096, "{align:?}");
        let (n, got) = read(&file, 0, 16384).await;
        assert_eq!(n, bytes.len());
        assert_eq!(&got[..n], &bytes[..]);
        assert!(got[n..].iter().all(|b| *b == 0));
        let (n, got) = read(&file, 8192, 4096).await;
        assert_eq!((n, &got[..1000]), (1000, &bytes[8192..]));
    });
}

#[test]
fn holes_and_allocation() {
    for (engine, ring) in WAYS {
        let temp = image(&[]);
        let path = temp.path().to_owned();
        on_thread(ring, move || async move {
            let file = File::open(&path, how(engine)).await.unwrap();
            assert_eq!(file.extent_at(0).await.unwrap(), Extent::End);
            file.set_len(1 << 20).await.unwrap();
            if file.extent_at(0).await.unwrap() == Extent::Data(1 << 20) {
                println!("skipped: no holes on {}", path.display());
                return;
            }
            file.write_at(256 << 10, &IoBuf::copy_of(&pattern(256 << 10)), false).await.unwrap();
            assert_eq!(file.extent_at(0).await.unwrap(), Extent::Hole(256 << 10));
            assert_eq!(file.extent_at(300 << 10).await.unwrap(), Extent::Data(512 << 10));
            assert_eq!(file.extent_at(512 << 10).await.unwrap(), Extent::Hole(1 << 20));
            assert_eq!(file.extent_at(1 << 20).await.unwrap(), Extent::End);

            file.allocate(AllocMode::PunchHole, 256 << 10, 128 << 10).await.unwrap();
            assert_eq!(file.extent_at(0).await.unwrap(), Extent::Hole(384 << 10));
            assert!(read(&file, 256 << 10, 128 << 10).await.1.iter().all(|b| *b == 0));
            if file.allocate(AllocMode::ZeroRange, 384 << 10, 128 << 10).await.is_ok() {
                assert!(read(&file, 384 << 10, 128 << 10).await.1.iter().all(|b| *b == 0));
            }
            file.allocate(AllocMode::AllocateKeepSize, 0, 2 << 20).await.unwrap();
            assert_eq!(file.stat().await.unwrap().size, 1 << 20);
            file.allocate(AllocMode::Allocate, 0, 2 << 20).await.unwrap();
            let stat = file.stat().await.unwrap();
            assert_eq!(stat.size, 2 << 20);
            assert!(stat.allocated >= 2 << 20);
        });
    }
}

#[test]
fn works_on_a_runtime_that_is_no_iothread() {
    let temp = image(b"abc");
    wait(async {
        let file = File::open(temp.path(), how(Engine::Ring)).await.unwrap();
        assert_eq!(read(&file, 0, 3).await, (3, b"abc".to_vec()));
        file.sync_data().await.unwrap();
        assert!(IoThread::current().is_none());
    });
}

#[test]
fn the_calling_thread_becomes_an_iothread() {
    let temp = image(b"abc");
    let sum = io::run_main("main", Params::default(), |this| async move {
        assert!(Arc::ptr_eq(&this, &IoThread::current().unwrap()));
        let file = File::open(temp.path(), how(Engine::Ring)).await.unwrap();
        // Written first, so that no page cache is in the way of the ring.
        file.write_at(0, &IoBuf::copy_of(b"xyz"), true).await.unwrap();
        let other = IoThread::start("other", Params::default()).unwrap();
        let answer = other.run({
            let this = Arc::clone(&this);
            move || async move { this.run(|| async { 40 }).await.unwrap() + 2 }
        });
        let answer = answer.await.unwrap();
        other.stop().await;
        answer
    });
    assert_eq!(sum.unwrap(), 42);
    assert!(IoThread::current().is_none());
}

#[test]
fn threads_carry_their_name() {
    let thread = IoThread::start("io-name-test", Params::default()).unwrap();
    let seen = wait(thread.run(|| async {
        let comm = std::fs::read_to_string("/proc/thread-self/comm").unwrap();
        let pool = io::blocking(|| std::fs::read_to_string("/proc/thread-self/comm").unwrap()).await.unwrap();
        (comm, pool)
    }));
    assert_eq!(seen.unwrap(), ("io-name-test\n".into(), "io-name-test\n".into()));
    wait(thread.stop());
}

#[test]
fn errors_are_the_kernels() {
    for (engine, ring) in WAYS {
        let temp = image(b"abc");
        let path = temp.path().to_owned();
        on_thread(ring, move || async move {
            let file = File::open(&path, OpenHow { access: Access::ReadOnly, ..how(engine) }).await.unwrap();
            let err = file.write_at(0, &IoBuf::copy_of(b"x"), false).await.unwrap_err();
            assert_eq!(err, nix::errno::Errno::EBADF);
            let err = File::open(Path::new("/nonexistent/x"), how(engine)).await.unwrap_err();
            assert_eq!(err.kind(), std::io::ErrorKind::NotFound);
            if let Ok(full) = File::open(Path::new("/dev/full"), how(engine)).await {
                let err = full.write_at(0, &IoBuf::copy_of(b"x"), false).await.unwrap_err();
                assert_eq!(err, nix::errno::Errno::ENOSPC);
                assert_eq!(full.stat().await.unwrap().kind, FileKind::Char);
            }
            assert!(file.block_device().await.is_err());
        });
    }
}
