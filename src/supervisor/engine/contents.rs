//! What is in stores, and what follows from that.

use std::sync::Arc;

use layered_stores_model::{StoreName, StoreSpec};

use super::Engine;
use crate::supervisor::{
    leases::{Attended, Report},
    plan::Phase,
    status::Problem,
};

/// What is found by looking into a store.
const FOUND: [Problem; 3] = [Problem::DatabaseUnreadable, Problem::PathsLost, Problem::Unleased];

impl Engine {
    /// Tells those who look into stores which are up. Of those that are not nothing is known.
    pub(super) fn tell_up(&mut self) {
        for entry in self.entries.values_mut().filter(|entry| entry.phase != Phase::Active) {
            entry.found = None;
            entry.clear(&FOUND);
        }
        let attended = |name: &StoreName| {
            let entry = self.entries.get(name).filter(|entry| entry.phase == Phase::Active)?;
            let below = |spec: &Arc<StoreSpec>| self.below(&spec.name);
            let beneath = std::iter::successors(self.below(name), below).take(self.entries.len()).collect();
            Some(Attended { spec: Arc::clone(&entry.spec), beneath, uid: entry.owner_uid, round: entry.round })
        };
        let up: Vec<_> = self.entries.keys().filter_map(attended).collect();
        self.up.send_if_modified(|told| {
            let is_news = **told != up;
            if is_news {
                *told = Arc::new(up);
            }
            is_news
        });
    }

    /// Takes what was found in a store.
    pub(super) fn found(&mut self, name: &StoreName, report: Report) {
        let Some(entry) = self.entries.get_mut(name).filter(|entry| entry.phase == Phase::Active) else { return };
        let problems = [
            report.unreadable.as_ref().map(|why| {
                format!("what is in it is not known: {why}; what it is known to use is kept in the lower store")
            }),
            report.lost(name),
            report.unleased.as_ref().map(|why| {
                format!(
                    "the lower store's garbage collector may take what this store uses: {why}; collect no garbage there, or \
                     see to that"
                )
            }),
        ];
        for (problem, message) in FOUND.into_iter().zip(problems) {
            match message {
                Some(message) => entry.problem(problem, message),
                None => entry.clear(&[problem]),
            }
        }
        entry.found = Some(Arc::new(report));
        self.publish(name);
    }
}
