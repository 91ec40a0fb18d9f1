//! Declares, mounts and looks after layered Nix stores.
#![forbid(unsafe_code)]

pub mod bus;
pub mod cli;
mod file;
pub mod supervisor;
pub mod systemd;
pub mod varlink;
