//! A flush that failed is never followed by one that succeeds: the kernel may have dropped what it could not write.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "test code")]

mod common;

use block::{Errno, WriteFlags};
use buf::IoBuf;
use common::{attach, graph, on_thread, options, writer};
use io::RingUse;
use serde_json::json;
use std::path::PathBuf;
use std::process::Command;

/// A loop device of 16 MiB on a file system that has room for 1 MiB; none where it cannot be made.
struct Liar {
    folder: tempfile::TempDir,
    device: Option<PathBuf>,
}

impl Liar {
    fn new() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", "size=1M", "none"]).arg(folder.path()).output();
        if !mount.is_ok_and(|out| out.status.success()) {
            println!("skipped: cannot mount");
            return None;
        }
        let mut this = Self { folder, device: None };
        let image = this.folder.path().join("image");
        std::fs::File::create(&image).unwrap().set_len(16 << 20).unwrap();
        let out = Command::new("losetup").args(["--find", "--show"]).arg(&image).output().ok()?;
        if !out.status.success() {
            println!("skipped: no loop device: {}", String::from_utf8_lossy(&out.stderr));
            return None;
        }
        this.device = Some(String::from_utf8(out.stdout).unwrap().trim().into());
        Some(this)
    }
}

impl Drop for Liar {
    fn drop(&mut self) {
        if let Some(device) = &self.device {
            let _ = Command::new("losetup").arg("--detach").arg(device).status();
        }
        let _ = Command::new("umount").arg("--lazy").arg(self.folder.path()).status();
    }
}

#[test]
fn a_failed_durable_write_is_remembered_by_flushes() {
    let Some(liar) = Liar::new() else { return };
    let device = liar.device.clone().unwrap();
    on_thread(RingUse::Auto, move || async move {
        let mut g = graph();
        let json = json!({ "driver": "host_device", "node-name": "d", "filename": device });
        g.add(&options(&json)).await.unwrap();
        let disk = attach(&mut g, "d", writer()).await.unwrap();
        let ones = IoBuf::alloc(4 << 20);
        ones.fill(1);
        assert_eq!(disk.write(0, &ones, WriteFlags::FUA).await, Err(Errno::EIO));
        assert_eq!(disk.flush().await, Err(Errno::EIO));
        g.detach(disk).await;
        g.close_all().await;
    });
}

#[test]
fn a_failed_flush_is_remembered() {
    for auto_read_only in [false, true] {
        let Some(liar) = Liar::new() else { return };
        let device = liar.device.clone().unwrap();
        on_thread(RingUse::Auto, move || async move {
            let mut g = graph();
            let json = json!({
                "driver": "host_device", "node-name": "d", "filename": device, "auto-read-only": auto_read_only
            });
            g.add(&options(&json)).await.unwrap();
            let disk = attach(&mut g, "d", writer()).await.unwrap();
            let ones = IoBuf::alloc(4 << 20);
            ones.fill(1);
            disk.write(0, &ones, WriteFlags::NONE).await.unwrap();
            if auto_read_only {
                // The writer goes before it flushed: its file is replaced by one that never saw the error.
                let reader = attach(&mut g, "d", common::READER).await.unwrap();
                g.detach(disk).await;
                assert_eq!(reader.flush().await, Err(Errno::EIO));
                g.detach(reader).await;
                let disk = attach(&mut g, "d", writer()).await.unwrap();
                assert_eq!(disk.flush().await, Err(Errno::EIO));
                g.detach(disk).await;
            } else {
                assert_eq!(disk.flush().await, Err(Errno::EIO));
                let small = IoBuf::copy_of(&[2; 512]);
                disk.write(0, &small, WriteFlags::NONE).await.unwrap();
                assert_eq!(disk.flush().await, Err(Errno::EIO), "still");
                assert_eq!(disk.write(0, &small, WriteFlags::FUA).await, Err(Errno::EIO));
                g.detach(disk).await;
            }
            g.close_all().await;
        });
    }
}
