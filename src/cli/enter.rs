//! Running a command that sees a store at `/nix`.

use std::{
    ffi::OsString,
    fs,
    io::{self, ErrorKind},
    os::unix::{fs::MetadataExt as _, process::CommandExt as _},
    path::Path,
    process::Command,
};

use layered_stores_client::Properties;
use layered_stores_overlay::host;
use rustix::{
    fs::Access,
    mount::MountPropagationFlags,
    process::{getegid, geteuid},
};

use super::inside::{self, HOST_NIX};

/// Why a command could not be run.
#[derive(Debug, thiserror::Error)]
pub(super) enum EnterError {
    #[error("store {0:?} is {1}, not active; start it with `layered-stores start {0}`")]
    NotActive(String, String),
    #[error("there is no directory /nix to put the store at; make one with `mkdir /nix`")]
    NoNix,
    #[error("cannot make a mount namespace: {0}; run this as root, or allow unprivileged user namespaces")]
    Namespace(io::Error),
    #[error("cannot put {from} at /nix: {error}")]
    Bind { from: String, error: io::Error },
    #[error(
        "cannot show the machine's own store, which is the lower one, at {HOST_NIX}: {0}; is layered-storesd older than this command line?"
    )]
    Host(io::Error),
    #[error("cannot run {command:?}: {error}")]
    Exec { command: OsString, error: io::Error },
}

/// Replaces this process by a command that sees the store at `/nix`. Returns only when that fails.
///
/// All of `<root>/nix` is put at `/nix`, not the store directory alone: so a superblock that the daemon puts in place later
/// propagates into the namespace, and an `enter` that runs for days does not go on seeing an old one.
pub(super) fn enter(store: &Properties, command: Vec<OsString>) -> EnterError {
    match try_enter(store, command) {
        Ok(never) => match never {},
        Err(error) => error,
    }
}

fn try_enter(store: &Properties, command: Vec<OsString>) -> Result<std::convert::Infallible, EnterError> {
    if store.state != "active" {
        return Err(EnterError::NotActive(store.name.clone(), store.state.clone()));
    }
    let nix = store.real_store_dir.trim_end_matches("/store").to_owned();
    if !Path::new("/nix").is_dir() {
        return Err(EnterError::NoNix);
    }
    let (uid, gid) = (geteuid(), getegid());
    host::private_mount_namespace(!uid.is_root()).map_err(EnterError::Namespace)?;
    if !uid.is_root() {
        map_user(uid.as_raw(), gid.as_raw()).map_err(EnterError::Namespace)?;
    }
    let bind = |error: rustix::io::Errno| EnterError::Bind { from: nix.clone(), error: error.into() };
    let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", slave).map_err(bind)?;

    // Only root and the owner can write to the database. Whether others may use the daemon is for Nix to say. Root does not
    // come here with a store that belongs to somebody else.
    let through_daemon = !store.daemon_uri.is_empty() && (uid.is_root() || !owns(&store.upper_layer, uid.as_raw()));
    let uri = if through_daemon { &store.daemon_uri } else { &store.store_uri };
    // What Nix takes "auto" for depends on whether it can write to the machine's own database (`openStore`).
    let by_daemon = rustix::fs::access("/nix/var/nix", Access::WRITE_OK).is_err();
    let inside = inside::store_uri(uri, by_daemon);
    if inside.is_some() {
        show_host(uid.is_root())?;
    }
    rustix::mount::mount_bind_recursive(nix.as_str(), "/nix").map_err(bind)?;

    let mut command = command.into_iter();
    let program = command.next().unwrap_or_else(|| std::env::var_os("SHELL").unwrap_or_else(|| "/bin/sh".into()));
    let error = Command::new(&program)
        .args(command)
        // Nix itself must not take the merged directory for a plain store: it would delete through the overlay.
        .env("NIX_REMOTE", inside.as_ref().unwrap_or(uri))
        .env("LAYERED_STORE", &store.name)
        .exec();
    Err(EnterError::Exec { command: program, error })
}

/// Shows the machine's own `/nix`, where the lower store is, beside the one that is about to cover it.
fn show_host(is_root: bool) -> Result<(), EnterError> {
    if is_root {
        // The daemon makes it too; one that is older has not.
        let _ = fs::create_dir(HOST_NIX);
    }
    rustix::mount::mount_bind_recursive("/nix", HOST_NIX).map_err(|error| EnterError::Host(error.into()))
}

fn owns(path: &str, uid: u32) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.uid() == uid)
}

/// Keeps user and group what they are inside a new user namespace (user_namespaces(7)).
fn map_user(uid: u32, gid: u32) -> io::Result<()> {
    match fs::write("/proc/self/setgroups", "deny") {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    fs::write("/proc/self/uid_map", format!("{uid} {uid} 1\n"))?;
    fs::write("/proc/self/gid_map", format!("{gid} {gid} 1\n"))
}
