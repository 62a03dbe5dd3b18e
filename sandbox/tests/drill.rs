//! Tries, from inside each role of the helper, what somebody who took it over would: every call must be refused, with
//! one line that names it. And the other way: what each role needs goes through.
//!
//! Each attempt is a process of its own (this program again, with the attempt in its environment), since a refused call
//! ends it.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]
#![expect(unsafe_code, reason = "system calls by number, as an intruder would make them")]

mod support;

use sandbox::syscall::{PR_HELPER, Refusal};
use support::{Attempt, InRole};

const EXEC: i64 = libc::PROT_EXEC as i64 | libc::PROT_READ as i64;

/// What no role may do, whatever the options, beyond what neither process may.
const ESCAPES: &[Attempt] = &[
    ("clone3", libc::SYS_clone3, [0, 0, 0]),
    ("socket", libc::SYS_socket, [libc::AF_INET as i64, libc::SOCK_STREAM as i64, 0]),
    ("socket", libc::SYS_socket, [libc::AF_UNIX as i64, libc::SOCK_STREAM as i64, 0]),
    ("socketpair", libc::SYS_socketpair, [libc::AF_UNIX as i64, libc::SOCK_STREAM as i64, 0]),
    ("connect", libc::SYS_connect, [0, 0, 0]),
    ("bind", libc::SYS_bind, [0, 0, 0]),
    ("listen", libc::SYS_listen, [0, 0, 0]),
    ("io_uring_setup", libc::SYS_io_uring_setup, [0, 0, 0]),
    ("memfd_create", libc::SYS_memfd_create, [0, 0, 0]),
    ("linkat", libc::SYS_linkat, [0, 0, 0]),
    ("symlinkat", libc::SYS_symlinkat, [0, 0, 0]),
    ("renameat2", libc::SYS_renameat2, [0, 0, 0]),
    ("fchmodat", libc::SYS_fchmodat, [0, 0, 0]),
    ("truncate", libc::SYS_truncate, [0, 0, 0]),
    ("pwrite64", libc::SYS_pwrite64, [0, 0, 0]),
    ("mmap", libc::SYS_mmap, [0, 4096, EXEC]),
    ("mprotect", libc::SYS_mprotect, [0, 4096, EXEC]),
    // BLKDISCARD, FIONBIO.
    ("ioctl", libc::SYS_ioctl, [-1, 0x1277, 0]),
    ("ioctl", libc::SYS_ioctl, [-1, 0x5421, 0]),
];

/// What one role has and another must not.
const DIVIDED: &[InRole] = &[
    ("wire", ("ioctl", libc::SYS_ioctl, [-1, 0x2285, 0])),
    ("logger", ("ioctl", libc::SYS_ioctl, [-1, 0x2285, 0])),
    ("worker", ("recvmsg", libc::SYS_recvmsg, [-1, 0, 0])),
    ("worker", ("sendmsg", libc::SYS_sendmsg, [-1, 0, 0])),
    ("worker", ("accept4", libc::SYS_accept4, [-1, 0, 0])),
    ("worker", ("openat", libc::SYS_openat, [-100, 0, 0])),
    ("worker", ("unlinkat", libc::SYS_unlinkat, [-100, 0, 0])),
    ("logger", ("openat", libc::SYS_openat, [-100, 0, 0])),
    ("logger", ("recvmsg", libc::SYS_recvmsg, [-1, 0, 0])),
    // Reading is all that any option adds.
    ("wire", ("openat", libc::SYS_openat, [-100, 0, libc::O_RDWR as i64])),
    ("wire", ("openat", libc::SYS_openat, [-100, 0, libc::O_WRONLY as i64 | libc::O_CREAT as i64])),
    ("wire", ("statx", libc::SYS_statx, [-100, 0, 0])),
    ("wire", ("fcntl", libc::SYS_fcntl, [0, libc::F_SETFL as i64, 0])),
];

/// What each role needs: it must come back, with whatever error the arguments give.
const NEEDED: &[InRole] = &[
    ("wire", ("recvmsg", libc::SYS_recvmsg, [-1, 0, 0])),
    ("wire", ("sendmsg", libc::SYS_sendmsg, [-1, 0, 0])),
    ("wire", ("accept4", libc::SYS_accept4, [-1, 0, 0])),
    ("wire", ("epoll_ctl", libc::SYS_epoll_ctl, [-1, 0, 0])),
    ("wire", ("fcntl", libc::SYS_fcntl, [-1, libc::F_GETFL as i64, 0])),
    ("wire", ("getsockopt", libc::SYS_getsockopt, [-1, libc::SOL_SOCKET as i64, 0])),
    ("wire", ("openat", libc::SYS_openat, [-100, 0, libc::O_CLOEXEC as i64])),
    ("wire", ("mmap", libc::SYS_mmap, [0, 0, 3])),
    ("worker", ("ioctl", libc::SYS_ioctl, [-1, 0x2285, 0])),
    ("worker", ("ioctl", libc::SYS_ioctl, [-1, 0x4e40, 0])),
    ("worker", ("ioctl", libc::SYS_ioctl, [-1, 0x4018_70c8, 0])),
    ("worker", ("ioctl", libc::SYS_ioctl, [-1, 0x4010_70c9, 0])),
    ("worker", ("ioctl", libc::SYS_ioctl, [-1, 0x4010_70ca, 0])),
    ("worker", ("ioctl", libc::SYS_ioctl, [-1, 0x4018_70cb, 0])),
    ("worker", ("ioctl", libc::SYS_ioctl, [-1, 0x4018_70cc, 0])),
    ("worker", ("ioctl", libc::SYS_ioctl, [-1, 0x4010_70cd, 0])),
    ("worker", ("ioctl", libc::SYS_ioctl, [-1, 0xc010_70ce, 0])),
    ("worker", ("ioctl", libc::SYS_ioctl, [-1, 0x8010_70cf, 0])),
    ("worker", ("ioctl", libc::SYS_ioctl, [-1, 0xc048_4e43, 0])),
    ("worker", ("ioctl", libc::SYS_ioctl, [-1, 0xc048_4e41, 0])),
    ("worker", ("pread64", libc::SYS_pread64, [-1, 0, 0])),
    ("worker", ("close", libc::SYS_close, [-1, 0, 0])),
    ("logger", ("write", libc::SYS_write, [-1, 0, 0])),
];

#[test]
fn attempt() {
    support::child(&PR_HELPER, Refusal::End);
}

#[test]
fn escapes_are_refused_in_every_role() {
    support::escapes(&PR_HELPER, ESCAPES, &[]);
}

#[test]
fn roles_do_not_have_each_others_calls() {
    support::all_end("attempt", DIVIDED);
}

#[test]
fn what_a_role_needs_comes_back() {
    support::all_come_back(NEEDED);
}
