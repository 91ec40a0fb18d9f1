//! The specification of one layered store: all that is declared, and all that follows from it.

use std::{fmt, ops::Deref};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::{Deserialize, Serialize};

use super::{
    AbsolutePath, LowerStore, MountOption, MountUnitName, NIX_STORE_DIR, NixDaemon, StoreName, Terms,
    lower::NIX_STATE_DIR,
};

/// What stays as it is in a parameter of a Nix store URL: RFC 3986's unreserved characters and the slash.
const URL_PARAMETER: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~').remove(b'/');

/// A text as it is written for the value of a parameter of a Nix store URL.
pub fn url_parameter(text: &str) -> impl fmt::Display {
    utf8_percent_encode(text, URL_PARAMETER)
}

/// What an overlay mount is made of: its four directories, and the options that were chosen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layers {
    /// The lower store's directory of store objects.
    pub lower: AbsolutePath,
    /// Where the objects are that the layered store adds.
    pub upper: AbsolutePath,
    /// OverlayFS's scratch directory.
    pub work: AbsolutePath,
    /// Where both are merged: Nix's real store dir.
    pub merged: AbsolutePath,
    /// Options of the mount, besides those that every store has.
    #[serde(default)]
    pub options: Vec<MountOption>,
}

impl Layers {
    /// Whether the directories are those of other layers, whatever the options.
    pub fn are_at(&self, other: &Self) -> bool {
        let Self { lower, upper, work, merged, options: _ } = self;
        [lower, upper, work, merged] == [&other.lower, &other.upper, &other.work, &other.merged]
    }
}

/// The group of Nix's build users, where Nix runs as root and nothing else is set (`build-users-group`).
pub const BUILD_USERS: &str = "nixbld";

/// Who owns the directories of a store.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ownership {
    /// User name or number; `root` when absent.
    pub owner: Option<String>,
    /// Group name or number; when absent, that of Nix's build users where it exists and the store is root's, else the owner's.
    pub group: Option<String>,
    /// Mode of the upper layer; when absent, 1775 for a store of root's with the group of Nix's build users and 0755 for others.
    pub mode: Option<u32>,
}

/// A store's own Nix daemon, and the user whom the store belongs to.
pub type Service = (NixDaemon, Option<String>);

/// One layered store with every default filled in and every reference resolved: what was declared, and what is derived from it.
///
/// What was declared is read as if it were a part of this (`spec.name`, `spec.daemon`), which is what the records have it as.
/// A specification comes from [`stack()`](crate::stack()), or from a record of one, so that the two belong together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreSpec {
    #[serde(flatten)]
    pub(crate) terms: Terms,
    /// The lower store as Nix has to be told about it.
    pub lower_url: String,
    /// The directories of its mount.
    pub layers: Layers,
    /// `<root>/nix/var/nix`, with the database.
    pub state_dir: AbsolutePath,
    /// The systemd unit of the mount.
    pub mount_unit: MountUnitName,
    /// What Nix calls when the merged directory has to be refreshed.
    pub remount_hook: AbsolutePath,
}

impl Deref for StoreSpec {
    type Target = Terms;

    fn deref(&self) -> &Terms {
        &self.terms
    }
}

impl StoreSpec {
    /// The store URL that Nix opens (`local-overlay://?…`), every escape in place.
    ///
    /// `check-mount` is left at Nix's default, which is on: the mounts made here pass it.
    pub fn uri(&self) -> String {
        let parameters = [
            ("root", self.root.as_str()),
            ("lower-store", self.lower_url.as_str()),
            ("upper-layer", self.layers.upper.as_str()),
            ("remount-hook", self.remount_hook.as_str()),
        ];
        let parameters: Vec<_> = parameters.map(|(key, value)| format!("{key}={}", url_parameter(value))).into();
        format!("local-overlay://?{}", parameters.join("&"))
    }

    /// The URL under which its own Nix daemon is used, if it has one.
    ///
    /// Nix's older commands read store objects behind the daemon's back, and `root` tells them where. No character of a path
    /// needs an escape.
    pub fn daemon_uri(&self) -> Option<String> {
        self.daemon.as_ref().map(|daemon| format!("unix://{}?root={}", daemon.socket_path, self.root))
    }

    /// Its own Nix daemon, if it has one, and as whom that runs: what changes either makes the daemon anew.
    pub fn service(&self) -> Option<Service> {
        self.daemon.as_ref().map(|daemon| (daemon.clone(), self.ownership.owner.clone()))
    }

    /// The layered store underneath, if the lower store is one.
    pub fn lower_name(&self) -> Option<&StoreName> {
        match &self.lower_store {
            LowerStore::Layered(name) => Some(name),
            LowerStore::Nix { .. } => None,
        }
    }

    /// The state directory of the store underneath.
    pub fn lower_state_dir(&self) -> AbsolutePath {
        let of_layered = || {
            let root = self.layers.lower.as_str().strip_suffix(NIX_STORE_DIR)?;
            format!("{root}{NIX_STATE_DIR}").parse().ok()
        };
        match &self.lower_store {
            LowerStore::Nix { state_dir, .. } => state_dir.clone(),
            // Its real store dir is `<root>/nix/store`.
            LowerStore::Layered(_) => of_layered().unwrap_or_else(|| self.state_dir.clone()),
        }
    }

    /// Whether a directory of one store is, or lies inside, one of the other.
    pub fn shares_directories_with(&self, other: &Self) -> bool {
        let directories = |spec: &Self| [spec.root.clone(), spec.layers.upper.clone(), spec.layers.work.clone()];
        let (mine, others) = (directories(self), directories(other));
        mine.iter().any(|a| others.iter().any(|b| a.is_within(b) || b.is_within(a)))
    }

    /// Whether a directory that belongs to a store of a name is this store's, or holds one of its directories.
    pub fn is_of(&self, name: &StoreName, directory: &AbsolutePath) -> bool {
        let Layers { lower, upper, work, .. } = &self.layers;
        self.name == *name || [&self.root, lower, upper, work].iter().any(|dir| dir.is_within(directory))
    }

    /// Whether going from `self` to `new` needs the mount to be taken down and made again.
    ///
    /// The owner and mode of directories that exist are never changed, `required` and `autostart` are the daemon's
    /// business alone, and a Nix daemon is made anew without the mount.
    pub fn needs_restart_for(&self, new: &Self) -> bool {
        self.layers != new.layers || self.ephemeral != new.ephemeral
    }
}
