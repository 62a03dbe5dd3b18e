//! Commands for the fault node.

use super::Control;
use block::Node;
use block::fault::FaultControl;
use qapi::types::fault::*;
use qapi::{Error, Result};
use std::sync::Arc;

/// The node's facet.
fn facet(node: &Arc<Node>) -> Result<&dyn FaultControl> {
    let name = node.name();
    node.driver().fault_control().ok_or_else(|| Error::generic(format!("Node '{name}' is not a fault node")))
}

impl Control {
    pub(super) async fn x_fault_set_rules(&mut self, args: XFaultSetRules) -> Result<()> {
        facet(&self.graph.find(None, Some(&args.node_name))?)?.set_rules(&args.rules)
    }

    pub(super) async fn x_fault_release(&mut self, args: XFaultRelease) -> Result<XFaultInfo> {
        let node = self.graph.find(None, Some(&args.node_name))?;
        let before = facet(&node)?.info();
        facet(&node)?.release();
        Ok(before)
    }

    pub(super) async fn x_fault_crash(&mut self, args: XFaultCrash) -> Result<XFaultInfo> {
        let node = self.graph.find(None, Some(&args.node_name))?;
        let before = facet(&node)?.info();
        facet(&node)?.crash(args.keep, args.seed, args.atomic_size).await?;
        Ok(before)
    }

    pub(super) async fn x_fault_restart(&mut self, args: XFaultRestart) -> Result<()> {
        facet(&self.graph.find(None, Some(&args.node_name))?)?.restart();
        Ok(())
    }

    pub(super) async fn x_query_fault(&mut self, args: XQueryFault) -> Result<XFaultInfo> {
        Ok(facet(&self.graph.find(None, Some(&args.node_name))?)?.info())
    }
}
