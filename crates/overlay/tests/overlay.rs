//! Real overlays on the real kernel, in a mount namespace of their own. These tests need root.

use std::{
    fs,
    io::ErrorKind,
    os::unix::{
        ffi::OsStrExt as _,
        fs::{PermissionsExt as _, chown, symlink},
    },
    path::{Path, PathBuf},
};

use layered_stores_model::{
    Layers, StoreSpec,
    config::{self, Defaults, Keys},
};
use layered_stores_overlay::{
    glance, host,
    layers::{self, LayersError, look_over, prepare, release_mount_point},
    mount::{MountError, correct_flags, mount, unmount},
    mountinfo::{Cover, MountState, MountTable},
    place::{MountId, NotOurs},
    probe,
    refresh::{Changes, Outcome, RefreshError, Report, Rung, reconfigure, refresh},
    room::{self, Room},
    swap::{OldMount, OldSuperblock, finish},
};
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
        let defaults =
            Defaults { state_dir: at("state").parse().expect("valid"), remount_hook: "/hook".parse().expect("valid") };
        let config = config::parse(&text, &defaults, Keys::Alone).expect("a configuration");
        Self { spec: config.stores.into_iter().next().expect("a store"), root }
    }

    /// Mounts it where no one else sees it. nextest runs each test in a process of its own.
    fn mounted() -> Self {
        host::private_mount_namespace(false).expect("root");
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        rustix::mount::mount_change("/", private).expect("a private namespace");
        let store = Self::new();
        prepare(&store.spec, &[]).expect("directories");
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

#[test]
fn of_a_directory_that_is_too_large_to_be_compared_the_first_file_tells() {
    let store = Store::mounted();
    store.shadow();
    for layer in [store.merged(), store.lower()] {
        for number in 0..17_000 {
            fs::write(layer.join(format!("{number}")), "").expect("written");
        }
    }
    assert_eq!(store.stale(), 0);
    let pinned = fs::File::open(store.merged().join("file")).expect("open");
    fs::remove_dir_all(store.upper()).expect("removed");
    assert_eq!(store.stale(), 1);
    let report = store.refresh(&changed(), Rung::Probe).expect("refreshed");
    assert_eq!((report.outcome, report.still_stale.len()), (Outcome::Swapped, 0));
    drop(pinned);
}

#[test]
fn a_path_that_was_deleted_in_the_upper_layer_shows_the_lower_one_after_a_reconfigure() {
    let store = Store::mounted();
    store.shadow();
    assert_eq!(store.read(), "upper");
    fs::remove_dir_all(store.upper()).expect("removed");
    assert_eq!(store.stale(), 1, "the kernel keeps the old entry until it is told");
    let report = store.refresh(&changed(), Rung::Probe).expect("refreshed");
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
    let (report, old) = store.refresh_to(&changed(), (Rung::Probe, Rung::Swap));
    let report = report.expect("refreshed");
    assert_eq!((report.outcome, report.still_stale.len()), (Outcome::Swapped, 0));
    assert_eq!(store.read(), "lower");
    assert_eq!(std::io::read_to_string(pinned).expect("still readable"), "upper");
    assert_eq!(store.state(), MountState::Mounted { read_only: false, twice: false, unpinned: None, flags: None });
    assert_eq!(old.expect("an old mount").retire().expect("retired"), OldSuperblock::Retired);
    fs::write(store.spec.layers.merged.as_path().join("tmp"), "").expect("the new superblock takes writes");
}

#[test]
fn who_has_a_path_open_for_a_moment_does_not_keep_it_in_view_where_there_is_no_swap() {
    let store = Store::mounted();
    let later = store.merged().with_file_name("11111111111111111111111111111111-later");
    assert!(!later.exists());
    fs::create_dir(store.lower().with_file_name(later.file_name().expect("a name"))).expect("made");
    assert!(!later.exists(), "it was looked for before");
    let pinned = store.pin();
    let report = std::thread::scope(|scope| {
        scope.spawn(|| {
            // It is seen after the first reconfigure, in which the path is in use.
            while !later.exists() {
                std::thread::yield_now();
            }
            drop(pinned);
        });
        store.refresh_to(&changed(), (Rung::Probe, Rung::Reconfigure)).0.expect("refreshed")
    });
    assert_eq!((report.outcome, report.still_stale), (Outcome::Reconfigured, vec![]));
    assert_eq!(store.read(), "lower");
}

#[test]
fn what_a_store_above_has_looked_at_is_forgotten_without_a_swap() {
    let store = Store::mounted();
    let at = |tail: &str| {
        let path = store.root.path().join("above").join(tail);
        fs::create_dir_all(&path).expect("made");
        path.to_str().expect("text").parse().expect("a path")
    };
    let [upper, work, merged] = ["upper", "work", "merged"].map(at);
    let options = store.spec.layers.options.clone();
    let above = Layers { lower: store.spec.layers.merged.clone(), upper, work, merged, options };
    mount(&above, None).expect("mounted");
    // As the lock of a path that Nix has added to the lower store.
    fs::write(store.lower(), "").expect("written");
    assert!(above.merged.as_path().join(PATH).exists());
    fs::remove_file(store.lower()).expect("removed");
    reconfigure(store.spec.layers.merged.as_str()).expect("reconfigured");
    assert_eq!(store.stale(), 1, "the one above refers to it");
    let report = refresh(&store.spec.layers, &changed(), (Rung::Probe, Rung::Swap), None, &[&above], &());
    let report = report.0.expect("refreshed");
    assert_eq!((report.outcome, report.still_stale.len()), (Outcome::Reconfigured, 0));
    unmount(&above).expect("unmounted");
}

#[test]
fn what_the_lower_store_gains_and_loses_is_seen_after_a_refresh() {
    let store = Store::mounted();
    assert!(!store.merged().exists(), "looked up and remembered as missing");
    fs::write(store.lower(), "").expect("written");
    assert_eq!(store.stale(), 1);
    store.refresh(&changed(), Rung::Probe).expect("refreshed");
    assert!(store.merged().exists());
    fs::remove_file(store.lower()).expect("removed");
    assert_eq!(store.stale(), 1);
    store.refresh(&changed(), Rung::Probe).expect("refreshed");
    assert!(!store.merged().exists());
}

#[test]
fn changes_nobody_saw_are_found_by_looking_at_every_path() {
    let store = Store::mounted();
    store.shadow();
    assert_eq!(store.read(), "upper");
    fs::remove_dir_all(store.upper()).expect("removed");
    let report = store.refresh(&Changes::unknown(), Rung::Probe).expect("refreshed");
    assert_eq!((report.outcome, report.probed), (Outcome::Reconfigured, 1));
}

#[test]
fn a_view_that_is_right_is_left_alone() {
    let store = Store::mounted();
    store.shadow();
    let report = store.refresh(&changed(), Rung::Probe).expect("refreshed");
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
    drop(prepare(&store.spec, &[]).expect("prepared"));
    drop(prepare(&store.spec, &[]).expect("prepared again"));
    let bare = store.spec.layers.merged.as_path();
    assert!(fs::write(bare.join("x"), "").is_err(), "not even root writes into the bare mount point");
    release_mount_point(&store.spec.layers.merged).expect("released");
    fs::write(bare.join("x"), "").expect("released, it is a directory like any other");
    assert!(matches!(prepare(&store.spec, &[]), Err(LayersError::MountPointNotEmpty { .. })));
}

#[test]
fn an_upper_layer_is_used_once() {
    let store = Store::new();
    let _lock = prepare(&store.spec, &[]).expect("prepared");
    assert!(matches!(prepare(&store.spec, &[]), Err(LayersError::Locked(_))));
}

#[test]
fn a_path_that_others_could_redirect_is_not_walked() {
    let store = Store::new();
    let state = store.root.path().join("state");
    let elsewhere = store.root.path().join("elsewhere");
    fs::create_dir_all(elsewhere.join("stores")).expect("made");
    symlink(&elsewhere, &state).expect("linked");
    assert!(matches!(prepare(&store.spec, &[]), Err(LayersError::Symlink { .. })));
    fs::remove_file(&state).expect("removed");
    fs::create_dir(&state).expect("made");
    fs::set_permissions(&state, fs::Permissions::from_mode(0o777)).expect("chmod");
    assert!(matches!(prepare(&store.spec, &[]), Err(LayersError::UnsafeParent { .. })));
}

#[test]
fn a_glance_sees_what_the_kernel_remembers_wrongly_and_leaves_no_trace() {
    let store = Store::mounted();
    let layers = &store.spec.layers;
    let names = [PATH.into()].into();
    let is_stale = || glance::is_stale(layers, &names).expect("looked");
    assert!(!is_stale(), "there is nothing");

    // Nobody has looked for it before, and the glance is no look either: both layers' paths come to be shown.
    fs::create_dir(store.lower()).expect("a path");
    assert!(!is_stale(), "nobody has looked");
    fs::create_dir(store.upper()).expect("a path");
    fs::write(store.upper().join("file"), "upper").expect("written");
    assert_eq!(fs::read_to_string(store.merged().join("file")).expect("read"), "upper");

    fs::remove_dir_all(store.upper()).expect("removed");
    fs::remove_dir(store.lower()).expect("removed");
    assert!(is_stale(), "it is gone, and was looked at");
    reconfigure(layers.merged.as_str()).expect("reconfigured");
    assert!(!is_stale(), "nothing is remembered");

    assert!(!store.merged().exists());
    fs::create_dir(store.lower()).expect("a path");
    assert!(!store.merged().exists(), "the kernel remembers that it was missing");
    assert!(is_stale(), "it came, and was looked for");
    reconfigure(layers.merged.as_str()).expect("reconfigured");
    assert!(!is_stale());
    assert!(store.merged().exists());
    assert!(!is_stale(), "it is remembered, and right");
}

/// Somebody who is not root: nobody.
const STRANGER: Option<u32> = Some(65534);

fn give(path: &Path, mode: u32, owner: Option<u32>) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("chmod");
    chown(path, owner, owner).expect("chown");
}

#[test]
fn not_even_the_owner_of_a_store_may_own_a_directory_above_it() {
    let mut store = Store::new();
    store.spec.ownership.owner = Some("nobody".to_owned());
    let state = store.root.path().join("state");
    for mode in [0o755, 0o1777] {
        fs::create_dir_all(&state).expect("made");
        give(&state, mode, STRANGER);
        assert!(matches!(prepare(&store.spec, &[]), Err(LayersError::UnsafeParent { uid: 65534, .. })), "{mode:o}");
    }
}

#[test]
fn the_way_to_the_lower_store_is_walked_as_well() {
    let store = Store::new();
    let (lower, away) = (store.root.path().join("lower"), store.root.path().join("away"));
    give(&lower.join("nix/store"), 0o1775, STRANGER);
    drop(prepare(&store.spec, &[]).expect("the directory itself may belong to anybody"));
    give(&lower.join("nix"), 0o755, STRANGER);
    assert!(matches!(prepare(&store.spec, &[]), Err(LayersError::UnsafeParent { key: "lower-store", .. })));
    give(&lower.join("nix"), 0o755, Some(0));
    for link in ["nix/store", "nix"] {
        fs::rename(lower.join(link), &away).expect("moved");
        symlink(&away, lower.join(link)).expect("linked");
        assert!(matches!(prepare(&store.spec, &[]), Err(LayersError::Symlink { key: "lower-store", .. })), "{link}");
        fs::remove_file(lower.join(link)).expect("removed");
        fs::rename(&away, lower.join(link)).expect("moved back");
    }
}

#[test]
fn where_others_can_make_files_nothing_is_made_or_taken() {
    let store = Store::new();
    let state = store.root.path().join("state");
    let stores = state.join("stores");
    fs::create_dir(&state).expect("made");
    give(&state, 0o1777, Some(0));
    assert!(matches!(prepare(&store.spec, &[]), Err(LayersError::SharedParent { .. })), "nothing is made there");
    fs::create_dir(&stores).expect("made");
    give(&stores, 0o755, STRANGER);
    assert!(matches!(prepare(&store.spec, &[]), Err(LayersError::UnsafeParent { .. })), "nothing of others' is taken");
    give(&stores, 0o755, Some(0));
    drop(prepare(&store.spec, &[]).expect("what is root's there is safe, as below /tmp"));
    fs::create_dir(state.join("lower")).expect("made");
    let mut store = store;
    store.spec.layers.lower = state.join("lower").to_str().expect("text").parse().expect("valid");
    drop(prepare(&store.spec, &[]).expect("root's"));
    give(&state.join("lower"), 0o755, STRANGER);
    assert!(matches!(prepare(&store.spec, &[]), Err(LayersError::SharedParent { key: "lower-store", .. })));
}

#[test]
fn directories_that_somebody_else_has_made_before_are_not_taken() {
    let store = Store::new();
    let (upper, work) = (store.spec.layers.upper.as_path(), store.spec.layers.work.as_path());
    fs::create_dir_all(upper).expect("made");
    give(upper, 0o755, STRANGER);
    assert!(matches!(prepare(&store.spec, &[]), Err(LayersError::OtherOwner { found: 65534, wanted: 0, .. })));
    give(upper, 0o755, Some(0));
    fs::create_dir_all(work).expect("made");
    for (mode, owner) in [(0o700, STRANGER), (0o770, Some(0)), (0o1777, Some(0))] {
        give(work, mode, owner);
        assert!(matches!(prepare(&store.spec, &[]), Err(LayersError::NotRoots { key: "work-dir", .. })), "{mode:o}");
    }
    fs::remove_dir(work).expect("removed");

    // Half-made ones.
    let half_made = work.with_file_name(".work.new");
    fs::create_dir(&half_made).expect("made");
    give(&half_made, 0o777, STRANGER);
    fs::write(half_made.join("theirs"), "").expect("written");
    assert!(matches!(prepare(&store.spec, &[]), Err(LayersError::InTheWay { .. })));
    fs::remove_file(half_made.join("theirs")).expect("removed");
    let theirs = fs::File::open(&half_made).expect("open");
    drop(prepare(&store.spec, &[]).expect("an empty one is of a daemon that was killed, and made anew"));
    let ino = |metadata: fs::Metadata| std::os::unix::fs::MetadataExt::ino(&metadata);
    assert_ne!(ino(theirs.metadata().expect("it")), ino(work.metadata().expect("it")));
    assert_eq!(work.metadata().expect("it").permissions().mode() & 0o7777, 0o700);
}

#[test]
fn a_lock_that_others_can_take_keeps_no_store_down() {
    let store = Store::new();
    drop(prepare(&store.spec, &[]).expect("prepared"));
    let lock = |path: &Path| {
        let file = fs::File::open(path).expect("open");
        file.lock().expect("locked");
        file
    };
    // Everything that somebody who is not root can open; and what would have been the lock, made before.
    let upper = store.spec.layers.upper.as_path();
    let file = upper.with_file_name(".upper.lock");
    assert_eq!(file.metadata().expect("it").permissions().mode() & 0o7777, 0o600);
    fs::remove_file(&file).expect("removed");
    fs::write(&file, "").expect("made");
    give(&file, 0o666, STRANGER);
    let _theirs = [lock(upper), lock(upper.parent().expect("a parent")), lock(&file)];
    let mine = prepare(&store.spec, &[]).expect("not kept down");
    assert!(matches!(prepare(&store.spec, &[]), Err(LayersError::Locked(_))), "but this one counts");
    assert!(matches!(layers::lock(&store.spec), Err(LayersError::Locked(_))));
    drop(mine);
    drop(layers::lock(&store.spec).expect("free again"));
}

#[test]
fn an_upper_layer_is_known_again_and_another_one_is_not_taken() {
    let store = Store::mounted();
    let marks = look_over(&store.spec, &[]).expect("ours");
    let id = marks.upper.clone().and_then(|mark| mark.id);
    assert!(id.is_some(), "an overlay shows the mark, and takes one");
    let upper = store.spec.layers.upper.as_path();
    let aside = upper.with_file_name("aside");
    fs::rename(upper, &aside).expect("renamed");
    let records = [marks];
    assert!(matches!(look_over(&store.spec, &records), Err(LayersError::Missing { .. })));
    fs::create_dir(upper).expect("made");
    assert!(matches!(look_over(&store.spec, &records), Err(LayersError::Another { .. })));
    assert!(matches!(look_over(&store.spec, &[]), Err(LayersError::Elsewhere { .. })));
    let swapped = store.refresh(&Changes::unknown(), Rung::Swap);
    assert!(swapped.is_err(), "nor is it slid under: {swapped:?}");
    unmount(&store.spec.layers).expect("unmounted");
    assert!(matches!(mount(&store.spec.layers, id.as_ref()), Err(MountError::OtherUpper(_))));
    assert!(matches!(prepare(&store.spec, &records), Err(LayersError::Another { .. })));
    fs::remove_dir(upper).expect("removed");
    assert!(matches!(prepare(&store.spec, &records), Err(LayersError::Missing { .. })));
    assert!(!upper.exists(), "nothing was made");
    fs::rename(&aside, upper).expect("renamed");
    mount(&store.spec.layers, id.as_ref()).expect("the one");
}

#[test]
fn what_was_mounted_over_a_store_meanwhile_is_neither_slid_under_nor_taken_off() {
    let store = Store::mounted();
    let pinned = store.pin();
    let cover = |source: &str| {
        let at = store.spec.layers.merged.as_path();
        rustix::mount::mount(source, at, "tmpfs", MountFlags::empty(), None).expect("mounted");
        fs::write(at.join("theirs"), "").expect("written");
    };
    let known = store.known();
    cover("theirs");
    let point = store.spec.layers.merged.to_string();
    let covered = MountState::Covered(Cover { what: "tmpfs from theirs".to_owned(), hides: point.clone(), point });
    for (from, known) in
        [Rung::Probe, Rung::Reconfigure, Rung::Swap].into_iter().flat_map(|from| [(from, None), (from, known)])
    {
        let refused = refresh(&store.spec.layers, &changed(), (from, Rung::Swap), known, &[], &()).0;
        assert!(matches!(refused, Err(RefreshError::NotOurs(_))), "{from:?} {known:?}");
        assert_eq!(store.state(), covered);
    }
    assert!(finish(&store.spec.layers, &()).is_err());
    assert!(matches!(unmount(&store.spec.layers), Err(MountError::NotOurs(_))));
    assert!(matches!(mount(&store.spec.layers, None), Err(MountError::Layers(_))), "nor is it mounted over");
    assert!(store.spec.layers.merged.as_path().join("theirs").exists());
    rustix::mount::unmount(store.spec.layers.merged.as_str(), UnmountFlags::empty()).expect("unmounted");
    let report = store.refresh(&changed(), Rung::Probe).expect("refreshed");
    assert_eq!((report.outcome, report.still_stale.len()), (Outcome::Swapped, 0));
    drop(pinned);
}

#[test]
fn another_overlay_in_the_place_of_a_store_is_left_as_it_is() {
    let store = Store::mounted();
    let known = store.known();
    unmount(&store.spec.layers).expect("unmounted");
    let other = Layers { upper: store.spec.layers.lower.clone(), ..store.spec.layers.clone() };
    let other = Layers { lower: store.spec.layers.upper.clone(), ..other };
    mount(&other, None).expect("somebody else mounts something else of the same kind");
    fs::create_dir(store.merged()).expect("made");
    // What the kernel remembers is forgotten with a reconfigure.
    fs::remove_dir(store.lower()).expect("removed");
    for (from, known) in [Rung::Reconfigure, Rung::Swap].into_iter().flat_map(|from| [(from, None), (from, known)]) {
        let refused = refresh(&store.spec.layers, &Changes::unknown(), (from, Rung::Swap), known, &[], &()).0;
        let foreign = matches!(refused, Err(RefreshError::NotOurs(NotOurs::Foreign { .. })));
        assert!(foreign, "{from:?} {known:?}: {refused:?}");
    }
    assert!(matches!(unmount(&store.spec.layers), Err(MountError::NotOurs(NotOurs::Foreign { .. }))));
    assert!(store.merged().exists(), "it was not reconfigured");
    assert!(matches!(store.state(), MountState::Foreign { .. }));
    unmount(&other).expect("it was not taken off, and nothing was slid under it");
    assert_eq!(store.state(), MountState::Absent);
}

#[test]
fn what_was_mounted_over_a_directory_above_a_store_is_in_the_way_of_everything_done_to_it() {
    let store = Store::mounted();
    let pinned = store.pin();
    let merged = store.spec.layers.merged.as_str();
    let point = store.spec.root.as_str();
    rustix::mount::mount("theirs", point, "tmpfs", MountFlags::empty(), None).expect("mounted");
    let cover = Cover { what: "tmpfs from theirs".to_owned(), point: point.to_owned(), hides: merged.to_owned() };
    assert_eq!(store.state(), MountState::Covered(cover.clone()));
    for bare in [false, true] {
        if bare {
            fs::create_dir_all(merged).expect("made");
        }
        for from in [Rung::Reconfigure, Rung::Swap] {
            let refused = store.refresh(&changed(), from).expect_err("covered").to_string();
            assert_eq!(refused, cover.to_string(), "{from:?}");
        }
        let refused = unmount(&store.spec.layers).expect_err("covered").to_string();
        assert_eq!(refused, cover.to_string());
    }
    let below = fs::read_dir(merged).expect("the cover's").count();
    assert_eq!(below, 0, "nothing was mounted on the cover");
    rustix::mount::unmount(point, UnmountFlags::empty()).expect("unmounted");
    let report = store.refresh(&changed(), Rung::Probe).expect("refreshed");
    assert_eq!((report.outcome, report.still_stale.len()), (Outcome::Swapped, 0));
    drop(pinned);
}

#[test]
fn that_there_is_no_room_in_an_upper_layer_is_found_out_and_nothing_is_left_of_it() {
    let store = Store::mounted();
    let mut layers = store.spec.layers.clone();
    let disk = store.root.path().join("disk");
    fs::create_dir(&disk).expect("made");
    let options = c"size=4m,nr_inodes=10";
    rustix::mount::mount("disk", &disk, "tmpfs", MountFlags::empty(), options).expect("mounted");
    for dir in [&mut layers.upper, &mut layers.work] {
        *dir = disk.join(dir.as_path().file_name().expect("a name")).to_str().expect("text").parse().expect("valid");
        fs::create_dir(dir.as_path()).expect("made");
    }
    let room = || room::look(&layers);
    assert_eq!(room(), Room::Enough);
    assert_eq!(fs::read_dir(layers.work.as_path()).expect("listed").count(), 0);

    fs::write(disk.join("filler"), vec![0; 3 << 20]).expect("written");
    assert_eq!(room(), Room::Enough, "1 MiB is enough");
    fs::write(disk.join("more"), "more").expect("written");
    assert_eq!(room(), Room::NoSpace(4 << 20));
    fs::remove_file(disk.join("more")).expect("removed");
    assert_eq!(room(), Room::Enough);

    let files: Vec<_> =
        (0..10).map(|number| disk.join(number.to_string())).take_while(|file| fs::write(file, "").is_ok()).collect();
    assert_eq!(room(), Room::NoFiles(rustix::io::Errno::NOSPC));
    fs::remove_file(&files[0]).expect("removed");
    assert_eq!(room(), Room::Enough);

    rustix::mount::mount_remount(&disk, MountFlags::RDONLY, c"").expect("remounted");
    assert_eq!(room(), Room::ReadOnly(rustix::io::Errno::ROFS));
    rustix::mount::mount_remount(&disk, MountFlags::empty(), c"").expect("remounted");
    assert_eq!(room(), Room::Enough);
}

#[test]
fn what_was_taken_away_unseen_and_is_in_use_takes_a_swap() {
    let store = Store::mounted();
    let name = "00000000000000000000000000000001-taken-away";
    let at = |dir: &layered_stores_model::AbsolutePath| dir.as_path().join(name);
    let layers = &store.spec.layers;
    fs::write(at(&layers.merged), "").expect("written");
    let _pinned = fs::File::open(at(&layers.merged)).expect("open");
    fs::remove_file(at(&layers.upper)).expect("removed");

    assert_eq!(probe::stale_of_all(layers).expect("listed").0, [], "nothing tells of it");
    let report = store.refresh(&Changes::unknown(), Rung::Reconfigure).expect("refreshed");
    assert_eq!((report.outcome, report.is_right()), (Outcome::Reconfigured, true));
    assert!(at(&layers.merged).exists(), "so it is not found among all");
    let report = store.refresh_to(&Changes::lost(), (Rung::Probe, Rung::Reconfigure)).0.expect("refreshed");
    assert_eq!((report.outcome, report.is_right(), report.lost), (Outcome::Reconfigured, false, true));
    let report = store.refresh(&Changes::lost(), Rung::Probe).expect("refreshed");
    assert_eq!((report.outcome, report.is_right()), (Outcome::Swapped, true));
    assert!(!at(&layers.merged).exists());
}

#[test]
fn what_was_swapped_out_is_known_also_where_the_look_after_it_fails() {
    let store = Store::mounted();
    let too_long = Changes { names: ["a".repeat(300).into()].into(), ..Changes::default() };
    let (report, old) = store.refresh_to(&too_long, (Rung::Swap, Rung::Swap));
    assert!(matches!(report, Err(RefreshError::Look { errno: rustix::io::Errno::NAMETOOLONG, .. })), "{report:?}");
    assert_eq!(old.expect("an old mount").retire().expect("retired"), OldSuperblock::Retired);
}

#[test]
fn a_superblock_that_was_swapped_out_is_read_only_once_nobody_writes() {
    let store = Store::mounted();
    let _pinned = store.pin();
    fs::write(store.spec.layers.merged.as_path().join("log"), "").expect("made");
    let inside = fs::File::open(store.spec.layers.merged.as_path()).expect("open");
    let log = store.spec.layers.merged.as_path().join("log");
    let writer = fs::OpenOptions::new().append(true).open(&log).expect("open");
    let old = store.refresh_to(&changed(), (Rung::Probe, Rung::Swap)).1.expect("an old mount");
    let write = |name: &str| {
        let flags = rustix::fs::OFlags::CREATE | rustix::fs::OFlags::WRONLY;
        rustix::fs::openat(&inside, name, flags, rustix::fs::Mode::RWXU).map(drop)
    };
    assert_eq!(old.retire().expect("asked"), OldSuperblock::StillWritten);
    write("still").expect("it takes writes");
    drop(writer);
    assert_eq!(old.retire().expect("asked"), OldSuperblock::Retired);
    assert_eq!(write("no-more"), Err(rustix::io::Errno::ROFS));
    fs::write(store.spec.layers.merged.as_path().join("fresh"), "").expect("the store takes writes");
}

#[test]
fn a_swap_that_was_interrupted_is_finished_and_what_is_mounted_is_never_retired() {
    let store = Store::mounted();
    let layers = &store.spec.layers;
    // One superblock twice is somebody's bind mount, not a swap.
    let at = layers.merged.as_str();
    rustix::mount::mount_bind(at, at).expect("bound");
    assert!(finish(layers, &()).is_err());
    rustix::mount::unmount(at, UnmountFlags::empty()).expect("unmounted");

    let root = fs::File::open(at).expect("open");
    let kept = OldMount::kept(root.into(), 1);
    assert_eq!(kept.retire().expect("asked"), OldSuperblock::StillMounted);
    fs::write(layers.merged.as_path().join("tmp"), "").expect("it takes writes");
}

#[test]
fn flags_that_are_missing_are_put_back() {
    let store = Store::mounted();
    let layers = &store.spec.layers;
    let flags = || match store.state() {
        MountState::Mounted { flags, .. } => flags,
        other => panic!("{other:?}"),
    };
    assert_eq!(flags(), None);
    rustix::mount::mount_remount(layers.merged.as_str(), MountFlags::BIND | MountFlags::NOEXEC, "").expect("remounted");
    let differ = "without nosuid, nodev and with noexec";
    assert_eq!(flags().as_deref(), Some(differ));
    assert_eq!(correct_flags(layers).expect("corrected").as_deref(), Some(differ));
    assert_eq!(flags(), None);
    assert_eq!(correct_flags(layers).expect("looked at"), None);
}

#[test]
fn names_that_are_no_text_are_looked_at() {
    let store = Store::mounted();
    let name = std::ffi::OsStr::from_bytes(b"00000000000000000000000000000000-\xff");
    let at = |dir: &layered_stores_model::AbsolutePath| dir.as_path().join(name);
    let layers = &store.spec.layers;
    assert_eq!(fs::metadata(at(&layers.merged)).map_err(|e| e.kind()).err(), Some(ErrorKind::NotFound));
    fs::write(at(&layers.lower), "").expect("written");
    assert_eq!(probe::stale(layers, [name]).expect("probed").len(), 1);
    assert_eq!(probe::stale_of_all(layers).expect("listed"), (probe::stale(layers, [name]).expect("probed"), 1));
    store.refresh(&Changes { names: [name.into()].into(), ..Changes::default() }, Rung::Probe).expect("refreshed");
    assert!(at(&layers.merged).exists());

    // And in a path: its only file tells whether the path is right.
    let file = std::ffi::OsStr::from_bytes(b"\xff");
    for path in [store.merged(), store.lower()] {
        fs::create_dir(&path).expect("made");
        fs::write(path.join(file), "").expect("written");
    }
    let _pinned = fs::File::open(store.merged().join(file)).expect("open");
    fs::remove_file(store.upper().join(file)).and_then(|()| fs::write(store.upper().join(file), "")).expect("replaced");
    let stale = probe::stale(layers, [PATH]).expect("probed");
    assert_eq!(stale.iter().map(|stale| stale.symptom).collect::<Vec<_>>(), [probe::Symptom::OtherFile]);
}

#[test]
fn a_link_on_the_way_to_a_mount_point_is_not_followed() {
    let store = Store::mounted();
    let root = store.spec.root.as_path().to_owned();
    let away = root.with_file_name("away");
    let layers = &store.spec.layers;
    fs::rename(&root, &away).expect("moved");
    symlink(&away, &root).expect("linked");
    assert!(!layered_stores_overlay::mount::is_mount_point(&layers.merged));
    assert!(matches!(mount(layers, None), Err(MountError::Layers(LayersError::Symlink { .. }))));
    assert!(store.refresh(&changed(), Rung::Swap).is_err() && unmount(layers).is_err());
    assert!(release_mount_point(&layers.merged).is_err());
    let moved = away.join("nix/store");
    let table = MountTable::read(|point| Path::new(point) == moved).expect("a table");
    assert!(table.top(moved.to_str().expect("text")).is_some(), "it is mounted still, elsewhere");
    fs::remove_file(&root).expect("removed");
    fs::rename(&away, &root).expect("moved back");
}
