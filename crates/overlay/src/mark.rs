//! The mark of a store whose contents are being removed: a file beside the upper layer, where only root makes any.

use std::os::fd::AsFd as _;

use layered_stores_model::{AbsolutePath, StoreSpec};
use rustix::{
    fs::{AtFlags, Mode, OFlags},
    io::Errno,
};

use super::{
    layers::LayersError,
    walk::{Walk, readable},
};

const KEY: &str = "upper-layer";

fn name_of_mark(name: &str) -> String {
    format!(".{name}.removing")
}

/// Marks that what is in an upper layer is being removed. On disk when this returns.
pub(super) fn mark(upper: &AbsolutePath) -> Result<(), LayersError> {
    let sys = |errno| LayersError::sys(KEY, "mark as being removed", upper.as_str(), errno);
    let (parent, name) = Walk::new(KEY).to_parent(upper)?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let made = rustix::fs::openat(&parent, name_of_mark(name), flags, Mode::RUSR | Mode::WUSR).map_err(sys)?;
    rustix::fs::fsync(made).map_err(sys)?;
    readable(parent.as_fd()).and_then(rustix::fs::fsync).map_err(sys)
}

/// Takes the mark away. On disk when this returns.
pub(super) fn unmark(upper: &AbsolutePath) -> Result<(), LayersError> {
    let sys = |errno| LayersError::sys(KEY, "take the mark from", upper.as_str(), errno);
    let (parent, name) = Walk::new(KEY).to_parent(upper)?;
    rustix::fs::unlinkat(&parent, name_of_mark(name), AtFlags::empty()).map_err(sys)?;
    readable(parent.as_fd()).and_then(rustix::fs::fsync).map_err(sys)
}

/// Refuses a store that has the mark.
pub(super) fn refuse_half_removed(spec: &StoreSpec) -> Result<(), LayersError> {
    let upper = &spec.layers.upper;
    let (parent, name) = Walk::new(KEY).to_parent(upper)?;
    match rustix::fs::statat(parent, name_of_mark(name), AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => Ok(()),
        Ok(_) => Err(LayersError::HalfRemoved { path: upper.clone(), store: spec.name.to_string() }),
        Err(errno) => Err(LayersError::sys(KEY, "look beside", upper.as_str(), errno)),
    }
}
