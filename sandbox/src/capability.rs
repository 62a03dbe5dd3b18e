//! Capabilities: all five sets of the thread, `[capabilities(7)]`.

use crate::Error;
use caps::{CapSet, Capability, CapsHashSet};

fn error(e: impl std::fmt::Display) -> Error {
    Error::new("capabilities", e)
}

/// Empties the bounding set as far as this process may: without CAP_SETPCAP it stays, and `no_new_privs` makes it moot.
pub fn empty_bounding_set() -> Result<(), Error> {
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP).map_err(error)? {
        caps::clear(None, CapSet::Bounding).map_err(error)?;
    }
    Ok(())
}

/// Keeps, of those that it has, these capabilities as permitted and effective; everything else goes. Returns what is left.
pub fn keep(wanted: &[Capability]) -> Result<Vec<Capability>, Error> {
    let permitted = caps::read(None, CapSet::Permitted).map_err(error)?;
    let kept: CapsHashSet = wanted.iter().copied().filter(|c| permitted.contains(c)).collect();
    let left = wanted.iter().copied().filter(|c| kept.contains(c)).collect();
    let inheritable = caps::read(None, CapSet::Inheritable).map_err(error)?;
    if permitted == kept && inheritable.is_empty() {
        // Nothing is there to be taken, and whoever took it may have forbidden the call as well.
        return Ok(left);
    }
    caps::clear(None, CapSet::Ambient).map_err(error)?;
    caps::set(None, CapSet::Effective, &kept).map_err(error)?;
    caps::set(None, CapSet::Permitted, &kept).map_err(error)?;
    caps::clear(None, CapSet::Inheritable).map_err(error)?;
    Ok(left)
}
