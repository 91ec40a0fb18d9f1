//! What operations have brought, and what follows from it.

use std::sync::{Arc, PoisonError};

use layered_stores_model::{Service, StoreName, StoreSpec};
use layered_stores_overlay::{
    probe::Stale,
    refresh::{Changes, Report, Rung},
    room::Room,
};
use tokio::time::Instant;

use super::{Engine, room};
use crate::supervisor::{
    Error,
    entry::{Entry, Op, answer},
    handle::Event,
    machine::SwappedOut,
    operation::{Held, OperationError, Up},
    plan::{Phase, Want},
    status::Problem,
};

/// What an operation brought.
pub(super) enum Done {
    Up(Result<Up, OperationError>),
    Stopped(Result<(), OperationError>),
    SwapFinished(Result<Arc<dyn SwappedOut>, OperationError>),
    Released(Result<(), OperationError>, Release),
    Refreshed(Result<Report, OperationError>, Option<Arc<dyn SwappedOut>>),
    Glanced(Result<bool, OperationError>),
    Held(Result<Held, OperationError>),
    OwnerSeen(Option<String>),
    RoomSeen(Result<Room, OperationError>),
    LookedAhead(Arc<StoreSpec>, Result<(), OperationError>),
    Job(u64, Option<Result<Vec<Stale>, OperationError>>),
    Served(Option<Service>, Result<(), OperationError>),
    Removed(Result<(), OperationError>),
    LeftOverRemoved(Result<(), Error>),
}

/// Why something is undone.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Release {
    Forget,
    Respecify,
}

impl Engine {
    /// Takes what an operation brought.
    pub(super) fn done(&mut self, name: &StoreName, done: Done) {
        let now = Instant::now();
        if let Done::LeftOverRemoved(result) = done {
            self.is_left_over_removed(name, &result);
            return;
        }
        if let Done::Job(id, brought) = done {
            self.job_came_back(name, id, brought);
            return;
        }
        if let Done::LookedAhead(spec, found) = done {
            self.has_looked_ahead(name, &spec, found);
            return;
        }
        let Some(entry) = self.entries.get_mut(name) else { return };
        entry.forget_ended();
        if let Done::OwnerSeen(wrong) = done {
            self.has_seen_owner(name, wrong);
            return;
        }
        if let Done::RoomSeen(room) = done {
            self.has_seen_room(name, room);
            return;
        }
        if let Done::Up(Ok(up)) = done {
            entry.unconfirmed = Some(Box::new(up));
            self.look_soon();
            return;
        }
        entry.op = None;
        // A refresh does not change what the mount table says of a store.
        let is_news = !matches!(done, Done::Refreshed(..) | Done::Glanced(_) | Done::Held(_)) || entry.passed_over;
        match done {
            Done::Up(Err(error)) => {
                entry.fail(error.problem(), error.to_string());
                entry.retries.later(now);
                if !entry.is_considered() {
                    let failed = Err(Error::StartFailed(name.clone(), error.to_string()));
                    answer(std::mem::take(&mut entry.waiting.starting), &failed);
                }
            }
            Done::Stopped(Ok(())) => {
                tracing::info!(store = %name, "{name}: stopped");
                entry.down();
            }
            Done::Stopped(Err(error)) => self.is_busy(name, &error.to_string()),
            Done::SwapFinished(Ok(old)) => {
                tracing::info!(store = %name, "{name}: a swap that was interrupted is finished");
                self.retirements.add(name.clone(), old, Arc::clone(&entry.spec));
                entry.refreshes.owed.demand(Changes::unknown(), Rung::Probe, now);
            }
            Done::SwapFinished(Err(error)) => {
                entry.fail(Problem::RefreshFailed, error.to_string());
                entry.retries.later(now);
            }
            Done::Released(result, why) => self.is_released(name, result, why),
            Done::Refreshed(result, old) => {
                match result {
                    Ok(report) => self.is_refreshed(name, report),
                    Err(error) => self.is_not_refreshed(name, &error),
                }
                if let Some(old) = old {
                    self.is_swapped_out(name, old);
                }
                // Root's Nix takes a store over while it adds to it, which is what has led here.
                self.look_at_owner(name);
            }
            Done::Glanced(result) => self.has_glanced(name, &result),
            Done::Held(result) => self.is_held(name, result),
            Done::Served(service, result) => match result {
                Ok(()) => {
                    entry.serving.made(service, now);
                    entry.clear(&[Problem::DaemonFailed]);
                }
                Err(error) => {
                    entry.serving.failed(now);
                    entry.problem(Problem::DaemonFailed, format!("its Nix daemon: {error}; it is tried again"));
                }
            },
            Done::Removed(result) => self.is_removed(name, result),
            // These were taken above.
            Done::Up(Ok(_)) | Done::LeftOverRemoved(_) | Done::Job(..) | Done::LookedAhead(..) => {}
            Done::OwnerSeen(_) | Done::RoomSeen(_) => {}
        }
        self.publish(name);
        self.refresh_if_asked(name);
        if is_news {
            self.look_soon();
        }
    }

    pub(super) fn is_up(&mut self, name: &StoreName, up: Up, adopted: bool) {
        if adopted {
            // One that was started was looked at for that; it is looked at with the room that it has.
            self.look_at_owner(name);
        }
        let Some(entry) = self.entries.get_mut(name) else { return };
        let how = if adopted { "adopted" } else { "mounted" };
        tracing::info!(store = %name, adopted, "{name}: active, {how} at {}", entry.spec.layers.merged);
        entry.up();
        entry.mounted = up.mount;
        let wrong = room::describe(&*self.machine, entry, up.room);
        entry.rooms.begins_with(name, wrong, Instant::now());
        entry.look_at_room();
        entry.belongs_to(up.owner_uid);
        entry.serving.found(up.served);
        if !up.changes.is_empty() {
            entry.refreshes.owed.demand(up.changes, Rung::Probe, Instant::now());
        }
        self.is_held(name, Ok(up.held));
        let now = Instant::now();
        for above in self.lying_on(name) {
            above.try_again();
            // One that was up all the time goes on with the superblock that was there before.
            if above.phase == Phase::Active || above.op == Some(Op::Adopt) {
                above.refreshes.owed.demand(Changes::lost(), Rung::Swap, now);
            }
        }
    }

    pub(super) fn is_busy(&mut self, name: &StoreName, why: &str) {
        let Some(entry) = self.entries.get_mut(name) else { return };
        // systemd has stopped the socket on the way.
        entry.serving.disturbed();
        let asked = std::mem::take(&mut entry.waiting.stopping);
        if !asked.is_empty() && entry.want == Want::Down {
            // All or nothing: it stays up and looked after.
            self.stays_up(name);
        } else {
            entry.fail_at_what_is_seen();
            entry.retries.later(Instant::now());
            entry.problem(Problem::Busy, format!("it should be down and stays mounted: {why}; it is tried again"));
        }
        answer(asked, &Err(Error::Busy(name.clone(), why.to_owned())));
    }

    /// Has a store that was to be stopped stay up: a stop that is refused has no effect, now or later. What lies on it may have
    /// been given up on already.
    pub(super) fn stays_up(&mut self, name: &StoreName) {
        if let Some(entry) = self.entries.get_mut(name) {
            entry.want(Want::Up);
        }
        self.lying_on(name).for_each(Entry::try_again);
    }

    /// The stores that lie on a store, whether they are up or not.
    pub(super) fn lying_on(&mut self, name: &StoreName) -> impl Iterator<Item = &mut Entry> {
        let is_on_it = move |entry: &&mut Entry| entry.spec.lower_name() == Some(name);
        self.entries.values_mut().filter(is_on_it)
    }

    /// What has failed for want of a directory that another store had is tried again at once.
    pub(super) fn are_free(&mut self, are_of: impl Fn(&StoreSpec) -> bool) {
        let waits = |entry: &&mut Entry| matches!(entry.phase, Phase::Failed { .. }) && are_of(&entry.spec);
        self.entries.values_mut().filter(waits).for_each(Entry::try_again);
    }

    fn has_left(&mut self, was: &StoreSpec) {
        self.are_free(|spec| spec.name != was.name && spec.shares_directories_with(was));
    }

    pub(super) fn is_released(&mut self, name: &StoreName, result: Result<(), OperationError>, why: Release) {
        let Some(entry) = self.entries.get_mut(name) else { return };
        let is_whole = result.is_ok();
        if let Err(error) = result {
            // The mount point keeps its attribute, or the record stays; a note is all there is to do about it.
            tracing::warn!(store = %name, "{name}: what was prepared for it is not all undone: {error}");
        }
        match why {
            Release::Respecify => {
                let was = Arc::clone(&entry.spec);
                entry.respecify();
                entry.down();
                entry.try_again();
                let entry = &self.entries[name];
                self.register(entry);
                self.has_left(&was);
            }
            // Declared again in the meantime: it stays.
            Release::Forget if entry.want != Want::Gone => entry.down(),
            Release::Forget => {
                let was = Arc::clone(&entry.spec);
                self.has_left(&was);
                let Some(entry) = self.entries.get_mut(name) else { return };
                answer(std::mem::take(&mut entry.waiting.stopping), &Ok(()));
                let error = Error::NoSuchStore(name.to_string());
                entry.waiting.answer_all(&error);
                self.jobs.fail_all_of(name, &error, Instant::now());
                let upper = &entry.spec.layers.upper;
                if is_whole {
                    tracing::info!(store = %name, "{name}: forgotten; its data stays in {upper}");
                } else {
                    tracing::info!(store = %name, "{name}: the next daemon undoes the rest; its data stays in {upper}");
                }
                self.entries.remove(name);
                let mut registry = self.registry.write().unwrap_or_else(PoisonError::into_inner);
                registry.by_name.remove(name);
                registry.by_path.retain(|_, of| of != name);
                let _ = self.events.send(Event::Removed(name.clone()));
            }
        }
    }
}
