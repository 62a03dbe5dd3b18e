//! Persistent reservations of a device: by the kernel where the node's descriptor is enough, else by the manager that the
//! node names.
//!
//! The kernel is asked first: it needs no privilege since Linux 6.5. It is asked only for what it does exactly as the
//! command says; where it refuses to try, nothing has been done and the manager is asked. `[SPC-4 §6.15]`, `[SPC-4 §6.16]`

use super::{FileDriver, Medium, Writing};
use block::Errno;
use block::driver::LocalFuture;
use block::reservation::{Outcome, Problem, Reservations, Route};
use io::{Access, File, PrOut};
use ipc::frame::Failure;
use ipc::scsi::{Action, Command, Data, Holder, Key, Kind, Sense, status};
use std::io as std_io;
use std::sync::Arc;

/// The most keys that one answer carries, as with SCSI's allocation length of 8192 bytes.
const MAX_KEYS: u16 = 1023;

/// `enum pr_type` and SCSI's type.
const KINDS: [(u32, Kind); 6] = [
    (1, Kind::WriteExclusive),
    (2, Kind::ExclusiveAccess),
    (3, Kind::WriteExclusiveRegistrantsOnly),
    (4, Kind::ExclusiveAccessRegistrantsOnly),
    (5, Kind::WriteExclusiveAllRegistrants),
    (6, Kind::ExclusiveAccessAllRegistrants),
];

fn pr_type(kind: Kind) -> u32 {
    KINDS.iter().find(|row| row.1 == kind).map_or(0, |row| row.0)
}

impl Reservations for FileDriver {
    fn execute<'a>(&'a self, command: Command) -> LocalFuture<'a, Outcome> {
        Box::pin(self.reserve(command))
    }
}

impl FileDriver {
    async fn reserve(&self, command: Command) -> Outcome {
        let file = match self.device_for(command.action()).await {
            Ok(file) => file,
            Err(problem) => return Outcome::nowhere(problem),
        };
        if matches!(self.medium, Medium::Block(_))
            && let Some(result) = by_kernel(&file, &command).await
        {
            return Outcome { route: Some(Route::Kernel), result };
        }
        let Some(manager) = &self.manager else {
            let reason = format!("the kernel does not do it on '{}', and the node has no pr-manager", self.filename);
            return Outcome::nowhere(Problem::new(Sense::INVALID_OPCODE, reason));
        };
        let device = match file.share() {
            Ok(device) => device,
            Err(e) => return Outcome::nowhere(Problem::new(Sense::COMMUNICATION_FAILURE, qapi::error::errno_text(&e))),
        };
        Outcome { route: Some(Route::Helper), result: manager.execute(device, command).await }
    }

    /// The file, open for writing if the command changes something and the node may write.
    async fn device_for(&self, action: Action) -> Result<Arc<File>, Problem> {
        let file = self.file().map_err(|_| Problem::new(Sense::NO_MEDIUM, format!("'{}' is closed", self.filename)))?;
        let settings = self.settings();
        if !action.is_out() || settings.writing != Writing::WhenNeeded || file.access() == Access::ReadWrite {
            return Ok(file);
        }
        // No user writes at the moment. Reservations are the device's, not the image's: they need no lock.
        let again = self.open_again(&file, Access::ReadWrite, settings.direct).await;
        again.map_err(|error| Problem::new(Sense::INVALID_OPCODE, error.to_string()))
    }
}

/// What the kernel says to a command; none if it cannot or may not do it, in which case nothing has been done.
async fn by_kernel(file: &File, command: &Command) -> Option<Result<Data, Problem>> {
    match command {
        // Whatever is in the way of a read, the helper may know better. Older kernels say EINVAL on SCSI disks.
        Command::ReadKeys => file.pr_read_keys(MAX_KEYS).await.ok().map(|(generation, total, keys)| {
            Ok(Data::Keys { generation, keys: keys.into_iter().map(Key).collect(), total })
        }),
        Command::ReadReservation => file.pr_read_reservation().await.ok().map(|found| {
            let kind = KINDS.iter().find(|row| row.0 == found.kind).map(|row| row.1);
            let holder = kind.map(|kind| {
                // Of these types all registrants are holders, `[SPC-4 §6.15.3.2]`.
                let all = matches!(kind, Kind::WriteExclusiveAllRegistrants | Kind::ExclusiveAccessAllRegistrants);
                Holder { key: Key(if all { 0 } else { found.key }), scope: 0, kind }
            });
            Ok(Data::Reservation { generation: found.generation, holder })
        }),
        _ => tried(file.pr_out(change(command)?).await),
    }
}

/// The kernel's form of a command that changes something; none where it would do something else.
fn change(command: &Command) -> Option<PrOut> {
    Some(match command {
        // The kernel always asks for persistence through power loss.
        Command::Register { key, new_key, options, initiators }
            if options.persist && !options.all_target_ports && initiators.is_empty() =>
        {
            PrOut::Register { old: key.0, new: new_key.0, ignore: false }
        }
        Command::RegisterAndIgnore { new_key, options } if options.persist && !options.all_target_ports => {
            PrOut::Register { old: 0, new: new_key.0, ignore: true }
        }
        Command::Reserve { key, kind } => PrOut::Reserve { key: key.0, kind: pr_type(*kind) },
        Command::Release { key, kind } => PrOut::Release { key: key.0, kind: pr_type(*kind) },
        Command::Preempt { key, victim, kind, abort } => {
            PrOut::Preempt { key: key.0, victim: victim.0, kind: pr_type(*kind), abort: *abort }
        }
        Command::Clear { key } => PrOut::Clear { key: key.0 },
        _ => return None,
    })
}

/// What came of a change; none if it was not tried.
fn tried(result: std_io::Result<i32>) -> Option<Result<Data, Problem>> {
    let error = match result {
        Ok(code) => return Some(kernel_status(code)),
        Err(error) => error,
    };
    let sense = match error.raw_os_error().map(Errno::from_raw) {
        // Not allowed here, not known to the kernel, not possible on this device; EAGAIN: no thread to call from.
        Some(Errno::EPERM | Errno::EACCES | Errno::ENOTTY | Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EAGAIN) => {
            return None;
        }
        Some(Errno::EINVAL) => Sense::INVALID_FIELD_IN_CDB,
        Some(Errno::EBADE) => return Some(Err(conflict())),
        Some(Errno::ENODEV | Errno::ENXIO) => Sense::NOT_RESPONDING,
        Some(Errno::ENOMEDIUM) => Sense::NO_MEDIUM,
        _ => Sense::COMMUNICATION_FAILURE,
    };
    Some(Err(Problem::new(sense, qapi::error::errno_text(&error))))
}

fn conflict() -> Problem {
    Failure { status: status::RESERVATION_CONFLICT, sense: Vec::new() }.into()
}

/// `enum pr_status`, and the NVMe status codes that kernels before 6.4 passed on.
fn kernel_status(code: i32) -> Result<Data, Problem> {
    let sense = match code {
        0 => return Ok(Data::None),
        // Reservation conflict: SCSI's, and NVMe's 83h with or without "do not retry".
        0x18 | 0x83 | 0x4083 => return Err(conflict()),
        // Invalid opcode, invalid field: NVMe's.
        0x01 | 0x4001 => Sense::INVALID_OPCODE,
        0x4002 => Sense::INVALID_FIELD_IN_CDB,
        // PR_STS_RETRY_PATH_FAILURE, PR_STS_PATH_FAST_FAILED, PR_STS_PATH_FAILED.
        0x000e_0000 | 0x000f_0000 | 0x0001_0000 => Sense::NOT_RESPONDING,
        _ => Sense::COMMUNICATION_FAILURE,
    };
    Err(Problem::new(sense, format!("the kernel's status is {code:#x}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ipc::scsi::RegisterOptions;

    #[test]
    fn the_kernel_gets_what_it_does_exactly() {
        let (key, new_key) = (Key(1), Key(2));
        let register = |persist, all_target_ports, initiators| {
            let options = RegisterOptions { persist, all_target_ports };
            change(&Command::Register { key, new_key, options, initiators })
        };
        assert_eq!(register(true, false, vec![]), Some(PrOut::Register { old: 1, new: 2, ignore: false }));
        assert_eq!(register(false, false, vec![]), None);
        assert_eq!(register(true, true, vec![]), None);
        assert_eq!(register(true, false, vec![0; 24]), None);
        let kind = Kind::ExclusiveAccessAllRegistrants;
        assert_eq!(change(&Command::ReplaceLost { new_key, kind, persist: true }), None);
        assert_eq!(
            change(&Command::Preempt { key, victim: new_key, kind, abort: false }),
            Some(PrOut::Preempt { key: 1, victim: 2, kind: 6, abort: false })
        );
        assert_eq!(change(&Command::ReadKeys), None);
    }

    #[test]
    fn what_the_kernel_did_not_try_goes_on() {
        let tried = |errno: Errno| super::tried(Err(errno.into()));
        for errno in [Errno::EPERM, Errno::ENOTTY, Errno::EOPNOTSUPP] {
            assert_eq!(tried(errno), None, "{errno}");
        }
        assert_eq!(tried(Errno::EINVAL).unwrap().unwrap_err().failure.sense(), Some(Sense::INVALID_FIELD_IN_CDB));
        assert_eq!(super::tried(Ok(0x18)), Some(Err(conflict())));
        assert_eq!(super::tried(Ok(0)), Some(Ok(Data::None)));
    }
}
