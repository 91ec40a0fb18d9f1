//! Mount options that a declaration may choose.

use std::{fmt, str::FromStr};

use serde::{
    Deserialize, Serialize,
    de::{IntoDeserializer as _, value},
};

/// An option of a store's mount that changes nothing about what is in the store. `nodev` and `nosuid` are always on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MountOption {
    /// No access times.
    Noatime,
    /// No access times of directories.
    Nodiratime,
    /// Access times are written when they are older than the last change.
    Relatime,
    /// Access times are written at every access.
    Strictatime,
    /// Nothing in the store can be executed.
    Noexec,
}

impl MountOption {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Noatime, Self::Nodiratime, Self::Relatime, Self::Strictatime, Self::Noexec];
}

/// The word that mount(8) takes.
impl fmt::Display for MountOption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// A text is no [`MountOption`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not among the mount options that can be chosen: {options}", options = MountOption::ALL.map(|option| option.to_string()).join(", "))]
pub struct UnknownMountOption(String);

impl FromStr for MountOption {
    type Err = UnknownMountOption;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let named: Result<Self, value::Error> = Self::deserialize(text.into_deserializer());
        named.map_err(|_| UnknownMountOption(text.to_owned()))
    }
}
