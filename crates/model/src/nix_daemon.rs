//! A store's own Nix daemon: its socket, who may use it, and its settings.

use std::{collections::BTreeMap, fmt::Write as _};

use serde::{Deserialize, Serialize};

use super::{
    AbsolutePath, StoreName,
    config::{Key, fields::Fields},
    unprintable,
};

/// `sun_path` of a Unix socket's address, without the terminating zero (unix(7)).
pub const MAX_SOCKET_PATH_LEN: usize = 107;

/// What is declared about a store's Nix daemon, defaults filled in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NixDaemon {
    /// The Unix socket it listens on.
    pub socket_path: AbsolutePath,
    /// The socket's mode.
    pub socket_mode: u32,
    /// Nix's `allowed-users`.
    pub allowed_users: Vec<String>,
    /// Nix's `trusted-users`.
    pub trusted_users: Vec<String>,
    /// Further settings, each as nix.conf(5) has it.
    pub settings: BTreeMap<String, String>,
}

impl NixDaemon {
    /// The keys of `[stores.NAME.daemon]`.
    pub const KEYS: &[Key] = &[
        Key {
            name: "daemon.socket-path",
            options: &["daemon.socketPath"],
            kind: "path, at most 107 bytes",
            default: "`/run/layered-stores/<name>/daemon.sock`",
            example: "\"/run/ci-store.sock\"",
            description: "The Unix socket on which the Nix daemon of this store listens.",
            section: "",
        },
        Key {
            name: "daemon.socket-mode",
            options: &["daemon.socketMode"],
            kind: "string of octal digits",
            default: "`\"0666\"`",
            example: "\"0660\"",
            description: "The mode of the socket. Nix itself decides by `daemon.allowed-users`; a narrower mode \
                          keeps others from connecting at all.",
            section: "",
        },
        Key {
            name: "daemon.allowed-users",
            options: &["daemon.allowedUsers", "daemon.allowedGroups"],
            kind: "list of strings",
            default: "`[\"*\"]`",
            example: "[\"@ci\", \"alice\"]",
            description: "Users, and groups as `\"@group\"`, who may use this store's Nix daemon; `\"*\"` is everybody.",
            section: "",
        },
        Key {
            name: "daemon.trusted-users",
            options: &["daemon.trustedUsers"],
            kind: "list of strings",
            default: "`[\"root\"]`",
            example: "[\"root\", \"@wheel\"]",
            description: "Users, and groups as `\"@group\"`, whom this store's Nix daemon trusts: they may import what nobody has \
                          signed and change the daemon's settings for themselves. That is as good as being who the daemon runs \
                          as: root, or the `owner` of the store, if it has one.",
            section: "security.md#trusted-users",
        },
        Key {
            name: "daemon.settings",
            options: &["daemon.settings"],
            kind: "table of strings, integers, true or false, and lists of strings",
            default: "`{}`",
            example: "{ max-jobs = 2, substituters = [], extra-experimental-features = [\"ca-derivations\"] }",
            description: "Further settings of this store's Nix daemon, as in nix.conf(5); they win over the machine's own, which \
                          hold for it as well. What a layered store needs, experimental features among it, is set without \
                          being asked for.",
            section: "",
        },
    ];

    /// Reads the table. `None` after a mistake, which was reported.
    pub(crate) fn read(fields: &mut Fields<'_, '_, '_>) -> Option<Self> {
        let socket_path = fields.socket_path();
        let socket_mode = fields.socket_mode();
        let user = |text: &str| refuse_user(text).map_or_else(|| Ok(text.to_owned()), Err);
        let allowed_users = fields.list("allowed-users", user);
        let trusted_users = fields.list("trusted-users", user);
        let settings = fields.settings();
        Some(Self {
            socket_path: socket_path?,
            socket_mode: socket_mode.unwrap_or(0o666),
            allowed_users: allowed_users.unwrap_or_else(|| vec!["*".to_owned()]),
            trusted_users: trusted_users.unwrap_or_else(|| vec!["root".to_owned()]),
            settings,
        })
    }

    /// Where the socket of a store's daemon is if nothing else is said.
    pub fn default_socket_path(name: &StoreName) -> String {
        format!("/run/layered-stores/{name}/daemon.sock")
    }

    /// The text of the nix.conf(5) that the daemon of the store at `uri` is given, on top of the machine's own. `as_root`:
    /// whether the daemon runs as root, and not as the user whom the store belongs to.
    pub fn nix_conf(&self, uri: &str, as_root: bool) -> String {
        let mut text =
            String::from("# Written by layered-storesd for this store's Nix daemon; changes are overwritten.\n");
        let mut set = |key: &str, value: &str| {
            // Infallible for a String.
            let _ = writeln!(text, "{key} = {value}");
        };
        set("store", uri);
        set("extra-experimental-features", "local-overlay-store read-only-local-store");
        set("allowed-users", &self.allowed_users.join(" "));
        set("trusted-users", &self.trusted_users.join(" "));
        // The machine's own settings hold as well, and these do harm to a layered store: deduplication copies the lower
        // store's links up, and what is freed in a layered store Nix counts wrongly.
        set("auto-optimise-store", "false");
        set("min-free", "0");
        if !as_root {
            // Only root can build as somebody else.
            set("build-users-group", "");
        }
        for (key, value) in &self.settings {
            set(key, value);
        }
        text
    }
}

/// Why a setting of Nix cannot be given to a store's daemon.
pub fn refuse_setting(key: &str, value: &str) -> Option<&'static str> {
    match key {
        "store" => Some("the daemon is given its store by itself; take the setting away"),
        "experimental-features" => {
            Some("what the store needs is set by itself; name further ones with extra-experimental-features")
        }
        "allowed-users" | "extra-allowed-users" => Some("this is set with daemon.allowed-users; take the setting away"),
        "trusted-users" | "extra-trusted-users" => Some("this is set with daemon.trusted-users; take the setting away"),
        "min-free" | "max-free" => Some(
            "Nix counts wrongly how much is freed in a layered store, and would delete more than is asked for; take the \
             setting away",
        ),
        "auto-optimise-store" if value != "false" => {
            Some("it would replace files of the upper layer by hard links; set it to false, or take it away")
        }
        _ if key.is_empty() || !key.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-') => {
            Some("the name of a Nix setting has lower-case letters, digits and '-' only")
        }
        _ if value.contains('\n') => Some("the value has to be one line; take the line break away"),
        _ if unprintable(value).is_some() => Some("the value holds a control character; take it away"),
        _ => None,
    }
}

/// Why a text names nobody whom Nix could let in; the forms are those of `allowed-users` in nix.conf(5).
pub fn refuse_user(user: &str) -> Option<String> {
    let name = user.strip_prefix('@').unwrap_or(user);
    let valid = |c: char| c.is_ascii_alphanumeric() || "_.$-".contains(c);
    let is_name = !name.is_empty() && !name.starts_with('-') && name.chars().all(valid);
    (user != "*" && !is_name)
        .then(|| format!("{user:?} is not a user's name, a group's as \"@group\", or \"*\" for everybody"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_of_a_daemon() {
        let daemon = NixDaemon {
            socket_path: "/run/layered-stores/ci/daemon.sock".parse().expect("valid"),
            socket_mode: 0o666,
            allowed_users: vec!["@ci".to_owned(), "alice".to_owned()],
            trusted_users: vec!["root".to_owned()],
            settings: [("max-jobs".to_owned(), "2".to_owned())].into(),
        };
        let of_root = daemon.nix_conf("local-overlay://?root=/r", true);
        assert_eq!(
            of_root,
            "# Written by layered-storesd for this store's Nix daemon; changes are overwritten.\n\
             store = local-overlay://?root=/r\n\
             extra-experimental-features = local-overlay-store read-only-local-store\n\
             allowed-users = @ci alice\n\
             trusted-users = root\n\
             auto-optimise-store = false\n\
             min-free = 0\n\
             max-jobs = 2\n"
        );
        let of_owner = daemon.nix_conf("local-overlay://?root=/r", false);
        assert_eq!(of_owner.replace("build-users-group = \n", ""), of_root);
        assert_ne!(of_owner, of_root);
    }

    #[test]
    fn who_may_be_let_in() {
        for user in ["*", "alice", "@ci", "build.er", "1000"] {
            assert_eq!(refuse_user(user), None, "{user:?}");
        }
        for user in ["", "@", "-x", "a b", "@a@b", "a\nb", "**"] {
            assert!(refuse_user(user).is_some(), "{user:?}");
        }
    }

    #[test]
    fn settings_that_are_refused() {
        for (key, value) in [
            ("store", "daemon"),
            ("experimental-features", ""),
            ("extra-allowed-users", "bob"),
            ("auto-optimise-store", "true"),
            ("max-free", "1"),
            ("Max-Jobs", "1"),
            ("a", "b\nstore = c"),
            ("include x", ""),
            ("substituters", "a\0b"),
            ("substituters", "\u{1b}[2J"),
            ("substituters", "a\rstore = c"),
        ] {
            assert!(refuse_setting(key, value).is_some(), "{key} = {value}");
        }
        for (key, value) in
            [("max-jobs", "2"), ("extra-experimental-features", "flakes"), ("auto-optimise-store", "false")]
        {
            assert_eq!(refuse_setting(key, value), None, "{key} = {value}");
        }
    }
}
