//! How systemd spells paths in unit names and names in D-Bus object paths.

use std::{fmt, fmt::Write as _};

use serde::{Deserialize, Serialize};

use super::{AbsolutePath, StoreName};

/// The name of a `.mount` unit.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MountUnitName(String);

/// A path whose mount unit would have a name that systemd does not take.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the mount unit for {path} would have a name of {len} bytes, and systemd takes {max}; use a shorter path, \
     or one with fewer '-' (each counts four)",
    max = MountUnitName::MAX_LEN
)]
pub struct UnitNameTooLong {
    path: AbsolutePath,
    len: usize,
}

impl MountUnitName {
    /// `UNIT_NAME_MAX` of systemd less the final NUL. Longer names are replaced by a hash there, and nobody
    /// would find the unit again.
    pub const MAX_LEN: usize = 255;

    /// The mount unit of a mount point, as `systemd-escape --path --suffix=mount` names it.
    ///
    /// # Errors
    /// [`UnitNameTooLong`] when systemd would not take the name.
    pub fn of(mount_point: &AbsolutePath) -> Result<Self, UnitNameTooLong> {
        let mut name = String::with_capacity(Self::MAX_LEN);
        for (i, byte) in mount_point.as_str()[1..].bytes().enumerate() {
            match byte {
                b'/' => name.push('-'),
                b'.' if i == 0 => name.push_str("\\x2e"),
                b'.' | b'_' | b':' => name.push(byte.into()),
                _ if byte.is_ascii_alphanumeric() => name.push(byte.into()),
                _ => write!(name, "\\x{byte:02x}").expect("writing to a String does not fail"),
            }
        }
        name.push_str(".mount");
        if name.len() > Self::MAX_LEN {
            return Err(UnitNameTooLong { path: mount_point.clone(), len: name.len() });
        }
        Ok(Self(name))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name as a shell takes it: in quotes where it holds a backslash.
    pub fn quoted(&self) -> String {
        if self.0.contains('\\') { format!("'{self}'") } else { self.0.clone() }
    }
}

impl fmt::Display for MountUnitName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl StoreName {
    /// The name as a label of a D-Bus object path, escaped as systemd's `bus_label_escape()` does it.
    pub fn bus_label(&self) -> String {
        let mut label = String::with_capacity(self.as_str().len());
        for (i, byte) in self.as_str().bytes().enumerate() {
            if byte.is_ascii_alphabetic() || (i > 0 && byte.is_ascii_digit()) {
                label.push(byte.into());
            } else {
                write!(label, "_{byte:02x}").expect("writing to a String does not fail");
            }
        }
        label
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_units_are_named_as_systemd_escape_names_them() {
        for (path, unit) in [
            ("/nix/store", "nix-store.mount"),
            ("/mnt/merged-store/nix/store", r"mnt-merged\x2dstore-nix-store.mount"),
            ("/.hidden/a.b_c", r"\x2ehidden-a.b_c.mount"),
        ] {
            let path = path.parse().expect("valid");
            assert_eq!(MountUnitName::of(&path).map(|u| u.to_string()), Ok(unit.to_owned()));
        }
    }

    #[test]
    fn a_unit_name_systemd_would_hash_is_refused() {
        let path: AbsolutePath = format!("/{}", "-".repeat(100)).parse().expect("valid");
        let error = MountUnitName::of(&path).expect_err("400 bytes");
        assert!(error.to_string().contains("406 bytes"), "{error}");
    }

    #[test]
    fn bus_labels_are_escaped_as_systemd_escapes_them() {
        for (name, label) in [("ci", "ci"), ("dev-box", "dev_2dbox"), ("0a1", "_30a1")] {
            let name: StoreName = name.parse().expect("valid");
            assert_eq!(name.bus_label(), label);
        }
    }
}
