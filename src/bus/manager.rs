//! `org.layeredstores1.Manager`.

use zbus::{interface, message::Header, wire::OwnedObjectPath};

use super::{
    authorization::{Action, Authorization},
    error::Result,
    store_path,
};
use crate::supervisor::{Command, Handle, StatusCell};

/// The object at `/org/layeredstores1`.
pub(super) struct Manager {
    pub(super) handle: Handle,
    pub(super) authorization: Authorization,
}

fn path_of(cell: &StatusCell) -> OwnedObjectPath {
    cell.read(|status| store_path(status.name()))
}

/// All layered stores of this machine.
#[interface(name = "org.layeredstores1.Manager")]
impl Manager {
    /// All stores, by name: name, state and object.
    #[zbus(out_args("stores"))]
    fn list_stores(&self) -> Vec<(String, String, OwnedObjectPath)> {
        let row = |cell: &StatusCell| {
            cell.read(|status| (status.name().to_string(), status.state.to_string(), store_path(status.name())))
        };
        self.handle.stores().iter().map(row).collect()
    }

    /// The object of a store. Fails with `org.layeredstores1.Error.NoSuchStore`.
    #[zbus(out_args("store"))]
    fn get_store(&self, name: &str) -> Result<OwnedObjectPath> {
        Ok(path_of(&self.handle.store(name)?))
    }

    /// The object of the store with a real store dir. Fails with `org.layeredstores1.Error.NoSuchStore`.
    #[zbus(out_args("store"))]
    fn get_store_by_path(&self, real_store_dir: &str) -> Result<OwnedObjectPath> {
        Ok(path_of(&self.handle.store_at(real_store_dir)?))
    }

    /// Makes the merged directory of the store with a real store dir agree with its layers, and returns when it does. This
    /// is what Nix's remount hook calls. Allowed to root, to the store's owner, and to whom polkit allows
    /// `org.layeredstores1.remount`.
    async fn remount(&self, real_store_dir: &str, #[zbus(header)] call: Header<'_>) -> Result<()> {
        let (name, owner) =
            self.handle.store_at(real_store_dir)?.read(|status| (status.name().clone(), status.owner_uid));
        self.authorization.check(&call, Action::Remount, Some(name.as_str()), Some(owner)).await?;
        Ok(self.handle.ask(|reply| Command::Remount(name, reply)).await?)
    }

    /// Reads the configuration again and puts it in force as a whole, or not at all: with mistakes in it, this fails with
    /// `org.layeredstores1.Error.InvalidConfiguration` and everything stays as it is. Returns when all stores are where
    /// they should be or were given up on. Needs `org.layeredstores1.reload`.
    async fn reload(&self, #[zbus(header)] call: Header<'_>) -> Result<()> {
        self.authorization.check(&call, Action::Reload, None, None).await?;
        Ok(self.handle.ask(Command::Reload).await?)
    }

    /// The daemon's version.
    #[zbus(property(emits_changed_signal = "const"))]
    fn version(&self) -> &str {
        env!("CARGO_PKG_VERSION")
    }
}
