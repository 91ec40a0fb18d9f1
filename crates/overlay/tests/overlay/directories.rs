//! Directories: made, checked, known again, locked.

use super::*;

const STRANGER: Option<u32> = Some(65534);

fn give(path: &Path, mode: u32, owner: Option<u32>) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("chmod");
    chown(path, owner, owner).expect("chown");
}

#[test]
fn preparing_again_changes_nothing_and_the_bare_mount_point_takes_no_writes() {
    needs_root!();
    let store = Store::new();
    drop(prepare(&store.spec, Known::of(&[])).expect("prepared"));
    drop(prepare(&store.spec, Known::of(&[])).expect("prepared again"));
    let bare = store.spec.layers.merged.as_path();
    let refused = fs::write(bare.join("x"), "").map_err(|error| error.kind());
    assert_eq!(refused, Err(ErrorKind::PermissionDenied), "not even root writes into the bare mount point");
    release_mount_point(&store.spec.layers.merged).expect("released");
    fs::write(bare.join("x"), "").expect("released, it is a directory like any other");
    assert!(matches!(prepare(&store.spec, Known::of(&[])), Err(LayersError::MountPointNotEmpty { .. })));
}

#[test]
fn an_upper_layer_is_used_once() {
    needs_root!();
    let store = Store::new();
    let _lock = prepare(&store.spec, Known::of(&[])).expect("prepared");
    assert!(matches!(prepare(&store.spec, Known::of(&[])), Err(LayersError::Locked(_))));
}

#[test]
fn what_a_start_would_refuse_is_found_ahead_and_nothing_is_made_for_it() {
    needs_root!();
    let look = |spec: &StoreSpec| layers::look_ahead(spec, Known::of(&[]));
    let store = Store::new();
    look(&store.spec).expect("all is still to be made");
    assert!(!store.root.path().join("state").exists());
    drop(prepare(&store.spec, Known::of(&[])).expect("prepared"));
    look(&store.spec).expect("as it is");

    let upper = store.spec.layers.upper.as_path();
    give(upper, 0o755, STRANGER);
    assert!(matches!(look(&store.spec), Err(LayersError::OtherOwner { .. })));
    give(upper, 0o755, Some(0));
    fs::write(store.spec.layers.work.as_path().join("mine"), "").expect("written");
    assert!(matches!(look(&store.spec), Err(LayersError::WorkNotEmpty { .. })));
    fs::remove_file(store.spec.layers.work.as_path().join("mine")).expect("removed");

    let text = format!("[stores.t]\nlower-store = {:?}\nephemeral-size = \"1M\"\n", store.root.path().join("lower"));
    let state = store.root.path().join("state");
    let ephemeral = fixture::declared(state.to_str().expect("text"), &text).remove(0);
    assert!(matches!(look(&ephemeral), Err(LayersError::NotEphemeralYet { .. })));
    let elsewhere = store.root.path().join("elsewhere");
    look(&fixture::declared(elsewhere.to_str().expect("text"), &text).remove(0)).expect("there is nothing yet");
    assert!(!elsewhere.exists());

    fs::remove_dir_all(store.spec.layers.lower.as_path()).expect("removed");
    assert!(matches!(look(&store.spec), Err(LayersError::LowerMissing(_))));
}

#[test]
fn a_path_that_others_could_redirect_is_not_walked() {
    needs_root!();
    let store = Store::new();
    let state = store.root.path().join("state");
    let elsewhere = store.root.path().join("elsewhere");
    fs::create_dir_all(elsewhere.join("stores")).expect("made");
    symlink(&elsewhere, &state).expect("linked");
    assert!(matches!(prepare(&store.spec, Known::of(&[])), Err(LayersError::Symlink { .. })));
    fs::remove_file(&state).expect("removed");
    fs::create_dir(&state).expect("made");
    fs::set_permissions(&state, fs::Permissions::from_mode(0o777)).expect("chmod");
    assert!(matches!(prepare(&store.spec, Known::of(&[])), Err(LayersError::UnsafeParent { .. })));
}

#[test]
fn not_even_the_owner_of_a_store_may_own_a_directory_above_it() {
    let mut store = Store::new();
    store.spec = fixture::with(&store.spec, |terms| terms.ownership.owner = Some("nobody".to_owned()));
    let state = store.root.path().join("state");
    for mode in [0o755, 0o1777] {
        fs::create_dir_all(&state).expect("made");
        give(&state, mode, STRANGER);
        assert!(
            matches!(prepare(&store.spec, Known::of(&[])), Err(LayersError::UnsafeParent { uid: 65534, .. })),
            "{mode:o}"
        );
    }
}

#[test]
fn the_way_to_the_lower_store_is_walked_as_well() {
    needs_root!();
    let mut store = Store::new();
    store.spec = fixture::with(&store.spec, |terms| terms.ownership.owner = Some("nobody".to_owned()));
    let (lower, away) = (store.root.path().join("lower"), store.root.path().join("away"));
    give(&lower.join("nix/store"), 0o1775, Some(1000));
    drop(prepare(&store.spec, Known::of(&[])).expect("the directory itself may belong to anybody"));
    give(&lower.join("nix"), 0o755, STRANGER);
    assert!(matches!(prepare(&store.spec, Known::of(&[])), Err(LayersError::UnsafeParent { key: "lower-store", .. })));
    give(&lower.join("nix"), 0o755, Some(0));
    for link in ["nix/store", "nix"] {
        fs::rename(lower.join(link), &away).expect("moved");
        symlink(&away, lower.join(link)).expect("linked");
        assert!(
            matches!(prepare(&store.spec, Known::of(&[])), Err(LayersError::Symlink { key: "lower-store", .. })),
            "{link}"
        );
        fs::remove_file(lower.join(link)).expect("removed");
        fs::rename(&away, lower.join(link)).expect("moved back");
    }
}

#[test]
fn an_upper_layer_of_roots_is_not_for_others_to_write_to() {
    needs_root!();
    let mut store = Store::new();
    let plain = store.spec.clone();
    let declare = |owner: Option<&str>, mode| {
        let (owner, group) = (owner.map(str::to_owned), Some("65534".to_owned()));
        fixture::with(&plain, |terms| terms.ownership = Ownership { owner, group, mode })
    };
    let upper = plain.layers.upper.as_path();
    let (refused, permissions) = (
        |store: &Store| matches!(prepare(&store.spec, Known::of(&[])), Err(LayersError::UpperForOthers { .. })),
        || upper.metadata().expect("made").permissions().mode() & 0o7777,
    );

    store.spec = declare(None, Some(0o1775));
    assert!(refused(&store), "a group that is not of build users");
    assert!(!upper.exists(), "nothing was made");
    store.spec = declare(None, None);
    drop(prepare(&store.spec, Known::of(&[])).expect("by default it does not write"));
    assert_eq!(permissions(), 0o755);
    assert!(owner(&store.spec, None).is_ok());
    for mode in [0o1775, 0o1777, 0o757] {
        give(upper, mode, Some(0));
        chown(upper, None, STRANGER).expect("chown");
        assert!(refused(&store), "{mode:o}");
        assert!(
            matches!(owner(&store.spec, None), Err(OwnerError::Others(LayersError::UpperForOthers { .. }))),
            "{mode:o}"
        );
    }
    give(upper, 0o750, Some(0));
    drop(prepare(&store.spec, Known::of(&[])).expect("nobody else writes"));

    fs::remove_dir(upper).expect("removed");
    store.spec = declare(Some("nobody"), Some(0o1775));
    fs::remove_dir_all(&plain.state_dir).expect("removed");
    drop(prepare(&store.spec, Known::of(&[])).expect("no Nix of root's works in somebody else's"));
    assert_eq!(permissions(), 0o1775);
}

#[test]
fn a_lower_store_that_roots_nix_opens_has_a_state_directory_of_roots() {
    needs_root!();
    let mut store = Store::new();
    let plain = store.spec.clone();
    let lower = store.root.path().join("lower");
    let state = lower.join("nix/var/nix");
    fs::create_dir_all(&state).expect("made");
    drop(prepare(&store.spec, Known::of(&[])).expect("root's alone"));
    let name = |url: String| fixture::with(&plain, |terms| terms.lower_store = url.parse().expect("valid"));
    let refused = |spec: &StoreSpec| {
        let prepared = prepare(spec, Known::of(&[]));
        let is_refused = matches!(prepared, Err(LayersError::LowerForOthers { .. }));
        assert!(is_refused || prepared.is_ok(), "{prepared:?}");
        drop(prepared);
        assert_eq!(
            is_refused,
            matches!(owner(spec, None), Err(OwnerError::Others(LayersError::LowerForOthers { .. })))
        );
        is_refused
    };
    let at = lower.display();
    for (path, mode, stranger) in
        [(&state, 0o755, true), (&state, 0o775, false), (&lower.join("nix/var"), 0o1777, false)]
    {
        give(path, mode, if stranger { STRANGER } else { Some(0) });
        for url in
            [format!("{at}"), format!("local?root={at}&read-only=true"), format!("auto?state={}", state.display())]
        {
            store.spec = name(url);
            assert!(refused(&store.spec), "{}: {mode:o}", store.spec.lower_store);
        }
        // Who works there is a Nix daemon, or not root's Nix.
        for url in [format!("unix:///s?root={at}"), format!("daemon?root={at}"), format!("{at}?state={at}/none")] {
            store.spec = name(url);
            assert!(!refused(&store.spec), "{}: {mode:o}", store.spec.lower_store);
        }
        give(path, 0o755, Some(0));
    }
    // Of what Nix goes through in it nothing is others'.
    store.spec = name(at.to_string());
    for (path, mode, owner) in [("db", 0o755, STRANGER), ("temproots", 0o777, Some(0)), ("gcroots", 0o1777, Some(0))] {
        fs::create_dir(state.join(path)).expect("made");
        give(&state.join(path), mode, owner);
        assert!(refused(&store.spec), "{path}");
        fs::remove_dir(state.join(path)).expect("removed");
    }
    symlink("elsewhere", state.join("db")).expect("linked");
    assert!(!refused(&store.spec), "root leads where it likes");
    // What is missing others could make.
    fs::remove_file(state.join("db")).expect("removed");
    fs::remove_dir_all(lower.join("nix/var")).expect("removed");
    assert!(!refused(&store.spec));
    give(&lower.join("nix"), 0o1777, Some(0));
    assert!(refused(&store.spec));
    give(&lower.join("nix"), 0o755, Some(0));
}

#[test]
fn a_lower_store_whose_links_root_would_follow_is_roots_or_cannot_be_changed() {
    needs_root!();
    host::private_mount_namespace(false).expect("a mount namespace");
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).expect("a private namespace");
    let mut store = Store::new();
    let plain = store.spec.clone();
    let dir = plain.layers.lower.as_path();
    let at = store.root.path().join("lower");
    for url in [at.display().to_string(), format!("unix:///s?root={}", at.display())] {
        store.spec = fixture::with(&plain, |terms| terms.lower_store = url.parse().expect("valid"));
        for (mode, owner) in [(0o755, STRANGER), (0o1777, Some(0)), (0o775, Some(0))] {
            give(dir, mode, owner);
            chown(dir, None, STRANGER).expect("chown");
            let refused = prepare(&store.spec, Known::of(&[]));
            assert!(matches!(refused, Err(LayersError::LowerForOthers { .. })), "{refused:?}");
            assert!(matches!(layers::look_ahead(&store.spec, Known::of(&[])), Err(LayersError::LowerForOthers { .. })));
        }
    }
    rustix::mount::mount_bind(&at, &at).expect("mounted");
    let read_only = MountFlags::BIND | MountFlags::RDONLY;
    rustix::mount::mount_remount(&at, read_only, "").expect("for reading only");
    drop(prepare(&store.spec, Known::of(&[])).expect("nobody changes it"));
    rustix::mount::unmount(&at, UnmountFlags::DETACH).expect("unmounted");
}

#[test]
fn a_state_dir_of_roots_is_not_for_others_to_write_to() {
    needs_root!();
    let store = Store::new();
    drop(prepare(&store.spec, Known::of(&[])).expect("prepared"));
    let state = store.spec.state_dir.as_path();
    fs::create_dir(state.join("profiles")).expect("made");
    for (path, mode) in [(state, 0o775), (&state.join("profiles"), 0o777)] {
        give(path, mode, Some(0));
        let refused = prepare(&store.spec, Known::of(&[]));
        assert!(matches!(refused, Err(LayersError::StateForOthers { .. })), "{refused:?}");
        give(path, 0o755, Some(0));
    }
    drop(prepare(&store.spec, Known::of(&[])).expect("root's alone"));
}

#[test]
fn where_others_can_make_files_nothing_is_made_or_taken() {
    needs_root!();
    let store = Store::new();
    let state = store.root.path().join("state");
    let stores = state.join("stores");
    fs::create_dir(&state).expect("made");
    give(&state, 0o1777, Some(0));
    assert!(
        matches!(prepare(&store.spec, Known::of(&[])), Err(LayersError::SharedParent { .. })),
        "nothing is made there"
    );
    fs::create_dir(&stores).expect("made");
    give(&stores, 0o755, STRANGER);
    assert!(
        matches!(prepare(&store.spec, Known::of(&[])), Err(LayersError::UnsafeParent { .. })),
        "nothing of others' is taken"
    );
    give(&stores, 0o755, Some(0));
    drop(prepare(&store.spec, Known::of(&[])).expect("what is root's there is safe, as below /tmp"));
    fs::create_dir(state.join("lower")).expect("made");
    let mut store = store;
    store.spec.layers.lower = state.join("lower").to_str().expect("text").parse().expect("valid");
    drop(prepare(&store.spec, Known::of(&[])).expect("root's"));
    give(&state.join("lower"), 0o755, STRANGER);
    assert!(matches!(prepare(&store.spec, Known::of(&[])), Err(LayersError::SharedParent { key: "lower-store", .. })));
}

#[test]
fn directories_that_somebody_else_has_made_before_are_not_taken() {
    needs_root!();
    let store = Store::new();
    let (upper, work) = (store.spec.layers.upper.as_path(), store.spec.layers.work.as_path());
    fs::create_dir_all(upper).expect("made");
    give(upper, 0o755, STRANGER);
    assert!(matches!(
        prepare(&store.spec, Known::of(&[])),
        Err(LayersError::OtherOwner { found: 65534, wanted: 0, .. })
    ));
    give(upper, 0o755, Some(0));
    fs::create_dir_all(work).expect("made");
    for (mode, owner) in [(0o700, STRANGER), (0o770, Some(0)), (0o1777, Some(0))] {
        give(work, mode, owner);
        assert!(
            matches!(prepare(&store.spec, Known::of(&[])), Err(LayersError::NotRoots { key: "work-dir", .. })),
            "{mode:o}"
        );
    }
    fs::remove_dir(work).expect("removed");

    // Half-made ones.
    let half_made = work.with_file_name(".work.new");
    fs::create_dir(&half_made).expect("made");
    give(&half_made, 0o777, STRANGER);
    fs::write(half_made.join("theirs"), "").expect("written");
    assert!(matches!(prepare(&store.spec, Known::of(&[])), Err(LayersError::InTheWay { .. })));
    fs::remove_file(half_made.join("theirs")).expect("removed");
    let theirs = fs::File::open(&half_made).expect("open");
    drop(prepare(&store.spec, Known::of(&[])).expect("an empty one is of a daemon that was killed, and made anew"));
    let ino = |metadata: fs::Metadata| std::os::unix::fs::MetadataExt::ino(&metadata);
    assert_ne!(ino(theirs.metadata().expect("it")), ino(work.metadata().expect("it")));
    assert_eq!(work.metadata().expect("it").permissions().mode() & 0o7777, 0o700);
}

#[test]
fn a_lock_that_others_can_take_keeps_no_store_down() {
    needs_root!();
    let store = Store::new();
    drop(prepare(&store.spec, Known::of(&[])).expect("prepared"));
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
    let mine = prepare(&store.spec, Known::of(&[])).expect("not kept down");
    assert!(matches!(prepare(&store.spec, Known::of(&[])), Err(LayersError::Locked(_))), "but this one counts");
    assert!(matches!(layers::lock(&store.spec), Err(LayersError::Locked(_))));
    drop(mine);
    drop(layers::lock(&store.spec).expect("free again"));
}

#[test]
fn an_upper_layer_is_known_again_and_another_one_is_not_taken() {
    needs_root!();
    let store = Store::mounted();
    let marks = look_over(&store.spec, Known::of(&[])).expect("ours");
    let id = marks.upper.clone().and_then(|mark| mark.id);
    assert!(id.is_some(), "an overlay shows the mark, and takes one");
    let upper = store.spec.layers.upper.as_path();
    let aside = upper.with_file_name("aside");
    fs::rename(upper, &aside).expect("renamed");
    let records = [marks];
    assert!(matches!(look_over(&store.spec, Known::of(&records)), Err(LayersError::Missing { .. })));
    fs::create_dir(upper).expect("made");
    assert!(matches!(look_over(&store.spec, Known::of(&records)), Err(LayersError::Another { .. })));
    assert!(matches!(look_over(&store.spec, Known::of(&[])), Err(LayersError::Elsewhere { .. })));
    let swapped = store.refresh(&Changes::unknown(), Rung::Swap);
    assert!(swapped.is_err(), "nor is it slid under: {swapped:?}");
    unmount(&store.spec.layers).expect("unmounted");
    assert!(matches!(mount(&store.spec.layers, id.as_ref()), Err(MountError::OtherUpper(_))));
    assert!(matches!(prepare(&store.spec, Known::of(&records)), Err(LayersError::Another { .. })));
    fs::remove_dir(upper).expect("removed");
    assert!(matches!(prepare(&store.spec, Known::of(&records)), Err(LayersError::Missing { .. })));
    assert!(!upper.exists(), "nothing was made");
    fs::rename(&aside, upper).expect("renamed");
    mount(&store.spec.layers, id.as_ref()).expect("the one");
}

#[test]
fn that_there_is_no_room_in_an_upper_layer_is_found_out_and_nothing_is_left_of_it() {
    needs_root!();
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
