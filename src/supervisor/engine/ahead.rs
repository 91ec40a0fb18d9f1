//! Looking ahead, whether stores that are up can come up with what is declared now, and deciding which of them change.

use std::sync::Arc;

use layered_stores_model::{StoreName, StoreSpec};
use tokio::time::Instant;

use super::{Engine, stuck};
use crate::supervisor::{
    entry::Entry,
    operation::OperationError,
    plan::{
        Lower,
        change::{self, Change, Found},
    },
};

impl Engine {
    /// Looks at what is declared and not in force, and has those stores change that can.
    pub(super) fn consider(&mut self, now: Instant) {
        let names: Vec<_> =
            self.entries.iter().filter(|(_, entry)| entry.candidate.is_some()).map(|(name, _)| name.clone()).collect();
        if names.is_empty() {
            return;
        }
        for name in &names {
            self.look_ahead(name, now);
        }
        let changes: Vec<_> = names.iter().filter_map(|name| self.as_change(&self.entries[name])).collect();
        let stuck: Vec<_> =
            self.entries.values().filter(|entry| entry.is_in_the_way()).map(|entry| &*entry.spec).collect();
        let lower = |name: &StoreName| self.entries.get(name).map_or(Lower::Unavailable, |entry| self.state_of(entry));
        let mut staying = change::staying(&changes, &stuck, lower);
        for name in &names {
            if let Some(entry) = self.entries.get_mut(name) {
                entry.decide(staying.remove(name));
            }
        }
    }

    fn as_change<'e>(&self, entry: &'e Entry) -> Option<Change<'e>> {
        let candidate = entry.candidate.as_ref()?;
        let is_up = entry.has_something_to_lose();
        let is_theirs = is_up && entry.is_mounted() && !self.machine.is_ours(&entry.spec.mount_unit);
        let found = if is_theirs && !candidate.spec.layers.are_at(&entry.spec.layers) {
            Found::Wrong("its mount was not made by the daemon, and stays; unmount it by hand".to_owned())
        } else {
            candidate.found.clone()
        };
        Some(Change { now: &entry.spec, then: &candidate.spec, is_up, found })
    }

    /// Begins to look, if it is time to. The store is refreshed meanwhile as ever, whatever does not answer.
    fn look_ahead(&mut self, name: &StoreName, now: Instant) {
        let Some(entry) = self.entries.get_mut(name) else { return };
        if let Some(spec) = entry.begin_to_look(now) {
            let looking = self.machine.look_ahead(&spec);
            entry.looks_ahead(&spec, &looking.progress, now);
            self.once(name, looking.result, move |engine, name, found| engine.has_looked_ahead(name, &spec, found));
        }
        let Some(entry) = self.entries.get_mut(name) else { return };
        if let Some(spot) = entry.look_is_silent(now) {
            let why = stuck::describe(entry.declared_spec(), spot, &*self.machine);
            entry.look_is_given_up(why, now);
        }
    }

    /// Takes what was found.
    fn has_looked_ahead(&mut self, name: &StoreName, spec: &Arc<StoreSpec>, found: Result<(), OperationError>) {
        if let Some(entry) = self.entries.get_mut(name) {
            entry.look_came_back(spec, found.err().map(|error| error.to_string()), Instant::now());
            self.look_soon();
        }
    }
}
