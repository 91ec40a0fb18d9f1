//! The way of the remount hook to the daemon: one call over a socket of its own, in the varlink protocol (varlink.org).
//!
//! The hook is what people wait for in every garbage collection, and most of its time would go into becoming a client of the
//! message bus. Root and a store's owner, whom the kernel vouches for (`SO_PEERCRED`), can ask here; everybody else is sent to
//! the bus, where polkit decides. `varlinkctl call /run/layered-stores/org.layeredstores1 …` works as well.

use std::{
    io::{self, Read as _, Write as _},
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

use rustix::net;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// The socket, in the daemon's runtime directory.
pub const SOCKET: &str = "/run/layered-stores/org.layeredstores1";

/// The method that refreshes a merged directory.
pub const REMOUNT: &str = "org.layeredstores1.Remount";
/// Who asks is neither root nor the owner.
pub const NOT_AUTHORIZED: &str = "org.layeredstores1.NotAuthorized";
/// The daemon goes down; the next one can be asked.
pub const SHUTTING_DOWN: &str = "org.layeredstores1.ShuttingDown";
/// It could not be done.
pub const FAILED: &str = "org.layeredstores1.Failed";

/// What the daemon answers.
#[derive(Serialize, Deserialize)]
pub struct Reply {
    /// The name of an error, if it is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// What comes with it.
    #[serde(default)]
    pub parameters: Value,
}

/// Why the daemon could not be asked over its socket.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Nobody listens.
    #[error("nobody listens on {SOCKET}: {0}")]
    Absent(io::Error),
    /// The daemon wants to be asked over the bus.
    #[error("the socket {SOCKET} does not help: {0}")]
    Elsewhere(String),
    /// The daemon went away before it answered. The next one can be asked.
    #[error("the daemon went away before it answered")]
    Lost,
    /// The daemon has not answered in time.
    #[error("the daemon has not answered in time; see `systemctl status layered-storesd`")]
    Timeout,
    /// The daemon says that it cannot be done.
    #[error("{0}")]
    Refused(String),
}

/// Asks the daemon to refresh a merged directory, from a process that does nothing else.
///
/// systemd keeps the socket while there is no daemon for a moment. Whoever connects then waits for the next one.
///
/// # Errors
/// [`AskError`].
pub fn ask_remount(dir: &str, timeout: Duration) -> Result<(), AskError> {
    let deadline = Instant::now() + timeout;
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::WouldBlock => AskError::Timeout,
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => AskError::Lost,
        _ => AskError::Elsewhere(error.to_string()),
    };
    let mut stream = connect(timeout).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => AskError::Absent(error),
        _ => failed(error),
    })?;
    let mut call = json!({ "method": REMOUNT, "parameters": { "realStoreDir": dir } }).to_string();
    call.push('\0');
    match stream.write_all(call.as_bytes()) {
        // Whom the daemon turns away it answers and hangs up on without listening: the answer is there all the same.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        written => written.map_err(failed)?,
    }
    let mut reply = Vec::new();
    let mut buffer = [0; 1024];
    while reply.last() != Some(&0) {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(AskError::Timeout);
        }
        stream.set_read_timeout(Some(left)).map_err(failed)?;
        match stream.read(&mut buffer) {
            Ok(0) => return Err(AskError::Lost),
            Ok(read) => reply.extend_from_slice(&buffer[..read]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed(error)),
        }
    }
    reply.pop();
    let reply: Reply = serde_json::from_slice(&reply).map_err(|error| AskError::Elsewhere(error.to_string()))?;
    let message = reply.parameters.get("message").and_then(Value::as_str).map(str::to_owned);
    match reply.error {
        None => Ok(()),
        Some(name) if name == NOT_AUTHORIZED => Err(AskError::Elsewhere(message.unwrap_or(name))),
        Some(name) if name == SHUTTING_DOWN => Err(AskError::Lost),
        Some(name) => Err(AskError::Refused(message.unwrap_or(name))),
    }
}

/// Connects to the daemon's socket. With a queue that is full connect(2) waits, and for no longer than a write may take.
fn connect(timeout: Duration) -> io::Result<UnixStream> {
    let socket = net::socket_with(net::AddressFamily::UNIX, net::SocketType::STREAM, net::SocketFlags::CLOEXEC, None)?;
    net::sockopt::set_socket_timeout(&socket, net::sockopt::Timeout::Send, Some(timeout))?;
    net::connect(&socket, &net::SocketAddrUnix::new(SOCKET)?)?;
    Ok(socket.into())
}
