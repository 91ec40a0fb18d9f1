//! Walking to a directory through nothing that others than root could change.
//!
//! No path is opened as a whole: each component is opened in the one before, and symbolic links are refused. Every directory
//! on the way belongs to root and is writable for nobody else, so what was found once is found again: whoever could put
//! something else in a directory's place would decide what root mounts, fills and shows. An access control list needs no look
//! of its own, since the group's bits of a mode are the most that a list grants (acl(5)).

use std::{
    cell::RefCell,
    ffi::CStr,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use layered_stores_model::AbsolutePath;
use nix::unistd::{Gid, Uid};
use rustix::{
    fs::{AtFlags, FileType, Mode, OFlags, RawMode, RenameFlags, ResolveFlags, Statx, StatxFlags},
    io::Errno,
};

use super::{
    layers::LayersError,
    progress::{self, Spot},
};

const REFER: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// User, group and mode of a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Owner {
    pub(super) uid: Uid,
    pub(super) gid: Gid,
    pub(super) mode: Mode,
}

/// A walk from the root directory to a configured path.
pub(super) struct Walk {
    /// The configuration's key, for messages.
    key: &'static str,
    /// Whether missing directories are made.
    create: bool,
}

/// Who can make files in a directory on the way.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Writers {
    Root,
    /// Others as well, but only root can take away or rename what is root's: the directory is sticky, as /tmp.
    Others,
}

thread_local! {
    /// The directories on the way that this thread has come through, while its walks go [`together`].
    static WALKED: RefCell<Option<Vec<Walked>>> = const { RefCell::new(None) };
}

/// A directory on the way.
struct Walked {
    path: String,
    dir: OwnedFd,
    writers: Writers,
}

/// Has all walks of `work` open and look at each directory on the way once.
///
/// For work that mounts nothing on the way. Nobody but root could have something else found there a moment later.
pub(super) fn together<T>(work: impl FnOnce() -> T) -> T {
    struct Forget;
    impl Drop for Forget {
        fn drop(&mut self) {
            WALKED.set(None);
        }
    }
    if WALKED.with_borrow(Option::is_some) {
        return work();
    }
    WALKED.set(Some(Vec::new()));
    let _forget = Forget;
    work()
}

/// The last of the directories on the way to `path` that is known, and how much of the path leads there.
fn known_on_the_way(path: &str) -> Option<(OwnedFd, Writers, usize)> {
    WALKED.with_borrow(|walked| {
        let leads_there = |known: &&Walked| path.strip_prefix(&known.path).is_some_and(|rest| rest.starts_with('/'));
        let known = walked.as_ref()?.iter().filter(leads_there).max_by_key(|known| known.path.len())?;
        Some((known.dir.try_clone().ok()?, known.writers, known.path.len()))
    })
}

fn remember(path: &str, dir: &OwnedFd, writers: Writers) {
    WALKED.with_borrow_mut(|walked| {
        if let (Some(walked), Ok(dir)) = (walked, dir.try_clone()) {
            walked.push(Walked { path: path.to_owned(), dir, writers });
        }
    });
}

impl Walk {
    /// A walk to what is there.
    pub(super) fn new(key: &'static str) -> Self {
        Self { key, create: false }
    }

    /// A walk that makes directories that are missing.
    pub(super) fn making(key: &'static str) -> Self {
        Self { key, create: true }
    }

    fn sys(&self, doing: &'static str, at: &str, errno: Errno) -> LayersError {
        LayersError::sys(self.key, doing, at, errno)
    }

    /// The directory at `path`.
    pub(super) fn to(&self, path: &AbsolutePath) -> Result<OwnedFd, LayersError> {
        let (parent, name) = self.to_parent(path)?;
        self.step(&parent, name, path.as_str())
    }

    /// The directory that holds the last component of `path`, and that component.
    pub(super) fn to_parent<'p>(&self, path: &'p AbsolutePath) -> Result<(OwnedFd, &'p str), LayersError> {
        match self.to_any_parent(path)? {
            (dir, name, Writers::Root) => Ok((dir, name)),
            (dir, name, Writers::Others) => Err(self.shared(dir.as_fd(), name, path.as_str())),
        }
    }

    /// The directory at `path`, which is only looked at: it may lie where others can make files, if it is root's.
    pub(super) fn to_existing(&self, path: &AbsolutePath) -> Result<OwnedFd, LayersError> {
        let (parent, name, writers) = self.to_any_parent(path)?;
        let dir = self.step(&parent, name, path.as_str())?;
        if writers == Writers::Others && self.stat(dir.as_fd(), path.as_str())?.stx_uid != 0 {
            return Err(self.shared(parent.as_fd(), name, path.as_str()));
        }
        Ok(dir)
    }

    fn to_any_parent<'p>(&self, path: &'p AbsolutePath) -> Result<(OwnedFd, &'p str, Writers), LayersError> {
        progress::at(match self.key {
            "lower-store" => Spot::Lower,
            "work-dir" => Spot::Work,
            "root" => Spot::Root,
            _ => Spot::Upper,
        });
        let (mut dir, mut writers, known) = match known_on_the_way(path.as_str()) {
            Some(known) => known,
            None => {
                let dir = rustix::fs::open("/", REFER, Mode::empty()).map_err(|e| self.sys("open", "/", e))?;
                let writers = self.check_parent(dir.as_fd(), "/")?;
                (dir, writers, 0)
            }
        };
        let (walked, rest) = path.as_str().split_at(known);
        let mut components = rest.split('/').skip(1).peekable();
        let mut walked = walked.to_owned();
        while let Some(component) = components.next() {
            if components.peek().is_none() {
                return Ok((dir, component, writers));
            }
            walked.push('/');
            walked.push_str(component);
            let walk = Self { create: self.create && writers == Writers::Root, ..*self };
            dir = match walk.step(&dir, component, &walked) {
                Err(LayersError::Sys { errno: Errno::NOENT, .. }) if self.create => {
                    return Err(self.shared(dir.as_fd(), component, &walked));
                }
                result => result?,
            };
            writers = self.check_parent(dir.as_fd(), &walked)?;
            remember(&walked, &dir, writers);
        }
        unreachable!("an AbsolutePath has a component")
    }

    /// The directory `name` in `parent`, made if need be.
    pub(super) fn step(&self, parent: &OwnedFd, name: &str, at: &str) -> Result<OwnedFd, LayersError> {
        let open = || rustix::fs::openat(parent, name, REFER, Mode::empty());
        let opened = match open() {
            Err(Errno::NOENT) if self.create => match rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(Errno::EXIST) => open(),
                Err(errno) => return Err(self.sys("make the directory", at, errno)),
            },
            result => result,
        };
        opened.map_err(|errno| match errno {
            Errno::NOTDIR | Errno::LOOP if is_symlink(parent, name) => {
                LayersError::Symlink { key: self.key, at: at.to_owned() }
            }
            Errno::NOTDIR => LayersError::NotADirectory { key: self.key, at: at.to_owned() },
            errno => self.sys("open", at, errno),
        })
    }

    /// Refuses a directory in which others could replace what root is about to use.
    pub(super) fn check_parent(&self, dir: BorrowedFd<'_>, at: &str) -> Result<Writers, LayersError> {
        let stat = self.stat(dir, at)?;
        let mode = mode(&stat);
        match (stat.stx_uid, mode.intersects(Mode::WGRP | Mode::WOTH)) {
            (0, false) => Ok(Writers::Root),
            (0, true) if mode.contains(Mode::SVTX) => Ok(Writers::Others),
            (uid, _) => {
                Err(LayersError::UnsafeParent { key: self.key, at: at.to_owned(), uid, mode: permissions(&stat) })
            }
        }
    }

    fn shared(&self, dir: BorrowedFd<'_>, name: &str, at: &str) -> LayersError {
        let directory = at.strip_suffix(name).map_or(at, |dir| dir.trim_end_matches('/')).to_owned();
        match self.stat(dir, &directory) {
            Ok(stat) => {
                LayersError::SharedParent { key: self.key, at: at.to_owned(), directory, mode: permissions(&stat) }
            }
            Err(error) => error,
        }
    }

    /// The directory at `path`, refused with `EBUSY` if something is mounted there.
    pub(super) fn to_unmounted(&self, path: &AbsolutePath) -> Result<OwnedFd, LayersError> {
        let (parent, name) = self.to_parent(path)?;
        let resolve = ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS;
        rustix::fs::openat2(parent, name, REFER, Mode::empty(), resolve).map_err(|errno| {
            let errno = if errno == Errno::XDEV { Errno::BUSY } else { errno };
            self.sys("open the bare mount point", path.as_str(), errno)
        })
    }

    /// The directory at `path`; if it is missing it is made complete with owner and mode, or not at all.
    pub(super) fn make_owned(&self, path: &AbsolutePath, owner: Owner) -> Result<OwnedFd, LayersError> {
        let (parent, name) = self.to_parent(path)?;
        let existing = Self { create: false, ..*self }.step(&parent, name, path.as_str());
        if !matches!(existing, Err(LayersError::Sys { errno: Errno::NOENT, .. })) {
            return existing;
        }
        // Made under another name and renamed when it is right: a kill in between leaves no half-made directory.
        let temporary = format!(".{name}.new");
        let fail = |errno| self.sys("make the directory", path.as_str(), errno);
        match rustix::fs::mkdirat(&parent, &temporary, Mode::RWXU) {
            Err(Errno::EXIST) => {
                // A half-made one is empty, and taken away whoever's it is by now. Anything else is nothing of ours.
                rustix::fs::unlinkat(&parent, &temporary, AtFlags::REMOVEDIR).map_err(|errno| {
                    let at = path.as_str().strip_suffix(name).unwrap_or_default();
                    let in_the_way = format!("{at}{temporary}");
                    LayersError::InTheWay { key: self.key, at: in_the_way, path: path.clone(), errno }
                })?;
                rustix::fs::mkdirat(&parent, &temporary, Mode::RWXU).map_err(fail)?;
            }
            made => made.map_err(fail)?,
        }
        let fd = self.step(&parent, &temporary, path.as_str())?;
        let fd = readable(fd.as_fd()).map_err(fail)?;
        let (uid, gid) = (owner.uid.as_raw(), owner.gid.as_raw());
        let (uid, gid) = (rustix::fs::Uid::from_raw(uid), rustix::fs::Gid::from_raw(gid));
        rustix::fs::fchown(&fd, Some(uid), Some(gid)).map_err(fail)?;
        rustix::fs::fchmod(&fd, owner.mode).map_err(fail)?;
        rustix::fs::renameat_with(&parent, &temporary, &parent, name, RenameFlags::NOREPLACE).map_err(fail)?;
        Ok(fd)
    }

    /// Refuses a directory that is not root's alone.
    pub(super) fn check_own(&self, dir: BorrowedFd<'_>, path: &AbsolutePath) -> Result<Statx, LayersError> {
        let stat = self.stat(dir, path.as_str())?;
        if stat.stx_uid == 0 && !mode(&stat).intersects(Mode::WGRP | Mode::WOTH) {
            return Ok(stat);
        }
        let (uid, mode) = (stat.stx_uid, permissions(&stat));
        Err(LayersError::NotRoots { key: self.key, path: path.clone(), uid, mode })
    }

    pub(super) fn stat(&self, fd: BorrowedFd<'_>, at: &str) -> Result<Statx, LayersError> {
        stat(fd).map_err(|errno| self.sys("look at", at, errno))
    }
}

/// What a descriptor refers to: mount, device, inode, owner and mode.
pub(super) fn stat(fd: BorrowedFd<'_>) -> Result<Statx, Errno> {
    const EMPTY: &CStr = c"";
    rustix::fs::statx(fd, EMPTY, AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS | StatxFlags::MNT_ID)
}

/// Opens a directory for reading that is only referred to (`O_PATH`) so far.
pub(super) fn readable(dir: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    rustix::fs::openat(dir, c".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

/// Refers to a directory without following a symbolic link anywhere on the way.
///
/// In one step, for those who only look: what is on the way was walked when the store was brought up or taken over.
pub(super) fn refer_to(path: &AbsolutePath) -> Result<OwnedFd, Errno> {
    rustix::fs::openat2(rustix::fs::CWD, path.as_str(), REFER, Mode::empty(), ResolveFlags::NO_SYMLINKS)
}

fn is_symlink(parent: &OwnedFd, name: &str) -> bool {
    rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)
        .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Symlink)
}

fn mode(stat: &Statx) -> Mode {
    Mode::from_raw_mode(RawMode::from(stat.stx_mode))
}

fn permissions(stat: &Statx) -> u32 {
    u32::from(stat.stx_mode) & 0o7777
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn walks_that_go_together_open_each_directory_on_the_way_once() {
        let dirs = ["/usr", "/usr/share", "/usr/bin"].map(|dir| dir.parse::<AbsolutePath>().expect("valid"));
        let walk = Walk::new("root");
        let of = |path: &AbsolutePath| {
            let (parent, name, _) = walk.to_any_parent(path).expect("directories of root's");
            let dir = walk.step(&parent, name, path.as_str()).expect("there");
            stat(dir.as_fd()).map(|stat| (stat.stx_mnt_id, stat.stx_ino)).expect("looked at")
        };
        let apart = dirs.each_ref().map(of);
        let known = || WALKED.with_borrow(|walked| walked.as_ref().map(|walked| walked.len()));
        together(|| {
            assert_eq!(known(), Some(0));
            assert_eq!(together(|| dirs.each_ref().map(of)), apart, "they lead to the same");
            assert_eq!(known(), Some(1), "/usr, for both that are in it");
            let longer = "/usr/share/doc".parse().expect("valid");
            assert!(known_on_the_way("/usr/sharee").is_some_and(|(_, _, length)| length == "/usr".len()));
            let _ = walk.to_any_parent(&longer);
            assert_eq!(known(), Some(2), "what is known leads further");
        });
        assert_eq!(known(), None, "nothing is kept open");
        let panicked = std::panic::catch_unwind(|| together(|| panic!("as work may")));
        assert!(panicked.is_err() && known().is_none());
    }
}
