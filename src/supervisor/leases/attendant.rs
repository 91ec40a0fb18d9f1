//! Knowing what is in one store, and keeping what it needs of the store underneath.

use std::{
    collections::{HashMap, HashSet},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use layered_stores_model::{Leases, StoreSpec, excerpt};
use layered_stores_nix_db::{
    ObjectName,
    index::protocol::{Answer, EXAMPLES, Objects, Places},
};
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use super::{
    Attended, Report, Tell,
    index::{Indexes, Told, Watching},
    lower::{Claim, LeaseError, Lower},
};

/// How often it is told what is in a store that is changing.
const TELL: Duration = Duration::from_secs(1);

/// How soon what is kept is written to the disk for good.
const WRITE: Duration = Duration::from_secs(2);

/// How much of what an index says is shown, in bytes.
const LONGEST: usize = 500;

/// How soon it is tried again to keep what could not be kept.
const AGAIN: Duration = Duration::from_secs(10);

/// What is still to be done about what is kept.
#[derive(Default)]
struct Owed {
    /// Nothing but this is to be kept.
    only: Option<Arc<HashSet<ObjectName>>>,
    add: HashSet<ObjectName>,
    remove: HashSet<ObjectName>,
}

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
    claim: Claim,
    /// Where objects underneath lie.
    objects: Arc<[PathBuf]>,
    owed: Owed,
    /// Whether the index can be asked.
    is_reachable: bool,
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
        let claim = Claim::take(&lower.state_dir, &attended.spec.name);
        let places = places(&attended.spec, &attended.beneath);
        let objects = places.objects.iter().flat_map(|objects| objects.lowers.clone()).collect();
        Self {
            spec: Arc::clone(&attended.spec),
            lower,
            watching: indexes.watch(attended.uid, places),
            valid: None,
            syncs,
            waiting: HashMap::new(),
            next: 0,
            all: None,
            claim,
            objects,
            owed: Owed::default(),
            is_reachable: true,
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
            Leases::All => self.watch_lower(&indexes).await,
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
                    if !self.is_reachable {
                        continue;
                    }
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
            self.settle().await;
        }
        if self.write_at.is_some_and(|at| at <= now) {
            self.write_at = None;
            if let Err(error) = self.lower.sync(&self.spec.name, &self.claim).await {
                self.will_write();
                self.cannot_keep(error.to_string());
            }
        }
    }

    /// Watches the database of the store underneath, as whoever its state directory belongs to.
    async fn watch_lower(&mut self, indexes: &Indexes) {
        let state_dir = self.lower.state_dir.clone();
        let look = move || {
            let dir = Lower::open(&state_dir)?;
            rustix::fs::fstat(&dir).map(|stat| stat.st_uid).map_err(|errno| LeaseError::Lock(state_dir.clone(), errno))
        };
        match self.lower.blocking(look).await {
            Ok(uid) => {
                let db = self.lower.state_dir.as_path().join("db");
                self.valid = Some(indexes.watch(uid, Places { db, objects: None }));
            }
            Err(error) => self.cannot_keep(error.to_string()),
        }
    }

    /// Hears of the store itself.
    async fn hears(&mut self, told: Told) {
        if self.spec.leases == Leases::Used {
            self.keep_what_is_told(&told).await;
        }
        match told {
            Told::Begun => self.is_reachable = true,
            Told::Answer(Answer::Used { .. }) => {}
            Told::Unreachable(why) => {
                self.is_reachable = false;
                self.report.unreadable = Some(why);
                self.waiting.clear();
            }
            Told::Answer(Answer::State { mut contents, failure, synced, .. }) => {
                // The index says what its user likes.
                contents.lost.truncate(EXAMPLES);
                for lost in &mut contents.lost {
                    lost.referrers.truncate(1);
                }
                self.report.unreadable = failure.map(|failure| excerpt(&failure.message, LONGEST));
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
            Told::Answer(Answer::State { failure: Some(failure), .. }) => {
                self.report.unleased = Some(excerpt(&failure.message, LONGEST));
            }
            Told::Answer(Answer::State { .. }) if self.again_at.is_none() => self.report.unleased = None,
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
            Told::Answer(Answer::State { failure: None, absent: false, .. }) => {
                if let Some(all) = self.all.take() {
                    self.keep_only(all).await;
                }
            }
            Told::Answer(Answer::State { .. }) | Told::Unreachable(_) => {}
        }
    }

    /// Keeps what is used in the lower store.
    async fn keep(&mut self, names: Vec<ObjectName>) {
        for name in names {
            self.owed.remove.remove(&name);
            self.owed.add.insert(name);
        }
        self.settle().await;
    }

    async fn keep_no_longer(&mut self, names: Vec<ObjectName>) {
        for name in names {
            self.owed.add.remove(&name);
            self.owed.remove.insert(name);
        }
        self.settle().await;
    }

    async fn keep_only(&mut self, names: HashSet<ObjectName>) {
        self.owed = Owed { only: Some(Arc::new(names)), ..Owed::default() };
        self.settle().await;
    }

    /// Does what is owed. What fails stays owed.
    async fn settle(&mut self) {
        let result = self.try_settle().await;
        match result {
            Ok(()) => {
                self.again_at = None;
                if self.spec.leases == Leases::Used {
                    self.report.unleased = None;
                }
            }
            // Nothing is lost by what is kept in vain.
            Err(_) if self.spec.leases == Leases::None => self.again_at = Some(Instant::now() + AGAIN),
            Err(error) => self.cannot_keep(error.to_string()),
        }
    }

    async fn try_settle(&mut self) -> Result<(), LeaseError> {
        let name = &self.spec.name;
        if let Some(only) = self.owed.only.clone() {
            let count = if only.is_empty() {
                // A store that uses nothing needs no directory there, and a store that nobody has used none at all.
                match self.lower.drop_all(name, &self.claim).await {
                    Ok(_) => 0,
                    Err(error) if error.is_missing() => 0,
                    Err(error) => return Err(error),
                }
            } else {
                self.lower.keep_only(name, &self.claim, Arc::clone(&only)).await?
            };
            self.report.leases = count;
            self.owed.only = None;
            self.owed.add.extend(only.iter().cloned());
            self.will_write();
        }
        let name = &self.spec.name;
        if !self.owed.add.is_empty() {
            let names: Arc<[ObjectName]> = self.owed.add.iter().cloned().collect();
            self.report.leases += self.lower.add(name, &self.claim, &self.objects, names).await?;
            self.owed.add.clear();
            self.will_write();
        }
        let name = &self.spec.name;
        if !self.owed.remove.is_empty() {
            let names: Arc<[ObjectName]> = self.owed.remove.iter().cloned().collect();
            let count = self.lower.remove(name, &self.claim, names).await?;
            self.report.leases = self.report.leases.saturating_sub(count);
            self.owed.remove.clear();
            self.will_write();
        }
        Ok(())
    }

    fn will_write(&mut self) {
        self.write_at.get_or_insert_with(|| Instant::now() + WRITE);
    }

    fn cannot_keep(&mut self, why: String) {
        self.report.unleased = Some(why);
        self.again_at = Some(Instant::now() + AGAIN);
    }
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
