//! The directories of a store: walked to without trust, made with the right owner, checked, and locked.
//!
//! A directory that exists is never given another owner or mode.

mod accounts;
mod error;
mod others;
mod work;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

pub use error::LayersError;
pub(super) use others::refuse_others;
pub(super) use work::{KERNELS, refuse_strange_work};

use layered_stores_model::{AbsolutePath, Layers, LowerStore, NIX_STORE_DIR, Ownership, StoreSpec};
use nix::unistd::{Gid, Uid};
use rustix::{
    fs::{AtFlags, CWD, Dir, FileType, IFlags, Mode, Statx, StatxAttributes, StatxFlags, XattrFlags},
    io::Errno,
};

use self::{
    accounts::{BuildUsers, resolve_owner, resolve_user},
    others::{refuse_lower_of_others, refuse_state_of_others, refuse_writers},
};
use super::{
    ephemeral,
    identity::{self, Expected, Id, Known, Marks, Pair},
    lock::UpperLock,
    mark,
    progress::{self, Spot},
    walk::{self, Owner, Walk, readable, refer_to, stat},
};

/// Makes and checks all directories of a store that is not mounted, and takes its lock.
///
/// Running it again after it was interrupted at any point is safe. What the store had before, as is `known`, is not made
/// anew; see [`identity`].
///
/// # Errors
/// [`LayersError`]; directories made so far stay.
pub fn prepare(spec: &StoreSpec, known: Known<'_>) -> Result<(UpperLock, Marks), LayersError> {
    let build_users = BuildUsers::of(spec);
    let owner = resolve_owner(spec, &build_users)?;
    require_lower(spec, owner, &build_users)?;
    match &spec.ephemeral {
        Some(wanted) => ephemeral::ensure(wanted)?,
        None => refuse_left_over(spec)?,
    }
    // Nothing is mounted from here on.
    walk::together(|| prepare_own(spec, known, owner, &build_users))
}

/// Makes and checks the directories that are a store's own.
fn prepare_own(
    spec: &StoreSpec,
    known: Known<'_>,
    owner: Owner,
    build_users: &BuildUsers<'_>,
) -> Result<(UpperLock, Marks), LayersError> {
    let (upper, state) = identity::expected(spec, known);
    let directories = make_upper(spec, owner, build_users, &upper)?;
    let lock = UpperLock::take(&spec.layers.upper)?;
    mark::refuse_half_removed(spec)?;
    let state_dir = prepare_root(spec, owner, &state)?;
    if owner.uid.is_root() {
        refuse_state_of_others(spec, state_dir.as_fd())?;
    }
    // What is mounted may have changed since nothing was there to compare.
    let (upper_dir, state_dir) = (directories.upper.as_fd(), state_dir.as_fd());
    upper.check(upper_dir)?;
    state.check(state_dir)?;
    identity::check_pair(spec, Some(upper_dir), Some(state_dir), &state)?;
    let pair = Pair { upper: &upper, upper_dir, through: upper_dir, state: &state, state_dir };
    Ok((lock, pair.settle()?))
}

/// Looks whether a store could most likely come up, while something else is mounted for it. Nothing is made, and what is not there
/// yet may be refused only when it is.
///
/// # Errors
/// [`LayersError`], as of [`prepare`].
pub fn look_ahead(spec: &StoreSpec, known: Known<'_>) -> Result<(), LayersError> {
    walk::together(|| look_at_all(spec, known))
}

fn look_at_all(spec: &StoreSpec, known: Known<'_>) -> Result<(), LayersError> {
    let build_users = BuildUsers::of(spec);
    let owner = resolve_owner(spec, &build_users)?;
    // That of a layered store is there when that is up.
    let is_layered = spec.lower_name().is_some();
    if !is_layered {
        require_lower(spec, owner, &build_users)?;
    }
    match &spec.ephemeral {
        Some(wanted) => ephemeral::look_ahead(wanted)?,
        None => refuse_left_over(spec)?,
    }
    identity::require(spec, known)?;
    match Directories::open(&spec.layers) {
        Ok(directories) => {
            check_upper(&directories, spec, owner, &build_users)?;
            refuse_strange_work(directories.work.as_fd(), &spec.layers.work)
        }
        Err(LayersError::Sys { errno: Errno::NOENT, .. }) => Ok(()),
        Err(LayersError::LowerMissing(_)) if is_layered => Ok(()),
        Err(error) => Err(error),
    }
}

fn require_lower(spec: &StoreSpec, owner: Owner, build_users: &BuildUsers<'_>) -> Result<(), LayersError> {
    if owner.uid.is_root() {
        refuse_writers(spec, build_users, owner.gid, owner.mode)?;
    }
    let lower = open_lower(&spec.layers.lower).map_err(|error| match (error, &spec.lower_store) {
        (LayersError::LowerMissing(dir), LowerStore::Nix { url, .. }) if dir.as_str() == NIX_STORE_DIR => {
            LayersError::NixUnused { dir, url: url.clone() }
        }
        (error, _) => error,
    })?;
    if owner.uid.is_root() { refuse_lower_of_others(spec, &lower, build_users) } else { Ok(()) }
}

fn refuse_left_over(spec: &StoreSpec) -> Result<(), LayersError> {
    let upper = &spec.layers.upper;
    match ephemeral::left_over(upper)? {
        Some(directory) => Err(LayersError::StillEphemeral { upper: upper.clone(), directory }),
        None => Ok(()),
    }
}

/// Checks the way to all directories of a store whose mount is in place already, and that it is made of them. Returns by what they
/// are known again. Whom the upper layer belongs to is another matter: see [`owner`](super::owner).
///
/// # Errors
/// [`LayersError`].
pub fn look_over(spec: &StoreSpec, known: Known<'_>) -> Result<Marks, LayersError> {
    walk::together(|| look_over_all(spec, known))
}

fn look_over_all(spec: &StoreSpec, known: Known<'_>) -> Result<Marks, LayersError> {
    let (upper, merged) = (&spec.layers.upper, &spec.layers.merged);
    let (expected, state) = identity::expected(spec, known);
    let mounted = Walk::new("root").to(merged)?;
    let directories = Directories::open(&spec.layers).map_err(|error| expected.missing(error))?;
    let (upper_dir, through) = (directories.upper.as_fd(), mounted.as_fd());
    let found = expected.check(upper_dir)?;
    // The overlay shows the attributes of the upper layer that it was made with.
    let is_it = || Ok(Id::of(&mounted)? == found && identity::are_one(&mounted, upper_dir)?);
    if !is_it().map_err(|errno| LayersError::sys("root", "look at", merged.as_str(), errno))? {
        return Err(LayersError::Elsewhere { upper: upper.clone(), merged: merged.clone() });
    }
    let state_dir = match Walk::new("root").to(&spec.state_dir) {
        Err(LayersError::Sys { errno: Errno::NOENT, .. }) if !state.is_known() => {
            return Ok(Marks { upper: Some(expected.mark_through(upper_dir, through)?), state: None });
        }
        dir => dir.map_err(|error| state.missing(error))?,
    };
    let state_dir = state_dir.as_fd();
    state.check(state_dir)?;
    let tells = |upper: Id| identity::tells(state_dir, &upper);
    let are_told = found.map(tells).transpose();
    // Its database may be gone by now, and taken down it would be worse off; a start would see that.
    if are_told.map_err(|errno| LayersError::sys("root", "look at", spec.state_dir.as_str(), errno))? != Some(true) {
        identity::check_pair(spec, Some(upper_dir), Some(state_dir), &state)?;
    }
    Pair { upper: &expected, upper_dir, through, state: &state, state_dir }.settle()
}

/// Takes the lock of a store whose mount is in place already.
///
/// # Errors
/// [`LayersError`], such as [`LayersError::Locked`] when another process has it.
pub fn lock(spec: &StoreSpec) -> Result<UpperLock, LayersError> {
    progress::at(Spot::Upper);
    UpperLock::take(&spec.layers.upper)
}

/// The user who may ask for a refresh besides root: the owner of the upper layer.
///
/// # Errors
/// The kernel's answer when the upper layer cannot be looked at.
pub fn upper_owner(upper: &AbsolutePath) -> Result<u32, Errno> {
    progress::at(Spot::Upper);
    Ok(stat(refer_to(upper)?.as_fd())?.stx_uid)
}

/// The user whom the configuration gives a store to; `root` when it names nobody.
///
/// # Errors
/// [`LayersError::NoSuchAccount`].
pub fn declared_owner(ownership: &Ownership) -> Result<u32, LayersError> {
    progress::at(Spot::Accounts);
    Ok(resolve_user(ownership)?.0.as_raw())
}

/// Takes the immutable attribute off the bare mount point of a store that is mounted no more.
///
/// # Errors
/// [`LayersError::Sys`]; a mount point that does not exist is no error.
pub fn release_mount_point(merged: &AbsolutePath) -> Result<(), LayersError> {
    let sys = |errno| LayersError::sys("root", "unlock the mount point", merged.as_str(), errno);
    match Walk::new("root").to_unmounted(merged) {
        Ok(point) => set_immutable(point.as_fd(), false).map_err(sys),
        Err(LayersError::Sys { errno: Errno::NOENT, .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// The directories an overlay is made of, each walked to and opened once.
///
/// To the kernel they are named by path all the same: it takes descriptors for layers from Linux 6.13 on, and shows then no
/// paths that Nix's `check-mount` would find. The walk is what makes the two the same, and
/// [`are_in_place`](Self::are_in_place) sees that they are.
#[derive(Debug)]
pub(super) struct Directories {
    lower: OwnedFd,
    upper: OwnedFd,
    work: OwnedFd,
}

impl Directories {
    /// Opens them, and refuses those that are no layers.
    pub(super) fn open(layers: &Layers) -> Result<Self, LayersError> {
        let lower = open_lower(&layers.lower)?;
        let walk = Walk::new("upper-layer");
        let (parent, name) = walk.to_parent(&layers.upper)?;
        let upper = walk.step(&parent, name, layers.upper.as_str())?;
        let stat = walk.stat(upper.as_fd(), layers.upper.as_str())?;
        if stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
            return Err(LayersError::UpperIsMountRoot(layers.upper.clone()));
        }
        let walk = Walk::new("work-dir");
        let (parent, name) = walk.to_parent(&layers.work)?;
        let work = walk.step(&parent, name, layers.work.as_str())?;
        if walk.check_own(work.as_fd(), &layers.work)?.stx_mnt_id != stat.stx_mnt_id {
            return Err(LayersError::OtherMount { work: layers.work.clone(), upper: layers.upper.clone() });
        }
        Ok(Self { lower, upper, work })
    }

    /// The lower store's directory.
    pub(super) fn lower(&self) -> BorrowedFd<'_> {
        self.lower.as_fd()
    }

    /// Whether the paths still lead to them.
    ///
    /// # Errors
    /// The first path that does not.
    pub(super) fn are_in_place(&self, layers: &Layers) -> Result<(), AbsolutePath> {
        for (spot, dir, path) in [
            (Spot::Lower, &self.lower, &layers.lower),
            (Spot::Upper, &self.upper, &layers.upper),
            (Spot::Work, &self.work, &layers.work),
        ] {
            let is = |stat: &Statx| (stat.stx_mnt_id, stat.stx_dev_major, stat.stx_dev_minor, stat.stx_ino);
            progress::at(spot);
            let flags = AtFlags::SYMLINK_NOFOLLOW;
            let now = rustix::fs::statx(CWD, path.as_str(), flags, StatxFlags::INO | StatxFlags::MNT_ID);
            let then = stat(dir.as_fd());
            if then.as_ref().map(is) != now.as_ref().map(is) {
                return Err(path.clone());
            }
        }
        Ok(())
    }
}

/// Walks to the state directory of a store that others lie on, whomever it belongs to: which directory it is, is for root to say.
///
/// # Errors
/// [`LayersError`].
pub fn open_lower_state(state_dir: &AbsolutePath) -> Result<OwnedFd, LayersError> {
    let walk = Walk::new("lower-store");
    let (parent, name) = walk.to_parent(state_dir)?;
    walk.step(&parent, name, state_dir.as_str())
}

/// Walks to the lower store's directory. It may belong to anybody, and others may be able to write to it; what is in it is as
/// trustworthy as they are. But which directory it is, is for root to say.
fn open_lower(lower: &AbsolutePath) -> Result<OwnedFd, LayersError> {
    Walk::new("lower-store").to_existing(lower).map_err(|error| match error {
        LayersError::Sys { errno: Errno::NOENT, .. } => LayersError::LowerMissing(lower.clone()),
        error => error,
    })
}

/// Makes and checks upper layer and work dir.
fn make_upper(
    spec: &StoreSpec,
    owner: Owner,
    build_users: &BuildUsers<'_>,
    upper: &Expected<'_>,
) -> Result<Directories, LayersError> {
    let layers = &spec.layers;
    make_if_new("upper-layer", &layers.upper, owner, upper)?;
    let private = Owner { uid: Uid::from_raw(0), gid: Gid::from_raw(0), mode: Mode::from_raw_mode(0o700) };
    Walk::making("work-dir").make_owned(&layers.work, private)?;
    let directories = Directories::open(layers)?;
    check_upper(&directories, spec, owner, build_users)?;
    check_xattrs(directories.work.as_fd(), &layers.upper)?;
    refuse_strange_work(directories.work.as_fd(), &layers.work)?;
    check_file_types(&layers.upper)?;
    Ok(directories)
}

/// Makes a directory with a store's data, if it was not there before.
fn make_if_new(
    key: &'static str,
    path: &AbsolutePath,
    owner: Owner,
    expected: &Expected<'_>,
) -> Result<OwnedFd, LayersError> {
    if expected.is_known() {
        return Walk::new(key).to(path).map_err(|error| expected.missing(error));
    }
    Walk::making(key).make_owned(path, owner)
}

/// Refuses an upper layer that is somebody else's: what is in it was not put there by who the configuration says.
fn check_upper(
    directories: &Directories,
    spec: &StoreSpec,
    owner: Owner,
    build_users: &BuildUsers<'_>,
) -> Result<(), LayersError> {
    let (key, path) = ("upper-layer", spec.layers.upper.clone());
    let stat = Walk::new(key).stat(directories.upper.as_fd(), path.as_str())?;
    let (found, wanted) = (stat.stx_uid, owner.uid.as_raw());
    if found != wanted {
        return Err(LayersError::OtherOwner { key, path, found, wanted });
    }
    if owner.uid.is_root() {
        refuse_writers(spec, build_users, Gid::from_raw(stat.stx_gid), Mode::from_raw_mode(stat.stx_mode.into()))?;
    }
    Ok(())
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
        Err(errno) => {
            let doing = "set an extended attribute on the filesystem of";
            Err(LayersError::sys("upper-layer", doing, upper.as_str(), errno))
        }
    }
}

fn check_file_types(upper: &AbsolutePath) -> Result<(), LayersError> {
    let sys = |errno| LayersError::sys("upper-layer", "list the parent of", upper.as_str(), errno);
    let (parent, name) = Walk::new("upper-layer").to_parent(upper)?;
    for entry in readable(parent.as_fd()).and_then(Dir::read_from).map_err(sys)? {
        let entry = entry.map_err(sys)?;
        if entry.file_name().to_bytes() == name.as_bytes() && entry.file_type() == FileType::Unknown {
            return Err(LayersError::NoFileTypes(upper.clone()));
        }
    }
    Ok(())
}

/// Makes `<root>/nix/store` as a mount point that takes no writes, and the state dir, which is returned.
fn prepare_root(spec: &StoreSpec, owner: Owner, state_dir: &Expected<'_>) -> Result<OwnedFd, LayersError> {
    let merged = &spec.layers.merged;
    if state_dir.is_known() {
        // What it lies in is not made either.
        Walk::new("root").to(&spec.state_dir).map_err(|error| state_dir.missing(error))?;
    }
    let walk = Walk::making("root");
    walk.to(merged)?;
    let point = walk.to_unmounted(merged)?;
    walk.check_parent(point.as_fd(), merged.as_str())?;
    let sys = |doing: &'static str| {
        let at = merged.to_string();
        move |errno| LayersError::sys("root", doing, at, errno)
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
    let made = make_if_new("root", &spec.state_dir, state, state_dir)?;
    if let Ok(log) = spec.root.join("nix/var/log/nix") {
        walk.make_owned(&log, state)?;
    }
    Ok(made)
}

fn set_immutable(dir: BorrowedFd<'_>, on: bool) -> Result<(), Errno> {
    let dir = readable(dir)?;
    let flags = rustix::fs::ioctl_getflags(&dir)?;
    if flags.contains(IFlags::IMMUTABLE) == on {
        return Ok(());
    }
    rustix::fs::ioctl_setflags(&dir, if on { flags | IFlags::IMMUTABLE } else { flags - IFlags::IMMUTABLE })
}
