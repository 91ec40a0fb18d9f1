//! What the daemon and the index say to each other: JSON, one message a line.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::ObjectName;

/// The longest line, in bytes. Names are cut into messages that stay below it.
pub const LONGEST_LINE: usize = 1 << 20;

/// How many names are in one message at most.
pub const NAMES: usize = 2048;

/// How many of the paths that are lost are named.
pub const EXAMPLES: usize = 5;

/// By what a store is known on one connection.
pub type StoreId = u64;

/// What is to be watched of one store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Places {
    /// The directory of its database, the `db` of its state directory.
    pub db: PathBuf,
    /// Where its objects lie; without, every valid path counts as one that is used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub objects: Option<Objects>,
}

/// Where the objects of a store lie.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Objects {
    /// Its upper layer.
    pub upper: PathBuf,
    /// The directories of objects underneath, the uppermost first: several where the lower store is a layered one. What is merged
    /// is never touched, or it could not be unmounted meanwhile.
    pub lowers: Vec<PathBuf>,
}

impl Objects {
    /// All of its directories, the uppermost first.
    pub(super) fn dirs(&self) -> impl Iterator<Item = &PathBuf> {
        std::iter::once(&self.upper).chain(&self.lowers)
    }
}

/// What the daemon says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// Watch a store, and tell all of it.
    Watch {
        /// How the daemon calls it. A number that is known is begun anew.
        id: StoreId,
        /// Where it is.
        places: Places,
    },
    /// Watch it no more.
    Forget {
        /// The store.
        id: StoreId,
    },
    /// Read the database now, and tell when all is told that was in it when this was asked.
    Sync {
        /// The store.
        id: StoreId,
        /// Comes back with the answer.
        token: u64,
    },
}

/// What the index says. A store's first [`State`](Answer::State) ends the telling of all of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// Lower paths that a store refers to now and did not before, and the other way round.
    Used {
        /// The store.
        id: StoreId,
        /// What is new.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        added: Vec<ObjectName>,
        /// What is over.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        removed: Vec<ObjectName>,
    },
    /// How a store is, after all that was told before.
    State {
        /// The store.
        id: StoreId,
        /// The requests to read it that are answered by this.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        synced: Vec<u64>,
        /// What is in it; the last that is known if the database cannot be read.
        contents: Contents,
        /// Why the database cannot be read.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        failure: Option<Failure>,
        /// Whether there is no database, which is no failure of a store that was never used.
        #[serde(default)]
        absent: bool,
    },
}

/// What is in a store, by its database and its directories.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Contents {
    /// Valid paths whose files are in the upper layer.
    pub upper_paths: u64,
    /// Their size as NARs, in bytes.
    pub upper_size: u64,
    /// Those of them whose files are in the lower store as well.
    pub shadowed_paths: u64,
    /// Their size as NARs, in bytes.
    pub shadowed_size: u64,
    /// Valid paths whose files are in the lower store only.
    pub lower_paths: u64,
    /// Valid paths whose files are nowhere.
    pub lost_paths: u64,
    /// Some of these.
    pub lost: Vec<Lost>,
}

/// A path that is valid, and whose files are nowhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lost {
    /// It.
    pub name: ObjectName,
    /// Some of the paths that refer to it.
    pub referrers: Vec<ObjectName>,
}

/// Why a database cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Failure {
    /// What is said to people.
    pub message: String,
}
