//! [`NbdExport`]: a disk under a name, and the clients that use it.

use super::metacontext::Contexts;
use super::negotiate::{BlockSizes, Offer};
use super::server::NbdServer;
use super::wire::MAX_PAYLOAD;
use crate::lifetime::{Inside, Lifetime};
use crate::{Export, ExportDriver, ExportParams};
use block::Disk;
use block::driver::LocalFuture;
use io::IoThread;
use qapi::Result;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::OwnedSemaphorePermit;

/// What an export is made from. The disk needs what [`crate::permissions`] says.
#[derive(Debug)]
pub struct NbdExportOptions {
    /// The id of the export, by which it is removed.
    pub id: String,
    /// The name that clients ask for, at most 4096 bytes.
    pub name: String,
    /// A text for people, at most 4096 bytes.
    pub description: Option<String>,
    /// Whether clients may write.
    pub writable: bool,
    /// Whether to offer the metadata context `qemu:allocation-depth`.
    pub allocation_depth: bool,
    /// What is exported. Write-through is a property of the disk.
    pub disk: Disk,
    /// The threads that serve clients, each one in turn; the server's own thread when empty.
    pub threads: Vec<Arc<IoThread>>,
}

/// Starts exports of an NBD server.
#[derive(Debug)]
pub struct NbdDriver<'a> {
    /// The server, which has to run.
    pub server: &'a NbdServer,
    /// As [`NbdExportOptions::name`].
    pub name: String,
    /// As [`NbdExportOptions::description`].
    pub description: Option<String>,
    /// As [`NbdExportOptions::allocation_depth`].
    pub allocation_depth: bool,
}

impl ExportDriver for NbdDriver<'_> {
    fn start<'a>(&'a self, params: ExportParams) -> LocalFuture<'a, Result<Arc<dyn Export>>> {
        let ExportParams { id, writable, disk, threads, .. } = params;
        Box::pin(async move {
            let export: Arc<dyn Export> = self.server.add(NbdExportOptions {
                id,
                name: self.name.clone(),
                description: self.description.clone(),
                writable,
                allocation_depth: self.allocation_depth,
                disk,
                threads,
            })?;
            Ok(export)
        })
    }
}

/// An export of an NBD server. Made by [`NbdServer::add`](super::NbdServer::add).
#[derive(Debug)]
pub struct NbdExport {
    options: NbdExportOptions,
    /// The thread that the next client gets.
    next: AtomicUsize,
    /// With the clients inside.
    lifetime: Lifetime,
}

impl NbdExport {
    pub(crate) fn new(options: NbdExportOptions) -> Self {
        Self { options, next: AtomicUsize::new(0), lifetime: Lifetime::new() }
    }

    /// The name that clients ask for.
    pub fn name(&self) -> &str {
        &self.options.name
    }

    /// Whether clients may write.
    pub fn is_writable(&self) -> bool {
        self.options.writable
    }

    pub(crate) fn description(&self) -> Option<&str> {
        self.options.description.as_deref()
    }

    /// What a client that asks now is told; the size is that of now.
    pub(crate) fn offer(&self) -> Offer {
        let facts = self.options.disk.facts();
        let minimum = facts.request_align.clamp(1, 64 << 10);
        let hint = if facts.opt_transfer.is_power_of_two() { facts.opt_transfer } else { 0 };
        let maximum = facts.max_transfer.clamp(minimum, MAX_PAYLOAD);
        let preferred = minimum.max(4096).max(hint).min(maximum.max(4096));
        Offer {
            name: self.options.name.clone(),
            description: self.options.description.clone(),
            size: self.options.disk.size(),
            writable: self.options.writable,
            contexts: Contexts::offered(self.options.allocation_depth),
            block_sizes: BlockSizes { minimum, preferred, maximum: maximum.max(preferred) },
        }
    }

    /// Counts a client in, unless the export is going away.
    pub(crate) fn enter(self: &Arc<Self>, permit: Option<OwnedSemaphorePermit>) -> Option<Client> {
        if self.is_shutting_down() {
            return None;
        }
        Some(Client { export: Arc::clone(self), _permit: permit, _inside: self.lifetime.enter() })
    }

    /// The thread for the next client, none for the server's own.
    pub(crate) fn next_thread(&self) -> Option<Arc<IoThread>> {
        let threads = &self.options.threads;
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        threads.get(turn.checked_rem(threads.len())?).cloned()
    }
}

impl Export for NbdExport {
    fn id(&self) -> &str {
        &self.options.id
    }

    fn kind(&self) -> &'static str {
        "nbd"
    }

    fn disk(&self) -> &Disk {
        &self.options.disk
    }

    fn clients(&self) -> usize {
        self.lifetime.inside()
    }

    fn lifetime(&self) -> &Lifetime {
        &self.lifetime
    }
}

/// One client of an export, counted as long as this lives.
#[derive(Debug)]
pub(crate) struct Client {
    export: Arc<NbdExport>,
    _permit: Option<OwnedSemaphorePermit>,
    _inside: Inside,
}

impl Client {
    pub(crate) fn export(&self) -> &NbdExport {
        &self.export
    }

    /// Waits until the export sends its clients away.
    pub(crate) fn closing(&self) -> impl Future<Output = ()> + 'static {
        self.export.lifetime.ending()
    }
}
