//! Our D-Bus API: thin, and without decisions of its own.

mod authorization;
mod connections;
mod error;
mod gate;
mod job;
mod manager;
mod publisher;
mod questions;
mod store;
#[cfg(test)]
mod tests;
mod waiting;

pub use connections::Connections;
pub use publisher::{Milestone, PublishError, Publisher};
