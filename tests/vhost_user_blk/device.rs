//! What the device says of itself.

use super::{client, serving, setup, socket};
use tests::vhost::{FrontEnd, feature, msg, protocol, req};
use tests::{Setup, known_defect};

fn number(config: &[u8], at: usize, len: usize) -> u64 {
    let mut raw = [0; 8];
    raw[..len].copy_from_slice(&config[at..at + len]);
    u64::from_le_bytes(raw)
}

#[test]
fn a_writable_device_has_these_features() {
    let daemon = serving("writable=on,num-queues=3");
    let mut front = FrontEnd::connect(&socket(&daemon));
    let features = front.ask(msg::GET_FEATURES, &[]).word();
    let expected = feature::SEG_MAX
        | feature::BLK_SIZE
        | feature::FLUSH
        | feature::TOPOLOGY
        | feature::CONFIG_WCE
        | feature::MQ
        | feature::DISCARD
        | feature::WRITE_ZEROES
        | feature::LOG_ALL
        | feature::INDIRECT
        | feature::EVENT_IDX
        | feature::PROTOCOL
        | feature::VERSION_1;
    assert_eq!(features & expected, expected, "{features:#x}");
    assert_eq!(features & feature::RO, 0);
    front.negotiate(u64::MAX, u64::MAX);
    assert_eq!(front.ask(msg::GET_QUEUE_NUM, &[]).word(), 3);
    assert_eq!(front.ask(msg::GET_MAX_MEM_SLOTS, &[]).word(), 509);
    let wanted = protocol::MQ
        | protocol::LOG_SHMFD
        | protocol::REPLY_ACK
        | protocol::CONFIG
        | protocol::BACKEND_REQ
        | protocol::CONFIGURE_MEM_SLOTS;
    assert_eq!(front.protocol & wanted, wanted, "{:#x}", front.protocol);
    let config = front.config(60);
    assert_eq!(number(&config, 0, 8), 8 << 11, "sectors");
    assert_eq!(number(&config, 12, 4), 126, "seg_max");
    assert_eq!(number(&config, 20, 4), 512, "blk_size");
    assert_eq!(number(&config, 34, 2), 3, "num_queues");
    assert!(number(&config, 36, 4) >= 32768, "max_discard_sectors");
    assert!(number(&config, 40, 4) >= 1, "max_discard_seg");
    assert!(number(&config, 56, 1) == 1 || known_defect("it may unmap, and says that it may not"));
}

#[test]
fn the_state_of_the_cache_is_told_truthfully() {
    for (options, writeback) in [("writable=on", 1), ("writable=on,writethrough=on", 0)] {
        let daemon = serving(options);
        let front = client(&daemon);
        let told = number(&front.config(60), 32, 1);
        if writeback != told && known_defect("X1") {
            continue;
        }
        assert_eq!(told, writeback, "{options}");
    }
}

#[test]
fn sizes_that_mean_nothing_are_not_claimed() {
    let daemon = serving("writable=on");
    let front = FrontEnd::connect(&socket(&daemon));
    let features = front.ask(msg::GET_FEATURES, &[]).word();
    drop(front);
    let config = client(&daemon).config(60);
    let sane = features & feature::SIZE_MAX == 0 && number(&config, 26, 2) == 0 && number(&config, 28, 4) == 0;
    assert!(sane || known_defect("X17"), "{features:#x} {config:?}");
}

#[test]
fn a_read_only_device_says_so_and_refuses() {
    let daemon = serving("");
    let mut front = client(&daemon);
    assert_ne!(front.features & feature::RO, 0);
    assert_eq!(front.read(0, 512), [0; 512]);
    assert_eq!(front.request(0, req::OUT, 0, &[1; 512], 0).0, 1);
    let range = [0; 16];
    assert_ne!(front.request(0, req::DISCARD, 0, &range, 0).0, 0);
    assert_ne!(front.request(0, req::WRITE_ZEROES, 0, &range, 0).0, 0);
    front.flush();
}

#[test]
fn blocks_of_other_sizes() {
    let daemon = serving("writable=on,logical-block-size=4096");
    let mut front = client(&daemon);
    assert_eq!(number(&front.config(60), 20, 4), 4096);
    front.write(8, &[7; 4096]);
    assert_eq!(front.read(8, 4096), [7; 4096]);
    // What is no whole block is refused, not rounded.
    if known_defect("parts of blocks are served") {
        return;
    }
    assert_eq!(front.request(0, req::IN, 1, &[], 4096).0, 1);
    assert_eq!(front.request(0, req::OUT, 8, &[1; 512], 0).0, 1);
    assert_eq!(front.read(8, 4096), [7; 4096]);
}

#[test]
fn the_cache_mode_is_the_guests_to_choose() {
    let daemon = serving("writable=on");
    let front = client(&daemon);
    for on in [false, true, false] {
        assert_eq!(front.set_writeback(on), 0);
        assert_eq!(front.config(33)[32], u8::from(on));
    }
    // Nothing else of the configuration can be written.
    if front.protocol & protocol::REPLY_ACK != 0 {
        let payload: Vec<u8> = [0u32, 1, 0].iter().flat_map(|n| n.to_le_bytes()).chain([1]).collect();
        let taken = front.try_tell(msg::SET_CONFIG, &payload, &[]) == 0;
        assert!(!taken || known_defect("a refused configuration is acknowledged"));
    }
}

#[test]
fn a_write_through_guest_has_each_write_on_stable_storage() {
    if known_defect("X1, X10") {
        return;
    }
    let daemon = serving("writable=on");
    let mut qmp = daemon.qmp();
    // A write that has to be durable is followed by a flush of the file, or is one that the kernel makes durable; with a throttle
    // of nothing below, that shows as a flush of that node.
    let mut flushes = || {
        let stats = qmp.ok("query-blockstats", serde_json::json!({"query-nodes": true}));
        stats.as_array().unwrap().iter().map(|node| node["stats"]["flush_operations"].as_u64().unwrap()).sum::<u64>()
    };
    let mut front = client(&daemon);
    front.write(0, &[1; 512]);
    let before = flushes();
    assert_eq!(front.set_writeback(false), 0);
    assert!(flushes() > before, "what was written before is made durable");
    front.write(0, &[2; 512]);
    drop(front);
    // A guest without FLUSH cannot flush, so it gets the same: it works, and its data is there.
    let mut front = FrontEnd::start(&socket(&daemon), 1, feature::FLUSH | feature::CONFIG_WCE);
    front.write(1, &[3; 512]);
    assert_eq!(front.read(0, 1024), [[2; 512], [3; 512]].concat());
}

#[test]
fn status_and_reset_of_the_device() {
    let daemon = serving("writable=on");
    let mut front = client(&daemon);
    if front.protocol & protocol::STATUS == 0 {
        assert!(tests::on_reference());
        return;
    }
    assert_eq!(front.ask(msg::GET_STATUS, &[]).word(), 0);
    front.tell(msg::SET_STATUS, &15u64.to_le_bytes(), &[]);
    assert_eq!(front.ask(msg::GET_STATUS, &[]).word(), 15);
    front.write(0, &[5; 512]);
    assert_eq!(front.set_writeback(false), 0);
    front.tell(msg::RESET_DEVICE, &[], &[]);
    assert_eq!(front.ask(msg::GET_STATUS, &[]).word(), 0);
    assert_eq!(front.config(33)[32], 1);
    // It has forgotten its queue and its features; set up again it works.
    front.queues.clear();
    front.poke(0, &[0; 0x10000]);
    front.negotiate(u64::MAX, u64::MAX);
    front.add_queue(0, 64);
    assert_eq!(front.read(0, 512), [5; 512]);
}

#[test]
fn options_are_checked() {
    for (options, text) in [
        ("addr.type=inet,addr.host=127.0.0.1,addr.port=1", "Only socket address types 'unix' and 'fd' are supported"),
        ("addr.type=vsock,addr.cid=1,addr.port=1", "Only socket address types 'unix' and 'fd' are supported"),
        (
            "addr.type=unix,addr.path=s,logical-block-size=100",
            "parameter logical-block-size must be a power of 2 between 512 and 2097152",
        ),
        (
            "addr.type=unix,addr.path=s,logical-block-size=4194304",
            "parameter logical-block-size must be a power of 2 between 512 and 2097152",
        ),
        ("addr.type=unix,addr.path=s,num-queues=0", "num-queues must be greater than 0"),
        ("addr.type=unix,addr.path=s,num-queues=70000", "Parameter 'num-queues' expects uint16_t"),
        ("addr.type=fd,addr.str=99", "File descriptor '99' is not a socket"),
        ("addr.type=unix", "Parameter 'addr.path' is missing"),
        ("addr.type=unix,addr.path=/none/s", "Failed to bind socket to /none/s: No such file or directory"),
    ] {
        let ended = Setup::new()
            .line("--blockdev driver=null-co,node-name=n")
            .line(&format!("--export vhost-user-blk,id=e,node-name=n,{options}"))
            .run();
        assert!(!ended.status.success());
        // What the option takes may follow.
        let said = ended.stderr.lines().next().unwrap_or_default();
        assert!(said.ends_with(text), "{options}: {}", ended.stderr);
    }
}

#[test]
fn a_serial_number_is_what_the_user_says() {
    let daemon = serving("writable=on");
    let (status, id) = client(&daemon).request(0, req::GET_ID, 0, &[], 20);
    assert_eq!((status, id.as_slice()), (0, &b"vhost_user_blk\0\0\0\0\0\0"[..]));
    if tests::on_reference() {
        return;
    }
    let daemon = serving("writable=on,serial=0123456789abcdefghij");
    let (status, id) = client(&daemon).request(0, req::GET_ID, 0, &[], 20);
    assert_eq!((status, id.as_slice()), (0, &b"0123456789abcdefghij"[..]));
    let ended = setup("serial=0123456789abcdefghijk").run();
    assert!(ended.stderr.contains("serial must not be longer than 20 bytes"), "{}", ended.stderr);
}
