//! The graph: names, permissions, drains, resizes; a failed change changes nothing.
#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use block::disk::DiskOptions;
use block::perm::Bits;
use block::testing::{self, MemoryDriver};
use block::{Errno, Facts, NodeOptions, Perms, WriteFlags};
use buf::IoBuf;
use proptest::prelude::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

fn run<T>(future: impl Future<Output = T>) -> T {
    let local = tokio::task::LocalSet::new();
    local.block_on(&tokio::runtime::Builder::new_current_thread().build().unwrap(), future)
}

fn user(need: Bits, shared: Bits) -> DiskOptions {
    DiskOptions { label: "a test".into(), perms: Perms { need, shared }, writethrough: false }
}

#[test]
fn names_are_checked() {
    run(async {
        let mut graph = testing::graph();
        let add = async |graph: &mut block::Graph, name: &str| {
            let (driver, _) = MemoryDriver::open(512, Facts::default());
            graph.adopt(name, driver, NodeOptions::default()).await.map(|_| ()).map_err(|e| e.to_string())
        };
        assert_eq!(add(&mut graph, "ok-1._x").await, Ok(()));
        assert_eq!(add(&mut graph, "ok-1._x").await, Err("Duplicate nodes with node-name='ok-1._x'".into()));
        assert_eq!(add(&mut graph, "1x").await, Err("Invalid node-name: '1x'".into()));
        assert_eq!(add(&mut graph, "").await, Err("Invalid node-name: ''".into()));
        assert_eq!(add(&mut graph, &"a".repeat(31)).await, Ok(()));
        assert_eq!(add(&mut graph, &"a".repeat(32)).await, Err("Node name too long".into()));
        assert_eq!(graph.nodes().count(), 2);
    });
}

#[test]
fn a_node_in_use_stays() {
    run(async {
        let mut graph = testing::graph();
        let (driver, _) = MemoryDriver::open(512, Facts::default());
        let node = graph.adopt("n", driver, NodeOptions::default()).await.unwrap();
        let disk = graph.attach(&node, &user(Bits::CONSISTENT_READ, Bits::ALL)).await.unwrap();
        assert_eq!(graph.delete("n").await.unwrap_err().to_string(), "Node n is in use");
        graph.detach(disk).await;
        graph.delete("n").await.unwrap();
        assert!(graph.get("n").is_none());
        let again = graph.delete("n").await.unwrap_err().to_string();
        assert_eq!(again, "Failed to find node with node-name='n'");
    });
}

#[test]
fn a_drain_waits_for_who_is_inside_and_keeps_others_out() {
    run(async {
        let mut graph = testing::graph();
        let (driver, memory) = MemoryDriver::open(8192, Facts::default());
        let node = graph.adopt("n", driver, NodeOptions::default()).await.unwrap();
        let disk = graph.attach(&node, &user(Bits::WRITE, Bits::ALL)).await.unwrap();
        let early = tokio::task::spawn_local({
            let disk = disk.clone();
            async move { disk.write(0, &IoBuf::copy_of(&[1; 512]), WriteFlags::NONE).await }
        });
        tokio::task::yield_now().await;
        let drained = graph.drain(&node).await;
        assert_eq!(memory.bytes.lock().unwrap()[0], 1, "the early write is complete");
        let late = tokio::task::spawn_local({
            let disk = disk.clone();
            async move { disk.write(0, &IoBuf::copy_of(&[2; 512]), WriteFlags::NONE).await }
        });
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
        assert_eq!(memory.bytes.lock().unwrap()[0], 1, "the late write waits");
        drop(drained);
        early.await.unwrap().unwrap();
        late.await.unwrap().unwrap();
        assert_eq!(memory.bytes.lock().unwrap()[0], 2);
    });
}

#[test]
fn a_resize_is_seen_by_users_that_share_it_and_refused_by_others() {
    run(async {
        let mut graph = testing::graph();
        let (driver, _) = MemoryDriver::open(4096, Facts::default());
        let node = graph.adopt("n", driver, NodeOptions::default()).await.unwrap();
        let disk = graph.attach(&node, &user(Bits::CONSISTENT_READ, Bits::ALL)).await.unwrap();
        let seen = Arc::new(AtomicU64::new(0));
        disk.on_resize(Box::new({
            let seen = Arc::clone(&seen);
            move |size| seen.store(size, Ordering::Relaxed)
        }));
        graph.resize(&node, 8192).await.unwrap();
        assert_eq!((seen.load(Ordering::Relaxed), disk.size()), (8192, 8192));
        disk.read(8191, &IoBuf::alloc(1)).await.unwrap();
        assert_eq!(disk.read(8192, &IoBuf::alloc(1)).await, Err(Errno::EIO));

        let stubborn = graph.attach(&node, &user(Bits::CONSISTENT_READ, !Bits::RESIZE)).await.unwrap();
        let text = graph.resize(&node, 512).await.unwrap_err().to_string();
        assert!(
            text.starts_with("Permission conflict on node 'n': permissions 'resize' are both required by"),
            "{text}"
        );
        assert_eq!(stubborn.size(), 8192);
        assert_eq!(node.parents().len(), 2, "the refused user is gone");
    });
}

#[test]
fn a_read_only_node_has_no_writers() {
    run(async {
        let mut graph = testing::graph();
        let (driver, _) = MemoryDriver::open(512, Facts::default());
        let node = graph.adopt("n", driver, NodeOptions { read_only: true, ..NodeOptions::default() }).await.unwrap();
        let refused = graph.attach(&node, &user(Bits::WRITE, Bits::ALL)).await.unwrap_err();
        assert_eq!(refused.to_string(), "Block node is read-only");
        let reader = graph.attach(&node, &user(Bits::CONSISTENT_READ, Bits::ALL)).await.unwrap();
        assert_eq!(reader.write(0, &IoBuf::zeroed(1), WriteFlags::NONE).await, Err(Errno::EPERM));
    });
}

proptest! {
    /// Users come and go; at each time no two of them conflict, and one is refused exactly when it would.
    #[test]
    fn permissions_never_conflict(steps in prop::collection::vec((any::<bool>(), 0u8..16, 0u8..16, 0usize..8), 1..40)) {
        run(async move {
            let mut graph = testing::graph();
            let (driver, _) = MemoryDriver::open(512, Facts::default());
            let node = graph.adopt("n", driver, NodeOptions::default()).await.unwrap();
            let mut users = Vec::new();
            for (come, need, shared, which) in steps {
                if !come && !users.is_empty() {
                    let (disk, _) = users.swap_remove(which % users.len());
                    graph.detach(disk).await;
                } else {
                    let new = Perms { need: Bits::from_bits(need), shared: Bits::from_bits(shared) };
                    let fits = users.iter().all(|(_, old): &(_, Perms)| {
                        old.shared.contains(new.need) && new.shared.contains(old.need)
                    });
                    match graph.attach(&node, &user(new.need, new.shared)).await {
                        Ok(disk) => {
                            assert!(fits);
                            users.push((disk, new));
                        }
                        Err(_) => assert!(!fits),
                    }
                }
                let all = users.iter().fold(Perms::default(), |all, (_, perms)| all.with(*perms));
                assert_eq!(node.user_perms(), all);
                assert_eq!(node.parents().len(), users.len());
            }
        });
    }
}
