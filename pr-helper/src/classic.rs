//! A connection that speaks the classic protocol: one request at a time, `[ipc::classic]`.

use crate::server::{Connection, End, one_descriptor};
use ipc::classic::decode_request;
use ipc::fds::Passed;
use ipc::scsi::Cdb;

/// Serves requests until the connection ends.
pub async fn run(connection: &mut Connection) -> Result<(), End> {
    loop {
        let mut cdb = [0; Cdb::SIZE];
        let mut passed = Passed::None;
        // Never more than the CDB: what comes after it has its own descriptors.
        let begun = connection.first(&mut cdb, &mut passed).await?;
        connection.rest(cdb.get_mut(begun..).unwrap_or_default(), &mut passed).await?;
        let fd = one_descriptor(passed)?;
        let cdb = decode_request(cdb).map_err(|e| End::Protocol(format!("Invalid CDB ({e})")))?;
        let mut parameters = Vec::new();
        if cdb.is_out() {
            parameters.resize(usize::try_from(cdb.data_length()).unwrap_or(0), 0);
            let mut passed = Passed::None;
            connection.rest(&mut parameters, &mut passed).await?;
            if !matches!(passed, Passed::None) {
                return Err(End::Protocol("File descriptor with the parameter list".into()));
            }
        }
        let reply = connection.execute(fd, cdb, parameters).await;
        connection.answer(&reply.encode()).await?;
    }
}
