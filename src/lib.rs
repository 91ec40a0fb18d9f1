//! Declares, mounts and looks after layered Nix stores.
pub mod config;
pub mod store;
