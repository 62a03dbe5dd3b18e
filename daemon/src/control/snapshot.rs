//! Snapshots: overlays above nodes, snapshots inside images, and transactions of both.
//!
//! An action is *prepared*: everything that can fail is done, and can be taken back. When all are prepared, the graph changes
//! once for all of them, all or nothing; if it cannot, what was prepared is taken back in reverse.

use super::Control;
use super::query::filename;
use block::graph::{Change, Drained};
use block::snapshot::{SnapshotFacts, Snapshots};
use block::{Node, Role};
use qapi::types::block::BlockdevOptions;
use qapi::types::create::BlockdevCreateOptions;
use qapi::types::snapshot::*;
use qapi::{Error, Qapi, Result};
use serde_json::json;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

/// How something that was prepared is taken back.
enum Undo {
    /// The node that was opened for it goes.
    Node(String),
    /// The snapshot goes.
    Snapshot(Arc<Node>, String),
}

/// Actions that have been prepared.
#[derive(Default)]
pub(super) struct Prepared {
    undo: Vec<Undo>,
    /// Nodes and their overlays, in order.
    overlays: Vec<(Arc<Node>, Arc<Node>)>,
    /// Nobody writes between the first action and the last.
    drained: Vec<Drained>,
}

fn internal(node: &Arc<Node>) -> Result<&dyn Snapshots> {
    let facet = node.driver().snapshots();
    facet.ok_or_else(|| Error::generic("Failed to get a snapshot list: Operation not supported"))
}

/// The node whose image a node shows, if that one keeps snapshots: itself, or one below it that it alone stands for.
fn keeper(node: &Arc<Node>) -> Option<Arc<Node>> {
    let mut node = Arc::clone(node);
    while node.driver().snapshots().is_none() {
        let below = match node.children().as_slice() {
            [only] if only.role() == Role::Filtered => only.node(),
            _ => return None,
        };
        node = below;
    }
    Some(node)
}

/// A node without nodes above it: the older commands take no other.
fn root(node: Arc<Node>) -> Result<Arc<Node>> {
    if node.parents().iter().any(|edge| edge.role() != Role::Root) {
        return Err(Error::generic("Need a root block node"));
    }
    Ok(node)
}

/// Whether nothing stands above the node that an overlay would pull away from below it.
fn check_free(node: &Arc<Node>) -> Result<()> {
    let backing = node.parents().into_iter().find(|edge| edge.role() == Role::Backing);
    match backing.and_then(|edge| edge.parent_node()) {
        Some(above) => Err(Error::generic(format!(
            "Node '{}' is busy: node is used as backing hd of '{}'",
            node.name(),
            above.name()
        ))),
        None => Ok(()),
    }
}

fn check_overlay(overlay: &Arc<Node>) -> Result<()> {
    if overlay.parents().iter().any(|edge| edge.role() == Role::Root) {
        return Err(Error::generic("The overlay is already in use"));
    }
    if overlay.children().iter().any(|edge| edge.role() == Role::Backing) {
        return Err(Error::generic("The overlay already has a backing image"));
    }
    if overlay.driver().backing().is_none() {
        return Err(Error::generic("The overlay does not support backing images"));
    }
    Ok(())
}

/// The name by which an image finds `node` again: a path that does not depend on where the image is, or options.
fn name_for(node: &Arc<Node>) -> Result<String> {
    let name = filename(node);
    if name.is_empty() {
        let node = node.name();
        return Err(Error::generic(format!("Node '{node}' has no name that an image could find it by")));
    }
    if name.starts_with("json:") {
        return Ok(name);
    }
    let path = std::path::absolute(Path::new(&name)).map_err(|error| Error::io(format!("'{name}'"), error))?;
    Ok(path.to_string_lossy().into_owned())
}

impl Control {
    pub(super) async fn blockdev_snapshot(&mut self, args: BlockdevSnapshot) -> Result<()> {
        let mut prepared = Prepared::default();
        let result = self.prepare_snapshot(&mut prepared, &args).await;
        self.finish_actions(prepared, result).await
    }

    pub(super) async fn blockdev_snapshot_sync(&mut self, args: BlockdevSnapshotSync) -> Result<()> {
        let mut prepared = Prepared::default();
        let result = self.prepare_snapshot_sync(&mut prepared, &args).await;
        self.finish_actions(prepared, result).await
    }

    pub(super) async fn blockdev_snapshot_internal_sync(&mut self, args: BlockdevSnapshotInternalSync) -> Result<()> {
        let mut prepared = Prepared::default();
        let result = self.prepare_internal(&mut prepared, &args).await;
        self.finish_actions(prepared, result).await
    }

    pub(super) async fn transaction(&mut self, args: Transaction) -> Result<()> {
        let grouped = args.properties.and_then(|properties| properties.completion_mode);
        if grouped == Some(ActionCompletionMode::Grouped)
            && let Some(action) = args.actions.first()
        {
            // Only jobs can be grouped, and no action here starts one.
            let name = qapi::Variants::tag(&action.action);
            return Err(Error::generic(format!(
                "Action '{name}' does not support transaction property completion-mode = grouped"
            )));
        }
        let mut prepared = Prepared::default();
        let mut result = Ok(());
        for action in &args.actions {
            result = match &action.action {
                TransactionActionVariant::Abort(_) => Err(Error::generic("Transaction aborted using Abort action")),
                TransactionActionVariant::BlockdevSnapshot(wrapped) => {
                    self.prepare_snapshot(&mut prepared, &wrapped.data).await
                }
                TransactionActionVariant::BlockdevSnapshotSync(wrapped) => {
                    self.prepare_snapshot_sync(&mut prepared, &wrapped.data).await
                }
                TransactionActionVariant::BlockdevSnapshotInternalSync(wrapped) => {
                    self.prepare_internal(&mut prepared, &wrapped.data).await
                }
            };
            if result.is_err() {
                break;
            }
        }
        self.finish_actions(prepared, result).await
    }

    /// The graph changes for all actions at once, or everything is taken back.
    async fn finish_actions(&mut self, prepared: Prepared, result: Result<()>) -> Result<()> {
        let Prepared { undo, overlays, drained } = prepared;
        let result = match result {
            Ok(()) => self.put_overlays(&overlays).await,
            Err(error) => Err(error),
        };
        if result.is_err() {
            for step in undo.into_iter().rev() {
                // What cannot be taken back stays as something that nobody uses.
                let _ = match step {
                    Undo::Node(name) => self.graph.delete(&name).await,
                    Undo::Snapshot(node, id) => match node.driver().snapshots() {
                        Some(snapshots) => snapshots.delete(&id).await,
                        None => Ok(()),
                    },
                };
            }
            return result;
        }
        drop(drained);
        for (node, _) in &overlays {
            // Nobody writes to it any more; if it cannot be closed for writing, that does no harm.
            let _ = self.graph.set_read_only(node, true).await;
        }
        Ok(())
    }

    async fn put_overlays(&mut self, overlays: &[(Arc<Node>, Arc<Node>)]) -> Result<()> {
        if overlays.is_empty() {
            return Ok(());
        }
        let mut change = Change::new();
        for (node, overlay) in overlays {
            change.set_backing(overlay, Some(node))?;
            // An overlay may itself have got one in the same transaction: users go to the last.
            let mut top = overlay;
            while let Some((_, above)) = overlays.iter().find(|(below, _)| Arc::ptr_eq(below, top)) {
                top = above;
            }
            let others = |edge: &block::Edge| {
                !edge.parent_node().is_some_and(|parent| overlays.iter().any(|(_, o)| Arc::ptr_eq(o, &parent)))
            };
            change.move_parents(node, top, others);
        }
        self.graph.change(change).await
    }

    async fn prepare_snapshot(&mut self, prepared: &mut Prepared, args: &BlockdevSnapshot) -> Result<()> {
        let node = self.graph.find(Some(&args.node), Some(&args.node))?;
        let overlay = self.graph.find(Some(&args.overlay), Some(&args.overlay))?;
        if Arc::ptr_eq(&node, &overlay) {
            let name = node.name();
            return Err(Error::generic(format!("Making '{name}' a backing child of '{name}' would create a cycle")));
        }
        self.check_node(prepared, &node)?;
        check_overlay(&overlay)?;
        prepared.drained.push(self.graph.drain(&node).await);
        prepared.overlays.push((node, overlay));
        Ok(())
    }

    fn check_node(&self, prepared: &Prepared, node: &Arc<Node>) -> Result<()> {
        if let Some((_, above)) = prepared.overlays.iter().find(|(below, _)| Arc::ptr_eq(below, node)) {
            return Err(Error::generic(format!(
                "Node '{}' is busy: node is used as backing hd of '{}'",
                node.name(),
                above.name()
            )));
        }
        check_free(node)
    }

    async fn prepare_snapshot_sync(&mut self, prepared: &mut Prepared, args: &BlockdevSnapshotSync) -> Result<()> {
        let Some(name) = &args.node_name else {
            let device = args.device.as_deref().unwrap_or_default();
            return Err(Error::generic(format!("Cannot find device='{device}' nor node-name=''")));
        };
        let node = self.graph.find(None, Some(name))?;
        let Some(overlay) = &args.snapshot_node_name else {
            return Err(Error::generic("New overlay node-name missing"));
        };
        if self.graph.get(overlay).is_some() {
            return Err(Error::generic("New overlay node-name already in use"));
        }
        self.check_node(prepared, &node)?;
        let format = args.format.as_deref().unwrap_or("qcow2");
        if format != "qcow2" {
            return Err(Error::generic(format!("Backing file not supported for file format '{format}'")));
        }
        let path = match args.snapshot_file.split_once(':') {
            Some(("file", path)) => path,
            Some((protocol, _)) if !protocol.contains('/') => {
                return Err(Error::generic(format!("Unknown protocol '{protocol}'")));
            }
            _ => args.snapshot_file.as_str(),
        };
        prepared.drained.push(self.graph.drain(&node).await);
        if args.mode != Some(NewImageMode::Existing) {
            self.make_overlay_image(&node, path).await?;
        }
        let options = node.options();
        let options = json!({
            "driver": "qcow2", "node-name": overlay, "backing": null,
            "read-only": options.read_only, "auto-read-only": options.auto_read_only,
            "discard": if options.discard { "unmap" } else { "ignore" },
            "cache": { "direct": options.direct, "no-flush": options.no_flush },
            "file": { "driver": "file", "filename": path },
        });
        let added = self.graph.add(&BlockdevOptions::from_value(&options)?).await?;
        prepared.undo.push(Undo::Node(overlay.clone()));
        prepared.overlays.push((node, added));
        Ok(())
    }

    /// An empty image as long as `node`, which names it.
    async fn make_overlay_image(&mut self, node: &Arc<Node>, path: &str) -> Result<()> {
        let backing = name_for(node)?;
        let file = json!({ "driver": "file", "filename": path });
        let empty = json!({ "driver": "file", "filename": path, "size": 0 });
        self.graph.create_image(&BlockdevCreateOptions::from_value(&empty)?).await?;
        let image = json!({
            "driver": "qcow2", "file": file, "size": node.size(),
            "backing-file": backing, "backing-fmt": node.driver().name(),
        });
        self.graph.create_image(&BlockdevCreateOptions::from_value(&image)?).await
    }

    async fn prepare_internal(&mut self, prepared: &mut Prepared, args: &BlockdevSnapshotInternalSync) -> Result<()> {
        let node = root(self.graph.find(Some(&args.device), Some(&args.device))?)?;
        let (device, name) = (&args.device, &args.name);
        let keeper = keeper(&node);
        if node.options().read_only || keeper.as_ref().is_some_and(|keeper| keeper.options().read_only) {
            return Err(Error::generic(format!("Device '{device}' is read only")));
        }
        let Some((keeper, snapshots)) = keeper.as_ref().and_then(|keeper| Some((keeper, keeper.driver().snapshots()?)))
        else {
            return Err(Error::generic(format!(
                "Block format '{}' used by device '{device}' does not support internal snapshots",
                node.driver().name()
            )));
        };
        if name.is_empty() {
            return Err(Error::generic("Name is empty"));
        }
        prepared.drained.push(self.graph.drain(keeper).await);
        let list = snapshots.list().await?;
        if list.iter().any(|snapshot| snapshot.name == *name) {
            return Err(Error::generic(format!("Snapshot with name '{name}' already exists on device '{device}'")));
        }
        let highest = list.iter().filter_map(|snapshot| snapshot.id.parse::<u64>().ok()).max().unwrap_or(0);
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let facts = SnapshotFacts {
            id: highest.saturating_add(1).to_string(),
            name: name.clone(),
            date_sec: u32::try_from(now.as_secs()).unwrap_or(u32::MAX),
            date_nsec: now.subsec_nanos(),
            ..SnapshotFacts::default()
        };
        let failed = |error: Error| error.context(format!("Failed to create snapshot '{name}' on device '{device}'"));
        snapshots.create(&facts).await.map_err(failed)?;
        prepared.undo.push(Undo::Snapshot(Arc::clone(keeper), facts.id));
        Ok(())
    }

    pub(super) async fn blockdev_snapshot_delete_internal_sync(
        &mut self,
        args: BlockdevSnapshotDeleteInternalSync,
    ) -> Result<SnapshotInfo> {
        let node = root(self.graph.find(Some(&args.device), Some(&args.device))?)?;
        let (id, name) = (args.id.as_deref(), args.name.as_deref());
        if id.is_none() && name.is_none() {
            return Err(Error::generic("Name or id must be provided"));
        }
        let keeper = keeper(&node).unwrap_or_else(|| Arc::clone(&node));
        let list = internal(&keeper)?.list().await?;
        let same = |given: Option<&str>, own: &str| given.is_none_or(|given| given == own);
        let found = list.into_iter().find(|one| same(id, &one.id) && same(name, &one.name));
        let found = found.ok_or_else(|| {
            let (id, name) = (id.unwrap_or("null"), name.unwrap_or("null"));
            let device = &args.device;
            Error::generic(format!("Snapshot with id '{id}' and name '{name}' does not exist on device '{device}'"))
        })?;
        if node.options().read_only || keeper.options().read_only {
            return Err(Error::generic(format!("Device '{}' is read only", args.device)));
        }
        let drained = self.graph.drain(&keeper).await;
        let (id, name, device) = (&found.id, &found.name, &args.device);
        let failed = |error: Error| {
            error.context(format!("Failed to delete snapshot with id '{id}' and name '{name}' on device '{device}'"))
        };
        internal(&keeper)?.delete(&found.id).await.map_err(failed)?;
        drop(drained);
        Ok(found.into())
    }

    pub(super) async fn change_backing_file(&mut self, args: ChangeBackingFile) -> Result<()> {
        let top = root(self.graph.find(Some(&args.device), Some(&args.device))?)?;
        let image = self.graph.find(None, Some(&args.image_node_name))?;
        let backing = image.children().into_iter().find(|edge| edge.role() == Role::Backing);
        let (Some(facet), Some(backing)) = (image.driver().backing(), backing) else {
            return Err(Error::generic("not allowing backing file change on an image without a backing file"));
        };
        let mut chain = Some(Arc::clone(&top));
        while let Some(node) = chain.as_ref().filter(|node| !Arc::ptr_eq(node, &image)) {
            let below = node.children().into_iter().find(|edge| matches!(edge.role(), Role::Backing | Role::Filtered));
            chain = below.map(|edge| edge.node());
        }
        if chain.is_none() {
            return Err(Error::generic(format!("'{}' and image file are not in the same chain", args.device)));
        }
        let read_only = image.options().read_only;
        if read_only {
            self.graph.set_read_only(&image, false).await?;
        }
        let drained = self.graph.drain(&image).await;
        let changed = facet.rename(&args.backing_file, backing.node().driver().name()).await;
        drop(drained);
        if read_only {
            self.graph.set_read_only(&image, true).await?;
        }
        changed
    }
}
