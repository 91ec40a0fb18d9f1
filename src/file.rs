//! Replacing a file in one step: whoever reads it, and whatever ends the daemon, finds the old one or the new one.

use std::{
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Write as _},
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::Path,
};

use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags},
    io::Errno,
};

/// How a file ends that is still being written. One that is found was left by a daemon that was killed.
pub(crate) const UNFINISHED: &str = "new";

/// Modes of files: who reads them besides root.
pub(crate) const FOR_ALL: u32 = 0o644;
pub(crate) const FOR_ROOT: u32 = 0o600;

/// Replaces a file, or makes it, with the directories on the way. With `sync` it is on disk when this returns.
///
/// The directory has to be one in which only root can make files.
///
/// # Errors
/// What the kernel says; the file is the old one then.
pub(crate) fn replace(path: &Path, text: &[u8], mode: u32, sync: bool) -> io::Result<()> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(dir)?;
    let temporary = path.with_extension(UNFINISHED);
    let write = || {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&temporary)?;
        file.write_all(text)?;
        if sync {
            file.sync_all()?;
        }
        fs::rename(&temporary, path)
    };
    // On a disk that is full, a name may be had and no room for what is in the file.
    write().inspect_err(|_| drop(fs::remove_file(&temporary)))?;
    if sync {
        File::open(dir)?.sync_all()?;
    }
    Ok(())
}

/// Replaces a file, or makes it, in a directory that may be somebody else's, or above which there are directories that are: nothing
/// is followed that anybody has put in the way.
///
/// It is on disk when the kernel gets to it: this is for what is soon written anew.
///
/// # Errors
/// What the kernel says, `ELOOP` for a link on the way; the file is the old one then.
pub(crate) fn replace_among_others(path: &Path, text: &[u8], mode: u32) -> io::Result<()> {
    let directory = path.parent().filter(|directory| !directory.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = path.file_name().ok_or(Errno::ISDIR)?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let at = rustix::fs::openat2(CWD, directory, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS)?;
    let mut temporary = std::ffi::OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".{UNFINISHED}"));
    // Left by one that was killed, or put there by somebody.
    match rustix::fs::unlinkat(&at, &temporary, AtFlags::empty()) {
        Err(error) if error != Errno::NOENT => return Err(error.into()),
        _ => {}
    }
    let new = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut file = File::from(rustix::fs::openat(&at, &temporary, new, Mode::RUSR | Mode::WUSR)?);
    let mut write = || {
        file.write_all(text)?;
        file.set_permissions(Permissions::from_mode(mode))?;
        Ok(rustix::fs::renameat(&at, &temporary, &at, name)?)
    };
    write().inspect_err(|_: &io::Error| {
        let _ = rustix::fs::unlinkat(&at, &temporary, AtFlags::empty());
    })
}

/// Lets nobody but root read a file, in a directory in which only root can make any.
///
/// # Errors
/// What the kernel says.
pub(crate) fn restrict(path: &Path) -> io::Result<()> {
    let file = fs::symlink_metadata(path)?;
    let is_open = file.is_file() && file.permissions().mode() & 0o077 != 0;
    if is_open { fs::set_permissions(path, Permissions::from_mode(FOR_ROOT)) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_file_is_replaced_with_its_mode_and_nothing_is_left_beside_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("made/file.json");
        for text in ["a longer text", "a text"] {
            replace(&path, text.as_bytes(), FOR_ROOT, true).expect("replaced");
            assert_eq!(fs::read_to_string(&path).expect("read"), text);
            assert_eq!(fs::metadata(&path).expect("there").permissions().mode() & 0o777, FOR_ROOT);
        }
        let entries = fs::read_dir(path.parent().expect("a directory")).expect("listed").count();
        assert_eq!(entries, 1);
    }

    #[test]
    fn among_others_a_file_is_replaced_and_no_link_is_followed() {
        let dir = tempfile::tempdir().expect("a directory");
        let (top, other) = (dir.path().canonicalize().expect("there"), tempfile::tempdir().expect("a directory"));
        let (path, aim) = (top.join("x.prom"), other.path().join("aim"));
        fs::write(&aim, "theirs").expect("written");
        let links = || {
            for name in ["x.prom", ".x.prom.new"] {
                let _ = fs::remove_file(top.join(name));
                symlink(&aim, top.join(name)).expect("linked");
            }
        };
        links();
        for text in ["a longer text", "a text"] {
            replace_among_others(&path, text.as_bytes(), FOR_ALL).expect("replaced");
            assert_eq!(fs::read_to_string(&path).expect("read"), text);
            let file = fs::symlink_metadata(&path).expect("there");
            assert_eq!((file.is_file(), file.permissions().mode() & 0o777), (true, FOR_ALL));
        }
        links();
        replace_among_others(&path, b"a text", FOR_ALL).expect("replaced");
        assert_eq!(fs::read_to_string(&aim).expect("read"), "theirs");
        assert_eq!(fs::read_dir(&top).expect("listed").count(), 1);
        // Nor is one that leads to the directory.
        symlink(&top, other.path().join("way")).expect("linked");
        let error = replace_among_others(&other.path().join("way/x.prom"), b"other", FOR_ALL).expect_err("a link");
        assert_eq!(error.raw_os_error(), Some(Errno::LOOP.raw_os_error()));
        assert_eq!(fs::read_to_string(&path).expect("read"), "a text");
    }
}
