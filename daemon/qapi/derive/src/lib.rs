//! Derive macro of the qapi crate.
