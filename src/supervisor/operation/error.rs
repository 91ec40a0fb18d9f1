//! Why an operation did not come off, in words for people.

use std::{io, path::PathBuf};

use layered_stores_model::{AbsolutePath, MountUnitName, StoreName};
use layered_stores_overlay::{
    layers::LayersError,
    mount::MountError,
    owner::OwnerError,
    refresh::RefreshError,
    remove::RemoveError,
    swap::{RetireError, SwapError},
};

use crate::{
    supervisor::{record::RecordError, status::Problem},
    systemd::{SocketError, UnitError},
};

/// An operation that did not come off. The message is what people read.
#[derive(Debug, thiserror::Error)]
pub(in crate::supervisor) enum OperationError {
    #[error(transparent)]
    Layers(#[from] LayersError),
    #[error(transparent)]
    Unit(#[from] UnitError),
    #[error("cannot write the unit file of {unit}: {source}")]
    UnitFile { unit: MountUnitName, source: io::Error },
    #[error(transparent)]
    Mount(#[from] MountError),
    #[error("{}", in_use(.why, .holders))]
    Unmount { why: String, holders: Vec<String> },
    #[error("{0}; the store is not stopped before that")]
    NotOnTop(String),
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error(transparent)]
    Swap(#[from] SwapError),
    #[error(transparent)]
    Refresh(#[from] RefreshError),
    #[error(transparent)]
    Retire(#[from] RetireError),
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error("cannot write {}: {source}", .file.display())]
    NixConf { file: PathBuf, source: io::Error },
    #[error("cannot write the drop-in of layered-stores-nix-daemon@{store}.service: {source}")]
    NixDaemonUnit { store: StoreName, source: io::Error },
    #[error(transparent)]
    Remove(#[from] RemoveError),
    #[error(transparent)]
    Owner(#[from] OwnerError),
    #[error("cannot read the mount table: {0}")]
    MountTable(io::Error),
    #[error(
        "lower-store: the filesystem of {0} was taken away, and what is there now is empty; the store goes on with what it \
         had; mount the lower store again, or name another"
    )]
    LowerTakenAway(AbsolutePath),
    #[error("it was called off")]
    CalledOff,
    #[error("a mistake of layered-storesd, please report it: {0}")]
    Panic(String),
}

impl OperationError {
    /// What is wrong with a store that did not come up for it.
    pub(in crate::supervisor) fn problem(&self) -> Problem {
        match self {
            Self::Layers(
                LayersError::Missing { .. }
                | LayersError::Another { .. }
                | LayersError::OfOther { .. }
                | LayersError::OtherUpper { .. }
                | LayersError::Unpaired { .. }
                | LayersError::NoDatabase { .. }
                | LayersError::Elsewhere { .. },
            )
            | Self::Mount(MountError::OtherUpper(_)) => Problem::UpperMissing,
            _ => Problem::StartFailed,
        }
    }
}

fn in_use(why: &str, holders: &[String]) -> String {
    if holders.is_empty() { why.to_owned() } else { format!("it is used by {}", holders.join(", ")) }
}
