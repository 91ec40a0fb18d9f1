//! A small handle around the kernel's filesystem context (`fsopen(2)`, `fspick(2)`).

use std::{
    fmt,
    os::fd::{AsFd, OwnedFd},
};

use rustix::{
    fs::StatFs,
    io::Errno,
    mount::{FsMountFlags, FsOpenFlags, FsPickFlags, MountAttrFlags},
};

/// `OVERLAYFS_SUPER_MAGIC` of `linux/magic.h`.
const OVERLAYFS_MAGIC: u64 = 0x794c_7630;
/// `TMPFS_MAGIC`, likewise.
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// A filesystem context: settings on their way into a new or an existing superblock.
#[derive(Debug)]
pub struct FsContext {
    fd: OwnedFd,
}

/// A step of the mount API failed.
#[derive(Debug)]
pub struct ContextError {
    step: &'static str,
    errno: Errno,
    /// What the kernel wrote into the context's message buffer.
    messages: Vec<String>,
}

impl ContextError {
    /// The error number.
    pub fn errno(&self) -> Errno {
        self.errno
    }
}

impl std::error::Error for ContextError {}

impl fmt::Display for ContextError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.step, std::io::Error::from(self.errno))?;
        if !self.messages.is_empty() {
            write!(f, " (the kernel says: {})", self.messages.join("; "))?;
        }
        Ok(())
    }
}

impl FsContext {
    /// A context for a new superblock of type `fs_type`.
    ///
    /// # Errors
    /// [`ContextError`] with the kernel's answer.
    pub fn open(fs_type: &str) -> Result<Self, ContextError> {
        let fd = rustix::mount::fsopen(fs_type, FsOpenFlags::FSOPEN_CLOEXEC);
        fd.map(|fd| Self { fd }).map_err(|errno| ContextError { step: "fsopen", errno, messages: Vec::new() })
    }

    /// A context for the superblock of the mount whose root `path` is. A final symbolic link is not followed.
    ///
    /// # Errors
    /// [`ContextError`]; `EINVAL` when `path` is no root of a mount.
    pub fn pick(dir: impl AsFd, path: &str) -> Result<Self, ContextError> {
        let mut flags = FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_SYMLINK_NOFOLLOW;
        flags |= FsPickFlags::FSPICK_NO_AUTOMOUNT;
        if path.is_empty() {
            flags |= FsPickFlags::FSPICK_EMPTY_PATH;
        }
        let fd = rustix::mount::fspick(dir, path, flags);
        fd.map(|fd| Self { fd }).map_err(|errno| ContextError { step: "fspick", errno, messages: Vec::new() })
    }

    /// Sets `key` to `value`.
    ///
    /// # Errors
    /// [`ContextError`] with the kernel's answer and its messages.
    pub fn set(&self, key: &str, value: &str) -> Result<(), ContextError> {
        self.check("fsconfig", rustix::mount::fsconfig_set_string(self.fd.as_fd(), key, value))
    }

    /// Sets the flag `key`.
    ///
    /// # Errors
    /// [`ContextError`] with the kernel's answer and its messages.
    pub fn set_flag(&self, key: &str) -> Result<(), ContextError> {
        self.check("fsconfig", rustix::mount::fsconfig_set_flag(self.fd.as_fd(), key))
    }

    /// Applies the settings to the picked superblock; with none set, drops its unused directory entries.
    ///
    /// # Errors
    /// [`ContextError`] with the kernel's answer and its messages.
    pub fn reconfigure(&self) -> Result<(), ContextError> {
        self.check("reconfigure", rustix::mount::fsconfig_reconfigure(self.fd.as_fd()))
    }

    /// Makes the superblock and a mount of it that is attached nowhere. It is gone when the descriptor is closed.
    ///
    /// # Errors
    /// [`ContextError`] with the kernel's answer and its messages.
    pub fn mount(&self, attributes: MountAttrFlags) -> Result<OwnedFd, ContextError> {
        self.check("create superblock", rustix::mount::fsconfig_create(self.fd.as_fd()))?;
        let mount = rustix::mount::fsmount(self.fd.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes);
        self.check("fsmount", mount)
    }

    fn check<T>(&self, step: &'static str, result: Result<T, Errno>) -> Result<T, ContextError> {
        result.map_err(|errno| ContextError { step, errno, messages: self.messages() })
    }

    /// Drains the messages the kernel keeps for this context: one a `read(2)`, each with its level in front.
    fn messages(&self) -> Vec<String> {
        let mut messages = Vec::new();
        let mut buffer = [0; 1024];
        while let Ok(read @ 1..) = rustix::io::read(&self.fd, &mut buffer) {
            let line = String::from_utf8_lossy(&buffer[..read]);
            messages.push(line.trim_end().trim_start_matches(['e', 'w', 'i']).trim_start().to_owned());
        }
        messages
    }
}

/// Whether a file is on an overlay.
pub fn is_overlay(file: impl AsFd) -> bool {
    rustix::fs::fstatfs(file).is_ok_and(|stat| stat.f_type as u64 == OVERLAYFS_MAGIC)
}

/// Whether a filesystem is one in memory.
pub fn is_tmpfs(filesystem: &StatFs) -> bool {
    filesystem.f_type as u64 == TMPFS_MAGIC
}
