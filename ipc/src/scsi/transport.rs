//! TransportIDs: which initiator port a registration belongs to. `[SPC-4 §7.6.4]`

use std::fmt::Write;

/// The port's name for people: `iqn...`, `fc:...`, `sas:...`, `srp:...`. `None` for other protocols and for what does not
/// follow the standard.
pub fn port_name(transport_id: &[u8]) -> Option<String> {
    let first = *transport_id.first()?;
    match (first & 0x0f, first >> 6) {
        (0, 0) => Some(hex("fc:", transport_id.get(8..16)?)),
        (4, 0) => Some(hex("srp:", transport_id.get(8..24)?)),
        (5, format @ (0 | 1)) => {
            let length = usize::from(u16::from_be_bytes([*transport_id.get(2)?, *transport_id.get(3)?]));
            let name = transport_id.get(4..4 + length)?;
            let name = name.split(|&byte| byte == 0).next()?;
            let name = std::str::from_utf8(name).ok().filter(|name| name.chars().all(|c| !c.is_control()))?;
            // Format 1 adds the session: `,i,0x` and its identifier.
            (!name.is_empty() && (format == 1) == name.contains(",i,0x")).then(|| name.to_owned())
        }
        (6, 0) => Some(hex("sas:", transport_id.get(4..12)?)),
        _ => None,
    }
}

fn hex(prefix: &str, bytes: &[u8]) -> String {
    bytes.iter().fold(prefix.to_owned(), |mut text, byte| {
        // To write into a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names() {
        let mut sas = vec![6, 0, 0, 0, 0x50, 1, 2, 3, 4, 5, 6, 7];
        sas.resize(24, 0);
        assert_eq!(port_name(&sas).as_deref(), Some("sas:5001020304050607"));
        let mut fc = vec![0; 24];
        fc[15] = 1;
        assert_eq!(port_name(&fc).as_deref(), Some("fc:0000000000000001"));
        let iscsi =
            |format: u8, name: &[u8]| [&[format << 6 | 5, 0, 0, u8::try_from(name.len()).unwrap()], name].concat();
        assert_eq!(port_name(&iscsi(0, b"iqn.2026-01.example:a\0\0\0")).as_deref(), Some("iqn.2026-01.example:a"));
        let session = b"iqn.2026-01.example:a,i,0x00023d000001\0\0";
        assert_eq!(port_name(&iscsi(1, session)).as_deref(), Some("iqn.2026-01.example:a,i,0x00023d000001"));
        assert_eq!(port_name(&iscsi(1, b"iqn.2026-01.example:a\0\0\0")), None);
        assert_eq!(port_name(&iscsi(0, b"\xff\xff\0\0")), None);
        assert_eq!(port_name(&sas[..11]), None);
        assert_eq!(port_name(&[]), None);
    }

    proptest! {
        #[test]
        fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = port_name(&bytes);
        }
    }
}
