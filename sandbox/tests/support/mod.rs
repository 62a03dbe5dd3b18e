//! One attempt in a process of its own: this test program again, with the attempt in its environment.

use sandbox::syscall::{EXIT_REFUSED, Mode, Policy, Refusal, name_refused_calls};
use std::process::{Command, Output};

/// A call with its first three arguments; the others are zero.
pub type Attempt = (&'static str, libc::c_long, [i64; 3]);

/// An attempt from inside a role.
pub type InRole = (&'static str, Attempt);

/// What no thread of either process may do, whatever the options.
const ESCAPES: &[Attempt] = &[
    ("execve", libc::SYS_execve, [0, 0, 0]),
    ("execveat", libc::SYS_execveat, [0, 0, 0]),
    ("clone", libc::SYS_clone, [0, 0, 0]),
    ("ptrace", libc::SYS_ptrace, [0, 0, 0]),
    ("process_vm_readv", libc::SYS_process_vm_readv, [1, 0, 0]),
    ("process_vm_writev", libc::SYS_process_vm_writev, [1, 0, 0]),
    ("pidfd_getfd", libc::SYS_pidfd_getfd, [0, 0, 0]),
    ("kill", libc::SYS_kill, [1, 0, 0]),
    ("tkill", libc::SYS_tkill, [1, 0, 0]),
    ("tgkill", libc::SYS_tgkill, [1, 1, 0]),
    ("mount", libc::SYS_mount, [0, 0, 0]),
    ("umount2", libc::SYS_umount2, [0, 0, 0]),
    ("move_mount", libc::SYS_move_mount, [0, 0, 0]),
    ("fsopen", libc::SYS_fsopen, [0, 0, 0]),
    ("pivot_root", libc::SYS_pivot_root, [0, 0, 0]),
    ("chroot", libc::SYS_chroot, [0, 0, 0]),
    ("unshare", libc::SYS_unshare, [0, 0, 0]),
    ("setns", libc::SYS_setns, [0, 0, 0]),
    ("setuid", libc::SYS_setuid, [0, 0, 0]),
    ("setgid", libc::SYS_setgid, [0, 0, 0]),
    ("setresuid", libc::SYS_setresuid, [0, 0, 0]),
    ("setgroups", libc::SYS_setgroups, [0, 0, 0]),
    ("capset", libc::SYS_capset, [0, 0, 0]),
    ("prctl", libc::SYS_prctl, [libc::PR_SET_DUMPABLE as i64, 1, 0]),
    ("seccomp", libc::SYS_seccomp, [0, 0, 0]),
    ("rt_sigaction", libc::SYS_rt_sigaction, [libc::SIGSYS as i64, 0, 0]),
    ("init_module", libc::SYS_init_module, [0, 0, 0]),
    ("finit_module", libc::SYS_finit_module, [0, 0, 0]),
    ("kexec_load", libc::SYS_kexec_load, [0, 0, 0]),
    ("reboot", libc::SYS_reboot, [0, 0, 0]),
    ("bpf", libc::SYS_bpf, [0, 0, 0]),
    ("perf_event_open", libc::SYS_perf_event_open, [0, 0, 0]),
    ("userfaultfd", libc::SYS_userfaultfd, [0, 0, 0]),
    ("keyctl", libc::SYS_keyctl, [0, 0, 0]),
    ("shmget", libc::SYS_shmget, [0, 0, 0]),
    ("open_by_handle_at", libc::SYS_open_by_handle_at, [0, 0, 0]),
    ("openat2", libc::SYS_openat2, [0, 0, 0]),
    ("mknodat", libc::SYS_mknodat, [0, 0, 0]),
    ("fchownat", libc::SYS_fchownat, [0, 0, 0]),
    ("personality", libc::SYS_personality, [0, 0, 0]),
    ("setrlimit", libc::SYS_setrlimit, [0, 0, 0]),
    // TIOCSTI, SG_SCSI_RESET, LOOP_SET_FD, DM_DEV_CREATE, NVME_IOCTL_RESET.
    ("ioctl", libc::SYS_ioctl, [-1, 0x5412, 0]),
    ("ioctl", libc::SYS_ioctl, [-1, 0x2284, 0]),
    ("ioctl", libc::SYS_ioctl, [-1, 0x4c00, 0]),
    ("ioctl", libc::SYS_ioctl, [-1, 0xc138_fd03, 0]),
    ("ioctl", libc::SYS_ioctl, [-1, 0x4e44, 0]),
];

/// The child: under the filter of its role, with all that options can add, makes the call and says that it came back.
pub fn child(policy: &'static Policy, then: Refusal) {
    let Ok(role) = std::env::var("DRILL_ROLE") else { return };
    let numbers = std::env::var("DRILL_CALL").unwrap();
    let [call, a, b, c] = numbers.split(' ').map(|n| n.parse::<i64>().unwrap()).collect::<Vec<_>>()[..] else {
        panic!("DRILL_CALL")
    };
    let options: Vec<_> = policy.options().collect();
    name_refused_calls(then).unwrap();
    policy.filters(&options, Mode::Enforce).enter(role.leak()).unwrap();
    // SAFETY: no argument is a valid address, so the kernel reads and writes no memory of this process.
    unsafe {
        let result = libc::syscall(call, a, b, c, 0, 0, 0);
        let refused = result == -1 && *libc::__errno_location() == libc::EPERM;
        let text = if refused { c"came back refused\n" } else { c"came back\n" };
        libc::write(1, text.as_ptr().cast(), text.count_bytes());
        libc::_exit(0);
    }
}

/// The test that is the child, and the role that it takes on.
type Child<'a> = (&'a str, &'a str);

fn make((test, role): Child<'_>, (_, call, [a, b, c]): &Attempt) -> Output {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", test, "--nocapture", "--test-threads=1"]);
    child.env("DRILL_ROLE", role).env("DRILL_CALL", format!("{call} {a} {b} {c}")).output().unwrap()
}

/// Standard error must have the line that names the call and the role.
fn must_be_named(role: &str, attempt: &Attempt, output: &Output) {
    let line = String::from_utf8_lossy(&output.stderr);
    let named = line.contains(&format!("system call {} (", attempt.0)) && line.contains(&format!("in thread '{role}'"));
    assert!(named, "{role}: {attempt:?}: {output:?}");
}

/// The call must end the process.
fn must_end(child: Child<'_>, attempt: &Attempt) {
    let output = make(child, attempt);
    assert_eq!(output.status.code(), Some(EXIT_REFUSED), "{child:?}: {attempt:?}: {output:?}");
    assert!(!String::from_utf8_lossy(&output.stdout).contains("came back"), "{child:?}: {attempt:?}");
    must_be_named(child.1, attempt, &output);
}

/// The call must be made, or answered, and say so with this line.
fn must_say(child: Child<'_>, attempt: &Attempt, line: &str) -> Output {
    let output = make(child, attempt);
    assert!(output.status.success(), "{child:?}: {attempt:?}: {output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).contains(line), "{child:?}: {attempt:?}: {output:?}");
    output
}

/// In no role of the policy, but for these pairs, may any of [`ESCAPES`] and of these calls be made: each ends the process.
pub fn escapes(policy: &Policy, more: &[Attempt], but: &[(&str, &str)]) {
    for attempt in ESCAPES.iter().chain(more) {
        for role in policy.roles().filter(|role| !but.contains(&(role, attempt.0))) {
            must_end(("attempt", role), attempt);
        }
    }
}

/// Each call ends the process.
pub fn all_end(test: &str, attempts: &[InRole]) {
    attempts.iter().for_each(|(role, attempt)| must_end((test, role), attempt));
}

/// Each call is made, and comes back with whatever its arguments give.
pub fn all_come_back(attempts: &[InRole]) {
    attempts.iter().for_each(|(role, attempt)| drop(must_say(("attempt", role), attempt, "came back\n")));
}

/// Each call fails with EPERM.
#[allow(dead_code, reason = "one of the two programs has no such calls")]
pub fn all_are_answered(test: &str, attempts: &[InRole]) {
    for (role, attempt) in attempts {
        must_be_named(role, attempt, &must_say((test, role), attempt, "came back refused\n"));
    }
}
