//! `org.layeredstores1.Store`.

use layered_stores_client::job_path;
use layered_stores_model::StoreName;
use layered_stores_nix_db::index::protocol::Contents;
use zbus::{interface, message::Header, wire::OwnedObjectPath};

use super::{
    authorization::{Action, Authorization},
    error::Result,
    waiting,
};
use crate::supervisor::{Asker, Command, Handle, JobCommand, Kind, Status, StatusCell};

/// The object of one store.
pub(super) struct Store {
    pub(super) cell: StatusCell,
    pub(super) handle: Handle,
    pub(super) authorization: Authorization,
}

impl Store {
    /// One figure of what is in it.
    fn content(&self, figure: impl Fn(&Contents) -> u64) -> u64 {
        self.cell.read(|status| status.found.as_ref()?.contents().map(figure)).unwrap_or_default()
    }

    async fn check(&self, call: &Header<'_>, action: Action) -> Result<StoreName> {
        let (name, owner) = self.cell.read(|status| (status.name().clone(), status.owner_uid));
        let owner = (action == Action::Remount).then_some(owner);
        self.authorization.check(call, action, Some(name.as_str()), owner).await?;
        Ok(name)
    }

    /// Has a job done, for as long as the caller stays on the bus.
    async fn job(&self, call: &Header<'_>, kind: Kind) -> Result<OwnedObjectPath> {
        let name = self.check(call, Action::Job(kind)).await?;
        let caller = self.authorization.caller(call).await?;
        let ask = |reply| Command::Job(JobCommand::Ask(kind, name, caller.clone(), reply));
        let asked = self.handle.ask(ask).await?;
        if let Some(waits_no_more) = asked.waits_no_more {
            waiting::follow(caller, waits_no_more, self.authorization.clone(), self.handle.clone());
        }
        Ok(job_path(asked.job.id()))
    }
}

/// The problems of a store as pairs of code and message.
fn problems(status: &Status) -> Vec<(String, String)> {
    status.problems.iter().map(|(problem, message)| (problem.to_string(), message.clone())).collect()
}

/// One layered store.
#[interface(name = "org.layeredstores1.Store")]
impl Store {
    /// Brings the store up, and the layered store it lies on. Returns when it is active. Fails with
    /// `org.layeredstores1.Error.StartFailed`. Needs `org.layeredstores1.start`.
    async fn start(&self, #[zbus(header)] call: Header<'_>) -> Result<()> {
        let name = self.check(&call, Action::Start).await?;
        Ok(self.handle.ask(|reply| Command::Start(name, reply)).await?)
    }

    /// Takes the store down. Its data stays. Fails with `org.layeredstores1.Error.Busy` when it is in use and with
    /// `org.layeredstores1.Error.LowerOfOthers` when another store lies on it; it stays up then. Needs
    /// `org.layeredstores1.stop`.
    async fn stop(&self, #[zbus(header)] call: Header<'_>) -> Result<()> {
        let name = self.check(&call, Action::Stop).await?;
        Ok(self.handle.ask(|reply| Command::Stop(name, reply)).await?)
    }

    /// Makes the merged directory agree with its layers, and returns when it does. Fails with
    /// `org.layeredstores1.Error.NotActive`, `RefreshFailed` or `Stale`. Allowed to root, to the store's owner, and to whom
    /// polkit allows `org.layeredstores1.remount`.
    async fn remount(&self, #[zbus(header)] call: Header<'_>) -> Result<()> {
        let name = self.check(&call, Action::Remount).await?;
        Ok(self.handle.ask(|reply| Command::Remount(name, Asker::Allowed, reply)).await?)
    }

    /// Looks at every path for those whose merged view is not what the layers say, and changes nothing. Returns the job that
    /// does it, whose `GetResult` has them: one that begins after this call, for as long as the caller stays on the bus. Needs
    /// `org.layeredstores1.verify`.
    #[zbus(out_args("job"))]
    async fn verify(&self, #[zbus(header)] call: Header<'_>) -> Result<OwnedObjectPath> {
        self.job(&call, Kind::Verify).await
    }

    /// The store's name.
    #[zbus(property(emits_changed_signal = "const"))]
    fn name(&self) -> String {
        self.cell.read(|status| status.name().to_string())
    }

    /// `inactive`, `activating`, `active`, `deactivating` or `failed`.
    #[zbus(property)]
    fn state(&self) -> String {
        self.cell.read(|status| status.state.to_string())
    }

    /// Why it is in that state; empty when there is nothing to say.
    #[zbus(property)]
    fn state_reason(&self) -> String {
        self.cell.read(|status| status.state_reason.clone())
    }

    /// Since when it is in that state, in microseconds of real time.
    #[zbus(property, name = "StateChangeUSec")]
    fn state_change_usec(&self) -> u64 {
        self.cell.read(|status| status.state_change_usec)
    }

    /// When something that failed is tried again, in microseconds of real time; 0: nothing is.
    #[zbus(property, name = "NextTryUSec")]
    fn next_try_usec(&self) -> u64 {
        self.cell.read(|status| status.next_try_usec)
    }

    /// What is wrong with it, whatever its state: pairs of a code for programs and a message for people.
    #[zbus(property)]
    fn problems(&self) -> Vec<(String, String)> {
        self.cell.read(problems)
    }

    /// The URL under which Nix opens it.
    #[zbus(property)]
    fn store_uri(&self) -> String {
        self.cell.read(|status| status.spec.uri())
    }

    /// The URL under which the store's own Nix daemon is used; empty when none is declared.
    #[zbus(property)]
    fn daemon_uri(&self) -> String {
        self.cell.read(|status| status.spec.daemon_uri().unwrap_or_default())
    }

    /// The lower store as the configuration names it.
    #[zbus(property)]
    fn lower_store(&self) -> String {
        self.cell.read(|status| status.spec.lower_store.to_string())
    }

    /// The lower store's directory of store objects.
    #[zbus(property)]
    fn lower_store_dir(&self) -> String {
        self.cell.read(|status| status.spec.layers.lower.to_string())
    }

    /// The directory with the objects the store adds.
    #[zbus(property)]
    fn upper_layer(&self) -> String {
        self.cell.read(|status| status.spec.layers.upper.to_string())
    }

    /// OverlayFS's scratch directory.
    #[zbus(property)]
    fn work_dir(&self) -> String {
        self.cell.read(|status| status.spec.layers.work.to_string())
    }

    /// The directory where both layers are merged.
    #[zbus(property)]
    fn real_store_dir(&self) -> String {
        self.cell.read(|status| status.spec.layers.merged.to_string())
    }

    /// The directory with its database.
    #[zbus(property)]
    fn state_dir(&self) -> String {
        self.cell.read(|status| status.spec.state_dir.to_string())
    }

    /// The systemd unit of its mount.
    #[zbus(property)]
    fn mount_unit(&self) -> String {
        self.cell.read(|status| status.spec.mount_unit.to_string())
    }

    /// Whether the configuration declares it. A store that is declared no more is stopped and forgotten.
    #[zbus(property)]
    fn declared(&self) -> bool {
        self.cell.read(|status| status.declared)
    }

    /// Whether the daemon is ready, and layered-stores.target reached, only once this store is active.
    #[zbus(property)]
    fn required(&self) -> bool {
        self.cell.read(|status| status.spec.required)
    }

    /// When it was last refreshed, in microseconds of real time; 0: not since the daemon started.
    #[zbus(property, name = "LastRefreshUSec")]
    fn last_refresh_usec(&self) -> u64 {
        self.cell.read(|status| status.last_refresh_usec)
    }

    /// How it was last refreshed: `reconfigured` or `swapped`; empty: not since the daemon started.
    #[zbus(property)]
    fn last_refresh(&self) -> String {
        self.cell.read(|status| status.last_refresh.to_owned())
    }

    /// How many refreshes there were since the daemon started.
    #[zbus(property)]
    fn refresh_count(&self) -> u64 {
        self.cell.read(|status| status.refresh_count)
    }

    /// How many of them put a fresh superblock in place.
    #[zbus(property)]
    fn swap_count(&self) -> u64 {
        self.cell.read(|status| status.swap_count)
    }

    /// Whether it is known what is in it. Until it is, the counts and sizes are 0.
    #[zbus(property)]
    fn contents_known(&self) -> bool {
        self.cell.read(|status| status.found.as_ref().is_some_and(|found| found.contents().is_some()))
    }

    /// How many valid paths have their files in the upper layer.
    #[zbus(property)]
    fn upper_path_count(&self) -> u64 {
        self.content(|contents| contents.upper_paths)
    }

    /// The size, as NARs and in bytes, of the valid paths in the upper layer.
    #[zbus(property)]
    fn upper_nar_size(&self) -> u64 {
        self.content(|contents| contents.upper_size)
    }

    /// How many valid paths have their files in the upper layer and in the lower store as well.
    #[zbus(property)]
    fn shadowed_path_count(&self) -> u64 {
        self.content(|contents| contents.shadowed_paths)
    }

    /// The size, as NARs and in bytes, of what is in both: `layered-stores optimise` gives as much back.
    #[zbus(property)]
    fn shadowed_nar_size(&self) -> u64 {
        self.content(|contents| contents.shadowed_size)
    }

    /// How many valid paths have their files in the lower store only.
    #[zbus(property)]
    fn lower_path_count(&self) -> u64 {
        self.content(|contents| contents.lower_paths)
    }

    /// How many valid paths have their files nowhere.
    #[zbus(property)]
    fn lost_path_count(&self) -> u64 {
        self.content(|contents| contents.lost_paths)
    }

    /// How many paths are kept for it from the lower store's garbage collector.
    #[zbus(property)]
    fn lease_count(&self) -> u64 {
        self.cell.read(|status| status.found.as_ref().map_or(0, |found| found.leases()))
    }
}
