//! Looking ahead, whether a store that is up can come up with the specification that waits.

use std::sync::Arc;

use layered_stores_model::{StoreName, StoreSpec};
use tokio::time::Instant;

use super::{Engine, done::Done};
use crate::supervisor::{operation::OperationError, status::Problem, threads::DEADLINE};

impl Engine {
    /// Begins to look. The store is refreshed meanwhile as ever, whatever does not answer.
    pub(super) fn look_ahead(&mut self, name: &StoreName) {
        let Some(next) = self.entries.get_mut(name).and_then(|entry| entry.next.as_mut()) else { return };
        next.begin_to_look();
        let (name, spec) = (name.clone(), Arc::clone(&next.spec));
        let looking = self.machine.look_ahead(&spec);
        self.operations.spawn(async move {
            let found = tokio::time::timeout(DEADLINE, looking.result).await.ok();
            (name, Done::LookedAhead(spec, found))
        });
    }

    /// Takes what was found; nothing if that has not answered in time.
    pub(super) fn has_looked_ahead(
        &mut self,
        name: &StoreName,
        spec: &Arc<StoreSpec>,
        found: Option<Result<(), OperationError>>,
    ) {
        let Some(entry) = self.entries.get_mut(name) else { return };
        let Some(next) = entry.next.as_mut().filter(|next| Arc::ptr_eq(&next.spec, spec)) else { return };
        let why = match found {
            Some(Ok(())) => None,
            Some(Err(error)) => Some(error.to_string()),
            None => Some(format!("one of its directories has not answered for {} s", DEADLINE.as_secs())),
        };
        next.was_looked_at(why.is_none());
        match why {
            None => entry.clear(&[Problem::NotApplied]),
            Some(why) => {
                entry.retries.later(Instant::now());
                let message = format!(
                    "it goes on as it was, because with what is declared now it would not come up: {why}; it is tried again"
                );
                entry.problem(Problem::NotApplied, message);
            }
        }
        self.publish(name);
        self.look_soon();
    }
}
