//! The gate between the bus and us.
//!
//! zbus takes in every call there is and makes a task of each, so who sends faster than it is answered, or sends what is
//! large, takes memory and time from everybody; and it ends its connection with the first header that it cannot read. Here
//! messages are looked at as they come from the socket, before anything is made of them: what is too large or cannot be read is
//! skipped without being kept, what is too much is refused, and the rest is let in as its user's turn comes.

mod frame;
mod limits;
mod socket;
#[cfg(test)]
mod tests;

use std::{
    num::NonZeroU32,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use limits::{Arrival, Call, Limits};
use tokio::{
    net::UnixStream,
    sync::{Notify, mpsc},
};
use zbus::{
    Address, Connection, Message,
    address::transport::{Transport, UnixSocket},
    connection, fdo,
};

/// How many refusals may wait to be sent. Who asks for more gets none.
const REFUSALS: usize = 64;

const LIMITS_EXCEEDED: &str = "org.freedesktop.DBus.Error.LimitsExceeded";
const NOT_SUPPORTED: &str = "org.freedesktop.DBus.Error.NotSupported";

/// Lets calls in, as much as each user may have.
#[derive(Debug)]
pub(super) struct Gate {
    limits: Mutex<Limits>,
    news: Notify,
    strangers: mpsc::UnboundedSender<String>,
    refusals: mpsc::Sender<Refusal>,
}

/// A call that is refused.
#[derive(Debug)]
struct Refusal {
    sender: String,
    serial: NonZeroU32,
    error: &'static str,
    why: String,
}

impl Gate {
    /// A gate, the names of those who have to be [`identified`](Self::identified), and what is to be refused.
    fn new() -> (Arc<Self>, mpsc::UnboundedReceiver<String>, mpsc::Receiver<Refusal>) {
        let (strangers, names) = mpsc::unbounded_channel();
        let (refusals, refused) = mpsc::channel(REFUSALS);
        (Arc::new(Self { limits: Mutex::default(), news: Notify::new(), strangers, refusals }), names, refused)
    }

    /// Takes a call that has come in. Returns whether that was possible now; if not, it is once there are [`news`](Self::news).
    fn arrive(&self, call: Call) -> bool {
        let sender = call.sender.clone();
        let arrival = self.limits().arrive(call, Instant::now());
        match arrival {
            Arrival::Taken => {}
            // There are as many as `limits` allows; the other end goes only with us.
            Arrival::Unknown => drop(self.strangers.send(sender)),
            Arrival::Refused(call) => self.refuse_too_many(call),
            Arrival::Later => return false,
        }
        true
    }

    fn refuse_too_many(&self, call: Call) {
        let why = "too many calls of this user are under way; wait for answers";
        self.refuse(call, LIMITS_EXCEEDED, why.to_owned());
    }

    fn refuse(&self, call: Call, error: &'static str, why: String) {
        let Call { sender, serial, wants_reply, .. } = call;
        if wants_reply {
            let _ = self.refusals.try_send(Refusal { sender, serial, error, why });
        }
    }

    fn identified(&self, sender: &str, uid: Option<u32>) {
        for call in self.limits().identified(sender, uid, Instant::now()) {
            self.refuse_too_many(call);
        }
        self.news.notify_one();
    }

    /// Whether an answer on its way out is wanted.
    fn answered(&self, message: &Message) -> bool {
        let header = message.header();
        let (Some(destination), Some(serial)) = (header.destination(), header.reply_serial()) else { return true };
        let mut limits = self.limits();
        let wanted = limits.answered(destination.as_str(), serial, message.data().len(), Instant::now());
        if limits.has_next() {
            self.news.notify_one();
        }
        wanted
    }

    fn next(&self) -> Option<Vec<u8>> {
        self.limits().next()
    }

    /// Returns when there may be something for [`next`](Self::next).
    async fn news(&self) {
        let due = self.limits().due();
        let balance = async {
            match due {
                Some(due) => tokio::time::sleep_until(due.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = self.news.notified() => {}
            () = balance => self.limits().tick(Instant::now()),
        }
    }

    /// Whose connection that is, if it has called.
    pub(super) fn uid(&self, sender: &str) -> Option<u32> {
        self.limits().uid(sender)
    }

    fn limits(&self) -> MutexGuard<'_, Limits> {
        // Nothing that holds it can panic halfway through a change.
        self.limits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A gate that nobody comes through, so that the bus is asked about everybody.
    #[cfg(test)]
    pub(super) fn unused() -> Arc<Self> {
        Self::new().0
    }
}

/// Connects to the system bus, with calls coming in through a gate. `bus` is asked who callers are.
pub(super) async fn connect(bus: fdo::DBusProxy<'static>) -> zbus::Result<(Connection, Arc<Gate>)> {
    let (gate, mut names, refused) = Gate::new();
    let connection = connect_through(Some(Arc::clone(&gate))).await?;

    let identifier = Arc::downgrade(&gate);
    tokio::spawn(async move {
        while let Some(name) = names.recv().await {
            let (bus, gate) = (bus.clone(), identifier.clone());
            tokio::spawn(async move {
                let uid = match zbus::names::UniqueName::try_from(name.as_str()) {
                    Ok(unique) => bus.get_connection_unix_user(unique.into()).await.ok(),
                    Err(_) => None,
                };
                if let Some(gate) = gate.upgrade() {
                    gate.identified(&name, uid);
                }
            });
        }
    });
    tokio::spawn(send_refusals(refused, connection.clone()));
    Ok((connection, gate))
}

async fn send_refusals(mut refused: mpsc::Receiver<Refusal>, connection: Connection) {
    while let Some(refusal) = refused.recv().await {
        // Who went away needs no answer, and when the connection is lost the daemon ends.
        if let Ok(message) = refusal.message() {
            let _ = connection.send(&message).await;
        }
    }
}

/// Connects to the system bus for calls of our own. Nobody can call us here, or hold us up with signals.
pub(super) async fn connect_for_calls() -> zbus::Result<Connection> {
    connect_through(None).await
}

async fn connect_through(gate: Option<Arc<Gate>>) -> zbus::Result<Connection> {
    let address = Address::system()?;
    let Transport::Unix(unix) = address.transport() else { return Err(zbus::Error::Unsupported) };
    let UnixSocket::File(path) = unix.path() else { return Err(zbus::Error::Unsupported) };
    let stream = UnixStream::connect(path).await?;
    connection::Builder::socket(socket::gated(stream, gate)).build().await
}

impl Refusal {
    fn message(&self) -> zbus::Result<Message> {
        // zbus answers the header of a message; the one of this call was not kept.
        let call = Message::method_call("/", "Refused").serial(self.serial).sender(self.sender.as_str()).build(&())?;
        Message::error(&call.header(), self.error).build(&(&self.why,))
    }
}
