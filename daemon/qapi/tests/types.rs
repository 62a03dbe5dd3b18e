//! The types of the interface against requests that clients send and replies that the reference gives.
#![allow(missing_docs, clippy::expect_used, clippy::panic)]

use qapi::{
    Command, Qapi, Value,
    types::{
        block::{BlockdevDriver, BlockdevDriverOptions, BlockdevOptions, BlockdevRef, OnOffAuto},
        block_query::{BlockDeviceStats, BlockStats, QueryNamedBlockNodes, XDbgBlockGraph},
        chardev::ChardevAdd,
        control::{MonitorOptions, QmpCapabilities},
        export::{BlockExportIothreads, BlockExportOptions, NbdServerOptions, NbdServerOptionsLegacy},
        qom::ObjectOptions,
        sockets::{SocketAddress, SocketAddressVariant},
    },
};
use serde_json::json;

fn read<T: Qapi>(value: Value) -> T {
    T::from_value(&value).unwrap_or_else(|e| panic!("{value}: {e}"))
}

fn error<T: Qapi + std::fmt::Debug>(value: Value) -> String {
    T::from_value(&value).expect_err("it is wrong").to_string()
}

#[test]
fn a_raw_node_over_a_file() {
    let options: BlockdevOptions = read(json!({
        "driver": "raw", "node-name": "r", "read-only": true,
        "file": {"driver": "file", "filename": "/x", "locking": "off", "aio": "io_uring", "cache": {"direct": true}},
    }));
    let BlockdevDriverOptions::Raw(raw) = &options.driver else { panic!("not raw") };
    let BlockdevRef::Definition(file) = &raw.file else { panic!("no definition") };
    let BlockdevDriverOptions::File(options) = &file.driver else { panic!("no file") };
    assert_eq!((options.filename.as_str(), options.locking, options.drop_cache), ("/x", Some(OnOffAuto::Off), true));
    assert_eq!(qapi::Variants::tag(&file.driver), BlockdevDriver::File);
    assert_eq!(
        error::<BlockdevOptions>(json!({"driver": "raw", "file": null})),
        "Invalid parameter type for 'file', expected: BlockdevRef"
    );
    assert_eq!(
        error::<BlockdevOptions>(json!({"driver": "host_device", "filename": "/x", "nosuch": "p"})),
        "Parameter 'nosuch' is unexpected"
    );
}

#[test]
fn both_forms_of_socket_addresses() {
    let flat: NbdServerOptions = read(json!({"addr": {"type": "inet", "host": "::1", "port": "10809", "to": 10900}}));
    assert_eq!((flat.max_connections, flat.handshake_max_seconds), (100, 10));
    let SocketAddressVariant::Inet(inet) = &flat.addr.addr else { panic!("not inet") };
    assert_eq!((inet.to, inet.numeric, inet.ipv4), (Some(10900), false, None));
    let legacy: NbdServerOptionsLegacy =
        read(json!({"addr": {"type": "unix", "data": {"path": "/s"}}, "max-connections": 0}));
    let SocketAddress { addr: SocketAddressVariant::Unix(unix) } = NbdServerOptions::from(legacy).addr else {
        panic!("not unix")
    };
    assert_eq!((unix.path.as_str(), unix.tight, unix.is_abstract), ("/s", true, false));
    assert_eq!(
        error::<NbdServerOptionsLegacy>(json!({"addr": {"type": "unix", "path": "/s"}})),
        "Parameter 'addr.data' is missing"
    );
    let _: ChardevAdd = read(json!({"id": "c", "backend": {"type": "socket", "data": {
        "addr": {"type": "vsock", "data": {"cid": "2", "port": "1"}}, "server": true, "wait": false}}}));
}

#[test]
fn an_export_on_one_thread_or_several() {
    let one: BlockExportOptions = read(json!({"type": "nbd", "id": "e", "node-name": "n", "iothread": "t"}));
    assert_eq!(one.iothread, Some(BlockExportIothreads::Single("t".into())));
    let two: BlockExportOptions =
        read(json!({"type": "nbd", "id": "e", "node-name": "n", "iothread": ["t", "u"], "name": "x"}));
    assert_eq!(two.iothread, Some(BlockExportIothreads::Multi(vec!["t".into(), "u".into()])));
    assert_eq!(
        error::<BlockExportOptions>(json!({"type": "nbd", "id": "e", "node-name": "n", "iothread": [1]})),
        "Invalid parameter type for 'iothread[0]', expected: string"
    );
}

#[test]
fn the_smaller_ones() {
    let _: ObjectOptions = read(json!({"qom-type": "iothread", "id": "t", "poll-max-ns": 0}));
    assert_eq!(
        error::<QmpCapabilities>(json!({"enable": ["foo"]})),
        "Parameter 'enable[0]' does not accept value 'foo'",
        "the reference says 'null' here"
    );
    assert_eq!(
        error::<MonitorOptions>(json!({"chardev": "c", "mode": "vc"})),
        "Parameter 'mode' does not accept value 'vc'"
    );
    assert_eq!(QueryNamedBlockNodes::NAME, "query-named-block-nodes");
    assert!(!read::<QueryNamedBlockNodes>(json!({})).flat);
}

/// A node as the reference described it, seen through our types: nothing missing, nothing unknown.
#[test]
fn replies_of_the_reference_are_of_our_types() {
    let stats = json!({
        "unmap_operations": 0, "unmap_merged": 0, "failed_zone_append_operations": 0, "flush_total_time_ns": 0,
        "wr_highest_offset": 0, "wr_total_time_ns": 0, "failed_wr_operations": 0, "failed_rd_operations": 0,
        "wr_merged": 0, "wr_bytes": 0, "timed_stats": [], "failed_unmap_operations": 0, "zone_append_merged": 0,
        "failed_flush_operations": 0, "account_invalid": false, "rd_total_time_ns": 0, "invalid_unmap_operations": 0,
        "flush_operations": 0, "wr_operations": 0, "unmap_bytes": 0, "rd_merged": 0, "rd_bytes": 0,
        "unmap_total_time_ns": 0, "invalid_flush_operations": 0, "account_failed": false,
        "zone_append_total_time_ns": 0, "zone_append_operations": 0, "rd_operations": 0, "zone_append_bytes": 0,
        "invalid_zone_append_operations": 0, "invalid_wr_operations": 0, "invalid_rd_operations": 0,
    });
    let file = json!({
        "node-name": "f", "stats": stats,
        "driver-specific": {"discard-bytes-ok": 0, "discard-nb-ok": 0, "driver": "file", "discard-nb-failed": 0},
    });
    let raw: BlockStats = read(json!({"node-name": "r", "stats": stats, "parent": file}));
    assert_eq!(raw.stats, BlockDeviceStats::default());
    assert!(raw.parent.expect("the file").driver_specific.is_some());
    let graph: XDbgBlockGraph = read(json!({
        "edges": [
            {"name": "root", "parent": 1, "shared-perm": ["write-unchanged", "write", "consistent-read"],
             "perm": ["write", "consistent-read"], "child": 2}],
        "nodes": [{"name": "r", "type": "block-driver", "id": 2}, {"name": "", "type": "block-backend", "id": 1}],
    }));
    assert_eq!(graph.nodes.len(), 2);
}

#[test]
fn deep_definitions_are_refused_before_they_fill_the_stack() {
    let mut value = json!("a");
    for _ in 0..400 {
        let mut map = qapi::Map::new();
        map.insert("driver".to_owned(), "raw".into());
        map.insert("file".to_owned(), value);
        value = Value::Object(map);
    }
    let text = std::thread::Builder::new()
        // Half of what the daemon's main thread has, without optimisation.
        .stack_size(4 << 20)
        .spawn(move || error::<BlockdevOptions>(value))
        .expect("a thread")
        .join()
        .expect("no overflow");
    assert!(text.ends_with("is nested too deeply"), "{text}");
}
