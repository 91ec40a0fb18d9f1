//! What outlives the daemon: which stores it has touched, and which layers it has last found right.
//!
//! * `<state>/known/<name>.json` holds a store's specification from before its first directory is made until after its
//!   last trace is undone. It is how a store is wound down that was removed from the configuration while the daemon was
//!   not running. Beside that it has the [`Marks`] by which the store's directories are known again. Only root reads it: the
//!   settings of a Nix daemon may be secret.
//! * `<runtime>/<name>.upper.json` has these as well: the state directory may be on a filesystem that is taken away. Those of
//!   an ephemeral store are there only, because its directories are gone with the next boot.
//! * `<runtime>/<name>.asked.json` holds what people have asked for otherwise than declared.
//! * `<runtime>/<name>.json` holds a [`Fingerprint`]. It is how a daemon that starts again knows without looking at every
//!   path whether anything changed in the meantime.

mod asked;
#[cfg(test)]
mod earlier;
mod error;

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

pub use error::RecordError;
use layered_stores_model::{StoreName, StoreSpec};
use layered_stores_overlay::{
    identity::{Id, Mark, Marks},
    progress::{self, Spot},
    refresh::Fingerprint,
};
use serde::{Deserialize, Serialize};

use super::nix_daemon;
use crate::file::{FOR_ALL, FOR_ROOT, UNFINISHED, replace, restrict};

/// The directories of both kinds of records.
#[derive(Clone, Debug)]
pub(super) struct Records {
    known: PathBuf,
    runtime: PathBuf,
    soft_reboots: u32,
    /// What is on disk, as far as this run of the daemon has read or written it; `None` until it was read. The specifications are
    /// the engine's own.
    on_disk: Arc<Mutex<Option<HashMap<StoreName, Record>>>>,
}

/// What is kept of a store in the state directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    #[serde(flatten)]
    spec: Arc<StoreSpec>,
    /// `None` in a record of a version that had no marks.
    #[serde(default)]
    marks: Option<Marks>,
}

impl Record {
    fn of(spec: &Arc<StoreSpec>, marks: &Marks) -> Self {
        // Those of an ephemeral store are gone with the next boot.
        let lasting = if spec.ephemeral.is_some() { Marks::default() } else { marks.clone() };
        Self { spec: Arc::clone(spec), marks: Some(lasting) }
    }

    /// By what the directories of the store were known again that it was then.
    fn marks(&self) -> Option<Marks> {
        match &self.marks {
            _ if self.spec.ephemeral.is_some() => None,
            Some(marks) => Some(marks.clone()),
            // It was brought up once, by a version that had no marks.
            None => Some(unmarked(&self.spec)),
        }
    }
}

/// What is kept of a store until the next boot.
#[derive(PartialEq, Eq, Serialize, Deserialize)]
struct Note {
    ephemeral: bool,
    /// Since which soft reboot. One unmounts what is in memory, and leaves the note (systemd-soft-reboot.service(8)).
    #[serde(default)]
    soft_reboots: u32,
    marks: Marks,
}

/// The stores that were touched and not wound down.
#[derive(Debug, Default)]
pub(super) struct Known {
    pub(super) stores: Vec<Arc<StoreSpec>>,
    /// Those of which nothing is known but that there is a record, and that they are declared no more.
    pub(super) unreadable: Vec<String>,
}

impl Records {
    pub(super) fn new(state_dir: &Path, runtime_dir: &Path) -> Self {
        let (known, runtime) = (state_dir.join("known"), runtime_dir.to_owned());
        Self { known, runtime, soft_reboots: 0, on_disk: Arc::default() }
    }

    /// The same after so many soft reboots.
    pub(super) fn since(self, soft_reboots: u32) -> Self {
        Self { soft_reboots, ..self }
    }

    /// All stores that were touched and not wound down. A record that cannot be read is not taken for none: that of a store
    /// which is declared is made anew, and moved aside; another one stays, and is told of at every start.
    pub(super) fn known(&self, declared: &[StoreSpec]) -> Result<Known, RecordError> {
        let (records, unreadable) = self.read(declared)?;
        let stores = records.values().map(|record| Arc::clone(&record.spec)).collect();
        *self.on_disk() = Some(records);
        Ok(Known { stores, unreadable })
    }

    fn read(&self, declared: &[StoreSpec]) -> Result<(HashMap<StoreName, Record>, Vec<String>), RecordError> {
        let list = |source| RecordError::List { path: self.known.clone(), source };
        let entries = match fs::read_dir(&self.known) {
            Ok(entries) => entries,
            // The first start of all.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((HashMap::new(), Vec::new())),
            Err(error) => return Err(list(error)),
        };
        let (mut records, mut unreadable) = (HashMap::new(), Vec::new());
        for entry in entries {
            let path = entry.map_err(list)?.path();
            if path.extension().is_some_and(|extension| extension == UNFINISHED) {
                // A daemon was killed while it wrote this.
                let _ = fs::remove_file(&path);
                continue;
            }
            // Those of earlier versions could be read by everybody.
            if let Err(error) = restrict(&path) {
                tracing::warn!("{} cannot be kept from others: {error}", path.display());
            }
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            let error = match fs::read(&path).and_then(|text| Ok(serde_json::from_slice::<Record>(&text)?)) {
                Ok(record) => {
                    records.insert(record.spec.name.clone(), record);
                    continue;
                }
                Err(error) => error,
            };
            let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            if declared.iter().any(|spec| spec.name.as_str() == name) {
                let aside = path.with_extension("json.unreadable");
                // What cannot be moved is replaced when the store is recorded; nothing else needs it out of the way.
                let kept = match fs::rename(&path, &aside) {
                    Ok(()) => format!("it is kept as {}", aside.display()),
                    Err(error) => format!("and it cannot be moved away: {error}"),
                };
                tracing::warn!(
                    store = name,
                    "the record {} cannot be read: {error}; {kept}. If {name} had other directories before, it may still be \
                     mounted there",
                    path.display()
                );
            } else {
                tracing::error!(
                    store = name,
                    "the record {} cannot be read: {error}; the store {name} is not declared any more and may still be \
                     mounted, which nobody looks after: look for it with `findmnt --types overlay`, then remove the record",
                    path.display()
                );
                unreadable.push(name);
            }
        }
        Ok((records, unreadable))
    }

    /// Keeps a specification and the marks of its directories, on disk when this returns.
    pub(super) fn remember(&self, spec: &Arc<StoreSpec>, marks: &Marks) -> Result<(), RecordError> {
        progress::at(Spot::Records);
        let record = Record::of(spec, marks);
        keep(&self.known_path(&spec.name), &serde_json::to_vec_pretty(&record), true)?;
        self.note(&spec.name, Some(record));
        self.keep_note(spec, marks)
    }

    /// The same for a store that is mounted. A record that was found at the start is believed to be there still: what holds it
    /// may be full by now, read-only, or silent.
    pub(super) fn keep(&self, spec: &Arc<StoreSpec>, marks: &Marks) -> Result<(), RecordError> {
        let is_kept = self.on_disk().as_ref().map(|records| records.get(&spec.name) == Some(&Record::of(spec, marks)));
        match is_kept {
            Some(true) => self.keep_note(spec, marks),
            Some(false) => self.remember(spec, marks),
            None => {
                self.keep_note(spec, marks)?;
                Err(RecordError::Silent(self.known.clone()))
            }
        }
    }

    fn keep_note(&self, spec: &StoreSpec, marks: &Marks) -> Result<(), RecordError> {
        let (ephemeral, soft_reboots) = (spec.ephemeral.is_some(), self.soft_reboots);
        let note = Note { ephemeral, soft_reboots, marks: marks.clone() };
        keep(&self.note_path(&spec.name), &serde_json::to_vec(&note), false)
    }

    /// The directory of the records that outlive a boot.
    pub(super) fn directory(&self) -> &Path {
        &self.known
    }

    fn on_disk(&self) -> MutexGuard<'_, Option<HashMap<StoreName, Record>>> {
        // A panic while it was held leaves a map that is still a map.
        self.on_disk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, name: &StoreName, record: Option<Record>) {
        if let Some(records) = self.on_disk().as_mut() {
            match record {
                Some(record) => drop(records.insert(name.clone(), record)),
                None => drop(records.remove(name)),
            }
        }
    }

    /// Refuses a store whose record cannot be read: what is in its directories may never have been its own.
    pub(super) fn refuse_unreadable(&self, name: &StoreName) -> Result<(), RecordError> {
        progress::at(Spot::Records);
        let (record, aside) = (self.known_path(name), self.aside(name));
        match read(&record)? {
            Some(text) if serde_json::from_slice::<Record>(&text).is_ok() => Ok(()),
            Some(_) => Err(RecordError::Unreadable { path: record, store: name.clone() }),
            None if aside.exists() => Err(RecordError::Unreadable { path: aside, store: name.clone() }),
            None => Ok(()),
        }
    }

    /// By what the directories of a store are known again, as far as it had them when this was noted. There are several
    /// records, any of which may be older than the others.
    pub(super) fn marks(&self, spec: &StoreSpec) -> Result<Vec<Marks>, RecordError> {
        progress::at(Spot::Records);
        let on_disk = match read(&self.known_path(&spec.name))? {
            Some(text) => match serde_json::from_slice::<Record>(&text) {
                Ok(record) => record.marks(),
                // It was there before, and most likely so.
                Err(_) => Some(unmarked(spec)),
            },
            // One that could not be read was moved aside, and says that much.
            None => self.aside(&spec.name).exists().then(|| unmarked(spec)),
        };
        self.and_noted(spec, on_disk)
    }

    /// The same of a store that is mounted, without a look at the records on disk.
    pub(super) fn marks_at_hand(&self, spec: &StoreSpec) -> Result<Vec<Marks>, RecordError> {
        let on_disk = self.on_disk().as_ref().and_then(|records| records.get(&spec.name)?.marks());
        self.and_noted(spec, on_disk)
    }

    fn and_noted(&self, spec: &StoreSpec, on_disk: Option<Marks>) -> Result<Vec<Marks>, RecordError> {
        let ephemeral = spec.ephemeral.is_some();
        // What cannot be read here is in the record as well.
        let note = read(&self.note_path(&spec.name))?.and_then(|text| serde_json::from_slice::<Note>(&text).ok());
        let is_of_this_boot = |note: &Note| !ephemeral || note.soft_reboots == self.soft_reboots;
        let noted = note.filter(|note| note.ephemeral == ephemeral && is_of_this_boot(note)).map(|note| note.marks);
        Ok(on_disk.filter(|_| !ephemeral).into_iter().chain(noted).collect())
    }

    /// Which stores have a directory with this mark on record, but for one of a name.
    pub(super) fn with_mark(&self, but: Option<&StoreName>, id: &Id) -> Vec<(StoreName, Mark)> {
        let records = self.on_disk();
        let others = records.iter().flatten().filter(|(other, _)| Some(*other) != but);
        let marks = others.flat_map(|(other, record)| {
            let marks = record.marks.iter().flat_map(|marks| [&marks.upper, &marks.state]);
            marks.flatten().map(move |mark| (other, mark))
        });
        marks
            .filter(|(_, mark)| mark.id.as_ref() == Some(id))
            .map(|(other, mark)| (other.clone(), mark.clone()))
            .collect()
    }

    /// Has a store begin anew, with directories that are known by these marks or by none, on disk when this returns.
    pub(super) fn begin_anew(&self, name: &StoreName, marks: &Marks) -> Result<(), RecordError> {
        progress::at(Spot::Records);
        let path = self.known_path(name);
        if let Some(text) = read(&path)?
            && let Ok(record) = serde_json::from_slice::<Record>(&text)
        {
            let record = Record { marks: Some(marks.clone()), ..record };
            match keep(&path, &serde_json::to_vec_pretty(&record), true) {
                Ok(()) => self.note(name, Some(record)),
                // The store is down, and has no traces that somebody would have to undo.
                Err(error) if error.is_of_no_room() => {
                    remove(&path)?;
                    self.note(name, None);
                }
                Err(error) => return Err(error),
            }
        }
        remove(&self.aside(name))?;
        remove(&self.note_path(name))
    }

    /// The directory of notes that are kept until the next boot.
    pub(super) fn runtime(&self) -> &Path {
        &self.runtime
    }

    /// Forgets a store.
    pub(super) fn forget(&self, name: &StoreName) -> Result<(), RecordError> {
        progress::at(Spot::Records);
        self.note(name, None);
        let _ = fs::remove_file(self.runtime_path(name));
        let _ = fs::remove_file(self.note_path(name));
        nix_daemon::remove(&self.runtime, name);
        remove(&self.aside(name))?;
        remove(&self.known_path(name))
    }

    /// Keeps a fingerprint until the next boot. Losing it costs a look at every path, no more.
    pub(super) fn keep_fingerprint(&self, name: &StoreName, fingerprint: &Fingerprint) {
        let text = serde_json::to_vec(fingerprint).unwrap_or_default();
        if let Err(error) = replace(&self.runtime_path(name), &text, FOR_ALL, false) {
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

    /// Where a record is kept that could not be read.
    fn aside(&self, name: &StoreName) -> PathBuf {
        self.known.join(format!("{name}.json.unreadable"))
    }

    fn note_path(&self, name: &StoreName) -> PathBuf {
        // No store's name has a dot.
        self.runtime.join(format!("{name}.upper.json"))
    }
}

/// That a store had an upper layer, and no more.
fn unmarked(spec: &StoreSpec) -> Marks {
    Marks { upper: Some(Mark { path: spec.layers.upper.clone(), id: None }), state: None }
}

fn read(path: &Path) -> Result<Option<Vec<u8>>, RecordError> {
    match fs::read(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(RecordError::Read { path: path.to_owned(), source }),
    }
}

fn remove(path: &Path) -> Result<(), RecordError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(RecordError::Remove { path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}

/// Writes a file that does not hold this text already.
fn keep(path: &Path, text: &serde_json::Result<Vec<u8>>, sync: bool) -> Result<(), RecordError> {
    let write = |source| RecordError::Write { path: path.to_owned(), source };
    let text = text.as_ref().map_err(|error| write(io::Error::other(error.to_string())))?;
    if fs::read(path).is_ok_and(|old| old == *text) {
        return Ok(());
    }
    replace(path, text, FOR_ROOT, sync).map_err(write)
}

#[cfg(test)]
mod tests;
