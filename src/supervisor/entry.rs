//! What the engine knows about one store.

mod candidate;
mod looks;
mod problems;
mod refreshes;
mod retries;
mod serving;
#[cfg(test)]
mod tests;
mod waiting;

use std::{
    collections::BTreeMap,
    sync::{Arc, Weak},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

pub(super) use candidate::Candidate;
use candidate::Looking;
use layered_stores_model::{StoreSpec, printable};
use layered_stores_overlay::{mountinfo::MountState, place::MountId, progress::Spot};
pub(super) use refreshes::{LEFT, Refreshes, SWAPS_APART};
pub(super) use retries::Retries;
pub(super) use serving::Serving;
use tokio::time::Instant;
pub(super) use waiting::{Reply, Waiting, answer};

use self::retries::{REPAIR_WINDOW, REPAIRS};
use super::{
    Error,
    leases::Report,
    looks::Looks,
    machine::{Follow, Guard},
    operation::Up,
    plan::{Failure, Phase, Want, stack::Doing},
    status::{Problem, State, Status, StatusCell},
    threads::DEADLINE,
    whereabouts::Whereabouts,
};

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
    /// It was up with its specification since it was last to be down.
    was_up: bool,
    /// What is declared, if it is another specification and not known yet whether the store can come up with it.
    pub(super) candidate: Option<Candidate>,
    looking: Option<Looking>,
    /// A specification that is put in force as soon as the store is down, for which it goes down.
    pub(super) next: Option<Arc<StoreSpec>>,
    pub(super) want: Want,
    pub(super) declared: bool,
    /// Whether it is to be up because somebody has asked for that, as the next daemon is told.
    kept_asked: Option<bool>,
    pub(super) phase: Phase,
    /// Why the phase is what it is.
    pub(super) reason: String,
    pub(super) mount: MountState,
    pub(super) lock: Option<Guard>,
    /// The mount that was made, taken over, or swapped in.
    pub(super) mounted: Option<MountId>,
    pub(super) op: Option<Op>,
    /// It was time to plan for it, and something was being done about it: that comes before the next refresh, or those who
    /// ask for refreshes without a pause would keep everything else from it.
    pub(super) passed_over: bool,
    /// It was where it should be, or was given up on, since the start or the last reload. What is done about it later does
    /// not make anybody wait.
    pub(super) reached: bool,
    pub(super) retries: Retries,
    pub(super) refreshes: Refreshes,
    pub(super) serving: Serving,
    pub(super) waiting: Waiting,
    problems: BTreeMap<Problem, String>,
    pub(super) owner_uid: u32,
    pub(super) cell: StatusCell,
    /// How far what is being done about it has come.
    errands: Vec<Weak<dyn Follow>>,
    /// Why it counts as stuck, while it does.
    pub(super) stuck: Option<String>,
    pub(super) whereabouts: Whereabouts,
    pub(super) looks: Looks,
    /// What was found by looking into it, and how often that was to be begun anew.
    pub(super) found: Option<Arc<Report>>,
    pub(super) round: u64,
    /// Whether its mount is read-only, and what keeps its upper layer from taking writes.
    read_only: bool,
    pub(super) room: Option<(Problem, String)>,
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
            was_up: false,
            candidate: None,
            looking: None,
            next: None,
            want,
            declared,
            kept_asked: None,
            phase: Phase::Inactive,
            reason: String::new(),
            mount: MountState::Absent,
            lock: None,
            mounted: None,
            op: None,
            passed_over: false,
            reached: false,
            retries: Retries::default(),
            refreshes: Refreshes::default(),
            serving: Serving::default(),
            waiting: Waiting::default(),
            problems: BTreeMap::new(),
            owner_uid: 0,
            errands: Vec::new(),
            stuck: None,
            whereabouts: Whereabouts::default(),
            read_only: false,
            room: None,
            looks: Looks::default(),
            found: None,
            round: 0,
            hold_at: None,
            own_seen: None,
            unconfirmed: None,
        }
    }

    /// Follows something that is done about it.
    pub(super) fn follow(&mut self, progress: &Arc<dyn Follow>) {
        self.errands.push(Arc::downgrade(progress));
    }

    /// Follows no more what has come to its end. Nothing of a store at rest has to be looked at.
    pub(super) fn forget_ended(&mut self) {
        self.errands.retain(|progress| progress.strong_count() > 0);
    }

    /// What has not answered for the longest time, and since when.
    pub(super) fn waits_for(&self) -> Option<(Spot, Instant)> {
        self.errands.iter().filter_map(|progress| progress.upgrade()?.waits_for()).min_by_key(|(_, since)| *since)
    }

    /// When it is to be looked whether it is stuck, or still is.
    pub(super) fn stuck_due(&self) -> Option<Instant> {
        let (_, since) = self.waits_for()?;
        Some(since + DEADLINE).filter(|_| self.stuck.is_none())
    }

    /// Changes what is wanted, which makes every earlier failure worth another try. Whoever waits for something else is sent
    /// away: that will not come.
    pub(super) fn want(&mut self, want: Want) {
        let name = &self.spec.name;
        match want {
            Want::Up => {
                let error = Error::Busy(name.clone(), "it was started again meanwhile".to_owned());
                answer(std::mem::take(&mut self.waiting.stopping), &Err(error));
            }
            Want::Down | Want::Gone => {
                let error = Error::StartFailed(name.clone(), "it was stopped meanwhile".to_owned());
                answer(std::mem::take(&mut self.waiting.starting), &Err(error));
            }
        }
        self.want = want;
        self.clear(&[Problem::Busy]);
        self.try_again();
        self.retries.forget_failures();
        self.retries.forget_repairs();
    }

    /// Whether it is to be kept for the next daemon that somebody has asked for it to be up, or down; `None`: it is as declared.
    pub(super) fn asked(&self) -> Option<bool> {
        match (self.want, self.declared_spec().autostart) {
            (Want::Up, false) => Some(true),
            (Want::Down, true) => Some(false),
            _ => None,
        }
    }

    /// Notes what is kept of that. Whether it was something else.
    pub(super) fn keeps_asked(&mut self, asked: Option<bool>) -> bool {
        std::mem::replace(&mut self.kept_asked, asked) != asked
    }

    /// Has it be as somebody has asked an earlier daemon.
    pub(super) fn was_asked(&mut self, up: bool) {
        self.kept_asked = Some(up);
        let want = if up { Want::Up } else { Want::Down };
        if self.declared && self.want != want {
            self.want(want);
        }
    }

    /// Lets what has failed be tried again at once.
    pub(super) fn try_again(&mut self) {
        self.retries.at_once();
        self.serving.at_once();
        if let Some(candidate) = &mut self.candidate {
            candidate.retries.at_once();
        }
    }

    /// Notes that it is up.
    pub(super) fn up(&mut self) {
        self.phase = Phase::Active;
        self.was_up = true;
        self.reason.clear();
        self.retries.forget_failures();
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
        self.was_up &= self.want == Want::Up;
        self.reason.clear();
        self.unlock();
        self.mounted = None;
        self.refreshes.forget();
        self.serving.forget();
        self.whereabouts = Whereabouts::default();
        self.room = None;
        self.looks = Looks::default();
        self.hold_at = None;
        self.problems.clear();
    }

    /// Gives up until something changes.
    pub(super) fn fail(&mut self, problem: Problem, reason: String) {
        let others: Vec<_> = WHY_FAILED.into_iter().filter(|other| *other != problem).collect();
        self.clear(&others);
        self.phase = Phase::Failed { seen: self.mount.clone() };
        self.retries.give_up();
        self.reason = printable(&reason);
        self.problem(problem, reason);
    }

    /// Has it tried again, whatever it was given up on for.
    pub(super) fn forget_failure(&mut self) {
        if self.op.is_none() && matches!(self.phase, Phase::Failed { .. }) {
            self.phase = Phase::Inactive;
        }
    }

    /// Notes that what is mounted now has been tried in vain as well, if it was given up on.
    pub(super) fn fail_at_what_is_seen(&mut self) {
        if let Phase::Failed { seen } = &mut self.phase {
            seen.clone_from(&self.mount);
        }
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
            Failure::LowerElsewhere => {
                let lower = self.spec.lower_name().map(ToString::to_string).unwrap_or_default();
                let reason = format!(
                    "its lower store {lower} is not where it is declared to be; see `layered-stores status {lower}`"
                );
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
        self.problems.insert(problem, message);
    }

    pub(super) fn has(&self, problem: Problem) -> bool {
        self.problems.contains_key(&problem)
    }

    /// What is said of a problem, if it is there.
    pub(super) fn message(&self, problem: Problem) -> Option<&str> {
        self.problems.get(&problem).map(String::as_str)
    }

    pub(super) fn clear(&mut self, problems: &[Problem]) {
        for problem in problems {
            self.problems.remove(problem);
        }
    }

    /// Whether its Nix daemon, or that it has none, is still to be seen to.
    pub(super) fn is_to_be_served(&self) -> bool {
        self.phase == Phase::Active && self.serving.due().is_none() && !self.serving.is(self.spec.service().as_ref())
    }

    /// Whether it was given up on, and what it was given up on for is still there.
    pub(super) fn is_given_up(&self) -> bool {
        let is_failed = matches!(&self.phase, Phase::Failed { seen } if *seen == self.mount);
        is_failed && !self.retries.is_allowed()
    }

    pub(super) fn is_mounted(&self) -> bool {
        matches!(self.mount, MountState::Mounted { .. })
    }

    /// What is being done about it, as far as that matters to its neighbours.
    pub(super) fn doing(&self) -> Doing {
        match self.op {
            None => Doing::Nothing,
            Some(Op::Stop | Op::Release) => Doing::TakingDown,
            Some(_) => Doing::SomethingElse,
        }
    }

    /// Whether it is to go down, or to be made anew, and cannot for now.
    pub(super) fn cannot_go(&self) -> bool {
        self.op.is_none() && (self.retries.due().is_some() || self.is_given_up())
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
        self.waiting.belongs_to(&self.spec.name, owner_uid);
    }

    /// Whether it is where it should be, or was given up on.
    pub(super) fn is_settled(&self) -> bool {
        // Nobody knows how long it will be, and it is as little worth waiting for as one that failed.
        if self.stuck.is_some() {
            return true;
        }
        // That takes no longer than looks do.
        if self.is_considered() {
            return false;
        }
        let at_goal = match self.want {
            // What could be done about it at once was planned before this is asked.
            _ if matches!(self.phase, Phase::Failed { .. }) => true,
            Want::Up => self.next.is_none() && self.phase != Phase::Inactive && !self.is_to_be_served(),
            Want::Down => self.next.is_none() && self.phase != Phase::Active,
            Want::Gone => false,
        };
        matches!(self.op, None | Some(Op::Refresh | Op::Remove | Op::Hold)) && (at_goal || self.retries.due().is_some())
    }

    /// When what has failed is tried again, in microseconds of real time; 0: it is not.
    fn next_try_usec(&self) -> u64 {
        let candidate = self.candidate.as_ref().map_or(0, |candidate| candidate.retries.due_usec());
        let times = [self.retries.due_usec(), candidate];
        times.into_iter().filter(|usec| *usec > 0).min().unwrap_or_default()
    }

    /// Publishes the status, and tells the journal what is new of its problems; returns the one before if it was different.
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
        let old = self.cell.replace(Status {
            spec: Arc::clone(&self.spec),
            state,
            state_change_usec: if state == before && since > 0 { since } else { realtime_usec(Duration::ZERO) },
            next_try_usec: self.next_try_usec(),
            state_reason: match state {
                _ if self.op == Some(Op::Remove) && self.stuck.is_none() => "what is in it is being removed".to_owned(),
                State::Failed => self.reason.clone(),
                State::Activating => self.stuck.clone().unwrap_or_else(waits),
                _ => String::new(),
            },
            problems: self.problems.iter().map(|(problem, message)| (*problem, message.clone())).collect(),
            declared: self.declared,
            last_refresh_usec: self.refreshes.last_usec,
            last_refresh: self.refreshes.last,
            refresh_count: self.refreshes.count,
            swap_count: self.refreshes.swap_count,
            owner_uid: self.owner_uid,
            found: self.found.clone(),
        });
        if let Some(old) = &old {
            problems::tell(&self.spec.name, &old.problems, &self.problems);
        }
        old
    }
}

fn realtime_usec(ahead: Duration) -> u64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from((since_epoch + ahead).as_micros()).unwrap_or(u64::MAX)
}
