//! The filesystem in memory that an ephemeral store lies on.

use std::os::fd::{AsFd, OwnedFd};

use layered_stores_model::{AbsolutePath, Ephemeral};
use rustix::{
    fs::Dir,
    io::Errno,
    mount::{MountAttrFlags, MoveMountFlags},
};

use super::{
    context::{FsContext, is_tmpfs},
    layers::LayersError,
    mountinfo::MountTable,
    walk::{Walk, readable},
};

const KEY: &str = "ephemeral-size";

/// What the mount table shows as the source of our filesystems.
const SOURCE: &str = "layered-stores";

/// Mounts the filesystem, or has the one that is there take as much as is declared. What is in it stays.
///
/// systemd makes a unit of it as of every mount, and orders the store's mount, which lies below it, after it.
///
/// # Errors
/// [`LayersError`]; nothing was mounted then.
pub(super) fn ensure(ephemeral: &Ephemeral) -> Result<(), LayersError> {
    let Ephemeral { directory, size } = ephemeral;
    let sys = |doing: &'static str| move |errno| LayersError::sys(KEY, doing, directory.as_str(), errno);
    let kernel = |error| LayersError::Filesystem { directory: directory.clone(), size: size.clone(), error };
    if is_ours(&read_table(directory)?, directory) {
        let context = FsContext::pick(rustix::fs::CWD, directory.as_str()).map_err(kernel)?;
        return context.set("size", size.as_str()).and_then(|()| context.reconfigure()).map_err(kernel);
    }
    let point = bare_directory(directory)?;
    refuse_contents(&point, directory)?;
    let context = FsContext::open("tmpfs").map_err(kernel)?;
    for (key, value) in [("source", SOURCE), ("size", size.as_str()), ("mode", "0755")] {
        context.set(key, value).map_err(kernel)?;
    }
    let mount = context.mount(MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV).map_err(kernel)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(mount.as_fd(), "", point.as_fd(), "", flags).map_err(sys("mount a filesystem at"))
}

/// Refuses a directory on which no filesystem is mounted that would hide what is in it.
///
/// # Errors
/// [`LayersError`].
pub(super) fn look_ahead(ephemeral: &Ephemeral) -> Result<(), LayersError> {
    let directory = &ephemeral.directory;
    if is_ours(&read_table(directory)?, directory) {
        return Ok(());
    }
    match Walk::new(KEY).to_unmounted(directory) {
        Ok(point) => refuse_contents(&point, directory),
        Err(LayersError::Sys { errno: Errno::NOENT, .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

fn refuse_contents(point: &OwnedFd, directory: &AbsolutePath) -> Result<(), LayersError> {
    let sys = |errno| LayersError::sys(KEY, "list", directory.as_str(), errno);
    for entry in readable(point.as_fd()).and_then(Dir::read_from).map_err(sys)? {
        let entry = entry.map_err(sys)?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            let example = entry.file_name().to_string_lossy().into_owned();
            return Err(LayersError::NotEphemeralYet { directory: directory.clone(), example });
        }
    }
    Ok(())
}

/// Whether `directory` lies on a filesystem that was made for an ephemeral store: the store was one until its declaration
/// changed.
pub(super) fn left_over(directory: &AbsolutePath) -> Result<Option<AbsolutePath>, LayersError> {
    // Next to all are not in memory, and the mount table is long when there are many.
    let existing = directory.as_path().ancestors().find_map(|at| rustix::fs::statfs(at).ok());
    if !existing.is_some_and(|stat| is_tmpfs(&stat)) {
        return Ok(None);
    }
    let table = read_table(directory)?;
    let mut above = directory.as_path().ancestors().skip(1).filter_map(|at| at.to_str()?.parse().ok());
    Ok(above.find(|at| is_ours(&table, at)))
}

fn read_table(directory: &AbsolutePath) -> Result<MountTable, LayersError> {
    MountTable::read_on_the_way_to(directory.as_str()).map_err(|source| LayersError::MountTable { key: KEY, source })
}

/// Whether what is on top there was made for an ephemeral store.
pub(super) fn is_ours(table: &MountTable, at: &AbsolutePath) -> bool {
    table.top(at.as_str()).is_some_and(|mount| mount.fs_type == "tmpfs" && mount.source == SOURCE)
}

fn bare_directory(directory: &AbsolutePath) -> Result<OwnedFd, LayersError> {
    let walk = Walk::making(KEY);
    walk.to(directory)?;
    walk.to_unmounted(directory)
}
