//! What else is mounted, or linked, where a store is.

use super::*;

#[test]
fn what_was_mounted_over_a_store_meanwhile_is_neither_slid_under_nor_taken_off() {
    needs_root!();
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
    assert!(matches!(finish(&store.spec.layers, &()), Err(SwapError::NotOurs(NotOurs::Covered(_)))));
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
    needs_root!();
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
    needs_root!();
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
fn a_link_on_the_way_to_a_mount_point_is_not_followed() {
    needs_root!();
    let store = Store::mounted();
    let root = store.spec.root.as_path().to_owned();
    let away = root.with_file_name("away");
    let layers = &store.spec.layers;
    fs::rename(&root, &away).expect("moved");
    symlink(&away, &root).expect("linked");
    assert!(!layered_stores_overlay::mount::is_mount_point(&layers.merged));
    assert!(matches!(mount(layers, None), Err(MountError::Layers(LayersError::Symlink { .. }))));
    let is_link = |error: &NotOurs| matches!(error, NotOurs::Unknown(_, error) if Errno::from_io_error(error) == Some(Errno::LOOP));
    let refused = store.refresh(&changed(), Rung::Swap);
    assert!(matches!(&refused, Err(RefreshError::NotOurs(error)) if is_link(error)), "{refused:?}");
    let refused = unmount(layers);
    assert!(matches!(&refused, Err(MountError::NotOurs(error)) if is_link(error)), "{refused:?}");
    let refused = release_mount_point(&layers.merged);
    assert!(matches!(refused, Err(LayersError::Symlink { .. })), "{refused:?}");
    let moved = away.join("nix/store");
    let table = MountTable::read(|point| Path::new(point) == moved).expect("a table");
    assert!(table.top(moved.to_str().expect("text")).is_some(), "it is mounted still, elsewhere");
    fs::remove_file(&root).expect("removed");
    fs::rename(&away, &root).expect("moved back");
}
