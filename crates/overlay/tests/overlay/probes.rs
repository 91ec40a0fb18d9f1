//! What counts as a wrong view. Plain directories stand for the merged one: of a file it has in common with a layer, both have
//! the same inode number, as in an overlay.

use std::{ffi::OsStr, sync::Arc};

use layered_stores_model::AbsolutePath;
use rustix::fs::{CWD, FileType, Mode, XattrFlags, makedev, mknodat};

use super::*;
use probe::{MOST_STALE, Stale, Symptom};

/// Three directories that are gone at the end.
struct View {
    layers: Layers,
    _root: tempfile::TempDir,
}

impl View {
    fn new() -> Self {
        let root = tempfile::tempdir().expect("a directory");
        let at = |tail: &str| -> AbsolutePath {
            let path = root.path().join(tail);
            fs::create_dir(&path).expect("made");
            path.to_str().expect("text").parse().expect("valid")
        };
        let [lower, upper, work, merged] = ["lower", "upper", "work", "merged"].map(at);
        Self { layers: Layers { lower, upper, work, merged, options: Vec::new() }, _root: root }
    }

    /// With a path that is a directory everywhere.
    fn with_directories() -> Self {
        let view = Self::new();
        for dir in [view.lower(""), view.upper(""), view.merged("")] {
            fs::create_dir(dir).expect("made");
        }
        view
    }

    fn lower(&self, below: &str) -> PathBuf {
        at(&self.layers.lower, below)
    }

    fn upper(&self, below: &str) -> PathBuf {
        at(&self.layers.upper, below)
    }

    fn merged(&self, below: &str) -> PathBuf {
        at(&self.layers.merged, below)
    }

    fn symptom(&self) -> Option<Symptom> {
        probe::stale(&self.layers, [PATH]).expect("probed").first().map(|stale| stale.symptom)
    }

    fn all(&self) -> (Vec<Stale>, usize) {
        probe::stale_of_all(&self.layers).expect("listed")
    }
}

/// A path, or what is in it.
fn at(dir: &AbsolutePath, below: &str) -> PathBuf {
    let path = dir.as_path().join(PATH);
    if below.is_empty() { path } else { path.join(below) }
}

fn file(path: &Path) {
    fs::write(path, "").expect("written");
}

/// Has the merged directory show a file of a layer.
fn show(of: &Path, merged: &Path) {
    fs::hard_link(of, merged).expect("linked");
}

fn device(path: &Path, (major, minor): (u32, u32)) {
    mknodat(CWD, path, FileType::CharacterDevice, Mode::RUSR, makedev(major, minor)).expect("made");
}

const WHITEOUT: (u32, u32) = (0, 0);
const NULL: (u32, u32) = (1, 3);

#[test]
fn a_file_is_the_upper_layers_or_else_the_lower_ones() {
    let view = View::new();
    assert_eq!(view.symptom(), None, "it is nowhere");
    file(&view.merged(""));
    assert_eq!(view.symptom(), Some(Symptom::Left));
    file(&view.lower(""));
    assert_eq!(view.symptom(), Some(Symptom::OtherFile));
    fs::remove_file(view.merged("")).expect("removed");
    assert_eq!(view.symptom(), Some(Symptom::Missing));
    show(&view.lower(""), &view.merged(""));
    assert_eq!(view.symptom(), None);
    file(&view.upper(""));
    assert_eq!(view.symptom(), None, "it was copied up, and keeps its number");
    fs::remove_file(view.lower("")).expect("removed");
    assert_eq!(view.symptom(), Some(Symptom::OtherFile), "it comes from no layer");
    fs::remove_file(view.merged("")).expect("removed");
    show(&view.upper(""), &view.merged(""));
    assert_eq!(view.symptom(), None);
    fs::remove_file(view.merged("")).expect("removed");
    fs::create_dir(view.merged("")).expect("made");
    assert_eq!(view.symptom(), Some(Symptom::OtherFile), "it is no directory");
}

#[test]
fn a_whiteout_hides_what_the_lower_store_has_and_other_devices_are_shown() {
    needs_root!();
    let view = View::new();
    file(&view.lower(""));
    device(&view.upper(""), WHITEOUT);
    assert_eq!(view.symptom(), None);
    show(&view.lower(""), &view.merged(""));
    assert_eq!(view.symptom(), Some(Symptom::Left));
    fs::remove_file(view.upper("")).expect("removed");
    device(&view.upper(""), NULL);
    fs::remove_file(view.merged("")).expect("removed");
    assert_eq!(view.symptom(), Some(Symptom::Missing));
    show(&view.upper(""), &view.merged(""));
    assert_eq!(view.symptom(), None);
}

#[test]
fn in_a_directory_of_both_layers_a_whiteout_hides_a_name_and_other_devices_are_names() {
    needs_root!();
    let view = View::with_directories();
    file(&view.lower("a"));
    file(&view.upper("b"));
    show(&view.upper("b"), &view.merged("b"));
    assert_eq!(view.symptom(), Some(Symptom::OtherNames));
    device(&view.upper("a"), WHITEOUT);
    assert_eq!(view.symptom(), None);
    device(&view.upper("c"), NULL);
    assert_eq!(view.symptom(), Some(Symptom::OtherNames));
    show(&view.upper("c"), &view.merged("c"));
    assert_eq!(view.symptom(), None);
}

#[test]
fn an_opaque_directory_hides_the_one_of_the_lower_store() {
    needs_root!();
    let view = View::with_directories();
    file(&view.lower("a"));
    let mark = |value: &[u8]| {
        let upper = view.upper("");
        rustix::fs::setxattr(upper, "trusted.overlay.opaque", value, XattrFlags::empty()).expect("set");
    };
    for (value, symptom) in [(b"x", Some(Symptom::OtherNames)), (b"y", None)] {
        mark(value);
        assert_eq!(view.symptom(), symptom);
    }
    mark(b"");
    assert_eq!(view.symptom(), Some(Symptom::OtherNames));
}

#[test]
fn the_first_file_tells_however_deep_it_lies() {
    let view = View::with_directories();
    for dir in ["empty", "full", "full/deep"] {
        fs::create_dir(view.lower(dir)).expect("made");
        fs::create_dir(view.merged(dir)).expect("made");
    }
    assert_eq!(view.symptom(), None, "there is none");
    file(&view.lower("full/deep/a"));
    assert_eq!(view.symptom(), Some(Symptom::OtherNames));
    file(&view.merged("full/deep/a"));
    assert_eq!(view.symptom(), Some(Symptom::OtherFile));
    fs::remove_file(view.merged("full/deep/a")).expect("removed");
    show(&view.lower("full/deep/a"), &view.merged("full/deep/a"));
    assert_eq!(view.symptom(), None);
    fs::create_dir(view.upper("full")).expect("made");
    file(&view.upper("full/b"));
    show(&view.upper("full/b"), &view.merged("full/b"));
    assert_eq!(view.symptom(), None, "what is in both layers is merged");
}

#[test]
fn what_is_no_directory_in_a_layer_hides_nothing_in_one_above_it() {
    for make in [
        |path: &Path| file(path),
        |path: &Path| mknodat(CWD, path, FileType::Fifo, Mode::RUSR, 0).expect("made"),
        |path: &Path| symlink("/proc/self", path).expect("linked"),
    ] {
        let view = View::with_directories();
        fs::remove_dir(view.lower("")).expect("removed");
        make(&view.lower(""));
        file(&view.upper("a"));
        show(&view.upper("a"), &view.merged("a"));
        assert_eq!(view.symptom(), None);
    }
}

#[test]
fn a_link_that_leads_nowhere_is_there() {
    let view = View::new();
    symlink("/nowhere", view.lower("")).expect("linked");
    assert_eq!(view.symptom(), Some(Symptom::Missing));
    show(&view.lower(""), &view.merged(""));
    assert_eq!(view.symptom(), None);
}

#[test]
fn of_a_tree_without_a_file_the_first_256_directories_are_looked_into() {
    let view = View::with_directories();
    let name = |number: usize| format!("{number:03}");
    let (last_seen, first_unseen) = (name(254), name(255));
    for number in 0..256 {
        fs::create_dir(view.lower(&name(number))).expect("made");
        fs::create_dir(view.merged(&name(number))).expect("made");
    }
    file(&view.lower(&format!("{first_unseen}/a")));
    assert_eq!(view.symptom(), None);
    file(&view.lower(&format!("{last_seen}/a")));
    assert_eq!(view.symptom(), Some(Symptom::OtherNames));
}

#[test]
fn all_names_of_a_directory_are_compared_unless_it_is_too_large() {
    let view = View::with_directories();
    for number in 0..2000 {
        file(&view.lower(&format!("{number:05}")));
        show(&view.lower(&format!("{number:05}")), &view.merged(&format!("{number:05}")));
    }
    file(&view.lower("last"));
    assert_eq!(view.symptom(), Some(Symptom::OtherNames));
    for number in 2000..17_000 {
        file(&view.lower(&format!("{number:05}")));
    }
    assert_eq!(view.symptom(), None, "the first file is right");
    for number in 0..2000 {
        fs::remove_file(view.merged(&format!("{number:05}"))).expect("removed");
    }
    assert_eq!(view.symptom(), Some(Symptom::OtherNames), "it lists nothing");
}

#[test]
fn when_either_layer_is_too_large_to_be_compared_the_first_file_tells() {
    let view = View::with_directories();
    file(&view.lower("a"));
    for number in 0..17_000 {
        file(&view.upper(&format!("b{number}")));
    }
    show(&view.lower("a"), &view.merged("a"));
    assert_eq!(view.symptom(), None);
}

#[test]
fn paths_are_counted_once_and_what_is_right_or_no_path_is_not_told_of() {
    let view = View::new();
    let name = |number: usize| format!("{number:032}-path");
    let file_in = |dir: &AbsolutePath, number: usize| file(&dir.as_path().join(name(number)));
    file_in(&view.layers.lower, 1);
    file_in(&view.layers.upper, 1);
    file_in(&view.layers.upper, 2);
    file_in(&view.layers.merged, 3);
    file(&view.layers.merged.as_path().join(".links"));
    let stale = |number: usize, symptom| Stale { name: name(number).into(), symptom };
    let wrong = vec![stale(1, Symptom::Missing), stale(2, Symptom::Missing), stale(3, Symptom::Left)];
    assert_eq!(view.all(), (wrong, 3));

    let progress = Arc::<Progress>::default();
    Arc::clone(&progress).follow(|| probe::expect_all(&view.layers)).expect("listed");
    assert_eq!(progress.counts(), (0, 3), "the merged directory is not counted");
}

#[test]
fn a_look_at_all_paths_ends_when_more_are_wrong_than_are_told_of() {
    let view = View::new();
    for number in 0..MOST_STALE + 10 {
        file(&view.layers.lower.as_path().join(format!("{number:032}-path")));
    }
    let (stale, probed) = view.all();
    assert_eq!((stale.len(), probed), (MOST_STALE, MOST_STALE));
}

#[test]
fn a_look_into_a_path_ends_when_it_is_called_off() {
    let view = View::with_directories();
    let progress = Arc::<Progress>::default();
    let look = || Arc::clone(&progress).follow(|| probe::stale(&view.layers, [PATH]));
    assert_eq!(look(), Ok(vec![]));
    progress.call_off();
    assert_eq!(look(), Err(Errno::CANCELED));
}

#[test]
fn the_directory_that_cannot_be_looked_at_is_named() {
    let view = View::new();
    let named = || match RefreshError::look(&view.layers, Errno::IO) {
        RefreshError::Look { key, errno, .. } => (key, errno),
        other => panic!("{other}"),
    };
    assert_eq!(named(), ("root", Errno::IO), "it was something below");
    for (key, dir) in
        [("root", &view.layers.merged), ("upper-layer", &view.layers.upper), ("lower-store", &view.layers.lower)]
    {
        fs::remove_dir(dir.as_path()).expect("removed");
        assert_eq!(named(), (key, Errno::NOENT));
    }
}

#[test]
fn what_is_wrong_is_told_in_words_and_with_a_name_that_is_text() {
    let name = OsStr::from_bytes(b"00000000000000000000000000000000-\xff").to_owned();
    let told = [
        (Symptom::Missing, "missing from the merged directory"),
        (Symptom::Left, "still in the merged directory"),
        (Symptom::OtherFile, "another file"),
        (Symptom::OtherNames, "other names"),
    ];
    for (symptom, words) in told {
        let told = Stale { name: name.clone(), symptom }.to_string();
        assert!(told.starts_with(r"00000000000000000000000000000000-\xff: ") && told.contains(words), "{told}");
    }
}
