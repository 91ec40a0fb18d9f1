//! Names of store objects.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// The length of the hash at the beginning of a name, and the characters it is made of (`nix32`).
const HASH: usize = 32;
const DIGITS: &[u8] = b"0123456789abcdfghijklmnpqrsvwxyz";

/// The most that Nix lets a name have after the hash (`maxPathLen` of `StorePath`).
const LONGEST: usize = 211;

/// The name of a store object, such as `s66mzxpvicwk07gjbjfw9izjfa797vsw-hello-2.12.1`: what is behind the store directory in
/// its path. It is one component of a path and not `.` or `..`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct ObjectName(Box<str>);

/// Something is not the name of a store object.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not the name of a store object: {0:?}")]
pub struct NameError(String);

impl NameError {
    /// As much of it as is worth showing.
    fn of(text: &str) -> Self {
        Self(text.chars().take(300).collect())
    }
}

impl ObjectName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name in a store path, whatever the store directory.
    ///
    /// # Errors
    /// [`NameError`].
    pub fn in_path(path: &str) -> Result<Self, NameError> {
        let name = path.strip_prefix('/').and_then(|path| path.rsplit_once('/')?.1.parse().ok());
        name.ok_or_else(|| NameError::of(path))
    }
}

impl TryFrom<String> for ObjectName {
    type Error = NameError;

    fn try_from(name: String) -> Result<Self, NameError> {
        name.parse()
    }
}

impl FromStr for ObjectName {
    type Err = NameError;

    fn from_str(name: &str) -> Result<Self, NameError> {
        let is_of_name = |byte: u8| byte.is_ascii_alphanumeric() || b"+-._?=".contains(&byte);
        match name.as_bytes().split_at_checked(HASH) {
            Some((hash, [b'-', rest @ ..]))
                if hash.iter().all(|byte| DIGITS.contains(byte))
                    && (1..=LONGEST).contains(&rest.len())
                    && rest.iter().copied().all(is_of_name)
                    && !is_dots(rest) =>
            {
                Ok(Self(name.into()))
            }
            _ => Err(NameError::of(name)),
        }
    }
}

/// What Nix takes for no name (`checkName` in src/libstore/path.cc): dots alone, or with a dash behind them. It ends where it finds
/// one in a list of roots.
fn is_dots(rest: &[u8]) -> bool {
    matches!(rest, [b'.'] | [b'.', b'.'] | [b'.', b'-', ..] | [b'.', b'.', b'-', ..])
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HELLO: &str = "s66mzxpvicwk07gjbjfw9izjfa797vsw-hello-2.12.1";

    #[test]
    fn names_are_those_of_nix() {
        assert_eq!(HELLO.parse::<ObjectName>().expect("a name").as_str(), HELLO);
        let long = format!("{}-{}", &HELLO[..HASH], "a".repeat(LONGEST));
        assert!(long.parse::<ObjectName>().is_ok());
        assert!(format!("{}-.a", &HELLO[..HASH]).parse::<ObjectName>().is_ok());
        for wrong in [
            "",
            "hello",
            ".links",
            &HELLO[..HASH],
            &HELLO[..=HASH],
            &HELLO[1..],
            &format!("{HELLO}/bin"),
            &format!("{HELLO}\n"),
            &format!("{long}a"),
            // `e` is no digit of nix32.
            &HELLO.replacen('s', "e", 1),
            &HELLO.replace('.', "ä"),
            &format!("{}-.", &HELLO[..HASH]),
            &format!("{}-..", &HELLO[..HASH]),
            &format!("{}-.-a", &HELLO[..HASH]),
            &format!("{}-..-a", &HELLO[..HASH]),
        ] {
            assert_eq!(wrong.parse::<ObjectName>(), Err(NameError(wrong.to_owned())), "{wrong:?}");
        }
    }

    #[test]
    fn a_path_ends_with_a_name() {
        let name = HELLO.parse();
        assert_eq!(ObjectName::in_path(&format!("/nix/store/{HELLO}")), name);
        assert_eq!(ObjectName::in_path(&format!("/{HELLO}/{HELLO}")), name);
        for wrong in [HELLO, "", "/", "/nix/store/", &format!("/{HELLO}"), &format!("/nix/store/{HELLO}/")] {
            assert!(ObjectName::in_path(wrong).is_err(), "{wrong:?}");
        }
    }

    proptest! {
        #[test]
        fn a_name_is_one_component_that_can_be_shown(text in ".{0,300}", path in "(/[a-z.]{0,3}){0,3}/[0-9a-z]{30,34}-[a-z./-]{0,5}") {
            for name in [text.parse::<ObjectName>(), ObjectName::in_path(&path)].into_iter().flatten() {
                let name = name.as_str();
                prop_assert!(!name.contains('/') && name.len() < 256 && name.is_ascii() && !name.contains(char::is_control));
            }
        }
    }
}
