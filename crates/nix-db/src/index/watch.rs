//! Noticing that something has changed in a directory.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    mem::MaybeUninit,
    os::fd::OwnedFd,
    path::Path,
    sync::Arc,
};

use rustix::{
    fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags},
    io::Errno,
};

use super::protocol::StoreId;

/// How much is read at once.
const BUFFER: usize = 64 * 1024;

/// Something that happened in a directory that is watched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum News {
    /// To a name in it.
    Name(i32, Box<str>),
    /// The directory is not there any more.
    Gone(i32),
    /// Nobody knows what: some was lost.
    Lost,
}

/// What a directory is to a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Role {
    /// The database, or what is above it, is in it.
    Database,
    /// Store objects are in it.
    Objects,
}

/// An instance of inotify(7).
#[derive(Clone, Debug)]
pub(super) struct Queue(Arc<OwnedFd>);

impl Queue {
    pub(super) fn new() -> Result<Self, Errno> {
        Ok(Self(Arc::new(inotify::init(CreateFlags::CLOEXEC)?)))
    }

    /// Watches a directory.
    pub(super) fn add(&self, dir: &Path, role: Role) -> Result<i32, Errno> {
        let names = WatchFlags::CREATE | WatchFlags::DELETE | WatchFlags::MOVED_FROM | WatchFlags::MOVED_TO;
        let of_role = match role {
            Role::Database => names | WatchFlags::MODIFY,
            Role::Objects => names,
        };
        // One directory has one watch, whatever it is to whom.
        let flags = of_role | WatchFlags::MOVE_SELF | WatchFlags::ONLYDIR | WatchFlags::MASK_ADD;
        inotify::add_watch(&*self.0, dir, flags)
    }

    pub(super) fn remove(&self, watch: i32) {
        // It may be gone by itself.
        let _ = inotify::remove_watch(&*self.0, watch);
    }

    /// Waits for news.
    pub(super) fn follow(&self, mut tell: impl FnMut(News) -> bool) -> Result<(), Errno> {
        let mut buffer = vec![MaybeUninit::uninit(); BUFFER];
        let mut reader = inotify::Reader::new(&*self.0, &mut buffer);
        loop {
            let event = match reader.next() {
                Ok(event) => event,
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(errno),
            };
            let flags = event.events();
            let news = if flags.contains(ReadFlags::QUEUE_OVERFLOW) {
                News::Lost
            } else if flags.intersects(ReadFlags::IGNORED | ReadFlags::MOVE_SELF) {
                News::Gone(event.wd())
            } else {
                match event.file_name().and_then(|name| name.to_str().ok()) {
                    Some(name) => News::Name(event.wd(), name.into()),
                    // Nothing of Nix's is called so.
                    None => continue,
                }
            };
            if !tell(news) {
                return Ok(());
            }
        }
    }
}

/// For whom directories are watched.
#[derive(Debug, Default)]
pub(super) struct Watched {
    stores: HashMap<i32, BTreeSet<(StoreId, Role)>>,
    /// Watches of which there was news before it was known whose they are.
    early: HashSet<i32>,
}

impl Watched {
    /// Whom news of a watch is for.
    pub(super) fn of(&mut self, watch: i32) -> Vec<(StoreId, Role)> {
        let stores = self.stores.get(&watch);
        if stores.is_none() {
            self.early.insert(watch);
        }
        stores.into_iter().flatten().copied().collect()
    }

    /// Notes for whom a directory is watched. Whether there was news of it already.
    pub(super) fn note(&mut self, watch: i32, store: StoreId, role: Role) -> bool {
        self.stores.entry(watch).or_default().insert((store, role));
        self.early.contains(&watch)
    }

    /// Nothing is being added any more, so what is not known by now is nobody's.
    pub(super) fn forget_early(&mut self) {
        self.early.clear();
    }

    /// A watch has ended by itself.
    pub(super) fn ended(&mut self, watch: i32) -> Vec<(StoreId, Role)> {
        let stores = self.of(watch);
        self.stores.remove(&watch);
        stores
    }

    /// Forgets a store; the watches that nobody has any more.
    pub(super) fn forget(&mut self, store: StoreId) -> Vec<i32> {
        for stores in self.stores.values_mut() {
            stores.retain(|(of, _)| *of != store);
        }
        let unused: Vec<_> =
            self.stores.iter().filter(|(_, stores)| stores.is_empty()).map(|(watch, _)| *watch).collect();
        self.stores.retain(|_, stores| !stores.is_empty());
        unused
    }
}
