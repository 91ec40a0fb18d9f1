//! Walking a parsed document: what is declared, and every mistake with its place in the text.

use std::ops::Range;

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{
    Config, Defaults, Diagnostic, Key, Keys,
    fields::{Fields, kind},
    keys::DAEMON,
};
use crate::{Conflict, Declaration, NixDaemon, StoreName, nearest, nixos_option, stack};

/// Walks the parsed document and collects mistakes.
pub(super) struct Reader<'a> {
    pub(super) text: &'a str,
    pub(super) defaults: &'a Defaults,
    pub(super) keys: Keys,
    pub(super) diagnostics: Vec<Diagnostic>,
}

/// What a mistake is about.
#[derive(Default)]
pub(super) struct About<'m> {
    pub(super) store: Option<&'m str>,
    pub(super) key: Option<&'m str>,
    pub(super) value: Option<&'m str>,
}

impl<'m> About<'m> {
    pub(super) fn store(store: &'m str) -> Self {
        Self { store: Some(store), ..Self::default() }
    }

    pub(super) fn key(store: &'m str, key: &'m str) -> Self {
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
    pub(super) fn document(&mut self, document: &DeTable<'_>) -> Config {
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
        if let Err(error) = store.parse::<StoreName>() {
            self.report(name.span(), About::store(store), format!("store {store:?}: {error}"));
        }
        let Some(table) = value.get_ref().as_table() else {
            let found = kind(value.get_ref());
            let message = format!("store {store:?}: a table is expected here, not {found}");
            self.report(value.span(), About::store(store), message);
            return None;
        };
        self.unknown_keys(store, table, "", Declaration::KEYS);
        let mut fields = Fields { reader: self, store, table, within: "" };
        let declaration = Declaration::read(&mut fields);
        if table.get("lower-store").is_none() {
            let option = fields.reader.option(store, "lower-store");
            let message =
                format!("key \"lower-store\"{option} is missing; name the store underneath, for example \"daemon\"");
            let about = About::key(store, "lower-store");
            fields.reader.report(name.span(), about, format!("store {store:?}: {message}"));
        }
        if self.diagnostics.len() > mistakes {
            return None;
        }
        let mut keys: Vec<_> = table.iter().map(|(key, value)| (key.get_ref().to_string(), value.span())).collect();
        if let Some(daemon) = table.get("daemon").and_then(|value| value.get_ref().as_table()) {
            keys.extend(daemon.iter().map(|(key, value)| (format!("daemon.{}", key.get_ref()), value.span())));
        }
        let declaration = declaration?;
        let places = Places { name: declaration.name.clone(), store: name.span(), keys };
        Some((declaration, places))
    }

    /// The table of a store's Nix daemon. `None` after a mistake, which was reported.
    pub(super) fn daemon(&mut self, store: &str, value: &Spanned<DeValue<'_>>) -> Option<NixDaemon> {
        let Some(table) = value.get_ref().as_table() else {
            let found = kind(value.get_ref());
            let option = self.option(store, "daemon");
            let message = format!("store {store:?}: daemon{option}: a table is expected here, not {found}");
            self.report(value.span(), About::key(store, "daemon"), message);
            return None;
        };
        self.unknown_keys(store, table, DAEMON, NixDaemon::KEYS);
        let mut fields = Fields { reader: self, store, table, within: DAEMON };
        NixDaemon::read(&mut fields)
    }

    fn unknown_keys(&mut self, store: &str, table: &DeTable<'_>, within: &str, keys: &[Key]) {
        let known: Vec<_> = keys.iter().map(Key::word).collect();
        for (key, _) in table.iter().filter(|(key, _)| !known.contains(&&**key.get_ref())) {
            self.unknown_key(Some(store), within, key, &known);
        }
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
    pub(super) fn option(&self, store: &str, key: &str) -> String {
        self.beside(|| nixos_option::option(store, key))
    }

    pub(super) fn beside(&self, option: impl FnOnce() -> String) -> String {
        match self.keys {
            Keys::Alone => String::new(),
            Keys::WithNixosOptions => format!(" ({})", option()),
        }
    }

    pub(super) fn report(&mut self, span: Range<usize>, about: About<'_>, message: String) {
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
