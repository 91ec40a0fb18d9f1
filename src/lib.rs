//! Declares, mounts and looks after layered Nix stores.
pub mod config;
pub mod overlay;
pub mod store;
