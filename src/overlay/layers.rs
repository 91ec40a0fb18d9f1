//! The directories of a store: walked to without trust, made with the right owner, checked, and locked.
//!
//! Paths may lead through directories that others can write. So no path is opened as a whole: each component is opened
//! in the one before, symbolic links are refused, and every directory on the way has to belong to root or the store's
//! owner. A directory that exists is never given another owner or mode.

use std::{
    ffi::CStr,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::unistd::{Gid, Group, Uid, User};
use rustix::{
    fs::{
        AtFlags, Dir, FileType, FlockOperation, IFlags, Mode, OFlags, RawMode, ResolveFlags, Statx, StatxAttributes,
        StatxFlags, XattrFlags,
    },
    io::Errno,
};

use super::{context::ContextError, ephemeral};
use crate::store::{AbsolutePath, EphemeralSize, Ownership, StoreSpec};

/// Why a store's directories cannot be used. Nothing was mounted.
#[derive(Debug, thiserror::Error)]
pub enum LayersError {
    /// The lower store's directory is not there.
    #[error("lower-store: {0} is not there; fill the lower store first, or mount the filesystem it is on")]
    LowerMissing(AbsolutePath),
    /// An account of the configuration does not exist.
    #[error("{key} = {name:?}: there is no such {kind} on this machine; create it, or name another")]
    NoSuchAccount {
        /// The configuration's key.
        key: &'static str,
        /// The name that was not found.
        name: String,
        /// User or group.
        kind: &'static str,
    },
    /// A component is a symbolic link.
    #[error("{key}: {at} is a symbolic link; write the path it leads to")]
    Symlink {
        /// The configuration's key.
        key: &'static str,
        /// The component.
        at: String,
    },
    /// A component is a file.
    #[error("{key}: {at} is not a directory; move it away, or name another path")]
    NotADirectory {
        /// The configuration's key.
        key: &'static str,
        /// The component.
        at: String,
    },
    /// A directory on the way could be replaced by somebody else.
    #[error(
        "{key}: {at} can be changed by others than root and the store's owner, who could put something else in its \
         place; change its owner or mode (now uid {uid}, mode {mode:04o}), or name another path"
    )]
    UnsafeParent {
        /// The configuration's key.
        key: &'static str,
        /// The directory.
        at: String,
        /// Its owner.
        uid: u32,
        /// Its mode.
        mode: u32,
    },
    /// The upper layer belongs to somebody else than the configuration says.
    #[error("{key}: {path} belongs to uid {found}, and the configuration says {wanted}; chown it, or change `owner`")]
    OtherOwner {
        /// The configuration's key.
        key: &'static str,
        /// The directory.
        path: AbsolutePath,
        /// Its owner.
        found: u32,
        /// The configured owner.
        wanted: u32,
    },
    /// The upper layer is the root of a filesystem.
    #[error(
        "upper-layer: {0} is the root of a mounted filesystem, where things like lost+found are no store paths; \
         use a directory below it"
    )]
    UpperIsMountRoot(AbsolutePath),
    /// Work dir and upper layer are on different mounts.
    #[error("work-dir: {work} is on another mount than the upper layer {upper}; put both on one filesystem")]
    OtherMount {
        /// The work dir.
        work: AbsolutePath,
        /// The upper layer.
        upper: AbsolutePath,
    },
    /// The upper layer's filesystem has no trusted extended attributes.
    #[error(
        "upper-layer: the filesystem of {0} has no extended attributes, which OverlayFS needs; use another filesystem"
    )]
    NoXattrs(AbsolutePath),
    /// The upper layer's filesystem does not tell the types of directory entries.
    #[error(
        "upper-layer: the filesystem of {0} tells no file types (d_type), which OverlayFS needs; use another filesystem"
    )]
    NoFileTypes(AbsolutePath),
    /// The bare mount point holds files that a mount would hide.
    #[error(
        "root: {path} is not empty (it holds {example:?}), and the mount would hide what is in it; \
         move it away, or name another root"
    )]
    MountPointNotEmpty {
        /// The bare mount point.
        path: AbsolutePath,
        /// One of its entries.
        example: String,
    },
    /// Another process has the upper layer locked.
    #[error(
        "upper-layer: {0} is locked by another process, most likely another layered-storesd; \
         two overlays on one upper layer corrupt it, so this store stays down until the other is stopped"
    )]
    Locked(AbsolutePath),
    /// The directory of an ephemeral store's filesystem holds files that the mount would hide.
    #[error(
        "ephemeral-size: {directory} is not empty (it holds {example:?}), most likely from when the store was not ephemeral; \
         move it away, or take ephemeral-size away"
    )]
    NotEphemeralYet {
        /// The directory.
        directory: AbsolutePath,
        /// One of its entries.
        example: String,
    },
    /// A store that is ephemeral no more would go on in memory.
    #[error(
        "upper-layer: {upper} is in memory still, from when the store was ephemeral; copy what is needed out of {directory}, \
         then run `umount {directory}`"
    )]
    StillEphemeral {
        /// The upper layer.
        upper: AbsolutePath,
        /// Where the filesystem in memory is mounted.
        directory: AbsolutePath,
    },
    /// The filesystem in memory could not be made, or not given the size.
    #[error("ephemeral-size = \"{size}\": cannot make the filesystem at {directory}: {error}")]
    Filesystem {
        /// Where it is to be.
        directory: AbsolutePath,
        /// How large.
        size: EphemeralSize,
        /// The kernel's answer.
        error: ContextError,
    },
    /// The mount table could not be read.
    #[error("{key}: cannot read the mount table: {source}")]
    MountTable {
        /// The configuration's key.
        key: &'static str,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// A system call failed.
    #[error("{key}: {doing} {at}: {errno}")]
    Sys {
        /// The configuration's key.
        key: &'static str,
        /// What was being done.
        doing: &'static str,
        /// To what.
        at: String,
        /// The kernel's answer.
        errno: Errno,
    },
}

/// The lock that keeps every other process from using an upper layer. Released when dropped, and by the kernel when
/// the process dies.
#[derive(Debug)]
pub struct UpperLock {
    _fd: OwnedFd,
}

/// User, group and mode of a store's directories.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Owner {
    uid: Uid,
    gid: Gid,
    mode: Mode,
}

/// How often a lock is tried again before it counts as held by another.
///
/// A daemon that was killed keeps its locks for the instant until the kernel has closed its files.
const LOCK_ATTEMPTS: u32 = 20;
const LOCK_PAUSE: std::time::Duration = std::time::Duration::from_millis(10);

/// Makes and checks all directories of a store that is not mounted, and takes its lock.
///
/// Running it again after it was interrupted at any point is safe.
///
/// # Errors
/// [`LayersError`]; directories made so far stay.
pub fn prepare(spec: &StoreSpec) -> Result<UpperLock, LayersError> {
    let owner = resolve_owner(&spec.ownership)?;
    check_lower(&spec.layers.lower)?;
    match &spec.ephemeral {
        Some(wanted) => ephemeral::ensure(wanted)?,
        None => {
            if let Some(directory) = ephemeral::left_over(&spec.layers.upper)? {
                return Err(LayersError::StillEphemeral { upper: spec.layers.upper.clone(), directory });
            }
        }
    }
    let upper = make_upper(spec, owner)?;
    let lock = lock_upper(upper, &spec.layers.upper)?;
    prepare_root(spec, owner)?;
    Ok(lock)
}

/// Takes the lock of a store whose mount is in place already.
///
/// # Errors
/// [`LayersError::Locked`] when another process has it.
pub fn lock(spec: &StoreSpec) -> Result<UpperLock, LayersError> {
    let owner = resolve_owner(&spec.ownership)?;
    let walk = Walk { key: "upper-layer", owner: owner.uid, create: false };
    lock_upper(walk.to(&spec.layers.upper)?, &spec.layers.upper)
}

/// The user who may ask for a refresh besides root: the owner of the upper layer.
///
/// # Errors
/// The kernel's answer when the upper layer cannot be looked at.
pub fn upper_owner(upper: &AbsolutePath) -> Result<u32, Errno> {
    Ok(rustix::fs::lstat(upper.as_path())?.st_uid)
}

/// Takes the immutable attribute off the bare mount point of a store that is mounted no more.
///
/// # Errors
/// [`LayersError::Sys`]; a mount point that does not exist is no error.
pub fn release_mount_point(merged: &AbsolutePath) -> Result<(), LayersError> {
    let sys = |errno| LayersError::Sys { key: "root", doing: "unlock the mount point", at: merged.to_string(), errno };
    let walk = Walk { key: "root", owner: Uid::from_raw(0), create: false };
    match walk.open_unmounted(merged) {
        Ok(point) => set_immutable(point.as_fd(), false).map_err(sys),
        Err(LayersError::Sys { errno: Errno::NOENT, .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

fn check_lower(lower: &AbsolutePath) -> Result<(), LayersError> {
    match rustix::fs::stat(lower.as_path()) {
        Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Directory => Ok(()),
        Ok(_) => Err(LayersError::NotADirectory { key: "lower-store", at: lower.to_string() }),
        Err(Errno::NOENT) => Err(LayersError::LowerMissing(lower.clone())),
        Err(errno) => Err(LayersError::Sys { key: "lower-store", doing: "look at", at: lower.to_string(), errno }),
    }
}

fn resolve_owner(ownership: &Ownership) -> Result<Owner, LayersError> {
    let root = Uid::from_raw(0);
    let (uid, own_gid) = match &ownership.owner {
        None => (root, Gid::from_raw(0)),
        Some(name) => {
            let by_number = || name.parse().ok().map(|id| User::from_uid(Uid::from_raw(id)));
            let user = User::from_name(name).ok().flatten().or_else(|| by_number()?.ok().flatten());
            let missing = || LayersError::NoSuchAccount { key: "owner", name: name.clone(), kind: "user" };
            user.map(|user| (user.uid, user.gid)).ok_or_else(missing)?
        }
    };
    let (gid, default_mode) = match &ownership.group {
        Some(name) => {
            let by_number = || name.parse().ok().map(|id| Group::from_gid(Gid::from_raw(id)));
            let group = Group::from_name(name).ok().flatten().or_else(|| by_number()?.ok().flatten());
            let missing = || LayersError::NoSuchAccount { key: "group", name: name.clone(), kind: "group" };
            (group.map(|group| group.gid).ok_or_else(missing)?, 0o1775)
        }
        // What Nix itself gives its store directory when it runs as root with build users (`LocalStore`).
        None if uid == root => match Group::from_name("nixbld") {
            Ok(Some(group)) => (group.gid, 0o1775),
            _ => (own_gid, 0o755),
        },
        None => (own_gid, 0o755),
    };
    Ok(Owner { uid, gid, mode: Mode::from_raw_mode(ownership.mode.unwrap_or(default_mode)) })
}

/// Makes and checks upper layer and work dir.
fn make_upper(spec: &StoreSpec, owner: Owner) -> Result<OwnedFd, LayersError> {
    let path = &spec.layers.upper;
    let walk = Walk { key: "upper-layer", owner: owner.uid, create: true };
    let (parent, name) = walk.to_parent(path)?;
    let upper = walk.make_owned(&parent, name, path, owner)?;
    let stat = walk.stat(upper.as_fd(), path.as_str())?;
    if stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
        return Err(LayersError::UpperIsMountRoot(path.clone()));
    }
    if spec.ownership.owner.is_some() && stat.stx_uid != owner.uid.as_raw() {
        return Err(LayersError::OtherOwner {
            key: "upper-layer",
            path: path.clone(),
            found: stat.stx_uid,
            wanted: owner.uid.as_raw(),
        });
    }

    let work_walk = Walk { key: "work-dir", owner: owner.uid, create: true };
    let (work_parent, work_name) = work_walk.to_parent(&spec.layers.work)?;
    let private = Owner { uid: Uid::from_raw(0), gid: Gid::from_raw(0), mode: Mode::from_raw_mode(0o700) };
    let work = work_walk.make_owned(&work_parent, work_name, &spec.layers.work, private)?;
    if work_walk.stat(work.as_fd(), spec.layers.work.as_str())?.stx_mnt_id != stat.stx_mnt_id {
        return Err(LayersError::OtherMount { work: spec.layers.work.clone(), upper: path.clone() });
    }
    check_xattrs(work.as_fd(), path)?;
    check_file_types(&parent, name, path)?;
    Ok(upper)
}

/// OverlayFS keeps its notes in `trusted.overlay.*`; the work dir is ours to try it on.
fn check_xattrs(work: BorrowedFd<'_>, upper: &AbsolutePath) -> Result<(), LayersError> {
    const PROBE: &str = "trusted.layered-stores";
    let set = readable(work).and_then(|work| {
        rustix::fs::fsetxattr(&work, PROBE, b"1", XattrFlags::empty())?;
        // A leftover does no harm.
        let _ = rustix::fs::fremovexattr(&work, PROBE);
        Ok(())
    });
    match set {
        Ok(()) => Ok(()),
        Err(Errno::OPNOTSUPP) => Err(LayersError::NoXattrs(upper.clone())),
        Err(errno) => Err(LayersError::Sys {
            key: "upper-layer",
            doing: "set an extended attribute on the filesystem of",
            at: upper.to_string(),
            errno,
        }),
    }
}

fn check_file_types(parent: &OwnedFd, name: &str, upper: &AbsolutePath) -> Result<(), LayersError> {
    let sys =
        |errno| LayersError::Sys { key: "upper-layer", doing: "list the parent of", at: upper.to_string(), errno };
    for entry in readable(parent.as_fd()).and_then(Dir::read_from).map_err(sys)? {
        let entry = entry.map_err(sys)?;
        if entry.file_name().to_bytes() == name.as_bytes() && entry.file_type() == FileType::Unknown {
            return Err(LayersError::NoFileTypes(upper.clone()));
        }
    }
    Ok(())
}

fn lock_upper(upper: OwnedFd, path: &AbsolutePath) -> Result<UpperLock, LayersError> {
    // The walk refers to directories without opening them; a lock needs an open file.
    let sys = |errno| LayersError::Sys { key: "upper-layer", doing: "lock", at: path.to_string(), errno };
    let fd = readable(upper.as_fd()).map_err(sys)?;
    for attempt in 1.. {
        match rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => break,
            Err(Errno::AGAIN) if attempt < LOCK_ATTEMPTS => std::thread::sleep(LOCK_PAUSE),
            Err(Errno::AGAIN) => return Err(LayersError::Locked(path.clone())),
            Err(errno) => return Err(sys(errno)),
        }
    }
    Ok(UpperLock { _fd: fd })
}

/// Makes `<root>/nix/store` as a mount point that takes no writes, and the state dir.
///
/// Root, and the directories between it and the mount point, belong to root even when the store belongs to somebody
/// else: who can rename a directory on the way to a mount point decides what root mounts where.
fn prepare_root(spec: &StoreSpec, owner: Owner) -> Result<(), LayersError> {
    let merged = &spec.layers.merged;
    let walk = Walk { key: "root", owner: owner.uid, create: true };
    walk.to(merged)?;
    let point = walk.open_unmounted(merged)?;
    let sys = |doing: &'static str| {
        let at = merged.to_string();
        move |errno| LayersError::Sys { key: "root", doing, at, errno }
    };
    for entry in readable(point.as_fd()).and_then(Dir::read_from).map_err(sys("list"))? {
        let entry = entry.map_err(sys("list"))?;
        // What Nix creates before it notices that nothing is mounted starts with a dot (`.links`) and holds nothing.
        if !entry.file_name().to_bytes().starts_with(b".") {
            let example = entry.file_name().to_string_lossy().into_owned();
            return Err(LayersError::MountPointNotEmpty { path: merged.clone(), example });
        }
    }
    match set_immutable(point.as_fd(), true) {
        // A courtesy where the filesystem has it.
        Ok(()) | Err(Errno::NOTTY | Errno::OPNOTSUPP | Errno::INVAL | Errno::PERM) => {}
        Err(errno) => return Err(sys("set the immutable attribute of")(errno)),
    }

    let state = Owner { mode: Mode::from_raw_mode(0o755), ..owner };
    for tail in ["nix/var/nix", "nix/var/log/nix"] {
        if let Ok(path) = spec.root.join(tail) {
            let (parent, name) = walk.to_parent(&path)?;
            walk.make_owned(&parent, name, &path, state)?;
        }
    }
    Ok(())
}

fn set_immutable(dir: BorrowedFd<'_>, on: bool) -> Result<(), Errno> {
    let dir = readable(dir)?;
    let flags = rustix::fs::ioctl_getflags(&dir)?;
    if flags.contains(IFlags::IMMUTABLE) == on {
        return Ok(());
    }
    rustix::fs::ioctl_setflags(&dir, if on { flags | IFlags::IMMUTABLE } else { flags - IFlags::IMMUTABLE })
}

/// Opens a directory for reading that is only referred to (`O_PATH`) so far.
pub(super) fn readable(dir: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    rustix::fs::openat(dir, c".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

/// A walk from the root directory to a configured path.
pub(super) struct Walk {
    /// The configuration's key, for messages.
    key: &'static str,
    /// Who may own directories on the way, besides root.
    owner: Uid,
    /// Whether missing directories are made.
    create: bool,
}

impl Walk {
    /// A walk that makes directories, through those of root alone.
    pub(super) fn of_root(key: &'static str) -> Self {
        Self { key, owner: Uid::from_raw(0), create: true }
    }

    fn sys(&self, doing: &'static str, at: &str, errno: Errno) -> LayersError {
        LayersError::Sys { key: self.key, doing, at: at.to_owned(), errno }
    }

    /// The directory at `path`.
    pub(super) fn to(&self, path: &AbsolutePath) -> Result<OwnedFd, LayersError> {
        let (parent, name) = self.to_parent(path)?;
        self.step(&parent, name, path.as_str())
    }

    /// The directory that holds the last component of `path`, and that component.
    fn to_parent<'p>(&self, path: &'p AbsolutePath) -> Result<(OwnedFd, &'p str), LayersError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mut dir = rustix::fs::open("/", flags, Mode::empty()).map_err(|e| self.sys("open", "/", e))?;
        let mut components = path.components().peekable();
        let mut walked = String::new();
        while let Some(component) = components.next() {
            if components.peek().is_none() {
                return Ok((dir, component));
            }
            walked.push('/');
            walked.push_str(component);
            dir = self.step(&dir, component, &walked)?;
            self.check_parent(dir.as_fd(), &walked)?;
        }
        unreachable!("an AbsolutePath has a component")
    }

    /// The directory `name` in `parent`, made if need be.
    fn step(&self, parent: &OwnedFd, name: &str, at: &str) -> Result<OwnedFd, LayersError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let open = || rustix::fs::openat(parent, name, flags, Mode::empty());
        let opened = match open() {
            Err(Errno::NOENT) if self.create => match rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(Errno::EXIST) => open(),
                Err(errno) => return Err(self.sys("make the directory", at, errno)),
            },
            result => result,
        };
        opened.map_err(|errno| match errno {
            Errno::NOTDIR | Errno::LOOP if self.is_symlink(parent, name) => {
                LayersError::Symlink { key: self.key, at: at.to_owned() }
            }
            Errno::NOTDIR => LayersError::NotADirectory { key: self.key, at: at.to_owned() },
            errno => self.sys("open", at, errno),
        })
    }

    fn is_symlink(&self, parent: &OwnedFd, name: &str) -> bool {
        rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)
            .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Symlink)
    }

    /// Refuses a directory in which others could replace what root is about to use.
    fn check_parent(&self, dir: BorrowedFd<'_>, at: &str) -> Result<(), LayersError> {
        let stat = self.stat(dir, at)?;
        let mode = Mode::from_raw_mode(RawMode::from(stat.stx_mode));
        let trusted = stat.stx_uid == 0 || stat.stx_uid == self.owner.as_raw();
        // In a sticky directory (/tmp) others cannot rename what is not theirs.
        let writable = mode.intersects(Mode::WGRP | Mode::WOTH) && !mode.contains(Mode::SVTX);
        if trusted && !writable {
            return Ok(());
        }
        let mode = u32::from(stat.stx_mode) & 0o7777;
        Err(LayersError::UnsafeParent { key: self.key, at: at.to_owned(), uid: stat.stx_uid, mode })
    }

    /// The directory at `path`, refused with `EBUSY` if something is mounted there.
    pub(super) fn open_unmounted(&self, path: &AbsolutePath) -> Result<OwnedFd, LayersError> {
        let (parent, name) = Walk { create: false, ..*self }.to_parent(path)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS;
        rustix::fs::openat2(parent, name, flags, Mode::empty(), resolve).map_err(|errno| {
            let errno = if errno == Errno::XDEV { Errno::BUSY } else { errno };
            self.sys("open the bare mount point", path.as_str(), errno)
        })
    }

    /// The directory `name` in `parent`; if it is missing it is made complete with owner and mode, or not at all.
    fn make_owned(
        &self,
        parent: &OwnedFd,
        name: &str,
        path: &AbsolutePath,
        owner: Owner,
    ) -> Result<OwnedFd, LayersError> {
        let existing = Walk { create: false, ..*self }.step(parent, name, path.as_str());
        if !matches!(existing, Err(LayersError::Sys { errno: Errno::NOENT, .. })) {
            return existing;
        }
        // Made under another name and renamed when it is right: a kill in between leaves no half-made directory.
        let temporary = format!(".{name}.new");
        let fail = |errno| self.sys("make the directory", path.as_str(), errno);
        let fd = Walk { create: true, ..*self }.step(parent, &temporary, path.as_str())?;
        let fd = readable(fd.as_fd()).map_err(fail)?;
        let (uid, gid) = (owner.uid.as_raw(), owner.gid.as_raw());
        let (uid, gid) = (rustix::fs::Uid::from_raw(uid), rustix::fs::Gid::from_raw(gid));
        rustix::fs::fchown(&fd, Some(uid), Some(gid)).map_err(fail)?;
        rustix::fs::fchmod(&fd, owner.mode).map_err(fail)?;
        rustix::fs::renameat_with(parent, &temporary, parent, name, rustix::fs::RenameFlags::NOREPLACE)
            .map_err(fail)?;
        Ok(fd)
    }

    fn stat(&self, fd: BorrowedFd<'_>, at: &str) -> Result<Statx, LayersError> {
        const EMPTY: &CStr = c"";
        let mask = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
        rustix::fs::statx(fd, EMPTY, AtFlags::EMPTY_PATH, mask).map_err(|errno| self.sys("look at", at, errno))
    }
}
