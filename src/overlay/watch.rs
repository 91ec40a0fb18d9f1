//! Watching the upper layers and lower store directories for names that come and go (inotify(7)).
//!
//! Nix keeps "a remount is needed" in its memory only; if it dies before it calls the hook, nobody is told. The layers
//! tell.

use std::{
    collections::HashMap,
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Mutex, MutexGuard, PoisonError},
};

use rustix::{
    fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags},
    io::Errno,
};

use super::{probe::is_store_path_name, refresh::Changes};
use crate::store::{AbsolutePath, Layers, StoreName};

/// A layer that cannot be watched.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// The kernel has no more watches.
    #[error("the kernel has no inotify watch left for {0}; raise the sysctl fs.inotify.max_user_watches")]
    Exhausted(AbsolutePath),
    /// Another answer of the kernel.
    #[error("cannot watch {0}: {1}")]
    Sys(AbsolutePath, Errno),
}

/// All watches of the daemon, on one inotify descriptor.
#[derive(Debug)]
pub struct Watches {
    fd: OwnedFd,
    /// Which stores a watch concerns: the kernel gives one number for one directory, and stores share lower stores.
    ///
    /// Held while a watch is added and while events are read, so that no event comes before its watch is known.
    stores: Mutex<HashMap<i32, Vec<StoreName>>>,
}

impl Watches {
    /// No watches yet.
    ///
    /// # Errors
    /// The kernel's answer when the limit of inotify instances is reached.
    pub fn new() -> Result<Self, Errno> {
        let fd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        Ok(Self { fd, stores: Mutex::default() })
    }

    /// The descriptor, readable when there are events.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Watches the layers of a store. Again after a layer was replaced is fine.
    ///
    /// # Errors
    /// [`WatchError`]; one of the two layers may be watched then.
    pub fn add(&self, store: &StoreName, layers: &Layers) -> Result<(), WatchError> {
        let flags = WatchFlags::CREATE | WatchFlags::DELETE | WatchFlags::MOVE;
        let flags = flags | WatchFlags::DELETE_SELF | WatchFlags::MOVE_SELF | WatchFlags::ONLYDIR;
        let mut stores = self.lock();
        for dir in [&layers.upper, &layers.lower] {
            let watch = inotify::add_watch(&self.fd, dir.as_str(), flags).map_err(|errno| match errno {
                Errno::NOSPC => WatchError::Exhausted(dir.clone()),
                errno => WatchError::Sys(dir.clone(), errno),
            })?;
            let concerned = stores.entry(watch).or_default();
            if !concerned.contains(store) {
                concerned.push(store.clone());
            }
        }
        Ok(())
    }

    /// Forgets the layers of a store.
    pub fn remove(&self, store: &StoreName) {
        self.lock().retain(|&watch, concerned| {
            concerned.retain(|name| name != store);
            if concerned.is_empty() {
                // Fails only if the kernel dropped the watch with its directory.
                let _ = inotify::remove_watch(&self.fd, watch);
            }
            !concerned.is_empty()
        });
    }

    /// Takes all events there are.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn drain(&self) -> Result<HashMap<StoreName, Changes>, Errno> {
        let mut changes: HashMap<StoreName, Changes> = HashMap::new();
        let mut stores = self.lock();
        let mut buffer = [MaybeUninit::uninit(); 16 * 1024];
        let mut reader = inotify::Reader::new(&self.fd, &mut buffer);
        loop {
            let event = match reader.next() {
                Ok(event) => event,
                Err(Errno::AGAIN) => return Ok(changes),
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(errno),
            };
            let flags = event.events();
            if flags.contains(ReadFlags::QUEUE_OVERFLOW) {
                for store in stores.values().flatten() {
                    changes.insert(store.clone(), Changes::unknown());
                }
            } else if let Some(name) = event.file_name() {
                let name = name.to_string_lossy();
                if is_store_path_name(&name) {
                    for store in stores.get(&event.wd()).into_iter().flatten() {
                        changes.entry(store.clone()).or_default().names.insert(name.clone().into_owned());
                    }
                }
            } else {
                // The directory itself was moved, deleted or unmounted.
                for store in stores.get(&event.wd()).into_iter().flatten() {
                    changes.insert(store.clone(), Changes::unknown());
                }
                if flags.contains(ReadFlags::IGNORED) {
                    stores.remove(&event.wd());
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<i32, Vec<StoreName>>> {
        // A panic while it was held leaves a map that is still a map.
        self.stores.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATH: &str = "00000000000000000000000000000000-hello";

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
        let (a, b) = ("a".parse::<StoreName>().expect("valid"), "b".parse::<StoreName>().expect("valid"));
        let watches = Watches::new().expect("inotify");
        watches.add(&a, &layers("a")).expect("watched");
        watches.add(&b, &layers("b")).expect("watched");

        std::fs::write(dir.path().join("lower").join(PATH), "").expect("written");
        std::fs::write(dir.path().join("lower/.links"), "").expect("written");
        let seen = Changes { names: [PATH.to_owned()].into(), unknown: false };
        assert_eq!(watches.drain(), Ok([(a.clone(), seen.clone()), (b.clone(), seen.clone())].into()));

        watches.remove(&a);
        std::fs::remove_file(dir.path().join("lower").join(PATH)).expect("removed");
        std::fs::write(dir.path().join("a-upper").join(PATH), "").expect("written");
        assert_eq!(watches.drain(), Ok([(b.clone(), seen)].into()));

        std::fs::remove_dir_all(dir.path().join("b-upper")).expect("removed");
        assert_eq!(watches.drain(), Ok([(b, Changes::unknown())].into()));
    }
}
