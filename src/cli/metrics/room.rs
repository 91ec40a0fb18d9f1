//! How much room there is on the filesystems of upper layers.
//!
//! A filesystem is asked where it is mounted, so that nothing is followed that the owner of a store may have put in the way, and no
//! right is needed to look into an owner's directories. One that does not answer keeps a process of its own from ending, and
//! nobody else from an answer.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io::{self, BufRead as _, Write as _},
    process::{Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use layered_stores_client::Properties;
use layered_stores_overlay::mountinfo::MountTable;
use serde::{Deserialize, Serialize};

use crate::supervisor::Problem;

/// How long all filesystems may take together.
const PATIENCE: Duration = Duration::from_secs(2);

/// How much stack a thread has that asks one.
const STACK: usize = 1 << 17;

/// What there is on a filesystem.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Room {
    pub(super) bytes: Option<u64>,
    /// For others than root.
    pub(super) free_bytes: Option<u64>,
    pub(super) inodes: Option<u64>,
    pub(super) free_inodes: Option<u64>,
}

/// What room there is for stores, by their names, as far as that is known soon.
pub(super) fn of(stores: &[Properties]) -> HashMap<String, Room> {
    let Ok(table) = MountTable::read(|_| true) else { return HashMap::new() };
    let stuck = Problem::Stuck.to_string();
    // Of those it is known that something does not answer: each look would leave a process behind.
    let asked = stores.iter().filter(|store| !store.problems.iter().any(|(code, _)| *code == stuck));
    let on: Vec<_> = asked.filter_map(|store| Some((&store.name, table.leads_to(&store.upper_layer)?.0))).collect();
    let points: BTreeSet<_> = on.iter().map(|(_, point)| *point).collect();
    let found = if points.is_empty() { BTreeMap::new() } else { ask(&points).unwrap_or_default() };
    on.into_iter().filter_map(|(name, point)| Some((name.clone(), *found.get(point)?))).collect()
}

/// A line of what the asking process says.
type Line = (String, Room);

fn ask(points: &BTreeSet<&str>) -> io::Result<BTreeMap<String, Room>> {
    let mut child = Command::new("/proc/self/exe")
        .arg("count-room")
        .args(points)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let from = child.stdout.take();
    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || {
        let lines = from.into_iter().flat_map(|from| io::BufReader::new(from).lines()).map_while(Result::ok);
        for line in lines.filter_map(|line| serde_json::from_str::<Line>(&line).ok()) {
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    let deadline = Instant::now() + PATIENCE;
    let mut found = BTreeMap::new();
    while let Ok((point, room)) = lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        found.insert(point, room);
    }
    // It is not waited for: the kernel keeps one that waits for a filesystem.
    let _ = child.kill();
    let _ = child.try_wait();
    Ok(found)
}

/// What the asking process does: says what room there is on the filesystems that are mounted there.
pub(in crate::cli) fn count(points: Vec<String>) {
    let asking: Vec<_> = points
        .into_iter()
        .filter_map(|point| {
            let ask = move || {
                let Some(room) = room(&point) else { return };
                if let Ok(line) = serde_json::to_string::<Line>(&(point, room)) {
                    let _ = writeln!(io::stdout(), "{line}");
                }
            };
            // One that hangs holds up no other.
            std::thread::Builder::new().stack_size(STACK).spawn(ask).ok()
        })
        .collect();
    for thread in asking {
        let _ = thread.join();
    }
}

fn room(point: &str) -> Option<Room> {
    let found = rustix::fs::statvfs(point).ok()?;
    let bytes = |blocks: u64| blocks.checked_mul(found.f_frsize);
    // Filesystems that make inodes as they go say that they have none.
    let inodes = |number: u64| (found.f_files > 0).then_some(number);
    Some(Room {
        bytes: bytes(found.f_blocks),
        free_bytes: bytes(found.f_bavail),
        inodes: inodes(found.f_files),
        free_inodes: inodes(found.f_favail),
    })
}
