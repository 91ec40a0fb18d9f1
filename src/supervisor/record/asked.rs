//! What people have asked for otherwise than declared: stores that were started or stopped by hand.
//!
//! `<runtime>/<name>.asked.json` keeps that until the next boot, so that a daemon that starts again, for a new version or because
//! it was killed, leaves stores as they are.

use std::{collections::HashMap, fs, io};

use layered_stores_model::StoreName;
use serde::{Deserialize, Serialize};

use super::Records;
use crate::file::{FOR_ALL, replace};

/// How the file ends. No store's name has a dot.
const ENDING: &str = ".asked.json";

/// What was asked for.
#[derive(Serialize, Deserialize)]
struct Asked {
    up: bool,
    /// Since which soft reboot. After one, stores come up as declared (systemd-soft-reboot.service(8)).
    soft_reboots: u32,
}

impl Records {
    /// Keeps whether a store is to be up until the next boot, whatever is declared; `None`: as declared. Losing it costs what
    /// somebody has done by hand, no more.
    pub(in crate::supervisor) fn keep_asked(&self, name: &StoreName, up: Option<bool>) {
        let path = self.runtime.join(format!("{name}{ENDING}"));
        let kept = match up.map(|up| Asked { up, soft_reboots: self.soft_reboots }) {
            Some(asked) => {
                serde_json::to_vec(&asked).map_err(Into::into).and_then(|text| replace(&path, &text, FOR_ALL, false))
            }
            None => match fs::remove_file(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                removed => removed,
            },
        };
        if let Err(error) = kept {
            let path = path.display();
            tracing::warn!(store = %name, "{name}: what was asked for it cannot be kept for the next daemon in {path}: {error}");
        }
    }

    /// All that was kept since the boot.
    pub(in crate::supervisor) fn asked(&self) -> HashMap<StoreName, bool> {
        let entries = fs::read_dir(&self.runtime).into_iter().flatten().flatten();
        let read = |entry: fs::DirEntry| {
            let name = entry.file_name().to_str()?.strip_suffix(ENDING)?.parse().ok()?;
            let asked: Asked = serde_json::from_slice(&fs::read(entry.path()).ok()?).ok()?;
            (asked.soft_reboots == self.soft_reboots).then_some((name, asked.up))
        };
        entries.filter_map(read).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_asked_for_is_kept_until_the_next_boot() {
        let dir = tempfile::tempdir().expect("a directory");
        let records = Records::new(&dir.path().join("state"), &dir.path().join("run"));
        let [a, b]: [StoreName; 2] = ["a", "b"].map(|name| name.parse().expect("valid"));
        assert!(records.asked().is_empty());
        records.keep_asked(&a, Some(true));
        records.keep_asked(&b, Some(false));
        assert_eq!(records.asked(), HashMap::from([(a.clone(), true), (b.clone(), false)]));
        assert!(records.clone().since(1).asked().is_empty(), "a soft reboot is a boot");
        records.keep_asked(&a, None);
        records.keep_asked(&a, None);
        assert_eq!(records.asked(), HashMap::from([(b, false)]));
    }
}
