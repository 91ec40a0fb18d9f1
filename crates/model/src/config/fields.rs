//! The values of one table, each read as what it has to be.

use std::{collections::BTreeMap, fmt, ops::Range};

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::reader::{About, Reader};
use crate::{
    AbsolutePath, Ephemeral, EphemeralSize, Leases, MAX_SOCKET_PATH_LEN, NixDaemon, Ownership, StoreName,
    refuse_setting,
};

/// The values of one store's table, or of a table in it.
pub(crate) struct Fields<'r, 'a, 't> {
    pub(super) reader: &'r mut Reader<'a>,
    pub(crate) store: &'r str,
    pub(super) table: &'r DeTable<'t>,
    /// What is written in front of a key in messages.
    pub(super) within: &'static str,
}

impl Fields<'_, '_, '_> {
    /// The text of a key, if it is there and is a text.
    pub(crate) fn text(&mut self, key: &str) -> Option<(String, Range<usize>)> {
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
    pub(crate) fn parsed<T: std::str::FromStr<Err: fmt::Display>>(&mut self, key: &str) -> Option<T> {
        let (text, span) = self.text(key)?;
        text.parse().map_err(|error| self.refuse(key, &text, span, &error)).ok()
    }

    /// A directory's path, or its default below the state dir.
    pub(crate) fn directory(&mut self, key: &str) -> Option<AbsolutePath> {
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
    pub(crate) fn list<T>(&mut self, key: &str, read: impl Fn(&str) -> Result<T, String>) -> Option<Vec<T>> {
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
    pub(crate) fn ephemeral(&mut self) -> Option<Ephemeral> {
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

    /// The table of a store's Nix daemon.
    pub(crate) fn daemon(&mut self) -> Option<NixDaemon> {
        let value = self.table.get("daemon")?;
        self.reader.daemon(self.store, value)
    }

    pub(crate) fn socket_path(&mut self) -> Option<AbsolutePath> {
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

    pub(crate) fn socket_mode(&mut self) -> Option<u32> {
        let (text, span) = self.text("socket-mode")?;
        let is_mode = (3..=4).contains(&text.len()) && text.bytes().all(|byte| (b'0'..=b'7').contains(&byte));
        if is_mode {
            return u32::from_str_radix(&text, 8).ok();
        }
        self.refuse("socket-mode", &text, span, &"a mode is three or four octal digits, such as \"0666\"");
        None
    }

    /// Settings of Nix, each as nix.conf(5) has it.
    pub(crate) fn settings(&mut self) -> BTreeMap<String, String> {
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
    pub(crate) fn account(&mut self, key: &str) -> Option<String> {
        let (text, span) = self.text(key)?;
        let valid = |c: char| c.is_ascii_alphanumeric() || "_.-$".contains(c);
        if text.is_empty() || text.starts_with('-') || !text.chars().all(valid) {
            self.refuse(key, &text, span, &"not the name or number of an account");
            return None;
        }
        Some(text)
    }

    /// Whom the store's directories are for.
    pub(crate) fn ownership(&mut self) -> Ownership {
        Ownership { owner: self.account("owner"), group: self.account("group"), mode: self.mode() }
    }

    /// A file mode in octal digits.
    fn mode(&mut self) -> Option<u32> {
        let (text, span) = self.text("mode")?;
        let mode = u32::from_str_radix(&text, 8).ok().filter(|mode| *mode <= 0o7777);
        if let Some(mode) = mode.filter(|mode| mode & 0o702 == 0o700) {
            return Some(mode);
        }
        let everybody = "everybody could write into the store; take the last digit's 2 away";
        let form = "a mode is three or four octal digits that leave the owner all rights, such as \"1775\"";
        let why = if mode.is_some_and(|mode| mode & 0o002 != 0) { everybody } else { form };
        self.refuse("mode", &text, span, &why);
        None
    }

    /// A boolean that is true when it is not given.
    pub(crate) fn flag(&mut self, key: &str) -> bool {
        let Some(value) = self.table.get(key) else { return true };
        value.get_ref().as_bool().unwrap_or_else(|| {
            self.wrong_type(key, value, "true or false");
            true
        })
    }

    /// What is kept in the lower store; the default after a mistake, which was reported.
    pub(crate) fn leases(&mut self) -> Leases {
        if self.table.contains_key("leases") { self.parsed("leases").unwrap_or_default() } else { Leases::default() }
    }

    pub(super) fn refuse(&mut self, key: &str, value: &str, span: Range<usize>, why: &dyn fmt::Display) {
        let key = format!("{}{key}", self.within);
        let about = About { value: Some(value), ..About::key(self.store, &key) };
        let option = self.reader.option(self.store, &key);
        self.reader.report(span, about, format!("store {:?}: {key}{option} = {value:?}: {why}", self.store));
    }

    pub(super) fn wrong_type(&mut self, key: &str, value: &Spanned<DeValue<'_>>, expected: &str) {
        let found = kind(value.get_ref());
        let key = format!("{}{key}", self.within);
        let option = self.reader.option(self.store, &key);
        let quoted = match value.get_ref() {
            DeValue::Integer(number) if expected == "a string" && number.radix() == 10 => {
                format!("; write \"{}\"", number.as_str())
            }
            DeValue::Boolean(value) if expected == "a string" => format!("; write \"{value}\""),
            DeValue::String(value) if expected == "true or false" && matches!(value.as_ref(), "true" | "false") => {
                format!("; write {value}")
            }
            _ => String::new(),
        };
        let message =
            format!("store {:?}: {key}{option}: {expected} is expected here, not {found}{quoted}", self.store);
        self.reader.report(value.span(), About::key(self.store, &key), message);
    }
}

/// A TOML value's type with its article.
pub(super) fn kind(value: &DeValue<'_>) -> String {
    let name = value.type_str();
    format!("{} {name}", if matches!(name, "array" | "integer") { "an" } else { "a" })
}
