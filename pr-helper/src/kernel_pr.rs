//! Persistent reservations through the kernel's own interface, `<linux/pr.h>`: NVMe namespaces, which know no SCSI, and
//! device-mapper maps, where the kernel registers on every path and undoes it if one refuses.
//!
//! The kernel always asks for persistence through power loss (APTPL, NVMe PTPL), whatever the client asked for.

use crate::scsi_device::ioctl_error;
use crate::sg_io;
use ipc::classic::Reply;
use ipc::kernel::{self, Change, Ended, ReadReservation};
use ipc::scsi::{Action, Capabilities, Cdb, Data, Key, Kind, Parameters, Sense, status};
use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

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
        (Change::Register { old, new: Key(0), ignore }, Some(namespace)) => {
            sg_io::nvme_unregister(device, namespace, old.0, ignore, timeout)
        }
        _ => repeat(device, command),
    };
    // NVMe tells a first registration from a replaced one even if the present key does not matter, and the kernel
    // takes a zero key for the former, `[NVM Express 2.0 §7.3]`.
    if let (Change::Register { old: Key(0), new: new @ Key(1..), ignore: true }, Ok(code)) = (command, &result)
        && kernel::ended(*code) == Ended::Conflict
    {
        result = repeat(device, Change::Register { old: Key(u64::MAX), new, ignore: true });
    }
    match result.map(kernel::ended) {
        Ok(Ended::Good) => Reply::status(status::GOOD),
        Ok(Ended::Conflict) => Reply::status(status::RESERVATION_CONFLICT),
        Ok(Ended::Check(sense)) => Reply::check(sense),
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

fn repeat(device: BorrowedFd<'_>, change: Change) -> io::Result<i32> {
    kernel::past_attentions(|| sg_io::pr_out(device, &change))
}

/// The kernel's command for a SCSI one, or what is wrong with it.
fn translate(cdb: &Cdb, list: &[u8]) -> Result<Change, Sense> {
    let action = cdb.action().ok_or(Sense::INVALID_FIELD_IN_CDB)?;
    if matches!(action, Action::RegisterAndMove | Action::ReplaceLost) {
        return Err(Sense::INVALID_FIELD_IN_CDB);
    }
    let p = Parameters::decode(list).ok_or(Sense::PARAMETER_LIST_LENGTH)?;
    if !p.initiators.is_empty() || p.all_target_ports {
        return Err(Sense::INVALID_FIELD_IN_PARAMETER_LIST);
    }
    let (key, other) = (p.key, p.action_key);
    let kind = || {
        let (scope, code) = (cdb.scope_type() >> 4, cdb.scope_type() & 0x0f);
        Kind::from_code(code).filter(|_| scope == 0).ok_or(Sense::INVALID_FIELD_IN_CDB)
    };
    Ok(match action {
        Action::Register => Change::Register { old: key, new: other, ignore: false },
        Action::RegisterAndIgnore => Change::Register { old: Key(0), new: other, ignore: true },
        Action::Reserve => Change::Reserve { key, kind: kind()? },
        Action::Release => Change::Release { key, kind: kind()? },
        Action::Clear => Change::Clear { key },
        Action::Preempt => Change::Preempt { key, victim: other, kind: kind()?, abort: false },
        Action::PreemptAndAbort => Change::Preempt { key, victim: other, kind: kind()?, abort: true },
        _ => return Err(Sense::INVALID_FIELD_IN_CDB),
    })
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
    let found = match sg_io::pr_read_reservation(device) {
        Ok(found) => found,
        Err(_) => {
            let report = report(device, namespace, timeout)?;
            let key = report.registrants.iter().find(|r| r.holds).map_or(0, |r| r.key.0);
            ReadReservation { key, generation: report.generation, kind: u32::from(report.kind) }
        }
    };
    Ok(Data::Reservation { generation: found.generation, holder: kernel::holder(found.key, found.kind) })
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

    fn command(command: &Command) -> Result<Change, Sense> {
        let (cdb, list) = command.encode().unwrap();
        translate(&cdb, &list)
    }

    #[test]
    fn commands() {
        let (key, victim, kind) = (Key(1), Key(2), Kind::WriteExclusiveRegistrantsOnly);
        assert_eq!(command(&Command::Reserve { key, kind }), Ok(Change::Reserve { key, kind }));
        assert_eq!(
            command(&Command::Preempt { key, victim, kind, abort: true }),
            Ok(Change::Preempt { key, victim, kind, abort: true })
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
