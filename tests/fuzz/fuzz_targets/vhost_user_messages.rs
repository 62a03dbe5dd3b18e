//! The messages of a vhost-user front-end that sends these bytes.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| export::vhost_user_blk::fuzz::fuzz_messages(bytes));
