//! The way to the engine for everybody else.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
    sync::{Arc, PoisonError, RwLock},
};

use layered_stores_model::{AbsolutePath, StoreName, excerpt};
use layered_stores_overlay::remove::{self, LeftOver};
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use super::{
    Error,
    entry::Reply,
    jobs::{JobCommand, JobNews},
    leases::Report,
    status::{Status, StatusCell},
    threads::DEADLINE,
};
use crate::systemd::SocketState;

/// Who asks for a refresh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asker {
    /// Root: nobody is kept from what they could do by themselves.
    Root,
    /// A user, who may if the store is theirs. Whose it is turns out when it is up.
    User(u32),
    /// Somebody who was allowed to.
    Allowed,
}

/// Something the engine is asked to do.
#[derive(Debug)]
pub enum Command {
    /// Bring a store up, and those it lies on.
    Start(StoreName, Reply),
    /// Take a store down.
    Stop(StoreName, Reply),
    /// Refresh a store's merged view now.
    Remount(StoreName, Asker, Reply),
    /// Something about a job.
    Job(JobCommand),
    /// Remove what is in a store that is not mounted, or what is left of one.
    RemoveData(StoreName, Reply),
    /// Read the configuration again.
    Reload(Reply),
    /// How the sockets of Nix daemons were when that was asked, after one has changed. The engine tells it itself.
    Sockets(Instant, BTreeMap<StoreName, SocketState>),
    /// What was found in a store. The engine tells it itself.
    Found(StoreName, Box<Report>),
}

/// Something that happened, for those who tell others.
#[derive(Debug)]
pub enum Event {
    /// There is a new store.
    Added(StatusCell),
    /// A store's status changed.
    Changed {
        /// The status before.
        old: Box<Status>,
        /// The status now.
        cell: StatusCell,
    },
    /// A store is gone.
    Removed(StoreName),
    /// There is news of a job.
    Job(JobNews),
    /// How all stores are has changed.
    Summary {
        /// One line for people.
        summary: String,
    },
    /// All stores are where they should be or were given up on, for the first time since the start or a reload.
    Settled {
        /// One line for people.
        summary: String,
    },
}

/// All stores, for looking them up.
#[derive(Debug, Default)]
pub(super) struct Registry {
    pub(super) by_name: BTreeMap<StoreName, StatusCell>,
    pub(super) by_path: HashMap<String, StoreName>,
    /// The directories of stores and all above them, where a mount decides about what a path leads to.
    pub(super) on_the_way: HashSet<String>,
}

/// The way to the engine for everybody else.
#[derive(Clone, Debug)]
pub struct Handle {
    commands: mpsc::Sender<Command>,
    registry: Arc<RwLock<Registry>>,
    /// The directory that holds one for each store. Who looks into it holds the lock: if it does not answer, one waits for it.
    stores: Arc<tokio::sync::Mutex<AbsolutePath>>,
}

impl Handle {
    pub(super) fn new(commands: mpsc::Sender<Command>, registry: Arc<RwLock<Registry>>, stores: AbsolutePath) -> Self {
        Self { commands, registry, stores: Arc::new(tokio::sync::Mutex::new(stores)) }
    }

    /// What is left of stores that are not declared any more.
    ///
    /// # Errors
    /// [`Error::ListFailed`].
    pub async fn left_over(&self) -> Result<Vec<LeftOver>, Error> {
        let failed = |why: &dyn fmt::Display| Error::ListFailed(why.to_string());
        let list = async {
            let stores = Arc::clone(&self.stores).lock_owned().await;
            // Whoever comes meanwhile waits for the lock, and not on a thread of their own.
            tokio::task::spawn_blocking(move || remove::list(&stores)).await
        };
        let listed = tokio::time::timeout(DEADLINE, list).await.map_err(|_| {
            let seconds = DEADLINE.as_secs();
            failed(&format_args!(
                "the directory of the stores has not answered for {seconds} s; see to the filesystem of the daemon's state \
                 directory"
            ))
        })?;
        let mut all = listed.map_err(|error| failed(&error))?.map_err(|error| failed(&error))?;
        let specs: Vec<_> = self.stores().iter().map(|cell| cell.read(|status| Arc::clone(&status.spec))).collect();
        all.retain(|left| {
            remove::is_half_removed(left) || !specs.iter().any(|spec| spec.is_of(&left.name, &left.directory))
        });
        Ok(all)
    }

    /// The published status of all stores, by name.
    pub fn stores(&self) -> Vec<StatusCell> {
        self.registry.read().unwrap_or_else(PoisonError::into_inner).by_name.values().cloned().collect()
    }

    /// The published status of a store.
    ///
    /// # Errors
    /// [`Error::NoSuchStore`].
    pub fn store(&self, name: &str) -> Result<StatusCell, Error> {
        let registry = self.registry.read().unwrap_or_else(PoisonError::into_inner);
        registry.by_name.get(name).cloned().ok_or_else(|| Error::NoSuchStore(excerpt(name, StoreName::MAX_LEN)))
    }

    /// The published status of the store with a real store dir.
    ///
    /// # Errors
    /// [`Error::NoStoreAtPath`].
    pub fn store_at(&self, real_store_dir: &str) -> Result<StatusCell, Error> {
        let registry = self.registry.read().unwrap_or_else(PoisonError::into_inner);
        let path = real_store_dir.trim_end_matches('/');
        let name = registry.by_path.get(path);
        let unknown = || Error::NoStoreAtPath(excerpt(real_store_dir, AbsolutePath::MAX_LEN));
        name.and_then(|name| registry.by_name.get(name)).cloned().ok_or_else(unknown)
    }

    /// Whether a user owns a store, or may turn out to.
    pub fn may_be_owner(&self, uid: u32) -> bool {
        self.stores().iter().any(|cell| cell.read(|status| status.may_be_owner(uid)))
    }

    /// Sends a command that has no answer.
    pub async fn tell(&self, command: Command) {
        // An engine that is gone needs to know nothing.
        let _ = self.commands.send(command).await;
    }

    /// Sends a command and awaits its answer.
    ///
    /// # Errors
    /// Whatever the engine answers; [`Error::ShuttingDown`] when it is gone.
    pub async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, Error> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.map_err(|_| Error::ShuttingDown)?;
        answer.await.map_err(|_| Error::ShuttingDown)?
    }
}
