//! A database, opened and read.

use std::{
    ffi::OsStr,
    fs::File,
    io::{self, Read as _},
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_encode};
use rusqlite::{Connection, OpenFlags, Row, limits::Limit};
use rustix::{
    fs::{FileType, Stat},
    io::Errno,
};

use super::{DatabaseError, Graph, ObjectName};

/// The version that Nix writes into the file `schema` beside a database (`nixSchemaVersion`), since Nix 1.11.
pub(crate) const SCHEMA: &str = "10";

/// How long somebody else's lock is waited for. Nix holds one that keeps readers out for moments only, and only where it works
/// without a log (`use-sqlite-wal = false`).
const PATIENCE: Duration = Duration::from_secs(2);

/// No value of Nix's is longer. Signatures and what asserts a content address are the longest.
const LONGEST_VALUE: i32 = 1 << 20;

/// How often a database is read that changes meanwhile, where nothing holds changes off.
const TRIES: usize = 3;

/// All but what can stand in a path of a URI.
const NOT_IN_URI: &AsciiSet = &NON_ALPHANUMERIC.remove(b'/').remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// A database that is read and never written.
#[derive(Debug)]
pub struct Database {
    dir: PathBuf,
    connection: Connection,
    /// Where there is no log, and none can be made to take turns with others: what the database was like when it was opened.
    untouched: Option<Fingerprint>,
}

/// By what it is noticed that a database was written to, or is another one: two that differ are of different states. Two within
/// a few milliseconds may be alike though something was written in between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fingerprint {
    database: Mark,
    log: Option<Mark>,
}

/// Device, inode, size, and when it was written to, in seconds and nanoseconds.
type Mark = (u64, u64, i64, i64, u64);

/// What is valid at one moment.
#[derive(Debug)]
pub struct Snapshot<'d> {
    dir: &'d Path,
    connection: &'d Connection,
}

/// A path that is valid in a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValidPath {
    /// Its number in the database.
    pub id: i64,
    /// What it is called.
    pub name: ObjectName,
    /// The hash of its contents as a NAR, as Nix writes it: `sha256:` and 64 digits.
    pub hash: String,
    /// Its size as a NAR, in bytes; 0 where Nix has not noted it.
    pub nar_size: u64,
}

impl Fingerprint {
    /// That of the database in a directory, the `db` of a state directory.
    ///
    /// # Errors
    /// [`DatabaseError::Absent`], [`DatabaseError::Foreign`] for something that is no file, [`DatabaseError::Unreadable`].
    pub fn of(dir: &Path) -> Result<Self, DatabaseError> {
        let look = |name| Ok(file(dir, name)?.map(|stat| mark(&stat)));
        look("db.sqlite-shm")?;
        let database = look("db.sqlite")?.ok_or_else(|| DatabaseError::Absent(dir.to_owned()))?;
        Ok(Self { database, log: look("db.sqlite-wal")? })
    }

    /// Whether it is of the same file as another one.
    pub(crate) fn is_of_the_same_file(&self, other: &Self) -> bool {
        let file = |(device, inode, ..): Mark| (device, inode);
        file(self.database) == file(other.database)
    }

    /// Whether there is nothing in the log.
    fn is_without_log(&self) -> bool {
        self.log.is_none_or(|(_, _, size, ..)| size == 0)
    }
}

/// What a file in the directory of a database is like, if it is there.
fn file(dir: &Path, name: &str) -> Result<Option<Stat>, DatabaseError> {
    match rustix::fs::lstat(dir.join(name)) {
        Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile => Ok(Some(stat)),
        // Whoever opens a pipe waits for ever for what is behind it.
        Ok(_) => Err(DatabaseError::Foreign { dir: dir.to_owned(), what: format!("{name} is not a file") }),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(errno) => Err(DatabaseError::Unreadable { dir: dir.to_owned(), source: errno.into() }),
    }
}

fn mark(stat: &Stat) -> Mark {
    (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime, stat.st_mtime_nsec)
}

impl Database {
    /// Opens the database in a directory, the `db` of a state directory.
    ///
    /// # Errors
    /// [`DatabaseError`].
    pub fn open(dir: &Path) -> Result<Self, DatabaseError> {
        let fingerprint = Fingerprint::of(dir)?;
        check_version(dir)?;
        // SQLite makes a log that is missing even for those who only read (`sqlite3WalOpen`).
        if fingerprint.log.is_none() && has_log(dir)? {
            return Self::open_with(dir, "immutable=1", Some(fingerprint));
        }
        match Self::open_with(dir, "readonly_shm=1", None) {
            // The index of the log is missing, and may not be made. Nix keeps both (`SQLITE_FCNTL_PERSIST_WAL`).
            Err(DatabaseError::Unreadable { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                if fingerprint.is_without_log() {
                    return Self::open_with(dir, "immutable=1", Some(fingerprint));
                }
                open_file(dir).and(Err(DatabaseError::HalfWritten(dir.to_owned())))
            }
            opened => opened,
        }
    }

    fn open_with(dir: &Path, how: &str, untouched: Option<Fingerprint>) -> Result<Self, DatabaseError> {
        let name: PathBuf = dir.join("db.sqlite");
        let name: &OsStr = name.as_ref();
        let uri = format!("file:{}?mode=ro&{how}", percent_encode(name.as_bytes(), NOT_IN_URI));
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let prepared = || {
            let connection = Connection::open_with_flags(&uri, flags)?;
            connection.busy_timeout(PATIENCE)?;
            connection.set_limit(Limit::SQLITE_LIMIT_LENGTH, LONGEST_VALUE)?;
            connection.set_limit(Limit::SQLITE_LIMIT_ATTACHED, 0)?;
            // `temp_store`: nothing is written elsewhere either. The others are what SQLite advises for databases of strangers.
            connection.execute_batch(
                "PRAGMA query_only = ON; PRAGMA temp_store = MEMORY; PRAGMA trusted_schema = OFF; PRAGMA cell_size_check = ON; \
                 PRAGMA mmap_size = 0;",
            )?;
            // Nothing was read so far.
            connection.query_row("SELECT count(*) FROM sqlite_schema", [], |_| Ok(()))?;
            Ok(connection)
        };
        let connection = prepared().map_err(|error| DatabaseError::of(dir, &error))?;
        Ok(Self { dir: dir.to_owned(), connection, untouched })
    }

    /// Reads what belongs together. `look` may be called again, when somebody has written meanwhile to a database on which nothing
    /// holds that off.
    ///
    /// # Errors
    /// [`DatabaseError`].
    pub fn read<T>(
        &mut self,
        mut look: impl FnMut(&Snapshot<'_>) -> Result<T, DatabaseError>,
    ) -> Result<T, DatabaseError> {
        for _ in 0..TRIES {
            let seen = self.read_once(&mut look);
            match self.untouched {
                // With one that has no log and is being written to, anything can have been seen.
                Some(then) if Fingerprint::of(&self.dir)? != then => *self = Self::open(&self.dir)?,
                _ => return seen,
            }
        }
        Err(DatabaseError::Locked(self.dir.clone()))
    }

    fn read_once<T>(
        &mut self,
        look: &mut impl FnMut(&Snapshot<'_>) -> Result<T, DatabaseError>,
    ) -> Result<T, DatabaseError> {
        let sql = |error| DatabaseError::of(&self.dir, &error);
        let transaction = self.connection.transaction().map_err(sql)?;
        let snapshot = Snapshot { dir: &self.dir, connection: &transaction };
        snapshot.check_tables()?;
        look(&snapshot)
    }

    /// Whether it was opened as one that does not change: what is written to it later is not seen.
    pub(crate) fn is_immutable(&self) -> bool {
        self.untouched.is_some()
    }

    /// A number that is another one whenever somebody else has written since it was asked for last.
    ///
    /// # Errors
    /// [`DatabaseError`].
    pub fn version(&self) -> Result<i64, DatabaseError> {
        let version = self.connection.query_row("PRAGMA data_version", [], |row| row.get(0));
        version.map_err(|error| DatabaseError::of(&self.dir, &error))
    }
}

fn open_file(dir: &Path) -> Result<File, DatabaseError> {
    File::open(dir.join("db.sqlite")).map_err(|source| DatabaseError::Unreadable { dir: dir.to_owned(), source })
}

/// Whether changes go to a log first, by the version of the format that readers have to know, which is in the header.
fn has_log(dir: &Path) -> Result<bool, DatabaseError> {
    let mut header = Vec::new();
    let read = open_file(dir)?.take(20).read_to_end(&mut header);
    read.map_err(|source| DatabaseError::Unreadable { dir: dir.to_owned(), source })?;
    Ok(header.get(19) == Some(&2))
}

fn check_version(dir: &Path) -> Result<(), DatabaseError> {
    // Nix makes it last: without it, it is being made.
    if file(dir, "schema")?.is_none() {
        return Err(DatabaseError::Absent(dir.to_owned()));
    }
    let mut version = Vec::new();
    let read = File::open(dir.join("schema")).and_then(|file| file.take(32).read_to_end(&mut version));
    read.map_err(|source| DatabaseError::Unreadable { dir: dir.to_owned(), source })?;
    let version = String::from_utf8_lossy(&version).trim().to_owned();
    if version == SCHEMA { Ok(()) } else { Err(DatabaseError::Version { dir: dir.to_owned(), version }) }
}

impl Snapshot<'_> {
    /// Refuses views and tables of modules in the place of Nix's tables, which run what somebody has put there.
    fn check_tables(&self) -> Result<(), DatabaseError> {
        ["ValidPaths", "Refs"].into_iter().try_for_each(|table| self.check_table(table))
    }

    fn check_table(&self, table: &str) -> Result<(), DatabaseError> {
        let is_table = "SELECT count(*) FROM sqlite_schema WHERE type = 'table' AND rootpage > 0 AND name = ?";
        let count: i64 = self.connection.query_row(is_table, [table], |row| row.get(0)).map_err(self.sql())?;
        if count == 1 { Ok(()) } else { Err(self.foreign(format!("it has no table {table}"))) }
    }

    fn sql(&self) -> impl Fn(rusqlite::Error) -> DatabaseError {
        |error| DatabaseError::of(self.dir, &error)
    }

    fn foreign(&self, what: String) -> DatabaseError {
        DatabaseError::Foreign { dir: self.dir.to_owned(), what }
    }

    fn valid_path(&self, row: &Row<'_>) -> Result<ValidPath, DatabaseError> {
        let id = row.get(0).map_err(self.sql())?;
        let path: String = row.get(1).map_err(self.sql())?;
        let name = ObjectName::in_path(&path).map_err(|error| self.foreign(format!("path {id} is {error}")))?;
        let hash = row.get(2).map_err(self.sql())?;
        let nar_size: Option<i64> = row.get(3).map_err(self.sql())?;
        Ok(ValidPath { id, name, hash, nar_size: nar_size.unwrap_or(0).try_into().unwrap_or(0) })
    }

    /// Visits all paths that are valid, until `visit` wants no more.
    ///
    /// # Errors
    /// [`DatabaseError`].
    pub fn valid_paths(&self, visit: impl FnMut(ValidPath) -> bool) -> Result<(), DatabaseError> {
        self.valid_paths_after(i64::MIN, visit)
    }

    /// Visits those with a number above one, which are what became valid later: no number is given twice (`AUTOINCREMENT`).
    ///
    /// # Errors
    /// [`DatabaseError`].
    pub fn valid_paths_after(&self, id: i64, mut visit: impl FnMut(ValidPath) -> bool) -> Result<(), DatabaseError> {
        let select = "SELECT id, path, hash, narSize FROM ValidPaths WHERE id > ?";
        let mut select = self.connection.prepare(select).map_err(self.sql())?;
        let mut rows = select.query([id]).map_err(self.sql())?;
        while let Some(row) = rows.next().map_err(self.sql())? {
            if !visit(self.valid_path(row)?) {
                break;
            }
        }
        Ok(())
    }

    /// How many paths are valid.
    ///
    /// # Errors
    /// [`DatabaseError`].
    pub fn count(&self) -> Result<usize, DatabaseError> {
        let count = self.connection.query_row("SELECT count(*) FROM ValidPaths", [], |row| row.get::<_, i64>(0));
        Ok(usize::try_from(count.map_err(self.sql())?).unwrap_or_default())
    }

    /// The paths that refer to one, but for itself; so many at most.
    ///
    /// # Errors
    /// [`DatabaseError`].
    pub fn referrers(&self, id: i64, most: usize) -> Result<Vec<ValidPath>, DatabaseError> {
        let select = "SELECT id, path, hash, narSize FROM Refs JOIN ValidPaths ON id = referrer \
                      WHERE reference = ?1 AND referrer != ?1 ORDER BY path LIMIT ?2";
        let mut select = self.connection.prepare(select).map_err(self.sql())?;
        let most = i64::try_from(most).unwrap_or(i64::MAX);
        let mut rows = select.query([id, most]).map_err(self.sql())?;
        let mut referrers = Vec::new();
        while let Some(row) = rows.next().map_err(self.sql())? {
            referrers.push(self.valid_path(row)?);
        }
        Ok(referrers)
    }

    /// What the paths have to do with one another.
    ///
    /// # Errors
    /// [`DatabaseError`].
    pub fn graph(&self) -> Result<Graph, DatabaseError> {
        self.check_table("DerivationOutputs")?;
        Graph::read(self)
    }

    /// Visits the rows of a query without parameters.
    pub(crate) fn each(
        &self,
        select: &str,
        mut visit: impl FnMut(&Row<'_>) -> rusqlite::Result<()>,
    ) -> Result<(), DatabaseError> {
        let mut select = self.connection.prepare(select).map_err(self.sql())?;
        let mut rows = select.query([]).map_err(self.sql())?;
        while let Some(row) = rows.next().map_err(self.sql())? {
            visit(row).map_err(self.sql())?;
        }
        Ok(())
    }
}
