//! Exports, and the NBD server that some of them need.
//!
//! An export is made in three steps that can each fail (name, disk, service) and ends in two: it is asked to shut down, and
//! when its last client has gone its disk is taken back and everybody is told.

use super::{Control, Message};
use block::disk::DiskOptions;
use block::stats::Op;
use block::{Disk, Errno, IoResult, Node, OnError};
use export::fuse::{AllowOther, FuseDriver, Mounts};
use export::nbd::{NbdDriver, NbdServer, NbdServerParams};
use export::vduse::VduseBlkDriver;
use export::vhost_user_blk::VhostUserBlkDriver;
use export::{Export, ExportDriver, ExportParams, Resize, Resized};
use io::socket;
use io::{IoThread, Listener};
use qapi::types::export::{
    BlockExportDel, BlockExportDeleted, BlockExportInfo, BlockExportIothreads, BlockExportOnError, BlockExportOptions,
    BlockExportOptionsNbd, BlockExportOptionsNbdBase, BlockExportRemoveMode, BlockExportStatistics,
    BlockExportTransport, BlockExportType, BlockExportVariant, FuseExportAllowOther, NbdServerAddOptions,
    NbdServerOptions, NbdServerOptionsLegacy, NbdServerRemove, NbdServerStop, QueryBlockExports, XBlockExportResume,
};
use qapi::{Error, Result, Variants};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;

struct Entry {
    export: Arc<dyn Export>,
    /// Told when it is gone.
    waiting: Vec<oneshot::Sender<()>>,
    ty: BlockExportType,
    disk: Disk,
}

/// The wish of an export that its node were of another length.
#[derive(Debug)]
pub struct ExportResize {
    node: Arc<Node>,
    size: u64,
    grow_only: bool,
    reply: oneshot::Sender<IoResult>,
}

/// The way of one export to the control task.
struct Resizer {
    disk: Disk,
    handle: super::Handle,
}

impl Resize for Resizer {
    fn resize(&self, size: u64, grow_only: bool) -> Resized {
        let (reply, done) = oneshot::channel();
        self.handle.send(Message::ExportResize(ExportResize { node: self.disk.node(), size, grow_only, reply }));
        // Nobody replies when the daemon is about to end.
        Box::pin(async move { done.await.unwrap_or(Err(Errno::EIO)) })
    }
}

/// All exports, oldest first, and what those of one kind share.
#[derive(Default)]
pub(super) struct Exports {
    list: Vec<Entry>,
    nbd: Option<NbdServer>,
    /// Not while the command line is carried out.
    accepting: bool,
    fuse_mounts: Mounts,
}

impl Exports {
    fn nbd(&self) -> Result<&NbdServer> {
        self.nbd.as_ref().ok_or_else(|| Error::generic("NBD server not running"))
    }

    /// What starts the kind of export that `options` ask for. The place where a new kind comes in.
    fn driver<'a>(&'a self, options: &'a BlockExportOptions, node: &Node) -> Result<Box<dyn ExportDriver + 'a>> {
        match &options.export {
            BlockExportVariant::Nbd(nbd) => Ok(Box::new(NbdDriver {
                server: self.nbd()?,
                name: nbd.base.name.clone().unwrap_or_else(|| node.name().to_owned()),
                description: nbd.base.description.clone(),
                allocation_depth: nbd.allocation_depth,
            })),
            BlockExportVariant::VhostUserBlk(options) => Ok(Box::new(VhostUserBlkDriver { options })),
            BlockExportVariant::VduseBlk(options) => Ok(Box::new(VduseBlkDriver { options })),
            BlockExportVariant::Fuse(fuse) => Ok(Box::new(FuseDriver {
                mountpoint: fuse.mountpoint.clone(),
                growable: fuse.growable,
                allow_other: match fuse.allow_other {
                    FuseExportAllowOther::Off => AllowOther::Off,
                    FuseExportAllowOther::On => AllowOther::On,
                    FuseExportAllowOther::Auto => AllowOther::Auto,
                },
                mounts: self.fuse_mounts.clone(),
            })),
        }
    }

    fn find(&self, id: &str) -> Result<&Entry> {
        let found = self.list.iter().find(|entry| entry.export.id() == id);
        found.ok_or_else(|| not_found(id))
    }
}

fn not_found(id: &str) -> Error {
    Error::generic(format!("Export '{id}' is not found"))
}

impl Control {
    pub(super) async fn nbd_server_start(&mut self, args: NbdServerOptionsLegacy) -> Result<()> {
        let mut options = NbdServerOptions::from(args);
        let passed = self.descriptors.resolve_address(&mut options.addr)?;
        let started = self.start_nbd_server(options).await;
        drop(passed);
        started
    }

    /// `nbd-server-start` and `--nbd-server`.
    pub async fn start_nbd_server(&mut self, options: NbdServerOptions) -> Result<()> {
        if self.exports.nbd.is_some() {
            return Err(Error::generic("NBD server already running"));
        }
        let listeners = socket::listen(&options.addr).await?;
        listeners.iter().for_each(Listener::refuse_descriptors);
        let seconds = u64::from(options.handshake_max_seconds);
        let params = NbdServerParams {
            handshake_limit: (seconds > 0).then(|| Duration::from_secs(seconds)),
            max_connections: options.max_connections,
        };
        let mut server = NbdServer::new(listeners, params);
        if self.exports.accepting {
            server.accept();
        }
        self.exports.nbd = Some(server);
        Ok(())
    }

    /// The command line has been carried out: clients of NBD servers are let in, and find all its exports.
    pub(super) fn accept_clients(&mut self) {
        self.exports.accepting = true;
        if let Some(server) = &mut self.exports.nbd {
            server.accept();
        }
    }

    pub(super) async fn nbd_server_stop(&mut self, _: NbdServerStop) -> Result<()> {
        let server = self.exports.nbd.take().ok_or_else(|| Error::generic("NBD server not running"))?;
        server.exports().iter().for_each(|export| export.disk().give_up());
        for export in server.stop().await.into_iter().rev() {
            self.export_closed(export.id()).await;
        }
        Ok(())
    }

    /// `block-export-add` and `--export`.
    pub async fn block_export_add(&mut self, mut options: BlockExportOptions) -> Result<()> {
        if !qapi::opts::is_identifier(&options.id) {
            return Err(Error::generic("Invalid block export id"));
        }
        if self.exports.find(&options.id).is_ok() {
            return Err(Error::generic(format!("Block export id '{}' is already in use", options.id)));
        }
        let node = self.graph.find(None, Some(&options.node_name))?;
        let threads = self.threads_for(&options)?;
        if options.writable && node.options().read_only {
            return Err(Error::generic("Cannot export read-only node as writable"));
        }
        let can_wait = matches!(options.export, BlockExportVariant::Nbd(_) | BlockExportVariant::VhostUserBlk(_));
        if options.allow_inactive && !can_wait {
            return Err(Error::generic("Export type does not support inactive exports"));
        }
        if !options.allow_inactive {
            self.graph.activate(&node).await?;
        }
        let passed = match &mut options.export {
            BlockExportVariant::VhostUserBlk(export) => self.descriptors.resolve_address(&mut export.addr)?,
            _ => None,
        };
        let driver = self.exports.driver(&options, &node)?;
        let disk_options = DiskOptions {
            label: format!("block export '{}'", options.id),
            perms: driver.permissions(options.writable),
            writethrough: options.writethrough,
        };
        let disk = match options.allow_inactive {
            true => self.graph.attach_inactive(&node, &disk_options).await?,
            false => self.graph.attach(&node, &disk_options).await?,
        };
        if options.writable && driver.is_outlived() {
            self.graph.outlive(&disk);
        }
        if let Some(policy) = options.x_on_error {
            let policy = match policy {
                BlockExportOnError::Report => OnError::Report,
                BlockExportOnError::Stop => OnError::Stop,
                BlockExportOnError::Enospc => OnError::Enospc,
            };
            disk.handle_errors(options.id.clone(), policy);
        }
        let params = ExportParams {
            id: options.id.clone(),
            writable: options.writable,
            disk: disk.clone(),
            threads,
            resize: Arc::new(Resizer { disk: disk.clone(), handle: self.handle() }),
        };
        let started = driver.start(params).await;
        drop((driver, passed));
        match started {
            Ok(export) => {
                self.watch(&*export);
                let ty = options.export.tag();
                self.exports.list.push(Entry { export, waiting: Vec::new(), ty, disk });
                Ok(())
            }
            Err(error) => {
                self.graph.detach(disk).await;
                Err(error)
            }
        }
    }

    /// Nodes have no home thread, so that an export's threads are its own affair and `fixed-iothread` always holds.
    fn threads_for(&self, options: &BlockExportOptions) -> Result<Vec<Arc<IoThread>>> {
        match &options.iothread {
            None => Ok(Vec::new()),
            Some(BlockExportIothreads::Single(id)) => Ok(vec![self.objects.iothread(id)?]),
            Some(BlockExportIothreads::Multi(ids)) if ids.is_empty() => {
                Err(Error::generic("The list of I/O threads must not be empty"))
            }
            Some(BlockExportIothreads::Multi(_)) if options.fixed_iothread => {
                Err(Error::generic("Cannot use fixed-iothread for a multi-threaded export"))
            }
            Some(BlockExportIothreads::Multi(ids)) => ids.iter().map(|id| self.objects.iothread(id)).collect(),
        }
    }

    /// Sends a message to this task when the export has closed.
    fn watch(&self, export: &dyn Export) {
        let (closed, id, handle) = (export.closed(), export.id().to_owned(), self.handle());
        tokio::task::spawn_local(async move {
            closed.await;
            handle.send(Message::ExportClosed(id));
        });
    }

    /// Asks an export to close. The result waits until it is gone if nobody is known to use it, so that its event comes before
    /// the reply; clients that have to leave first are not waited for.
    pub(super) fn block_export_del(
        &mut self,
        args: BlockExportDel,
    ) -> Result<impl Future<Output = Result<()>> + use<>> {
        let entry = self.exports.list.iter_mut().find(|entry| entry.export.id() == args.id);
        let entry = entry.ok_or_else(|| not_found(&args.id))?;
        if entry.export.is_shutting_down() {
            return Err(Error::generic(format!("Export '{}' is already shutting down", args.id)));
        }
        let used = entry.export.clients() > 0;
        if args.mode == BlockExportRemoveMode::Safe && used {
            let hint = "Use mode='hard' to force client disconnect";
            return Err(Error::generic(format!("export '{}' still in use", args.id)).with_hint(hint));
        }
        entry.disk.give_up();
        entry.export.request_shutdown();
        let gone = (!used).then(|| {
            let (tell, gone) = oneshot::channel();
            entry.waiting.push(tell);
            gone
        });
        Ok(async move {
            if let Some(gone) = gone {
                // An error says that the daemon ends, and with it every export.
                let _ = gone.await;
            }
            Ok(())
        })
    }

    /// The last step of an export's life; said twice, it does nothing the second time.
    pub(super) async fn export_closed(&mut self, id: &str) {
        let found = self.exports.list.iter().position(|e| e.export.id() == id && e.export.is_shutting_down());
        let Some(at) = found else { return };
        let entry = self.exports.list.remove(at);
        if let Some(server) = &self.exports.nbd
            && let Some(nbd) = server.exports().into_iter().find(|nbd| nbd.id() == id)
        {
            server.forget(&nbd);
        }
        drop(entry.export);
        self.graph.detach(entry.disk).await;
        self.events.emit(&BlockExportDeleted { id: id.to_owned() });
        for waiting in entry.waiting {
            // Its monitor may have gone.
            let _ = waiting.send(());
        }
    }

    /// Sets the length of a node because an export needs it so.
    pub(super) async fn export_resize(&mut self, wish: ExportResize) {
        let ExportResize { node, size, grow_only, reply } = wish;
        let result = if grow_only && node.size() >= size { Ok(()) } else { self.graph.resize(&node, size).await };
        // The export may be gone, which is no reason not to do it.
        let _ = reply.send(result.map_err(|error| errno_of(&error)));
    }

    pub(super) async fn x_block_export_resume(&mut self, args: XBlockExportResume) -> Result<()> {
        self.exports.find(&args.id)?.disk.resume();
        Ok(())
    }

    /// Ends all exports and the servers, and waits for their clients to be gone.
    pub(super) async fn close_exports(&mut self) {
        self.exports.list.iter().for_each(|entry| entry.disk.give_up());
        if self.exports.nbd.is_some() {
            // It runs, so it can be stopped.
            let _ = self.nbd_server_stop(NbdServerStop).await;
        }
        while let Some(entry) = self.exports.list.first() {
            let export = Arc::clone(&entry.export);
            export.request_shutdown();
            export.closed().await;
            self.export_closed(export.id()).await;
        }
    }

    pub(super) async fn query_block_exports(&mut self, _: QueryBlockExports) -> Result<Vec<BlockExportInfo>> {
        let info = |entry: &Entry| BlockExportInfo {
            id: entry.export.id().to_owned(),
            ty: entry.ty,
            node_name: entry.disk.node().name().to_owned(),
            shutting_down: entry.export.is_shutting_down(),
            x_statistics: statistics(&entry.disk),
            x_transport: entry.export.transport().map(|transport| match transport {
                export::Transport::Device => BlockExportTransport::Device,
                export::Transport::IoUring => BlockExportTransport::IoUring,
            }),
        };
        Ok(self.exports.list.iter().rev().map(info).collect())
    }

    /// The older way: the export's id is its name, and a node that cannot be written to is exported read-only.
    pub(super) async fn nbd_server_add(&mut self, args: NbdServerAddOptions) -> Result<()> {
        self.exports.nbd()?;
        let node = self.graph.find(Some(&args.device), Some(&args.device))?;
        let name = args.base.name.clone().unwrap_or_else(|| args.device.clone());
        let writable = args.writable && !node.options().read_only;
        let base = BlockExportOptionsNbdBase { name: Some(name.clone()), ..args.base };
        self.block_export_add(BlockExportOptions {
            export: BlockExportVariant::Nbd(BlockExportOptionsNbd { base, allocation_depth: false }),
            id: name,
            fixed_iothread: false,
            iothread: None,
            node_name: args.device,
            writable,
            writethrough: false,
            allow_inactive: false,
            x_on_error: None,
        })
        .await
    }

    pub(super) fn nbd_server_remove(
        &mut self,
        args: NbdServerRemove,
    ) -> Result<impl Future<Output = Result<()>> + use<>> {
        self.exports.nbd()?;
        let name = &args.name;
        if self.exports.find(name)?.export.kind() != "nbd" {
            return Err(Error::generic(format!("Block export '{name}' is not an NBD export")));
        }
        self.block_export_del(BlockExportDel { id: args.name, mode: args.mode })
    }
}

/// The errno that an operating system's error below `error` has; without one, the driver does not want what it was asked.
fn errno_of(error: &Error) -> Errno {
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        if let Some(number) = inner.downcast_ref::<std::io::Error>().and_then(std::io::Error::raw_os_error) {
            return Errno::from_raw(number);
        }
        source = inner.source();
    }
    Errno::EINVAL
}

/// The counters of an export's disk.
fn statistics(disk: &Disk) -> BlockExportStatistics {
    let stats = disk.stats();
    let [read, write, flush, unmap] = [Op::Read, Op::Write, Op::Flush, Op::Unmap].map(|op| stats.read(op));
    let all = [read, write, flush, unmap];
    BlockExportStatistics {
        rd_bytes: read.bytes,
        wr_bytes: write.bytes,
        unmap_bytes: unmap.bytes,
        rd_operations: read.operations,
        wr_operations: write.operations,
        flush_operations: flush.operations,
        unmap_operations: unmap.operations,
        failed_operations: all.iter().map(|counters| counters.failed).sum(),
        invalid_operations: all.iter().map(|counters| counters.invalid).sum(),
        waiting_operations: u64::try_from(disk.waiting()).unwrap_or(u64::MAX),
    }
}
