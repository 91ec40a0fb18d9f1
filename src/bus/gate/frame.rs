//! Messages of the bus as bytes (D-Bus specification, "Message Format").

use std::num::NonZeroU32;

use futures_util::FutureExt as _;
use zbus::{
    connection::socket::ReadHalf,
    wire::{
        Endian, Variant,
        serialized::{Context, Data},
    },
};

/// How long a message is before the array of its header's fields.
pub(super) const FIXED: usize = 16;

const NO_REPLY_EXPECTED: u8 = 0x1;
const FLAGS_AT: usize = 2;

/// Fields of a header by number.
const DESTINATION: u8 = 6;
const SENDER: u8 = 7;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Call,
    /// An answer to a call of ours, good or bad: the bus delivers no others.
    Reply,
    Signal,
    /// What there is not, or not yet. It is to be ignored (D-Bus specification, "Message Types").
    Other,
}

/// What the first bytes of a message tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Start {
    pub(super) kind: Kind,
    pub(super) wants_reply: bool,
    pub(super) serial: NonZeroU32,
    /// The length of the header without the padding behind it, and with it.
    pub(super) header: usize,
    pub(super) body: usize,
    /// The length of the whole message.
    pub(super) total: usize,
    endian: Endian,
}

/// Who sends a message, and to whom.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Fields {
    pub(super) sender: Option<String>,
    pub(super) destination: Option<String>,
}

/// Reads the first bytes of a message; `None` for what is none, and of which nobody knows where it ends.
pub(super) fn start(bytes: &[u8; FIXED]) -> Option<Start> {
    let endian = match bytes[0] {
        b'l' => Endian::Little,
        b'B' => Endian::Big,
        _ => return None,
    };
    let number = |at: usize| {
        let bytes = [bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]];
        if endian == Endian::Little { u32::from_le_bytes(bytes) } else { u32::from_be_bytes(bytes) }
    };
    let header = FIXED.checked_add(usize::try_from(number(12)).ok()?)?;
    let body = header.checked_next_multiple_of(8)?;
    let total = body.checked_add(usize::try_from(number(4)).ok()?)?;
    let wants_reply = bytes[FLAGS_AT] & NO_REPLY_EXPECTED == 0;
    let (kind, serial) = match (bytes[1], NonZeroU32::new(number(8))) {
        (1, Some(serial)) => (Kind::Call, serial),
        (2 | 3, Some(serial)) => (Kind::Reply, serial),
        (4, Some(serial)) => (Kind::Signal, serial),
        (_, serial) => (Kind::Other, serial.unwrap_or(NonZeroU32::MIN)),
    };
    Some(Start { kind, wants_reply, serial, header, body, total, endian })
}

/// Reads the fields of a header; `None` for what is none.
pub(super) fn fields(start: &Start, header: &[u8]) -> Option<Fields> {
    type Header<'a> = (u8, u8, u8, u8, u32, u32, Vec<(u8, Variant<'a>)>);
    let data = Data::new(header, Context::new(start.endian, 0));
    let (header, _): (Header<'_>, usize) = data.deserialize().ok()?;
    let mut found = Fields::default();
    for (number, value) in header.6 {
        let field = match number {
            SENDER => &mut found.sender,
            DESTINATION => &mut found.destination,
            _ => continue,
        };
        *field = value.downcast_ref::<&str>().ok().map(str::to_owned);
    }
    Some(found)
}

/// Whether zbus can read a header, with the padding behind it. It ends its connection with the first one that it cannot, and that
/// may be the header of a legal message: fields that nobody knows are to be ignored (D-Bus specification, "Header Fields"), and
/// dbus-broker hands them on; dbus-daemon takes them out.
pub(super) fn is_readable(header: &[u8]) -> bool {
    /// A socket from which all was read before.
    #[derive(Debug)]
    struct Nothing;

    impl ReadHalf for Nothing {}

    let mut header = header.to_vec();
    if let Some(length_of_body) = header.get_mut(4..8) {
        length_of_body.fill(0);
    }
    // Its own parser has to say; nothing else reaches that without reading, and nothing here is waited for.
    let message = Nothing.receive_message(0, &mut header, &mut Vec::new()).now_or_never();
    message.is_some_and(|message| message.is_ok())
}

/// Has a call ask for a reply, by which it is known when it is over.
pub(super) fn ask_for_reply(message: &mut [u8]) {
    if let Some(flags) = message.get_mut(FLAGS_AT) {
        *flags &= !NO_REPLY_EXPECTED;
    }
}

#[cfg(test)]
mod tests {
    use zbus::{Message, message::Flags};

    use super::*;

    #[test]
    fn a_message_is_read_as_it_was_written() {
        for endian in [Endian::Little, Endian::Big] {
            let call = Message::method_call("/org/layeredstores1", "Remount").expect_call(endian);
            let bytes = call.data().to_vec();
            let start = start(bytes[..FIXED].try_into().expect("long enough")).expect("a message");
            assert_eq!((start.kind, start.wants_reply, start.total), (Kind::Call, false, bytes.len()));
            assert_eq!(start.serial, call.primary_header().serial_num());
            assert!(is_readable(&bytes[..start.body]));
            let fields = fields(&start, &bytes[..start.header]).expect("a header");
            assert_eq!(fields.sender.as_deref(), Some(":1.7"));
            assert_eq!(fields.destination.as_deref(), Some("org.layeredstores1"));
            let mut bytes = bytes;
            ask_for_reply(&mut bytes);
            let again = super::start(bytes[..FIXED].try_into().expect("long enough")).expect("a message");
            assert_eq!(again, Start { wants_reply: true, ..start });
        }
    }

    trait ExpectCall {
        fn expect_call(self, endian: Endian) -> Message;
    }

    impl ExpectCall for zbus::message::Builder<'_> {
        fn expect_call(self, endian: Endian) -> Message {
            self.sender(":1.7")
                .destination("org.layeredstores1")
                .interface("org.layeredstores1.Manager")
                .endian(endian)
                .with_flags(Flags::NO_REPLY_EXPECTED)
                .build(&("/srv/ci/root/nix/store",))
                .expect("a message")
        }
    }

    #[test]
    fn what_is_no_message_is_none() {
        for bytes in [[0; FIXED], *b"OK 0123456789ab\r"] {
            assert_eq!(start(&bytes), None, "{bytes:?}");
        }
        for bytes in [
            *b"l\x05\0\x01\x03\0\0\0\x01\0\0\0\0\0\0\0",
            // No serial.
            *b"l\x01\0\x01\x03\0\0\0\0\0\0\0\0\0\0\0",
        ] {
            let start = start(&bytes).expect("it is known where it ends");
            assert_eq!((start.kind, start.total), (Kind::Other, FIXED + 3));
        }
        let longest = start(b"B\x01\0\x01\xff\xff\xff\xff\0\0\0\x01\xff\xff\xff\xff").expect("a message");
        assert_eq!(longest.total, 16 + 0x1_0000_0000 + 0xffff_ffff);
    }
}
