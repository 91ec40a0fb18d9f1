//! The filesystem in memory that an ephemeral store lies on.

use std::os::fd::{AsFd, OwnedFd};

use rustix::{
    fs::Dir,
    mount::{MountAttrFlags, MoveMountFlags},
};

use super::{
    context::FsContext,
    layers::{LayersError, Walk, readable},
    mountinfo::MountTable,
};
use crate::store::{AbsolutePath, Ephemeral};

const KEY: &str = "ephemeral-size";

/// `TMPFS_MAGIC` of `linux/magic.h`.
const TMPFS_MAGIC: u64 = 0x0102_1994;

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
    let sys = |doing: &'static str| move |errno| LayersError::Sys { key: KEY, doing, at: directory.to_string(), errno };
    let kernel = |error| LayersError::Filesystem { directory: directory.clone(), size: size.clone(), error };
    if is_ours(&read_table(|point| point == directory.as_str())?, directory) {
        let context = FsContext::pick(rustix::fs::CWD, directory.as_str()).map_err(kernel)?;
        return context.set("size", size.as_str()).and_then(|()| context.reconfigure()).map_err(kernel);
    }
    let point = bare_directory(directory)?;
    for entry in readable(point.as_fd()).and_then(Dir::read_from).map_err(sys("list"))? {
        let entry = entry.map_err(sys("list"))?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            let example = entry.file_name().to_string_lossy().into_owned();
            return Err(LayersError::NotEphemeralYet { directory: directory.clone(), example });
        }
    }
    let context = FsContext::open("tmpfs").map_err(kernel)?;
    for (key, value) in [("source", SOURCE), ("size", size.as_str()), ("mode", "0755")] {
        context.set(key, value).map_err(kernel)?;
    }
    let mount = context.mount(MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV).map_err(kernel)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(mount.as_fd(), "", point.as_fd(), "", flags).map_err(sys("mount a filesystem at"))
}

/// Whether `directory` lies on a filesystem that was made for an ephemeral store: the store was one until its declaration
/// changed.
pub(super) fn left_over(directory: &AbsolutePath) -> Result<Option<AbsolutePath>, LayersError> {
    // Next to all are not in memory, and the mount table is long when there are many.
    let existing = directory.as_path().ancestors().find_map(|at| rustix::fs::statfs(at).ok());
    if existing.is_none_or(|stat| stat.f_type as u64 != TMPFS_MAGIC) {
        return Ok(None);
    }
    let table = read_table(|point| directory.as_path().starts_with(point))?;
    let mut above = directory.as_path().ancestors().skip(1).filter_map(|at| at.to_str()?.parse().ok());
    Ok(above.find(|at| is_ours(&table, at)))
}

fn read_table(is_of_interest: impl Fn(&str) -> bool) -> Result<MountTable, LayersError> {
    MountTable::read(is_of_interest).map_err(|source| LayersError::MountTable { key: KEY, source })
}

fn is_ours(table: &MountTable, at: &AbsolutePath) -> bool {
    table.top(at.as_str()).is_some_and(|mount| mount.fs_type == "tmpfs" && mount.source == SOURCE)
}

fn bare_directory(directory: &AbsolutePath) -> Result<OwnedFd, LayersError> {
    let walk = Walk::of_root(KEY);
    walk.to(directory)?;
    walk.open_unmounted(directory)
}
