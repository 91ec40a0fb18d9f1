//! What operations have brought, and what follows from it.

use std::sync::{Arc, PoisonError};

use layered_stores_model::{Service, StoreName, StoreSpec};
use layered_stores_overlay::refresh::{Changes, Rung};
use tokio::time::Instant;

use super::{Engine, looks};
use crate::supervisor::{
    Error,
    entry::{Entry, Op, answer},
    handle::Event,
    looks::Look,
    machine::SwappedOut,
    operation::{OperationError, Up},
    plan::{Phase, Want},
    status::Problem,
};

/// Why something is undone.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Release {
    Forget,
    Respecify,
}

impl Engine {
    pub(super) fn is_not_up(&mut self, name: &StoreName, error: &OperationError) {
        let Some(entry) = self.entries.get_mut(name) else { return };
        entry.fail(error.problem(), error.to_string());
        entry.retries.later(Instant::now());
        if !entry.is_considered() {
            let failed = Err(Error::StartFailed(name.clone(), error.to_string()));
            answer(std::mem::take(&mut entry.waiting.starting), &failed);
        }
    }

    pub(super) fn is_stopped(&mut self, name: &StoreName, result: Result<(), OperationError>) {
        match (result, self.entries.get_mut(name)) {
            (Ok(()), Some(entry)) => {
                tracing::info!(store = %name, "{name}: stopped");
                entry.down();
            }
            (Err(error), _) => self.is_busy(name, &error.to_string()),
            (Ok(()), None) => {}
        }
    }

    pub(super) fn is_swap_finished(&mut self, name: &StoreName, result: Result<Arc<dyn SwappedOut>, OperationError>) {
        let now = Instant::now();
        let Some(entry) = self.entries.get_mut(name) else { return };
        match result {
            Ok(old) => {
                tracing::info!(store = %name, "{name}: a swap that was interrupted is finished");
                self.retirements.add(name.clone(), old, Arc::clone(&entry.spec));
                entry.refreshes.owed.demand(Changes::unknown(), Rung::Probe, now);
            }
            Err(error) => {
                entry.fail(Problem::RefreshFailed, error.to_string());
                entry.retries.later(now);
            }
        }
    }

    pub(super) fn is_served(&mut self, name: &StoreName, service: Option<Service>, result: Result<(), OperationError>) {
        let now = Instant::now();
        let Some(entry) = self.entries.get_mut(name) else { return };
        match result {
            Ok(()) => {
                entry.serving.made(service, now);
                entry.clear(&[Problem::DaemonFailed]);
                // It was made because its directories were found to be whose they should be.
                if entry.has(Problem::OtherOwner) {
                    entry.looks.at_once(Look::Owner, now);
                }
            }
            Err(error) => {
                entry.serving.failed(now);
                entry.problem(Problem::DaemonFailed, format!("its Nix daemon: {error}; it is tried again"));
            }
        }
    }

    pub(super) fn is_up(&mut self, name: &StoreName, up: Up, adopted: bool) {
        let Some(entry) = self.entries.get_mut(name) else { return };
        let how = if adopted { "adopted" } else { "mounted" };
        tracing::info!(store = %name, adopted, "{name}: active, {how} at {}", entry.spec.layers.merged);
        entry.up();
        entry.mounted = up.mount;
        entry.room = looks::describe(&*self.machine, entry, up.room);
        entry.look_at_room();
        entry.looks.begin(name, Instant::now());
        if adopted {
            // One that was started was looked at for that.
            entry.looks.at_once(Look::Owner, Instant::now());
        }
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
