//! Refreshing stores: when, how far, and who is told.

use std::{sync::Arc, time::Duration};

use layered_stores_model::StoreName;
use layered_stores_overlay::refresh::{Changes, Outcome, RefreshError, Report, Rung};
use tokio::time::Instant;

use super::Engine;
use crate::supervisor::{
    Error,
    entry::{Entry, LEFT, Op, Reply, SWAPS_APART, answer},
    looks::Look,
    machine::{Refreshed, Refreshing, SwappedOut},
    operation::OperationError,
    plan::{
        Phase,
        refresh::{Asking, Swaps, Turn, Verdict, how_far, verdict},
    },
    status::Problem,
};

/// How many stale paths a message names.
const NAMED_STALE: usize = 3;

/// How many refreshes that nobody has asked for are made at a time, so that those that somebody waits for find a thread. One
/// that takes longer than [`UNASKED_MOST`] does not count: it hangs, and others do not wait for it.
const UNASKED: usize = 4;
const UNASKED_MOST: Duration = Duration::from_secs(1);

/// When a refresh of a store is to begin that no event begins.
pub(super) fn refresh_at(entry: &Entry, unasked_from: Instant) -> Option<Instant> {
    if entry.op.is_some() || entry.passed_over || entry.phase != Phase::Active {
        return None;
    }
    [entry.refreshes.owed.due().map(|at| at.max(unasked_from)), entry.refreshes.asked_at].into_iter().flatten().min()
}

impl Engine {
    /// Begins the refreshes whose time has come, the oldest first.
    pub(super) fn refresh_due(&mut self, now: Instant) {
        let free = self.unasked_from(now);
        let is_due = |entry: &&Entry| refresh_at(entry, free).is_some_and(|at| at <= now);
        let due = self.entries.values().filter(is_due);
        let mut due: Vec<_> = due.map(|entry| (entry.refreshes.owed.due(), entry.spec.name.clone())).collect();
        due.sort_unstable();
        // One change of a lower store concerns all stores on it, and each that ends would have all the others asked.
        let mut places = UNASKED.saturating_sub(self.unasked(now).count());
        for (_, name) in due {
            let is_waited_for = self.entries.get(&name).is_some_and(|entry| !entry.waiting.remounting.is_empty());
            if places > 0 || is_waited_for {
                self.refresh(&name);
                let has_begun = self.entries.get(&name).is_some_and(|entry| entry.refreshes.unasked.is_some());
                places = places.saturating_sub(has_begun.into());
            }
        }
    }

    /// When the refreshes that nobody has asked for and that are being made count no more.
    fn unasked(&self, now: Instant) -> impl Iterator<Item = Instant> {
        let in_flight = self.entries.values().filter_map(|entry| entry.refreshes.unasked);
        in_flight.map(|since| since + UNASKED_MOST).filter(move |&end| end > now)
    }

    /// When there may be another refresh that nobody has asked for.
    pub(super) fn unasked_from(&self, now: Instant) -> Instant {
        let ends: Vec<_> = self.unasked(now).collect();
        if ends.len() < UNASKED { now } else { ends.into_iter().min().unwrap_or(now) }
    }

    /// Serves those who have asked while something else was being done.
    pub(super) fn refresh_if_asked(&mut self, name: &StoreName) {
        if self.entries.get(name).is_some_and(|entry| !entry.waiting.remounting.is_empty()) {
            self.refresh(name);
        }
    }

    /// Begins the refresh that is due or asked for, if nothing else is being done or to be done about the store.
    pub(super) fn refresh(&mut self, name: &StoreName) {
        // What was changed before the command came is in the queue by now, and counts.
        self.drain_watches_of(name);
        let now = Instant::now();
        let has_room = self.unasked_from(now) <= now;
        let Some(entry) = self.entries.get_mut(name) else { return };
        if entry.op.is_some() || entry.passed_over || entry.phase != Phase::Active {
            return;
        }
        let (turn, asked_at) = Asking {
            is_waited_for: !entry.waiting.remounting.is_empty(),
            root_asks: entry.waiting.root_asks,
            next: entry.refreshes.asked.next(now),
            has_room,
        }
        .turn();
        entry.refreshes.asked_at = asked_at;
        if turn == Turn::Nobody {
            return;
        }
        let asked = turn == Turn::Asked;
        let Some(mut aim) = entry.refreshes.owed.take(now, asked) else { return };
        if !asked && entry.waiting.queueing.is_empty() {
            entry.refreshes.owed.leave_lost(&mut aim);
        }
        entry.refreshes.unasked = (!asked).then_some(now);
        entry.refreshes.aim = Some(aim.clone());
        let mounted = entry.mounted;
        if aim.glance.is_some() {
            self.begin(name, Op::Refresh, |machine, spec| machine.glance(spec, aim, mounted), Self::has_glanced);
            return;
        }
        let swaps = || Swaps { next: entry.refreshes.swaps.next(now), are_held: self.machine.left(name) >= LEFT };
        let to = how_far(aim.from, asked && entry.waiting.root_asks, swaps);
        if asked {
            entry.refreshes.asked.count(now);
            entry.waiting.root_asks = false;
            entry.waiting.refreshing.append(&mut entry.waiting.remounting);
        }
        if to == Rung::Swap {
            entry.waiting.refreshing.append(&mut entry.waiting.queueing);
        }
        aim.whole &= !entry.refreshes.owed.has_left_lost();
        let kept = entry.refreshes.fingerprint;
        let above = self.active_above(name);
        let refreshing = Refreshing { aim, to, kept, mount: mounted, above };
        self.begin(name, Op::Refresh, |machine, spec| machine.refresh(spec, refreshing), Self::has_refreshed);
    }

    fn has_refreshed(&mut self, name: &StoreName, (result, old): Refreshed) {
        match result {
            Ok(report) => self.is_refreshed(name, report),
            Err(error) => self.is_not_refreshed(name, &error),
        }
        if let Some(old) = old {
            self.is_swapped_out(name, old);
        }
        // Root's Nix takes a store over while it adds to it, which is what has led here.
        if let Some(entry) = self.entries.get_mut(name) {
            entry.looks.soon(Look::Owner, Instant::now());
        }
    }

    fn is_refreshed(&mut self, name: &StoreName, mut report: Report) {
        self.drain_watches_of(name);
        let now = Instant::now();
        let (can_swap, are_held) = (self.machine.can_swap(), || self.machine.left(name) >= LEFT);
        let Some(entry) = self.entries.get_mut(name) else { return };
        let unasked = entry.refreshes.unasked.take();
        entry.mounted = report.mount;
        let Some(mut aim) = entry.refreshes.aim.take() else { return };
        let has_swapped = report.outcome == Outcome::Swapped;
        let owed = &mut entry.refreshes.owed;
        if let Some(since) = unasked.filter(|_| aim.changes.unknown) {
            owed.looked_at_all(since, now);
        }
        if has_swapped {
            owed.is_fresh();
        } else if !report.lost && can_swap {
            owed.leave_lost(&mut aim);
        }
        let is_all_right = aim.whole && report.is_right() && !owed.has_left_lost();
        let on_record = report.on_record(is_all_right);
        // What has changed again since then is the next one's. A fresh view is wrong of nothing else.
        let is_fresh = has_swapped && owed.has_seen_anything();
        report.still_stale.retain(|stale| !is_fresh && !owed.has_seen(&stale.name));
        let is_right = report.is_right();
        let may_swap_help = !has_swapped && can_swap;
        // Whoever waits is answered before anything is logged or published: it is Nix that waits.
        let waiting = std::mem::take(&mut entry.waiting.refreshing);
        entry.refreshes.fingerprint = on_record.or(entry.refreshes.fingerprint);
        entry.clear(&[Problem::RefreshFailed]);
        match verdict(is_right, may_swap_help, !is_right && are_held()) {
            Verdict::Right => {
                answer(waiting, &Ok(()));
                entry.refreshes.owed.is_right();
                if is_all_right {
                    entry.whereabouts.lower_is_right();
                }
                if aim.whole {
                    entry.clear(&[Problem::Stale]);
                }
            }
            Verdict::Stale => stays_stale(entry, waiting, &report, now),
            Verdict::Held => is_held_open(entry, waiting, &report, now),
            Verdict::Queue => waits_for_a_swap(entry, waiting, &report, now),
        }
        let (how, above) = match report.outcome {
            Outcome::Current => return,
            Outcome::Reconfigured => ("reconfigured", Rung::Reconfigure),
            Outcome::Swapped => ("swapped", Rung::Swap),
        };
        entry.refreshes.done(name, how, report.probed, now);
        self.refresh_above(name, &aim.changes, above);
    }

    /// Has a mount that was swapped out retired. Nobody waits for this, so that it may take as long as it needs.
    fn is_swapped_out(&mut self, name: &StoreName, old: Arc<dyn SwappedOut>) {
        let Some(entry) = self.entries.get_mut(name) else { return };
        entry.refreshes.swap_count += 1;
        entry.refreshes.swaps.count(Instant::now());
        self.retirements.add(name.clone(), old, Arc::clone(&entry.spec));
    }

    fn has_glanced(&mut self, name: &StoreName, result: Result<bool, OperationError>) {
        let now = Instant::now();
        let Some(entry) = self.entries.get_mut(name) else { return };
        entry.refreshes.unasked = None;
        let Some(aim) = entry.refreshes.aim.take() else { return };
        if let Some(due) = aim.glance {
            entry.refreshes.owed.glanced(due, now);
        }
        // What fails is said by the second look.
        if matches!(result, Ok(true)) {
            entry.refreshes.done(name, "reconfigured", aim.changes.names.len(), now);
            self.refresh_above(name, &aim.changes, Rung::Reconfigure);
        }
    }

    /// What lies on top of a store has looked at the old view, and after a swap refers to the old superblock.
    fn refresh_above(&mut self, name: &StoreName, changes: &Changes, from: Rung) {
        let now = Instant::now();
        for entry in self.lying_on(name) {
            entry.refreshes.owed.demand(changes.clone(), from, now);
        }
    }

    fn is_not_refreshed(&mut self, name: &StoreName, error: &OperationError) {
        let now = Instant::now();
        let Some(entry) = self.entries.get_mut(name) else { return };
        entry.refreshes.unasked = None;
        // It may be another one by now.
        entry.mounted = None;
        let Some(aim) = entry.refreshes.aim.take() else { return };
        // A swap that failed has made a superblock as well.
        if matches!(error, OperationError::Refresh(RefreshError::Swap(_))) {
            entry.refreshes.swaps.count(now);
        }
        let message = match entry.whereabouts.lower_cover() {
            Some(cover) => format!("{error}; {cover}"),
            None => error.to_string(),
        };
        entry.refreshes.owed.put_off(aim.changes, now);
        entry.problem(Problem::RefreshFailed, message.clone());
        let failed = Err(Error::RefreshFailed(name.clone(), message));
        answer(std::mem::take(&mut entry.waiting.refreshing), &failed);
    }
}

/// What is to be looked at again.
fn still_stale(report: &Report) -> Changes {
    let names = report.still_stale.iter().map(|stale| stale.name.clone()).collect();
    Changes { names, unknown: report.lost, taken: report.lost }
}

/// All was done that can be.
fn stays_stale(entry: &mut Entry, waiting: Vec<Reply>, report: &Report, now: Instant) {
    let named: Vec<_> = report.still_stale.iter().take(NAMED_STALE).map(ToString::to_string).collect();
    let after = if report.outcome == Outcome::Swapped {
        "even after a swap"
    } else {
        "used by a process until whose end, before Linux 6.5, nothing cures them"
    };
    let message = format!("{} of its paths, {after}: {}", report.still_stale.len(), named.join("; "));
    answer(waiting, &Err(Error::Stale(entry.spec.name.clone(), message.clone())));
    let pause = entry.refreshes.owed.put_off(still_stale(report), now).as_secs();
    entry.problem(Problem::Stale, format!("{message}; it is tried again after {pause} s"));
}

/// Only a swap would help, and processes hold too many superblocks already.
fn is_held_open(entry: &mut Entry, waiting: Vec<Reply>, report: &Report, now: Instant) {
    let waiting = waiting.into_iter().chain(std::mem::take(&mut entry.waiting.queueing));
    answer(waiting, &Err(Error::Held(entry.spec.name.clone(), LEFT)));
    let pause = entry.refreshes.owed.put_off(still_stale(report), now).as_secs();
    let message = format!(
        "some of its paths; only a swap helps, and {LEFT} superblocks that swaps have left are held open by processes: end \
         those that have files of it open for long; it is tried again after {pause} s"
    );
    entry.problem(Problem::Stale, message);
}

/// Only a swap helps, for which it is not the turn. Nobody is refused for this: the wait is shorter than the hook's patience, and
/// one swap is for all who wait.
fn waits_for_a_swap(entry: &mut Entry, mut waiting: Vec<Reply>, report: &Report, now: Instant) {
    entry.waiting.queueing.append(&mut waiting);
    let turn = entry.refreshes.swaps.next(now).unwrap_or(now);
    entry.refreshes.owed.demand(still_stale(report), Rung::Reconfigure, turn);
    let apart = SWAPS_APART.as_secs();
    // Without the names: they may be others each time, and each time would be a line of the journal.
    let message = format!("some of its paths; only a swap helps, and after many the next comes within {apart} s");
    entry.problem(Problem::Stale, message);
}
