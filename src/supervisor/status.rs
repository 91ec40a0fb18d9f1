//! What is published about a store.

use std::{
    fmt,
    sync::{Arc, PoisonError, RwLock},
};

use layered_stores_model::{StoreName, StoreSpec};
use serde::Serialize;

use super::leases::Report;

/// Where a store is in its life; the words are systemd's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(serde::Deserialize))]
#[serde(rename_all = "kebab-case")]
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
    /// All there are.
    pub(crate) const ALL: [Self; 5] =
        [Self::Inactive, Self::Activating, Self::Active, Self::Deactivating, Self::Failed];
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// Something that is wrong with a store, whatever its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[cfg_attr(test, derive(serde::Deserialize))]
#[serde(rename_all = "kebab-case")]
pub enum Problem {
    /// The merged view is not what the layers say, and a swap did not help.
    Stale,
    /// A filesystem it lies on does not answer.
    Stuck,
    /// Its mount is in use and cannot be taken down.
    Busy,
    /// It is up as it was declared before, because it would not come up as it is declared now.
    NotApplied,
    /// Something is mounted on top of it.
    Covered,
    /// Something that is not this store is mounted in its place.
    Foreign,
    /// It is mounted, but by somebody else: it is left alone when it is stopped.
    NotOurs,
    /// Its mount was taken away again and again behind the daemon's back.
    MountLost,
    /// Its upper layer or state dir was there before, and is not there now or another one.
    UpperMissing,
    /// It could not be brought up.
    StartFailed,
    /// Its Nix daemon cannot be connected to.
    DaemonFailed,
    /// Its directories belong to somebody else than the configuration says, or others can change what root's Nix follows.
    OtherOwner,
    /// A refresh could not be carried out.
    RefreshFailed,
    /// Changes of its layers go unseen.
    Unwatched,
    /// Something that the next daemon needs cannot be written.
    Unrecorded,
    /// It is mounted with an option that makes changes of a layer dangerous.
    MountOptions,
    /// The kernel refuses writes to it, or to the filesystem of its upper layer.
    ReadOnly,
    /// There is no room on the filesystem of its upper layer.
    Full,
    /// Its database, or where the objects lie that are in it, cannot be read.
    DatabaseUnreadable,
    /// Paths are valid in it whose files are neither in its upper layer nor in the lower store.
    PathsLost,
    /// What it uses of the lower store cannot be kept from the garbage collector there.
    Unleased,
}

impl Problem {
    /// All there are.
    pub(crate) const ALL: [Self; 21] = [
        Self::Stale,
        Self::Stuck,
        Self::Busy,
        Self::NotApplied,
        Self::Covered,
        Self::Foreign,
        Self::NotOurs,
        Self::MountLost,
        Self::UpperMissing,
        Self::StartFailed,
        Self::DaemonFailed,
        Self::OtherOwner,
        Self::RefreshFailed,
        Self::Unwatched,
        Self::Unrecorded,
        Self::MountOptions,
        Self::ReadOnly,
        Self::Full,
        Self::DatabaseUnreadable,
        Self::PathsLost,
        Self::Unleased,
    ];
}

/// Its code on the bus.
impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
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
    /// Since when it is in that state, in microseconds of real time; 0: nobody has looked yet.
    pub state_change_usec: u64,
    /// When something that failed is tried again, in microseconds of real time; 0: nothing is.
    pub next_try_usec: u64,
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
    /// What was found by looking into it.
    pub found: Option<Arc<Report>>,
}

impl Status {
    /// A store nobody has looked at yet.
    pub fn new(spec: Arc<StoreSpec>, declared: bool) -> Self {
        Self {
            spec,
            state: State::Inactive,
            state_reason: String::new(),
            state_change_usec: 0,
            next_try_usec: 0,
            problems: Vec::new(),
            declared,
            last_refresh_usec: 0,
            last_refresh: "",
            refresh_count: 0,
            swap_count: 0,
            owner_uid: 0,
            found: None,
        }
    }

    /// Whether all that is other here than in `last` is other in `first` too: who tells in what these two differ tells of this
    /// one as well.
    pub(crate) fn is_between(&self, first: &Self, last: &Self) -> bool {
        fn is<T: PartialEq>(here: &T, first: &T, last: &T) -> bool {
            here == last || first != last
        }
        // Named one by one, so that a field that comes is not forgotten.
        let Self {
            spec,
            state,
            state_reason,
            state_change_usec,
            next_try_usec,
            problems,
            declared,
            last_refresh_usec,
            last_refresh,
            refresh_count,
            swap_count,
            owner_uid,
            found,
        } = self;
        // Several properties are parts of a specification.
        Arc::ptr_eq(spec, &last.spec)
            && is(state, &first.state, &last.state)
            && is(state_reason, &first.state_reason, &last.state_reason)
            && is(state_change_usec, &first.state_change_usec, &last.state_change_usec)
            && is(next_try_usec, &first.next_try_usec, &last.next_try_usec)
            && is(problems, &first.problems, &last.problems)
            && is(declared, &first.declared, &last.declared)
            && is(last_refresh_usec, &first.last_refresh_usec, &last.last_refresh_usec)
            && is(last_refresh, &first.last_refresh, &last.last_refresh)
            && is(refresh_count, &first.refresh_count, &last.refresh_count)
            && is(swap_count, &first.swap_count, &last.swap_count)
            && is(owner_uid, &first.owner_uid, &last.owner_uid)
            && is(found, &first.found, &last.found)
    }

    /// Whether a user owns the store, or may turn out to when it is up.
    pub fn may_be_owner(&self, uid: u32) -> bool {
        self.owner_uid == uid || self.state == State::Activating
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
    /// A status of its own.
    pub(crate) fn new(status: Status) -> Self {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_changed_back_is_between_nothing() {
        let first = Status::new(Arc::new(layered_stores_model::fixture::spec("a", "/lower")), true);
        let active = Status { state: State::Active, state_change_usec: 2, ..first.clone() };
        let on_the_way = Status { state: State::Activating, state_change_usec: 1, ..first.clone() };
        assert!(on_the_way.is_between(&first, &active) && first.is_between(&first, &active));
        let wrong = Status { problems: vec![(Problem::Full, "full".to_owned())], ..on_the_way.clone() };
        assert!(!wrong.is_between(&first, &active), "it was told that it is full");
        assert!(!on_the_way.is_between(&first, &first));
        let spec = Arc::new(layered_stores_model::fixture::spec("a", "/other"));
        assert!(!Status { spec, ..on_the_way }.is_between(&first, &active));
    }

    #[test]
    fn none_is_missing_from_what_says_that_it_is_all() {
        fn expected<T: serde::de::DeserializeOwned>() -> String {
            serde_json::from_str::<T>("\"\"").err().map(|error| error.to_string()).unwrap_or_default()
        }
        let named = |expected: &str| expected.matches('`').count() / 2 - 1;
        let (states, problems) = (expected::<State>(), expected::<Problem>());
        assert_eq!((named(&states), named(&problems)), (State::ALL.len(), Problem::ALL.len()));
        assert!(State::ALL.iter().all(|state| states.contains(&format!("`{state}`"))), "{states}");
        assert!(Problem::ALL.iter().all(|problem| problems.contains(&format!("`{problem}`"))), "{problems}");
    }

    #[test]
    fn names_are_those_of_the_bus() {
        assert_eq!(State::Deactivating.to_string(), "deactivating");
        assert_eq!(format!("{:<9}|", State::Active), "active   |", "they stand in columns");
        for (problem, code) in [
            (Problem::Full, "full"),
            (Problem::NotOurs, "not-ours"),
            (Problem::MountOptions, "mount-options"),
            (Problem::ReadOnly, "read-only"),
        ] {
            assert_eq!(problem.to_string(), code);
        }
    }
}
