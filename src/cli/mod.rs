//! The command line: asks the daemon over D-Bus and prints what it says.

pub mod args;
mod client;
mod commands;
mod enter;
mod generate;
mod render;
mod usage;

pub use commands::run;
