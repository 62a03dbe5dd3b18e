//! [`VhostUserBlkExport`]: a socket on which one front-end after the other gets a disk.

use super::device::{Device, Parts};
use crate::lifetime::Lifetime;
use crate::virtio_blk::config::Geometry;
use crate::virtio_blk::options;
use crate::virtio_blk::queue::Shared;
use crate::virtio_blk::request::Limits;
use crate::{Export, ExportDriver, ExportParams};
use block::Disk;
use block::driver::LocalFuture;
use io::{Lane, Listener, MessageSocket, socket};
use qapi::types::export::BlockExportOptionsVhostUserBlk;
use qapi::types::sockets::SocketAddressVariant;
use qapi::{Error, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::watch;

/// How long accepting pauses when the system is short of descriptors or memory.
const SHORTAGE_PAUSE: Duration = Duration::from_millis(100);
/// Connections that ended and left something that cannot be closed: with so many of them no further one is taken.
const MAX_FORMER: usize = 8;
/// How long is waited at most until what a front-end sent, or the listener, is closed.
const CLOSING: Duration = Duration::from_millis(200);
/// What a guest sees as serial number if the user gives none. `[reference]`
const SERIAL: &str = "vhost_user_blk";

/// Starts exports of this kind.
#[derive(Debug)]
pub struct VhostUserBlkDriver<'a> {
    /// What the user asked for.
    pub options: &'a BlockExportOptionsVhostUserBlk,
}

impl ExportDriver for VhostUserBlkDriver<'_> {
    /// A front-end that keeps requests in flight for us connects again.
    fn is_outlived(&self) -> bool {
        true
    }

    fn start<'a>(&'a self, params: ExportParams) -> LocalFuture<'a, Result<Arc<dyn Export>>> {
        Box::pin(async move { Ok(start(self.options, params).await? as Arc<dyn Export>) })
    }
}

/// An export of this kind.
#[derive(Debug)]
pub struct VhostUserBlkExport {
    id: String,
    disk: Disk,
    /// A front-end is there.
    connected: AtomicBool,
    /// With the task inside that serves.
    lifetime: Lifetime,
}

async fn start(options: &BlockExportOptionsVhostUserBlk, params: ExportParams) -> Result<Arc<VhostUserBlkExport>> {
    if !matches!(options.addr.addr, SocketAddressVariant::Unix(_) | SocketAddressVariant::Fd(_)) {
        return Err(Error::generic("Only socket address types 'unix' and 'fd' are supported"));
    }
    let block_size = options::block_size(options.logical_block_size)?;
    options::check_queues(options.num_queues)?;
    let serial = options::serial(options.serial.as_deref().unwrap_or(SERIAL))?;
    let threads = params.serving_threads()?;
    let listeners = socket::listen(&options.addr).await?;
    let ExportParams { id, writable, disk, .. } = params;
    let (grown, resized) = watch::channel(disk.size());
    disk.on_resize(Box::new(move |size| {
        grown.send_replace(size);
    }));
    let parts = Parts {
        shared: Arc::new(Shared {
            disk: disk.clone(),
            limits: Limits { writable, block_size },
            serial,
            through: AtomicBool::new(true),
        }),
        geometry: Geometry { block_size, queues: options.num_queues, writable },
        threads,
        writeback: watch::Sender::new(!disk.is_writethrough()),
        resized,
    };
    let export =
        Arc::new(VhostUserBlkExport { id, disk, connected: AtomicBool::new(false), lifetime: Lifetime::new() });
    let (this, inside) = (Arc::clone(&export), export.lifetime.enter());
    tokio::task::spawn_local(async move {
        serve(listeners, &this, &parts).await;
        drop((parts, this, inside));
    });
    Ok(export)
}

/// Serves one front-end after the other until the export is to close.
async fn serve(listeners: Vec<Listener>, export: &VhostUserBlkExport, parts: &Parts) {
    let mut short = false;
    // Of those that left; busy where something cannot be closed yet.
    let mut former: Vec<Lane> = Vec::new();
    while let Some(accepted) = next_client(&listeners, &former, export).await {
        let connected = accepted.and_then(|fd| {
            let idle = former.iter().position(Lane::is_idle).map(|at| former.swap_remove(at));
            let lane = idle.map_or_else(|| Lane::start("front-end"), Ok)?;
            Ok((MessageSocket::new(fd, &lane)?, lane))
        });
        let (socket, lane) = match connected {
            Ok(connected) => connected,
            Err(error) => {
                if !std::mem::replace(&mut short, true) {
                    tracing::warn!(target: "vhost_user_blk_accept", %error, export = export.id, "cannot accept a connection, and keeps trying");
                }
                tokio::time::sleep(SHORTAGE_PAUSE).await;
                continue;
            }
        };
        short = false;
        export.connected.store(true, Ordering::Relaxed);
        tracing::debug!(target: "vhost_user_blk_connected", export = export.id);
        let result = Device::new(parts, &export.lifetime, socket, lane.clone()).run().await;
        // Usually at once, so that the next one needs no further thread.
        let _ = tokio::time::timeout(CLOSING, lane.idle()).await;
        former.push(lane);
        export.connected.store(false, Ordering::Relaxed);
        match result {
            Ok(()) => tracing::debug!(target: "vhost_user_blk_left", export = export.id, "front-end left"),
            Err(error) => {
                tracing::warn!(target: "vhost_user_blk_dropped", %error, export = export.id, "the front-end was disconnected");
            }
        }
    }
    // Who waits may have sent something, which is closed with the listener.
    if let Ok(lane) = Lane::start("front-end") {
        lane.dispose(listeners.into_iter().map(Listener::into_fd).collect::<Vec<_>>());
        // Usually at once, so that the name is free for the next export.
        let _ = tokio::time::timeout(CLOSING, lane.idle()).await;
    }
}

/// The next connection of any listener, when not too many `former` ones are left; none when the export is to close.
async fn next_client(
    listeners: &[Listener],
    former: &[Lane],
    export: &VhostUserBlkExport,
) -> Option<std::io::Result<std::os::fd::OwnedFd>> {
    let mut waiting: Vec<_> = listeners.iter().map(|listener| Box::pin(listener.accept())).collect();
    let any = std::future::poll_fn(move |cx| {
        let ready = waiting.iter_mut().find_map(|accept| match accept.as_mut().poll(cx) {
            std::task::Poll::Ready(result) => Some(result),
            std::task::Poll::Pending => None,
        });
        ready.map_or(std::task::Poll::Pending, std::task::Poll::Ready)
    });
    let any = async {
        if let (Some(oldest), MAX_FORMER.., false) = (former.first(), former.len(), former.iter().any(Lane::is_idle)) {
            oldest.idle().await;
        }
        any.await
    };
    tokio::select! {
        biased;
        () = export.lifetime.ending() => None,
        accepted = any => Some(accepted),
    }
}

impl Export for VhostUserBlkExport {
    fn id(&self) -> &str {
        &self.id
    }

    fn kind(&self) -> &'static str {
        "vhost-user-blk"
    }

    fn disk(&self) -> &Disk {
        &self.disk
    }

    fn clients(&self) -> usize {
        usize::from(self.connected.load(Ordering::Relaxed))
    }

    fn lifetime(&self) -> &Lifetime {
        &self.lifetime
    }
}
