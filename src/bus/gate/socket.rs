//! The socket of a connection to the bus, read through the gate.

use std::{
    io,
    os::fd::{BorrowedFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use tokio::net::{
    UnixStream,
    unix::{OwnedReadHalf, OwnedWriteHalf},
};
use zbus::{
    Message,
    connection::socket::{BoxedSplit, ReadHalf, Split, WriteHalf},
    export::async_trait::async_trait,
    message::Type,
};

use super::{
    Gate, LIMITS_EXCEEDED, NOT_SUPPORTED,
    frame::{self, Fields, Kind, Start},
    limits::Call,
};

/// The longest call or signal, in bytes. No legal one is longer than a few KiB; the bus lets through 32 MiB.
const LONGEST: usize = 64 * 1024;

/// How much is read at a time.
const CHUNK: usize = 64 * 1024;

/// How long the bus may take nothing of us. It stops reading from who has too much on its way to others
/// (`max_incoming_bytes`), and others may never read; only a new connection gets out of that.
const STUCK: Duration = Duration::from_secs(30);

/// The bus itself.
const BUS: &str = "org.freedesktop.DBus";

/// A connection's socket, whose calls go through a gate. Without one, none get in.
pub(super) fn gated(stream: UnixStream, gate: Option<Arc<Gate>>) -> BoxedSplit {
    let (read, write) = stream.into_split();
    let reader = Reader {
        stream: read,
        gate: gate.clone(),
        state: State::Handshake,
        buffer: Vec::new(),
        taken: 0,
        admitted: Vec::new(),
        handed: 0,
    };
    Split::new(Box::new(reader), Box::new(Writer { stream: write, gate }))
}

/// What the next bytes of the stream are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Lines of text, until the first message.
    Handshake,
    /// The beginning of a message.
    Between,
    /// So many bytes of a message that is let in.
    Pass(usize),
    /// So many bytes of a message that is not.
    Skip(usize),
}

/// The half that is read. It hands on the messages that are let in, byte by byte as they were.
#[derive(Debug)]
pub(super) struct Reader {
    stream: OwnedReadHalf,
    gate: Option<Arc<Gate>>,
    state: State,
    /// What was read, and how much of it was used.
    buffer: Vec<u8>,
    taken: usize,
    /// A message that is let in, and how much of it was handed on.
    admitted: Vec<u8>,
    handed: usize,
}

/// What is to be done next.
enum Step {
    /// So many bytes of the buffer are handed on.
    Hand(usize),
    /// Look again.
    Again,
    /// More bytes are needed.
    Read,
    /// What is there cannot be taken before the gate has news.
    Wait,
}

impl Reader {
    fn available(&self) -> &[u8] {
        &self.buffer[self.taken..]
    }

    fn step(&mut self, room: usize) -> io::Result<Step> {
        let available = self.available().len();
        Ok(match self.state {
            State::Handshake => match self.available() {
                [] => Step::Read,
                // No line of the handshake begins like that.
                [b'l' | b'B', ..] => {
                    self.state = State::Between;
                    Step::Again
                }
                line => Step::Hand(line.iter().position(|&b| b == b'\n').map_or(line.len(), |at| at + 1).min(room)),
            },
            State::Pass(0) | State::Skip(0) => {
                self.state = State::Between;
                Step::Again
            }
            State::Pass(_) | State::Skip(_) if available == 0 => Step::Read,
            State::Pass(left) => {
                let count = left.min(available).min(room);
                self.state = State::Pass(left - count);
                Step::Hand(count)
            }
            State::Skip(left) => {
                let count = left.min(available);
                self.state = State::Skip(left - count);
                self.taken += count;
                Step::Again
            }
            State::Between => {
                if let Some(message) = self.gate.as_ref().and_then(|gate| gate.next()) {
                    (self.admitted, self.handed) = (message, 0);
                    return Ok(Step::Again);
                }
                return self.judge();
            }
        })
    }

    /// Decides about the message that the buffer begins with.
    fn judge(&mut self) -> io::Result<Step> {
        let Some((bytes, _)) = self.available().split_first_chunk() else { return Ok(Step::Read) };
        let broken = || io::Error::new(io::ErrorKind::InvalidData, "the bus has sent what is no message");
        let start = frame::start(bytes).ok_or_else(broken)?;
        let is_long = start.kind != Kind::Reply && start.total > LONGEST;
        // Of what is handed on as it comes, or is too long, only the header is looked at.
        let looked_at = if start.kind == Kind::Call && !is_long { start.total } else { start.body.min(LONGEST) };
        if self.available().len() < looked_at {
            return Ok(Step::Read);
        }
        let header = self.available().get(..start.body);
        let fields = header.and_then(|header| frame::fields(&start, &header[..start.header])).unwrap_or_default();
        let is_readable = header.is_some_and(frame::is_readable);
        self.state = match start.kind {
            Kind::Signal if is_readable && !is_long && is_expected(&fields) => State::Pass(start.total),
            Kind::Reply if is_readable => State::Pass(start.total),
            Kind::Call if !self.call(start, fields, is_long, is_readable) => return Ok(Step::Wait),
            Kind::Call | Kind::Signal | Kind::Other => State::Skip(start.total),
            Kind::Reply => {
                tracing::warn!("an answer on the bus has a header that cannot be read; it is as if there was none");
                State::Skip(start.total)
            }
        };
        Ok(Step::Again)
    }

    /// Takes a call that has come in. Returns whether that was possible now.
    fn call(&self, start: Start, fields: Fields, is_long: bool, is_readable: bool) -> bool {
        let (Some(gate), Some(sender)) = (&self.gate, fields.sender) else { return true };
        let Start { serial, wants_reply, total, .. } = start;
        let is_taken = is_readable && !is_long;
        let bytes = if is_taken { self.available()[..total].to_vec() } else { Vec::new() };
        let call = Call { sender, serial, wants_reply, bytes };
        if is_taken {
            return gate.arrive(call);
        }
        let (error, why) = if is_long {
            (LIMITS_EXCEEDED, format!("the call is {total} bytes long; at most {LONGEST} are taken"))
        } else {
            (NOT_SUPPORTED, "the header of the call has fields that are not known here".to_owned())
        };
        gate.refuse(call, error, why);
        true
    }

    /// Waits until the gate may have something to let in, or room.
    async fn news(&self) {
        match &self.gate {
            Some(gate) => gate.news().await,
            None => std::future::pending().await,
        }
    }

    /// Waits for more bytes, or for a message that the gate has let in.
    async fn fill(&mut self) -> io::Result<()> {
        tokio::select! {
            ready = self.stream.readable() => ready?,
            () = self.news(), if self.state == State::Between => return Ok(()),
        }
        self.buffer.drain(..self.taken);
        self.taken = 0;
        let before = self.buffer.len();
        self.buffer.resize(before + CHUNK, 0);
        let read = self.stream.try_read(&mut self.buffer[before..]);
        self.buffer.truncate(before + read.as_ref().map_or(0, |&read| read));
        match read {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => {
                // Somebody who sends without end lets others have a turn.
                tokio::task::yield_now().await;
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// Whether a signal is one that we may have asked for. Everybody may send signals to us alone; of those only the bus's
/// own say anything.
fn is_expected(fields: &Fields) -> bool {
    fields.destination.is_none() || fields.sender.as_deref() == Some(BUS)
}

#[async_trait]
impl ReadHalf for Reader {
    async fn recvmsg(&mut self, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
        loop {
            let admitted = &self.admitted[self.handed..];
            if !admitted.is_empty() {
                let count = admitted.len().min(buffer.len());
                buffer[..count].copy_from_slice(&admitted[..count]);
                self.handed += count;
                return Ok((count, Vec::new()));
            }
            match self.step(buffer.len())? {
                Step::Hand(count) => {
                    buffer[..count].copy_from_slice(&self.available()[..count]);
                    self.taken += count;
                    return Ok((count, Vec::new()));
                }
                Step::Again => {}
                Step::Read => self.fill().await?,
                Step::Wait => self.news().await,
            }
        }
    }
}

/// The half that is written.
#[derive(Debug)]
pub(super) struct Writer {
    stream: OwnedWriteHalf,
    gate: Option<Arc<Gate>>,
}

#[async_trait]
impl WriteHalf for Writer {
    async fn send_message(&mut self, message: &Message) -> zbus::Result<()> {
        let is_reply = matches!(message.message_type(), Type::MethodReturn | Type::Error);
        if let Some(gate) = self.gate.as_ref().filter(|_| is_reply)
            && !gate.answered(message)
        {
            return Ok(());
        }
        let mut rest: &[u8] = message.data();
        while !rest.is_empty() {
            let sent = self.sendmsg(rest, &[]).await?;
            rest = &rest[sent..];
        }
        Ok(())
    }

    async fn sendmsg(&mut self, buffer: &[u8], _fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
        loop {
            match self.stream.try_write(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return result,
            }
            if tokio::time::timeout(STUCK, self.stream.writable()).await.is_err() {
                // What follows a message that was sent in part would be taken for the rest of it.
                tracing::error!("the bus has taken nothing for {} s; the connection is given up", STUCK.as_secs());
                self.close().await?;
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
    }

    async fn close(&mut self) -> io::Result<()> {
        rustix::net::shutdown(self.stream.as_ref(), rustix::net::Shutdown::Both)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        sync::mpsc,
    };

    use super::{super::Refusal, *};

    struct Setup {
        bus: UnixStream,
        read: Box<dyn ReadHalf>,
        gate: Arc<Gate>,
        strangers: mpsc::UnboundedReceiver<String>,
        refused: mpsc::Receiver<Refusal>,
    }

    async fn set_up(is_open: bool) -> Setup {
        let (bus, ours) = UnixStream::pair().expect("a pair of sockets");
        let (gate, strangers, refused) = Gate::new();
        let (mut read, _write) = gated(ours, is_open.then(|| Arc::clone(&gate))).take();
        let mut bus = bus;
        bus.write_all(b"OK 0123456789abcdef0123456789abcdef\r\n").await.expect("room");
        let mut line = [0; 64];
        let (length, _) = read.recvmsg(&mut line).await.expect("a line");
        assert!(line[..length].ends_with(b"\r\n"));
        Setup { bus, read, gate, strangers, refused }
    }

    impl Setup {
        async fn send(&mut self, messages: &[&Message]) {
            let bytes = messages.iter().flat_map(|message| message.data().to_vec()).collect::<Vec<u8>>();
            self.bus.write_all(&bytes).await.expect("somebody reads");
        }

        /// The member of the next message that comes through, or its kind.
        async fn receive(&mut self) -> String {
            let message = self.read.receive_message(1, &mut Vec::new(), &mut Vec::new()).await.expect("a message");
            let header = message.header();
            header.member().map_or_else(|| format!("{:?}", message.message_type()), ToString::to_string)
        }
    }

    fn call(member: &str, serial: u32, length: usize) -> Message {
        let serial = serial.try_into().expect("not zero");
        let call = Message::method_call("/org/layeredstores1", member.to_owned()).sender(":1.7").serial(serial);
        call.build(&("x".repeat(length),)).expect("a message")
    }

    fn signal(member: &str, sender: &str, destination: Option<&str>) -> Message {
        let signal = Message::signal("/", "org.example", member.to_owned()).sender(sender.to_owned());
        let signal = match destination {
            Some(destination) => signal.destination(destination.to_owned()),
            None => signal,
        };
        signal.build(&()).expect("a message")
    }

    #[tokio::test]
    async fn what_nobody_has_asked_for_does_not_get_in() {
        let mut setup = set_up(false).await;
        let reply =
            Message::method_return(&call("Get", 1, 0).header()).build(&("y".repeat(200_000),)).expect("a message");
        let messages = [
            &call("Call", 1, 10),
            &signal("Spam", ":1.7", Some(":1.1")),
            &signal("News", ":1.7", None),
            &signal("NameAcquired", BUS, Some(":1.1")),
            &reply,
            &signal("End", ":1.7", None),
        ];
        let bytes: Vec<u8> = messages.iter().flat_map(|message| message.data().to_vec()).collect();
        let (read, write) = setup.bus.into_split();
        let mut bus = write;
        // Cut anywhere, it is the same.
        let sent = tokio::spawn(async move {
            for piece in bytes.chunks(977) {
                bus.write_all(piece).await.expect("somebody reads");
            }
            (bus, read)
        });
        setup.bus = UnixStream::pair().expect("a pair of sockets").0;
        for expected in ["News", "NameAcquired", "MethodReturn", "End"] {
            assert_eq!(setup.receive().await, expected);
        }
        drop(sent.await);
        let end = setup.read.receive_message(1, &mut Vec::new(), &mut Vec::new()).await;
        assert!(end.is_err(), "{end:?}");
    }

    #[tokio::test]
    async fn calls_get_in_once_it_is_known_whose_they_are_and_long_ones_do_not() {
        let mut setup = set_up(true).await;
        setup.send(&[&call("First", 1, 10), &call("Long", 2, 16 << 10 << 3), &call("Second", 3, 60_000)]).await;
        setup.send(&[&signal("News", ":1.7", None)]).await;
        assert_eq!(setup.receive().await, "News");
        assert_eq!(setup.strangers.recv().await.as_deref(), Some(":1.7"));
        let refused = setup.refused.recv().await.expect("a refusal");
        assert_eq!((refused.sender.as_str(), refused.serial.get()), (":1.7", 2));
        assert!(refused.why.contains("at most 65536"), "{}", refused.why);
        let message = refused.message().expect("a message");
        assert_eq!(message.header().reply_serial(), Some(refused.serial));
        assert_eq!(message.header().destination().map(|name| name.as_str().to_owned()).as_deref(), Some(":1.7"));
        setup.gate.identified(":1.7", Some(1000));
        assert_eq!(setup.receive().await, "First");
        assert_eq!(setup.receive().await, "Second");
        assert!(setup.strangers.try_recv().is_err(), "asked once");
    }

    #[tokio::test]
    async fn what_comes_after_too_many_unknown_callers_waits_until_one_is_known() {
        let mut setup = set_up(true).await;
        let messages: Vec<_> = (1..=40).map(|serial| call("Held", serial, 60_000)).collect();
        let mut bytes: Vec<u8> = messages.iter().flat_map(|message| message.data().to_vec()).collect();
        bytes.extend_from_slice(signal("News", ":1.8", None).data());
        let mut bus = std::mem::replace(&mut setup.bus, UnixStream::pair().expect("a pair of sockets").0);
        let _sending = tokio::spawn(async move { bus.write_all(&bytes).await.map(|()| bus) });
        tokio::time::timeout(Duration::from_millis(50), setup.receive()).await.expect_err("nobody is known");
        setup.gate.identified(":1.7", Some(0));
        let mut came = Vec::new();
        while came.last().is_none_or(|last| last != "News") {
            came.push(setup.receive().await);
        }
        assert_eq!((came.len(), came.iter().filter(|member| *member == "Held").count()), (41, 40));
        assert!(setup.refused.try_recv().is_err(), "nobody is refused");
    }

    #[tokio::test(start_paused = true)]
    async fn a_bus_that_takes_nothing_is_given_up_and_a_slow_one_is_not() {
        let (bus, ours) = UnixStream::pair().expect("a pair of sockets");
        let (_read, mut write) = gated(ours, None).take();
        let (mut from_us, _to_us) = bus.into_split();
        let mut taken = vec![0; 1 << 20];
        // As much as fits between the two.
        let mut sent = write.sendmsg(&[7; 1 << 20], &[]).await.expect("room");
        let mut received = 0;
        for _ in 0..10 {
            let (sending, slow) = tokio::join!(write.sendmsg(&[7; 1 << 20], &[]), async {
                tokio::time::sleep(STUCK * 9 / 10).await;
                from_us.read(&mut taken).await
            });
            sent += sending.expect("it is waited for");
            received += slow.expect("something was sent");
        }
        let began = tokio::time::Instant::now();
        let error = loop {
            match write.sendmsg(&[7; 1 << 20], &[]).await {
                Ok(more) => sent += more,
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(began.elapsed() >= STUCK && began.elapsed() < 2 * STUCK, "{:?}", began.elapsed());
        let mut rest = Vec::new();
        from_us.read_to_end(&mut rest).await.expect("it was shut down");
        assert_eq!(received + rest.len(), sent);
        let error = write.sendmsg(b"more", &[]).await.expect_err("what follows would be taken for a part");
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }

    #[tokio::test]
    async fn what_is_no_message_ends_the_connection() {
        let mut setup = set_up(true).await;
        setup.bus.write_all(b"?\x01\0\x01\0\0\0\0\x01\0\0\0\0\0\0\0").await.expect("somebody reads");
        assert!(setup.read.receive_message(1, &mut Vec::new(), &mut Vec::new()).await.is_err());
    }
}
