//! Options that the exports of virtio block devices have in common: checked, with the texts of the reference.

use super::request::ID_LEN;
use qapi::{Error, Result};

/// Queues at most: a vhost-user front-end names them in one byte.
const MAX_QUEUES: u16 = 256;

/// Whether a device can have as many queues.
///
/// # Errors
/// It cannot.
pub(crate) fn check_queues(queues: u16) -> Result<()> {
    if queues == 0 {
        return Err(Error::generic("num-queues must be greater than 0"));
    }
    if queues > MAX_QUEUES {
        return Err(Error::generic(format!("num-queues must not be greater than {MAX_QUEUES}")));
    }
    Ok(())
}

/// The bytes of a block.
///
/// # Errors
/// There are no such blocks.
pub(crate) fn block_size(size: u64) -> Result<u32> {
    let size = u32::try_from(size).ok().filter(|size| size.is_power_of_two() && (512..=2 << 20).contains(size));
    size.ok_or_else(|| Error::generic("parameter logical-block-size must be a power of 2 between 512 and 2097152"))
}

/// A serial number as the driver gets it.
///
/// # Errors
/// It is too long.
pub(crate) fn serial(text: &str) -> Result<[u8; ID_LEN]> {
    let mut serial = [0; ID_LEN];
    let Some(place) = serial.get_mut(..text.len()) else {
        return Err(Error::generic(format!("serial must not be longer than {ID_LEN} bytes")));
    };
    place.copy_from_slice(text.as_bytes());
    Ok(serial)
}
