//! By what the directories with a store's data are known again.
//!
//! What is missing is made when a store comes up for the first time, and never again: a filesystem that is late or was taken
//! away leaves the directory beneath it, and a new, empty upper layer there would be built into, with a database that names
//! paths it does not have, or one that knows nothing of those of the other.
//!
//! So the upper layer and the state dir carry a mark: a random number in an extended attribute that root alone can set, and
//! that no overlay hides. The records have it too. It is on disk before a record names it, so wherever a daemon ends, the next
//! one finds either a record that is kept to, or none and takes what is there, unless it is another store's by the record of
//! that. A mark is replaced in a copy only, which could be mistaken for the original later; `remove-data` takes it away.
//!
//! The two belong together: see [`pair`]. If both are others than on record and belong together, they are a whole store that
//! somebody has put there, such as a backup, and are taken.

mod id;
mod pair;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use layered_stores_model::{AbsolutePath, StoreName, StoreSpec};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

pub use self::id::{ATTRIBUTE, Id, UPPER_ATTRIBUTE};
pub(super) use self::{
    id::{are_one, mark_anew, unmark},
    pair::{Pair, check_pair, example_of, has_database, tells},
};
use super::{
    layers::LayersError,
    mark,
    walk::{self, Walk},
};

/// The configuration's keys, for messages.
const UPPER: &str = "upper-layer";
const ROOT: &str = "root";

/// A directory that was there, and its mark. Where it could not be given one, that it was there is all that is known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// The directory.
    pub path: AbsolutePath,
    /// The number in its attribute.
    pub id: Option<Id>,
}

/// The marks of the directories with a store's data.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Marks {
    /// The upper layer's.
    pub upper: Option<Mark>,
    /// The state dir's, with Nix's database.
    pub state: Option<Mark>,
}

/// What is on record of the directories of a store, and of those of others.
#[derive(Clone, Copy)]
pub struct Known<'k> {
    /// The store's own. There may be several records: one of them is right.
    pub own: &'k [Marks],
    /// Which directories of other stores have a mark on record.
    pub others: &'k dyn Fn(&Id) -> Vec<(StoreName, Mark)>,
}

impl<'k> Known<'k> {
    /// What is on record of a store, where there is no other one.
    pub fn of(own: &'k [Marks]) -> Self {
        Self { own, others: &|_| Vec::new() }
    }

    /// Whether a mark is on record for this store, wherever the directory was then.
    pub(super) fn has(&self, id: &Id) -> bool {
        self.marks().any(|mark| mark.id.as_ref() == Some(id))
    }

    fn marks(&self) -> impl Iterator<Item = &'k Mark> {
        self.own.iter().flat_map(|marks| [&marks.upper, &marks.state]).flatten()
    }
}

/// Whose a directory is, by its mark.
#[derive(PartialEq, Eq)]
pub(super) enum Claim {
    /// That of no other store.
    Nobodys,
    /// A copy of another store's, or of one that the store has elsewhere.
    Copy,
    /// Another store's: it is the one, or the one is not where it should be.
    Of(StoreName),
}

/// Whose a directory with a mark is. What another store has on record `at` the same path is not its own any more: no two are
/// declared with one directory.
pub(super) fn claim(
    others: &dyn Fn(&Id) -> Vec<(StoreName, Mark)>,
    id: &Id,
    dir: BorrowedFd<'_>,
    at: Option<&AbsolutePath>,
) -> Result<Claim, Errno> {
    let mut claim = Claim::Nobodys;
    for (other, mark) in others(id) {
        if at == Some(&mark.path) {
            continue;
        }
        if !is_still_there(&mark, id, dir)? {
            return Ok(Claim::Of(other));
        }
        claim = Claim::Copy;
    }
    Ok(claim)
}

/// Whether a directory is where it was with its mark, and another one than `copy`.
fn is_still_there(mark: &Mark, id: &Id, copy: BorrowedFd<'_>) -> Result<bool, Errno> {
    let Ok(there) = Walk::new(UPPER).to(&mark.path) else { return Ok(false) };
    if Id::of(&there) != Ok(Some(id.clone())) {
        return Ok(false);
    }
    // A filesystem may be mounted at two places.
    let number = |dir| walk::stat(dir).map(|stat| (stat.stx_dev_major, stat.stx_dev_minor, stat.stx_ino));
    Ok(number(there.as_fd())? != number(copy)?)
}

/// What the records say of a directory: it was not there before, or has one of these marks.
pub(super) struct Expected<'m> {
    key: &'static str,
    path: &'m AbsolutePath,
    store: &'m str,
    marks: Vec<&'m Mark>,
    known: Known<'m>,
}

/// What is expected of upper layer and state dir.
pub(super) fn expected<'m>(spec: &'m StoreSpec, known: Known<'m>) -> (Expected<'m>, Expected<'m>) {
    let of = |key, path: &'m AbsolutePath, mark: fn(&Marks) -> Option<&Mark>| {
        let marks = known.own.iter().filter_map(mark).filter(|mark| mark.path == *path).collect();
        Expected { key, path, store: spec.name.as_str(), marks, known }
    };
    let upper = of(UPPER, &spec.layers.upper, |marks| marks.upper.as_ref());
    (upper, of(ROOT, &spec.state_dir, |marks| marks.state.as_ref()))
}

/// The marks that go on to hold until a store has come up with a specification: there may be others of its directories by then,
/// or the ones that it had.
pub fn retained(spec: &StoreSpec, records: &[Marks]) -> Marks {
    let best = |path: &AbsolutePath, mark: fn(&Marks) -> Option<&Mark>| {
        // One that is marked says more than one that is not.
        let says = |mark: &&Mark| (mark.path == *path, mark.id.is_some());
        records.iter().rev().filter_map(mark).max_by_key(says).cloned()
    };
    let upper = best(&spec.layers.upper, |marks| marks.upper.as_ref());
    Marks { upper, state: best(&spec.state_dir, |marks| marks.state.as_ref()) }
}

/// Refuses a store one of whose directories was there and is not there now, or whose directories are not those of one store.
/// Nothing is changed.
///
/// # Errors
/// [`LayersError::HalfRemoved`], [`LayersError::Missing`], [`LayersError::Another`], [`LayersError::OfOther`],
/// [`LayersError::LinkedDatabase`], and what [`check_pair`] says.
pub fn require(spec: &StoreSpec, known: Known<'_>) -> Result<(), LayersError> {
    walk::together(|| require_all(spec, known))
}

fn require_all(spec: &StoreSpec, known: Known<'_>) -> Result<(), LayersError> {
    // What has no database any more may be about to lose the rest, and has no mark by which it is known.
    mark::refuse_half_removed(spec)?;
    let (upper, state) = expected(spec, known);
    let (upper, state_dir) = (upper.open()?, state.open()?);
    if let Some(dir) = &state_dir {
        pair::refuse_link(spec, dir.as_fd())?;
    }
    check_pair(spec, upper.as_ref().map(AsFd::as_fd), state_dir.as_ref().map(AsFd::as_fd), &state)
}

/// Whether the upper layer is another one than on record, or has another database, and the two that are there belong together.
///
/// # Errors
/// [`LayersError`] where they cannot be looked at.
pub fn is_another_pair(spec: &StoreSpec, known: Known<'_>) -> Result<bool, LayersError> {
    let (upper, state) = expected(spec, known);
    if !upper.is_known() && !state.is_known() {
        return Ok(false);
    }
    let (Some(above), Some(below)) = (upper.find()?, state.find()?) else { return Ok(false) };
    let id = Id::of(&above).map_err(|errno| upper.sys("look at", errno))?;
    let look = |errno| state.sys("look at", errno);
    let Some(id) = id else { return Ok(false) };
    let is_pair = tells(&below, &id).map_err(look)? && has_database(below.as_fd()).map_err(look)?;
    let are_those = upper.check(above.as_fd()).is_ok() && state.check(below.as_fd()).is_ok();
    Ok(is_pair && !are_those)
}

impl Expected<'_> {
    /// Whether it was there before.
    pub(super) fn is_known(&self) -> bool {
        !self.marks.is_empty()
    }

    /// The directory, if it is there, and the one.
    fn open(&self) -> Result<Option<OwnedFd>, LayersError> {
        match self.find()? {
            Some(dir) => self.check(dir.as_fd()).map(|_| Some(dir)),
            None if self.is_known() => Err(self.missing(self.sys("open", Errno::NOENT))),
            None => Ok(None),
        }
    }

    /// The directory that is there.
    fn find(&self) -> Result<Option<OwnedFd>, LayersError> {
        match Walk::new(self.key).to(self.path) {
            Err(LayersError::Sys { errno: Errno::NOENT, .. }) => Ok(None),
            found => found.map(Some),
        }
    }

    /// Says that a directory that is not there should be.
    pub(super) fn missing(&self, error: LayersError) -> LayersError {
        match error {
            LayersError::Sys { errno: Errno::NOENT, .. } if self.is_known() => {
                LayersError::Missing { key: self.key, path: self.path.clone(), store: self.store.to_owned() }
            }
            error => error,
        }
    }

    /// The mark that a directory has, if it is the one.
    pub(super) fn check(&self, dir: BorrowedFd<'_>) -> Result<Option<Id>, LayersError> {
        let found = self.refuse_others(dir)?;
        let wanted = self.marks.iter().find_map(|mark| mark.id.as_ref());
        match wanted {
            Some(wanted) if !self.is_of(found.as_ref()) => Err(LayersError::Another {
                key: self.key,
                path: self.path.clone(),
                store: self.store.to_owned(),
                holds_something: example_of(dir).map_err(|errno| self.sys("list", errno))?.is_some(),
                found,
                wanted: wanted.clone(),
            }),
            _ => Ok(found),
        }
    }

    /// The mark that a directory has, if it is not another store's.
    pub(super) fn refuse_others(&self, dir: BorrowedFd<'_>) -> Result<Option<Id>, LayersError> {
        let found = self.mark_of(dir)?;
        match self.claim(found.as_ref(), dir)? {
            Claim::Of(other) => {
                let (key, path, store) = (self.key, self.path.clone(), self.store.to_owned());
                Err(LayersError::OfOther { key, path, store, other })
            }
            Claim::Nobodys | Claim::Copy => Ok(found),
        }
    }

    /// Whether a directory is the store's by its mark, wherever it was, and no copy of that.
    pub(super) fn is_own(&self, found: Option<&Id>, dir: BorrowedFd<'_>) -> Result<bool, LayersError> {
        Ok(found.is_some_and(|id| self.known.has(id)) && !self.is_copy(found, dir)?)
    }

    /// Whether a directory with this mark is a copy.
    fn is_copy(&self, found: Option<&Id>, dir: BorrowedFd<'_>) -> Result<bool, LayersError> {
        Ok(self.claim(found, dir)? == Claim::Copy)
    }

    fn mark_of(&self, dir: BorrowedFd<'_>) -> Result<Option<Id>, LayersError> {
        Id::of(dir).map_err(|errno| self.sys("read the mark of", errno))
    }

    /// Whose a directory is that has this mark.
    fn claim(&self, found: Option<&Id>, dir: BorrowedFd<'_>) -> Result<Claim, LayersError> {
        let Some(id) = found else { return Ok(Claim::Nobodys) };
        let claim = if self.known.has(id) {
            self.claim_own(id, dir)
        } else {
            claim(self.known.others, id, dir, Some(self.path))
        };
        claim.map_err(|errno| self.sys("look at", errno))
    }

    /// One that was moved is the store's. A copy of one that stays where it was is another directory from then on, or the
    /// database would go with both.
    fn claim_own(&self, id: &Id, dir: BorrowedFd<'_>) -> Result<Claim, Errno> {
        if self.ids().any(|here| here == id) {
            return Ok(Claim::Nobodys);
        }
        for mark in self.known.marks().filter(|mark| mark.id.as_ref() == Some(id)) {
            if is_still_there(mark, id, dir)? {
                return Ok(Claim::Copy);
            }
        }
        Ok(Claim::Nobodys)
    }

    /// Whether a directory with this mark, or without one, is on record here. One that could not be marked then is any.
    pub(super) fn is_of(&self, found: Option<&Id>) -> bool {
        self.marks.iter().any(|mark| mark.id.is_none() || mark.id.as_ref() == found)
    }

    /// The upper layer that is on record with a state dir at this path, if that of this mark is not.
    fn other_upper(&self, found: Option<&Id>) -> Option<Id> {
        let is_here = |marks: &&Marks| marks.state.as_ref().is_some_and(|mark| mark.path == *self.path);
        let uppers = self.known.own.iter().filter(is_here).filter_map(|marks| marks.upper.as_ref()?.id.as_ref());
        let uppers: Vec<_> = uppers.collect();
        if found.is_some_and(|found| uppers.contains(&found)) { None } else { uppers.last().copied().cloned() }
    }

    /// Whether it is on record that it was there, and could not be marked.
    pub(super) fn is_unmarked(&self) -> bool {
        self.marks.iter().any(|mark| mark.id.is_none())
    }

    /// The marks that are on record.
    pub(super) fn ids(&self) -> impl Iterator<Item = &Id> {
        self.marks.iter().filter_map(|mark| mark.id.as_ref())
    }

    /// The mark of a directory, which is given one if it has none. On disk when this returns.
    pub(super) fn mark(&self, dir: BorrowedFd<'_>) -> Result<Mark, LayersError> {
        self.mark_through(dir, dir)
    }

    /// The same for an upper layer that is mounted, which is marked through the overlay.
    pub(super) fn mark_through(&self, dir: BorrowedFd<'_>, merged: BorrowedFd<'_>) -> Result<Mark, LayersError> {
        let mut id = self.check(dir)?;
        if id.is_none() {
            let fresh = Id::new().map_err(|errno| self.sys("make a mark for", errno))?;
            match fresh.set(merged) {
                Ok(()) => id = self.check(dir)?,
                // A store works without one. That it was there is known then, and no more. Where there is one already, what is
                // mounted has another upper layer, which the caller sees.
                Err(Errno::EXIST) => {}
                Err(errno) if id::is_no_place_for_marks(errno) => {}
                Err(errno) => return Err(self.sys("set the mark of", errno)),
            }
        }
        let mark = Mark { path: self.path.clone(), id };
        if !self.marks.contains(&&mark) {
            self.sync(dir)?;
        }
        Ok(mark)
    }

    /// A record of a directory that a power cut takes away would keep the store down.
    fn sync(&self, dir: BorrowedFd<'_>) -> Result<(), LayersError> {
        let (parent, _) = Walk::new(self.key).to_parent(self.path)?;
        [dir, parent.as_fd()].into_iter().try_for_each(pair::sync).map_err(|errno| self.sys("write to disk", errno))
    }

    fn sys(&self, doing: &'static str, errno: Errno) -> LayersError {
        LayersError::sys(self.key, doing, self.path.as_str(), errno)
    }
}
