//! QMP as a sans-I/O state machine: JSON stream to requests, responses and events to bytes.
#![forbid(unsafe_code)]
