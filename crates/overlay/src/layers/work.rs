//! What may be in a work dir, which the kernel empties and so does whoever removes a store's data.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use layered_stores_model::AbsolutePath;
use rustix::{
    fs::{Dir, Mode, OFlags, ResolveFlags},
    io::Errno,
};

use super::LayersError;
use crate::walk::readable;

/// The directories that OverlayFS makes in a work dir (`OVL_WORKDIR_NAME`, `OVL_INDEXDIR_NAME`).
pub(crate) const KERNELS: [&str; 2] = ["work", "index"];

/// Refuses a work dir with something in it that OverlayFS has not put there, to which nobody would be asked.
pub(crate) fn refuse_strange_work(work: BorrowedFd<'_>, path: &AbsolutePath) -> Result<(), LayersError> {
    let list = |errno| LayersError::sys("work-dir", "list", path.as_str(), errno);
    let is_known = |name: &[u8]| KERNELS.iter().any(|kernels| kernels.as_bytes() == name);
    // What a crash has left there is called `#` and a number (`ovl_tempname`), and `incompat` tells of options that need it.
    let is_in_work = |name: &[u8]| name.starts_with(b"#") || name == b"incompat";
    // File handles in hexadecimal, of an overlay that had an index (`ovl_get_index_name`, `OVL_FH_MAGIC`).
    let is_in_index = |name: &[u8]| name.starts_with(b"#") || name.starts_with(b"00fb");
    let mut strange = strange_in(work, is_known).map_err(list)?;
    for (name, is_known) in [(KERNELS[0], &is_in_work as &dyn Fn(&[u8]) -> bool), (KERNELS[1], &is_in_index)] {
        if strange.is_none()
            && let Some(below) = kernels_own(work, name).map_err(list)?
        {
            strange = strange_in(below, is_known).map_err(list)?.map(|found| format!("{name}/{found}"));
        }
    }
    strange.map_or(Ok(()), |example| Err(LayersError::WorkNotEmpty { path: path.clone(), example }))
}

fn kernels_own(work: BorrowedFd<'_>, name: &str) -> Result<Option<OwnedFd>, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    match rustix::fs::openat2(work, name, flags, Mode::empty(), resolve) {
        Ok(dir) => Ok(Some(dir)),
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(errno),
    }
}

fn strange_in(dir: impl AsFd, is_known: impl Fn(&[u8]) -> bool) -> Result<Option<String>, Errno> {
    for entry in Dir::read_from(readable(dir.as_fd())?)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if !matches!(name, b"." | b"..") && !is_known(name) {
            return Ok(Some(entry.file_name().to_string_lossy().into_owned()));
        }
    }
    Ok(None)
}
