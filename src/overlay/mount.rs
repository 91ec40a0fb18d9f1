//! Making and unmaking the overlay of a store.

use std::os::fd::{AsFd, OwnedFd};

use rustix::{
    fs::{AtFlags, CWD, StatxAttributes, StatxFlags},
    io::Errno,
    mount::{MoveMountFlags, UnmountFlags},
};

use super::{
    context::{ContextError, FsContext, is_overlay},
    options::{mount_attributes, superblock_options},
};
use crate::store::{AbsolutePath, Layers, MAX_DEPTH};

/// Why a store is not mounted, or still is.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The kernel does not make the overlay.
    #[error("cannot make an overlay for {0}: {1}")]
    Create(AbsolutePath, ContextError),
    /// The lower store is on an overlay already.
    #[error(
        "lower-store: {0} is on an overlay already, and the kernel stacks at most {MAX_DEPTH} overlays; use the \
         lower store of the one below"
    )]
    TooDeep(AbsolutePath),
    /// The kernel does not attach the overlay.
    #[error("cannot mount at {0}: {1}")]
    Attach(AbsolutePath, Errno),
    /// The kernel does not unmount it.
    #[error("cannot unmount {0}: {1}")]
    Unmount(AbsolutePath, Errno),
}

/// Mounts a store at its merged directory.
///
/// # Errors
/// [`MountError`]; nothing is mounted then.
pub fn mount(layers: &Layers) -> Result<(), MountError> {
    let merged = &layers.merged;
    let fresh = fresh_mount(layers).map_err(|error| {
        // That overlays are stacked too deep the kernel tells nobody but its own log.
        if error.errno() == Errno::INVAL && is_overlay(layers.lower.as_str()) {
            MountError::TooDeep(layers.lower.clone())
        } else {
            MountError::Create(merged.clone(), error)
        }
    })?;
    rustix::mount::move_mount(fresh.as_fd(), "", CWD, merged.as_str(), MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(|errno| MountError::Attach(merged.clone(), errno))
}

/// Unmounts what is mounted at a store's merged directory.
///
/// # Errors
/// [`MountError::Unmount`], with `EBUSY` while it is used.
pub fn unmount(merged: &AbsolutePath) -> Result<(), MountError> {
    rustix::mount::unmount(merged.as_str(), UnmountFlags::NOFOLLOW)
        .map_err(|errno| MountError::Unmount(merged.clone(), errno))
}

/// Whether something is mounted at a path, without a look at the whole mount table.
pub fn is_mount_point(path: &AbsolutePath) -> bool {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    let stat = rustix::fs::statx(CWD, path.as_str(), flags, StatxFlags::empty());
    stat.is_ok_and(|stat| stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

/// An overlay of a store's layers that is attached nowhere.
pub(super) fn fresh_mount(layers: &Layers) -> Result<OwnedFd, ContextError> {
    let context = FsContext::open("overlay")?;
    context.set("source", "overlay")?;
    for (key, value) in superblock_options(layers) {
        context.set(key, value)?;
    }
    context.mount(mount_attributes(layers))
}
