//! What is to be done to a store, and what is said of it: between the command and the process that does it, which may be that of
//! another user.

use serde::{Deserialize, Serialize};

/// What is to be done.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Task {
    pub(super) what: What,
    pub(super) dry_run: bool,
    /// The URL by which Nix opens the store.
    pub(super) uri: String,
    pub(super) state_dir: String,
    pub(super) upper_layer: String,
    pub(super) lower_store_dir: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum What {
    Collect {
        /// How many bytes are to be free in the end; nothing else is deleted then.
        until_free: Option<u64>,
        /// How old generations of profiles may be, in days.
        older_than: Option<u32>,
    },
    Optimise,
}

/// What the process says, one a line.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Event {
    /// How far it is.
    Progress { done: u64, total: u64 },
    /// What Nix, or the remount hook, has to say to the person.
    Said(String),
    /// It is over. Nothing comes after it.
    Over(Report),
}

/// What has come of it.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Report {
    /// Names of what has gone from the upper layer, or would go, and what each took on disk.
    pub(super) paths: Vec<(String, u64)>,
    /// What that frees altogether.
    pub(super) freed: u64,
    /// What is free on the filesystem of the upper layer.
    pub(super) free: u64,
    /// The generations of profiles that have gone, or would go.
    pub(super) generations: Vec<String>,
    /// What could not be done.
    pub(super) error: Option<String>,
    /// A Nix that may have deleted something has not got to its end, where it has the store refreshed.
    pub(super) owes_refresh: bool,
}
