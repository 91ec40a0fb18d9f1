//! What is held of a store as long as it is up: its lock, its record, its watches. What cannot be had is tried for again.

use std::time::Duration;

use layered_stores_model::StoreName;
use layered_stores_overlay::refresh::{Changes, Rung};
use tokio::time::Instant;

use super::Engine;
use crate::supervisor::{
    entry::{Entry, Op},
    operation::{Held, OperationError},
    plan::Phase,
    status::Problem,
};

/// How long what cannot be had is left alone. It costs a few system calls.
const AGAIN: Duration = Duration::from_secs(30);

/// When a store is to be taken hold of again.
pub(super) fn hold_at(entry: &Entry) -> Option<Instant> {
    entry.hold_at.filter(|_| entry.op.is_none() && !entry.passed_over && entry.phase == Phase::Active)
}

impl Engine {
    /// Tries again for what could not be had.
    pub(super) fn hold_due(&mut self, now: Instant) {
        let is_due = |entry: &&Entry| hold_at(entry).is_some_and(|at| at <= now);
        let due = self.entries.values().filter(is_due);
        for (name, locked) in due.map(|entry| (entry.spec.name.clone(), entry.lock.is_some())).collect::<Vec<_>>() {
            self.begin(&name, Op::Hold, |machine, spec| machine.hold(spec, locked), Self::is_held);
        }
    }

    /// Has everybody try at once for what could not be had.
    pub(super) fn hold_soon(&mut self, now: Instant) {
        for at in self.entries.values_mut().filter_map(|entry| entry.hold_at.as_mut()) {
            *at = now;
        }
    }

    pub(super) fn is_held(&mut self, name: &StoreName, held: Result<Held, OperationError>) {
        let now = Instant::now();
        let Some(entry) = self.entries.get_mut(name) else { return };
        let held = held.unwrap_or_else(|error| Held { unrecorded: Some(error), ..Held::default() });
        if let Some(lock) = held.lock {
            entry.lock = Some(lock);
        }
        entry.hold_at = (held.unwatched.is_some() || held.unrecorded.is_some()).then_some(now + AGAIN);
        let seconds = AGAIN.as_secs();
        match held.unwatched {
            Some(error) => {
                let message = format!(
                    "{error}; until then changes of its layers are seen to only when the hook asks for it; it is tried again \
                     every {seconds} s"
                );
                entry.problem(Problem::Unwatched, message);
            }
            None if entry.has(Problem::Unwatched) => {
                entry.clear(&[Problem::Unwatched]);
                entry.refreshes.owed.demand(Changes::lost(), Rung::Probe, now);
            }
            None => {}
        }
        match held.unrecorded {
            Some(error) => {
                let message =
                    format!("{error}; the store is in use all the same, and it is tried again every {seconds} s");
                entry.problem(Problem::Unrecorded, message);
            }
            None => entry.clear(&[Problem::Unrecorded]),
        }
    }
}
