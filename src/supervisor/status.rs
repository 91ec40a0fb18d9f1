//! What is published about a store.

use std::{
    fmt,
    sync::{Arc, PoisonError, RwLock},
};

use crate::store::{StoreName, StoreSpec};

/// Where a store is in its life; the words are systemd's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum State {
    /// Not mounted, and nothing is wrong.
    #[default]
    Inactive,
    /// On its way up.
    Activating,
    /// Mounted, compared with its specification, and open for use.
    Active,
    /// On its way down.
    Deactivating,
    /// Not usable; the reason says why.
    Failed,
}

impl State {
    /// systemd's word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Inactive => "inactive",
            Self::Activating => "activating",
            Self::Active => "active",
            Self::Deactivating => "deactivating",
            Self::Failed => "failed",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Something that is wrong with a store, whatever its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Problem {
    /// The merged view is not what the layers say, and a swap did not help.
    Stale,
    /// Its mount is in use and cannot be taken down.
    Busy,
    /// Something is mounted on top of it.
    Covered,
    /// Something that is not this store is mounted in its place.
    Foreign,
    /// It is mounted, but by somebody else: it is left alone when it is stopped.
    NotOurs,
    /// Its mount was taken away again and again behind the daemon's back.
    MountLost,
    /// It could not be brought up.
    StartFailed,
    /// Its Nix daemon cannot be connected to.
    DaemonFailed,
    /// A refresh could not be carried out.
    RefreshFailed,
    /// Changes of its layers go unseen.
    Unwatched,
    /// It is mounted with an option that makes changes of a layer dangerous.
    MountOptions,
    /// The kernel refuses writes to it.
    ReadOnly,
}

impl Problem {
    /// The code on the bus.
    pub fn code(self) -> &'static str {
        match self {
            Self::Stale => "stale",
            Self::Busy => "busy",
            Self::Covered => "covered",
            Self::Foreign => "foreign",
            Self::NotOurs => "not-ours",
            Self::MountLost => "mount-lost",
            Self::StartFailed => "start-failed",
            Self::DaemonFailed => "daemon-failed",
            Self::RefreshFailed => "refresh-failed",
            Self::Unwatched => "unwatched",
            Self::MountOptions => "mount-options",
            Self::ReadOnly => "read-only",
        }
    }
}

/// Everything that is published about a store. The fields are the properties of `org.layeredstores1.Store`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// The specification that is in force.
    pub spec: Arc<StoreSpec>,
    /// Where it is in its life.
    pub state: State,
    /// Why it is in that state; empty when there is nothing to say.
    pub state_reason: String,
    /// What is wrong.
    pub problems: Vec<(Problem, String)>,
    /// Whether the configuration declares it.
    pub declared: bool,
    /// When the merged view was last found right after a refresh, in microseconds of real time; 0: never.
    pub last_refresh_usec: u64,
    /// How: `reconfigured` or `swapped`; empty: never.
    pub last_refresh: &'static str,
    /// How many refreshes there were since the daemon started.
    pub refresh_count: u64,
    /// How many of them went as far as a swap.
    pub swap_count: u64,
    /// The user, besides root, who may ask for a refresh.
    pub owner_uid: u32,
}

impl Status {
    /// A store nobody has looked at yet.
    pub fn new(spec: Arc<StoreSpec>, declared: bool) -> Self {
        Self {
            spec,
            state: State::Inactive,
            state_reason: String::new(),
            problems: Vec::new(),
            declared,
            last_refresh_usec: 0,
            last_refresh: "",
            refresh_count: 0,
            swap_count: 0,
            owner_uid: 0,
        }
    }

    /// The store's name.
    pub fn name(&self) -> &StoreName {
        &self.spec.name
    }
}

/// A status that the engine writes and everybody reads.
#[derive(Clone, Debug)]
pub struct StatusCell(Arc<RwLock<Status>>);

impl StatusCell {
    pub(super) fn new(status: Status) -> Self {
        Self(Arc::new(RwLock::new(status)))
    }

    /// The status as it is now.
    pub fn get(&self) -> Status {
        self.read(Status::clone)
    }

    /// Looks at the status without copying it.
    pub fn read<T>(&self, look: impl FnOnce(&Status) -> T) -> T {
        look(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Replaces the status; the old one is returned if it was different.
    pub(super) fn replace(&self, status: Status) -> Option<Status> {
        let mut current = self.0.write().unwrap_or_else(PoisonError::into_inner);
        (*current != status).then(|| std::mem::replace(&mut *current, status))
    }
}
