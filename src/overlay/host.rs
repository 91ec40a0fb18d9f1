//! Working in PID 1's mount namespace.
//!
//! A hardened service unit (`ProtectSystem=` and the like) lives in a mount namespace of its own, a slave of PID 1's.
//! A reconfigure from there reaches the host, because it acts on the superblock; a `move_mount(2)` does not, and a
//! directory below a read-only or hidden path cannot be prepared. So every thread that touches a store first
//! moves into PID 1's namespace.
//!
//! This is the one module with `unsafe` code.

use std::fs::File;
use std::os::fd::AsFd;

use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

/// The mount namespace of PID 1 cannot be entered.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot enter PID 1's mount namespace, where stores are mounted: {step}: {source}; \
     run as root with CAP_SYS_ADMIN, CAP_SYS_CHROOT and CAP_SYS_PTRACE"
)]
pub struct EnterError {
    step: &'static str,
    source: std::io::Error,
}

/// Moves the calling thread into PID 1's mount namespace, unless it is there already.
///
/// Meant for threads that do nothing else afterwards: the move is for good, and working directory and root become
/// those of the namespace.
///
/// # Errors
/// [`EnterError`] when the thread lacks the privilege.
pub fn enter() -> Result<(), EnterError> {
    let step = |step| move |source| EnterError { step, source };
    let namespace = File::open("/proc/1/ns/mnt").map_err(step("open /proc/1/ns/mnt"))?;
    let here =
        rustix::fs::stat("/proc/thread-self/ns/mnt").map_err(|e| step("stat /proc/thread-self/ns/mnt")(e.into()))?;
    let there = rustix::fs::fstat(&namespace).map_err(|e| step("stat /proc/1/ns/mnt")(e.into()))?;
    if (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino) {
        return Ok(());
    }
    // setns(2) refuses a mount namespace to a thread that shares working directory and root with others.
    //
    // SAFETY: `unshare` is unsafe for `CLONE_FILES`, which would let threads see different file descriptor tables.
    // `CLONE_FS` only gives this thread a working directory, root and umask of its own.
    #[allow(unsafe_code)]
    let unshared = unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) };
    unshared.map_err(|e| step("unshare(CLONE_FS)")(e.into()))?;
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Mount))
        .map_err(|e| step("setns(CLONE_NEWNS)")(e.into()))
}
