//! A store underneath: what the stores on it need of it is kept from its garbage collector.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::PathBuf,
    sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use layered_stores_model::{AbsolutePath, StoreName};
use layered_stores_nix_db::{
    ObjectName,
    collector::{self, GcLock},
    roots::{self, Roots, RootsError, TemporaryRoots},
};
use layered_stores_overlay::layers::{self, LayersError};
use rustix::io::Errno;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    sync::Semaphore,
};

use super::turns::Member;

/// How soon a collector is asked again that has its lock and does not answer yet, and how long it may take to take note of a
/// root: it finishes what it is about to delete.
const AGAIN: Duration = Duration::from_millis(10);
const PATIENCE: Duration = Duration::from_secs(600);

/// How much is done at a time in one lower store, and in all: one that hangs takes no threads from the others.
const AT_ONCE: usize = 4;
const IN_ALL: usize = 64;

static THREADS: Semaphore = Semaphore::const_new(IN_ALL);

/// Whose turn it is.
#[derive(Clone, Debug)]
pub(super) enum Turn {
    /// Ours: no collector can begin.
    Ours,
    /// A collector's, or nobody knows yet. It is told of every root, over this connection.
    Collectors(Arc<tokio::sync::Mutex<Option<UnixStream>>>),
}

impl Turn {
    pub(super) fn collectors() -> Self {
        Self::Collectors(Arc::default())
    }
}

/// The right to change what is kept for a store, which is lost to whoever claims it next. What an attendant has begun on a thread may
/// go on when the attendant is gone.
#[derive(Clone, Debug)]
pub(super) struct Claim {
    holder: Arc<Mutex<u64>>,
    number: u64,
}

impl Claim {
    /// Takes it, for a store and the state directory underneath.
    pub(super) fn take(state_dir: &AbsolutePath, store: &StoreName) -> Self {
        type Holders = HashMap<(AbsolutePath, StoreName), Arc<Mutex<u64>>>;
        static HOLDERS: LazyLock<Mutex<Holders>> = LazyLock::new(Mutex::default);
        let mut holders = HOLDERS.lock().unwrap_or_else(PoisonError::into_inner);
        let holder = Arc::clone(holders.entry((state_dir.clone(), store.clone())).or_default());
        drop(holders);
        let mut last = holder.lock().unwrap_or_else(PoisonError::into_inner);
        *last += 1;
        let number = *last;
        drop(last);
        Self { holder, number }
    }

    /// Does something with what is kept, unless somebody else has claimed it. Blocks.
    pub(super) fn with<T: Default>(&self, work: impl FnOnce() -> Result<T, LeaseError>) -> Result<T, LeaseError> {
        let holder = self.holder.lock().unwrap_or_else(PoisonError::into_inner);
        if *holder == self.number { work() } else { Ok(T::default()) }
    }
}

/// Roots in a lower store cannot be had.
#[derive(Debug, thiserror::Error)]
pub(in crate::supervisor) enum LeaseError {
    #[error(transparent)]
    Lower(#[from] LayersError),
    #[error(transparent)]
    Roots(#[from] RootsError),
    #[error("cannot use gc.lock in {0}: {1}")]
    Lock(AbsolutePath, Errno),
    #[error("the work on it failed: {0}")]
    Panic(String),
}

impl LeaseError {
    /// Whether there is no state directory.
    pub(super) fn is_missing(&self) -> bool {
        matches!(self, Self::Lower(LayersError::Sys { errno: Errno::NOENT, .. }))
    }
}

/// A store underneath.
#[derive(Debug)]
pub(super) struct Lower {
    pub(super) state_dir: AbsolutePath,
    turn: Mutex<Turn>,
    /// The stores that lie on it, on whatever level.
    members: Mutex<BTreeMap<StoreName, Member>>,
    /// What processes that work in those stores are about to use, while they cannot say so there.
    temporary: Mutex<Option<TemporaryRoots>>,
    /// The lock of its collector, as long as it is held, for one at a time: who lets a collector in, or who keeps it out because the
    /// collector of the store underneath has its turn.
    pub(super) lock: Arc<tokio::sync::Mutex<Option<Arc<GcLock>>>>,
    places: Arc<Semaphore>,
}

impl Lower {
    pub(super) fn new(state_dir: AbsolutePath) -> Self {
        Self {
            state_dir,
            turn: Mutex::new(Turn::collectors()),
            members: Mutex::default(),
            temporary: Mutex::default(),
            lock: Arc::default(),
            places: Arc::new(Semaphore::new(AT_ONCE)),
        }
    }

    fn turn(&self) -> Turn {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Notes whose turn it is. Who has written a root, and sees then that it was ours, has written it before a collector could
    /// begin.
    pub(super) fn set_turn(&self, turn: Turn) {
        *self.turn.lock().unwrap_or_else(PoisonError::into_inner) = turn;
    }

    /// Does something there on a thread, when it may have one.
    pub(super) async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, LeaseError> + Send + 'static,
    ) -> Result<T, LeaseError> {
        let _place = self.places.acquire().await;
        blocking(work).await
    }

    pub(super) fn members(&self) -> MutexGuard<'_, BTreeMap<StoreName, Member>> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its state directory. Blocks.
    pub(super) fn open(state_dir: &AbsolutePath) -> Result<OwnedFd, LeaseError> {
        Ok(layers::open_lower_state(state_dir)?)
    }

    /// Does something with the roots of a store, on a thread.
    async fn with_roots<T: Default + Send + 'static>(
        &self,
        store: &StoreName,
        claim: &Claim,
        work: impl FnOnce(&Roots) -> Result<T, RootsError> + Send + 'static,
    ) -> Result<T, LeaseError> {
        let (state_dir, store, claim) = (self.state_dir.clone(), store.clone(), claim.clone());
        let work = move || {
            claim.with(|| {
                let roots = Roots::open(Self::open(&state_dir)?, store.as_str())?;
                Ok(work(&roots)?)
            })
        };
        self.blocking(work).await
    }

    /// Keeps paths from its collector for a store, as far as they are in one of its directories of objects: what is not there needs
    /// no root, and nobody is to fill the lower store with them. How many were not kept before.
    pub(super) async fn add(
        &self,
        store: &StoreName,
        claim: &Claim,
        objects: &Arc<[PathBuf]>,
        names: Arc<[ObjectName]>,
    ) -> Result<u64, LeaseError> {
        let (added, objects) = (Arc::clone(&names), Arc::clone(objects));
        let add = move |roots: &Roots| {
            let dirs: Vec<_> = objects.iter().filter_map(|dir| roots::open_dir(dir).ok()).collect();
            let (mut count, mut error) = (0, None);
            for name in added.iter().filter(|name| dirs.iter().any(|dir| roots::has(dir, name))) {
                match roots.add(name) {
                    Ok(is_new) => count += u64::from(is_new),
                    Err(why) => error = error.or(Some(why)),
                }
            }
            error.map_or(Ok(count), Err)
        };
        let count = self.with_roots(store, claim, add).await?;
        if let Turn::Collectors(connection) = self.turn() {
            for name in &*names {
                if !self.tell_collector(&connection, name).await {
                    break;
                }
            }
        }
        Ok(count)
    }

    /// Keeps paths no longer. How many were kept.
    pub(super) async fn remove(
        &self,
        store: &StoreName,
        claim: &Claim,
        names: Arc<[ObjectName]>,
    ) -> Result<u64, LeaseError> {
        let remove = move |roots: &Roots| {
            let mut count = 0;
            for name in &*names {
                count += u64::from(roots.remove(name)?);
            }
            Ok(count)
        };
        self.with_roots(store, claim, remove).await
    }

    /// Keeps nothing but these. How many of them are kept already.
    pub(super) async fn keep_only(
        &self,
        store: &StoreName,
        claim: &Claim,
        names: Arc<HashSet<ObjectName>>,
    ) -> Result<u64, LeaseError> {
        let keep = move |roots: &Roots| {
            let kept = roots.list()?;
            for name in kept.difference(&names) {
                roots.remove(name)?;
            }
            Ok(u64::try_from(kept.intersection(&names).count()).unwrap_or(u64::MAX))
        };
        self.with_roots(store, claim, keep).await
    }

    /// Has what is kept be kept over a power cut.
    pub(super) async fn sync(&self, store: &StoreName, claim: &Claim) -> Result<(), LeaseError> {
        self.with_roots(store, claim, Roots::sync).await
    }

    /// Keeps nothing for a store. Whether anything was kept.
    pub(super) async fn drop_all(&self, store: &StoreName, claim: &Claim) -> Result<bool, LeaseError> {
        let (state_dir, store, claim) = (self.state_dir.clone(), store.clone(), claim.clone());
        self.blocking(move || claim.with(|| Ok(Roots::drop_all(Self::open(&state_dir)?, store.as_str())?))).await
    }

    /// Keeps a path from its collector for as long as the turn of a collector lasts. Whoever asks goes on when this has returned.
    pub(super) async fn add_temporary(self: &Arc<Self>, name: ObjectName) -> Result<(), LeaseError> {
        let (lower, names) = (Arc::clone(self), HashSet::from([name.clone()]));
        // First: a collector opens its socket before it reads what is kept, so who finds no socket has written early enough.
        let written = self.blocking(move || lower.write_temporary(&names)).await;
        match self.turn() {
            Turn::Ours => written,
            Turn::Collectors(connection) => {
                let is_told = self.tell_collector(&connection, &name).await;
                if is_told { Ok(()) } else { written }
            }
        }
    }

    /// The same of many, before a collector has its turn. Blocks.
    pub(super) fn write_temporary(&self, names: &HashSet<ObjectName>) -> Result<(), LeaseError> {
        let mut temporary = self.temporary.lock().unwrap_or_else(PoisonError::into_inner);
        let roots = match &mut *temporary {
            Some(roots) => roots,
            none => none.insert(TemporaryRoots::make(Self::open(&self.state_dir)?)?),
        };
        Ok(roots.add(names)?)
    }

    /// Those who have asked have told Nix by themselves now. Blocks.
    pub(super) fn drop_temporary(&self) {
        let temporary = self.temporary.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(temporary);
    }

    /// Tells the collector of a root, and waits until it has taken note. Whether it has: if there is none any more, the next one reads
    /// what is kept by itself.
    async fn tell_collector(&self, connection: &tokio::sync::Mutex<Option<UnixStream>>, name: &ObjectName) -> bool {
        let mut connection = connection.lock().await;
        loop {
            // Taken out: whoever gives up in between leaves an answer behind that is nobody else's.
            if let Ok(stream) = self.tell_once(connection.take(), name).await {
                *connection = Some(stream);
                return true;
            }
            match self.is_collecting().await {
                Ok(true) => tokio::time::sleep(AGAIN).await,
                // What cannot be found out is not waited for.
                Ok(false) | Err(_) => return false,
            }
        }
    }

    async fn tell_once(&self, stream: Option<UnixStream>, name: &ObjectName) -> io::Result<UnixStream> {
        let mut stream = match stream {
            Some(stream) => stream,
            None => {
                let state_dir = self.state_dir.clone();
                let connect = move || {
                    let dir = Self::open(&state_dir)?;
                    collector::connect(dir.as_fd()).map_err(|error| LeaseError::Panic(error.to_string()))
                };
                let stream = self.blocking(connect).await.map_err(io::Error::other)?;
                stream.set_nonblocking(true)?;
                UnixStream::from_std(stream)?
            }
        };
        let answer = async {
            stream.write_all(format!("/nix/store/{name}\n").as_bytes()).await?;
            stream.read_u8().await
        };
        match tokio::time::timeout(PATIENCE, answer).await {
            Ok(Ok(b'1')) => Ok(stream),
            Ok(Ok(_)) => Err(io::ErrorKind::InvalidData.into()),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    /// Whether a collector has its turn, by its lock.
    async fn is_collecting(&self) -> Result<bool, LeaseError> {
        let state_dir = self.state_dir.clone();
        let look = move || {
            let lock_error = |errno| LeaseError::Lock(state_dir.clone(), errno);
            let lock = GcLock::open(Self::open(&state_dir)?).map_err(lock_error)?;
            // Held for a moment together with others, as Nix itself does.
            lock.try_share().map(|shared| !shared).map_err(lock_error)
        };
        self.blocking(look).await
    }
}

/// Does something on a thread.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, LeaseError> + Send + 'static,
) -> Result<T, LeaseError> {
    let place = THREADS.acquire().await;
    let work = move || {
        // It is there until the thread is, whoever waits for it.
        let _place = place;
        work()
    };
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(LeaseError::Panic(error.to_string())))
}
