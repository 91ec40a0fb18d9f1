//! The directories of a store: walked to without trust, made with the right owner, checked, and locked.
//!
//! A directory that exists is never given another owner or mode.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use layered_stores_model::{
    AbsolutePath, EphemeralSize, Layers, LowerStore, NIX_STORE_DIR, Ownership, StoreName, StoreSpec,
};
use nix::unistd::{Gid, Group, Uid, User};
use rustix::{
    fs::{AtFlags, CWD, Dir, FileType, IFlags, Mode, Statx, StatxAttributes, StatxFlags, XattrFlags},
    io::Errno,
};

use super::{
    context::ContextError,
    ephemeral,
    identity::{self, ATTRIBUTE, Expected, Id, Marks},
    lock::UpperLock,
    mark,
    progress::{self, Spot},
    walk::{Owner, Walk, readable, refer_to, stat},
};

/// Why a store's directories cannot be used. Nothing was mounted.
#[derive(Debug, thiserror::Error)]
pub enum LayersError {
    /// The lower store's directory is not there.
    #[error("lower-store: {0} is not there; fill the lower store first, or mount the filesystem it is on")]
    LowerMissing(AbsolutePath),
    /// The machine's own store is not there: Nix makes it when it is first used.
    #[error(
        "lower-store: {dir} is not there, because Nix makes it when it is first used; as root, run \
         `nix --extra-experimental-features nix-command store info --store {url:?}`, and start this store"
    )]
    NixUnused {
        /// The directory.
        dir: AbsolutePath,
        /// What Nix calls the store.
        url: String,
    },
    /// Something has to be written where nothing can be.
    #[error("{key}: {at} is on a read-only filesystem; mount it for writing, or name another path")]
    ReadOnly {
        /// The configuration's key.
        key: &'static str,
        /// What was to be made or changed.
        at: String,
    },
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
    /// It cannot be found out whether an account exists.
    #[error(
        "{key} = {name:?}: the name service cannot say who that is: {source}; see to what /etc/nsswitch.conf names, or give \
         the number"
    )]
    NameService {
        /// The configuration's key.
        key: &'static str,
        /// The name that was looked for.
        name: String,
        /// Its answer.
        source: std::io::Error,
    },
    /// A directory with a store's data is not there.
    #[error(
        "{key}: {path} is not there, and has what is in store {store}; mount the filesystem it is on, and the store comes up \
         by itself. If it was deleted on purpose, `layered-stores remove-data {store}` has the store begin anew"
    )]
    Missing {
        /// The configuration's key.
        key: &'static str,
        /// The directory.
        path: AbsolutePath,
        /// The store's name.
        store: String,
    },
    /// A directory is not the one with a store's data.
    #[error(
        "{key}: {path} is another directory than the one that has what is in store {store}: it has {}, and should have \
         the mark {wanted}; mount the filesystem that is missing there, and the store comes up by itself.{} To throw away what \
         is there and begin anew, run `layered-stores remove-data {store}`",
        .found.as_ref().map_or_else(|| "no mark".to_owned(), |id| format!("the mark {id}")),
        copy(found.is_none(), wanted, path)
    )]
    Another {
        /// The configuration's key.
        key: &'static str,
        /// The directory.
        path: AbsolutePath,
        /// The store's name.
        store: String,
        /// The mark it has.
        found: Option<Id>,
        /// The mark that the records have.
        wanted: Id,
    },
    /// A directory is that of another store.
    #[error(
        "{key}: {path} has what is in store {other}, and not what is in store {store}; mount the filesystem that belongs \
         there, and the store comes up by itself, or name another path"
    )]
    OfOther {
        /// The configuration's key.
        key: &'static str,
        /// The directory.
        path: AbsolutePath,
        /// The store's name.
        store: String,
        /// That of the store that the records know it by.
        other: StoreName,
    },
    /// The database belongs to another upper layer.
    #[error(
        "upper-layer: {path} is not the directory that the database in {state_dir} belongs to, and which has the mark {wanted}; \
         name the path of that, mount the filesystem it is on, or move it here (mv(1) and `cp -a` keep the mark).{} With another \
         `root`, the store begins anew beside it; to throw the database away, and what is in {path}, run `layered-stores \
         remove-data {store}`",
        copy(*unmarked, wanted, path)
    )]
    OtherUpper {
        /// The upper layer.
        path: AbsolutePath,
        /// The directory with the database.
        state_dir: AbsolutePath,
        /// The mark of the upper layer it belongs to.
        wanted: Id,
        /// Whether there is an upper layer that has no mark.
        unmarked: bool,
        /// The store's name.
        store: String,
    },
    /// An upper layer was used, and the database that knows what is in it is not there.
    #[error(
        "upper-layer: {path} has what is in a store, and {state_dir} does not have the database that knows of it; mount the \
         filesystem it is on, or, if the store had another root, `mkdir --parents` {state_dir} and move what is in that of the \
         other root there. If it is gone for good, `layered-stores remove-data {store}` has the store begin anew"
    )]
    NoDatabase {
        /// The upper layer.
        path: AbsolutePath,
        /// Where the database should be.
        state_dir: AbsolutePath,
        /// The store's name.
        store: String,
    },
    /// What is mounted has another upper layer than the one that its path leads to.
    #[error(
        "upper-layer: {upper} is another directory now than the one that is mounted at {merged}, whose filesystem was \
         unmounted or covered; mount it again, or take away what covers it, and the store is well by itself"
    )]
    Elsewhere {
        /// Where the upper layer should be.
        upper: AbsolutePath,
        /// The merged directory.
        merged: AbsolutePath,
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
        "{key}: {at} can be changed by others than root, who could put something else in its place; give it to root and \
         take the right to write from all others (now uid {uid}, mode {mode:04o}), or name another path"
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
    /// A directory would lie where others can make files, and could have made it beforehand.
    #[error(
        "{key}: {at} would lie in {directory}, where others than root can make files (mode {mode:04o}) and could have \
         made it beforehand; make a directory of root's there and go below it, or name another path"
    )]
    SharedParent {
        /// The configuration's key.
        key: &'static str,
        /// What is to be made or used.
        at: String,
        /// The directory it lies in.
        directory: String,
        /// That directory's mode.
        mode: u32,
    },
    /// A directory that only root may have belongs to somebody else, or others can write to it.
    #[error(
        "{key}: {path} has to belong to root and be writable for nobody else (now uid {uid}, mode {mode:04o}), and what \
         is in it may be somebody else's; move it away, and it is made anew"
    )]
    NotRoots {
        /// The configuration's key.
        key: &'static str,
        /// The directory.
        path: AbsolutePath,
        /// Its owner.
        uid: u32,
        /// Its mode.
        mode: u32,
    },
    /// What is in the place of a directory that is being made is not empty, or no directory.
    #[error("{key}: {at}, the name under which {path} is made, cannot be used: {errno}; move it away")]
    InTheWay {
        /// The configuration's key.
        key: &'static str,
        /// What is in the way.
        at: String,
        /// The directory that is to be made.
        path: AbsolutePath,
        /// Why it cannot be taken away.
        errno: Errno,
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
    /// What is in the store was being removed, and not all of it is gone.
    #[error(
        "upper-layer: what is in {path} was being removed, and that did not come to its end; run `layered-stores remove-data \
         {store}` again"
    )]
    HalfRemoved {
        /// The upper layer.
        path: AbsolutePath,
        /// The store's name.
        store: String,
    },
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
    #[error("{key}: cannot {doing} {at}: {errno}")]
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

/// What to do about a directory that should have a mark, and may have lost it.
fn copy(unmarked: bool, wanted: &Id, path: &AbsolutePath) -> String {
    if unmarked {
        format!(
            " If it is a copy without extended attributes, run `setfattr --name={ATTRIBUTE} --value={wanted} {path}`."
        )
    } else {
        String::new()
    }
}

impl LayersError {
    /// That a system call failed.
    pub(super) fn sys(key: &'static str, doing: &'static str, at: impl Into<String>, errno: Errno) -> Self {
        match errno {
            Errno::ROFS => Self::ReadOnly { key, at: at.into() },
            errno => Self::Sys { key, doing, at: at.into(), errno },
        }
    }
}

/// Makes and checks all directories of a store that is not mounted, and takes its lock.
///
/// Running it again after it was interrupted at any point is safe. What the store had before, as the `records` say, is not made
/// anew; see [`identity`].
///
/// # Errors
/// [`LayersError`]; directories made so far stay.
pub fn prepare(spec: &StoreSpec, records: &[Marks]) -> Result<(UpperLock, Marks), LayersError> {
    let owner = resolve_owner(&spec.ownership)?;
    open_lower(&spec.layers.lower).map_err(|error| match (error, &spec.lower_store) {
        (LayersError::LowerMissing(dir), LowerStore::Nix { url, .. }) if dir.as_str() == NIX_STORE_DIR => {
            LayersError::NixUnused { dir, url: url.clone() }
        }
        (error, _) => error,
    })?;
    match &spec.ephemeral {
        Some(wanted) => ephemeral::ensure(wanted)?,
        None => {
            if let Some(directory) = ephemeral::left_over(&spec.layers.upper)? {
                return Err(LayersError::StillEphemeral { upper: spec.layers.upper.clone(), directory });
            }
        }
    }
    let (upper, state) = identity::expected(spec, records);
    let directories = make_upper(spec, owner, &upper)?;
    let lock = UpperLock::take(&spec.layers.upper)?;
    mark::refuse_half_removed(spec)?;
    let state_dir = prepare_root(spec, owner, &state)?;
    // What is mounted may have changed since nothing was there to compare.
    identity::check_pair(spec, Some(directories.upper.as_fd()), Some(state_dir.as_fd()))?;
    let upper = upper.mark(directories.upper.as_fd())?;
    identity::pair(spec, &upper, state_dir.as_fd())?;
    Ok((lock, Marks { upper: Some(upper), state: Some(state.mark(state_dir.as_fd())?) }))
}

/// Checks the way to all directories of a store whose mount is in place already, and that it is made of them. Returns by what they
/// are known again. Whom the upper layer belongs to is another matter: see [`owner`](super::owner).
///
/// # Errors
/// [`LayersError`].
pub fn look_over(spec: &StoreSpec, records: &[Marks]) -> Result<Marks, LayersError> {
    let (upper, merged) = (&spec.layers.upper, &spec.layers.merged);
    let (expected, state) = identity::expected(spec, records);
    let mounted = Walk::new("root").to(merged)?;
    let directories = Directories::open(&spec.layers).map_err(|error| expected.missing(error))?;
    // The overlay shows the attributes of the upper layer that it was made with.
    let mark = expected.mark_through(directories.upper.as_fd(), mounted.as_fd())?;
    let id = Id::of(&mounted).map_err(|errno| LayersError::sys("root", "look at", merged.as_str(), errno))?;
    let is_it = || identity::are_one(&mounted, &directories.upper);
    if id != mark.id || !is_it().map_err(|errno| LayersError::sys("root", "look at", merged.as_str(), errno))? {
        return Err(LayersError::Elsewhere { upper: upper.clone(), merged: merged.clone() });
    }
    let state = match Walk::new("root").to(&spec.state_dir) {
        Err(LayersError::Sys { errno: Errno::NOENT, .. }) if !state.is_known() => None,
        dir => {
            let dir = dir.map_err(|error| state.missing(error))?;
            state.check(dir.as_fd())?;
            identity::check_pair(spec, Some(directories.upper.as_fd()), Some(dir.as_fd()))?;
            identity::pair(spec, &mark, dir.as_fd())?;
            Some(state.mark(dir.as_fd())?)
        }
    };
    Ok(Marks { upper: Some(mark), state })
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

/// Walks to the lower store's directory. It may belong to anybody, and others may be able to write to it; what is in it is as
/// trustworthy as they are. But which directory it is, is for root to say.
fn open_lower(lower: &AbsolutePath) -> Result<OwnedFd, LayersError> {
    Walk::new("lower-store").to_existing(lower).map_err(|error| match error {
        LayersError::Sys { errno: Errno::NOENT, .. } => LayersError::LowerMissing(lower.clone()),
        error => error,
    })
}

fn resolve_owner(ownership: &Ownership) -> Result<Owner, LayersError> {
    // The name service may ask somebody over the network.
    progress::at(Spot::Accounts);
    let (uid, own_gid) = resolve_user(ownership)?;
    let (gid, default_mode) = match &ownership.group {
        Some(name) => {
            let by_number = |id| Group::from_gid(Gid::from_raw(id));
            let group = account("group", "group", name, Group::from_name(name), by_number)?;
            (group.gid, 0o1775)
        }
        // What Nix itself gives its store directory when it runs as root with build users (`LocalStore`).
        None if uid.is_root() => match found("group", "nixbld", Group::from_name("nixbld"))? {
            Some(group) => (group.gid, 0o1775),
            None => (own_gid, 0o755),
        },
        None => (own_gid, 0o755),
    };
    Ok(Owner { uid, gid, mode: Mode::from_raw_mode(ownership.mode.unwrap_or(default_mode)) })
}

fn resolve_user(ownership: &Ownership) -> Result<(Uid, Gid), LayersError> {
    let Some(name) = &ownership.owner else { return Ok((Uid::from_raw(0), Gid::from_raw(0))) };
    let by_number = |id| User::from_uid(Uid::from_raw(id));
    let user = account("owner", "user", name, User::from_name(name), by_number)?;
    Ok((user.uid, user.gid))
}

/// The account of a name; failing that, of the number that it is.
fn account<T>(
    key: &'static str,
    kind: &'static str,
    name: &str,
    by_name: nix::Result<Option<T>>,
    by_number: impl FnOnce(u32) -> nix::Result<Option<T>>,
) -> Result<T, LayersError> {
    if let Some(account) = found(key, name, by_name)? {
        return Ok(account);
    }
    let by_number = name.parse().map_or(Ok(None), by_number);
    found(key, name, by_number)?.ok_or_else(|| LayersError::NoSuchAccount { key, name: name.to_owned(), kind })
}

/// What the name service says. That it cannot say is something else than that there is nobody.
fn found<T>(key: &'static str, name: &str, answer: nix::Result<Option<T>>) -> Result<Option<T>, LayersError> {
    use nix::errno::Errno;
    match answer {
        // What getpwnam(3) lists for "the given name was not found".
        Err(Errno::ENOENT | Errno::ESRCH | Errno::EBADF | Errno::EPERM) => Ok(None),
        Err(errno) => Err(LayersError::NameService { key, name: name.to_owned(), source: errno.into() }),
        Ok(account) => Ok(account),
    }
}

/// Makes and checks upper layer and work dir.
fn make_upper(spec: &StoreSpec, owner: Owner, upper: &Expected<'_>) -> Result<Directories, LayersError> {
    let layers = &spec.layers;
    make_if_new("upper-layer", &layers.upper, owner, upper)?;
    let private = Owner { uid: Uid::from_raw(0), gid: Gid::from_raw(0), mode: Mode::from_raw_mode(0o700) };
    Walk::making("work-dir").make_owned(&layers.work, private)?;
    let directories = Directories::open(layers)?;
    check_upper(&directories, layers, owner)?;
    check_xattrs(directories.work.as_fd(), &layers.upper)?;
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
fn check_upper(directories: &Directories, layers: &Layers, owner: Owner) -> Result<(), LayersError> {
    let (key, path) = ("upper-layer", layers.upper.clone());
    let found = Walk::new(key).stat(directories.upper.as_fd(), path.as_str())?.stx_uid;
    let wanted = owner.uid.as_raw();
    if found == wanted { Ok(()) } else { Err(LayersError::OtherOwner { key, path, found, wanted }) }
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

#[cfg(test)]
mod tests {
    use nix::errno::Errno;

    use super::*;

    #[test]
    fn that_the_name_service_cannot_say_is_not_that_there_is_nobody() {
        let look_up = |by_name, by_number| account("owner", "user", "7", by_name, |_| by_number);
        assert!(matches!(look_up(Ok(Some(1)), Err(Errno::EIO)), Ok(1)), "found by name");
        assert!(matches!(look_up(Ok(None), Ok(Some(2))), Ok(2)), "found by number");
        for nobody in [Ok(None), Err(Errno::ENOENT), Err(Errno::ESRCH)] {
            let error = look_up(nobody, Ok(None::<u32>)).expect_err("nobody").to_string();
            assert!(error.contains("no such user"), "{error}");
        }
        for (by_name, by_number) in [(Err(Errno::ETIMEDOUT), Ok(Some(2))), (Ok(None), Err(Errno::EIO))] {
            let error = look_up(by_name, by_number).expect_err("unknown").to_string();
            assert!(error.contains("cannot say who that is"), "{error}");
        }
    }
}
