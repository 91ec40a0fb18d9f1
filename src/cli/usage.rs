//! How much a store holds, and how much room is left.
//!
//! What is counted belongs to somebody else, perhaps, and may lie on a filesystem that does not answer. So it is counted by
//! descriptors, through which no link and no mount is followed, and by a process of its own, which is left behind when it
//! takes too long: the kernel lets a thread that waits for a filesystem go on waiting, and with it its process.

use std::{
    collections::{HashMap, HashSet},
    ffi::OsStr,
    io::{self, BufRead as _, Write as _},
    os::{fd::OwnedFd, unix::ffi::OsStrExt as _},
    process::{Child, Command, Stdio},
    sync::{Mutex, PoisonError, mpsc},
    time::{Duration, Instant},
};

use layered_stores_client::Properties;
use layered_stores_overlay::{context::is_tmpfs, probe::is_store_path_name};
use rustix::fs::{CWD, Dir, Mode, ResolveFlags};
use serde::{Deserialize, Serialize};

use super::disk::{FLAGS, bytes_of, each_below, is_directory};

/// How long it may take altogether.
const PATIENCE: Duration = Duration::from_secs(2);

/// How many directories are counted at a time: one that hangs holds up no other.
const THREADS: usize = 16;

/// What a directory of store objects holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Held {
    /// How many store paths.
    pub(super) paths: usize,
    /// How many bytes on disk, files with several names counted once.
    pub(super) bytes: u64,
    /// How many bytes can be added.
    pub(super) free: u64,
    /// If it is in memory, how much of its limit is taken, and the limit.
    pub(super) limited: Option<(u64, u64)>,
}

/// What is known about a store. `None`: it may not be looked at, or it takes too long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Usage {
    /// What its upper layer holds.
    pub(super) upper: Option<Held>,
    /// How many store paths its lower store holds.
    pub(super) lower: Option<usize>,
}

/// Counts what stores hold, as far as that is known soon.
pub(super) fn of(stores: &[Properties]) -> Vec<Usage> {
    let mut asked: Vec<(bool, &str)> = stores.iter().map(|store| (true, store.upper_layer.as_str())).collect();
    let lowers: HashSet<_> = stores.iter().map(|store| (false, store.lower_store_dir.as_str())).collect();
    asked.extend(lowers);
    let found = counted(&asked).unwrap_or_default();
    let held = |deep, directory: &String| found.get(&(deep, directory.clone())).copied();
    let usage = |store: &Properties| Usage {
        upper: held(true, &store.upper_layer),
        lower: held(false, &store.lower_store_dir).map(|held| held.paths),
    };
    stores.iter().map(usage).collect()
}

/// A line of what the counting process says.
type Line = ((bool, String), Held);

fn counted(asked: &[(bool, &str)]) -> io::Result<HashMap<(bool, String), Held>> {
    let mut child = Command::new("/proc/self/exe")
        .arg("count")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let (mut to, from) = (child.stdin.take(), child.stdout.take());
    let question = serde_json::to_vec(asked).map_err(io::Error::from)?;
    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || {
        if let Some(mut to) = to.take() {
            let _ = to.write_all(&question);
        }
        for line in from.into_iter().flat_map(|from| io::BufReader::new(from).lines()).map_while(Result::ok) {
            if let Ok(line) = serde_json::from_str::<Line>(&line)
                && sender.send(line).is_err()
            {
                break;
            }
        }
    });
    let deadline = Instant::now() + PATIENCE;
    let mut found = HashMap::new();
    while found.len() < asked.len() {
        match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok((directory, held)) => drop(found.insert(directory, held)),
            Err(_) => break,
        }
    }
    leave(child);
    Ok(found)
}

/// Ends a process, and does not wait for it, because that may take for ever. It is seen to with the next one: there are many when
/// somebody watches.
fn leave(mut child: Child) {
    let _ = child.kill();
    let mut left = LEFT.lock().unwrap_or_else(PoisonError::into_inner);
    left.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
    left.push(child);
}

/// Processes that the kernel keeps until it is asked how they ended.
static LEFT: Mutex<Vec<Child>> = Mutex::new(Vec::new());

/// What the counting process does: reads which directories to count, and whether at depth, and says what they hold.
pub(super) fn count() -> io::Result<()> {
    let asked: Vec<(bool, String)> = serde_json::from_reader(io::stdin())?;
    let threads = asked.len().min(THREADS);
    let asked = Mutex::new(asked.into_iter());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let next = asked.lock().unwrap_or_else(PoisonError::into_inner).next();
                    let Some((deep, directory)) = next else { break };
                    if let Ok(held) = held(&directory, deep)
                        && let Ok(line) = serde_json::to_string(&((deep, directory), held))
                    {
                        let _ = writeln!(io::stdout(), "{line}");
                    }
                }
            });
        }
    });
    Ok(())
}

fn held(directory: &str, deep: bool) -> io::Result<Held> {
    let top = rustix::fs::openat2(CWD, directory, FLAGS, Mode::empty(), ResolveFlags::NO_SYMLINKS)?;
    let is_path = |entry: rustix::io::Result<rustix::fs::DirEntry>| {
        entry.is_ok_and(|entry| is_store_path_name(OsStr::from_bytes(entry.file_name().to_bytes())))
    };
    let paths = Dir::read_from(&top)?.filter_map(|entry| is_path(entry).then_some(())).count();
    if !deep {
        return Ok(Held { paths, ..Held::default() });
    }
    let filesystem = rustix::fs::fstatfs(&top)?;
    let block = u64::try_from(filesystem.f_bsize).unwrap_or(0);
    let (all, free) = (filesystem.f_blocks * block, filesystem.f_bavail * block);
    let is_limited = is_tmpfs(&filesystem) && all > 0;
    let limited = is_limited.then(|| (all - filesystem.f_bfree * block, all));
    Ok(Held { paths, bytes: bytes(top)?, free, limited })
}

/// Adds up a directory, files with several names once.
fn bytes(top: OwnedFd) -> io::Result<u64> {
    let (mut counted, mut bytes) = (HashSet::new(), 0);
    each_below(top, |stat| {
        if is_directory(stat) || stat.st_nlink == 1 || counted.insert((stat.st_dev, stat.st_ino)) {
            bytes += bytes_of(stat);
        }
    })?;
    Ok(bytes)
}

const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];

/// A size as people read it.
pub(super) fn human(bytes: u64) -> String {
    let unit = unit_of(bytes);
    format!("{} {}", in_unit(bytes, unit), UNITS[unit])
}

/// A part of a size, both in the unit of the whole.
pub(super) fn human_part(part: u64, whole: u64) -> String {
    let unit = unit_of(whole);
    format!("{} of {} {}", in_unit(part, unit), in_unit(whole, unit), UNITS[unit])
}

fn unit_of(bytes: u64) -> usize {
    (1..UNITS.len()).take_while(|unit| bytes >> (10 * unit) > 0).count()
}

/// With one decimal where there is anything behind the point.
fn in_unit(bytes: u64, unit: usize) -> String {
    let text = format!("{:.1}", bytes as f64 / f64::from(1u32 << 10).powi(i32::try_from(unit).unwrap_or(0)));
    text.strip_suffix(".0").map_or_else(|| text.clone(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink, path::Path};

    use rustix::fs::{AtFlags, OFlags};

    use super::{super::disk::DEPTH, *};

    fn of(directory: &Path) -> Held {
        held(&directory.to_string_lossy(), true).expect("counted")
    }

    #[test]
    fn files_with_several_names_count_once_and_links_lead_nowhere() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("00000000000000000000000000000000-a");
        fs::create_dir(&path).expect("made");
        fs::write(path.join("one"), "x").expect("written");
        let alone = of(dir.path());
        fs::hard_link(path.join("one"), path.join("two")).expect("linked");
        assert_eq!(of(dir.path()).bytes, alone.bytes);
        assert_eq!(alone.paths, 1);
        symlink("/usr", path.join("elsewhere")).expect("linked");
        assert!(of(dir.path()).bytes <= alone.bytes + 4096);
        // The directory itself, too.
        symlink(dir.path(), path.join("again")).expect("linked");
        assert!(held(&path.join("again").to_string_lossy(), true).is_err());
    }

    #[test]
    fn who_counts_again_and_again_leaves_no_processes_behind() {
        let left: Vec<u32> = (0..20)
            .map(|_| {
                let child = Command::new("sleep").arg("3600").spawn().expect("begun");
                let id = child.id();
                leave(child);
                id
            })
            .collect();
        let state = |id: &u32| fs::read_to_string(format!("/proc/{id}/stat")).ok();
        let has_ended = |id: &u32| state(id).is_none_or(|stat| stat.contains(") Z "));
        while !left.iter().all(has_ended) {
            std::thread::yield_now();
        }
        leave(Command::new("sleep").arg("3600").spawn().expect("begun"));
        assert!(left.iter().all(|id| state(id).is_none()));
    }

    #[test]
    fn deep_directories_are_counted_as_far_as_that_goes() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut at = rustix::fs::open(dir.path(), FLAGS, Mode::empty()).expect("opened");
        let mut sparse = 0;
        for depth in 1..=2 * DEPTH {
            rustix::fs::mkdirat(&at, "d", Mode::RWXU).expect("made");
            let file = rustix::fs::openat(&at, "file", OFlags::CREATE | OFlags::WRONLY, Mode::RWXU).expect("made");
            rustix::io::write(&file, b"x").expect("written");
            // The file and the directory beside it: what is open is read to its end, and nothing below is opened.
            if depth <= DEPTH {
                let here = |name| rustix::fs::statat(&at, name, AtFlags::empty()).expect("looked at").st_blocks;
                sparse += u64::try_from(here("file") + here("d")).expect("a size") * 512;
            }
            at = rustix::fs::openat(&at, "d", FLAGS, Mode::empty()).expect("opened");
        }
        assert!(sparse > 0);
        assert_eq!(of(dir.path()).bytes, sparse);
    }

    #[test]
    fn sizes_read_well() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (4096, "4 KiB"),
            (1536, "1.5 KiB"),
            (5 << 30, "5 GiB"),
            (1 << 50, "1024 TiB"),
        ] {
            assert_eq!(human(bytes), text);
        }
        assert_eq!(human_part(76 << 20, 256 << 20), "76 of 256 MiB");
        assert_eq!(human_part(512 << 10, 64 << 20), "0.5 of 64 MiB");
    }
}
