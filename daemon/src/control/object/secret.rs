//! Objects of type `secret` and `secret_keyring`: bytes that nobody else should know, such as passwords of images.
//!
//! The bytes are read once, beside the control task, and decrypted when the object is made; who needs them finds them by the object's name in
//! [`block::resource`]. The tree of objects shows what the user wrote in the options, as the reference does: who wants to
//! keep it from other monitors gives a file or an encrypted secret.

use super::UserObject;
use crate::control::chardev::decode_base64;
use aes::Aes256;
use block::resource::{Resources, Secret as Bytes};
use cbc::cipher::{BlockDecryptMut, KeyIvInit, block_padding::NoPadding};
use io::{Channel, FdSets};
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use qapi::types::qom::{ObjectVariant, SecretCommon, SecretFormat, SecretKeyringProperties, SecretProperties};
use qapi::{Error, Result, Value};
use std::fs::File;
use std::future::poll_fn;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;
use std::sync::Arc;

/// Names and types of the properties of both types.
pub const COMMON: &[(&str, &str)] = &[("iv", "string"), ("keyid", "string"), ("format", "QCryptoSecretFormat")];
/// Those of `secret`.
pub const PROPERTIES: &[(&str, &str)] =
    &[("iv", "string"), ("keyid", "string"), ("format", "QCryptoSecretFormat"), ("file", "string"), ("data", "string")];
/// Those of `secret_keyring`.
pub const KEYRING_PROPERTIES: &[(&str, &str)] =
    &[("iv", "string"), ("keyid", "string"), ("format", "QCryptoSecretFormat"), ("serial", "int32_t")];

/// What a file with a secret may hold, in bytes.
const MAX_FILE: u64 = 1 << 20;
/// The length of a key and of a block of the cipher, in bytes.
const KEY: usize = 32;
const BLOCK: usize = 16;

/// A secret of the user's.
pub struct Secret {
    bytes: Arc<Bytes>,
    common: SecretCommon,
    source: Source,
}

/// Where it came from.
enum Source {
    Data(String),
    File(String),
    Keyring(i32),
}

impl Secret {
    /// Reads a secret out of the options; `content` is that of the file that they name.
    ///
    /// # Errors
    /// Options contradict each other, or what is there is not of its format.
    pub fn read(options: &SecretProperties, content: Option<Vec<u8>>, resources: &Resources) -> Result<Self> {
        let (bytes, source) = match (&options.data, &options.file) {
            (Some(_), Some(_)) => return Err(Error::generic("'file' and 'data' are mutually exclusive")),
            (None, None) => return Err(Error::generic("Either 'file' or 'data' must be provided")),
            (Some(data), None) => (data.clone().into_bytes(), Source::Data(data.clone())),
            (None, Some(name)) => (content.unwrap_or_default(), Source::File(name.clone())),
        };
        Self::new(bytes, options.common.clone(), source, resources)
    }

    /// Reads a secret out of the kernel's keyring.
    ///
    /// # Errors
    /// There is no such key, it may not be read, or what is there is not of its format.
    pub fn read_key(options: &SecretKeyringProperties, resources: &Resources) -> Result<Self> {
        let serial = options.serial;
        let bytes = io::keyring::read(serial)
            .map_err(|error| Error::io(format!("Unable to read serial key {serial:08x}"), error))?;
        Self::new(bytes, options.common.clone(), Source::Keyring(serial), resources)
    }

    fn new(bytes: Vec<u8>, common: SecretCommon, source: Source, resources: &Resources) -> Result<Self> {
        let bytes = decode(Bytes::new(bytes), &common, resources)?;
        Ok(Self { bytes: Arc::new(bytes), common, source })
    }

    /// The secret itself.
    pub fn bytes(&self) -> &Arc<Bytes> {
        &self.bytes
    }
}

/// The file that holds what the object is made of.
pub fn file_of(object: &ObjectVariant) -> Option<&str> {
    match object {
        // With both the options contradict each other, and nothing is read.
        ObjectVariant::Secret(options) if options.data.is_none() => options.file.as_deref(),
        _ => None,
    }
}

/// The content of a file, which may be a pipe: then whoever waits for it holds no thread, and may give up.
///
/// # Errors
/// It cannot be read, or has more than a secret has.
pub async fn read_file(name: &str, fdsets: FdSets) -> Result<Vec<u8>> {
    let failed = |error| Error::io(format!("Unable to read {name}"), error);
    let path = PathBuf::from(name);
    // Without waiting for the other end of a pipe.
    let flags = OFlag::O_RDONLY | OFlag::O_NOCTTY | OFlag::O_NONBLOCK;
    let open = move || {
        let file = File::from(fdsets.open(&path, flags, Mode::empty())?.fd);
        let kind = file.metadata()?.file_type();
        if kind.is_fifo() || kind.is_char_device() {
            return Ok(Content::Pipe(file.into()));
        }
        let mut bytes = Vec::new();
        file.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
        Ok::<_, std::io::Error>(Content::All(bytes))
    };
    let bytes = match io::blocking(open).await.and_then(|read| read) {
        Ok(Content::All(bytes)) => Ok(bytes),
        Ok(Content::Pipe(pipe)) => read_as_it_comes(pipe).await,
        Err(error) => Err(error),
    };
    let bytes = bytes.map_err(failed)?;
    if is_too_long(&bytes) {
        return Err(Error::generic(format!("Unable to read {name}: it has more than {MAX_FILE} bytes")));
    }
    Ok(bytes)
}

fn is_too_long(bytes: &[u8]) -> bool {
    u64::try_from(bytes.len()).is_ok_and(|length| length > MAX_FILE)
}

/// What is in a file, or where it will come from.
enum Content {
    All(Vec<u8>),
    Pipe(OwnedFd),
}

/// The bytes of a pipe or a terminal, until whoever writes has closed it.
async fn read_as_it_comes(pipe: OwnedFd) -> std::io::Result<Vec<u8>> {
    let pipe = Channel::single(pipe)?;
    let (mut bytes, mut part) = (Vec::new(), [0; 4096]);
    while !is_too_long(&bytes) {
        let count = poll_fn(|cx| pipe.poll_read(cx, &mut part, &mut Vec::new())).await?;
        if count == 0 {
            break;
        }
        bytes.extend_from_slice(part.get(..count).unwrap_or_default());
    }
    Ok(bytes)
}

/// What the bytes stand for.
fn decode(bytes: Bytes, common: &SecretCommon, resources: &Resources) -> Result<Bytes> {
    let format = common.format.unwrap_or_default();
    let from_base64 = |bytes: &Bytes| {
        let text = std::str::from_utf8(bytes.expose()).unwrap_or("\0");
        decode_base64(text).map(Bytes::new)
    };
    let Some(key) = &common.keyid else {
        return match format {
            SecretFormat::Raw => Ok(bytes),
            SecretFormat::Base64 => from_base64(&bytes),
        };
    };
    let key = resources.secret(key)?;
    let Ok(key): std::result::Result<&[u8; KEY], _> = key.expose().try_into() else {
        return Err(Error::generic(format!("Key should be {KEY} bytes in length")));
    };
    let iv = common.iv.as_ref().ok_or_else(|| Error::generic("IV is required to decrypt secret"))?;
    let iv = decode_base64(iv)?;
    let Ok(iv): std::result::Result<[u8; BLOCK], _> = iv.as_slice().try_into() else {
        return Err(Error::generic(format!("IV should be {BLOCK} bytes in length not {}", iv.len())));
    };
    let encrypted = match format {
        SecretFormat::Raw => bytes,
        SecretFormat::Base64 => from_base64(&bytes)?,
    };
    let length = encrypted.expose().len();
    let wrong_length = || Error::generic(format!("Length {length} must be a multiple of block size {BLOCK}"));
    let cipher = cbc::Decryptor::<Aes256>::new(key.into(), &iv.into());
    let plain = cipher.decrypt_padded_vec_mut::<NoPadding>(encrypted.expose()).map_err(|_| wrong_length())?;
    without_padding(Bytes::new(plain))
}

/// The bytes in front of the padding, whose last byte says how long it is. [RFC 5652 §6.3]
fn without_padding(plain: Bytes) -> Result<Bytes> {
    let all = plain.expose();
    let Some(last) = all.last() else { return Ok(plain) };
    let count = usize::from(*last);
    match all.len().checked_sub(count).and_then(|end| all.get(..end)) {
        Some(content) if (1..=BLOCK).contains(&count) => Ok(Bytes::new(content.to_vec())),
        _ => Err(Error::generic(format!("Incorrect number of padding bytes ({count}) found on decrypted data"))),
    }
}

impl UserObject for Secret {
    fn get(&self, name: &str) -> Option<Value> {
        let text = |text: Option<&str>| Some(text.unwrap_or_default().into());
        match (name, &self.source) {
            ("iv", _) => text(self.common.iv.as_deref()),
            ("keyid", _) => text(self.common.keyid.as_deref()),
            ("format", _) => text(Some(self.common.format.unwrap_or_default().as_str())),
            ("data", Source::Data(data)) => text(Some(data)),
            ("file", Source::File(file)) => text(Some(file)),
            ("serial", Source::Keyring(serial)) => Some((*serial).into()),
            ("data" | "file", Source::Data(_) | Source::File(_)) => text(None),
            _ => None,
        }
    }

    fn set(&mut self, name: &str, _: &Value) -> Result<()> {
        // The reference takes the value and goes on with the secret that it has.
        Err(Error::generic(format!("Property '{name}' of a secret cannot be changed: make a new one")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_is_checked() {
        let result = |bytes: &[u8]| without_padding(Bytes::new(bytes.to_vec())).map(|b| b.expose().to_vec());
        assert_eq!(result(b"").unwrap(), b"");
        assert_eq!(result(b"abc\x01").unwrap(), b"abc");
        assert_eq!(result(b"\x02\x02").unwrap(), b"");
        for wrong in [&b"abc\0"[..], b"abc\x05", b"aaaaaaaaaaaaaaaaaaaaaaaaaa\x11"] {
            let text = result(wrong).unwrap_err().to_string();
            let count = wrong.last().unwrap();
            assert_eq!(text, format!("Incorrect number of padding bytes ({count}) found on decrypted data"));
        }
    }
}
