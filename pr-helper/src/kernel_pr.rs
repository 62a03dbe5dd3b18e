//! Persistent reservations through the kernel's own interface, `<linux/pr.h>`: NVMe namespaces, which know no SCSI, and
//! device-mapper maps, where the kernel registers on every path and undoes it if one refuses.
//!
//! The kernel passes a status but no sense, so the sense here is what a SCSI device would have said. It always asks for
//! persistence through power loss (APTPL, NVMe PTPL), whatever the client asked for.

use crate::scsi_device::ioctl_error;
use crate::sg_io::{self, PrCommand};
use ipc::classic::Reply;
use ipc::scsi::{Action, Capabilities, Cdb, Data, Holder, Key, Kind, Parameters, Sense, status};
use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

/// `enum pr_type` and NVMe's reservation types (the same numbers) with the SCSI types.
const KINDS: [(u32, Kind); 6] = [
    (1, Kind::WriteExclusive),
    (2, Kind::ExclusiveAccess),
    (3, Kind::WriteExclusiveRegistrantsOnly),
    (4, Kind::ExclusiveAccessRegistrantsOnly),
    (5, Kind::WriteExclusiveAllRegistrants),
    (6, Kind::ExclusiveAccessAllRegistrants),
];

/// Reservation conflict: SCSI's and the kernel's; NVMe's 83h with and without "do not retry".
const CONFLICTS: [i32; 3] = [0x18, 0x83, 0x4083];

/// `PR_STS_IOERR`: the device answered CHECK CONDITION, and the kernel has kept the sense to itself.
const CHECK_CONDITION: i32 = 0x02;

/// How often a command is tried that ended so. Most often the reason is a unit attention, of which each path of a map
/// has its own, and which is gone when it was reported; a command that ended with it had no effect.
const UNIT_ATTENTIONS: usize = 9;

/// The most keys that fit into the largest reply.
const MAX_KEYS: usize = (ipc::classic::MAX_DATA - 8) / 8;

/// PERSISTENT RESERVE OUT; of an NVMe namespace if `nvme` has its number, else of a map.
pub fn reserve_out(
    device: BorrowedFd<'_>,
    nvme: Option<u32>,
    cdb: &Cdb,
    parameters: &[u8],
    timeout: Duration,
) -> Reply {
    let command = match translate(cdb, parameters) {
        Ok(command) => command,
        Err(sense) => return Reply::check(sense),
    };
    let mut result = match (command, nvme) {
        (PrCommand::Register { old, new: 0, ignore }, Some(namespace)) => {
            sg_io::nvme_unregister(device, namespace, old, ignore, timeout)
        }
        _ => repeat(device, command),
    };
    // NVMe tells a first registration from a replaced one even if the present key does not matter, and the kernel
    // takes a zero key for the former, `[NVM Express 2.0 §7.3]`.
    if let (PrCommand::Register { old: 0, new: new @ 1.., ignore: true }, Ok(code)) = (command, &result)
        && CONFLICTS.contains(code)
    {
        result = repeat(device, PrCommand::Register { old: u64::MAX, new, ignore: true });
    }
    match result {
        Ok(code) => kernel_status(code),
        Err(e) => kernel_error(&e),
    }
}

/// What the kernel does not know or does not allow is, for the client, a command that the device does not have.
fn kernel_error(error: &io::Error) -> Reply {
    match error.raw_os_error() {
        Some(libc::ENOTTY | libc::EOPNOTSUPP | libc::EACCES | libc::EPERM) => Reply::check(Sense::INVALID_OPCODE),
        _ => ioctl_error(error),
    }
}

/// Executes the command until it no longer ends with a unit attention.
fn repeat(device: BorrowedFd<'_>, command: PrCommand) -> io::Result<i32> {
    let mut tries = (0..UNIT_ATTENTIONS).map(|_| sg_io::pr_command(device, command));
    tries.find(|result| !matches!(result, Ok(CHECK_CONDITION))).unwrap_or(Ok(CHECK_CONDITION))
}

/// The kernel's command for a SCSI one, or what is wrong with it.
fn translate(cdb: &Cdb, list: &[u8]) -> Result<PrCommand, Sense> {
    let action = cdb.action().ok_or(Sense::INVALID_FIELD_IN_CDB)?;
    if matches!(action, Action::RegisterAndMove | Action::ReplaceLost) {
        return Err(Sense::INVALID_FIELD_IN_CDB);
    }
    let p = Parameters::decode(list).ok_or(Sense::PARAMETER_LIST_LENGTH)?;
    if !p.initiators.is_empty() || p.all_target_ports {
        return Err(Sense::INVALID_FIELD_IN_PARAMETER_LIST);
    }
    let (key, other) = (p.key.0, p.action_key.0);
    let kind = || {
        let (scope, code) = (cdb.scope_type() >> 4, cdb.scope_type() & 0x0f);
        let row = KINDS.iter().find(|row| scope == 0 && row.1 as u8 == code);
        row.map(|row| row.0).ok_or(Sense::INVALID_FIELD_IN_CDB)
    };
    Ok(match action {
        Action::Register => PrCommand::Register { old: key, new: other, ignore: false },
        Action::RegisterAndIgnore => PrCommand::Register { old: 0, new: other, ignore: true },
        Action::Reserve => PrCommand::Reserve { key, kind: kind()? },
        Action::Release => PrCommand::Release { key, kind: kind()? },
        Action::Clear => PrCommand::Clear { key },
        Action::Preempt => PrCommand::Preempt { key, victim: other, kind: kind()?, abort: false },
        Action::PreemptAndAbort => PrCommand::Preempt { key, victim: other, kind: kind()?, abort: true },
        _ => return Err(Sense::INVALID_FIELD_IN_CDB),
    })
}

/// `enum pr_status`, and the NVMe status codes that kernels before 6.4 passed on.
fn kernel_status(code: i32) -> Reply {
    match code {
        0 => Reply::status(status::GOOD),
        code if CONFLICTS.contains(&code) => Reply::status(status::RESERVATION_CONFLICT),
        // Invalid opcode, invalid field: NVMe's.
        0x01 | 0x4001 => Reply::check(Sense::INVALID_OPCODE),
        0x4002 => Reply::check(Sense::INVALID_FIELD_IN_CDB),
        // PR_STS_RETRY_PATH_FAILURE, PR_STS_PATH_FAST_FAILED, PR_STS_PATH_FAILED.
        0x000e_0000 | 0x000f_0000 | 0x0001_0000 => Reply::check(Sense::NOT_RESPONDING),
        _ => Reply::check(Sense::COMMUNICATION_FAILURE),
    }
}

/// PERSISTENT RESERVE IN of an NVMe namespace.
pub fn reserve_in(device: BorrowedFd<'_>, namespace: u32, cdb: &Cdb, timeout: Duration) -> Reply {
    let data = match cdb.action() {
        Some(Action::ReadKeys) => read_keys(device, namespace, timeout),
        Some(Action::ReadReservation) => read_reservation(device, namespace, timeout),
        Some(Action::ReportCapabilities) => Ok(Data::Capabilities(capabilities(device, namespace, timeout))),
        // There is no TransportID that describes an NVMe host.
        _ => return Reply::check(Sense::INVALID_FIELD_IN_CDB),
    };
    match data {
        Ok(data) => {
            let mut data = data.encode();
            data.truncate(usize::try_from(cdb.data_length()).unwrap_or(usize::MAX));
            Reply { data, ..Reply::status(status::GOOD) }
        }
        Err(e) => kernel_error(&e),
    }
}

fn read_keys(device: BorrowedFd<'_>, namespace: u32, timeout: Duration) -> io::Result<Data> {
    let mut keys = vec![0; MAX_KEYS];
    if let Ok((generation, total)) = sg_io::pr_read_keys(device, &mut keys) {
        keys.truncate(usize::try_from(total).unwrap_or(usize::MAX));
        return Ok(Data::Keys { generation, keys: keys.into_iter().map(Key).collect(), total });
    }
    let report = report(device, namespace, timeout)?;
    let keys: Vec<Key> = report.registrants.iter().map(|r| r.key).take(MAX_KEYS).collect();
    Ok(Data::Keys { generation: report.generation, total: u32::from(report.total), keys })
}

fn read_reservation(device: BorrowedFd<'_>, namespace: u32, timeout: Duration) -> io::Result<Data> {
    let (generation, key, code) = match sg_io::pr_read_reservation(device) {
        Ok(reservation) => reservation,
        Err(_) => {
            let report = report(device, namespace, timeout)?;
            let holder = report.registrants.iter().find(|r| r.holds);
            (report.generation, holder.map_or(0, |r| r.key.0), u32::from(report.kind))
        }
    };
    let kind = KINDS.iter().find(|row| row.0 == code).map(|row| row.1);
    let holder = kind.map(|kind| {
        // The all-registrants types have no single holder, `[SPC-4 §6.15.3.2]`.
        let all = matches!(kind, Kind::WriteExclusiveAllRegistrants | Kind::ExclusiveAccessAllRegistrants);
        Holder { key: Key(if all { 0 } else { key }), scope: 0, kind }
    });
    Ok(Data::Reservation { generation, holder })
}

/// Identify Namespace's RESCAP (byte 31) in SCSI's terms; without it, what every NVMe namespace with reservations has.
fn capabilities(device: BorrowedFd<'_>, namespace: u32, timeout: Duration) -> Capabilities {
    let mut identify = [0; 4096];
    match sg_io::nvme_identify_namespace(device, namespace, &mut identify, timeout) {
        Ok(0) => capabilities_of(identify[31]),
        _ => Capabilities::default(),
    }
}

fn capabilities_of(rescap: u8) -> Capabilities {
    // NVMe bit, bit of SCSI's PERSISTENT RESERVATION TYPE MASK.
    const TYPES: [(u8, u16); 6] = [(1, 0x0200), (2, 0x0800), (3, 0x2000), (4, 0x4000), (5, 0x8000), (6, 0x0001)];
    let types = TYPES.iter().filter(|(bit, _)| rescap >> bit & 1 != 0).map(|(_, mask)| mask).sum();
    Capabilities { persist: rescap & 1 != 0, types: Some(types), ..Capabilities::default() }
}

struct Report {
    generation: u32,
    kind: u8,
    total: u16,
    registrants: Vec<Registrant>,
}

struct Registrant {
    key: Key,
    holds: bool,
}

fn report(device: BorrowedFd<'_>, namespace: u32, timeout: Duration) -> io::Result<Report> {
    let mut bytes = vec![0; 64 * 1024];
    match sg_io::nvme_reservation_report(device, namespace, &mut bytes, timeout)? {
        0 => parse_report(&bytes).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData)),
        code => Err(io::Error::other(format!("NVMe status {code:#x}"))),
    }
}

/// The extended reservation status data structure, `[NVM Express 2.0 figure 413]`; little endian.
fn parse_report(bytes: &[u8]) -> Option<Report> {
    let (head, entries) = bytes.split_first_chunk::<64>()?;
    let total = u16::from_le_bytes([head[5], head[6]]);
    let registrants = entries
        .chunks_exact(64)
        .take(usize::from(total))
        .filter_map(|entry| {
            let key = Key(u64::from_le_bytes(*entry.get(8..)?.first_chunk::<8>()?));
            Some(Registrant { key, holds: entry.get(2)? & 1 != 0 })
        })
        .collect();
    let generation = u32::from_le_bytes(*head.first_chunk::<4>()?);
    Some(Report { generation, kind: head[4], total, registrants })
}

#[cfg(test)]
mod tests {
    use super::*;
    use ipc::scsi::{Command, RegisterOptions};

    fn command(command: &Command) -> Result<PrCommand, Sense> {
        let (cdb, list) = command.encode().unwrap();
        translate(&cdb, &list)
    }

    #[test]
    fn commands() {
        let (key, victim, kind) = (Key(1), Key(2), Kind::WriteExclusiveRegistrantsOnly);
        assert_eq!(command(&Command::Reserve { key, kind }), Ok(PrCommand::Reserve { key: 1, kind: 3 }));
        assert_eq!(
            command(&Command::Preempt { key, victim, kind, abort: true }),
            Ok(PrCommand::Preempt { key: 1, victim: 2, kind: 3, abort: true })
        );
        let options = RegisterOptions { all_target_ports: true, persist: false };
        assert_eq!(
            command(&Command::RegisterAndIgnore { new_key: key, options }),
            Err(Sense::INVALID_FIELD_IN_PARAMETER_LIST)
        );
        assert_eq!(
            command(&Command::ReplaceLost { new_key: key, kind, persist: true }),
            Err(Sense::INVALID_FIELD_IN_CDB)
        );
        let (cdb, list) = Command::Clear { key }.encode().unwrap();
        assert_eq!(translate(&cdb, &list[..23]), Err(Sense::PARAMETER_LIST_LENGTH));
        let scope = Cdb::build(Action::Reserve, 0x13, 24);
        assert_eq!(translate(&scope, &list), Err(Sense::INVALID_FIELD_IN_CDB));
        let kind = Cdb::build(Action::Reserve, 0x02, 24);
        assert_eq!(translate(&kind, &list), Err(Sense::INVALID_FIELD_IN_CDB));
    }

    #[test]
    fn reports() {
        let mut bytes = vec![0; 64 * 3];
        bytes[..4].copy_from_slice(&7u32.to_le_bytes());
        bytes[4] = 2;
        bytes[5] = 9;
        bytes[64 + 2] = 1;
        bytes[64 + 8] = 0xaa;
        bytes[128 + 8] = 0xbb;
        let report = parse_report(&bytes).unwrap();
        let keys: Vec<_> = report.registrants.iter().map(|r| (r.key, r.holds)).collect();
        assert_eq!((report.generation, report.kind, report.total), (7, 2, 9));
        assert_eq!(keys, [(Key(0xaa), true), (Key(0xbb), false)]);
        assert!(parse_report(&bytes[..63]).is_none());
    }

    #[test]
    fn nvme_capabilities() {
        let all = capabilities_of(0xff);
        assert_eq!((all.persist, all.types), (true, Some(0xea01)));
        assert_eq!(capabilities_of(0x02).types, Some(0x0200));
    }
}
