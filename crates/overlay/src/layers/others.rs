//! Where Nix that is run by root works, nobody else may put anything: it follows links there, so whoever can makes root change
//! what they choose. In the merged directory it opens locks (`openLockFile`) and deletes below `.links`, whichever layer these are
//! in; in a state directory it makes files and directories, of a lower store with `read-only=true` as well
//! (`LocalStore::LocalStore`).

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use layered_stores_model::{AbsolutePath, LowerStore, StoreSpec};
use nix::unistd::Gid;
use rustix::{
    fs::{AtFlags, FileType, Mode, StatVfsMountFlags},
    io::Errno,
};

use super::{LayersError, accounts::BuildUsers, open_lower};
use crate::walk::{self, Walk};

/// What Nix goes through in a state directory.
const FOLLOWED: [&str; 4] = ["db", "temproots", "gcroots", "profiles"];

/// Something that others than root can change.
struct Changeable {
    at: String,
    uid: u32,
    mode: u32,
}

impl Changeable {
    fn of_state(self, spec: &StoreSpec) -> LayersError {
        let Self { at, uid, mode } = self;
        LayersError::StateForOthers { dir: spec.state_dir.clone(), at, uid, mode }
    }
}

/// Refuses a store of root's of which others can change what root's Nix follows.
pub(crate) fn refuse_others(spec: &StoreSpec) -> Result<(), LayersError> {
    walk::together(|| refuse_others_in_all(spec))
}

fn refuse_others_in_all(spec: &StoreSpec) -> Result<(), LayersError> {
    let upper = &spec.layers.upper;
    let stat = rustix::fs::lstat(upper.as_path())
        .map_err(|errno| LayersError::sys("upper-layer", "look at", upper.as_str(), errno))?;
    let build_users = BuildUsers::of(spec);
    refuse_writers(spec, &build_users, Gid::from_raw(stat.st_gid), Mode::from_raw_mode(stat.st_mode))?;
    if let Some(changeable) = changeable(Walk::new("root"), &spec.state_dir)? {
        return Err(changeable.of_state(spec));
    }
    refuse_lower_of_others(spec, &open_lower(&spec.layers.lower)?, &build_users)
}

/// Refuses an upper layer of root's that others can write to, with a group and a mode that it has or is to get. Nix gives it to
/// its build users by itself.
pub(super) fn refuse_writers(
    spec: &StoreSpec,
    build_users: &BuildUsers<'_>,
    gid: Gid,
    mode: Mode,
) -> Result<(), LayersError> {
    if !are_for_others(build_users, gid, mode)? {
        return Ok(());
    }
    let mode = mode.as_raw_mode() & 0o7777;
    Err(LayersError::UpperForOthers { path: spec.layers.upper.clone(), gid: gid.as_raw(), mode })
}

fn are_for_others(build_users: &BuildUsers<'_>, gid: Gid, mode: Mode) -> Result<bool, LayersError> {
    Ok(mode.contains(Mode::WOTH) || mode.contains(Mode::WGRP) && !build_users.gids()?.contains(&gid))
}

/// Refuses a state directory of root's, to which was walked, that others can change.
pub(super) fn refuse_state_of_others(spec: &StoreSpec, state_dir: BorrowedFd<'_>) -> Result<(), LayersError> {
    match changeable_in(Walk::new("root"), state_dir, &spec.state_dir)? {
        None => Ok(()),
        Some(changeable) => Err(changeable.of_state(spec)),
    }
}

/// Refuses a lower store whose directories others can change in which root's Nix works. To that of its objects was walked.
pub(super) fn refuse_lower_of_others(
    spec: &StoreSpec,
    found: &OwnedFd,
    build_users: &BuildUsers<'_>,
) -> Result<(), LayersError> {
    // A layered store is looked at by itself.
    let LowerStore::Nix { state_dir, has_daemon, .. } = &spec.lower_store else { return Ok(()) };
    let refuse = |dir: &AbsolutePath, Changeable { at, uid, mode }| {
        Err(LayersError::LowerForOthers { dir: dir.clone(), at, uid, mode })
    };
    let (walk, lower) = (Walk::new("lower-store"), &spec.layers.lower);
    let stat = walk.stat(found.as_fd(), lower.as_str())?;
    let mode = Mode::from_raw_mode(stat.stx_mode.into());
    let is_changeable = stat.stx_uid != 0 || are_for_others(build_users, Gid::from_raw(stat.stx_gid), mode)?;
    if is_changeable && !is_read_only(found.as_fd()) {
        let mode = mode.as_raw_mode() & 0o7777;
        return refuse(lower, Changeable { at: lower.to_string(), uid: stat.stx_uid, mode });
    }
    if *has_daemon {
        return Ok(());
    }
    match changeable(walk, state_dir)? {
        None => Ok(()),
        Some(changeable) => refuse(state_dir, changeable),
    }
}

/// On a filesystem that is mounted for reading nobody changes anything; what is in it is for who has mounted it to judge.
fn is_read_only(dir: BorrowedFd<'_>) -> bool {
    rustix::fs::fstatvfs(dir).is_ok_and(|stat| stat.f_flag.contains(StatVfsMountFlags::RDONLY))
}

/// What of a state directory, of those above it and of those in it that Nix goes through can be changed by others than root.
fn changeable(walk: Walk, dir: &AbsolutePath) -> Result<Option<Changeable>, LayersError> {
    match walk.to(dir) {
        Ok(found) => changeable_in(walk, found.as_fd(), dir),
        Err(error) => changeable_above(walk, dir, error),
    }
}

/// The same of what is above a directory to which a walk has failed. Nix makes what is missing, and so could whoever may make files
/// in the last one that is there.
fn changeable_above(walk: Walk, dir: &AbsolutePath, error: LayersError) -> Result<Option<Changeable>, LayersError> {
    match error {
        LayersError::Sys { errno: Errno::NOENT, .. } => {
            let Some(above) = dir.as_path().parent().and_then(|above| above.to_str()?.parse().ok()) else {
                return Ok(None);
            };
            match walk.to(&above) {
                Ok(found) => not_roots(walk, found.as_fd(), &above),
                Err(error) => changeable_above(walk, &above, error),
            }
        }
        LayersError::UnsafeParent { at, uid, mode, .. } => Ok(Some(Changeable { at, uid, mode })),
        LayersError::SharedParent { directory: at, mode, .. } => Ok(Some(Changeable { at, uid: 0, mode })),
        error => Err(error),
    }
}

fn not_roots(walk: Walk, found: BorrowedFd<'_>, dir: &AbsolutePath) -> Result<Option<Changeable>, LayersError> {
    match walk.check_own(found, dir) {
        Err(LayersError::NotRoots { path, uid, mode, .. }) => Ok(Some(Changeable { at: path.to_string(), uid, mode })),
        own => own.map(|_| None),
    }
}

fn changeable_in(walk: Walk, found: BorrowedFd<'_>, dir: &AbsolutePath) -> Result<Option<Changeable>, LayersError> {
    let itself = not_roots(walk, found, dir)?;
    if itself.is_some() || is_read_only(found) {
        return Ok(itself);
    }
    for name in FOLLOWED {
        let at = || format!("{dir}/{name}");
        let stat = match rustix::fs::statat(found, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => continue,
            Err(errno) => return Err(LayersError::sys("root", "look at", at(), errno)),
        };
        // A link has all rights, and leads where root has it lead.
        let is_link = FileType::from_raw_mode(stat.st_mode) == FileType::Symlink;
        if stat.st_uid != 0 || (!is_link && stat.st_mode & 0o022 != 0) {
            return Ok(Some(Changeable { at: at(), uid: stat.st_uid, mode: stat.st_mode & 0o7777 }));
        }
    }
    Ok(None)
}
