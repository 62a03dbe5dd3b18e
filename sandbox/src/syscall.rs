//! System calls: seccomp filters by role, compiled from JSON, and the line that a refused call leaves.
//!
//! A policy file is what `seccompiler` reads: named sections of rows, each allowing a call (with conditions on its
//! arguments), with a `comment` that says what for. A role's filter is one or several sections joined, so that a call
//! that only an option needs is allowed only with that option. A call outside the list raises SIGSYS; the handler
//! writes one line that names the call and ends the process. Nobody can take the handler away: no list has
//! `rt_sigaction`.

use crate::{Error, names};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use seccompiler::BpfProgram;
use serde_json::Value;
use std::cell::Cell;
use std::collections::HashMap;

/// The helper's policy.
pub const PR_HELPER: &str = include_str!("../policies/pr-helper.json");

/// The exit status after a refused call, as a shell would show death by SIGSYS.
pub const EXIT_REFUSED: i32 = 128 + libc::SIGSYS;

/// What happens to a call outside the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// One line, and the end of the process.
    Enforce,
    /// The kernel logs it and lets it pass: for development.
    Log,
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

impl Filters {
    /// Compiles, for each role, the sections named with it.
    pub fn compile(policy: &str, roles: &[(&'static str, Vec<&str>)], mode: Mode) -> Result<Self, Error> {
        let policy: Value = serde_json::from_str(policy).map_err(error)?;
        let mut joined = serde_json::Map::new();
        for (role, sections) in roles {
            let mut rows = Vec::new();
            for section in sections {
                let filter = policy.get(section).and_then(|s| s.get("filter")).and_then(Value::as_array);
                rows.extend(
                    filter.ok_or_else(|| error(format!("the policy has no section '{section}'")))?.iter().cloned(),
                );
            }
            let refused = match mode {
                Mode::Enforce => "trap",
                Mode::Log => "log",
            };
            let filter = serde_json::json!({ "mismatch_action": refused, "match_action": "allow", "filter": rows });
            joined.insert((*role).to_owned(), filter);
        }
        let text = Value::Object(joined).to_string();
        let arch = std::env::consts::ARCH.try_into().map_err(error)?;
        Ok(Self(seccompiler::compile_from_json(text.as_bytes(), arch).map_err(error)?))
    }

    /// Puts this thread, and those that it starts, under the filter of `role`.
    pub fn enter(&self, role: &'static str) -> Result<(), Error> {
        let program = self.0.get(role).ok_or_else(|| error(format!("no filter for role '{role}'")))?;
        ROLE.with(|r| r.set(role));
        seccompiler::apply_filter(program).map_err(error)
    }
}

/// Installs the handler that names a refused call; once, before any filter.
pub fn name_refused_calls() -> Result<(), Error> {
    let action = SigAction::new(SigHandler::SigAction(refused), SaFlags::SA_SIGINFO, SigSet::all());
    // SAFETY: the handler only reads its argument and constants, and calls write and _exit.
    unsafe { sigaction(Signal::SIGSYS, &action) }.map_err(error)?;
    Ok(())
}

/// The head of `siginfo_t` as the kernel fills it for SIGSYS, `[sigaction(2)]`.
#[repr(C)]
struct Refusal {
    signo: libc::c_int,
    errno: libc::c_int,
    code: libc::c_int,
    padding: libc::c_int,
    address: *const libc::c_void,
    syscall: libc::c_int,
}

extern "C" fn refused(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo_t, which is larger than Refusal and aligned at least as strictly.
    let number = unsafe { (*info.cast::<Refusal>()).syscall };
    let mut digits = [0u8; 12];
    let parts: [&[u8]; 7] = [
        b"sandbox: system call ",
        names::name(libc::c_long::from(number)).as_bytes(),
        b" (",
        decimal(number.unsigned_abs(), &mut digits),
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
    // SAFETY: `line` has `end` bytes; both calls are async-signal-safe, and every list allows them.
    unsafe {
        libc::write(2, line.as_ptr().cast(), end);
        libc::_exit(EXIT_REFUSED);
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

    #[test]
    fn every_row_of_every_policy_has_a_reason() {
        for policy in [PR_HELPER] {
            let policy: Value = serde_json::from_str(policy).unwrap();
            for (name, section) in policy.as_object().unwrap() {
                for row in section["filter"].as_array().unwrap() {
                    let reason = row["comment"].as_str().unwrap_or_default();
                    assert!(reason.len() > 5, "{name}: no reason for {row}");
                }
            }
        }
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
