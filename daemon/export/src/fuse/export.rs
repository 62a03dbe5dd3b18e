//! [`FuseExport`]: mounting, the threads, and the end.
//!
//! The end has an order: the file system is unmounted while the threads still serve, because the kernel writes back then what
//! programs left in shared mappings; then the threads stop reading and finish what they read; with the last descriptor the
//! connection ends, and whoever still has the file open gets `ENOTCONN`. One task of the control thread sees to it.

use super::device::Device;
use super::file::{File, FileOptions};
use super::mounts::{Mounts, Place};
use super::reply::Reply;
use super::session::{self, End};
use super::transport::{Rings, Transport};
use super::wire::MAX_TRANSFER;
use crate::lifetime::{Inside, Lifetime};
use crate::{Export, ExportDriver, ExportParams};
use block::driver::LocalFuture;
use block::perm::Bits;
use block::{Disk, Perms};
use io::fuse_mount::MountId;
use io::{FuseDevice, IoThread};
use nix::unistd::{Gid, Uid};
use qapi::{Error, Result};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::watch;

/// How a mount point says that it is a descriptor instead.
const PASSED: &str = "/dev/fd/";

/// Who may use an export besides the user that runs the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AllowOther {
    /// Nobody.
    Off,
    /// Everybody whom mode and owner allow.
    On,
    /// As `On`, and as `Off` where that is refused.
    Auto,
}

/// Starts FUSE exports.
#[derive(Debug)]
pub struct FuseDriver {
    /// The regular file to mount on, or `/dev/fd/N`: descriptor N is `/dev/fuse`, mounted by somebody else.
    pub mountpoint: String,
    /// Writes beyond the end make the file longer.
    pub growable: bool,
    /// Who may use it.
    pub allow_other: AllowOther,
    /// Where other exports are.
    pub mounts: Mounts,
}

impl ExportDriver for FuseDriver {
    fn permissions(&self, writable: bool) -> Perms {
        // Whoever may write may truncate.
        let need = if writable { Bits::WRITE | Bits::RESIZE } else { Bits::default() };
        Perms { need: Bits::CONSISTENT_READ | need, shared: Bits::ALL }
    }

    fn start<'a>(&'a self, params: ExportParams) -> LocalFuture<'a, Result<Arc<dyn Export>>> {
        Box::pin(async move { self.open(params).await.map(|export| export as Arc<dyn Export>) })
    }
}

/// A mounted device.
struct Mounted {
    device: OwnedFd,
    /// What is to be unmounted in the end and where, none if that is somebody else's affair.
    place: Option<(Place, MountId)>,
    /// Others than the daemon's user can reach it.
    shared: bool,
}

impl FuseDriver {
    async fn open(&self, params: ExportParams) -> Result<Arc<FuseExport>> {
        let threads = params.serving_threads()?;
        let ours = params.threads.is_empty();
        let mounted = match self.mountpoint.strip_prefix(PASSED) {
            Some(number) => self.take_passed(number)?,
            None => self.mount(params.writable).await?,
        };
        let lifetime = Lifetime::new();
        let file = File::new(FileOptions {
            disk: params.disk.clone(),
            writable: params.writable,
            growable: self.growable,
            shared: mounted.shared,
            resize: params.resize,
            closing: lifetime.watch(),
            owner: (Uid::current().as_raw(), Gid::current().as_raw()),
        });
        let export = Arc::new(FuseExport { id: params.id, disk: params.disk, lifetime, ours, rings: Arc::default() });
        match export.serve(mounted, Arc::new(file), &threads).await {
            Ok(()) => Ok(export),
            Err(error) => {
                export.request_shutdown();
                export.closed().await;
                Err(error)
            }
        }
    }

    fn take_passed(&self, number: &str) -> Result<Mounted> {
        let failed = |error| Error::io(format!("Cannot use '{}' for a FUSE export", self.mountpoint), error);
        let number = number.parse().map_err(|_| failed(std::io::Error::other("it ends with no number")))?;
        let device = FuseDevice::passed(number).map_err(failed)?;
        // Whoever mounted it has said who may use it; what it does not allow, the kernel does not let through.
        Ok(Mounted { device, place: None, shared: self.allow_other != AllowOther::Off })
    }

    async fn mount(&self, writable: bool) -> Result<Mounted> {
        let path = self.mountpoint.clone();
        let found = io::blocking(move || look_at(&path)).await;
        let path = found.map_err(|error| Error::io("cannot start a thread", error))??;
        let Some(place) = self.mounts.take(&path) else {
            return Err(Error::generic(format!("There already is a FUSE export on '{}'", self.mountpoint)));
        };
        let attempts: &[bool] = match self.allow_other {
            AllowOther::Off => &[false],
            AllowOther::On => &[true],
            AllowOther::Auto => &[true, false],
        };
        let mut last = None;
        for &shared in attempts {
            let (path, options) = (path.clone(), mount_options(writable, shared));
            let mounted = io::blocking(move || io::mounter::mount(&path, &options)).await;
            match mounted.and_then(std::convert::identity) {
                Ok((device, what)) => return Ok(Mounted { device, place: Some((place, what)), shared }),
                Err(error) => last = Some(error),
            }
        }
        let text = "Failed to mount FUSE session to export";
        Err(last.map_or_else(|| Error::generic(text), |error| Error::io(text, error)))
    }
}

/// The mount point, absolute and without links, if it is a regular file.
fn look_at(given: &str) -> Result<PathBuf> {
    let failed = |error| Error::io(format!("Failed to stat '{given}'"), error);
    let path = Path::new(given);
    // Not the file itself, which may be one of ours: only its folder.
    let real = match (path.parent(), path.file_name()) {
        (Some(folder), Some(name)) if !is_link(path) => {
            let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
            std::fs::canonicalize(folder).map_err(failed)?.join(name)
        }
        _ => std::fs::canonicalize(path).map_err(failed)?,
    };
    if !std::fs::metadata(&real).map_err(failed)?.is_file() {
        return Err(Error::generic(format!("'{given}' is not a regular file")));
    }
    Ok(real)
}

fn is_link(path: &Path) -> bool {
    std::fs::read_link(path).is_ok()
}

fn mount_options(writable: bool, shared: bool) -> String {
    let access = if writable { "rw" } else { "ro" };
    let other = if shared { ",allow_other" } else { "" };
    format!("{access},nosuid,nodev,noatime,default_permissions,max_read={MAX_TRANSFER}{other}")
}

/// A file that shows a disk. Made by [`FuseDriver`].
#[derive(Debug)]
pub struct FuseExport {
    id: String,
    disk: Disk,
    /// With the tasks inside: one or two a thread, and the one that ends them.
    lifetime: Lifetime,
    /// It runs on the daemon's first thread, and on no IOThread of the user's.
    ours: bool,
    rings: Arc<Rings>,
}

/// What the tasks of an export that serve it share. The export is not closed while one has it.
pub(crate) struct Serving {
    task: Task,
    file: Arc<File>,
    stop: watch::Receiver<bool>,
    reason: watch::Sender<End>,
}

impl Clone for Serving {
    fn clone(&self) -> Self {
        let (file, stop, reason) = (self.file(), self.stop(), self.reason.clone());
        Self { task: Task::new(&self.task.export), file, stop, reason }
    }
}

impl Serving {
    pub(crate) fn file(&self) -> Arc<File> {
        Arc::clone(&self.file)
    }

    /// True when nothing more is to be served.
    pub(crate) fn stop(&self) -> watch::Receiver<bool> {
        self.stop.clone()
    }

    /// Whether it runs on the daemon's first thread, and on no IOThread of the user's.
    pub(crate) fn is_ours(&self) -> bool {
        self.task.export.ours
    }

    /// Where requests come over rings.
    pub(crate) fn rings(&self) -> Arc<Rings> {
        Arc::clone(&self.task.export.rings)
    }

    /// A task takes no more requests: without its having been told to, the export ends.
    pub(crate) fn ended(&self, end: End) {
        let export = &self.task.export;
        if end != End::Stopped && !export.is_shutting_down() {
            tracing::warn!(target: "fuse_ended", export = export.id, reason = ?end, "the mount of a FUSE export has gone");
            self.reason.send_replace(end);
            export.request_shutdown();
        }
    }
}

/// A task of an export.
struct Task {
    export: Arc<FuseExport>,
    _inside: Inside,
}

impl Task {
    fn new(export: &Arc<FuseExport>) -> Self {
        Self { export: Arc::clone(export), _inside: export.lifetime.enter() }
    }
}

impl FuseExport {
    /// Starts the threads and the task that ends them.
    async fn serve(self: &Arc<Self>, mounted: Mounted, file: Arc<File>, threads: &[Arc<IoThread>]) -> Result<()> {
        let Mounted { device, place, .. } = mounted;
        let (stop, stopping) = watch::channel(false);
        let (resized, look) = watch::channel(());
        let own = device.try_clone().map_err(|error| Error::io("Cannot duplicate the FUSE device", error))?;
        // From here on the end is that task's, also after an error below.
        let ended = watch::Sender::new(End::Stopped);
        let task = Task::new(self);
        let end = Ending { device: own, place, stop, look, ended: ended.subscribe() };
        tokio::task::spawn_local(async move { end.run(task).await });
        self.disk.on_resize(Box::new(move |_| {
            let _ = resized.send(());
        }));
        let others = threads.len().saturating_sub(1);
        let shared = |error| Error::io("Cannot share the FUSE device between threads", error);
        let own = device.try_clone().map_err(shared)?;
        let devices = io::blocking(move || {
            let clones: std::io::Result<Vec<OwnedFd>> =
                (0..others).map(|_| FuseDevice::clone_of(device.as_fd())).collect();
            clones.map(|mut all| {
                all.push(device);
                all
            })
        })
        .await
        .and_then(std::convert::identity)
        .map_err(shared)?;
        let serving = Serving { task: Task::new(self), file, stop: stopping, reason: ended };
        let transport = Transport::new(threads.to_vec(), own, serving.clone());
        for (thread, device) in threads.iter().zip(devices) {
            let (serving, transport) = (serving.clone(), Arc::clone(&transport));
            let started = thread.spawn(move || async move {
                match FuseDevice::new(device) {
                    Ok(device) => {
                        let source = Device::new(device);
                        let end =
                            session::run(source, serving.file(), &transport, serving.stop(), serving.is_ours()).await;
                        serving.ended(end);
                    }
                    Err(error) => {
                        tracing::warn!(target: "fuse_error", %error, "a thread cannot serve a FUSE export");
                    }
                }
            });
            started.map_err(|error| Error::generic(format!("cannot use the I/O thread: {error}")))?;
        }
        Ok(())
    }
}

/// What the end of an export takes.
struct Ending {
    /// Another descriptor of the first thread's device.
    device: OwnedFd,
    place: Option<(Place, MountId)>,
    stop: watch::Sender<bool>,
    /// The length of the disk has changed.
    look: watch::Receiver<()>,
    /// Why the threads have ended.
    ended: watch::Receiver<End>,
}

impl Ending {
    /// Tells the kernel of changes until the export is to end, and ends it then.
    async fn run(mut self, task: Task) {
        let mut closing = std::pin::pin!(task.export.lifetime.ending());
        loop {
            tokio::select! {
                biased;
                () = &mut closing => break,
                Ok(()) = self.look.changed() => {
                    // A kernel that does not take it asks by itself after a while.
                    let _ = FuseDevice::notify(self.device.as_fd(), Reply::attributes_changed().bytes());
                }
            }
        }
        if let Some((place, what)) = &self.place {
            let (path, what) = (place.path().to_owned(), *what);
            let done = io::blocking(move || io::mounter::unmount(&path, what)).await;
            // Whoever cuts the connection by force may leave the mount, which looks the same from here.
            let gone = *self.ended.borrow() == End::Unmounted;
            if let Err(error) = done.and_then(std::convert::identity)
                && !gone
            {
                tracing::warn!(target: "fuse_error", path = %place.path().display(), %error, "cannot unmount a FUSE export");
            }
        }
        self.stop.send_replace(true);
        drop(self.device);
        // The place is free when the last descriptor is closed, which is when the other tasks have ended.
        task.export.lifetime.at_most(1).await;
        drop(self.place);
        drop(task);
    }
}

impl Export for FuseExport {
    fn id(&self) -> &str {
        &self.id
    }

    fn kind(&self) -> &'static str {
        "fuse"
    }

    fn disk(&self) -> &Disk {
        &self.disk
    }

    fn transport(&self) -> Option<crate::Transport> {
        Some(self.rings.kind())
    }

    /// Nobody is known to use a file: an export is removed under those who have it open, as in the reference.
    fn clients(&self) -> usize {
        0
    }

    fn lifetime(&self) -> &Lifetime {
        &self.lifetime
    }
}
