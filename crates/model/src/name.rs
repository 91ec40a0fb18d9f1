//! Names of layered stores.

use std::{borrow::Borrow, fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// The name of a layered store: `[a-z0-9][a-z0-9-]*`, at most 64 bytes.
///
/// The character set is the intersection of what is comfortable in a path, a systemd unit name, a
/// D-Bus object path label and a Nix attribute name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct StoreName(String);

/// Why a text is no [`StoreName`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// The empty text.
    #[error("a store's name is empty; use lower-case letters, digits and '-'")]
    Empty,
    /// More than 64 bytes.
    #[error("the name is {0} bytes long; the most is {max}", max = StoreName::MAX_LEN)]
    TooLong(usize),
    /// It starts with a `-`, which command lines would take for an option.
    #[error("the name starts with '-'; start it with a lower-case letter or a digit")]
    LeadingDash,
    /// A character outside the set.
    #[error("the name holds {0:?}; use lower-case letters, digits and '-' only")]
    Character(char),
}

impl StoreName {
    /// The longest name, in bytes.
    pub const MAX_LEN: usize = 64;

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<StoreName> for String {
    fn from(value: StoreName) -> Self {
        value.0
    }
}

impl TryFrom<String> for StoreName {
    type Error = <Self as FromStr>::Err;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl FromStr for StoreName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        if text.is_empty() {
            return Err(NameError::Empty);
        }
        if text.len() > Self::MAX_LEN {
            return Err(NameError::TooLong(text.len()));
        }
        if text.starts_with('-') {
            return Err(NameError::LeadingDash);
        }
        let allowed = |c: &char| c.is_ascii_lowercase() || c.is_ascii_digit() || *c == '-';
        match text.chars().find(|c| !allowed(c)) {
            Some(c) => Err(NameError::Character(c)),
            None => Ok(Self(text.to_owned())),
        }
    }
}

impl fmt::Debug for StoreName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl fmt::Display for StoreName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl Borrow<str> for StoreName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_pattern() {
        for good in ["ci", "a", "0", "dev-box-2", "a-"] {
            assert_eq!(good.parse::<StoreName>().map(|n| n.to_string()), Ok(good.to_owned()));
        }
        let long = "a".repeat(65);
        for (bad, why) in [
            ("", NameError::Empty),
            ("-a", NameError::LeadingDash),
            ("Ci", NameError::Character('C')),
            ("a_b", NameError::Character('_')),
            ("a/b", NameError::Character('/')),
            ("é", NameError::Character('é')),
            (long.as_str(), NameError::TooLong(65)),
        ] {
            assert_eq!(bad.parse::<StoreName>(), Err(why), "{bad:?}");
        }
    }
}
