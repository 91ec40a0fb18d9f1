//! Emptying a directory that an owner may change meanwhile.

use std::{
    ffi::{CStr, CString},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use layered_stores_model::printable;
use rustix::{
    fs::{AtFlags, Dir, Mode, OFlags, RenameFlags, ResolveFlags, StatxFlags},
    io::Errno,
    time::{ClockId, Timespec},
};

use super::{RemoveError, sys};
use crate::{progress, walk::readable};

/// How deep directories are followed with two open files for each; what is deeper is brought up first. A tree that a user has
/// made may be deeper than there are file descriptors.
const DEPTH: usize = 32;

/// How often a directory that should be empty is read again, and how much is removed in all that was made while this was under
/// way. Whoever goes on making files would go on for ever: in one directory, or in ever new ones.
const PASSES: u32 = 32;
const LATE: u64 = 10_000;

/// Removes a directory with all that is in it. Whether there was one.
pub(super) fn remove_tree(parent: BorrowedFd<'_>, name: &str, at: &str) -> Result<bool, RemoveError> {
    let name = CString::new(name).map_err(|_| sys("name", at)(Errno::INVAL))?;
    let Some(dir) = open(parent, &name, at)? else { return Ok(false) };
    empty(&dir, at)?;
    rustix::fs::unlinkat(parent, &name, AtFlags::REMOVEDIR).map_err(|errno| refused(errno, &name, at))?;
    Ok(true)
}

/// Opens a directory in another one. `None`: it is not there, or is no directory.
fn open(parent: BorrowedFd<'_>, name: &CStr, at: &str) -> Result<Option<OwnedFd>, RemoveError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS | ResolveFlags::BENEATH;
    match rustix::fs::openat2(parent, name, flags, Mode::empty(), resolve) {
        Ok(dir) => Ok(Some(dir)),
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
        // Somebody renames something somewhere (openat2(2)); it is there the next time.
        Err(Errno::AGAIN) => Ok(None),
        Err(Errno::XDEV) => Err(mounted(name, at)),
        Err(errno) => Err(sys("open a directory in", at)(errno)),
    }
}

fn mounted(name: &CStr, at: &str) -> RemoveError {
    RemoveError::Mounted { what: "something".to_owned(), at: below(name, at) }
}

/// The kernel's answer to an attempt to remove something.
fn refused(errno: Errno, name: &CStr, at: &str) -> RemoveError {
    match errno {
        Errno::BUSY => mounted(name, at),
        // Root is refused this for nothing else (`may_delete` in the kernel's fs/namei.c).
        Errno::PERM => RemoveError::Immutable(below(name, at)),
        errno => RemoveError::Sys { doing: "remove", at: below(name, at), errno },
    }
}

/// Something that lies anywhere in a directory, for people.
fn below(name: &CStr, at: &str) -> String {
    format!("{at}/…/{}", printable(&name.to_string_lossy()))
}

/// A directory that is being emptied.
struct Level {
    fd: OwnedFd,
    entries: Dir,
    /// Its name in the one above.
    name: CString,
    passes: u32,
    /// Whether there was anything in it in this pass.
    was_filled: bool,
}

impl Level {
    fn new(fd: OwnedFd, name: &CStr) -> Result<Self, Errno> {
        Ok(Self { entries: Dir::read_from(&fd)?, fd, name: name.to_owned(), passes: 0, was_filled: false })
    }

    /// Begins to read it again. Whether it has not been read too often.
    fn again(&mut self) -> bool {
        self.entries.rewind();
        self.passes += 1;
        self.was_filled = false;
        self.passes <= PASSES
    }
}

/// Empties a directory.
pub(super) fn empty(top: &OwnedFd, at: &str) -> Result<(), RemoveError> {
    let fail = sys("remove what is in", at);
    let not_empty = || RemoveError::NotEmpty(at.to_owned());
    let again = |level: &mut Level| if level.again() { Ok(()) } else { Err(not_empty()) };
    let root = readable(top.as_fd()).and_then(|fd| Level::new(fd, c".")).map_err(&fail)?;
    let mut levels = vec![root];
    let began = rustix::time::clock_gettime(ClockId::RealtimeCoarse);
    let mut late: u64 = 0;
    let mut brought_up: u64 = 0;
    while let Some(level) = levels.pop() {
        progress::goes_on();
        let mut level = level;
        let Some(entry) = level.entries.next() else {
            match levels.last() {
                None if level.was_filled => {
                    again(&mut level)?;
                    levels.push(level);
                }
                None => {}
                Some(above) => match rustix::fs::unlinkat(&above.fd, &level.name, AtFlags::REMOVEDIR) {
                    // Another thing of that name is seen to when the directory above is read again.
                    Ok(()) | Err(Errno::NOENT | Errno::NOTDIR) => {}
                    Err(Errno::NOTEMPTY | Errno::EXIST) => {
                        again(&mut level)?;
                        levels.push(level);
                    }
                    Err(errno) => return Err(refused(errno, &level.name, at)),
                },
            }
            continue;
        };
        let entry = entry.map_err(&fail)?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            levels.push(level);
            continue;
        }
        level.was_filled = true;
        // What was not there when the directory was read first has come since.
        late += u64::from(level.passes > 0);
        if late > LATE + brought_up {
            return Err(not_empty());
        }
        let is_gone = remove(level.fd.as_fd(), name, at)?;
        if !is_gone && levels.len() + 1 >= DEPTH {
            let higher = format!(".removing-{brought_up}");
            brought_up += 1;
            match rustix::fs::renameat_with(&level.fd, name, top, &higher, RenameFlags::NOREPLACE) {
                // There is one more to see to, which nobody makes by going on to make files.
                Ok(()) => levels.iter_mut().take(1).for_each(|top| top.passes = 0),
                Err(Errno::NOENT | Errno::EXIST) => {}
                Err(errno) => return Err(refused(errno, name, at)),
            }
        } else if !is_gone && let Some(dir) = open(level.fd.as_fd(), name, at)? {
            late += u64::from(was_made_since(&dir, began));
            let below = Level::new(dir, name).map_err(&fail)?;
            levels.extend([level, below]);
            continue;
        }
        levels.push(level);
    }
    Ok(())
}

/// Whether a directory was made since a time. Not all filesystems can tell, and a clock that was put back says nothing.
fn was_made_since(dir: &OwnedFd, time: Timespec) -> bool {
    let stat = rustix::fs::statx(dir, c"", AtFlags::EMPTY_PATH, StatxFlags::BTIME);
    let now = rustix::time::clock_gettime(ClockId::RealtimeCoarse);
    stat.is_ok_and(|stat| {
        let born = (stat.stx_btime.tv_sec, i64::from(stat.stx_btime.tv_nsec));
        let knows = stat.stx_mask & StatxFlags::BTIME.bits() != 0;
        knows && born > (time.tv_sec, time.tv_nsec) && born <= (now.tv_sec, now.tv_nsec)
    })
}

/// Removes a file, a link, or a directory that is empty. Whether it is gone.
fn remove(dir: BorrowedFd<'_>, name: &CStr, at: &str) -> Result<bool, RemoveError> {
    for flags in [AtFlags::empty(), AtFlags::REMOVEDIR] {
        match rustix::fs::unlinkat(dir, name, flags) {
            Ok(()) | Err(Errno::NOENT) => return Ok(true),
            Err(Errno::ISDIR | Errno::NOTDIR | Errno::NOTEMPTY | Errno::EXIST) => {}
            Err(errno) => return Err(refused(errno, name, at)),
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    #[test]
    fn a_directory_is_emptied_whatever_is_in_it_and_nothing_else_is_touched() {
        let dir = tempfile::tempdir().expect("a directory");
        let (store, outside) = (dir.path().join("store"), dir.path().join("outside"));
        for made in [&store, &outside] {
            fs::create_dir(made).expect("made");
        }
        fs::write(outside.join("precious"), "precious").expect("written");
        symlink(&outside, store.join("link")).expect("linked");
        symlink(outside.join("precious"), store.join("file")).expect("linked");
        fs::hard_link(outside.join("precious"), store.join("hard")).expect("linked");
        for number in 0..3000 {
            fs::write(store.join(number.to_string()), "").expect("written");
        }
        // Deeper than paths can be long, and than a process has descriptors.
        let mut at = fs::File::open(&store).map(OwnedFd::from).expect("opened");
        for _ in 0..5000 {
            rustix::fs::mkdirat(&at, "deep", Mode::RWXU).expect("made");
            at = rustix::fs::openat(&at, "deep", OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).expect("opened");
            rustix::fs::symlinkat(outside.as_path(), &at, "link").expect("linked");
        }
        let top = fs::File::open(&store).map(OwnedFd::from).expect("opened");
        empty(&top, "store").expect("emptied");
        assert_eq!(fs::read_dir(&store).expect("listed").count(), 0);
        assert_eq!(fs::read_to_string(outside.join("precious")).expect("there"), "precious");
    }
}
