//! Beginning jobs, and what becomes of them when something else happens to their stores.

use std::sync::Arc;

use layered_stores_model::StoreName;
use layered_stores_overlay::{progress::Progress, refresh::Changes};
use tokio::time::Instant;

use super::Engine;
use crate::supervisor::{
    Error,
    entry::{Entry, Reply},
    jobs::{Asked, Caller, Findings, JobCommand, Kind},
    looks::Look,
    operation::OperationError,
    plan::Phase,
};

impl Engine {
    pub(super) fn job_command(&mut self, command: JobCommand) {
        match command {
            JobCommand::Ask(kind, name, caller, reply) => self.ask_for_job(kind, &name, caller, reply),
            JobCommand::Result(id, caller, reply) => self.jobs.result(id, &caller, reply),
            JobCommand::Cancel(id, caller, reply) => {
                let _ = reply.send(self.jobs.cancel(id, &caller, Instant::now()));
            }
            JobCommand::Left(name) => self.jobs.left(&name, Instant::now()),
        }
    }

    /// Lets somebody wait for a job about a store that is up.
    fn ask_for_job(&mut self, kind: Kind, name: &StoreName, caller: Caller, reply: Reply<Asked>) {
        let refused = match self.entries.get_mut(name) {
            None => Error::NoSuchStore(name.to_string()),
            Some(Entry { stuck: Some(stuck), .. }) => Error::Stuck(name.clone(), stuck.clone()),
            Some(entry) if entry.phase != Phase::Active => entry.not_active(),
            Some(entry) => {
                entry.looks.soon(Look::Room, Instant::now());
                self.jobs.ask(kind, name, caller, reply);
                self.begin_jobs(name);
                return;
            }
        };
        let _ = reply.send(Err(refused));
    }

    /// Begins what is to be done about a store beside everything else.
    fn begin_jobs(&mut self, name: &StoreName) {
        for kind in Kind::ALL {
            let Some(entry) = self.entries.get_mut(name) else { return };
            let progress = Arc::<Progress>::default();
            let Some((id, cancel)) = self.jobs.begin(kind, name, &progress, Instant::now()) else { continue };
            let begun = self.machine.work(kind, &entry.spec, entry.mounted, Arc::clone(&progress));
            entry.follow(&begun.progress);
            let work = self.jobs.works().follow(cancel, progress, begun.result);
            self.once(name, work, move |engine, name, brought| engine.job_came_back(name, kind, id, brought));
        }
    }

    /// Takes what the work on a job has brought; `None` if it was called off before it began.
    fn job_came_back(
        &mut self,
        name: &StoreName,
        kind: Kind,
        id: u64,
        brought: Option<Result<Findings, OperationError>>,
    ) {
        if let Some(entry) = self.entries.get_mut(name) {
            entry.forget_ended();
            // The way out that is said is to ask for a refresh, which looks at them then whatever was missed before.
            if let (Kind::Verify, Some(Ok(found))) = (kind, &brought) {
                let names = found.iter().map(|finding| finding.about.clone().into()).collect();
                entry.refreshes.owed.found(Changes { names, ..Changes::default() });
            }
        }
        let brought = brought.map(|brought| brought.map_err(|error| error.to_string()));
        self.jobs.came_back(id, brought, Instant::now());
        self.begin_jobs(name);
    }
}
