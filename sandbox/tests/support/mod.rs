//! One attempt in a process of its own: this test program again, with the attempt in its environment.

use sandbox::syscall::{EXIT_REFUSED, Mode, Policy, Refusal, name_refused_calls};
use std::process::{Command, Output};

/// A call with its first three arguments; the others are zero.
pub type Attempt = (&'static str, libc::c_long, [i64; 3]);

/// An attempt from inside a role.
pub type InRole = (&'static str, Attempt);

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

/// In no role of the policy, but for these pairs, may any of the calls be made: each ends the process.
pub fn escapes(policy: &Policy, attempts: &[Attempt], but: &[(&str, &str)]) {
    for attempt in attempts {
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
