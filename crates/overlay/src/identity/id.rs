//! The mark itself: a random number in an extended attribute.

use std::{
    fmt,
    os::fd::{AsFd, OwnedFd},
};

use rustix::{fs::XattrFlags, io::Errno, rand::GetRandomFlags};
use serde::{Deserialize, Serialize};

use crate::walk::readable;

/// The name of the attribute. Its value is text, so that a person can copy it.
pub const ATTRIBUTE: &str = "trusted.layered-stores.id";

/// The attribute of a state dir that has the mark of the upper layer it belongs to.
pub const UPPER_ATTRIBUTE: &str = "trusted.layered-stores.upper-id";

/// The same for the mark that its upper layer is about to get. It counts as much.
const NEXT_ATTRIBUTE: &str = "trusted.layered-stores.next-upper-id";

/// What is set for a moment, to see where it turns up.
const TRIAL: &str = "trusted.layered-stores.trial";

const LENGTH: usize = 32;

/// A number that no other directory has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Id(Box<str>);

impl Id {
    pub(crate) fn new() -> Result<Self, Errno> {
        let mut bytes = [0; LENGTH / 2];
        // So few are had at once or not at all (getrandom(2)).
        if rustix::rand::getrandom(&mut bytes, GetRandomFlags::empty())? < bytes.len() {
            return Err(Errno::AGAIN);
        }
        Ok(Self(format!("{:032x}", u128::from_ne_bytes(bytes)).into()))
    }

    /// The number that a text is. It is printed, and a disk may come from anywhere.
    pub(crate) fn parse(text: &[u8]) -> Option<Self> {
        let is_one = text.len() == LENGTH && text.iter().all(u8::is_ascii_hexdigit);
        str::from_utf8(text).ok().filter(|_| is_one).map(|text| Self(text.into()))
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// That of a directory. `None` where there is none, or something that is none.
    pub(crate) fn of(dir: impl AsFd) -> Result<Option<Self>, Errno> {
        read(dir, ATTRIBUTE)
    }

    /// That of the upper layer which a state dir belongs to.
    pub(crate) fn of_upper(state_dir: impl AsFd) -> Result<Option<Self>, Errno> {
        read(state_dir, UPPER_ATTRIBUTE)
    }

    /// That which the upper layer of a state dir was about to get.
    pub(crate) fn of_next_upper(state_dir: impl AsFd) -> Result<Option<Self>, Errno> {
        read(state_dir, NEXT_ATTRIBUTE)
    }

    /// Marks a directory that has no mark.
    pub(super) fn set(&self, dir: impl AsFd) -> Result<(), Errno> {
        let dir = readable(dir.as_fd())?;
        match self.write(&dir, ATTRIBUTE, XattrFlags::CREATE) {
            // Something that is no mark is in its place.
            Err(Errno::EXIST) if Self::of(&dir)?.is_none() => self.write(&dir, ATTRIBUTE, XattrFlags::REPLACE),
            set => set,
        }
    }

    /// Marks a directory, whatever mark it has.
    pub(super) fn replace(&self, dir: impl AsFd) -> Result<(), Errno> {
        self.write(&readable(dir.as_fd())?, ATTRIBUTE, XattrFlags::empty())
    }

    /// Has a state dir tell that it belongs to the upper layer of this mark.
    pub(super) fn tell(&self, state_dir: impl AsFd) -> Result<(), Errno> {
        self.write(&readable(state_dir.as_fd())?, UPPER_ATTRIBUTE, XattrFlags::empty())
    }

    /// Has a state dir tell that its upper layer is about to get this mark.
    pub(super) fn announce(&self, state_dir: impl AsFd) -> Result<(), Errno> {
        self.write(&readable(state_dir.as_fd())?, NEXT_ATTRIBUTE, XattrFlags::empty())
    }

    fn write(&self, dir: &OwnedFd, attribute: &str, flags: XattrFlags) -> Result<(), Errno> {
        rustix::fs::fsetxattr(dir, attribute, self.0.as_bytes(), flags)
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn read(dir: impl AsFd, attribute: &str) -> Result<Option<Id>, Errno> {
    let mut text = [0; LENGTH];
    let dir = readable(dir.as_fd())?;
    match rustix::fs::fgetxattr(dir, attribute, &mut text[..]) {
        Ok(length) => Ok(Id::parse(&text[..length])),
        Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::RANGE) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// What keeps a mark from being set, without which a store works as well.
pub(super) fn is_no_place_for_marks(errno: Errno) -> bool {
    matches!(errno, Errno::OPNOTSUPP | Errno::ROFS | Errno::NOSPC | Errno::DQUOT | Errno::PERM)
}

/// Takes the mark from a directory that is about to be emptied: another store that knows it by that is not to find it empty.
pub(crate) fn unmark(dir: impl AsFd) -> Result<(), Errno> {
    match rustix::fs::fremovexattr(dir, ATTRIBUTE) {
        // What is immutable does not get empty either.
        Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::PERM) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// Gives a directory that is empty by now a mark of its own. `None` where none can be set.
pub(crate) fn mark_anew(dir: impl AsFd, fresh: Id) -> Result<Option<Id>, Errno> {
    match fresh.replace(dir) {
        Err(errno) if is_no_place_for_marks(errno) => Ok(None),
        set => set.map(|()| Some(fresh)),
    }
}

/// Takes from a state dir what was announced: it is told by now.
pub(super) fn unannounce(state_dir: impl AsFd) -> Result<(), Errno> {
    match rustix::fs::fremovexattr(readable(state_dir.as_fd())?, NEXT_ATTRIBUTE) {
        Err(Errno::NODATA) => Ok(()),
        removed => removed,
    }
}

/// Whether two directories are one, each seen directly or as the upper layer of an overlay. A copy or a snapshot has the same
/// mark, and an overlay does not tell the device of its layers; so something is set through the one and looked for in the other.
/// Where nothing can be set, they are taken for one.
pub(crate) fn are_one(one: impl AsFd, other: impl AsFd) -> Result<bool, Errno> {
    let (one, trial) = (readable(one.as_fd())?, Id::new()?);
    match trial.write(&one, TRIAL, XattrFlags::empty()) {
        Ok(()) => {}
        Err(errno) if is_no_place_for_marks(errno) => return Ok(true),
        Err(errno) => return Err(errno),
    }
    let found = read(other, TRIAL);
    // One that stays is replaced the next time.
    let _ = rustix::fs::fremovexattr(&one, TRIAL);
    Ok(found? == Some(trial))
}
