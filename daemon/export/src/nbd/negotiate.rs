//! The handshake as a machine without I/O: bytes in, bytes out, one option at a time, `[NBD Newstyle negotiation]`.
//!
//! It owns what the client has negotiated so far and nothing else. Whoever drives it sends what a step wrote before it
//! takes the next, so that a client which does not read its replies is not answered any further. The data of an option
//! is looked at only when it is complete; what is too long to be of use is skipped without being kept.

use super::metacontext::Contexts;
use super::options::{self, BadData};
use super::wire::{
    Fields, GREETING_MAGIC, MAX_PAYLOAD, MAX_STRING, OPTION_MAGIC, OPTION_REPLY_MAGIC, export_flag, handshake, info,
    opt, option_name, rep,
};
use std::fmt;

/// The longest option that is looked at, in bytes: a name and some hundred queries. Longer ones are answered with
/// "too big". An option beyond the longest payload ends the connection.
pub(crate) const MAX_OPTION: usize = 256 << 10;

/// How replies look on the wire, and requests with [`Mode::Extended`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Mode {
    /// Simple replies only.
    Simple,
    /// Chunks with 32-bit lengths.
    Structured,
    /// Chunks and requests with 64-bit lengths.
    Extended,
}

/// What a client is told about an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Offer {
    pub name: String,
    pub description: Option<String>,
    /// Bytes.
    pub size: u64,
    pub writable: bool,
    pub contexts: Contexts,
    pub block_sizes: BlockSizes,
}

/// The limits of requests, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockSizes {
    /// Offsets and lengths are multiples of this. A power of two up to 64 KiB.
    pub minimum: u32,
    /// What is served best. A power of two.
    pub preferred: u32,
    /// The longest payload.
    pub maximum: u32,
}

/// Where the handshake looks exports up.
pub(crate) trait Exports {
    /// The export of that name.
    fn find(&self, name: &[u8]) -> Option<Offer>;
    /// All exports, in the order in which they were made.
    fn list(&self) -> Vec<(String, Option<String>)>;
    /// Whether the server is going away.
    fn is_shutting_down(&self) -> bool;
}

/// What was agreed upon when the transmission phase began.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Session {
    pub export: String,
    pub mode: Mode,
    pub contexts: Contexts,
}

/// Why a handshake ended without a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The client asked for it.
    Aborted,
    /// The client set flags that nobody offered.
    ClientFlags(u32),
    /// An option does not begin with its magic number.
    OptionMagic,
    /// An option is longer than any may be.
    OptionLength(u32),
    /// An option other than the export name from a client without fixed newstyle.
    NotFixed(u32),
    /// EXPORT_NAME cannot be answered with an error: too long, unknown, or after extended headers.
    ExportName(&'static str),
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Aborted => f.write_str("aborted by the client"),
            Self::ClientFlags(flags) => write!(f, "Unknown client flags {flags:#x} received"),
            Self::OptionMagic => f.write_str("Bad magic received"),
            Self::OptionLength(len) => write!(f, "len ({len}) is larger than max len ({MAX_PAYLOAD})"),
            Self::NotFixed(option) => write!(f, "Unsupported option {option} ({})", option_name(*option)),
            Self::ExportName(why) => f.write_str(why),
        }
    }
}

/// What a step led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// More bytes are needed before anything can happen.
    Starved,
    /// Something was taken in; there may be more to do with the bytes at hand.
    Advanced,
    /// The transmission phase begins with the next byte.
    Transmission(Session),
    /// The connection is to be closed, after what was written has been sent.
    End(End),
}

#[derive(Debug)]
enum State {
    ClientFlags,
    Option,
    /// The data of an option that was answered already.
    Skip(u32),
}

/// The server's side of a handshake.
#[derive(Debug)]
pub(crate) struct Negotiation {
    state: State,
    fixed: bool,
    no_zeroes: bool,
    mode: Mode,
    /// What SET_META_CONTEXT selected last, and for which export.
    contexts: Contexts,
    contexts_of: String,
}

/// The first bytes of the server.
pub(crate) fn greeting() -> [u8; 18] {
    let mut out = [0; 18];
    let (magic, rest) = out.split_at_mut(8);
    let (option, flags) = rest.split_at_mut(8);
    magic.copy_from_slice(&GREETING_MAGIC.to_be_bytes());
    option.copy_from_slice(&OPTION_MAGIC.to_be_bytes());
    flags.copy_from_slice(&(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES).to_be_bytes());
    out
}

fn put(out: &mut Vec<u8>, option: u32, kind: u32, parts: &[&[u8]]) {
    let len: usize = parts.iter().map(|p| p.len()).sum();
    out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes());
    parts.iter().for_each(|p| out.extend_from_slice(p));
}

/// A name as it goes into a message: long ones are cut.
fn shortened(name: &[u8]) -> (&[u8], &'static [u8]) {
    const SHOWN: usize = 80;
    match name.split_at_checked(SHOWN) {
        Some((shown, _)) => (shown, b"..."),
        None => (name, b""),
    }
}

impl Negotiation {
    pub(crate) fn new() -> Self {
        Self {
            state: State::ClientFlags,
            fixed: false,
            no_zeroes: false,
            mode: Mode::Simple,
            contexts: Contexts::NONE,
            contexts_of: String::new(),
        }
    }

    /// Takes the next item from the front of `input`: says how many bytes it used, and adds its reply to `out`.
    pub(crate) fn step(&mut self, input: &[u8], exports: &dyn Exports, out: &mut Vec<u8>) -> (usize, Step) {
        match self.state {
            State::ClientFlags => match Fields::new(input).u32() {
                None => (0, Step::Starved),
                Some(flags) => (4, self.client_flags(flags)),
            },
            State::Skip(left) => {
                let have = u32::try_from(input.len()).unwrap_or(u32::MAX).min(left);
                self.state = if have == left { State::Option } else { State::Skip(left - have) };
                let step = if have == 0 && left > 0 { Step::Starved } else { Step::Advanced };
                (usize::try_from(have).unwrap_or(0), step)
            }
            State::Option => self.option(input, exports, out),
        }
    }

    fn client_flags(&mut self, flags: u32) -> Step {
        let known = u32::from(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES);
        if flags & !known != 0 {
            return Step::End(End::ClientFlags(flags));
        }
        self.fixed = flags & u32::from(handshake::FIXED_NEWSTYLE) != 0;
        self.no_zeroes = flags & u32::from(handshake::NO_ZEROES) != 0;
        self.state = State::Option;
        Step::Advanced
    }

    fn option(&mut self, input: &[u8], exports: &dyn Exports, out: &mut Vec<u8>) -> (usize, Step) {
        const HEADER: usize = 16;
        let mut fields = Fields::new(input);
        let Some(magic) = fields.u64() else { return (0, Step::Starved) };
        if magic != OPTION_MAGIC {
            return (8, Step::End(End::OptionMagic));
        }
        let (Some(option), Some(length)) = (fields.u32(), fields.u32()) else { return (0, Step::Starved) };
        if !self.fixed && option != opt::EXPORT_NAME {
            return (HEADER, Step::End(End::NotFixed(option)));
        }
        let len = usize::try_from(length).unwrap_or(usize::MAX);
        if length > MAX_PAYLOAD {
            return (HEADER, Step::End(End::OptionLength(length)));
        }
        if option == opt::EXPORT_NAME && len > MAX_STRING {
            return (HEADER, Step::End(End::ExportName("Bad length received")));
        }
        // What is refused whatever its data: no need to wait for the data, only to step over it.
        if let Some((kind, text)) = self.refused(option, len, exports) {
            put(out, option, kind, &[text.as_bytes()]);
            self.state = State::Skip(length);
            return (HEADER, Step::Advanced);
        }
        if option == opt::ABORT {
            put(out, option, rep::ACK, &[]);
            return (HEADER, Step::End(End::Aborted));
        }
        let Some(data) = fields.bytes(len) else { return (0, Step::Starved) };
        (HEADER + len, self.complete_option(option, data, exports, out))
    }

    /// The error that an option gets without a look at its data.
    fn refused(&self, option: u32, len: usize, exports: &dyn Exports) -> Option<(u32, String)> {
        let no_data = matches!(option, opt::LIST | opt::STARTTLS | opt::STRUCTURED_REPLY | opt::EXTENDED_HEADERS);
        let known = (opt::EXPORT_NAME..=opt::EXTENDED_HEADERS).contains(&option) && option_name(option) != "<unknown>";
        if !known {
            let text = format!("Unsupported option {option} ({})", option_name(option));
            return Some((rep::ERR_UNSUP, text));
        }
        if matches!(option, opt::EXPORT_NAME | opt::ABORT) {
            return None;
        }
        if no_data && len > 0 {
            return Some((rep::ERR_INVALID, unexpected_length(option)));
        }
        if len > MAX_OPTION {
            return Some((rep::ERR_TOO_BIG, format!("option '{}' is too big", option_name(option))));
        }
        match option {
            _ if exports.is_shutting_down() => Some((rep::ERR_SHUTDOWN, "the server is shutting down".to_owned())),
            opt::STARTTLS => Some((rep::ERR_POLICY, "TLS not configured".to_owned())),
            opt::STRUCTURED_REPLY | opt::EXTENDED_HEADERS if self.mode == Mode::Extended => {
                let kind = if option == opt::EXTENDED_HEADERS { rep::ERR_INVALID } else { rep::ERR_EXT_HEADER_REQD };
                Some((kind, "extended headers already negotiated".to_owned()))
            }
            opt::STRUCTURED_REPLY if self.mode == Mode::Structured => {
                Some((rep::ERR_INVALID, "structured reply already negotiated".to_owned()))
            }
            opt::SET_META_CONTEXT if self.mode == Mode::Simple => {
                let text = format!("request option '{}' when structured reply is not negotiated", option_name(option));
                Some((rep::ERR_INVALID, text))
            }
            _ => None,
        }
    }

    fn complete_option(&mut self, option: u32, data: &[u8], exports: &dyn Exports, out: &mut Vec<u8>) -> Step {
        let done = match option {
            opt::EXPORT_NAME => return self.export_name(data, exports, out),
            opt::LIST => {
                for (name, description) in exports.list() {
                    let len = u32::try_from(name.len()).unwrap_or(u32::MAX).to_be_bytes();
                    let description = description.unwrap_or_default();
                    put(out, option, rep::SERVER, &[&len, name.as_bytes(), description.as_bytes()]);
                }
                Ok(())
            }
            opt::INFO | opt::GO => match self.info(option, data, exports, out) {
                Ok(Some(session)) => return Step::Transmission(session),
                Ok(None) => return Step::Advanced,
                Err(refusal) => Err(refusal),
            },
            opt::STRUCTURED_REPLY => {
                self.mode = Mode::Structured;
                Ok(())
            }
            opt::EXTENDED_HEADERS => {
                self.mode = Mode::Extended;
                Ok(())
            }
            opt::LIST_META_CONTEXT | opt::SET_META_CONTEXT => self.meta_context(option, data, exports, out),
            _ => Err(Refusal { kind: rep::ERR_UNSUP, text: Vec::new() }),
        };
        match done {
            Ok(()) => put(out, option, rep::ACK, &[]),
            Err(refusal) => put(out, option, refusal.kind, &[&refusal.text]),
        }
        Step::Advanced
    }

    fn export_name(&mut self, name: &[u8], exports: &dyn Exports, out: &mut Vec<u8>) -> Step {
        if self.mode == Mode::Extended {
            return Step::End(End::ExportName("Extended headers already negotiated"));
        }
        if exports.is_shutting_down() {
            return Step::End(End::ExportName("the server is shutting down"));
        }
        let Some(offer) = exports.find(name) else {
            return Step::End(End::ExportName("export not found"));
        };
        let contexts = self.contexts_for(&offer);
        out.extend_from_slice(&offer.size.to_be_bytes());
        out.extend_from_slice(&self.export_flags(&offer, false).to_be_bytes());
        if !self.no_zeroes {
            out.resize(out.len() + 124, 0);
        }
        Step::Transmission(Session { export: offer.name, mode: self.mode, contexts })
    }

    fn export_flags(&self, offer: &Offer, status_payload: bool) -> u16 {
        let mut flags = export_flag::HAS_FLAGS
            | export_flag::SEND_FLUSH
            | export_flag::SEND_FUA
            | export_flag::CAN_MULTI_CONN
            | export_flag::SEND_CACHE;
        flags |= if offer.writable {
            export_flag::SEND_TRIM | export_flag::SEND_WRITE_ZEROES | export_flag::SEND_FAST_ZERO
        } else {
            export_flag::READ_ONLY
        };
        if self.mode >= Mode::Structured {
            flags |= export_flag::SEND_DF;
        }
        if self.mode == Mode::Extended && status_payload {
            flags |= export_flag::BLOCK_STATUS_PAYLOAD;
        }
        flags
    }

    /// The selected contexts, if they were selected for this export.
    fn contexts_for(&self, offer: &Offer) -> Contexts {
        if self.mode >= Mode::Structured && self.contexts_of == offer.name { self.contexts } else { Contexts::NONE }
    }

    fn info(
        &mut self,
        option: u32,
        data: &[u8],
        exports: &dyn Exports,
        out: &mut Vec<u8>,
    ) -> Result<Option<Session>, Refusal> {
        let request = options::info_request(data).map_err(|bad| Refusal::bad_data(option, &bad))?;
        let offer = exports.find(request.name).ok_or_else(|| Refusal::unknown_export(request.name))?;
        let contexts = self.contexts_for(&offer);
        let mut tell = |kind: u16, parts: &[&[u8]]| {
            let kind = kind.to_be_bytes();
            let all: Vec<&[u8]> = std::iter::once(&kind[..]).chain(parts.iter().copied()).collect();
            put(out, option, rep::INFO, &all);
        };
        if request.wants_name {
            tell(info::NAME, &[offer.name.as_bytes()]);
        }
        if let Some(description) = &offer.description {
            tell(info::DESCRIPTION, &[description.as_bytes()]);
        }
        let sizes = offer.block_sizes;
        // Only who asks promises to keep to it. It is advice: what is not aligned is served all the same.
        let minimum = if option == opt::INFO || request.wants_block_size { sizes.minimum } else { 1 };
        let told = [minimum.to_be_bytes(), sizes.preferred.to_be_bytes(), sizes.maximum.to_be_bytes()];
        tell(info::BLOCK_SIZE, &[told.as_flattened()]);
        let flags = self.export_flags(&offer, option == opt::INFO || !contexts.is_empty());
        tell(info::EXPORT, &[&offer.size.to_be_bytes(), &flags.to_be_bytes()]);
        if option == opt::INFO {
            if !request.wants_block_size && sizes.minimum > 1 {
                let text = b"request NBD_INFO_BLOCK_SIZE to use this export".to_vec();
                return Err(Refusal { kind: rep::ERR_BLOCK_SIZE_REQD, text });
            }
            put(out, option, rep::ACK, &[]);
            return Ok(None);
        }
        put(out, option, rep::ACK, &[]);
        Ok(Some(Session { export: offer.name, mode: self.mode, contexts }))
    }

    fn meta_context(
        &mut self,
        option: u32,
        data: &[u8],
        exports: &dyn Exports,
        out: &mut Vec<u8>,
    ) -> Result<(), Refusal> {
        let listing = option == opt::LIST_META_CONTEXT;
        if !listing {
            // Even a selection that fails replaces the one before.
            self.contexts = Contexts::NONE;
            self.contexts_of.clear();
        }
        let (name, rest) = options::context_request(data).map_err(|bad| Refusal::bad_data(option, &bad))?;
        let offer = exports.find(name).ok_or_else(|| Refusal::unknown_export(name))?;
        let found =
            options::context_queries(rest, offer.contexts, listing).map_err(|bad| Refusal::bad_data(option, &bad))?;
        for context in found.iter() {
            // A list has no ids: the client is to disregard the field.
            let id = if listing { 0 } else { context.id() };
            put(out, option, rep::META_CONTEXT, &[&id.to_be_bytes(), context.name().as_bytes()]);
        }
        if !listing {
            self.contexts = found;
            self.contexts_of = offer.name;
        }
        Ok(())
    }
}

fn unexpected_length(option: u32) -> String {
    format!("option '{}' has unexpected length", option_name(option))
}

/// An error reply to an option. The text may hold a client's own bytes, which need not be UTF-8.
struct Refusal {
    kind: u32,
    text: Vec<u8>,
}

impl Refusal {
    fn bad_data(option: u32, bad: &BadData) -> Self {
        let text = match bad {
            BadData::Inconsistent => format!("Inconsistent lengths in option {}", option_name(option)),
            BadData::NameTooLong(len) => format!("Invalid name length: {len}"),
            BadData::Nul => format!("Unexpected embedded NUL in option {}", option_name(option)),
            BadData::Trailing => unexpected_length(option),
        };
        Self { kind: rep::ERR_INVALID, text: text.into_bytes() }
    }

    fn unknown_export(name: &[u8]) -> Self {
        let (shown, more) = shortened(name);
        let text = [b"export '", shown, more, b"' not present"].concat();
        Self { kind: rep::ERR_UNKNOWN, text }
    }
}

#[cfg(test)]
mod tests;
