//! Having a store's Nix daemon be what is declared.
//!
//! systemd starts the daemon when somebody connects to its socket. Here is made what that takes: the socket, as whom the
//! daemon runs, and the file with its settings, `<runtime>/<name>/nix.conf`. The file's text tells what the socket was made
//! with and whom it is for, so that a daemon of ours that starts again finds out whether anything has changed.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use layered_stores_model::{NixDaemon, StoreName, StoreSpec};
use layered_stores_overlay::{
    owner::owner,
    progress::{self, Spot},
};

use super::{
    operation::{OperationError, Tools},
    threads::Errand,
};
use crate::{
    file::{FOR_ROOT, replace},
    systemd::{SocketError, nix_daemon_unit},
};

/// The directory of what a store's Nix daemon needs.
pub(super) fn directory(runtime: &Path, name: &StoreName) -> PathBuf {
    runtime.join(name.as_str())
}

/// The file with the settings of a store's Nix daemon.
fn nix_conf(runtime: &Path, name: &StoreName) -> PathBuf {
    directory(runtime, name).join("nix.conf")
}

/// Makes socket and settings what they should be. Connections that are open go on with the old ones.
pub(super) async fn serve(tools: Tools, errand: Errand, below: Option<Arc<StoreSpec>>) -> Result<(), OperationError> {
    let served = make(tools.clone(), &errand, below).await;
    if let Err(OperationError::Owner(_) | OperationError::Socket(SocketError::OtherUser { .. })) = &served {
        // A daemon that does not run as whom it should is worse than none.
        tools.units.stop_socket(&errand.spec.name).await?;
    }
    if let Err(OperationError::Owner(error)) = &served
        && error.leads_root()
    {
        // And so is one of root's that goes where others lead it.
        tools.units.kill_nix_daemon(&errand.spec.name).await;
    }
    served
}

async fn make(tools: Tools, errand: &Errand, below: Option<Arc<StoreSpec>>) -> Result<(), OperationError> {
    let spec = Arc::clone(&errand.spec);
    let file = nix_conf(tools.records.runtime(), &spec.name);
    let read = {
        let file = file.clone();
        move || Ok(fs::read_to_string(file).ok())
    };
    let there = errand.run(read).await?;
    let Some(daemon) = &spec.daemon else {
        tools.units.stop_socket(&spec.name).await?;
        let remove = move || {
            remove(tools.records.runtime(), &spec.name);
            Ok(())
        };
        return errand.run(remove).await;
    };
    let look = {
        let spec = Arc::clone(&spec);
        move || {
            progress::at(Spot::Upper);
            Ok(owner(&spec, below.as_deref())?)
        }
    };
    let owner = errand.run(look).await?;
    let text = text(daemon, &spec, owner);
    // The first line is the socket.
    let socket_was_same = there.as_ref().is_some_and(|there| there.lines().next() == text.lines().next());
    if there.is_some() && !socket_was_same {
        tools.units.stop_socket(&spec.name).await?;
    }
    let name_user = {
        let store = spec.name.clone();
        move || nix_daemon_unit::write(&store, owner).map_err(|source| OperationError::NixDaemonUnit { store, source })
    };
    let user_changed = errand.run(name_user).await?;
    if owner != 0 || user_changed {
        tools.units.check_user(&spec.name, owner).await?;
    }
    if there.as_ref() != Some(&text) {
        let was_as = there.as_deref().and_then(user_of);
        let write = move || {
            // Settings may hold secrets such as access tokens.
            replace(&file, text.as_bytes(), FOR_ROOT, false).map_err(|source| OperationError::NixConf { file, source })
        };
        errand.run(write).await?;
        if socket_was_same {
            tools.units.stop_nix_daemon(&spec.name).await?;
        }
        if there.is_some() && was_as != Some(owner) {
            // What runs as the former user has no business in the store any more.
            tools.units.kill_nix_daemon(&spec.name).await;
        }
    }
    Ok(tools.units.start_socket(&spec.name, daemon, &spec.mount_unit, socket_was_same).await?)
}

/// Removes the settings. Left behind, they would be removed the next time.
pub(super) fn remove(runtime: &Path, name: &StoreName) {
    let _ = fs::remove_file(nix_conf(runtime, name));
    let _ = fs::remove_dir(directory(runtime, name));
    let _ = nix_daemon_unit::remove(name);
}

/// How the line begins that tells whom settings are for, by number.
const USER: &str = "# user ";

/// The user whom the text of a settings file is for.
pub fn user_of(text: &str) -> Option<u32> {
    text.lines().find_map(|line| line.strip_prefix(USER))?.parse().ok()
}

fn text(daemon: &NixDaemon, spec: &StoreSpec, owner: u32) -> String {
    let (path, mode, unit) = (&daemon.socket_path, daemon.socket_mode, &spec.mount_unit);
    let head = format!("# socket {path} {mode:04o} {unit}\n{USER}{owner}\n");
    head + &daemon.nix_conf(&spec.uri(), owner == 0)
}
