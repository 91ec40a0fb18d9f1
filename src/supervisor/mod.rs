//! The engine: what should be, what is, and what to do about the difference.
//!
//! One task owns the state of all stores ([`engine`]). It compares what the configuration and people want with what the
//! mount table shows ([`plan`]), carries the differences out as operations ([`operation`]), and looks again. Whoever wants
//! something changed sends a [`Command`] and awaits the answer; whoever wants to know something reads the published
//! [`Status`].

mod askers;
mod engine;
mod entry;
mod error;
mod handle;
mod jobs;
mod leases;
mod limit;
mod looks;
mod machine;
mod mounts;
mod nix_daemon;
mod operation;
mod owed;
mod plan;
mod record;
mod retirement;
mod room;
mod schedule;
#[cfg(test)]
pub(crate) mod simulation;
mod status;
mod threads;
mod whereabouts;

pub use engine::{Engine, EngineError};
pub use error::Error;
pub use handle::{Asker, Command, Event, Handle};
pub use jobs::{Asked, Caller, Job, JobCommand, JobNews, Kind};
pub use leases::Report;
pub use machine::{Host, Settings};
pub use nix_daemon::user_of;
pub use record::RecordError;
pub use status::{Problem, State, Status, StatusCell};
pub use threads::THREADS;
