//! The index of a user's stores: a program that reads their databases with that user's rights, and nobody else's.

use std::{io, time::Duration};

use tokio::net::UnixStream;

use super::{SocketError, Units, manager};

/// Where the socket of one is, before the number of the user.
const SOCKETS: &str = "/run/layered-stores-index/";

/// How long connecting may take. systemd takes every connection, and starts the program when it has time.
const PATIENCE: Duration = Duration::from_secs(10);

/// An index cannot be reached.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// systemd does not start its socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// It cannot be connected to.
    #[error("cannot connect to {SOCKETS}{0}: {1}")]
    Connect(u32, io::Error),
}

impl Units {
    /// Connects to the index that runs as a user.
    ///
    /// # Errors
    /// [`IndexError`].
    pub async fn connect_index(&self, uid: u32) -> Result<UnixStream, IndexError> {
        let unit = format!("layered-stores-index@{uid}.socket");
        let started = {
            let _call = self.calls.acquire().await;
            // One that has failed is to be tried again.
            let _ = manager::answer(self.manager.reset_failed_unit(&unit)).await;
            manager::answer(self.manager.start_unit(&unit, "fail")).await
        };
        match started {
            Ok(job) => self.socket_job(job, "start", unit).await?,
            Err(error) => return Err(SocketError::Refused("start", unit, Box::new(error)).into()),
        }
        let connected = tokio::time::timeout(PATIENCE, UnixStream::connect(format!("{SOCKETS}{uid}"))).await;
        let connected = connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        connected.map_err(|error| IndexError::Connect(uid, error))
    }
}
