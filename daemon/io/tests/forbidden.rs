//! Where a sandbox or an administrator forbids io_uring, before or in the middle: everything works, on the pool.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, clippy::print_stdout, reason = "test code")]
#![expect(unsafe_code, reason = "installs a system-call filter")]

use buf::IoBuf;
use io::{Access, Engine, File, IoThread, OpenHow, Params};
use std::future::Future;
use std::path::PathBuf;
use std::rc::Rc;

/// Makes the calling thread, and those that it starts, fail with EPERM in one system call.
fn forbid(call: libc::c_long) {
    let stmt = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let mut program = [
        // The number is the first word of what a filter sees.
        stmt(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0),
        libc::sock_filter {
            code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
            jt: 0,
            jf: 1,
            k: u32::try_from(call).unwrap(),
        },
        stmt(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | u32::try_from(libc::EPERM).unwrap()),
        stmt(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
    ];
    let prog = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: both calls take plain numbers and a program that lives until they return.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const prog), 0);
    }
}

fn wait<T>(f: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(f)
}

async fn write_and_read(path: PathBuf) {
    let how = OpenHow { access: Access::ReadWrite, direct: false, engine: Engine::Ring };
    let file = Rc::new(File::open(&path, how).await.unwrap());
    let tasks: Vec<_> = (0..400u64)
        .map(|i| {
            let file = Rc::clone(&file);
            tokio::task::spawn_local(async move {
                file.write_at(i * 8, &IoBuf::copy_of(&i.to_le_bytes()), i % 100 == 0).await.unwrap();
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    file.sync_data().await.unwrap();
    let want: Vec<u8> = (0..400u64).flat_map(u64::to_le_bytes).collect();
    let all = IoBuf::alloc(want.len());
    assert_eq!(file.read_at(0, &all).await, Ok(want.len()));
    assert_eq!(all.to_vec(), want);
}

#[test]
fn no_ring_can_be_made() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().to_owned();
    std::thread::spawn(move || {
        forbid(libc::SYS_io_uring_setup);
        let thread = IoThread::start("none", Params::default()).unwrap();
        assert_eq!(thread.ring_error().and_then(std::io::Error::raw_os_error), Some(libc::EPERM));
        wait(async {
            thread.run(move || write_and_read(path)).await.unwrap();
            thread.stop().await;
        });
    })
    .join()
    .unwrap();
}

#[test]
fn the_ring_is_taken_away() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().to_owned();
    let thread = IoThread::start("gone", Params::default()).unwrap();
    if let Some(e) = thread.ring_error() {
        println!("skipped: no ring here: {e}");
        return;
    }
    wait(async {
        let work = thread.run(move || async move {
            write_and_read(path.clone()).await;
            forbid(libc::SYS_io_uring_enter);
            write_and_read(path).await;
        });
        work.await.unwrap();
        thread.stop().await;
    });
}
