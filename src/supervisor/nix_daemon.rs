//! Having a store's Nix daemon be what is declared.
//!
//! systemd starts the daemon when somebody connects to its socket. Here is made what that takes: the socket, and the file
//! with the daemon's settings, `<runtime>/<name>/nix.conf`. The file's text tells what the socket was made with, so that a
//! daemon of ours that starts again finds out whether anything has changed.

use std::{
    fs, io,
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::operation::{OperationError, Tools, blocking};
use crate::store::{NixDaemon, StoreName, StoreSpec};

/// The directory of what a store's Nix daemon needs.
pub(super) fn directory(runtime: &Path, name: &StoreName) -> PathBuf {
    runtime.join(name.as_str())
}

/// The file with the settings of a store's Nix daemon.
pub fn nix_conf(runtime: &Path, name: &StoreName) -> PathBuf {
    directory(runtime, name).join("nix.conf")
}

/// Makes socket and settings what they should be. Connections that are open go on with the old ones.
pub(super) async fn serve(tools: Tools, spec: Arc<StoreSpec>) -> Result<(), OperationError> {
    let file = nix_conf(tools.records.runtime(), &spec.name);
    let there = blocking({
        let file = file.clone();
        move || Ok(fs::read_to_string(file).ok())
    })
    .await?;
    let Some(daemon) = &spec.daemon else {
        tools.units.stop_socket(&spec.name).await?;
        return blocking(move || {
            remove(tools.records.runtime(), &spec.name);
            Ok(())
        })
        .await;
    };
    let text = text(daemon, &spec);
    // The first line is the socket.
    let socket_was_same = there.as_ref().is_some_and(|there| there.lines().next() == text.lines().next());
    if there.is_some() && !socket_was_same {
        tools.units.stop_socket(&spec.name).await?;
    }
    if there.as_ref() != Some(&text) {
        blocking(move || write(&file, &text).map_err(|source| OperationError::NixConf { file, source })).await?;
        if socket_was_same {
            tools.units.stop_nix_daemon(&spec.name).await?;
        }
    }
    Ok(tools.units.start_socket(&spec.name, daemon, &spec.mount_unit, socket_was_same).await?)
}

/// Removes the settings. Left behind, they would be removed the next time.
pub(super) fn remove(runtime: &Path, name: &StoreName) {
    let _ = fs::remove_file(nix_conf(runtime, name));
    let _ = fs::remove_dir(directory(runtime, name));
}

fn text(daemon: &NixDaemon, spec: &StoreSpec) -> String {
    let socket = format!("# socket {} {:04o} {}\n", daemon.socket_path, daemon.socket_mode, spec.mount_unit);
    socket + &daemon.nix_conf(&spec.uri())
}

/// Settings may hold secrets such as access tokens, so nobody else reads them.
fn write(file: &Path, text: &str) -> io::Result<()> {
    fs::create_dir_all(file.parent().unwrap_or(Path::new("/")))?;
    let temporary = file.with_extension("new");
    let _ = fs::remove_file(&temporary);
    let mut new = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
    new.write_all(text.as_bytes())?;
    fs::rename(&temporary, file)
}
