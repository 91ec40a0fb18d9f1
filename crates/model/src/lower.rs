//! What a configuration may name as the lower store.

use std::{fmt, str::FromStr};

use percent_encoding::percent_decode_str;
use serde::{Deserialize, Serialize};

use super::{AbsolutePath, NIX_STORE_DIR, NameError, PathError, StoreName, unprintable};

/// Where Nix's state directory is below a store's root.
pub(crate) const NIX_STATE_DIR: &str = "/nix/var/nix";

/// The prefix that refers to another store of the same configuration.
const LAYERED: &str = "layered:";

/// The store underneath, as the configuration names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum LowerStore {
    /// `layered:NAME`: another layered store of this configuration.
    Layered(StoreName),
    /// A Nix store URL or a root directory, exactly as Nix will be given it.
    Nix {
        /// The text handed to Nix.
        url: String,
        /// The directory of its store objects on this machine.
        store_dir: AbsolutePath,
        /// Its state directory.
        state_dir: AbsolutePath,
        /// Whether a Nix daemon works there for those who use it.
        has_daemon: bool,
    },
}

/// Why a text names no usable lower store.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LowerStoreError {
    /// The empty text.
    #[error("it is empty; name a root directory, a Nix store URL such as \"daemon\", or \"layered:NAME\"")]
    Empty,
    /// `layered:` with something that is no name behind it.
    #[error("what follows \"layered:\" is no store's name: {0}")]
    Name(#[from] NameError),
    /// The store, its root or its `real` directory is no usable path.
    #[error("{0}")]
    Path(#[from] PathError),
    /// A store that lives on another machine or has no directory at all.
    #[error(
        "a {0:?} store has no directory on this machine; an overlay needs one: \
         use a root directory, \"daemon\", \"local\" or \"layered:NAME\""
    )]
    NotLocal(String),
    /// A store directory other than `/nix/store`.
    #[error("its store directory is {0:?}; a layered store needs one that is {NIX_STORE_DIR:?}")]
    StoreDir(String),
    /// The host's store written as the root directory.
    #[error("the host's own store is written \"daemon\" (through its daemon) or \"local\" (directly)")]
    HostRoot,
    /// A character that a file, a command line or a terminal would not take for one of a name.
    #[error("it holds {0:?}, as it is or percent-encoded, which no store's URL has to; take it away")]
    Unprintable(char),
}

impl From<LowerStore> for String {
    fn from(lower: LowerStore) -> Self {
        lower.to_string()
    }
}

impl TryFrom<String> for LowerStore {
    type Error = LowerStoreError;

    fn try_from(text: String) -> Result<Self, LowerStoreError> {
        text.parse()
    }
}

impl FromStr for LowerStore {
    type Err = LowerStoreError;

    fn from_str(text: &str) -> Result<Self, LowerStoreError> {
        if text.is_empty() {
            return Err(LowerStoreError::Empty);
        }
        if let Some(name) = text.strip_prefix(LAYERED) {
            return Ok(Self::Layered(name.parse()?));
        }
        if text == "/" {
            return Err(LowerStoreError::HostRoot);
        }
        let (store_dir, state_dir, has_daemon) = directories(text)?;
        refuse_unprintable(text)?;
        Ok(Self::Nix { url: text.to_owned(), store_dir, state_dir, has_daemon })
    }
}

/// Refuses what would end a line or a string in a nix.conf, a unit or a C program, or be obeyed by a terminal. Nix decodes
/// the parameters of a URL, so what is percent-encoded counts as well.
fn refuse_unprintable(url: &str) -> Result<(), LowerStoreError> {
    let decoded = percent_decode_str(url).decode_utf8_lossy();
    // What is not UTF-8 becomes U+FFFD.
    let refused = unprintable(&decoded).or_else(|| decoded.chars().find(|&c| c == char::REPLACEMENT_CHARACTER));
    refused.map_or(Ok(()), |c| Err(LowerStoreError::Unprintable(c)))
}

/// The local directory of store objects of a Nix store URL, its state directory, and whether a Nix daemon works in that.
///
/// Follows `parseStoreReference` and the settings `root`, `real`, `state` and `store` of Nix's local stores
/// (`src/libstore/store-reference.cc`, `local-fs-store.hh`): `real` and `state` win over `root`, and a bare
/// absolute path is a root.
fn directories(url: &str) -> Result<(AbsolutePath, AbsolutePath, bool), LowerStoreError> {
    let (base, query) = url.split_once('?').unwrap_or((url, ""));
    let (scheme, authority) = base.split_once("://").unwrap_or((base, ""));
    let mut root = None;
    match scheme {
        "auto" | "daemon" | "unix" | "local-overlay" => {}
        "local" if authority.is_empty() => {}
        "local" => root = Some(authority.to_owned()),
        path if path.starts_with('/') => root = Some(path.to_owned()),
        // `./x`, `../x` and `a/b` are paths to Nix as well, relative to wherever it is started.
        path if path.contains('/') => return Err(PathError::Relative.into()),
        other => return Err(LowerStoreError::NotLocal(other.to_owned())),
    }
    let (mut real, mut state) = (None, None);
    for (key, value) in query.split('&').filter_map(|pair| pair.split_once('=')) {
        let value = percent_decode_str(value).decode_utf8_lossy().into_owned();
        match key {
            "root" if !value.is_empty() => root = Some(value),
            "real" => real = Some(value),
            "state" => state = Some(value),
            "store" if value != NIX_STORE_DIR => return Err(LowerStoreError::StoreDir(value)),
            _ => {}
        }
    }
    let directory = |given: Option<String>, default: &str| match (given, &root) {
        (Some(given), _) => given.parse(),
        (None, Some(root)) => root.parse::<AbsolutePath>()?.join(&default[1..]),
        (None, None) => default.parse(),
    };
    let has_daemon = matches!(scheme, "daemon" | "unix");
    Ok((directory(real, NIX_STORE_DIR)?, directory(state, NIX_STATE_DIR)?, has_daemon))
}

impl fmt::Display for LowerStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Layered(name) => write!(f, "{LAYERED}{name}"),
            Self::Nix { url, .. } => f.write_str(url),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_directories_of_a_lower_store_are_where_nix_has_them() {
        for (url, store, state) in [
            ("/mnt/store-a", "/mnt/store-a/nix/store", "/mnt/store-a/nix/var/nix"),
            ("auto", "/nix/store", "/nix/var/nix"),
            ("daemon", "/nix/store", "daemon: /nix/var/nix"),
            ("daemon?root=/x", "/x/nix/store", "daemon: /x/nix/var/nix"),
            ("local", "/nix/store", "/nix/var/nix"),
            ("local?root=/x", "/x/nix/store", "/x/nix/var/nix"),
            ("local?root=", "/nix/store", "/nix/var/nix"),
            ("local?root=/x&real=/y/store&read-only=true", "/y/store", "/x/nix/var/nix"),
            ("local?state=%2Fs&real=/y/store", "/y/store", "/s"),
            ("local-overlay://?root=/x", "/x/nix/store", "/x/nix/var/nix"),
            ("local:///srv/a?read-only=true", "/srv/a/nix/store", "/srv/a/nix/var/nix"),
            ("local?store=/nix/store&root=%2Fx", "/x/nix/store", "/x/nix/var/nix"),
            ("unix:///run/other.sock?root=/x", "/x/nix/store", "daemon: /x/nix/var/nix"),
            ("unix://", "/nix/store", "daemon: /nix/var/nix"),
            ("/x?state=/s&read-only=true", "/x/nix/store", "/s"),
        ] {
            let (found_store, found_state, has_daemon) =
                directories(url).unwrap_or_else(|error| panic!("{url}: {error}"));
            let found_state = format!("{}{found_state}", if has_daemon { "daemon: " } else { "" });
            assert_eq!((found_store.as_str(), found_state.as_str()), (store, state), "{url}");
        }
    }

    #[test]
    fn a_lower_store_without_a_local_directory_is_refused() {
        for (text, why) in [
            ("", LowerStoreError::Empty),
            ("/", LowerStoreError::HostRoot),
            ("https://cache.example.org", LowerStoreError::NotLocal("https".into())),
            ("ssh-ng://host", LowerStoreError::NotLocal("ssh-ng".into())),
            ("s3://bucket", LowerStoreError::NotLocal("s3".into())),
            ("dummy://", LowerStoreError::NotLocal("dummy".into())),
            ("./rel", PathError::Relative.into()),
            ("a/b", PathError::Relative.into()),
            ("/x/", PathError::TrailingSlash.into()),
            ("local?root=rel", PathError::Relative.into()),
            ("local?state=rel", PathError::Relative.into()),
            ("local?store=/gnu/store", LowerStoreError::StoreDir("/gnu/store".into())),
            ("/x\0", PathError::Character('\0').into()),
            ("local?root=/x%00", PathError::Character('\0').into()),
            ("local?root=/x&log=\0", LowerStoreError::Unprintable('\0')),
            ("local?root=/x&log=/l%00", LowerStoreError::Unprintable('\0')),
            ("local?root=/x&log%0a=/l", LowerStoreError::Unprintable('\n')),
            ("daemon?\n\nstore=x", LowerStoreError::Unprintable('\n')),
            ("unix:///run/%1b[2J", LowerStoreError::Unprintable('\u{1b}')),
            ("unix:///run/\u{202e}", LowerStoreError::Unprintable('\u{202e}')),
            ("local?log=%ff", LowerStoreError::Unprintable('\u{fffd}')),
            ("layered:", NameError::Empty.into()),
            ("layered:A", NameError::Character('A').into()),
        ] {
            assert_eq!(text.parse::<LowerStore>(), Err(why), "{text:?}");
        }
    }
}
