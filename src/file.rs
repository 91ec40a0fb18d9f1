//! Replacing a file in one step: whoever reads it, and whatever ends the daemon, finds the old one or the new one.

use std::{
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Write as _},
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::Path,
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
}
