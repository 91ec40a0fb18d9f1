//! What outlives the daemon: which stores it has touched, and which layers it has last found right.
//!
//! * `<state>/known/<name>.json` holds a store's specification from before its first directory is made until after its
//!   last trace is undone. It is how a store is wound down that was removed from the configuration while the daemon was
//!   not running.
//! * `<runtime>/<name>.json` holds a [`Fingerprint`]. It is how a daemon that starts again knows without looking at every
//!   path whether anything changed in the meantime.

use std::{
    fs, io,
    io::Write as _,
    path::{Path, PathBuf},
};

use super::nix_daemon;
use crate::{
    overlay::refresh::Fingerprint,
    store::{StoreName, StoreSpec},
};

/// The directories of both kinds of records.
#[derive(Clone, Debug)]
pub(super) struct Records {
    known: PathBuf,
    runtime: PathBuf,
}

/// A record that cannot be kept.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {path}: {source}; the daemon needs its state directory writable")]
pub(super) struct RecordError {
    path: PathBuf,
    source: io::Error,
}

impl Records {
    pub(super) fn new(state_dir: &Path, runtime_dir: &Path) -> Self {
        Self { known: state_dir.join("known"), runtime: runtime_dir.to_owned() }
    }

    /// All stores that were touched and not wound down. Files that are no records are skipped.
    pub(super) fn known(&self) -> Vec<StoreSpec> {
        let Ok(entries) = fs::read_dir(&self.known) else { return Vec::new() };
        let is_record = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "json");
        entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(is_record)
            .filter_map(|path| {
                let spec = serde_json::from_slice(&fs::read(&path).ok()?);
                spec.inspect_err(|error| {
                    tracing::warn!("the record {} cannot be read and is skipped: {error}", path.display())
                })
                .ok()
            })
            .collect()
    }

    /// Keeps a specification, on disk when this returns.
    pub(super) fn remember(&self, spec: &StoreSpec) -> Result<(), RecordError> {
        let path = self.known_path(&spec.name);
        let text = serde_json::to_vec_pretty(spec).map_err(io::Error::from);
        if let (Ok(text), Ok(old)) = (&text, fs::read(&path))
            && *text == old
        {
            return Ok(());
        }
        text.and_then(|text| replace(&path, &text, true)).map_err(|source| RecordError { path, source })
    }

    /// The directory of notes that are kept until the next boot.
    pub(super) fn runtime(&self) -> &Path {
        &self.runtime
    }

    /// Forgets a store.
    pub(super) fn forget(&self, name: &StoreName) {
        // A record that stays is read again at the next start and forgotten then.
        let _ = fs::remove_file(self.known_path(name));
        let _ = fs::remove_file(self.runtime_path(name));
        nix_daemon::remove(&self.runtime, name);
    }

    /// Keeps a fingerprint until the next boot. Losing it costs a look at every path, no more.
    pub(super) fn keep_fingerprint(&self, name: &StoreName, fingerprint: &Fingerprint) {
        let text = serde_json::to_vec(fingerprint).unwrap_or_default();
        if let Err(error) = replace(&self.runtime_path(name), &text, false) {
            tracing::warn!(store = %name, "{name}: its fingerprint cannot be kept: {error}");
        }
    }

    /// The fingerprint that was kept last.
    pub(super) fn fingerprint(&self, name: &StoreName) -> Option<Fingerprint> {
        serde_json::from_slice(&fs::read(self.runtime_path(name)).ok()?).ok()
    }

    fn known_path(&self, name: &StoreName) -> PathBuf {
        self.known.join(format!("{name}.json"))
    }

    fn runtime_path(&self, name: &StoreName) -> PathBuf {
        self.runtime.join(format!("{name}.json"))
    }
}

/// Replaces a file in one step.
fn replace(path: &Path, text: &[u8], sync: bool) -> io::Result<()> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(dir)?;
    let temporary = path.with_extension("new");
    let mut file = fs::File::create(&temporary)?;
    file.write_all(text)?;
    if sync {
        file.sync_all()?;
    }
    fs::rename(&temporary, path)?;
    if sync {
        fs::File::open(dir)?.sync_all()?;
    }
    Ok(())
}
