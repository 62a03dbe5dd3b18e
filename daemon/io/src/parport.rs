//! Parallel ports of the host. `[Linux parport: ppdev]`

use nix::errno::Errno;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

/// `PPCLAIM` of `<linux/ppdev.h>`.
const PPCLAIM: libc::c_ulong = 0x708b;

/// Takes the port for this process until the descriptor is closed.
///
/// # Errors
/// It is no parallel port, or somebody else has it.
pub fn claim(port: &OwnedFd) -> io::Result<()> {
    // SAFETY: this request takes no argument.
    let result = unsafe { libc::ioctl(port.as_raw_fd(), PPCLAIM) };
    Errno::result(result)?;
    Ok(())
}
