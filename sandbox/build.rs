//! Compiles the policies to the programs that the kernel takes, so that no process does so at its start.
//!
//! For each `policies/NAME.json` there is a constant `NAME` in `policies.rs` of the build's folder.

#[path = "build/policy.rs"]
mod policy;

use policy::Policy;
use seccompiler::BpfProgram;
use std::fmt::Write;
use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build");
    println!("cargo::rerun-if-changed=policies");
    let arch = std::env::var("CARGO_CFG_TARGET_ARCH")?;
    let mut text = String::new();
    for (name, file, about) in [
        ("DAEMON", "policies/daemon.json", "The daemon's policy."),
        ("PR_HELPER", "policies/pr-helper.json", "The helper's policy."),
    ] {
        let policy = Policy::parse(&std::fs::read_to_string(file)?).map_err(|error| format!("{file}: {error}"))?;
        let constant = constant(&policy, &arch).map_err(|error| format!("{file}: {error}"))?;
        writeln!(text, "/// {about}\npub static {name}: Policy = {constant};")?;
    }
    std::fs::write(Path::new(&std::env::var("OUT_DIR")?).join("policies.rs"), text)?;
    Ok(())
}

fn constant(policy: &Policy, arch: &str) -> Result<String, String> {
    let mut text = "Policy { programs: &[".to_owned();
    for program in policy.programs(arch)? {
        let code = code(&program.code);
        text += &format!("Program {{ role: {:?}, options: &{:?}, code: {code} }},\n", program.role, program.options);
    }
    // By the C library's constants: the numbers are those of the target, where this script does not run.
    let never: Vec<String> = policy.never(arch)?.iter().map(|name| format!("libc::SYS_{name}")).collect();
    text += &format!("], absent: {}, never: &[{}] }}", code(&policy.absent(arch)?), never.join(", "));
    Ok(text)
}

fn code(program: &BpfProgram) -> String {
    let rows = program.iter().map(|row| format!("op({}, {}, {}, {})", row.code, row.jt, row.jf, row.k));
    format!("&[{}]", rows.collect::<Vec<_>>().join(", "))
}
