//! The table of keys: what is made from it is current, and what it says of reading holds.
//!
//! `UPDATE_EXPECT=1 cargo test -p layered-stores-model --test keys` writes what is made from it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use layered_stores_model::{
    Declaration, MountOption, NixDaemon, StoreSpec,
    config::{self, DEFAULT_STATE_DIR, Defaults, Key, Keys},
};
use serde_json::{Value, json};

const END: &str = "<!-- end -->\n";

/// A file of the repository has the text it should have, or is given it where that was asked for.
fn expect(path: &Path, text: &str) {
    if std::env::var_os("UPDATE_EXPECT").is_some() {
        fs::write(path, text).expect("written");
    }
    let how = "UPDATE_EXPECT=1 cargo test -p layered-stores-model --test keys";
    let found = fs::read_to_string(path).unwrap_or_default();
    assert!(found == text, "{} is not what the table of keys says: run {how}", path.display());
}

/// Tests run in the directory of their crate, which may have been moved since it was built.
fn repository(tail: &str) -> PathBuf {
    Path::new("../..").join(tail)
}

/// The first paragraph, which is all that a table has room for.
fn summary(key: &Key) -> &str {
    key.description.split("\n\n").next().unwrap_or_default()
}

fn table(keys: &[Key]) -> String {
    let row = |key: &Key| {
        let name = match key.section {
            "" => format!("`{}`", key.word()),
            section => format!("[`{}`]({section})", key.word()),
        };
        format!("| {name} | {} | {} | {} |\n", key.kind, key.default, summary(key))
    };
    format!(
        "| key | type | default | meaning |\n| --- | --- | --- | --- |\n{}",
        keys.iter().map(row).collect::<String>()
    )
}

#[test]
fn the_manual_has_the_tables() {
    let page = repository("docs/configuration.md");
    let mut text = fs::read_to_string(&page).expect("the page");
    for (file, keys) in [("declaration.rs", Declaration::KEYS), ("nix_daemon.rs", NixDaemon::KEYS)] {
        let mark = format!("<!-- made from crates/model/src/{file} -->\n");
        let start = text.find(&mark).expect("a mark") + mark.len();
        let end = start + text[start..].find(END).expect("an end");
        text.replace_range(start..end, &table(keys));
    }
    expect(&page, &text);
}

/// A text as the documentation of NixOS has it: keys are options there, and manual pages have a role of their own.
fn on_nixos(text: &str) -> String {
    let written = |text: String, key: &Key| {
        let options: Vec<_> = key.options.iter().map(|option| format!("{{option}}`{option}`")).collect();
        text.replace(&format!("`{}`", key.name), &options.join(" and "))
    };
    Key::all().fold(text.to_owned(), written).replace("nix.conf(5)", "{manpage}`nix.conf(5)`")
}

fn example(key: &Key) -> Value {
    let table: toml::Table = toml::from_str(&format!("example = {}", key.example)).expect("TOML");
    serde_json::to_value(&table["example"]).expect("a value")
}

#[test]
fn the_module_has_its_words_from_the_table() {
    let words = |key: &Key| {
        let of_it = json!({
            "options": key.options,
            "default": on_nixos(key.default),
            "description": on_nixos(key.description),
            "example": example(key),
        });
        (key.name.to_owned(), of_it)
    };
    let all: Value = Key::all().map(words).collect::<serde_json::Map<_, _>>().into();
    expect(&repository("module/keys.json"), &format!("{all:#}\n"));
}

fn parse(text: &str) -> StoreSpec {
    let defaults = Defaults {
        state_dir: DEFAULT_STATE_DIR.parse().expect("valid"),
        remount_hook: "/usr/bin/layered-stores-remount".parse().expect("valid"),
    };
    let config = config::parse(text, &defaults, Keys::Alone).unwrap_or_else(|mistakes| panic!("{text}: {mistakes:?}"));
    config.stores.into_iter().next().expect("a store")
}

/// A store that is declared with a key, and the same without it.
fn with_and_without(key: &Key, value: &str) -> (StoreSpec, StoreSpec) {
    let lower = if key.name == "lower-store" { "" } else { "lower-store = \"/l\"\n" };
    let table = if key.name == key.word() { "" } else { "[stores.ci.daemon]\n" };
    let with = parse(&format!("[stores.ci]\n{lower}{table}{} = {value}\n", key.word()));
    (with, parse(&format!("[stores.ci]\nlower-store = \"/l\"\n{table}")))
}

#[test]
fn every_example_is_read_and_changes_something() {
    for key in Key::all() {
        let (with, without) = with_and_without(key, key.example);
        assert_ne!(with, without, "{} = {} is what holds without it, or is not read", key.name, key.example);
    }
}

#[test]
fn every_default_that_is_a_value_is_what_holds_without_it() {
    let mut values = 0;
    for key in Key::all() {
        let Some(value) = key.default.strip_prefix('`').and_then(|text| text.strip_suffix('`')) else { continue };
        // What is in between is no value: the sentence has several.
        if value.contains('`') {
            continue;
        }
        let value = value.replace("<state>", DEFAULT_STATE_DIR).replace("<name>", "ci");
        let value = if value.starts_with('/') { format!("{value:?}") } else { value };
        let (with, without) = with_and_without(key, &value);
        assert_eq!(with, without, "{}", key.name);
        values += 1;
    }
    assert!(values > 10, "{values}: most defaults are values");
}

#[test]
fn every_mount_option_is_named() {
    let named = MountOption::ALL.map(|option| format!("`{option}`")).join(", ");
    let key = Key::all().find(|key| key.name == "mount-options").expect("the key");
    assert_eq!(key.kind, format!("list of {named}"));
}

#[test]
fn texts_are_sentences() {
    for key in Key::all() {
        for paragraph in key.description.split("\n\n").filter(|paragraph| !paragraph.ends_with("one of")) {
            assert!(paragraph.ends_with('.'), "{}: {paragraph}", key.name);
        }
        assert!(!summary(key).contains('\n'), "{}: a table has no room for a list", key.name);
        for text in [key.kind, key.default, summary(key)] {
            assert!(!text.contains('|'), "{}: {text}", key.name);
        }
    }
}
