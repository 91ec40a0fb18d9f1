//! Records of earlier runs that come late, because the state directory did not answer when the daemon started.
//!
//! Stores that are mounted are taken over without them, and nothing is started: what is known of a store may say that it is
//! mounted elsewhere.

use std::sync::Arc;

use layered_stores_model::StoreName;
use tokio::time::Instant;

use super::{Engine, stuck::silent};
use crate::supervisor::{plan::Phase, record::Known, status::Problem};

impl Engine {
    /// What is the matter with the state directory.
    pub(super) fn why_silent(&self) -> String {
        silent("the daemon's state directory", &self.machine.records(), &*self.machine)
    }

    /// Has a store wait that would be started.
    pub(super) fn wait_for_records(&mut self, name: &StoreName) {
        let reason = format!("{}; the store is started by itself then", self.why_silent());
        if let Some(entry) = self.entries.get_mut(name) {
            entry.fail(Problem::StartFailed, reason);
        }
    }

    /// Has stores be as somebody has asked earlier daemons.
    pub(super) fn were_asked(&mut self) {
        for (name, up) in self.machine.asked() {
            match self.entries.get_mut(&name) {
                Some(entry) => entry.was_asked(up),
                // It was taken out of the configuration, and wound down.
                None => self.machine.keep_asked(&name, None),
            }
        }
    }

    /// Takes what earlier runs have left.
    pub(super) fn recalled(&mut self, known: Known) {
        let now = Instant::now();
        tracing::info!("the state directory answers again");
        self.unreadable = known.unreadable;
        for spec in known.stores {
            let name = spec.name.clone();
            let Some(entry) = self.entries.get_mut(&name) else {
                self.add(spec, false);
                continue;
            };
            // One that is up is where it was found, whatever the record says.
            if entry.op.is_none() && entry.phase != Phase::Active && spec.needs_restart_for(&entry.spec) {
                let declared = Arc::clone(entry.declared_spec());
                entry.spec = spec;
                // What it was found to be was that of another place.
                entry.forget_failure();
                entry.propose(declared);
                self.register(&self.entries[&name]);
            }
        }
        for entry in self.entries.values_mut() {
            if matches!(entry.phase, Phase::Failed { .. }) {
                entry.try_again();
            }
        }
        self.hold_soon(now);
        self.look_at = Some(now);
    }
}
