//! Nodes: made, resized, deleted.

use super::Control;
use qapi::types::block::{BlockResize, BlockdevDel, BlockdevOptions, BlockdevReopen};
use qapi::{Error, Result};

impl Control {
    /// `blockdev-add` and `--blockdev`.
    pub async fn blockdev_add(&mut self, options: BlockdevOptions) -> Result<()> {
        self.graph.add(&options).await.map(|_| ())
    }

    pub(super) async fn blockdev_reopen(&mut self, args: BlockdevReopen) -> Result<()> {
        self.graph.reopen(args.options).await
    }

    pub(super) async fn blockdev_del(&mut self, args: BlockdevDel) -> Result<()> {
        self.graph.delete(&args.node_name).await
    }

    pub(super) async fn block_resize(&mut self, args: BlockResize) -> Result<()> {
        let node = self.graph.find(args.device.as_deref(), args.node_name.as_deref())?;
        let size = u64::try_from(args.size).map_err(|_| Error::generic("Parameter 'size' expects a >0 size"))?;
        self.graph.resize(&node, size).await
    }
}
