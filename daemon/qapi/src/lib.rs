//! QAPI types: one definition for JSON, the command line, introspection and documentation.
#![forbid(unsafe_code)]

pub mod error;

pub use error::{Error, ErrorClass, Result, ResultExt};
