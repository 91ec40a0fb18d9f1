//! Where Nix that is run by root works, nobody else may put anything: it follows links there, so whoever can makes root change
//! what they choose. In the store directory it opens locks (`openLockFile`) and deletes below `.links`; in a lower store that it
//! opens itself it makes files of the state directory, with `read-only=true` as well (`LocalStore::LocalStore`).

use std::os::fd::AsFd as _;

use layered_stores_model::{LowerStore, StoreSpec};
use nix::unistd::Gid;
use rustix::{fs::Mode, io::Errno};

use super::{LayersError, accounts::build_users};
use crate::walk::Walk;

/// Refuses a store of root's of which others can change what root's Nix follows.
pub(crate) fn refuse_others(spec: &StoreSpec) -> Result<(), LayersError> {
    let upper = &spec.layers.upper;
    let stat = rustix::fs::lstat(upper.as_path())
        .map_err(|errno| LayersError::sys("upper-layer", "look at", upper.as_str(), errno))?;
    refuse_writers(spec, Gid::from_raw(stat.st_gid), Mode::from_raw_mode(stat.st_mode))?;
    refuse_lower_of_others(spec)
}

/// Refuses an upper layer of root's that others can write to, with a group and a mode that it has or is to get. Nix gives it to
/// its build users by itself.
pub(super) fn refuse_writers(spec: &StoreSpec, gid: Gid, mode: Mode) -> Result<(), LayersError> {
    let for_group = mode.contains(Mode::WGRP) && !build_users(spec)?.contains(&gid);
    if !for_group && !mode.contains(Mode::WOTH) {
        return Ok(());
    }
    let mode = mode.as_raw_mode() & 0o7777;
    Err(LayersError::UpperForOthers { path: spec.layers.upper.clone(), gid: gid.as_raw(), mode })
}

/// Refuses a lower store that root's Nix opens itself, if its state directory is not root's alone.
pub(super) fn refuse_lower_of_others(spec: &StoreSpec) -> Result<(), LayersError> {
    // That of a layered store is looked at as its own.
    let LowerStore::Nix { state_dir: Some(dir), .. } = &spec.lower_store else { return Ok(()) };
    let walk = Walk::new("lower-store");
    let looked = walk.to(dir).and_then(|found| walk.check_own(found.as_fd(), dir).map(drop));
    match looked {
        // Nix makes it.
        Ok(()) | Err(LayersError::Sys { errno: Errno::NOENT, .. }) => Ok(()),
        Err(LayersError::UnsafeParent { at, uid, mode, .. }) => {
            Err(LayersError::LowerForOthers { dir: dir.clone(), at, uid, mode })
        }
        Err(LayersError::SharedParent { directory: at, mode, .. }) => {
            Err(LayersError::LowerForOthers { dir: dir.clone(), at, uid: 0, mode })
        }
        Err(LayersError::NotRoots { path, uid, mode, .. }) => {
            Err(LayersError::LowerForOthers { dir: dir.clone(), at: path.to_string(), uid, mode })
        }
        Err(error) => Err(error),
    }
}
