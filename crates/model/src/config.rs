//! The configuration: TOML text in, a stack of stores out.
//!
//! Parsing is apart from reading files, so that the daemon, `check-config` and the tests see the same text in the
//! same way. Every mistake in a text is reported, not only the first.

use std::{
    collections::BTreeMap,
    fmt,
    ops::Range,
    path::{Path, PathBuf},
};

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use crate::{
    AbsolutePath, Conflict, Declaration, Ephemeral, EphemeralSize, MAX_SOCKET_PATH_LEN, MountOption, NixDaemon,
    Ownership, StoreName, StoreSpec, nearest, nixos_option, refuse_setting, refuse_user, stack,
};

/// Where the configuration is read from when nothing else is said.
pub const DEFAULT_PATH: &str = "/etc/layered-stores/config.toml";

/// Where stores keep what the configuration gives no place of its own.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/layered-stores";

/// Where notes are kept until the next boot.
pub const DEFAULT_RUNTIME_DIR: &str = "/run/layered-stores";

/// The keys of `[stores.NAME]`.
pub(crate) const STORE_KEYS: [&str; 12] = [
    "lower-store",
    "root",
    "upper-layer",
    "work-dir",
    "owner",
    "group",
    "mode",
    "required",
    "autostart",
    "mount-options",
    "ephemeral-size",
    "daemon",
];

/// The keys of `[stores.NAME.daemon]`.
pub(crate) const DAEMON_KEYS: [&str; 5] = ["socket-path", "socket-mode", "allowed-users", "trusted-users", "settings"];

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

/// Walks the parsed document and collects mistakes.
struct Reader<'a> {
    text: &'a str,
    defaults: &'a Defaults,
    keys: Keys,
    diagnostics: Vec<Diagnostic>,
}

/// What a mistake is about.
#[derive(Default)]
struct About<'m> {
    store: Option<&'m str>,
    key: Option<&'m str>,
    value: Option<&'m str>,
}

impl<'m> About<'m> {
    fn store(store: &'m str) -> Self {
        Self { store: Some(store), ..Self::default() }
    }

    fn key(store: &'m str, key: &'m str) -> Self {
        Self { key: Some(key), ..Self::store(store) }
    }
}

/// Where the values of one store stand in the text.
struct Places {
    name: StoreName,
    store: Range<usize>,
    keys: Vec<(String, Range<usize>)>,
}

impl Reader<'_> {
    fn document(&mut self, document: &DeTable<'_>) -> Config {
        let mut declarations = Vec::new();
        let mut places = Vec::new();
        for (key, value) in document {
            if key.get_ref() != "stores" {
                self.unknown_key(None, "", key, &["stores"]);
            } else if let Some(stores) = value.get_ref().as_table() {
                for (name, value) in stores {
                    if let Some((declaration, place)) = self.store(name, value) {
                        declarations.push(declaration);
                        places.push(place);
                    }
                }
            } else {
                let message = format!("key \"stores\": a table is expected here, not {}", kind(value.get_ref()));
                let about = About { key: Some("stores"), ..About::default() };
                self.report(value.span(), about, format!("{message}; write [stores.NAME]"));
            }
        }
        match stack(declarations, &self.defaults.remount_hook) {
            Ok(stores) => Config { stores },
            Err(conflicts) => {
                // References are checked on what could be read; with mistakes before, a missing store may be one of
                // those, and reporting it again would only confuse.
                for conflict in conflicts {
                    self.conflict(&conflict, &places);
                }
                Config::default()
            }
        }
    }

    fn conflict(&mut self, conflict: &Conflict, places: &[Places]) {
        let Some(place) = places.iter().find(|place| place.name == conflict.store) else { return };
        let span = place.keys.iter().find(|(key, _)| key == conflict.key).map_or(&place.store, |(_, span)| span);
        let (store, key, value) = (conflict.store.as_str(), conflict.key, &conflict.value);
        let about = About { value: Some(value), ..About::key(store, key) };
        let option = self.option(store, key);
        self.report(span.clone(), about, format!("store {store:?}: {key}{option} = {value:?}: {conflict}"));
    }

    fn store(
        &mut self,
        name: &Spanned<std::borrow::Cow<'_, str>>,
        value: &Spanned<DeValue<'_>>,
    ) -> Option<(Declaration, Places)> {
        let mistakes = self.diagnostics.len();
        let store = name.get_ref().as_ref();
        let parsed = store.parse::<StoreName>();
        if let Err(error) = &parsed {
            self.report(name.span(), About::store(store), format!("store {store:?}: {error}"));
        }
        let Some(table) = value.get_ref().as_table() else {
            let found = kind(value.get_ref());
            let message = format!("store {store:?}: a table is expected here, not {found}");
            self.report(value.span(), About::store(store), message);
            return None;
        };
        for (key, _) in table.iter().filter(|(key, _)| !STORE_KEYS.contains(&&**key.get_ref())) {
            self.unknown_key(Some(store), "", key, &STORE_KEYS);
        }
        let mut fields = Fields { reader: self, store, table, within: "" };
        let lower_store = fields.parsed("lower-store");
        if table.get("lower-store").is_none() {
            let option = fields.reader.option(store, "lower-store");
            let message =
                format!("key \"lower-store\"{option} is missing; name the store underneath, for example \"daemon\"");
            let about = About::key(store, "lower-store");
            fields.reader.report(name.span(), about, format!("store {store:?}: {message}"));
        }
        let root = fields.directory("root");
        let upper_layer = fields.directory("upper-layer");
        let work_dir = fields.directory("work-dir");
        let ownership =
            Ownership { owner: fields.account("owner"), group: fields.account("group"), mode: fields.mode() };
        let required = fields.flag("required");
        let autostart = fields.flag("autostart");
        let mount_options = fields.list("mount-options", |text| text.parse::<MountOption>().map_err(|e| e.to_string()));
        let ephemeral = fields.ephemeral();
        let daemon = table.get("daemon").and_then(|value| self.daemon(store, value));
        let Ok(store) = parsed else { return None };
        if self.diagnostics.len() > mistakes {
            return None;
        }
        let mut keys: Vec<_> = table.iter().map(|(key, value)| (key.get_ref().to_string(), value.span())).collect();
        if let Some(daemon) = table.get("daemon").and_then(|value| value.get_ref().as_table()) {
            keys.extend(daemon.iter().map(|(key, value)| (format!("daemon.{}", key.get_ref()), value.span())));
        }
        Some((
            Declaration {
                name: store.clone(),
                lower_store: lower_store?,
                root: root?,
                upper_layer: upper_layer?,
                work_dir: work_dir?,
                ownership,
                required,
                autostart,
                mount_options: mount_options.unwrap_or_default(),
                ephemeral,
                daemon,
            },
            Places { name: store, store: name.span(), keys },
        ))
    }

    /// The table of a store's Nix daemon. `None` after a mistake, which was reported.
    fn daemon(&mut self, store: &str, value: &Spanned<DeValue<'_>>) -> Option<NixDaemon> {
        let Some(table) = value.get_ref().as_table() else {
            let found = kind(value.get_ref());
            let option = self.option(store, "daemon");
            let message = format!("store {store:?}: daemon{option}: a table is expected here, not {found}");
            self.report(value.span(), About::key(store, "daemon"), message);
            return None;
        };
        for (key, _) in table.iter().filter(|(key, _)| !DAEMON_KEYS.contains(&&**key.get_ref())) {
            self.unknown_key(Some(store), "daemon.", key, &DAEMON_KEYS);
        }
        let mut fields = Fields { reader: self, store, table, within: "daemon." };
        let socket_path = fields.socket_path();
        let socket_mode = fields.socket_mode();
        let user = |text: &str| refuse_user(text).map_or_else(|| Ok(text.to_owned()), Err);
        let allowed_users = fields.list("allowed-users", user);
        let trusted_users = fields.list("trusted-users", user);
        let settings = fields.settings();
        Some(NixDaemon {
            socket_path: socket_path?,
            socket_mode: socket_mode.unwrap_or(0o666),
            allowed_users: allowed_users.unwrap_or_else(|| vec!["*".to_owned()]),
            trusted_users: trusted_users.unwrap_or_else(|| vec!["root".to_owned()]),
            settings,
        })
    }

    fn unknown_key(
        &mut self,
        store: Option<&str>,
        within: &str,
        key: &Spanned<std::borrow::Cow<'_, str>>,
        valid: &[&str],
    ) {
        let place = store.map(|store| format!("store {store:?}: ")).unwrap_or_default();
        let hint = match nearest(key.get_ref(), valid.iter().copied()) {
            Some(nearest) => format!("did you mean {nearest:?}?"),
            None => format!("the keys are {}", valid.join(", ")),
        };
        let key_name = format!("{within}{}", key.get_ref());
        let about = About { store, key: Some(&key_name), value: None };
        let option = self.beside(|| nixos_option::setting(store, &key_name));
        self.report(key.span(), about, format!("{place}unknown key {key_name:?}{option}; {hint}"));
    }

    /// What stands behind a key of a store: nothing, or its option.
    fn option(&self, store: &str, key: &str) -> String {
        self.beside(|| nixos_option::option(store, key))
    }

    fn beside(&self, option: impl FnOnce() -> String) -> String {
        match self.keys {
            Keys::Alone => String::new(),
            Keys::WithNixosOptions => format!(" ({})", option()),
        }
    }

    fn report(&mut self, span: Range<usize>, about: About<'_>, message: String) {
        let before = &self.text[..span.start.min(self.text.len())];
        let line_start = before.rfind('\n').map_or(0, |i| i + 1);
        self.diagnostics.push(Diagnostic {
            line: before.matches('\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
            store: about.store.map(str::to_owned),
            key: about.key.map(str::to_owned),
            value: about.value.map(str::to_owned),
            message,
        });
    }
}

/// The values of one store's table, or of a table in it.
struct Fields<'r, 'a, 't> {
    reader: &'r mut Reader<'a>,
    store: &'r str,
    table: &'r DeTable<'t>,
    /// What is written in front of a key in messages.
    within: &'static str,
}

impl Fields<'_, '_, '_> {
    /// The text of a key, if it is there and is a text.
    fn text(&mut self, key: &str) -> Option<(String, Range<usize>)> {
        let value = self.table.get(key)?;
        match value.get_ref().as_str() {
            Some(text) => Some((text.to_owned(), value.span())),
            None => {
                self.wrong_type(key, value, "a string");
                None
            }
        }
    }

    /// The value of a key through [`FromStr`](std::str::FromStr).
    fn parsed<T: std::str::FromStr<Err: fmt::Display>>(&mut self, key: &str) -> Option<T> {
        let (text, span) = self.text(key)?;
        text.parse().map_err(|error| self.refuse(key, &text, span, &error)).ok()
    }

    /// A directory's path, or its default below the state dir.
    fn directory(&mut self, key: &str) -> Option<AbsolutePath> {
        if self.table.get(key).is_some() {
            return self.parsed(key);
        }
        // What is no name makes no default, and was reported.
        self.store.parse::<StoreName>().ok()?;
        let tail = key.split('-').next().unwrap_or(key);
        let tail = format!("stores/{}/{tail}", self.store);
        let path = self.reader.defaults.state_dir.join(&tail);
        path.map_err(|error| {
            let option = self.reader.option(self.store, key);
            let message = format!("store {:?}: the default of {key}{option}: {error}; set {key}", self.store);
            self.reader.report(0..0, About::key(self.store, key), message);
        })
        .ok()
    }

    /// A list of texts, each through `read`; `None` when it is not given.
    fn list<T>(&mut self, key: &str, read: impl Fn(&str) -> Result<T, String>) -> Option<Vec<T>> {
        let value = self.table.get(key)?;
        let Some(array) = value.get_ref().as_array() else {
            self.wrong_type(key, value, "a list of strings");
            return None;
        };
        let mut list = Vec::with_capacity(array.len());
        for element in array {
            match element.get_ref().as_str().map(&read) {
                Some(Ok(read)) => list.push(read),
                Some(Err(why)) => {
                    let key = format!("{}{key}", self.within);
                    let option = self.reader.option(self.store, &key);
                    let message = format!("store {:?}: {key}{option}: {why}", self.store);
                    let about = About { value: element.get_ref().as_str(), ..About::key(self.store, &key) };
                    self.reader.report(element.span(), about, message);
                }
                None => self.wrong_type(key, element, "a string"),
            }
        }
        Some(list)
    }

    /// The filesystem of an ephemeral store, which holds all of its directories.
    fn ephemeral(&mut self) -> Option<Ephemeral> {
        self.table.get("ephemeral-size")?;
        let size = self.parsed::<EphemeralSize>("ephemeral-size");
        for key in ["root", "upper-layer", "work-dir"] {
            if let Some((text, span)) = self.table.get(key).and_then(|_| self.text(key)) {
                let why = "an ephemeral store has all of its directories on a filesystem of its own; take this away, or \
                           ephemeral-size";
                self.refuse(key, &text, span, &why);
            }
        }
        let directory = self.reader.defaults.state_dir.join(&format!("stores/{}", self.store)).ok()?;
        Some(Ephemeral { directory, size: size? })
    }

    fn socket_path(&mut self) -> Option<AbsolutePath> {
        let Some((text, span)) = self.text("socket-path") else {
            // What is no text was reported, and what is no name makes no default.
            let name = self.store.parse().ok().filter(|_| self.table.get("socket-path").is_none())?;
            return NixDaemon::default_socket_path(&name).parse().ok();
        };
        let length = text.len();
        let path = text.parse::<AbsolutePath>().map_err(|error| error.to_string()).and_then(|path| {
            let too_long =
                || format!("the path is {length} bytes long; a Unix socket's has at most {MAX_SOCKET_PATH_LEN}");
            if length > MAX_SOCKET_PATH_LEN { Err(too_long()) } else { Ok(path) }
        });
        path.map_err(|why| self.refuse("socket-path", &text, span, &why)).ok()
    }

    fn socket_mode(&mut self) -> Option<u32> {
        let (text, span) = self.text("socket-mode")?;
        let is_mode = (3..=4).contains(&text.len()) && text.bytes().all(|byte| (b'0'..=b'7').contains(&byte));
        if is_mode {
            return u32::from_str_radix(&text, 8).ok();
        }
        self.refuse("socket-mode", &text, span, &"a mode is three or four octal digits, such as \"0666\"");
        None
    }

    /// Settings of Nix, each as nix.conf(5) has it.
    fn settings(&mut self) -> BTreeMap<String, String> {
        let mut settings = BTreeMap::new();
        let Some(value) = self.table.get("settings") else { return settings };
        let Some(table) = value.get_ref().as_table() else {
            self.wrong_type("settings", value, "a table");
            return settings;
        };
        for (key, value) in table {
            let name = key.get_ref().as_ref();
            let text = match value.get_ref() {
                DeValue::String(text) => Some(text.to_string()),
                DeValue::Boolean(flag) => Some(flag.to_string()),
                DeValue::Integer(number) => {
                    i64::from_str_radix(number.as_str(), number.radix()).ok().map(|n| n.to_string())
                }
                DeValue::Array(array) => {
                    let words: Option<Vec<&str>> = array.iter().map(|word| word.get_ref().as_str()).collect();
                    words.map(|words| words.join(" "))
                }
                _ => None,
            };
            let refused = match &text {
                Some(text) => refuse_setting(name, text).map(str::to_owned),
                None => Some(format!(
                    "a string, an integer, true, false or a list of strings is expected here, not {}",
                    kind(value.get_ref())
                )),
            };
            match refused {
                Some(why) => {
                    let key = format!("daemon.settings.{}", name.escape_debug());
                    let option = self.reader.option(self.store, &format!("daemon.settings.{name}"));
                    let message = format!("store {:?}: {key}{option}: {why}", self.store);
                    let about = About { value: text.as_deref(), ..About::key(self.store, &key) };
                    self.reader.report(value.span(), about, message);
                }
                None => drop(settings.insert(name.to_owned(), text.unwrap_or_default())),
            }
        }
        settings
    }

    /// A user's or group's name or number. Whether it exists only the machine can tell.
    fn account(&mut self, key: &str) -> Option<String> {
        let (text, span) = self.text(key)?;
        let valid = |c: char| c.is_ascii_alphanumeric() || "_.-$".contains(c);
        if text.is_empty() || text.starts_with('-') || !text.chars().all(valid) {
            self.refuse(key, &text, span, &"not the name or number of an account");
            return None;
        }
        Some(text)
    }

    /// A file mode in octal digits.
    fn mode(&mut self) -> Option<u32> {
        let (text, span) = self.text("mode")?;
        match u32::from_str_radix(&text, 8) {
            Ok(mode) if mode <= 0o7777 && mode & 0o700 == 0o700 && mode & 0o002 == 0 => Some(mode),
            Ok(mode) if mode <= 0o7777 && mode & 0o002 != 0 => {
                self.refuse("mode", &text, span, &"everybody could write into the store; take the last digit's 2 away");
                None
            }
            _ => {
                let way_out = "a mode is three or four octal digits that leave the owner all rights, such as \"1775\"";
                self.refuse("mode", &text, span, &way_out);
                None
            }
        }
    }

    /// A boolean that is true when it is not given.
    fn flag(&mut self, key: &str) -> bool {
        let Some(value) = self.table.get(key) else { return true };
        value.get_ref().as_bool().unwrap_or_else(|| {
            self.wrong_type(key, value, "true or false");
            true
        })
    }

    fn refuse(&mut self, key: &str, value: &str, span: Range<usize>, why: &dyn fmt::Display) {
        let key = format!("{}{key}", self.within);
        let about = About { value: Some(value), ..About::key(self.store, &key) };
        let option = self.reader.option(self.store, &key);
        self.reader.report(span, about, format!("store {:?}: {key}{option} = {value:?}: {why}", self.store));
    }

    fn wrong_type(&mut self, key: &str, value: &Spanned<DeValue<'_>>, expected: &str) {
        let found = kind(value.get_ref());
        let key = format!("{}{key}", self.within);
        let option = self.reader.option(self.store, &key);
        let message = format!("store {:?}: {key}{option}: {expected} is expected here, not {found}", self.store);
        self.reader.report(value.span(), About::key(self.store, &key), message);
    }
}

/// A TOML value's type with its article.
fn kind(value: &DeValue<'_>) -> String {
    let name = value.type_str();
    format!("{} {name}", if matches!(name, "array" | "integer") { "an" } else { "a" })
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
                "[stores.ci]\nlower-store = \"/l\"\nquota = 1\n",
                "3:1: store \"ci\": unknown key \"quota\"; the keys are lower-store, root, upper-layer, work-dir, \
                 owner, group, mode, required, autostart, mount-options, ephemeral-size, daemon",
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
