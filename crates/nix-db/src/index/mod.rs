//! The index: a process that reads the databases of a user's stores as that user, and tells the daemon what is in them.
//!
//! The daemon must not open what a stranger has written: what SQLite does with it would be done as root. So this process has no
//! rights but those of the user whom the databases belong to, and changes nothing.

mod catalog;
pub mod protocol;
mod serve;
mod watch;

pub use serve::serve;
