//! Does the merged view of a path say what its layers say?
//!
//! Sizes and times cannot tell: Nix gives all files the same time, and a path that is in both layers has the same content
//! in both. But with the options that stores are mounted with, the merged view of a file shows the inode number of the
//! file it comes from, and a directory whose upper layer was deleted lists empty. So a path is walked down to the
//! first file, comparing names on the way, and then that file's inode number.

use std::{
    collections::BTreeSet,
    ffi::{OsStr, OsString},
    fmt,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::{OsStrExt as _, OsStringExt as _},
    },
};

use layered_stores_model::{AbsolutePath, Layers};
use rustix::{
    fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat},
    io::Errno,
};

use super::{
    progress::{self, Spot},
    walk,
};

/// How many directories of one path are looked into before it counts as right. Only trees of directories without any file
/// get that far.
const MAX_DIRECTORIES: usize = 256;

/// How many names of one directory are compared. An owner can make millions of them, and all are held in memory at once.
const MAX_NAMES: usize = 16 * 1024;

/// How many paths that are wrong are told of.
pub const MOST_STALE: usize = 4096;

/// After how many entries of a directory it is noted that it goes on.
const LISTED: usize = 1024;

/// A path whose merged view is not what its layers say.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stale {
    /// The path's name in the store directory.
    pub name: OsString,
    /// In which way it is wrong.
    pub symptom: Symptom,
}

/// In which way a merged view is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Symptom {
    /// A layer has it, the merged view does not.
    Missing,
    /// No layer has it (any more), the merged view does.
    Left,
    /// It shows another file than the layers have.
    OtherFile,
    /// It lists other names than the layers have.
    OtherNames,
}

impl fmt::Display for Symptom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Missing => "in a layer but missing from the merged directory",
            Self::Left => "in no layer but still in the merged directory",
            Self::OtherFile => "shows another file than its layer has",
            Self::OtherNames => "lists other names than its layers have",
        })
    }
}

impl Stale {
    /// The name for people and for the bus. Those that Nix gives stay as they are.
    pub fn shown_name(&self) -> String {
        self.name.as_bytes().escape_ascii().to_string()
    }
}

impl fmt::Display for Stale {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.shown_name(), self.symptom)
    }
}

/// The three directories that are compared, each opened once. While there is one of these, the store's mount is busy.
struct View {
    upper: OwnedFd,
    lower: OwnedFd,
    merged: OwnedFd,
}

impl View {
    fn of(layers: &Layers) -> Result<Self, Errno> {
        let open = |spot, dir: &AbsolutePath| {
            progress::at(spot);
            walk::refer_to(dir)
        };
        let (upper, lower) = (open(Spot::Upper, &layers.upper)?, open(Spot::Lower, &layers.lower)?);
        Ok(Self { upper, lower, merged: open(Spot::Merged, &layers.merged)? })
    }
}

/// The paths among `names` whose merged view is wrong.
///
/// # Errors
/// The kernel's answer when a layer or the merged directory cannot be looked at.
pub fn stale(layers: &Layers, names: impl IntoIterator<Item: AsRef<OsStr>>) -> Result<Vec<Stale>, Errno> {
    let view = View::of(layers)?;
    let mut stale = Vec::new();
    for name in names {
        stale.extend(probe_twice(&view, name.as_ref())?);
    }
    Ok(stale)
}

/// Says how many paths [`stale_of_all`] is about to look at: those that the layers list. None of the names is held.
///
/// # Errors
/// The kernel's answer when a layer cannot be listed; `ECANCELED` when the work is called off.
pub fn expect_all(layers: &Layers) -> Result<(), Errno> {
    let View { upper, lower, .. } = &View::of(layers)?;
    let mut total = 0;
    for (spot, dir) in [(Spot::Lower, lower), (Spot::Upper, upper)] {
        progress::at(spot);
        for entry in Dir::read_from(walk::readable(dir.as_fd())?)? {
            progress::go_on()?;
            total += u64::from(is_store_path_name(OsStr::from_bytes(entry?.file_name().to_bytes())));
        }
    }
    progress::expect(total);
    Ok(())
}

/// The paths whose merged view is wrong among all that the layers and the merged directory list, and how many were looked at.
/// After [`MOST_STALE`] it stops: an owner can have any number of them, and none of the names is held longer than it takes.
///
/// # Errors
/// The kernel's answer when a directory cannot be listed or looked at; `ECANCELED` when the work is called off.
pub fn stale_of_all(layers: &Layers) -> Result<(Vec<Stale>, usize), Errno> {
    let view = View::of(layers)?;
    let View { upper, lower, merged } = &view;
    let (mut stale, mut probed) = (Vec::new(), 0);
    // What an earlier one of them lists was looked at already.
    let listed =
        [(Spot::Lower, lower, &[][..]), (Spot::Upper, upper, &[lower]), (Spot::Merged, merged, &[lower, upper])];
    for (spot, dir, earlier) in listed {
        progress::at(spot);
        for entry in Dir::read_from(walk::readable(dir.as_fd())?)? {
            let entry = entry?;
            progress::go_on()?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if !is_store_path_name(name) {
                continue;
            }
            if is_in_any(earlier, name)? {
                // Both layers list it, so it was counted twice; the merged directory was not counted.
                if spot == Spot::Upper {
                    progress::one_more();
                }
                continue;
            }
            probed += 1;
            stale.extend(probe_twice(&view, name)?);
            progress::one_more();
            if stale.len() == MOST_STALE {
                return Ok((stale, probed));
            }
        }
    }
    Ok((stale, probed))
}

fn is_in_any(dirs: &[&OwnedFd], name: &OsStr) -> Result<bool, Errno> {
    for dir in dirs {
        if lookup(dir, name)?.is_some() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Paths come and go while they are looked at: only what is wrong twice is wrong.
fn probe_twice(view: &View, name: &OsStr) -> Result<Option<Stale>, Errno> {
    if probe(view, name)?.is_none() {
        return Ok(None);
    }
    Ok(probe(view, name)?.map(|symptom| Stale { name: name.to_owned(), symptom }))
}

/// Whether a directory can be opened and listed.
pub(super) fn can_list(dir: &AbsolutePath) -> Result<(), Errno> {
    let dir = walk::readable(walk::refer_to(dir)?.as_fd())?;
    // The first entry is enough.
    Dir::read_from(&dir)?.next().transpose().map(drop)
}

/// Whether `name` looks like a store path's name: 32 digits of Nix's base 32, a dash, a name.
///
/// Everything else in a store directory (`.links`, locks, temporary directories) is Nix's own business while it lasts.
pub fn is_store_path_name(name: impl AsRef<OsStr>) -> bool {
    let Some((hash, rest)) = name.as_ref().as_bytes().split_at_checked(32) else { return false };
    hash.iter().all(|b| b"0123456789abcdfghijklmnpqrsvwxyz".contains(b)) && rest.len() > 1 && rest.starts_with(b"-")
}

fn probe(view: &View, name: &OsStr) -> Result<Option<Symptom>, Errno> {
    let at = |spot, dir: &OwnedFd| {
        progress::at(spot);
        lookup(dir, name)
    };
    let upper = at(Spot::Upper, &view.upper)?;
    let (lower, merged) = (at(Spot::Lower, &view.lower)?, at(Spot::Merged, &view.merged)?);
    if let Some(symptom) = compare(upper.as_ref(), lower.as_ref(), merged.as_ref()) {
        return Ok(Some(symptom));
    }
    if !merged.is_some_and(|stat| is(&stat, FileType::Directory)) {
        return Ok(None);
    }
    let dir = |spot, dir: &OwnedFd| {
        progress::at(spot);
        open_dir(dir, name)
    };
    let mut budget = MAX_DIRECTORIES;
    let (upper, lower) = (dir(Spot::Upper, &view.upper)?, dir(Spot::Lower, &view.lower)?);
    let found = compare_trees(upper, lower, dir(Spot::Merged, &view.merged)?, &mut budget)?;
    Ok(match found {
        Found::Symptom(symptom) => Some(symptom),
        Found::AsExpected | Found::Nothing => None,
    })
}

/// Compares one entry: is it there, is it of the same type, and for a file, is it the layer's.
fn compare(upper: Option<&Stat>, lower: Option<&Stat>, merged: Option<&Stat>) -> Option<Symptom> {
    // A whiteout in the upper layer hides what the lower has.
    let hidden = upper.is_some_and(|stat| is(stat, FileType::CharacterDevice) && stat.st_rdev == 0);
    let shown = if hidden { None } else { upper.or(lower) };
    match (shown, merged) {
        (None, None) => None,
        (Some(_), None) => Some(Symptom::Missing),
        (None, Some(_)) => Some(Symptom::Left),
        (Some(shown), Some(merged)) => {
            let file_type = |stat: &Stat| FileType::from_raw_mode(stat.st_mode);
            let is_file = file_type(shown) != FileType::Directory;
            // A file that was copied up keeps the number of the lower one it comes from.
            let numbers = [Some(shown.st_ino), lower.map(|stat| stat.st_ino)];
            let other = file_type(shown) != file_type(merged) || (is_file && !numbers.contains(&Some(merged.st_ino)));
            other.then_some(Symptom::OtherFile)
        }
    }
}

/// What a walk down a tree has found.
enum Found {
    Symptom(Symptom),
    /// The first file is as it should be, or enough was looked at.
    AsExpected,
    /// No file, so the next directory may have one.
    Nothing,
}

impl From<Option<Symptom>> for Found {
    fn from(symptom: Option<Symptom>) -> Self {
        symptom.map_or(Self::AsExpected, Self::Symptom)
    }
}

/// Walks down to the first file.
fn compare_trees(
    upper: Option<OwnedFd>,
    lower: Option<OwnedFd>,
    merged: Option<OwnedFd>,
    budget: &mut usize,
) -> Result<Found, Errno> {
    let Some(merged) = merged else { return Ok(Found::Symptom(Symptom::Missing)) };
    if *budget == 0 {
        return Ok(Found::AsExpected);
    }
    *budget -= 1;
    progress::at(Spot::Merged);
    let opaque = upper.as_ref().is_some_and(is_opaque);
    let lower = lower.filter(|_| !opaque);

    let expected = names_to_show(upper.as_ref(), lower.as_ref())?;
    let shown = list(&merged, MAX_NAMES)?;
    // Of a directory that is too large to be compared, its first file tells, and that it lists anything at all.
    let differs = match (&expected, &shown) {
        (Listing { names, whole: true }, Listing { names: shown, whole: true }) => names != shown,
        _ => shown.names.is_empty() && !expected.names.is_empty(),
    };
    if differs {
        // A path that is being written has other names with every look. Only where the layers have the same ones before and
        // after, the merged directory should have had them in between.
        let at_rest = expected == names_to_show(upper.as_ref(), lower.as_ref())?;
        return Ok(at_rest.then_some(Symptom::OtherNames).into());
    }

    let below = |dir: &Option<OwnedFd>, name: &OsStr| dir.as_ref().map_or(Ok(None), |dir| lookup(dir.as_fd(), name));
    let mut directories = Vec::new();
    for name in expected.names {
        let merged = lookup(merged.as_fd(), &name)?;
        if merged.is_some_and(|stat| is(&stat, FileType::Directory)) {
            directories.push(name);
        } else {
            let layers = (below(&upper, &name)?, below(&lower, &name)?);
            return Ok(compare(layers.0.as_ref(), layers.1.as_ref(), merged.as_ref()).into());
        }
    }
    let into = |dir: &Option<OwnedFd>, name: &OsStr| dir.as_ref().map_or(Ok(None), |dir| open_dir(dir.as_fd(), name));
    for name in directories {
        let found =
            compare_trees(into(&upper, &name)?, into(&lower, &name)?, open_dir(merged.as_fd(), &name)?, budget)?;
        if !matches!(found, Found::Nothing) {
            return Ok(found);
        }
    }
    Ok(Found::Nothing)
}

/// What a directory lists.
#[derive(PartialEq, Eq)]
struct Listing {
    names: BTreeSet<OsString>,
    /// Whether it lists nothing else.
    whole: bool,
}

/// What a merged directory should list.
fn names_to_show(upper: Option<&OwnedFd>, lower: Option<&OwnedFd>) -> Result<Listing, Errno> {
    let mut expected = Listing { names: BTreeSet::new(), whole: true };
    if let Some(lower) = lower {
        expected = list(lower, MAX_NAMES)?;
    }
    if let Some(upper) = upper {
        let added = list(upper, MAX_NAMES)?;
        expected.whole &= added.whole;
        for (number, name) in added.names.into_iter().enumerate() {
            if number % LISTED == 0 {
                progress::go_on()?;
            }
            let stat = lookup(upper.as_fd(), &name)?;
            if stat.is_some_and(|stat| is(&stat, FileType::CharacterDevice) && stat.st_rdev == 0) {
                expected.names.remove(&name);
            } else {
                expected.names.insert(name);
            }
        }
    }
    Ok(expected)
}

fn is(stat: &Stat, file_type: FileType) -> bool {
    FileType::from_raw_mode(stat.st_mode) == file_type
}

/// An opaque upper directory hides the lower one of the same name.
fn is_opaque(dir: &OwnedFd) -> bool {
    let mut value = [0; 1];
    matches!(rustix::fs::fgetxattr(dir, "trusted.overlay.opaque", &mut value), Ok(1)) && value == *b"y"
}

fn lookup(dir: impl AsFd, name: &OsStr) -> Result<Option<Stat>, Errno> {
    match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT) {
        Ok(stat) => Ok(Some(stat)),
        // Linux before 6.19 answers ESTALE for some stale entries: the name is there in no usable form.
        Err(Errno::NOENT | Errno::NOTDIR | Errno::STALE) => Ok(None),
        Err(errno) => Err(errno),
    }
}

fn open_dir(dir: impl AsFd, name: &OsStr) -> Result<Option<OwnedFd>, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::openat(dir, name, flags, Mode::empty()) {
        Ok(fd) => Ok(Some(fd)),
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::STALE) => Ok(None),
        Err(errno) => Err(errno),
    }
}

fn list(dir: &OwnedFd, most: usize) -> Result<Listing, Errno> {
    let mut names = BTreeSet::new();
    for (number, entry) in Dir::read_from(dir)?.enumerate() {
        let entry = entry?;
        if number % LISTED == 0 {
            progress::go_on()?;
        }
        let name = entry.file_name().to_bytes();
        if name == b"." || name == b".." {
            continue;
        }
        if names.len() == most {
            return Ok(Listing { names, whole: false });
        }
        // Nothing says that a name is text, and a name that was changed into one would not be found.
        names.insert(OsString::from_vec(name.to_vec()));
    }
    Ok(Listing { names, whole: true })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_store_paths_are_of_interest() {
        for (name, expected) in [
            ("00000000000000000000000000000000-hello", true),
            ("0123456789abcdfghijklmnpqrsvwxyz-a", true),
            ("0123456789abcdfghijklmnpqrsvwxye-a", false),
            ("00000000000000000000000000000000-", false),
            ("00000000000000000000000000000000", false),
            ("00000000000000000000000000000000.lock", false),
            (".links", false),
            ("tmp-1234-0", false),
            ("é0000000000000000000000000000000-x", false),
        ] {
            assert_eq!(is_store_path_name(name), expected, "{name}");
        }
    }
}
