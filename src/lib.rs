//! Declares, mounts and looks after layered Nix stores.
pub mod bus;
pub mod cli;
pub mod config;
pub mod overlay;
pub mod store;
pub mod supervisor;
pub mod systemd;
pub mod varlink;
