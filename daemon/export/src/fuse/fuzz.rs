//! What the fuzz targets run: a request of any bytes is read, and nothing of it is out of bounds.

use super::request::{HEAD, Operation, Request, parse, parse_parts};
use super::wire::{IN_HEADER, MAX_TRANSFER, WRITE_IN, opcode};

/// Reads `raw` as one request of the device.
///
/// # Panics
/// What it asks for is out of bounds.
pub fn request(raw: &[u8]) {
    let head = raw.get(..raw.len().min(HEAD)).unwrap_or_default();
    if let Some(request) = parse(head, raw.len()) {
        check(&request, raw.len().checked_sub(IN_HEADER + WRITE_IN));
    }
}

/// Reads `raw` as one entry of a ring: how long the payload is, the header, and the fixed part with what lay there before.
///
/// # Panics
/// What it asks for is out of bounds, or not what the same bytes ask for when they come over the device.
pub fn ring_request(raw: &[u8]) {
    let Some((len, raw)) = raw.split_first_chunk() else { return };
    let Some((header, rest)) = raw.split_first_chunk::<IN_HEADER>() else { return };
    let room = usize::try_from(MAX_TRANSFER).unwrap_or(usize::MAX);
    let payload = usize::try_from(u32::from_ne_bytes(*len)).unwrap_or(usize::MAX).min(room);
    let mut fixed = [0xee; io::FUSE_FIXED];
    for (place, byte) in fixed.iter_mut().zip(rest) {
        *place = *byte;
    }
    let Some(request) = parse_parts(header, &fixed, payload) else { return };
    check(&request, Some(payload));
    let [a, b, c, d, e, f, g, h, ..] = *header;
    let received = usize::try_from(u32::from_ne_bytes([a, b, c, d])).unwrap_or(usize::MAX);
    // The data of a write are a payload on a ring, and behind its fixed part on the device.
    let is_write = u32::from_ne_bytes([e, f, g, h]) == opcode::WRITE;
    if payload == 0 && !is_write && received <= IN_HEADER + fixed.len() {
        let whole = [header.as_slice(), &fixed].concat();
        let same = parse(whole.get(..received.min(HEAD)).unwrap_or_default(), received);
        assert!(same == Some(request), "{request:?}, over the device {same:?}");
    }
}

fn check(request: &Request, data: Option<usize>) {
    let ok = match request.operation {
        Ok(Operation::Read { at, len }) => len <= MAX_TRANSFER && at.checked_add(u64::from(len)).is_some(),
        Ok(Operation::Write { at, len }) => {
            data.is_some() && data == usize::try_from(len).ok() && at.checked_add(u64::from(len)).is_some()
        }
        Ok(Operation::Allocate { at, len, .. }) => at.checked_add(len).is_some(),
        _ => true,
    };
    assert!(ok, "out of bounds: {request:?}");
}

#[cfg(test)]
mod tests {
    use super::super::request::tests::raw;
    use super::super::wire::opcode;
    use proptest::prelude::*;

    #[test]
    fn a_write_that_ends_in_its_fixed_part_is_none() {
        let cut = raw(opcode::WRITE, 7, &[0; 20]);
        super::request(&cut);
        super::ring_request(&[&[0; 4], cut.as_slice()].concat());
    }

    proptest! {
        #[test]
        fn any_bytes_are_read(opcode in 0u32..60, unique: u64, body in prop::collection::vec(any::<u8>(), 0..300)) {
            super::request(&body);
            super::request(&raw(opcode, unique, &body));
        }

        #[test]
        fn any_bytes_of_a_ring_are_read(
            opcode in 0u32..60, unique: u64, payload in 0u32..200, body in prop::collection::vec(any::<u8>(), 0..300),
        ) {
            super::ring_request(&body);
            let raw = raw(opcode, unique, &body);
            super::ring_request(&[payload.to_ne_bytes().as_slice(), &raw].concat());
        }
    }
}
