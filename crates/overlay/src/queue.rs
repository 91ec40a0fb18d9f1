//! One of the kernel's queues for names that come and go (an instance of inotify(7)), and what was read of it.

use std::{
    collections::{BTreeSet, HashMap},
    ffi::OsStr,
    mem::MaybeUninit,
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    sync::Arc,
};

use layered_stores_model::StoreName;
use rustix::{
    fs::inotify::{self, CreateFlags, ReadFlags},
    io::Errno,
};

use super::{probe::is_store_path_name, refresh::Changes};

/// How much is read at once, and how long an event may be (inotify(7): "sizeof(struct inotify_event) + NAME_MAX + 1").
const BUFFER: usize = 16 * 1024;
const LONGEST_EVENT: usize = 16 + 255 + 1;

/// How many reads a queue gets before it is the next one's turn: some hundred events, which take less than a millisecond.
const TURN: usize = 4;

/// A queue, and which stores the watches are for that fill it.
#[derive(Debug)]
pub(super) struct Queue {
    instance: Arc<OwnedFd>,
    /// Which stores a watch concerns: the kernel gives one number for one directory, and stores share lower stores.
    stores: HashMap<i32, BTreeSet<StoreName>>,
    /// The watch of each store: it has one directory in a queue.
    watches: HashMap<StoreName, i32>,
    /// How many directories are being added. The number of a watch is not known until the kernel has answered.
    adding: usize,
    /// What was seen by watches that are not known yet, and whether some of it may have been lost.
    early: HashMap<i32, Changes>,
    early_lost: bool,
    /// What stores are still to be told.
    seen: HashMap<StoreName, Changes>,
}

impl Queue {
    pub(super) fn new() -> Result<Self, Errno> {
        let instance = Arc::new(inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?);
        let (stores, watches) = (HashMap::new(), HashMap::new());
        let (early, seen) = (HashMap::new(), HashMap::new());
        Ok(Self { instance, stores, watches, adding: 0, early, early_lost: false, seen })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.instance.as_fd()
    }

    /// Notes that a directory is being added to this instance, which stays until [`Queue::added`] is told.
    pub(super) fn adds(&mut self) -> Arc<OwnedFd> {
        self.adding += 1;
        Arc::clone(&self.instance)
    }

    pub(super) fn is(&self, instance: &Arc<OwnedFd>) -> bool {
        Arc::ptr_eq(&self.instance, instance)
    }

    /// Notes the watch that a store's directory was given, if it was given one. It has one here: what an earlier one has seen
    /// stays to be told.
    pub(super) fn added(&mut self, store: &StoreName, watch: Option<i32>) -> Result<(), Errno> {
        self.adding -= 1;
        let mut result = Ok(());
        if let Some(watch) = watch {
            self.stores.entry(watch).or_default().insert(store.clone());
            let lost = self.early_lost.then(Changes::lost);
            for changes in self.early.remove(&watch).into_iter().chain(lost) {
                self.seen.entry(store.clone()).or_default().merge(changes);
            }
            let earlier = self.watches.insert(store.clone(), watch).filter(|earlier| *earlier != watch);
            if let Some(earlier) = earlier {
                result = self.read_all();
                self.stores.entry(earlier).or_default().remove(store);
            }
        }
        self.clean();
        result
    }

    /// Forgets the watch of a store that has another one elsewhere now. What it has seen stays to be told.
    pub(super) fn leave(&mut self, store: &StoreName) -> Result<(), Errno> {
        let result = if self.watches.contains_key(store) { self.read_all() } else { Ok(()) };
        self.forget(store);
        result
    }

    /// Forgets a store.
    pub(super) fn remove(&mut self, store: &StoreName) {
        self.forget(store);
        self.seen.remove(store);
    }

    fn forget(&mut self, store: &StoreName) {
        if let Some(watch) = self.watches.remove(store) {
            self.stores.entry(watch).or_default().remove(store);
            self.clean();
        }
    }

    /// How many stores it concerns.
    pub(super) fn len(&self) -> usize {
        self.watches.len()
    }

    pub(super) fn is_unused(&self) -> bool {
        self.adding == 0 && self.watches.is_empty() && self.seen.is_empty()
    }

    pub(super) fn concerns(&self, store: &StoreName) -> bool {
        self.seen.contains_key(store) || self.watches.contains_key(store)
    }

    /// Drops what is of no use any more. While a directory is being added it may be one that has a watch already, which
    /// concerned nobody else but must stay.
    fn clean(&mut self) {
        if self.adding > 0 {
            return;
        }
        self.early.clear();
        self.early_lost = false;
        self.stores.retain(|&watch, concerned| {
            if concerned.is_empty() {
                // Fails only if the kernel dropped the watch with its directory.
                let _ = inotify::remove_watch(&self.instance, watch);
            }
            !concerned.is_empty()
        });
    }

    /// Takes what was seen and not told.
    pub(super) fn take(&mut self) -> HashMap<StoreName, Changes> {
        std::mem::take(&mut self.seen)
    }

    /// Reads some of what there is. Whether there is more.
    pub(super) fn read_some(&mut self) -> Result<bool, Errno> {
        let reads = self.reads()?;
        self.read(reads.min(TURN)).map(|()| reads > TURN)
    }

    /// Reads all events that there are when this is called, and not those that come meanwhile: whoever goes on making events as
    /// fast as they are read would be listened to for ever.
    pub(super) fn read_all(&mut self) -> Result<(), Errno> {
        let reads = self.reads()?;
        self.read(reads)
    }

    /// How many reads it takes for all there is.
    fn reads(&self) -> Result<usize, Errno> {
        // A read takes no part of an event. Each but the last fills its buffer up to where the next event has no room.
        let there = usize::try_from(rustix::io::ioctl_fionread(self.fd())?).unwrap_or(usize::MAX);
        Ok(if there == 0 { 0 } else { 1 + there / (BUFFER - LONGEST_EVENT) })
    }

    fn read(&mut self, mut reads: usize) -> Result<(), Errno> {
        let Self { instance, stores, watches, adding, early, early_lost, seen } = self;
        let mut buffer = [MaybeUninit::uninit(); BUFFER];
        let mut reader = inotify::Reader::new(instance.as_fd(), &mut buffer);
        loop {
            if reader.is_buffer_empty() {
                if reads == 0 {
                    return Ok(());
                }
                reads -= 1;
            }
            let event = match reader.next() {
                Ok(event) => event,
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(errno),
            };
            let flags = event.events();
            let taken = flags.intersects(ReadFlags::DELETE | ReadFlags::MOVED_FROM);
            if flags.contains(ReadFlags::QUEUE_OVERFLOW) {
                for store in watches.keys() {
                    seen.insert(store.clone(), Changes::lost());
                }
                *early_lost |= *adding > 0;
            } else if !stores.contains_key(&event.wd()) {
                // Of a directory that is being added, or of a watch that was removed.
                if *adding > 0 {
                    let names = event.file_name().map(|name| OsStr::from_bytes(name.to_bytes()).to_owned());
                    let names = names.into_iter().filter(|name| is_store_path_name(name)).collect();
                    let unknown = event.file_name().is_none();
                    early.entry(event.wd()).or_default().merge(Changes { names, unknown, taken });
                }
            } else if let Some(name) = event.file_name() {
                let name = OsStr::from_bytes(name.to_bytes());
                if is_store_path_name(name) {
                    for store in stores.get(&event.wd()).into_iter().flatten() {
                        seen.entry(store.clone()).or_default().add(name.to_owned(), taken);
                    }
                }
            } else {
                // The directory itself was moved, deleted or unmounted.
                for store in stores.get(&event.wd()).into_iter().flatten() {
                    seen.entry(store.clone()).or_default().merge(Changes::unknown());
                }
                if flags.contains(ReadFlags::IGNORED) {
                    for store in stores.remove(&event.wd()).into_iter().flatten() {
                        watches.remove(&store);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use rustix::fs::inotify::WatchFlags;

    use super::*;

    const PATH: &str = "00000000000000000000000000000000-hello";

    fn name() -> StoreName {
        "a".parse().expect("valid")
    }

    #[test]
    fn what_is_seen_before_a_watch_is_known_is_not_lost() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut queue = Queue::new().expect("inotify");
        let seen = Changes { names: [PATH.into()].into(), ..Changes::default() };

        // The moment in which who adds has had the kernel's answer, and has not told it.
        let instance = queue.adds();
        let watch = inotify::add_watch(&instance, dir.path(), WatchFlags::CREATE).expect("watched");
        std::fs::write(dir.path().join(PATH), "").expect("written");
        assert_eq!(queue.read_all().map(|()| queue.take()), Ok(HashMap::new()));
        assert_eq!(queue.early, [(watch, seen.clone())].into());

        // A store that shared the directory goes meanwhile: the watch stays.
        let other: StoreName = "b".parse().expect("valid");
        queue.watches.insert(other.clone(), watch);
        queue.stores.entry(watch).or_default().insert(other.clone());
        queue.remove(&other);
        assert!(queue.stores.contains_key(&watch));
        assert_eq!(queue.added(&name(), Some(watch)), Ok(()));
        assert_eq!(queue.take(), [(name(), seen)].into());
        queue.remove(&name());
        assert!(queue.stores.is_empty() && queue.is_unused(), "and goes when nothing is being added");
    }

    #[test]
    fn whoever_goes_on_changing_names_keeps_nobody_from_taking_what_there_is() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut queue = Queue::new().expect("inotify");
        let made: Vec<_> = (0..4).map(|number| dir.path().join(number.to_string())).collect();
        for dir in &made {
            std::fs::create_dir(dir).expect("made");
            std::fs::write(dir.join(PATH), "").expect("written");
            let watch = inotify::add_watch(queue.fd(), dir, WatchFlags::MOVE).expect("watched");
            queue.stores.insert(watch, [name()].into());
        }
        let end = Instant::now() + Duration::from_secs(2);
        let longest = std::thread::scope(|scope| {
            for dir in &made {
                scope.spawn(move || {
                    let (one, other) = (dir.join(PATH), dir.join(format!("{PATH}-2")));
                    while Instant::now() < end {
                        std::fs::rename(&one, &other).and_then(|()| std::fs::rename(&other, &one)).expect("renamed");
                    }
                });
            }
            let mut longest = Duration::ZERO;
            while Instant::now() < end {
                let began = Instant::now();
                queue.read_all().expect("read");
                queue.take();
                longest = longest.max(began.elapsed());
            }
            longest
        });
        assert!(longest < Duration::from_secs(1), "{longest:?}");
        // What comes after the last look is there for the next one.
        queue.read_all().expect("read");
        queue.take();
        assert_eq!(queue.read_all().map(|()| queue.take()), Ok(HashMap::new()));
    }
}
