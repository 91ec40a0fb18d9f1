//! Sliding a fresh superblock under a mount, so that no path of the store is missing at any moment.
//!
//! A reconfigure drops only directory entries that nobody uses. While a process holds a file open below a path that was
//! deleted in the upper layer, everybody keeps seeing the deleted path. A second overlay of the same layers has no such
//! entries: it is attached beneath the old mount (`MOVE_MOUNT_BENEATH`, Linux 6.5) and becomes visible in the instant
//! the old one is detached. Holders of old files keep them until they close them.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::LazyLock,
};

use layered_stores_model::{AbsolutePath, Layers};
use rustix::{fs::CWD, io::Errno, mount::MoveMountFlags};

use super::{
    context::{ContextError, FsContext},
    identity::{self, Id},
    layers::LayersError,
    mount::{MountError, fresh_mount},
    mountinfo::{MountState, MountTable},
    place::{MountId, NotOurs, Place, Top},
    walk,
};

/// Why a swap was not made. The old mount is in place and as it was.
#[derive(Debug, thiserror::Error)]
pub enum SwapError {
    /// The kernel is too old.
    #[error(
        "cannot put a fresh overlay in the place of {0}: before Linux 6.5 a mount that is in use cannot be replaced"
    )]
    Impossible(AbsolutePath),
    /// What is mounted is not the store.
    #[error(transparent)]
    NotOurs(#[from] NotOurs),
    /// The way to the mount point is not safe.
    #[error(transparent)]
    Walk(#[from] LayersError),
    /// No second overlay of the same layers can be made.
    #[error("no fresh overlay can take its place: {0}")]
    Create(#[from] MountError),
    /// The kernel does not attach the fresh overlay.
    #[error("cannot slide a fresh overlay under {0}: {1}")]
    Attach(AbsolutePath, Errno),
    /// The old mount stays on top of the fresh one, most likely because something was mounted on top of it.
    #[error("cannot detach the old overlay from {0}: {1}")]
    Detach(AbsolutePath, Errno),
    /// The mount table could not be read.
    #[error("cannot read the mount table: {0}")]
    MountTable(std::io::Error),
}

/// Where mounts that are swapped out are kept for the next run of the daemon, should this one end before it has
/// [retired](OldMount::retire) them.
pub trait SafeKeeping {
    /// Keeps a mount under its number.
    fn keep(&self, mount: BorrowedFd<'_>, number: u64);
    /// Does not keep it any longer.
    fn let_go(&self, number: u64);
}

/// For those who have no next run.
impl SafeKeeping for () {
    fn keep(&self, _: BorrowedFd<'_>, _: u64) {}

    fn let_go(&self, _: u64) {}
}

/// What became of the superblock that was swapped out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OldSuperblock {
    /// It refuses writes from now on.
    Retired,
    /// A process has a file of it open for writing. Its writes go on into the upper layer.
    StillWritten,
    /// It is mounted, so it is not swapped out and was left as it is.
    StillMounted,
}

/// A superblock that was swapped out could not be made read-only.
#[derive(Debug, thiserror::Error)]
pub enum RetireError {
    /// The kernel refuses.
    #[error(transparent)]
    Refused(#[from] ContextError),
    /// It cannot be found out whether it is mounted.
    #[error("cannot find out whether it is mounted: {0}")]
    Unknown(std::io::Error),
}

/// The mount that was swapped out. It is to be [retired](Self::retire) a little later.
#[derive(Debug)]
pub struct OldMount {
    fd: OwnedFd,
    number: u64,
}

/// Whether this kernel can replace a mount that is in use. It is asked once, and nothing is mounted for it.
pub fn is_possible() -> bool {
    // A flag it does not know is refused with EINVAL before the path is looked at (`move_mount` in fs/namespace.c); an empty
    // path with ENOENT.
    static POSSIBLE: LazyLock<bool> = LazyLock::new(|| {
        rustix::mount::move_mount(CWD, "", CWD, "", MoveMountFlags::MOVE_MOUNT_BENEATH) != Err(Errno::INVAL)
    });
    *POSSIBLE
}

/// Puts a fresh superblock in place of `old`, the store's mount. Takes well under a millisecond. Returns what was swapped
/// out, and what is mounted now.
///
/// # Errors
/// [`SwapError`]; the merged directory shows the old mount then, or whatever was mounted on top of it meanwhile.
pub fn swap(layers: &Layers, old: Top, keeping: &dyn SafeKeeping) -> Result<(OldMount, MountId), SwapError> {
    let merged = &layers.merged;
    if !is_possible() {
        return Err(SwapError::Impossible(merged.clone()));
    }
    let place = Place::of(merged)?;
    let attach = |errno| SwapError::Attach(merged.clone(), errno);
    // The path of the upper layer may lead to another one by now.
    let upper = Id::of(&old).map_err(attach)?;
    let fresh = fresh_mount(layers, upper.as_ref())?;
    if !identity::are_one(&old, &fresh).map_err(attach)? {
        return Err(MountError::OtherUpper(layers.upper.clone()).into());
    }
    let id = MountId::of(&fresh).map_err(attach)?;
    // Made under a mount that is not on top, it would go beneath that one's cover: the kernel takes what is on top.
    if place.top().map_err(attach)? != old.id() {
        return Err(attach(Errno::BUSY));
    }
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH
        | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH
        | MoveMountFlags::MOVE_MOUNT_BENEATH;
    rustix::mount::move_mount(fresh.as_fd(), "", old.as_fd(), "", flags).map_err(attach)?;
    let old = take_off(&place, merged, old.id(), old.into(), keeping)?;
    // Whoever listed the fresh overlay while a call was on its way through the old one has looked names up that are no more.
    let _ = FsContext::pick(&fresh, "").and_then(|context| context.reconfigure());
    Ok((old, id))
}

/// Takes the upper one of two mounts of the same store away: the second half of a swap that was interrupted.
///
/// # Errors
/// [`SwapError`]; both mounts are in place then.
pub fn finish(layers: &Layers, keeping: &dyn SafeKeeping) -> Result<OldMount, SwapError> {
    let merged = &layers.merged;
    let place = Place::of(merged)?;
    let old = Top::of(layers, None)?;
    let table = MountTable::read_on_the_way_to(merged.as_str()).map_err(SwapError::MountTable)?;
    if !matches!(table.state(layers), MountState::Mounted { twice: true, .. }) {
        return Err(SwapError::Detach(merged.clone(), Errno::BUSY));
    }
    take_off(&place, merged, old.id(), old.into(), keeping)
}

/// Takes the mount on top off.
///
/// It is kept first: between the two, the next run finds it mounted and takes it off by itself.
fn take_off(
    place: &Place<'_>,
    merged: &AbsolutePath,
    id: MountId,
    fd: OwnedFd,
    keeping: &dyn SafeKeeping,
) -> Result<OldMount, SwapError> {
    keeping.keep(fd.as_fd(), id.number());
    match place.detach(fd.as_fd(), id) {
        Ok(()) => Ok(OldMount { fd, number: id.number() }),
        Err(errno) => {
            keeping.let_go(id.number());
            Err(SwapError::Detach(merged.clone(), errno))
        }
    }
}

impl AsFd for OldMount {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl OldMount {
    /// How long system calls that were under way at the swap are given to come to their end.
    pub const GRACE: std::time::Duration = std::time::Duration::from_millis(500);

    /// A mount that an earlier run has swapped out.
    pub fn kept(fd: OwnedFd, number: u64) -> Self {
        Self { fd, number }
    }

    /// The number it is kept under.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Makes the old superblock refuse writes, so that two superblocks do not go on writing to one upper layer.
    ///
    /// This comes after the swap and not before it, and not at once: made read-only while it still is what the path leads to,
    /// or while calls are under way that have resolved their path to it, it would fail builds that create a file in that
    /// moment. After [`GRACE`](Self::GRACE) only processes with a directory or file of it open can reach it, and if one of
    /// those has a file open for writing, the kernel answers `EBUSY` and its writes go on into files that both share.
    ///
    /// # Errors
    /// [`RetireError`]; it goes on taking writes then.
    pub fn retire(&self) -> Result<OldSuperblock, RetireError> {
        let number = walk::stat(self.fd.as_fd()).map_err(|errno| RetireError::Unknown(errno.into()))?.stx_mnt_id;
        if MountTable::parent_of(number).map_err(RetireError::Unknown)?.is_some() {
            return Ok(OldSuperblock::StillMounted);
        }
        let context = FsContext::pick(&self.fd, "")?;
        context.set_flag("ro")?;
        match context.reconfigure() {
            Ok(()) => Ok(OldSuperblock::Retired),
            Err(error) if error.errno() == Errno::BUSY => Ok(OldSuperblock::StillWritten),
            Err(error) => Err(error.into()),
        }
    }
}
