//! What the fuzz target runs: a request of any bytes is read, and nothing of it is out of bounds.

use super::request::{HEAD, Operation, parse};
use super::wire::{IN_HEADER, MAX_TRANSFER, WRITE_IN};

/// Reads `raw` as one request.
#[expect(clippy::panic, reason = "that is how a fuzz target says that it found something")]
pub fn request(raw: &[u8]) {
    let head = raw.get(..raw.len().min(HEAD)).unwrap_or_default();
    let Some(request) = parse(head, raw.len()) else { return };
    let ok = match request.operation {
        Ok(Operation::Read { at, len }) => len <= MAX_TRANSFER && at.checked_add(u64::from(len)).is_some(),
        Ok(Operation::Write { at, len }) => {
            let data = raw.len().checked_sub(IN_HEADER + WRITE_IN);
            data == usize::try_from(len).ok() && at.checked_add(u64::from(len)).is_some()
        }
        Ok(Operation::Allocate { at, len, .. }) => at.checked_add(len).is_some(),
        _ => true,
    };
    if !ok {
        panic!("out of bounds: {request:?}");
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_are_read(opcode in 0u32..60, unique: u64, body in prop::collection::vec(any::<u8>(), 0..300)) {
            super::request(&body);
            super::request(&super::super::request::tests::raw(opcode, unique, &body));
        }
    }
}
