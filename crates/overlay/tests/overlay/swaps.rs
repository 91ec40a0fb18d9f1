//! Superblocks that take the place of others.

use std::{
    cell::RefCell,
    os::fd::{AsFd as _, BorrowedFd},
};

use layered_stores_overlay::{options::superblock_options, swap::SafeKeeping};

use super::*;

/// The numbers of what is kept.
#[derive(Default)]
struct Kept(RefCell<Vec<u64>>);

impl SafeKeeping for Kept {
    fn keep(&self, mount: BorrowedFd<'_>, number: u64) {
        assert_eq!(MountId::of(mount).expect("a mount").number(), number);
        self.0.borrow_mut().push(number);
    }

    fn let_go(&self, number: u64) {
        self.0.borrow_mut().retain(|kept| *kept != number);
    }
}

#[test]
fn what_was_swapped_out_is_known_also_where_the_look_after_it_fails() {
    needs_root!();
    let store = Store::mounted();
    let too_long = Changes { names: ["a".repeat(300).into()].into(), ..Changes::default() };
    let (report, old) = store.refresh_to(&too_long, (Rung::Swap, Rung::Swap));
    assert!(matches!(report, Err(RefreshError::Look { errno: rustix::io::Errno::NAMETOOLONG, .. })), "{report:?}");
    assert_eq!(old.expect("an old mount").retire().expect("retired"), OldSuperblock::Retired);
}

#[test]
fn a_superblock_that_was_swapped_out_is_read_only_once_nobody_writes() {
    needs_root!();
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
    needs_root!();
    let store = Store::mounted();
    let layers = &store.spec.layers;
    // One superblock twice is somebody's bind mount, not a swap.
    let at = layers.merged.as_str();
    rustix::mount::mount_bind(at, at).expect("bound");
    assert!(matches!(finish(layers, &()), Err(SwapError::Detach(_, Errno::BUSY))));
    rustix::mount::unmount(at, UnmountFlags::empty()).expect("unmounted");

    let root = fs::File::open(at).expect("open");
    let kept = OldMount::kept(root.into(), 1);
    assert_eq!(kept.retire().expect("asked"), OldSuperblock::StillMounted);
    fs::write(layers.merged.as_path().join("tmp"), "").expect("it takes writes");
}

#[test]
fn of_two_mounts_that_a_swap_has_left_the_upper_one_is_taken_off_and_kept() {
    needs_root!();
    let store = Store::mounted();
    let layers = &store.spec.layers;
    let at = layers.merged.as_str();
    let options: Vec<_> = superblock_options(layers).map(|(key, value)| format!("{key}={value}")).collect();
    let options = std::ffi::CString::new(options.join(",")).expect("text");
    rustix::mount::mount("overlay", at, "overlay", MountFlags::NOSUID | MountFlags::NODEV, &*options).expect("mounted");
    assert_eq!(store.state(), MountState::Mounted { read_only: false, twice: true, unpinned: None, flags: None });
    let upper = MountId::of(fs::File::open(at).expect("open")).expect("a mount");

    let kept = Kept::default();
    let old = finish(layers, &kept).expect("finished");
    assert_eq!(MountId::of(old.as_fd()).expect("a mount"), upper);
    assert_eq!((old.number(), kept.0.into_inner()), (upper.number(), vec![upper.number()]));
    assert_eq!(store.state(), MountState::Mounted { read_only: false, twice: false, unpinned: None, flags: None });
    assert_eq!(old.retire().expect("asked"), OldSuperblock::Retired);
}

#[test]
fn flags_that_are_missing_are_put_back() {
    needs_root!();
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
