//! A request of these bytes from `/dev/fuse`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| export::fuse::fuzz::request(bytes));
