//! Does the kernel remember of some names what the layers do not say any more?
//!
//! What the [probe](super::probe) looks for, for names that have just come or gone, and without a trace: a look through the merged
//! directory would have the kernel remember each name as it is in this moment, in which it may be half made. So it is asked
//! only for what it remembers already (`RESOLVE_CACHED`, Linux 5.12), and what it does not remember is right.
//!
//! What it remembers it may keep to itself: where a filesystem has a say in it (`d_revalidate`: FUSE, NFS), and while anybody
//! mounts or unmounts anything anywhere, which every user can, in a namespace of their own. So a glance is for those who cannot
//! wait, and never the last look.

use std::{
    collections::BTreeSet,
    ffi::{OsStr, OsString},
    os::fd::OwnedFd,
};

use layered_stores_model::Layers;
use rustix::{
    fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags},
    io::Errno,
};

use super::{
    progress::{self, Spot},
    walk,
};

/// Whether one of `names` is remembered as something that it is not.
///
/// # Errors
/// The kernel's answer when a layer or the merged directory cannot be looked at.
pub fn is_stale(layers: &Layers, names: &BTreeSet<OsString>) -> Result<bool, Errno> {
    let at = |spot, dir| {
        progress::at(spot);
        walk::refer_to(dir)
    };
    let upper = at(Spot::Upper, &layers.upper)?;
    let (lower, merged) = (at(Spot::Lower, &layers.lower)?, at(Spot::Merged, &layers.merged)?);
    for name in names {
        // Most names are remembered in no store, and of these the layers need not be asked.
        progress::at(Spot::Merged);
        let Some(remembered) = remembered(&merged, name)? else { continue };
        progress::at(Spot::Upper);
        let shown = match is_there(&upper, name)? {
            Some(is_whiteout) => !is_whiteout,
            None => {
                progress::at(Spot::Lower);
                is_there(&lower, name)?.is_some()
            }
        };
        if remembered != shown {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether a layer has a name, and whether as a whiteout.
fn is_there(layer: &OwnedFd, name: &OsStr) -> Result<Option<bool>, Errno> {
    match rustix::fs::statat(layer, name, AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT) {
        Ok(stat) => {
            let is_device = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice;
            Ok(Some(is_device && stat.st_rdev == 0))
        }
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// Whether the kernel remembers a name as being there. `None`: it does not remember anything, or does not say.
fn remembered(merged: &OwnedFd, name: &OsStr) -> Result<Option<bool>, Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::openat2(merged, name, flags, Mode::empty(), ResolveFlags::CACHED) {
        Ok(_) => Ok(Some(true)),
        // Linux before 6.19 answers ESTALE for some stale entries: the name is there in no usable form.
        Err(Errno::NOENT | Errno::STALE) => Ok(Some(false)),
        Err(Errno::AGAIN) => Ok(None),
        Err(errno) => Err(errno),
    }
}
