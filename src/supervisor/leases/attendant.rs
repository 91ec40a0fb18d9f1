//! Knowing what is in one store, and keeping what it needs of the store underneath.

use std::{
    collections::{HashMap, HashSet},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use layered_stores_model::{Leases, StoreSpec};
use layered_stores_nix_db::{
    ObjectName,
    index::protocol::{Answer, Objects, Places},
};
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use super::{
    Attended, Report, Tell,
    index::{Indexes, Told, Watching},
    lower::Lower,
};

/// How often it is told what is in a store that is changing.
const TELL: Duration = Duration::from_secs(1);

/// How soon what is kept is written to the disk for good.
const WRITE: Duration = Duration::from_secs(2);

/// How soon it is tried again to keep what could not be kept.
const AGAIN: Duration = Duration::from_secs(10);

/// What is known of a store, and what is kept for it.
pub(super) struct Attendant {
    spec: Arc<StoreSpec>,
    lower: Arc<Lower>,
    watching: Watching,
    /// The lower store's database, where all that is valid there is kept.
    valid: Option<Watching>,
    syncs: mpsc::Receiver<oneshot::Sender<()>>,
    /// Those who wait for an answer with a number.
    waiting: HashMap<u64, oneshot::Sender<()>>,
    next: u64,
    /// All that is to be kept, while all of it is being told.
    all: Option<HashSet<ObjectName>>,
    /// What is to be kept and could not be.
    owed: HashSet<ObjectName>,
    report: Report,
    tell: Tell,
    /// What was told last, and from when on it may be told again.
    told: Report,
    tell_from: Instant,
    write_at: Option<Instant>,
    again_at: Option<Instant>,
}

impl Attendant {
    /// For a store that lies on `lower`.
    pub(super) fn new(
        attended: &Attended,
        lower: Arc<Lower>,
        indexes: &Indexes,
        syncs: mpsc::Receiver<oneshot::Sender<()>>,
        tell: Tell,
    ) -> Self {
        Self {
            spec: Arc::clone(&attended.spec),
            lower,
            watching: indexes.watch(attended.uid, places(&attended.spec, &attended.beneath)),
            valid: None,
            syncs,
            waiting: HashMap::new(),
            next: 0,
            all: None,
            owed: HashSet::new(),
            report: Report::default(),
            tell,
            told: Report::default(),
            tell_from: Instant::now(),
            write_at: None,
            again_at: None,
        }
    }

    /// Goes on until nobody wants it any more.
    pub(super) async fn attend(mut self, indexes: Indexes) {
        match self.spec.leases {
            Leases::Used => {}
            Leases::All => {
                let db = self.lower.state_dir.as_path().join("db");
                let uid = owner_of(db.join("db.sqlite")).await;
                self.valid = Some(indexes.watch(uid, Places { db, objects: None }));
            }
            // What was kept before.
            Leases::None => self.keep_only(HashSet::new()).await,
        }
        loop {
            let due = [self.tell_at(), self.write_at, self.again_at].into_iter().flatten().min();
            tokio::select! {
                told = self.watching.next() => match told {
                    Some(told) => self.hears(told).await,
                    None => return,
                },
                told = next_of(&mut self.valid) => match told {
                    Some(told) => self.hears_of_lower(told).await,
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
        (self.report != self.told).then_some(self.tell_from)
    }

    async fn due(&mut self) {
        let now = Instant::now();
        if self.tell_at().is_some_and(|at| at <= now) {
            self.tell_from = now + TELL;
            self.told.clone_from(&self.report);
            (self.tell)(&self.spec.name, self.report.clone()).await;
        }
        if self.again_at.is_some_and(|at| at <= now) {
            self.again_at = None;
            self.keep(Vec::new()).await;
        }
        if self.write_at.is_some_and(|at| at <= now) {
            self.write_at = None;
            if let Err(error) = self.lower.sync(&self.spec.name).await {
                self.cannot_keep(error.to_string());
            }
        }
    }

    /// Hears of the store itself.
    async fn hears(&mut self, told: Told) {
        if self.spec.leases == Leases::Used {
            self.keep_what_is_told(&told).await;
        }
        match told {
            Told::Begun | Told::Answer(Answer::Used { .. }) => {}
            Told::Unreachable(why) => {
                self.report.unreadable = Some(why);
                self.waiting.clear();
            }
            Told::Answer(Answer::State { contents, failure, synced, .. }) => {
                self.report.unreadable = failure.map(|failure| failure.message);
                self.report.contents = Some(contents);
                for token in synced {
                    if let Some(done) = self.waiting.remove(&token) {
                        let _ = done.send(());
                    }
                }
            }
        }
    }

    /// Hears of the store underneath, all of which is kept.
    async fn hears_of_lower(&mut self, told: Told) {
        self.keep_what_is_told(&told).await;
        match told {
            Told::Unreachable(why) => self.report.unleased = Some(why),
            Told::Answer(Answer::State { failure: Some(failure), .. }) => self.report.unleased = Some(failure.message),
            Told::Answer(Answer::State { .. }) if self.owed.is_empty() => self.report.unleased = None,
            _ => {}
        }
    }

    /// Keeps what is said to be used, and nothing else once all of it was said.
    async fn keep_what_is_told(&mut self, told: &Told) {
        match told {
            Told::Begun => self.all = Some(HashSet::new()),
            Told::Answer(Answer::Used { added, removed, .. }) => {
                match &mut self.all {
                    Some(all) => {
                        all.extend(added.iter().cloned());
                        for name in removed {
                            all.remove(name);
                        }
                    }
                    None => self.keep_no_longer(removed.clone()).await,
                }
                self.keep(added.clone()).await;
            }
            // What cannot be read now is used as it was.
            Told::Answer(Answer::State { failure: None, .. }) => {
                if let Some(all) = self.all.take() {
                    self.keep_only(all).await;
                }
            }
            Told::Answer(Answer::State { .. }) | Told::Unreachable(_) => {}
        }
    }

    /// Keeps what is used in the lower store.
    async fn keep(&mut self, mut names: Vec<ObjectName>) {
        names.extend(self.owed.drain());
        if names.is_empty() {
            return;
        }
        let names: Arc<[ObjectName]> = names.into();
        match self.lower.add(&self.spec.name, Arc::clone(&names)).await {
            Ok(count) => {
                self.report.leases += count;
                self.report.unleased = None;
                self.will_write();
            }
            Err(error) => {
                self.owed.extend(names.iter().cloned());
                self.cannot_keep(error.to_string());
            }
        }
    }

    async fn keep_no_longer(&mut self, names: Vec<ObjectName>) {
        for name in &names {
            self.owed.remove(name);
        }
        if names.is_empty() {
            return;
        }
        match self.lower.remove(&self.spec.name, names).await {
            Ok(count) => {
                self.report.leases = self.report.leases.saturating_sub(count);
                self.will_write();
            }
            Err(error) => self.cannot_keep(error.to_string()),
        }
    }

    async fn keep_only(&mut self, names: HashSet<ObjectName>) {
        // A store that uses nothing needs no directory there.
        let is_nothing = names.is_empty();
        let kept = match is_nothing {
            true => self.lower.drop_all(&self.spec.name).await.map(|_| 0),
            false => self.lower.keep_only(&self.spec.name, names).await,
        };
        match kept {
            Ok(0) => self.report.leases = 0,
            Ok(count) => {
                self.report.leases = count;
                self.will_write();
            }
            // Nothing is lost by what is kept in vain.
            Err(_) if is_nothing => {}
            Err(error) => self.cannot_keep(error.to_string()),
        }
    }

    fn will_write(&mut self) {
        self.write_at.get_or_insert_with(|| Instant::now() + WRITE);
    }

    fn cannot_keep(&mut self, why: String) {
        self.report.unleased = Some(why);
        self.again_at = Some(Instant::now() + AGAIN);
    }
}

/// Whom a file belongs to; root if nobody knows.
async fn owner_of(path: PathBuf) -> u32 {
    let look = tokio::task::spawn_blocking(move || rustix::fs::lstat(&path).map(|stat| stat.st_uid));
    look.await.map_or(0, |uid| uid.unwrap_or(0))
}

async fn next_of(watching: &mut Option<Watching>) -> Option<Told> {
    match watching {
        Some(watching) => watching.next().await,
        None => std::future::pending().await,
    }
}

/// Where the objects of a store, and those underneath, lie. What is merged is not among them.
fn places(spec: &StoreSpec, beneath: &[Arc<StoreSpec>]) -> Places {
    let lowest = &beneath.last().map_or(spec, |last| last).layers.lower;
    let uppers = beneath.iter().map(|spec| &spec.layers.upper);
    let lowers = uppers.chain([lowest]).map(|dir| dir.as_path().to_owned()).collect();
    let objects = Objects { upper: spec.layers.upper.as_path().to_owned(), lowers };
    Places { db: spec.state_dir.as_path().join("db"), objects: Some(objects) }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
