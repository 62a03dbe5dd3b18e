//! The handshake of a client that sends these bytes.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| export::nbd::fuzz::fuzz_handshake(bytes));
