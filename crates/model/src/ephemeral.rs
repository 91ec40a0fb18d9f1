//! Stores that are gone with the next boot.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::AbsolutePath;

/// The filesystem in memory that holds all directories of an ephemeral store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ephemeral {
    /// Where it is mounted.
    pub directory: AbsolutePath,
    /// The most it may take.
    pub size: EphemeralSize,
}

/// How large a filesystem in memory may grow, as `size=` of tmpfs takes it (tmpfs(5)).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EphemeralSize(String);

impl EphemeralSize {
    /// The value for `size=`.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for EphemeralSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A text is no size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a size is a number of bytes, with K, M, G or T behind it for powers of 1024, or a part of the memory from \"1%\" to \
     \"100%\""
)]
pub struct NoSize;

impl FromStr for EphemeralSize {
    type Err = NoSize;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
        let number: u64 = digits.parse().map_err(|_| NoSize)?;
        let is_plain = digits.bytes().all(|byte| byte.is_ascii_digit());
        let fits = match &text[digits.len()..] {
            "" | "K" | "M" | "G" | "T" => number > 0,
            "%" => (1..=100).contains(&number) && !digits.starts_with('0'),
            _ => false,
        };
        if is_plain && fits { Ok(Self(text.to_owned())) } else { Err(NoSize) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for size in ["1", "4096", "2G", "100M", "1%", "50%", "100%", "007K"] {
            assert_eq!(size.parse::<EphemeralSize>().map(|s| s.to_string()), Ok(size.to_owned()));
        }
        for size in
            ["", "0", "0G", "G", "2GB", "2g", "-1", "+1", "1.5G", "0%", "101%", "%", "1 G", "99999999999999999999"]
        {
            assert_eq!(size.parse::<EphemeralSize>(), Err(NoSize), "{size:?}");
        }
    }
}
