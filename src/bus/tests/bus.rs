//! A message bus inside of the test process. It speaks the protocol as far as the daemon and its clients need it, but for match
//! rules: everybody gets every signal.
//!
//! There is no socket in it. A paused clock jumps to the next timer once no task can go on, and knows nothing of what the kernel
//! is about to deliver; what is in memory has woken its reader by then.

use std::{
    collections::BTreeMap,
    io,
    num::NonZeroU32,
    os::fd::{BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::sync::mpsc;
use zbus::{
    Connection, Message,
    connection::{
        Builder,
        socket::{BoxedSplit, ReadHalf, Split, WriteHalf},
    },
    export::async_trait::async_trait,
    message::{Header, Type},
    wire::DynamicType,
};

const BUS: &str = "org.freedesktop.DBus";
const UNKNOWN_NAME: &str = "org.freedesktop.DBus.Error.NameHasNoOwner";

/// The bus.
#[derive(Clone, Debug, Default)]
pub(super) struct Bus(Arc<Mutex<Peers>>);

#[derive(Debug, Default)]
struct Peers {
    all: BTreeMap<String, Peer>,
    /// Well-known names, and whose they are.
    names: BTreeMap<String, String>,
    last: u32,
}

#[derive(Debug)]
struct Peer {
    uid: u32,
    inbox: mpsc::UnboundedSender<Vec<u8>>,
}

impl Bus {
    /// Connects somebody.
    pub(super) async fn connect(&self, uid: u32) -> Connection {
        self.connect_slowly(uid, || Duration::ZERO).await
    }

    /// Connects somebody of whom the bus takes one message after the other, after a pause each.
    pub(super) async fn connect_slowly(
        &self,
        uid: u32,
        mut pause: impl FnMut() -> Duration + Send + 'static,
    ) -> Connection {
        let (inbox, incoming) = mpsc::unbounded_channel();
        let (outgoing, mut sent) = mpsc::channel::<Message>(1);
        let name = self.next_name();
        let reader = Reader { incoming, rest: Vec::new() };
        let newcomer = Newcomer { bus: self.clone(), name: name.clone(), peer: Peer { uid, inbox } };
        let writer = Writer { newcomer: Some(newcomer), outgoing: Some(outgoing) };
        let bus = self.clone();
        tokio::spawn(async move {
            while let Some(message) = sent.recv().await {
                let pause = pause();
                if !pause.is_zero() {
                    tokio::time::sleep(pause).await;
                }
                bus.pass_on(&name, &message);
            }
            bus.leave(&name);
        });
        let socket: BoxedSplit = Split::new(Box::new(reader), Box::new(writer));
        Builder::socket(socket).build().await.expect("a connection")
    }

    /// Whether somebody has a name.
    pub(super) fn knows(&self, name: &str) -> bool {
        self.peers().owner(name).is_some()
    }

    fn peers(&self) -> MutexGuard<'_, Peers> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next_name(&self) -> String {
        let mut peers = self.peers();
        peers.last += 1;
        format!(":1.{}", peers.last)
    }

    fn enter(&self, newcomer: Newcomer) {
        let (mut peers, name) = (self.peers(), newcomer.name);
        peers.all.insert(name.clone(), newcomer.peer);
        peers.owner_changed(&name, "", &name);
    }

    fn leave(&self, name: &str) {
        let mut peers = self.peers();
        peers.all.remove(name);
        let owned: Vec<_> = peers.names.extract_if(.., |_, owner| owner == name).map(|(owned, _)| owned).collect();
        for owned in owned {
            peers.owner_changed(&owned, name, "");
        }
        peers.owner_changed(name, name, "");
    }

    fn pass_on(&self, sender: &str, message: &Message) {
        let header = message.header();
        let mut peers = self.peers();
        match header.destination().map(|name| name.as_str()) {
            None => peers.tell_all(message, sender),
            Some(BUS) => {
                let answer = peers.answer(sender, message, &header);
                peers.tell(sender, &answer);
            }
            Some(name) => match peers.owner(name).map(str::to_owned) {
                Some(owner) => peers.tell(&owner, message),
                None if message.message_type() == Type::MethodCall => {
                    let answer = error(&header, "org.freedesktop.DBus.Error.ServiceUnknown");
                    peers.tell(sender, &answer);
                }
                None => {}
            },
        }
    }
}

impl Peers {
    fn owner<'a>(&'a self, name: &'a str) -> Option<&'a str> {
        if self.all.contains_key(name) { Some(name) } else { self.names.get(name).map(String::as_str) }
    }

    fn tell(&self, name: &str, message: &Message) {
        if let Some(peer) = self.all.get(name) {
            // It may be about to leave.
            let _ = peer.inbox.send(message.data().to_vec());
        }
    }

    fn tell_all(&self, message: &Message, but: &str) {
        for name in self.all.keys().filter(|name| *name != but) {
            self.tell(name, message);
        }
    }

    fn owner_changed(&self, name: &str, old: &str, new: &str) {
        let signal = Message::signal("/org/freedesktop/DBus", BUS, "NameOwnerChanged").sender(BUS);
        self.tell_all(&signal.build(&(name, old, new)).expect("a signal"), "");
    }

    /// Answers a call of the bus itself.
    fn answer(&mut self, sender: &str, message: &Message, header: &Header<'_>) -> Message {
        let body = message.body();
        let named = || body.deserialize::<String>().expect("a name");
        match header.member().map(|member| member.as_str()) {
            Some("AddMatch" | "RemoveMatch") => reply(header, &()),
            Some("RequestName") => {
                let (name, _) = body.deserialize::<(String, u32)>().expect("a name and flags");
                if self.names.contains_key(&name) {
                    return reply(header, &3_u32);
                }
                self.names.insert(name.clone(), sender.to_owned());
                self.owner_changed(&name, "", sender);
                reply(header, &1_u32)
            }
            Some("NameHasOwner") => reply(header, &self.owner(&named()).is_some()),
            Some("GetNameOwner") => match self.owner(&named()) {
                Some(owner) => reply(header, &owner),
                None => error(header, UNKNOWN_NAME),
            },
            Some("GetConnectionUnixUser") => match self.all.get(&named()) {
                Some(peer) => reply(header, &peer.uid),
                None => error(header, UNKNOWN_NAME),
            },
            _ => error(header, "org.freedesktop.DBus.Error.UnknownMethod"),
        }
    }
}

fn reply(call: &Header<'_>, body: &(impl serde::Serialize + DynamicType)) -> Message {
    Message::method_return(call).sender(BUS).build(body).expect("a reply")
}

fn error(call: &Header<'_>, name: &'static str) -> Message {
    Message::error(call, name).sender(BUS).build(&("the bus of the tests says no",)).expect("an error")
}

/// What comes from the bus.
#[derive(Debug)]
struct Reader {
    incoming: mpsc::UnboundedReceiver<Vec<u8>>,
    rest: Vec<u8>,
}

#[async_trait]
impl ReadHalf for Reader {
    async fn recvmsg(&mut self, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
        if self.rest.is_empty() {
            self.rest = self.incoming.recv().await.unwrap_or_default();
        }
        let count = self.rest.len().min(buffer.len());
        buffer[..count].copy_from_slice(&self.rest[..count]);
        self.rest.drain(..count);
        Ok((count, Vec::new()))
    }

    fn auth_mechanism(&self) -> zbus::connection::AuthMechanism {
        zbus::connection::AuthMechanism::Anonymous
    }
}

/// What goes to the bus.
#[derive(Debug)]
struct Writer {
    /// Until it has greeted.
    newcomer: Option<Newcomer>,
    outgoing: Option<mpsc::Sender<Message>>,
}

/// Somebody who is not on the bus yet.
#[derive(Debug)]
struct Newcomer {
    bus: Bus,
    name: String,
    peer: Peer,
}

#[async_trait]
impl WriteHalf for Writer {
    async fn send_message(&mut self, message: &Message) -> zbus::Result<()> {
        let closed = || io::Error::from(io::ErrorKind::BrokenPipe);
        let outgoing = self.outgoing.as_ref().ok_or_else(closed)?;
        Ok(outgoing.send(message.clone()).await.map_err(|_| closed())?)
    }

    /// Answers the handshake and the `Hello` after it, which come together.
    async fn sendmsg(&mut self, bytes: &[u8], _: &[BorrowedFd<'_>]) -> io::Result<usize> {
        const END: &[u8] = b"BEGIN\r\n";
        let end = bytes.windows(END.len()).position(|window| window == END).expect("a handshake") + END.len();
        let serial: [u8; 4] = bytes[end + 8..end + 12].try_into().expect("a message");
        let serial = NonZeroU32::new(u32::from_ne_bytes(serial)).expect("not zero");
        let newcomer = self.newcomer.take().expect("one greeting");
        let name = newcomer.name.as_str();
        let hello = Message::method_call("/", "Hello").serial(serial).sender(name).build(&());
        let reply = reply(&hello.expect("a call").header(), &name);
        for part in [b"OK 0123456789abcdef0123456789abcdef\r\n".as_slice(), reply.data()] {
            let _ = newcomer.peer.inbox.send(part.to_vec());
        }
        newcomer.bus.clone().enter(newcomer);
        Ok(bytes.len())
    }

    async fn close(&mut self) -> io::Result<()> {
        self.outgoing = None;
        Ok(())
    }
}
