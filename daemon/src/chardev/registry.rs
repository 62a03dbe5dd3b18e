//! All character devices by name: making, changing, querying and removing them.
//!
//! To make a device can take long: a name is resolved, a host connected to, a pipe opened. So it goes on beside the control
//! task, with the name reserved meanwhile. The state is shared by what goes on, all on the main thread, and never
//! borrowed across an await.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use ::io::FdSets;
use block::driver::LocalFuture;
use qapi::types::chardev::{
    ChardevBackend, ChardevBackendKind, ChardevBackendVariant, ChardevCommon, ChardevInfo, ChardevReturn,
};
use qapi::types::sockets::SocketAddress;
use qapi::{Error, Result};

use super::hub::{Hub, MAX_DEVICES};
use super::log::Log;
use super::mux::Mux;
use super::permanent::Permanent;
use super::pty::Pty;
use super::ringbuf::{Ring, RingClient};
use super::socket::Socket;
use super::{ChardevPort, Common, Connection, Source, files, stdio, udp};

/// All character devices.
pub struct Chardevs {
    shared: Rc<Shared>,
}

struct Shared {
    devices: RefCell<BTreeMap<String, Device>>,
    /// The process has left its terminal.
    background: Cell<bool>,
    fdsets: FdSets,
    /// Ends the daemon.
    quit: Rc<dyn Fn()>,
}

struct Device {
    kind: ChardevBackendKind,
    common: Common,
    /// Of a socket.
    address: Option<SocketAddress>,
    /// Of a ring buffer.
    ring: Option<Rc<Ring>>,
    state: State,
}

enum State {
    /// It is being made, or changed.
    Opening,
    /// Nothing uses it.
    Free(ChardevPort),
    /// A monitor talks on it.
    Taken,
    /// A multiplexer or a hub has it, which may be used itself.
    Lent(Rc<Cell<bool>>),
    /// A multiplexer, with any number of users.
    Mux(Rc<Mux>),
}

/// The properties of a socket in the tree of objects.
pub struct SocketProperties {
    /// Where it listens or connects to.
    pub address: SocketAddress,
    /// Whether it has a client.
    pub connected: bool,
}

fn common_of(backend: &ChardevBackend) -> &ChardevCommon {
    match &backend.kind {
        ChardevBackendVariant::File(wrapper) => &wrapper.data.common,
        ChardevBackendVariant::Serial(wrapper)
        | ChardevBackendVariant::Parallel(wrapper)
        | ChardevBackendVariant::Pipe(wrapper) => &wrapper.data.common,
        ChardevBackendVariant::Socket(wrapper) => &wrapper.data.common,
        ChardevBackendVariant::Udp(wrapper) => &wrapper.data.common,
        ChardevBackendVariant::Pty(wrapper) => &wrapper.data.common,
        ChardevBackendVariant::Null(wrapper) => &wrapper.data,
        ChardevBackendVariant::Mux(wrapper) => &wrapper.data.common,
        ChardevBackendVariant::Hub(wrapper) => &wrapper.data.common,
        ChardevBackendVariant::Stdio(wrapper) => &wrapper.data.common,
        ChardevBackendVariant::Ringbuf(wrapper) | ChardevBackendVariant::Memory(wrapper) => &wrapper.data.common,
    }
}

fn kind_of(backend: &ChardevBackend) -> ChardevBackendKind {
    match &backend.kind {
        ChardevBackendVariant::File(_) => ChardevBackendKind::File,
        ChardevBackendVariant::Serial(_) => ChardevBackendKind::Serial,
        ChardevBackendVariant::Parallel(_) => ChardevBackendKind::Parallel,
        ChardevBackendVariant::Pipe(_) => ChardevBackendKind::Pipe,
        ChardevBackendVariant::Socket(_) => ChardevBackendKind::Socket,
        ChardevBackendVariant::Udp(_) => ChardevBackendKind::Udp,
        ChardevBackendVariant::Pty(_) => ChardevBackendKind::Pty,
        ChardevBackendVariant::Null(_) => ChardevBackendKind::Null,
        ChardevBackendVariant::Mux(_) => ChardevBackendKind::Mux,
        ChardevBackendVariant::Hub(_) => ChardevBackendKind::Hub,
        ChardevBackendVariant::Stdio(_) => ChardevBackendKind::Stdio,
        ChardevBackendVariant::Ringbuf(_) => ChardevBackendKind::Ringbuf,
        ChardevBackendVariant::Memory(_) => ChardevBackendKind::Memory,
    }
}

/// A name that nobody else can take. What stood under it before comes back unless the reservation is used.
struct Reservation {
    shared: Rc<Shared>,
    id: String,
    before: Option<Device>,
}

impl Reservation {
    fn new(shared: &Rc<Shared>, id: &str, kind: ChardevBackendKind, before: Option<Device>) -> Self {
        let device = Device { kind, common: Common::default(), address: None, ring: None, state: State::Opening };
        shared.devices.borrow_mut().insert(id.to_owned(), device);
        Self { shared: shared.clone(), id: id.to_owned(), before }
    }

    fn fill(mut self, device: Device) {
        drop(self.before.take());
        let place = self.shared.devices.borrow_mut().insert(self.id.clone(), device);
        drop(place);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut devices = self.shared.devices.borrow_mut();
        if devices.get(&self.id).is_some_and(|device| matches!(device.state, State::Opening)) {
            match self.before.take() {
                Some(device) => drop(devices.insert(std::mem::take(&mut self.id), device)),
                None => drop(devices.remove(&self.id)),
            }
        }
    }
}

impl Chardevs {
    /// No devices. `quit` is called when a client of a multiplexer asks for the end of the daemon.
    pub fn new(fdsets: FdSets, quit: impl Fn() + 'static) -> Self {
        let shared = Shared { devices: RefCell::default(), background: Cell::new(false), fdsets, quit: Rc::new(quit) };
        Self { shared: Rc::new(shared) }
    }

    /// The process is about to leave its terminal: no device can use the standard streams.
    pub fn go_to_background(&mut self) {
        self.shared.background.set(true);
    }

    /// Begins to make a device. One that is told to wait is made when its first client is there.
    ///
    /// # Errors
    /// The name is taken. What is returned: options contradict each other, or the system refuses.
    pub fn add(&self, id: &str, backend: ChardevBackend) -> Result<LocalFuture<'static, Result<ChardevReturn>>> {
        if self.shared.devices.borrow().contains_key(id) {
            return Err(Error::generic(format!(
                "attempt to add duplicate property '{id}' to object (type 'container')"
            )));
        }
        self.shared.check(&backend)?;
        let reservation = Reservation::new(&self.shared, id, kind_of(&backend), None);
        Ok(Box::pin(open(reservation, backend)))
    }

    /// Begins to replace a device that nothing uses by one of the same name. If that fails, the old one stays.
    ///
    /// # Errors
    /// As [`Chardevs::add`]; and there is no such device, or something uses it.
    pub fn change(&self, id: &str, backend: ChardevBackend) -> Result<LocalFuture<'static, Result<ChardevReturn>>> {
        match self.shared.devices.borrow().get(id).map(|device| (device.kind, &device.state)) {
            None => return Err(Error::generic(format!("Chardev '{id}' does not exist"))),
            Some((ChardevBackendKind::Mux | ChardevBackendKind::Hub, _)) => {
                return Err(Error::generic("For mux or hub device hotswap is not supported yet"));
            }
            Some((_, State::Free(_))) => {}
            Some((_, State::Opening)) => return Err(Error::generic(format!("Chardev '{id}' is busy"))),
            Some(_) => return Err(Error::generic("Chardev user does not support chardev hotswap")),
        }
        let before = self.shared.devices.borrow_mut().remove(id);
        let checked = self.shared.check(&backend);
        let kind = kind_of(&backend);
        // From here on the old device comes back by itself.
        let reservation = Reservation::new(&self.shared, id, kind, before);
        checked?;
        Ok(Box::pin(open(reservation, backend)))
    }

    /// Removes a device on which nothing talks.
    ///
    /// # Errors
    /// There is none of this name, or it is in use.
    pub fn remove(&self, id: &str) -> Result<()> {
        let mut devices = self.shared.devices.borrow_mut();
        let busy = match devices.get(id).map(|device| &device.state) {
            None => return Err(Error::generic(format!("Chardev '{id}' not found"))),
            Some(State::Free(_)) => false,
            Some(State::Mux(mux)) => mux.is_used(),
            Some(State::Opening | State::Taken | State::Lent(_)) => true,
        };
        if busy {
            return Err(Error::generic(format!("Chardev '{id}' is busy")));
        }
        let removed = devices.remove(id);
        // What it had from other devices is theirs again.
        let mut give_back = |id: &str, port| {
            if let Some(device) = devices.get_mut(id) {
                device.state = State::Free(port);
            }
        };
        match removed.map(|device| device.state) {
            Some(State::Mux(mux)) => {
                if let Some((id, port)) = mux.give_back() {
                    give_back(&id, port);
                }
            }
            Some(State::Free(ChardevPort(Source::Hub(hub)))) => {
                hub.into_devices().into_iter().for_each(|(id, port)| give_back(&id, port));
            }
            _ => {}
        }
        Ok(())
    }

    /// What `query-chardev` tells, by name.
    pub fn query(&self) -> Vec<ChardevInfo> {
        let info = |(id, device): (&String, &Device)| ChardevInfo {
            label: id.clone(),
            filename: device.common.label.get(),
            frontend_open: match &device.state {
                State::Opening | State::Free(_) => false,
                State::Taken => true,
                State::Lent(used) => used.get(),
                State::Mux(mux) => mux.is_used(),
            },
        };
        let devices = self.shared.devices.borrow();
        devices.iter().filter(|(_, device)| !matches!(device.state, State::Opening)).map(info).collect()
    }

    /// Whether there is a device of this name, or one is being made.
    pub fn contains(&self, id: &str) -> bool {
        self.shared.devices.borrow().contains_key(id)
    }

    /// The sort of a device, if it exists.
    pub fn type_of(&self, id: &str) -> Option<&'static str> {
        self.shared.devices.borrow().get(id).map(|device| device.kind.as_str())
    }

    /// Names and sorts of all devices.
    pub fn list(&self) -> Vec<(String, &'static str)> {
        self.shared.devices.borrow().iter().map(|(id, device)| (id.clone(), device.kind.as_str())).collect()
    }

    /// The properties of a socket, if it is one.
    pub fn socket(&self, id: &str) -> Option<SocketProperties> {
        let devices = self.shared.devices.borrow();
        let device = devices.get(id)?;
        let address = device.address.clone()?;
        Some(SocketProperties { address, connected: device.common.label.has_client.get() })
    }

    /// Writes to a ring buffer, as its user would.
    ///
    /// # Errors
    /// There is no such device, or it is of another sort.
    pub fn write_ring(&self, id: &str, bytes: &[u8]) -> Result<()> {
        self.ring(id, |ring, common| {
            ring.write(bytes);
            if let Some(log) = &common.log {
                log.write(bytes);
            }
        })
    }

    /// Takes the oldest bytes of a ring buffer, at most `count`.
    ///
    /// # Errors
    /// As [`Chardevs::write_ring`].
    pub fn read_ring(&self, id: &str, count: usize) -> Result<Vec<u8>> {
        self.ring(id, |ring, _| ring.read(count))
    }

    fn ring<T>(&self, id: &str, work: impl FnOnce(&Ring, &Common) -> T) -> Result<T> {
        let devices = self.shared.devices.borrow();
        let device = devices.get(id).ok_or_else(|| Error::generic(format!("Device '{id}' not found")))?;
        match &device.ring {
            Some(ring) => Ok(work(ring, &device.common)),
            None => Err(Error::generic(format!("{id} is not a ringbuf device"))),
        }
    }

    /// Hands the clients of a device to a monitor.
    ///
    /// # Errors
    /// There is no such device, or it has a monitor already.
    pub fn take_for_monitor(&self, id: &str) -> Result<ChardevPort> {
        let mut devices = self.shared.devices.borrow_mut();
        let device = devices.get_mut(id).ok_or_else(|| Error::generic(format!("chardev \"{id}\" not found")))?;
        if let State::Mux(mux) = &device.state {
            return Ok(ChardevPort(Source::Slot { slot: mux.add_user()?, oob: mux.offers_oob() }));
        }
        Ok(take(device, id, State::Taken)?.started())
    }
}

/// What is behind a device that nothing uses.
fn take(device: &mut Device, id: &str, state: State) -> Result<ChardevPort> {
    match std::mem::replace(&mut device.state, state) {
        State::Free(port) => Ok(port),
        other => {
            device.state = other;
            Err(Error::generic(format!("chardev '{id}' is already in use")))
        }
    }
}

impl Shared {
    /// What can be said before anything is opened.
    fn check(&self, backend: &ChardevBackend) -> Result<()> {
        if matches!(backend.kind, ChardevBackendVariant::Stdio(_)) {
            if self.background.get() {
                return Err(Error::generic("cannot use stdio with -daemonize"));
            }
            if self.devices.borrow().values().any(|device| device.kind == ChardevBackendKind::Stdio) {
                return Err(Error::generic("cannot use stdio by multiple character devices"));
            }
        }
        Ok(())
    }

    /// The device below a multiplexer.
    fn borrow_for_mux(&self, base: &str, used: &Rc<Cell<bool>>) -> Result<ChardevPort> {
        let mut devices = self.devices.borrow_mut();
        let found = devices.get_mut(base).filter(|device| !matches!(device.state, State::Opening));
        let device = found.ok_or_else(|| Error::generic(format!("mux: base chardev {base} not found")))?;
        if matches!(device.state, State::Mux(_)) {
            return Err(Error::generic(format!("mux: multiplexers can't be stacked, check chardev '{base}'")));
        }
        take(device, base, State::Lent(used.clone()))
    }

    /// The devices below a hub. All or none.
    fn borrow_for_hub(&self, id: &str, names: &[String], used: &Rc<Cell<bool>>) -> Result<Vec<(String, ChardevPort)>> {
        if names.is_empty() {
            return Err(Error::generic("hub: 'chardevs' list is not defined"));
        }
        if names.len() > MAX_DEVICES {
            return Err(Error::generic(format!("hub: too many uses of chardevs '{id}' (maximum is {MAX_DEVICES})")));
        }
        let mut devices = self.devices.borrow_mut();
        for (at, name) in names.iter().enumerate() {
            let found = devices.get(name).filter(|device| !matches!(device.state, State::Opening));
            let device = found.ok_or_else(|| Error::generic(format!("hub: chardev can't be found by id '{name}'")))?;
            if matches!(device.kind, ChardevBackendKind::Mux | ChardevBackendKind::Hub) {
                return Err(Error::generic(format!(
                    "hub: multiplexers and hub devices can't be stacked, check chardev '{name}', chardev should not be \
                     a hub device or have 'mux=on' enabled"
                )));
            }
            let again = names.get(..at).is_some_and(|before| before.contains(name));
            if again || !matches!(device.state, State::Free(_)) {
                return Err(Error::generic(format!("chardev '{name}' is already in use")));
            }
        }
        let mut taken = Vec::new();
        for name in names {
            if let Some(device) = devices.get_mut(name) {
                taken.push((name.clone(), take(device, name, State::Lent(used.clone()))?));
            }
        }
        Ok(taken)
    }
}

/// Makes the device and puts it into its place.
async fn open(reservation: Reservation, backend: ChardevBackend) -> Result<ChardevReturn> {
    let shared = reservation.shared.clone();
    let (id, kind) = (reservation.id.as_str(), kind_of(&backend));
    let log = Log::open(common_of(&backend), &shared.fdsets).await?;
    let common = Common { log: log.map(Rc::new), ..Common::default() };
    common.label.set(kind.as_str().to_owned());
    let (mut ring, mut address, mut pty) = (None, None, None);
    let used = Rc::new(Cell::new(false));
    let source = match &backend.kind {
        ChardevBackendVariant::File(wrapper) => {
            Source::Permanent(files::file(&wrapper.data, &shared.fdsets, &common).await?)
        }
        ChardevBackendVariant::Serial(wrapper) => {
            Source::Permanent(files::serial(&wrapper.data, &shared.fdsets, &common).await?)
        }
        ChardevBackendVariant::Parallel(wrapper) => {
            Source::Nobody(Some(files::parallel(&wrapper.data, &shared.fdsets).await?))
        }
        ChardevBackendVariant::Pipe(wrapper) => {
            Source::Permanent(files::pipe(&wrapper.data, &shared.fdsets, &common).await?)
        }
        ChardevBackendVariant::Socket(wrapper) => {
            let socket = Socket::open(id, &wrapper.data, &common).await?;
            address = Some(socket.address().clone());
            Source::Socket(socket)
        }
        ChardevBackendVariant::Udp(wrapper) => Source::Permanent(udp::open(&wrapper.data, &common).await?),
        ChardevBackendVariant::Pty(wrapper) => {
            let terminal = Pty::open(&wrapper.data, &common)?;
            pty = Some(terminal.name().to_owned());
            Source::Pty(terminal)
        }
        ChardevBackendVariant::Null(_) => Source::Nobody(None),
        ChardevBackendVariant::Stdio(wrapper) => Source::Stdio(Some(stdio::open(wrapper.data.signal, &common)?)),
        ChardevBackendVariant::Ringbuf(wrapper) | ChardevBackendVariant::Memory(wrapper) => {
            let made = Rc::new(Ring::new(wrapper.data.size)?);
            ring = Some(made.clone());
            let common = common.clone();
            Source::Ring(Permanent::new(move || Ok(Connection::plain(RingClient(made.clone()), &common))))
        }
        ChardevBackendVariant::Hub(wrapper) => {
            let devices = shared.borrow_for_hub(id, &wrapper.data.chardevs, &used)?;
            Source::Hub(Hub::new(common.clone(), devices, used))
        }
        ChardevBackendVariant::Mux(wrapper) => {
            let name = wrapper.data.chardev.clone();
            let base = (name.clone(), shared.borrow_for_mux(&name, &used)?);
            let mux = Mux::new(id, common.clone(), base, used, shared.quit.clone());
            reservation.fill(Device { kind, common, address, ring, state: State::Mux(Rc::new(mux)) });
            return Ok(ChardevReturn::default());
        }
    };
    reservation.fill(Device { kind, common, address, ring, state: State::Free(ChardevPort(source)) });
    Ok(ChardevReturn { pty })
}
