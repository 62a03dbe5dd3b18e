//! A SCSI command through SG_IO, and what its end means.

use crate::sg_io::{self, SgResult, Transfer};
use ipc::classic::Reply;
use ipc::scsi::{Cdb, Sense, status};
use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

/// Executes the command. An error is SG_IO's own: the command did not reach a SCSI device.
pub fn execute(device: BorrowedFd<'_>, cdb: &Cdb, parameters: &[u8], timeout: Duration) -> io::Result<Reply> {
    let command = cdb.bytes().first_chunk::<10>().ok_or(io::ErrorKind::InvalidInput)?;
    let transfer = match cdb.is_out() {
        true => Transfer::Out(parameters),
        false => Transfer::In(usize::try_from(cdb.data_length()).map_err(io::Error::other)?),
    };
    Ok(reply(sg_io::sg_io(device, command, transfer, timeout)?))
}

/// The reply to a client, `data` only with GOOD. What the transport says counts before the device's status, which the
/// device then never sent.
fn reply(result: SgResult) -> Reply {
    if let Some(reply) = transport_error(result.host) {
        return reply;
    }
    match result.status {
        status::GOOD => Reply { data: result.data, ..Reply::status(status::GOOD) },
        status::CHECK_CONDITION => Reply { sense: result.sense, ..Reply::status(status::CHECK_CONDITION) },
        other => Reply::status(other),
    }
}

/// `DID_*` of `<scsi/scsi_status.h>`; `None` for DID_OK.
fn transport_error(host: u16) -> Option<Reply> {
    Some(match host {
        0x00 => return None,
        // NO_CONNECT, BAD_TARGET
        0x01 | 0x04 => Reply::check(Sense::NOT_RESPONDING),
        // BUS_BUSY, SOFT_ERROR, IMM_RETRY, REQUEUE: the command may be repeated
        0x02 | 0x0b | 0x0c | 0x0d => Reply::status(status::BUSY),
        // TIME_OUT
        0x03 => Reply::check(Sense::TIMEOUT),
        // ABORT
        0x05 => Reply::check(Sense::ABORTED),
        // RESET
        0x08 => Reply::check(Sense::RESET),
        // NEXUS_FAILURE: how some drivers report a conflict
        0x11 => Reply::status(status::RESERVATION_CONFLICT),
        _ => Reply::check(Sense::COMMUNICATION_FAILURE),
    })
}

/// The reply where the ioctl itself failed.
pub fn ioctl_error(error: &io::Error) -> Reply {
    match error.raw_os_error() {
        Some(libc::EDOM) => Reply::status(status::TASK_SET_FULL),
        Some(libc::EBADE) => Reply::status(status::RESERVATION_CONFLICT),
        Some(libc::EAGAIN | libc::EBUSY) => Reply::status(status::BUSY),
        Some(libc::ENOMEM | libc::EREMOTEIO) => Reply::check(Sense::TARGET_FAILURE),
        Some(libc::ENOMEDIUM) => Reply::check(Sense::NO_MEDIUM),
        Some(libc::EINVAL) => Reply::check(Sense::INVALID_FIELD_IN_CDB),
        Some(libc::ENODEV | libc::ENXIO) => Reply::check(Sense::NOT_RESPONDING),
        _ => Reply::check(Sense::IO_PROCESS_TERMINATED),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(status: u8, host: u16) -> SgResult {
        SgResult { status, host, sense: [7; 96], data: vec![1, 2, 3] }
    }

    #[test]
    fn data_and_sense_only_where_they_mean_something() {
        assert_eq!(reply(result(0, 0)), Reply { data: vec![1, 2, 3], ..Reply::status(0) });
        let check = reply(result(2, 0));
        assert_eq!((check.sense, check.data.len()), ([7; 96], 0));
        assert_eq!(reply(result(0x18, 0)), Reply::status(0x18));
        assert_eq!(reply(result(0, 3)), Reply::check(Sense::TIMEOUT));
    }

    #[test]
    fn errno() {
        let reply = |e| ioctl_error(&io::Error::from_raw_os_error(e));
        assert_eq!(reply(libc::ENOTTY), Reply::check(Sense::IO_PROCESS_TERMINATED));
        assert_eq!(reply(libc::EPERM), Reply::check(Sense::IO_PROCESS_TERMINATED));
        assert_eq!(reply(libc::EINVAL), Reply::check(Sense::INVALID_FIELD_IN_CDB));
        assert_eq!(reply(libc::EBADE), Reply::status(status::RESERVATION_CONFLICT));
    }
}
