//! Which option of the NixOS module a key of the configuration is written with.

use std::fmt;

use crate::config::Key;

/// Where the module has its options (`module/options.nix`).
const MODULE: &str = "services.layeredStores";

/// Settings of Nix, which the module takes under their own names.
const NIX_SETTINGS: &str = "daemon.settings.";

/// The options of a store that a key is written with, as people write them down.
pub(crate) fn option(store: &str, key: &str) -> String {
    let below = |option: &dyn fmt::Display| format!("{MODULE}.stores.{}.{option}", attribute(store));
    if let Some(setting) = key.strip_prefix(NIX_SETTINGS) {
        return below(&format_args!("{NIX_SETTINGS}{}", attribute(setting)));
    }
    // No key is without a row; if one were, this is how it can be written.
    let Some(key) = Key::all().find(|row| row.name == key) else { return setting(Some(store), key) };
    let options = key.options.iter().map(|option| below(option));
    options.collect::<Vec<_>>().join(" or ")
}

/// The option for what has no option of its own.
pub(crate) fn setting(store: Option<&str>, key: &str) -> String {
    let store = store.map(|store| format!("stores.{}.", attribute(store))).unwrap_or_default();
    let key = key.split('.').map(attribute).collect::<Vec<_>>().join(".");
    format!("{MODULE}.settings.{store}{key}")
}

/// A name as Nix has it in an attribute path, in quotes where it needs them.
fn attribute(name: &str) -> String {
    let is_identifier = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "_'-".contains(c));
    if is_identifier { name.to_owned() } else { format!("{name:?}") }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::MountOption;

    /// Made from the options of the module, which the scenario `module` holds.
    const REFERENCE: &str = include_str!("../../../docs/options.md");

    /// What a store has on NixOS and not in the configuration: switches for a part of it, what NixOS itself is told, and what
    /// follows from the others.
    const WITHOUT_KEY: [&str; 13] = [
        "daemon.enable",
        "daemon.serviceConfig",
        "ephemeral.enable",
        "gc.automatic",
        "gc.dates",
        "gc.options",
        "gc.persistent",
        "gc.randomizedDelaySec",
        "mountUnit",
        "realStoreDir",
        "remountGroups",
        "remountUsers",
        "uri",
    ];

    #[test]
    fn every_key_is_written_with_options_that_exist_and_every_option_writes_one() {
        // The table of the Nix daemon has keys of its own.
        let keys = Key::all().filter(|key| key.name != "daemon");
        let written: BTreeSet<_> = keys.flat_map(|key| key.options.iter().copied()).collect();
        let heading =
            |line: &'static str| line.strip_prefix("## `services.layeredStores.stores.<name>.")?.strip_suffix('`');
        let options = REFERENCE.lines().filter_map(heading).filter(|option| !WITHOUT_KEY.contains(option));
        assert_eq!(written, options.collect());
    }

    #[test]
    fn every_mount_option_can_be_chosen_on_nixos() {
        let all = MountOption::ALL.map(|option| format!("\"{option}\"")).join(", ");
        assert!(REFERENCE.contains(&format!("*Type:* list of (one of {all})")), "{all}");
    }

    #[test]
    fn options_are_written_as_nix_reads_them() {
        for (store, key, expected) in [
            ("ci", "root", "services.layeredStores.stores.ci.root"),
            ("1", "upper-layer", "services.layeredStores.stores.\"1\".upperLayer"),
            ("ci", "daemon.settings.max-jobs", "services.layeredStores.stores.ci.daemon.settings.max-jobs"),
            ("ci", "daemon.settings.max jobs", "services.layeredStores.stores.ci.daemon.settings.\"max jobs\""),
            (
                "ci",
                "daemon.allowed-users",
                "services.layeredStores.stores.ci.daemon.allowedUsers or \
                 services.layeredStores.stores.ci.daemon.allowedGroups",
            ),
        ] {
            assert_eq!(option(store, key), expected);
        }
        assert_eq!(setting(Some("ci"), "daemon.socket"), "services.layeredStores.settings.stores.ci.daemon.socket");
        assert_eq!(setting(None, "stors"), "services.layeredStores.settings.stors");
    }
}
