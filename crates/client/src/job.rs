//! Following a job of the daemon's.

use std::convert::Infallible;

use futures_util::StreamExt as _;
use layered_stores_model::StoreName;
use zbus::{Connection, fdo, names::BusName, proxy::CacheProperties, wire::OwnedObjectPath};

use crate::{
    BUS_NAME,
    client::ClientError,
    proxy::{JobProxy, StoreProxy},
    store_path,
};

/// A job that this process waits for. It is cancelled when the connection to the bus ends, if nobody else waits for it.
pub struct Job {
    proxy: JobProxy<'static>,
}

impl Job {
    /// Has the daemon begin a job about a store, with the method that `begin` calls.
    pub(crate) async fn begin(
        connection: &Connection,
        name: &StoreName,
        begin: impl AsyncFnOnce(&StoreProxy<'_>) -> zbus::Result<OwnedObjectPath>,
    ) -> Result<Self, ClientError> {
        // By its unique name: the next daemon knows nothing of this one's jobs, and numbers its own in the same way.
        let owner = fdo::DBusProxy::new(connection).await?.get_name_owner(BUS_NAME.try_into()?).await?;
        let daemon = BusName::from(owner.into_inner());
        let store = StoreProxy::builder(connection).destination(daemon.clone()).path(store_path(name)).build().await?;
        let path = begin(&store).await.map_err(meanwhile)?;
        let proxy = JobProxy::builder(connection).destination(daemon).path(path);
        Ok(Self { proxy: proxy.cache_properties(CacheProperties::Lazily).build().await? })
    }

    /// Waits until it is over, and returns what it has found.
    ///
    /// # Errors
    /// [`ClientError::Gone`] when the daemon ends first, else what the daemon says.
    pub async fn result(&self) -> Result<Vec<(String, String)>, ClientError> {
        self.proxy.get_result().await.map_err(meanwhile)
    }

    /// Waits for it no more: [`result`](Self::result) returns, and the job ends if nobody else waits for it.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn cancel(&self) -> Result<(), ClientError> {
        self.proxy.cancel().await.map_err(meanwhile)
    }

    /// Tells how much is done and how much there is to do, each time that the daemon says so. Never returns.
    pub async fn watch(&self, mut tell: impl FnMut(u64, u64)) -> Infallible {
        let mut changes = self.proxy.receive_done_changed().await;
        while changes.next().await.is_some() {
            if let (Ok(done), Ok(total)) = (self.proxy.done().await, self.proxy.total().await) {
                tell(done, total);
            }
        }
        // What has become of the job is not told here.
        std::future::pending().await
    }
}

/// What an error means while something is waited for: the daemon that was asked is not there to answer.
fn meanwhile(error: zbus::Error) -> ClientError {
    match &error {
        zbus::Error::FDO(fdo_error)
            if matches!(
                **fdo_error,
                fdo::Error::NoReply(_) | fdo::Error::ServiceUnknown(_) | fdo::Error::NameHasNoOwner(_)
            ) =>
        {
            ClientError::Gone
        }
        zbus::Error::InputOutput(_) => ClientError::NoBus(error),
        _ => error.into(),
    }
}
