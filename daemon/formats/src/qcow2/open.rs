//! Opening an image: its header and tables are checked, its files found.

use super::bitmap::Recorder;
use super::bytes::us;
use super::cache::Cache;
use super::cleaner::Cleaner;
use super::damage::Damage;
use super::entry::Shape;
use super::extensions::Extensions;
use super::guard::Guard;
use super::handover::Handover;
use super::header::{self, Header};
use super::image::{L1, Qcow2};
use super::options::Tuning;
use super::refcount::Refcounts;
use super::snapshot;
use super::unpacked::Unpacked;
use crate::Workers;
use block::{BlkdebugEvent, Edge, OpenContext, Role};
use buf::IoBuf;
use qapi::types::block::{BlockdevOptions, BlockdevOptionsQcow2, BlockdevRef, BlockdevRefOrNull};
use qapi::{Error, Qapi, Result};
use serde_json::json;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

/// Opens the image in `options.file`, and the files that it names. What takes a processor long is left to `workers`.
///
/// # Errors
/// Not a valid image, a feature that is not there, the errors of the children.
pub async fn open(cx: &mut OpenContext<'_>, options: &BlockdevOptionsQcow2, workers: Workers) -> Result<Qcow2> {
    let file = cx.child("file", Role::Image, &options.file).await?;
    let start = Start::read(&file).await?;
    let read_only = cx.options.read_only;
    let (header, extensions) = (&start.header, &start.extensions);
    check_features(header, extensions, read_only)?;
    let tuning = Tuning::choose(options, header)?;
    let caches = &tuning.caches;
    let table = read_table(&file, "L1 table", header.l1_at, u64::from(header.l1_entries) * 8).await?;
    let l1 = L1 {
        entries: table.chunks_exact(8).map(|entry| super::bytes::be64(entry, 0)).collect(),
        at: header.l1_at,
        ..L1::default()
    };
    file.raise(BlkdebugEvent::ReftableLoad);
    let table = read_table(&file, "reference count table", header.reftable_at, header.reftable_bytes()).await?;
    let refs = Refcounts::new(header.cluster_bits, header.refcount_order, header.reftable_at, &table, caches.refcounts);
    snapshot::read_table(&file.node(), header).await?;
    let bitmaps = Recorder::read(&file, header, extensions.bitmaps.as_ref()).await?;
    let data_file = data_file(cx, options, &start, &file).await?;
    let backing = backing(cx, options, &start, &file).await?;
    let shape = Shape {
        version: header.version,
        cluster_bits: header.cluster_bits,
        subclusters: if header.extended_l2() { 32 } else { 1 },
        data_file: data_file.is_some(),
    };
    let l2 = Arc::new(Cache::new(caches.l2, us(caches.l2_entry), BlkdebugEvent::L2Load));
    let image = Qcow2 {
        shape,
        raw_data: header.autoclear & header::RAW_DATA_FILE != 0,
        read_only: read_only.into(),
        lazy: tuning.lazy.into(),
        discards: tuning.discards.bits().into(),
        cleaner: Cleaner::start(tuning.clean_interval, [&l2, &refs.blocks]),
        size: AtomicU64::new(header.size),
        l1: l1.into(),
        l2,
        refs,
        unpacked: Unpacked::new(header.cluster_size()),
        workers,
        epochs: super::epoch::Epochs::default(),
        busy: block::overlap::Overlap::default(),
        tables: block::overlap::Overlap::default(),
        unlinked: Vec::new().into(),
        much_unlinked: false.into(),
        retired: Vec::new().into(),
        turn: tokio::sync::Mutex::default(),
        turns: AtomicU64::new(0),
        handover: Handover::default(),
        prepared: false.into(),
        preparing: tokio::sync::Mutex::default(),
        bitmaps,
        guard: Guard::new(tuning.checked),
        damage: Damage::new(cx.reporter(), cx.node_name()),
        header: start.header.into(),
        extensions: start.extensions,
        file,
        data_file,
        backing: backing.into(),
        backing_name: start.backing_name.into(),
    };
    let read = image.guard_anew().await;
    read.map_err(|errno| Error::io("Could not read the snapshots' tables", errno.into()))?;
    Ok(image)
}

async fn read_table(file: &Edge, what: &str, at: u64, len: u64) -> Result<Vec<u8>> {
    if len == 0 {
        return Ok(Vec::new());
    }
    if at.checked_add(len).is_none_or(|end| end > file.size().next_multiple_of(1 << 21)) {
        return Err(Error::generic(format!("Could not read {what}: it lies beyond the end of the image")));
    }
    let buf = IoBuf::alloc(us(len));
    file.read(at, &buf).await.map_err(|errno| Error::io(format!("Could not read {what}"), errno.into()))?;
    Ok(buf.to_vec())
}

/// What the first cluster says.
pub(super) struct Start {
    pub header: Header,
    pub extensions: Extensions,
    pub backing_name: Option<String>,
}

impl Start {
    pub async fn read(file: &Edge) -> Result<Self> {
        let first = Self::bytes(file, 512).await?;
        let header = Header::parse(&first)?;
        let first = Self::bytes(file, header.cluster_size()).await?;
        let end = if header.backing_at == 0 { header.cluster_size() } else { header.backing_at };
        let end = us(end).min(first.len());
        let extensions = Extensions::parse(first.get(us(header.header_len.into())..end).unwrap_or_default())?;
        let backing_name = (header.backing_at != 0 && header.backing_len > 0)
            .then(|| {
                let from = us(header.backing_at);
                let name = first.get(from..from + us(header.backing_len.into()));
                let name = name.ok_or_else(|| Error::generic("Could not read backing file name"))?;
                String::from_utf8(name.to_vec()).map_err(|_| Error::generic("The backing file name is not UTF-8"))
            })
            .transpose()?;
        Ok(Self { header, extensions, backing_name })
    }

    async fn bytes(file: &Edge, len: u64) -> Result<Vec<u8>> {
        let buf = IoBuf::alloc(us(len.min(file.size())));
        let read = file.read(0, &buf).await;
        read.map_err(|errno| Error::io("Could not read qcow2 header", errno.into()))?;
        Ok(buf.to_vec())
    }
}

/// Whether the image can be used at all, and written to unless `read_only`.
pub(super) fn check_features(header: &Header, extensions: &Extensions, read_only: bool) -> Result<()> {
    let unknown = header.unknown_incompatible();
    if unknown != 0 {
        let names = extensions.name_features(unknown);
        return Err(Error::generic(format!("Unsupported qcow2 feature(s): {names}")));
    }
    match header.crypt {
        0 if !extensions.crypto => {}
        0..=2 => return Err(Error::generic("The image is encrypted, which is not supported")),
        other => return Err(Error::generic(format!("Unsupported encryption method {other}"))),
    }
    // Guest offsets would be taken for places in the image.
    if header.autoclear & header::RAW_DATA_FILE != 0 && !header.has_data_file() {
        return Err(Error::generic("data-file-raw requires a data file"));
    }
    if read_only {
        return Ok(());
    }
    if header.incompatible & header::CORRUPT != 0 {
        return Err(Error::generic("qcow2: Image is corrupt; cannot be opened read/write"));
    }
    Ok(())
}

async fn data_file(
    cx: &mut OpenContext<'_>,
    options: &BlockdevOptionsQcow2,
    start: &Start,
    file: &Edge,
) -> Result<Option<Arc<Edge>>> {
    let has = start.header.has_data_file();
    match (&options.data_file, &start.extensions.data_file) {
        (Some(_), _) if !has => {
            Err(Error::generic("'data-file' can only be set for images with an external data file"))
        }
        (Some(given), _) => cx.child("data-file", Role::Data, given).await.map(Some),
        (None, _) if !has => Ok(None),
        (None, Some(name)) => {
            let options = named(name, None, file)?;
            cx.implicit_child("data-file", Role::Data, options).await.map(Some)
        }
        (None, None) => Err(Error::generic("'data-file' is required for this image")),
    }
}

async fn backing(
    cx: &mut OpenContext<'_>,
    options: &BlockdevOptionsQcow2,
    start: &Start,
    file: &Edge,
) -> Result<Option<Arc<Edge>>> {
    let reference = match &options.backing {
        Some(BlockdevRefOrNull::Null(_)) => return Ok(None),
        Some(BlockdevRefOrNull::Reference(name)) if name.is_empty() => return Ok(None),
        Some(BlockdevRefOrNull::Reference(name)) => Some(BlockdevRef::Reference(name.clone())),
        Some(BlockdevRefOrNull::Definition(options)) => Some(BlockdevRef::Definition(options.clone())),
        None => None,
    };
    let failed = |error: Error| {
        let desc = format!("Could not open backing file: {error}");
        Error { desc, ..error }
    };
    let Some(name) = &start.backing_name else {
        return match reference {
            Some(reference) => cx.child("backing", Role::Backing, &reference).await.map(Some).map_err(failed),
            None => Ok(None),
        };
    };
    if start.raw_with_backing() {
        return Err(Error::generic("An external data file that is raw cannot have a backing file"));
    }
    if let Some(reference) = reference {
        return cx.child("backing", Role::Backing, &reference).await.map(Some).map_err(failed);
    }
    let format = start.extensions.backing_format.as_deref();
    if format.is_none() && !name.starts_with("json:") {
        return Err(Error::generic(format!(
            "The image names the backing file '{name}' without its format, and formats are never guessed: give 'backing' as \
             an option, or have the image name it ('qemu-img rebase -u -F')"
        )));
    }
    let options = named(name, format, file)?;
    let opened = cx.implicit_child("backing", Role::Backing, options).await;
    opened.map(Some).map_err(failed)
}

impl Start {
    fn raw_with_backing(&self) -> bool {
        self.header.autoclear & header::RAW_DATA_FILE != 0 && self.header.has_data_file()
    }
}

/// The options of the file that an image in `image` names.
fn named(name: &str, format: Option<&str>, image: &Edge) -> Result<BlockdevOptions> {
    if let Some(json) = name.strip_prefix("json:") {
        let value = serde_json::from_str::<serde_json::Value>(json)
            .map_err(|error| Error::generic(format!("Could not parse the JSON options of '{name}': {error}")))?;
        return BlockdevOptions::from_value(&nested(value));
    }
    let path = match name.split_once(':') {
        Some(("file", path)) => path,
        Some((protocol, _)) if !protocol.contains('/') => {
            return Err(Error::generic(format!("Unknown protocol '{protocol}' in the name '{name}'")));
        }
        _ => name,
    };
    let path = beside(path, image)?;
    let file = json!({ "driver": "file", "filename": path });
    let options = match format {
        None | Some("file") => file,
        Some("host_device") => json!({ "driver": "host_device", "filename": path }),
        Some(format) => json!({ "driver": format, "file": file }),
    };
    BlockdevOptions::from_value(&options)
}

/// A path that is relative to the folder of the image.
pub(super) fn beside(path: &str, image: &Edge) -> Result<String> {
    if Path::new(path).is_absolute() {
        return Ok(path.to_owned());
    }
    let image = image.node().driver().filename();
    if image.is_empty() || image.starts_with("json:") {
        return Err(Error::generic(format!("Cannot use relative backing file names for '{image}'")));
    }
    let folder = Path::new(&image).parent().unwrap_or(Path::new(""));
    Ok(folder.join(path).to_string_lossy().into_owned())
}

/// `{"a.b": c}` as `{"a": {"b": c}}`: both forms are in use.
fn nested(value: serde_json::Value) -> serde_json::Value {
    let serde_json::Value::Object(members) = value else { return value };
    let mut out = serde_json::Map::new();
    for (key, value) in members {
        let value = nested(value);
        match key.split_once('.') {
            None => {
                out.insert(key, value);
            }
            Some((outer, inner)) => {
                let place = out.entry(outer.to_owned()).or_insert_with(|| json!({}));
                if let (serde_json::Value::Object(place), serde_json::Value::Object(inner)) =
                    (place, nested(json!({ inner: value })))
                {
                    place.extend(inner);
                }
            }
        }
    }
    serde_json::Value::Object(out)
}
