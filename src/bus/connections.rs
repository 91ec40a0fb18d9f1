//! The daemon's connections to the system bus.

use zbus::{Connection, fdo, proxy::CacheProperties};
use zbus_polkit::policykit1::AuthorityProxy;

use super::{authorization::Authorization, gate, questions::Questions};

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
        let questions = gate::connect_for_calls().await?;
        let bus = fdo::DBusProxy::builder(&questions).cache_properties(CacheProperties::No).build().await?;
        let polkit = AuthorityProxy::builder(&questions).cache_properties(CacheProperties::No).build().await?;
        let (serving, gate) = gate::connect(bus.clone()).await?;
        let authorization = Authorization::new(bus.clone(), gate, Questions::new(bus, polkit));
        Ok(Self { serving, engine: gate::connect_for_calls().await?, questions, authorization })
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
