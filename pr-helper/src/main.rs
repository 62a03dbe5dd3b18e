//! The program: options in, status out. Everything else is in the library.

use clap::Parser;
use qemu_pr_helper::{options::Options, run};
use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    // As the reference: everything that goes wrong at the start ends with 1.
    let options = match Options::try_parse() {
        Ok(options) => options,
        Err(e) => {
            let _ = e.print();
            return ExitCode::from(u8::from(e.use_stderr()));
        }
    };
    match run::run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            let _ = writeln!(std::io::stderr(), "qemu-pr-helper: {e}");
            ExitCode::FAILURE
        }
    }
}
