//! The way to the engine for everybody else.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, PoisonError, RwLock},
};

use tokio::sync::{mpsc, oneshot};

use super::{
    Error,
    entry::Reply,
    status::{Status, StatusCell},
};
use crate::{overlay::probe::Stale, store::StoreName};

/// Something the engine is asked to do.
#[derive(Debug)]
pub enum Command {
    /// Bring a store up, and those it lies on.
    Start(StoreName, Reply),
    /// Take a store down.
    Stop(StoreName, Reply),
    /// Refresh a store's merged view now.
    Remount(StoreName, Reply),
    /// Look at all paths of a store.
    Verify(StoreName, Reply<Vec<Stale>>),
    /// Read the configuration again.
    Reload(Reply),
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
    /// A start or a reload is under way.
    Progress {
        /// How many stores are active so far.
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
}

/// The way to the engine for everybody else.
#[derive(Clone, Debug)]
pub struct Handle {
    commands: mpsc::Sender<Command>,
    registry: Arc<RwLock<Registry>>,
}

impl Handle {
    pub(super) fn new(commands: mpsc::Sender<Command>, registry: Arc<RwLock<Registry>>) -> Self {
        Self { commands, registry }
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
        registry.by_name.get(name).cloned().ok_or_else(|| Error::NoSuchStore(name.to_owned()))
    }

    /// The published status of the store with a real store dir.
    ///
    /// # Errors
    /// [`Error::NoStoreAtPath`].
    pub fn store_at(&self, real_store_dir: &str) -> Result<StatusCell, Error> {
        let registry = self.registry.read().unwrap_or_else(PoisonError::into_inner);
        let path = real_store_dir.trim_end_matches('/');
        let name = registry.by_path.get(path).ok_or_else(|| Error::NoStoreAtPath(real_store_dir.to_owned()))?;
        registry.by_name.get(name).cloned().ok_or_else(|| Error::NoStoreAtPath(real_store_dir.to_owned()))
    }

    /// Whether a user owns a store.
    pub fn is_owner(&self, uid: u32) -> bool {
        self.stores().iter().any(|cell| cell.read(|status| status.owner_uid == uid))
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
