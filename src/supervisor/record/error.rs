//! Why records cannot be kept or read, and what follows from that.

use std::{io, path::PathBuf};

use layered_stores_model::StoreName;

/// What the daemon has to know about earlier runs, and to leave to later ones.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// It cannot be kept.
    #[error("cannot write {path}: {source}; the daemon needs its state directory writable")]
    Write {
        /// The record.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It cannot be removed.
    #[error("cannot remove {path}: {source}; the next daemon finds it and tries again")]
    Remove {
        /// The record.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// One cannot be read.
    #[error("cannot read {path}: {source}; it says by what the store's directories are known again; make it readable")]
    Read {
        /// The record.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It is no record, and nothing is to be removed without one.
    #[error(
        "the record {path} cannot be read, by which the directories of {store} are known again: what is in them may be somebody \
         else's. Run `layered-stores start {store}`, which makes a new one if they are the store's; or take that file away, and \
         nothing that is not marked as the store's is removed"
    )]
    Unreadable {
        /// The record.
        path: PathBuf,
        /// The store's name.
        store: StoreName,
    },
    /// The directory does not answer.
    #[error("{0} has not answered yet, where it is kept which stores have been mounted")]
    Silent(PathBuf),
    /// The directory cannot be listed.
    #[error(
        "cannot read {path}: {source}; stores that were taken out of the configuration while the daemon was away would stay \
         mounted and unseen; make it readable, or move it away if there are none"
    )]
    List {
        /// The directory.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

impl RecordError {
    /// Whether nothing is wrong but that no more fits.
    pub(in crate::supervisor) fn is_of_no_room(&self) -> bool {
        use io::ErrorKind::{QuotaExceeded, StorageFull};
        matches!(self, Self::Write { source, .. } if matches!(source.kind(), StorageFull | QuotaExceeded))
    }
}
