//! What the daemon says of itself.

/// The QEMU release whose interface this daemon implements: management layers decide by it what they may use.
pub const QEMU: (i64, i64, i64) = (10, 0, 2);

/// This program and its own version.
pub const PACKAGE: &str = concat!("qemu-storage-daemon-rs ", env!("CARGO_PKG_VERSION"));

/// What `--version` prints: scripts read the first line.
pub fn text() -> String {
    let (major, minor, micro) = QEMU;
    format!(
        "qemu-storage-daemon version {major}.{minor}.{micro} ({PACKAGE})\n\
         A storage daemon in Rust with the interface of QEMU {major}.{minor}\n"
    )
}
