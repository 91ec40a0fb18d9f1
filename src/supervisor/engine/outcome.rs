//! What operations have brought, and what follows from it.

use std::{
    sync::{Arc, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::time::Instant;

use super::Engine;
use crate::{
    overlay::{
        probe::Stale,
        refresh::{Changes, Outcome, Report, Rung},
        swap::OldSuperblock,
    },
    store::{NixDaemon, StoreName},
    supervisor::{
        Error,
        entry::{Op, answer},
        handle::Event,
        operation::{self, OperationError, Up},
        plan::{Phase, Want},
        status::Problem,
    },
};

/// How long paths that stay stale after a swap are left alone before the next try.
const STALE_RETRY: Duration = Duration::from_secs(30);

/// How many stale paths a message names.
const NAMED_STALE: usize = 3;

/// What an operation brought.
pub(super) enum Done {
    Up(Result<Up, OperationError>),
    Stopped(Result<(), OperationError>),
    SwapFinished(Result<(), OperationError>),
    Released(Result<(), OperationError>, Release),
    Refreshed(Result<Report, OperationError>),
    Retired(OldSuperblock),
    Verified(Result<Vec<Stale>, OperationError>),
    Served(Option<NixDaemon>, Result<(), OperationError>),
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
        if let Done::Retired(old) = done {
            if old == OldSuperblock::StillWritten {
                tracing::warn!(store = %name, "{name}: a process goes on writing through the mount that was swapped out");
            }
            return;
        }
        let Some(entry) = self.entries.get_mut(name) else { return };
        if let Done::Verified(result) = done {
            let result = result.map_err(|error| Error::RefreshFailed(name.clone(), error.to_string()));
            answer(std::mem::take(&mut entry.verifying), &result);
            return;
        }
        if let Done::Up(Ok(up)) = done {
            entry.unconfirmed = Some(up);
            self.look_soon();
            return;
        }
        entry.op = None;
        let refreshed = matches!(done, Done::Refreshed(_));
        match done {
            Done::Up(Err(error)) => {
                entry.fail(Problem::StartFailed, error.to_string());
                entry.retry_later(now);
                let failed = Err(Error::StartFailed(name.clone(), error.to_string()));
                answer(std::mem::take(&mut entry.starting), &failed);
            }
            Done::Stopped(Ok(())) => {
                tracing::info!(store = %name, "{name}: stopped");
                entry.down();
            }
            Done::Stopped(Err(error)) => self.is_busy(name, &error.to_string()),
            Done::SwapFinished(Ok(())) => {
                tracing::info!(store = %name, "{name}: a swap that was interrupted is finished");
                entry.owed.demand(Changes::unknown(), Rung::Probe, now);
            }
            Done::SwapFinished(Err(error)) => {
                entry.fail(Problem::RefreshFailed, error.to_string());
                entry.retry_later(now);
            }
            Done::Released(result, why) => self.is_released(name, result, why),
            Done::Refreshed(Ok(report)) => self.is_refreshed(name, report),
            Done::Refreshed(Err(error)) => {
                let message = error.to_string();
                let changes = std::mem::take(&mut entry.paying);
                entry.owed.demand(changes, Rung::Reconfigure, now + STALE_RETRY);
                entry.problem(Problem::RefreshFailed, message.clone());
                let failed = Err(Error::RefreshFailed(name.clone(), message));
                answer(std::mem::take(&mut entry.refreshing), &failed);
            }
            Done::Served(daemon, result) => match result {
                Ok(()) => {
                    entry.served = Some(daemon);
                    entry.clear(&[Problem::DaemonFailed]);
                }
                Err(error) => {
                    entry.served = None;
                    entry.retry_later(now);
                    entry.problem(Problem::DaemonFailed, format!("its Nix daemon: {error}; it is tried again"));
                }
            },
            Done::Up(Ok(_)) | Done::Verified(_) | Done::Retired(_) => {}
        }
        self.publish(name);
        self.refresh_if_asked(name);
        // A refresh does not change what the mount table says of a store.
        if !refreshed {
            self.look_soon();
        }
    }

    pub(super) fn is_up(&mut self, name: &StoreName, up: Up, adopted: bool) {
        let Some(entry) = self.entries.get_mut(name) else { return };
        let how = if adopted { "adopted" } else { "mounted" };
        tracing::info!(store = %name, adopted, "{name}: active, {how} at {}", entry.spec.layers.merged);
        entry.up();
        if let Some(lock) = up.lock {
            entry.lock = Some(lock);
        }
        entry.owner_uid = up.owner_uid;
        entry.served = (!up.served).then_some(None);
        if !up.changes.is_empty() {
            entry.owed.demand(up.changes, Rung::Probe, Instant::now());
        }
        match up.unwatched {
            Some(error) => {
                let message = format!("{error}; until then it is refreshed only when the hook asks for it");
                entry.problem(Problem::Unwatched, message);
            }
            None => entry.clear(&[Problem::Unwatched]),
        }
        for above in self.entries.values_mut().filter(|entry| entry.spec.lower_name() == Some(name)) {
            above.try_again();
        }
    }

    pub(super) fn is_busy(&mut self, name: &StoreName, why: &str) {
        let Some(entry) = self.entries.get_mut(name) else { return };
        // systemd has stopped the socket on the way.
        entry.served = entry.served.take().filter(Option::is_none);
        let asked = std::mem::take(&mut entry.stopping);
        if !asked.is_empty() && entry.want == Want::Down {
            // All or nothing: it stays up and looked after.
            entry.want(Want::Up);
        } else {
            entry.retry_later(Instant::now());
            entry.problem(Problem::Busy, format!("it should be down and stays mounted: {why}; it is tried again"));
        }
        answer(asked, &Err(Error::Busy(name.clone(), why.to_owned())));
    }

    pub(super) fn is_released(&mut self, name: &StoreName, result: Result<(), OperationError>, why: Release) {
        let Some(entry) = self.entries.get_mut(name) else { return };
        if let Err(error) = result {
            // The mount point keeps its attribute; a note is all there is to do about it.
            tracing::warn!(store = %name, "{name}: the mount point was not given back: {error}");
        }
        match why {
            Release::Respecify => {
                if let Some(next) = entry.next.take() {
                    entry.spec = next;
                }
                entry.down();
                entry.try_again();
                let entry = &self.entries[name];
                self.register(entry);
            }
            // Declared again in the meantime: it stays.
            Release::Forget if entry.want != Want::Gone => entry.down(),
            Release::Forget => {
                answer(std::mem::take(&mut entry.stopping), &Ok(()));
                entry.answer_all(&Error::NoSuchStore(name.to_string()));
                tracing::info!(store = %name, "{name}: forgotten; its data stays in {}", entry.spec.layers.upper);
                self.entries.remove(name);
                let mut registry = self.registry.write().unwrap_or_else(PoisonError::into_inner);
                registry.by_name.remove(name);
                registry.by_path.retain(|_, of| of != name);
                let _ = self.events.send(Event::Removed(name.clone()));
            }
        }
    }

    /// Serves those who have asked while something else was being done.
    pub(super) fn refresh_if_asked(&mut self, name: &StoreName) {
        if self.entries.get(name).is_some_and(|entry| !entry.remounting.is_empty()) {
            self.refresh(name);
        }
    }

    /// Begins the refresh that is owed or asked for, if nothing else is being done about the store.
    pub(super) fn refresh(&mut self, name: &StoreName) {
        // What was changed before the command came is in the queue by now, and counts.
        self.drain_watches();
        let Some(entry) = self.entries.get_mut(name) else { return };
        if entry.op.is_some() || entry.phase != Phase::Active {
            return;
        }
        let (changes, owed) = entry.owed.take();
        let asked = if entry.remounting.is_empty() { Rung::Probe } else { Rung::Reconfigure };
        entry.refreshing.append(&mut entry.remounting);
        entry.paying = changes.clone();
        let (tools, spec, kept) = (self.tools.clone(), Arc::clone(&entry.spec), entry.fingerprint);
        self.spawn(name, Op::Refresh, async move {
            Done::Refreshed(operation::refresh(tools, spec, changes, owed.max(asked), kept).await)
        });
    }

    pub(super) fn is_refreshed(&mut self, name: &StoreName, report: Report) {
        let now = Instant::now();
        let Some(entry) = self.entries.get_mut(name) else { return };
        let changes = std::mem::take(&mut entry.paying);
        // Whoever waits is answered before anything is logged or published: it is Nix that waits.
        let asked = std::mem::take(&mut entry.refreshing);
        entry.clear(&[Problem::RefreshFailed]);
        if report.still_stale.is_empty() {
            answer(asked, &Ok(()));
            entry.fingerprint = Some(report.fingerprint);
            entry.clear(&[Problem::Stale]);
        } else {
            let names = report.still_stale.iter().map(|stale| stale.name.clone()).collect();
            entry.owed.demand(Changes { names, unknown: false }, Rung::Probe, now + STALE_RETRY);
            let named: Vec<_> = report.still_stale.iter().take(NAMED_STALE).map(ToString::to_string).collect();
            let message = format!("{} of its paths: {}", report.still_stale.len(), named.join("; "));
            answer(asked, &Err(Error::Stale(name.clone(), message.clone())));
            entry.problem(Problem::Stale, message);
        }
        let (how, above) = match report.outcome {
            Outcome::Current => return,
            Outcome::Reconfigured => ("reconfigured", Rung::Reconfigure),
            Outcome::Swapped => ("swapped", Rung::Swap),
        };
        entry.refresh_count += 1;
        entry.last_refresh = how;
        entry.last_refresh_usec = realtime_usec();
        tracing::info!(store = %name, refresh = how, probed = report.probed, "{name}: {how} (paths probed: {})", report.probed);
        if let Some(old) = report.old {
            entry.swap_count += 1;
            let (name, spec) = (name.clone(), Arc::clone(&entry.spec));
            self.operations.spawn(async move { (name, Done::Retired(operation::retire(old, spec).await)) });
        }
        // What lies on top has looked at the old view, and after a swap refers to the old superblock.
        for entry in self.entries.values_mut().filter(|entry| entry.spec.lower_name() == Some(name)) {
            entry.owed.demand(changes.clone(), above, now);
        }
    }
}

fn realtime_usec() -> u64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_epoch.as_micros()).unwrap_or(u64::MAX)
}
