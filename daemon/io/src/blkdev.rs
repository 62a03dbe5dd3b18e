//! Block devices: sizes, limits, discard and zeroes by ioctl. [linux/fs.h BLK*]

use crate::fd::Fd;
use crate::file::File;
use crate::pool;
use nix::errno::Errno;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

mod calls {
    //! The ioctls by name.
    use nix::{ioctl_none_bad, ioctl_read, ioctl_read_bad, ioctl_write_ptr_bad, request_code_none};

    ioctl_read!(blkgetsize64, 0x12, 114, usize);
    ioctl_read_bad!(blksszget, request_code_none!(0x12, 104), libc::c_int);
    ioctl_read_bad!(blkpbszget, request_code_none!(0x12, 123), libc::c_uint);
    ioctl_read_bad!(blkiomin, request_code_none!(0x12, 120), libc::c_uint);
    ioctl_read_bad!(blkioopt, request_code_none!(0x12, 121), libc::c_uint);
    ioctl_read_bad!(blkroget, request_code_none!(0x12, 94), libc::c_int);
    ioctl_write_ptr_bad!(blkroset, request_code_none!(0x12, 93), libc::c_int);
    ioctl_write_ptr_bad!(blkdiscard, request_code_none!(0x12, 119), [u64; 2]);
    ioctl_write_ptr_bad!(blkzeroout, request_code_none!(0x12, 127), [u64; 2]);
    // [linux/cdrom.h] The argument is the number of the slot.
    nix::ioctl_write_int_bad!(cdrom_drive_status, 0x5326);
    ioctl_none_bad!(blkflsbuf, request_code_none!(0x12, 97));
}

/// What a block device says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockDevice {
    /// Length in bytes.
    pub size: u64,
    /// Logical sector size in bytes: the unit of direct I/O.
    pub logical_sector: u32,
    /// Physical sector size in bytes.
    pub physical_sector: u32,
    /// Smallest I/O size without a penalty in bytes, 0 if unknown.
    pub io_min: u32,
    /// Optimal I/O size in bytes, 0 if unknown.
    pub io_opt: u32,
    /// The kernel refuses writes.
    pub read_only: bool,
    /// Limits of its queue.
    pub queue: QueueLimits,
}

/// Limits of a block device's queue as sysfs shows them; none where it does not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueLimits {
    /// The largest request in bytes; the kernel splits larger ones.
    pub max_transfer: Option<u64>,
    /// The most segments of a request.
    pub max_segments: Option<u64>,
    /// The largest discard in bytes, 0 if it cannot discard.
    pub discard_max: Option<u64>,
    /// Unit of discard in bytes, 0 if it cannot discard.
    pub discard_granularity: Option<u64>,
    /// The largest write of zeroes without data in bytes, 0 if the device has no such command.
    pub write_zeroes_max: Option<u64>,
    /// Whether it is a zoned device.
    pub zoned: bool,
}

impl File {
    /// What the block device says of itself.
    ///
    /// # Errors
    /// It is no block device, or does not answer.
    pub async fn block_device(&self) -> io::Result<BlockDevice> {
        let fd = Arc::clone(&self.fd);
        pool::blocking(move || Ok(describe(&fd)?)).await?
    }

    /// The length of a block device in bytes.
    ///
    /// # Errors
    /// It is no block device, or does not answer.
    pub async fn block_device_size(&self) -> io::Result<u64> {
        let fd = Arc::clone(&self.fd);
        Ok(pool::blocking(move || size(&fd)).await??)
    }

    /// Whether there is a disc in the drive. What is no drive has none.
    pub async fn has_disc(&self) -> bool {
        /// The slot in use, and the answer for a disc that can be read [linux/cdrom.h].
        const CURRENT: libc::c_int = libc::c_int::MAX;
        const DISC_OK: libc::c_int = 4;
        let fd = Arc::clone(&self.fd);
        // SAFETY: cdrom_drive_status takes a number, no pointer.
        let status = pool::blocking(move || unsafe { calls::cdrom_drive_status(fd.raw(), CURRENT) }).await;
        matches!(status, Ok(Ok(DISC_OK)))
    }

    /// Tells a block device that nobody needs the range any more. What it reads as afterwards is up to the device.
    ///
    /// # Errors
    /// `EOPNOTSUPP` if it cannot; otherwise what the kernel says.
    pub async fn block_discard(&self, at: u64, len: u64) -> Result<(), Errno> {
        // SAFETY: blkdiscard reads two u64 through the pointer.
        self.range_call(at, len, |fd, range| unsafe { calls::blkdiscard(fd.raw(), range) }).await
    }

    /// Makes a range of a block device read as zeroes; the kernel writes zeroes where the device has no command for it.
    ///
    /// # Errors
    /// What the kernel says.
    pub async fn block_zero_out(&self, at: u64, len: u64) -> Result<(), Errno> {
        // SAFETY: blkzeroout reads two u64 through the pointer.
        self.range_call(at, len, |fd, range| unsafe { calls::blkzeroout(fd.raw(), range) }).await
    }

    /// Makes the kernel refuse writes to a block device, or take them again.
    ///
    /// # Errors
    /// No privilege, or no block device.
    pub async fn block_set_read_only(&self, read_only: bool) -> io::Result<()> {
        let fd = Arc::clone(&self.fd);
        let value = libc::c_int::from(read_only);
        // SAFETY: blkroset reads one int through the pointer.
        pool::blocking(move || unsafe { calls::blkroset(fd.raw(), &value) }).await??;
        Ok(())
    }

    /// Writes out and drops the buffers of a block device (BLKFLSBUF).
    ///
    /// # Errors
    /// No privilege, or no block device.
    pub async fn block_flush_buffers(&self) -> io::Result<()> {
        let fd = Arc::clone(&self.fd);
        // SAFETY: blkflsbuf takes no argument.
        pool::blocking(move || unsafe { calls::blkflsbuf(fd.raw()) }).await??;
        Ok(())
    }

    /// The position of the end of a seekable character device or other file, in bytes.
    ///
    /// # Errors
    /// It cannot seek.
    pub async fn seek_end(&self) -> io::Result<u64> {
        let fd = Arc::clone(&self.fd);
        let end = pool::blocking(move || nix::unistd::lseek(&*fd, 0, nix::unistd::Whence::SeekEnd)).await??;
        u64::try_from(end).map_err(|_| io::Error::from(Errno::EIO))
    }

    async fn range_call(
        &self,
        at: u64,
        len: u64,
        call: impl Fn(&Fd, &[u64; 2]) -> nix::Result<libc::c_int> + Send + 'static,
    ) -> Result<(), Errno> {
        let fd = Arc::clone(&self.fd);
        let range = [at, len];
        let result = pool::blocking(move || {
            loop {
                match call(&fd, &range) {
                    Err(Errno::EINTR) => continue,
                    other => return other.map(drop),
                }
            }
        });
        result.await.map_err(|e| e.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?
    }
}

fn size(fd: &Fd) -> nix::Result<u64> {
    let mut bytes = 0u64;
    // SAFETY: BLKGETSIZE64 writes one u64 through the pointer; the argument type of its number (size_t) is as wide on the
    // 64-bit machines that this crate is for.
    unsafe { calls::blkgetsize64(fd.raw(), (&raw mut bytes).cast()) }?;
    Ok(bytes)
}

const _: () = assert!(size_of::<usize>() == size_of::<u64>(), "the ioctl numbers are those of 64-bit machines");

fn describe(fd: &Fd) -> nix::Result<BlockDevice> {
    let (mut logical, mut read_only) = (0, 0);
    let (mut physical, mut io_min, mut io_opt) = (0, 0, 0);
    let bytes = size(fd)?;
    // SAFETY: each of these writes one int through the pointer.
    unsafe {
        calls::blksszget(fd.raw(), &mut logical)?;
        calls::blkpbszget(fd.raw(), &mut physical)?;
        calls::blkroget(fd.raw(), &mut read_only)?;
        // Hints: old drivers lack them.
        let _ = calls::blkiomin(fd.raw(), &mut io_min);
        let _ = calls::blkioopt(fd.raw(), &mut io_opt);
    }
    let rdev = nix::sys::stat::fstat(fd.as_fd())?.st_rdev;
    Ok(BlockDevice {
        size: bytes,
        logical_sector: u32::try_from(logical).unwrap_or(512),
        physical_sector: physical,
        io_min,
        io_opt,
        read_only: read_only != 0,
        queue: QueueLimits::of(rdev),
    })
}

impl QueueLimits {
    fn of(rdev: libc::dev_t) -> Self {
        let device = PathBuf::from(format!("/sys/dev/block/{}:{}", libc::major(rdev), libc::minor(rdev)));
        let mut queue = device.join("queue");
        if !queue.is_dir() {
            // A partition: the queue is its disk's. The entry is a link, so the step up is the kernel's, not the path's.
            queue = device.join("../queue");
        }
        let kib = number(&queue, "max_sectors_kb");
        Self {
            max_transfer: kib.and_then(|kib| kib.checked_mul(1024)),
            max_segments: number(&queue, "max_segments"),
            discard_max: number(&queue, "discard_max_bytes"),
            discard_granularity: number(&queue, "discard_granularity"),
            write_zeroes_max: number(&queue, "write_zeroes_max_bytes"),
            zoned: text(&queue, "zoned").is_some_and(|model| model != "none"),
        }
    }
}

fn text(queue: &Path, name: &str) -> Option<String> {
    Some(std::fs::read_to_string(queue.join(name)).ok()?.trim().to_owned())
}

fn number(queue: &Path, name: &str) -> Option<u64> {
    text(queue, name)?.parse().ok()
}
