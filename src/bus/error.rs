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
        use supervisor::Error;
        let name = match &error {
            Error::NoSuchStore(_) | Error::NoStoreAtPath(_) | Error::NothingLeft(_) => {
                "org.layeredstores1.Error.NoSuchStore"
            }
            Error::NotOwner(_) | Error::NotAsker(_) => "org.freedesktop.DBus.Error.AccessDenied",
            Error::NotActive(..) => "org.layeredstores1.Error.NotActive",
            Error::StartFailed(..) => "org.layeredstores1.Error.StartFailed",
            Error::Busy(..) => "org.layeredstores1.Error.Busy",
            Error::LowerOf(..) => "org.layeredstores1.Error.LowerOfOthers",
            Error::RefreshFailed(..) => "org.layeredstores1.Error.RefreshFailed",
            Error::Stale(..) | Error::Held(..) => "org.layeredstores1.Error.Stale",
            Error::Stuck(..) => "org.layeredstores1.Error.Stuck",
            Error::InUse(..) => "org.layeredstores1.Error.InUse",
            Error::RemoveFailed(..) | Error::ListFailed(_) => "org.layeredstores1.Error.RemoveFailed",
            Error::InvalidConfiguration(_) => "org.layeredstores1.Error.InvalidConfiguration",
            Error::Cancelled(..) => "org.layeredstores1.Error.Cancelled",
            Error::NoSuchJob(_) => "org.layeredstores1.Error.NoSuchJob",
            Error::TooManyJobs(_) => "org.freedesktop.DBus.Error.LimitsExceeded",
            Error::ShuttingDown => "org.layeredstores1.Error.ShuttingDown",
        };
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
