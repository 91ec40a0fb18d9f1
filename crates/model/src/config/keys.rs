//! The keys of the configuration, in the words in which people read of them.
//!
//! The tables stand beside what they are read into: [`Declaration::KEYS`] and [`NixDaemon::KEYS`]. From them come what is told of
//! keys that are misspelled, the manual page, the reference in `docs/configuration.md`, and `module/keys.json`, from which the
//! options of the NixOS module have their descriptions.

use crate::{Declaration, NixDaemon};

/// What is written in front of the keys of `[stores.NAME.daemon]`.
pub(crate) const DAEMON: &str = "daemon.";

/// A key of the configuration.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// Its name, with `daemon.` in front for one of `[stores.NAME.daemon]`.
    pub name: &'static str,
    /// The options of the NixOS module that it is written with, as they are named below a store.
    pub options: &'static [&'static str],
    /// What is written behind it, in Markdown.
    pub kind: &'static str,
    /// What holds without it, in Markdown; what begins with "none" is no value.
    pub default: &'static str,
    /// A value in TOML that is not the default.
    pub example: &'static str,
    /// What it is for, in Markdown. The first paragraph is enough for a table; other keys are named in code spans.
    pub description: &'static str,
    /// Where the manual says more, as a link from `docs/configuration.md`; empty if nowhere.
    pub section: &'static str,
}

impl Key {
    /// All keys, in the order in which they are described.
    pub fn all() -> impl Iterator<Item = &'static Self> + Clone {
        Declaration::KEYS.iter().chain(NixDaemon::KEYS)
    }

    /// The name as it is written in its table.
    pub fn word(&self) -> &'static str {
        self.name.strip_prefix(DAEMON).unwrap_or(self.name)
    }
}
