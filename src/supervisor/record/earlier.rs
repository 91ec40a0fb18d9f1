//! Records that other versions have written: no store is lost with an upgrade.

use layered_stores_model::fixture;

use super::*;

/// Word by word what version 0.1.0 writes. It stays as it is.
const TEXT: &str = include_str!("earlier.json");

/// What was declared then.
const DECLARED: &str = "
[stores.base]
lower-store = \"daemon\"
[stores.ci]
lower-store = \"layered:base\"
root = \"/srv/ci/root\"
group = \"ci\"
required = false
mount-options = [\"noatime\"]
[stores.ci.daemon]
allowed-users = [\"@ci\"]
settings = { max-jobs = 2 }
";

fn known(text: &str) -> Known {
    let dir = tempfile::tempdir().expect("a directory");
    fs::create_dir(dir.path().join("known")).expect("made");
    fs::write(dir.path().join("known/ci.json"), text).expect("written");
    Records::new(dir.path(), dir.path()).known(&[]).expect("listed")
}

#[test]
fn a_record_of_the_first_version_is_read() {
    let ci = fixture::declared("/state", DECLARED)
        .into_iter()
        .find(|spec| spec.name.as_str() == "ci")
        .expect("it is declared");
    // With that group it cannot be declared any more.
    let ci = fixture::with(&ci, |terms| terms.ownership.mode = Some(0o1775));
    let known = known(TEXT);
    assert_eq!((known.stores, known.unreadable), (vec![Arc::new(ci)], Vec::<String>::new()));
}

#[test]
fn an_earlier_version_reads_what_is_written_now() {
    let then: serde_json::Map<String, serde_json::Value> = serde_json::from_str(TEXT).expect("JSON");
    let record: Record = serde_json::from_str(TEXT).expect("read");
    let now = serde_json::to_value(&record).expect("written");
    for (key, value) in then {
        assert_eq!(now[&key], value, "{key}");
    }
}

#[test]
fn a_store_from_somewhere_that_is_not_known_is_left_alone() {
    let record: Record = serde_json::from_str(TEXT).expect("read");
    let text = serde_json::to_string(&record).expect("written");
    assert_eq!(known(&text).stores.len(), 1);
    let later = text.replace("\"source\":\"configuration\"", "\"source\":\"somewhere\"");
    assert_ne!(later, text);
    let known = known(&later);
    assert_eq!((known.stores, known.unreadable), (Vec::new(), vec!["ci".to_owned()]));
}
