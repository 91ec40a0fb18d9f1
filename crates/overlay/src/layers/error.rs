//! Why a store's directories cannot be used, in words for people.

use layered_stores_model::{AbsolutePath, EphemeralSize, StoreName};
use nix::unistd::{Gid, Group};
use rustix::io::Errno;

use crate::{
    context::ContextError,
    identity::{ATTRIBUTE, Id, UPPER_ATTRIBUTE},
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
         the mark {wanted}; mount the filesystem that is missing there, or unmount what covers it, and the store comes up by \
         itself.{} {}",
        .found.as_ref().map_or_else(|| "no mark".to_owned(), |id| format!("the mark {id}")),
        copy(found.is_none() && *holds_something, wanted, path),
        anew(*holds_something, path, store)
    )]
    Another {
        /// The configuration's key.
        key: &'static str,
        /// The directory.
        path: AbsolutePath,
        /// The store's name.
        store: String,
        /// Whether there is something in it.
        holds_something: bool,
        /// The mark it has.
        found: Option<Id>,
        /// The mark that the records have.
        wanted: Id,
    },
    /// A directory is that of another store.
    #[error(
        "{key}: {path} has what is in store {other}, and not what is in store {store}; mount the filesystem that belongs \
         there, and the store comes up by itself, or name another path. If it was moved here on purpose, take {other} out of \
         the configuration, or bring it up with other directories, and start {store} again"
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
         name the path of that, mount the filesystem it is on, or unmount what covers it, or move it here (`mv -T OLD NEW` and \
         `cp -a` keep the mark).{} With another `root`, the store begins anew beside it; to throw the database away, and what is \
         in its upper layer, name the path of that and run `layered-stores remove-data {store}`",
        copy(*is_copy, wanted, path)
    )]
    OtherUpper {
        /// The upper layer.
        path: AbsolutePath,
        /// The directory with the database.
        state_dir: AbsolutePath,
        /// The mark of the upper layer it belongs to.
        wanted: Id,
        /// Whether there is an upper layer with something in it that has no mark.
        is_copy: bool,
        /// The store's name.
        store: String,
    },
    /// The database may belong to any upper layer.
    #[error(
        "upper-layer: {path} has what is in a store, and the database in {state_dir}, where store {store} would have its \
         own, does not tell that it belongs to it; mount the filesystem that the right one is on, or unmount what covers it, or name the root it is in. If the two belong \
         together, which only you can tell, run `setfattr --name={UPPER_ATTRIBUTE} --value={found} {state_dir}`: with another \
         database, the next garbage collection deletes all that is in {path}"
    )]
    Unpaired {
        /// The upper layer.
        path: AbsolutePath,
        /// The directory with the database.
        state_dir: AbsolutePath,
        /// The mark of the upper layer.
        found: Id,
        /// The store's name.
        store: String,
    },
    /// Where a database would be is a link.
    #[error(
        "root: in {0}, `db` or what is in it is a symbolic link, behind which nobody can tell whether the database is there; \
         move the directory here, or mount what it is on here (`mount --bind`)"
    )]
    LinkedDatabase(AbsolutePath),
    /// An upper layer was used, and the database that knows what is in it is not there.
    #[error(
        "upper-layer: {path} has what is in a store, and {state_dir} does not have the database that knows of it; mount the \
         filesystem it is on, or unmount what covers it, or, if the store had another root, have the `nix/var/nix` of that moved \
         here, with its owner: make what {state_dir} lies in, and run `mv -T OLD {state_dir}`. If it is gone for good, {}",
        if *is_known {
            format!("`layered-stores remove-data {store}` has the store begin anew")
        } else {
            format!("store {store} begins anew when what is in {path} was moved away")
        }
    )]
    NoDatabase {
        /// The upper layer.
        path: AbsolutePath,
        /// Where the database should be.
        state_dir: AbsolutePath,
        /// The store's name.
        store: String,
        /// Whether the upper layer is on record for the store.
        is_known: bool,
    },
    /// An upper layer was never a store's, and has something in it.
    #[error(
        "upper-layer: {path} is not empty (it holds {example:?}), and there is no database in {state_dir} that knows of it; \
         name another path, or move away what is in it. If it is a store's, name the root that has its database"
    )]
    UpperNotEmpty {
        /// The upper layer.
        path: AbsolutePath,
        /// One of its entries.
        example: String,
        /// Where a database would be.
        state_dir: AbsolutePath,
    },
    /// A work dir has something in it that would be deleted.
    #[error(
        "work-dir: {path} is not empty (it holds {example:?}), and OverlayFS deletes what is in its work dir; move it away, or \
         name another path"
    )]
    WorkNotEmpty {
        /// The work dir.
        path: AbsolutePath,
        /// Something in it.
        example: String,
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
    /// Others can write to an upper layer of root's, or could.
    #[error(
        "upper-layer: {path}, with group {group} and mode {mode:04o}, is for others than root to write to, and root's Nix \
         follows the links that they put there; run `chmod go-w {path}`, take away what in it is not root's, and leave `mode` \
         away, or give the store an `owner`. Nix's build users may write there: if it was given to others than them, `chgrp` gives it \
         back, and if these are they, name their group in /etc/nix/nix.conf (`build-users-group`)",
        group = group_name(*gid)
    )]
    UpperForOthers {
        /// The upper layer.
        path: AbsolutePath,
        /// Its group.
        gid: u32,
        /// Its mode.
        mode: u32,
    },
    /// Root's Nix would work in a lower store that others can change.
    #[error(
        "lower-store: root's Nix works in {dir}, with `read-only=true` as well, and follows the links there; {at} can be changed \
         by others than root (now uid {uid}, mode {mode:04o}): give it to root alone, mount the lower store for reading only, \
         or give this store an `owner`"
    )]
    LowerForOthers {
        /// The directory of its objects, or its state directory.
        dir: AbsolutePath,
        /// It, or the one above it that others can change.
        at: String,
        /// Its owner.
        uid: u32,
        /// Its mode.
        mode: u32,
    },
    /// Root's Nix would work in a state directory that others can change.
    #[error(
        "root: root's Nix works in {dir} and follows the links there; {at} can be changed by others than root (now uid {uid}, \
         mode {mode:04o}): give it to root alone, or give the store an `owner`"
    )]
    StateForOthers {
        /// The state directory.
        dir: AbsolutePath,
        /// It, or what is in it.
        at: String,
        /// Its owner.
        uid: u32,
        /// Its mode.
        mode: u32,
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
         stop the store and move it away, or take ephemeral-size away"
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
         stop the store, then run `umount {directory}`"
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
    /// Not even root may do it.
    #[error(
        "{key}: cannot {doing} {at}: it, or the directory it is in, is immutable or append-only (lsattr(1)), which is root's \
         doing, as for a mount point whose filesystem is missing; mount that, or take the attribute away with `chattr -ia`"
    )]
    Immutable {
        /// The configuration's key.
        key: &'static str,
        /// What was being done.
        doing: &'static str,
        /// To what.
        at: String,
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

/// The name of a group, or the number where there is none.
fn group_name(gid: u32) -> String {
    Group::from_gid(Gid::from_raw(gid)).ok().flatten().map_or_else(|| gid.to_string(), |group| group.name)
}

/// How a store begins anew whose directory has another in its place.
fn anew(holds_something: bool, path: &AbsolutePath, store: &str) -> String {
    let first = if holds_something { format!("move away what is in {path}, and ") } else { String::new() };
    format!(
        "To begin anew without what was in the store, its database included, {first}run `layered-stores remove-data {store}`"
    )
}

impl LayersError {
    /// That a system call failed.
    pub(crate) fn sys(key: &'static str, doing: &'static str, at: impl Into<String>, errno: Errno) -> Self {
        match errno {
            Errno::ROFS => Self::ReadOnly { key, at: at.into() },
            Errno::PERM => Self::Immutable { key, doing, at: at.into() },
            errno => Self::Sys { key, doing, at: at.into(), errno },
        }
    }
}
