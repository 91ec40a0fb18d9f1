//! Why a database cannot be read.

use std::{io, path::PathBuf};

use rusqlite::ErrorCode;

/// Why a database cannot be read. Each is over when its cause is: nothing is kept between two times.
#[derive(Debug, thiserror::Error)]
pub enum DatabaseError {
    /// There is none: Nix has not used the store yet, or it was taken away.
    #[error("there is no database in {0}")]
    Absent(PathBuf),
    /// Somebody has it locked, for longer than is waited.
    #[error("the database in {0} is locked by another process")]
    Locked(PathBuf),
    /// It was being written when that broke off, and only who may write can put it right.
    #[error("the database in {0} was left half written; any command of Nix on the store puts it right")]
    HalfWritten(PathBuf),
    /// It is of a version that is not known.
    #[error("the database in {dir} is of the version {version:?}, and known is {known}", known = crate::database::SCHEMA)]
    Version {
        /// The directory.
        dir: PathBuf,
        /// What Nix has written into `schema` there.
        version: String,
    },
    /// It is a database, and not Nix's.
    #[error("the database in {dir} is not one of Nix's: {what}")]
    Foreign {
        /// The directory.
        dir: PathBuf,
        /// What is not as it should be.
        what: String,
    },
    /// It is damaged.
    #[error("the database in {dir} is damaged: {what}")]
    Damaged {
        /// The directory.
        dir: PathBuf,
        /// What SQLite says.
        what: String,
    },
    /// It may not be read, or its filesystem fails.
    #[error("the database in {dir} cannot be read: {source}")]
    Unreadable {
        /// The directory.
        dir: PathBuf,
        /// The reason.
        source: io::Error,
    },
}

impl DatabaseError {
    /// What SQLite has failed with.
    pub(crate) fn of(dir: &std::path::Path, error: &rusqlite::Error) -> Self {
        let dir = dir.to_owned();
        let (code, extended) = match error {
            rusqlite::Error::SqliteFailure(failure, _) => (failure.code, failure.extended_code),
            // Of another type, or without the column that was asked for.
            error => return Self::Foreign { dir, what: error.to_string() },
        };
        let io = |kind: io::ErrorKind| io::Error::new(kind, error.to_string());
        match code {
            ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked | ErrorCode::FileLockingProtocolFailed => {
                Self::Locked(dir)
            }
            // Of a log or a journal that has to be played back first.
            ErrorCode::ReadOnly if extended != rusqlite::ffi::SQLITE_READONLY => Self::HalfWritten(dir),
            ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase => Self::Damaged { dir, what: error.to_string() },
            ErrorCode::CannotOpen => Self::Unreadable { dir, source: io(io::ErrorKind::NotFound) },
            ErrorCode::PermissionDenied => Self::Unreadable { dir, source: io(io::ErrorKind::PermissionDenied) },
            ErrorCode::SystemIoFailure | ErrorCode::OutOfMemory => {
                Self::Unreadable { dir, source: io(io::ErrorKind::Other) }
            }
            _ => Self::Foreign { dir, what: error.to_string() },
        }
    }
}
