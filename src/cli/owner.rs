//! Root and a store that belongs to a user.

use std::{fs, os::unix::fs::MetadataExt as _};

use anyhow::{Result, bail};
use layered_stores_client::Properties;
use layered_stores_overlay::owner::user_name;

/// Keeps root from a store that belongs to a user. Root's Nix would follow the links that the owner may have put into the
/// state dir, and take the store directory over. With the store at `/nix` that is so even of a Nix that uses the store's own
/// daemon, which makes profiles by itself, and every program that root finds below `/nix` may be one of the owner's.
pub(super) fn refuse_root(store: &Properties, doing: &str) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    let owner = |path: &str| Some(fs::symlink_metadata(path).ok()?.uid());
    let owners = [&store.state_dir, &store.upper_layer].map(|path| owner(path));
    let Some(owner) = owners.into_iter().flatten().find(|uid| *uid != 0) else { return Ok(()) };
    let (name, owner) = (&store.name, user_name(owner));
    let as_owner = format!("runuser -u {owner} -- layered-stores {doing} {name}");
    let way_out = if doing == "enter" {
        format!("use `{as_owner}`")
    } else if store.daemon_uri.is_empty() {
        format!("use `{as_owner}`, or declare [stores.{name}.daemon]")
    } else {
        format!("use its Nix daemon (`layered-stores uri --daemon {name}`), or `{as_owner}`")
    };
    bail!("store {name:?} belongs to {owner}, whose links and programs root would follow and run; {way_out}")
}

/// What to tell a user who asks for the URL of a store that belongs to somebody else; `None` if it is theirs, or root asks.
pub(super) fn not_theirs(store: &Properties) -> Option<String> {
    let uid = rustix::process::geteuid();
    let owner = fs::symlink_metadata(&store.upper_layer).ok()?.uid();
    if uid.is_root() || uid.as_raw() == owner {
        return None;
    }
    let (name, owner) = (&store.name, user_name(owner));
    let way_out = if store.daemon_uri.is_empty() {
        format!("for others, declare [stores.{name}.daemon]")
    } else {
        format!("use its Nix daemon, `layered-stores uri --daemon {name}`")
    };
    Some(format!("store {name:?} belongs to {owner}, and nobody else but root can open this URL; {way_out}"))
}
