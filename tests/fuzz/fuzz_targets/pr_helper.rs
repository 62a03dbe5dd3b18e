//! What reaches the helper from an unprivileged process, in both protocols, and what reaches the daemon from a device.
#![no_main]

use ipc::classic::{self, REPLY_HEADER, Reply};
use ipc::frame::{self, HEADER, Hello, Request, Response, Welcome};
use ipc::scsi::Cdb;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Some((cdb, list)) = bytes.split_first_chunk::<{ Cdb::SIZE }>()
        && let Ok(cdb) = classic::decode_request(*cdb)
    {
        assert!(cdb.data_length() <= 8192);
        let _ = cdb.action();
        let _ = list;
    }
    if let Some((header, _)) = bytes.split_first_chunk::<REPLY_HEADER>() {
        let _ = Reply::decode_header(header);
    }
    if let Some((header, body)) = bytes.split_first_chunk::<HEADER>()
        && let Ok(length) = frame::message_length(*header)
        && let Some(body) = body.get(..length)
    {
        // What decodes encodes to the same bytes: nothing in a message is left unread.
        if let Ok(request) = frame::decode::<Request>(body) {
            assert_eq!(frame::encode(&request).expect("encode")[HEADER..], *body);
        }
        let _ = frame::decode::<Hello>(body);
        let _ = frame::decode::<Welcome>(body);
        let _ = frame::decode::<Response>(body);
    }
});
