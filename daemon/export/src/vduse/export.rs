//! [`VduseBlkExport`]: how a device begins and ends.
//!
//! A device that is there already was left by a process that has died, or that had to leave it on the vDPA bus. If it is not
//! on the bus any more, nobody misses it, and it is made anew. Otherwise its driver waits for it, and it is taken up
//! with the record that its former process left; without one it is unknown which requests are in flight, so it is left alone.

use super::device::{Device, Kernel, Parts};
use super::record::{Record, Shape, folder};
use crate::lifetime::Lifetime;
use crate::virtio_blk::config::{CONFIG_LEN, Geometry};
use crate::virtio_blk::options;
use crate::virtio_blk::queue::Shared;
use crate::virtio_blk::request::Limits;
use crate::{Export, ExportDriver, ExportParams};
use block::Disk;
use block::driver::LocalFuture;
use io::{VduseControl, VduseDevice, VduseNew, vduse_is_attached};
use qapi::types::export::BlockExportOptionsVduseBlk;
use qapi::{Error, Result};
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use tokio::sync::{oneshot, watch};

/// The number of block devices. `[virtio 1.2 §5]`
const BLOCK: u32 = 2;
/// The most bytes of a name: one less than the kernel has room for, and what a file name can have with what is put before it.
const MAX_NAME: usize = 200;
/// How long and how often a new device is waited for that this process cannot open yet: udev gives it its owner.
const OPEN_TRIES: u32 = 100;
const OPEN_PAUSE: Duration = Duration::from_millis(10);

/// Starts exports of this kind.
#[derive(Debug)]
pub struct VduseBlkDriver<'a> {
    /// What the user asked for.
    pub options: &'a BlockExportOptionsVduseBlk,
}

impl ExportDriver for VduseBlkDriver<'_> {
    /// The kernel keeps the device, and the requests in flight, for the next process.
    fn is_outlived(&self) -> bool {
        true
    }

    fn start<'a>(&'a self, params: ExportParams) -> LocalFuture<'a, Result<Arc<dyn Export>>> {
        Box::pin(async move { Ok(start(self.options, params).await? as Arc<dyn Export>) })
    }
}

/// An export of this kind.
#[derive(Debug)]
pub struct VduseBlkExport {
    id: String,
    name: String,
    disk: Disk,
    drivers: watch::Receiver<usize>,
    /// With the task inside that serves.
    lifetime: Lifetime,
}

fn check_name(name: &str) -> Result<()> {
    let wrong = name.is_empty() || name.contains(['/', '\0']) || matches!(name, "." | ".." | "control");
    if wrong || name.len() > MAX_NAME {
        let text = format!("failed to create vduse device: '{name}' cannot be the name of a device");
        return Err(Error::generic(text));
    }
    Ok(())
}

/// A device that is open, and what belongs to it.
struct Opened {
    control: VduseControl,
    device: OwnedFd,
    record: Record,
    /// Another process left it to its driver.
    left: bool,
}

fn failed(error: impl std::fmt::Display) -> Error {
    Error::generic(format!("failed to create vduse device: {error}"))
}

/// Makes the device, or opens the one that was left. Can block.
fn open(name: &str, shape: Shape, config: &[u8; CONFIG_LEN]) -> Result<Opened> {
    let control = VduseControl::open().map_err(|error| failed(format_args!("/dev/vduse/control: {error}")))?;
    let new = VduseNew { name, device: BLOCK, features: shape.features, queues: shape.queues, config };
    let mut created = control.create(&new);
    if let Err(error) = &created
        && error.kind() == ErrorKind::AlreadyExists
    {
        match control.destroy(name) {
            Ok(()) => created = control.create(&new),
            Err(error) if error.kind() == ErrorKind::ResourceBusy => return take_over(control, name, shape),
            Err(error) => return Err(failed(format_args!("{name}: {error}"))),
        }
    }
    created.map_err(|error| failed(format_args!("{name}: {error}")))?;
    let opened = set_up(name, shape);
    match opened {
        Ok((device, record)) => Ok(Opened { control, device, record, left: false }),
        Err(error) => {
            // It was made a moment ago, and nobody can use it.
            let _ = control.destroy(name);
            Err(error)
        }
    }
}

fn set_up(name: &str, shape: Shape) -> Result<(OwnedFd, Record)> {
    let folder = folder().map_err(no_record)?;
    let record = Record::create(&folder, name, shape);
    let record = record.map_err(|error| no_record(format_args!("{}: {error}", folder.display())))?;
    let mut tries = 0;
    loop {
        match VduseDevice::open(name) {
            Ok(device) => return Ok((device, record)),
            Err(error)
                if tries < OPEN_TRIES && matches!(error.kind(), ErrorKind::NotFound | ErrorKind::PermissionDenied) =>
            {
                tries += 1;
                std::thread::sleep(OPEN_PAUSE);
            }
            Err(error) => {
                record.remove();
                return Err(failed(format_args!("/dev/vduse/{name}: {error}")));
            }
        }
    }
}

fn no_record(error: impl std::fmt::Display) -> Error {
    Error::generic(format!("failed to set reconnect log file: {error}"))
}

fn take_over(control: VduseControl, name: &str, shape: Shape) -> Result<Opened> {
    let hint = format!("'vdpa dev del {name}' takes it off the vDPA bus, then it is made anew");
    let in_use = |why: String| {
        Error::generic(format!("failed to create vduse device: '{name}' exists and is in use: {why}"))
            .with_hint(hint.clone())
    };
    let device = VduseDevice::open(name).map_err(|error| match error.kind() {
        ErrorKind::ResourceBusy => in_use("another process serves it".to_owned()),
        _ => failed(format_args!("/dev/vduse/{name}: {error}")),
    })?;
    let folder = folder().map_err(no_record)?;
    let record = Record::open(&folder, name, shape).map_err(|error| match error.kind() {
        ErrorKind::NotFound => in_use(format!("{} has no record of its requests in flight", folder.display())),
        ErrorKind::WouldBlock => in_use("another process has its record".to_owned()),
        _ => in_use(error.to_string()),
    })?;
    Ok(Opened { control, device, record, left: true })
}

async fn start(options: &BlockExportOptionsVduseBlk, params: ExportParams) -> Result<Arc<VduseBlkExport>> {
    options::check_queues(options.num_queues)?;
    let queue_size = options.queue_size;
    if !queue_size.is_power_of_two() || !(4..=1024).contains(&queue_size) {
        return Err(Error::generic("queue-size is invalid"));
    }
    let block_size = options::block_size(options.logical_block_size)?;
    let serial = options::serial(options.serial.as_deref().unwrap_or_default())?;
    check_name(&options.name)?;
    let name = options.name.clone();
    let threads = params.serving_threads()?;
    let ExportParams { id, writable, disk, .. } = params;
    let (grown, resized) = watch::channel(disk.size());
    disk.on_resize(Box::new(move |size| {
        grown.send_replace(size);
    }));
    let (drivers, counted) = watch::channel(0);
    let parts = Parts {
        shared: Arc::new(Shared {
            disk: disk.clone(),
            limits: Limits { writable, block_size },
            serial,
            through: AtomicBool::new(true),
        }),
        geometry: Geometry { block_size, queues: options.num_queues, writable },
        queue_size,
        threads,
        resized,
        drivers,
    };
    let shape = Shape { queues: options.num_queues, queue_size, block_size, features: parts.features() };
    let config = parts.geometry.config(&disk, !disk.is_writethrough());
    let opening = name.clone();
    let opened = io::blocking(move || open(&opening, shape, &config)).await.map_err(failed)??;
    let Opened { control, device, record, left } = opened;
    let (tell, ready) = oneshot::channel();
    let export = Arc::new(VduseBlkExport { id, name, disk, drivers: counted, lifetime: Lifetime::new() });
    let (this, inside) = (Arc::clone(&export), export.lifetime.enter());
    tokio::task::spawn_local(async move {
        let result = serve(&this, &parts, device, &record, left, tell).await;
        if let Err(error) = result {
            tracing::warn!(target: "vduse_lost", %error, export = this.id, "the device cannot be served any more");
            this.lifetime.ending().await;
        }
        drop(parts);
        end(&this, control, record).await;
        drop((this, inside));
    });
    match ready.await {
        Ok(Ok(())) => Ok(export),
        Ok(Err(error)) => {
            export.request_shutdown();
            export.closed().await;
            Err(failed(format_args!("{}: {error}", export.name)))
        }
        Err(_) => Err(failed("the daemon is about to end")),
    }
}

/// Serves the device until the export is to close. Says whether it could begin.
async fn serve(
    export: &VduseBlkExport,
    parts: &Parts,
    device: OwnedFd,
    record: &Record,
    left: bool,
    tell: oneshot::Sender<std::io::Result<()>>,
) -> std::io::Result<()> {
    let begin = async || {
        let kernel: Arc<dyn Kernel> = Arc::new(begun(device, parts, left)?);
        let mut device = Device::new(parts, kernel, record.region()?);
        if left {
            device.take_up().await?;
        }
        Ok(device)
    };
    let device: std::io::Result<Device<'_>> = begin().await;
    match device {
        Ok(device) => {
            let _ = tell.send(Ok(()));
            tracing::debug!(target: "vduse_start", export = export.id, device = export.name, left);
            device.run(export.lifetime.ending()).await
        }
        Err(error) => {
            let given_up = error.raw_os_error() == Some(nix::libc::EPERM);
            let _ = tell.send(Err(if given_up {
                let text = "the kernel has given the device up, as nobody answered in time; 'vdpa dev del' removes it";
                std::io::Error::other(text)
            } else {
                error
            }));
            Ok(())
        }
    }
}

fn begun(device: OwnedFd, parts: &Parts, left: bool) -> std::io::Result<VduseDevice> {
    let device = VduseDevice::new(device)?;
    if !left {
        (0..parts.geometry.queues).try_for_each(|index| device.set_queue_max(index, parts.queue_size))?;
    }
    Ok(device)
}

/// Removes the device, unless it is on the vDPA bus: then it is left with its record.
async fn end(export: &VduseBlkExport, control: VduseControl, record: Record) {
    let name = export.name.clone();
    let ended = io::blocking(move || {
        let destroyed = control.destroy(&name);
        match destroyed {
            Err(error) if error.kind() == ErrorKind::ResourceBusy => Err(error),
            other => {
                record.remove();
                other
            }
        }
    })
    .await;
    let Err(error) = ended.and_then(|result| result) else { return };
    if error.kind() == ErrorKind::ResourceBusy {
        tracing::warn!(
            target: "vduse_left",
            export = export.id,
            device = export.name,
            "the device stays on the vDPA bus, and waits for an export of its name or for 'vdpa dev del'"
        );
    } else {
        tracing::warn!(target: "vduse_left", %error, export = export.id, device = export.name, "the device cannot be removed");
    }
}

impl Export for VduseBlkExport {
    fn id(&self) -> &str {
        &self.id
    }

    fn kind(&self) -> &'static str {
        "vduse-blk"
    }

    fn disk(&self) -> &Disk {
        &self.disk
    }

    /// One if a driver uses the device, or is to: it is on the vDPA bus.
    fn clients(&self) -> usize {
        (*self.drivers.borrow()).max(usize::from(vduse_is_attached(&self.name)))
    }

    fn lifetime(&self) -> &Lifetime {
        &self.lifetime
    }
}
