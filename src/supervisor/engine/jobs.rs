//! Beginning jobs, and what becomes of them when something else happens to their stores.

use std::sync::Arc;

use layered_stores_model::StoreName;
use layered_stores_overlay::{probe::Stale, progress::Progress};
use tokio::time::Instant;

use super::{Engine, done::Done};
use crate::supervisor::{
    Error,
    entry::{Entry, Reply},
    jobs::{Asked, Caller, JobCommand, Kind},
    operation::OperationError,
    plan::Phase,
};

impl Engine {
    /// Lets somebody wait for a look at all paths of a store.
    pub(super) fn verify(&mut self, name: &StoreName, caller: Caller, reply: Reply<Asked>) {
        let refused = match self.entries.get_mut(name) {
            None => Error::NoSuchStore(name.to_string()),
            Some(Entry { stuck: Some(stuck), .. }) => Error::Stuck(name.clone(), stuck.clone()),
            Some(entry) if entry.phase != Phase::Active => entry.not_active(),
            Some(entry) => {
                entry.rooms.soon(Instant::now());
                self.jobs.ask(Kind::Verify, name, caller, reply);
                self.begin_jobs(name);
                return;
            }
        };
        let _ = reply.send(Err(refused));
    }

    /// Begins what is to be done about a store beside everything else.
    fn begin_jobs(&mut self, name: &StoreName) {
        let Some(entry) = self.entries.get_mut(name) else { return };
        let progress = Arc::<Progress>::default();
        let Some((id, cancel)) = self.jobs.begin(Kind::Verify, name, &progress, Instant::now()) else { return };
        let begun = self.machine.verify(&entry.spec, entry.mounted, Arc::clone(&progress));
        entry.follow(&begun.progress);
        let work = self.jobs.works().follow(cancel, progress, begun.result);
        let name = name.clone();
        self.operations.spawn(async move { (name, Done::Job(id, work.await)) });
    }

    /// Takes what the work on a job has brought; `None` if it was called off before it began.
    pub(super) fn job_came_back(
        &mut self,
        name: &StoreName,
        id: u64,
        brought: Option<Result<Vec<Stale>, OperationError>>,
    ) {
        let outcome = match brought {
            Some(Ok(stale)) => Ok(stale.into()),
            Some(Err(error)) => Err(Error::RefreshFailed(name.clone(), error.to_string())),
            None => Err(Error::Cancelled(Kind::Verify, name.clone())),
        };
        self.jobs.came_back(id, outcome, Instant::now());
        if let Some(entry) = self.entries.get_mut(name) {
            entry.forget_ended();
        }
        self.begin_jobs(name);
    }

    pub(super) fn job_command(&mut self, command: JobCommand) {
        match command {
            JobCommand::Result(id, caller, reply) => self.jobs.result(id, &caller, reply),
            JobCommand::Cancel(id, caller, reply) => {
                let _ = reply.send(self.jobs.cancel(id, &caller, Instant::now()));
            }
            JobCommand::Left(name) => self.jobs.left(&name, Instant::now()),
        }
    }
}
