//! The way of the remount hook to the daemon: one call over a socket of our own, in the varlink protocol (varlink.org).
//!
//! The hook is what people wait for in every garbage collection, and most of its time would go into becoming a client of the
//! message bus. Root and a store's owner, whom the kernel vouches for (`SO_PEERCRED`), can ask here instead; everybody else is
//! sent to the bus, where polkit decides. `varlinkctl call /run/layered-stores/org.layeredstores1 …` works as well.

use std::{
    io::{self, Read as _, Write as _},
    os::unix::{fs::PermissionsExt as _, net::UnixStream as BlockingStream},
    path::Path,
    sync::Arc,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{UnixListener, UnixStream},
    sync::Semaphore,
};

use crate::supervisor::{Command, Handle};

/// The socket, in the daemon's runtime directory.
pub const SOCKET: &str = "/run/layered-stores/org.layeredstores1";

const REMOUNT: &str = "org.layeredstores1.Remount";
const NOT_AUTHORIZED: &str = "org.layeredstores1.NotAuthorized";
const FAILED: &str = "org.layeredstores1.Failed";

/// The description that `varlinkctl introspect` shows.
const DESCRIPTION: &str = "\
# What Nix's remount hook asks of layered-storesd
interface org.layeredstores1

# Makes the merged directory of the store with a real store dir agree with its layers
method Remount(realStoreDir: string) -> ()

# The caller is neither root nor the store's owner; over D-Bus, polkit decides
error NotAuthorized (message: string)

# It could not be done
error Failed (message: string)
";

/// The longest call, in bytes; a path has at most 255.
const LONGEST_CALL: u64 = 4096;

/// How many clients that are not root are served at a time. Others are sent to the bus, as strangers are.
const CLIENTS: usize = 32;

/// How long a client may take to send its call.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Deserialize)]
struct Call {
    method: String,
    #[serde(default)]
    parameters: Value,
}

#[derive(Serialize, Deserialize)]
struct Reply {
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    #[serde(default)]
    parameters: Value,
}

impl Reply {
    fn error(name: &str, parameters: Value) -> Self {
        Self { error: Some(name.to_owned()), parameters }
    }

    fn failed(message: &dyn std::fmt::Display) -> Self {
        Self::error(FAILED, json!({ "message": message.to_string() }))
    }
}

/// Opens the socket, in place of one that an earlier daemon has left.
///
/// # Errors
/// When it cannot be made.
pub fn listen(socket: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(socket)?;
    // Anybody may connect; who it is decides what is done.
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o666))?;
    Ok(listener)
}

/// Serves clients for ever.
pub async fn serve(listener: UnixListener, handle: Handle) {
    let places = Arc::new(Semaphore::new(CLIENTS));
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let Ok(uid) = stream.peer_cred().map(|peer| peer.uid()) else { continue };
                // Nobody waits for somebody else: strangers are answered at once, without listening to them.
                let place = Arc::clone(&places).try_acquire_owned().ok();
                if uid != 0 && (place.is_none() || !handle.is_owner(uid)) {
                    turn_away(stream);
                    continue;
                }
                let handle = handle.clone();
                tokio::spawn(async move {
                    // A client that goes away in the middle is nothing to talk about.
                    let _ = converse(stream, uid, &handle).await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::error!("cannot accept a client of {SOCKET}: {error}");
                tokio::time::sleep(PATIENCE).await;
            }
        }
    }
}

fn turn_away(stream: UnixStream) {
    let message = json!({ "message": "only root and the store's owner can ask here" });
    let mut text = serde_json::to_vec(&Reply::error(NOT_AUTHORIZED, message)).unwrap_or_default();
    text.push(0);
    // It fits into the socket's buffer, which is empty.
    let _ = stream.into_std().and_then(|mut stream| stream.write_all(&text));
}

async fn converse(stream: UnixStream, uid: u32, handle: &Handle) -> io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut read = BufReader::new(read.take(LONGEST_CALL));
    loop {
        let mut message = Vec::new();
        read.get_mut().set_limit(LONGEST_CALL);
        let length = tokio::time::timeout(PATIENCE, read.read_until(0, &mut message)).await??;
        if length == 0 || message.pop() != Some(0) {
            return Ok(());
        }
        let reply = match serde_json::from_slice(&message) {
            Ok(call) => answer(call, uid, handle).await,
            Err(error) => Reply::failed(&format!("not a varlink call: {error}")),
        };
        let mut text = serde_json::to_vec(&reply)?;
        text.push(0);
        write.write_all(&text).await?;
    }
}

async fn answer(call: Call, uid: u32, handle: &Handle) -> Reply {
    let text = |key: &str| call.parameters.get(key).and_then(Value::as_str);
    match call.method.as_str() {
        REMOUNT => match text("realStoreDir") {
            Some(dir) => remount(dir, uid, handle).await,
            None => Reply::error("org.varlink.service.InvalidParameter", json!({ "parameter": "realStoreDir" })),
        },
        "org.varlink.service.GetInfo" => {
            let interfaces = ["org.layeredstores1", "org.varlink.service"];
            let version = env!("CARGO_PKG_VERSION");
            let info = json!({
                "vendor": "", "product": "layered-stores", "version": version, "url": "", "interfaces": interfaces,
            });
            Reply { error: None, parameters: info }
        }
        "org.varlink.service.GetInterfaceDescription" if text("interface") == Some("org.layeredstores1") => {
            Reply { error: None, parameters: json!({ "description": DESCRIPTION }) }
        }
        method => Reply::error("org.varlink.service.MethodNotFound", json!({ "method": method })),
    }
}

async fn remount(dir: &str, uid: u32, handle: &Handle) -> Reply {
    let found = handle.store_at(dir).map(|cell| cell.read(|status| (status.name().clone(), status.owner_uid)));
    let (name, owner) = match found {
        Ok(found) => found,
        Err(error) => return Reply::failed(&error),
    };
    if uid != 0 && uid != owner {
        return Reply::error(NOT_AUTHORIZED, json!({ "message": "only root and the store's owner can ask here" }));
    }
    match handle.ask(|reply| Command::Remount(name, reply)).await {
        Ok(()) => Reply { error: None, parameters: json!({}) },
        Err(error) => Reply::failed(&error),
    }
}

/// Why the daemon could not be asked over its socket.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Nobody listens, or the daemon wants to be asked over the bus.
    #[error("the socket {SOCKET} does not help: {0}")]
    Elsewhere(String),
    /// The daemon has not answered in time.
    #[error("the daemon has not answered within {} s; see `systemctl status layered-storesd`", .0.as_secs())]
    Timeout(Duration),
    /// The daemon says that it cannot be done.
    #[error("{0}")]
    Refused(String),
}

/// Asks the daemon to refresh a merged directory, from a process that does nothing else.
///
/// # Errors
/// [`AskError`].
pub fn ask_remount(dir: &str, timeout: Duration) -> Result<(), AskError> {
    let elsewhere = |error: io::Error| AskError::Elsewhere(error.to_string());
    let mut stream = BlockingStream::connect(SOCKET).map_err(elsewhere)?;
    stream.set_read_timeout(Some(timeout)).map_err(elsewhere)?;
    let mut call = json!({ "method": REMOUNT, "parameters": { "realStoreDir": dir } }).to_string();
    call.push('\0');
    stream.write_all(call.as_bytes()).map_err(elsewhere)?;
    let mut reply = Vec::new();
    let mut buffer = [0; 1024];
    while reply.last() != Some(&0) {
        match stream.read(&mut buffer) {
            Ok(0) => return Err(AskError::Elsewhere("the daemon went away".to_owned())),
            Ok(read) => reply.extend_from_slice(&buffer[..read]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(AskError::Timeout(timeout)),
            Err(error) => return Err(elsewhere(error)),
        }
    }
    reply.pop();
    let reply: Reply = serde_json::from_slice(&reply).map_err(|error| AskError::Elsewhere(error.to_string()))?;
    let message = reply.parameters.get("message").and_then(Value::as_str).map(str::to_owned);
    match reply.error {
        None => Ok(()),
        Some(name) if name == NOT_AUTHORIZED => Err(AskError::Elsewhere(message.unwrap_or(name))),
        Some(name) => Err(AskError::Refused(message.unwrap_or(name))),
    }
}
