//! The daemon's end of the hook's way to it: see [`layered_stores_client::hook`].

use std::{
    io::{self, Write as _},
    os::{fd::AsFd as _, unix::fs::PermissionsExt as _},
    path::Path,
    sync::Arc,
    time::Duration,
};

use layered_stores_client::hook::{FAILED, NOT_AUTHORIZED, REMOUNT, Reply, SHUTTING_DOWN, SOCKET};
use layered_stores_overlay::host;
use rustix::{io::Errno, net};
use sd_notify::NotifyState;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{UnixListener, UnixStream},
    sync::Semaphore,
};

use crate::supervisor::{Asker, Command, Error, Handle, StatusCell};

/// The description that `varlinkctl introspect` shows.
const DESCRIPTION: &str = "\
# What Nix's remount hook asks of layered-storesd
interface org.layeredstores1

# Makes the merged directory of the store with a real store dir agree with its layers
method Remount(realStoreDir: string) -> ()

# The caller is neither root nor the store's owner; over D-Bus, polkit decides
error NotAuthorized (message: string)

# The daemon goes down; the next one can be asked
error ShuttingDown (message: string)

# It could not be done
error Failed (message: string)
";

/// The longest call, in bytes; a path has at most 255.
const LONGEST_CALL: u64 = 4096;

/// How many clients that are not root are served at a time. Others are sent to the bus, as strangers are.
const CLIENTS: usize = 32;

/// How long a client may take to send its call, and to take the answer.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Deserialize)]
struct Call {
    method: String,
    #[serde(default)]
    parameters: Value,
}

fn refusal(name: &str, parameters: Value) -> Reply {
    Reply { error: Some(name.to_owned()), parameters }
}

fn not_authorized(message: &dyn std::fmt::Display) -> Reply {
    refusal(NOT_AUTHORIZED, json!({ "message": message.to_string() }))
}

fn failed(message: &dyn std::fmt::Display) -> Reply {
    refusal(FAILED, json!({ "message": message.to_string() }))
}

/// The name under which systemd keeps the socket.
const KEPT: &str = "hook";

/// Opens the socket: the one that systemd has kept since an earlier daemon opened it, or a new one, in place of what there is.
///
/// systemd keeps it in the file descriptor store of the unit, until that is stopped. Clients that come while the daemon is
/// started again wait in its queue.
///
/// # Errors
/// When it cannot be made.
pub fn listen(socket: &Path) -> io::Result<UnixListener> {
    if let Some((_, kept)) = host::kept_by_systemd(|name| name == KEPT).pop() {
        let listener = std::os::unix::net::UnixListener::from(kept);
        listener.set_nonblocking(true)?;
        // The path may lead elsewhere by now: another version of the daemon may have put a socket of its own there.
        if leads_to(socket, &listener) {
            return UnixListener::from_std(listener);
        }
    }
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(socket)?;
    // Anybody may connect; who it is decides what is done.
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o666))?;
    let name = [NotifyState::FdStoreRemove, NotifyState::FdName(KEPT)];
    let store = [NotifyState::FdStore, NotifyState::FdName(KEPT)];
    // Without it hooks find nobody while the daemon is started again, and ask over the bus.
    if let Err(error) = sd_notify::notify(&name).and_then(|()| sd_notify::notify_with_fds(&store, &[listener.as_fd()]))
    {
        tracing::warn!("systemd does not keep {SOCKET} for the next daemon: {error}");
    }
    Ok(listener)
}

/// Whether who connects to `path` gets into the queue of `listener`, which nobody else takes from.
fn leads_to(path: &Path, listener: &std::os::unix::net::UnixListener) -> bool {
    let is_its_address = listener.local_addr().is_ok_and(|address| address.as_pathname() == Some(path));
    // Whether somebody listens there is tried: the daemon has the bus name, so it is nobody, or it is `listener`. With a
    // queue that is full it is not waited for.
    is_its_address && matches!(try_connect(path), Ok(()) | Err(Errno::AGAIN))
}

fn try_connect(path: &Path) -> Result<(), Errno> {
    let flags = net::SocketFlags::CLOEXEC | net::SocketFlags::NONBLOCK;
    let socket = net::socket_with(net::AddressFamily::UNIX, net::SocketType::STREAM, flags, None)?;
    net::connect(&socket, &net::SocketAddrUnix::new(path)?)
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
                if uid != 0 && (place.is_none() || !handle.may_be_owner(uid)) {
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
    let mut text = serde_json::to_vec(&refusal(NOT_AUTHORIZED, message)).unwrap_or_default();
    text.push(0);
    // It fits into the socket's buffer, which is empty; the socket stays one that does not block.
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
            Err(error) => failed(&format!("not a varlink call: {error}")),
        };
        let mut text = serde_json::to_vec(&reply)?;
        text.push(0);
        tokio::time::timeout(PATIENCE, write.write_all(&text)).await??;
    }
}

async fn answer(call: Call, uid: u32, handle: &Handle) -> Reply {
    let text = |key: &str| call.parameters.get(key).and_then(Value::as_str);
    match call.method.as_str() {
        REMOUNT => match text("realStoreDir") {
            Some(dir) => remount(dir, uid, handle).await,
            None => refusal("org.varlink.service.InvalidParameter", json!({ "parameter": "realStoreDir" })),
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
        method => refusal("org.varlink.service.MethodNotFound", json!({ "method": method })),
    }
}

async fn remount(dir: &str, uid: u32, handle: &Handle) -> Reply {
    let look = |cell: StatusCell| cell.read(|status| (status.name().clone(), status.may_be_owner(uid)));
    let (name, may_be_owner) = match handle.store_at(dir).map(look) {
        Ok(found) => found,
        Err(error) => return failed(&error),
    };
    if uid != 0 && !may_be_owner {
        return not_authorized(&Error::NotOwner(name));
    }
    let asker = if uid == 0 { Asker::Root } else { Asker::User(uid) };
    match handle.ask(|reply| Command::Remount(name, asker, reply)).await {
        Ok(()) => Reply { error: None, parameters: json!({}) },
        Err(error @ Error::NotOwner(_)) => not_authorized(&error),
        Err(error @ Error::ShuttingDown) => refusal(SHUTTING_DOWN, json!({ "message": error.to_string() })),
        Err(error) => failed(&error),
    }
}
