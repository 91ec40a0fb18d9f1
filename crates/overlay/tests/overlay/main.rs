//! Real overlays on the real kernel, in a mount namespace of their own. Those that need root end at their first line for
//! everybody else.

mod directories;
mod pairs;
mod places;
mod probes;
mod refreshes;
mod removals;
mod swaps;

use std::{
    fs,
    io::ErrorKind,
    os::unix::{
        ffi::OsStrExt as _,
        fs::{PermissionsExt as _, chown, symlink},
    },
    path::{Path, PathBuf},
};

use layered_stores_model::{Layers, Ownership, StoreSpec, fixture, needs_root};
use layered_stores_overlay::{
    glance, host,
    identity::Known,
    layers::{self, LayersError, look_over, prepare, release_mount_point},
    mount::{MountError, correct_flags, mount, unmount},
    mountinfo::{Cover, MountState, MountTable},
    owner::{OwnerError, owner},
    place::{MountId, NotOurs},
    probe,
    progress::Progress,
    refresh::{Changes, Outcome, RefreshError, Report, Rung, reconfigure, refresh},
    room::{self, Room},
    swap::{OldMount, OldSuperblock, SwapError, finish},
};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};

const PATH: &str = "00000000000000000000000000000000-path";

/// A store over a lower one, in a directory that is gone at the end.
struct Store {
    spec: StoreSpec,
    root: tempfile::TempDir,
}

impl Store {
    fn new() -> Self {
        let root = tempfile::tempdir().expect("a directory");
        fs::set_permissions(root.path(), fs::Permissions::from_mode(0o755)).expect("chmod");
        let at = |tail: &str| root.path().join(tail).to_string_lossy().into_owned();
        fs::create_dir_all(at("lower/nix/store")).expect("a lower store");
        let text = format!("[stores.t]\nlower-store = {:?}\n", at("lower"));
        Self { spec: fixture::declared(&at("state"), &text).remove(0), root }
    }

    /// Mounts it where no one else sees it. nextest runs each test in a process of its own.
    fn mounted() -> Self {
        host::private_mount_namespace(false).expect("a mount namespace, which is made for root");
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        rustix::mount::mount_change("/", private).expect("a private namespace");
        let store = Self::new();
        prepare(&store.spec, Known::of(&[])).expect("directories");
        mount(&store.spec.layers, None).expect("mounted");
        store
    }

    fn lower(&self) -> PathBuf {
        self.spec.layers.lower.as_path().join(PATH)
    }

    fn upper(&self) -> PathBuf {
        self.spec.layers.upper.as_path().join(PATH)
    }

    fn merged(&self) -> PathBuf {
        self.spec.layers.merged.as_path().join(PATH)
    }

    /// Puts the path into both layers, as a build in the layered store and then one in the lower store do.
    fn shadow(&self) {
        for (path, text) in [(self.merged(), "upper"), (self.lower(), "lower")] {
            fs::create_dir(&path).expect("made");
            fs::write(path.join("file"), text).expect("written");
        }
    }

    fn read(&self) -> String {
        fs::read_to_string(self.merged().join("file")).expect("readable")
    }

    fn stale(&self) -> usize {
        probe::stale(&self.spec.layers, [PATH]).expect("probed").len()
    }

    fn refresh(&self, changes: &Changes, from: Rung) -> Result<Report, RefreshError> {
        self.refresh_to(changes, (from, Rung::Swap)).0
    }

    fn refresh_to(&self, changes: &Changes, rungs: (Rung, Rung)) -> (Result<Report, RefreshError>, Option<OldMount>) {
        refresh(&self.spec.layers, changes, rungs, None, &[], &())
    }

    /// Its mount, as the first refresh has found it.
    fn known(&self) -> Option<MountId> {
        let known = self.refresh(&Changes::default(), Rung::Reconfigure).expect("refreshed").mount;
        assert!(known.is_some());
        known
    }

    /// Has a path deleted that is in both layers and open, which only a swap helps against.
    fn pin(&self) -> fs::File {
        self.shadow();
        let pinned = fs::File::open(self.merged().join("file")).expect("open");
        fs::remove_dir_all(self.upper()).expect("removed");
        pinned
    }

    fn state(&self) -> MountState {
        let merged = self.spec.layers.merged.as_str();
        MountTable::read_on_the_way_to(merged).expect("a mount table").state(&self.spec.layers)
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // The namespace takes the mounts with it; the attribute would keep the directory from being removed.
        while rustix::mount::unmount(self.spec.layers.merged.as_str(), UnmountFlags::DETACH).is_ok() {}
        let _ = release_mount_point(&self.spec.layers.merged);
    }
}

fn changed() -> Changes {
    Changes { names: [PATH.into()].into(), ..Changes::default() }
}
