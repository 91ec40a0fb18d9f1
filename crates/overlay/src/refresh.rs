//! Making the merged view agree with its layers again: reconfigure, probe, and if need be swap.
//!
//! A ladder, because each step costs more and cures more. None is trusted: what counts is the probe after it.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    os::fd::{AsFd, OwnedFd},
    thread,
    time::Duration,
};

use layered_stores_model::{AbsolutePath, Layers};
use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
};

use super::{
    context::{ContextError, FsContext, is_overlay},
    place::{MountId, NotOurs, Top},
    probe::{self, Stale},
    progress::{self, Spot},
    swap::{self, OldMount, SafeKeeping, SwapError},
    walk,
};

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

/// How many names are kept. Whoever owns an upper layer can make up any number of them; beyond this, all are looked at.
const MOST_NAMES: usize = 4096;

/// How often stores above are made to let go of what one below is to forget.
const LET_GO: usize = 2;

/// Where there is no swap, how long somebody may take who just has a look at a path that is to be forgotten. Who looks at it
/// while the kernel drops what is in it (freeing a deleted file may wait for the disk) keeps its directory, and with that a
/// listing without names, for everybody until the next reconfigure.
const LOOKS: [Duration; 3] = [Duration::from_millis(1), Duration::from_millis(10), Duration::from_millis(100)];

/// What may have changed in the layers since the merged view was last known to be right.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Names that appeared in or disappeared from a layer.
    pub names: BTreeSet<OsString>,
    /// Anything may have: changes went unseen.
    pub unknown: bool,
    /// Some were taken away.
    pub taken: bool,
}

impl Changes {
    /// Changes nobody saw.
    pub fn unknown() -> Self {
        Self { unknown: true, ..Self::default() }
    }

    /// Changes nobody saw, among which names may have been taken away.
    pub fn lost() -> Self {
        Self { taken: true, ..Self::unknown() }
    }

    /// Whether names that were taken away may be among those that nobody saw. What is in no layer any more is not found by
    /// listing them, nor in the merged directory, where a process that uses it keeps it in everybody's view.
    pub fn is_lost(&self) -> bool {
        self.unknown && self.taken
    }

    /// Whether nothing changed.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty() && !self.unknown
    }

    /// Adds a name, which was `taken` away or has come.
    pub fn add(&mut self, name: OsString, taken: bool) {
        self.taken |= taken;
        if !self.unknown {
            self.names.insert(name);
            self.bound();
        }
    }

    /// Adds what is in `other`.
    pub fn merge(&mut self, other: Self) {
        self.unknown |= other.unknown;
        self.taken |= other.taken;
        self.names.extend(other.names);
        self.bound();
    }

    fn bound(&mut self) {
        if self.names.len() > MOST_NAMES {
            *self = Self { taken: self.taken, ..Self::unknown() };
        }
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
    /// The store's mount, if it was looked up: the next refresh knows it by that.
    pub mount: Option<MountId>,
    /// What is wrong all the same.
    pub still_stale: Vec<Stale>,
    /// Paths may be in view that are in no layer any more: nobody knows which, and a swap was not to be made.
    pub lost: bool,
    /// How many paths were probed.
    pub probed: usize,
    /// The layers as they were just before.
    pub fingerprint: Fingerprint,
}

impl Report {
    /// Whether what was looked at is right now.
    pub fn is_right(&self) -> bool {
        self.still_stale.is_empty() && !self.lost
    }

    /// What is to be on record after it. A fresh superblock is made of the directories that are there now, also if not all was looked
    /// at: those that were there before may be known again by nothing but a number that the kernel gives to others.
    pub fn on_record(&self, is_all_right: bool) -> Option<Fingerprint> {
        match (is_all_right, self.outcome) {
            (true, _) => Some(self.fingerprint),
            (false, Outcome::Swapped) => Some(self.fingerprint.of_unknown_names()),
            (false, _) => None,
        }
    }
}

/// A refresh that could not be carried out.
#[derive(Debug, thiserror::Error)]
pub enum RefreshError {
    /// The directory is no root of an overlay mount.
    #[error("{0} is not an overlay mount; is the store started?")]
    NotAnOverlay(String),
    /// What is mounted is not the store.
    #[error(transparent)]
    NotOurs(#[from] NotOurs),
    /// The reconfigure failed.
    #[error("cannot reconfigure the overlay at {0}: {1}")]
    Reconfigure(String, ContextError),
    /// The swap failed.
    #[error(transparent)]
    Swap(#[from] SwapError),
    /// A layer or the merged directory could not be looked at.
    #[error("{key}: cannot look at {path}: {errno}{}", way_out(*.errno))]
    Look {
        /// The configuration's key.
        key: &'static str,
        /// The directory.
        path: AbsolutePath,
        /// The kernel's answer.
        errno: Errno,
    },
}

impl RefreshError {
    /// A look at a store's directories failed; which of them cannot be looked at is found out by a second look.
    pub fn look(layers: &Layers, errno: Errno) -> Self {
        let Layers { lower, upper, merged, .. } = layers;
        let directories =
            [(Spot::Lower, "lower-store", lower), (Spot::Upper, "upper-layer", upper), (Spot::Merged, "root", merged)];
        for (spot, key, path) in directories {
            progress::at(spot);
            if let Err(errno) = probe::can_list(path) {
                return Self::Look { key, path: path.clone(), errno };
            }
        }
        // It was a directory in one of them, and the merged one shows what is in both.
        Self::Look { key: "root", path: merged.clone(), errno }
    }
}

fn way_out(errno: Errno) -> &'static str {
    match errno {
        // What FUSE says of a server that has ended.
        Errno::NOTCONN => {
            "; what serves this filesystem has ended: unmount it and mount it again, then this heals by itself"
        }
        Errno::NOENT => "; mount the filesystem that it is on",
        Errno::LOOP => "; a symbolic link is on the way: put the directory back",
        _ => "; `journalctl -k` may say more; when that is mended run `layered-stores remount` for this store",
    }
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
        let stamp = |spot, dir: &AbsolutePath| {
            progress::at(spot);
            let stat = walk::stat(walk::refer_to(dir)?.as_fd())?;
            Ok::<_, Errno>(DirectoryStamp {
                device: (stat.stx_dev_major, stat.stx_dev_minor),
                inode: stat.stx_ino,
                seconds: stat.stx_mtime.tv_sec,
                nanoseconds: stat.stx_mtime.tv_nsec,
            })
        };
        Ok(Self { upper: stamp(Spot::Upper, &layers.upper)?, lower: stamp(Spot::Lower, &layers.lower)? })
    }

    /// The same directories, of which it is not known what was in them.
    #[must_use]
    pub fn of_unknown_names(self) -> Self {
        let unknown = |stamp| DirectoryStamp { seconds: 0, nanoseconds: 0, ..stamp };
        Self { upper: unknown(self.upper), lower: unknown(self.lower) }
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
    progress::at(Spot::Merged);
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let root = rustix::fs::open(merged, flags, Mode::empty());
    match root.ok().filter(|root: &OwnedFd| is_overlay(root)) {
        Some(root) => reconfigure_mount(&root, merged),
        None => Err(RefreshError::NotAnOverlay(merged.to_owned())),
    }
}

fn reconfigure_mount(root: impl AsFd, merged: &str) -> Result<(), RefreshError> {
    let context = FsContext::pick(root, "").map_err(|error| match error.errno() {
        Errno::INVAL | Errno::NOENT => RefreshError::NotAnOverlay(merged.to_owned()),
        _ => RefreshError::Reconfigure(merged.to_owned(), error),
    })?;
    context.reconfigure().map_err(|error| RefreshError::Reconfigure(merged.to_owned(), error))
}

/// Reconfigures a store's mount. `known` is that mount, if it was looked up before; returns which it is.
///
/// # Errors
/// [`RefreshError`].
pub fn reconfigure_store(layers: &Layers, known: Option<MountId>) -> Result<MountId, RefreshError> {
    // The descriptor keeps the mount busy, and goes with the end of this.
    let top = Top::of(layers, known)?;
    reconfigure_mount(&top, layers.merged.as_str())?;
    Ok(top.id())
}

/// Refreshes the merged view of a mounted store as far as it needs it, and no further than `to`. `known` is its mount, if it
/// was looked up before. `above` are the layers of the stores that lie on it. What was swapped out is returned also if a later
/// step could not be made.
///
/// # Errors
/// [`RefreshError`] when a step could not be made; a [`Report`] with paths in `still_stale` is no error here.
pub fn refresh(
    layers: &Layers,
    changes: &Changes,
    rungs: (Rung, Rung),
    known: Option<MountId>,
    above: &[&Layers],
    keeping: &dyn SafeKeeping,
) -> (Result<Report, RefreshError>, Option<OldMount>) {
    let mut swapped_out = None;
    let swap = |known| {
        let (old, fresh) = swap::swap(layers, Top::of(layers, known)?, keeping)?;
        swapped_out = Some(old);
        Ok(fresh)
    };
    let report = climb(layers, changes, rungs, known, above, swap);
    (report, swapped_out)
}

/// Goes up the ladder; the last step is `swap`, which is told the mount and returns the fresh one.
fn climb(
    layers: &Layers,
    changes: &Changes,
    (from, to): (Rung, Rung),
    known: Option<MountId>,
    above: &[&Layers],
    mut swap: impl FnMut(Option<MountId>) -> Result<MountId, RefreshError>,
) -> Result<Report, RefreshError> {
    let cannot_look = |errno| RefreshError::look(layers, errno);
    // Taken first: what changes from here on is seen by the next refresh.
    let fingerprint = Fingerprint::of(layers).map_err(cannot_look)?;
    // What the old mount shows does not matter any more, and it may show nothing: its lower store may have died.
    let swapped = if from == Rung::Swap { Some(swap(known)?) } else { None };
    let probe = || {
        let stale = if changes.unknown {
            probe::stale_of_all(layers)
        } else {
            probe::stale(layers, &changes.names).map(|stale| (stale, changes.names.len()))
        };
        stale.map_err(cannot_look)
    };
    let report = |outcome, mount, (still_stale, probed)| {
        let lost = changes.is_lost() && outcome != Outcome::Swapped && swap::is_possible();
        Report { outcome, mount, still_stale, lost, probed, fingerprint }
    };

    if swapped.is_some() {
        return Ok(report(Outcome::Swapped, swapped, probe()?));
    }
    if from == Rung::Probe && !changes.is_lost() {
        let found = probe()?;
        if found.0.is_empty() {
            return Ok(report(Outcome::Current, known, found));
        }
    }
    let known = Some(reconfigure_store(layers, known)?);
    let mut found = probe()?;
    let once_more = |found: &mut (Vec<Stale>, usize)| -> Result<(), RefreshError> {
        reconfigure_store(layers, known)?;
        found.0 = probe::stale(layers, found.0.iter().map(|stale| &stale.name)).map_err(cannot_look)?;
        Ok(())
    };
    // An overlay keeps the entries of its layers that its own refer to (`ovl_lookup`), so those above let go first. One of them
    // may look again before this one has forgotten.
    for _ in 0..LET_GO {
        if found.0.is_empty() || above.is_empty() {
            break;
        }
        for layers in above {
            // What is wrong with a store above is for its own refresh to say.
            let _ = reconfigure_store(layers, None);
        }
        once_more(&mut found)?;
    }
    let is_right = found.0.is_empty() && !changes.is_lost();
    if is_right {
        return Ok(report(Outcome::Reconfigured, known, found));
    }
    if to < Rung::Swap || !swap::is_possible() {
        // The first reconfigure after the last process has let go of a path cures it.
        for pause in LOOKS {
            if found.0.is_empty() {
                break;
            }
            thread::sleep(pause);
            once_more(&mut found)?;
        }
        return Ok(report(Outcome::Reconfigured, known, found));
    }
    let fresh = match swap(known) {
        // Nothing is known to be wrong. Where no overlay can be made, as of a layer that has become read-only, this is all.
        Err(_) if found.0.is_empty() => {
            return Ok(Report { lost: false, ..report(Outcome::Reconfigured, known, found) });
        }
        fresh => fresh?,
    };
    Ok(report(Outcome::Swapped, Some(fresh), probe()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_cannot_be_looked_at_is_the_one_that_is_named() {
        for (missing, key) in [("lower", "lower-store"), ("upper", "upper-layer"), ("merged", "root")] {
            let dir = tempfile::tempdir().expect("a directory");
            let path = |name: &str| {
                let path = dir.path().canonicalize().expect("it is there").join(name);
                if name != missing {
                    std::fs::create_dir(&path).expect("made");
                }
                path.to_str().expect("text").parse().expect("a path")
            };
            let [lower, upper, work, merged] = ["lower", "upper", "work", "merged"].map(path);
            let layers = Layers { lower, upper, work, merged, options: Vec::new() };
            let error = RefreshError::look(&layers, Errno::IO).to_string();
            assert!(error.starts_with(&format!("{key}: cannot look at /")), "{error}");
            let end = format!("/{missing}: No such file or directory (os error 2); mount the filesystem that it is on");
            assert!(error.ends_with(&end), "{error}");
        }
    }

    #[test]
    fn a_look_that_fails_inside_of_the_directories_says_what_the_kernel_said() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().canonicalize().expect("it is there");
        let path: AbsolutePath = path.to_str().expect("text").parse().expect("a path");
        let [lower, upper, work, merged] = [(); 4].map(|()| path.clone());
        let error =
            RefreshError::look(&Layers { lower, upper, work, merged, options: Vec::new() }, Errno::IO).to_string();
        assert!(
            error.starts_with("root: cannot look at /") && error.contains("(os error 5); `journalctl -k`"),
            "{error}"
        );
    }

    #[test]
    fn names_without_end_are_any_names() {
        let mut changes = Changes::default();
        for number in 0..MOST_NAMES {
            changes.add(number.to_string().into(), false);
        }
        assert_eq!((changes.names.len(), changes.unknown), (MOST_NAMES, false));
        changes.add("one more".into(), false);
        assert_eq!(changes, Changes::unknown());
        changes.add("and another".into(), true);
        assert_eq!(changes, Changes::lost());
    }

    #[test]
    fn names_that_were_taken_away_and_forgotten_are_lost() {
        let mut changes = Changes::default();
        changes.add("taken away".into(), true);
        assert!(!changes.is_lost(), "its name is known");
        for number in 0..MOST_NAMES {
            changes.add(number.to_string().into(), false);
        }
        assert!(changes.is_lost());
        let mut merged = Changes::unknown();
        merged.merge(changes);
        assert_eq!(merged, Changes::lost());
    }
}
