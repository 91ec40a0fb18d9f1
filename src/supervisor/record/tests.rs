use std::{fs::Permissions, os::unix::fs::PermissionsExt as _};

use super::*;
use layered_stores_model::{Ephemeral, fixture, needs_root};
use layered_stores_overlay::{identity, layers::LayersError};

fn spec(name: &str) -> Arc<StoreSpec> {
    Arc::new(fixture::spec(name, "/lower"))
}

/// A specification whose directories are not there, and can be looked for.
fn real(dir: &Path) -> Arc<StoreSpec> {
    let at = |tail: &str| dir.join(tail).to_string_lossy().parse().expect("valid");
    let mut spec = StoreSpec::clone(&spec("t"));
    (spec.layers.upper, spec.layers.work, spec.state_dir) = (at("upper"), at("work"), at("state"));
    Arc::new(spec)
}

#[test]
fn what_a_store_had_before_is_known_from_every_record() {
    needs_root!();
    let dir = tempfile::tempdir().expect("a directory");
    let (state, runtime) = (dir.path().join("state"), dir.path().join("run"));
    let records = Records::new(&state, &runtime);
    let spec = real(dir.path());
    let marks = Marks {
        upper: Some(Mark { path: spec.layers.upper.clone(), id: None }),
        state: Some(Mark { path: spec.state_dir.clone(), id: None }),
    };
    let refused = || {
        let result = identity::require(&spec, identity::Known::of(&records.marks(&spec).expect("read")));
        matches!(result, Err(LayersError::Missing { .. }))
    };
    assert!(!refused(), "nothing was ever there");
    records.remember(&spec, &Marks::default()).expect("written");
    assert!(!refused(), "nothing was made yet");
    records.remember(&spec, &marks).expect("written");
    assert!(refused());
    let known = records.known_path(&spec.name);
    for gone in [known.clone(), records.note_path(&spec.name)] {
        records.remember(&spec, &marks).expect("written");
        fs::remove_file(gone).expect("removed");
        assert!(refused(), "one record is enough");
    }

    let mut other = StoreSpec::clone(&spec);
    (other.state_dir, other.layers.upper) = ("/other".parse().expect("valid"), "/else".parse().expect("valid"));
    let kept = records.marks(&other).expect("read");
    assert!(identity::require(&other, identity::Known::of(&kept)).is_ok(), "other directories are other ones");
    let in_memory = Ephemeral { directory: "/memory".parse().expect("valid"), size: "1M".parse().expect("valid") };
    let ephemeral = Arc::new(fixture::with(&spec, |terms| terms.ephemeral = Some(in_memory)));
    assert_eq!(records.marks(&ephemeral).expect("read"), [], "a boot takes these with it");
    records.remember(&ephemeral, &marks).expect("written");
    assert_eq!(records.marks(&ephemeral).expect("read"), std::slice::from_ref(&marks), "but nothing else");
    assert_eq!(records.marks(&spec).expect("read"), [], "and they are not those on disk");
    let next = records.clone().since(1);
    assert_eq!(next.marks(&ephemeral).expect("read"), [], "but a soft reboot does");
    next.remember(&ephemeral, &marks).expect("written");
    assert_eq!(next.marks(&ephemeral).expect("read"), std::slice::from_ref(&marks));

    records.remember(&spec, &marks).expect("written");
    records.begin_anew(&spec.name, &Marks::default()).expect("forgotten");
    assert!(!refused(), "it is to begin anew");
    assert_eq!(
        records.known(&[]).expect("listed").stores,
        std::slice::from_ref(&spec),
        "the store itself is not forgotten"
    );

    for older in [serde_json::to_vec(&*spec).expect("written"), b"{".to_vec()] {
        fs::write(&known, older).expect("written");
        assert!(refused(), "of an earlier version, or damaged: it was brought up before");
    }

    assert_eq!(records.known(&[StoreSpec::clone(&spec)]).expect("listed").stores, []);
    assert!(!known.exists(), "it is moved aside");
    assert!(refused(), "and says as much as before");
    records.begin_anew(&spec.name, &Marks::default()).expect("forgotten");
    assert!(!refused());
}

#[test]
fn nothing_is_removed_by_a_record_that_cannot_be_read() {
    let dir = tempfile::tempdir().expect("a directory");
    let records = Records::new(dir.path(), dir.path());
    let (spec, refused) = (spec("t"), || records.refuse_unreadable(&spec("t").name).is_err());
    assert!(!refused(), "there is none");
    records.remember(&spec, &Marks::default()).expect("written");
    assert!(!refused());
    fs::write(records.known_path(&spec.name), "{").expect("written");
    assert!(refused());
    records.known(&[StoreSpec::clone(&spec)]).expect("listed");
    assert!(refused(), "moved aside");
    records.remember(&spec, &Marks::default()).expect("written");
    assert!(!refused(), "it has come up since");
    records.forget(&spec.name).expect("forgotten");
    assert!(!refused() && records.marks(&spec).expect("read").is_empty(), "one of another time says nothing");
}

#[test]
fn what_is_kept_of_a_store_is_for_root_alone() {
    let dir = tempfile::tempdir().expect("a directory");
    let records = Records::new(dir.path(), dir.path());
    let record = records.known_path(&spec("t").name);
    let mode = || fs::metadata(&record).expect("there").permissions().mode() & 0o777;
    records.remember(&spec("t"), &Marks::default()).expect("written");
    assert_eq!(mode(), 0o600, "settings may be secret");
    fs::set_permissions(&record, Permissions::from_mode(0o644)).expect("set");
    records.known(&[]).expect("listed");
    assert_eq!(mode(), 0o600, "also of an earlier version");
}

#[test]
fn what_cannot_be_read_is_not_taken_for_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    let records = Records::new(dir.path(), dir.path());
    assert!(records.known(&[]).is_ok_and(|known| known.stores.is_empty()), "nothing was ever kept");

    for name in ["whole", "declared", "gone"] {
        records.remember(&spec(name), &Marks::default()).expect("written");
    }
    for name in ["declared", "gone"] {
        fs::write(records.known_path(&name.parse().expect("valid")), "{").expect("written");
    }
    for _ in 0..2 {
        let known = records.known(&[StoreSpec::clone(&spec("declared"))]).expect("listed");
        assert_eq!(known.stores, [spec("whole")]);
        assert_eq!(known.unreadable, ["gone"], "and the next time as well");
    }
    assert!(dir.path().join("known/declared.json.unreadable").exists(), "a person may want to look at it");
    assert!(!dir.path().join("known/declared.json").exists());

    let litter = dir.path().join("known/whole.new");
    fs::write(&litter, "").expect("written");
    records.known(&[]).expect("listed");
    assert!(!litter.exists(), "what a daemon was killed over is taken away");

    fs::remove_dir_all(dir.path().join("known")).expect("removed");
    fs::write(dir.path().join("known"), "").expect("written");
    let error = records.known(&[]).expect_err("no directory").to_string();
    assert!(error.contains("would stay mounted and unseen"), "{error}");
}

#[test]
fn a_record_that_is_there_is_kept_without_being_written() {
    let dir = tempfile::tempdir().expect("a directory");
    Records::new(dir.path(), dir.path()).remember(&spec("a"), &Marks::default()).expect("written");
    let records = Records::new(dir.path(), dir.path());
    let silent = records.keep(&spec("a"), &Marks::default()).expect_err("nothing was read yet").to_string();
    assert!(silent.contains("has not answered yet"), "{silent}");
    records.known(&[]).expect("listed");

    // No directory can be made there, whoever asks.
    fs::remove_dir_all(dir.path().join("known")).expect("removed");
    fs::write(dir.path().join("known"), "").expect("written");
    records.keep(&spec("a"), &Marks::default()).expect("as it was found");
    assert!(records.keep(&spec("b"), &Marks::default()).is_err());
    let another = Arc::new(fixture::with(&spec("a"), |terms| terms.required = false));
    assert!(records.keep(&another, &Marks::default()).is_err(), "another one");
}
