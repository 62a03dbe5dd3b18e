//! Persistent reservations: the managers that carry out commands, and the commands themselves. `[SPC-4 §5.9]`

use crate::Qapi;

/// A manager of persistent reservations.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(name = "PRManagerInfo", since = "3.0")]
pub struct PrManagerInfo {
    /// The name of the object.
    pub id: String,
    /// Whether it is connected to its helper.
    pub connected: bool,
}

/// Lists the managers of persistent reservations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Qapi)]
#[qapi(command = "query-pr-managers", returns = "Vec<PrManagerInfo>", since = "3.0")]
pub struct QueryPrManagers;

/// A manager of persistent reservations has connected to its helper, or has lost it.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(event = "PR_MANAGER_STATUS_CHANGED", since = "3.0")]
pub struct PrManagerStatusChanged {
    /// The name of the object.
    pub id: String,
    /// Whether it is connected now.
    pub connected: bool,
}

/// Which way a command about persistent reservations went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Qapi)]
pub enum PrRoute {
    /// The kernel did it on the node's own descriptor.
    Kernel,
    /// The node's `pr-manager` had its helper do it.
    Helper,
}

/// The type of a persistent reservation. Its scope is always the logical unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Qapi)]
pub enum PrType {
    /// The holder alone may write.
    WriteExclusive,
    /// The holder alone may read and write.
    ExclusiveAccess,
    /// All who are registered may write; one of them holds the reservation.
    WriteExclusiveRegistrantsOnly,
    /// All who are registered may read and write; one of them holds the reservation.
    ExclusiveAccessRegistrantsOnly,
    /// All who are registered may write, and hold the reservation together.
    WriteExclusiveAllRegistrants,
    /// All who are registered may read and write, and hold the reservation together.
    ExclusiveAccessAllRegistrants,
}

/// Reads the state of a device's persistent reservations (PERSISTENT RESERVE IN). Other commands are carried out
/// meanwhile, however long the device takes. Fails with the SCSI status or sense if the device refuses.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "x-block-pr-in", returns = "PrState", since = "11.0", unstable)]
pub struct XBlockPrIn {
    /// The node: a `host_device` or `file`, or a `raw` that shows all of one.
    pub node_name: String,
    /// What to read.
    pub action: PrInAction,
}

/// What a device says about its persistent reservations.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct PrState {
    /// Which way the command went.
    pub route: PrRoute,
    /// What was read.
    #[qapi(variants, tag = "action")]
    pub state: PrStateVariant,
}

/// What can be read.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(variants, tag_enum = "PrInAction")]
pub enum PrStateVariant {
    /// The registered keys.
    ReadKeys(PrKeys),
    /// The reservation and its holder.
    ReadReservation(PrReservation),
    /// What the device can do.
    ReportCapabilities(PrCapabilities),
    /// All registrations, with the ports that they are for.
    ReadFullStatus(PrFullStatus),
}

/// The registered keys.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct PrKeys {
    /// Counts the changes of registrations.
    pub generation: u32,
    /// The keys, one for each registration, as far as one answer holds them.
    pub keys: Vec<u64>,
    /// How many there are on the device.
    pub total: u32,
}

/// The reservation.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct PrReservation {
    /// Counts the changes of registrations.
    pub generation: u32,
    /// The holder; left out if there is no reservation.
    pub holder: Option<PrHolder>,
}

/// Who holds a reservation.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct PrHolder {
    /// Its key; 0 where all registrants hold the reservation.
    pub key: u64,
    /// The type of the reservation.
    #[qapi(rename = "type")]
    pub kind: PrType,
}

/// What a device can do about persistent reservations.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct PrCapabilities {
    /// The action `replace-lost-reservation`.
    pub replace_lost_reservation: bool,
    /// The older commands RESERVE and RELEASE next to persistent reservations.
    pub compatible_reservations: bool,
    /// Registration of other initiator ports.
    pub initiators: bool,
    /// Registration for all target ports at once.
    pub all_target_ports: bool,
    /// Registrations and reservation can survive a power loss.
    pub persist: bool,
    /// They do so now.
    pub persist_active: bool,
    /// Which other commands are let through, as the ALLOW COMMANDS field of SPC-4 has it, 0 to 7.
    pub allow_commands: u8,
    /// The types of reservations; left out if the device does not tell.
    pub types: Option<Vec<PrType>>,
}

/// All registrations.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct PrFullStatus {
    /// Counts the changes of registrations.
    pub generation: u32,
    /// The registrations, as far as one answer holds them.
    pub registrations: Vec<PrRegistration>,
    /// The device has more.
    pub truncated: bool,
}

/// A registration.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct PrRegistration {
    /// Its key.
    pub key: u64,
    /// It is for all target ports.
    pub all_target_ports: bool,
    /// The relative identifier of the target port.
    pub target_port: u16,
    /// The type of the reservation, if this registration holds it.
    #[qapi(rename = "type")]
    pub kind: Option<PrType>,
    /// The name of the initiator port, for people: `iqn...`, `fc:...`, `sas:...`; left out for other protocols.
    pub initiator: Option<String>,
    /// The initiator port's TransportID in hexadecimal digits, as the commands that name ports take it.
    pub transport_id: String,
}

/// Changes a device's persistent reservations (PERSISTENT RESERVE OUT). The node must not be read-only. Other commands are
/// carried out meanwhile, however long the device takes. Fails with the SCSI status or sense if the device refuses.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(command = "x-block-pr-out", returns = "PrDone", since = "11.0", unstable)]
pub struct XBlockPrOut {
    /// The node: a `host_device` or `file`, or a `raw` that shows all of one.
    pub node_name: String,
    /// What to do.
    #[qapi(variants, tag = "action")]
    pub change: PrChange,
}

/// A command that was carried out.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct PrDone {
    /// Which way it went.
    pub route: PrRoute,
}

/// What can be done.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
#[qapi(variants, tag_enum = "PrOutAction")]
pub enum PrChange {
    /// Registers, changes or removes the key of this host's port.
    Register(PrRegister),
    /// The same whatever the present key is.
    RegisterAndIgnore(PrRegisterAndIgnore),
    /// Takes the reservation.
    Reserve(PrReserve),
    /// Gives the reservation up.
    Release(PrReserve),
    /// Removes the reservation and all registrations.
    Clear(PrClear),
    /// Removes the registrations with another key, and takes the reservation if one of them held it.
    Preempt(PrPreempt),
    /// The same, and aborts their commands.
    PreemptAndAbort(PrPreempt),
    /// Registers another initiator port and hands the reservation over to it. Goes through the helper alone.
    RegisterAndMove(PrRegisterAndMove),
    /// Begins anew after the device has lost its reservations. Goes through the helper alone.
    ReplaceLostReservation(PrReplaceLost),
}

/// A registration.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct PrRegister {
    /// The present key; 0 if there is none.
    #[qapi(default)]
    pub key: u64,
    /// The key from now on; 0 removes the registration.
    pub new_key: u64,
    /// Survive a power loss. The kernel does nothing else, so that false goes through the helper.
    #[qapi(default = true)]
    pub persist: bool,
    /// Register for all target ports at once. Goes through the helper alone.
    #[qapi(default)]
    pub all_target_ports: bool,
    /// TransportIDs, in hexadecimal digits, of other initiator ports to register. Goes through the helper alone.
    pub initiators: Option<Vec<String>>,
}

/// A registration that replaces any other of the same port.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct PrRegisterAndIgnore {
    /// The key from now on; 0 removes the registration.
    pub new_key: u64,
    /// Survive a power loss. The kernel does nothing else, so that false goes through the helper.
    #[qapi(default = true)]
    pub persist: bool,
    /// Register for all target ports at once. Goes through the helper alone.
    #[qapi(default)]
    pub all_target_ports: bool,
}

/// A reservation to take or to give up.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct PrReserve {
    /// The key that this host's port is registered with.
    pub key: u64,
    /// The type of the reservation.
    #[qapi(rename = "type")]
    pub kind: PrType,
}

/// Registrations to remove.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct PrClear {
    /// The key that this host's port is registered with.
    pub key: u64,
}

/// A key to remove.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct PrPreempt {
    /// The key that this host's port is registered with.
    pub key: u64,
    /// The key to remove.
    pub victim: u64,
    /// The type of the reservation that is taken.
    #[qapi(rename = "type")]
    pub kind: PrType,
}

/// A reservation to hand over.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct PrRegisterAndMove {
    /// The key that this host's port is registered with.
    pub key: u64,
    /// The key to register the other port with.
    pub new_key: u64,
    /// Remove this host's registration.
    #[qapi(default)]
    pub unregister: bool,
    /// Survive a power loss.
    #[qapi(default = true)]
    pub persist: bool,
    /// The relative identifier of the target port.
    pub target_port: u16,
    /// The TransportID of the other initiator port, in hexadecimal digits.
    pub initiator: String,
}

/// A reservation to make anew.
#[derive(Debug, Clone, PartialEq, Eq, Qapi)]
pub struct PrReplaceLost {
    /// The key to register.
    pub new_key: u64,
    /// The type of the reservation.
    #[qapi(rename = "type")]
    pub kind: PrType,
    /// Survive a power loss.
    #[qapi(default = true)]
    pub persist: bool,
}
