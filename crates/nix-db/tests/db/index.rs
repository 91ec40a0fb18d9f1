//! What the index tells of stores.

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::net::UnixStream,
    path::PathBuf,
    time::Duration,
};

use layered_stores_nix_db::index::{
    self,
    protocol::{Answer, Contents, EXAMPLES, Failure, Lost, Objects, Places, Request},
};
use tempfile::TempDir;

use crate::nix::{Nix, name};

/// More than anything takes; who waits for it has failed.
const FOR_EVER: Duration = Duration::from_secs(60);

/// A store in a directory of its own.
struct Store {
    dir: TempDir,
}

impl Store {
    fn new() -> Self {
        let store = Self { dir: TempDir::new().expect("made") };
        for dir in ["state", "upper", "lower"] {
            fs::create_dir(store.path(dir)).expect("made");
        }
        store
    }

    fn path(&self, of: &str) -> PathBuf {
        self.dir.path().join(of)
    }

    fn places(&self) -> Places {
        self.places_over(vec![self.path("lower")])
    }

    fn places_over(&self, lowers: Vec<PathBuf>) -> Places {
        Places { db: self.path("state/db"), objects: Some(Objects { upper: self.path("upper"), lowers }) }
    }

    fn nix(&self) -> Nix {
        let _ = fs::create_dir(self.path("state/db"));
        Nix::opens(&self.path("state/db"), "wal")
    }

    fn has(&self, layer: &str, numbers: std::ops::RangeInclusive<usize>) {
        for number in numbers {
            fs::create_dir(self.path(layer).join(name(number))).expect("made");
        }
    }

    fn loses(&self, layer: &str, number: usize) {
        fs::remove_dir(self.path(layer).join(name(number))).expect("removed");
    }
}

/// The daemon's end.
struct Daemon {
    stream: UnixStream,
    answers: BufReader<UnixStream>,
    /// The store that it is about.
    id: u64,
    used: BTreeSet<String>,
    token: u64,
    absent: bool,
}

impl Daemon {
    fn new() -> Self {
        let (stream, other) = UnixStream::pair().expect("a pair");
        std::thread::spawn(move || index::serve(other));
        stream.set_read_timeout(Some(FOR_EVER)).expect("set");
        let answers = BufReader::new(stream.try_clone().expect("cloned"));
        Self { stream, answers, id: 1, used: BTreeSet::new(), token: 0, absent: false }
    }

    fn watching(store: &Store) -> Self {
        let mut daemon = Self::new();
        daemon.asks(&Request::Watch { id: 1, places: store.places() });
        daemon
    }

    fn asks(&mut self, request: &Request) {
        writeln!(self.stream, "{}", serde_json::to_string(request).expect("written")).expect("sent");
    }

    /// Waits for the next state.
    fn state(&mut self) -> (Contents, Option<Failure>, Vec<u64>) {
        loop {
            let mut line = String::new();
            self.answers.read_line(&mut line).expect("an answer in time");
            match serde_json::from_str(&line).expect("an answer") {
                Answer::Used { id, added, removed } if id == self.id => {
                    assert!(added.len() + removed.len() <= index::protocol::NAMES);
                    self.used.extend(added.iter().map(ToString::to_string));
                    for name in removed {
                        assert!(self.used.remove(name.as_str()), "{name} was told");
                    }
                }
                Answer::State { id, contents, failure, synced, absent } if id == self.id => {
                    self.absent = absent;
                    return (contents, failure, synced);
                }
                Answer::Used { .. } | Answer::State { .. } => {}
            }
        }
    }

    /// Waits until the store is so.
    fn until(&mut self, is_so: impl Fn(&Contents, Option<&Failure>) -> bool) -> Contents {
        loop {
            let (contents, failure, _) = self.state();
            if is_so(&contents, failure.as_ref()) {
                return contents;
            }
        }
    }

    /// What is in the store now.
    fn synced(&mut self) -> Contents {
        self.token += 1;
        self.asks(&Request::Sync { id: 1, token: self.token });
        loop {
            let (contents, _, synced) = self.state();
            if synced.contains(&self.token) {
                return contents;
            }
        }
    }

    fn uses(&self, numbers: std::ops::RangeInclusive<usize>) -> bool {
        self.used == numbers.map(name).collect()
    }
}

#[test]
fn what_is_not_in_the_upper_layer_alone_is_used_from_the_lower_store() {
    let store = Store::new();
    store.has("lower", 1..=4);
    store.has("upper", 4..=5);
    let mut nix = store.nix();
    nix.registers(1..=2);
    let mut daemon = Daemon::watching(&store);
    daemon.state();
    assert!(daemon.uses(1..=2));
    // What is in both, and what is the store's own.
    nix.registers(4..=5);
    let contents = daemon.until(|contents, _| contents.upper_paths == 2);
    let wanted = Contents {
        upper_paths: 2,
        upper_size: 900,
        shadowed_paths: 1,
        shadowed_size: 400,
        lower_paths: 2,
        ..Contents::default()
    };
    assert_eq!(contents, wanted);
    assert_eq!(daemon.used, [1, 2, 4].map(name).into());
    // What is in both is taken from the upper layer (`nix-store --optimise`), and is used before and after.
    store.loses("upper", 4);
    daemon.until(|contents, _| contents.lower_paths == 3 && contents.shadowed_paths == 0);
    nix.runs("delete from ValidPaths where id in (1, 5)");
    let contents = daemon.until(|contents, _| contents.lower_paths == 2);
    assert_eq!((contents.upper_paths, &daemon.used), (0, &[2, 4].map(name).into()));
}

#[test]
fn all_of_a_burst_is_told_and_what_was_registered_anew_stays_used() {
    const MANY: usize = 3_000;
    let store = Store::new();
    store.has("lower", 1..=MANY);
    let mut nix = store.nix();
    let mut daemon = Daemon::watching(&store);
    daemon.state();
    for first in (1..=MANY).step_by(100) {
        nix.registers(first..=first + 99);
    }
    assert_eq!(daemon.synced().lower_paths, u64::try_from(MANY).expect("few"));
    assert!(daemon.uses(1..=MANY));
    // With other numbers, as Nix has them after a path was deleted and substituted again.
    nix.runs("create table T as select * from ValidPaths; delete from ValidPaths");
    nix.runs(
        "insert into ValidPaths select id + 20000, path, hash, 1, null, narSize, null, null, null from T where id > 1",
    );
    daemon.synced();
    assert!(daemon.uses(2..=MANY));
}

#[test]
fn a_path_whose_files_are_nowhere_is_lost_until_they_are_back() {
    let store = Store::new();
    store.has("lower", 1..=9);
    store.has("upper", 10..=10);
    let mut nix = store.nix();
    nix.registers(1..=10);
    nix.refers(10, 3);
    let mut daemon = Daemon::watching(&store);
    assert_eq!(daemon.state().0.lost_paths, 0);
    store.loses("lower", 3);
    let lost = daemon.until(|contents, _| contents.lost_paths == 1).lost;
    let named = |number: usize| name(number).parse().expect("a name");
    assert_eq!(lost, [Lost { name: named(3), referrers: vec![named(10)] }]);
    assert!(daemon.uses(1..=9), "what is lost is still referred to");
    for number in 4..=9 {
        store.loses("lower", number);
    }
    assert_eq!(daemon.until(|contents, _| contents.lost_paths == 7).lost.len(), EXAMPLES);
    daemon.used.clear();
    store.has("lower", 3..=9);
    assert_eq!(daemon.until(|contents, _| contents.lost_paths == 0).lost, []);
    assert!(daemon.uses(3..=9), "what is back is told again");
}

#[test]
fn a_layer_that_cannot_be_looked_into_is_said_and_nothing_counts_as_lost() {
    let store = Store::new();
    store.has("lower", 1..=2);
    let mut nix = store.nix();
    nix.registers(1..=2);
    let mut daemon = Daemon::watching(&store);
    daemon.state();
    fs::rename(store.path("lower"), store.path("away")).expect("renamed");
    let (contents, failure, _) = daemon.state();
    assert!(failure.expect("said").message.contains("lower: No such file"));
    assert_eq!(contents.lost_paths, 0);
    assert!(daemon.uses(1..=2));
    fs::rename(store.path("away"), store.path("lower")).expect("renamed");
    daemon.until(|contents, failure| failure.is_none() && contents.lower_paths == 2);
}

#[test]
fn a_whiteout_of_a_layer_hides_what_is_in_the_layer_below() {
    let store = Store::new();
    fs::create_dir(store.path("middle")).expect("made");
    store.has("lower", 1..=2);
    let mut nix = store.nix();
    nix.registers(1..=2);
    let whiteout = store.path("middle").join(name(1));
    let mode = rustix::fs::Mode::empty();
    let made = rustix::fs::mknodat(rustix::fs::CWD, whiteout, rustix::fs::FileType::CharacterDevice, mode, 0);
    if made.is_err() {
        // Since Linux 5.8 anybody can make one, on most filesystems.
        return eprintln!("skipped: no whiteouts here");
    }
    let mut daemon = Daemon::new();
    let lowers = vec![store.path("middle"), store.path("lower")];
    daemon.asks(&Request::Watch { id: 1, places: store.places_over(lowers) });
    let contents = daemon.until(|contents, _| contents.lost_paths == 1);
    assert_eq!(contents.lower_paths, 1);
}

#[test]
fn a_database_that_cannot_be_read_is_said_and_what_was_told_stays() {
    let store = Store::new();
    store.has("lower", 1..=3);
    let mut daemon = Daemon::watching(&store);
    assert_eq!(daemon.state().1, None, "Nix has not used it yet");
    assert!(daemon.absent);
    fs::create_dir(store.path("state/profiles")).expect("made");
    store.has("upper", 4..=4);
    let said = daemon.state().1.expect("said").message;
    assert!(said.contains("no database"), "whatever it was is not known any more: {said}");
    store.loses("upper", 4);
    let mut nix = store.nix();
    nix.registers(1..=2);
    daemon.until(|contents, failure| failure.is_none() && contents.lower_paths == 2);
    nix.ends();
    let db = store.path("state/db");
    fs::rename(&db, store.path("state/kept")).expect("renamed");
    daemon.until(|_, failure| failure.is_some_and(|failure| failure.message.contains("no database")));
    assert!(daemon.absent);
    fs::create_dir(&db).expect("made");
    fs::write(db.join("schema"), "10").expect("written");
    fs::write(db.join("db.sqlite"), "no database at all, and long enough for the header of one".repeat(100))
        .expect("written");
    daemon.until(|_, failure| failure.is_some_and(|failure| failure.message.contains("damaged")));
    assert!(daemon.uses(1..=2));
    // Another one takes its place.
    fs::remove_dir_all(&db).expect("removed");
    let mut nix = store.nix();
    nix.registers(2..=3);
    daemon.until(|contents, failure| failure.is_none() && contents.lower_paths == 2);
    assert!(daemon.uses(2..=3));
}

#[test]
fn of_a_store_of_which_only_the_database_is_watched_all_is_used() {
    let store = Store::new();
    let mut nix = store.nix();
    nix.registers(1..=2);
    let mut daemon = Daemon::new();
    daemon.asks(&Request::Watch { id: 1, places: Places { db: store.path("state/db"), objects: None } });
    assert_eq!(daemon.state().0.lost_paths, 0);
    assert!(daemon.uses(1..=2));
    nix.runs("delete from ValidPaths where id = 1");
    nix.registers(3..=3);
    daemon.synced();
    assert!(daemon.uses(2..=3));
}

#[test]
fn a_store_that_is_forgotten_takes_no_watch_from_one_that_is_begun_meanwhile() {
    const ROUNDS: usize = 100;
    let store = Store::new();
    store.has("lower", 1..=ROUNDS);
    let mut nix = store.nix();
    let mut daemon = Daemon::watching(&store);
    daemon.state();
    for round in 1..=ROUNDS {
        // Both have the same directories, and each directory has one watch. What is asked is asked at another moment each time.
        daemon.asks(&Request::Watch { id: daemon.id + 1, places: store.places() });
        std::thread::sleep(Duration::from_micros(u64::try_from(round).expect("few") * 20));
        daemon.asks(&Request::Forget { id: daemon.id });
        daemon.id += 1;
        daemon.state();
        nix.registers(round..=round);
        daemon.until(|contents, _| usize::try_from(contents.lower_paths) == Ok(round));
    }
}

#[test]
fn what_is_forgotten_is_told_of_no_more_and_what_is_watched_anew_is_told_whole() {
    let store = Store::new();
    store.has("lower", 1..=3);
    let mut nix = store.nix();
    nix.registers(1..=2);
    let mut daemon = Daemon::watching(&store);
    daemon.state();
    daemon.asks(&Request::Forget { id: 1 });
    nix.registers(3..=3);
    daemon.used.clear();
    daemon.id = 2;
    daemon.asks(&Request::Watch { id: 2, places: store.places() });
    assert_eq!(daemon.state().0.lower_paths, 3);
    assert!(daemon.uses(1..=3));
}
