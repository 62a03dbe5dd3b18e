//! Entries for fuzzers: total functions of what a front-end sends. They panic only if an invariant is broken.

use super::wire::{HEADER, Header, MAX_FDS, MAX_PAYLOAD, Message};

/// The messages of a front-end that sends `bytes`.
///
/// # Panics
/// A message is longer than it may be, or asks for more descriptors than come.
pub fn fuzz_messages(bytes: &[u8]) {
    let mut rest = bytes;
    while let Some((raw, after)) = rest.split_first_chunk::<HEADER>() {
        let Ok(header) = Header::parse(raw) else { return };
        assert!(header.size <= MAX_PAYLOAD);
        let (payload, after) = after.split_at(header.size.min(after.len()));
        rest = after;
        let Ok(message) = Message::decode(header.request, payload) else { continue };
        let (least, most) = message.descriptors();
        assert!(least <= most && most <= MAX_FDS, "{message:?}");
        match message {
            Message::GetConfig { offset, size, .. } => assert!(offset + size <= 256),
            Message::SetConfig { bytes, .. } => assert!(bytes.len() <= MAX_PAYLOAD),
            Message::SetVringKick { index, .. } => assert!(index < 256),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn messages(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            fuzz_messages(&bytes);
        }
    }
}
