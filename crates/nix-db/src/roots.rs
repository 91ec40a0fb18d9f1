//! Roots for a store's garbage collector: what is below `gcroots` in its state directory is not collected.
//!
//! A root is an empty file with the name of a store object (`LocalStore::findRoots` in Nix's src/libstore/gc.cc): one call
//! makes it, and it follows nothing. What it names need not be there.

use std::{
    collections::HashSet,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags},
    io::Errno,
};

use crate::ObjectName;

/// Below `gcroots`: the directory that holds one for each store.
const OURS: &str = "layered-stores";

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// What one layered store needs of the store underneath.
#[derive(Debug)]
pub struct Roots {
    dir: OwnedFd,
}

/// Roots cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum RootsError {
    /// The kernel refuses.
    #[error("cannot {doing} {at} in the lower store's state directory: {errno}")]
    Sys {
        /// What was tried.
        doing: &'static str,
        /// Where, below the state directory.
        at: String,
        /// The kernel's answer.
        errno: Errno,
    },
    /// A directory of ours is somebody else's: whoever can write to it takes roots away.
    #[error(
        "{at} in the lower store's state directory can be changed by others (uid {uid}, mode {mode:04o}); remove it"
    )]
    NotOurs {
        /// Where, below the state directory.
        at: String,
        /// Its owner.
        uid: u32,
        /// Its mode.
        mode: u32,
    },
}

impl RootsError {
    fn sys(doing: &'static str, at: &str) -> impl FnOnce(Errno) -> Self {
        move |errno| Self::Sys { doing, at: at.to_owned(), errno }
    }

    /// Whether it lies on a filesystem that takes no writes.
    pub fn is_read_only(&self) -> bool {
        matches!(self, Self::Sys { errno: Errno::ROFS, .. })
    }
}

impl Roots {
    /// Those of a store, by its name. The directory is made if need be.
    ///
    /// # Errors
    /// [`RootsError`].
    pub fn open(state_dir: impl AsFd, store: &str) -> Result<Self, RootsError> {
        let gcroots = nix_directory(state_dir.as_fd(), "gcroots").map_err(RootsError::sys("open", "gcroots"))?;
        let ours = step(gcroots.as_fd(), OURS, &at(None), true)?;
        refuse_others(&ours, &at(None))?;
        let dir = step(ours.as_fd(), store, &at(Some(store)), true)?;
        refuse_others(&dir, &at(Some(store)))?;
        Ok(Self { dir })
    }

    /// All of them. What is there that is none is left out.
    ///
    /// # Errors
    /// [`RootsError`].
    pub fn list(&self) -> Result<HashSet<ObjectName>, RootsError> {
        names(self.dir.as_fd()).map_err(RootsError::sys("list", OURS))
    }

    /// Adds one. Whether it was not there.
    ///
    /// # Errors
    /// [`RootsError`].
    pub fn add(&self, name: &ObjectName) -> Result<bool, RootsError> {
        let mode = Mode::RUSR | Mode::RGRP | Mode::ROTH;
        match rustix::fs::mknodat(&self.dir, name.as_str(), FileType::RegularFile, mode, 0) {
            Ok(()) => Ok(true),
            Err(Errno::EXIST) => Ok(false),
            Err(errno) => Err(RootsError::sys("make a root for", name.as_str())(errno)),
        }
    }

    /// Removes one. Whether it was there.
    ///
    /// # Errors
    /// [`RootsError`].
    pub fn remove(&self, name: &ObjectName) -> Result<bool, RootsError> {
        match rustix::fs::unlinkat(&self.dir, name.as_str(), AtFlags::empty()) {
            Ok(()) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(errno) => Err(RootsError::sys("remove the root of", name.as_str())(errno)),
        }
    }

    /// Has what was added and removed be there after a power cut.
    ///
    /// # Errors
    /// [`RootsError`].
    pub fn sync(&self) -> Result<(), RootsError> {
        rustix::fs::fsync(&self.dir).map_err(RootsError::sys("write", OURS))
    }

    /// Removes all roots of a store, and the directory if there is nothing else in it. Whether there was one.
    ///
    /// # Errors
    /// [`RootsError`].
    pub fn drop_all(state_dir: impl AsFd, store: &str) -> Result<bool, RootsError> {
        let found = (|| {
            let gcroots = step(state_dir.as_fd(), "gcroots", "gcroots", false)?;
            let ours = step(gcroots.as_fd(), OURS, &at(None), false)?;
            let dir = step(ours.as_fd(), store, &at(Some(store)), false)?;
            Ok((ours, dir))
        })();
        let (ours, dir) = match found {
            Err(RootsError::Sys { errno: Errno::NOENT, .. }) => return Ok(false),
            found => found?,
        };
        refuse_others(&ours, &at(None))?;
        refuse_others(&dir, &at(Some(store)))?;
        let roots = Self { dir };
        for name in roots.list()? {
            roots.remove(&name)?;
        }
        match rustix::fs::unlinkat(&ours, store, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOTEMPTY | Errno::NOENT) => Ok(true),
            Err(errno) => Err(RootsError::sys("remove", &at(Some(store)))(errno)),
        }
    }
}

fn at(store: Option<&str>) -> String {
    store.map_or_else(|| format!("gcroots/{OURS}"), |store| format!("gcroots/{OURS}/{store}"))
}

fn step(dir: BorrowedFd<'_>, name: &str, at: &str, make: bool) -> Result<OwnedFd, RootsError> {
    let open = || rustix::fs::openat(dir, name, DIRECTORY, Mode::empty());
    match open() {
        Err(Errno::NOENT) if make => {
            let mode = Mode::RWXU | Mode::RGRP | Mode::XGRP | Mode::ROTH | Mode::XOTH;
            match rustix::fs::mkdirat(dir, name, mode) {
                Ok(()) | Err(Errno::EXIST) => open().map_err(RootsError::sys("open", at)),
                Err(errno) => Err(RootsError::sys("make", at)(errno)),
            }
        }
        opened => opened.map_err(RootsError::sys("open", at)),
    }
}

/// A directory of Nix's in a state directory, made if need be: for Nix as whoever owns that.
pub(crate) fn nix_directory(state_dir: BorrowedFd<'_>, name: &str) -> Result<OwnedFd, Errno> {
    let mode = Mode::RWXU | Mode::RGRP | Mode::XGRP | Mode::ROTH | Mode::XOTH;
    let open = || rustix::fs::openat(state_dir, name, DIRECTORY, Mode::empty());
    match open() {
        Err(Errno::NOENT) => match rustix::fs::mkdirat(state_dir, name, mode) {
            Ok(()) => {
                let made = open()?;
                give(&made, state_dir)?;
                Ok(made)
            }
            Err(Errno::EXIST) => open(),
            Err(errno) => Err(errno),
        },
        opened => opened,
    }
}

/// Gives what was made in a directory to whoever owns that.
pub(crate) fn give(made: &OwnedFd, dir: BorrowedFd<'_>) -> Result<(), Errno> {
    let (stat, own) = (rustix::fs::fstat(dir)?, rustix::fs::fstat(made)?);
    // What is somebody else's was not made here: it took the place meanwhile.
    if own.st_uid == stat.st_uid || own.st_uid != rustix::process::geteuid().as_raw() {
        return Ok(());
    }
    let (uid, gid) = (rustix::fs::Uid::from_raw(stat.st_uid), rustix::fs::Gid::from_raw(stat.st_gid));
    rustix::fs::fchown(made, Some(uid), Some(gid))
}

/// Refuses a directory that is not this process's own.
fn refuse_others(dir: &OwnedFd, at: &str) -> Result<(), RootsError> {
    let stat = rustix::fs::fstat(dir).map_err(RootsError::sys("look at", at))?;
    if stat.st_uid == rustix::process::geteuid().as_raw() && stat.st_mode & 0o022 == 0 {
        return Ok(());
    }
    Err(RootsError::NotOurs { at: at.to_owned(), uid: stat.st_uid, mode: stat.st_mode & 0o7777 })
}

/// The names of store objects in a directory.
fn names(dir: BorrowedFd<'_>) -> Result<HashSet<ObjectName>, Errno> {
    let entries = Dir::read_from(dir)?;
    let name = |entry: Result<rustix::fs::DirEntry, Errno>| {
        entry.map(|entry| entry.file_name().to_str().ok()?.parse().ok()).transpose()
    };
    entries.filter_map(name).collect()
}

/// The roots that processes hold for a while (`temproots` in a state directory): what Nix is working with right now.
///
/// # Errors
/// What the kernel says.
pub fn temporary(state_dir: impl AsFd) -> Result<HashSet<ObjectName>, Errno> {
    /// How much is read, in bytes. Whoever owns the store can put anything there: a pipe, which would be waited for, or a file
    /// without an end.
    const LONGEST: usize = 4 << 20;
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let dir = match rustix::fs::openat(state_dir, "temproots", DIRECTORY, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(HashSet::new()),
        dir => dir?,
    };
    let mut found = HashSet::new();
    let mut left = LONGEST;
    let mut buffer = vec![0; 64 << 10];
    for entry in Dir::read_from(&dir)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name.is_empty() || !name.iter().all(u8::is_ascii_digit) {
            continue;
        }
        let Ok(file) = rustix::fs::openat(&dir, entry.file_name(), flags, Mode::empty()) else { continue };
        let is_file = |stat: rustix::fs::Stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        if !rustix::fs::fstat(&file).is_ok_and(is_file) {
            continue;
        }
        let mut text = Vec::new();
        while left > 0 {
            let Ok(count @ 1..) = rustix::io::read(&file, &mut buffer) else { break };
            left = left.saturating_sub(count);
            text.extend_from_slice(&buffer[..count]);
        }
        // Whole paths, each with a NUL behind it.
        let paths = text.split_inclusive(|&byte| byte == 0).filter_map(|path| path.strip_suffix(b"\0"));
        let names = paths.filter_map(|path| ObjectName::in_path(std::str::from_utf8(path).ok()?).ok());
        found.extend(names);
    }
    Ok(found)
}

/// Opens a directory, with no link on the way.
///
/// # Errors
/// What the kernel says.
pub fn open_dir(path: &std::path::Path) -> Result<OwnedFd, Errno> {
    rustix::fs::openat2(CWD, path, DIRECTORY, Mode::empty(), rustix::fs::ResolveFlags::NO_SYMLINKS)
}

/// Whether there is something of a name in a directory of objects.
pub fn has(dir: impl AsFd, name: &ObjectName) -> bool {
    rustix::fs::statat(dir, name.as_str(), AtFlags::SYMLINK_NOFOLLOW).is_ok()
}

/// Roots that hold for as long as this is there, as Nix's own do while it works with a path: a file in `temproots` that is locked.
#[derive(Debug)]
pub struct TemporaryRoots {
    dir: OwnedFd,
    name: String,
    file: OwnedFd,
    /// What is in the file, and how long that is.
    names: HashSet<ObjectName>,
    length: u64,
}

impl TemporaryRoots {
    /// None, to begin with.
    ///
    /// # Errors
    /// [`RootsError`].
    pub fn make(state_dir: impl AsFd) -> Result<Self, RootsError> {
        const AT: &str = "temproots";
        /// Names are numbers of processes (`LocalStore::fnTempRoots`); no process of Linux has one that is greater.
        const BEYOND: u32 = 1 << 22;
        let dir = nix_directory(state_dir.as_fd(), AT).map_err(RootsError::sys("open", AT))?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let process = rustix::process::getpid().as_raw_nonzero().get().unsigned_abs();
        for beyond in 1..=16 {
            let name = (beyond * BEYOND + process).to_string();
            let file = match rustix::fs::openat(&dir, &name, flags, Mode::RUSR | Mode::WUSR) {
                Err(Errno::EXIST) => continue,
                file => file.map_err(RootsError::sys("make a file in", AT))?,
            };
            // Before a collector, which may run as the owner, finds a file that it cannot open.
            give(&file, dir.as_fd()).map_err(RootsError::sys("give away a file in", AT))?;
            rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive)
                .map_err(RootsError::sys("lock a file in", AT))?;
            return Ok(Self { dir, name, file, names: HashSet::new(), length: 0 });
        }
        Err(RootsError::sys("make a file in", AT)(Errno::EXIST))
    }

    /// Adds some.
    ///
    /// # Errors
    /// [`RootsError`]: nothing was added then.
    pub fn add(&mut self, names: &HashSet<ObjectName>) -> Result<(), RootsError> {
        /// More than a collection can have to do with. Whoever asks may be anybody.
        const MOST: usize = 200_000;
        let new: Vec<_> = names.difference(&self.names).cloned().collect();
        if self.names.len() + new.len() > MOST {
            return Err(RootsError::sys("keep so much in", "temproots")(Errno::DQUOT));
        }
        let mut text = Vec::new();
        for name in &new {
            text.extend_from_slice(b"/nix/store/");
            text.extend_from_slice(name.as_str().as_bytes());
            text.push(0);
        }
        let mut rest = &text[..];
        while !rest.is_empty() {
            match rustix::io::write(&self.file, rest) {
                Ok(written) => rest = rest.get(written..).unwrap_or_default(),
                Err(errno) => {
                    // Nix ends where it finds half a path.
                    let _ = rustix::fs::ftruncate(&self.file, self.length);
                    let _ = rustix::fs::seek(&self.file, rustix::fs::SeekFrom::Start(self.length));
                    return Err(RootsError::sys("write to", "temproots")(errno));
                }
            }
        }
        self.length += u64::try_from(text.len()).unwrap_or_default();
        self.names.extend(new);
        Ok(())
    }
}

impl Drop for TemporaryRoots {
    fn drop(&mut self) {
        // A collector that finds it without a lock removes it as well.
        let _ = rustix::fs::unlinkat(&self.dir, &self.name, AtFlags::empty());
    }
}
