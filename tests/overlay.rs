//! Real overlays on the real kernel, in a mount namespace of their own. These tests need root.

use std::{
    fs,
    os::{fd::AsFd, unix::fs::PermissionsExt as _},
    path::PathBuf,
};

use layered_stores::{
    config::{self, Defaults},
    overlay::{
        context::FsContext,
        host,
        layers::{LayersError, prepare, release_mount_point},
        mountinfo::{MountState, MountTable},
        options::superblock_options,
        probe,
        refresh::{Changes, Outcome, RefreshError, Rung, reconfigure, refresh},
    },
    store::StoreSpec,
};
use rustix::{
    fs::CWD,
    mount::{MountAttrFlags, MountPropagationFlags, MoveMountFlags},
};

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
        let defaults =
            Defaults { state_dir: at("state").parse().expect("valid"), remount_hook: "/hook".parse().expect("valid") };
        let config = config::parse(&text, &defaults).expect("a configuration");
        Self { spec: config.stores.into_iter().next().expect("a store"), root }
    }

    /// Mounts it where no one else sees it. nextest runs each test in a process of its own.
    fn mounted() -> Self {
        host::private_mount_namespace(false).expect("root");
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        rustix::mount::mount_change("/", private).expect("a private namespace");
        let store = Self::new();
        prepare(&store.spec).expect("directories");
        let context = FsContext::open("overlay").expect("overlayfs");
        context.set("source", "overlay").expect("a source");
        for (key, value) in superblock_options(&store.spec.layers) {
            context.set(key, value).expect(key);
        }
        let mount = context.mount(MountAttrFlags::empty()).expect("a mount");
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        rustix::mount::move_mount(mount.as_fd(), "", CWD, store.spec.layers.merged.as_str(), flags).expect("attached");
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

    fn state(&self) -> MountState {
        let merged = self.spec.layers.merged.as_str();
        MountTable::read(|point| point == merged).expect("a mount table").state(&self.spec.layers)
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // The namespace takes the mount with it; the attribute would keep the directory from being removed.
        let _ = rustix::mount::unmount(self.spec.layers.merged.as_str(), rustix::mount::UnmountFlags::DETACH);
        let _ = release_mount_point(&self.spec.layers.merged);
    }
}

fn changed() -> Changes {
    Changes { names: [PATH.to_owned()].into(), unknown: false }
}

#[test]
fn a_path_that_was_deleted_in_the_upper_layer_shows_the_lower_one_after_a_reconfigure() {
    let store = Store::mounted();
    store.shadow();
    assert_eq!(store.read(), "upper");
    fs::remove_dir_all(store.upper()).expect("removed");
    assert_eq!(store.stale(), 1, "the kernel keeps the old entry until it is told");
    let report = refresh(&store.spec.layers, &changed(), Rung::Probe).expect("refreshed");
    assert_eq!((report.outcome, report.still_stale.len()), (Outcome::Reconfigured, 0));
    assert_eq!(store.read(), "lower");
}

#[test]
fn a_pinned_file_does_not_keep_a_deleted_path_alive() {
    let store = Store::mounted();
    store.shadow();
    let pinned = fs::File::open(store.merged().join("file")).expect("open");
    fs::remove_dir_all(store.upper()).expect("removed");
    reconfigure(store.spec.layers.merged.as_str()).expect("reconfigured");
    assert_eq!(store.stale(), 1, "a reconfigure alone does not help");
    let report = refresh(&store.spec.layers, &changed(), Rung::Probe).expect("refreshed");
    assert_eq!((report.outcome, report.still_stale.len()), (Outcome::Swapped, 0));
    assert_eq!(store.read(), "lower");
    assert_eq!(std::io::read_to_string(pinned).expect("still readable"), "upper");
    assert_eq!(store.state(), MountState::Mounted { read_only: false, twice: false, unpinned: None });
    report.old.expect("an old mount").retire();
    fs::write(store.spec.layers.merged.as_path().join("tmp"), "").expect("the new superblock takes writes");
}

#[test]
fn what_the_lower_store_gains_and_loses_is_seen_after_a_refresh() {
    let store = Store::mounted();
    assert!(!store.merged().exists(), "looked up and remembered as missing");
    fs::write(store.lower(), "").expect("written");
    assert_eq!(store.stale(), 1);
    refresh(&store.spec.layers, &changed(), Rung::Probe).expect("refreshed");
    assert!(store.merged().exists());
    fs::remove_file(store.lower()).expect("removed");
    assert_eq!(store.stale(), 1);
    refresh(&store.spec.layers, &changed(), Rung::Probe).expect("refreshed");
    assert!(!store.merged().exists());
}

#[test]
fn changes_nobody_saw_are_found_by_looking_at_every_path() {
    let store = Store::mounted();
    store.shadow();
    assert_eq!(store.read(), "upper");
    fs::remove_dir_all(store.upper()).expect("removed");
    let report = refresh(&store.spec.layers, &Changes::unknown(), Rung::Probe).expect("refreshed");
    assert_eq!((report.outcome, report.probed), (Outcome::Reconfigured, 1));
}

#[test]
fn a_view_that_is_right_is_left_alone() {
    let store = Store::mounted();
    store.shadow();
    let report = refresh(&store.spec.layers, &changed(), Rung::Probe).expect("refreshed");
    assert_eq!(report.outcome, Outcome::Current);
}

#[test]
fn only_overlays_are_reconfigured() {
    assert!(matches!(reconfigure("/proc"), Err(RefreshError::NotAnOverlay(_))));
    assert!(matches!(reconfigure("/nowhere"), Err(RefreshError::NotAnOverlay(_))));
}

#[test]
fn preparing_again_changes_nothing_and_the_bare_mount_point_takes_no_writes() {
    let store = Store::new();
    drop(prepare(&store.spec).expect("prepared"));
    drop(prepare(&store.spec).expect("prepared again"));
    let bare = store.spec.layers.merged.as_path();
    assert!(fs::write(bare.join("x"), "").is_err(), "not even root writes into the bare mount point");
    release_mount_point(&store.spec.layers.merged).expect("released");
    fs::write(bare.join("x"), "").expect("released, it is a directory like any other");
    assert!(matches!(prepare(&store.spec), Err(LayersError::MountPointNotEmpty { .. })));
}

#[test]
fn an_upper_layer_is_used_once() {
    let store = Store::new();
    let _lock = prepare(&store.spec).expect("prepared");
    assert!(matches!(prepare(&store.spec), Err(LayersError::Locked(_))));
}

#[test]
fn a_path_that_others_could_redirect_is_not_walked() {
    let store = Store::new();
    let state = store.root.path().join("state");
    let elsewhere = store.root.path().join("elsewhere");
    fs::create_dir_all(elsewhere.join("stores")).expect("made");
    std::os::unix::fs::symlink(&elsewhere, &state).expect("linked");
    assert!(matches!(prepare(&store.spec), Err(LayersError::Symlink { .. })));
    fs::remove_file(&state).expect("removed");
    fs::create_dir(&state).expect("made");
    fs::set_permissions(&state, fs::Permissions::from_mode(0o777)).expect("chmod");
    assert!(matches!(prepare(&store.spec), Err(LayersError::UnsafeParent { .. })));
}
