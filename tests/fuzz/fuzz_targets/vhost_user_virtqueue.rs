//! A virtqueue in guest memory that holds these bytes.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| export::virtio_blk::fuzz::fuzz_virtqueue(bytes));
