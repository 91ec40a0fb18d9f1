//! The kernel's side: layer directories, the mount table, and keeping the merged view right.
//!
//! Everything here blocks and acts in the mount namespace of the calling thread; [`host`] says which that is.

pub mod context;
mod ephemeral;
pub mod glance;
pub mod holders;
pub mod host;
pub mod identity;
pub mod layers;
pub mod left;
pub mod lock;
mod mark;
pub mod mount;
pub mod mountinfo;
pub mod options;
pub mod owner;
pub mod place;
pub mod probe;
pub mod progress;
mod queue;
pub mod refresh;
pub mod remove;
pub mod room;
pub mod swap;
mod walk;
pub mod watch;
