//! Whether an upper layer and a state dir belong together, and how they are made to tell so.
//!
//! The state dir has the upper layer's mark as well: with another upper layer, its database would name paths that are not there,
//! and what is in the upper layer of another database is nobody's, which a garbage collection deletes. That is seen without any
//! record: a store may have got another name, or another upper layer for a while.

use std::os::fd::{AsFd, BorrowedFd};

use layered_stores_model::StoreSpec;
use rustix::{
    fs::{Dir, Mode, OFlags, ResolveFlags},
    io::Errno,
};

use super::{
    Expected, Id, Mark, Marks, ROOT, UPPER,
    id::{is_no_place_for_marks, unannounce},
};
use crate::{
    layers::LayersError,
    progress::{self, Spot},
    walk::readable,
};

/// Refuses an upper layer and a state dir that are not those of one store. What is not there yet can be made.
///
/// A state dir with a database goes with the upper layer whose mark it has, and with no other. Where it has none, it goes with
/// the one that is on `record` with it; or neither was ever this program's, and somebody has declared an overlay that they had
/// made by hand. An upper layer with something in it goes with no state dir that has no database.
pub(crate) fn check_pair(
    spec: &StoreSpec,
    upper: Option<BorrowedFd<'_>>,
    state: Option<BorrowedFd<'_>>,
    record: &Expected<'_>,
) -> Result<(), LayersError> {
    let (path, state_dir, store) = (spec.layers.upper.clone(), spec.state_dir.clone(), spec.name.to_string());
    let look = |errno| LayersError::sys(ROOT, "look at", state_dir.as_str(), errno);
    let look_above = |errno| LayersError::sys(UPPER, "look at", path.as_str(), errno);
    let example = || upper.map(example_of).transpose().map(Option::flatten).map_err(look_above);
    progress::at(Spot::Upper);
    let found = upper.map(Id::of).transpose().map_err(look_above)?.flatten();
    progress::at(Spot::Root);
    let used = match state {
        Some(state) if has_database(state).map_err(look)? => state,
        _ => return check_upper(spec, found.as_ref(), example()?, record),
    };
    if let Some(found) = &found
        && tells(used, found).map_err(look)?
    {
        return Ok(());
    }
    // A state dir that takes no marks, or is of a version that did not tell, is told of by the record alone.
    let told = Id::of_upper(used).map_err(look)?.or_else(|| record.other_upper(found.as_ref()));
    match (told, found) {
        (Some(wanted), found) => {
            let is_copy = found.is_none() && example()?.is_some();
            Err(LayersError::OtherUpper { path, state_dir, wanted, is_copy, store })
        }
        (None, Some(found)) if !record.is_of(Id::of(used).map_err(look)?.as_ref()) && example()?.is_some() => {
            Err(LayersError::Unpaired { path, state_dir, found, store })
        }
        (None, _) => Ok(()),
    }
}

/// Whether a state dir tells that it belongs to the upper layer of a mark.
pub(crate) fn tells(state: impl AsFd, upper: &Id) -> Result<bool, Errno> {
    Ok(Id::of_upper(&state)?.as_ref() == Some(upper) || Id::of_next_upper(&state)?.as_ref() == Some(upper))
}

/// Refuses an upper layer with something in it that no database knows of.
fn check_upper(
    spec: &StoreSpec,
    found: Option<&Id>,
    example: Option<String>,
    record: &Expected<'_>,
) -> Result<(), LayersError> {
    let (path, state_dir, store) = (spec.layers.upper.clone(), spec.state_dir.clone(), spec.name.to_string());
    match (found, example) {
        (_, None) => Ok(()),
        (Some(id), Some(_)) => Err(LayersError::NoDatabase { path, state_dir, store, is_known: record.known.has(id) }),
        (None, Some(example)) => Err(LayersError::UpperNotEmpty { path, example, state_dir }),
    }
}

/// Refuses a state dir whose database is behind a link, which an owner can make: whether one is there could not be told.
pub(super) fn refuse_link(spec: &StoreSpec, state: BorrowedFd<'_>) -> Result<(), LayersError> {
    match open_database(state) {
        Err(Errno::LOOP) => Err(LayersError::LinkedDatabase(spec.state_dir.clone())),
        _ => Ok(()),
    }
}

/// Whether Nix has made a database. Whatever else is in its place counts as one, or it would be taken for new.
pub(crate) fn has_database(state: BorrowedFd<'_>) -> Result<bool, Errno> {
    match open_database(state) {
        Ok(()) | Err(Errno::NOTDIR | Errno::LOOP) => Ok(true),
        Err(Errno::NOENT) => Ok(false),
        Err(errno) => Err(errno),
    }
}

fn open_database(state: BorrowedFd<'_>) -> Result<(), Errno> {
    let (flags, resolve) = (OFlags::PATH | OFlags::CLOEXEC, ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS);
    rustix::fs::openat2(state, "db/db.sqlite", flags, Mode::empty(), resolve).map(drop)
}

/// Something that is in a directory, but for what Nix makes before it needs it.
pub(crate) fn example_of(dir: BorrowedFd<'_>) -> Result<Option<String>, Errno> {
    for entry in Dir::read_from(readable(dir)?)? {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b".." | b".links") {
            return Ok(Some(entry.file_name().to_string_lossy().into_owned()));
        }
    }
    Ok(None)
}

/// An upper layer and a state dir that belong together.
pub(crate) struct Pair<'p> {
    pub(crate) upper: &'p Expected<'p>,
    pub(crate) upper_dir: BorrowedFd<'p>,
    /// Where the upper layer's mark is set: in itself, or in the overlay that is mounted.
    pub(crate) through: BorrowedFd<'p>,
    pub(crate) state: &'p Expected<'p>,
    pub(crate) state_dir: BorrowedFd<'p>,
}

impl Pair<'_> {
    /// Has both tell that they belong together. On disk when this returns.
    pub(crate) fn settle(&self) -> Result<Marks, LayersError> {
        let upper = if self.begin_anew()? {
            Mark { path: self.upper.path.clone(), id: self.upper.mark_of(self.upper_dir)? }
        } else {
            let upper = self.upper.mark_through(self.upper_dir, self.through)?;
            self.tell(&upper)?;
            upper
        };
        Ok(Marks { upper: Some(upper), state: Some(self.state.mark(self.state_dir)?) })
    }

    /// Gives them marks of their own if one is a copy, which could be mistaken for the original later; and if there is a database
    /// already that tells nothing. Where no mark can be set, they stay as they are. Whether they were given any.
    fn begin_anew(&self) -> Result<bool, LayersError> {
        let found = self.upper.mark_of(self.upper_dir)?;
        let state = self.state.mark_of(self.state_dir)?;
        let is_state_copy = self.state.is_copy(state.as_ref(), self.state_dir)?;
        let is_copy = is_state_copy || self.upper.is_copy(found.as_ref(), self.upper_dir)?;
        let look = |errno| self.state.sys("look at", errno);
        let is_used = found.is_none() && has_database(self.state_dir).map_err(look)?;
        if !is_copy && !is_used {
            return Ok(false);
        }
        match self.give_fresh_marks(found.as_ref(), is_state_copy) {
            Err(errno) if is_no_place_for_marks(errno) => Ok(false),
            given => given.map(|()| true).map_err(|errno| self.state.sys("set the mark of", errno)),
        }
    }

    /// This may end anywhere. So the state dir tells of the fresh mark before the upper layer has it, and goes on to tell of the
    /// old one until the fresh one is on disk.
    fn give_fresh_marks(&self, found: Option<&Id>, is_state_copy: bool) -> Result<(), Errno> {
        let fresh = Id::new()?;
        if let Some(found) = found {
            // The last time may have ended with what was announced then.
            found.tell(self.state_dir)?;
        }
        fresh.announce(self.state_dir)?;
        sync(self.state_dir)?;
        fresh.replace(self.through)?;
        sync(self.upper_dir)?;
        fresh.tell(self.state_dir)?;
        if is_state_copy {
            Id::new()?.replace(self.state_dir)?;
        }
        unannounce(self.state_dir)?;
        sync(self.state_dir)
    }

    /// Has the state dir tell which upper layer it belongs to. Where it cannot, a store works without.
    fn tell(&self, upper: &Mark) -> Result<(), LayersError> {
        let sys = |errno| self.state.sys("set the mark of", errno);
        let Some(id) = &upper.id else { return Ok(()) };
        let told = Id::of_upper(self.state_dir).map_err(sys)?;
        if told.as_ref() == Some(id) {
            // A copy may have been cut short that is not the upper layer any more. The database goes on without it.
            return match Id::of_next_upper(self.state_dir).map_err(sys)? {
                Some(_) => unannounce(self.state_dir).map_err(sys),
                None => Ok(()),
            };
        }
        if told.is_some()
            && has_database(self.state_dir).map_err(sys)?
            && Id::of_next_upper(self.state_dir).map_err(sys)?.as_ref() != Some(id)
        {
            // What was put there since they were compared is another store's.
            return Ok(());
        }
        match id.tell(self.state_dir).and_then(|()| unannounce(self.state_dir)) {
            Err(errno) if !is_no_place_for_marks(errno) => Err(sys(errno)),
            _ => Ok(()),
        }
    }
}

/// Has a directory's marks written to disk.
pub(super) fn sync(dir: BorrowedFd<'_>) -> Result<(), Errno> {
    match readable(dir).and_then(rustix::fs::fsync) {
        // Some filesystems know no such thing for directories, and some are read-only.
        Err(Errno::INVAL | Errno::ROFS) => Ok(()),
        synced => synced,
    }
}
