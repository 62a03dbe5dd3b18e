use super::*;
use crate::nbd::fuzz;
use proptest::prelude::*;

struct Two {
    shutting_down: bool,
}

impl Exports for Two {
    fn find(&self, name: &[u8]) -> Option<Offer> {
        let (writable, minimum) = match name {
            b"e" => (true, 1),
            b"r" => (false, 512),
            _ => return None,
        };
        Some(Offer {
            name: String::from_utf8(name.to_vec()).unwrap(),
            description: writable.then(|| "some text".to_owned()),
            size: 1 << 20,
            writable,
            contexts: Contexts::offered(writable),
            block_sizes: BlockSizes { minimum, preferred: 4096, maximum: 32 << 20 },
        })
    }

    fn list(&self) -> Vec<(String, Option<String>)> {
        vec![("e".to_owned(), Some("some text".to_owned())), ("r".to_owned(), None)]
    }

    fn is_shutting_down(&self) -> bool {
        self.shutting_down
    }
}

const SERVER: Two = Two { shutting_down: false };

/// A client of the machine.
struct Peer {
    negotiation: Negotiation,
}

/// A reply to an option.
type Reply = (u32, u32, Vec<u8>);

impl Peer {
    fn new() -> Self {
        Self::with_flags(3)
    }

    fn with_flags(flags: u32) -> Self {
        let mut negotiation = Negotiation::new();
        let (used, step) = negotiation.step(&flags.to_be_bytes(), &SERVER, &mut Vec::new());
        assert_eq!((used, step), (4, Step::Advanced));
        Self { negotiation }
    }

    /// Sends an option; the raw reply and the last step.
    fn raw(&mut self, option: u32, data: &[u8]) -> (Vec<u8>, Step) {
        self.raw_to(&SERVER, option, data)
    }

    fn raw_to(&mut self, server: &Two, option: u32, data: &[u8]) -> (Vec<u8>, Step) {
        let mut input = OPTION_MAGIC.to_be_bytes().to_vec();
        input.extend_from_slice(&option.to_be_bytes());
        input.extend_from_slice(&u32::try_from(data.len()).unwrap().to_be_bytes());
        input.extend_from_slice(data);
        let (mut at, mut out) = (0, Vec::new());
        loop {
            let (used, step) = self.negotiation.step(&input[at..], server, &mut out);
            at += used;
            if step != Step::Advanced || at == input.len() {
                return (out, step);
            }
        }
    }

    /// Sends an option that is answered with replies.
    fn ask(&mut self, option: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        let (raw, _) = self.raw(option, data);
        replies(&raw)
            .into_iter()
            .inspect(|(to, ..)| assert_eq!(*to, option))
            .map(|(_, kind, data)| (kind, data))
            .collect()
    }

    /// Sends an option that fails; the kind and the text.
    fn refused(&mut self, option: u32, data: &[u8]) -> (u32, String) {
        let mut all = self.ask(option, data);
        let (kind, text) = all.pop().unwrap();
        assert!(kind & (1 << 31) != 0, "{kind:#x}");
        (kind, String::from_utf8(text).unwrap())
    }
}

fn replies(raw: &[u8]) -> Vec<Reply> {
    let mut fields = Fields::new(raw);
    let mut all = Vec::new();
    while fields.left() > 0 {
        assert_eq!(fields.u64(), Some(OPTION_REPLY_MAGIC));
        let (option, kind, len) = (fields.u32().unwrap(), fields.u32().unwrap(), fields.u32().unwrap());
        all.push((option, kind, fields.bytes(usize::try_from(len).unwrap()).unwrap().to_vec()));
    }
    all
}

fn string(text: &[u8]) -> Vec<u8> {
    [&u32::try_from(text.len()).unwrap().to_be_bytes()[..], text].concat()
}

fn go(name: &str, infos: &[u16]) -> Vec<u8> {
    let mut data = string(name.as_bytes());
    data.extend_from_slice(&u16::try_from(infos.len()).unwrap().to_be_bytes());
    infos.iter().for_each(|i| data.extend_from_slice(&i.to_be_bytes()));
    data
}

fn meta(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = string(name.as_bytes());
    data.extend_from_slice(&u32::try_from(queries.len()).unwrap().to_be_bytes());
    queries.iter().for_each(|q| data.extend_from_slice(&string(q.as_bytes())));
    data
}

const ACK: (u32, Vec<u8>) = (rep::ACK, Vec::new());

#[test]
fn the_greeting_offers_fixed_newstyle_without_zeroes() {
    assert_eq!(&greeting(), b"NBDMAGICIHAVEOPT\0\x03");
}

#[test]
fn list_and_abort() {
    let mut peer = Peer::new();
    let both = vec![(rep::SERVER, b"\0\0\0\x01esome text".to_vec()), (rep::SERVER, b"\0\0\0\x01r".to_vec()), ACK];
    assert_eq!(peer.ask(opt::LIST, b""), both);
    let invalid = (rep::ERR_INVALID, "option 'list' has unexpected length".to_owned());
    assert_eq!(peer.refused(opt::LIST, b"x"), invalid);
    assert_eq!(peer.refused(opt::LIST, &[0; 5000]), invalid, "the data is stepped over");
    assert_eq!(peer.ask(opt::LIST, b""), both);
    let (raw, step) = peer.raw(opt::ABORT, b"data is ignored");
    assert_eq!(replies(&raw), [(opt::ABORT, rep::ACK, vec![])]);
    assert_eq!(step, Step::End(End::Aborted));
}

#[test]
fn what_is_not_supported_says_so() {
    let mut peer = Peer::new();
    assert_eq!(peer.refused(opt::STARTTLS, b""), (rep::ERR_POLICY, "TLS not configured".to_owned()));
    assert_eq!(
        peer.refused(opt::STARTTLS, b"x"),
        (rep::ERR_INVALID, "option 'starttls' has unexpected length".to_owned())
    );
    for option in [0, 4, 12, 99, u32::MAX] {
        let text = format!("Unsupported option {option} (<unknown>)");
        assert_eq!(peer.refused(option, &[1; 3000]), (rep::ERR_UNSUP, text));
    }
    let big = vec![0; MAX_OPTION + 1];
    assert_eq!(
        peer.refused(opt::SET_META_CONTEXT, &big),
        (rep::ERR_TOO_BIG, "option 'set meta context' is too big".to_owned())
    );
    let (raw, _) = peer.raw_to(&Two { shutting_down: true }, opt::GO, &go("e", &[]));
    assert_eq!(replies(&raw)[0].1, rep::ERR_SHUTDOWN);
}

#[test]
fn info_tells_what_is_asked_in_order() {
    let mut peer = Peer::new();
    let sizes = (rep::INFO, b"\0\x03\0\0\0\x01\0\0\x10\0\x02\0\0\0".to_vec());
    let export = |flags: &[u8; 2]| (rep::INFO, [b"\0\0\0\0\0\0\0\x10\0\0", &flags[..]].concat());
    let about = (rep::INFO, b"\0\x02some text".to_vec());
    assert_eq!(peer.ask(opt::INFO, &go("e", &[])), [about.clone(), sizes.clone(), export(b"\x0d\x6d"), ACK]);
    let name = (rep::INFO, b"\0\x01e".to_vec());
    assert_eq!(
        peer.ask(opt::INFO, &go("e", &[1, 2, 3, 77, 3, 0])),
        [name, about.clone(), sizes.clone(), export(b"\x0d\x6d"), ACK]
    );
    assert_eq!(peer.ask(opt::EXTENDED_HEADERS, b""), [ACK]);
    assert_eq!(peer.ask(opt::INFO, &go("e", &[])), [about, sizes, export(b"\x1d\xed"), ACK]);
    for (data, kind, text) in [
        (go("nope", &[]), rep::ERR_UNKNOWN, "export 'nope' not present".to_owned()),
        (go("", &[]), rep::ERR_UNKNOWN, "export '' not present".to_owned()),
        (vec![], rep::ERR_INVALID, "Inconsistent lengths in option info".to_owned()),
        ([go("e", &[]), vec![0]].concat(), rep::ERR_INVALID, "option 'info' has unexpected length".to_owned()),
        (go(&"x".repeat(4097), &[]), rep::ERR_INVALID, "Invalid name length: 4097".to_owned()),
        (go("e\0", &[]), rep::ERR_INVALID, "Unexpected embedded NUL in option info".to_owned()),
        (go(&"x".repeat(4096), &[]), rep::ERR_UNKNOWN, format!("export '{}...' not present", "x".repeat(80))),
    ] {
        assert_eq!(peer.refused(opt::INFO, &data), (kind, text));
    }
}

#[test]
fn a_name_that_is_not_text_is_echoed_as_it_is() {
    let data = [&string(b"\xff\xfe")[..], b"\0\0"].concat();
    assert_eq!(Peer::new().ask(opt::INFO, &data), [(rep::ERR_UNKNOWN, b"export '\xff\xfe' not present".to_vec())]);
}

#[test]
fn block_sizes_are_told_to_who_asks_for_them() {
    let sizes = |minimum: &[u8; 2]| (rep::INFO, [b"\0\x03\0\0", &minimum[..], b"\0\0\x10\0\x02\0\0\0"].concat());
    let mut peer = Peer::new();
    let all = peer.ask(opt::INFO, &go("r", &[]));
    assert_eq!(all[0], sizes(b"\x02\0"), "told even if it is an error not to ask");
    assert_eq!(all[2].0, rep::ERR_BLOCK_SIZE_REQD);
    assert_eq!(all[2].1, b"request NBD_INFO_BLOCK_SIZE to use this export");
    assert_eq!(peer.ask(opt::INFO, &go("r", &[3]))[2], ACK);
    for (infos, minimum) in [(&[][..], b"\0\x01"), (&[3], b"\x02\0")] {
        let (raw, step) = Peer::new().raw(opt::GO, &go("r", infos));
        let (_, kind, data) = replies(&raw)[0].clone();
        assert_eq!((kind, data), sizes(minimum));
        let session = Session { export: "r".to_owned(), mode: Mode::Simple, contexts: Contexts::NONE };
        assert_eq!(step, Step::Transmission(session));
    }
}

#[test]
fn reply_styles_are_negotiated_once() {
    let mut peer = Peer::new();
    let invalid = |text: &str| (rep::ERR_INVALID, text.to_owned());
    assert_eq!(peer.refused(opt::STRUCTURED_REPLY, b"x"), invalid("option 'structured reply' has unexpected length"));
    assert_eq!(peer.ask(opt::STRUCTURED_REPLY, b""), [ACK]);
    assert_eq!(peer.refused(opt::STRUCTURED_REPLY, b""), invalid("structured reply already negotiated"));
    assert_eq!(peer.refused(opt::EXTENDED_HEADERS, b"y"), invalid("option 'extended headers' has unexpected length"));
    assert_eq!(peer.ask(opt::EXTENDED_HEADERS, b""), [ACK]);
    let again = "extended headers already negotiated".to_owned();
    assert_eq!(peer.refused(opt::EXTENDED_HEADERS, b""), (rep::ERR_INVALID, again.clone()));
    assert_eq!(peer.refused(opt::STRUCTURED_REPLY, b""), (rep::ERR_EXT_HEADER_REQD, again));
}

#[test]
fn contexts_are_listed_and_selected() {
    let mut peer = Peer::new();
    let context = |id: u8, name: &str| (rep::META_CONTEXT, [&[0, 0, 0, id], name.as_bytes()].concat());
    let (base, depth) = ("base:allocation", "qemu:allocation-depth");
    let all = [context(0, base), context(0, depth), ACK];
    assert_eq!(peer.ask(opt::LIST_META_CONTEXT, &meta("e", &[])), all);
    assert_eq!(
        peer.refused(opt::SET_META_CONTEXT, &meta("e", &[base])),
        (rep::ERR_INVALID, "request option 'set meta context' when structured reply is not negotiated".to_owned())
    );
    peer.ask(opt::STRUCTURED_REPLY, b"");
    let list = |peer: &mut Peer, q: &[&str]| peer.ask(opt::LIST_META_CONTEXT, &meta("e", q));
    let set = |peer: &mut Peer, q: &[&str]| peer.ask(opt::SET_META_CONTEXT, &meta("e", q));
    assert_eq!(list(&mut peer, &["base:"]), [context(0, base), ACK]);
    assert_eq!(list(&mut peer, &["qemu:", base]), all);
    assert_eq!(set(&mut peer, &[]), [ACK]);
    assert_eq!(set(&mut peer, &["base:", "qemu:", "foo:bar", ""]), [ACK]);
    assert_eq!(set(&mut peer, &[base, depth, base]), [context(0, base), context(1, depth), ACK]);
    assert_eq!(peer.negotiation.contexts.len(), 2);
    let queries = peer.ask(opt::SET_META_CONTEXT, &[&meta("e", &[base])[..], b"x"].concat());
    assert_eq!(queries[0].0, rep::ERR_INVALID, "trailing bytes");
    assert!(peer.negotiation.contexts.is_empty(), "a failed selection clears the one before");
    for (data, kind, text) in [
        (meta("nope", &[base]), rep::ERR_UNKNOWN, "export 'nope' not present"),
        (vec![], rep::ERR_INVALID, "Inconsistent lengths in option set meta context"),
        (
            [&string(b"e")[..], b"\xff\xff\xff\xff"].concat(),
            rep::ERR_INVALID,
            "Inconsistent lengths in option set meta context",
        ),
        (string(&[b'x'; 4097]), rep::ERR_INVALID, "Invalid name length: 4097"),
    ] {
        assert_eq!(peer.refused(opt::SET_META_CONTEXT, &data), (kind, text.to_owned()));
    }
}

#[test]
fn contexts_hold_for_the_export_that_they_were_selected_for() {
    for (of, expected) in [("e", 1), ("r", 0)] {
        let mut peer = Peer::new();
        peer.ask(opt::EXTENDED_HEADERS, b"");
        peer.ask(opt::SET_META_CONTEXT, &meta(of, &["base:allocation"]));
        let (raw, step) = peer.raw(opt::GO, &go("e", &[]));
        let Step::Transmission(session) = step else { panic!("{step:?}") };
        assert_eq!((session.contexts.len(), session.mode), (expected, Mode::Extended));
        let flags = if expected == 1 { b"\x1d\xed" } else { b"\x0d\xed" };
        assert_eq!(replies(&raw)[2].2[10..], flags[..], "the payload of block status is of use only with contexts");
    }
}

#[test]
fn export_name_is_answered_without_a_header() {
    let mut peer = Peer::with_flags(1);
    let (raw, step) = peer.raw(opt::EXPORT_NAME, b"e");
    let expected = [&b"\0\0\0\0\0\x10\0\0\x0d\x6d"[..], &[0; 124]].concat();
    assert_eq!(raw, expected);
    assert!(matches!(step, Step::Transmission(_)));
    assert_eq!(Peer::with_flags(2).raw(opt::EXPORT_NAME, b"e").0.len(), 10, "without fixed newstyle as well");
    let mut extended = Peer::new();
    extended.ask(opt::EXTENDED_HEADERS, b"");
    for (mut peer, name) in [(Peer::new(), &b"nope"[..]), (Peer::new(), &[b'n'; 4097]), (extended, b"e")] {
        let (raw, step) = peer.raw(opt::EXPORT_NAME, name);
        assert!(raw.is_empty());
        assert!(matches!(step, Step::End(End::ExportName(_))), "{step:?}");
    }
}

#[test]
fn what_cannot_be_followed_ends_the_connection() {
    let mut out = Vec::new();
    let step = |flags: u32| Negotiation::new().step(&flags.to_be_bytes(), &SERVER, &mut Vec::new()).1;
    assert_eq!(step(4), Step::End(End::ClientFlags(4)));
    assert_eq!(step(7), Step::End(End::ClientFlags(7)));
    let magic = Peer::new().negotiation.step(b"IHAVEOPX", &SERVER, &mut out).1;
    assert_eq!(magic, Step::End(End::OptionMagic));
    let long = Peer::new().negotiation.step(b"IHAVEOPT\0\0\0\x63\x02\0\0\x01", &SERVER, &mut out).1;
    assert_eq!(long, Step::End(End::OptionLength((32 << 20) + 1)));
    let old = Peer::with_flags(0).raw(opt::LIST, b"");
    assert_eq!(old, (vec![], Step::End(End::NotFixed(opt::LIST))));
    assert!(out.is_empty());
}

proptest! {
    /// A whole handshake has the same replies however its bytes are cut.
    #[test]
    fn pieces_do_not_matter(cuts in prop::collection::vec(1usize..40, 1..60)) {
        let mut wire = 3u32.to_be_bytes().to_vec();
        for (option, data) in [
            (99, vec![7; 100]),
            (opt::STRUCTURED_REPLY, vec![]),
            (opt::SET_META_CONTEXT, meta("e", &["base:allocation", "qemu:allocation-depth"])),
            (opt::INFO, go("e", &[3, 1])),
            (opt::GO, go("e", &[3])),
        ] {
            wire.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
            wire.extend_from_slice(&u32::to_be_bytes(option));
            wire.extend_from_slice(&u32::try_from(data.len()).unwrap().to_be_bytes());
            wire.extend_from_slice(&data);
        }
        wire.extend_from_slice(b"request");
        let run = |cuts: &mut dyn Iterator<Item = usize>| {
            let (mut negotiation, mut at, mut have, mut out) = (Negotiation::new(), 0, 0, Vec::new());
            loop {
                match negotiation.step(&wire[at..have], &SERVER, &mut out) {
                    (used, Step::Advanced) => at += used,
                    (_, Step::Starved) => have = (have + cuts.next().unwrap()).min(wire.len()),
                    (used, last) => return (at + used, last, out),
                }
            }
        };
        let whole = run(&mut std::iter::repeat(usize::MAX / 2));
        prop_assert_eq!(whole.0, wire.len() - b"request".len());
        prop_assert_eq!(run(&mut cuts.into_iter().cycle()), whole);
    }

    #[test]
    fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..400), flags in 0u32..5, option in 0u32..13) {
        fuzz::fuzz_handshake(&bytes);
        let head = [&flags.to_be_bytes()[..], b"IHAVEOPT", &option.to_be_bytes(), &400u32.to_be_bytes()].concat();
        fuzz::fuzz_handshake(&[&head[..], &bytes, &bytes].concat());
    }

    #[test]
    fn any_request_is_survived(
        requests in prop::collection::vec((any::<bool>(), any::<u8>(), 0u8..10, any::<u64>(), any::<u64>(), any::<u8>()), 1..20),
        tail in prop::collection::vec(any::<u8>(), 0..64),
    ) {
        let mut wire = Vec::new();
        for (extended, flags, command, at, len, shift) in requests {
            let (at, len) = (at >> (shift % 64), len >> (shift / 4));
            let magic: u32 = if extended { 0x21e4_1c71 } else { 0x2560_9513 };
            wire.extend_from_slice(&magic.to_be_bytes());
            wire.extend_from_slice(&[0, flags, 0, command]);
            wire.extend_from_slice(&[9; 8]);
            wire.extend_from_slice(&at.to_be_bytes());
            wire.extend_from_slice(&len.to_be_bytes()[if extended { 0 } else { 4 }..]);
        }
        wire.extend_from_slice(&tail);
        fuzz::fuzz_requests(&wire);
        fuzz::fuzz_requests(&tail);
    }
}
