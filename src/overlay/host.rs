//! Working in PID 1's mount namespace, and the two system interfaces that Rust calls `unsafe`.
//!
//! A hardened service unit (`ProtectSystem=` and the like) lives in a mount namespace of its own, a slave of PID 1's.
//! A reconfigure from there reaches the host, because it acts on the superblock; a `move_mount(2)` does not, and a
//! directory below a read-only or hidden path cannot be prepared. So every thread that touches a store first
//! moves into PID 1's namespace.
//!
//! This is the one module with `unsafe` code.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
};

use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};
use tokio::io::{Interest, unix::AsyncFd};

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

/// Waiting for a descriptor to become ready.
///
/// # Errors
/// When the descriptor cannot be polled.
///
/// # Panics
/// Outside a tokio runtime.
pub fn readiness(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` refers to the same open file for as long as it lives, and the `AsyncFd` owns it and gives
    // no mutable access to it.
    #[allow(unsafe_code)]
    let registered = unsafe { AsyncFd::register_with_interest(fd, interest) };
    Ok(registered?)
}

/// Moves the calling process, which must have no other threads, into a mount namespace of its own, and with `user` into a
/// user namespace of its own as well, which is what allows it to somebody who is not root.
///
/// # Errors
/// The kernel's answer.
pub fn private_mount_namespace(user: bool) -> io::Result<()> {
    let flags = UnshareFlags::NEWNS | if user { UnshareFlags::NEWUSER } else { UnshareFlags::empty() };
    // SAFETY: `unshare` is unsafe for `CLONE_FILES`, which is not among the flags.
    #[allow(unsafe_code)]
    let unshared = unsafe { rustix::thread::unshare_unsafe(flags) };
    Ok(unshared?)
}
