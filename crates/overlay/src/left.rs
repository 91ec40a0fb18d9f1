//! The superblocks that swaps have left behind, for as long as somebody holds a file of them.
//!
//! Nothing lists the superblocks of the kernel that are mounted nowhere. But an inotify watch ends with the superblock of what it
//! watches (`IN_UNMOUNT`, inotify(7)), and does not keep it.

use std::{
    collections::HashMap,
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
    sync::{Mutex, OnceLock, PoisonError},
};

use layered_stores_model::StoreName;
use rustix::{
    fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags},
    io::Errno,
};

/// An inotify instance, made when it is needed: a user has so many (inotify(7)), and others may have them all just now.
#[derive(Debug, Default)]
struct Instance(OnceLock<OwnedFd>);

impl Instance {
    fn get(&self) -> Option<BorrowedFd<'_>> {
        self.0.get().map(AsFd::as_fd)
    }

    fn get_or_make(&self) -> Result<BorrowedFd<'_>, Errno> {
        if let Some(fd) = self.get() {
            return Ok(fd);
        }
        let fd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        // Somebody else may have been quicker. Nothing is watched on this one yet.
        Ok(self.0.get_or_init(|| fd).as_fd())
    }
}

/// What swaps have left behind, by watch.
#[derive(Debug, Default)]
pub struct Left {
    instance: Instance,
    stores: Mutex<HashMap<i32, StoreName>>,
}

impl Left {
    /// Follows the superblock of a mount that was swapped out.
    ///
    /// # Errors
    /// The kernel's answer when there is no watch or no instance left; it is not counted then.
    pub fn follow(&self, store: &StoreName, root: impl AsFd) -> Result<(), Errno> {
        // It is mounted nowhere, so this is its only path. The watch cannot end before it is known: `root` keeps the superblock.
        let path = format!("/proc/thread-self/fd/{}", root.as_fd().as_raw_fd());
        let watch =
            inotify::add_watch(self.instance.get_or_make()?, path, WatchFlags::DELETE_SELF | WatchFlags::ONLYDIR)?;
        self.stores.lock().unwrap_or_else(PoisonError::into_inner).insert(watch, store.clone());
        Ok(())
    }

    /// How many a store has left behind that are not gone.
    pub fn count(&self, store: &StoreName) -> usize {
        let Some(fd) = self.instance.get() else { return 0 };
        let mut stores = self.stores.lock().unwrap_or_else(PoisonError::into_inner);
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(fd, &mut buffer);
        loop {
            match reader.next() {
                Ok(event) if event.events().contains(ReadFlags::IGNORED) => drop(stores.remove(&event.wd())),
                Ok(_) | Err(Errno::INTR) => {}
                Err(_) => break,
            }
        }
        stores.values().filter(|of| *of == store).count()
    }
}
