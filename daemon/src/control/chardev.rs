//! Commands about character devices; the devices themselves are in [`crate::chardev`].

use super::Control;
use base64::Engine;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use qapi::types::chardev::{
    ChardevAdd, ChardevBackend, ChardevBackendInfo, ChardevBackendKind, ChardevBackendVariant, ChardevChange,
    ChardevInfo, ChardevRemove, ChardevReturn, ChardevSendBreak, DataFormat, QueryChardev, QueryChardevBackends,
    RingbufRead, RingbufWrite,
};
use qapi::{Error, Result, ResultExt};
use std::os::fd::OwnedFd;

/// Base64 as clients write it, with or without the padding.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// The bytes that a text in base64 stands for. Line breaks in it mean nothing.
///
/// # Errors
/// It is none.
pub(super) fn decode_base64(text: &str) -> Result<Vec<u8>> {
    let text: String = text.chars().filter(|c| !matches!(c, '\r' | '\n')).collect();
    BASE64.decode(text).map_err(|_| Error::generic("Base64 data contains invalid characters"))
}

impl Control {
    pub(super) fn chardev_add(
        &mut self,
        args: ChardevAdd,
    ) -> Result<impl Future<Output = Result<ChardevReturn>> + use<>> {
        let ChardevAdd { id, mut backend } = args;
        if self.chardevs.contains(&id) {
            return Err(Error::generic(format!("Chardev with id '{id}' already exists")));
        }
        let failed = format!("Failed to add chardev '{id}'");
        let passed = self.prepare(&mut backend).with_context(|| failed.clone())?;
        let begun = self.chardevs.add(&id, backend).with_context(|| failed.clone())?;
        Ok(async move {
            let added = begun.await.with_context(|| failed);
            drop(passed);
            added
        })
    }

    pub(super) fn chardev_change(
        &mut self,
        args: ChardevChange,
    ) -> Result<impl Future<Output = Result<ChardevReturn>> + use<>> {
        let ChardevChange { id, mut backend } = args;
        let failed = format!("Failed to add chardev '{id}'");
        let passed = self.prepare(&mut backend).with_context(|| failed.clone())?;
        let begun = self.chardevs.change(&id, backend)?;
        Ok(async move {
            let changed = begun.await.with_context(|| failed);
            drop(passed);
            changed
        })
    }

    /// What a device may not be told once others are served; and the socket that a client passed for it.
    fn prepare(&mut self, backend: &mut ChardevBackend) -> Result<Option<OwnedFd>> {
        match &mut backend.kind {
            // Whoever asked would get no reply until then, and could not even ask to stop.
            ChardevBackendVariant::Socket(socket) if socket.data.server && socket.data.wait == Some(true) => {
                Err(Error::generic("'wait' can only be on on the command line"))
            }
            ChardevBackendVariant::Socket(socket) => self.descriptors.resolve_legacy(&mut socket.data.addr),
            ChardevBackendVariant::Udp(udp) => self.descriptors.resolve_legacy(&mut udp.data.remote),
            _ => Ok(None),
        }
    }

    pub(super) async fn chardev_remove(&mut self, args: ChardevRemove) -> Result<()> {
        self.chardevs.remove(&args.id)
    }

    pub(super) async fn chardev_send_break(&mut self, args: ChardevSendBreak) -> Result<()> {
        // What can use a device here is a monitor, and to a monitor a break means nothing.
        if self.chardevs.contains(&args.id) {
            Ok(())
        } else {
            Err(Error::generic(format!("Chardev '{}' not found", args.id)))
        }
    }

    pub(super) async fn query_chardev(&mut self, _: QueryChardev) -> Result<Vec<ChardevInfo>> {
        Ok(self.chardevs.query())
    }

    pub(super) async fn query_chardev_backends(&mut self, _: QueryChardevBackends) -> Result<Vec<ChardevBackendInfo>> {
        Ok(ChardevBackendKind::ALL.iter().map(|kind| ChardevBackendInfo { name: kind.as_str().to_owned() }).collect())
    }

    pub(super) async fn ringbuf_write(&mut self, args: RingbufWrite) -> Result<()> {
        let bytes = match args.format.unwrap_or_default() {
            DataFormat::Utf8 => args.data.into_bytes(),
            DataFormat::Base64 => {
                // Which device it is counts first.
                self.chardevs.write_ring(&args.device, &[])?;
                decode_base64(&args.data)?
            }
        };
        self.chardevs.write_ring(&args.device, &bytes)
    }

    pub(super) async fn ringbuf_read(&mut self, args: RingbufRead) -> Result<String> {
        self.chardevs.read_ring(&args.device, 0)?;
        let size = usize::try_from(args.size).ok().filter(|size| *size > 0);
        let size = size.ok_or_else(|| Error::generic("size must be greater than zero"))?;
        let bytes = self.chardevs.read_ring(&args.device, size)?;
        Ok(match args.format.unwrap_or_default() {
            DataFormat::Utf8 => String::from_utf8_lossy(&bytes).into_owned(),
            DataFormat::Base64 => BASE64.encode(bytes),
        })
    }
}
