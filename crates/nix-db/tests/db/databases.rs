//! Databases as Nix makes them, and as they are not.

use std::{
    collections::BTreeMap,
    fs,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::Path,
    sync::{LazyLock, mpsc},
    time::Duration,
};

use layered_stores_nix_db::{Database, DatabaseError, Fingerprint, ValidPath};
use proptest::prelude::*;
use tempfile::TempDir;

use crate::nix::{Nix, name};

fn all(database: &mut Database) -> Result<Vec<ValidPath>, DatabaseError> {
    database.read(|snapshot| {
        let mut paths = Vec::new();
        snapshot.valid_paths(|path| {
            paths.push(path);
            true
        })?;
        Ok(paths)
    })
}

fn names(dir: &Path) -> Result<Vec<String>, DatabaseError> {
    let paths = all(&mut Database::open(dir)?)?;
    Ok(paths.into_iter().map(|path| path.name.to_string()).collect())
}

/// Every file: what is in it, as a hash, and when it was changed.
fn contents(dir: &Path) -> BTreeMap<String, (u64, i64, i64)> {
    let entries = fs::read_dir(dir).expect("listed").map(|entry| entry.expect("an entry"));
    let look = |entry: fs::DirEntry| {
        let stat = entry.metadata().expect("looked at");
        let mut hasher = DefaultHasher::new();
        fs::read(entry.path()).expect("read").hash(&mut hasher);
        (entry.file_name().to_string_lossy().into_owned(), (hasher.finish(), stat.mtime(), stat.mtime_nsec()))
    };
    entries.map(look).collect()
}

fn referrers(dir: &Path, id: i64, most: usize) -> Vec<String> {
    let mut database = Database::open(dir).expect("opened");
    let referrers = database.read(|snapshot| snapshot.referrers(id, most)).expect("read");
    referrers.into_iter().map(|path| path.name.to_string()).collect()
}

#[test]
fn what_is_valid_is_told_with_what_refers_to_it() {
    let dir = TempDir::new().expect("a directory");
    let mut nix = Nix::opens(dir.path(), "wal");
    nix.registers(1..=4);
    for (referrer, reference) in [(1, 2), (2, 2), (3, 2), (4, 1)] {
        nix.refers(referrer, reference);
    }
    nix.runs("update ValidPaths set narSize = null where id = 4");
    let mut database = Database::open(dir.path()).expect("opened");
    let paths = all(&mut database).expect("read");
    let as_seen: Vec<_> = paths.iter().map(|path| (path.id, path.name.to_string(), path.nar_size)).collect();
    assert_eq!(as_seen, [(1, name(1), 100), (2, name(2), 200), (3, name(3), 300), (4, name(4), 0)]);
    assert_eq!(paths[1].hash, format!("sha256:{:064}", 2));
    assert_eq!(referrers(dir.path(), 2, 10), [name(1), name(3)], "not itself");
    assert_eq!(referrers(dir.path(), 2, 1), [name(1)]);
    let mut seen = 0;
    let first = database.read(|snapshot| {
        snapshot.valid_paths(|_| {
            seen += 1;
            false
        })
    });
    assert!(first.is_ok() && seen == 1, "it ends when nobody wants more");
    nix.ends();
}

#[test]
fn nix_writes_while_it_is_read_and_is_seen_when_it_has_committed() {
    let dir = TempDir::new().expect("a directory");
    let mut nix = Nix::opens(dir.path(), "wal");
    nix.registers(1..=1);
    let mut database = Database::open(dir.path()).expect("opened");
    let version = database.version().expect("a version");
    let seen = database.read(|snapshot| {
        let mut seen = Vec::new();
        snapshot.valid_paths(|path| {
            // In the middle of reading somebody commits, and does not wait.
            nix.registers(2..=2);
            seen.push(path.name.to_string());
            true
        })?;
        Ok(seen)
    });
    assert_eq!(seen.expect("read"), [name(1)], "what belongs together");
    assert_ne!(database.version().expect("a version"), version);
    assert_eq!(all(&mut database).expect("read").len(), 2, "what was committed is in the log only");

    nix.runs("begin immediate");
    nix.registers(3..=3);
    assert_eq!(all(&mut database).expect("read").len(), 2);
    nix.runs("commit");
    nix.checkpoints();
    assert_eq!(all(&mut database).expect("read").len(), 3, "and then in the database");
    nix.ends();
}

#[test]
fn nothing_is_made_or_changed() {
    for journal in ["wal", "truncate", "delete"] {
        for (what, is_open, gone) in [
            ("Nix has it open", true, &[][..]),
            ("Nix was killed", false, &[]),
            ("only the index of the log is missing", false, &["db.sqlite-shm"]),
            ("it was copied alone", false, &["db.sqlite-shm", "db.sqlite-wal"]),
        ] {
            let dir = TempDir::new().expect("a directory");
            let mut nix = Nix::opens(dir.path(), journal);
            nix.registers(1..=1);
            if gone.len() == 2 {
                nix.checkpoints();
            }
            let nix = if is_open {
                Some(nix)
            } else {
                nix.dies();
                None
            };
            for file in gone {
                let _ = fs::remove_file(dir.path().join(file));
            }
            let before = contents(dir.path());
            let read = names(dir.path());
            assert_eq!(contents(dir.path()), before, "{journal}, {what}");
            if gone.len() == 1 && journal == "wal" {
                // Only who may make files can play the log back.
                assert!(matches!(read, Err(DatabaseError::HalfWritten(_))), "{read:?}");
            } else {
                assert_eq!(read.expect("read"), [name(1)], "{journal}, {what}");
            }
            if let Some(nix) = nix {
                nix.ends();
            }
        }
    }
}

#[test]
fn one_without_a_log_is_read_as_it_is_now() {
    let dir = TempDir::new().expect("a directory");
    let mut nix = Nix::opens(dir.path(), "wal");
    nix.registers(1..=1);
    nix.checkpoints();
    nix.ends();
    for file in ["db.sqlite-wal", "db.sqlite-shm"] {
        fs::remove_file(dir.path().join(file)).expect("removed");
    }
    let mut database = Database::open(dir.path()).expect("opened");
    assert_eq!(all(&mut database).expect("read").len(), 1);
    let mut reads = 0;
    let seen = database.read(|snapshot| {
        reads += 1;
        if reads == 1 {
            let mut nix = Nix::opens(dir.path(), "wal");
            nix.registers(2..=2);
            nix.checkpoints();
            nix.ends();
        }
        let mut seen = 0;
        snapshot.valid_paths(|_| {
            seen += 1;
            true
        })?;
        Ok(seen)
    });
    assert_eq!((seen.expect("read"), reads), (2, 2), "what was seen while it changed counts for nothing");
}

#[test]
fn what_is_there_instead_of_a_database_is_named() {
    let dir = TempDir::new().expect("a directory");
    let path = dir.path();
    let refused = || names(path).expect_err("refused");
    assert!(matches!(names(&path.join("missing")), Err(DatabaseError::Absent(_))));
    assert!(matches!(refused(), DatabaseError::Absent(_)), "{:?}", refused());
    fs::create_dir(path.join("db.sqlite")).expect("made");
    assert!(matches!(refused(), DatabaseError::Foreign { .. }), "{:?}", refused());
    fs::remove_dir(path.join("db.sqlite")).expect("removed");
    let pipe = rustix::fs::FileType::Fifo;
    rustix::fs::mknodat(rustix::fs::CWD, path.join("db.sqlite"), pipe, 0o600.into(), 0).expect("made");
    assert!(matches!(refused(), DatabaseError::Foreign { .. }), "nobody writes into the pipe: {:?}", refused());
    fs::remove_file(path.join("db.sqlite")).expect("removed");

    fs::write(path.join("db.sqlite"), "").expect("written");
    assert!(matches!(refused(), DatabaseError::Absent(_)), "Nix is making it: {:?}", refused());
    fs::write(path.join("schema"), "10").expect("written");
    assert!(refused().to_string().contains("no table ValidPaths"), "{}", refused());
    fs::write(path.join("db.sqlite"), "x".repeat(10_000)).expect("written");
    assert!(matches!(refused(), DatabaseError::Damaged { .. }), "{:?}", refused());
    fs::remove_file(path.join("db.sqlite")).expect("removed");

    let mut nix = Nix::opens(path, "wal");
    assert_eq!(names(path).expect("read"), Vec::<String>::new());
    for version in ["7", "11", ""] {
        fs::write(path.join("schema"), version).expect("written");
        assert!(matches!(refused(), DatabaseError::Version { version: said, .. } if said == version));
    }
    fs::write(path.join("schema"), "10\n").expect("written");
    nix.runs("insert into ValidPaths (path, hash, registrationTime) values ('/nix/store/../x', '', 0)");
    assert!(refused().to_string().contains("/nix/store/../x"), "{}", refused());
    nix.runs("alter table ValidPaths drop column narSize");
    assert!(refused().to_string().contains("narSize"), "{}", refused());
    nix.runs(
        "drop table ValidPaths; create view ValidPaths as with recursive r(id, path, hash, narSize) as \
         (values(1, '', '', 1) union all select id + 1, path, hash, narSize from r) select * from r",
    );
    assert!(refused().to_string().contains("no table ValidPaths"), "it would never end: {}", refused());
    nix.ends();
}

#[test]
fn one_that_is_cut_off_or_replaced_is_noticed() {
    let dir = TempDir::new().expect("a directory");
    let mut nix = Nix::opens(dir.path(), "wal");
    nix.registers(1..=2000);
    nix.checkpoints();
    nix.ends();
    let file = dir.path().join("db.sqlite");
    let fingerprint = || Fingerprint::of(dir.path()).expect("there");
    let (then, whole) = (fingerprint(), fs::read(&file).expect("read"));
    fs::write(&file, &whole[..whole.len() / 2]).expect("written");
    assert_ne!(fingerprint(), then);
    assert!(matches!(names(dir.path()), Err(DatabaseError::Damaged { .. })));
    let then = fingerprint();
    fs::write(dir.path().join("copy"), &whole).expect("written");
    fs::rename(dir.path().join("copy"), &file).expect("renamed");
    assert_ne!(fingerprint(), then);
    assert_eq!(names(dir.path()).expect("it is whole again").len(), 2000);
}

#[test]
fn who_locks_it_is_not_waited_for_for_long() {
    let dir = TempDir::new().expect("a directory");
    let mut nix = Nix::opens(dir.path(), "truncate");
    nix.registers(1..=1);
    nix.runs("begin exclusive");
    let (said, answer) = mpsc::channel();
    let path = dir.path().to_owned();
    std::thread::spawn(move || said.send(names(&path).map_err(|error| matches!(error, DatabaseError::Locked(_)))));
    assert_eq!(answer.recv_timeout(Duration::from_secs(30)).expect("an answer"), Err(true));
    nix.runs("rollback");
    assert_eq!(names(dir.path()).expect("read"), [name(1)]);
    nix.ends();
}

#[test]
fn what_may_not_be_read_is_named() {
    let dir = TempDir::new().expect("a directory");
    Nix::opens(dir.path(), "wal").ends();
    // Root may read everything.
    if rustix::process::geteuid().is_root() {
        return;
    }
    fs::set_permissions(dir.path().join("db.sqlite"), fs::Permissions::from_mode(0o000)).expect("set");
    assert!(matches!(names(dir.path()), Err(DatabaseError::Unreadable { .. })));
}

/// The files of a database with something in its log.
fn whole() -> &'static BTreeMap<String, Vec<u8>> {
    static WHOLE: LazyLock<BTreeMap<String, Vec<u8>>> = LazyLock::new(|| {
        let dir = TempDir::new().expect("a directory");
        let mut nix = Nix::opens(dir.path(), "wal");
        nix.registers(1..=200);
        nix.runs("pragma wal_checkpoint(passive)");
        nix.registers(201..=300);
        nix.dies();
        let file = |name: &str| (name.to_owned(), fs::read(dir.path().join(name)).expect("read"));
        ["db.sqlite", "db.sqlite-wal", "db.sqlite-shm", "schema"].map(file).into()
    });
    &WHOLE
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nothing_that_somebody_puts_there_does_harm(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..40),
        cut in prop::option::weighted(0.3, any::<prop::sample::Index>()),
        which in prop::sample::select(vec!["db.sqlite", "db.sqlite-wal", "db.sqlite-shm"]),
    ) {
        let dir = TempDir::new().expect("a directory");
        for (file, content) in whole() {
            fs::write(dir.path().join(file), content).expect("written");
        }
        let file = dir.path().join(which);
        let mut content = fs::read(&file).expect("read");
        for (at, value) in changes {
            let at = at.index(content.len());
            content[at] = value;
        }
        if let Some(cut) = cut {
            content.truncate(cut.index(content.len()));
        }
        fs::write(&file, content).expect("written");
        let before = contents(dir.path());
        let mut count = 0;
        if let Ok(mut database) = Database::open(dir.path()) {
            let _ = database.read(|snapshot| {
                snapshot.valid_paths(|path| {
                    assert!(!path.name.as_str().contains('/'));
                    count += 1;
                    count < 100_000
                })?;
                snapshot.referrers(1, 10)
            });
        }
        prop_assert!(count < 100_000, "it ends");
        prop_assert_eq!(contents(dir.path()), before);
    }
}
