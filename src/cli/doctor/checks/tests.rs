use layered_stores_client::Properties;
use serde_json::json;

use super::*;
use crate::cli::fixture::store;

/// A machine on which all is well.
fn well() -> Facts {
    Facts {
        kernel: "6.18.44-amd64".to_owned(),
        filesystems: "nodev\tproc\nnodev\toverlay\n\text4\n".to_owned(),
        mount: Some("mount from util-linux 2.38.1 (libmount 2.38.1)".to_owned()),
        nix: Some("nix (Nix) 2.26.3\n".to_owned()),
        settings: Some(json!({
            "experimental-features": {"value": ["local-overlay-store", "nix-command"]},
            "auto-optimise-store": {"value": false},
            "min-free": {"value": 0},
            "store": {"value": "auto"},
        })),
        declared: vec!["ci".to_owned()],
        stores: Ok(vec![store("ci")]),
        lower: vec![("/nix/store".to_owned(), Some(0xef53))],
        has_module: false,
        mistakes: None,
        mounts: String::new(),
        daemon_mounts: None,
    }
}

/// What is found on a machine that is not well in one regard.
fn found(change: impl FnOnce(&mut Facts)) -> Vec<(&'static str, Verdict, String)> {
    let mut facts = well();
    change(&mut facts);
    let findings = all(&facts).into_iter().filter(|finding| finding.verdict != Verdict::Right);
    let shown = |finding: Finding| (finding.check, finding.verdict, format!("{}; {}", finding.message, finding.cure));
    findings.map(shown).collect()
}

#[track_caller]
fn assert_found(change: impl FnOnce(&mut Facts), check: &str, verdict: Verdict, words: &str) {
    let found = found(change);
    let [(of, as_found, said)] = &found[..] else { panic!("not one thing: {found:?}") };
    assert_eq!((*of, *as_found), (check, verdict), "{said}");
    assert!(said.contains(words), "{said}");
}

#[test]
fn where_all_is_well_nothing_is_wrong() {
    assert_eq!(found(|_| ()), []);
    assert_eq!(all(&well()).len(), 7);
}

#[test]
fn what_is_older_than_it_should_be_is_said() {
    use Verdict::{Note, Unknown, Wrong};
    assert_found(|facts| facts.kernel = "6.1.0-30".to_owned(), "kernel", Note, "Linux 6.5 or newer");
    assert_found(|facts| facts.kernel = "odd".to_owned(), "kernel", Unknown, "odd");
    assert_found(|facts| facts.nix = Some("nix (Nix) 2.25.5".to_owned()), "nix", Wrong, "2.26 or newer");
    assert_found(|facts| facts.nix = Some("nix (Lix, like Nix) 2.93.0".to_owned()), "nix", Wrong, "no layered stores");
    assert_found(|facts| facts.nix = None, "nix", Wrong, "install Nix");
    assert_eq!(found(|facts| facts.nix = Some("nix (Nix) 3.0.0".to_owned())), []);
    let newer = |facts: &mut Facts| facts.mount = Some("mount from util-linux 2.41.5 (libmount 2.41.5)".to_owned());
    assert_found(newer, "mount(8)", Note, "layered-stores-remount");
    assert_found(|facts| facts.mount = None, "mount(8)", Unknown, "cannot be run");
}

#[test]
fn a_kernel_without_overlayfs_is_said() {
    let without = |facts: &mut Facts| facts.filesystems = "nodev\toverlayish\n\text4\n".to_owned();
    assert_found(without, "overlayfs", Verdict::Wrong, "CONFIG_OVERLAY_FS");
    let with_module = |facts: &mut Facts| {
        without(facts);
        facts.has_module = true;
    };
    assert_eq!(found(with_module), []);
}

#[test]
fn settings_that_hurt_are_named() {
    let set = |name: &'static str, value: serde_json::Value| {
        move |facts: &mut Facts| facts.settings.as_mut().expect("settings")[name]["value"] = value
    };
    let wrong = Verdict::Wrong;
    assert_found(set("auto-optimise-store", json!(true)), "nix settings", wrong, "auto-optimise-store");
    assert_found(set("min-free", json!(1)), "nix settings", wrong, "min-free");
    assert_found(set("experimental-features", json!(["flakes"])), "nix settings", wrong, "local-overlay-store");
    let served = |facts: &mut Facts| {
        set("experimental-features", json!([]))(facts);
        facts.stores = Ok(vec![Properties { daemon_uri: "unix:///s".to_owned(), ..store("ci") }]);
    };
    assert_found(served, "nix settings", Verdict::Note, "local-overlay-store");
    let store = json!("local-overlay://?remount-hook=/usr/local/bin/mine");
    assert_found(set("store", store), "nix settings", wrong, "another remount hook");
    let ours = json!("local-overlay://?remount-hook=/usr/bin/layered-stores-remount");
    assert_eq!(found(set("store", ours)), []);
    assert_found(|facts| facts.settings = None, "nix settings", Verdict::Unknown, "config show");
}

#[test]
fn the_daemon_and_its_configuration_are_looked_at() {
    let wrong = Verdict::Wrong;
    assert_found(
        |facts| facts.mistakes = Some("1:1: x\n2:2: y".to_owned()),
        "configuration",
        wrong,
        "1:1: x; `layered-stores check",
    );
    assert_found(|facts| facts.stores = Err("it is not running".to_owned()), "stores", wrong, "it is not running");
    assert_found(|facts| facts.declared.push("new".to_owned()), "stores", wrong, "has not read new yet");
    let full = |facts: &mut Facts| {
        let problems = vec![("full".to_owned(), "no room".to_owned())];
        facts.stores = Ok(vec![Properties { problems, ..store("ci") }]);
    };
    assert_found(full, "stores", wrong, "`layered-stores status ci`");
    let none = |facts: &mut Facts| (facts.declared, facts.stores) = (Vec::new(), Ok(Vec::new()));
    assert_found(none, "configuration", Verdict::Note, "declares no stores");
}

#[test]
fn a_lower_store_on_a_filesystem_that_does_not_tell_is_named() {
    let of = |of: Option<FsWord>| move |facts: &mut Facts| facts.lower = vec![("/mnt/lower".to_owned(), of)];
    for (of_lower, name) in [(0x6969, "NFS"), (0x6573_5546, "FUSE"), (0x0102_1997, "9p"), (0xff53_4d42, "CIFS")] {
        assert_found(of(Some(of_lower)), "lower store", Verdict::Note, name);
    }
    assert_found(of(None), "lower store", Verdict::Unknown, "/mnt/lower does not answer");
}

#[test]
fn what_was_mounted_by_hand_is_named() {
    let line =
        |point: &str, options: &str| format!("30 1 0:20 / {point} rw,relatime shared:1 - overlay overlay {options}\n");
    let by_hand = "rw,lowerdir=/nix/store,upperdir=/u,workdir=/w";
    for (point, options, is_named) in [
        ("/x/nix/store", by_hand, true),
        ("/s/ci/root/nix/store", by_hand, false),
        ("/var/lib/docker/overlay2/x/merged", by_hand, false),
        ("/x/nix/store", "rw,lowerdir=/base,upperdir=/u,workdir=/w", false),
    ] {
        let mounted = |facts: &mut Facts| facts.mounts = line(point, options).repeat(2);
        if is_named {
            assert_found(mounted, "mounts", Verdict::Note, point);
        } else {
            assert_eq!(found(mounted), [], "{point}");
        }
    }
}

#[test]
fn a_nix_daemon_that_sees_no_new_mounts_is_named() {
    let line = |propagation: &str| {
        format!("30 1 0:20 / /s/ci/root/nix/store rw{propagation} - overlay overlay rw,lowerdir=/nix/store\n")
    };
    for (propagation, is_cut_off) in [("", true), (" shared:7", false), (" master:7", false)] {
        let mounts = |facts: &mut Facts| facts.daemon_mounts = Some(line(propagation));
        if is_cut_off {
            assert_found(mounts, "nix-daemon", Verdict::Wrong, "an old one of ci");
        } else {
            assert_eq!(found(mounts), []);
        }
    }
}
