//! Persistent reservations of a device: by the kernel where the node's descriptor is enough, else by the manager that the
//! node names.
//!
//! The kernel is asked first: it needs no privilege since Linux 6.5. It is asked only for what it does exactly as the
//! command says; where it refuses to try, nothing has been done and the manager is asked. `[SPC-4 §6.15]`, `[SPC-4 §6.16]`

use super::{FileDriver, Medium, Writing};
use block::Errno;
use block::driver::LocalFuture;
use block::reservation::{Outcome, Problem, Reservations, Route};
use io::{Access, File};
use ipc::frame::Failure;
use ipc::kernel::{self, Change, Ended};
use ipc::scsi::{Action, Command, Data, Key, Sense, status};
use std::io as std_io;
use std::sync::Arc;

/// The most keys that one answer carries, as with SCSI's allocation length of 8192 bytes.
const MAX_KEYS: u16 = 1023;

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
            let holder = kernel::holder(found.key, found.kind);
            Ok(Data::Reservation { generation: found.generation, holder })
        }),
        _ => tried(file.pr_out(change(command)?).await),
    }
}

/// The kernel's form of a command that changes something; none where it would do something else.
fn change(command: &Command) -> Option<Change> {
    Some(match *command {
        // The kernel always asks for persistence through power loss.
        Command::Register { key, new_key, options, ref initiators }
            if options.persist && !options.all_target_ports && initiators.is_empty() =>
        {
            Change::Register { old: key, new: new_key, ignore: false }
        }
        Command::RegisterAndIgnore { new_key, options } if options.persist && !options.all_target_ports => {
            Change::Register { old: Key(0), new: new_key, ignore: true }
        }
        Command::Reserve { key, kind } => Change::Reserve { key, kind },
        Command::Release { key, kind } => Change::Release { key, kind },
        Command::Preempt { key, victim, kind, abort } => Change::Preempt { key, victim, kind, abort },
        Command::Clear { key } => Change::Clear { key },
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

fn kernel_status(code: i32) -> Result<Data, Problem> {
    match kernel::ended(code) {
        Ended::Good => Ok(Data::None),
        Ended::Conflict => Err(conflict()),
        Ended::Check(sense) => Err(Problem::new(sense, format!("the kernel's status is {code:#x}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ipc::scsi::{Kind, RegisterOptions};

    #[test]
    fn the_kernel_gets_what_it_does_exactly() {
        let (key, new_key) = (Key(1), Key(2));
        let register = |persist, all_target_ports, initiators| {
            let options = RegisterOptions { persist, all_target_ports };
            change(&Command::Register { key, new_key, options, initiators })
        };
        assert_eq!(register(true, false, vec![]), Some(Change::Register { old: key, new: new_key, ignore: false }));
        assert_eq!(register(false, false, vec![]), None);
        assert_eq!(register(true, true, vec![]), None);
        assert_eq!(register(true, false, vec![0; 24]), None);
        let kind = Kind::ExclusiveAccessAllRegistrants;
        assert_eq!(change(&Command::ReplaceLost { new_key, kind, persist: true }), None);
        assert_eq!(
            change(&Command::Preempt { key, victim: new_key, kind, abort: false }),
            Some(Change::Preempt { key, victim: new_key, kind, abort: false })
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
