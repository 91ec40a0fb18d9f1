//! What of a store is removed, and what is not.

use std::cell::RefCell;

use layered_stores_overlay::{
    identity::{ATTRIBUTE, Mark, Marks, UPPER_ATTRIBUTE, require, retained},
    remove::{self, RemoveError},
};

use super::{
    pairs::{attribute, set, unset},
    *,
};

impl Store {
    fn remove(&self, own: &[Marks]) -> Result<bool, RemoveError> {
        Ok(self.remove_anew(own)?.0)
    }

    /// Whether a state dir is left, and by what the directories are known from then on.
    fn remove_anew(&self, own: &[Marks]) -> Result<(bool, Marks), RemoveError> {
        let recorded = RefCell::new(None);
        let left = remove::contents(&self.spec, Known::of(own), |marks| {
            *recorded.borrow_mut() = Some(marks.clone());
            Ok(())
        })?;
        Ok((left.is_some(), recorded.into_inner().expect("recorded")))
    }

    fn is_full(&self) -> bool {
        self.upper().exists()
    }

    fn has_database(&self) -> bool {
        self.spec.state_dir.as_path().join("db/db.sqlite").exists()
    }

    fn being_removed(&self) -> PathBuf {
        self.spec.layers.upper.as_path().with_file_name(".upper.removing")
    }
}

#[test]
fn a_store_that_was_up_is_emptied_and_comes_up_empty() {
    needs_root!();
    let (store, marks) = Store::used();
    let before = attribute(store.spec.layers.upper.as_path(), ATTRIBUTE);
    let (is_left, anew) = store.remove_anew(&marks).expect("removed");
    assert!(!is_left && !store.is_full() && !store.has_database() && !store.being_removed().exists());
    assert_ne!(attribute(store.spec.layers.upper.as_path(), ATTRIBUTE), before, "who knows it by that is to miss it");
    fs::create_dir(store.upper()).expect("somebody goes on making files");
    store.remove(&[anew]).expect("removed");
    store.prepare().expect("anew");
}

#[test]
fn a_database_that_was_never_the_stores_is_not_removed_with_it() {
    needs_root!();
    let (mut store, marks) = Store::used();
    let upper_id = attribute(store.spec.layers.upper.as_path(), ATTRIBUTE).expect("marked");
    let foreign = store.root.path().join("chroot");
    let root = foreign.to_str().expect("text").parse().expect("valid");
    store.spec = fixture::with(&store.spec, |terms| terms.root = root);
    store.spec.state_dir = store.spec.root.join("nix/var/nix").expect("short");
    store.spec.layers.merged = store.spec.root.join("nix/store").expect("short");
    store.make_database();
    for records in [&marks[..], &[]] {
        let refused = store.remove(records);
        let is_named = matches!(refused, Err(RemoveError::StrangeDatabase { .. } | RemoveError::Strange { .. }));
        assert!(is_named && store.has_database() && store.is_full(), "{refused:?}");
    }
    set(store.spec.state_dir.as_path(), UPPER_ATTRIBUTE, &"e".repeat(32));
    let refused = store.remove(&marks);
    assert!(matches!(refused, Err(RemoveError::OtherPair { .. })), "{refused:?}");
    assert!(store.has_database() && store.is_full() && !store.being_removed().exists(), "nothing was begun");
    set(store.spec.state_dir.as_path(), UPPER_ATTRIBUTE, &upper_id);
    store.remove(&marks).expect("its own by what it tells");
    assert!(!store.has_database() && !store.is_full());
}

#[test]
fn an_upper_layer_is_not_a_stores_for_having_been_tried() {
    needs_root!();
    let (store, marks) = Store::used();
    unset(store.spec.layers.upper.as_path(), ATTRIBUTE);
    for records in [&marks[..], &[], &[Marks::default()]] {
        let refused = store.remove(records);
        assert!(matches!(refused, Err(RemoveError::Strange { .. })), "{refused:?}");
        assert!(store.is_full() && store.has_database());
    }
    let unmarked = marks.map(|marks| Marks { upper: marks.upper.map(|mark| Mark { id: None, ..mark }), ..marks });
    set(store.spec.state_dir.as_path(), UPPER_ATTRIBUTE, &"e".repeat(32));
    let refused = store.remove(&unmarked);
    assert!(matches!(refused, Err(RemoveError::OtherPair { .. })), "{refused:?}");
    unset(store.spec.state_dir.as_path(), UPPER_ATTRIBUTE);
    store.remove(&unmarked).expect("one that could not be marked");
}

#[test]
fn a_removal_that_was_cut_short_is_finished_whatever_the_store_is_called_and_touches_no_other_database() {
    needs_root!();
    for (older, is_unmarked) in [(false, false), (false, true), (true, true)] {
        let (store, [marks]) = Store::used();
        let id = |mark: Option<Mark>| mark.and_then(|mark| mark.id).expect("marked").to_string();
        let (upper, state) = (id(marks.upper), id(marks.state));
        let text = if older { String::new() } else { format!("{upper}\n{state}\n") };
        fs::write(store.being_removed(), text).expect("written");
        if is_unmarked {
            unset(store.spec.layers.upper.as_path(), ATTRIBUTE);
        }
        let refused = require(&store.spec, Known::of(&[]));
        assert!(matches!(refused, Err(LayersError::HalfRemoved { .. })), "{refused:?}");
        // The database of another upper layer, which the store had in the meantime.
        set(store.spec.state_dir.as_path(), UPPER_ATTRIBUTE, &"e".repeat(32));
        let path = store.root.path().join("state/second").to_str().expect("text").parse().expect("valid");
        let second = Mark { path, id: Some(serde_id(&"e".repeat(32))) };
        let now = Marks { upper: Some(second), state: Some(Mark { path: store.spec.state_dir.clone(), id: None }) };
        assert!(store.remove(&[now]).expect("finished"), "the database is told of");
        assert!(!store.is_full() && store.has_database() && !store.being_removed().exists());
    }
}

/// A mark of this text.
fn serde_id(text: &str) -> layered_stores_overlay::identity::Id {
    serde_json::from_value(serde_json::Value::String(text.to_owned())).expect("one")
}

#[test]
fn what_was_cut_short_before_the_database_was_gone_takes_it_along() {
    needs_root!();
    let (store, [marks]) = Store::used();
    let id = |mark: Option<Mark>| mark.and_then(|mark| mark.id).expect("marked").to_string();
    fs::write(store.being_removed(), format!("{}\n{}\n", id(marks.upper), id(marks.state))).expect("written");
    assert!(!store.remove(&[]).expect("finished"));
    assert!(!store.is_full() && !store.has_database());
}

#[test]
fn a_removal_whose_end_could_not_be_recorded_is_finished_whatever_was_made_in_the_meantime() {
    let (store, marks) = Store::used();
    let unrecorded = |_: &Marks| Err(std::io::Error::from(std::io::ErrorKind::ReadOnlyFilesystem));
    let failed = remove::contents(&store.spec, Known::of(&marks), unrecorded);
    assert!(matches!(failed, Err(RemoveError::Record(_))), "{failed:?}");
    fs::create_dir(store.upper()).expect("somebody goes on making files");
    let refused = require(&store.spec, Known::of(&marks));
    assert!(matches!(refused, Err(LayersError::HalfRemoved { .. })), "{refused:?}");
    store.remove(&marks).expect("finished");
    assert!(!store.is_full() && !store.being_removed().exists());
}

#[test]
fn of_a_work_dir_only_what_the_kernel_made_is_removed() {
    needs_root!();
    let (store, marks) = Store::used();
    let work = store.spec.layers.work.as_path();
    fs::create_dir_all(work.join("work")).expect("made");
    fs::write(work.join("work/two"), "precious").expect("written");
    let refused = store.remove(&marks);
    assert!(matches!(refused, Err(RemoveError::Layers(LayersError::WorkNotEmpty { .. }))), "{refused:?}");
    assert!(work.join("work/two").exists() && store.is_full() && store.has_database());
    fs::rename(work.join("work/two"), work.join("work/#2")).expect("renamed");
    store.remove(&marks).expect("removed");
    assert_eq!(fs::read_dir(work).expect("listed").count(), 0);
}

#[test]
fn where_the_upper_layer_is_gone_for_good_the_rest_goes_and_nothing_is_made() {
    needs_root!();
    let (store, marks) = Store::used();
    let upper = store.spec.layers.upper.as_path();
    fs::remove_dir_all(upper).expect("removed");
    fs::remove_file(upper.with_file_name(".upper.lock")).expect("removed");
    store.remove(&marks).expect("removed");
    assert!(!store.has_database() && !upper.exists() && !upper.with_file_name(".upper.lock").exists());
    // Or something empty is there, such as a bare mount point.
    let (store, marks) = Store::used();
    let upper = store.spec.layers.upper.as_path();
    fs::remove_dir_all(upper).expect("removed");
    fs::create_dir(upper).expect("made");
    store.remove(&marks).expect("removed");
    assert!(!store.has_database() && upper.exists());
}

#[test]
fn what_a_store_has_on_record_holds_until_it_has_come_up_with_something_else() {
    needs_root!();
    let (store, [marks]) = Store::used();
    assert_eq!(retained(&store.spec, std::slice::from_ref(&marks)), marks);
    let mut other = store.spec.clone();
    other.layers.upper = "/other/upper".parse().expect("valid");
    other.state_dir = "/other/root/nix/var/nix".parse().expect("valid");
    assert_eq!(retained(&other, std::slice::from_ref(&marks)), marks, "with other directories as well");
    let unmarked = Marks { upper: marks.upper.clone().map(|mark| Mark { id: None, ..mark }), state: None };
    assert_eq!(retained(&store.spec, &[unmarked, marks.clone()]), marks, "what is marked says more");
}

#[test]
fn a_copy_of_a_stores_upper_layer_is_not_removed_for_its_mark() {
    needs_root!();
    let (mut store, marks) = Store::used();
    let original = store.spec.layers.upper.clone();
    let copy = original.as_path().with_file_name("backup");
    fs::create_dir_all(copy.join("path")).expect("made");
    set(&copy, ATTRIBUTE, &attribute(original.as_path(), ATTRIBUTE).expect("marked"));
    store.spec.layers.upper = copy.to_str().expect("text").parse().expect("valid");
    let refused = store.remove(&marks);
    assert!(matches!(refused, Err(RemoveError::Strange { .. })), "{refused:?}");
    assert!(copy.join("path").exists() && store.has_database());
    store.spec.layers.upper = original;
    store.remove(&marks).expect("the one itself");
}

#[test]
fn one_that_could_not_be_marked_is_not_one_that_has_the_mark_of_another() {
    needs_root!();
    let (store, marks) = Store::used();
    let unmarked = marks.map(|marks| Marks { upper: marks.upper.map(|mark| Mark { id: None, ..mark }), ..marks });
    set(store.spec.layers.upper.as_path(), ATTRIBUTE, &"e".repeat(32));
    let refused = store.remove(&unmarked);
    assert!(matches!(refused, Err(RemoveError::Strange { .. })), "{refused:?}");
    assert!(store.is_full());
}

#[test]
fn a_removal_that_fails_on_the_way_can_be_finished_whatever_is_made_meanwhile() {
    needs_root!();
    let (store, marks) = Store::used();
    let kernels = store.spec.layers.work.as_path().join("work");
    fs::create_dir_all(&kernels).expect("made");
    let set_immutable = |is: bool| {
        let flags = if is { "+i" } else { "-i" };
        let done = std::process::Command::new("chattr").arg(flags).arg(&kernels).status();
        assert!(done.expect("chattr").success());
    };
    set_immutable(true);
    let failed = store.remove(&marks);
    assert!(matches!(failed, Err(RemoveError::Immutable(_))), "{failed:?}");
    fs::create_dir_all(store.upper()).expect("its owner goes on");
    set_immutable(false);
    store.remove(&marks).expect("finished");
    assert!(!store.is_full() && !store.being_removed().exists());
}
