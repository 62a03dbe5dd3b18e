//! Tries, from inside each role of the daemon, what somebody who took it over would, and what the role needs. See
//! `drill.rs`, which does the same for the helper; `tests/sandbox` does it within a daemon that serves.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]
#![expect(unsafe_code, reason = "system calls by number, as an intruder would make them")]

mod support;

use sandbox::syscall::{DAEMON, Refusal};
use support::{Attempt, InRole};

const WX: i64 = libc::PROT_EXEC as i64 | libc::PROT_WRITE as i64;

/// What no role may do, beyond what neither process may.
const ESCAPES: &[Attempt] = &[
    ("mmap", libc::SYS_mmap, [0, 4096, WX]),
    ("mprotect", libc::SYS_mprotect, [0, 4096, WX]),
    ("socket", libc::SYS_socket, [libc::AF_PACKET as i64, libc::SOCK_RAW as i64, 0]),
    ("socket", libc::SYS_socket, [libc::AF_ALG as i64, libc::SOCK_SEQPACKET as i64, 0]),
    ("clone", libc::SYS_clone, [libc::CLONE_NEWUSER as i64, 0, 0]),
];

/// What one role has and another must not.
const DIVIDED: &[InRole] = &[
    ("iothread", ("openat", libc::SYS_openat, [-100, 0, 0])),
    ("iothread", ("openat", libc::SYS_openat, [-100, 0, libc::O_RDWR as i64])),
    ("iothread", ("socket", libc::SYS_socket, [libc::AF_UNIX as i64, libc::SOCK_STREAM as i64, 0])),
    ("iothread", ("connect", libc::SYS_connect, [-1, 0, 0])),
    ("iothread", ("bind", libc::SYS_bind, [-1, 0, 0])),
    ("iothread", ("listen", libc::SYS_listen, [-1, 0, 0])),
    ("iothread", ("unlinkat", libc::SYS_unlinkat, [-100, 0, 0])),
    ("iothread", ("linkat", libc::SYS_linkat, [-100, 0, -100])),
    ("iothread", ("symlinkat", libc::SYS_symlinkat, [0, 0, 0])),
    ("iothread", ("renameat2", libc::SYS_renameat2, [-100, 0, -100])),
    ("iothread", ("fchmodat", libc::SYS_fchmodat, [-100, 0, 0])),
    ("iothread", ("truncate", libc::SYS_truncate, [0, 0, 0])),
    ("iothread", ("newfstatat", libc::SYS_newfstatat, [-100, 0, 0])),
    ("iothread", ("ioctl", libc::SYS_ioctl, [-1, 0x4018_70c8, 0])),
    ("iothread", ("io_uring_setup", libc::SYS_io_uring_setup, [1, 0, 0])),
    ("control", ("io_uring_setup", libc::SYS_io_uring_setup, [1, 0, 0])),
    ("worker", ("io_uring_setup", libc::SYS_io_uring_setup, [1, 0, 0])),
    ("worker", ("socket", libc::SYS_socket, [libc::AF_INET as i64, libc::SOCK_STREAM as i64, 0])),
    ("worker", ("connect", libc::SYS_connect, [-1, 0, 0])),
    ("connector", ("ioctl", libc::SYS_ioctl, [-1, 0x1277, 0])),
    ("connector", ("pwrite64", libc::SYS_pwrite64, [-1, 0, 0])),
    ("reservations", ("openat", libc::SYS_openat, [-100, 0, 0])),
    ("reservations", ("socket", libc::SYS_socket, [libc::AF_INET as i64, libc::SOCK_STREAM as i64, 0])),
    // Code only where the name service's modules are loaded.
    ("control", ("mmap", libc::SYS_mmap, [0, 4096, libc::PROT_EXEC as i64])),
    ("worker", ("mmap", libc::SYS_mmap, [0, 4096, libc::PROT_EXEC as i64])),
];

/// What each role needs: it must come back, with whatever error the arguments give.
const NEEDED: &[InRole] = &[
    ("control", ("openat", libc::SYS_openat, [-100, 0, libc::O_RDWR as i64])),
    ("control", ("socket", libc::SYS_socket, [libc::AF_UNIX as i64, libc::SOCK_STREAM as i64, 0])),
    ("control", ("socket", libc::SYS_socket, [libc::AF_INET6 as i64, libc::SOCK_STREAM as i64, 0])),
    ("control", ("bind", libc::SYS_bind, [-1, 0, 0])),
    ("control", ("unlinkat", libc::SYS_unlinkat, [-100, 0, 0])),
    ("control", ("keyctl", libc::SYS_keyctl, [11, 0, 0])),
    ("control", ("rt_sigaction", libc::SYS_rt_sigaction, [libc::SIGTERM as i64, 0, 0])),
    ("control", ("ioctl", libc::SYS_ioctl, [-1, 0x8004_5430, 0])),
    ("control", ("io_uring_enter", libc::SYS_io_uring_enter, [-1, 0, 0])),
    ("iothread", ("io_uring_enter", libc::SYS_io_uring_enter, [-1, 0, 0])),
    ("iothread", ("recvmsg", libc::SYS_recvmsg, [-1, 0, 0])),
    ("iothread", ("accept4", libc::SYS_accept4, [-1, 0, 0])),
    ("iothread", ("fallocate", libc::SYS_fallocate, [-1, 0, 0])),
    ("iothread", ("fdatasync", libc::SYS_fdatasync, [-1, 0, 0])),
    ("iothread", ("mmap", libc::SYS_mmap, [0, 0, 3])),
    ("iothread", ("statx", libc::SYS_statx, [-1, 0, libc::AT_EMPTY_PATH as i64])),
    ("worker", ("openat", libc::SYS_openat, [-100, 0, libc::O_RDWR as i64])),
    ("worker", ("ioctl", libc::SYS_ioctl, [-1, 0x8008_1272, 0])),
    ("worker", ("ioctl", libc::SYS_ioctl, [-1, 0x1277, 0])),
    ("worker", ("ioctl", libc::SYS_ioctl, [-1, 0x4018_70c8, 0])),
    ("connector", ("socket", libc::SYS_socket, [libc::AF_INET as i64, libc::SOCK_DGRAM as i64, 0])),
    ("connector", ("socket", libc::SYS_socket, [libc::AF_NETLINK as i64, libc::SOCK_RAW as i64, 0])),
    ("connector", ("connect", libc::SYS_connect, [-1, 0, 0])),
    ("connector", ("mmap", libc::SYS_mmap, [0, 0, libc::PROT_EXEC as i64 | libc::PROT_READ as i64])),
    ("reservations", ("connect", libc::SYS_connect, [-1, 0, 0])),
    ("reservations", ("sendmsg", libc::SYS_sendmsg, [-1, 0, 0])),
    ("starter", ("io_uring_setup", libc::SYS_io_uring_setup, [0, 0, 0])),
    ("starter", ("seccomp", libc::SYS_seccomp, [9, 0, 0])),
];

#[test]
fn attempt() {
    support::child(&DAEMON, Refusal::End);
}

/// The same where calls are let fail, as `--sandbox default` has it.
#[test]
fn lenient_attempt() {
    support::child(&DAEMON, Refusal::Fail(&DAEMON));
}

#[test]
fn a_refused_call_fails_and_one_that_is_never_made_ends_the_process() {
    support::all_end("lenient_attempt", &[("worker", ("execve", libc::SYS_execve, [0; 3]))]);
    support::all_are_answered("lenient_attempt", DIVIDED);
}

#[test]
fn escapes_are_refused_in_every_role() {
    // To take on a further filter is what the starter is there for.
    support::escapes(&DAEMON, ESCAPES, &[("starter", "seccomp")]);
}

#[test]
fn roles_do_not_have_each_others_calls() {
    support::all_end("attempt", DIVIDED);
}

#[test]
fn what_a_role_needs_comes_back() {
    support::all_come_back(NEEDED);
}
