//! Exports of block nodes: NBD.
#![forbid(unsafe_code)]
