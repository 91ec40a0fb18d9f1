//! By what the directories with a store's data are known again.
//!
//! What is missing is made when a store comes up for the first time, and never again: a filesystem that is late or was taken
//! away leaves the directory beneath it, and a new, empty upper layer there would be built into, with a database that names
//! paths it does not have, or one that knows nothing of those of the other.
//!
//! So the upper layer and the state dir carry a mark: a random number in an extended attribute that root alone can set, and
//! that no overlay hides. The records have it too. A mark is never replaced; `remove-data` takes it away. It is on disk before
//! a record names it, so wherever a daemon ends, the next one finds either a record that is kept to, or none and takes what is
//! there.
//!
//! The two belong together. The state dir has the upper layer's mark as well: with another upper layer, its database would name
//! paths that are not there, and what is in the upper layer of another database would be nobody's. That is seen without any
//! record: a store may have got another name, or another upper layer for a while. And if both are others than on record and
//! belong together, they are a whole store that somebody has put there, such as a backup, and are taken.

use std::{
    fmt,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use layered_stores_model::{AbsolutePath, StoreSpec};
use rustix::{
    fs::{Dir, Mode, OFlags, ResolveFlags, XattrFlags},
    io::Errno,
    rand::GetRandomFlags,
};
use serde::{Deserialize, Serialize};

use super::{
    layers::LayersError,
    mark,
    progress::{self, Spot},
    walk::{Walk, readable},
};

/// The name of the attribute. Its value is text, so that a person can copy it.
pub const ATTRIBUTE: &str = "trusted.layered-stores.id";

/// The attribute of a state dir that has the mark of the upper layer it belongs to.
const UPPER_ATTRIBUTE: &str = "trusted.layered-stores.upper-id";

/// What is set for a moment, to see where it turns up.
const TRIAL: &str = "trusted.layered-stores.trial";

const LENGTH: usize = 32;

/// The configuration's keys, for messages.
const UPPER: &str = "upper-layer";
const ROOT: &str = "root";

/// A number that no other directory has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Id(String);

impl Id {
    fn new() -> Result<Self, Errno> {
        let mut bytes = [0; LENGTH / 2];
        // So few are had at once or not at all (getrandom(2)).
        if rustix::rand::getrandom(&mut bytes, GetRandomFlags::empty())? < bytes.len() {
            return Err(Errno::AGAIN);
        }
        Ok(Self(format!("{:032x}", u128::from_ne_bytes(bytes))))
    }

    /// That of a directory. `None` where there is none, or something that is none.
    pub(super) fn of(dir: impl AsFd) -> Result<Option<Self>, Errno> {
        Self::read(dir, ATTRIBUTE)
    }

    /// That of the upper layer which a state dir belongs to.
    fn of_upper(state_dir: impl AsFd) -> Result<Option<Self>, Errno> {
        Self::read(state_dir, UPPER_ATTRIBUTE)
    }

    fn read(dir: impl AsFd, attribute: &str) -> Result<Option<Self>, Errno> {
        let mut text = [0; LENGTH];
        let dir = readable(dir.as_fd())?;
        match rustix::fs::fgetxattr(dir, attribute, &mut text[..]) {
            // It is printed, and a disk may come from anywhere.
            Ok(LENGTH) if text.iter().all(u8::is_ascii_hexdigit) => Ok(String::from_utf8(text.to_vec()).ok().map(Self)),
            Ok(_) | Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::RANGE) => Ok(None),
            Err(errno) => Err(errno),
        }
    }

    fn set(&self, dir: BorrowedFd<'_>) -> Result<(), Errno> {
        let dir = readable(dir)?;
        match rustix::fs::fsetxattr(&dir, ATTRIBUTE, self.0.as_bytes(), XattrFlags::CREATE) {
            // Something that is no mark is in its place.
            Err(Errno::EXIST) if Self::of(&dir)?.is_none() => {
                rustix::fs::fsetxattr(&dir, ATTRIBUTE, self.0.as_bytes(), XattrFlags::REPLACE)
            }
            set => set,
        }
    }
}

/// Takes the mark from a directory that is about to be emptied: another store that knows it by that is not to find it empty.
pub(super) fn unmark(dir: impl AsFd) -> Result<(), Errno> {
    match rustix::fs::fremovexattr(dir, ATTRIBUTE) {
        // What is immutable does not get empty either.
        Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::PERM) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// Whether two directories are one, each seen directly or as the upper layer of an overlay. A copy or a snapshot has the same
/// mark, and an overlay does not tell the device of its layers; so something is set through the one and looked for in the other.
/// Where nothing can be set, they are taken for one.
pub(super) fn are_one(one: impl AsFd, other: impl AsFd) -> Result<bool, Errno> {
    let (one, trial) = (readable(one.as_fd())?, Id::new()?);
    match rustix::fs::fsetxattr(&one, TRIAL, trial.0.as_bytes(), XattrFlags::empty()) {
        Ok(()) => {}
        Err(Errno::OPNOTSUPP | Errno::ROFS | Errno::NOSPC | Errno::DQUOT | Errno::PERM) => return Ok(true),
        Err(errno) => return Err(errno),
    }
    let mut text = [0; LENGTH];
    let found = readable(other.as_fd()).and_then(|other| rustix::fs::fgetxattr(other, TRIAL, &mut text[..]));
    // One that stays is replaced the next time.
    let _ = rustix::fs::fremovexattr(&one, TRIAL);
    match found {
        Ok(length) => Ok(text[..length] == *trial.0.as_bytes()),
        Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::RANGE) => Ok(false),
        Err(errno) => Err(errno),
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

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

/// What the records say of a directory: it was not there before, or has one of these marks.
pub(super) struct Expected<'m> {
    key: &'static str,
    path: &'m AbsolutePath,
    store: &'m str,
    marks: Vec<&'m Mark>,
}

/// What is expected of upper layer and state dir. There may be several records of each: one of them is right.
pub(super) fn expected<'m>(spec: &'m StoreSpec, records: &'m [Marks]) -> (Expected<'m>, Expected<'m>) {
    let of = |key, path: &'m AbsolutePath, mark: fn(&Marks) -> Option<&Mark>| {
        let marks = records.iter().filter_map(mark).filter(|mark| mark.path == *path).collect();
        Expected { key, path, store: spec.name.as_str(), marks }
    };
    let upper = of(UPPER, &spec.layers.upper, |marks| marks.upper.as_ref());
    (upper, of(ROOT, &spec.state_dir, |marks| marks.state.as_ref()))
}

/// Whether a directory is where its mark says.
pub fn is_at(mark: &Mark) -> bool {
    let found = Walk::new(UPPER).to(&mark.path).ok().and_then(|dir| Id::of(dir).ok().flatten());
    mark.id.is_some() && found == mark.id
}

/// The marks that go on to hold for a specification.
pub fn retained(spec: &StoreSpec, records: &[Marks]) -> Marks {
    let (upper, state) = expected(spec, records);
    // One that is marked says more than one that is not.
    let best = |all: Vec<&Mark>| all.iter().find(|mark| mark.id.is_some()).or(all.first()).map(|&mark| mark.clone());
    Marks { upper: best(upper.marks), state: best(state.marks) }
}

/// Refuses a store one of whose directories was there and is not there now, or whose directories are not those of one store.
/// Nothing is changed.
///
/// # Errors
/// [`LayersError::Missing`], [`LayersError::Another`], [`LayersError::OtherUpper`], [`LayersError::NoDatabase`],
/// [`LayersError::HalfRemoved`].
pub fn require(spec: &StoreSpec, records: &[Marks]) -> Result<(), LayersError> {
    let (upper, state) = expected(spec, records);
    let (upper, state) = (upper.open()?, state.open()?);
    if upper.is_some() {
        // What has no database any more may be about to lose the rest.
        mark::refuse_half_removed(spec)?;
    }
    check_pair(spec, upper.as_ref().map(AsFd::as_fd), state.as_ref().map(AsFd::as_fd))
}

/// The mark of an upper layer that is another one than on record, or has another database, if the two that are there belong
/// together.
///
/// # Errors
/// [`LayersError`] where they cannot be looked at.
pub fn another_pair(spec: &StoreSpec, records: &[Marks]) -> Result<Option<Id>, LayersError> {
    let (upper, state) = expected(spec, records);
    if !upper.is_known() && !state.is_known() {
        return Ok(None);
    }
    let (Some(above), Some(below)) = (upper.find()?, state.find()?) else { return Ok(None) };
    let id = Id::of(&above).map_err(|errno| upper.sys("look at", errno))?;
    let look = |errno| state.sys("look at", errno);
    let is_pair =
        id.is_some() && id == Id::of_upper(&below).map_err(look)? && has_database(below.as_fd()).map_err(look)?;
    let are_those = upper.check(above.as_fd()).is_ok() && state.check(below.as_fd()).is_ok();
    Ok(id.filter(|_| is_pair && !are_those))
}

/// Refuses a state dir with a database that belongs to another upper layer, and an upper layer whose database is not there.
/// What neither has been used yet can be put together as one likes.
pub(super) fn check_pair(
    spec: &StoreSpec,
    upper: Option<BorrowedFd<'_>>,
    state: Option<BorrowedFd<'_>>,
) -> Result<(), LayersError> {
    let (path, state_dir, store) = (spec.layers.upper.clone(), spec.state_dir.clone(), spec.name.to_string());
    let look = |errno| LayersError::sys(ROOT, "look at", state_dir.as_str(), errno);
    let look_above = |errno| LayersError::sys(UPPER, "look at", path.as_str(), errno);
    progress::at(Spot::Root);
    let wanted = state.map(Id::of_upper).transpose().map_err(look)?.flatten();
    let is_used = state.map(has_database).transpose().map_err(look)?.unwrap_or_default();
    progress::at(Spot::Upper);
    let found = upper.map(Id::of).transpose().map_err(look_above)?.flatten();
    if wanted.is_some() && wanted == found {
        return Ok(());
    }
    if is_used {
        let unmarked = upper.is_some() && found.is_none();
        // One of a version that did not tell belongs to what is there.
        return wanted
            .map_or(Ok(()), |wanted| Err(LayersError::OtherUpper { path, state_dir, wanted, unmarked, store }));
    }
    match upper {
        Some(upper) if found.is_some() && !is_empty(upper).map_err(look_above)? => {
            Err(LayersError::NoDatabase { path, state_dir, store })
        }
        _ => Ok(()),
    }
}

/// Has a state dir tell which upper layer it belongs to. Where it cannot, a store works without.
pub(super) fn pair(spec: &StoreSpec, upper: &Mark, state: BorrowedFd<'_>) -> Result<(), LayersError> {
    let sys = |errno| LayersError::sys(ROOT, "set the mark of", spec.state_dir.as_str(), errno);
    let Some(id) = &upper.id else { return Ok(()) };
    if Id::of_upper(state).map_err(sys)?.as_ref() == Some(id) {
        return Ok(());
    }
    let set = |state| rustix::fs::fsetxattr(state, UPPER_ATTRIBUTE, id.0.as_bytes(), XattrFlags::empty());
    match readable(state).and_then(set) {
        Ok(()) | Err(Errno::OPNOTSUPP | Errno::ROFS | Errno::NOSPC | Errno::DQUOT | Errno::PERM) => Ok(()),
        Err(errno) => Err(sys(errno)),
    }
}

/// Whether Nix has made a database. Links, which an owner can make, lead to none.
fn has_database(state: BorrowedFd<'_>) -> Result<bool, Errno> {
    let (flags, resolve) = (OFlags::PATH | OFlags::CLOEXEC, ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS);
    match rustix::fs::openat2(state, "db/db.sqlite", flags, Mode::empty(), resolve) {
        Ok(_) => Ok(true),
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// Whether there is nothing in a directory.
pub(super) fn is_empty(dir: BorrowedFd<'_>) -> Result<bool, Errno> {
    for entry in Dir::read_from(readable(dir)?)? {
        if !matches!(entry?.file_name().to_bytes(), b"." | b"..") {
            return Ok(false);
        }
    }
    Ok(true)
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
        let found = Id::of(dir).map_err(|errno| self.sys("read the mark of", errno))?;
        let is_the_one = |mark: &&Mark| mark.id.is_none() || mark.id == found;
        let wanted = self.marks.iter().find_map(|mark| mark.id.as_ref());
        match wanted {
            Some(wanted) if !self.marks.iter().any(is_the_one) => Err(LayersError::Another {
                key: self.key,
                path: self.path.clone(),
                store: self.store.to_owned(),
                found,
                wanted: wanted.clone(),
            }),
            _ => Ok(found),
        }
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
                Err(Errno::EXIST | Errno::OPNOTSUPP | Errno::ROFS | Errno::NOSPC | Errno::DQUOT | Errno::PERM) => {}
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
        for dir in [dir, parent.as_fd()] {
            match readable(dir).and_then(rustix::fs::fsync) {
                // Some filesystems know no such thing for directories, and some are read-only.
                Ok(()) | Err(Errno::INVAL | Errno::ROFS) => {}
                Err(errno) => return Err(self.sys("write to disk", errno)),
            }
        }
        Ok(())
    }

    fn sys(&self, doing: &'static str, errno: Errno) -> LayersError {
        LayersError::sys(self.key, doing, self.path.as_str(), errno)
    }
}
