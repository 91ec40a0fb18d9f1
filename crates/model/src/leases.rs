//! What is kept in the lower store.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// What of the lower store is kept there for a layered store, whoever collects garbage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Leases {
    /// What the store refers to.
    #[default]
    Used,
    /// All that is valid.
    All,
    /// Nothing.
    None,
}

/// A text says nothing of what is kept.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it is one of \"used\", \"all\" and \"none\"")]
pub struct LeasesError;

impl FromStr for Leases {
    type Err = LeasesError;

    fn from_str(text: &str) -> Result<Self, LeasesError> {
        match text {
            "used" => Ok(Self::Used),
            "all" => Ok(Self::All),
            "none" => Ok(Self::None),
            _ => Err(LeasesError),
        }
    }
}

impl fmt::Display for Leases {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}
