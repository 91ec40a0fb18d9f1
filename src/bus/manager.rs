//! `org.layeredstores1.Manager`.

use layered_stores_client::store_path;
use layered_stores_model::{StoreName, excerpt};
use zbus::{interface, message::Header, wire::OwnedObjectPath};

use super::{
    authorization::{Action, Authorization},
    error::Result,
};
use crate::supervisor::{Asker, Command, Error, Handle, StatusCell};

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
        Ok(self.handle.ask(|reply| Command::Remount(name, Asker::Allowed, reply)).await?)
    }

    /// Reads the configuration again and puts it in force as a whole, or not at all: with mistakes in it, this fails with
    /// `org.layeredstores1.Error.InvalidConfiguration` and everything stays as it is. Returns when all stores are where
    /// they should be or were given up on. Needs `org.layeredstores1.reload`.
    async fn reload(&self, #[zbus(header)] call: Header<'_>) -> Result<()> {
        self.authorization.check(&call, Action::Reload, None, None).await?;
        Ok(self.handle.ask(Command::Reload).await?)
    }

    /// What is left of stores that are not declared any more: name, directory, and whether it takes memory because the store was
    /// ephemeral. `RemoveData` removes it.
    #[zbus(out_args("left_over"))]
    async fn list_left_over(&self) -> Result<Vec<(String, String, bool)>> {
        let all = self.handle.left_over().await?;
        Ok(all.into_iter().map(|left| (left.name.to_string(), left.directory.to_string(), left.in_memory)).collect())
    }

    /// Removes what is left of a store that is not declared any more, or all that is in a declared store that is not active,
    /// which is empty when it comes up the next time; returns when it is gone. Fails with `org.layeredstores1.Error.InUse`
    /// when the store is active. Needs `org.layeredstores1.remove-data`.
    async fn remove_data(&self, name: &str, #[zbus(header)] call: Header<'_>) -> Result<()> {
        let unknown = || Error::NoSuchStore(excerpt(name, StoreName::MAX_LEN));
        let name: StoreName = name.parse().map_err(|_| unknown())?;
        self.authorization.check(&call, Action::RemoveData, Some(name.as_str()), None).await?;
        Ok(self.handle.ask(|reply| Command::RemoveData(name, reply)).await?)
    }

    /// The daemon's version.
    #[zbus(property(emits_changed_signal = "const"))]
    fn version(&self) -> &str {
        env!("CARGO_PKG_VERSION")
    }
}
