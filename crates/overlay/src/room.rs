//! Does the filesystem of an upper layer take writes, and is there room on it?
//!
//! An overlay tells of neither: its own mount stays writable when the filesystem below turns read-only over an error, which
//! ext4 shows nowhere but in its options (`emergency_ro`), and every build fails. So it is tried.

use std::os::fd::AsFd as _;

use layered_stores_model::Layers;
use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
};

use super::{
    progress::{self, Spot},
    walk,
};

/// Less than this is no room. A database in the state dir and the smallest build take more.
const LEAST: u64 = 1 << 20;

/// What there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// It takes writes, as far as can be told.
    Enough,
    /// It takes none.
    ReadOnly(Errno),
    /// Those who build have less than 1 MiB of so many bytes.
    NoSpace(u64),
    /// No file can be made, however much space there is.
    NoFiles(Errno),
}

/// Looks whether a file could be made on the filesystem of the upper layer, and filled.
///
/// The file is made in the work dir, which lies on the same mount and is root's alone, without a name (`O_TMPFILE`): nothing
/// of it is left whenever this ends, and no watch of a layer wakes up.
pub fn look(layers: &Layers) -> Room {
    progress::at(Spot::Work);
    let Ok(work) = walk::refer_to(&layers.work) else { return Room::Enough };
    let file = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
    let refused = rustix::fs::openat(&work, c".", file, Mode::RUSR | Mode::WUSR).map(drop).err();
    let space = rustix::fs::fstatvfs(work.as_fd());
    match (refused, space) {
        (Some(errno @ (Errno::ROFS | Errno::IO)), _) => Room::ReadOnly(errno),
        // Blocks that are reserved for root are of no use to those who build.
        (_, Ok(space)) if space.f_blocks > 0 && space.f_bavail.saturating_mul(space.f_frsize) < LEAST => {
            Room::NoSpace(space.f_blocks.saturating_mul(space.f_frsize))
        }
        (Some(errno @ (Errno::NOSPC | Errno::DQUOT)), _) => Room::NoFiles(errno),
        // Some filesystems have no such files; whatever else it is, others find out and say better.
        _ => Room::Enough,
    }
}
