//! Issues SCSI PERSISTENT RESERVE commands for unprivileged clients.
fn main() {}
