//! The device ioctls: SG_IO, `IOC_PR_*`, NVMe pass-through. The only unsafe file of the helper.
//!
//! Each function is one ioctl with a typed argument; what the answer means is for [`crate::scsi_device`] and
//! [`crate::kernel_pr`]. Every number used here has a row in the sandbox's policy. `[linux/Documentation/scsi]`,
//! `<scsi/sg.h>`, `<linux/pr.h>`, `<linux/nvme_ioctl.h>`.
#![expect(unsafe_code, reason = "ioctl has no safe form: each call proves its own argument")]

use ipc::kernel::{self, Change};
use ipc::scsi::SENSE_SIZE;
use rustix::ioctl::{Opcode, opcode};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

const SG_IO: Opcode = 0x2285;
const NVME_ID: Opcode = opcode::none(b'N', 0x40);
const NVME_ADMIN: Opcode = opcode::read_write::<NvmeCommand>(b'N', 0x41);
const NVME_IO: Opcode = opcode::read_write::<NvmeCommand>(b'N', 0x43);

/// `struct sg_io_hdr`.
#[repr(C)]
struct SgIoHeader {
    interface: libc::c_int,
    direction: libc::c_int,
    command_length: u8,
    sense_length: u8,
    iovec_count: u16,
    data_length: u32,
    data: *mut libc::c_void,
    command: *const u8,
    sense: *mut u8,
    timeout: u32,
    flags: u32,
    pack_id: libc::c_int,
    user: *mut libc::c_void,
    status: u8,
    masked_status: u8,
    message_status: u8,
    sense_written: u8,
    host_status: u16,
    driver_status: u16,
    residual: libc::c_int,
    duration: u32,
    info: u32,
}

/// `struct nvme_passthru_cmd`.
#[repr(C)]
#[derive(Default)]
struct NvmeCommand {
    opcode: u8,
    flags: u8,
    reserved: u16,
    namespace: u32,
    dwords_2_3: [u32; 2],
    metadata: u64,
    address: u64,
    metadata_length: u32,
    data_length: u32,
    dwords_10_15: [u32; 6],
    timeout_ms: u32,
    result: u32,
}

/// Calls ioctl; a negative result is an error.
///
/// # Safety
/// `argument` is what the request takes: valid for reads and writes of that type, as is all memory that it points to.
unsafe fn ioctl<T>(device: BorrowedFd<'_>, request: Opcode, argument: *mut T) -> io::Result<i32> {
    // SAFETY: the caller vouches for the argument.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), libc::Ioctl::from(request), argument) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Room behind the buffer of an answer. The kernel may let a target in software (LIO) write into this very memory, and
/// its READ FULL STATUS writes up to a descriptor beyond a short allocation length (seen on Linux 6.12).
const SLACK: usize = 4096;

/// Which way the data of a SCSI command goes.
#[derive(Debug)]
pub enum Transfer<'a> {
    /// So many bytes from the device.
    In(usize),
    /// To the device.
    Out(&'a [u8]),
}

/// How a SCSI command ended.
#[derive(Debug, Clone)]
pub struct SgResult {
    /// SCSI status.
    pub status: u8,
    /// What the host adapter's driver says, `DID_*` of `<scsi/scsi_status.h>`.
    pub host: u16,
    /// Sense data; zero where the device sent none.
    pub sense: [u8; SENSE_SIZE],
    /// The bytes that the device sent.
    pub data: Vec<u8>,
}

/// SG_IO with a ten-byte CDB. The kernel aborts the command after `timeout` (at least a millisecond).
pub fn sg_io(
    device: BorrowedFd<'_>,
    cdb: &[u8; 10],
    transfer: Transfer<'_>,
    timeout: Duration,
) -> io::Result<SgResult> {
    /// `SG_DXFER_NONE`, `SG_DXFER_TO_DEV`, `SG_DXFER_FROM_DEV`.
    const NONE: i32 = -1;
    const TO: i32 = -2;
    const FROM: i32 = -3;
    let mut answer = Vec::new();
    let (direction, data, length) = match transfer {
        Transfer::In(0) | Transfer::Out([]) => (NONE, std::ptr::null_mut(), 0),
        Transfer::In(length) => {
            answer.resize(length.saturating_add(SLACK), 0u8);
            (FROM, answer.as_mut_ptr(), length)
        }
        // The kernel only reads from here for SG_DXFER_TO_DEV.
        Transfer::Out(data) => (TO, data.as_ptr().cast_mut(), data.len()),
    };
    let mut sense = [0; SENSE_SIZE];
    let mut header = SgIoHeader {
        interface: libc::c_int::from(b'S'),
        direction,
        command_length: 10,
        sense_length: SENSE_SIZE_U8,
        iovec_count: 0,
        data_length: u32::try_from(length).map_err(io::Error::other)?,
        data: data.cast(),
        command: cdb.as_ptr(),
        sense: sense.as_mut_ptr(),
        timeout: u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX).max(1),
        flags: 0,
        pack_id: 0,
        user: std::ptr::null_mut(),
        status: 0,
        masked_status: 0,
        message_status: 0,
        sense_written: 0,
        host_status: 0,
        driver_status: 0,
        residual: 0,
        duration: 0,
        info: 0,
    };
    // SAFETY: SG_IO takes a sg_io_hdr. Command (10 bytes), sense (96 bytes, as sense_length says) and data (`length`
    // bytes, writable unless the direction is to the device) outlive the call, which is synchronous: on return the
    // kernel has copied everything and keeps no pointer.
    unsafe { ioctl(device, SG_IO, &raw mut header)? };
    answer.truncate(length.saturating_sub(usize::try_from(header.residual).unwrap_or(0)));
    Ok(SgResult { status: header.status, host: header.host_status, sense, data: answer })
}

#[expect(clippy::cast_possible_truncation, reason = "96")]
const SENSE_SIZE_U8: u8 = SENSE_SIZE as u8;

/// Changes reservations. Returns the kernel's status, [`kernel::ended`].
pub fn pr_out(device: BorrowedFd<'_>, change: &Change) -> io::Result<i32> {
    let mut call = change.call();
    // SAFETY: the request reads the structure that `call` has for it, which lives across the call and holds no pointer.
    unsafe { ioctl(device, call.request, call.argument.as_mut_ptr()) }
}

/// IOC_PR_READ_KEYS: generation, how many there are, and as many keys as fit into `list`.
pub fn pr_read_keys(device: BorrowedFd<'_>, list: &mut [u64]) -> io::Result<(u32, u32)> {
    let count = u32::try_from(list.len()).unwrap_or(u32::MAX);
    let keys = u64::try_from(list.as_mut_ptr().expose_provenance()).map_err(io::Error::other)?;
    let mut found = kernel::ReadKeys { generation: 0, count, keys };
    // SAFETY: the structure lives across the call; it points to `count` keys that the kernel may write.
    unsafe { ioctl(device, kernel::READ_KEYS, &raw mut found)? };
    Ok((found.generation, found.count))
}

/// IOC_PR_READ_RESERVATION.
pub fn pr_read_reservation(device: BorrowedFd<'_>) -> io::Result<kernel::ReadReservation> {
    let mut found = kernel::ReadReservation::default();
    // SAFETY: the structure lives across the call and holds no pointer.
    unsafe { ioctl(device, kernel::READ_RESERVATION, &raw mut found)? };
    Ok(found)
}

/// NVME_IOCTL_ID: the namespace's number; an error if the device is no NVMe namespace.
pub fn nvme_namespace(device: BorrowedFd<'_>) -> io::Result<u32> {
    // SAFETY: the request takes no argument.
    let id = unsafe { ioctl::<libc::c_void>(device, NVME_ID, std::ptr::null_mut())? };
    u32::try_from(id).map_err(io::Error::other)
}

/// Reservation Report of a namespace, extended data structure, `[NVM Express 2.0 §7.5]`. Returns the NVMe status.
pub fn nvme_reservation_report(
    device: BorrowedFd<'_>,
    namespace: u32,
    report: &mut [u8],
    timeout: Duration,
) -> io::Result<i32> {
    let dwords = u32::try_from(report.len() / 4).map_err(io::Error::other)?;
    let command = NvmeCommand { opcode: 0x0e, namespace, ..NvmeCommand::default() };
    // Number of dwords, zero based; extended data structure.
    nvme(device, NVME_IO, command, [dwords.saturating_sub(1), 1], report, timeout)
}

/// Reservation Register, unregistering, `[NVM Express 2.0 §7.3]`. Returns the NVMe status.
///
/// IOC_PR_REGISTER cannot: with a new key of zero it replaces the key by zero, and the host stays registered.
pub fn nvme_unregister(
    device: BorrowedFd<'_>,
    namespace: u32,
    key: u64,
    ignore: bool,
    timeout: Duration,
) -> io::Result<i32> {
    let mut keys = [0; 16];
    keys[..8].copy_from_slice(&key.to_le_bytes());
    let command = NvmeCommand { opcode: 0x0d, namespace, ..NvmeCommand::default() };
    // Unregister; ignore the existing key.
    nvme(device, NVME_IO, command, [1 | u32::from(ignore) << 3, 0], &mut keys, timeout)
}

/// Identify Namespace, `[NVM Express 2.0 §5.17.2.1]`. Returns the NVMe status.
pub fn nvme_identify_namespace(
    device: BorrowedFd<'_>,
    namespace: u32,
    data: &mut [u8; 4096],
    timeout: Duration,
) -> io::Result<i32> {
    let command = NvmeCommand { opcode: 0x06, namespace, ..NvmeCommand::default() };
    nvme(device, NVME_ADMIN, command, [0, 0], data, timeout)
}

fn nvme(
    device: BorrowedFd<'_>,
    request: Opcode,
    mut command: NvmeCommand,
    [dword_10, dword_11]: [u32; 2],
    data: &mut [u8],
    timeout: Duration,
) -> io::Result<i32> {
    command.address = u64::try_from(data.as_mut_ptr().expose_provenance()).map_err(io::Error::other)?;
    command.data_length = u32::try_from(data.len()).map_err(io::Error::other)?;
    command.dwords_10_15[0] = dword_10;
    command.dwords_10_15[1] = dword_11;
    command.timeout_ms = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX).max(1);
    // SAFETY: both requests take a nvme_passthru_cmd. It points to `data_length` bytes that the kernel may write, and
    // to nothing else; the call is synchronous.
    unsafe { ioctl(device, request, &raw mut command) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ipc::scsi::Key;
    use std::os::fd::AsFd;

    #[test]
    fn layouts_and_numbers_are_the_kernels() {
        assert_eq!(size_of::<SgIoHeader>(), 88);
        assert_eq!(size_of::<NvmeCommand>(), 72);
        assert_eq!([NVME_ID, NVME_ADMIN, NVME_IO], [0x4e40, 0xc048_4e41, 0xc048_4e43]);
    }

    #[test]
    fn a_file_is_no_device() {
        let file = tempfile::tempfile().unwrap();
        let errno = sg_io(file.as_fd(), &[0x5e; 10], Transfer::In(8), Duration::from_secs(1)).unwrap_err();
        assert_eq!(errno.raw_os_error(), Some(libc::ENOTTY));
        let errno = pr_out(file.as_fd(), &Change::Clear { key: Key(1) }).unwrap_err();
        assert_eq!(errno.raw_os_error(), Some(libc::ENOTTY));
        assert_eq!(nvme_namespace(file.as_fd()).unwrap_err().raw_os_error(), Some(libc::ENOTTY));
    }
}
