//! The arguments of options: dotted keys, JSON in braces, the older form of `--chardev`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use qapi::keyval::{self, Parsed};
use qapi::opts::{self, Opts};

fuzz_target!(|bytes: &[u8]| {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    for implied in [None, Some("driver")] {
        match keyval::parse(text, implied) {
            Ok(Parsed::Keyval(value) | Parsed::Help(value)) => assert!(value.is_object()),
            Ok(Parsed::Json(json)) => {
                let _ = qmp::parser::parse(json);
            }
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
    let _ = Opts::parse(text, "backend");
    let _ = opts::chardev(text);
});
