//! Working in PID 1's mount namespace, and the system interfaces that Rust calls `unsafe`.
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
    os::fd::{AsFd, FromRawFd as _, OwnedFd},
    sync::{LazyLock, Mutex, PoisonError},
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

/// What systemd has kept for this service under such names, and has handed to it at its start (sd_listen_fds(3)), with those
/// names. Each can be had once.
pub fn kept_by_systemd(is_wanted: impl Fn(&str) -> bool) -> Vec<(String, OwnedFd)> {
    static KEPT: LazyLock<Mutex<Vec<(String, OwnedFd)>>> = LazyLock::new(|| {
        let fds = sd_notify::listen_fds_with_names().into_iter().flatten();
        // SAFETY: systemd has opened them before this process began, and LISTEN_PID= says that they are for this process. They
        // are taken here and nowhere else, once.
        #[allow(unsafe_code)]
        Mutex::new(fds.map(|(fd, name)| (name, unsafe { OwnedFd::from_raw_fd(fd) })).collect())
    });
    KEPT.lock().unwrap_or_else(PoisonError::into_inner).extract_if(.., |(name, _)| is_wanted(name)).collect()
}

/// The number of the mount that a mount hangs on. Both are numbers that are not used again (`STATX_MNT_ID_UNIQUE`).
///
/// # Errors
/// The kernel's answer: before Linux 6.8 there is no statmount(2), and neither is there where it is filtered.
pub fn parent_of_mount(number: u64) -> io::Result<u64> {
    /// The same number on every architecture but alpha and mips.
    const STATMOUNT: libc::c_long = 457;
    const STATMOUNT_MNT_BASIC: u64 = 2;
    // struct mnt_id_req of linux/mount.h: size and a spare field, the mount, what is asked for.
    let request: [u64; 3] = [u64::from_ne_bytes(mount_request_head()), number, STATMOUNT_MNT_BASIC];
    // struct statmount is 512 bytes long; `mnt_parent_id` is at 48.
    let mut answer = [0_u64; 64];
    // SAFETY: statmount(2) reads as much of the request as its size field says, and writes at most as much as it is told the
    // answer has room for. Both are alive, and any bytes are valid numbers.
    #[allow(unsafe_code)]
    let said = unsafe { libc::syscall(STATMOUNT, request.as_ptr(), answer.as_mut_ptr(), size_of_val(&answer), 0) };
    if said != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(answer[6])
}

/// `size` (24 bytes) and `spare` of `struct mnt_id_req`.
fn mount_request_head() -> [u8; 8] {
    let mut head = [0; 8];
    head[..4].copy_from_slice(&24_u32.to_ne_bytes());
    head
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
