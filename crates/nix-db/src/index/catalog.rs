//! What one store refers to, and what has changed of that since it was last read.

use std::{
    cell::Cell,
    collections::{HashMap, HashSet},
    os::fd::OwnedFd,
    path::Path,
    time::{Duration, Instant},
};

use rustix::{
    fs::{AtFlags, Dir, FileType, Mode, OFlags},
    io::Errno,
};

use super::protocol::{Contents, EXAMPLES, Failure, Lost, Objects, Places};
use crate::{Database, DatabaseError, Fingerprint, ObjectName, Snapshot};

/// From so many names on, a directory is read as a whole instead of being asked for each.
const MANY: usize = 2000;

/// How long the files of a valid path have to be nowhere until it counts as lost: what is moved is nowhere for a moment.
const MOMENT: Duration = Duration::from_millis(500);

const OPEN: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// One path that is valid.
#[derive(Debug)]
struct Held {
    id: i64,
    size: u64,
    upper: bool,
    lower: bool,
    /// Whether it is a lower path that is referred to: its files were in the lower store, or not in the upper layer, at some time
    /// since it is valid. They may be out of sight for a while, with the filesystem that they are on, and what is in both may be
    /// taken from the upper layer at any time (`nix-store --optimise`).
    is_used: bool,
    /// Since when its files are nowhere.
    lost: Option<Instant>,
}

/// What has changed.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Delta {
    pub(super) added: Vec<ObjectName>,
    pub(super) removed: Vec<ObjectName>,
}

/// What one store refers to.
#[derive(Debug)]
pub(super) struct Catalog {
    places: Places,
    database: Option<Open>,
    rows: HashMap<ObjectName, Held>,
    /// The highest number in the database that was read.
    last: i64,
    contents: Contents,
    /// Why it was not seen where files are, if it was not.
    blind: Option<String>,
    is_absent: bool,
}

#[derive(Debug)]
struct Open {
    database: Database,
    fingerprint: Fingerprint,
    /// The version that was read.
    version: Option<i64>,
}

/// What may have come or gone in the directories of objects.
#[derive(Debug)]
pub(super) enum Touched {
    Names(HashSet<ObjectName>),
    All,
}

impl Open {
    /// Whether it shows what is in a file now.
    fn is_of(&self, fingerprint: &Fingerprint) -> bool {
        if self.database.is_immutable() {
            self.fingerprint == *fingerprint
        } else {
            self.fingerprint.is_of_the_same_file(fingerprint)
        }
    }
}

/// A row as it is read.
struct New {
    id: i64,
    name: ObjectName,
    size: u64,
}

impl Catalog {
    pub(super) fn new(places: Places) -> Self {
        Self {
            places,
            database: None,
            rows: HashMap::new(),
            last: i64::MIN,
            contents: Contents::default(),
            blind: None,
            is_absent: false,
        }
    }

    pub(super) fn places(&self) -> &Places {
        &self.places
    }

    pub(super) fn contents(&self) -> &Contents {
        &self.contents
    }

    /// Whether there is no database.
    pub(super) fn is_absent(&self) -> bool {
        self.is_absent
    }

    /// Whether something has to be looked at again in a moment.
    pub(super) fn is_unsure(&self) -> bool {
        self.blind.is_some() || self.rows.values().any(|held| held.lost.is_some_and(|since| since.elapsed() < MOMENT))
    }

    /// Takes note of all that has changed: in the database, and of the names that were `touched` in the directories of objects.
    /// What was told of before stays when something cannot be read.
    pub(super) fn update(&mut self, touched: &Touched) -> (Delta, Option<Failure>) {
        let mut delta = Delta::default();
        let is_touched = |name: &ObjectName, held: &Held| match touched {
            Touched::All => true,
            Touched::Names(names) => held.lost.is_some() || names.contains(name),
        };
        let again = self.rows.iter().filter(|(name, held)| self.blind.is_some() || is_touched(name, held));
        let again: Vec<_> = again.map(|(name, _)| name.clone()).collect();
        self.see(&again, &mut delta);
        let read = self.read(&mut delta);
        self.reckon();
        self.is_absent = matches!(read, Err(DatabaseError::Absent(_)));
        if let Err(error) = read.and_then(|()| self.name_lost()) {
            self.close();
            // Nix makes it when it uses the store for the first time.
            let upper = self.places.objects.as_ref().map(|objects| &objects.upper);
            let is_gone = was_used(&self.places.db) && upper.is_some_and(|dir| has_objects(dir));
            let is_unused = self.is_absent && self.rows.is_empty() && !is_gone;
            let failure = Failure { message: error.to_string() };
            return (delta, (!is_unused).then_some(failure));
        }
        let blind = self.blind.clone();
        (delta, blind.map(|message| Failure { message }))
    }

    /// Closes the database. It is opened again when it is to be read.
    pub(super) fn close(&mut self) {
        self.database = None;
    }

    fn read(&mut self, delta: &mut Delta) -> Result<(), DatabaseError> {
        let fingerprint = Fingerprint::of(&self.places.db)?;
        let mut open = match self.database.take() {
            Some(open) if open.is_of(&fingerprint) => open,
            _ => Open { database: Database::open(&self.places.db)?, fingerprint, version: None },
        };
        // Asked before: what comes in between is read twice rather than not at all.
        let version = open.database.version()?;
        if open.version == Some(version) {
            self.database = Some(open);
            return Ok(());
        }
        let (last, known) = (self.last, self.rows.len());
        let (rows, are_all) = open.database.read(|snapshot| {
            // Another database may give the same numbers to other paths.
            if open.version.is_some() {
                let new = rows(snapshot, last)?;
                if snapshot.count()? == known + new.len() {
                    return Ok((new, false));
                }
            }
            Ok((rows(snapshot, i64::MIN)?, true))
        })?;
        open.version = Some(version);
        self.database = Some(open);
        if are_all {
            self.keep(&rows, delta);
        }
        self.take(rows, delta);
        Ok(())
    }

    /// Forgets what is not valid any more.
    fn keep(&mut self, rows: &[New], delta: &mut Delta) {
        let valid: HashMap<&ObjectName, i64> = rows.iter().map(|row| (&row.name, row.id)).collect();
        self.rows.retain(|name, held| {
            let stays = valid.get(name).is_some_and(|id| *id == held.id);
            if !stays && held.is_used {
                delta.removed.push(name.clone());
            }
            stays
        });
        self.last = i64::MIN;
    }

    /// Takes note of rows, some of which may be known.
    fn take(&mut self, new: Vec<New>, delta: &mut Delta) {
        let mut unseen = Vec::new();
        for New { id, name, size } in new {
            self.last = self.last.max(id);
            if self.rows.contains_key(&name) {
                continue;
            }
            let held = Held { id, size, upper: false, lower: false, is_used: false, lost: None };
            self.rows.insert(name.clone(), held);
            unseen.push(name);
        }
        self.see(&unseen, delta);
        // What is valid under another number is no other path.
        let rows = &self.rows;
        let is_used = |name: &ObjectName| rows.get(name).is_some_and(|held| held.is_used);
        delta.removed.retain(|name| !is_used(name));
        delta.added.retain(is_used);
    }

    /// Looks in which directories files of these names are.
    fn see(&mut self, names: &[ObjectName], delta: &mut Delta) {
        if names.is_empty() && self.blind.is_none() {
            return;
        }
        self.blind = None;
        let dirs = self.places.objects.iter().flat_map(Objects::dirs);
        let dirs: Vec<_> = dirs.map(|dir| Directory::of(dir, names.len())).collect();
        let now = Instant::now();
        for name in names {
            let Some(held) = self.rows.get_mut(name) else { continue };
            let mut found = dirs.iter().map(|dir| dir.has(name));
            held.upper = found.next() == Some(Found::Yes);
            // A whiteout hides what is below it.
            held.lower = found.find(|found| *found != Found::No) == Some(Found::Yes);
            let was_lost = held.lost.is_some();
            let is_known = !dirs.is_empty();
            held.lost = (is_known && !held.upper && !held.lower).then(|| held.lost.unwrap_or(now));
            // What was taken away and is back may not be kept any more.
            if (held.lower || !held.upper) && (!held.is_used || was_lost && held.lower) {
                held.is_used = true;
                delta.added.push(name.clone());
            }
        }
        self.blind = dirs.iter().find_map(Directory::failure);
    }

    fn reckon(&mut self) {
        let mut contents = Contents::default();
        for held in self.rows.values() {
            if held.upper {
                contents.upper_paths += 1;
                contents.upper_size = contents.upper_size.saturating_add(held.size);
            }
            if held.upper && held.lower {
                contents.shadowed_paths += 1;
                contents.shadowed_size = contents.shadowed_size.saturating_add(held.size);
            }
            contents.lower_paths += u64::from(held.lower && !held.upper);
            contents.lost_paths += u64::from(self.blind.is_none() && held.is_lost());
        }
        self.contents = Contents { lost: std::mem::take(&mut self.contents.lost), ..contents };
    }

    /// Names some of the paths that are lost, with what refers to them.
    fn name_lost(&mut self) -> Result<(), DatabaseError> {
        self.contents.lost.clear();
        if self.contents.lost_paths == 0 {
            return Ok(());
        }
        let lost = self.rows.iter().filter(|(_, held)| held.is_lost());
        let mut lost: Vec<_> = lost.map(|(name, held)| (name.clone(), held.id)).collect();
        lost.sort_unstable();
        lost.truncate(EXAMPLES);
        let Some(open) = &mut self.database else { return Ok(()) };
        self.contents.lost = open.database.read(|snapshot| {
            let lost = lost.iter().map(|(name, id)| {
                let referrers = snapshot.referrers(*id, EXAMPLES)?.into_iter().map(|path| path.name).collect();
                Ok(Lost { name: name.clone(), referrers })
            });
            lost.collect()
        })?;
        Ok(())
    }
}

impl Held {
    fn is_lost(&self) -> bool {
        self.lost.is_some_and(|since| since.elapsed() >= MOMENT)
    }
}

fn rows(snapshot: &Snapshot<'_>, after: i64) -> Result<Vec<New>, DatabaseError> {
    let mut new = Vec::new();
    snapshot.valid_paths_after(after, |path| {
        new.push(New { id: path.id, name: path.name, size: path.nar_size });
        true
    })?;
    Ok(new)
}

/// Whether Nix has used the store whose database is, or was, in a directory: it makes this with the database, and nobody else does.
fn was_used(db: &Path) -> bool {
    db.parent().is_some_and(|state_dir| rustix::fs::lstat(state_dir.join("profiles")).is_ok())
}

/// Whether there are store objects in a directory.
fn has_objects(dir: &Path) -> bool {
    // Where it cannot be looked, there may be.
    let Ok(dir) = rustix::fs::open(dir, OPEN, Mode::empty()) else { return true };
    let is_object =
        |entry: rustix::fs::DirEntry| entry.file_name().to_str().is_ok_and(|name| name.parse::<ObjectName>().is_ok());
    Dir::read_from(&dir).is_ok_and(|entries| entries.flatten().any(is_object))
}

/// Whether a name is in a directory of objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    Yes,
    No,
    /// A whiteout: it is hidden in what is below as well.
    Hidden,
}

/// A directory of objects.
struct Directory<'d> {
    path: &'d Path,
    content: Content,
    failure: Cell<Option<Errno>>,
}

enum Content {
    /// All that is in it.
    Listed(HashMap<Box<str>, Found>),
    /// What is in it is looked for.
    Asked(OwnedFd),
    Unreadable,
}

impl<'d> Directory<'d> {
    /// To look for so many names.
    fn of(path: &'d Path, names: usize) -> Self {
        let (content, failure) = match Content::of(path, names) {
            Ok(content) => (content, None),
            Err(errno) => (Content::Unreadable, Some(errno)),
        };
        Self { path, content, failure: Cell::new(failure) }
    }

    fn has(&self, name: &ObjectName) -> Found {
        let dir = match &self.content {
            Content::Listed(names) => return names.get(name.as_str()).copied().unwrap_or(Found::No),
            Content::Asked(dir) => dir,
            Content::Unreadable => return Found::No,
        };
        match rustix::fs::statat(dir, name.as_str(), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice => Found::Hidden,
            Ok(_) => Found::Yes,
            Err(Errno::NOENT) => Found::No,
            Err(errno) => {
                self.failure.set(Some(errno));
                Found::No
            }
        }
    }

    fn failure(&self) -> Option<String> {
        let errno = self.failure.get()?;
        Some(format!("cannot look into {}: {errno}", self.path.display()))
    }
}

impl Content {
    fn of(path: &Path, names: usize) -> Result<Self, Errno> {
        let dir = rustix::fs::open(path, OPEN, Mode::empty())?;
        if names < MANY {
            return Ok(Self::Asked(dir));
        }
        let mut listed = HashMap::new();
        for entry in Dir::read_from(&dir)? {
            let entry = entry?;
            let Ok(name) = entry.file_name().to_str() else { continue };
            let is_whiteout = entry.file_type() == FileType::CharacterDevice;
            listed.insert(name.into(), if is_whiteout { Found::Hidden } else { Found::Yes });
        }
        Ok(Self::Listed(listed))
    }
}
