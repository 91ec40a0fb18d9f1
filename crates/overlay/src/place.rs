//! The place a store is mounted at, and the mount that is on top there: told apart by descriptor, never by path alone.
//!
//! What is mounted at a path is for whoever may mount to decide, and may be something else from one system call to the next.
//! So each act looks first whether what is on top is the store's own mount. An act that takes a descriptor hits that mount and
//! no other; for the one that does not, see [`Place::detach`].

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use layered_stores_model::{AbsolutePath, Layers};
use rustix::{
    fs::{AtFlags, Statx, StatxFlags},
    io::Errno,
    mount::{MountFlags, UnmountFlags},
};

use super::{
    layers::LayersError,
    mountinfo::{Cover, MountState, MountTable},
    options::mount_flags,
    progress::{self, Spot},
    walk::{self, Walk},
};

/// `STATX_MNT_ID_UNIQUE` of `linux/stat.h`: numbers that are not used again, from Linux 6.8 on.
const MNT_ID_UNIQUE: StatxFlags = StatxFlags::from_bits_retain(0x4000);

/// What tells a mount from every other one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MountId {
    number: u64,
    /// The superblock's device: on kernels older than 6.8 the number is used again once the mount is gone.
    device: (u32, u32),
}

impl MountId {
    /// The mount a descriptor refers to.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn of(fd: impl AsFd) -> Result<Self, Errno> {
        let stat = rustix::fs::statx(fd.as_fd(), c"", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID | MNT_ID_UNIQUE)?;
        Ok(Self::from(&stat))
    }

    /// The number: the kernel's for good from Linux 6.8 on, before that the mount table's.
    pub fn number(self) -> u64 {
        self.number
    }
}

impl From<&Statx> for MountId {
    fn from(stat: &Statx) -> Self {
        Self { number: stat.stx_mnt_id, device: (stat.stx_dev_major, stat.stx_dev_minor) }
    }
}

/// What is on top at a store's mount point is not the store's mount.
#[derive(Debug, thiserror::Error)]
pub enum NotOurs {
    /// Nothing is mounted there, or something else.
    #[error("{0} is not an overlay mount; is the store started?")]
    NotMounted(AbsolutePath),
    /// Something else is mounted there.
    #[error("{what} is mounted at {at}, which is not this store; it is left alone: unmount it with `umount {at}`")]
    Foreign {
        /// What it is.
        what: String,
        /// The mount point.
        at: AbsolutePath,
    },
    /// The store's mount is there, and something else is on top of it, or of a directory above it.
    #[error("{0}")]
    Covered(Cover),
    /// It cannot be found out.
    #[error("cannot look at what is mounted at {0}: {1}")]
    Unknown(AbsolutePath, std::io::Error),
}

/// The mount on top at a store's mount point. While there is one of these, the mount is busy.
#[derive(Debug)]
pub struct Top {
    fd: OwnedFd,
    id: MountId,
}

impl Top {
    /// Refers to the store's mount at the merged directory. `known` is the mount that was found to be the store's before;
    /// another one is compared with the store's layers.
    ///
    /// # Errors
    /// [`NotOurs`].
    pub fn of(layers: &Layers, known: Option<MountId>) -> Result<Self, NotOurs> {
        let at = &layers.merged;
        let unknown = |errno: Errno| NotOurs::Unknown(at.clone(), errno.into());
        progress::at(Spot::Merged);
        let read = || MountTable::read_on_the_way_to(at.as_str()).map_err(|error| NotOurs::Unknown(at.clone(), error));
        let fd = match walk::refer_to(at) {
            Ok(fd) => fd,
            Err(Errno::NOENT | Errno::NOTDIR) => {
                // The path may lead into something that hides the store.
                let MountState::Covered(cover) = read()?.state(layers) else {
                    return Err(NotOurs::NotMounted(at.clone()));
                };
                return Err(NotOurs::Covered(cover));
            }
            Err(errno) => return Err(unknown(errno)),
        };
        let id = MountId::of(&fd).map_err(unknown)?;
        if known == Some(id) {
            return Ok(Self { fd, id });
        }
        let table = read()?;
        let is_on_top = walk::stat(fd.as_fd()).map_err(unknown)?.stx_mnt_id;
        match table.state(layers) {
            MountState::Mounted { .. } if table.top(at.as_str()).is_some_and(|top| top.id == is_on_top) => {
                Ok(Self { fd, id })
            }
            MountState::Absent | MountState::Mounted { .. } => Err(NotOurs::NotMounted(at.clone())),
            MountState::Covered(cover) => Err(NotOurs::Covered(cover)),
            MountState::Foreign { what } => Err(NotOurs::Foreign { what, at: at.clone() }),
        }
    }

    /// The mount.
    pub fn id(&self) -> MountId {
        self.id
    }

    /// Gives the mount the flags that stores have and those that were declared.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn set_flags(&self, layers: &Layers, read_only: bool) -> Result<(), Errno> {
        let mut flags = MountFlags::BIND | mount_flags(layers);
        flags.set(MountFlags::RDONLY, read_only);
        // A link of /proc leads to the very mount, whatever is on top of it (`nd_jump_link`).
        rustix::mount::mount_remount(by_descriptor(self.fd.as_fd()), flags, c"")
    }
}

impl AsFd for Top {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<Top> for OwnedFd {
    fn from(top: Top) -> Self {
        top.fd
    }
}

/// The place a store is mounted at: the directory the mount point lies in, and its name there.
#[derive(Debug)]
pub(super) struct Place<'p> {
    parent: OwnedFd,
    name: &'p str,
}

impl<'p> Place<'p> {
    /// Walks there.
    pub(super) fn of(merged: &'p AbsolutePath) -> Result<Self, LayersError> {
        let (parent, name) = Walk::new("root").to_parent(merged)?;
        Ok(Self { parent, name })
    }

    /// What is on top there now.
    pub(super) fn top(&self) -> Result<MountId, Errno> {
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        let mask = StatxFlags::MNT_ID | MNT_ID_UNIQUE;
        Ok(MountId::from(&rustix::fs::statx(&self.parent, self.name, flags, mask)?))
    }

    /// Takes a mount that is on top there away, for whoever comes by path. Those who have something of it open keep that.
    ///
    /// The kernel goes on from the mount it is given to whatever is on top of that by then (`LOOKUP_MOUNTPOINT`), so the look
    /// comes directly before. Whether the mount is busy does not matter.
    ///
    /// # Errors
    /// `EBUSY` when something else is on top, which is not touched; else the kernel's answer.
    pub(super) fn detach(&self, mount: BorrowedFd<'_>, id: MountId) -> Result<(), Errno> {
        let path = by_descriptor(mount);
        if self.top()? != id {
            return Err(Errno::BUSY);
        }
        rustix::mount::unmount(path, UnmountFlags::DETACH)
    }

    /// Unmounts what is on top there, if that is `id` and is not in use.
    ///
    /// # Errors
    /// `EBUSY` when it is in use, or something else is on top; else the kernel's answer.
    pub(super) fn unmount(&self, id: MountId) -> Result<(), Errno> {
        // A descriptor of the mount itself would keep it busy: it is named in the directory it lies in.
        let path = format!("{}/{}", by_descriptor(self.parent.as_fd()), self.name);
        if self.top()? != id {
            return Err(Errno::BUSY);
        }
        rustix::mount::unmount(path, UnmountFlags::NOFOLLOW)
    }
}

/// What a descriptor refers to, for system calls that take nothing but paths.
fn by_descriptor(fd: BorrowedFd<'_>) -> String {
    format!("/proc/thread-self/fd/{}", fd.as_raw_fd())
}
