//! Protocol drivers and filters.
#![forbid(unsafe_code)]
