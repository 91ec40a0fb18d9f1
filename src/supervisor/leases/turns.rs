//! Taking turns with the collector of a store underneath.
//!
//! As a rule the turn is ours: its lock is held together with whoever else adds roots, and a collector that wants to begin waits.
//! That is noticed, and before the collector gets its turn, all that the stores on it refer to is kept: what their databases say
//! now, and what processes are about to use. While the collector works, Nix in those stores asks here instead, by the lock and
//! the socket that it would use if its own collector ran, and goes on when this collector has taken note.

use std::{
    io,
    mem::MaybeUninit,
    os::fd::{AsFd as _, OwnedFd},
    sync::{Arc, Weak},
    time::Duration,
};

use futures_util::future::join_all;
use layered_stores_model::StoreSpec;
use layered_stores_nix_db::{
    ObjectName,
    collector::{self, GcLock, Listening},
    roots,
};
use layered_stores_overlay::host;
use rustix::{
    fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags},
    io::Errno,
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader, Interest},
    net::{UnixListener, UnixStream},
    sync::{OwnedMutexGuard, mpsc, oneshot},
    task::JoinSet,
    time::Instant,
};

use super::{
    Lowers,
    lower::{LeaseError, Lower, Turn, blocking},
};

/// How long a collector may be kept waiting, for what is done before its turn. What is not done by then is made good after it.
const HOLD: Duration = Duration::from_millis(80);

/// When it is looked, after somebody has opened the lock, whether they wait for it: a collector does a moment later.
const LOOKS: [u64; 9] = [0, 1, 2, 5, 10, 20, 50, 200, 500];

/// How often it is looked without a reason: nothing would tell of one that was missed.
const EVERY: Duration = Duration::from_secs(60);

/// How soon it is tried again to have the lock where that cannot be had.
const LATER: Duration = Duration::from_secs(30);

/// How long a collector that was let in may take to take its lock: one that is woken is seen nowhere until then.
const TAKE: Duration = Duration::from_millis(500);

/// How long whoever asks waits until all is kept that is in the store's database by then.
const SYNC: Duration = Duration::from_secs(2);

/// How many processes of one store may ask at a time, and the longest that they may ask, in bytes.
const CLIENTS: usize = 256;
const LONGEST: u64 = 512;

/// A store that lies on another, as far as turns go.
#[derive(Clone, Debug)]
pub(super) struct Member {
    pub(super) spec: Arc<StoreSpec>,
    /// Has all be kept that its database says by now, and answers then.
    pub(super) sync: mpsc::Sender<oneshot::Sender<()>>,
}

/// Takes turns for as long as somebody else has the lower store.
pub(super) async fn take_turns(lower: Weak<Lower>, lowers: Lowers) {
    let mut is_said = false;
    loop {
        let Some(strong) = lower.upgrade() else { return };
        match begin(&strong).await {
            Ok(lock) => {
                is_said = false;
                drop(strong);
                let ended = go_on(&lower, &lowers, lock).await;
                let Some(strong) = lower.upgrade() else { return };
                strong.set_turn(Turn::collectors());
                *strong.lock.lock().await = None;
                let Err(error) = ended else { return };
                tracing::warn!("taking turns with a garbage collector has to begin anew: {error}");
            }
            Err(error) => {
                // A lower store that Nix has never used has no collector.
                if !error.is_missing() && !std::mem::replace(&mut is_said, true) {
                    let dir = &strong.state_dir;
                    tracing::warn!(
                        "the garbage collector of {dir} may take what was first used while it runs: {error}"
                    );
                }
                // Nobody waits for whoever cannot be had.
                strong.set_turn(Turn::Ours);
            }
        }
        tokio::time::sleep(LATER).await;
    }
}

/// Waits until the turn is ours.
async fn begin(lower: &Arc<Lower>) -> Result<Arc<GcLock>, LeaseError> {
    let state_dir = lower.state_dir.clone();
    let lock_error = |errno| LeaseError::Lock(state_dir.clone(), errno);
    let dir = lower.state_dir.clone();
    let lock = blocking(move || {
        let fail = |errno| LeaseError::Lock(dir.clone(), errno);
        Ok(Arc::new(GcLock::open(Lower::open(&dir)?).map_err(fail)?))
    })
    .await?;
    wait_for(&lock).await?.map_err(lock_error)?;
    lower.set_turn(Turn::Ours);
    *lower.lock.lock().await = Some(Arc::clone(&lock));
    Ok(lock)
}

/// Waits for a lock, on a thread of its own: it may take hours.
async fn wait_for(lock: &Arc<GcLock>) -> Result<Result<(), Errno>, LeaseError> {
    let (lock, (done, is_done)) = (Arc::clone(lock), oneshot::channel());
    let wait = move || {
        let _ = done.send(lock.share());
    };
    std::thread::Builder::new().spawn(wait).map_err(|error| LeaseError::Panic(error.to_string()))?;
    is_done.await.map_err(|error| LeaseError::Panic(error.to_string()))
}

/// Lets collectors in, one after the other.
async fn go_on(lower: &Weak<Lower>, lowers: &Lowers, lock: Arc<GcLock>) -> io::Result<()> {
    let path = lock.as_path();
    // The path leads to what this process has open, in whatever namespace.
    let watch = move || -> Result<OwnedFd, Errno> {
        let queue = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        inotify::add_watch(
            &queue,
            path,
            WatchFlags::OPEN | WatchFlags::ATTRIB | WatchFlags::DELETE_SELF | WatchFlags::MOVE_SELF,
        )?;
        Ok(queue)
    };
    let queue = tokio::task::spawn_blocking(watch).await.map_err(io::Error::other)??;
    let opened = host::readiness(queue, Interest::READABLE)?;
    loop {
        let news = tokio::time::timeout(EVERY, opened.readable()).await;
        let Some(strong) = lower.upgrade() else { return Ok(()) };
        if let Ok(ready) = news {
            ready?.clear_ready();
            if is_gone(opened.get_ref())? {
                return Err(io::Error::other("somebody has taken the lock away"));
            }
        }
        let mut looks = LOOKS.iter();
        while let Some(pause) = looks.next() {
            tokio::time::sleep(Duration::from_millis(*pause)).await;
            if is_waited_for(&lock).await? {
                // Not while it is kept out for the sake of the store underneath.
                let _alone = strong.lock.lock().await;
                take_turn(&strong, lowers, &lock).await?;
                // Of another one that waits nothing tells any more.
                looks = LOOKS.iter();
            }
        }
    }
}

/// What happens to a lock that is not where it was, or may not be: one that is deleted while it is open loses a name.
const GONE: ReadFlags =
    ReadFlags::ATTRIB.union(ReadFlags::DELETE_SELF).union(ReadFlags::MOVE_SELF).union(ReadFlags::IGNORED);

/// Reads what there is. Whether the lock is not where it was.
fn is_gone(queue: &OwnedFd) -> io::Result<bool> {
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut reader = inotify::Reader::new(queue, &mut buffer);
    loop {
        match reader.next() {
            Ok(event) if event.events().intersects(GONE) => {
                return Ok(true);
            }
            Ok(_) => {}
            Err(Errno::AGAIN) => return Ok(false),
            Err(errno) => return Err(errno.into()),
        }
    }
}

async fn is_waited_for(lock: &Arc<GcLock>) -> io::Result<bool> {
    let lock = Arc::clone(lock);
    let holders = tokio::task::spawn_blocking(move || lock.holders()).await.map_err(io::Error::other)??;
    Ok(holders.waiting)
}

/// Lets a collector in that waits, and waits until it is done.
async fn take_turn(lower: &Arc<Lower>, lowers: &Lowers, lock: &Arc<GcLock>) -> io::Result<()> {
    let began = Instant::now();
    let by = began + HOLD;
    let members: Vec<_> = lower.members().values().cloned().collect();
    let _temporary = Temporary(Arc::clone(lower));
    let mut serving = JoinSet::new();
    // One after the other for each store, and all stores at once: one that does not answer takes nothing from the others.
    let prepare = |member: &Member| {
        let (lower, member) = (Arc::clone(lower), member.clone());
        let own = lowers.known(&member.spec.state_dir);
        async move {
            let spec = Arc::clone(&member.spec);
            let guard = async {
                let held = match &own {
                    Some(own) => Some(Arc::clone(&own.lock).lock_owned().await),
                    None => None,
                };
                blocking(move || Guard::take(&lower, &spec, own.zip(held), by.into_std())).await
            };
            let guard = tokio::time::timeout_at(by, guard).await;
            let _ = tokio::time::timeout_at(by, sync(&member)).await;
            (member, guard)
        }
    };
    let mut guards = Vec::new();
    for (member, guarded) in join_all(members.iter().map(prepare)).await {
        let name = &member.spec.name;
        match guarded {
            Ok(Ok(guard)) => {
                match guard.listening.as_ref().map(|listening| listening.listener.try_clone()).transpose() {
                    Ok(Some(listener)) => drop(serving.spawn(serve(listener, Arc::clone(lower), member.clone()))),
                    Ok(None) => continue,
                    Err(error) => {
                        tracing::warn!(store = %name, "{name}: not held during a garbage collection: {error}");
                        continue;
                    }
                }
                guards.push(guard);
            }
            // Its own collector runs, or its filesystem takes its time.
            Ok(Err(error)) => tracing::info!(store = %name, "{name}: not held during a garbage collection: {error}"),
            Err(_) => tracing::info!(store = %name, "{name}: not held during a garbage collection in time"),
        }
    }
    // Before the lock is let go: who sees later that the turn was ours has written before.
    lower.set_turn(Turn::collectors());
    release(lock).await?;
    let held = began.elapsed();
    let held_us = u64::try_from(held.as_micros()).unwrap_or(u64::MAX);
    tracing::info!(
        held_us,
        stores = members.len(),
        "a garbage collection of {} begins; it was held for {} ms",
        lower.state_dir,
        held.as_millis()
    );
    has_begun(lock).await?;
    wait_for(lock).await.map_err(io::Error::other)??;
    lower.set_turn(Turn::Ours);
    serving.shutdown().await;
    tokio::task::spawn_blocking(move || drop(guards)).await.map_err(io::Error::other)?;
    tracing::info!("the garbage collection of {} has ended after {} ms", lower.state_dir, began.elapsed().as_millis());
    Ok(())
}

/// What is kept for as long as a collection lasts.
struct Temporary(Arc<Lower>);

impl Drop for Temporary {
    fn drop(&mut self) {
        let lower = Arc::clone(&self.0);
        tokio::task::spawn_blocking(move || lower.drop_temporary());
    }
}

async fn release(lock: &Arc<GcLock>) -> io::Result<()> {
    let lock = Arc::clone(lock);
    tokio::task::spawn_blocking(move || lock.release()).await.map_err(io::Error::other)?.map_err(Into::into)
}

/// Waits until the collector that was let in has the lock. It may have been ended meanwhile.
async fn has_begun(lock: &Arc<GcLock>) -> io::Result<()> {
    let until = Instant::now() + TAKE;
    while Instant::now() < until {
        let seen = Arc::clone(lock);
        let holders = tokio::task::spawn_blocking(move || seen.holders()).await.map_err(io::Error::other)??;
        if holders.alone {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    Ok(())
}

/// Has all be kept that a store's database says by now.
async fn sync(member: &Member) {
    let (done, is_done) = oneshot::channel();
    if member.sync.send(done).await.is_ok() {
        let _ = is_done.await;
    }
}

/// The lock of a store's collector that is held for the stores on it, had by one at a time.
type Held = OwnedMutexGuard<Option<Arc<GcLock>>>;

/// A store whose processes ask here what is to be kept.
struct Guard {
    lock: Arc<GcLock>,
    /// It is held here already, together with others, for the sake of stores on it.
    held: Option<(Arc<Lower>, Held)>,
    listening: Option<Listening>,
}

impl Guard {
    /// Takes the lock of a store's own collector and opens its socket, and keeps what its processes have said by then. Blocks, but for
    /// a filesystem only until `by`.
    fn take(
        lower: &Lower,
        spec: &StoreSpec,
        held: Option<(Arc<Lower>, Held)>,
        by: std::time::Instant,
    ) -> Result<Self, LeaseError> {
        let fail = |errno| LeaseError::Lock(spec.state_dir.clone(), errno);
        let dir = Lower::open(&spec.state_dir)?;
        let held = held.filter(|(_, held)| held.is_some());
        let lock = match held.as_ref().and_then(|(_, held)| held.as_ref()) {
            Some(lock) => Arc::clone(lock),
            None => Arc::new(GcLock::open(&dir).map_err(fail)?),
        };
        let mut guard = Self { lock, held, listening: None };
        guard.lock_in_time(by).map_err(fail)?;
        let listening = collector::listen(dir.as_fd());
        let listening = listening.map_err(|error| fail(Errno::from_io_error(&error).unwrap_or(Errno::IO)))?;
        guard.listening = Some(listening);
        // What they have said by now; what cannot be read is no reason to have them wait.
        let temporary = roots::temporary(&dir).unwrap_or_default();
        if !temporary.is_empty() {
            lower.write_temporary(&temporary)?;
        }
        Ok(guard)
    }

    /// Processes that add a root hold it for a moment.
    fn lock_in_time(&mut self, by: std::time::Instant) -> Result<(), Errno> {
        while !self.lock.try_take()? {
            // With that it is not held together with others any more (flock(2)).
            if self.held.is_some() && !self.lock.try_share()? {
                self.wait_for_collector();
                return Err(Errno::AGAIN);
            }
            if std::time::Instant::now() >= by {
                return Err(Errno::AGAIN);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// The store's own collector has begun in between, without a turn.
    fn wait_for_collector(&mut self) {
        let (Some((own, held)), lock) = (self.held.take(), Arc::clone(&self.lock)) else { return };
        own.set_turn(Turn::collectors());
        let wait = move || {
            let _held = held;
            let _ = lock.share();
            own.set_turn(Turn::Ours);
        };
        // Where there is no thread for it, it stays told of every root.
        let _ = std::thread::Builder::new().spawn(wait);
    }
}

/// Gives all of it back, whoever has let go of it.
impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(listening) = self.listening.take() {
            listening.end();
        }
        // Who has waited for it is let in next; else it is let go with the file.
        if self.held.is_some() {
            let _ = self.lock.share();
        }
    }
}

/// Answers the processes that work in one store.
async fn serve(listener: std::os::unix::net::UnixListener, lower: Arc<Lower>, member: Member) {
    let listener = match listener.set_nonblocking(true).and_then(|()| UnixListener::from_std(listener)) {
        Ok(listener) => listener,
        Err(error) => return tracing::warn!("cannot answer in the place of a garbage collector: {error}"),
    };
    let mut clients = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if clients.len() < CLIENTS => match accepted {
                Ok((stream, _)) => drop(clients.spawn(answer(stream, Arc::clone(&lower), member.clone()))),
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            },
            Some(_) = clients.join_next() => {}
        }
    }
}

/// Answers one process: a path a line, and a `1` for each that is kept.
async fn answer(mut stream: UnixStream, lower: Arc<Lower>, member: Member) {
    let (reader, mut writer) = stream.split();
    let mut reader = BufReader::new(reader);
    loop {
        let mut line = String::new();
        match (&mut reader).take(LONGEST).read_line(&mut line).await {
            Ok(length) if length > 0 && line.ends_with('\n') => {}
            _ => return,
        }
        // Whatever else it is, it is nothing of the store underneath.
        if let Ok(name) = ObjectName::in_path(line.trim_end())
            && let Err(error) = lower.add_temporary(name).await
        {
            // Nix takes a connection that ends for a collector that does, and begins anew at once.
            tokio::time::sleep(Duration::from_millis(100)).await;
            return tracing::warn!("a root for the garbage collector of {} was not kept: {error}", lower.state_dir);
        }
        // What the process has found valid before is in the database, and is not asked for one by one: of a derivation it says that
        // it is about to use that, and means what that refers to.
        let _ = tokio::time::timeout(SYNC, sync(&member)).await;
        if writer.write_all(b"1").await.is_err() {
            return;
        }
    }
}
