//! Knowing what is in one store, and keeping what it needs of the store underneath.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use layered_stores_model::{StoreName, StoreSpec};
use layered_stores_nix_db::{
    ObjectName,
    index::protocol::{Answer, Places},
};
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use super::{
    Attended, Report, Tell,
    index::{Indexes, Told, Watching},
    lower::{LeaseError, Lower},
};

/// How often it is told what is in a store that is changing.
const TELL: Duration = Duration::from_secs(1);

/// How soon what is kept is written to the disk for good.
const WRITE: Duration = Duration::from_secs(2);

/// How soon it is tried again to keep what could not be kept.
const AGAIN: Duration = Duration::from_secs(30);

/// What is known of a store, and what is kept for it.
pub(super) struct Attendant {
    name: StoreName,
    lower: Option<Arc<Lower>>,
    watching: Watching,
    syncs: mpsc::Receiver<oneshot::Sender<()>>,
    /// Those who wait for an answer with a number.
    waiting: HashMap<u64, oneshot::Sender<()>>,
    next: u64,
    /// All that is used, while all of it is being told.
    all: Option<HashSet<ObjectName>>,
    /// What is used and could not be kept.
    owed: HashSet<ObjectName>,
    report: Report,
    tell: Tell,
    /// From when on it may be told again.
    tell_from: Instant,
    is_told: bool,
    write_at: Option<Instant>,
    again_at: Option<Instant>,
}

impl Attendant {
    /// For a store that lies on `lower`, if anything is to be kept there.
    pub(super) fn new(
        attended: &Attended,
        lower: Option<Arc<Lower>>,
        indexes: &Indexes,
        syncs: mpsc::Receiver<oneshot::Sender<()>>,
        tell: Tell,
    ) -> Self {
        Self {
            name: attended.spec.name.clone(),
            lower,
            watching: indexes.watch(attended.uid, places(&attended.spec, &attended.beneath)),
            syncs,
            waiting: HashMap::new(),
            next: 0,
            all: None,
            owed: HashSet::new(),
            report: Report::default(),
            tell,
            tell_from: Instant::now(),
            is_told: true,
            write_at: None,
            again_at: None,
        }
    }

    /// Goes on until nobody wants it any more.
    pub(super) async fn attend(mut self) {
        loop {
            let due = [self.tell_at(), self.write_at, self.again_at].into_iter().flatten().min();
            tokio::select! {
                told = self.watching.next() => match told {
                    Some(told) => self.hears(told).await,
                    None => return,
                },
                Some(done) = self.syncs.recv() => {
                    self.next += 1;
                    self.waiting.insert(self.next, done);
                    self.watching.sync(self.next);
                }
                () = sleep_until(due) => self.due().await,
            }
        }
    }

    fn tell_at(&self) -> Option<Instant> {
        (!self.is_told).then_some(self.tell_from)
    }

    async fn due(&mut self) {
        let now = Instant::now();
        if self.tell_at().is_some_and(|at| at <= now) {
            (self.is_told, self.tell_from) = (true, now + TELL);
            (self.tell)(&self.name, self.report.clone()).await;
        }
        if self.again_at.is_some_and(|at| at <= now) {
            self.again_at = None;
            self.keep(Vec::new()).await;
        }
        if self.write_at.is_some_and(|at| at <= now) {
            self.write_at = None;
            if let Some(lower) = self.lower.clone()
                && let Err(error) = lower.sync(&self.name).await
            {
                self.cannot_keep(&error);
            }
        }
    }

    async fn hears(&mut self, told: Told) {
        let before = self.report.clone();
        match told {
            Told::Begun => self.all = Some(HashSet::new()),
            Told::Unreachable(why) => {
                self.report.unreadable = Some(why);
                self.waiting.clear();
            }
            Told::Answer(Answer::Used { added, removed, .. }) => {
                if let Some(all) = &mut self.all {
                    all.extend(added.iter().cloned());
                    for name in &removed {
                        all.remove(name);
                    }
                }
                self.keep(added).await;
                if self.all.is_none() {
                    self.keep_no_longer(removed).await;
                }
            }
            Told::Answer(Answer::State { contents, failure, synced, .. }) => {
                self.report.unreadable = failure.map(|failure| failure.message);
                self.report.contents = Some(contents);
                // What cannot be read now is used as it was.
                if self.report.unreadable.is_none()
                    && let Some(all) = self.all.take()
                {
                    self.keep_only(all).await;
                }
                for token in synced {
                    if let Some(done) = self.waiting.remove(&token) {
                        let _ = done.send(());
                    }
                }
            }
        }
        self.is_told &= self.report == before;
    }

    /// Keeps what is used in the lower store.
    async fn keep(&mut self, mut names: Vec<ObjectName>) {
        names.extend(self.owed.drain());
        let Some(lower) = self.lower.clone().filter(|_| !names.is_empty()) else { return };
        let names: Arc<[ObjectName]> = names.into();
        match lower.add(&self.name, Arc::clone(&names)).await {
            Ok(count) => {
                self.report.leases += count;
                self.report.unleased = None;
                self.will_write();
            }
            Err(error) => {
                self.owed.extend(names.iter().cloned());
                self.cannot_keep(&error);
            }
        }
    }

    async fn keep_no_longer(&mut self, names: Vec<ObjectName>) {
        for name in &names {
            self.owed.remove(name);
        }
        let Some(lower) = self.lower.clone().filter(|_| !names.is_empty()) else { return };
        match lower.remove(&self.name, names).await {
            Ok(count) => {
                self.report.leases = self.report.leases.saturating_sub(count);
                self.will_write();
            }
            Err(error) => self.cannot_keep(&error),
        }
    }

    async fn keep_only(&mut self, names: HashSet<ObjectName>) {
        let Some(lower) = self.lower.clone() else { return };
        // A store that uses nothing needs no directory there.
        let kept = match names.is_empty() {
            true => lower.drop_all(&self.name).await.map(|_| 0),
            false => lower.keep_only(&self.name, names).await,
        };
        match kept {
            Ok(count) => {
                self.report.leases = count;
                self.will_write();
            }
            Err(error) => self.cannot_keep(&error),
        }
    }

    fn will_write(&mut self) {
        self.write_at.get_or_insert_with(|| Instant::now() + WRITE);
    }

    fn cannot_keep(&mut self, error: &LeaseError) {
        let why = error.to_string();
        self.is_told &= self.report.unleased.as_ref() == Some(&why);
        self.report.unleased = Some(why);
        self.again_at = Some(Instant::now() + AGAIN);
    }
}

/// Where the objects of a store, and those underneath, lie. What is merged is not among them.
fn places(spec: &StoreSpec, beneath: &[Arc<StoreSpec>]) -> Places {
    let lowest = &beneath.last().map_or(spec, |last| last).layers.lower;
    let uppers = beneath.iter().map(|spec| &spec.layers.upper);
    let lowers = uppers.chain([lowest]).map(|dir| dir.as_path().to_owned()).collect();
    Places { db: spec.state_dir.as_path().join("db"), upper: spec.layers.upper.as_path().to_owned(), lowers }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
