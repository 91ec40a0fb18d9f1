//! The threads on which work touches the filesystems of stores, in PID 1's mount namespace.
//!
//! A system call on a filesystem that does not answer lasts until it does, and nothing cuts it off: whoever has asked a FUSE
//! server that has read the question waits even with SIGKILL (`request_wait_answer` in the kernel's fs/fuse/dev.c). So what
//! counts is that nobody else waits with it:
//!
//! * Nothing here is called on the loop, and no lock is held meanwhile.
//! * Work that gets no further for [`STALL`] gives its place to others.
//! * For what lies on the same filesystem, only so much stalls at a time; the rest waits for some of it to come back.
//! * Work says what it touches ([`progress`](layered_stores_overlay::progress)), and the engine tells people when that does not
//!   answer for [`DEADLINE`]. When the work comes back, however late, its result counts as if it had been quick.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read as _, Seek as _},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use layered_stores_model::StoreSpec;
use layered_stores_overlay::{
    mountinfo::MountTable,
    progress::{Progress, Spot},
};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use super::operation::OperationError;

// Work on one store that panics must not take the daemon from the others.
#[cfg(not(panic = "unwind"))]
compile_error!("layered-storesd needs `panic = \"unwind\"`");

/// How many threads there are at most. Next to all of them exist only while that many filesystems hang.
pub const THREADS: usize = 256;

/// How long a filesystem may take to answer until the store counts as stuck: longer than a disk that was asleep or has much
/// to write, shorter than the minute that Nix's hook waits. It is counted from the last answer; work that gets ahead may
/// take as long as it needs.
pub(super) const DEADLINE: Duration = Duration::from_secs(10);

/// How long work that gets no further keeps its place.
const STALL: Duration = Duration::from_secs(1);

/// How much is done at a time that takes milliseconds, and how much that looks at every path of a store.
const QUICK: usize = 8;
const LONG: usize = 4;

/// How many jobs look at a time. They have places of their own, or who may begin some would have everybody else's looks wait for
/// theirs.
const JOBS: usize = 2;

/// How much asks the name service at a time of what nobody waits for. It keeps its place until it is answered: of a name service that
/// does not answer there are no more threads than this.
const ASKING: usize = 2;

/// How much may stall at a time of stores on the same filesystems, and of all: the rest of the threads is for stores on
/// filesystems on which nothing has stalled.
const STALLED_TOGETHER: usize = 16;
const STALLED: usize = THREADS * 3 / 4;

/// Mounts of which at least one does not answer.
type Suspects = Vec<u64>;

/// All threads.
#[derive(Clone, Debug)]
pub(super) struct Threads(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    quick: Arc<Semaphore>,
    long: Arc<Semaphore>,
    jobs: Arc<Semaphore>,
    asking: Semaphore,
    /// How much has stalled, by what may be to blame.
    stalled: Mutex<HashMap<Suspects, usize>>,
    came_back: Notify,
    /// The mount table of PID 1's namespace.
    mounts: Mutex<File>,
}

impl Threads {
    /// Opens what is needed on one of the threads.
    pub(super) async fn new() -> io::Result<Self> {
        // Read later from elsewhere, it goes on showing the namespace of the thread that has opened it.
        let mounts = tokio::task::spawn_blocking(|| File::open("/proc/thread-self/mountinfo")).await??;
        Ok(Self(Arc::new(Inner {
            quick: Arc::new(Semaphore::new(QUICK)),
            long: Arc::new(Semaphore::new(LONG)),
            jobs: Arc::new(Semaphore::new(JOBS)),
            asking: Semaphore::new(ASKING),
            stalled: Mutex::default(),
            came_back: Notify::new(),
            mounts: Mutex::new(mounts),
        })))
    }

    /// Something that is to be done about a store.
    pub(super) fn errand(&self, spec: Arc<StoreSpec>) -> Errand {
        self.errand_with(spec, Arc::default())
    }

    /// The same, followed by somebody else as well.
    pub(super) fn errand_with(&self, spec: Arc<StoreSpec>, progress: Arc<Progress>) -> Errand {
        Errand { spec, progress, threads: self.clone() }
    }

    /// Where the filesystem is mounted that a path lies on, by the mount table's text: the path is not touched.
    pub(super) fn mount_point_of(&self, path: &Path) -> Option<String> {
        let table = self.table(&[path]).ok()?;
        table.leads_to(path.to_str()?).map(|(point, _)| point.to_owned())
    }

    fn table(&self, paths: &[&Path]) -> io::Result<MountTable> {
        let mut text = Vec::new();
        let mut file = lock(&self.0.mounts);
        file.rewind()?;
        file.read_to_end(&mut text)?;
        drop(file);
        let is_of_interest = |point: &str| paths.iter().any(|path| path.starts_with(point));
        Ok(MountTable::parse(&String::from_utf8_lossy(&text), is_of_interest))
    }

    /// The mounts that some directories lie on.
    fn mounts_of(&self, paths: &[&Path]) -> Vec<u64> {
        let Ok(table) = self.table(paths) else { return Vec::new() };
        let mount_of = |path: &&Path| Some(table.leads_to(path.to_str()?)?.1.id);
        let mut mounts: Vec<u64> = paths.iter().filter_map(mount_of).collect();
        mounts.sort_unstable();
        mounts.dedup();
        mounts
    }

    /// What may be to blame for work on a store that has stalled somewhere.
    fn suspects(&self, spec: &StoreSpec, at: Option<Spot>) -> Suspects {
        let layers = &spec.layers;
        let [lower, upper, root] = [&layers.lower, &layers.upper, &spec.root].map(|dir| dir.as_path());
        match at {
            Some(Spot::Lower) => self.mounts_of(&[lower]),
            // The filesystem of an ephemeral store is its own and lies in memory: nobody shares that fate, and it answers.
            _ if spec.ephemeral.is_some() => self.mounts_of(&[lower]),
            Some(Spot::Upper | Spot::Work) => self.mounts_of(&[upper]),
            Some(Spot::Root) => self.mounts_of(&[root]),
            Some(Spot::Merged) => self.mounts_of(&[lower, upper]),
            _ => self.mounts_of(&[lower, upper, root]),
        }
    }

    /// Whether so much has stalled for what a store lies on as well that more is not begun.
    fn are_taken(&self, spec: &StoreSpec) -> bool {
        if lock(&self.0.stalled).is_empty() {
            return false;
        }
        let mounts = self.suspects(spec, None);
        let stalled = lock(&self.0.stalled);
        let all: usize = stalled.values().sum();
        let most = if all >= STALLED { 1 } else { STALLED_TOGETHER };
        // Only where all that may be to blame is the store's as well: what lies on a disk that answers is not to wait for what
        // lies on that and on something else.
        let is_shared = |suspects: &Suspects| !suspects.is_empty() && suspects.iter().all(|of| mounts.contains(of));
        stalled.iter().any(|(suspects, count)| *count >= most && is_shared(suspects))
    }

    fn stall(&self, spec: &StoreSpec, at: Option<Spot>) -> Stalled {
        let suspects = self.suspects(spec, at);
        *lock(&self.0.stalled).entry(suspects.clone()).or_default() += 1;
        Stalled { suspects, threads: self.clone() }
    }
}

/// Work that has stalled and is counted.
struct Stalled {
    suspects: Suspects,
    threads: Threads,
}

impl Drop for Stalled {
    fn drop(&mut self) {
        let mut stalled = lock(&self.threads.0.stalled);
        if let Some(count) = stalled.get_mut(&self.suspects) {
            *count -= 1;
            if *count == 0 {
                stalled.remove(&self.suspects);
            }
        }
        drop(stalled);
        self.threads.0.came_back.notify_waiters();
    }
}

/// Something that is done about one store, a piece of work after the other.
#[derive(Clone, Debug)]
pub(super) struct Errand {
    pub(super) spec: Arc<StoreSpec>,
    pub(super) progress: Arc<Progress>,
    threads: Threads,
}

impl Errand {
    /// Does work that takes milliseconds, if the filesystems answer.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, OperationError> + Send + 'static,
    ) -> Result<T, OperationError> {
        self.run_in(&self.threads.0.quick, work).await
    }

    /// Does work that may ask the name service and that nobody waits for.
    pub(super) async fn run_asking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, OperationError> + Send + 'static,
    ) -> Result<T, OperationError> {
        let place = self.threads.0.asking.acquire().await;
        let mut done = std::pin::pin!(self.run(work));
        tokio::select! {
            biased;
            done = &mut done => return done,
            // What hangs elsewhere has nothing to do with the others.
            () = self.stalls_elsewhere() => drop(place),
        }
        done.await
    }

    /// Waits until work has got no further for [`STALL`], and not for the name service.
    async fn stalls_elsewhere(&self) {
        loop {
            self.stalls().await;
            match self.progress.spot() {
                Some((Spot::Accounts, _)) => tokio::time::sleep(STALL).await,
                _ => return,
            }
        }
    }

    /// Does work that may look at every path of a store.
    pub(super) async fn run_long<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, OperationError> + Send + 'static,
    ) -> Result<T, OperationError> {
        self.run_in(&self.threads.0.long, work).await
    }

    /// Does the work of a job.
    pub(super) async fn run_job<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, OperationError> + Send + 'static,
    ) -> Result<T, OperationError> {
        self.run_in(&self.threads.0.jobs, work).await
    }

    async fn run_in<T: Send + 'static>(
        &self,
        places: &Arc<Semaphore>,
        work: impl FnOnce() -> Result<T, OperationError> + Send + 'static,
    ) -> Result<T, OperationError> {
        let place = self.place(places).await;
        // From here on it counts, even if there is no thread left that could begin.
        self.progress.mark(Spot::Elsewhere);
        let progress = Arc::clone(&self.progress);
        let mut thread = tokio::task::spawn_blocking(move || progress.follow(work));
        let done = tokio::select! {
            biased;
            done = &mut thread => done,
            () = self.stalls() => {
                drop(place);
                let at = self.progress.spot().map(|(spot, _)| spot);
                let _stalled = self.threads.stall(&self.spec, at);
                thread.await
            }
        };
        done.unwrap_or_else(|error| Err(OperationError::Panic(error.to_string())))
    }

    /// Waits until the store may have a thread.
    async fn place(&self, places: &Arc<Semaphore>) -> Option<OwnedSemaphorePermit> {
        let mut waits = false;
        loop {
            let came_back = self.threads.0.came_back.notified();
            tokio::pin!(came_back);
            came_back.as_mut().enable();
            if !self.threads.are_taken(&self.spec) {
                self.progress.rest();
                waits = false;
                let place = Arc::clone(places).acquire_owned().await.ok();
                // Meanwhile some more may have stalled.
                if !self.threads.are_taken(&self.spec) {
                    return place;
                }
            }
            if !std::mem::replace(&mut waits, true) {
                self.progress.mark(Spot::Others);
            }
            came_back.await;
        }
    }

    /// Waits until work that was begun has got no further for [`STALL`].
    async fn stalls(&self) {
        loop {
            let since = self.progress.spot().map_or_else(Instant::now, |(_, since)| since);
            let at = since + STALL;
            if at <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(at.into()).await;
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that holds it can panic halfway through a change.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use layered_stores_model::fixture;

    fn spec(name: &str, lower: &str) -> Arc<StoreSpec> {
        Arc::new(fixture::spec(name, lower))
    }

    #[tokio::test]
    async fn work_that_panics_takes_nobody_with_it() {
        let threads = Threads::new().await.expect("threads");
        let errand = threads.errand(spec("a", "/lower"));
        for _ in 0..QUICK + 1 {
            let error = errand.run::<()>(|| panic!("a test panics")).await.expect_err("a panic").to_string();
            assert!(error.contains("please report it") && error.contains("a test panics"), "{error}");
            assert_eq!(errand.progress.spot(), None);
        }
        assert!(matches!(errand.run(|| Ok(7)).await, Ok(7)));
    }

    #[tokio::test]
    async fn jobs_keep_nobody_from_looks_that_take_as_long() {
        let threads = Threads::new().await.expect("threads");
        let errand = threads.errand(spec("a", "/lower"));
        let (go_on, waits) = mpsc::channel::<()>();
        let waits = Arc::new(Mutex::new(waits));
        let mut jobs = tokio::task::JoinSet::new();
        for _ in 0..LONG + JOBS {
            let (waits, job) = (Arc::clone(&waits), threads.errand(spec("b", "/lower")));
            let work = move || {
                // Something that gets on.
                while lock(&waits).recv_timeout(Duration::from_millis(5)) == Err(mpsc::RecvTimeoutError::Timeout) {
                    layered_stores_overlay::progress::at(Spot::Lower);
                }
                Ok(())
            };
            jobs.spawn(async move { job.run_job(work).await });
        }
        while threads.0.jobs.available_permits() > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let looked = tokio::time::timeout(DEADLINE, errand.run_long(|| Ok(7))).await;
        assert!(matches!(looked, Ok(Ok(7))));
        drop(go_on);
        while let Some(done) = jobs.join_next().await {
            assert!(matches!(done, Ok(Ok(()))), "each has its turn");
        }
    }

    #[tokio::test]
    async fn what_hangs_is_counted_by_what_is_to_blame_and_not_by_what_else_a_store_has() {
        let threads = Threads::new().await.expect("threads");
        let with = |lower: &str, upper: &str| {
            let mut spec = fixture::spec("a", lower);
            spec.layers.upper = upper.parse().expect("valid");
            spec
        };
        // /proc, /sys and /dev are mounts on every machine.
        let (on_sys, on_dev) = (with("/proc/hangs", "/sys/up"), with("/proc/hangs", "/dev/up"));
        let healthy = with("/lower", "/sys/up");
        let stalled: Vec<_> = (0..STALLED_TOGETHER).map(|_| threads.stall(&on_sys, Some(Spot::Lower))).collect();
        assert!(threads.are_taken(&on_sys) && threads.are_taken(&on_dev) && !threads.are_taken(&healthy));
        drop(stalled);
        let merged: Vec<_> = (0..STALLED).map(|_| threads.stall(&on_sys, Some(Spot::Merged))).collect();
        assert!(threads.are_taken(&on_sys) && !threads.are_taken(&healthy), "it may be either of the two");
        drop(merged);
        assert!(!threads.are_taken(&on_sys) && lock(&threads.0.stalled).is_empty());
        let ephemeral = |name: &str| {
            let text = format!("[stores.{name}]\nlower-store = \"/proc/hangs\"\nephemeral-size = \"1G\"\n");
            fixture::declared("/dev", &text).pop().expect("declared")
        };
        let spots = [Spot::Lower, Spot::Upper, Spot::Root, Spot::Merged, Spot::Elsewhere].into_iter().map(Some);
        let _stalled: Vec<_> = spots.map(|at| threads.stall(&ephemeral("a"), at)).collect();
        assert_eq!(lock(&threads.0.stalled).len(), 1, "its own filesystem is not to blame");
        assert!(lock(&threads.0.stalled).contains_key(&threads.suspects(&ephemeral("b"), None)));
    }

    #[tokio::test]
    async fn who_asks_keeps_a_place_from_others_only_while_the_name_service_does_not_answer() {
        let threads = Threads::new().await.expect("threads");
        for (spot, is_free) in [(Spot::Lower, true), (Spot::Accounts, false)] {
            let (go_on, waits) = mpsc::channel::<()>();
            let waits = Arc::new(Mutex::new(waits));
            let mut hung = tokio::task::JoinSet::new();
            for _ in 0..ASKING {
                let (waits, errand) = (Arc::clone(&waits), threads.errand(spec("a", "/lower")));
                let work = move || {
                    layered_stores_overlay::progress::at(spot);
                    let _ = lock(&waits).recv();
                    Ok(())
                };
                hung.spawn(async move { errand.run_asking(work).await });
            }
            while threads.0.asking.available_permits() > 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            let other = threads.errand(spec("b", "/lower"));
            let asked = tokio::time::timeout(STALL * 3, other.run_asking(|| Ok(7))).await;
            assert_eq!(matches!(asked, Ok(Ok(7))), is_free, "{spot:?}");
            drop(go_on);
            while let Some(done) = hung.join_next().await {
                assert!(matches!(done, Ok(Ok(()))));
            }
        }
    }

    #[tokio::test]
    async fn work_that_hangs_leaves_threads_to_others() {
        let threads = Threads::new().await.expect("threads");
        // /proc is a mount on every machine, so the two lie on different filesystems.
        let (hanging, healthy) = (spec("a", "/proc/hangs"), spec("b", "/lower"));
        let (go_on, waits) = mpsc::channel::<()>();
        let waits = Arc::new(Mutex::new(waits));
        let errands: Vec<Errand> = (0..STALLED_TOGETHER * 2).map(|_| threads.errand(Arc::clone(&hanging))).collect();
        let mut hung = tokio::task::JoinSet::new();
        for errand in errands.clone() {
            let waits = Arc::clone(&waits);
            let work = move || {
                layered_stores_overlay::progress::at(Spot::Lower);
                let _ = lock(&waits).recv();
                Ok(())
            };
            hung.spawn(async move { errand.run(work).await });
        }
        let is_at = |wanted| {
            errands.iter().filter(|errand| matches!(errand.progress.spot(), Some((spot, _)) if spot == wanted)).count()
        };
        while is_at(Spot::Lower) < STALLED_TOGETHER || is_at(Spot::Others) == 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        // The last places are free again once the work that has them has stalled as well.
        assert!(matches!(threads.errand(healthy).run(|| Ok(7)).await, Ok(7)));
        assert!(is_at(Spot::Lower) < STALLED_TOGETHER + QUICK, "{} at a time", is_at(Spot::Lower));

        drop(go_on);
        while let Some(done) = hung.join_next().await {
            assert!(matches!(done, Ok(Ok(()))), "what hung comes to its end");
        }
        assert!(lock(&threads.0.stalled).is_empty());
    }
}
