//! What nodes are, what they did, and how they hang together.

use super::Control;
use block::driver::DynDriver;
use block::node::DetectZeroes;
use block::perm::Bits;
use block::stats::{Op, Stats};
use block::{Edge, Node, Role};
use qapi::types::block::BlockdevDetectZeroesOptions;
use qapi::types::block_query::*;
use qapi::{Error, Result};
use std::collections::HashMap;
use std::sync::Arc;

impl Control {
    /// There are no devices in a storage daemon, only nodes.
    pub(super) async fn query_block(&mut self, _: QueryBlock) -> Result<Vec<BlockInfo>> {
        Ok(Vec::new())
    }

    pub(super) async fn query_named_block_nodes(&mut self, _: QueryNamedBlockNodes) -> Result<Vec<BlockDeviceInfo>> {
        let nodes: Vec<_> = self.graph.nodes().rev().cloned().collect();
        let mut infos = Vec::with_capacity(nodes.len());
        // What the host knows of a file is asked on the pool of threads: a few at a time, so that their waits overlap.
        for some in nodes.chunks(16) {
            let asked: Vec<_> = some
                .iter()
                .cloned()
                .map(|node| tokio::task::spawn_local(async move { device_info(&node).await }))
                .collect();
            for info in asked {
                infos.push(info.await.map_err(|error| Error::generic(format!("a query was cut off: {error}")))??);
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

/// The file name of a node: its own, or that of the child whose bytes it shows.
pub(super) fn filename(node: &Arc<Node>) -> String {
    let own = node.driver().filename();
    if !own.is_empty() {
        return own;
    }
    match node.children().iter().find(|edge| edge.role() != Role::Backing) {
        Some(edge) => filename(&edge.node()),
        None => String::new(),
    }
}

async fn device_info(node: &Arc<Node>) -> Result<BlockDeviceInfo> {
    let options = node.options();
    let file = filename(node);
    let cache = BlockdevCacheInfo { writeback: true, direct: options.direct, no_flush: options.no_flush };
    let children = node.children();
    Ok(BlockDeviceInfo {
        image: image_info(node, file.clone()).await?,
        file,
        node_name: node.name().to_owned(),
        ro: options.read_only,
        drv: node.driver().name().to_owned(),
        backing_file_depth: backing_depth(node),
        children: children
            .iter()
            .map(|edge| BlockdevChild { child: edge.name().to_owned(), node_name: edge.node().name().to_owned() })
            .collect(),
        active: true,
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
        cache,
        write_threshold: 0,
    })
}

fn backing_depth(node: &Arc<Node>) -> i64 {
    let mut depth = 0;
    let mut node = Arc::clone(node);
    while let Some(edge) = node.children().into_iter().find(|edge| edge.role() == Role::Backing) {
        depth += 1;
        node = edge.node();
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

async fn image_info(node: &Arc<Node>, filename: String) -> Result<ImageInfo> {
    let name = node.driver().name();
    let specific = ["file", "host_device"]
        .contains(&name)
        .then(|| ImageInfoSpecific { kind: ImageInfoSpecificVariant::File(ImageInfoSpecificFileWrapper::default()) });
    Ok(ImageInfo {
        filename,
        format: name.to_owned(),
        dirty_flag: false,
        actual_size: allocated_size(node).await.map(signed),
        virtual_size: signed(node.size()),
        limits: Some(limits(node)),
        format_specific: specific,
    })
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
    let below = node.children().into_iter().find(|edge| edge.role() != Role::Backing);
    BlockStats {
        node_name: node.name().to_owned(),
        stats: device_stats(node.stats()),
        driver_specific: driver_stats(node.driver()),
        parent: below.map(|edge| Box::new(node_stats(&edge.node()))),
    }
}

fn driver_stats(_driver: &dyn DynDriver) -> Option<BlockStatsSpecific> {
    None
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
