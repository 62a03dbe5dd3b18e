//! Block status over a chain of nodes: each says what it knows of its bytes ([`Mapping`](crate::Mapping)), the walk puts it
//! together. It is what NBD's `base:allocation` and `qemu:allocation-depth` and the jobs ask.

use crate::IoResult;
use crate::driver::Span;
use crate::edge::Role;
use crate::node::Node;
use nix::errno::Errno;
use std::sync::Arc;

/// No chain of nodes is deeper than this: the walk ends even if a driver maps in a circle.
const MAX_DEPTH: u32 = 4096;

/// What lies at the start of the bytes that were asked for.
#[derive(Clone, Debug)]
pub struct Status {
    /// For how many bytes this holds, at least 1.
    pub len: u64,
    /// The bytes read as zero.
    pub zero: bool,
    /// The bytes are stored somewhere.
    pub data: bool,
    /// How many layers of backing files down the bytes are, 1 being the top one; 0 where no layer has them.
    pub depth: u32,
}

/// The status of the first bytes of `span` on `top`.
///
/// # Errors
/// The errno of the node that could not tell.
pub async fn of(top: &Arc<Node>, span: Span) -> IoResult<Status> {
    walk(top, span, true).await
}

/// In which layer the first bytes of `span` on `top` are. Whether they are zero is told only where that is known without
/// asking the host, so this is fit for the path of a request.
///
/// # Errors
/// The errno of the node that could not tell.
pub async fn layer(top: &Arc<Node>, span: Span) -> IoResult<Status> {
    walk(top, span, false).await
}

async fn walk(top: &Arc<Node>, span: Span, precise: bool) -> IoResult<Status> {
    let mut node = Arc::clone(top);
    let mut span = span;
    let mut depth = 1;
    for _ in 0..MAX_DEPTH {
        let found = node.map(span, precise).await?;
        let len = found.len.min(span.len);
        if !found.allocated {
            let backing = node.children().into_iter().find(|edge| edge.role() == Role::Backing);
            match backing {
                Some(edge) if span.at < edge.size() => {
                    node = edge.node();
                    span.len = len;
                    depth += 1;
                    continue;
                }
                _ => return Ok(Status { len, zero: true, data: false, depth: 0 }),
            }
        }
        match (&found.child, found.at) {
            (Some(edge), Some(at)) if !found.data && !found.zero => {
                node = edge.node();
                span = Span::new(at, len);
            }
            (Some(edge), Some(at)) if precise && found.data && !found.zero && !found.encoded => {
                // Stored by a format: the medium below may still know of a hole. If it does not know, it is data.
                let below = edge.map(Span::new(at, len), true).await;
                return Ok(match below {
                    Ok(below) => {
                        let zero = below.zero && below.allocated;
                        Status { len: len.min(below.len), zero, data: true, depth }
                    }
                    Err(_) => Status { len, zero: false, data: true, depth },
                });
            }
            _ => return Ok(Status { len, zero: found.zero, data: found.data, depth }),
        }
    }
    Err(Errno::ELOOP)
}
