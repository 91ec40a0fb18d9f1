//! The kernel's side: layer directories, the mount table, and keeping the merged view right.
//!
//! Everything here blocks and acts in the mount namespace of the calling thread; [`host`] says which that is.

pub mod context;
mod ephemeral;
pub mod holders;
pub mod host;
pub mod layers;
pub mod mount;
pub mod mountinfo;
pub mod options;
pub mod probe;
pub mod refresh;
pub mod swap;
pub mod watch;
