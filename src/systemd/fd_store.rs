//! Mounts that were swapped out, in PID 1's keeping: what this run of the daemon does not come to, the next one does.
//!
//! sd_pid_notify_with_fds(3), `FDSTORE=1`; `FileDescriptorStoreMax=` of the unit. PID 1 hands them back when it starts the daemon
//! again, whichever way it has ended.

use std::os::fd::BorrowedFd;

use layered_stores_model::StoreName;
use layered_stores_overlay::{
    host,
    swap::{OldMount, SafeKeeping},
};
use sd_notify::NotifyState;

/// What PID 1 keeps for a store.
#[derive(Clone, Copy, Debug)]
pub struct FdStore<'s>(pub &'s StoreName);

impl FdStore<'_> {
    /// No store's name has a dot, and no name here may have a colon.
    fn name(self, number: u64) -> String {
        format!("{}.{number}", self.0)
    }
}

impl SafeKeeping for FdStore<'_> {
    fn keep(&self, mount: BorrowedFd<'_>, number: u64) {
        // What only refers to a directory cannot be polled, and PID 1 would refuse to keep it.
        let states = [NotifyState::FdStore, NotifyState::FdName(&self.name(number)), NotifyState::Custom("FDPOLL=0")];
        // Without systemd there is nobody to keep it.
        let _ = sd_notify::notify_with_fds(&states, &[mount]);
    }

    fn let_go(&self, number: u64) {
        let _ = sd_notify::notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(&self.name(number))]);
    }
}

/// What earlier runs of the daemon have left to this one. To be asked once.
pub fn left_over() -> Vec<(StoreName, OldMount)> {
    let parse = |name: &str| {
        let (store, number) = name.rsplit_once('.')?;
        Some((store.parse().ok()?, number.parse().ok()?))
    };
    let kept = host::kept_by_systemd(|name| parse(name).is_some());
    let parsed = kept.into_iter().filter_map(|(name, fd)| parse(&name).map(|(store, number)| (store, fd, number)));
    parsed.map(|(store, fd, number)| (store, OldMount::kept(fd, number))).collect()
}
