//! What tests of several crates share: specifications, made as the daemon makes them, and what a test can do.

use std::{fs, os::unix::fs::MetadataExt as _};

use crate::{
    StoreSpec, Terms,
    config::{self, Defaults, Keys},
};

/// The stores that a configuration without mistakes declares, with directories below `state_dir` where it gives them none.
///
/// # Panics
/// When it has.
pub fn declared(state_dir: &str, text: &str) -> Vec<StoreSpec> {
    let path = |path: &str| path.parse().unwrap_or_else(|error| panic!("{path}: {error}"));
    let defaults = Defaults { state_dir: path(state_dir), remount_hook: path("/bin/hook") };
    config::parse(text, &defaults, Keys::Alone).unwrap_or_else(|mistakes| panic!("{mistakes:#?}")).stores
}

/// A store with directories below `/srv/<name>`, over a lower store with this directory of store objects.
///
/// # Panics
/// When the name is none, or the directory.
pub fn spec(name: &str, lower: &str) -> StoreSpec {
    let text = format!(
        "[stores.{name}]\nlower-store = \"local?real={lower}\"\nroot = \"/srv/{name}/root\"\n\
         upper-layer = \"/srv/{name}/upper\"\nwork-dir = \"/srv/{name}/work\"\n"
    );
    declared("/state", &text).remove(0)
}

/// A specification whose terms are others, and everything else as it was.
#[must_use]
pub fn with(spec: &StoreSpec, change: impl FnOnce(&mut Terms)) -> StoreSpec {
    let mut spec = spec.clone();
    change(&mut spec.terms);
    spec
}

/// Whether this process is root's, as most of what is done to mounts and other people's files needs.
///
/// # Panics
/// Without `/proc`.
pub fn is_root() -> bool {
    fs::metadata("/proc/thread-self").expect("/proc").uid() == 0
}

/// The first line of a test that only root can do: for everybody else it ends there, and says so.
#[macro_export]
macro_rules! needs_root {
    () => {
        if !$crate::fixture::is_root() {
            eprintln!("skipped: needs root");
            return;
        }
    };
}
