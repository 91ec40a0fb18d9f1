//! Making and unmaking the overlay of a store.

use std::os::fd::{AsFd, OwnedFd};

use layered_stores_model::{AbsolutePath, Layers, MAX_DEPTH};
use rustix::{
    fs::{AtFlags, StatxAttributes, StatxFlags},
    io::Errno,
    mount::MoveMountFlags,
};

use super::{
    context::{ContextError, FsContext, is_overlay},
    host,
    identity::Id,
    layers::{Directories, LayersError},
    mountinfo::MountTable,
    options::{mount_attributes, other_flags, superblock_options},
    place::{MountId, NotOurs, Place, Top},
    progress::{self, Spot},
    walk::{self, Walk},
};

/// Why a store is not mounted, or still is.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// A directory cannot be used.
    #[error(transparent)]
    Layers(#[from] LayersError),
    /// The kernel does not make the overlay.
    #[error("cannot make an overlay for {0}: {1}")]
    Create(AbsolutePath, ContextError),
    /// The lower store is on an overlay already.
    #[error(
        "lower-store: {0} is on an overlay already, and the kernel stacks at most {MAX_DEPTH} overlays; use the \
         lower store of the one below"
    )]
    TooDeep(AbsolutePath),
    /// A directory is not the one any more that was looked at.
    #[error("{0} was replaced by another directory while an overlay of it was made; it is tried again")]
    Replaced(AbsolutePath),
    /// The upper layer is another one than it should be.
    #[error(
        "upper-layer: {0} is another directory than the store's; its filesystem was unmounted or covered: mount it again, or \
         take away what covers it"
    )]
    OtherUpper(AbsolutePath),
    /// The kernel does not attach the overlay.
    #[error("cannot mount at {0}: {1}")]
    Attach(AbsolutePath, Errno),
    /// Something was mounted at the mount point meanwhile.
    #[error("something else was mounted at {0} in the same moment; it is left alone: unmount it, or name another root")]
    Occupied(AbsolutePath),
    /// What is mounted is not the store.
    #[error(transparent)]
    NotOurs(#[from] NotOurs),
    /// The kernel does not change the flags.
    #[error("cannot change the flags of the mount at {0}: {1}")]
    Flags(AbsolutePath, Errno),
    /// The kernel does not unmount it.
    #[error("cannot unmount {0}: {1}")]
    Unmount(AbsolutePath, Errno),
}

/// Mounts a store at its merged directory, if the upper layer has this mark.
///
/// # Errors
/// [`MountError`]; nothing is mounted then.
pub fn mount(layers: &Layers, upper: Option<&Id>) -> Result<MountId, MountError> {
    // What is mounted here is on the way to nothing.
    walk::together(|| mount_at(layers, upper))
}

fn mount_at(layers: &Layers, upper: Option<&Id>) -> Result<MountId, MountError> {
    let merged = &layers.merged;
    let fresh = fresh_mount(layers, upper)?;
    let attach = |errno| MountError::Attach(merged.clone(), errno);
    let id = MountId::of(&fresh).map_err(attach)?;
    let place = Place::of(merged)?;
    let point = Walk::new("root").to_unmounted(merged)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(fresh.as_fd(), "", point.as_fd(), "", flags).map_err(attach)?;
    // The kernel attaches to whatever is on top by then (`lock_mount`). On a mount of somebody else's, ours would hide that.
    if is_attached_to(&fresh, &point).map_err(attach)? {
        return Ok(id);
    }
    place.detach(fresh.as_fd(), id).map_err(|errno| MountError::Unmount(merged.clone(), errno))?;
    Err(MountError::Occupied(merged.clone()))
}

/// Whether a mount hangs on the mount that a directory is part of.
fn is_attached_to(mount: &OwnedFd, point: &OwnedFd) -> Result<bool, Errno> {
    match host::parent_of_mount(MountId::of(mount)?.number()) {
        Ok(parent) => Ok(parent == MountId::of(point)?.number()),
        // Before Linux 6.8 there is the mount table only.
        Err(_) => {
            let number = |fd: &OwnedFd| walk::stat(fd.as_fd()).map(|stat| stat.stx_mnt_id);
            let (mount, parent) = (number(mount)?, number(point)?);
            let found =
                MountTable::parent_of(mount).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
            Ok(found == Some(parent))
        }
    }
}

/// Gives a store's mount the flags it is to have. Returns in what they differed, if they did.
///
/// # Errors
/// [`MountError`]; the mount is as it was then.
pub fn correct_flags(layers: &Layers) -> Result<Option<String>, MountError> {
    let at = &layers.merged;
    let top = Top::of(layers, None)?;
    let table = MountTable::read_on_the_way_to(at.as_str()).map_err(|e| NotOurs::Unknown(at.clone(), e))?;
    let Some(mount) = table.top(at.as_str()) else { return Err(NotOurs::NotMounted(at.clone()).into()) };
    let differ = other_flags(&mount.flags, layers);
    if differ.is_some() {
        let read_only = mount.flags.split(',').any(|flag| flag == "ro");
        top.set_flags(layers, read_only).map_err(|errno| MountError::Flags(at.clone(), errno))?;
    }
    Ok(differ)
}

/// Unmounts a store.
///
/// # Errors
/// [`MountError`]; [`MountError::Unmount`] with `EBUSY` while it is used.
pub fn unmount(layers: &Layers) -> Result<(), MountError> {
    let id = Top::of(layers, None)?.id();
    let place = Place::of(&layers.merged)?;
    place.unmount(id).map_err(|errno| MountError::Unmount(layers.merged.clone(), errno))
}

/// Whether something is mounted at a path, without a look at the whole mount table. No symbolic link is followed.
pub fn is_mount_point(path: &AbsolutePath) -> bool {
    let Ok(place) = walk::refer_to(path) else { return false };
    let stat = rustix::fs::statx(place, c"", AtFlags::EMPTY_PATH, StatxFlags::empty());
    stat.is_ok_and(|stat| stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

/// An overlay of a store's layers that is attached nowhere. Its upper layer has this mark, if there is one.
pub(super) fn fresh_mount(layers: &Layers, upper: Option<&Id>) -> Result<OwnedFd, MountError> {
    let directories = Directories::open(layers)?;
    progress::at(Spot::Merged);
    let made = FsContext::open("overlay").and_then(|context| {
        context.set("source", "overlay")?;
        for (key, value) in superblock_options(layers) {
            context.set(key, value)?;
        }
        context.mount(mount_attributes(layers))
    });
    let fresh = made.map_err(|error| {
        // That overlays are stacked too deep the kernel tells nobody but its own log.
        if error.errno() == Errno::INVAL && is_overlay(directories.lower()) {
            MountError::TooDeep(layers.lower.clone())
        } else {
            MountError::Create(layers.merged.clone(), error)
        }
    })?;
    directories.are_in_place(layers).map_err(MountError::Replaced)?;
    // An overlay shows the attributes of its upper layer.
    let id = Id::of(&fresh).map_err(|errno| MountError::Attach(layers.merged.clone(), errno))?;
    if upper.is_some() && id.as_ref() != upper {
        return Err(MountError::OtherUpper(layers.upper.clone()));
    }
    Ok(fresh)
}
