//! A store underneath: what the stores on it need of it is kept from its garbage collector.

use std::{
    collections::{BTreeMap, HashSet},
    io,
    os::fd::{AsFd as _, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use layered_stores_model::{AbsolutePath, StoreName};
use layered_stores_nix_db::{
    ObjectName,
    collector::{self, GcLock},
    roots::{Roots, RootsError, TemporaryRoots},
};
use layered_stores_overlay::layers::{self, LayersError};
use rustix::io::Errno;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    sync::RwLock,
};

use super::turns::Member;

/// How soon a collector is asked again that has its lock and does not answer yet, and how long it may take to take note of a
/// root: it finishes what it is about to delete.
const AGAIN: Duration = Duration::from_millis(10);
const PATIENCE: Duration = Duration::from_secs(600);

/// Whose turn it is.
#[derive(Debug)]
pub(super) enum Turn {
    /// Ours: no collector can begin.
    Ours,
    /// A collector's, or nobody knows yet. It is told of every root.
    Collectors(tokio::sync::Mutex<Option<UnixStream>>),
}

impl Turn {
    pub(super) fn collectors() -> Self {
        Self::Collectors(tokio::sync::Mutex::new(None))
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
    pub(super) turn: RwLock<Turn>,
    /// The stores that lie on it, on whatever level.
    members: Mutex<BTreeMap<StoreName, Member>>,
    /// What processes that work in those stores are about to use, while they cannot say so there.
    temporary: Mutex<Option<TemporaryRoots>>,
    /// The lock of its collector, as long as it is held, for one at a time: who lets a collector in, or who keeps it out because the
    /// collector of the store underneath has its turn.
    pub(super) lock: Arc<tokio::sync::Mutex<Option<Arc<GcLock>>>>,
}

impl Lower {
    pub(super) fn new(state_dir: AbsolutePath) -> Self {
        let turn = RwLock::new(Turn::collectors());
        Self { state_dir, turn, members: Mutex::default(), temporary: Mutex::default(), lock: Arc::default() }
    }

    pub(super) fn members(&self) -> MutexGuard<'_, BTreeMap<StoreName, Member>> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its state directory. Blocks.
    pub(super) fn open(state_dir: &AbsolutePath) -> Result<OwnedFd, LeaseError> {
        Ok(layers::open_lower_state(state_dir)?)
    }

    /// Does something with the roots of a store, on a thread.
    async fn with_roots<T: Send + 'static>(
        &self,
        store: &StoreName,
        work: impl FnOnce(&Roots) -> Result<T, RootsError> + Send + 'static,
    ) -> Result<T, LeaseError> {
        let (state_dir, store) = (self.state_dir.clone(), store.clone());
        blocking(move || {
            let roots = Roots::open(Self::open(&state_dir)?, store.as_str())?;
            Ok(work(&roots)?)
        })
        .await
    }

    /// Keeps paths from its collector for a store. How many were not kept before.
    pub(super) async fn add(&self, store: &StoreName, names: Arc<[ObjectName]>) -> Result<u64, LeaseError> {
        // A turn does not end in between.
        let turn = self.turn.read().await;
        let added = Arc::clone(&names);
        let count = self.with_roots(store, move |roots| {
            let mut count = 0;
            for name in &*added {
                count += u64::from(roots.add(name)?);
            }
            Ok(count)
        });
        let count = count.await?;
        if let Turn::Collectors(connection) = &*turn {
            for name in &*names {
                self.tell_collector(connection, name).await;
            }
        }
        Ok(count)
    }

    /// Keeps paths no longer. How many were kept.
    pub(super) async fn remove(&self, store: &StoreName, names: Vec<ObjectName>) -> Result<u64, LeaseError> {
        let remove = move |roots: &Roots| {
            let mut count = 0;
            for name in &names {
                count += u64::from(roots.remove(name)?);
            }
            Ok(count)
        };
        self.with_roots(store, remove).await
    }

    /// Keeps nothing but these, which are kept already. How many that are.
    pub(super) async fn keep_only(&self, store: &StoreName, names: HashSet<ObjectName>) -> Result<u64, LeaseError> {
        let keep = move |roots: &Roots| {
            for name in roots.list()?.difference(&names) {
                roots.remove(name)?;
            }
            Ok(u64::try_from(names.len()).unwrap_or(u64::MAX))
        };
        self.with_roots(store, keep).await
    }

    /// Has what is kept be kept over a power cut.
    pub(super) async fn sync(&self, store: &StoreName) -> Result<(), LeaseError> {
        self.with_roots(store, Roots::sync).await
    }

    /// Keeps nothing for a store. Whether anything was kept.
    pub(super) async fn drop_all(&self, store: &StoreName) -> Result<bool, LeaseError> {
        let (state_dir, store) = (self.state_dir.clone(), store.clone());
        blocking(move || Ok(Roots::drop_all(Self::open(&state_dir)?, store.as_str())?)).await
    }

    /// Keeps a path from its collector for as long as the turn of a collector lasts. Whoever asks goes on when this has returned.
    pub(super) async fn add_temporary(self: &Arc<Self>, name: ObjectName) -> Result<(), LeaseError> {
        let turn = self.turn.read().await;
        let (lower, names) = (Arc::clone(self), HashSet::from([name.clone()]));
        // First: a collector opens its socket before it reads what is kept, so who finds no socket has written early enough.
        blocking(move || lower.write_temporary(&names)).await?;
        if let Turn::Collectors(connection) = &*turn {
            self.tell_collector(connection, &name).await;
        }
        Ok(())
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

    /// Tells the collector of a root, and waits until it has taken note; or until there is none any more: then the next one reads
    /// what is kept by itself.
    async fn tell_collector(&self, connection: &tokio::sync::Mutex<Option<UnixStream>>, name: &ObjectName) {
        let mut connection = connection.lock().await;
        loop {
            match self.tell_once(&mut connection, name).await {
                Ok(()) => return,
                Err(_) => *connection = None,
            }
            match self.is_collecting().await {
                Ok(true) => tokio::time::sleep(AGAIN).await,
                // What cannot be found out is not waited for.
                Ok(false) | Err(_) => return,
            }
        }
    }

    async fn tell_once(&self, connection: &mut Option<UnixStream>, name: &ObjectName) -> io::Result<()> {
        let stream = match connection {
            Some(stream) => stream,
            none => {
                let state_dir = self.state_dir.clone();
                let stream = blocking(move || {
                    let dir = Self::open(&state_dir)?;
                    collector::connect(dir.as_fd()).map_err(|error| LeaseError::Panic(error.to_string()))
                });
                let stream = stream.await.map_err(io::Error::other)?;
                stream.set_nonblocking(true)?;
                none.insert(UnixStream::from_std(stream)?)
            }
        };
        let answer = async {
            stream.write_all(format!("/nix/store/{name}\n").as_bytes()).await?;
            stream.read_u8().await
        };
        match tokio::time::timeout(PATIENCE, answer).await {
            Ok(Ok(b'1')) => Ok(()),
            Ok(Ok(_)) => Err(io::ErrorKind::InvalidData.into()),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    /// Whether a collector has its turn, by its lock.
    async fn is_collecting(&self) -> Result<bool, LeaseError> {
        let state_dir = self.state_dir.clone();
        blocking(move || {
            let lock_error = |errno| LeaseError::Lock(state_dir.clone(), errno);
            let lock = GcLock::open(Self::open(&state_dir)?).map_err(lock_error)?;
            // Held for a moment together with others, as Nix itself does.
            lock.try_share().map(|shared| !shared).map_err(lock_error)
        })
        .await
    }
}

/// Does something on a thread.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, LeaseError> + Send + 'static,
) -> Result<T, LeaseError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(LeaseError::Panic(error.to_string())))
}
