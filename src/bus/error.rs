//! Errors as clients see them.

use layered_stores_model::printable;
use zbus::{DBusError, Message, message::Header, names::ErrorName};

use crate::supervisor;

/// An error reply: a name for programs, a sentence for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BusError {
    name: &'static str,
    message: String,
}

pub(super) type Result<T> = std::result::Result<T, BusError>;

impl BusError {
    /// The caller may not do this.
    pub(super) fn access_denied(message: String) -> Self {
        Self { name: "org.freedesktop.DBus.Error.AccessDenied", message }
    }

    /// The caller has too much under way.
    pub(super) fn limits_exceeded(message: String) -> Self {
        Self { name: "org.freedesktop.DBus.Error.LimitsExceeded", message }
    }

    /// The caller may do this once it has authenticated, and has not said that it is prepared to.
    pub(super) fn interactive_authorization_required(message: String) -> Self {
        Self { name: "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired", message }
    }
}

impl From<supervisor::Error> for BusError {
    fn from(error: supervisor::Error) -> Self {
        let name = error.name();
        // What others have named is in it, such as processes; a configuration's mistakes are a line each.
        let message = error.to_string().lines().map(printable).collect::<Vec<_>>().join("\n");
        Self { name, message }
    }
}

impl DBusError for BusError {
    fn create_reply(&self, call: &Header<'_>) -> zbus::Result<Message> {
        Message::error(call, self.name()).build(&(&self.message,))
    }

    fn name(&self) -> ErrorName<'_> {
        ErrorName::from_static_str(self.name).expect("all names are valid")
    }

    fn description(&self) -> Option<&str> {
        Some(&self.message)
    }
}
