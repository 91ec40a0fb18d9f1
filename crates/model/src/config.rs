//! The configuration: TOML text in, a stack of stores out.
//!
//! Parsing is apart from reading files, so that the daemon, `check-config` and the tests see the same text in the
//! same way. Every mistake in a text is reported, not only the first.

pub(crate) mod fields;
pub(crate) mod keys;
mod reader;

use std::{
    fmt,
    path::{Path, PathBuf},
};

pub use keys::Key;
use toml::de::DeTable;

use self::reader::{About, Reader};
use crate::{AbsolutePath, StoreSpec};

/// Where the configuration is read from when nothing else is said.
pub const DEFAULT_PATH: &str = "/etc/layered-stores/config.toml";

/// Where stores keep what the configuration gives no place of its own.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/layered-stores";

/// Where notes are kept until the next boot.
pub const DEFAULT_RUNTIME_DIR: &str = "/run/layered-stores";

/// What a configuration's defaults are made from.
#[derive(Clone, Debug)]
pub struct Defaults {
    /// `<state>/stores/<name>/{root,upper,work}` is used where a store names no directory.
    pub state_dir: AbsolutePath,
    /// The executable that Nix is told to call as remount hook.
    pub remount_hook: AbsolutePath,
}

/// How mistakes name keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keys {
    /// By themselves.
    Alone,
    /// Beside each the option of the NixOS module that writes it, for who has never seen the file.
    WithNixosOptions,
}

/// A configuration that has passed every check that can be made without the machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// The stores, each after the one it lies on.
    pub stores: Vec<StoreSpec>,
}

/// One mistake in a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// The store it is about, if it is about one.
    pub store: Option<String>,
    /// The key, with `daemon.` before it for one of a Nix daemon's.
    pub key: Option<String>,
    /// The value that was refused, if it is a text.
    pub value: Option<String>,
    /// The store, key and value, what is wrong with them, and the way out.
    pub message: String,
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The text holds mistakes.
    #[error("{}", list(path, diagnostics))]
    Invalid {
        /// The file.
        path: PathBuf,
        /// All mistakes, in the order of the text.
        diagnostics: Vec<Diagnostic>,
    },
}

fn list(path: &Path, diagnostics: &[Diagnostic]) -> String {
    let line = |d: &Diagnostic| format!("{}:{d}", path.display());
    diagnostics.iter().map(line).collect::<Vec<_>>().join("\n")
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.line, self.column, self.message)
    }
}

/// Reads and checks a configuration file. A file that does not exist declares no stores.
///
/// # Errors
/// [`ConfigError`] when the file cannot be read or holds mistakes.
pub fn load(path: &Path, defaults: &Defaults, keys: Keys) -> Result<Config, ConfigError> {
    match std::fs::read_to_string(path) {
        Ok(text) => parse(&text, defaults, keys)
            .map_err(|diagnostics| ConfigError::Invalid { path: path.to_owned(), diagnostics }),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Config::default()),
        Err(source) => Err(ConfigError::Read { path: path.to_owned(), source }),
    }
}

/// The names that a configuration file declares, whatever else is in it: no check is made, and what cannot be read declares
/// nothing.
pub fn declared_names(path: &Path) -> Vec<String> {
    let Ok(text) = std::fs::read_to_string(path) else { return Vec::new() };
    let Ok(document) = DeTable::parse(&text) else { return Vec::new() };
    let stores = document.get_ref().get("stores").and_then(|stores| stores.get_ref().as_table());
    stores.into_iter().flatten().map(|(name, _)| name.get_ref().to_string()).collect()
}

/// Checks a configuration's text.
///
/// # Errors
/// All mistakes, in the order of the text.
pub fn parse(text: &str, defaults: &Defaults, keys: Keys) -> Result<Config, Vec<Diagnostic>> {
    let mut reader = Reader { text, defaults, keys, diagnostics: Vec::new() };
    let config = match DeTable::parse(text) {
        Ok(document) => reader.document(document.get_ref()),
        Err(error) => {
            reader.report(error.span().unwrap_or_default(), About::default(), error.message().to_owned());
            Config::default()
        }
    };
    if reader.diagnostics.is_empty() {
        Ok(config)
    } else {
        reader.diagnostics.sort_by_key(|d| (d.line, d.column));
        Err(reader.diagnostics)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn defaults() -> Defaults {
        Defaults {
            state_dir: DEFAULT_STATE_DIR.parse().expect("valid"),
            remount_hook: "/usr/bin/layered-stores-remount".parse().expect("valid"),
        }
    }

    fn mistakes(text: &str) -> Vec<String> {
        parse(text, &defaults(), Keys::Alone).expect_err("mistakes").iter().map(ToString::to_string).collect()
    }

    #[test]
    fn nothing_declares_nothing() {
        for text in ["", "\n# nothing\n", "[stores]\n"] {
            assert_eq!(parse(text, &defaults(), Keys::Alone), Ok(Config::default()), "{text:?}");
        }
    }

    #[test]
    fn every_directory_has_a_default_below_the_state_dir() {
        let config = parse("[stores.ci]\nlower-store = \"daemon\"\n", &defaults(), Keys::Alone).expect("valid");
        let ci = &config.stores[0];
        assert_eq!(ci.layers.lower.as_str(), "/nix/store");
        assert_eq!(ci.root.as_str(), "/var/lib/layered-stores/stores/ci/root");
        assert_eq!(ci.layers.upper.as_str(), "/var/lib/layered-stores/stores/ci/upper");
        assert_eq!(ci.layers.work.as_str(), "/var/lib/layered-stores/stores/ci/work");
        assert_eq!(ci.layers.merged.as_str(), "/var/lib/layered-stores/stores/ci/root/nix/store");
        assert_eq!(ci.state_dir.as_str(), "/var/lib/layered-stores/stores/ci/root/nix/var/nix");
        assert!(ci.required && ci.autostart);
    }

    #[test]
    fn mistakes_name_line_column_store_key_value_and_the_way_out() {
        for (text, expected) in [
            ("[stores.ci]\nlower-store = \"a\"b\n", "2:18: unexpected key or value, expected newline, `#`"),
            ("[stors.ci]\n", "1:2: unknown key \"stors\"; did you mean \"stores\"?"),
            ("stores = 1\n", "1:10: key \"stores\": a table is expected here, not an integer; write [stores.NAME]"),
            (
                "[stores.ci]\nlower-store = \"/l\"\nuper-layer = \"/u\"\n",
                "3:1: store \"ci\": unknown key \"uper-layer\"; did you mean \"upper-layer\"?",
            ),
            (
                "[stores.ci]\nlower-store = \"/l\"\nlower = 1\n",
                "3:1: store \"ci\": unknown key \"lower\"; did you mean \"lower-store\"?",
            ),
            (
                "[stores.ci]\nlower-store = \"/l\"\nmount-options = [\"ro\"]\n",
                "3:18: store \"ci\": mount-options: \"ro\" is not among the mount options that can be chosen: noatime, \
                 nodiratime, relatime, strictatime, noexec",
            ),
            (
                "[stores.ci]\nlower-store = \"/l\"\nephemeral-size = \"2GB\"\n",
                "3:18: store \"ci\": ephemeral-size = \"2GB\": a size is a number of bytes, with K, M, G or T behind it for \
                 powers of 1024, or a part of the memory from \"1%\" to \"100%\"",
            ),
            (
                "[stores.ci]\nlower-store = \"/l\"\nephemeral-size = \"2G\"\nroot = \"/r\"\n",
                "4:8: store \"ci\": root = \"/r\": an ephemeral store has all of its directories on a filesystem of its \
                 own; take this away, or ephemeral-size",
            ),
            (
                "[stores.ci]\nlower-store = \"/l\"\n[stores.ci.daemon]\nsocket-pth = \"/s\"\n",
                "4:1: store \"ci\": unknown key \"daemon.socket-pth\"; did you mean \"socket-path\"?",
            ),
            (
                "[stores.ci]\nlower-store = \"/l\"\n[stores.ci.daemon]\nallowed-users = [\"a b\"]\n",
                "4:18: store \"ci\": daemon.allowed-users: \"a b\" is not a user's name, a group's as \"@group\", or \"*\" for \
                 everybody",
            ),
            (
                "[stores.ci]\nlower-store = \"/l\"\ndaemon.settings.store = \"daemon\"\n",
                "3:25: store \"ci\": daemon.settings.store: the daemon is given its store by itself; take the setting away",
            ),
            (
                "[stores.a]\nlower-store = \"/l\"\ndaemon.socket-path = \"/s\"\n[stores.b]\nlower-store = \"/l\"\ndaemon.socket-path = \"/s\"\n",
                "6:22: store \"b\": daemon.socket-path = \"/s\": it is also the socket of store \"a\"; give each a socket of its \
                 own",
            ),
            (
                "[stores.ci]\n",
                "1:9: store \"ci\": key \"lower-store\" is missing; name the store underneath, for example \"daemon\"",
            ),
            (
                "[stores.CI]\nlower-store = \"/l\"\n",
                "1:9: store \"CI\": the name holds 'C'; use lower-case letters, digits and '-' only",
            ),
            (
                "[stores.ci]\nlower-store = [\"/l\"]\n",
                "2:15: store \"ci\": lower-store: a string is expected here, not an array",
            ),
            (
                "[stores.ci]\nlower-store = \"/l\"\nupper-layer = \"up\"\n",
                "3:15: store \"ci\": upper-layer = \"up\": the path is relative; give an absolute path",
            ),
            (
                "[stores.ci]\nlower-store = \"ssh://host\"\n",
                "2:15: store \"ci\": lower-store = \"ssh://host\": a \"ssh\" store has no directory on this machine; \
                 an overlay needs one: use a root directory, \"daemon\", \"local\" or \"layered:NAME\"",
            ),
            (
                "[stores.ci]\nlower-store = \"/l\"\nmode = \"0777\"\n",
                "3:8: store \"ci\": mode = \"0777\": everybody could write into the store; take the last digit's 2 away",
            ),
            (
                "[stores.ci]\nlower-store = \"/l\"\nmode = 755\n",
                "3:8: store \"ci\": mode: a string is expected here, not an integer; write \"755\"",
            ),
            (
                "[stores.ci]\nlower-store = \"/l\"\nrequired = \"true\"\n",
                "3:12: store \"ci\": required: true or false is expected here, not a string; write true",
            ),
            (
                "[stores.ci]\nlower-store = \"/l\"\nrequired = \"yes\"\n",
                "3:12: store \"ci\": required: true or false is expected here, not a string",
            ),
            (
                "[stores.a]\nlower-store = \"/l\"\n[stores.b]\nlower-store = \"/l\"\nwork-dir = \"/var/lib/layered-stores/stores/a/work\"\n",
                "5:12: store \"b\": work-dir = \"/var/lib/layered-stores/stores/a/work\": it is also the work-dir of \
                 store \"a\" (/var/lib/layered-stores/stores/a/work); give each a directory of its own",
            ),
            (
                "[stores.a]\nlower-store = \"layered:b\"\n",
                "2:15: store \"a\": lower-store = \"layered:b\": no store \"b\" is declared here; declare it, or name another",
            ),
        ] {
            assert_eq!(mistakes(text), [expected], "{text}");
        }
    }

    #[test]
    fn who_writes_something_else_is_told_which_keys_there_are() {
        let keys: Vec<_> = crate::Declaration::KEYS.iter().map(Key::word).collect();
        let expected = format!("3:1: store \"ci\": unknown key \"quota\"; the keys are {}", keys.join(", "));
        assert_eq!(mistakes("[stores.ci]\nlower-store = \"/l\"\nquota = 1\n"), [expected]);
        assert!(keys.starts_with(&["lower-store", "root"]) && keys.ends_with(&["daemon"]), "{keys:?}");
    }

    #[test]
    fn mistakes_name_the_nixos_option_beside_the_key() {
        let text = "[stores.ci]\nupper-layer = \"up\"\nworkdir = \"/w\"\nrequired = 1\nmount-options = [\"ro\"]\n\
                    daemon.settings.max-free = 1\n[stores.a]\nlower-store = \"layered:b\"\n[stors]\n";
        let mistakes = parse(text, &defaults(), Keys::WithNixosOptions).expect_err("mistakes");
        let ci = "services.layeredStores.stores.ci";
        let expected = [
            format!(
                "store \"ci\": key \"lower-store\" ({ci}.lowerStore) is missing; name the store underneath, for example \"daemon\""
            ),
            format!("store \"ci\": upper-layer ({ci}.upperLayer) = \"up\": the path is relative; give an absolute path"),
            "store \"ci\": unknown key \"workdir\" (services.layeredStores.settings.stores.ci.workdir); did you mean \
             \"work-dir\"?"
                .to_owned(),
            format!("store \"ci\": required ({ci}.required): true or false is expected here, not an integer"),
            format!(
                "store \"ci\": mount-options ({ci}.mountOptions): \"ro\" is not among the mount options that can be chosen: \
                 noatime, nodiratime, relatime, strictatime, noexec"
            ),
            format!(
                "store \"ci\": daemon.settings.max-free ({ci}.daemon.settings.max-free): Nix counts wrongly how much is freed \
                 in a layered store, and would delete more than is asked for; take the setting away"
            ),
            "store \"a\": lower-store (services.layeredStores.stores.a.lowerStore) = \"layered:b\": no store \"b\" is declared \
             here; declare it, or name another"
                .to_owned(),
            "unknown key \"stors\" (services.layeredStores.settings.stors); did you mean \"stores\"?".to_owned(),
        ];
        assert_eq!(mistakes.into_iter().map(|mistake| mistake.message).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn all_mistakes_are_reported_in_the_order_of_the_text() {
        let text = "[stores.b]\nroot = 1\n[stores.a]\nlower-store = \"/l\"\nworkdir = \"/w\"\n";
        let lines: Vec<_> = mistakes(text).iter().map(|m| m.split(':').next().map(str::to_owned)).collect();
        assert_eq!(lines, [Some("1".into()), Some("2".into()), Some("5".into())]);
    }

    proptest! {
        /// Whatever is written: it is read as it is written, or refused where it is written, with its name.
        #[test]
        fn what_is_written_is_read_or_refused_where_it_stands(
            stores in prop::collection::btree_map(
                "[a-z][a-z-]{0,2}|-[a-zé]",
                ("(/[a-z.]{1,3}){1,2}|daemon|[a-zé:]{0,3}", "0?[1-7][0-7]{0,2}|[0-9]{0,5}"),
                0..3,
            ),
        ) {
            let mut text = String::new();
            for (name, (lower, mode)) in &stores {
                text += &format!("[stores.\"{name}\"]\nlower-store = \"{lower}\"\nmode = \"{mode}\"\n");
            }
            match parse(&text, &defaults(), Keys::Alone) {
                Ok(config) => {
                    prop_assert_eq!(config.stores.len(), stores.len());
                    for spec in config.stores {
                        let (lower, mode) = &stores[spec.name.as_str()];
                        prop_assert_eq!(&spec.lower_store.to_string(), lower);
                        prop_assert_eq!(spec.ownership.mode, u32::from_str_radix(mode, 8).ok());
                    }
                }
                Err(mistakes) => {
                    prop_assert!(!mistakes.is_empty());
                    for mistake in mistakes {
                        let Some(line) = text.lines().nth(mistake.line - 1) else { panic!("there is no line {}", mistake.line) };
                        let value = mistake.value.unwrap_or_default();
                        prop_assert!(line.contains(&value), "{value:?} is not in {line:?}");
                        prop_assert!(mistake.store.is_some_and(|store| stores.contains_key(&store)), "{}", mistake.message);
                    }
                }
            }
        }
    }

    #[test]
    fn a_mistake_says_what_it_is_about() {
        let text = "[stores.ci]\nlower-store = \"daemon\"\nmode = \"9\"\nrequired = 1\n\n\
                    [stores.ci.daemon]\nsocket = \"x\"\nallowed-users = [\"a b\"]\n";
        let mistakes = parse(text, &defaults(), Keys::Alone).expect_err("mistakes");
        let about = |d: &Diagnostic| (d.line, d.store.clone(), d.key.clone(), d.value.clone());
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(
            mistakes.iter().map(about).collect::<Vec<_>>(),
            [
                (3, some("ci"), some("mode"), some("9")),
                (4, some("ci"), some("required"), None),
                (7, some("ci"), some("daemon.socket"), None),
                (8, some("ci"), some("daemon.allowed-users"), some("a b")),
            ]
        );
        let mistakes = parse("[stores", &defaults(), Keys::Alone).expect_err("mistakes");
        assert_eq!(mistakes.iter().map(about).collect::<Vec<_>>(), [(1, None, None, None)]);
    }
}
