//! Looking at the mount table, planning, and beginning what is planned.

use std::sync::{Arc, PoisonError};

use layered_stores_model::StoreName;
use layered_stores_overlay::mountinfo::MountState;
use tokio::time::Instant;

use super::{Engine, done::Release, remove::Removing};
use crate::supervisor::{
    Error,
    entry::{Entry, Op, answer},
    machine::Machine,
    plan::{Carries, Lower, Phase, Step, View, Want, plan},
    status::Problem,
};

/// Whether somebody else has a directory of a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Occupied {
    No,
    /// It will be free.
    ForNow,
    /// By what stays: who that is.
    By(String),
}

impl Engine {
    /// Looks at the mount table, plans for every store that nothing is being done about, and begins what is planned.
    pub(super) fn reconcile(&mut self) {
        let now = Instant::now();
        // Interest follows the entries; with none there is nothing to read.
        let registry = Arc::clone(&self.registry);
        let registry = registry.read().unwrap_or_else(PoisonError::into_inner);
        let is_of_interest = |point: &str| registry.on_the_way.contains(point);
        match self.machine.mounts(&is_of_interest) {
            Ok(table) => {
                let changed = std::mem::take(&mut self.mounts_changed);
                for entry in self.entries.values_mut() {
                    entry.look_at(&table);
                    entry.look_at_mount();
                    if changed {
                        entry.look_at_lower(&table, now);
                        entry.look_at_own(&table);
                    }
                }
                self.hide_above();
            }
            Err(error) => tracing::error!("the mount table cannot be read: {error}"),
        }
        drop(registry);
        self.confirm(now);
        self.consider(now);
        for name in self.entries.keys().cloned().collect::<Vec<_>>() {
            // Planning for one store can take several steps, and none of them more than once.
            for _ in 0..4 {
                if !self.step(&name, now) {
                    break;
                }
            }
        }
        for (name, entry) in &mut self.entries {
            let asked = entry.asked();
            if entry.keeps_asked(asked) {
                self.machine.keep_asked(name, asked);
            }
        }
        self.tell_up();
        self.publish_all();
        self.check_settled();
    }

    /// Lets what operations have brought count, now that the mount table was read.
    pub(super) fn confirm(&mut self, now: Instant) {
        let confirmable = |entry: &&mut Entry| entry.unconfirmed.is_some();
        let mut confirmed = Vec::new();
        for entry in self.entries.values_mut().filter(confirmable) {
            let adopted = entry.op.take() == Some(Op::Adopt);
            let Some(up) = entry.unconfirmed.take().map(|up| *up) else { continue };
            let shown = match &entry.mount {
                MountState::Mounted { .. } => {
                    confirmed.push((entry.spec.name.clone(), up, adopted));
                    continue;
                }
                MountState::Absent => "nothing there".to_owned(),
                MountState::Covered(cover) => format!("that {cover}"),
                MountState::Foreign { what } => what.clone(),
            };
            let reason = format!("it was mounted, but the mount table shows {shown}");
            entry.fail(Problem::StartFailed, reason);
            entry.retries.later(now);
        }
        for (name, up, adopted) in confirmed {
            self.is_up(&name, up, adopted);
            self.refresh_if_asked(&name);
        }
    }

    /// Carries out the next step for a store. Whether there may be another one.
    pub(super) fn step(&mut self, name: &StoreName, now: Instant) -> bool {
        let Some(entry) = self.entries.get_mut(name) else { return false };
        // A refresh may be in flight while the mount is lost; what comes of it does not matter then.
        entry.passed_over = entry.op.is_some();
        if entry.passed_over {
            return false;
        }
        let Some(entry) = self.entries.get(name) else { return false };
        let occupied = if entry.phase == Phase::Active { Occupied::No } else { self.occupied(entry) };
        let lower = if occupied == Occupied::ForNow { Lower::Pending } else { self.lower_state(&entry.spec) };
        let goes_down = entry.want != Want::Up || entry.respecifies();
        let carries = if goes_down { self.carries(name) } else { Carries::Nothing };
        let Some(entry) = self.entries.get_mut(name) else { return false };
        let ours = !(goes_down || lower == Lower::Leaving) || self.machine.is_ours(&entry.spec.mount_unit);
        if !ours {
            entry.take_next_in_place();
        }
        let view = View {
            want: entry.want,
            lower,
            respecify: entry.respecifies(),
            carries,
            ours,
            repair: entry.retries.may_repair(now),
            retry: entry.retries.is_allowed(),
            serve: entry.is_to_be_served(),
            phase: &entry.phase,
            mount: &entry.mount,
        };
        let step = plan(&view);
        if step != Step::Rest {
            tracing::debug!(store = %name, "{name}: planned: {step:?}");
        }
        match step {
            Step::Rest => {
                self.rested(name);
                false
            }
            Step::Settle => {
                entry.down();
                true
            }
            Step::Fail(failure) => {
                entry.give_up(failure);
                true
            }
            Step::Start { .. } if !self.recalling.is_empty() => {
                self.wait_for_records(name);
                true
            }
            Step::Start { repair } => {
                if let Occupied::By(why) = occupied {
                    entry.fail(Problem::StartFailed, why);
                    entry.retries.later(now);
                    return true;
                }
                if repair {
                    tracing::warn!(store = %name, "{name}: its mount is gone and is made again");
                    entry.retries.repaired(now);
                }
                let lock = entry.lock.take();
                self.begin_up(name, Op::Start, |machine, spec| machine.start(spec, lock));
                false
            }
            Step::Adopt => {
                let locked = entry.lock.is_some();
                let differ = matches!(entry.mount, MountState::Mounted { flags: Some(_), .. });
                self.begin_up(name, Op::Adopt, |machine, spec| machine.adopt(spec, locked, differ));
                false
            }
            Step::Serve => {
                let service = entry.spec.service();
                let below = self.below(name);
                self.begin(
                    name,
                    Op::Serve,
                    |machine, spec| machine.serve(spec, below),
                    |engine, name, result| engine.is_served(name, service, result),
                );
                false
            }
            Step::Refuse => {
                let above: Vec<_> = self.on_top_of(name).map(|entry| entry.spec.name.to_string()).collect();
                self.is_busy(name, &format!("it is the lower store of {}, which stays mounted", above.join(" and ")));
                true
            }
            Step::Stop => {
                self.begin(name, Op::Stop, Machine::stop, Self::is_stopped);
                false
            }
            Step::FinishSwap => {
                self.begin(name, Op::FinishSwap, Machine::finish_swap, Self::is_swap_finished);
                false
            }
            Step::Respecify => {
                self.release(name, Release::Respecify);
                false
            }
            Step::Forget => {
                self.release(name, Release::Forget);
                false
            }
        }
    }

    pub(super) fn release(&mut self, name: &StoreName, why: Release) {
        let Some(entry) = self.entries.get_mut(name) else { return };
        entry.unlock();
        let forget = why == Release::Forget;
        self.begin(
            name,
            Op::Release,
            |machine, spec| machine.release(spec, forget),
            move |engine, name, result| engine.is_released(name, result, why),
        );
    }

    /// Whether another store still has one of a store's directories, because one of the two was given other ones, or one of them
    /// is being removed.
    pub(super) fn occupied(&self, entry: &Entry) -> Occupied {
        let is_its_own = |(name, removing): &(&StoreName, &Removing)| entry.spec.is_of(name, &removing.directory);
        if let Some((_, removing)) = self.removing.iter().find(is_its_own) {
            return match &removing.stuck {
                Some(why) => Occupied::By(format!("{} is being removed, and {why}", removing.directory)),
                None => Occupied::ForNow,
            };
        }
        let leaves = |other: &Entry| other.is_to_go() || other.candidate.is_some();
        let has_one = |other: &&Entry| {
            other.spec.name != entry.spec.name && leaves(other) && other.spec.shares_directories_with(&entry.spec)
        };
        match self.entries.values().find(has_one) {
            None => Occupied::No,
            Some(other) if other.is_in_the_way() => Occupied::By(format!(
                "the store {0} has one of its directories and cannot go; see `layered-stores status {0}`",
                other.spec.name
            )),
            Some(other) if other.is_to_go() || other.is_considered() => Occupied::ForNow,
            Some(Entry { spec, .. }) => Occupied::By(format!(
                "the store {0} has one of its directories and goes on as it was; see `layered-stores status {0}`",
                spec.name
            )),
        }
    }

    /// Answers those who wait for a store to come to rest.
    pub(super) fn rested(&mut self, name: &StoreName) {
        let Some(entry) = self.entries.get_mut(name) else { return };
        match &entry.phase {
            Phase::Active => {
                // It may be about to change.
                if !entry.is_considered() {
                    let not_applied = entry.message(Problem::NotApplied).map(str::to_owned);
                    let answered = not_applied.map_or(Ok(()), |why| Err(Error::StartFailed(name.clone(), why)));
                    answer(std::mem::take(&mut entry.waiting.starting), &answered);
                }
                self.refresh_if_asked(name);
            }
            Phase::Failed { .. } => {
                let reason = entry.reason.clone();
                let not_active = Err(entry.not_active());
                answer(entry.waiting.all_remounting(), &not_active);
                // It may be about to be tried otherwise.
                if !entry.is_considered() {
                    let failed = Err(Error::StartFailed(name.clone(), reason.clone()));
                    answer(std::mem::take(&mut entry.waiting.starting), &failed);
                }
                let asked = std::mem::take(&mut entry.waiting.stopping);
                if !asked.is_empty() && entry.want == Want::Down {
                    self.stays_up(name);
                    self.look_at.get_or_insert(Instant::now());
                }
                answer(asked, &Err(Error::Busy(name.clone(), reason)));
            }
            Phase::Inactive if entry.want != Want::Up => {
                let not_active = Err(entry.not_active());
                answer(entry.waiting.all_remounting(), &not_active);
                answer(std::mem::take(&mut entry.waiting.stopping), &Ok(()));
            }
            Phase::Inactive => {}
        }
    }
}
