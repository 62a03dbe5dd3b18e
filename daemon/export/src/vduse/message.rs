//! Messages of the kernel, and their answers: numbers and layouts, `[VDUSE struct vduse_dev_request]`.

use io::VDUSE_MESSAGE;

/// Bytes in front of what is particular to a message: its kind or result, its number, and room.
const HEAD: usize = 24;

mod kind {
    pub const GET_VQ_STATE: u32 = 0;
    pub const SET_STATUS: u32 = 1;
    pub const UPDATE_IOTLB: u32 = 2;
}

/// What the kernel says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Message {
    /// Asks where a queue stands.
    GetQueueState(u32),
    /// The driver has set the status of the device. `[virtio 1.2 §2.1]`
    SetStatus(u8),
    /// The memory from one address to another one changed.
    UpdateMemory(u64, u64),
    Unknown(u32),
}

/// The number of a message, and what it says.
pub(crate) fn decode(raw: &[u8; VDUSE_MESSAGE]) -> (u32, Message) {
    let [a, b, c, d, e, f, g, h, ..] = *raw;
    let (kind, number) = (u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h]));
    let rest = raw.get(HEAD..).and_then(|rest| rest.first_chunk::<16>()).copied().unwrap_or_default();
    let [low, high] = [rest.first_chunk::<8>(), rest.last_chunk::<8>()].map(|half| half.copied().unwrap_or_default());
    let [i, j, k, l, ..] = low;
    let message = match kind {
        kind::GET_VQ_STATE => Message::GetQueueState(u32::from_ne_bytes([i, j, k, l])),
        kind::SET_STATUS => Message::SetStatus(i),
        kind::UPDATE_IOTLB => Message::UpdateMemory(u64::from_ne_bytes(low), u64::from_ne_bytes(high)),
        other => Message::Unknown(other),
    };
    (number, message)
}

/// An answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    Done,
    Failed,
    /// The next entry of the available ring of a queue.
    QueueState(u32, u16),
}

/// The answer to the message of this number.
pub(crate) fn encode(number: u32, answer: Answer) -> [u8; VDUSE_MESSAGE] {
    let mut raw = [0; VDUSE_MESSAGE];
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(place) = raw.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    };
    put(0, &number.to_ne_bytes());
    put(4, &u32::from(answer == Answer::Failed).to_ne_bytes());
    if let Answer::QueueState(index, next) = answer {
        put(HEAD, &index.to_ne_bytes());
        put(HEAD + 4, &next.to_ne_bytes());
    }
    raw
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn raw(kind: u32, number: u32, rest: &[u8]) -> [u8; VDUSE_MESSAGE] {
        let mut raw = [0; VDUSE_MESSAGE];
        raw[..4].copy_from_slice(&kind.to_ne_bytes());
        raw[4..8].copy_from_slice(&number.to_ne_bytes());
        raw[24..24 + rest.len()].copy_from_slice(rest);
        raw
    }

    #[test]
    fn messages_are_those_of_the_header() {
        assert_eq!(decode(&raw(0, 7, &3u32.to_ne_bytes())), (7, Message::GetQueueState(3)));
        assert_eq!(decode(&raw(1, 8, &[15, 0xFF])), (8, Message::SetStatus(15)));
        let range = [5u64.to_ne_bytes(), u64::MAX.to_ne_bytes()].concat();
        assert_eq!(decode(&raw(2, 9, &range)), (9, Message::UpdateMemory(5, u64::MAX)));
        assert_eq!(decode(&raw(3, u32::MAX, &[])), (u32::MAX, Message::Unknown(3)));
    }

    #[test]
    fn answers_are_those_of_the_header() {
        assert_eq!(encode(7, Answer::Done)[..8], [7u32.to_ne_bytes(), [0; 4]].concat());
        assert_eq!(encode(7, Answer::Failed)[..8], [7u32.to_ne_bytes(), 1u32.to_ne_bytes()].concat());
        let state = encode(7, Answer::QueueState(2, 0x1234));
        assert_eq!(state[..24], [&7u32.to_ne_bytes()[..], &[0; 20]].concat());
        assert_eq!(state[24..30], [&2u32.to_ne_bytes()[..], &0x1234u16.to_ne_bytes()].concat());
        assert!(state[30..].iter().all(|byte| *byte == 0));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_message(bytes in prop::collection::vec(any::<u8>(), VDUSE_MESSAGE)) {
            let raw: [u8; VDUSE_MESSAGE] = bytes.try_into().unwrap();
            let (number, _) = decode(&raw);
            prop_assert_eq!(&number.to_ne_bytes()[..], &raw[4..8]);
        }
    }
}
