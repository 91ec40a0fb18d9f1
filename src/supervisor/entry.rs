//! What the engine knows about one store.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use tokio::{sync::oneshot, time::Instant};

use super::{
    Error,
    operation::Up,
    plan::{Failure, Phase, Want},
    status::{Problem, State, Status, StatusCell},
};
use crate::{
    overlay::{
        layers::UpperLock,
        mountinfo::MountState,
        probe::Stale,
        refresh::{Changes, Fingerprint, Rung},
    },
    store::{NixDaemon, StoreSpec},
};

/// Where the answer to a command goes.
pub(super) type Reply<T = ()> = oneshot::Sender<Result<T, Error>>;

/// How often a mount that vanishes is made again: this many times in [`REPAIR_WINDOW`].
const REPAIRS: usize = 3;
const REPAIR_WINDOW: Duration = Duration::from_secs(60);

/// Waiting times before a failed operation is tried again.
const RETRY_FIRST: Duration = Duration::from_secs(5);
const RETRY_MOST: Duration = Duration::from_secs(300);

/// Changes of a layer are looked into once they pause this long, and at the latest after [`SETTLE_MOST`]. Nix calls the
/// hook when it has deleted everything, which is most often sooner.
const SETTLE: Duration = Duration::from_millis(300);
const SETTLE_MOST: Duration = Duration::from_secs(3);

/// The problems of which a store that failed has one.
const WHY_FAILED: [Problem; 5] =
    [Problem::StartFailed, Problem::Covered, Problem::Foreign, Problem::MountLost, Problem::NotOurs];

/// What is being done about a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    Start,
    Adopt,
    Stop,
    FinishSwap,
    Release,
    Refresh,
    Serve,
}

/// A refresh that should be made.
#[derive(Debug, Default)]
pub(super) struct Owed {
    pub(super) changes: Changes,
    pub(super) from: Rung,
    since: Option<Instant>,
    pub(super) due: Option<Instant>,
}

impl Owed {
    /// Adds changes that were seen; more of them may follow at once.
    pub(super) fn see(&mut self, changes: Changes, now: Instant) {
        self.changes.merge(changes);
        let since = *self.since.get_or_insert(now);
        self.due = Some((now + SETTLE).min(since + SETTLE_MOST));
    }

    /// Adds what cannot wait.
    pub(super) fn demand(&mut self, changes: Changes, from: Rung, due: Instant) {
        self.changes.merge(changes);
        self.from = self.from.max(from);
        self.since.get_or_insert(due);
        self.due = Some(self.due.map_or(due, |before| before.min(due)));
    }

    pub(super) fn take(&mut self) -> (Changes, Rung) {
        let Self { changes, from, .. } = std::mem::take(self);
        (changes, from)
    }
}

/// What the engine knows about one store.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) spec: Arc<StoreSpec>,
    /// A specification that can be put in force only when the store is down.
    pub(super) next: Option<Arc<StoreSpec>>,
    pub(super) want: Want,
    pub(super) declared: bool,
    pub(super) phase: Phase,
    /// Why the phase is what it is.
    pub(super) reason: String,
    pub(super) mount: MountState,
    pub(super) lock: Option<UpperLock>,
    pub(super) op: Option<Op>,
    /// Whether a failed operation may be tried again now.
    pub(super) retry: bool,
    pub(super) retry_at: Option<Instant>,
    retries: u32,
    repairs: VecDeque<Instant>,
    pub(super) owed: Owed,
    /// What the refresh in flight was given, to be owed again if it fails.
    pub(super) paying: Changes,
    /// The fingerprint on record, if this run of the daemon has put it there.
    pub(super) fingerprint: Option<Fingerprint>,
    /// What was last seen to about its Nix daemon; `None` while nothing was.
    pub(super) served: Option<Option<NixDaemon>>,
    problems: BTreeMap<Problem, String>,
    pub(super) last_refresh_usec: u64,
    pub(super) last_refresh: &'static str,
    pub(super) refresh_count: u64,
    pub(super) swap_count: u64,
    pub(super) owner_uid: u32,
    pub(super) cell: StatusCell,
    pub(super) starting: Vec<Reply>,
    pub(super) stopping: Vec<Reply>,
    /// Those who wait for a refresh that has not begun, and for the one that has.
    pub(super) remounting: Vec<Reply>,
    pub(super) refreshing: Vec<Reply>,
    pub(super) verifying: Vec<Reply<Vec<Stale>>>,
    /// What an operation that ended well has brought; it counts once the mount table agrees.
    pub(super) unconfirmed: Option<Up>,
}

impl Entry {
    pub(super) fn new(spec: StoreSpec, declared: bool) -> Self {
        let spec = Arc::new(spec);
        let want = match (declared, spec.autostart) {
            (false, _) => Want::Gone,
            (true, true) => Want::Up,
            (true, false) => Want::Down,
        };
        Self {
            cell: StatusCell::new(Status::new(Arc::clone(&spec), declared)),
            spec,
            next: None,
            want,
            declared,
            phase: Phase::Inactive,
            reason: String::new(),
            mount: MountState::Absent,
            lock: None,
            op: None,
            retry: true,
            retry_at: None,
            retries: 0,
            repairs: VecDeque::new(),
            owed: Owed::default(),
            paying: Changes::default(),
            fingerprint: None,
            served: None,
            problems: BTreeMap::new(),
            last_refresh_usec: 0,
            last_refresh: "",
            refresh_count: 0,
            swap_count: 0,
            owner_uid: 0,
            starting: Vec::new(),
            stopping: Vec::new(),
            remounting: Vec::new(),
            refreshing: Vec::new(),
            verifying: Vec::new(),
            unconfirmed: None,
        }
    }

    /// Changes what is wanted, which makes every earlier failure worth another try.
    pub(super) fn want(&mut self, want: Want) {
        self.want = want;
        self.clear(&[Problem::Busy]);
        self.try_again();
        self.retries = 0;
        self.repairs.clear();
    }

    /// Lets a failed operation be tried again at once.
    pub(super) fn try_again(&mut self) {
        self.retry = true;
        self.retry_at = None;
    }

    /// Schedules another try of what just failed.
    pub(super) fn retry_later(&mut self, now: Instant) {
        self.retry = false;
        self.retry_at = Some(now + RETRY_FIRST.saturating_mul(1 << self.retries.min(8)).min(RETRY_MOST));
        self.retries += 1;
    }

    /// Notes that it is up.
    pub(super) fn up(&mut self) {
        self.phase = Phase::Active;
        self.reason.clear();
        self.retries = 0;
        self.try_again();
        self.clear(&WHY_FAILED);
        self.clear(&[Problem::Busy, Problem::RefreshFailed, Problem::Stale]);
    }

    /// Notes that it is down.
    pub(super) fn down(&mut self) {
        self.phase = Phase::Inactive;
        self.reason.clear();
        self.lock = None;
        self.owed = Owed::default();
        self.fingerprint = None;
        self.served = None;
        self.problems.clear();
    }

    /// Gives up until something changes.
    pub(super) fn fail(&mut self, problem: Problem, reason: String) {
        let others: Vec<_> = WHY_FAILED.into_iter().filter(|other| *other != problem).collect();
        self.clear(&others);
        self.phase = Phase::Failed { seen: self.mount.clone() };
        self.retry = false;
        self.reason.clone_from(&reason);
        self.problem(problem, reason);
    }

    /// What a failure of the plan means to people.
    pub(super) fn give_up(&mut self, failure: Failure) {
        let at = &self.spec.layers.merged;
        let (problem, reason) = match failure {
            Failure::Lower => {
                let lower = self.spec.lower_name().map(ToString::to_string).unwrap_or_default();
                let reason = format!("its lower store {lower} is not up; see `layered-stores status {lower}`");
                (Problem::StartFailed, reason)
            }
            Failure::Covered(by) => {
                (Problem::Covered, format!("{by} is mounted on top of {at}; unmount it with `umount {at}`"))
            }
            Failure::Foreign(what) => (
                Problem::Foreign,
                format!(
                    "{what} is mounted at {at}, which is not this store; it is left alone: unmount it, or name another root"
                ),
            ),
            Failure::MountLost => (
                Problem::MountLost,
                format!(
                    "its mount was made again {REPAIRS} times within {} s and is gone once more; find out who takes it \
                     away, then run `layered-stores start {}`",
                    REPAIR_WINDOW.as_secs(),
                    self.spec.name
                ),
            ),
            Failure::NotOurs => (
                Problem::NotOurs,
                format!("{at} was not mounted by the daemon and is left mounted; unmount it with `umount {at}`"),
            ),
        };
        if problem == Problem::MountLost {
            self.lock = None;
        }
        self.fail(problem, reason);
    }

    pub(super) fn problem(&mut self, problem: Problem, message: String) {
        if self.problems.get(&problem) != Some(&message) {
            let name = &self.spec.name;
            tracing::warn!(store = %name, problem = problem.code(), "{name}: {message}");
            self.problems.insert(problem, message);
        }
    }

    pub(super) fn clear(&mut self, problems: &[Problem]) {
        for problem in problems {
            self.problems.remove(problem);
        }
    }

    /// Notes what the mount table says about a mount that is in use.
    pub(super) fn look_at_mount(&mut self) {
        let MountState::Mounted { read_only, unpinned, .. } = self.mount.clone() else { return };
        if read_only {
            let message =
                "the kernel refuses writes to it; look for errors of the upper layer's filesystem, or remount it rw";
            self.problem(Problem::ReadOnly, message.to_owned());
        } else {
            self.clear(&[Problem::ReadOnly]);
        }
        match unpinned {
            Some(option) => {
                let message =
                    format!("it is mounted with {option}, which makes changes of its layers dangerous; restart it");
                self.problem(Problem::MountOptions, message);
            }
            None => self.clear(&[Problem::MountOptions]),
        }
    }

    /// Whether its Nix daemon, or that it has none, is still to be seen to.
    pub(super) fn is_to_be_served(&self) -> bool {
        self.phase == Phase::Active
            && self.next.is_none()
            && self.retry
            && self.served.as_ref() != Some(&self.spec.daemon)
    }

    /// Whether it is on its way up, or about to be.
    pub(super) fn is_coming_up(&self) -> bool {
        self.want == Want::Up && !matches!(self.phase, Phase::Failed { .. })
    }

    /// The answer to those who want something of a store that is not up.
    pub(super) fn not_active(&self) -> Error {
        let name = self.spec.name.clone();
        match self.phase {
            Phase::Failed { .. } => Error::NotActive(name, self.reason.clone()),
            _ if self.want == Want::Up => {
                Error::NotActive(name, "it is on its way up; try again in a moment".to_owned())
            }
            _ => {
                let way_out = format!("start it with `layered-stores start {name}`");
                Error::NotActive(name, way_out)
            }
        }
    }

    /// Whether a mount that vanished may be made again.
    pub(super) fn may_repair(&mut self, now: Instant) -> bool {
        self.repairs.retain(|&at| now < at + REPAIR_WINDOW);
        self.repairs.len() < REPAIRS
    }

    pub(super) fn repaired(&mut self, now: Instant) {
        self.repairs.push_back(now);
    }

    /// Whether it is where it should be, or was given up on.
    pub(super) fn is_settled(&self) -> bool {
        let at_goal = match self.want {
            Want::Up => self.next.is_none() && self.phase != Phase::Inactive && !self.is_to_be_served(),
            Want::Down => self.next.is_none() && self.phase != Phase::Active,
            // Left mounted because it is not ours to unmount.
            Want::Gone => matches!(self.phase, Phase::Failed { .. }),
        };
        matches!(self.op, None | Some(Op::Refresh)) && (at_goal || self.retry_at.is_some())
    }

    /// Publishes the status; returns the one before if it was different.
    pub(super) fn publish(&self) -> Option<Status> {
        let state = match (self.op, &self.phase) {
            (Some(Op::Start | Op::Adopt), _) => State::Activating,
            (Some(Op::Stop | Op::Release), _) => State::Deactivating,
            (_, Phase::Active) => State::Active,
            (_, Phase::Failed { .. }) => State::Failed,
            (_, Phase::Inactive) if self.want == Want::Up => State::Activating,
            (_, Phase::Inactive) => State::Inactive,
        };
        let waits = || match (self.spec.lower_name(), self.op) {
            (Some(lower), None) => format!("waits for its lower store {lower}"),
            _ => String::new(),
        };
        self.cell.replace(Status {
            spec: Arc::clone(&self.spec),
            state,
            state_reason: match state {
                State::Failed => self.reason.clone(),
                State::Activating => waits(),
                _ => String::new(),
            },
            problems: self.problems.iter().map(|(problem, message)| (*problem, message.clone())).collect(),
            declared: self.declared,
            last_refresh_usec: self.last_refresh_usec,
            last_refresh: self.last_refresh,
            refresh_count: self.refresh_count,
            swap_count: self.swap_count,
            owner_uid: self.owner_uid,
        })
    }

    /// Answers everybody who waits with an error.
    pub(super) fn answer_all(&mut self, error: &Error) {
        let waiting = [&mut self.starting, &mut self.stopping, &mut self.remounting, &mut self.refreshing];
        answer(waiting.into_iter().flat_map(std::mem::take), &Err(error.clone()));
        answer(std::mem::take(&mut self.verifying), &Err(error.clone()));
    }
}

/// Sends the same answer to all; whoever went away in the meantime misses it.
pub(super) fn answer<T: Clone>(waiting: impl IntoIterator<Item = Reply<T>>, result: &Result<T, Error>) {
    for reply in waiting {
        let _ = reply.send(result.clone());
    }
}
