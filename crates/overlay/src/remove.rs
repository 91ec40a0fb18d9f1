//! Taking away what is in a store.
//!
//! It can end anywhere: the daemon is killed, the power goes. What is left must never come up as a store whose database says
//! that paths are there which are not, nor with half of a path in the upper layer over the same path of the lower store. So:
//!
//! * A store that has a directory of its own below the state directory, because it is ephemeral or not declared any more, loses
//!   it by one rename, to a name that no store can have. A filesystem in memory goes by one unmount before that.
//! * A declared store keeps its upper layer and work dir, whose owner and mode somebody may have chosen. Before anything is
//!   taken out of them there is a mark beside the upper layer, with which the store does not come up. Then goes the state dir
//!   with the database, by one rename, then the rest; then the record tells of the empty directories, and the mark goes. Where
//!   there is no room for the mark, it is made after the database is gone; a store that misses that does not come up either.
//!
//! What is none of the store's is not touched: see [`mod@claim`]. In both cases the next run finds what the one before has left,
//! and finishes it.
//!
//! An owner changes things meanwhile, if they like. Nothing is named by more than one component, below a directory that is
//! open; no link is followed and no mount is crossed. What they move in here is taken away with the rest.

mod claim;
mod tree;

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    path::Path,
};

use layered_stores_model::{AbsolutePath, StoreName, StoreSpec, printable};
use rustix::{
    fs::{Dir, RenameFlags},
    io::Errno,
};

use super::{
    ephemeral,
    holders::holders,
    identity::{self, Id, Known, Mark, Marks},
    layers::{self, LayersError},
    lock::UpperLock,
    mark::{self, Removing},
    mountinfo::MountTable,
    place::Place,
    progress::{self, Spot},
    walk::{Walk, readable},
};

use self::tree::{empty, remove_tree};

const KEY: &str = "data";

/// What is left of a store that is not declared any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftOver {
    /// The name it had.
    pub name: StoreName,
    /// Where it is.
    pub directory: AbsolutePath,
    /// Whether it takes memory: it was ephemeral.
    pub in_memory: bool,
}

/// Why not all was taken away.
#[derive(Debug, thiserror::Error)]
pub enum RemoveError {
    /// A directory could not be walked to, or is locked.
    #[error(transparent)]
    Layers(#[from] LayersError),
    /// There is nothing.
    #[error("{0} is not there")]
    Nothing(AbsolutePath),
    /// Something is mounted there.
    #[error("{what} is mounted at {at}, and nothing that is mounted is looked into; unmount it with `umount {at}`")]
    Mounted {
        /// What it is.
        what: String,
        /// Where.
        at: String,
    },
    /// A mounted overlay has a directory of it as a layer.
    #[error("the overlay that is mounted at {0} uses it; unmount that with `umount {0}`")]
    Layer(String),
    /// The filesystem in memory is in use.
    #[error("{directory} is used by {}; end that first", .holders.join(", "))]
    InUse {
        /// Where it is mounted.
        directory: AbsolutePath,
        /// Some of those who use it.
        holders: Vec<String>,
    },
    /// Somebody makes files faster than they are removed.
    #[error("{0} does not get empty: somebody goes on making files in it; end their processes")]
    NotEmpty(String),
    /// The kernel lets nobody remove it, root included.
    #[error(
        "{0} cannot be removed: it, or the directory it is in, is immutable or append-only (lsattr(1)), which is root's doing; \
         take that from it with `chattr -ia`"
    )]
    Immutable(String),
    /// A directory was never this store's.
    #[error(
        "{path} has never been the upper layer of this store, and is not empty; if nothing in it is needed, take that away by \
         hand. If it is the store's, run `layered-stores start {store}` first"
    )]
    Strange {
        /// The upper layer.
        path: AbsolutePath,
        /// The store's name.
        store: String,
    },
    /// A database was never this store's.
    #[error(
        "the database in {state_dir} has never been that of this store; if it is not needed, take it away by hand, or name \
         another root. If it is the store's, run `layered-stores start {store}` first"
    )]
    StrangeDatabase {
        /// The state dir.
        state_dir: AbsolutePath,
        /// The store's name.
        store: String,
    },
    /// A database is that of another upper layer.
    #[error(
        "the database in {state_dir} belongs to another upper layer than {upper}, and nothing is removed; name the upper layer \
         that it belongs to, or another root"
    )]
    OtherPair {
        /// The state dir.
        state_dir: AbsolutePath,
        /// The upper layer.
        upper: AbsolutePath,
    },
    /// The records cannot be changed.
    #[error("cannot keep by what its directories are known again: {0}")]
    Record(io::Error),
    /// The mount table could not be read.
    #[error("cannot read the mount table: {0}")]
    MountTable(io::Error),
    /// A system call failed.
    #[error("{doing} {at}: {errno}")]
    Sys {
        /// What was being done.
        doing: &'static str,
        /// To what.
        at: String,
        /// The kernel's answer.
        errno: Errno,
    },
}

/// What is below the directory `stores` that holds a directory for each store. Whether a store is declared is for the caller
/// to know; what an earlier removal has not come to is left of any store.
///
/// # Errors
/// [`RemoveError`].
pub fn list(stores: &AbsolutePath) -> Result<Vec<LeftOver>, RemoveError> {
    let sys = sys("list", stores.as_str());
    let entries = match Walk::new(KEY).to(stores) {
        Err(LayersError::Sys { errno: Errno::NOENT, .. }) => return Ok(Vec::new()),
        dir => readable(dir?.as_fd()).and_then(Dir::read_from).map_err(&sys)?,
    };
    let table = MountTable::read(|point| Path::new(point).parent() == Some(stores.as_path()));
    let table = table.map_err(RemoveError::MountTable)?;
    let mut all = Vec::new();
    for entry in entries {
        let entry = entry.map_err(&sys)?;
        let Ok(text) = entry.file_name().to_str() else { continue };
        let half_removed = text.strip_prefix('.').and_then(|rest| rest.strip_suffix(".removing"));
        let (Ok(name), Ok(directory)) = (half_removed.unwrap_or(text).parse(), stores.join(text)) else { continue };
        all.push(LeftOver { name, in_memory: ephemeral::is_ours(&table, &directory), directory });
    }
    all.sort_by(|a, b| a.directory.as_str().cmp(b.directory.as_str()));
    Ok(all)
}

/// Whether a directory is what a removal has not come to.
pub fn is_half_removed(left: &LeftOver) -> bool {
    left.directory.as_path().file_name().is_some_and(|name| name != left.name.as_str())
}

/// Removes the directory that a store had for itself below the state directory. `others` tells which stores have a mark on
/// record.
///
/// # Errors
/// [`RemoveError`]; [`RemoveError::Nothing`] when there was none.
pub fn directory(directory: &AbsolutePath, others: &dyn Fn(&Id) -> Vec<(StoreName, Mark)>) -> Result<(), RemoveError> {
    progress::at(Spot::Root);
    let nothing = || RemoveError::Nothing(directory.clone());
    let (parent, name) = match Walk::new(KEY).to_parent(directory) {
        Err(LayersError::Sys { errno: Errno::NOENT, .. }) => return Err(nothing()),
        parent => parent?,
    };
    while is_in_memory(directory)? {
        refuse_mounts(&[directory], Some(directory))?;
        unmount(directory)?;
    }
    refuse_mounts(&[directory], None)?;
    let removing = half_removed(name);
    let was_there = remove_tree(parent.as_fd(), &removing, directory.as_str())?;
    match Walk::new(KEY).step(&parent, name, directory.as_str()) {
        Err(LayersError::Sys { errno: Errno::NOENT, .. }) if was_there => return Ok(()),
        Err(LayersError::Sys { errno: Errno::NOENT, .. }) => return Err(nothing()),
        opened => drop(opened?),
    }
    let part = |tail| directory.join(tail).map_err(|_| sys("name what is in", directory.as_str())(Errno::NAMETOOLONG));
    for (key, part) in [("upper-layer", part("upper")?), ("root", part("root/nix/var/nix")?)] {
        refuse_others(key, &part, name, others)?;
    }
    let _lock = lock(&part("upper")?)?;
    layers::release_mount_point(&part("root/nix/store")?)?;
    set_aside(parent.as_fd(), name, &removing, directory.as_str())?;
    remove_tree(parent.as_fd(), &removing, directory.as_str())?;
    Ok(())
}

/// Removes what an earlier removal has not come to, of the directory that a store had for itself below the state directory. The
/// store may have been declared again since.
///
/// # Errors
/// [`RemoveError`].
pub fn rest(directory: &AbsolutePath) -> Result<(), RemoveError> {
    progress::at(Spot::Root);
    match existing(Walk::new(KEY).to_parent(directory))? {
        Some((parent, name)) => remove_tree(parent.as_fd(), &half_removed(name), directory.as_str()).map(drop),
        None => Ok(()),
    }
}

/// The name that a store's directory has while it is being removed.
fn half_removed(name: &str) -> String {
    format!(".{name}.removing")
}

/// Refuses a directory that a store has by another path, such as one at which its filesystem is mounted as well.
fn refuse_others(
    key: &'static str,
    path: &AbsolutePath,
    store: &str,
    others: &dyn Fn(&Id) -> Vec<(StoreName, Mark)>,
) -> Result<(), RemoveError> {
    let Some(dir) = existing(Walk::new(key).to(path))? else { return Ok(()) };
    let look = sys("look at", path.as_str());
    let Some(id) = Id::of(&dir).map_err(&look)? else { return Ok(()) };
    match identity::claim(others, &id, dir.as_fd(), None).map_err(&look)? {
        identity::Claim::Of(other) => {
            Err(LayersError::OfOther { key, path: path.clone(), store: store.to_owned(), other }.into())
        }
        _ => Ok(()),
    }
}

/// Removes all that is in a store that is not mounted, as far as it is the store's by what is `known`. The store begins anew:
/// `record` keeps by what its directories are known from now on. Returns a state dir that was left alone.
///
/// # Errors
/// [`RemoveError`]; what was begun is finished by calling this again.
pub fn contents(
    spec: &StoreSpec,
    known: Known<'_>,
    record: impl Fn(&Marks) -> io::Result<()>,
) -> Result<Option<AbsolutePath>, RemoveError> {
    if let Some(wanted) = &spec.ephemeral {
        record(&Marks::default()).map_err(RemoveError::Record)?;
        return match directory(&wanted.directory, known.others) {
            Err(RemoveError::Nothing(_)) => Ok(None),
            result => result.map(|()| None),
        };
    }
    let (upper, work) = (&spec.layers.upper, &spec.layers.work);
    let var = spec.root.join("nix/var").map_err(|_| sys("name what is in", spec.root.as_str())(Errno::NAMETOOLONG))?;
    if let Some(directory) = ephemeral::left_over(upper)? {
        refuse_mounts(&[&directory], Some(&directory))?;
        unmount(&directory)?;
    }
    refuse_mounts(&[upper, work, &var, &spec.layers.merged], None)?;
    let begun = mark::read(upper)?;
    // One that is not there cannot come up in the middle, and what it would lie in may take no files.
    let is_there = begun.is_some() || existing(Walk::new("upper-layer").to(upper))?.is_some();
    let _lock = if is_there { lock(upper)? } else { None };
    let claim = claim::claim(spec, known, begun.as_ref())?;
    let work_dir = existing(Walk::new("work-dir").to(work))?;
    if let Some(dir) = &work_dir {
        layers::refuse_strange_work(dir.as_fd(), work)?;
    }
    let is_to_be_marked = is_there && begun.is_none();
    let is_marked = is_to_be_marked && had_room(mark::mark(upper, &claim.removing))?;
    progress::at(Spot::Root);
    if let Some((parent, name)) = existing(Walk::new("root").to_parent(&var))? {
        remove_tree(parent.as_fd(), ".var.removing", var.as_str())?;
        if claim.state {
            set_aside(parent.as_fd(), name, ".var.removing", var.as_str())?;
            remove_tree(parent.as_fd(), ".var.removing", var.as_str())?;
        }
    }
    if is_to_be_marked && !is_marked {
        mark::mark(upper, &claim.removing)?;
    }
    progress::at(Spot::Upper);
    let upper_dir = claim.upper.as_ref().map(|dir| readable(dir.as_fd())).transpose();
    let upper_dir = upper_dir.map_err(sys("open", upper.as_str()))?;
    if let Some(dir) = &upper_dir {
        identity::unmark(dir).map_err(sys("take the mark from", upper.as_str()))?;
        empty(dir, upper.as_str())?;
    }
    progress::at(Spot::Work);
    if let Some(dir) = &work_dir {
        for kernels in layers::KERNELS {
            remove_tree(dir.as_fd(), kernels, work.as_str())?;
        }
        sync(dir.as_fd(), work.as_str())?;
    }
    let mut marks = Marks::default();
    if let Some(dir) = &upper_dir {
        progress::at(Spot::Upper);
        // It is the store's still, whatever somebody goes on to make in it, also if this ends before that is on record.
        let fresh = Id::new().map_err(sys("make a mark for", upper.as_str()))?;
        had_room(mark::mark(upper, &Removing { upper: Some(fresh.clone()), state: None }))?;
        let id = identity::mark_anew(dir, fresh).map_err(sys("set the mark of", upper.as_str()))?;
        marks.upper = id.map(|id| Mark { path: upper.clone(), id: Some(id) });
        sync(dir.as_fd(), upper.as_str())?;
    }
    // Not before: there is room for it now, and until now the record says what is to be finished.
    record(&marks).map_err(RemoveError::Record)?;
    if is_there {
        mark::unmark(upper)?;
    }
    Ok(claim.left)
}

/// Whether something could be written, and not only because nothing more fits.
fn had_room(written: Result<(), LayersError>) -> Result<bool, LayersError> {
    match written {
        Err(LayersError::Sys { errno: Errno::NOSPC | Errno::DQUOT, .. }) => Ok(false),
        written => written.map(|()| true),
    }
}

fn sys(doing: &'static str, at: &str) -> impl Fn(Errno) -> RemoveError {
    move |errno| RemoveError::Sys { doing, at: at.to_owned(), errno }
}

fn existing<T>(found: Result<T, LayersError>) -> Result<Option<T>, LayersError> {
    match found {
        Err(LayersError::Sys { errno: Errno::NOENT, .. }) => Ok(None),
        found => found.map(Some),
    }
}

/// The lock of an upper layer, if there is a place for one.
fn lock(upper: &AbsolutePath) -> Result<Option<UpperLock>, LayersError> {
    existing(UpperLock::take(upper))
}

fn is_in_memory(directory: &AbsolutePath) -> Result<bool, RemoveError> {
    let table = MountTable::read(|point| point == directory.as_str()).map_err(RemoveError::MountTable)?;
    Ok(ephemeral::is_ours(&table, directory))
}

/// Unmounts a filesystem in memory, which is all that keeps what is in it.
fn unmount(directory: &AbsolutePath) -> Result<(), RemoveError> {
    let place = Place::of(directory)?;
    match place.top().and_then(|id| place.unmount(id)) {
        Err(Errno::BUSY) => {
            let mut holders = holders(directory);
            if holders.is_empty() {
                holders.push("somebody".to_owned());
            }
            Err(RemoveError::InUse { directory: directory.clone(), holders })
        }
        result => result.map_err(sys("unmount", directory.as_str())),
    }
}

/// Refuses directories in which something is mounted, or that a mounted overlay has as a layer. `but` is left out.
fn refuse_mounts(directories: &[&AbsolutePath], but: Option<&AbsolutePath>) -> Result<(), RemoveError> {
    let is_within = |path: &str| directories.iter().any(|dir| Path::new(path).starts_with(dir.as_path()));
    let table = MountTable::read(|_| true).map_err(RemoveError::MountTable)?;
    for (point, mount) in table.mounts() {
        if is_within(point) && but.is_none_or(|but| but.as_str() != point) {
            return Err(RemoveError::Mounted { what: printable(&mount.describe()), at: printable(point) });
        }
        let live = &mount.live;
        let layers = [&live.upper, &live.work, &live.lower];
        if mount.fs_type == "overlay" && layers.iter().any(|layer| layer.split(':').any(is_within)) {
            return Err(RemoveError::Layer(printable(point)));
        }
    }
    Ok(())
}

/// Gives a directory that only root can rename another name, on disk when this returns. One that is not there is none.
fn set_aside(parent: BorrowedFd<'_>, name: &str, aside: &str, at: &str) -> Result<(), RemoveError> {
    match rustix::fs::renameat_with(parent, name, parent, aside, RenameFlags::NOREPLACE) {
        Ok(()) => sync(parent, at),
        Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(sys("rename", at)(errno)),
    }
}

fn sync(dir: BorrowedFd<'_>, at: &str) -> Result<(), RemoveError> {
    match readable(dir).and_then(rustix::fs::fsync) {
        // Some filesystems know no such thing for directories.
        Ok(()) | Err(Errno::INVAL) => Ok(()),
        Err(errno) => Err(sys("write to disk", at)(errno)),
    }
}
