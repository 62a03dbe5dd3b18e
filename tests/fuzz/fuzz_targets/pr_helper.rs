//! What reaches the helper from an unprivileged process, in both protocols, and what reaches the daemon from a device.
#![no_main]

use ipc::classic::{self, REPLY_HEADER, Reply};
use ipc::frame::{self, HEADER, Hello, Request, Response, Welcome};
use ipc::scsi::{Action, Cdb, Data, Parameters, Sense, port_name};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Some((cdb, list)) = bytes.split_first_chunk::<{ Cdb::SIZE }>()
        && let Ok(cdb) = classic::decode_request(*cdb)
    {
        assert!(cdb.data_length() <= 8192);
        // What rules see of the keys is what the command does with them.
        let keys = Parameters::keys(list);
        if let Some(parameters) = Parameters::decode(list) {
            assert_eq!(keys, Some((parameters.key, parameters.action_key)));
        }
        if let Some(action) = cdb.action() {
            assert_eq!(action.is_out(), cdb.is_out());
            device(action, list);
        }
    }
    if let Some((first, data)) = bytes.split_first()
        && let Some(action) = Action::all().nth(usize::from(first % 16))
    {
        device(action, data);
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

/// What a device answers: understood and written again, it means the same.
fn device(action: Action, data: &[u8]) {
    let _ = Sense::decode(data).map(|sense| sense.to_string());
    let reply = Reply { data: data.to_vec(), ..Reply::status(0) };
    let _ = frame::encode(&Response::from_reply(1, action, &reply));
    let Ok(found) = Data::decode(action, data) else { return };
    match &found {
        // As many keys as came, and how many there are, differ where the device has more than the buffer.
        Data::Keys { keys, total, .. } if keys.len() < *total as usize => {}
        Data::FullStatus { truncated: true, .. } => {}
        _ => assert_eq!(Data::decode(action, &found.encode()).as_ref(), Ok(&found)),
    }
    if let Data::FullStatus { registrants, .. } = found {
        for registrant in registrants {
            let _ = port_name(&registrant.initiator);
        }
    }
}
