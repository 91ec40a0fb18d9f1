//! Sliding a fresh superblock under a mount, so that no path of the store is missing at any moment.
//!
//! A reconfigure drops only directory entries that nobody uses. While a process holds a file open below a path that was
//! deleted in the upper layer, everybody keeps seeing the deleted path. A second overlay of the same layers has no such
//! entries: it is attached beneath the old mount (`MOVE_MOUNT_BENEATH`, Linux 6.5) and becomes visible in the instant
//! the old one is detached. Holders of old files keep them until they close them.

use std::os::fd::{AsFd, OwnedFd};

use rustix::{
    fs::CWD,
    io::Errno,
    mount::{MoveMountFlags, UnmountFlags},
};

use super::{
    context::{ContextError, FsContext, refer_to},
    mount::fresh_mount,
};
use crate::store::{AbsolutePath, Layers};

/// Why a swap was not made. The old mount is in place and as it was.
#[derive(Debug, thiserror::Error)]
pub enum SwapError {
    /// The old mount cannot be referred to.
    #[error("cannot refer to the mount at {0}: {1}")]
    Refer(AbsolutePath, Errno),
    /// The kernel does not make a second overlay of the same layers.
    #[error("cannot make a fresh overlay for {0}: {1}")]
    Create(AbsolutePath, ContextError),
    /// The kernel does not attach the fresh overlay.
    #[error("cannot slide a fresh overlay under {0}: {1} (this needs Linux 6.5)")]
    Attach(AbsolutePath, Errno),
    /// The old mount stays on top of the fresh one.
    #[error("cannot detach the old overlay from {0}: {1}")]
    Detach(AbsolutePath, Errno),
}

/// What became of the superblock that was swapped out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OldSuperblock {
    /// It refuses writes from now on, or is gone.
    Retired,
    /// A process has a file of it open for writing. Its writes go on into the upper layer.
    StillWritten,
}

/// The mount that was swapped out. It is to be [retired](Self::retire) a little later.
#[derive(Debug)]
pub struct OldMount(OwnedFd);

/// Puts a fresh superblock in place of the mount at the merged directory. Takes well under a millisecond.
///
/// # Errors
/// [`SwapError`]; the merged directory shows the old mount then.
pub fn swap(layers: &Layers) -> Result<OldMount, SwapError> {
    let merged = &layers.merged;
    let old = refer_to(merged.as_str()).map_err(|errno| SwapError::Refer(merged.clone(), errno))?;
    let fresh = fresh_mount(layers).map_err(|error| SwapError::Create(merged.clone(), error))?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_BENEATH;
    rustix::mount::move_mount(fresh.as_fd(), "", CWD, merged.as_str(), flags)
        .map_err(|errno| SwapError::Attach(merged.clone(), errno))?;
    drop(fresh);
    detach_top(merged)?;
    // Whoever listed the fresh overlay while a call was on its way through the old one has looked names up that are no more.
    let _ = FsContext::pick(CWD, merged.as_str()).and_then(|context| context.reconfigure());
    Ok(OldMount(old))
}

/// Takes the upper one of two mounts of the same store away: the second half of a swap.
///
/// # Errors
/// [`SwapError::Detach`]; both mounts are in place then.
pub fn detach_top(merged: &AbsolutePath) -> Result<(), SwapError> {
    let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
    rustix::mount::unmount(merged.as_str(), flags).map_err(|errno| SwapError::Detach(merged.clone(), errno))
}

impl OldMount {
    /// How long system calls that were under way at the swap are given to come to their end.
    pub const GRACE: std::time::Duration = std::time::Duration::from_millis(500);

    /// Makes the old superblock refuse writes, so that two superblocks do not go on writing to one upper layer.
    ///
    /// This comes after the swap and not before it, and not at once: made read-only while it still is what the path leads to,
    /// or while calls are under way that have resolved their path to it, it would fail builds that create a file in that
    /// moment. After [`GRACE`](Self::GRACE) only processes with a directory or file of it open can reach it, and if one of
    /// those has a file open for writing, the kernel answers `EBUSY` and its writes go on into files that both share.
    pub fn retire(self) -> OldSuperblock {
        let retired = FsContext::pick(&self.0, "").and_then(|context| {
            context.set_flag("ro")?;
            context.reconfigure()
        });
        match retired {
            Err(error) if error.errno() == Errno::BUSY => OldSuperblock::StillWritten,
            _ => OldSuperblock::Retired,
        }
    }
}
