//! As whom a store's Nix daemon runs: a drop-in for the store's instance of `layered-stores-nix-daemon@.service`.
//!
//! Root's Nix daemon follows links in the state dir, and whoever owns that would be root by it. So the daemon of a store
//! that belongs to a user runs as that user, and it is systemd that sees to it.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    time::SystemTime,
};

use layered_stores_model::StoreName;

use super::mount_unit::RUNTIME_UNITS;
use crate::file::{FOR_ALL, replace};

/// Not to be met by somebody else's drop-in: one of an instance hides those of the template that have the same name.
const FILE: &str = "50-layered-stores-owner.conf";

/// The service of a store's Nix daemon.
pub(super) fn service(store: &StoreName) -> String {
    format!("layered-stores-nix-daemon@{store}.service")
}

/// By number: what the kernel says of the store's directories is what was compared.
fn render(uid: u32) -> String {
    // HOME: the user need not have one, and what is in it is not for those who use the daemon. Nix keeps there what it knows
    // of binary caches.
    format!(
        "# Written by layered-storesd: the Nix daemon of a store that belongs to a user runs as that user. Changes will be lost.\n\
         [Service]\n\
         User={uid}\n\
         CapabilityBoundingSet=\n\
         AmbientCapabilities=\n\
         CacheDirectory=layered-stores/%i\n\
         CacheDirectoryMode=0700\n\
         Environment=HOME=%C/layered-stores/%i\n"
    )
}

/// Has the Nix daemon of a store run as a user, root being 0. Whether anything had to be changed for that.
///
/// # Errors
/// What the kernel says.
pub fn write(store: &StoreName, uid: u32) -> io::Result<bool> {
    let file = directory(store).join(FILE);
    if uid == 0 {
        return remove(store);
    }
    let text = render(uid);
    if fs::read(&file).is_ok_and(|old| old == text.as_bytes()) {
        return Ok(false);
    }
    // While it is written it does not end in .conf, and systemd does not take it.
    replace(&file, text.as_bytes(), FOR_ALL, false)?;
    // As for a mount unit: systemd looks for new files when the directory's time is another than before.
    File::open(RUNTIME_UNITS)?.set_modified(SystemTime::now())?;
    Ok(true)
}

/// Removes what was written for a store. Whether there was anything.
///
/// # Errors
/// What the kernel says.
pub fn remove(store: &StoreName) -> io::Result<bool> {
    match fs::remove_file(directory(store).join(FILE)) {
        Ok(()) => {
            // Somebody else's drop-ins may be in it.
            let _ = fs::remove_dir(directory(store));
            Ok(true)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn directory(store: &StoreName) -> PathBuf {
    Path::new(RUNTIME_UNITS).join(format!("{}.d", service(store)))
}
