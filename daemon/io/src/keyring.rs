//! Reading keys of the kernel's key retention service. `[keyctl(2)]`

use nix::errno::Errno;
use std::io;

/// What a key may hold at most: the kernel's limit for keys of users is 32767 bytes.
const MAX: usize = 1 << 20;

/// The payload of the key with this serial number.
///
/// # Errors
/// What keyctl(2) says: there is no such key, or it may not be read.
pub fn read(serial: i32) -> io::Result<Vec<u8>> {
    let mut payload = Vec::new();
    loop {
        let room = payload.len();
        // SAFETY: the kernel writes at most `room` bytes to the buffer, which has as many.
        let result = unsafe {
            libc::syscall(libc::SYS_keyctl, i64::from(libc::KEYCTL_READ), i64::from(serial), payload.as_mut_ptr(), room)
        };
        let needed = usize::try_from(Errno::result(result)?).unwrap_or_default();
        if needed <= room {
            payload.truncate(needed);
            return Ok(payload);
        }
        if needed > MAX {
            return Err(Errno::EFBIG.into());
        }
        // It may have grown meanwhile; then there is another turn.
        payload.resize(needed, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_is_not_there() {
        let errno = read(0x7fff_fff0).unwrap_err().raw_os_error().unwrap();
        // Where the service is not built in or is forbidden, there is no key either.
        assert!([libc::ENOKEY, libc::ENOSYS, libc::EPERM, libc::EACCES].contains(&errno), "{errno}");
    }
}
