//! Block devices, on a loop device; skipped where none can be made.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "test code")]

use buf::IoBuf;
use io::{Access, Engine, File, FileKind, IoThread, OpenHow, Params};
use std::path::PathBuf;
use std::process::Command;

struct Loop {
    device: PathBuf,
    _image: tempfile::NamedTempFile,
}

impl Loop {
    fn new(len: u64) -> Option<Self> {
        let image = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        image.as_file().set_len(len).unwrap();
        let out = Command::new("losetup").args(["--find", "--show"]).arg(image.path()).output().ok()?;
        if !out.status.success() {
            println!("skipped: no loop device: {}", String::from_utf8_lossy(&out.stderr));
            return None;
        }
        let device = String::from_utf8(out.stdout).unwrap().trim().into();
        Some(Self { device, _image: image })
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.device).status();
    }
}

#[test]
fn a_loop_device() {
    let Some(dev) = Loop::new(4 << 20) else { return };
    let thread = IoThread::start("blk", Params::default()).unwrap();
    let path = dev.device.clone();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let test = thread.run(move || async move {
        let how = OpenHow { access: Access::ReadWrite, direct: true, engine: Engine::Ring };
        let file = File::open(&path, how).await.unwrap();
        assert_eq!(file.stat().await.unwrap().kind, FileKind::Block);
        assert_eq!(file.block_device_size().await.unwrap(), 4 << 20);
        let about = file.block_device().await.unwrap();
        assert_eq!((about.size, about.read_only, about.queue.zoned), (4 << 20, false, false));
        assert!(about.logical_sector >= 512 && about.physical_sector >= about.logical_sector);
        assert!(about.queue.max_transfer.unwrap() >= 4096);
        let align = file.direct_align().await.unwrap();
        assert!(align.offset >= 512 && align.offset <= 4096, "{align:?}");

        let ones = IoBuf::alloc(1 << 20);
        ones.fill(1);
        file.write_at(0, &ones, true).await.unwrap();
        file.block_zero_out(4096, 8192).await.unwrap();
        match file.block_discard(64 << 10, 64 << 10).await {
            Ok(()) | Err(nix::errno::Errno::EOPNOTSUPP) => {}
            Err(e) => panic!("discard: {e}"),
        }
        let back = IoBuf::alloc(16 << 10);
        assert_eq!(file.read_at(0, &back).await.unwrap(), 16 << 10);
        let want: Vec<u8> = (0..16 << 10).map(|i| u8::from(!(4096..12288).contains(&i))).collect();
        assert_eq!(back.to_vec(), want);
        assert_eq!(file.read_at(4 << 20, &back).await.unwrap(), 0, "the end of the device");
        assert!(file.write_at(4 << 20, &back, false).await.is_err());

        file.block_set_read_only(true).await.unwrap();
        assert!(file.block_device().await.unwrap().read_only);
        file.block_set_read_only(false).await.unwrap();
        file.block_flush_buffers().await.unwrap();
        file.close().await;
    });
    runtime.block_on(test).unwrap();
    runtime.block_on(thread.stop());
}
