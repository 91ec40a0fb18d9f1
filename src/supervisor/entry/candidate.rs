//! A specification that is declared and not in force: the store would have to go down for it.

use std::sync::Arc;

use layered_stores_model::StoreSpec;
use layered_stores_overlay::{mountinfo::MountState, progress::Spot};
use tokio::time::Instant;

use super::{Entry, Retries};
use crate::supervisor::{
    machine::Follow,
    plan::{
        Want,
        change::{Found, Stay},
    },
    status::Problem,
    threads::DEADLINE,
};

/// A specification of which it has to be found out whether the store can come up with it.
#[derive(Debug)]
pub(in crate::supervisor) struct Candidate {
    pub(in crate::supervisor) spec: Arc<StoreSpec>,
    pub(in crate::supervisor) found: Found,
    /// Somebody looks, or waits for an earlier look to do so.
    is_looked_at: bool,
    /// When it is looked at again.
    pub(in crate::supervisor) retries: Retries,
    /// Why the store stays as it is.
    stay: Stay,
}

impl Candidate {
    pub(in crate::supervisor) fn new(spec: Arc<StoreSpec>) -> Self {
        Self { spec, found: Found::Nothing, is_looked_at: false, retries: Retries::default(), stay: Stay::ForNow }
    }

    /// Whether somebody should look.
    fn is_due(&self) -> bool {
        !self.is_looked_at && self.found != Found::Fine && self.retries.is_allowed()
    }

    /// Whether it is not known yet if the store stays as it is.
    fn is_open(&self) -> bool {
        self.is_looked_at || self.is_due() || self.stay == Stay::ForNow
    }

    /// Notes what was found.
    fn was_looked_at(&mut self, wrong: Option<String>, now: Instant) {
        self.is_looked_at = false;
        self.found = wrong.map_or(Found::Fine, Found::Wrong);
        if self.found == Found::Fine {
            self.retries.at_once();
        } else {
            self.retries.later(now);
        }
    }
}

/// A look that has not come back. There is one at a time of a specification: what does not answer costs one thread.
#[derive(Debug)]
pub(in crate::supervisor) struct Looking {
    spec: Arc<StoreSpec>,
    since: Instant,
    progress: Arc<dyn Follow>,
}

impl Looking {
    fn silent_at(&self) -> Instant {
        self.since + DEADLINE
    }

    /// What it waits for, as far as that is known.
    fn spot(&self) -> Spot {
        self.progress.waits_for().map_or(Spot::Elsewhere, |(spot, _)| spot)
    }
}

impl Entry {
    /// Has another specification be considered, for which the store has to go down.
    pub(in crate::supervisor) fn propose(&mut self, spec: Arc<StoreSpec>) {
        if self.next.as_ref() != Some(&spec) {
            self.withdraw();
            self.candidate = Some(Candidate::new(spec));
        }
    }

    /// Has it stay as it is.
    pub(in crate::supervisor) fn withdraw(&mut self) {
        self.clear(&[Problem::NotApplied]);
        self.candidate = None;
        if self.next.take().is_some() {
            self.clear(&[Problem::Busy]);
        }
    }

    /// The specification that is declared, whether or not it is in force.
    pub(in crate::supervisor) fn declared_spec(&self) -> &Arc<StoreSpec> {
        let candidate = self.candidate.as_ref().map(|candidate| &candidate.spec);
        candidate.or(self.next.as_ref()).unwrap_or(&self.spec)
    }

    /// Whether it is not known yet if it changes.
    pub(in crate::supervisor) fn is_considered(&self) -> bool {
        self.candidate.as_ref().is_some_and(Candidate::is_open)
    }

    /// The specification that somebody should look at now, if nobody does.
    pub(in crate::supervisor) fn begin_to_look(&mut self, now: Instant) -> Option<Arc<StoreSpec>> {
        let has_something_to_lose = self.has_something_to_lose();
        let candidate = self.candidate.as_mut().filter(|_| has_something_to_lose)?;
        if candidate.retries.due().is_some_and(|at| at <= now) {
            candidate.retries.at_once();
        }
        if !candidate.is_due() {
            return None;
        }
        let other = self.looking.as_ref();
        if other.is_some_and(|other| other.spec.needs_restart_for(&candidate.spec) && other.silent_at() > now) {
            // Of another specification; it comes back, or is waited for no longer.
            return None;
        }
        candidate.is_looked_at = true;
        let is_same = other.is_some_and(|other| !other.spec.needs_restart_for(&candidate.spec));
        (!is_same).then(|| Arc::clone(&candidate.spec))
    }

    /// Follows a look ahead that has begun.
    pub(in crate::supervisor) fn looks_ahead(
        &mut self,
        spec: &Arc<StoreSpec>,
        progress: &Arc<dyn Follow>,
        now: Instant,
    ) {
        self.looking = Some(Looking { spec: Arc::clone(spec), since: now, progress: Arc::clone(progress) });
    }

    /// When a look ahead is waited for no longer, or made again.
    pub(in crate::supervisor) fn candidate_due(&self) -> Option<Instant> {
        let candidate = self.candidate.as_ref()?;
        let waits = candidate.is_looked_at || candidate.is_due();
        let silent_at = self.looking.as_ref().filter(|_| waits && self.has_something_to_lose()).map(Looking::silent_at);
        silent_at.or(candidate.retries.due())
    }

    /// What a look waits for that has got no further for too long.
    pub(in crate::supervisor) fn look_is_silent(&self, now: Instant) -> Option<Spot> {
        let candidate = self.candidate.as_ref()?;
        let looking = self.looking.as_ref()?;
        (candidate.is_looked_at && looking.silent_at() <= now).then(|| looking.spot())
    }

    /// Notes that a look has come back, with what it has found.
    pub(in crate::supervisor) fn look_came_back(&mut self, spec: &Arc<StoreSpec>, wrong: Option<String>, now: Instant) {
        if self.looking.take_if(|looking| Arc::ptr_eq(&looking.spec, spec)).is_none() {
            // Another one was begun since.
            return;
        }
        let Some(candidate) = &mut self.candidate else { return };
        if Arc::ptr_eq(&candidate.spec, spec) {
            candidate.was_looked_at(wrong, now);
        } else {
            candidate.is_looked_at = false;
            candidate.retries.at_once();
        }
    }

    /// Notes that a look does not come back in time.
    pub(in crate::supervisor) fn look_is_given_up(&mut self, why: String, now: Instant) {
        if let Some(candidate) = &mut self.candidate {
            candidate.was_looked_at(Some(why), now);
        }
    }

    /// Has it stay as it is, or lets it change.
    pub(in crate::supervisor) fn decide(&mut self, stay: Option<Stay>) {
        let Some(candidate) = &mut self.candidate else { return };
        let Some(stay) = stay else {
            self.next = self.candidate.take().map(|candidate| candidate.spec);
            self.clear(&[Problem::NotApplied]);
            return self.try_again();
        };
        candidate.stay.clone_from(&stay);
        match stay {
            // What was said of it before holds until something else is known.
            Stay::ForNow => {}
            Stay::Because(why) => {
                let message = format!(
                    "it goes on as it was, because with what is declared now it would not come up: {why}; it is tried again"
                );
                self.problem(Problem::NotApplied, message);
            }
        }
    }

    /// Whether it is to go down for another specification.
    pub(in crate::supervisor) fn respecifies(&self) -> bool {
        self.next.is_some()
    }

    /// Whether that is so, or not known yet.
    pub(in crate::supervisor) fn may_respecify(&self) -> bool {
        self.respecifies() || self.is_considered()
    }

    /// Whether it is up as it was declared before, or would be if nothing was in the way.
    pub(in crate::supervisor) fn has_something_to_lose(&self) -> bool {
        match self.mount {
            MountState::Mounted { .. } | MountState::Covered(_) => true,
            MountState::Absent | MountState::Foreign { .. } => self.was_up && self.want == Want::Up,
        }
    }

    /// Whether it is to go down and could not the last time, or has got stuck.
    pub(in crate::supervisor) fn is_in_the_way(&self) -> bool {
        self.is_to_go() && (self.cannot_go() || self.stuck.is_some() || self.has(Problem::Busy))
    }

    /// Whether it is to go down, for good or for another specification.
    pub(in crate::supervisor) fn is_to_go(&self) -> bool {
        self.want == Want::Gone || self.next.is_some()
    }

    /// Puts the waiting specification in force, with which it was not up yet.
    pub(in crate::supervisor) fn respecify(&mut self) {
        if let Some(next) = self.next.take() {
            self.spec = next;
            self.was_up = false;
        }
    }

    /// Puts the waiting specification in force for a mount that somebody else has made, if it is of the same directories: with
    /// which options that is mounted is theirs to change.
    pub(in crate::supervisor) fn take_next_in_place(&mut self) {
        let is_mounted = self.is_mounted();
        if let Some(next) = self.next.take_if(|next| is_mounted && next.layers.are_at(&self.spec.layers)) {
            self.spec = next;
        }
    }
}
