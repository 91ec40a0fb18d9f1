//! Why a command was not carried out.

use crate::store::StoreName;

/// Why a command was not carried out. Each becomes a D-Bus error of its own name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// There is no store of that name.
    #[error("there is no store {0:?}; `layered-stores list` names those there are")]
    NoSuchStore(String),
    /// No store has that real store dir.
    #[error("no layered store has the real store dir {0:?}; `layered-stores status` shows those there are")]
    NoStoreAtPath(String),
    /// The store is not up, so there is nothing to refresh.
    #[error("store {0:?} is not active: {1}")]
    NotActive(StoreName, String),
    /// The store could not be started.
    #[error("store {0:?} could not be started: {1}")]
    StartFailed(StoreName, String),
    /// The store could not be stopped, most likely because it is in use.
    #[error("store {0:?} stays mounted: {1}")]
    Busy(StoreName, String),
    /// Other layered stores lie on it.
    #[error("store {0:?} is the lower store of {list}; stop {list} first", list = .1.join(" and "))]
    LowerOf(StoreName, Vec<String>),
    /// A refresh could not be made.
    #[error("store {0:?} could not be refreshed: {1}")]
    RefreshFailed(StoreName, String),
    /// A refresh was made, and the merged view is wrong all the same.
    #[error("store {0:?} is stale even after a swap: {1}; restart it with `layered-stores stop {0}` and `start {0}`")]
    Stale(StoreName, String),
    /// The configuration holds mistakes. The old one stays.
    #[error("the configuration was not changed:\n{0}")]
    InvalidConfiguration(String),
    /// The daemon is going down.
    #[error("the daemon is shutting down; the mounts stay")]
    ShuttingDown,
}
