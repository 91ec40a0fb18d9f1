//! Whatever a peer sends, zbus goes on reading behind the gate: its reader ends with the first message that it cannot make sense
//! of, and the connection with it.

use std::{iter, time::Duration};

use proptest::prelude::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use zbus::connection::socket::{ReadHalf, WriteHalf};

use super::*;

/// The bus's end of a connection.
struct Bus {
    read: Box<dyn ReadHalf>,
    write: Box<dyn WriteHalf>,
    connection: Connection,
}

impl Bus {
    /// Connects zbus through a gate, which takes everybody for the same user.
    async fn connect() -> Self {
        let (mut bus, ours) = UnixStream::pair().expect("a pair of sockets");
        let (gate, mut strangers, refused) = Gate::new();
        let greeting = async {
            const END: &[u8] = b"BEGIN\r\n";
            let (mut said, mut buffer) = (Vec::new(), [0; 4096]);
            let hello = loop {
                let count = bus.read(&mut buffer).await.expect("a greeting");
                said.extend_from_slice(&buffer[..count]);
                let end = said.windows(END.len()).position(|window| window == END).map(|at| at + END.len());
                if let Some(serial) = end.and_then(|end| said.get(end + 8..end + 12)) {
                    break u32::from_ne_bytes(serial.try_into().expect("four bytes"));
                }
            };
            let hello = Message::method_call("/", "Hello").serial(hello.try_into().expect("not zero")).build(&());
            let answer = Message::method_return(&hello.expect("a call").header()).build(&":1.1").expect("a reply");
            bus.write_all(b"OK 0123456789abcdef0123456789abcdef\r\n").await.expect("somebody reads");
            bus.write_all(answer.data()).await.expect("somebody reads");
        };
        let connecting = connection::Builder::socket(socket::gated(ours, Some(Arc::clone(&gate)))).build();
        let (connection, ()) = tokio::join!(connecting, greeting);
        let connection = connection.expect("a connection");
        // From here on it answers calls.
        connection.object_server();
        tokio::spawn(send_refusals(refused, connection.clone()));
        tokio::spawn(async move {
            while let Some(name) = strangers.recv().await {
                gate.identified(&name, Some(1000));
            }
        });
        // Of what comes back, answers are looked at.
        let (read, write) = socket::gated(bus, None).take();
        Self { read, write, connection }
    }

    async fn send(&mut self, message: &[u8]) {
        send(&mut self.write, message).await;
    }

    /// The answer to a call. There has to be one.
    async fn answer(&mut self, serial: NonZeroU32) -> Message {
        let answer = async {
            loop {
                let message = self.read.receive_message(1, &mut Vec::new(), &mut Vec::new()).await.expect("a message");
                if message.header().reply_serial() == Some(serial) {
                    return message;
                }
            }
        };
        tokio::select! {
            answer = tokio::time::timeout(Duration::from_secs(20), answer) => answer.expect("an answer"),
            () = self.connection.closed() => panic!("the connection is closed"),
        }
    }

    /// Whether calls are answered.
    async fn is_alive(&mut self) -> bool {
        self.send(call(LAST).data()).await;
        self.answer(number(LAST)).await.message_type() == zbus::message::Type::MethodReturn
    }
}

/// The serial of the call that is made last.
const LAST: u32 = 1_000_000;

async fn send(write: &mut Box<dyn WriteHalf>, mut message: &[u8]) {
    while !message.is_empty() {
        let sent = write.sendmsg(message, &[]).await.expect("somebody reads");
        message = &message[sent..];
    }
}

fn number(serial: u32) -> NonZeroU32 {
    serial.try_into().expect("not zero")
}

fn call(serial: u32) -> Message {
    let call = Message::method_call("/", "Ping").interface("org.freedesktop.DBus.Peer").sender(":1.7");
    call.serial(number(serial)).build(&()).expect("a call")
}

fn signal(serial: u32, destination: Option<&'static str>) -> Message {
    let signal = Message::signal("/", "org.example", "News").sender(":1.7").serial(number(serial));
    let signal = match destination {
        Some(destination) => signal.destination(destination),
        None => signal,
    };
    signal.build(&("something", 1u32)).expect("a signal")
}

/// Adds a field to the header of a message.
fn with_field(message: &Message, code: u8, signature: &str, value: &[u8]) -> Vec<u8> {
    let mut bytes = message.data().to_vec();
    let length = u32::from_ne_bytes(bytes[12..16].try_into().expect("four bytes")) as usize;
    let body = bytes.split_off((frame::FIXED + length).next_multiple_of(8));
    bytes.extend([code, u8::try_from(signature.len()).expect("short")]);
    bytes.extend(signature.bytes().chain(iter::once(0)).chain(value.iter().copied()));
    let length = u32::try_from(bytes.len() - frame::FIXED).expect("short");
    bytes[12..16].copy_from_slice(&length.to_ne_bytes());
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes.extend(body);
    bytes
}

#[tokio::test]
async fn a_call_with_a_field_that_zbus_does_not_know_is_refused_and_the_next_one_answered() {
    let mut bus = Bus::connect().await;
    bus.send(&with_field(&call(1), 10, "u", &[1, 0, 0, 0])).await;
    let refused = bus.answer(number(1)).await;
    assert_eq!(refused.header().error_name().map(ToString::to_string).as_deref(), Some(NOT_SUPPORTED));
    assert!(bus.is_alive().await);
}

#[tokio::test]
async fn what_zbus_cannot_read_is_dropped_and_takes_nobodys_place() {
    let mut bus = Bus::connect().await;
    let reply = Message::method_return(&call(77).header()).sender(":1.7").build(&()).expect("a reply");
    for serial in 1..100 {
        for message in [
            // A file descriptor that is not there, which not even the rest can be read with.
            with_field(&call(serial), 200, "h", &[0, 0, 0, 0]),
            with_field(&signal(serial, Some(":1.1")), 200, "h", &[0, 0, 0, 0]),
            with_field(&signal(serial, None), 11, "s", b"\x01\0\0\0x\0"),
            with_field(&reply, 11, "s", b"\x01\0\0\0x\0"),
            // Twice what comes once.
            with_field(&signal(serial, None), 7, "s", b"\x04\0\0\0:1.7\0"),
        ] {
            bus.send(&message).await;
        }
        // A type, a version and a serial that there are not.
        for (at, value) in [(1, 0), (1, 5), (1, 255), (3, 2)] {
            let mut message = call(serial).data().to_vec();
            message[at] = value;
            bus.send(&message).await;
        }
        let mut message = call(serial).data().to_vec();
        message[8..12].fill(0);
        bus.send(&message).await;
    }
    assert!(bus.is_alive().await);
}

#[derive(Clone, Debug)]
enum Change {
    /// A byte is another one.
    Byte(prop::sample::Index, u8),
    Field(u8, &'static str, Vec<u8>),
}

fn change() -> impl Strategy<Value = Change> {
    let value = prop::collection::vec(prop_oneof![Just(0), 0..5u8, any::<u8>()], 0..20);
    let signature = prop::sample::select(vec!["s", "o", "g", "u", "h", "v", "ah", "(uh)", "a{sv}", "", "x!", "ss"]);
    prop_oneof![
        (any::<prop::sample::Index>(), any::<u8>()).prop_map(|(at, value)| Change::Byte(at, value)),
        (0..12u8, signature, value).prop_map(|(code, signature, value)| Change::Field(code, signature, value)),
    ]
}

/// A message with a change. As long as the bus says: it finds the ends of messages as we do.
fn changed(kind: u8, serial: u32, change: &Change) -> Vec<u8> {
    let message = match kind {
        0 => call(serial),
        1 => signal(serial, None),
        2 => signal(serial, Some(":1.1")),
        _ => Message::method_return(&call(serial).header()).sender(":1.7").build(&("an answer",)).expect("a reply"),
    };
    match change {
        Change::Byte(at, value) => {
            let mut bytes = message.data().to_vec();
            let places: Vec<usize> = (0..bytes.len()).filter(|at| *at != 0 && !matches!(at, 4..8 | 12..16)).collect();
            bytes[*at.get(&places)] = *value;
            bytes
        }
        Change::Field(code, signature, value) => with_field(&message, *code, signature, value),
    }
}

proptest! {
    #[test]
    fn whatever_a_peer_sends_calls_are_answered_after_it(
        changes in prop::collection::vec((0..4u8, change()), 1..50),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let is_alive = runtime.block_on(async {
            let mut bus = Bus::connect().await;
            for (serial, (kind, change)) in (1..).zip(&changes) {
                bus.send(&changed(*kind, serial, change)).await;
            }
            bus.is_alive().await
        });
        prop_assert!(is_alive);
    }
}
