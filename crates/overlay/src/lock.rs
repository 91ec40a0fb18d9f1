//! One daemon for one upper layer.
//!
//! The kernel lets two overlays share an upper layer with no more than a line in its log. What is locked is a file beside it,
//! which only root can open: a lock of the upper layer itself could be taken by everybody who may look into it. A directory
//! has one name and one parent, so there is one such file, whatever work dir and whatever mount namespace somebody else uses.

use std::{
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use layered_stores_model::AbsolutePath;
use rustix::{
    fs::{AtFlags, FileType, FlockOperation, Mode, OFlags, RawMode},
    io::Errno,
};

use super::{
    layers::LayersError,
    walk::{self, Walk},
};

/// How often a lock is tried again before it counts as held by another.
///
/// A daemon that was killed keeps its locks for the instant until the kernel has closed its files.
const ATTEMPTS: u32 = 20;
const PAUSE: Duration = Duration::from_millis(10);

/// The lock that keeps every other process from using an upper layer. Released when dropped, and by the kernel when
/// the process dies.
#[derive(Debug)]
pub struct UpperLock {
    _fd: OwnedFd,
}

impl UpperLock {
    /// Takes the lock of an upper layer.
    pub(super) fn take(upper: &AbsolutePath) -> Result<Self, LayersError> {
        let sys = |errno| LayersError::sys("upper-layer", "lock", upper.as_str(), errno);
        let (parent, name) = Walk::new("upper-layer").to_parent(upper)?;
        let fd = open(&parent, &format!(".{name}.lock")).map_err(sys)?;
        for attempt in 1.. {
            match rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(Errno::AGAIN) if attempt < ATTEMPTS => std::thread::sleep(PAUSE),
                Err(Errno::AGAIN) => return Err(LayersError::Locked(upper.clone())),
                Err(errno) => return Err(sys(errno)),
            }
        }
        Ok(Self { _fd: fd })
    }
}

/// The file, made if need be. One that others could open is left from when the directory was theirs, and replaced.
fn open(parent: &OwnedFd, name: &str) -> Result<OwnedFd, Errno> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let private = Mode::RUSR | Mode::WUSR;
    for _ in 0..2 {
        // One that is there can be locked where nothing can be written.
        let opened = match rustix::fs::openat(parent, name, flags | OFlags::RDONLY, private) {
            Err(Errno::NOENT) => rustix::fs::openat(parent, name, flags | OFlags::RDONLY | OFlags::CREATE, private),
            opened => opened,
        };
        let fd = match opened {
            Err(Errno::LOOP | Errno::NXIO | Errno::NODEV) => None,
            result => Some(result?),
        };
        if let Some(fd) = fd {
            let stat = walk::stat(fd.as_fd())?;
            let mode = RawMode::from(stat.stx_mode);
            let others = Mode::RWXG | Mode::RWXO;
            if stat.stx_uid == 0
                && FileType::from_raw_mode(mode) == FileType::RegularFile
                && !Mode::from_raw_mode(mode).intersects(others)
            {
                return Ok(fd);
            }
        }
        rustix::fs::unlinkat(parent, name, AtFlags::empty())?;
    }
    Err(Errno::EXIST)
}
