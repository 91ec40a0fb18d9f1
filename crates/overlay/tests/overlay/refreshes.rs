//! What refreshes find and mend.

use super::*;

#[test]
fn of_a_directory_that_is_too_large_to_be_compared_the_first_file_tells() {
    needs_root!();
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
    needs_root!();
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
    needs_root!();
    let store = Store::mounted();
    store.shadow();
    let pinned = fs::File::open(store.merged().join("file")).expect("open");
    fs::remove_dir_all(store.upper()).expect("removed");
    reconfigure(store.spec.layers.merged.as_str()).expect("reconfigured");
    assert_eq!(store.stale(), 1, "a reconfigure alone does not help");
    let (report, old) = store.refresh_to(&changed(), (Rung::Probe, Rung::Swap));
    let report = report.expect("refreshed");
    assert_eq!((report.outcome, report.still_stale.len()), (Outcome::Swapped, 0));
    let (part, all) = (report.on_record(false).expect("swapped"), report.on_record(true));
    assert!(part.has_lower_of(&report.fingerprint) && part != report.fingerprint && all == Some(report.fingerprint));
    assert_eq!(store.read(), "lower");
    assert_eq!(std::io::read_to_string(pinned).expect("still readable"), "upper");
    assert_eq!(store.state(), MountState::Mounted { read_only: false, twice: false, unpinned: None, flags: None });
    assert_eq!(old.expect("an old mount").retire().expect("retired"), OldSuperblock::Retired);
    fs::write(store.spec.layers.merged.as_path().join("tmp"), "").expect("the new superblock takes writes");
}

#[test]
fn who_has_a_path_open_for_a_moment_does_not_keep_it_in_view_where_there_is_no_swap() {
    needs_root!();
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
    needs_root!();
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
    needs_root!();
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
    needs_root!();
    let store = Store::mounted();
    store.shadow();
    assert_eq!(store.read(), "upper");
    fs::remove_dir_all(store.upper()).expect("removed");
    let report = store.refresh(&Changes::unknown(), Rung::Probe).expect("refreshed");
    assert_eq!((report.outcome, report.probed), (Outcome::Reconfigured, 1));
}

#[test]
fn a_view_that_is_right_is_left_alone() {
    needs_root!();
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
fn a_glance_sees_what_the_kernel_remembers_wrongly_and_leaves_no_trace() {
    needs_root!();
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

#[test]
fn what_was_taken_away_unseen_and_is_in_use_takes_a_swap() {
    needs_root!();
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
fn names_that_are_no_text_are_looked_at() {
    needs_root!();
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
fn a_look_at_all_paths_counts_them_and_ends_when_it_is_called_off() {
    needs_root!();
    let store = Store::mounted();
    let layers = &store.spec.layers;
    // In both layers, in the lower one, in the upper one, and something that is no path.
    store.shadow();
    let also = |number: u8| format!("{number:032}-also");
    fs::write(layers.lower.as_path().join(also(1)), "").expect("written");
    fs::write(layers.merged.as_path().join(also(2)), "").expect("written");
    fs::create_dir(layers.merged.as_path().join(".links")).expect("made");

    let progress = std::sync::Arc::<Progress>::default();
    let look = || {
        let progress = std::sync::Arc::clone(&progress);
        progress.follow(|| probe::expect_all(layers).and_then(|()| probe::stale_of_all(layers)))
    };
    let (_, probed) = look().expect("listed");
    assert_eq!((probed, progress.counts()), (3, (4, 4)), "the one in both is listed twice");
    progress.call_off();
    assert_eq!(look(), Err(Errno::CANCELED));
}
