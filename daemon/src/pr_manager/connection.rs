//! One connection to a helper, for as long as it holds, in either protocol.

use super::{Job, Problem, Shared, lost};
use ipc::classic::Reply;
use ipc::client::{Classic, Frames};
use ipc::frame::Response;
use ipc::scsi::{Data, Sense};
use qapi::error::errno_text;
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// Why a connection has ended.
pub struct Ended(pub String);

fn broke(error: &io::Error) -> Ended {
    Ended(match error.kind() {
        io::ErrorKind::UnexpectedEof => "the helper closed the connection".to_owned(),
        _ => format!("the connection to the helper broke: {}", errno_text(error)),
    })
}

fn no_answer(limit: Duration) -> Problem {
    Problem::new(Sense::TIMEOUT, format!("the helper did not answer within {} s", limit.as_secs()))
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

/// A request that the helper has.
struct Inside {
    /// None once the time has run out; the number stays taken until the helper answers.
    reply: Option<oneshot::Sender<Result<Data, Problem>>>,
    deadline: Instant,
}

/// The frames protocol: as many requests at a time as the helper takes.
pub fn frames(shared: &Shared, frames: &Frames, socket: BorrowedFd<'_>) -> Ended {
    let mut inside = HashMap::new();
    let ended = converse(shared, frames, socket, &mut inside);
    for request in inside.into_values() {
        if let Some(reply) = request.reply {
            let _ = reply.send(Err(lost(ended.0.clone())));
        }
    }
    ended
}

fn converse(shared: &Shared, frames: &Frames, socket: BorrowedFd<'_>, inside: &mut HashMap<u64, Inside>) -> Ended {
    let limit = shared.limits.answer;
    let most = usize::from(frames.max_in_flight()).max(1);
    let mut next_id = 0u64;
    loop {
        if shared.lock().stopping {
            return Ended("the pr-manager has been deleted".to_owned());
        }
        while inside.len() < most {
            let Some(Job { device, command, reply, .. }) = shared.next_job() else { break };
            next_id = next_id.wrapping_add(1);
            inside.insert(next_id, Inside { reply: Some(reply), deadline: Instant::now() + limit });
            if let Err(error) = frames.send(next_id, device.as_fd(), command) {
                return broke(&error);
            }
        }
        let deadline = inside.values().filter(|request| request.reply.is_some()).map(|request| request.deadline).min();
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if shared.wait(Some(socket), left) {
            let Response { id, result } = match frames.receive() {
                Ok(response) => response,
                Err(error) => return broke(&error),
            };
            let Some(request) = inside.remove(&id) else {
                return Ended(format!("the helper answered request {id}, which it does not have"));
            };
            if let Some(reply) = request.reply {
                let _ = reply.send(result.map_err(Problem::from));
            }
        }
        let now = Instant::now();
        for request in inside.values_mut().filter(|request| request.deadline <= now) {
            if let Some(reply) = request.reply.take() {
                let _ = reply.send(Err(no_answer(limit)));
            }
        }
        if inside.len() == most && inside.values().all(|request| request.reply.is_none()) {
            return Ended(format!("the helper did not answer any of {most} requests"));
        }
    }
}

/// The classic protocol: one request at a time.
pub fn classic(shared: &Shared, mut classic: Classic, socket: &UnixStream) -> Ended {
    loop {
        if shared.lock().stopping {
            return Ended("the pr-manager has been deleted".to_owned());
        }
        let Some(job) = shared.next_job() else {
            // The helper says nothing by itself: what comes is the end, or nothing that can be understood.
            if shared.wait(Some(socket.as_fd()), None) {
                return Ended("the helper closed the connection".to_owned());
            }
            continue;
        };
        let (result, ended) = match ask(shared, &mut classic, socket, &job) {
            Ok(reply) => (Response::from_reply(0, job.command.action(), &reply).result.map_err(Problem::from), None),
            Err((problem, ended)) => (Err(problem), ended),
        };
        let _ = job.reply.send(result);
        if let Some(ended) = ended {
            return ended;
        }
    }
}

/// The answer to one request; else the problem, and the end of the connection unless it is untouched.
fn ask(
    shared: &Shared,
    classic: &mut Classic,
    socket: &UnixStream,
    job: &Job,
) -> Result<Reply, (Problem, Option<Ended>)> {
    let Some((cdb, parameters)) = job.command.encode() else {
        let problem = Problem::new(Sense::PARAMETER_LIST_LENGTH, "more TransportIDs than a command can carry");
        return Err((problem, None));
    };
    let limit = shared.limits.answer;
    let asked =
        socket.set_read_timeout(Some(limit)).and_then(|()| classic.execute(job.device.as_fd(), &cdb, &parameters));
    asked.map_err(|error| {
        if is_timeout(&error) {
            return (no_answer(limit), Some(Ended("the helper did not answer".to_owned())));
        }
        let ended = broke(&error);
        (lost(ended.0.clone()), Some(ended))
    })
}
