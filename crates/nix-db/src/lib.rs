//! Nix's side: what the database of a store says is valid.
//!
//! A database is opened for reading only, in a way in which SQLite makes and changes no file: not the database, not its log
//! (`-wal`), not the index of the log (`-shm`). Nix goes on writing meanwhile. What is read in one [`Snapshot`] belongs together.
//!
//! Whoever owns a store can put anything in the place of its database. So all of it is taken for a stranger's: tables have to be
//! tables, a value has to be short, a name has to be one of a store object. What memory corruption in SQLite would be worth is
//! the rights of the process that reads, which should be no more than those of the database's owner.
//!
//! ```no_run
//! use std::path::Path;
//!
//! use layered_stores_nix_db::Database;
//!
//! fn total_size(state_dir: &Path) -> Result<u64, layered_stores_nix_db::DatabaseError> {
//!     let mut database = Database::open(&state_dir.join("db"))?;
//!     let mut total = 0;
//!     database.read(|snapshot| {
//!         snapshot.valid_paths(|path| {
//!             total += path.nar_size;
//!             true
//!         })
//!     })?;
//!     Ok(total)
//! }
//! ```
#![forbid(unsafe_code)]

pub mod collector;
mod database;
mod error;
mod graph;
pub mod index;
mod name;
pub mod roots;

pub use database::{Database, Fingerprint, Snapshot, ValidPath};
pub use error::DatabaseError;
pub use graph::{Dead, Graph, Keep};
pub use name::{NameError, ObjectName};
