//! Why a command was not carried out.

use layered_stores_model::StoreName;

use super::Kind;

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
    /// Somebody else asks for a refresh.
    #[error("only root and the owner of store {0:?} can ask here")]
    NotOwner(StoreName),
    /// A refresh could not be made.
    #[error("store {0:?} could not be refreshed: {1}")]
    RefreshFailed(StoreName, String),
    /// A refresh was made, and the merged view is wrong all the same. The text says how far the refresh went.
    #[error("store {0:?} is stale: {1}; restart it with `layered-stores stop {0}` and `start {0}`")]
    Stale(StoreName, String),
    /// A filesystem of the store does not answer.
    #[error("store {0:?} is stuck: {1}")]
    Stuck(StoreName, String),
    /// A swap is needed, and too much of what earlier ones have left is held open.
    #[error(
        "store {0:?} is stale, and only a swap helps; processes hold {1} superblocks open that earlier swaps have left: end \
         those that have files of it open for long, or have root call `layered-stores-remount`"
    )]
    Held(StoreName, usize),
    /// What is in it cannot be removed while it is used.
    #[error("what is in store {0:?} is not removed: {1}")]
    InUse(StoreName, String),
    /// There is nothing to remove.
    #[error("there is no store {0:?}, and nothing is left of one; `layered-stores list --left-over` names what is")]
    NothingLeft(StoreName),
    /// Not all was removed.
    #[error("not all that is in store {0:?} was removed: {1}; then run `layered-stores remove-data {0}` again")]
    RemoveFailed(StoreName, String),
    /// What is left over cannot be listed.
    #[error("cannot look for what is left over: {0}")]
    ListFailed(String),
    /// The configuration holds mistakes. The old one stays.
    #[error("the configuration was not changed:\n{0}")]
    InvalidConfiguration(String),
    /// Nobody waits for a job any more, or root has ended it.
    #[error("{0} of store {1:?} was cancelled")]
    Cancelled(Kind, StoreName),
    /// There is no such job, or not any more.
    #[error("there is no job {0}; one that is over is forgotten once its result was read, or after a minute")]
    NoSuchJob(u64),
    /// Somebody else has asked for the job.
    #[error("job {0} is of somebody else; only root and who has asked for it may do that")]
    NotAsker(u64),
    /// Too much is under way.
    #[error("{0} jobs of this user are under way, or too many of all users; wait for them, or cancel some")]
    TooManyJobs(usize),
    /// The daemon is going down.
    #[error("the daemon is shutting down; the mounts stay")]
    ShuttingDown,
}

impl Error {
    /// Its name on D-Bus.
    pub fn name(&self) -> &'static str {
        match self {
            Self::NoSuchStore(_) | Self::NoStoreAtPath(_) | Self::NothingLeft(_) => {
                "org.layeredstores1.Error.NoSuchStore"
            }
            Self::NotOwner(_) | Self::NotAsker(_) => "org.freedesktop.DBus.Error.AccessDenied",
            Self::NotActive(..) => "org.layeredstores1.Error.NotActive",
            Self::StartFailed(..) => "org.layeredstores1.Error.StartFailed",
            Self::Busy(..) => "org.layeredstores1.Error.Busy",
            Self::LowerOf(..) => "org.layeredstores1.Error.LowerOfOthers",
            Self::RefreshFailed(..) => "org.layeredstores1.Error.RefreshFailed",
            Self::Stale(..) | Self::Held(..) => "org.layeredstores1.Error.Stale",
            Self::Stuck(..) => "org.layeredstores1.Error.Stuck",
            Self::InUse(..) => "org.layeredstores1.Error.InUse",
            Self::RemoveFailed(..) | Self::ListFailed(_) => "org.layeredstores1.Error.RemoveFailed",
            Self::InvalidConfiguration(_) => "org.layeredstores1.Error.InvalidConfiguration",
            Self::Cancelled(..) => "org.layeredstores1.Error.Cancelled",
            Self::NoSuchJob(_) => "org.layeredstores1.Error.NoSuchJob",
            Self::TooManyJobs(_) => "org.freedesktop.DBus.Error.LimitsExceeded",
            Self::ShuttingDown => "org.layeredstores1.Error.ShuttingDown",
        }
    }
}
