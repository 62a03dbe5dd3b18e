//! The dirty log: a bit for each page of guest memory that the device wrote to, for live migration,
//! `[vhost-user §Migration]`.

use buf::{GuestMemory, IoBuf, Mapping, Window};
use std::sync::Arc;

/// Bytes of guest memory that one bit stands for.
const PAGE: u64 = 4096;

/// The log as the front-end shares it.
#[derive(Debug)]
pub(crate) struct DirtyLog(Window);

impl DirtyLog {
    pub(crate) fn new(map: &Arc<Mapping>) -> Option<Self> {
        map.window(0, map.len()).map(Self)
    }

    /// Marks `len` bytes at the guest's address. Pages that the log has no bit for are left out: the front-end asked for no more.
    pub(crate) fn mark(&self, guest: u64, len: usize) {
        let Ok(len) = u64::try_from(len) else { return };
        let Some(last) = len.checked_sub(1).and_then(|len| guest.checked_add(len)) else { return };
        for page in guest / PAGE..=last / PAGE {
            let Ok(byte) = usize::try_from(page / 8) else { return };
            if byte >= self.0.len() {
                return;
            }
            self.0.or_u8(byte, 1 << (page % 8));
        }
    }

    /// Marks what `buf` points to.
    pub(crate) fn mark_buffer(&self, memory: &GuestMemory, buf: &IoBuf) {
        memory.guest_ranges(buf, |guest, len| self.mark(guest, len));
    }

    /// Whether the memory was taken away.
    pub(crate) fn is_torn(&self) -> bool {
        self.0.is_torn()
    }
}
