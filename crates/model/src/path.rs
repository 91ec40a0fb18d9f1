//! Absolute paths that survive every reader between the configuration and the kernel.

use std::{fmt, path::Path, str::FromStr};

use serde::{Deserialize, Serialize};

/// An absolute path that is safe in mount options, `/proc/mounts`, unit files and Nix's check.
///
/// Nix's `check-mount` builds a regular expression from the paths without quoting them and does not
/// undo the escapes of `/proc/mounts`; `fsconfig(2)` takes strings of at most 255 bytes with their
/// NUL. Paths that hold only `[A-Za-z0-9/._-]`, are normal and shorter than 255 bytes read the same
/// everywhere.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct AbsolutePath(String);

/// Why a text is no [`AbsolutePath`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// The empty text.
    #[error("the path is empty; give an absolute path")]
    Empty,
    /// It does not start at the root.
    #[error("the path is relative; give an absolute path")]
    Relative,
    /// The root directory itself.
    #[error("the root directory cannot be used here; give a directory of its own")]
    Root,
    /// It holds `.`, `..` or an empty component.
    #[error("the path holds {0:?} as a component; write the path without it")]
    Component(String),
    /// It ends in a slash, which Nix's mount check does not match.
    #[error("the path ends in '/'; leave the last '/' away")]
    TrailingSlash,
    /// A character outside the set.
    #[error("the path holds {0:?}; only letters, digits, '/', '.', '_' and '-' are safe in mount options")]
    Character(char),
    /// 255 bytes or more.
    #[error("the path is {0} bytes long; the kernel takes at most {max}", max = AbsolutePath::MAX_LEN)]
    TooLong(usize),
}

impl AbsolutePath {
    /// The longest path, in bytes.
    pub const MAX_LEN: usize = 254;

    /// The path as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The path as a [`Path`].
    pub fn as_path(&self) -> &Path {
        Path::new(&self.0)
    }

    /// This path with `tail` (`nix/store`) below it.
    ///
    /// # Errors
    /// [`PathError`] when the whole is no valid path, most likely because it is too long.
    pub fn join(&self, tail: &str) -> Result<Self, PathError> {
        format!("{}/{tail}", self.0).parse()
    }

    /// The components, without the leading root.
    pub fn components(&self) -> impl Iterator<Item = &str> {
        self.0[1..].split('/')
    }

    /// Whether this path is `other` or lies below it.
    pub fn is_within(&self, other: &Self) -> bool {
        self.as_path().starts_with(other.as_path())
    }
}

impl From<AbsolutePath> for String {
    fn from(value: AbsolutePath) -> Self {
        value.0
    }
}

impl TryFrom<String> for AbsolutePath {
    type Error = <Self as FromStr>::Err;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl FromStr for AbsolutePath {
    type Err = PathError;

    fn from_str(text: &str) -> Result<Self, PathError> {
        if text.is_empty() {
            return Err(PathError::Empty);
        }
        if !text.starts_with('/') {
            return Err(PathError::Relative);
        }
        if text == "/" {
            return Err(PathError::Root);
        }
        if text.len() > Self::MAX_LEN {
            return Err(PathError::TooLong(text.len()));
        }
        let allowed = |c: &char| c.is_ascii_alphanumeric() || "/._-".contains(*c);
        if let Some(c) = text.chars().find(|c| !allowed(c)) {
            return Err(PathError::Character(c));
        }
        if text.ends_with('/') {
            return Err(PathError::TrailingSlash);
        }
        match text[1..].split('/').find(|c| matches!(*c, "" | "." | "..")) {
            Some(component) => Err(PathError::Component(component.to_owned())),
            None => Ok(Self(text.to_owned())),
        }
    }
}

impl fmt::Debug for AbsolutePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl fmt::Display for AbsolutePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl AsRef<Path> for AbsolutePath {
    fn as_ref(&self) -> &Path {
        self.as_path()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_that_nix_or_the_kernel_would_misread_are_refused() {
        let longest = format!("/{}", "a".repeat(253));
        for good in ["/a", "/mnt/example/store-a", "/a/.hidden/b_c", longest.as_str()] {
            assert_eq!(good.parse::<AbsolutePath>().map(|p| p.to_string()), Ok(good.to_owned()));
        }
        let too_long = format!("/{}", "a".repeat(254));
        for (bad, why) in [
            ("", PathError::Empty),
            ("a/b", PathError::Relative),
            ("./a", PathError::Relative),
            ("/", PathError::Root),
            ("/a/", PathError::TrailingSlash),
            ("/a//b", PathError::Component(String::new())),
            ("/a/./b", PathError::Component(".".into())),
            ("/a/../b", PathError::Component("..".into())),
            ("/a b", PathError::Character(' ')),
            ("/a,b", PathError::Character(',')),
            ("/a:b", PathError::Character(':')),
            ("/a\\b", PathError::Character('\\')),
            ("/a%b", PathError::Character('%')),
            ("/ä", PathError::Character('ä')),
            (too_long.as_str(), PathError::TooLong(255)),
        ] {
            assert_eq!(bad.parse::<AbsolutePath>(), Err(why), "{bad:?}");
        }
    }

    #[test]
    fn within_is_by_component_not_by_prefix() {
        let path = |s: &str| s.parse::<AbsolutePath>().expect("valid");
        assert!(path("/a/b").is_within(&path("/a")));
        assert!(path("/a").is_within(&path("/a")));
        assert!(!path("/ab").is_within(&path("/a")));
    }
}
