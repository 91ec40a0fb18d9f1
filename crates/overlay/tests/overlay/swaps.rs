//! Superblocks that take the place of others.

use super::*;

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
