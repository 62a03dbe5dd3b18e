//! A connection that speaks the classic protocol: one request at a time, `[ipc::classic]`.

use crate::server::{Connection, End};
use ipc::classic::decode_request;
use ipc::scsi::Cdb;

/// Serves requests until the connection ends.
pub async fn run(connection: &mut Connection) -> Result<(), End> {
    loop {
        let mut cdb = [0; Cdb::SIZE];
        let mut arrival = connection.arrival().await?;
        // Never more than the CDB: what comes after it has its own descriptors.
        let begun = connection.first(&mut cdb, &mut arrival).await?;
        connection.rest(cdb.get_mut(begun..).unwrap_or_default(), &mut arrival).await?;
        let fd = arrival.take_one().ok_or_else(End::no_descriptor)?;
        let cdb = decode_request(cdb).map_err(|e| End::Protocol(format!("Invalid CDB ({e})")))?;
        let mut parameters = Vec::new();
        if cdb.is_out() {
            parameters.resize(usize::try_from(cdb.data_length()).unwrap_or(0), 0);
            let mut arrival = connection.arrival().await?;
            connection.rest(&mut parameters, &mut arrival).await?;
            if !arrival.passed.is_none() {
                return Err(End::Protocol("File descriptor with the parameter list".into()));
            }
        }
        let reply = connection.execute(fd, cdb, parameters).await;
        connection.answer(&reply.encode()).await?;
    }
}
