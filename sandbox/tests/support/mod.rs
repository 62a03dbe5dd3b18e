//! One attempt in a process of its own: this test program again, with the attempt in its environment.

use sandbox::syscall::{EXIT_REFUSED, Filters, Refusal, name_refused_calls};
use std::process::{Command, Output};

/// A call with its first three arguments; the others are zero.
pub type Attempt = (&'static str, libc::c_long, [i64; 3]);

/// The child: under the filter of its role, which `filters` has, makes the call and says that it came back.
pub fn child(filters: impl FnOnce(&str) -> Filters, then: Refusal) {
    let Ok(role) = std::env::var("DRILL_ROLE") else { return };
    let numbers = std::env::var("DRILL_CALL").unwrap();
    let [call, a, b, c] = numbers.split(' ').map(|n| n.parse::<i64>().unwrap()).collect::<Vec<_>>()[..] else {
        panic!("DRILL_CALL")
    };
    let filters = filters(&role);
    name_refused_calls(then).unwrap();
    filters.enter(role.leak()).unwrap();
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
pub type Child<'a> = (&'a str, &'a str);

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
pub fn must_end(child: Child<'_>, attempt: &Attempt) {
    let output = make(child, attempt);
    assert_eq!(output.status.code(), Some(EXIT_REFUSED), "{child:?}: {attempt:?}: {output:?}");
    assert!(!String::from_utf8_lossy(&output.stdout).contains("came back"), "{child:?}: {attempt:?}");
    must_be_named(child.1, attempt, &output);
}

/// The call must fail with EPERM.
#[allow(dead_code, reason = "one of the two programs has no such calls")]
pub fn must_be_answered(child: Child<'_>, attempt: &Attempt) {
    let output = make(child, attempt);
    assert!(output.status.success(), "{child:?}: {attempt:?}: {output:?}");
    assert!(
        String::from_utf8_lossy(&output.stdout).contains("came back refused\n"),
        "{child:?}: {attempt:?}: {output:?}"
    );
    must_be_named(child.1, attempt, &output);
}

/// The call must be made, and come back with whatever its arguments give.
pub fn must_come_back(child: Child<'_>, attempt: &Attempt) {
    let output = make(child, attempt);
    assert!(output.status.success(), "{child:?}: {attempt:?}: {output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("came back\n"), "{child:?}: {attempt:?}: {output:?}");
}
