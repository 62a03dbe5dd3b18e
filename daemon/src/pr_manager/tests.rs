//! The manager against helpers that misbehave. What real helpers do is in the interoperability tests.

use super::*;
use ipc::classic::{self, FEATURE_FRAMES};
use ipc::fds::{self, Passed};
use ipc::frame::{self, Failure, Hello, Message, Request, Response, Welcome};
use ipc::scsi::{Cdb, status};
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::sync::mpsc;
use tempfile::TempDir;

/// Far above anything that is expected: what takes longer hangs.
const HANGS: Duration = Duration::from_secs(60);

/// A manager, its folder and its reports.
struct Setup {
    folder: TempDir,
    manager: PrManager,
    reports: mpsc::Receiver<bool>,
}

fn limits() -> Limits {
    let retry = Duration::from_millis(1);
    Limits { patience: HANGS, answer: HANGS, message: HANGS, retry, longest_retry: retry }
}

impl Setup {
    fn new(limits: Limits) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (sender, reports) = mpsc::channel();
        let report = move |connected| {
            // A test that looks at no reports has ended.
            let _ = sender.send(connected);
        };
        let manager = PrManager::start("m", &folder.path().join("socket"), limits, Box::new(report)).unwrap();
        Self { folder, manager, reports }
    }

    fn listen(&self) -> UnixListener {
        let path = self.folder.path().join("socket");
        let _ = std::fs::remove_file(&path);
        UnixListener::bind(path).unwrap()
    }

    fn ask(&self, command: Command) -> Executed {
        self.manager.execute(std::fs::File::open("/dev/null").unwrap().into(), command)
    }

    fn reported(&self) -> bool {
        self.reports.recv_timeout(HANGS).unwrap()
    }
}

fn wait<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

/// What a problem says: its sense and its reason.
fn said(result: Result<Data, Problem>) -> (Option<Sense>, String) {
    let problem = result.unwrap_err();
    assert_eq!(problem.failure.status, status::CHECK_CONDITION);
    (problem.failure.sense(), problem.reason.unwrap_or_default())
}

fn reading(generation: u32) -> Result<Data, Problem> {
    Ok(Data::Reservation { generation, holder: None })
}

/// A helper's end of a connection.
struct Peer(UnixStream);

impl Peer {
    fn accept(listener: &UnixListener, features: u32) -> Self {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(HANGS)).unwrap();
        stream.write_all(&features.to_be_bytes()).unwrap();
        let mut wanted = [0; 4];
        stream.read_exact(&mut wanted).unwrap();
        assert_eq!(wanted, features.to_be_bytes());
        Self(stream)
    }

    /// A helper that speaks frames.
    fn frames(listener: &UnixListener, max_in_flight: u16) -> Self {
        let mut peer = Self::accept(listener, FEATURE_FRAMES);
        assert_eq!(peer.receive::<Hello>().0, Hello::OURS);
        peer.send(&Welcome { version: frame::VERSION, max_in_flight });
        peer
    }

    fn read(&self, buf: &mut [u8], passed: &mut Passed) {
        let mut done = 0;
        while done < buf.len() {
            let n = fds::receive(&self.0, &mut buf[done..], passed).unwrap();
            assert_ne!(n, 0, "the manager closed the connection");
            done += n;
        }
    }

    fn receive<T: Message>(&mut self) -> (T, Passed) {
        let (mut header, mut passed) = ([0; frame::HEADER], Passed::default());
        self.read(&mut header, &mut passed);
        let mut message = vec![0; frame::message_length(header).unwrap()];
        self.read(&mut message, &mut passed);
        (frame::decode(&message).unwrap(), passed)
    }

    fn request(&mut self) -> Request {
        let (request, mut passed) = self.receive();
        assert!(passed.take_one().is_some(), "{passed:?}");
        request
    }

    fn send<T: Message>(&mut self, message: &T) {
        self.0.write_all(&frame::encode(message).unwrap()).unwrap();
    }

    fn answer(&mut self, id: u64, generation: u32) {
        self.send(&Response { id, result: Ok(Data::Reservation { generation, holder: None }) });
    }

    /// A command of the classic protocol.
    fn command(&self) -> Cdb {
        let (mut cdb, mut passed) = ([0; 16], Passed::default());
        self.read(&mut cdb, &mut passed);
        assert!(passed.take_one().is_some(), "{passed:?}");
        classic::decode_request(cdb).unwrap()
    }
}

#[test]
fn requests_overlap_and_get_their_own_answers() {
    let setup = Setup::new(limits());
    let mut peer = Peer::frames(&setup.listen(), 8);
    assert!(setup.reported() && setup.manager.is_connected());
    let asked: Vec<_> = (0..8).map(|_| setup.ask(Command::ReadReservation)).collect();
    let mut ids: Vec<_> = asked.iter().map(|_| peer.request().id).collect();
    // In the order of their sending, which is that of the asking; answered the other way round.
    assert!(ids.is_sorted());
    ids.reverse();
    for (generation, id) in ids.into_iter().enumerate() {
        peer.answer(id, u32::try_from(generation).unwrap());
    }
    for (generation, answer) in asked.into_iter().rev().enumerate() {
        assert_eq!(wait(answer), reading(u32::try_from(generation).unwrap()));
    }
    let conflict = Failure { status: status::RESERVATION_CONFLICT, sense: Vec::new() };
    let asked = setup.ask(Command::ReadKeys);
    let id = peer.request().id;
    peer.send(&Response { id, result: Err(conflict.clone()) });
    assert_eq!(wait(asked), Err(Problem { failure: conflict, reason: None }));
}

#[test]
fn a_request_that_is_never_answered_delays_no_other() {
    let setup = Setup::new(Limits { answer: Duration::from_millis(50), ..limits() });
    let mut peer = Peer::frames(&setup.listen(), 2);
    let hangs = setup.ask(Command::ReadKeys);
    let hanging = peer.request().id;
    let asked = setup.ask(Command::ReadReservation);
    let id = peer.request().id;
    peer.answer(id, 1);
    // On a slow machine this one may have run out of time as well.
    let answered = wait(asked);
    assert!(answered == reading(1) || said(answered).0 == Some(Sense::TIMEOUT));
    let (sense, why) = said(wait(hangs));
    assert_eq!((sense, why.as_str()), (Some(Sense::TIMEOUT), "the helper did not answer within 0 s"));
    // Its answer comes too late and disturbs nobody.
    peer.answer(hanging, 2);
    let asked = setup.ask(Command::ReadReservation);
    let id = peer.request().id;
    peer.answer(id, 3);
    let answered = wait(asked);
    assert!(answered == reading(3) || said(answered).0 == Some(Sense::TIMEOUT));
    assert!(setup.manager.is_connected());
}

#[test]
fn a_helper_that_answers_nothing_is_left() {
    let setup = Setup::new(Limits { answer: Duration::from_millis(20), ..limits() });
    let listener = setup.listen();
    let _hangs = Peer::frames(&listener, 2);
    let asked = [setup.ask(Command::ReadKeys), setup.ask(Command::ReadKeys)];
    for answer in asked {
        assert_eq!(said(wait(answer)).0, Some(Sense::TIMEOUT));
    }
    let _again = Peer::frames(&listener, 2);
    assert_eq!([setup.reported(), setup.reported(), setup.reported()], [true, false, true]);
}

#[test]
fn only_what_is_inside_fails_with_a_helper() {
    let setup = Setup::new(limits());
    let listener = setup.listen();
    let mut peer = Peer::frames(&listener, 2);
    assert!(setup.reported());
    let mut asked: Vec<_> = (0..4).map(|_| setup.ask(Command::ReadReservation)).collect();
    let _ = (peer.request(), peer.request());
    drop(peer);
    let outside = asked.split_off(2);
    for answer in asked {
        let (sense, why) = said(wait(answer));
        assert_eq!(sense, Some(Sense::COMMUNICATION_FAILURE));
        assert!(why.contains("connection"), "{why}");
    }
    let mut peer = Peer::frames(&listener, 2);
    for _ in 0..2 {
        let id = peer.request().id;
        peer.answer(id, 7);
    }
    for answer in outside {
        assert_eq!(wait(answer), reading(7));
    }
    assert_eq!([setup.reported(), setup.reported()], [false, true]);
}

#[test]
fn nonsense_ends_the_connection_and_not_the_manager() {
    let setup = Setup::new(limits());
    let listener = setup.listen();
    let nonsense: [&[u8]; 3] = [&u32::MAX.to_le_bytes(), &[4, 0, 0, 0, 1, 2, 3, 4], &[0; 8]];
    for bytes in nonsense {
        let mut peer = Peer::frames(&listener, 4);
        let asked = setup.ask(Command::ReadKeys);
        peer.request();
        peer.0.write_all(bytes).unwrap();
        assert_eq!(said(wait(asked)).0, Some(Sense::COMMUNICATION_FAILURE));
    }
    let mut peer = Peer::frames(&listener, 4);
    let asked = setup.ask(Command::ReadKeys);
    let id = peer.request().id;
    peer.answer(id + 1, 1);
    assert!(said(wait(asked)).1.contains("which it does not have"));
    // The next connection works.
    let mut peer = Peer::frames(&listener, 4);
    let asked = setup.ask(Command::ReadReservation);
    let id = peer.request().id;
    peer.answer(id, 1);
    assert_eq!(wait(asked), reading(1));
}

#[test]
fn without_a_helper_requests_wait_and_then_fail() {
    let setup = Setup::new(Limits { patience: Duration::from_millis(20), ..limits() });
    let (sense, why) = said(wait(setup.ask(Command::ReadKeys)));
    assert_eq!(sense, Some(Sense::COMMUNICATION_FAILURE));
    let socket = setup.folder.path().join("socket");
    assert_eq!(why, format!("Failed to connect to '{}': No such file or directory", socket.display()));
    assert!(!setup.manager.is_connected() && setup.reports.try_recv().is_err());
}

#[test]
fn a_request_that_came_before_its_helper_is_answered() {
    let setup = Setup::new(limits());
    let asked = setup.ask(Command::ReadReservation);
    let mut peer = Peer::frames(&setup.listen(), 1);
    let id = peer.request().id;
    peer.answer(id, 5);
    assert_eq!(wait(asked), reading(5));
}

#[test]
fn the_path_can_change() {
    let setup = Setup::new(limits());
    let other = setup.folder.path().join("other");
    let listener = UnixListener::bind(&other).unwrap();
    setup.manager.set_path(&other);
    let _peer = Peer::frames(&listener, 1);
    assert!(setup.reported());
    assert_eq!(setup.manager.path(), other);
}

#[test]
fn a_classic_helper_gets_one_request_at_a_time() {
    let setup = Setup::new(limits());
    let listener = setup.listen();
    let mut peer = Peer::accept(&listener, 0);
    assert!(setup.reported());
    let asked = [setup.ask(Command::ReadReservation), setup.ask(Command::ReadReservation)];
    for generation in 0..2u8 {
        assert_eq!(peer.command().action(), Some(ipc::scsi::Action::ReadReservation));
        peer.0.set_nonblocking(true).unwrap();
        assert_eq!(peer.0.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        peer.0.set_nonblocking(false).unwrap();
        let data = vec![0, 0, 0, generation, 0, 0, 0, 0];
        let reply = classic::Reply { data, ..classic::Reply::status(status::GOOD) };
        peer.0.write_all(&reply.encode()).unwrap();
    }
    for (generation, answer) in (0..).zip(asked) {
        assert_eq!(wait(answer), reading(generation));
    }
    let asked = setup.ask(Command::ReadKeys);
    peer.command();
    peer.0.write_all(&classic::Reply::check(Sense::IO_PROCESS_TERMINATED).encode()).unwrap();
    assert_eq!(wait(asked).unwrap_err().failure.sense(), Some(Sense::IO_PROCESS_TERMINATED));
    // A command too long for any helper is not sent.
    let options = ipc::scsi::RegisterOptions::default();
    let key = ipc::scsi::Key(1);
    let asked = setup.ask(Command::Register { key, new_key: key, options, initiators: vec![0; 9000] });
    assert_eq!(said(wait(asked)).0, Some(Sense::PARAMETER_LIST_LENGTH));
    // It is missed when it goes, although nobody asks.
    drop(peer);
    assert!(!setup.reported());
}

#[test]
fn a_classic_helper_that_hangs_fails_one_request() {
    let setup = Setup::new(Limits { answer: Duration::from_millis(20), ..limits() });
    let listener = setup.listen();
    let hangs = Peer::accept(&listener, 0);
    let asked = setup.ask(Command::ReadKeys);
    hangs.command();
    let later = setup.ask(Command::ReadKeys);
    assert_eq!(said(wait(asked)).0, Some(Sense::TIMEOUT));
    let mut peer = Peer::accept(&listener, 0);
    peer.command();
    peer.0.write_all(&classic::Reply::status(status::RESERVATION_CONFLICT).encode()).unwrap();
    let answered = wait(later).unwrap_err().failure.status;
    // On a slow machine the second answer may have come too late.
    assert!([status::RESERVATION_CONFLICT, status::CHECK_CONDITION].contains(&answered));
}

#[test]
fn a_manager_that_stops_leaves_nobody_waiting() {
    let setup = Setup::new(limits());
    let listener = setup.listen();
    let mut peer = Peer::frames(&listener, 1);
    assert!(setup.reported());
    let asked = [setup.ask(Command::ReadKeys), setup.ask(Command::ReadKeys)];
    peer.request();
    setup.manager.stop();
    let later = setup.ask(Command::ReadKeys);
    for answer in asked.into_iter().chain([later]) {
        assert_eq!(said(wait(answer)).0, Some(Sense::COMMUNICATION_FAILURE));
    }
    assert!(!setup.manager.is_connected());
    let Setup { manager, reports, .. } = setup;
    drop(manager);
    // The thread has let go of everything, the reports among it, without another one.
    assert_eq!(reports.recv_timeout(HANGS), Err(mpsc::RecvTimeoutError::Disconnected));
}
