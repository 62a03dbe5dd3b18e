//! An inflight region that holds these bytes, found by a daemon that takes over.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| export::virtio_blk::fuzz::fuzz_inflight(bytes));
