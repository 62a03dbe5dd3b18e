//! Entries for fuzzers: total functions of the bytes that a client sends. They panic only if an invariant is broken.

use super::metacontext::Contexts;
use super::negotiate::{BlockSizes, Exports, MAX_OPTION, Mode, Negotiation, Offer, Step};
use super::request::{self, Command, Header, Limits, Verdict};

/// Two exports, one of them with everything.
struct Sample;

impl Exports for Sample {
    fn find(&self, name: &[u8]) -> Option<Offer> {
        let full = match name {
            b"" => false,
            b"e" => true,
            _ => return None,
        };
        Some(Offer {
            name: String::from_utf8_lossy(name).into_owned(),
            description: full.then(|| "some text".to_owned()),
            size: 1 << 20,
            writable: full,
            contexts: Contexts::offered(full),
            block_sizes: BlockSizes { minimum: if full { 512 } else { 1 }, preferred: 4096, maximum: 32 << 20 },
        })
    }

    fn list(&self) -> Vec<(String, Option<String>)> {
        vec![(String::new(), None), ("e".to_owned(), Some("some text".to_owned()))]
    }

    fn is_shutting_down(&self) -> bool {
        false
    }
}

/// The handshake of a client that sends `bytes`.
///
/// # Panics
/// It asks for more than it may keep, goes back, makes no progress, or answers out of proportion.
pub fn fuzz_handshake(bytes: &[u8]) {
    let mut negotiation = Negotiation::new();
    let (mut at, mut replies) = (0, Vec::new());
    // An option without data is answered without another byte, so every other step may use none.
    let mut idle = false;
    loop {
        let rest = bytes.get(at..).unwrap_or_default();
        let (used, step) = negotiation.step(rest, &Sample, &mut replies);
        assert!(used <= rest.len(), "uses bytes that are not there");
        at += used;
        // Repeated names make a reply to a selection no longer than the list of all contexts.
        assert!(replies.len() <= 8 << 10, "a reply of {} bytes", replies.len());
        replies.clear();
        match step {
            Step::Advanced => {
                assert!(used > 0 || !idle || at == bytes.len(), "no progress");
                idle = used == 0;
            }
            Step::Starved => {
                assert!(rest.len() < MAX_OPTION + 16, "keeps {} bytes", rest.len());
                break;
            }
            Step::Transmission(session) => {
                assert!(Sample.find(session.export.as_bytes()).is_some());
                assert!(session.mode > Mode::Simple || session.contexts.is_empty());
                break;
            }
            Step::End(_) => break,
        }
        if used == 0 && at == bytes.len() {
            break;
        }
    }
}

/// The requests of a client that sends `bytes`, in each mode.
///
/// # Panics
/// A request that is served is not within its limits.
pub fn fuzz_requests(bytes: &[u8]) {
    for (mode, contexts, writable) in [
        (Mode::Simple, Contexts::NONE, true),
        (Mode::Structured, Contexts::offered(true), true),
        (Mode::Extended, Contexts::offered(true), true),
        (Mode::Extended, Contexts::offered(false), false),
    ] {
        let limits = Limits { mode, contexts, writable, size: 1 << 20 };
        let mut rest = bytes;
        while let Some((header, payload)) = next(mode, &mut rest) {
            match request::check(&header, &limits) {
                Verdict::Serve(command) => inside(command, &limits),
                Verdict::NeedsPayload => {
                    if let Ok(command) = request::status_request(&header, payload, &limits) {
                        inside(command, &limits);
                    }
                }
                Verdict::Refuse(text) => assert!(text.len() < 200),
                Verdict::Fatal(_) | Verdict::Disconnect => break,
            }
        }
    }
}

fn next<'a>(mode: Mode, rest: &mut &'a [u8]) -> Option<(Header, &'a [u8])> {
    let (head, tail) = rest.split_at_checked(request::header_len(mode))?;
    let header = Header::parse(mode, head)?;
    let payload = usize::try_from(header.payload(mode)).unwrap_or(usize::MAX).min(tail.len());
    let (payload, tail) = tail.split_at(payload);
    *rest = tail;
    Some((header, payload))
}

fn inside(command: Command, limits: &Limits) {
    let (at, len, changes) = match command {
        Command::Read { at, len, .. } | Command::Cache { at, len } => (at, u64::from(len), false),
        Command::Write { at, len, .. } => (at, u64::from(len), true),
        Command::Trim { at, len, .. } | Command::WriteZeroes { at, len, .. } => (at, len, true),
        Command::BlockStatus { at, len, contexts, .. } => {
            assert!(len > 0 && !contexts.is_empty());
            (at, len, false)
        }
        Command::Flush => (0, 0, false),
    };
    assert!(at.checked_add(len).is_some_and(|end| end <= limits.size), "{command:?}");
    assert!(limits.writable || !changes, "{command:?}");
    let one_piece = matches!(command, Command::Read { .. } | Command::Cache { .. } | Command::Write { .. });
    assert!(!one_piece || len <= 32 << 20, "{command:?}");
}
