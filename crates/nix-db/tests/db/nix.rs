//! A process that works on a database as Nix does.

use std::{
    fs,
    io::{BufRead as _, BufReader, Lines, Write as _},
    ops::RangeInclusive,
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use rusqlite::{Connection, config::DbConfig};

/// A process that works on a database as Nix does. In one process SQLite would have writers and readers share what they know.
pub(crate) struct Nix {
    process: Child,
    commands: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
}

/// By which a process of these tests knows that it is to be Nix, and on which database.
const DATABASE: &str = "DATABASE_OF_THE_TEST";

/// What such a process does.
#[test]
fn as_nix() {
    let Ok(database) = std::env::var(DATABASE) else { return };
    let connection = Connection::open(database).expect("opened");
    // Which is what keeps the log and its index (`SQLITE_FCNTL_PERSIST_WAL`) without a call of C.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true).expect("set");
    println!("begun");
    for command in std::io::stdin().lines() {
        let result = connection.execute_batch(&command.expect("a command"));
        println!("{}", result.map_or_else(|error| error.to_string(), |()| "done".to_owned()));
    }
}

impl Nix {
    /// Opens a store's database with a kind of journal.
    pub(crate) fn opens(dir: &Path, journal: &str) -> Self {
        let mut process = Command::new(std::env::current_exe().expect("this"))
            .args(["--exact", "nix::as_nix", "--nocapture"])
            .env(DATABASE, dir.join("db.sqlite"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("started");
        let commands = process.stdin.take().expect("piped");
        let mut answers = BufReader::new(process.stdout.take().expect("piped")).lines();
        assert!(answers.by_ref().any(|line| line.is_ok_and(|line| line == "begun")));
        let mut nix = Self { process, commands, answers };
        nix.runs(&format!(
            "pragma journal_mode = {journal}; pragma synchronous = off; pragma wal_autocheckpoint = 40000; \
             create table if not exists ValidPaths (id integer primary key autoincrement not null, path text unique not null, \
               hash text not null, registrationTime integer not null, deriver text, narSize integer, ultimate integer, \
               sigs text, ca text); \
             create table if not exists Refs (referrer integer not null, reference integer not null, \
               primary key (referrer, reference)); \
             create index if not exists IndexReference on Refs(reference);"
        ));
        fs::write(dir.join("schema"), "10").expect("written");
        nix
    }

    pub(crate) fn runs(&mut self, sql: &str) {
        writeln!(self.commands, "{sql}").expect("written");
        assert_eq!(self.answers.next().expect("an answer").expect("text"), "done");
    }

    pub(crate) fn registers(&mut self, numbers: RangeInclusive<usize>) {
        let row = |number| format!("({number}, '/nix/store/{}', 'sha256:{number:064}', 1, {number}00)", name(number));
        let rows: Vec<_> = numbers.map(row).collect();
        self.runs(&format!(
            "insert into ValidPaths (id, path, hash, registrationTime, narSize) values {}",
            rows.join(",")
        ));
    }

    pub(crate) fn refers(&mut self, referrer: usize, reference: usize) {
        self.runs(&format!("insert into Refs values ({referrer}, {reference})"));
    }

    /// Writes what is in the log into the database.
    pub(crate) fn checkpoints(&mut self) {
        self.runs("pragma wal_checkpoint(truncate)");
    }

    pub(crate) fn ends(mut self) {
        drop(self.commands);
        self.process.wait().expect("ended");
    }

    pub(crate) fn dies(mut self) {
        self.process.kill().expect("killed");
        self.process.wait().expect("ended");
    }
}

pub(crate) fn name(number: usize) -> String {
    format!("{number:032}-of-it")
}
