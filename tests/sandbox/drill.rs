//! Some sixty escapes from each kind of thread of a daemon that serves, by [`Tracee`]: each must be refused; what the thread
//! needs must not be; and the daemon serves on.

use std::fs;

use nix::libc;
use serde_json::json;
use tests::nbd::Headers;
use tests::{Daemon, Setup, on_reference, skip, wait_for};

use crate::tracee::{Outcome, Tracee};

/// A call with its first three arguments, which are such that it would do nothing if it were made.
type Call = (i64, [i64; 3]);

/// What no thread may do.
const ESCAPES: &[Call] = &[
    (libc::SYS_execve, [0, 0, 0]),
    (libc::SYS_execveat, [-1, 0, 0]),
    (libc::SYS_clone, [libc::SIGCHLD as i64, 0, 0]),
    (libc::SYS_clone, [libc::CLONE_NEWUSER as i64, 0, 0]),
    (libc::SYS_fork, [0, 0, 0]),
    (libc::SYS_vfork, [0, 0, 0]),
    (libc::SYS_ptrace, [libc::PTRACE_TRACEME as i64, 0, 0]),
    (libc::SYS_process_vm_readv, [1, 0, 0]),
    (libc::SYS_process_vm_writev, [1, 0, 0]),
    (libc::SYS_pidfd_open, [1, 0, 0]),
    (libc::SYS_pidfd_getfd, [-1, 0, 0]),
    (libc::SYS_kill, [1, 0, 0]),
    (libc::SYS_tkill, [1, 0, 0]),
    (libc::SYS_tgkill, [1, 1, 0]),
    (libc::SYS_mount, [0, 0, 0]),
    (libc::SYS_umount2, [0, 0, 0]),
    (libc::SYS_move_mount, [-1, 0, -1]),
    (libc::SYS_open_tree, [-1, 0, 0]),
    (libc::SYS_fsopen, [0, 0, 0]),
    (libc::SYS_pivot_root, [0, 0, 0]),
    (libc::SYS_chroot, [0, 0, 0]),
    (libc::SYS_unshare, [0, 0, 0]),
    (libc::SYS_setns, [-1, 0, 0]),
    (libc::SYS_setuid, [0, 0, 0]),
    (libc::SYS_setgid, [0, 0, 0]),
    (libc::SYS_setresuid, [-1, -1, -1]),
    (libc::SYS_setgroups, [0, 0, 0]),
    (libc::SYS_capset, [0, 0, 0]),
    (libc::SYS_init_module, [0, 0, 0]),
    (libc::SYS_finit_module, [-1, 0, 0]),
    (libc::SYS_delete_module, [0, 0, 0]),
    (libc::SYS_kexec_load, [0, 0, 0]),
    (libc::SYS_bpf, [-1, 0, 0]),
    (libc::SYS_perf_event_open, [0, 0, 0]),
    (libc::SYS_reboot, [0, 0, 0]),
    (libc::SYS_swapon, [0, 0, 0]),
    (libc::SYS_settimeofday, [0, 0, 0]),
    (libc::SYS_sethostname, [0, 0, 0]),
    (libc::SYS_iopl, [0, 0, 0]),
    (libc::SYS_open_by_handle_at, [-1, 0, 0]),
    (libc::SYS_mknodat, [-1, 0, 0]),
    (libc::SYS_userfaultfd, [-1, 0, 0]),
    (libc::SYS_personality, [-1, 0, 0]),
    (libc::SYS_add_key, [0, 0, 0]),
    (libc::SYS_keyctl, [0, 0, 0]),
    (libc::SYS_prctl, [libc::PR_SET_DUMPABLE as i64, 1, 0]),
    (libc::SYS_prctl, [libc::PR_SET_SECCOMP as i64, 0, 0]),
    (libc::SYS_rt_sigaction, [libc::SIGSYS as i64, 0, 0]),
    (libc::SYS_prlimit64, [0, libc::RLIMIT_NOFILE as i64, 1]),
    (libc::SYS_shmget, [0, 0, 0]),
    (libc::SYS_fchownat, [-1, 0, 0]),
    (libc::SYS_openat2, [-1, 0, 0]),
    (libc::SYS_socket, [libc::AF_PACKET as i64, libc::SOCK_RAW as i64, 0]),
    (libc::SYS_socket, [libc::AF_ALG as i64, libc::SOCK_SEQPACKET as i64, 0]),
    (libc::SYS_mmap, [0, 0, (libc::PROT_EXEC | libc::PROT_WRITE) as i64]),
    (libc::SYS_mprotect, [0, 0, libc::PROT_EXEC as i64]),
    // TIOCSTI, SG_IO, LOOP_SET_FD, DM_DEV_CREATE, NVME_IOCTL_RESET.
    (libc::SYS_ioctl, [-1, 0x5412, 0]),
    (libc::SYS_ioctl, [-1, 0x2285, 0]),
    (libc::SYS_ioctl, [-1, 0x4c00, 0]),
    (libc::SYS_ioctl, [-1, 0xc138_fd03, 0]),
    (libc::SYS_ioctl, [-1, 0x4e44, 0]),
];

/// What a kind of thread may not do beside that, and what it must be able to do.
struct Role {
    name: &'static str,
    refused: &'static [Call],
    made: &'static [Call],
}

const LINK: Call = (libc::SYS_symlinkat, [0, -1, 0]);
const RING: Call = (libc::SYS_io_uring_setup, [0, 0, 0]);
const OPEN: Call = (libc::SYS_openat, [-1, 0, 0]);
const CONNECT: Call = (libc::SYS_connect, [-1, 0, 0]);
const RECEIVE: Call = (libc::SYS_recvmsg, [-1, 0, 0]);
const SYNC: Call = (libc::SYS_fdatasync, [-1, 0, 0]);
const DISCARD: Call = (libc::SYS_ioctl, [-1, 0x1277, 0]);
const FILTER: Call = (libc::SYS_seccomp, [-1, 0, 0]);

const ROLES: &[Role] = &[
    Role { name: "control", refused: &[RING, FILTER], made: &[OPEN, CONNECT, RECEIVE, SYNC] },
    Role { name: "iothread", refused: &[RING, FILTER, OPEN, LINK, CONNECT, DISCARD], made: &[RECEIVE, SYNC] },
    Role { name: "worker", refused: &[RING, FILTER, CONNECT], made: &[OPEN, SYNC, DISCARD] },
    Role { name: "reservations", refused: &[RING, FILTER, OPEN, DISCARD], made: &[CONNECT, RECEIVE] },
    Role { name: "starter", refused: &[], made: &[RING, OPEN, CONNECT] },
];

/// The threads of a process with their names, oldest first.
fn threads(pid: u32) -> Vec<(i32, String)> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("list the threads");
    let mut ids: Vec<i32> = tasks.map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().unwrap()).collect();
    ids.sort_unstable();
    let name =
        |id: i32| fs::read_to_string(format!("/proc/{pid}/task/{id}/comm")).unwrap_or_default().trim().to_owned();
    ids.into_iter().map(|id| (id, name(id))).collect()
}

/// A thread of that role: the IOThread is called `IO io0`, and so are, later, those of its pool.
fn thread(daemon: &Daemon, role: &str) -> i32 {
    wait_for(role, || {
        let threads = threads(daemon.pid());
        let named =
            |wanted: &str| threads.iter().filter(|(_, name)| name == wanted).map(|(id, _)| *id).collect::<Vec<_>>();
        match role {
            "control" => threads.first().map(|(id, _)| *id),
            "iothread" => named("IO io0").first().copied(),
            "worker" => named("IO io0").get(1).copied(),
            "reservations" => named("PR pr0").first().copied(),
            _ => named("starter").first().copied(),
        }
    })
}

fn refused_in_every_thread(sandbox: &str) {
    if on_reference() {
        skip!("the reference has no such sandbox");
    }
    let mut daemon = Setup::new()
        .line(sandbox)
        .qmp()
        .image("disk.img", 1 << 20)
        .line("--object iothread,id=io0,thread-pool-min=2 --object pr-manager-helper,id=pr0,path=none.sock")
        .line("--blockdev file,node-name=disk,filename=disk.img,aio=threads --nbd-server addr.type=unix,addr.path=nbd.sock")
        .line("--export nbd,id=e,node-name=disk,writable=on,iothread=io0")
        .start();
    let (mut client, _) = daemon.nbd().open("disk", Headers::Simple);
    assert_eq!(client.write(0, 0, &[7; 4096]), 0);
    for role in ROLES {
        let tracee = Tracee::stop(thread(&daemon, role.name));
        for (number, arguments) in ESCAPES.iter().chain(role.refused) {
            let outcome = tracee.call(*number, *arguments);
            assert_eq!(outcome, Outcome::Refused, "{}: call {number} {arguments:?}", role.name);
        }
        for (number, arguments) in role.made {
            let outcome = tracee.call(*number, *arguments);
            assert_ne!(outcome, Outcome::Refused, "{}: call {number} {arguments:?}", role.name);
        }
        assert_eq!(tracee.call(libc::SYS_clone3, [0; 3]), Outcome::Made(-i64::from(libc::ENOSYS)), "{}", role.name);
    }
    assert_eq!(client.read(0, 4096), [7; 4096], "the daemon serves on");
    daemon.qmp().ok("query-version", json!({}));
    daemon.stop();
}

#[test]
fn refused_by_default() {
    refused_in_every_thread("--sandbox default");
}

#[test]
fn refused_by_strict() {
    refused_in_every_thread("--sandbox strict");
}
