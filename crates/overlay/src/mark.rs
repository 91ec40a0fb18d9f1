//! The mark of a store whose contents are being removed: a file beside the upper layer, where only root makes any.

use std::{
    fmt, fs,
    io::{self, Read as _, Write as _},
    os::fd::AsFd as _,
};

use layered_stores_model::{AbsolutePath, StoreSpec};
use rustix::{
    fs::{AtFlags, Mode, OFlags},
    io::Errno,
};

use super::{
    identity::Id,
    layers::LayersError,
    walk::{Walk, readable},
};

const KEY: &str = "upper-layer";

/// More is not read of what may be anything.
const LONGEST: u64 = 128;

fn name_of_mark(name: &str) -> String {
    format!(".{name}.removing")
}

/// What the mark says: by what the directories were known whose contents are being removed. One of an earlier version says
/// nothing.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Removing {
    pub(super) upper: Option<Id>,
    pub(super) state: Option<Id>,
}

impl Removing {
    /// Whether an upper layer with this mark is the one. It is taken from it before it is emptied.
    pub(super) fn is_of_upper(&self, found: Option<&Id>) -> bool {
        self.upper.is_none() || found.is_none() || self.upper.as_ref() == found
    }

    /// Whether a state dir with this mark is the one.
    pub(super) fn is_of_state(&self, found: Option<&Id>) -> bool {
        *self == Self::default() || (found.is_some() && self.state.as_ref() == found)
    }

    fn parse(text: &[u8]) -> Self {
        let mut ids = text.split(|byte| *byte == b'\n').map(Id::parse);
        Self { upper: ids.next().flatten(), state: ids.next().flatten() }
    }
}

impl fmt::Display for Removing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for id in [&self.upper, &self.state] {
            writeln!(f, "{}", id.as_ref().map_or("-", Id::as_str))?;
        }
        Ok(())
    }
}

/// Marks that what is in an upper layer is being removed. On disk when this returns.
pub(super) fn mark(upper: &AbsolutePath, removing: &Removing) -> Result<(), LayersError> {
    let sys = |errno| LayersError::sys(KEY, "mark as being removed", upper.as_str(), errno);
    let (parent, name) = Walk::new(KEY).to_parent(upper)?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let made = rustix::fs::openat(&parent, name_of_mark(name), flags, Mode::RUSR | Mode::WUSR).map_err(sys)?;
    let mut made = fs::File::from(made);
    let io = |error: io::Error| sys(Errno::from_io_error(&error).unwrap_or(Errno::IO));
    let text = removing.to_string();
    made.write_all(text.as_bytes())
        .and_then(|()| made.set_len(text.len() as u64))
        .and_then(|()| made.sync_all())
        .map_err(io)?;
    readable(parent.as_fd()).and_then(rustix::fs::fsync).map_err(sys)
}

/// What the mark of an upper layer says, if it has one.
pub(super) fn read(upper: &AbsolutePath) -> Result<Option<Removing>, LayersError> {
    let sys = |errno| LayersError::sys(KEY, "look beside", upper.as_str(), errno);
    let (parent, name) = match Walk::new(KEY).to_parent(upper) {
        Err(LayersError::Sys { errno: Errno::NOENT, .. }) => return Ok(None),
        parent => parent?,
    };
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    match rustix::fs::openat(&parent, name_of_mark(name), flags, Mode::empty()) {
        Ok(file) => {
            let mut text = Vec::new();
            let read = fs::File::from(file).take(LONGEST).read_to_end(&mut text);
            read.map_err(|error| sys(Errno::from_io_error(&error).unwrap_or(Errno::IO)))?;
            Ok(Some(Removing::parse(&text)))
        }
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(sys(errno)),
    }
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
    let (parent, name) = match Walk::new(KEY).to_parent(upper) {
        Err(LayersError::Sys { errno: Errno::NOENT, .. }) => return Ok(()),
        parent => parent?,
    };
    match rustix::fs::statat(parent, name_of_mark(name), AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => Ok(()),
        Ok(_) => Err(LayersError::HalfRemoved { path: upper.clone(), store: spec.name.to_string() }),
        Err(errno) => Err(LayersError::sys(KEY, "look beside", upper.as_str(), errno)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_mark_says_is_what_was_written() {
        let id = |digit: &str| Id::parse(digit.repeat(32).as_bytes());
        for removing in [
            Removing { upper: id("a"), state: id("b") },
            Removing { upper: None, state: id("b") },
            Removing { upper: id("a"), state: None },
            Removing::default(),
        ] {
            assert_eq!(Removing::parse(removing.to_string().as_bytes()), removing);
        }
        for older in ["", "\n", "something else"] {
            assert_eq!(Removing::parse(older.as_bytes()), Removing::default());
        }
    }
}
