//! What can be declared of a store: every key of `[stores.NAME]`, what people are told about it, and how it is read.

use std::ops::Deref;

use serde::{Deserialize, Serialize};

use crate::{
    AbsolutePath, Ephemeral, Leases, LowerStore, MountOption, NixDaemon, Ownership, Source, StoreName,
    config::{Key, fields::Fields},
};

/// A store as declared, before its references are resolved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Declaration {
    /// What its specification takes over as it is.
    pub terms: Terms,
    /// The upper layer.
    pub upper_layer: AbsolutePath,
    /// The work dir.
    pub work_dir: AbsolutePath,
    /// Options of the mount.
    pub mount_options: Vec<MountOption>,
}

/// What is declared of a store, defaults filled in, but for what becomes a part of its [`Layers`](crate::Layers).
///
/// It is in the records that outlive a daemon (`src/supervisor/record.rs`): a field that is added has a default for serde,
/// which is what holds for a store of a version before it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terms {
    /// The store's name.
    pub name: StoreName,
    /// Where it comes from.
    #[serde(default)]
    pub source: Source,
    /// The lower store as declared.
    pub lower_store: LowerStore,
    /// The root of the store: `<root>/nix/store` is the real store dir.
    pub root: AbsolutePath,
    /// Who owns upper layer and state dir.
    pub ownership: Ownership,
    /// Whether the daemon is ready only once this store is active.
    pub required: bool,
    /// Whether the daemon starts this store by itself.
    pub autostart: bool,
    /// What is kept for it in the lower store.
    #[serde(default)]
    pub leases: Leases,
    /// The filesystem in memory that everything of it is on, if it is to be gone with the next boot.
    #[serde(default)]
    pub ephemeral: Option<Ephemeral>,
    /// Its own Nix daemon.
    #[serde(default)]
    pub daemon: Option<NixDaemon>,
}

impl Declaration {
    /// The keys of `[stores.NAME]`.
    pub const KEYS: &[Key] = &[
        Key {
            name: "lower-store",
            options: &["lowerStore"],
            kind: "string",
            default: "none: required",
            example: "\"daemon\"",
            description: "The store underneath, which is never written to.\n\
                          \n\
                          It is one of\n\
                          \n\
                          - `\"daemon\"`, this machine's own store through its Nix daemon, or `\"local\"`, the same directly;\n\
                          - the root directory of a store: the store objects of `\"/srv/base\"` are in `/srv/base/nix/store`. With \
                          `?read-only=true` behind it its database is opened without being written to, which takes Nix's \
                          experimental feature `read-only-local-store`;\n\
                          - another URL of a Nix store that has a directory on this machine;\n\
                          - `\"layered:NAME\"` for the store of that name here. One level of this works; the kernel stacks no more.",
            section: "#the-lower-store",
        },
        Key {
            name: "root",
            options: &["root"],
            kind: "path",
            default: "`<state>/stores/<name>/root`",
            example: "\"/srv/ci/root\"",
            description: "The root of the layered store: both layers are merged in `nix/store` below it, the real store dir, and \
                          Nix's database is in `nix/var/nix`.",
            section: "",
        },
        Key {
            name: "upper-layer",
            options: &["upperLayer"],
            kind: "path",
            default: "`<state>/stores/<name>/upper`",
            example: "\"/srv/ci/upper\"",
            description: "The directory with what the store adds. Its filesystem needs extended attributes.",
            section: "",
        },
        Key {
            name: "work-dir",
            options: &["workDir"],
            kind: "path",
            default: "`<state>/stores/<name>/work`",
            example: "\"/srv/ci/work\"",
            description: "OverlayFS's scratch space. It has to be on the same mount as `upper-layer`.",
            section: "",
        },
        Key {
            name: "owner",
            options: &["owner"],
            kind: "string",
            default: "root",
            example: "\"alice\"",
            description: "Name or number of the user to whom upper layer and database belong. This user may have the store \
                          remounted, builds into it without a Nix daemon, and is whom its Nix daemon runs as. Directories that \
                          exist are never given another owner.",
            section: "#a-store-of-a-users",
        },
        Key {
            name: "group",
            options: &["group"],
            kind: "string",
            default: "that of Nix's build users (`nixbld`) where it exists and the store is root's, and else the owner's",
            example: "\"builders\"",
            description: "Name or number of the group to which upper layer and database belong. Only Nix's build users may write \
                          to the upper layer of a store of root's.",
            section: "",
        },
        Key {
            name: "mode",
            options: &["mode"],
            kind: "string of octal digits",
            default: "`\"1775\"` for a store of root's with the group of Nix's build users, and `\"0755\"` for others",
            example: "\"0755\"",
            description: "Mode of the upper layer. Directories that exist are never given another mode.",
            section: "",
        },
        Key {
            name: "required",
            options: &["required"],
            kind: "true, false",
            default: "`true`",
            example: "false",
            description: "Whether `layered-stores.target` is reached, and the daemon ready, only once this store is active. A \
                          store that does not come up keeps no other store, and not the system, from coming up.",
            section: "",
        },
        Key {
            name: "autostart",
            options: &["autostart"],
            kind: "true, false",
            default: "`true`",
            example: "false",
            description: "Whether the store is brought up without being asked for. If not, `layered-stores start NAME` does.",
            section: "",
        },
        Key {
            name: "leases",
            options: &["leases"],
            kind: "`\"used\"`, `\"all\"`, `\"none\"`",
            default: "`\"used\"`",
            example: "\"all\"",
            description: "What is kept in the lower store, whoever collects garbage there: the paths that this store refers to, all \
                          that is valid there, or nothing.\n\
                          \n\
                          What is kept has a root in `gcroots/layered-stores` of the lower store's state directory, and turns are \
                          taken with its garbage collector. `\"none\"` is for a lower store in which nobody ever collects garbage.",
            section: "#what-is-kept-in-the-lower-store",
        },
        Key {
            name: "mount-options",
            options: &["mountOptions"],
            kind: "list of `noatime`, `nodiratime`, `relatime`, `strictatime`, `noexec`",
            default: "`[]`",
            example: "[\"noatime\"]",
            description: "Options of the store's mount. `nodev` and `nosuid` are always on.",
            section: "#mount-options",
        },
        Key {
            name: "ephemeral-size",
            options: &["ephemeral.size"],
            kind: "string",
            default: "none: the store is on disk",
            example: "\"2G\"",
            description: "The most that an ephemeral store may take: bytes, with `K`, `M`, `G` or `T` behind for powers of 1024, \
                          or a part of the memory such as `\"25%\"`. All directories of such a store lie on a filesystem in \
                          memory, and are gone with the next boot.",
            section: "#ephemeral-stores",
        },
        Key {
            name: "daemon",
            options: &["daemon"],
            kind: "table",
            default: "none",
            example: "{}",
            description: "A Nix daemon for this store: whoever may use it builds with \
                          `--store \"$(layered-stores uri --daemon NAME)\"` and needs no rights of their own. It is started by \
                          the first connection to its socket, which is there as long as the store is active.",
            section: "#the-nix-daemon-of-a-store",
        },
    ];

    /// Reads a store's table. `None` after a mistake, which was reported.
    pub(crate) fn read(fields: &mut Fields<'_, '_, '_>) -> Option<Self> {
        // Everything is read before the first mistake ends this, so that all of them are reported.
        let name = fields.store.parse().ok();
        let lower_store = fields.parsed("lower-store");
        let root = fields.directory("root");
        let upper_layer = fields.directory("upper-layer");
        let work_dir = fields.directory("work-dir");
        let ownership = fields.ownership();
        let required = fields.flag("required");
        let autostart = fields.flag("autostart");
        let leases = fields.leases();
        let mount_options = fields.list("mount-options", |text| text.parse::<MountOption>().map_err(|e| e.to_string()));
        let ephemeral = fields.ephemeral();
        let daemon = fields.daemon();
        let terms = Terms {
            name: name?,
            source: Source::Configuration,
            lower_store: lower_store?,
            root: root?,
            ownership,
            required,
            autostart,
            leases,
            ephemeral,
            daemon,
        };
        let mount_options = mount_options.unwrap_or_default();
        Some(Self { terms, upper_layer: upper_layer?, work_dir: work_dir?, mount_options })
    }
}

impl Deref for Declaration {
    type Target = Terms;

    fn deref(&self) -> &Terms {
        &self.terms
    }
}
