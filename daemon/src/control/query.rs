//! What nodes are, what they did, and how they hang together.

use super::Control;
use block::driver::ImageDetails;
use block::node::DetectZeroes;
use block::perm::Bits;
use block::stats::{Op, Stats};
use block::{Edge, Node, Role};
use qapi::types::block::BlockdevDetectZeroesOptions;
use qapi::types::block_query::*;
use qapi::{Error, Result, Value};
use serde_json::json;
use std::collections::HashMap;
use std::sync::Arc;

impl Control {
    /// There are no devices in a storage daemon, only nodes.
    pub(super) async fn query_block(&mut self, _: QueryBlock) -> Result<Vec<BlockInfo>> {
        Ok(Vec::new())
    }

    pub(super) async fn query_named_block_nodes(&mut self, args: QueryNamedBlockNodes) -> Result<Vec<BlockDeviceInfo>> {
        let nodes: Vec<_> = self.graph.nodes().rev().cloned().collect();
        let mut infos = Vec::with_capacity(nodes.len());
        // What the host knows of a file is asked on the pool of threads: a few at a time, so that their waits overlap.
        for some in nodes.chunks(16) {
            let asked: Vec<_> = some
                .iter()
                .cloned()
                .map(|node| tokio::task::spawn_local(async move { device_info(&node, args.flat).await }))
                .collect();
            for info in asked {
                infos.push(info.await.map_err(|error| Error::generic(format!("a query was cut off: {error}")))?);
            }
        }
        Ok(infos)
    }

    pub(super) async fn query_blockstats(&mut self, args: QueryBlockstats) -> Result<Vec<BlockStats>> {
        if !args.query_nodes {
            return Ok(Vec::new());
        }
        Ok(self.graph.nodes().map(node_stats).collect())
    }

    pub(super) async fn x_debug_query_block_graph(&mut self, _: XDebugQueryBlockGraph) -> Result<XDbgBlockGraph> {
        let mut ids = Ids::default();
        let mut graph = XDbgBlockGraph { nodes: Vec::new(), edges: Vec::new() };
        for node in self.graph.nodes() {
            let id = ids.of(Arc::as_ptr(node).addr());
            let ty = XDbgBlockGraphNodeType::BlockDriver;
            graph.nodes.push(XDbgBlockGraphNode { id, ty, name: node.name().to_owned() });
            for edge in node.parents() {
                let parent = match edge.parent_node() {
                    Some(parent) => ids.of(Arc::as_ptr(&parent).addr()),
                    // The root edge stands for its user, which has no other.
                    None => {
                        let parent = ids.of(Arc::as_ptr(&edge).addr());
                        let ty = XDbgBlockGraphNodeType::BlockBackend;
                        graph.nodes.push(XDbgBlockGraphNode { id: parent, ty, name: String::new() });
                        parent
                    }
                };
                graph.edges.push(edge_info(&edge, parent, id));
            }
        }
        Ok(graph)
    }
}

/// Numbers for things, in the order in which they are met, from 1.
#[derive(Default)]
struct Ids(HashMap<usize, u64>);

impl Ids {
    fn of(&mut self, address: usize) -> u64 {
        let next = u64::try_from(self.0.len()).unwrap_or(u64::MAX).saturating_add(1);
        *self.0.entry(address).or_insert(next)
    }
}

fn edge_info(edge: &Edge, parent: u64, child: u64) -> XDbgBlockGraphEdge {
    let perms = edge.perms();
    XDbgBlockGraphEdge {
        parent,
        child,
        name: edge.name().to_owned(),
        perm: permissions(perms.need),
        shared_perm: permissions(perms.shared),
    }
}

fn permissions(bits: Bits) -> Vec<BlockPermission> {
    [
        (Bits::CONSISTENT_READ, BlockPermission::ConsistentRead),
        (Bits::WRITE, BlockPermission::Write),
        (Bits::WRITE_UNCHANGED, BlockPermission::WriteUnchanged),
        (Bits::RESIZE, BlockPermission::Resize),
    ]
    .into_iter()
    .filter(|(bit, _)| bits.contains(*bit))
    .map(|(_, name)| name)
    .collect()
}

/// QAPI has signed sizes; no node is longer than the largest of them.
fn signed(size: u64) -> i64 {
    i64::try_from(size).unwrap_or(i64::MAX)
}

/// The file name of a node: its own, or that of the child whose bytes it shows. Where something else backs an image than
/// what it names, no file name says what the node shows, and it is a description of the node.
pub(super) fn filename(node: &Arc<Node>) -> String {
    Shown::of(node).name
}

fn backing_edge(node: &Node) -> Option<Arc<Edge>> {
    node.children().into_iter().find(|edge| edge.role() == Role::Backing)
}

/// Options as a file name. Images keep such names and clients compare them, so they are written as QMP writes them.
fn json_name(options: &Value) -> String {
    format!("json:{}", String::from_utf8_lossy(&qmp::to_bytes(options, qmp::Style::Compact)))
}

/// How a node is called.
struct Shown {
    name: String,
    /// Options that would open it again.
    json: Value,
}

impl Shown {
    fn of(node: &Arc<Node>) -> Self {
        let (driver, own) = (node.driver().name(), node.driver().filename());
        let children: Vec<_> = node.children().into_iter().map(|edge| (Self::of(&edge.node()), edge)).collect();
        let described = own.strip_prefix("json:").and_then(|json| serde_json::from_str(json).ok());
        if let Some(Value::Object(mut json)) = described {
            for (shown, edge) in children {
                if let Some(child) = json.get_mut(edge.name()) {
                    *child = shown.json;
                }
            }
            let json = Value::Object(json);
            return Self { name: json_name(&json), json };
        }
        if !own.is_empty() {
            return Self { json: json!({ "driver": driver, "filename": own }), name: own };
        }
        let (backing, others): (Vec<_>, Vec<_>) =
            children.into_iter().partition(|(_, edge)| edge.role() == Role::Backing);
        let backing = backing.into_iter().next();
        let named = node.driver().backing().and_then(|facet| facet.named());
        let differs = match (&named, &backing) {
            (Some(_), Some((_, edge))) if node.opened_implicitly(&edge.node()) => false,
            (Some(named), Some((shown, _))) => *named != shown.name,
            (None, None) => false,
            _ => true,
        };
        let primary = others.first().map(|(shown, _)| shown.name.clone());
        let mut json = serde_json::Map::new();
        if differs {
            json.insert("backing".to_owned(), backing.map_or(Value::Null, |(shown, _)| shown.json));
        }
        json.insert("driver".to_owned(), driver.into());
        json.extend(others.into_iter().map(|(shown, edge)| (edge.name().to_owned(), shown.json)));
        let json = Value::Object(json);
        Self { name: if differs { json_name(&json) } else { primary.unwrap_or_default() }, json }
    }
}

async fn device_info(node: &Arc<Node>, flat: bool) -> BlockDeviceInfo {
    let options = node.options();
    let file = filename(node);
    let cache = BlockdevCacheInfo { writeback: true, direct: options.direct, no_flush: options.no_flush };
    let children = node.children();
    BlockDeviceInfo {
        image: image_info(node, file.clone(), !flat).await,
        file,
        node_name: node.name().to_owned(),
        ro: options.read_only,
        drv: node.driver().name().to_owned(),
        backing_file: backing_edge(node).map(|edge| filename(&edge.node())),
        // It is counted along the images that are shown.
        backing_file_depth: if flat { 0 } else { backing_depth(node) },
        children: children
            .iter()
            .map(|edge| BlockdevChild { child: edge.name().to_owned(), node_name: edge.node().name().to_owned() })
            .collect(),
        active: !options.inactive,
        encrypted: false,
        detect_zeroes: match options.detect_zeroes {
            DetectZeroes::Off => BlockdevDetectZeroesOptions::Off,
            DetectZeroes::On => BlockdevDetectZeroesOptions::On,
            DetectZeroes::Unmap => BlockdevDetectZeroesOptions::Unmap,
        },
        bps: 0,
        bps_rd: 0,
        bps_wr: 0,
        iops: 0,
        iops_rd: 0,
        iops_wr: 0,
        bps_max: None,
        bps_rd_max: None,
        bps_wr_max: None,
        iops_max: None,
        iops_rd_max: None,
        iops_wr_max: None,
        bps_max_length: None,
        bps_rd_max_length: None,
        bps_wr_max_length: None,
        iops_max_length: None,
        iops_rd_max_length: None,
        iops_wr_max_length: None,
        iops_size: None,
        group: None,
        cache,
        write_threshold: node.write_threshold(),
    }
}

/// The node that shows through: what backs it, or what a filter filters.
fn below(node: &Node) -> Option<Arc<Node>> {
    // `raw` shows another node's bytes as a format of its own.
    let filter = node.driver().name() != "raw";
    let shows = |edge: &Arc<Edge>| edge.role() == Role::Backing || (filter && edge.role() == Role::Filtered);
    node.children().iter().find(|edge| shows(edge)).map(|edge| edge.node())
}

fn backing_depth(node: &Arc<Node>) -> i64 {
    let mut depth = 0;
    let mut node = below(node);
    while let Some(next) = node {
        depth += 1;
        node = below(&next);
    }
    depth
}

/// Bytes on the host: the driver's own, or those of its children together.
async fn allocated_size(node: &Arc<Node>) -> Option<u64> {
    if let Some(own) = node.driver().allocated_size().await {
        return Some(own);
    }
    let mut sum = None;
    for edge in node.children().iter().filter(|edge| edge.role() != Role::Backing) {
        let below = Box::pin(allocated_size(&edge.node())).await?;
        sum = Some(sum.unwrap_or(0) + below);
    }
    sum
}

/// What a driver knows of its image. What shows another node's image shows what that one says of clusters and snapshots too.
async fn details(node: &Arc<Node>) -> ImageDetails {
    let mut details = node.driver().image_info().await;
    let children = node.children();
    let filtered = children.iter().find(|edge| edge.role() == Role::Filtered);
    if let Some(below) = filtered.filter(|_| details.dirty.is_none()) {
        let below = Box::pin(self::details(&below.node())).await;
        details.dirty = below.dirty;
        details.cluster_size = below.cluster_size;
        if children.len() == 1 {
            details.snapshots = below.snapshots;
        }
    }
    details
}

/// The image of a node; with what shows through below it if `chain`.
async fn image_info(node: &Arc<Node>, filename: String, chain: bool) -> ImageInfo {
    let details = details(node).await;
    let mut info = ImageInfo {
        filename,
        format: node.driver().name().to_owned(),
        dirty_flag: details.dirty,
        actual_size: allocated_size(node).await.map(signed),
        virtual_size: signed(node.size()),
        cluster_size: details.cluster_size.map(i64::from),
        encrypted: details.encrypted.then_some(true),
        compressed: details.compressed.then_some(true),
        backing_filename: details.backing_filename,
        full_backing_filename: details.full_backing_filename,
        backing_filename_format: details.backing_filename_format,
        snapshots: (!details.snapshots.is_empty()).then_some(details.snapshots),
        backing_image: None,
        limits: Some(limits(node)),
        format_specific: details.specific.map(|kind| ImageInfoSpecific { kind }),
    };
    if chain && let Some(below) = below(node) {
        let name = self::filename(&below);
        info.backing_image = Some(Box::new(Box::pin(image_info(&below, name, true)).await));
    }
    info
}

fn limits(node: &Node) -> BlockLimitsInfo {
    let facts = node.facts();
    let memory = u64::from(facts.mem_align);
    BlockLimitsInfo {
        request_alignment: facts.request_align,
        max_discard: Some(facts.max_discard),
        discard_alignment: Some(facts.discard_align),
        max_write_zeroes: Some(facts.max_zero),
        write_zeroes_alignment: Some(facts.zero_align),
        opt_transfer: (facts.opt_transfer > 0).then_some(facts.opt_transfer),
        max_transfer: Some(facts.max_transfer),
        max_hw_transfer: None,
        max_iov: 1024,
        max_hw_iov: None,
        min_mem_alignment: memory,
        opt_mem_alignment: memory.max(4096),
    }
}

fn node_stats(node: &Arc<Node>) -> BlockStats {
    let children = node.children();
    let below = children.iter().find(|edge| edge.role() != Role::Backing);
    BlockStats {
        device: None,
        qdev: None,
        node_name: node.name().to_owned(),
        stats: device_stats(node.stats()),
        driver_specific: node.driver().driver_stats().map(|driver| BlockStatsSpecific { driver }),
        parent: below.map(|edge| Box::new(node_stats(&edge.node()))),
        backing: backing_edge(node).map(|edge| Box::new(node_stats(&edge.node()))),
    }
}

fn device_stats(stats: &Stats) -> BlockDeviceStats {
    let (read, write) = (stats.read(Op::Read), stats.read(Op::Write));
    let (flush, unmap) = (stats.read(Op::Flush), stats.read(Op::Unmap));
    BlockDeviceStats {
        rd_bytes: read.bytes,
        wr_bytes: write.bytes,
        unmap_bytes: unmap.bytes,
        rd_operations: read.operations,
        wr_operations: write.operations,
        flush_operations: flush.operations,
        unmap_operations: unmap.operations,
        rd_total_time_ns: read.time_ns,
        wr_total_time_ns: write.time_ns,
        flush_total_time_ns: flush.time_ns,
        unmap_total_time_ns: unmap.time_ns,
        wr_highest_offset: stats.highest_write(),
        idle_time_ns: stats.idle_ns(),
        failed_rd_operations: read.failed,
        failed_wr_operations: write.failed,
        failed_flush_operations: flush.failed,
        failed_unmap_operations: unmap.failed,
        invalid_rd_operations: read.invalid,
        invalid_wr_operations: write.invalid,
        invalid_flush_operations: flush.invalid,
        invalid_unmap_operations: unmap.invalid,
        account_invalid: true,
        account_failed: true,
        ..BlockDeviceStats::default()
    }
}
