//! System calls: seccomp filters by role, compiled from JSON, and the line that a refused call leaves.
//!
//! A policy file is what `seccompiler` reads: named sections of rows, each allowing a call (with conditions on its
//! arguments), with a `comment` that says what for. A role's filter is one or several sections joined, so that a call
//! that only an option needs is allowed only with that option. A row with `only` is for that architecture alone.
//!
//! A call outside the list raises SIGSYS; the handler writes one line that names the call. Then, by the [`Refusal`] that the
//! process chose at its start, it ends the process, or answers EPERM (ENOSYS for a call that this program has no name for)
//! and says so once for each call. Nobody can take the handler away: no list allows `rt_sigaction` for SIGSYS.

use crate::{Error, names};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use seccompiler::BpfProgram;
use serde_json::Value;
use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};

/// The helper's policy.
pub const PR_HELPER: &str = include_str!("../policies/pr-helper.json");

/// The daemon's policy. Beside the sections that roles are made of it has `absent`, calls that are answered as if the kernel
/// did not know them, and `never`, calls that end the process also where others only fail.
pub const DAEMON: &str = include_str!("../policies/daemon.json");

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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// It ends the process.
    End,
    /// It lets the call fail, unless the call is in the section `never` of this policy: then it ends the process.
    Fail(&'static str),
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

/// The filters of one process, by role.
#[derive(Debug)]
pub struct Filters(HashMap<String, BpfProgram>);

thread_local! {
    /// For the line of the handler. Constant and without a destructor, hence safe to read in a signal handler.
    static ROLE: Cell<&'static str> = const { Cell::new("main") };
}

fn error(e: impl std::fmt::Display) -> Error {
    Error::new("system calls", e)
}

/// The rows of some sections, those of this architecture, as `seccompiler` reads them.
///
/// A row without conditions stands for all rows of its call: together with conditions `seccompiler` would forget it.
fn join(policy: &Value, sections: &[&str], arch: &str) -> Result<Vec<Value>, Error> {
    let mut rows = Vec::new();
    for section in sections {
        let filter = policy.get(section).map(|s| s.get("filter").unwrap_or(s)).and_then(Value::as_array);
        rows.extend(filter.ok_or_else(|| error(format!("the policy has no section '{section}'")))?.iter().cloned());
    }
    rows.retain(|row| row.get("only").is_none_or(|only| only == arch));
    let free: HashSet<String> =
        rows.iter().filter(|row| row.get("args").is_none()).map(|row| row["syscall"].to_string()).collect();
    rows.retain(|row| row.get("args").is_none() || !free.contains(&row["syscall"].to_string()));
    for row in &mut rows {
        row.as_object_mut().map(|row| row.remove("only"));
    }
    Ok(rows)
}

/// The roles of a policy that lists them, with their sections.
pub fn roles(policy: &str) -> Result<Vec<(String, Vec<String>)>, Error> {
    let mut policy: Value = serde_json::from_str(policy).map_err(error)?;
    let roles: HashMap<String, Vec<String>> = serde_json::from_value(policy["roles"].take()).map_err(error)?;
    Ok(roles.into_iter().collect())
}

impl Filters {
    /// Compiles, for each role of the policy, the sections that it names there, but those in `without`.
    pub fn of_policy(policy: &str, without: &[&str], mode: Mode) -> Result<Self, Error> {
        let roles = roles(policy)?;
        let kept = roles.iter().map(|(role, sections)| {
            let kept = sections.iter().map(String::as_str).filter(|section| !without.contains(section));
            (role.as_str(), kept.collect::<Vec<_>>())
        });
        Self::compile(policy, &kept.collect::<Vec<_>>(), mode)
    }

    /// Compiles, for each role, the sections named with it.
    pub fn compile(policy: &str, roles: &[(&str, Vec<&str>)], mode: Mode) -> Result<Self, Error> {
        Self::compile_for(std::env::consts::ARCH, policy, roles, mode)
    }

    fn compile_for(arch: &str, policy: &str, roles: &[(&str, Vec<&str>)], mode: Mode) -> Result<Self, Error> {
        let policy: Value = serde_json::from_str(policy).map_err(error)?;
        let mut joined = serde_json::Map::new();
        let refused = match mode {
            Mode::Enforce => "trap",
            Mode::Log => "log",
        };
        for (role, sections) in roles {
            let rows = join(&policy, sections, arch)?;
            let filter = serde_json::json!({ "mismatch_action": refused, "match_action": "allow", "filter": rows });
            joined.insert((*role).to_owned(), filter);
        }
        if policy.get("absent").is_some() {
            let rows = join(&policy, &["absent"], arch)?;
            let answer = serde_json::json!({ "errno": libc::ENOSYS });
            let filter = serde_json::json!({ "mismatch_action": "allow", "match_action": answer, "filter": rows });
            joined.insert("absent".to_owned(), filter);
        }
        let text = Value::Object(joined).to_string();
        let arch = arch.try_into().map_err(error)?;
        Ok(Self(seccompiler::compile_from_json(text.as_bytes(), arch).map_err(error)?))
    }

    /// Puts this thread, and those that it starts, under the filter of `role`.
    pub fn enter(&self, role: &'static str) -> Result<(), Error> {
        self.apply(role)?;
        ROLE.with(|r| r.set(role));
        Ok(())
    }

    /// Calls of the section `absent` fail in this thread, and in those that it starts, with ENOSYS. Before any role.
    pub fn hide_absent_calls(&self) -> Result<(), Error> {
        self.apply("absent")
    }

    fn apply(&self, name: &str) -> Result<(), Error> {
        let program = self.0.get(name).ok_or_else(|| error(format!("no filter for role '{name}'")))?;
        seccompiler::apply_filter(program).map_err(error)
    }
}

/// Whether the kernel can filter system calls.
pub fn supported() -> bool {
    // SAFETY: PR_GET_SECCOMP only tells.
    unsafe { libc::prctl(libc::PR_GET_SECCOMP, 0, 0, 0, 0) >= 0 }
}

/// Installs the handler that names a refused call; once, before any filter.
pub fn name_refused_calls(then: Refusal) -> Result<(), Error> {
    if let Refusal::Fail(policy) = then {
        let policy: Value = serde_json::from_str(policy).map_err(error)?;
        for row in join(&policy, &["never"], std::env::consts::ARCH)? {
            let name = row["syscall"].as_str().unwrap_or_default();
            let number = names::number(name).ok_or_else(|| error(format!("no system call '{name}'")))?;
            FATAL.set(u32::try_from(number).map_err(error)?);
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

    /// The sections of a policy, with their rows.
    fn sections(policy: &str) -> Vec<(String, Vec<Value>)> {
        let Value::Object(mut policy) = serde_json::from_str(policy).unwrap() else { panic!("no object") };
        policy.remove("roles");
        let rows = |section: Value| section.get("filter").unwrap_or(&section).as_array().unwrap().clone();
        policy.into_iter().map(|(name, section)| (name, rows(section))).collect()
    }

    #[test]
    fn every_row_of_every_policy_has_a_reason() {
        for (name, rows) in [PR_HELPER, DAEMON].into_iter().flat_map(sections) {
            for row in rows {
                let reason = row["comment"].as_str().unwrap_or_default();
                assert!(reason.len() > 5, "{name}: no reason for {row}");
            }
        }
    }

    #[test]
    fn the_daemons_sections_compile_for_each_architecture() {
        let sections = sections(DAEMON);
        let names = sections.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>();
        for arch in ["x86_64", "aarch64"] {
            Filters::compile_for(arch, DAEMON, &[("all", names.clone())], Mode::Enforce).unwrap();
        }
    }

    #[test]
    fn a_starter_can_do_all_that_it_starts() {
        let mut roles: HashMap<_, _> = roles(DAEMON).unwrap().into_iter().collect();
        let starter = roles.remove("starter").unwrap();
        assert!(roles.into_values().flatten().all(|section| starter.contains(&section)));
    }

    #[test]
    fn what_never_happens_is_in_no_other_section() {
        let sections = sections(DAEMON);
        let (never, others): (Vec<_>, Vec<_>) = sections.into_iter().partition(|(name, _)| name == "never");
        for row in &never[0].1 {
            let name = row["syscall"].as_str().unwrap();
            assert!(row.get("only").is_some() || names::number(name).is_some(), "{name} has no number");
            assert!(others.iter().flat_map(|(_, rows)| rows).all(|row| row["syscall"] != name), "{name} is allowed");
        }
    }

    #[test]
    fn a_row_without_conditions_wins() {
        let policy = serde_json::json!({
            "a": [{"syscall": "ioctl", "args": [1]}, {"syscall": "read", "args": [1]}],
            "b": [{"syscall": "ioctl"}, {"syscall": "open", "only": "z80"}],
        });
        let rows = join(&policy, &["a", "b"], "x86_64").unwrap();
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
