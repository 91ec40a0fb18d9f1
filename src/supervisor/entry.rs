//! What the engine knows about one store.

use std::{
    collections::{BTreeMap, VecDeque},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::{Arc, Weak},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use layered_stores_model::{Service, StoreSpec, printable};
use layered_stores_overlay::{
    lock::UpperLock,
    mountinfo::{MountState, MountTable},
    place::MountId,
    probe::Stale,
    progress::{Progress, Spot},
    refresh::{Changes, Fingerprint, Rung},
};
use tokio::{sync::oneshot, time::Instant};

use super::{
    Error,
    askers::Askers,
    limit::Limit,
    operation::Up,
    owed::{Aim, Owed},
    plan::{Failure, Phase, Want},
    room::Rooms,
    status::{Problem, State, Status, StatusCell},
    threads::{DEADLINE, Errand},
    whereabouts::Whereabouts,
};

/// Where the answer to a command goes.
pub(super) type Reply<T = ()> = oneshot::Sender<Result<T, Error>>;

/// How often a mount that vanishes is made again: this many times in [`REPAIR_WINDOW`].
const REPAIRS: usize = 3;
const REPAIR_WINDOW: Duration = Duration::from_secs(60);

/// Waiting times before a failed operation is tried again.
const RETRY_FIRST: Duration = Duration::from_secs(5);
const RETRY_MOST: Duration = Duration::from_secs(300);

/// A Nix daemon that was connected to for so long has nothing to do with an earlier failure.
const SERVED_WELL: Duration = Duration::from_secs(600);

/// How often a store is swapped, when it is not root who asks for it. Each swap makes a superblock, and who holds a file open
/// keeps it.
const SWAPS: Limit = Limit::new(8, SWAPS_APART);
pub(super) const SWAPS_APART: Duration = Duration::from_secs(10);

/// How many superblocks swaps may have left behind that somebody holds, until it is root who asks for another one. An honest
/// store has one for each collection of garbage since its longest build began, if that.
pub(super) const LEFT: usize = 32;

/// How often a store is refreshed for those who ask for it without a pause. They are all answered by one refresh.
const REFRESHES: Limit = Limit::new(1000, Duration::from_millis(5));

/// How many lines of the journal refreshes get; others are counted, and the next line has their number.
const LINES: Limit = Limit::new(10, Duration::from_secs(10));

/// The problems of which a store that failed has one.
const WHY_FAILED: [Problem; 6] = [
    Problem::StartFailed,
    Problem::UpperMissing,
    Problem::Covered,
    Problem::Foreign,
    Problem::MountLost,
    Problem::NotOurs,
];

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
    Remove,
    Hold,
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
    /// The mount that was made, taken over, or swapped in.
    pub(super) mounted: Option<MountId>,
    pub(super) op: Option<Op>,
    /// It was time to plan for it, and something was being done about it: that comes before the next refresh, or those who
    /// ask for refreshes without a pause would keep everything else from it.
    pub(super) passed_over: bool,
    /// It was where it should be, or was given up on, since the start or the last reload. What is done about it later does
    /// not make anybody wait.
    pub(super) reached: bool,
    /// Whether a failed operation may be tried again now.
    pub(super) retry: bool,
    pub(super) retry_at: Option<Instant>,
    /// The same for people.
    next_try_usec: u64,
    retries: u32,
    repairs: VecDeque<Instant>,
    pub(super) owed: Owed,
    /// What the refresh in flight is to do.
    pub(super) paying: Option<Aim>,
    /// When the refresh in flight began, if nobody has asked for it.
    pub(super) unasked: Option<Instant>,
    pub(super) swaps: Limit,
    pub(super) refreshes: Limit,
    /// When those who ask are served again, if they ask too often.
    pub(super) refresh_at: Option<Instant>,
    pub(super) lines: Limit,
    /// The refreshes that no line of the journal has told of.
    pub(super) untold: u64,
    /// The fingerprint on record, if this run of the daemon has put it there.
    pub(super) fingerprint: Option<Fingerprint>,
    /// What was last seen to about its Nix daemon; `None` while nothing was.
    pub(super) served: Option<Option<Service>>,
    pub(super) served_at: Option<Instant>,
    /// When its Nix daemon is seen to again, after a failure, and how many failures there were.
    pub(super) serve_at: Option<Instant>,
    serve_failures: u32,
    problems: BTreeMap<Problem, String>,
    pub(super) last_refresh_usec: u64,
    pub(super) last_refresh: &'static str,
    pub(super) refresh_count: u64,
    pub(super) swap_count: u64,
    pub(super) owner_uid: u32,
    pub(super) cell: StatusCell,
    pub(super) starting: Vec<Reply>,
    pub(super) stopping: Vec<Reply>,
    /// Those who wait until what is in it is removed.
    pub(super) removing: Vec<Reply>,
    /// Those who wait for a refresh that has not begun, and for the one that has.
    pub(super) remounting: Vec<Reply>,
    pub(super) refreshing: Vec<Reply>,
    /// Root is among them.
    pub(super) root_asks: bool,
    /// Those who ask before it is known whose store it is.
    pub(super) unproven: Vec<(u32, Reply)>,
    /// Those who wait until there may be another swap.
    pub(super) queueing: Vec<Reply>,
    /// Those who wait for a look at all paths.
    pub(super) verifying: Askers<Vec<Stale>>,
    /// How far what is being done about it has come.
    errands: Vec<Weak<Progress>>,
    /// Why it counts as stuck, while it does.
    pub(super) stuck: Option<String>,
    pub(super) whereabouts: Whereabouts,
    /// Whether its mount is read-only, and whether its upper layer takes writes.
    read_only: bool,
    pub(super) rooms: Rooms,
    /// When what could not be had for it is tried for again: its lock, its record, its watches.
    pub(super) hold_at: Option<Instant>,
    /// Where its upper layer and its state dir were last seen to lie, as a hash: it matters only whether that changes.
    own_seen: Option<u64>,
    /// What an operation that ended well has brought; it counts once the mount table agrees.
    pub(super) unconfirmed: Option<Box<Up>>,
}

impl Entry {
    pub(super) fn new(spec: Arc<StoreSpec>, declared: bool) -> Self {
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
            mounted: None,
            op: None,
            passed_over: false,
            reached: false,
            retry: true,
            retry_at: None,
            next_try_usec: 0,
            retries: 0,
            repairs: VecDeque::new(),
            owed: Owed::default(),
            paying: None,
            unasked: None,
            swaps: SWAPS,
            refreshes: REFRESHES,
            refresh_at: None,
            lines: LINES,
            untold: 0,
            fingerprint: None,
            served: None,
            served_at: None,
            serve_at: None,
            serve_failures: 0,
            problems: BTreeMap::new(),
            last_refresh_usec: 0,
            last_refresh: "",
            refresh_count: 0,
            swap_count: 0,
            owner_uid: 0,
            starting: Vec::new(),
            stopping: Vec::new(),
            removing: Vec::new(),
            remounting: Vec::new(),
            refreshing: Vec::new(),
            root_asks: false,
            unproven: Vec::new(),
            queueing: Vec::new(),
            verifying: Askers::default(),
            errands: Vec::new(),
            stuck: None,
            whereabouts: Whereabouts::default(),
            read_only: false,
            rooms: Rooms::default(),
            hold_at: None,
            own_seen: None,
            unconfirmed: None,
        }
    }

    /// Follows something that is done about it.
    pub(super) fn follow(&mut self, errand: &Errand) {
        self.errands.push(Arc::downgrade(&errand.progress));
    }

    /// Follows no more what has come to its end. Nothing of a store at rest has to be looked at.
    pub(super) fn forget_ended(&mut self) {
        self.errands.retain(|progress| progress.strong_count() > 0);
    }

    /// What has not answered for the longest time, and since when.
    pub(super) fn waits_for(&self) -> Option<(Spot, std::time::Instant)> {
        self.errands.iter().filter_map(|progress| progress.upgrade()?.spot()).min_by_key(|(_, since)| *since)
    }

    /// When it is to be looked whether it is stuck, or still is.
    pub(super) fn stuck_due(&self) -> Option<Instant> {
        let (_, since) = self.waits_for()?;
        Some((since + DEADLINE).into()).filter(|_| self.stuck.is_none())
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
        self.serve_at = None;
        self.next_try_usec = 0;
    }

    /// Schedules another try of what just failed.
    pub(super) fn retry_later(&mut self, now: Instant) {
        self.retry = false;
        let pause = retry_after(self.retries);
        self.retry_at = Some(now + pause);
        self.next_try_usec = realtime_usec(pause);
        self.retries += 1;
    }

    /// Has its Nix daemon seen to again.
    pub(super) fn serve_later(&mut self, now: Instant) {
        if self.served_at.take().is_some_and(|at| now >= at + SERVED_WELL) {
            self.serve_failures = 0;
        }
        self.serve_at = Some(now + retry_after(self.serve_failures));
        self.serve_failures += 1;
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

    /// Gives the upper layer back. Closing a file may have to ask the filesystem.
    pub(super) fn unlock(&mut self) {
        if let Some(lock) = self.lock.take() {
            tokio::task::spawn_blocking(move || drop(lock));
        }
    }

    /// Notes that it is down.
    pub(super) fn down(&mut self) {
        self.phase = Phase::Inactive;
        self.reason.clear();
        self.unlock();
        self.mounted = None;
        self.owed = Owed::default();
        self.fingerprint = None;
        self.served = None;
        self.whereabouts = Whereabouts::default();
        self.rooms = Rooms::default();
        self.hold_at = None;
        self.problems.clear();
    }

    /// Gives up until something changes.
    pub(super) fn fail(&mut self, problem: Problem, reason: String) {
        let others: Vec<_> = WHY_FAILED.into_iter().filter(|other| *other != problem).collect();
        self.clear(&others);
        self.phase = Phase::Failed { seen: self.mount.clone() };
        self.retry = false;
        self.reason = printable(&reason);
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
            Failure::Covered(cover) => (Problem::Covered, cover.to_string()),
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
            self.unlock();
        }
        self.fail(problem, reason);
    }

    pub(super) fn problem(&mut self, problem: Problem, message: String) {
        // What others have named, such as mounts and processes, is in it.
        let message = printable(&message);
        if self.problems.get(&problem) != Some(&message) {
            let name = &self.spec.name;
            tracing::warn!(store = %name, problem = problem.code(), "{name}: {message}");
            self.problems.insert(problem, message);
        }
    }

    /// Notes a refresh that did something, and tells the journal of it.
    pub(super) fn refreshed(&mut self, refresh: &'static str, probed: usize, now: Instant) {
        self.refresh_count += 1;
        self.last_refresh = refresh;
        self.last_refresh_usec = realtime_usec(Duration::ZERO);
        if self.untold > 0 || self.lines.next(now).is_some() {
            self.untold += 1;
            return;
        }
        self.lines.count(now);
        let name = &self.spec.name;
        tracing::info!(store = %name, refresh, probed, "{name}: {refresh} (paths probed: {probed})");
    }

    /// When the journal is to be told of the refreshes that had no line of their own.
    pub(super) fn tell_at(&self, now: Instant) -> Option<Instant> {
        (self.untold > 0).then(|| self.lines.next(now).unwrap_or(now))
    }

    /// Tells the journal of those, if it is time.
    pub(super) fn tell_rest(&mut self, now: Instant) {
        if self.tell_at(now).is_some_and(|at| at <= now) {
            self.lines.count(now);
            let (name, refreshes, swaps) = (&self.spec.name, std::mem::take(&mut self.untold), self.swap_count);
            tracing::info!(store = %name, refreshes, swaps, "{name}: refreshed {refreshes} times more ({swaps} swaps so far)");
        }
    }

    pub(super) fn has(&self, problem: Problem) -> bool {
        self.problems.contains_key(&problem)
    }

    pub(super) fn clear(&mut self, problems: &[Problem]) {
        for problem in problems {
            self.problems.remove(problem);
        }
    }

    /// Notes what the mount table says: what is mounted, and whether whoever comes by path finds it and what it is made of.
    pub(super) fn look_at(&mut self, table: &MountTable) {
        let layers = &self.spec.layers;
        self.mount = table.state(layers);
        if !matches!(self.mount, MountState::Mounted { .. }) {
            return;
        }
        if self.unconfirmed.is_some() {
            self.whereabouts.note(layers, table, self.op == Some(Op::Start));
        }
        if let Some(cover) = self.whereabouts.cover(layers, table) {
            self.mount = MountState::Covered(cover);
        }
    }

    /// Notes what the mount table says about a mount that is in use.
    pub(super) fn look_at_mount(&mut self) {
        let MountState::Mounted { read_only, unpinned, flags, .. } = self.mount.clone() else { return };
        self.read_only = read_only;
        self.look_at_room();
        match (unpinned, flags) {
            (Some(option), _) => {
                let message = format!(
                    "it is mounted with {option}, which makes changes of its layers dangerous; run `layered-stores stop {0}` \
                     and `start {0}`",
                    self.spec.name
                );
                self.problem(Problem::MountOptions, message);
            }
            (None, Some(differ)) => {
                let at = &self.spec.layers.merged;
                let message = format!(
                    "it is mounted {differ}, other than declared; unmount it with `umount {at}`, and it is mounted anew"
                );
                self.problem(Problem::MountOptions, message);
            }
            (None, None) => self.clear(&[Problem::MountOptions]),
        }
    }

    /// Notes whether it takes writes: its mount, and the filesystem of its upper layer.
    pub(super) fn look_at_room(&mut self) {
        let mut wrong = self.rooms.wrong.clone();
        if self.read_only {
            let message =
                "the kernel refuses writes to it; look for errors of the upper layer's filesystem, or remount it rw";
            wrong = Some((Problem::ReadOnly, message.to_owned()));
        }
        for problem in [Problem::ReadOnly, Problem::Full] {
            match &wrong {
                Some((is, message)) if *is == problem => self.problem(problem, message.clone()),
                _ => self.clear(&[problem]),
            }
        }
    }

    /// Notes which mount its lower store lies on. When that is another, what it shows of the lower store is looked at anew:
    /// a filesystem whose server has ended comes back as another mount, of which no watch tells.
    pub(super) fn look_at_lower(&mut self, table: &MountTable, now: Instant) {
        // A layered store underneath tells by itself when it is swapped.
        if self.spec.lower_name().is_some() {
            return;
        }
        let is_other = self.whereabouts.lower_is_other(&self.spec.layers, table);
        if is_other && self.phase == Phase::Active {
            self.owed.demand(Changes::unknown(), Rung::Probe, now);
        } else if is_other && self.retry_at.is_some() {
            self.try_again();
        }
    }

    /// Notes where its upper layer and its state dir lie. When that is elsewhere, what has failed is tried again: the
    /// filesystem that was missing may be there.
    pub(super) fn look_at_own(&mut self, table: &MountTable) {
        let seen = [&self.spec.layers.upper, &self.spec.state_dir].map(|dir| table.location(dir.as_str()));
        let mut hasher = DefaultHasher::new();
        seen.hash(&mut hasher);
        let before = self.own_seen.replace(hasher.finish());
        let is_other = before.is_some() && before != self.own_seen;
        if is_other && self.retry_at.is_some() && matches!(self.phase, Phase::Failed { .. }) {
            self.try_again();
        }
    }

    /// Whether its Nix daemon, or that it has none, is still to be seen to.
    pub(super) fn is_to_be_served(&self) -> bool {
        self.phase == Phase::Active
            && self.next.is_none()
            && self.serve_at.is_none()
            && self.served != Some(self.spec.service())
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

    /// Notes whose store it is, which decides about those who have asked for a refresh before it was up.
    pub(super) fn belongs_to(&mut self, owner_uid: u32) {
        self.owner_uid = owner_uid;
        for (uid, reply) in std::mem::take(&mut self.unproven) {
            if uid == owner_uid {
                self.remounting.push(reply);
            } else {
                let _ = reply.send(Err(Error::NotOwner(self.spec.name.clone())));
            }
        }
    }

    /// Those who wait for a refresh that has not begun.
    pub(super) fn all_remounting(&mut self) -> Vec<Reply> {
        self.root_asks = false;
        let mut all = std::mem::take(&mut self.remounting);
        all.append(&mut self.queueing);
        all.extend(self.unproven.drain(..).map(|(_, reply)| reply));
        all
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
        // Nobody knows how long it will be, and it is as little worth waiting for as one that failed.
        if self.stuck.is_some() {
            return true;
        }
        let at_goal = match self.want {
            Want::Up => self.next.is_none() && self.phase != Phase::Inactive && !self.is_to_be_served(),
            Want::Down => self.next.is_none() && self.phase != Phase::Active,
            // Left mounted because it is not ours to unmount.
            Want::Gone => matches!(self.phase, Phase::Failed { .. }),
        };
        matches!(self.op, None | Some(Op::Refresh | Op::Remove | Op::Hold)) && (at_goal || self.retry_at.is_some())
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
        let (before, since) = self.cell.read(|status| (status.state, status.state_change_usec));
        self.cell.replace(Status {
            spec: Arc::clone(&self.spec),
            state,
            state_change_usec: if state == before && since > 0 { since } else { realtime_usec(Duration::ZERO) },
            next_try_usec: self.next_try_usec,
            state_reason: match state {
                _ if self.op == Some(Op::Remove) && self.stuck.is_none() => "what is in it is being removed".to_owned(),
                State::Failed => self.reason.clone(),
                State::Activating => self.stuck.clone().unwrap_or_else(waits),
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
        let waiting = [&mut self.starting, &mut self.stopping, &mut self.removing, &mut self.refreshing];
        answer(waiting.into_iter().flat_map(std::mem::take), &Err(error.clone()));
        answer(self.verifying.all(), &Err(error.clone()));
        answer(self.all_remounting(), &Err(error.clone()));
    }
}

fn realtime_usec(ahead: Duration) -> u64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from((since_epoch + ahead).as_micros()).unwrap_or(u64::MAX)
}

/// How long something that has failed before is left alone.
fn retry_after(failures: u32) -> Duration {
    RETRY_FIRST.saturating_mul(1 << failures.min(8)).min(RETRY_MOST)
}

/// Sends the same answer to all; whoever went away in the meantime misses it.
pub(super) fn answer<T: Clone>(waiting: impl IntoIterator<Item = Reply<T>>, result: &Result<T, Error>) {
    for reply in waiting {
        let _ = reply.send(result.clone());
    }
}
