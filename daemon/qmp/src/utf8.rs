//! UTF-8 as QMP reads it: modified UTF-8, so that NUL may come as `C0 80`, and without the noncharacters.
//!
//! Decoding is done by hand because the replies quote invalid input, and how many replacement characters a broken
//! sequence becomes is part of what clients see: a lead byte takes its continuation bytes with it.

/// The first character of `bytes` and how many bytes it takes. `None` stands for a sequence that is not a character;
/// its length is then what is to be skipped. Empty input gives length 0.
pub(crate) fn decode(bytes: &[u8]) -> (Option<char>, usize) {
    let Some(&lead) = bytes.first() else { return (None, 0) };
    let (length, bits) = match lead {
        0x00..=0x7F => return (Some(char::from(lead)), 1),
        0xC0..=0xDF => (2, lead & 0x1F),
        0xE0..=0xEF => (3, lead & 0x0F),
        0xF0..=0xF7 => (4, lead & 0x07),
        0xF8..=0xFB => (5, lead & 0x03),
        0xFC..=0xFD => (6, lead & 0x01),
        _ => return (None, 1),
    };
    let mut code = u32::from(bits);
    let mut taken = 1;
    for &byte in bytes.iter().take(length).skip(1) {
        if byte & 0xC0 != 0x80 {
            break;
        }
        code = code << 6 | u32::from(byte & 0x3F);
        taken += 1;
    }
    if taken != length {
        return (None, taken);
    }
    let shortest = match length {
        2 => 0x80,
        3 => 0x800,
        4 => 0x1_0000,
        _ => return (None, taken),
    };
    let overlong = code < shortest && !(code == 0 && length == 2);
    (if overlong { None } else { character(code) }, taken)
}

/// The character with this code, unless it is a surrogate, a noncharacter or out of range.
pub(crate) fn character(code: u32) -> Option<char> {
    let noncharacter = (0xFDD0..=0xFDEF).contains(&code) || code & 0xFFFE == 0xFFFE;
    if noncharacter { None } else { char::from_u32(code) }
}

/// Text for an error message: what is not a character becomes U+FFFD, and a NUL byte ends it.
pub(crate) fn lossy(bytes: &[u8]) -> String {
    let mut rest = bytes.split(|&b| b == 0).next().unwrap_or_default();
    let mut text = String::with_capacity(rest.len());
    while !rest.is_empty() {
        let (character, length) = decode(rest);
        text.push(character.unwrap_or(char::REPLACEMENT_CHARACTER));
        rest = rest.get(length..).unwrap_or_default();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_the_standard_library_on_every_character() {
        let mut buffer = [0; 4];
        for c in '\0'..=char::MAX {
            let bytes = c.encode_utf8(&mut buffer).as_bytes();
            let expected = character(u32::from(c));
            assert_eq!(decode(bytes), (expected, bytes.len()), "U+{:04X}", u32::from(c));
        }
        assert_eq!(character(0xFFFE), None);
        assert_eq!(character(0x1F_FFFF), None);
        assert_eq!(character(0xD800), None);
    }

    #[test]
    fn a_broken_sequence_is_one_unit() {
        let table: &[(&[u8], Option<char>, usize)] = &[
            (b"\xC0\x80", Some('\0'), 2),
            (b"\xC1\x80", None, 2),
            (b"\xE0\x80\x80", None, 3),
            (b"\xE2\x82", None, 2),
            (b"\xE2a", None, 1),
            (b"\xED\xA0\x80", None, 3),
            (b"\xF4\x90\x80\x80", None, 4),
            (b"\xF8\x88\x80\x80\x80\x80", None, 5),
            (b"\xFC\x84\x80\x80\x80\x80\x80", None, 6),
            (b"\x80\x80", None, 1),
            (b"\xFF", None, 1),
            (b"", None, 0),
        ];
        for (bytes, character, length) in table {
            assert_eq!(decode(bytes), (*character, *length), "{bytes:02X?}");
        }
        assert_eq!(lossy(b"a\xE2\x82\xC0\x80b\0c"), "a\u{FFFD}\0b");
    }
}
