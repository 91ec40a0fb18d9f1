//! Looking at stores that are up, and what follows from what is seen.

use std::sync::Arc;

use layered_stores_model::StoreName;
use layered_stores_overlay::{progress::Spot, room::Room};
use tokio::time::Instant;

use super::Engine;
use crate::supervisor::{
    entry::Entry,
    looks::{Look, Sight},
    machine::{Follow, Machine},
    operation::OperationError,
    plan::Phase,
    room,
    status::Problem,
};

/// How far a look has come. A name service that does not answer is no reason to have a store wait that goes on without it.
#[derive(Debug)]
struct WithoutAccounts(Arc<dyn Follow>);

impl Follow for WithoutAccounts {
    fn waits_for(&self) -> Option<(Spot, Instant)> {
        self.0.waits_for().filter(|(spot, _)| *spot != Spot::Accounts)
    }
}

/// When a store is to be looked at.
pub(super) fn look_due(entry: &Entry) -> Option<Instant> {
    entry.looks.due().filter(|_| entry.phase == Phase::Active && entry.stuck.is_none())
}

impl Engine {
    /// Begins the looks whose time has come.
    pub(super) fn look_at_stores(&mut self, now: Instant) {
        let is_due = |entry: &&mut Entry| look_due(entry).is_some_and(|at| at <= now);
        let due = self.entries.values_mut().filter(is_due);
        let due: Vec<_> = due.map(|entry| (entry.spec.name.clone(), entry.looks.take(now))).collect();
        for (name, looks) in due {
            for look in looks {
                self.look(&name, look);
            }
        }
    }

    fn look(&mut self, name: &StoreName, look: Look) {
        let below = self.below(name);
        let Some(entry) = self.entries.get_mut(name) else { return };
        let begun = self.machine.look(look, &entry.spec, below);
        let followed: Arc<dyn Follow> = Arc::new(WithoutAccounts(begun.progress));
        entry.follow(&followed);
        let result = async move {
            let seen = begun.result.await;
            drop(followed);
            seen
        };
        self.once(name, result, move |engine, name, seen| engine.has_looked(name, look, seen));
    }

    fn has_looked(&mut self, name: &StoreName, look: Look, seen: Result<Sight, OperationError>) {
        let now = Instant::now();
        let Some(entry) = self.entries.get_mut(name) else { return };
        entry.forget_ended();
        if !entry.looks.seen(look, now) {
            return;
        }
        match (look, seen) {
            (_, Ok(Sight::Room(room))) => {
                entry.room = describe(&*self.machine, entry, room);
                entry.look_at_room();
            }
            (_, Ok(Sight::Owner(wrong))) => self.has_seen_owner(name, wrong, now),
            // That it was not found out is a mistake of the daemon's, which the next look may not make.
            (Look::Room, Err(_)) => {
                entry.room = None;
                entry.look_at_room();
            }
            (Look::Owner, Err(_)) => {}
        }
        self.publish(name);
    }

    fn has_seen_owner(&mut self, name: &StoreName, wrong: Option<String>, now: Instant) {
        let Some(entry) = self.entries.get_mut(name) else { return };
        if wrong.is_some() != entry.has(Problem::OtherOwner) {
            // Its Nix daemon goes, or comes back.
            entry.serving.disturbed();
            entry.serving.at_once();
            // What lies on it works in it as well.
            for above in self.lying_on(name) {
                above.looks.at_once(Look::Owner, now);
            }
            self.look_soon();
        }
        let Some(entry) = self.entries.get_mut(name) else { return };
        match wrong {
            Some(message) => entry.problem(Problem::OtherOwner, message),
            None => entry.clear(&[Problem::OtherOwner]),
        }
    }
}

/// What is wrong, and the way out.
pub(super) fn describe(machine: &dyn Machine, entry: &Entry, seen: Room) -> Option<(Problem, String)> {
    if seen == Room::Enough {
        return None;
    }
    let point = machine.mount_point_of(entry.spec.layers.upper.as_path());
    room::describe(&entry.spec, seen, point.as_deref().unwrap_or("/"))
}
