//! The daemon's connections to the system bus.

use std::sync::Arc;

use zbus::{Connection, fdo, proxy::CacheProperties};
use zbus_polkit::policykit1::AuthorityProxy;

use super::{
    authorization::Authorization,
    gate::{self, Gate},
    questions::Questions,
};

/// The bus itself, asked over a connection.
pub(super) async fn bus_over(connection: &Connection) -> zbus::Result<fdo::DBusProxy<'static>> {
    fdo::DBusProxy::builder(connection).cache_properties(CacheProperties::No).build().await
}

/// The daemon's connections to the system bus: each fills up, waits or is held up for itself.
#[derive(Debug)]
pub struct Connections {
    /// Callers come in here.
    pub serving: Connection,
    /// The engine talks to systemd here.
    pub engine: Connection,
    /// The bus is asked here who callers are, and polkit what they may do.
    questions: Connection,
    pub(super) authorization: Authorization,
}

impl Connections {
    /// Connects to the system bus.
    ///
    /// # Errors
    /// When the bus does not answer.
    pub async fn open() -> zbus::Result<Self> {
        let bus = bus_over(&gate::connect_for_calls().await?).await?;
        let (serving, gate) = gate::connect(bus.clone()).await?;
        Self::of(bus, serving, gate, gate::connect_for_calls().await?).await
    }

    /// Takes connections that there are. `bus` is asked over one for calls of our own.
    pub(super) async fn of(
        bus: fdo::DBusProxy<'static>,
        serving: Connection,
        gate: Arc<Gate>,
        engine: Connection,
    ) -> zbus::Result<Self> {
        let questions = bus.inner().connection().clone();
        let polkit = AuthorityProxy::builder(&questions).cache_properties(CacheProperties::No).build().await?;
        let authorization = Authorization::new(bus.clone(), gate, Questions::new(bus, polkit));
        Ok(Self { serving, engine, questions, authorization })
    }

    /// Returns when one of them is lost. They are of no use without each other.
    pub async fn closed(&self) {
        tokio::select! {
            () = self.serving.closed() => {}
            () = self.engine.closed() => {}
            () = self.questions.closed() => {}
        }
    }

    /// Gives them back, and with them the bus name.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub async fn close(self) -> zbus::Result<()> {
        self.serving.close().await?;
        self.engine.close().await?;
        self.questions.close().await
    }
}
