//! The command line: asks the daemon over D-Bus and prints what it says.

pub mod args;
mod collect;
mod commands;
mod disk;
mod doctor;
mod enter;
#[cfg(test)]
mod fixture;
mod follow;
mod generate;
mod inside;
mod log;
mod metrics;
mod output;
mod owner;
mod program;
mod remove;
mod render;
mod status;
mod uri;
mod usage;
mod verify;

pub use commands::{run, run_internal};
pub use output::{complain, wrapped};
pub use uri::{Invocation, parse, without_result};
