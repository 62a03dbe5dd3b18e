//! The data of options: pure parsing, `[NBD Option types]`.

use super::metacontext::Contexts;
use super::wire::{Fields, MAX_STRING, info};

/// Why the data of an option was refused, as the client reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum BadData {
    /// A field or string ends after the data.
    Inconsistent,
    /// The export name is longer than a string may be.
    NameTooLong(u32),
    /// A string has a zero byte.
    Nul,
    /// Bytes follow the last field.
    Trailing,
}

/// What INFO and GO ask for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct InfoRequest<'a> {
    /// The export, none for the default one is the empty name.
    pub name: &'a [u8],
    /// Whether the client wants to see the canonical name.
    pub wants_name: bool,
    /// Whether the client keeps to the block sizes that it is told.
    pub wants_block_size: bool,
}

/// The export name at the start of the data.
fn name<'a>(fields: &mut Fields<'a>) -> Result<&'a [u8], BadData> {
    let len = fields.u32().ok_or(BadData::Inconsistent)?;
    match usize::try_from(len) {
        Ok(len) if len <= MAX_STRING => string(fields, len),
        _ => Err(BadData::NameTooLong(len)),
    }
}

fn string<'a>(fields: &mut Fields<'a>, len: usize) -> Result<&'a [u8], BadData> {
    let string = fields.bytes(len).ok_or(BadData::Inconsistent)?;
    if string.contains(&0) { Err(BadData::Nul) } else { Ok(string) }
}

/// The data of INFO and GO.
pub(crate) fn info_request(data: &[u8]) -> Result<InfoRequest<'_>, BadData> {
    let mut fields = Fields::new(data);
    let mut request = InfoRequest { name: name(&mut fields)?, wants_name: false, wants_block_size: false };
    for _ in 0..fields.u16().ok_or(BadData::Inconsistent)? {
        match fields.u16().ok_or(BadData::Inconsistent)? {
            info::NAME => request.wants_name = true,
            info::BLOCK_SIZE => request.wants_block_size = true,
            // The export and its description are always told; unknown kinds are to be ignored.
            _ => {}
        }
    }
    if fields.left() > 0 { Err(BadData::Trailing) } else { Ok(request) }
}

/// The export that LIST_META_CONTEXT and SET_META_CONTEXT are about, and the fields after it.
pub(crate) fn context_request(data: &[u8]) -> Result<(&[u8], Fields<'_>), BadData> {
    let mut fields = Fields::new(data);
    Ok((name(&mut fields)?, fields))
}

/// Which of `offered` the queries in the rest of the data name. Without a query a list has all, a selection none.
pub(crate) fn context_queries(mut fields: Fields<'_>, offered: Contexts, listing: bool) -> Result<Contexts, BadData> {
    let count = fields.u32().ok_or(BadData::Inconsistent)?;
    let mut found = if count == 0 && listing { offered } else { Contexts::NONE };
    for _ in 0..count {
        let len = fields.u32().ok_or(BadData::Inconsistent)?;
        let query = string(&mut fields, usize::try_from(len).unwrap_or(usize::MAX))?;
        found = found.union(offered.matching(query, listing));
    }
    if fields.left() > 0 { Err(BadData::Trailing) } else { Ok(found) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn info_requests() {
        let good = info_request(b"\0\0\0\x01e\0\x04\0\x01\0\x03\0\x03\xff\xff").unwrap();
        assert_eq!(good, InfoRequest { name: b"e", wants_name: true, wants_block_size: true });
        assert_eq!(info_request(b"\0\0\0\0\0\0").unwrap().name, b"");
        for (data, why) in [
            (&b""[..], BadData::Inconsistent),
            (b"\0\0\0", BadData::Inconsistent),
            (b"\0\0\0\x01", BadData::Inconsistent),
            (b"\0\0\0\x01e\0", BadData::Inconsistent),
            (b"\0\0\0\x01e\0\x01\0", BadData::Inconsistent),
            (b"\0\0\0\x01e\xff\xff", BadData::Inconsistent),
            (b"\0\0\x10\0e", BadData::Inconsistent),
            (b"\0\0\x10\x01e", BadData::NameTooLong(4097)),
            (b"\xff\xff\xff\xff", BadData::NameTooLong(u32::MAX)),
            (b"\0\0\0\x02e\0\0\0", BadData::Nul),
            (b"\0\0\0\x01e\0\0x", BadData::Trailing),
        ] {
            assert_eq!(info_request(data).unwrap_err(), why, "{data:?}");
        }
    }

    #[test]
    fn context_requests() {
        let offered = Contexts::offered(true);
        let ask = |rest: &[u8], listing| context_queries(Fields::new(rest), offered, listing);
        assert_eq!(ask(b"\0\0\0\0", true), Ok(offered));
        assert_eq!(ask(b"\0\0\0\0", false), Ok(Contexts::NONE));
        assert_eq!(ask(b"\0\0\0\x02\0\0\0\x05base:\0\0\0\x05qemu:", true), Ok(offered));
        assert_eq!(ask(b"\0\0\0\x01\0\0\0\x05base:", false), Ok(Contexts::NONE));
        for (rest, why) in [
            (&b"\0\0\0"[..], BadData::Inconsistent),
            (b"\0\0\0\x01", BadData::Inconsistent),
            (b"\xff\xff\xff\xff", BadData::Inconsistent),
            (b"\0\0\0\x01\0\0\0\x06base:", BadData::Inconsistent),
            (b"\0\0\0\x01\xff\xff\xff\xffbase:", BadData::Inconsistent),
            (b"\0\0\0\x01\0\0\0\x05ba\0e:", BadData::Nul),
            (b"\0\0\0\x01\0\0\0\x05base:x", BadData::Trailing),
        ] {
            assert_eq!(ask(rest, true), Err(why), "{rest:?}");
        }
    }
}
