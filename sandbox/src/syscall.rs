//! System calls: seccomp filters by role, compiled from JSON when the program is built, and the line that a refused call
//! leaves.
//!
//! `policies/*.json` say which calls a role may make and what for; `build/policy.rs` says how they are read. What
//! is left for the start of a process is to hand the ready programs to the kernel.
//!
//! A call outside the list raises SIGSYS; the handler writes one line that names the call. Then, by the [`Refusal`] that the
//! process chose at its start, it ends the process, or answers EPERM (ENOSYS for a call that this program has no name for)
//! and says so once for each call. Nobody can take the handler away: no list allows `rt_sigaction` for SIGSYS.

use crate::{Error, names};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use seccompiler::sock_filter;
use std::borrow::Cow;
use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};

include!(concat!(env!("OUT_DIR"), "/policies.rs"));

/// What one process may do.
#[derive(Debug)]
pub struct Policy {
    programs: &'static [Program],
    /// Answers the calls that are hidden; no rows if none is.
    absent: &'static [sock_filter],
    /// Calls that end the process also where others only fail.
    never: &'static [libc::c_long],
}

/// The filter of a role.
#[derive(Debug)]
struct Program {
    role: &'static str,
    /// The optional sections that are in it.
    options: &'static [&'static str],
    code: &'static [sock_filter],
}

const fn op(code: u16, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

/// The exit status after a refused call, as a shell would show death by SIGSYS.
pub const EXIT_REFUSED: i32 = 128 + libc::SIGSYS;

/// What happens to a call outside the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// SIGSYS: what [`name_refused_calls`] was told.
    Enforce,
    /// The kernel logs it and lets it pass: for development.
    Log,
}

/// What the handler of SIGSYS does after its line.
#[derive(Debug, Clone, Copy)]
pub enum Refusal {
    /// It ends the process.
    End,
    /// It lets the call fail, unless this policy has it among those that never happen: then it ends the process.
    Fail(&'static Policy),
}

/// One bit for each number of a system call.
struct Calls([AtomicU64; 16]);

impl Calls {
    const fn new() -> Self {
        Self([const { AtomicU64::new(0) }; 16])
    }

    /// Sets the bit; what it was. Numbers that no kernel has count as one.
    fn set(&self, number: u32) -> bool {
        let bit = 1 << (number % 64);
        self.0[Self::word(number)].fetch_or(bit, Ordering::Relaxed) & bit != 0
    }

    fn has(&self, number: u32) -> bool {
        self.0[Self::word(number)].load(Ordering::Relaxed) & (1 << (number % 64)) != 0
    }

    const fn word(number: u32) -> usize {
        let word = number / 64;
        if word < 16 { word as usize } else { 15 }
    }
}

/// Calls that are let fail, once [`Refusal::Fail`] was chosen: the ones whose bit is not set. Until then all are fatal.
static FATAL: Calls = Calls::new();
/// Whether FATAL counts.
static LENIENT: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);
/// Calls that were refused.
static REFUSED: Calls = Calls::new();

/// The names of the calls that were refused so far, in the order of their numbers.
pub fn refused_calls() -> Vec<&'static str> {
    (0..1024).filter(|number| REFUSED.has(*number)).map(|number| names::name(libc::c_long::from(number))).collect()
}

/// The filters of one process: those of its policy, with the optional sections that it asked for.
#[derive(Debug)]
pub struct Filters {
    policy: &'static Policy,
    options: Vec<&'static str>,
    mode: Mode,
}

/// An instruction that ends a program with a constant.
const RETURN: u32 = libc::BPF_RET | libc::BPF_K;

thread_local! {
    /// For the line of the handler. Constant and without a destructor, hence safe to read in a signal handler.
    static ROLE: Cell<&'static str> = const { Cell::new("main") };
}

fn error(e: impl std::fmt::Display) -> Error {
    Error::new("system calls", e)
}

impl Policy {
    /// The roles, each once.
    pub fn roles(&self) -> impl Iterator<Item = &'static str> {
        // The programs of a role lie together, the one without options first.
        self.programs.iter().filter(|program| program.options.is_empty()).map(|program| program.role)
    }

    /// All optional sections.
    pub fn options(&self) -> impl Iterator<Item = &'static str> {
        // Those of the role that has most of them: the others have some of the same.
        let most = self.programs.iter().map(|program| program.options).max_by_key(|options| options.len());
        most.into_iter().flatten().copied()
    }

    /// The filters with the optional sections of these names.
    pub fn filters(&'static self, options: &[&'static str], mode: Mode) -> Filters {
        Filters { policy: self, options: options.to_vec(), mode }
    }
}

impl Filters {
    /// Puts this thread, and those that it starts, under the filter of `role`.
    ///
    /// # Errors
    /// The policy has no such role; the kernel refuses.
    pub fn enter(&self, role: &'static str) -> Result<(), Error> {
        let chosen = |program: &&Program| {
            program.role == role && program.options.iter().all(|option| self.options.contains(option))
        };
        let programs = self.policy.programs.iter().filter(chosen);
        let program = programs.max_by_key(|program| program.options.len());
        let code = program.ok_or_else(|| error(format!("no filter for role '{role}'")))?.code;
        let code = match self.mode {
            Mode::Enforce => Cow::Borrowed(code),
            Mode::Log => logging(code).into(),
        };
        seccompiler::apply_filter(&code).map_err(error)?;
        ROLE.with(|r| r.set(role));
        Ok(())
    }

    /// Calls of the section `absent` fail in this thread, and in those that it starts, with ENOSYS. Before any role.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn hide_absent_calls(&self) -> Result<(), Error> {
        match self.policy.absent {
            [] => Ok(()),
            code => seccompiler::apply_filter(code).map_err(error),
        }
    }
}

/// The same program, but a call outside the list is logged by the kernel and passes.
fn logging(code: &[sock_filter]) -> Vec<sock_filter> {
    let trap = |row: &sock_filter| (u32::from(row.code), row.k) == (RETURN, libc::SECCOMP_RET_TRAP);
    code.iter()
        .map(|row| sock_filter { k: if trap(row) { libc::SECCOMP_RET_LOG } else { row.k }, ..row.clone() })
        .collect()
}

/// Whether the kernel can filter system calls.
pub fn supported() -> bool {
    // SAFETY: PR_GET_SECCOMP only tells.
    unsafe { libc::prctl(libc::PR_GET_SECCOMP, 0, 0, 0, 0) >= 0 }
}

/// Installs the handler that names a refused call; once, before any filter.
pub fn name_refused_calls(then: Refusal) -> Result<(), Error> {
    if let Refusal::Fail(policy) = then {
        for number in policy.never {
            FATAL.set(u32::try_from(*number).map_err(error)?);
        }
        LENIENT.store(true, Ordering::Relaxed);
    }
    let action = SigAction::new(SigHandler::SigAction(refused), SaFlags::SA_SIGINFO, SigSet::all());
    // SAFETY: the handler only reads its arguments, constants and atomics, and calls write and _exit.
    unsafe { sigaction(Signal::SIGSYS, &action) }.map_err(error)?;
    Ok(())
}

/// The head of `siginfo_t` as the kernel fills it for SIGSYS, `[sigaction(2)]`.
#[repr(C)]
struct Info {
    signo: libc::c_int,
    errno: libc::c_int,
    code: libc::c_int,
    padding: libc::c_int,
    address: *const libc::c_void,
    syscall: libc::c_int,
}

extern "C" fn refused(_: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo_t, which is larger than Info and aligned at least as strictly.
    let number = unsafe { (*info.cast::<Info>()).syscall };
    let fatal = !LENIENT.load(Ordering::Relaxed) || FATAL.has(number.unsigned_abs());
    let said = REFUSED.set(number.unsigned_abs());
    let name = names::name(libc::c_long::from(number));
    if fatal || !said {
        say(name, number.unsigned_abs());
    }
    if fatal {
        // SAFETY: async-signal-safe, and every list allows it.
        unsafe { libc::_exit(EXIT_REFUSED) };
    }
    // A call without a name is newer than this program: it is told that the kernel is older.
    let errno = if name == "?" { libc::ENOSYS } else { libc::EPERM };
    // SAFETY: the kernel passes the ucontext_t of the interrupted thread, which it restores when the handler returns.
    unsafe { set_result(context.cast(), errno) };
}

/// The interrupted call returns this error.
///
/// # Safety
/// `context` is the third argument of the handler.
#[cfg(target_arch = "x86_64")]
unsafe fn set_result(context: *mut libc::ucontext_t, errno: libc::c_int) {
    // SAFETY: valid as the caller says; REG_RAX is an index of the registers.
    unsafe { (*context).uc_mcontext.gregs[libc::REG_RAX as usize] = -i64::from(errno) };
}

/// The interrupted call returns this error.
///
/// # Safety
/// `context` is the third argument of the handler.
#[cfg(target_arch = "aarch64")]
unsafe fn set_result(context: *mut libc::ucontext_t, errno: libc::c_int) {
    // SAFETY: valid as the caller says.
    unsafe { (*context).uc_mcontext.regs[0] = i64::from(-errno).cast_unsigned() };
}

/// Writes the line; async-signal-safe, and leaves errno as it was.
fn say(name: &str, number: u32) {
    let mut digits = [0u8; 12];
    let parts: [&[u8]; 7] = [
        b"sandbox: system call ",
        name.as_bytes(),
        b" (",
        decimal(number, &mut digits),
        b") refused in thread '",
        ROLE.with(Cell::get).as_bytes(),
        b"'\n",
    ];
    let mut line = [0u8; 160];
    let mut end = 0;
    for byte in parts.into_iter().flatten().take(line.len()) {
        line[end] = *byte;
        end += 1;
    }
    // SAFETY: errno is this thread's; `line` has `end` bytes; write is async-signal-safe and every list allows it.
    unsafe {
        let errno = *libc::__errno_location();
        libc::write(2, line.as_ptr().cast(), end);
        *libc::__errno_location() = errno;
    }
}

/// The number in decimal, without memory or formatting machinery.
fn decimal(mut number: u32, digits: &mut [u8; 12]) -> &[u8] {
    let mut at = digits.len();
    loop {
        at -= 1;
        digits[at] = b'0' + u8::try_from(number % 10).unwrap_or(0);
        number /= 10;
        if number == 0 {
            break &digits[at..];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy;
    use serde_json::Value;
    use std::collections::HashSet;

    fn sources() -> [policy::Policy; 2] {
        [include_str!("../policies/daemon.json"), include_str!("../policies/pr-helper.json")]
            .map(|text| policy::Policy::parse(text).unwrap())
    }

    /// The sections of a policy, with their rows.
    fn sections(policy: policy::Policy) -> Vec<(String, Vec<Value>)> {
        let Value::Object(mut sections) = policy.0 else { panic!("no object") };
        sections.remove("roles");
        sections.remove("optional");
        sections.into_iter().map(|(name, rows)| (name, rows.as_array().unwrap().clone())).collect()
    }

    #[test]
    fn every_row_of_every_policy_has_a_reason() {
        for (name, rows) in sources().into_iter().flat_map(sections) {
            for row in rows {
                let reason = row["comment"].as_str().unwrap_or_default();
                assert!(reason.len() > 5, "{name}: no reason for {row}");
            }
        }
    }

    #[test]
    fn all_programs_compile_for_each_architecture() {
        for policy in sources() {
            for arch in ["x86_64", "aarch64"] {
                for program in policy.programs(arch).unwrap() {
                    assert!(program.code.len() < 4096, "{}: the kernel takes no longer ones", program.role);
                }
                policy.absent(arch).unwrap();
            }
        }
    }

    #[test]
    fn each_section_belongs_to_a_role() {
        for policy in sources() {
            let used: Vec<String> = policy.roles().into_iter().flat_map(|(_, sections)| sections).collect();
            for (name, _) in sections(policy) {
                assert!(used.contains(&name) || ["absent", "never"].contains(&name.as_str()), "{name}");
            }
        }
    }

    #[test]
    fn there_is_a_program_for_each_set_of_options() {
        let [daemon, helper] = sources();
        for (policy, source) in [(&DAEMON, daemon), (&PR_HELPER, helper)] {
            let names: HashSet<_> = policy.roles().collect();
            assert!(source.roles().iter().all(|(role, _)| names.contains(role.as_str())));
            for program in source.programs(std::env::consts::ARCH).unwrap() {
                let same = |built: &&Program| built.role == program.role && built.options == program.options;
                assert_eq!(policy.programs.iter().find(same).unwrap().code, program.code);
            }
        }
        assert_eq!(PR_HELPER.options().collect::<Vec<_>>(), ["remove", "cgroup", "background"]);
        assert_eq!(PR_HELPER.programs.iter().filter(|program| program.role == "wire").count(), 8);
        assert_eq!(DAEMON.options().collect::<Vec<_>>(), ["inet"]);
    }

    #[test]
    fn logging_refuses_nothing() {
        let code = DAEMON.programs[0].code;
        let ends = |code: &[sock_filter], answer| {
            code.iter().filter(|row| u32::from(row.code) == RETURN && row.k == answer).count()
        };
        let logged = logging(code);
        assert_eq!(ends(&logged, libc::SECCOMP_RET_TRAP), 0);
        assert_eq!(ends(&logged, libc::SECCOMP_RET_LOG), ends(code, libc::SECCOMP_RET_TRAP));
        assert!(ends(code, libc::SECCOMP_RET_TRAP) > 0);
    }

    #[test]
    fn a_starter_can_do_all_that_it_starts() {
        let [daemon, _] = sources();
        let (starter, others): (Vec<_>, Vec<_>) = daemon.roles().into_iter().partition(|row| row.0 == "starter");
        assert!(others.into_iter().flat_map(|row| row.1).all(|section| starter[0].1.contains(&section)));
    }

    #[test]
    fn what_never_happens_is_in_no_other_section() {
        let [daemon, _] = sources();
        let never = daemon.never("x86_64").unwrap();
        assert!(never.iter().any(|name| name == "execve"));
        let others = sections(daemon).into_iter().filter(|(section, _)| section != "never");
        for row in others.flat_map(|(_, rows)| rows) {
            assert!(!never.iter().any(|name| row["syscall"] == **name), "{row} is allowed");
        }
    }

    #[test]
    fn a_row_without_conditions_wins() {
        let policy = policy::Policy(serde_json::json!({
            "a": [{"syscall": "ioctl", "args": [1]}, {"syscall": "read", "args": [1]}],
            "b": [{"syscall": "ioctl"}, {"syscall": "open", "only": "z80"}],
        }));
        let rows = policy.join(&["a".to_owned(), "b".to_owned()], "x86_64").unwrap();
        assert_eq!(
            rows,
            [serde_json::json!({"syscall": "read", "args": [1]}), serde_json::json!({"syscall": "ioctl"})]
        );
    }

    #[test]
    fn calls_are_remembered() {
        let calls = Calls::new();
        assert!(!calls.set(321) && calls.set(321) && calls.has(321) && !calls.has(322));
        assert!(!calls.set(u32::MAX) && calls.set(u32::MAX));
    }

    #[test]
    fn numbers() {
        let mut digits = [0; 12];
        assert_eq!(decimal(0, &mut digits), b"0");
        assert_eq!(decimal(u32::MAX, &mut digits), b"4294967295");
    }

    #[test]
    fn names() {
        assert_eq!(names::name(libc::SYS_socket), "socket");
        assert_eq!(names::name(100_000), "?");
    }
}
