//! Interoperability, conformance and crash tests of the suite.
