//! Does the merged view of a path say what its layers say?
//!
//! Sizes and times cannot tell: Nix gives all files the same time, and a path that is in both layers has the same content
//! in both. But with the options that stores are mounted with, the merged view of a file shows the inode number of the
//! file it comes from, and a directory whose upper layer was deleted lists empty. So a path is walked down to the
//! first file, comparing names on the way, and then that file's inode number.

use std::{
    collections::BTreeSet,
    fmt,
    os::fd::{AsFd, OwnedFd},
};

use rustix::{
    fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, Stat},
    io::Errno,
};

use crate::store::{AbsolutePath, Layers};

/// How many directories of one path are looked into before it counts as right. Only trees of directories without any file
/// get that far.
const MAX_DIRECTORIES: usize = 256;

/// A path whose merged view is not what its layers say.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stale {
    /// The path's name in the store directory.
    pub name: String,
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

impl fmt::Display for Stale {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name, self.symptom)
    }
}

/// The paths among `names` whose merged view is wrong.
///
/// # Errors
/// The kernel's answer when a layer or the merged directory cannot be looked at.
pub fn stale<'n>(layers: &Layers, names: impl IntoIterator<Item = &'n str>) -> Result<Vec<Stale>, Errno> {
    let mut stale = Vec::new();
    for name in names {
        // Paths come and go while they are looked at: only what is wrong twice is wrong.
        if probe(layers, name)?.is_some()
            && let Some(symptom) = probe(layers, name)?
        {
            stale.push(Stale { name: name.to_owned(), symptom });
        }
    }
    Ok(stale)
}

/// The names of all store paths in the layers and the merged directory.
///
/// # Errors
/// The kernel's answer when a directory cannot be listed.
pub fn all_names(layers: &Layers) -> Result<BTreeSet<String>, Errno> {
    let mut names = BTreeSet::new();
    for dir in [&layers.lower, &layers.upper, &layers.merged] {
        let dir = open_dir(CWD.as_fd(), dir.as_str())?.ok_or(Errno::NOENT)?;
        names.extend(list(&dir)?.into_iter().filter(|name| is_store_path_name(name)));
    }
    Ok(names)
}

/// Whether `name` looks like a store path's name: 32 digits of Nix's base 32, a dash, a name.
///
/// Everything else in a store directory (`.links`, locks, temporary directories) is Nix's own business while it lasts.
pub fn is_store_path_name(name: &str) -> bool {
    let Some((hash, rest)) = name.split_at_checked(32) else { return false };
    hash.bytes().all(|b| b"0123456789abcdfghijklmnpqrsvwxyz".contains(&b)) && rest.len() > 1 && rest.starts_with('-')
}

fn probe(layers: &Layers, name: &str) -> Result<Option<Symptom>, Errno> {
    let at = |dir: &AbsolutePath| lookup(CWD.as_fd(), &format!("{dir}/{name}"));
    let (upper, lower, merged) = (at(&layers.upper)?, at(&layers.lower)?, at(&layers.merged)?);
    if let Some(symptom) = compare(upper.as_ref(), lower.as_ref(), merged.as_ref()) {
        return Ok(Some(symptom));
    }
    if !merged.is_some_and(|stat| is(&stat, FileType::Directory)) {
        return Ok(None);
    }
    let dir = |dir: &AbsolutePath| open_dir(CWD.as_fd(), &format!("{dir}/{name}"));
    let mut budget = MAX_DIRECTORIES;
    let found = walk(dir(&layers.upper)?, dir(&layers.lower)?, dir(&layers.merged)?, &mut budget)?;
    Ok(found.and_then(|found| found))
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

/// Walks down to the first file. `None`: no file was found, so go on with the next directory.
fn walk(
    upper: Option<OwnedFd>,
    lower: Option<OwnedFd>,
    merged: Option<OwnedFd>,
    budget: &mut usize,
) -> Result<Option<Option<Symptom>>, Errno> {
    let Some(merged) = merged else { return Ok(Some(Some(Symptom::Missing))) };
    if *budget == 0 {
        return Ok(Some(None));
    }
    *budget -= 1;
    let opaque = upper.as_ref().is_some_and(is_opaque);
    let lower = lower.filter(|_| !opaque);

    let mut expected = BTreeSet::new();
    if let Some(lower) = &lower {
        expected.extend(list(lower)?);
    }
    if let Some(upper) = &upper {
        for name in list(upper)? {
            let stat = lookup(upper.as_fd(), &name)?;
            if stat.is_some_and(|stat| is(&stat, FileType::CharacterDevice) && stat.st_rdev == 0) {
                expected.remove(&name);
            } else {
                expected.insert(name);
            }
        }
    }
    if expected != list(&merged)?.into_iter().collect() {
        return Ok(Some(Some(Symptom::OtherNames)));
    }

    let below = |dir: &Option<OwnedFd>, name: &str| dir.as_ref().map_or(Ok(None), |dir| lookup(dir.as_fd(), name));
    let mut directories = Vec::new();
    for name in expected {
        let merged = lookup(merged.as_fd(), &name)?;
        if merged.is_some_and(|stat| is(&stat, FileType::Directory)) {
            directories.push(name);
        } else {
            return Ok(Some(compare(below(&upper, &name)?.as_ref(), below(&lower, &name)?.as_ref(), merged.as_ref())));
        }
    }
    let into = |dir: &Option<OwnedFd>, name: &str| dir.as_ref().map_or(Ok(None), |dir| open_dir(dir.as_fd(), name));
    for name in directories {
        let found = walk(into(&upper, &name)?, into(&lower, &name)?, open_dir(merged.as_fd(), &name)?, budget)?;
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}

fn is(stat: &Stat, file_type: FileType) -> bool {
    FileType::from_raw_mode(stat.st_mode) == file_type
}

/// An opaque upper directory hides the lower one of the same name.
fn is_opaque(dir: &OwnedFd) -> bool {
    let mut value = [0; 1];
    matches!(rustix::fs::fgetxattr(dir, "trusted.overlay.opaque", &mut value), Ok(1)) && value == *b"y"
}

fn lookup(dir: impl AsFd, name: &str) -> Result<Option<Stat>, Errno> {
    match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT) {
        Ok(stat) => Ok(Some(stat)),
        // Linux before 6.19 answers ESTALE for some stale entries: the name is there in no usable form.
        Err(Errno::NOENT | Errno::NOTDIR | Errno::STALE) => Ok(None),
        Err(errno) => Err(errno),
    }
}

fn open_dir(dir: impl AsFd, name: &str) -> Result<Option<OwnedFd>, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::openat(dir, name, flags, Mode::empty()) {
        Ok(fd) => Ok(Some(fd)),
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::STALE) => Ok(None),
        Err(errno) => Err(errno),
    }
}

fn list(dir: &OwnedFd) -> Result<Vec<String>, Errno> {
    let mut names = Vec::new();
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(String::from_utf8_lossy(name).into_owned());
        }
    }
    Ok(names)
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
            (".links", false),
            ("tmp-1234-0", false),
            ("é0000000000000000000000000000000-x", false),
        ] {
            assert_eq!(is_store_path_name(name), expected, "{name}");
        }
    }
}
