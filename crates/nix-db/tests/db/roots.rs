//! Roots in a store's state directory.

use std::{collections::HashSet, fs, os::unix::fs::PermissionsExt as _};

use layered_stores_nix_db::{
    ObjectName,
    roots::{self, Roots, RootsError},
};
use tempfile::TempDir;

use crate::nix::name;

fn object(number: usize) -> ObjectName {
    name(number).parse().expect("a name")
}

#[test]
fn roots_come_and_go_one_by_one_and_all_at_once() {
    let dir = TempDir::new().expect("made");
    let state = roots::open_dir(dir.path()).expect("opened");
    assert!(!Roots::drop_all(&state, "ci").expect("none"));
    let ci = Roots::open(&state, "ci").expect("made");
    assert!(ci.add(&object(1)).expect("added") && ci.add(&object(2)).expect("added"));
    assert!(!ci.add(&object(2)).expect("there"));
    let other = Roots::open(&state, "other").expect("made");
    other.add(&object(2)).expect("added");
    ci.sync().expect("written");
    assert_eq!(ci.list().expect("listed"), HashSet::from([object(1), object(2)]));
    assert!(ci.remove(&object(1)).expect("removed") && !ci.remove(&object(1)).expect("gone"));
    let ours = dir.path().join("gcroots/layered-stores");
    assert!(Roots::drop_all(&state, "ci").expect("removed") && !ours.join("ci").exists());
    // What somebody else has put there is theirs.
    fs::write(ours.join("other/note"), "").expect("written");
    assert!(Roots::drop_all(&state, "other").expect("removed"));
    assert!(ours.join("other/note").exists() && !ours.join("other").join(name(2)).exists());
}

#[test]
fn no_link_is_followed_and_nothing_of_others_is_used() {
    let dir = TempDir::new().expect("made");
    let elsewhere = TempDir::new().expect("made");
    let state = roots::open_dir(dir.path()).expect("opened");
    let link = |at: &str| std::os::unix::fs::symlink(elsewhere.path(), dir.path().join(at)).expect("linked");
    link("gcroots");
    assert!(matches!(Roots::open(&state, "ci"), Err(RootsError::Sys { .. })));
    fs::remove_file(dir.path().join("gcroots")).expect("removed");
    fs::create_dir(dir.path().join("gcroots")).expect("made");
    link("gcroots/layered-stores");
    assert!(Roots::open(&state, "ci").is_err() && Roots::drop_all(&state, "ci").is_err());
    fs::remove_file(dir.path().join("gcroots/layered-stores")).expect("removed");
    Roots::open(&state, "ci").expect("made");
    let ours = dir.path().join("gcroots/layered-stores");
    fs::set_permissions(&ours, fs::Permissions::from_mode(0o777)).expect("set");
    assert!(matches!(Roots::open(&state, "ci"), Err(RootsError::NotOurs { .. })));
    assert_eq!(fs::read_dir(elsewhere.path()).expect("listed").count(), 0);
}

#[test]
fn temporary_roots_are_read_whatever_else_is_there() {
    let dir = TempDir::new().expect("made");
    let state = roots::open_dir(dir.path()).expect("opened");
    assert_eq!(roots::temporary(&state).expect("none"), HashSet::new());
    let temproots = dir.path().join("temproots");
    fs::create_dir(&temproots).expect("made");
    let path = |number| format!("/nix/store/{}", name(number));
    // The last path is being written.
    fs::write(temproots.join("17"), format!("{}\0{}\0{}", path(1), path(2), path(3))).expect("written");
    fs::write(temproots.join("18"), format!("{}\0no path\0", path(4))).expect("written");
    fs::write(temproots.join("note"), format!("{}\0", path(5))).expect("written");
    std::os::unix::fs::symlink("17", temproots.join("19")).expect("linked");
    let pipe = temproots.join("20");
    rustix::fs::mknodat(rustix::fs::CWD, pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0).expect("made");
    assert_eq!(roots::temporary(&state).expect("read"), [1, 2, 4].map(object).into());
}
