//! A request of these bytes from an io_uring.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| export::fuse::fuzz::ring_request(bytes));
