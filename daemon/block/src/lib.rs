//! The block graph: nodes, edges, permissions, requests.
#![forbid(unsafe_code)]
