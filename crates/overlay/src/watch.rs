//! Watching the upper layers and lower store directories for names that come and go (inotify(7)).
//!
//! Nix keeps "a remount is needed" in its memory only; if it dies before it calls the hook, nobody is told. The layers
//! tell.
//!
//! The kernel keeps 16384 events of an instance, and drops what comes then. Whoever can write to a layer can bring that about,
//! so each [`Source`] has a queue for itself: what it loses are its own stores' names.

use std::{
    collections::HashMap,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use layered_stores_model::{AbsolutePath, Layers, StoreName};
use rustix::{
    event::epoll,
    fs::{
        Mode, RawMode,
        inotify::{self, WatchFlags},
    },
    io::Errno,
};

use super::{
    progress::{self, Spot},
    queue::Queue,
    refresh::Changes,
    walk,
};

/// So many queues there are. A user has 128 instances (`fs.inotify.max_user_instances`), which for root others need as well, and
/// a queue that is full takes up to 8 MiB of the daemon's memory (`MemoryMax=`). Sources that come later share one.
const MOST_QUEUES: usize = 16;

const NAMES: WatchFlags = WatchFlags::CREATE.union(WatchFlags::DELETE).union(WatchFlags::MOVE);
const ITSELF: WatchFlags = WatchFlags::DELETE_SELF.union(WatchFlags::MOVE_SELF).union(WatchFlags::ONLYDIR);

/// A layer that cannot be watched.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// The kernel has no more instances.
    #[error("the kernel has no inotify instance left for root; raise the sysctl fs.inotify.max_user_instances")]
    NoInstance,
    /// The kernel has no more watches.
    #[error("the kernel has no inotify watch left for {0}; raise the sysctl fs.inotify.max_user_watches")]
    Exhausted(AbsolutePath),
    /// Another answer of the kernel.
    #[error("cannot watch {0}: {1}")]
    Sys(AbsolutePath, Errno),
}

/// Who makes the names that fill a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Source {
    /// Whether they are names of upper layers or of lower stores. Those of a lower store concern others than its owner.
    layer: Spot,
    /// The owner of the directory, and who else can write to a directory of root's. Another owner can give theirs any group and
    /// mode, and that makes no other source of them.
    user: u32,
    group: Option<u32>,
    everybody: bool,
}

impl Source {
    /// Who makes names in a directory.
    fn of(layer: Spot, dir: BorrowedFd<'_>) -> Result<Self, Errno> {
        let stat = walk::stat(dir)?;
        let mode = Mode::from_raw_mode(RawMode::from(stat.stx_mode));
        let is_roots = stat.stx_uid == 0;
        let group = (is_roots && mode.contains(Mode::WGRP)).then_some(stat.stx_gid);
        Ok(Self { layer, user: stat.stx_uid, group, everybody: is_roots && mode.contains(Mode::WOTH) })
    }

    /// Whether two may share a queue when there are no more: nobody else's names come between those of root's directories.
    fn may_share_with(&self, other: &Self) -> bool {
        (self.layer, self.user == 0) == (other.layer, other.user == 0)
    }
}

/// Queues, each with those whose names are in it.
type Queues = Vec<(Vec<Source>, Queue)>;

/// All watches of the daemon.
#[derive(Debug, Default)]
pub struct Watches {
    /// Tells when there are events in any queue (epoll(7)); made with the first.
    events: OnceLock<OwnedFd>,
    /// The engine reads them under this lock, so it is never held while a filesystem may be asked something.
    queues: Mutex<Queues>,
}

impl Watches {
    /// The descriptor, readable when there are events; `None` until something is watched.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.events.get().map(|fd| fd.as_fd())
    }

    /// Watches the layers of a store. Again after a layer was replaced, or given to somebody else, is fine.
    ///
    /// # Errors
    /// [`WatchError`]; one of the two layers may be watched then.
    pub fn add(&self, store: &StoreName, layers: &Layers) -> Result<(), WatchError> {
        for (layer, path) in [(Spot::Upper, &layers.upper), (Spot::Lower, &layers.lower)] {
            let sys = |errno| WatchError::Sys(path.clone(), errno);
            progress::at(layer);
            let dir = walk::refer_to(path).map_err(sys)?;
            let source = Source::of(layer, dir.as_fd()).map_err(sys)?;
            let instance = self.begin(source).map_err(|errno| match errno {
                Errno::MFILE => WatchError::NoInstance,
                errno => sys(errno),
            })?;
            // Permissions may be looked up: a filesystem that does not answer is waited for here.
            let dir = format!("/proc/thread-self/fd/{}", dir.as_raw_fd());
            let added = inotify::add_watch(&instance, dir, NAMES | ITSELF);
            self.end(layer, &instance, store, added.ok()).map_err(sys)?;
            added.map_err(|errno| match errno {
                Errno::NOSPC => WatchError::Exhausted(path.clone()),
                errno => sys(errno),
            })?;
        }
        Ok(())
    }

    /// The instance on which directories of a source are watched, for one that is about to be added.
    fn begin(&self, source: Source) -> Result<Arc<OwnedFd>, Errno> {
        let mut queues = self.lock();
        if let Some((_, queue)) = queues.iter_mut().find(|(sources, _)| sources.contains(&source)) {
            return Ok(queue.adds());
        }
        let may_share = |of: &usize| queues[*of].0.iter().all(|other| other.may_share_with(&source));
        let shared = (0..queues.len()).filter(may_share).min_by_key(|of| queues[*of].1.len());
        let of = match (shared, queues.len() < MOST_QUEUES) {
            (Some(shared), false) => shared,
            (shared, _) => match (self.make(), shared) {
                (Ok(queue), _) => {
                    queues.push((Vec::new(), queue));
                    queues.len() - 1
                }
                (Err(Errno::MFILE), Some(shared)) => shared,
                (Err(errno), _) => return Err(errno),
            },
        };
        let (sources, queue) = &mut queues[of];
        sources.push(source);
        Ok(queue.adds())
    }

    /// A queue more.
    fn make(&self) -> Result<Queue, Errno> {
        let queue = Queue::new()?;
        let events = match self.events.get() {
            Some(events) => events,
            None => {
                let events = epoll::create(epoll::CreateFlags::CLOEXEC)?;
                self.events.get_or_init(|| events)
            }
        };
        // It ends with the instance.
        epoll::add(events, queue.fd(), epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
        Ok(queue)
    }

    /// Notes the watch that a store's layer was given, if it was given one. An earlier one was of a directory that is its layer
    /// no more, or whose names come from another source since.
    fn end(&self, layer: Spot, instance: &Arc<OwnedFd>, store: &StoreName, watch: Option<i32>) -> Result<(), Errno> {
        let mut queues = self.lock();
        let of_layer = |(sources, _): &&mut (Vec<Source>, _)| sources.iter().any(|source| source.layer == layer);
        let mut result = Ok(());
        for (_, queue) in queues.iter_mut().filter(of_layer) {
            if queue.is(instance) {
                result = result.and(queue.added(store, watch));
            } else if watch.is_some() {
                result = result.and(queue.leave(store));
            }
        }
        drop_unused(queues);
        result
    }

    /// Forgets the layers of a store.
    pub fn remove(&self, store: &StoreName) {
        let mut queues = self.lock();
        for (_, queue) in queues.iter_mut() {
            queue.remove(store);
        }
        drop_unused(queues);
    }

    /// Takes some of the events of each queue, by store, and tells whether there are more. Whoever has a queue overflow with
    /// names keeps nobody else's from being read.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn drain(&self) -> Result<(HashMap<StoreName, Changes>, bool), Errno> {
        let mut queues = self.lock();
        let (mut changes, mut more) = (HashMap::new(), false);
        for (_, queue) in queues.iter_mut() {
            more |= queue.read_some()?;
            gather(&mut changes, queue);
        }
        Ok((changes, more))
    }

    /// Takes all events that there are when this is called in the queues that a store's layers have, by store.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn drain_for(&self, store: &StoreName) -> Result<HashMap<StoreName, Changes>, Errno> {
        let mut queues = self.lock();
        let mut changes = HashMap::new();
        for (_, queue) in queues.iter_mut().filter(|(_, queue)| queue.concerns(store)) {
            queue.read_all()?;
            gather(&mut changes, queue);
        }
        Ok(changes)
    }

    fn lock(&self) -> MutexGuard<'_, Queues> {
        // A panic while it was held leaves queues that are still queues.
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn gather(changes: &mut HashMap<StoreName, Changes>, queue: &mut Queue) {
    for (store, seen) in queue.take() {
        changes.entry(store).or_default().merge(seen);
    }
}

/// Gives back what concerns nobody any more, and not under the lock: the kernel waits for others before an instance is gone.
fn drop_unused(mut queues: MutexGuard<'_, Queues>) {
    let unused: Vec<_> = queues.extract_if(.., |(_, queue)| queue.is_unused()).collect();
    drop(queues);
    drop(unused);
}

#[cfg(test)]
mod tests {
    use layered_stores_model::needs_root;
    use rustix::event::{PollFd, PollFlags};

    use super::*;

    const PATH: &str = "00000000000000000000000000000000-hello";

    fn name(name: &str) -> StoreName {
        name.parse().expect("valid")
    }

    fn of(user: u32) -> Source {
        Source { layer: Spot::Upper, user, group: None, everybody: false }
    }

    /// A directory below `dir` that is watched as if it were somebody's.
    fn watch_as(watches: &Watches, user: u32, store: &str, dir: &tempfile::TempDir) -> std::path::PathBuf {
        let path = dir.path().join(store);
        std::fs::create_dir_all(&path).expect("a directory");
        let instance = watches.begin(of(user)).expect("inotify");
        let watch = inotify::add_watch(&instance, &path, NAMES | ITSELF).expect("watched");
        watches.end(Spot::Upper, &instance, &name(store), Some(watch)).expect("read");
        path
    }

    fn queues(watches: &Watches) -> Vec<Vec<u32>> {
        watches.lock().iter().map(|(sources, _)| sources.iter().map(|source| source.user).collect()).collect()
    }

    #[test]
    fn what_one_owner_loses_is_nothing_to_others_and_keeps_nobody_waiting() {
        let (dir, watches) = (tempfile::tempdir().expect("a directory"), Watches::default());
        let hers = watch_as(&watches, 1, "hers", &dir);
        let roots = watch_as(&watches, 0, "roots", &dir);
        let most = std::fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").expect("it is there");
        for number in 0..most.trim().parse().expect("a number") {
            let link = hers.join(format!("{PATH}-{number}"));
            std::os::unix::fs::symlink("x", &link).and_then(|()| std::fs::remove_file(&link)).expect("made");
        }
        std::fs::write(roots.join(PATH), "").expect("written");

        let seen = Changes { names: [PATH.into()].into(), ..Changes::default() };
        let (changes, more) = watches.drain().expect("read");
        assert_eq!(changes.get(&name("roots")), Some(&seen), "it had its turn");
        assert!(more && !changes[&name("hers")].is_lost(), "hers were not all read");

        std::fs::remove_file(roots.join(PATH)).expect("removed");
        let gone = Changes { taken: true, ..seen };
        assert_eq!(watches.drain_for(&name("roots")), Ok([(name("roots"), gone)].into()));
        while watches.drain().map(|(changes, _)| changes.get(&name("hers")).cloned()) != Ok(Some(Changes::lost())) {}
        assert_eq!(watches.drain(), Ok((HashMap::new(), false)));
    }

    #[test]
    fn one_descriptor_tells_of_events_in_any_queue_from_the_first_watch_on() {
        let (dir, watches) = (tempfile::tempdir().expect("a directory"), Watches::default());
        assert!(watches.fd().is_none());
        let paths = [1, 2].map(|user| watch_as(&watches, user, &format!("store-{user}"), &dir));
        let is_readable = || {
            let at_once = rustix::event::Timespec::default();
            let fd = watches.fd().expect("something is watched");
            rustix::event::poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], Some(&at_once)).expect("polled") > 0
        };
        for path in paths {
            assert!(!is_readable());
            std::fs::write(path.join(PATH), "").expect("written");
            assert!(is_readable());
            watches.drain().expect("read");
        }
        assert!(!is_readable());
    }

    #[test]
    fn those_that_come_when_there_are_many_share_a_queue_but_not_with_root() {
        let (dir, watches) = (tempfile::tempdir().expect("a directory"), Watches::default());
        let most = u32::try_from(MOST_QUEUES).expect("a small number");
        for user in 0..most + 2 {
            watch_as(&watches, user, &format!("store-{user}"), &dir);
        }
        watch_as(&watches, 0, "another", &dir);
        let mut shared: Vec<_> = (0..most).map(|user| vec![user]).collect();
        shared[1].push(most);
        shared[2].push(most + 1);
        assert_eq!(queues(&watches), shared);
        // Each is given back with the last store in it.
        watches.remove(&name("store-0"));
        watches.remove(&name("store-1"));
        watches.remove(&name("store-3"));
        shared.remove(3);
        assert_eq!(queues(&watches), shared);
        watches.remove(&name("another"));
        shared.remove(0);
        assert_eq!(queues(&watches), shared);
    }

    #[test]
    fn what_is_given_to_somebody_else_is_watched_in_their_queue_and_nothing_is_lost_on_the_way() {
        let (dir, watches) = (tempfile::tempdir().expect("a directory"), Watches::default());
        let path = watch_as(&watches, 1, "a", &dir);
        std::fs::write(path.join(PATH), "").expect("written");
        watch_as(&watches, 2, "a", &dir);
        let seen = Changes { names: [PATH.into()].into(), ..Changes::default() };
        assert_eq!(watches.drain(), Ok(([(name("a"), seen.clone())].into(), false)));
        std::fs::remove_file(path.join(PATH)).expect("removed");
        assert_eq!(watches.drain_for(&name("a")), Ok([(name("a"), Changes { taken: true, ..seen })].into()));
        watches.remove(&name("b"));
        assert_eq!(queues(&watches), [[2]]);
    }

    #[test]
    fn who_can_write_to_a_directory_makes_the_names_in_it() {
        needs_root!();
        let dir = tempfile::tempdir().expect("a directory");
        let of = |mode: u32| {
            let path = dir.path().join(mode.to_string());
            std::fs::create_dir(&path).expect("a directory");
            rustix::fs::chmod(&path, Mode::from_raw_mode(mode)).expect("changed");
            Source::of(Spot::Lower, std::fs::File::open(path).expect("opened").as_fd()).expect("looked at")
        };
        let group = rustix::fs::stat(dir.path()).expect("looked at").st_gid;
        let roots = Source { layer: Spot::Lower, user: 0, group: None, everybody: false };
        assert_eq!(of(0o755), roots);
        assert_eq!(of(0o775), Source { group: Some(group), ..roots });
        assert_eq!(of(0o757), Source { everybody: true, ..roots });
        rustix::fs::chown(dir.path(), Some(rustix::fs::Uid::from_raw(1)), None).expect("given away");
        let hers = Source::of(Spot::Lower, std::fs::File::open(dir.path()).expect("opened").as_fd());
        assert_eq!(hers, Ok(Source { user: 1, ..roots }));
    }

    #[test]
    fn names_that_come_and_go_in_a_layer_are_seen_by_every_store_on_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = |name: &str| -> AbsolutePath {
            let path = dir.path().join(name);
            std::fs::create_dir_all(&path).expect("a directory");
            // Temporary directories have names with letters and digits only, behind a dot.
            path.to_str().expect("text").parse().expect("valid")
        };
        let layers = |store: &str| Layers {
            lower: path("lower"),
            upper: path(&format!("{store}-upper")),
            work: path("work"),
            merged: path("merged"),
            options: Vec::new(),
        };
        let (a, b) = (name("a"), name("b"));
        let watches = Watches::default();
        watches.add(&a, &layers("a")).expect("watched");
        watches.add(&b, &layers("b")).expect("watched");
        let drain = || watches.drain().map(|(changes, _)| changes);

        std::fs::write(dir.path().join("lower").join(PATH), "").expect("written");
        std::fs::write(dir.path().join("lower/.links"), "").expect("written");
        let seen = Changes { names: [PATH.into()].into(), ..Changes::default() };
        assert_eq!(drain(), Ok([(a.clone(), seen.clone()), (b.clone(), seen.clone())].into()));

        watches.remove(&a);
        std::fs::remove_file(dir.path().join("lower").join(PATH)).expect("removed");
        std::fs::write(dir.path().join("a-upper").join(PATH), "").expect("written");
        assert_eq!(drain(), Ok([(b.clone(), Changes { taken: true, ..seen.clone() })].into()));

        // Another directory in its place is watched instead.
        std::fs::rename(dir.path().join("b-upper"), dir.path().join("before")).expect("renamed");
        watches.add(&b, &layers("b")).expect("watched");
        assert_eq!(drain(), Ok([(b.clone(), Changes::unknown())].into()));
        std::fs::write(dir.path().join("before").join(PATH), "").expect("written");
        assert_eq!(drain(), Ok(HashMap::new()));
        std::fs::write(dir.path().join("b-upper").join(PATH), "").expect("written");
        assert_eq!(drain(), Ok([(b.clone(), seen)].into()));

        std::fs::remove_file(dir.path().join("b-upper").join(PATH)).expect("removed");
        drain().expect("read");
        std::fs::remove_dir(dir.path().join("b-upper")).expect("removed");
        assert_eq!(drain(), Ok([(b, Changes::unknown())].into()));
    }
}
