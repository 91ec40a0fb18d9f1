//! Making the merged view agree with its layers again: reconfigure, probe, and if need be swap.
//!
//! A ladder, because each step costs more and cures more. None is trusted: what counts is the probe after it.

use std::collections::BTreeSet;

use rustix::{
    fs::{AtFlags, CWD, StatxFlags},
    io::Errno,
};

use super::{
    context::{ContextError, FsContext, is_overlay},
    probe::{self, Stale},
    swap::{OldMount, SwapError, swap},
};
use crate::store::{AbsolutePath, Layers};

/// The lowest step a refresh starts with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rung {
    /// Do nothing if the probe finds nothing.
    #[default]
    Probe,
    /// Reconfigure whatever the probe would find: somebody asked for it.
    Reconfigure,
    /// Swap: the superblock underneath was swapped, and this one still refers to the old one.
    Swap,
}

/// What may have changed in the layers since the merged view was last known to be right.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Names that appeared in or disappeared from a layer.
    pub names: BTreeSet<String>,
    /// Anything may have: changes went unseen.
    pub unknown: bool,
}

impl Changes {
    /// Changes nobody saw.
    pub fn unknown() -> Self {
        Self { unknown: true, ..Self::default() }
    }

    /// Whether nothing changed.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty() && !self.unknown
    }

    /// Adds what is in `other`.
    pub fn merge(&mut self, other: Self) {
        self.names.extend(other.names);
        self.unknown |= other.unknown;
    }
}

/// How far up the ladder a refresh went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing was stale, nothing was done.
    Current,
    /// The superblock was reconfigured.
    Reconfigured,
    /// A fresh superblock was put in place.
    Swapped,
}

/// The result of a refresh.
#[derive(Debug)]
pub struct Report {
    /// What was done.
    pub outcome: Outcome,
    /// The mount that was swapped out, if one was.
    pub old: Option<OldMount>,
    /// What is wrong all the same.
    pub still_stale: Vec<Stale>,
    /// How many paths were probed.
    pub probed: usize,
    /// The layers as they were just before.
    pub fingerprint: Fingerprint,
}

/// A refresh that could not be carried out.
#[derive(Debug, thiserror::Error)]
pub enum RefreshError {
    /// The directory is no root of an overlay mount.
    #[error("{0} is not an overlay mount; is the store started?")]
    NotAnOverlay(String),
    /// The reconfigure failed.
    #[error("cannot reconfigure the overlay at {0}: {1}")]
    Reconfigure(String, ContextError),
    /// The swap failed.
    #[error(transparent)]
    Swap(#[from] SwapError),
    /// A directory could not be looked at.
    #[error("cannot look at the layers of {0}: {1}")]
    Probe(AbsolutePath, Errno),
}

/// What tells cheaply whether names were added to or removed from the layers: a directory's modification time changes
/// with every such change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Fingerprint {
    upper: DirectoryStamp,
    lower: DirectoryStamp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct DirectoryStamp {
    device: (u32, u32),
    inode: u64,
    seconds: i64,
    nanoseconds: u32,
}

impl Fingerprint {
    /// The layers' fingerprint now.
    ///
    /// # Errors
    /// The kernel's answer when a layer cannot be looked at.
    pub fn of(layers: &Layers) -> Result<Self, Errno> {
        let stamp = |dir: &AbsolutePath| {
            let stat = rustix::fs::statx(CWD, dir.as_str(), AtFlags::SYMLINK_NOFOLLOW, StatxFlags::BASIC_STATS)?;
            Ok::<_, Errno>(DirectoryStamp {
                device: (stat.stx_dev_major, stat.stx_dev_minor),
                inode: stat.stx_ino,
                seconds: stat.stx_mtime.tv_sec,
                nanoseconds: stat.stx_mtime.tv_nsec,
            })
        };
        Ok(Self { upper: stamp(&layers.upper)?, lower: stamp(&layers.lower)? })
    }

    /// Whether the lower directory is the one it was. A superblock goes on with the one it was made of.
    pub fn has_lower_of(&self, other: &Self) -> bool {
        (self.lower.device, self.lower.inode) == (other.lower.device, other.lower.inode)
    }
}

/// Drops the unused directory entries of the overlay mounted at `merged`, in every mount namespace at once.
///
/// With no parameters this is the one reconfigure that overlayfs takes (`ovl_reconfigure`, Linux 6.5 and newer refuse
/// any option), and it keeps the flags of the mount. mount(8) passes the old options, which is why its remount fails.
///
/// # Errors
/// [`RefreshError`]; success says nothing about whether the view is right.
pub fn reconfigure(merged: &str) -> Result<(), RefreshError> {
    if !is_overlay(merged) {
        return Err(RefreshError::NotAnOverlay(merged.to_owned()));
    }
    let context = FsContext::pick(CWD, merged).map_err(|error| match error.errno() {
        Errno::INVAL | Errno::NOENT => RefreshError::NotAnOverlay(merged.to_owned()),
        _ => RefreshError::Reconfigure(merged.to_owned(), error),
    })?;
    context.reconfigure().map_err(|error| RefreshError::Reconfigure(merged.to_owned(), error))
}

/// Refreshes the merged view of a mounted store as far as it needs it.
///
/// # Errors
/// [`RefreshError`] when a step could not be made; a [`Report`] with paths in `still_stale` is no error here.
pub fn refresh(layers: &Layers, changes: &Changes, from: Rung) -> Result<Report, RefreshError> {
    let cannot_look = |errno| RefreshError::Probe(layers.merged.clone(), errno);
    // Taken first: what changes from here on is seen by the next refresh.
    let fingerprint = Fingerprint::of(layers).map_err(cannot_look)?;
    let names = if changes.unknown { probe::all_names(layers).map_err(cannot_look)? } else { changes.names.clone() };
    let probe = |names: &BTreeSet<String>| probe::stale(layers, names.iter().map(String::as_str)).map_err(cannot_look);
    let probed = names.len();
    let report = |outcome, old, still_stale| Report { outcome, old, still_stale, probed, fingerprint };

    if from == Rung::Probe && probe(&names)?.is_empty() {
        return Ok(report(Outcome::Current, None, Vec::new()));
    }
    if from < Rung::Swap {
        reconfigure(layers.merged.as_str())?;
        if probe(&names)?.is_empty() {
            return Ok(report(Outcome::Reconfigured, None, Vec::new()));
        }
    }
    let old = swap(layers)?;
    let still_stale = probe(&names)?;
    Ok(report(Outcome::Swapped, Some(old), still_stale))
}
