//! What the engine works with: everything outside of it, as far as it changes or can fail.
//!
//! The engine decides, and a machine carries out. There are two of them: the [`Host`], and one that is simulated, on which
//! tests drive the engine through thousands of orders of events that no real machine would show.

mod host;

use std::{
    collections::HashMap,
    fmt::Debug,
    io,
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
};

pub use host::{Host, Settings};
use layered_stores_model::{
    AbsolutePath, MountUnitName, StoreName, StoreSpec,
    config::{Config, ConfigError},
};
use layered_stores_overlay::{
    mountinfo::MountTable,
    place::MountId,
    progress::{Progress, Spot},
    refresh::{Changes, Fingerprint, Report, Rung},
    swap::{OldMount, OldSuperblock, RetireError},
};
use rustix::io::Errno;
use tokio::{
    sync::{mpsc::WeakSender, watch},
    time::Instant,
};

use super::{
    handle::Command,
    jobs::{Findings, Kind},
    leases::Stores,
    looks::{Look, Sight},
    operation::{Held, OperationError, Up},
    owed::Aim,
    record::{Known, RecordError},
};

/// Something that is there later.
pub(super) type Later<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// What keeps others from an upper layer for as long as it is held.
pub(super) type Guard = Box<dyn Debug + Send>;

/// Something that is being done about a store.
pub(super) struct Begun<T> {
    /// How far it has come, for as long as it goes on.
    pub(super) progress: Arc<dyn Follow>,
    /// What it brings.
    pub(super) result: Later<'static, T>,
}

/// How far something has come that is being done about a store.
pub(super) trait Follow: Debug + Send + Sync {
    /// What it waits for, and since when; `None` while it waits for nothing.
    fn waits_for(&self) -> Option<(Spot, Instant)>;
}

impl Follow for Progress {
    fn waits_for(&self) -> Option<(Spot, Instant)> {
        self.spot().map(|(spot, since)| (spot, since.into()))
    }
}

/// A mount that was swapped out, and goes on taking writes until it is retired.
pub(super) trait SwappedOut: Debug + Send + Sync {
    /// By what it is kept over the end of a daemon.
    fn number(&self) -> u64;

    /// Has it take no more writes. May block.
    fn retire(&self) -> Result<OldSuperblock, RetireError>;
}

impl SwappedOut for OldMount {
    fn number(&self) -> u64 {
        Self::number(self)
    }

    fn retire(&self) -> Result<OldSuperblock, RetireError> {
        Self::retire(self)
    }
}

/// What a refresh is to do, and what is known of the store.
#[derive(Debug)]
pub(super) struct Refreshing {
    pub(super) aim: Aim,
    /// The step it goes no further than.
    pub(super) to: Rung,
    /// The fingerprint on record, if this run of the daemon has put it there.
    pub(super) kept: Option<Fingerprint>,
    /// The store's mount, if it is known.
    pub(super) mount: Option<MountId>,
    /// The stores that lie on it.
    pub(super) above: Vec<Arc<StoreSpec>>,
}

/// What a refresh has brought: a report, and what it has swapped out.
pub(super) type Refreshed = (Result<Report, OperationError>, Option<Arc<dyn SwappedOut>>);

/// What an operation has brought.
pub(super) type Operated<T> = Begun<Result<T, OperationError>>;

/// What the engine works with.
///
/// What looks answers at once. What does something is [begun](Begun), may never come to an end, and can be begun again wherever
/// it was interrupted.
pub(super) trait Machine: Debug + Send + Sync {
    /// The mount table, as far as mount points are of interest.
    fn mounts(&self, is_of_interest: &dyn Fn(&str) -> bool) -> io::Result<MountTable>;

    /// Waits until the mount table has changed since the last time it was waited for.
    fn mounts_changed(&self) -> Later<'_, io::Result<()>>;

    /// Waits until there is something of layers to [read](Self::changes).
    fn layers_changed(&self) -> Later<'_, io::Result<()>>;

    /// What has changed of the layers of stores, and whether there is more than was read.
    fn changes(&self) -> Result<(HashMap<StoreName, Changes>, bool), Errno>;

    /// All that has changed up to now, as far as it may concern a store.
    fn changes_of(&self, name: &StoreName) -> Result<HashMap<StoreName, Changes>, Errno>;

    /// Looks into the stores that are up, and tells the engine what is found.
    fn attend(&self, stores: watch::Receiver<Stores>, engine: WeakSender<Command>) -> Later<'static, ()>;

    /// Tells the engine how the sockets of Nix daemons are, each time one has changed.
    fn watch_sockets(&self, engine: WeakSender<Command>) -> Later<'static, ()>;

    /// Has them looked at once more.
    fn look_at_sockets(&self);

    /// Whether a mount unit is the daemon's own.
    fn is_ours(&self, unit: &MountUnitName) -> bool;

    /// Whether a mount that is in use can be replaced.
    fn can_swap(&self) -> bool;

    /// How many superblocks that swaps have left somebody holds.
    fn left(&self, name: &StoreName) -> usize;

    /// Where the filesystem is mounted that a path lies on, found without touching the path.
    fn mount_point_of(&self, path: &Path) -> Option<String>;

    /// The directory of the records, for messages.
    fn records(&self) -> PathBuf;

    /// The configuration as it is now.
    fn configuration(&self) -> Later<'static, Result<Config, ConfigError>>;

    /// What earlier runs have left, of stores that are `declared` and of others.
    fn recall(&self, declared: Vec<StoreSpec>) -> Later<'static, Result<Known, RecordError>>;

    /// The stores that somebody has asked to be up, or down, since the boot. Unlike [what else was left](Self::recall) it is there
    /// at once.
    fn asked(&self) -> HashMap<StoreName, bool>;

    /// Keeps whether somebody has asked for a store to be up, or down, for the daemons until the next boot; `None`: it is to be as
    /// declared.
    fn keep_asked(&self, name: &StoreName, up: Option<bool>);

    /// What earlier runs have swapped out. To be asked once.
    fn swapped_out(&self) -> Vec<(StoreName, Arc<dyn SwappedOut>)>;

    /// Brings a store up that is not mounted.
    fn start(&self, spec: &Arc<StoreSpec>, lock: Option<Guard>) -> Operated<Up>;

    /// Looks whether a store could most likely come up that is up in another way. Nothing is changed.
    fn look_ahead(&self, spec: &Arc<StoreSpec>) -> Operated<()>;

    /// Takes over a mount that is right already, but for its flags if these `differ`.
    fn adopt(&self, spec: &Arc<StoreSpec>, locked: bool, differ: bool) -> Operated<Up>;

    /// Takes hold of what could not be had when a store came up.
    fn hold(&self, spec: &Arc<StoreSpec>, locked: bool) -> Operated<Held>;

    /// Has the Nix daemon of a store be what is declared. It works in the layered store `below` as well.
    fn serve(&self, spec: &Arc<StoreSpec>, below: Option<Arc<StoreSpec>>) -> Operated<()>;

    /// Takes a store down.
    fn stop(&self, spec: &Arc<StoreSpec>) -> Operated<()>;

    /// Takes the upper of two mounts away.
    fn finish_swap(&self, spec: &Arc<StoreSpec>) -> Operated<Arc<dyn SwappedOut>>;

    /// Undoes what was prepared for a store that is not mounted. With `forget`, its record goes as well. Its data stays.
    fn release(&self, spec: &Arc<StoreSpec>, forget: bool) -> Operated<()>;

    /// Has a glance at what changed just now. Whether it has reconfigured.
    fn glance(&self, spec: &Arc<StoreSpec>, aim: Aim, mount: Option<MountId>) -> Operated<bool>;

    /// Refreshes a store's merged view.
    fn refresh(&self, spec: &Arc<StoreSpec>, refreshing: Refreshing) -> Begun<Refreshed>;

    /// Has what was swapped out take no more writes. The store may be unknown by now.
    fn retire(&self, spec: Option<&Arc<StoreSpec>>, old: Arc<dyn SwappedOut>) -> Operated<OldSuperblock>;

    /// Keeps what was swapped out no longer for the next daemon.
    fn let_go(&self, name: &StoreName, number: u64);

    /// Looks at something of a store that is up. Nix works in the layered store `below` as well.
    fn look(&self, look: Look, spec: &Arc<StoreSpec>, below: Option<Arc<StoreSpec>>) -> Operated<Sight>;

    /// Does the work of a job on a mounted store. By `progress` it is seen how far it is, and it can be called off.
    fn work(
        &self,
        kind: Kind,
        spec: &Arc<StoreSpec>,
        mount: Option<MountId>,
        progress: Arc<Progress>,
    ) -> Operated<Findings>;

    /// Removes all that is in a store that is not mounted. `own` is the directory it has for itself, if it was not given others.
    fn remove(&self, spec: &Arc<StoreSpec>, lock: Option<Guard>, own: Option<AbsolutePath>) -> Operated<()>;

    /// Removes the directory of a store that is not declared any more.
    fn remove_left_over(&self, directory: AbsolutePath) -> Operated<()>;
}
