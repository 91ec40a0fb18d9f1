//! Which upper layer goes with which database, and whose they are.

use std::slice;

use layered_stores_model::{StoreName, fixture};
use layered_stores_overlay::identity::{ATTRIBUTE, Id, Mark, Marks, UPPER_ATTRIBUTE, require};
use rustix::{
    fs::{CWD, FileType, Mode, XattrFlags},
    io::Errno,
};

use super::*;

const NEXT: &str = "trusted.layered-stores.next-upper-id";

impl Store {
    /// One that was up, with something in its upper layer and in its database.
    pub(super) fn used() -> (Self, [Marks; 1]) {
        let store = Self::new();
        let marks = store.prepare().expect("prepared");
        fs::create_dir(store.upper()).expect("filled");
        store.make_database();
        (store, [marks])
    }

    pub(super) fn prepare(&self) -> Result<Marks, LayersError> {
        self.prepare_known(&[])
    }

    fn prepare_known(&self, own: &[Marks]) -> Result<Marks, LayersError> {
        prepare(&self.spec, Known::of(own)).map(|(_, marks)| marks)
    }

    /// What comes up on the same machine as another store.
    fn prepare_beside(&self, others: &[Mark]) -> Result<Marks, LayersError> {
        let others = |id: &Id| {
            let found = others.iter().filter(|other| other.id.as_ref() == Some(id));
            found.map(|other| (name("other"), other.clone())).collect()
        };
        prepare(&self.spec, Known { own: &[], others: &others }).map(|(_, marks)| marks)
    }

    pub(super) fn make_database(&self) {
        let db = self.spec.state_dir.as_path().join("db");
        fs::create_dir_all(&db).expect("made");
        fs::write(db.join("db.sqlite"), "").expect("written");
    }

    /// Gives it another root, with a database that Nix has made there.
    fn reroot(&mut self, root: &str) {
        let root = self.root.path().join(root).to_str().expect("text").parse().expect("valid");
        self.spec = fixture::with(&self.spec, |terms| terms.root = root);
        self.spec.state_dir = self.spec.root.join("nix/var/nix").expect("short");
        self.spec.layers.merged = self.spec.root.join("nix/store").expect("short");
    }

    fn upper_dir(&self) -> &Path {
        self.spec.layers.upper.as_path()
    }

    fn state_dir(&self) -> &Path {
        self.spec.state_dir.as_path()
    }
}

fn name(name: &str) -> StoreName {
    name.parse().expect("valid")
}

pub(super) fn attribute(dir: &Path, attribute: &str) -> Option<String> {
    let mut text = [0; 32];
    match rustix::fs::getxattr(dir, attribute, &mut text[..]) {
        Ok(length) => Some(String::from_utf8_lossy(&text[..length]).into_owned()),
        Err(Errno::NODATA) => None,
        Err(errno) => panic!("{errno}"),
    }
}

pub(super) fn set(dir: &Path, attribute: &str, value: &str) {
    rustix::fs::setxattr(dir, attribute, value.as_bytes(), XattrFlags::empty()).expect("set");
}

pub(super) fn unset(dir: &Path, attribute: &str) {
    rustix::fs::removexattr(dir, attribute).expect("taken away");
}

#[test]
fn a_database_that_tells_nothing_is_not_taken_over_what_is_in_an_upper_layer() {
    needs_root!();
    let (mut store, marks) = Store::used();
    store.reroot("fresh");
    store.make_database();
    let refused = store.prepare_known(&marks).expect_err("another database");
    assert!(matches!(refused, LayersError::Unpaired { .. }), "{refused}");
    assert_eq!(attribute(store.state_dir(), UPPER_ATTRIBUTE), None, "nothing is told by it");
    let upper = attribute(store.upper_dir(), ATTRIBUTE).expect("marked");
    let way_out = format!("setfattr --name={UPPER_ATTRIBUTE} --value={upper} {}`", store.spec.state_dir);
    assert!(refused.to_string().contains(&way_out), "{refused}");
    set(store.state_dir(), UPPER_ATTRIBUTE, &upper);
    store.prepare_known(&marks).expect("somebody has said so");
}

#[test]
fn a_database_of_a_version_that_did_not_tell_is_taken_with_the_record_of_it() {
    needs_root!();
    let (store, marks) = Store::used();
    unset(store.state_dir(), UPPER_ATTRIBUTE);
    assert!(matches!(store.prepare(), Err(LayersError::Unpaired { .. })), "which database it is, only a record tells");
    let unmarked =
        marks.clone().map(|marks| Marks { state: marks.state.map(|mark| Mark { id: None, ..mark }), ..marks });
    for record in [marks, unmarked] {
        store.prepare_known(&record).expect("the one on record");
        assert_eq!(attribute(store.state_dir(), UPPER_ATTRIBUTE), attribute(store.upper_dir(), ATTRIBUTE));
        unset(store.state_dir(), UPPER_ATTRIBUTE);
    }
}

#[test]
fn an_overlay_that_was_made_by_hand_can_be_declared_and_a_kill_keeps_it_from_nothing() {
    needs_root!();
    let store = Store::new();
    for dir in [store.upper_dir(), &store.upper(), store.state_dir()] {
        fs::create_dir_all(dir).expect("made");
    }
    store.make_database();
    store.prepare().expect("taken");
    let id = attribute(store.upper_dir(), ATTRIBUTE).expect("marked");
    assert_eq!(attribute(store.state_dir(), UPPER_ATTRIBUTE).as_ref(), Some(&id));
    // As a kill leaves it after the upper layer got its mark.
    unset(store.state_dir(), UPPER_ATTRIBUTE);
    set(store.state_dir(), NEXT, &id);
    store.prepare().expect("taken again");
    assert_eq!(attribute(store.state_dir(), UPPER_ATTRIBUTE).as_ref(), Some(&id));
    assert_eq!(attribute(store.state_dir(), NEXT), None);
    // And before that.
    unset(store.upper_dir(), ATTRIBUTE);
    unset(store.state_dir(), UPPER_ATTRIBUTE);
    set(store.state_dir(), NEXT, &id);
    store.prepare().expect("taken again");
    assert_eq!(attribute(store.state_dir(), UPPER_ATTRIBUTE), attribute(store.upper_dir(), ATTRIBUTE));
}

#[test]
fn what_is_in_an_upper_layer_needs_its_database_though_all_marks_are_right() {
    needs_root!();
    let (store, marks) = Store::used();
    store.prepare_known(&marks).expect("whole");
    fs::remove_dir_all(store.state_dir().join("db")).expect("removed");
    for _ in 0..2 {
        for records in [&marks[..], &[]] {
            assert!(matches!(store.prepare_known(records), Err(LayersError::NoDatabase { .. })));
        }
        // The bare mount point of one that has a filesystem for itself.
        fs::create_dir_all(store.state_dir().join("db")).expect("made");
    }
    fs::remove_dir(store.upper()).expect("removed");
    fs::create_dir(store.upper_dir().join(".links")).expect("made");
    store.prepare_known(&marks).expect("nothing is in it");
}

#[test]
fn whatever_is_in_the_place_of_a_database_counts_as_one() {
    needs_root!();
    let (mut store, marks) = Store::used();
    let (db, file) = (store.state_dir().join("db"), store.state_dir().join("db/db.sqlite"));
    let (upper, told) = (store.spec.layers.upper.clone(), attribute(store.state_dir(), UPPER_ATTRIBUTE));
    let fifo = |at: &Path| rustix::fs::mknodat(CWD, at, FileType::Fifo, Mode::RUSR, 0).expect("made");
    let link = |at: &Path| symlink(store.root.path(), at).expect("linked");
    let put: [(&dyn Fn(), bool); 4] = [
        (&|| link(&db), true),
        (&|| fifo(&db), false),
        (&|| fs::create_dir(&db).map(|()| link(&file)).expect("made"), true),
        (&|| fs::create_dir(&db).map(|()| fifo(&file)).expect("made"), false),
    ];
    for (number, (put, is_link)) in put.into_iter().enumerate() {
        if db.is_dir() && !db.is_symlink() {
            fs::remove_dir_all(&db).expect("removed");
        } else {
            fs::remove_file(&db).expect("removed");
        }
        put();
        let mut other = store.spec.clone();
        other.layers.upper = store.root.path().join("state/other").to_str().expect("text").parse().expect("valid");
        let refused = prepare(&other, Known::of(&marks)).map(drop);
        assert!(matches!(refused, Err(LayersError::OtherUpper { .. })), "{number}: {refused:?}");
        assert_eq!(attribute(store.spec.state_dir.as_path(), UPPER_ATTRIBUTE), told, "{number}");
        let required = require(&store.spec, Known::of(&marks));
        assert_eq!(matches!(required, Err(LayersError::LinkedDatabase(_))), is_link, "{number}: {required:?}");
    }
    store.spec.layers.upper = upper;
}

#[test]
fn a_new_store_does_not_take_a_directory_with_something_in_it() {
    needs_root!();
    let store = Store::new();
    fs::create_dir_all(store.upper_dir().join("photos")).expect("made");
    let refused = require(&store.spec, Known::of(&[])).expect_err("somebody's");
    assert!(matches!(&refused, LayersError::UpperNotEmpty { example, .. } if example == "photos"), "{refused}");
    assert!(matches!(store.prepare(), Err(LayersError::UpperNotEmpty { .. })), "nor if it shows up later");
    assert_eq!(attribute(store.upper_dir(), ATTRIBUTE), None, "it is not marked");
}

#[test]
fn what_another_store_has_is_not_taken_without_a_record_either() {
    needs_root!();
    let (store, [marks]) = Store::used();
    let mark = marks.upper.expect("on record");
    let elsewhere = |tail: &str| store.root.path().join(tail).to_str().expect("text").parse().expect("valid");
    let missing = Mark { path: elsewhere("missing"), ..mark.clone() };
    let refused = store.prepare_beside(slice::from_ref(&missing));
    assert!(matches!(&refused, Err(LayersError::OfOther { other, .. }) if *other == name("other")), "{refused:?}");
    fs::create_dir(missing.path.as_path()).expect("made");
    assert!(
        matches!(store.prepare_beside(slice::from_ref(&missing)), Err(LayersError::OfOther { .. })),
        "another one is in its place"
    );
    store.prepare_beside(slice::from_ref(&mark)).expect("the other store is declared elsewhere by now");
    assert_eq!(attribute(store.upper_dir(), ATTRIBUTE), mark.id.map(|id| id.to_string()), "it is no copy");
}

#[test]
fn a_filesystem_that_is_mounted_at_two_places_has_one_store() {
    needs_root!();
    let store = Store::mounted();
    unmount(&store.spec.layers).expect("unmounted");
    let [state, twice] = ["state", "twice"].map(|tail| store.root.path().join(tail));
    fs::create_dir(&twice).expect("made");
    rustix::mount::mount_bind_recursive(&state, &twice).expect("mounted");
    let upper = twice.join("stores/t/upper");
    let mark = store.prepare().expect("prepared").upper.expect("marked");
    let mark = Mark { path: upper.to_str().expect("text").parse().expect("valid"), ..mark };
    let refused = store.prepare_beside(slice::from_ref(&mark));
    assert!(matches!(refused, Err(LayersError::OfOther { .. })), "{refused:?}");
    rustix::mount::unmount(&twice, UnmountFlags::empty()).expect("unmounted");
}

/// A store that is a copy of another one, with all attributes, and the marks of that one.
fn copy() -> (Store, [Mark; 2]) {
    let (store, [marks]) = Store::used();
    let original = |mark: Option<Mark>, name: &str| {
        let mark = mark.expect("on record");
        let path = store.root.path().join(name);
        fs::create_dir(&path).expect("made");
        set(&path, ATTRIBUTE, &attribute(mark.path.as_path(), ATTRIBUTE).expect("marked"));
        Mark { path: path.to_str().expect("text").parse().expect("valid"), ..mark }
    };
    let marks = [original(marks.upper, "upper"), original(marks.state, "database")];
    (store, marks)
}

#[test]
fn a_copy_gets_marks_of_its_own() {
    needs_root!();
    let (store, original) = copy();
    let before = attribute(store.state_dir(), ATTRIBUTE);
    let marks = store.prepare_beside(&original).expect("taken");
    let upper = attribute(store.upper_dir(), ATTRIBUTE).expect("marked");
    let [original, _] = original;
    assert_ne!(Some(upper.clone()), original.id.as_ref().map(ToString::to_string));
    assert_eq!(marks.upper.and_then(|mark| mark.id).map(|id| id.to_string()).as_ref(), Some(&upper));
    assert_eq!(attribute(store.state_dir(), UPPER_ATTRIBUTE), Some(upper));
    assert_ne!(attribute(store.state_dir(), ATTRIBUTE), before);
    assert_eq!(attribute(store.state_dir(), NEXT), None);
    set(store.upper_dir(), ATTRIBUTE, &original.id.expect("marked").to_string());
    assert!(matches!(store.prepare(), Err(LayersError::OtherUpper { .. })), "the original's does not go with it");
}

#[test]
fn wherever_a_copy_is_cut_short_on_the_way_to_marks_of_its_own_it_comes_up() {
    needs_root!();
    let fresh = "f".repeat(32);
    for done in 0..5 {
        let (store, original) = copy();
        let theirs = original.each_ref().map(|mark| mark.id.as_ref().map(ToString::to_string));
        if done >= 1 {
            set(store.state_dir(), NEXT, &fresh);
        }
        if done >= 2 {
            set(store.upper_dir(), ATTRIBUTE, &fresh);
        }
        if done >= 3 {
            set(store.state_dir(), UPPER_ATTRIBUTE, &fresh);
        }
        if done >= 4 {
            set(store.state_dir(), ATTRIBUTE, &"e".repeat(32));
        }
        for _ in 0..2 {
            store.prepare_beside(&original).expect("taken");
            let upper = attribute(store.upper_dir(), ATTRIBUTE);
            let mine = [upper.clone(), attribute(store.state_dir(), ATTRIBUTE)];
            assert!(mine.iter().all(|mark| !theirs.contains(mark)), "{done}");
            assert_eq!(attribute(store.state_dir(), UPPER_ATTRIBUTE), upper, "{done}");
        }
    }
}

#[test]
fn a_copy_that_was_cut_short_and_given_up_does_not_get_the_database_that_has_gone_on() {
    let (mut store, marks) = Store::used();
    let original = store.spec.layers.upper.clone();
    store.spec.layers.upper = copied(original.as_path(), "big");
    let fresh = "f".repeat(32);
    set(store.state_dir(), NEXT, &fresh);
    set(store.upper_dir(), ATTRIBUTE, &fresh);
    let copy = std::mem::replace(&mut store.spec.layers.upper, original);
    store.prepare_known(&marks).expect("the original");
    assert_eq!(attribute(store.state_dir(), NEXT), None);
    store.spec.layers.upper = copy;
    let refused = store.prepare();
    assert!(matches!(refused, Err(LayersError::OtherUpper { .. })), "{refused:?}");
}

#[test]
fn a_work_dir_with_something_else_in_it_is_not_given_to_the_kernel() {
    needs_root!();
    let (store, marks) = Store::used();
    let work = store.spec.layers.work.as_path();
    let index = "index/00fb1d0001";
    for crashed in ["work", "work/#1f", "work/incompat", "work/incompat/volatile", "index", index] {
        fs::create_dir_all(work.join(crashed)).expect("made");
    }
    store.prepare_known(&marks).expect("what the kernel has left");
    for strange in ["index/three", "work/two", "one"] {
        fs::write(work.join(strange), "precious").expect("written");
        let refused = store.prepare_known(&marks).expect_err("somebody's");
        assert!(matches!(&refused, LayersError::WorkNotEmpty { example, .. } if example == strange), "{refused}");
    }
}

/// A copy of a directory with its mark, and with what a store has in it.
fn copied(from: &Path, to: &str) -> layered_stores_model::AbsolutePath {
    let to = from.with_file_name(to);
    fs::create_dir(&to).expect("made");
    fs::create_dir(to.join("path")).expect("filled");
    set(&to, ATTRIBUTE, &attribute(from, ATTRIBUTE).expect("marked"));
    to.to_str().expect("text").parse().expect("valid")
}

#[test]
fn a_copy_of_its_own_upper_layer_is_another_one_from_then_on() {
    needs_root!();
    let (mut store, marks) = Store::used();
    let original = store.spec.layers.upper.clone();
    store.spec.layers.upper = copied(original.as_path(), "big");
    let anew = store.prepare_known(&marks).expect("the database goes with a copy");
    assert_ne!(anew.upper.and_then(|mark| mark.id), marks[0].upper.clone().and_then(|mark| mark.id));
    // What is built now is in the copy alone.
    let big = std::mem::replace(&mut store.spec.layers.upper, original);
    for records in [&marks[..], &[]] {
        let refused = store.prepare_known(records);
        assert!(matches!(refused, Err(LayersError::OtherUpper { .. })), "{refused:?}");
    }
    store.spec.layers.upper = big;
    store.prepare_known(&marks).expect("again, as after a kill");
}

#[test]
fn a_copy_of_its_own_database_is_not_used_in_turns_with_the_original() {
    needs_root!();
    let (mut store, marks) = Store::used();
    let before = store.spec.clone();
    store.reroot("copy");
    store.make_database();
    for name in [ATTRIBUTE, UPPER_ATTRIBUTE] {
        set(store.state_dir(), name, &attribute(before.state_dir.as_path(), name).expect("marked"));
    }
    store.prepare_known(&marks).expect("with the copy");
    store.spec = before;
    let refused = store.prepare();
    assert!(matches!(refused, Err(LayersError::OtherUpper { .. })), "{refused:?}");
}

#[test]
fn what_was_moved_is_the_stores_still() {
    needs_root!();
    let (mut store, marks) = Store::used();
    let before = attribute(store.upper_dir(), ATTRIBUTE);
    let moved = store.upper_dir().with_file_name("moved");
    fs::rename(store.upper_dir(), &moved).expect("moved");
    store.spec.layers.upper = moved.to_str().expect("text").parse().expect("valid");
    store.prepare_known(&marks).expect("taken");
    assert_eq!(attribute(store.upper_dir(), ATTRIBUTE), before);
}

#[test]
fn where_a_database_cannot_tell_the_record_does() {
    needs_root!();
    let (mut store, marks) = Store::used();
    unset(store.state_dir(), UPPER_ATTRIBUTE);
    unset(store.state_dir(), ATTRIBUTE);
    let upper = store.spec.layers.upper.clone();
    let unmarked = marks.map(|marks| Marks { state: marks.state.map(|mark| Mark { id: None, ..mark }), ..marks });
    for (other, is_full) in [("mistyped", false), ("old", true)] {
        let other = store.upper_dir().with_file_name(other);
        if is_full {
            fs::create_dir_all(other.join("path")).expect("filled");
        }
        store.spec.layers.upper = other.to_str().expect("text").parse().expect("valid");
        let refused = store.prepare_known(&unmarked);
        assert!(matches!(refused, Err(LayersError::OtherUpper { .. })), "{refused:?}");
        store.spec.layers.upper = upper.clone();
    }
    store.prepare_known(&unmarked).expect("the one on record");
}

#[test]
fn what_is_hidden_is_something_too() {
    needs_root!();
    let store = Store::new();
    fs::create_dir_all(store.upper_dir().join(".ssh")).expect("made");
    let refused = store.prepare().expect_err("somebody's");
    assert!(matches!(&refused, LayersError::UpperNotEmpty { example, .. } if example == ".ssh"), "{refused}");
}
