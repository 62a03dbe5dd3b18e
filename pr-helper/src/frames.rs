//! A connection that speaks frames: requests overlap, answers come in the order in which devices finish,
//! `[ipc::frame]`.

use crate::foreign::{Arrival, Foreign};
use crate::server::{Connection, End, in_time};
use ipc::classic::Reply;
use ipc::frame::{self, HEADER, Hello, Request, Response, Welcome};
use ipc::scsi::Sense;
use std::sync::Arc;
use tokio::sync::Mutex;
use tokio::task::JoinSet;

/// The requests of one connection that may be open.
const MAX_IN_FLIGHT: u16 = 16;

/// Serves requests until the connection ends; those in progress are answered if the client still listens.
pub async fn run(connection: Connection) -> Result<(), End> {
    let connection = Arc::new(connection);
    let (hello, arrival) = in_time("say hello", read_frame::<Hello>(&connection)).await?;
    if !arrival.passed.is_none() {
        return Err(End::Protocol("File descriptor in the negotiation".into()));
    }
    let version = hello.choose();
    let welcome = Welcome { version: version.unwrap_or(0), max_in_flight: MAX_IN_FLIGHT };
    connection.answer(&frame::encode(&welcome).map_err(protocol)?).await?;
    if version.is_none() {
        return Err(End::Protocol(format!("Unknown versions {} to {}", hello.min_version, hello.max_version)));
    }
    let mut open = JoinSet::new();
    let end = serve(&connection, &mut open).await;
    while open.join_next().await.is_some() {}
    end
}

async fn serve(connection: &Arc<Connection>, open: &mut JoinSet<()>) -> Result<(), End> {
    // Held while a response is written, so that responses do not mix.
    let sending = Arc::new(Mutex::new(()));
    loop {
        let (request, arrival) = read_frame::<Request>(connection).await?;
        let fd = arrival.take_one().ok_or_else(End::no_descriptor)?;
        while open.try_join_next().is_some() {}
        if open.len() >= usize::from(MAX_IN_FLIGHT) {
            return Err(End::Protocol(format!("More than {MAX_IN_FLIGHT} requests at a time")));
        }
        open.spawn(answer(connection.clone(), sending.clone(), request, fd));
    }
}

async fn answer(connection: Arc<Connection>, sending: Arc<Mutex<()>>, request: Request, fd: Foreign) {
    let action = request.command.action();
    let reply = match request.command.encode() {
        Some((cdb, parameters)) => connection.execute(fd, cdb, parameters).await,
        None => Reply::check(Sense::PARAMETER_LIST_LENGTH),
    };
    let Ok(bytes) = frame::encode(&Response::from_reply(request.id, action, &reply)) else { return };
    let _one = sending.lock().await;
    if connection.answer(&bytes).await.is_err() {
        // Part of a frame may have gone: nothing can follow it. The one that reads sees the end.
        connection.hang_up();
    }
}

async fn read_frame<T: frame::Message>(connection: &Connection) -> Result<(T, Arrival), End> {
    let mut header = [0; HEADER];
    let mut arrival = connection.arrival().await?;
    let begun = connection.first(&mut header, &mut arrival).await?;
    connection.rest(header.get_mut(begun..).unwrap_or_default(), &mut arrival).await?;
    let mut message = vec![0; frame::message_length(header).map_err(protocol)?];
    connection.rest(&mut message, &mut arrival).await?;
    Ok((frame::decode(&message).map_err(protocol)?, arrival))
}

fn protocol(error: frame::Error) -> End {
    End::Protocol(format!("Invalid frame ({error})"))
}
