//! What stores that lie on one another are to one another.

use std::sync::Arc;

use layered_stores_model::{StoreName, StoreSpec};
use layered_stores_overlay::mountinfo::MountState;

use super::Engine;
use crate::supervisor::{
    entry::Entry,
    plan::{
        Carries, Lower, Phase,
        stack::{self, OnTop, Underneath},
    },
};

impl Engine {
    /// The stores that lie on a store, whether they are up or not.
    pub(super) fn lying_on(&mut self, name: &StoreName) -> impl Iterator<Item = &mut Entry> {
        let is_on_it = move |entry: &&mut Entry| entry.spec.lower_name() == Some(name);
        self.entries.values_mut().filter(is_on_it)
    }

    /// The stores that lie on a store and are mounted or on their way up.
    pub(super) fn on_top_of(&self, name: &StoreName) -> impl Iterator<Item = &Entry> {
        let is_on_top = move |entry: &&Entry| entry.spec.lower_name() == Some(name);
        self.entries.values().filter(is_on_top).filter(|entry| entry.mount != MountState::Absent || entry.op.is_some())
    }

    /// The layered store that one lies on.
    pub(super) fn below(&self, name: &StoreName) -> Option<Arc<StoreSpec>> {
        let lower = self.entries.get(name)?.spec.lower_name()?;
        self.entries.get(lower).map(|below| Arc::clone(&below.spec))
    }

    /// The stores that lie on a store, but for those on filesystems that do not answer.
    pub(super) fn active_above(&self, name: &StoreName) -> Vec<Arc<StoreSpec>> {
        self.entries
            .values()
            .filter(|entry| entry.spec.lower_name() == Some(name) && entry.phase == Phase::Active)
            .filter(|entry| entry.stuck.is_none())
            .map(|entry| Arc::clone(&entry.spec))
            .collect()
    }

    /// Has what hides a store hide those that lie on it: their lower store's path leads elsewhere.
    pub(super) fn hide_above(&mut self) {
        let cover = |entry: &Entry| match &entry.mount {
            MountState::Covered(cover) if cover.hides == entry.spec.layers.merged.as_str() => Some(cover.clone()),
            _ => None,
        };
        let hidden: Vec<_> =
            self.entries.iter().filter_map(|(name, entry)| Some((name.clone(), cover(entry)?))).collect();
        for (name, cover) in hidden {
            for above in self.lying_on(&name) {
                if above.is_mounted() {
                    above.mount = MountState::Covered(cover.clone());
                }
            }
        }
    }

    /// What the stores mean for a store that lie on it and are mounted, or may be.
    pub(super) fn carries(&self, name: &StoreName) -> Carries {
        let Some(below) = self.entries.get(name) else { return Carries::Nothing };
        let above = self.on_top_of(name).map(|entry| OnTop {
            want: entry.want,
            respecify: entry.may_respecify(),
            is_given_up: entry.is_given_up(),
            is_not_ours: entry.is_mounted() && !self.machine.is_ours(&entry.spec.mount_unit),
            doing: entry.doing(),
        });
        stack::carries(below.want, above)
    }

    /// What the store underneath is for one that lies on it.
    pub(super) fn lower_state(&self, above: &StoreSpec) -> Lower {
        let Some(lower) = above.lower_name() else { return Lower::Ready };
        let Some(entry) = self.entries.get(lower) else { return Lower::Unavailable };
        match self.state_of(entry) {
            Lower::Ready if entry.spec.layers.merged != above.layers.lower => {
                if entry.is_considered() {
                    Lower::Pending
                } else {
                    Lower::Elsewhere
                }
            }
            state => state,
        }
    }

    /// What a store is for those that lie on it, where it is.
    pub(super) fn state_of(&self, entry: &Entry) -> Lower {
        stack::lower(&Underneath {
            want: entry.want,
            respecify: entry.respecifies(),
            is_active: entry.phase == Phase::Active,
            is_coming_up: entry.is_coming_up(),
            cannot_go: entry.cannot_go(),
            is_stuck: entry.stuck.is_some(),
            doing: entry.doing(),
        })
    }
}
