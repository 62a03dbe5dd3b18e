//! Commands about persistent reservations. What a device is asked runs beside the control task, so that a device or a
//! helper that hangs delays nobody but the monitor that asked.

use super::Control;
use block::driver::LocalFuture;
use block::reservation::{Outcome, Route};
use ipc::scsi::{self, Action, Capabilities, Command, Data, Key, Kind, RegisterOptions};
use qapi::types::reservation::*;
use qapi::{Error, Result};
use std::fmt::Write;

fn scsi_kind(kind: PrType) -> Kind {
    match kind {
        PrType::WriteExclusive => Kind::WriteExclusive,
        PrType::ExclusiveAccess => Kind::ExclusiveAccess,
        PrType::WriteExclusiveRegistrantsOnly => Kind::WriteExclusiveRegistrantsOnly,
        PrType::ExclusiveAccessRegistrantsOnly => Kind::ExclusiveAccessRegistrantsOnly,
        PrType::WriteExclusiveAllRegistrants => Kind::WriteExclusiveAllRegistrants,
        PrType::ExclusiveAccessAllRegistrants => Kind::ExclusiveAccessAllRegistrants,
    }
}

fn shown_kind(kind: Kind) -> PrType {
    match kind {
        Kind::WriteExclusive => PrType::WriteExclusive,
        Kind::ExclusiveAccess => PrType::ExclusiveAccess,
        Kind::WriteExclusiveRegistrantsOnly => PrType::WriteExclusiveRegistrantsOnly,
        Kind::ExclusiveAccessRegistrantsOnly => PrType::ExclusiveAccessRegistrantsOnly,
        Kind::WriteExclusiveAllRegistrants => PrType::WriteExclusiveAllRegistrants,
        Kind::ExclusiveAccessAllRegistrants => PrType::ExclusiveAccessAllRegistrants,
    }
}

/// The bit of PERSISTENT RESERVATION TYPE MASK. `[SPC-4 §6.15.4]`
fn mask(kind: Kind) -> u16 {
    match kind {
        Kind::WriteExclusive => 0x0200,
        Kind::ExclusiveAccess => 0x0800,
        Kind::WriteExclusiveRegistrantsOnly => 0x2000,
        Kind::ExclusiveAccessRegistrantsOnly => 0x4000,
        Kind::WriteExclusiveAllRegistrants => 0x8000,
        Kind::ExclusiveAccessAllRegistrants => 0x0001,
    }
}

impl Control {
    /// A manager has connected, or lost its helper.
    pub(super) fn pr_manager_status(&mut self, id: String, connected: bool) {
        // A message of one that has been deleted since.
        if self.objects.pr_managers().any(|(name, _)| name == id) {
            self.events.emit(&PrManagerStatusChanged { id, connected });
        }
    }

    pub(super) async fn query_pr_managers(&mut self, _: QueryPrManagers) -> Result<Vec<PrManagerInfo>> {
        let info = |(id, manager): (&str, &crate::pr_manager::PrManager)| PrManagerInfo {
            id: id.to_owned(),
            connected: manager.is_connected(),
        };
        Ok(self.objects.pr_managers().map(info).collect())
    }

    pub(super) fn x_block_pr_in(&mut self, args: XBlockPrIn) -> Result<LocalFuture<'static, Result<PrState>>> {
        let command = match args.action {
            PrInAction::ReadKeys => Command::ReadKeys,
            PrInAction::ReadReservation => Command::ReadReservation,
            PrInAction::ReportCapabilities => Command::ReportCapabilities,
            PrInAction::ReadFullStatus => Command::ReadFullStatus,
        };
        let asked = self.ask(args.node_name, command)?;
        Ok(Box::pin(async move {
            let (route, data) = asked.await?;
            Ok(PrState { route, state: shown(data)? })
        }))
    }

    pub(super) fn x_block_pr_out(&mut self, args: XBlockPrOut) -> Result<LocalFuture<'static, Result<PrDone>>> {
        let asked = self.ask(args.node_name, command(args.change)?)?;
        Ok(Box::pin(async move { asked.await.map(|(route, _)| PrDone { route }) }))
    }

    /// Has a node's medium carry out a command. The node lives until it has.
    fn ask(&self, name: String, command: Command) -> Result<LocalFuture<'static, Result<(PrRoute, Data)>>> {
        let node = self.graph.find(None, Some(&name))?;
        Ok(Box::pin(async move {
            let action = command.action();
            let Outcome { route, result } = node.reserve(command).await;
            let route = route.map(|route| match route {
                Route::Kernel => PrRoute::Kernel,
                Route::Helper => PrRoute::Helper,
            });
            match (route, result) {
                (Some(route), Ok(data)) => Ok((route, data)),
                (route, Err(problem)) => {
                    let way = route.map(|route| format!(" through the {route}")).unwrap_or_default();
                    Err(Error::generic(format!("{}{way} failed on node '{name}': {problem}", spoken(action))))
                }
                (None, Ok(_)) => Err(Error::generic(format!("{} was not done on node '{name}'", spoken(action)))),
            }
        }))
    }
}

/// The name of an action as the standard writes it.
fn spoken(action: Action) -> String {
    action.name().replace('-', " ").to_uppercase()
}

fn command(change: PrChange) -> Result<Command> {
    let options = |persist, all_target_ports| RegisterOptions { persist, all_target_ports };
    Ok(match change {
        PrChange::Register(args) => {
            let mut initiators = Vec::new();
            for id in args.initiators.unwrap_or_default() {
                initiators.extend(bytes("initiators", &id)?);
            }
            Command::Register {
                key: Key(args.key),
                new_key: Key(args.new_key),
                options: options(args.persist, args.all_target_ports),
                initiators,
            }
        }
        PrChange::RegisterAndIgnore(args) => Command::RegisterAndIgnore {
            new_key: Key(args.new_key),
            options: options(args.persist, args.all_target_ports),
        },
        PrChange::Reserve(args) => Command::Reserve { key: Key(args.key), kind: scsi_kind(args.kind) },
        PrChange::Release(args) => Command::Release { key: Key(args.key), kind: scsi_kind(args.kind) },
        PrChange::Clear(args) => Command::Clear { key: Key(args.key) },
        PrChange::Preempt(args) => preempt(&args, false),
        PrChange::PreemptAndAbort(args) => preempt(&args, true),
        PrChange::RegisterAndMove(args) => Command::RegisterAndMove {
            key: Key(args.key),
            new_key: Key(args.new_key),
            unregister: args.unregister,
            persist: args.persist,
            target_port: args.target_port,
            initiator: bytes("initiator", &args.initiator)?,
        },
        PrChange::ReplaceLostReservation(args) => {
            Command::ReplaceLost { new_key: Key(args.new_key), kind: scsi_kind(args.kind), persist: args.persist }
        }
    })
}

fn preempt(args: &PrPreempt, abort: bool) -> Command {
    Command::Preempt { key: Key(args.key), victim: Key(args.victim), kind: scsi_kind(args.kind), abort }
}

/// The bytes of a TransportID.
fn bytes(parameter: &str, digits: &str) -> Result<Vec<u8>> {
    let byte = |pair: &[u8]| {
        let pair = std::str::from_utf8(pair).ok().filter(|pair| pair.len() == 2 && !pair.starts_with('+'))?;
        u8::from_str_radix(pair, 16).ok()
    };
    let all: Option<Vec<u8>> = digits.as_bytes().chunks(2).map(byte).collect();
    // The shortest has 24 bytes; each is a multiple of four. `[SPC-4 §7.6.4.1]`
    let id = all.filter(|id| id.len() >= 24 && id.len().is_multiple_of(4));
    id.ok_or_else(|| Error::generic(format!("Parameter '{parameter}' expects a TransportID in hexadecimal digits")))
}

fn digits(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // To write into a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn shown(data: Data) -> Result<PrStateVariant> {
    Ok(match data {
        Data::Keys { generation, keys, total } => {
            PrStateVariant::ReadKeys(PrKeys { generation, keys: keys.into_iter().map(|key| key.0).collect(), total })
        }
        Data::Reservation { generation, holder } => {
            let holder = holder.map(|holder| PrHolder { key: holder.key.0, kind: shown_kind(holder.kind) });
            PrStateVariant::ReadReservation(PrReservation { generation, holder })
        }
        Data::Capabilities(capabilities) => PrStateVariant::ReportCapabilities(shown_capabilities(&capabilities)),
        Data::FullStatus { generation, registrants, truncated } => {
            let registrations = registrants.into_iter().map(|registrant| PrRegistration {
                key: registrant.key.0,
                all_target_ports: registrant.all_target_ports,
                target_port: registrant.target_port,
                kind: registrant.holds.map(|(_, kind)| shown_kind(kind)),
                initiator: scsi::port_name(&registrant.initiator),
                transport_id: digits(&registrant.initiator),
            });
            PrStateVariant::ReadFullStatus(PrFullStatus {
                generation,
                registrations: registrations.collect(),
                truncated,
            })
        }
        Data::None => return Err(Error::generic("the answer has no data")),
    })
}

fn shown_capabilities(capabilities: &Capabilities) -> PrCapabilities {
    let types = capabilities
        .types
        .map(|able| Kind::ALL.into_iter().filter(|&kind| able & mask(kind) != 0).map(shown_kind).collect());
    PrCapabilities {
        replace_lost_reservation: capabilities.replace_lost,
        compatible_reservations: capabilities.compatible_reservations,
        initiators: capabilities.specify_initiators,
        all_target_ports: capabilities.all_target_ports,
        persist: capabilities.persist,
        persist_active: capabilities.persist_active,
        allow_commands: capabilities.allow_commands,
        types,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transport_ids() {
        let id = "06".to_owned() + &"00".repeat(22) + "fF";
        let got = bytes("initiator", &id).unwrap();
        assert_eq!((got.len(), got[0], got[23]), (24, 6, 0xff));
        assert_eq!(digits(&got), id.to_lowercase());
        for wrong in ["", "0", "06", &id[1..], &id.replace('6', "x"), &id.replace("06", "+6"), &id.replace("06", "é")]
        {
            let text = bytes("initiator", wrong).unwrap_err().to_string();
            assert_eq!(text, "Parameter 'initiator' expects a TransportID in hexadecimal digits", "{wrong}");
        }
    }

    #[test]
    fn types_go_both_ways() {
        for kind in Kind::ALL {
            assert_eq!(scsi_kind(shown_kind(kind)), kind);
        }
        let capabilities = Capabilities { types: Some(0xea01), persist: true, ..Capabilities::default() };
        let shown = shown_capabilities(&capabilities);
        assert!(shown.persist && !shown.persist_active);
        assert_eq!(shown.types.unwrap(), PrType::ALL);
        assert_eq!(shown_capabilities(&Capabilities::default()).types, None);
    }
}
