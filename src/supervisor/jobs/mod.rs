//! Jobs: what takes long, beside the operations on stores. They can be watched and cancelled, and there are only so many.
//!
//! A job is there as long as somebody waits for it. Those who do are known by their connections to the bus; who leaves the bus,
//! waits for nothing. A job that was cancelled is over at once for everybody, but its thread cannot be killed: it ends at its
//! next step, and until then no other of its kind is begun on its store.

mod bounds;
mod job;
mod messages;
mod work;

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use bounds::KEEP;
pub(in crate::supervisor) use job::{Finding, Findings};
pub use job::{Job, Kind};
use layered_stores_model::StoreName;
use layered_stores_overlay::progress::Progress;
pub use messages::{Asked, Caller, JobCommand, JobNews};
use tokio::{sync::mpsc, time::Instant};
use tokio_util::sync::{CancellationToken, DropGuard};
use work::Works;

use super::{
    Error,
    entry::{Reply, answer},
    handle::Event,
    schedule::Schedule,
};

/// How often it is told how far jobs have come.
const PACE: Duration = Duration::from_millis(200);

/// Somebody who waits for a job.
#[derive(Debug)]
struct Ask {
    caller: Caller,
    replies: Vec<Reply<Findings>>,
    _waits: DropGuard,
}

/// What is known of a job.
#[derive(Debug)]
struct Record {
    job: Arc<Job>,
    asks: Vec<Ask>,
    /// Root, who has not asked for it and wants to know all the same.
    onlookers: Vec<Reply<Findings>>,
    cancel: CancellationToken,
    told: (u64, u64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Check {
    Progress,
    Forget(u64),
}

/// All jobs.
#[derive(Debug)]
pub(super) struct Jobs {
    all: BTreeMap<u64, Record>,
    last: u64,
    /// Those whose thread has not come back, whether or not they are over.
    at_work: HashMap<(Kind, StoreName), u64>,
    checks: Schedule<Check>,
    works: Works,
    events: mpsc::UnboundedSender<Event>,
}

impl Jobs {
    pub(super) fn new(events: mpsc::UnboundedSender<Event>) -> Self {
        Self {
            all: BTreeMap::new(),
            last: 0,
            at_work: HashMap::new(),
            checks: Schedule::default(),
            works: Works::default(),
            events,
        }
    }

    fn tell(&self, news: JobNews) {
        let _ = self.events.send(Event::Job(news));
    }

    /// Lets somebody wait for a job that has not begun, which is made if there is none: one that has begun may have passed what
    /// has changed since.
    pub(super) fn ask(&mut self, kind: Kind, store: &StoreName, caller: Caller, reply: Reply<Asked>) {
        let is_meant = |record: &&mut Record| record.job.is_waiting() && record.job.is_of(kind, store);
        let waiting = self.all.values_mut().find(is_meant);
        if let Some(record) = &waiting
            && record.asks.iter().any(|ask| ask.caller == caller)
        {
            let asked = Asked { job: Arc::clone(&record.job), waits_no_more: None };
            return self.tell(JobNews::Asked(asked, reply));
        }
        let id = waiting.map(|record| record.job.id());
        if let Err(error) = self.has_room(id.is_none(), caller.uid) {
            let _ = reply.send(Err(error));
            return;
        }
        let id = id.unwrap_or_else(|| self.make(kind, store));
        let Some(record) = self.all.get_mut(&id) else { return };
        let waits = CancellationToken::new();
        record.asks.push(Ask { caller, replies: Vec::new(), _waits: waits.clone().drop_guard() });
        let asked = Asked { job: Arc::clone(&record.job), waits_no_more: Some(waits) };
        self.tell(JobNews::Asked(asked, reply));
    }

    fn make(&mut self, kind: Kind, store: &StoreName) -> u64 {
        self.last += 1;
        let job = Arc::new(Job::new(self.last, kind, store.clone()));
        let cancel = self.works.token();
        let record = Record { job, asks: Vec::new(), onlookers: Vec::new(), cancel, told: (0, 0) };
        self.all.insert(self.last, record);
        self.last
    }

    /// Begins the job of a store that waits, if no earlier one of its kind is still at work.
    pub(super) fn begin(
        &mut self,
        kind: Kind,
        store: &StoreName,
        progress: &Arc<Progress>,
        now: Instant,
    ) -> Option<(u64, CancellationToken)> {
        let slot = (kind, store.clone());
        if self.at_work.contains_key(&slot) {
            return None;
        }
        let record = self.all.values().find(|record| record.job.is_waiting() && record.job.is_of(kind, store))?;
        let (job, cancel) = (Arc::clone(&record.job), record.cancel.clone());
        job.begin(Arc::clone(progress));
        self.at_work.insert(slot, job.id());
        self.checks.plan(Check::Progress, now + PACE);
        let id = job.id();
        self.tell(JobNews::Changed(job));
        Some((id, cancel))
    }

    /// The work on jobs.
    pub(super) fn works(&self) -> &Works {
        &self.works
    }

    /// Takes what the work on a job has brought, which counts unless the job is over. `None`: it was called off before it began.
    pub(super) fn came_back(&mut self, id: u64, brought: Option<Result<Findings, String>>, now: Instant) {
        self.at_work.retain(|_, at_work| *at_work != id);
        let Some(Record { job, .. }) = self.all.get(&id) else { return };
        let outcome = match brought {
            Some(Ok(found)) => Ok(found),
            Some(Err(why)) => Err(job.kind().failed(job.store(), why)),
            None => Err(job.cancelled()),
        };
        self.end(id, outcome, now);
    }

    /// Ends a job, if it is not over.
    fn end(&mut self, id: u64, outcome: Result<Findings, Error>, now: Instant) {
        let Some(record) = self.all.get_mut(&id).filter(|record| !record.job.is_over()) else { return };
        record.job.end(outcome.clone());
        record.cancel.cancel();
        answer(record.onlookers.drain(..), &outcome);
        // Whoever waits for the answer has read it with that.
        record.asks.retain_mut(|ask| {
            let has_read = !ask.replies.is_empty();
            answer(ask.replies.drain(..), &outcome);
            !has_read
        });
        let job = Arc::clone(&record.job);
        self.tell(JobNews::Over(job));
        self.checks.plan(Check::Forget(id), now + KEEP);
        self.forget_unwanted(id);
        self.keep_only_so_many();
    }

    /// Ends all jobs of a store.
    pub(super) fn fail_all_of(&mut self, store: &StoreName, error: &Error, now: Instant) {
        let of_store: Vec<u64> =
            self.all.values().filter(|record| record.job.store() == store).map(|record| record.job.id()).collect();
        for id in of_store {
            self.end(id, Err(error.clone()), now);
        }
    }

    /// Tells what a job has found, once it is over. Its askers are told once, root as often as it likes.
    pub(super) fn result(&mut self, id: u64, caller: &Caller, reply: Reply<Findings>) {
        let Some(record) = self.all.get_mut(&id) else {
            let _ = reply.send(Err(Error::NoSuchJob(id)));
            return;
        };
        let asked = record.asks.iter().position(|ask| ask.caller == *caller);
        match (record.job.outcome(), asked) {
            (Some(outcome), Some(asked)) => {
                let _ = reply.send(outcome);
                record.asks.remove(asked);
                self.forget_unwanted(id);
            }
            (None, Some(asked)) => record.asks[asked].replies.push(reply),
            (Some(outcome), None) if caller.uid == 0 => drop(reply.send(outcome)),
            (None, None) if caller.uid == 0 => record.onlookers.push(reply),
            (_, None) => drop(reply.send(Err(Error::NotAsker(id)))),
        }
    }

    /// Has somebody wait for a job no more: the connection if it has asked, else everybody if it is root's, else those of its
    /// user. What nobody waits for any more is cancelled.
    pub(super) fn cancel(&mut self, id: u64, caller: &Caller, now: Instant) -> Result<(), Error> {
        let record = self.all.get(&id).ok_or(Error::NoSuchJob(id))?;
        if record.asks.iter().any(|ask| ask.caller == *caller) {
            self.withdraw(id, |other| other == caller, now);
        } else if caller.uid == 0 {
            self.end(id, Err(record.job.cancelled()), now);
        } else if record.asks.iter().any(|ask| ask.caller.uid == caller.uid) {
            self.withdraw(id, |other| other.uid == caller.uid, now);
        } else {
            return Err(Error::NotAsker(id));
        }
        Ok(())
    }

    /// Takes note that a connection has left the bus.
    pub(super) fn left(&mut self, name: &str, now: Instant) {
        let has_asked = |record: &&Record| record.asks.iter().any(|ask| ask.caller.name == name);
        let of_caller: Vec<u64> = self.all.values().filter(has_asked).map(|record| record.job.id()).collect();
        for id in of_caller {
            self.withdraw(id, |caller| caller.name == name, now);
        }
    }

    fn withdraw(&mut self, id: u64, is_meant: impl Fn(&Caller) -> bool, now: Instant) {
        let Some(record) = self.all.get_mut(&id) else { return };
        let error = record.job.cancelled();
        for ask in record.asks.extract_if(.., |ask| is_meant(&ask.caller)) {
            answer(ask.replies, &Err(error.clone()));
        }
        if record.asks.is_empty() {
            self.end(id, Err(error), now);
            self.forget_unwanted(id);
        }
    }

    /// Forgets a job that is over and whose result nobody is going to read.
    fn forget_unwanted(&mut self, id: u64) {
        if self.all.get(&id).is_some_and(|record| record.job.is_over() && record.asks.is_empty()) {
            self.forget(id);
        }
    }

    fn forget(&mut self, id: u64) {
        self.checks.drop(&Check::Forget(id));
        if self.all.remove(&id).is_some() {
            self.tell(JobNews::Forgotten(id));
        }
    }

    /// When there is something to [`look`](Self::look) at.
    pub(super) fn due(&self) -> Option<Instant> {
        self.checks.next()
    }

    /// Tells how far jobs have come, and forgets those that were kept for long enough.
    pub(super) fn look(&mut self, now: Instant) {
        for check in self.checks.take(now) {
            match check {
                Check::Forget(id) => self.forget(id),
                Check::Progress => self.tell_progress(now),
            }
        }
    }

    fn tell_progress(&mut self, now: Instant) {
        for record in self.all.values_mut().filter(|record| record.job.is_running()) {
            self.checks.plan(Check::Progress, now + PACE);
            let counts = record.job.counts();
            if std::mem::replace(&mut record.told, counts) != counts {
                let _ = self.events.send(Event::Job(JobNews::Changed(Arc::clone(&record.job))));
            }
        }
    }

    /// Ends all jobs and waits for their work, but for what hangs.
    pub(super) async fn shut_down(&mut self) {
        let all: Vec<u64> = self.all.keys().copied().collect();
        for id in all {
            self.end(id, Err(Error::ShuttingDown), Instant::now());
        }
        self.works.join().await;
    }
}

#[cfg(test)]
mod tests;
