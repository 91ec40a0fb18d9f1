//! Removing what is in stores that are down, and what is left of those that are declared no more.

use std::sync::{Arc, Weak};

use layered_stores_model::{AbsolutePath, PathError, StoreName};
use layered_stores_overlay::{mountinfo::MountState, remove::RemoveError};

use tokio::time::Instant;

use super::{Engine, reconcile::Occupied, stuck::silent};
use crate::supervisor::{
    Error,
    entry::{Entry, Op, Reply, answer},
    machine::Follow,
    operation::OperationError,
    plan::{Phase, Want},
    threads::DEADLINE,
};

/// A directory that is being removed. No store that has to do with it is started meanwhile.
#[derive(Debug)]
pub(super) struct Removing {
    pub(super) directory: AbsolutePath,
    pub(super) waiting: Vec<Reply>,
    progress: Weak<dyn Follow>,
    /// Why it is waited for no longer.
    pub(super) stuck: Option<String>,
}

impl Removing {
    /// When it is waited for no longer.
    pub(super) fn stuck_due(&self) -> Option<Instant> {
        let (_, since) = self.progress.upgrade().filter(|_| self.stuck.is_none())?.waits_for()?;
        Some(since + DEADLINE)
    }
}

impl Engine {
    pub(super) fn remove_data(&mut self, name: StoreName, reply: Reply) {
        // What is mounted is looked at now: the news of it may be on their way.
        self.reconcile();
        let result = if self.entries.contains_key(&name) {
            self.is_removable(&name)
        } else {
            self.remove_left_over(name, reply);
            return;
        };
        if let Err(error) = result {
            let _ = reply.send(Err(error));
            return;
        }
        // What an earlier removal has not come to goes as well: the store may not have been declared then.
        let own = self.own_directory(&name).ok();
        let Some(entry) = self.entries.get_mut(&name) else { return };
        entry.waiting.removing.push(reply);
        if entry.op == Some(Op::Remove) {
            return;
        }
        let lock = entry.lock.take();
        self.begin(&name, Op::Remove, |machine, spec| machine.remove(spec, lock, own), Self::is_removed);
        self.publish(&name);
    }

    /// Whether a store is down, and nothing else is being done about it.
    fn is_removable(&self, name: &StoreName) -> Result<(), Error> {
        let Some(entry) = self.entries.get(name) else { return Err(Error::NoSuchStore(name.to_string())) };
        let refuse = |why: String| Err(Error::InUse(name.clone(), why));
        if let Some(stuck) = &entry.stuck {
            return Err(Error::Stuck(name.clone(), stuck.clone()));
        }
        if entry.op == Some(Op::Remove) {
            return Ok(());
        }
        let above: Vec<_> = self.on_top_of(name).map(|entry| entry.spec.name.to_string()).collect();
        if !above.is_empty() {
            return Err(Error::LowerOf(name.clone(), above));
        }
        if !entry.declared {
            return refuse("it is declared no more, and not taken down yet; see `layered-stores status`".to_owned());
        }
        let failed = matches!(entry.phase, Phase::Failed { .. });
        let is_down = failed || (entry.phase == Phase::Inactive && entry.want != Want::Up);
        let is_idle = entry.op.is_none() && !entry.may_respecify();
        if !is_down || !is_idle || entry.mount != MountState::Absent {
            return refuse(format!("it is not stopped; run `layered-stores stop {name}` first"));
        }
        match self.occupied(entry) {
            Occupied::No => Ok(()),
            Occupied::ForNow => {
                refuse("another store that has one of its directories is on its way down; try again".to_owned())
            }
            Occupied::By(why) => refuse(why),
        }
    }

    /// The directory that a store has for itself, if it was not given others.
    fn own_directory(&self, name: &StoreName) -> Result<AbsolutePath, PathError> {
        self.state_dir.join(&format!("stores/{name}"))
    }

    fn remove_left_over(&mut self, name: StoreName, reply: Reply) {
        let directory = match self.own_directory(&name) {
            Ok(directory) => directory,
            Err(error) => {
                let _ = reply.send(Err(Error::RemoveFailed(name, error.to_string())));
                return;
            }
        };
        let uses =
            |entry: &&Entry| [&entry.spec, entry.declared_spec()].into_iter().any(|spec| spec.is_of(&name, &directory));
        if let Some(user) = self.entries.values().find(uses) {
            let why = format!("store {:?} has directories in {directory}", user.spec.name.as_str());
            let _ = reply.send(Err(Error::InUse(name, why)));
            return;
        }
        if let Some(removing) = self.removing.get_mut(&name) {
            match &removing.stuck {
                Some(why) => drop(reply.send(Err(Error::Stuck(name, why.clone())))),
                None => removing.waiting.push(reply),
            }
            return;
        }
        let begun = self.machine.remove_left_over(directory.clone());
        let progress = Arc::downgrade(&begun.progress);
        let removing = Removing { directory, waiting: vec![reply], progress, stuck: None };
        self.removing.insert(name.clone(), removing);
        self.once(&name, begun.result, Self::is_left_over_removed);
    }

    /// Gives up waiting for removals that have got no further for [`DEADLINE`]. They go on if they can.
    pub(super) fn look_at_removals(&mut self, now: Instant) {
        let mut is_any = false;
        for (name, removing) in &mut self.removing {
            if removing.stuck_due().is_some_and(|at| at <= now) {
                let why = silent("its directory", removing.directory.as_path(), &*self.machine);
                tracing::warn!(store = %name, "{name}: what is left of it cannot be removed: {why}");
                answer(removing.waiting.drain(..), &Err(Error::Stuck(name.clone(), why.clone())));
                removing.stuck = Some(why);
                is_any = true;
            }
        }
        if is_any {
            self.look_soon();
        }
    }

    /// What is left of a store was removed, or not.
    fn is_left_over_removed(&mut self, name: &StoreName, result: Result<(), OperationError>) {
        let result = match result {
            Ok(()) => {
                tracing::info!(store = %name, "{name}: what was left of it is removed");
                Ok(())
            }
            Err(OperationError::Remove(RemoveError::Nothing(_))) => Err(Error::NothingLeft(name.clone())),
            Err(error) => Err(Error::RemoveFailed(name.clone(), error.to_string())),
        };
        if let Some(removing) = self.removing.remove(name) {
            answer(removing.waiting, &result);
            // It may be declared again, and wait for this.
            self.are_free(|spec| spec.is_of(name, &removing.directory));
        }
        self.look_soon();
    }

    /// What is in a store was removed, or not.
    fn is_removed(&mut self, name: &StoreName, result: Result<(), OperationError>) {
        let Some(entry) = self.entries.get_mut(name) else { return };
        let result = result.map_err(|error| Error::RemoveFailed(name.clone(), error.to_string()));
        if result.is_ok() {
            tracing::info!(store = %name, "{name}: all that was in it is removed");
            // That may have been what was wrong with it.
            entry.try_again();
        }
        answer(std::mem::take(&mut entry.waiting.removing), &result);
    }
}
