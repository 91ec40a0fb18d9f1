//! How many questions polkit may be at for us, and for how long.
//!
//! A question to a person is open until somebody answers it, which may be never.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::StreamExt as _;
use zbus::{fdo, names::UniqueName};
use zbus_polkit::policykit1::{AuthorityProxy, AuthorizationResult, CheckAuthorizationFlags, Subject};

/// How many questions may be open for one user, and in all: dbus-daemon allows a connection 128 calls without an answer
/// (`max_replies_per_connection`).
const OPEN: usize = 4;
const OPEN_IN_ALL: usize = 64;

/// How long polkit may take to decide by itself, and how long a person may take.
const BY_ITSELF: Duration = Duration::from_secs(10);
const BY_A_PERSON: Duration = Duration::from_secs(300);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoAnswer {
    #[error("{0} questions of this user are open already; answer or cancel them first")]
    TooMany(usize),
    #[error("the caller has gone away")]
    Gone,
    #[error("polkit cannot be asked (no answer within {} s)", .0.as_secs())]
    Late(Duration),
    #[error("polkit cannot be asked ({})", .0.description().map_or_else(|| .0.to_string(), str::to_owned))]
    Failed(#[from] zbus::Error),
}

/// Asks polkit.
#[derive(Clone, Debug)]
pub(super) struct Questions {
    bus: fdo::DBusProxy<'static>,
    polkit: AuthorityProxy<'static>,
    open: Arc<Mutex<HashMap<u32, usize>>>,
    number: Arc<AtomicU64>,
}

/// The place of a question among those that may be open.
struct Place {
    open: Arc<Mutex<HashMap<u32, usize>>>,
    uid: u32,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = open.get_mut(&self.uid) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.uid);
            }
        }
    }
}

impl Questions {
    pub(super) fn new(bus: fdo::DBusProxy<'static>, polkit: AuthorityProxy<'static>) -> Self {
        Self { bus, polkit, open: Arc::default(), number: Arc::default() }
    }

    /// Asks whether a caller may do something. With `interactive`, a person may be asked.
    pub(super) async fn ask(
        &self,
        sender: &UniqueName<'_>,
        uid: u32,
        subject: &Subject,
        action: &str,
        details: &HashMap<&str, &str>,
        interactive: bool,
    ) -> Result<AuthorizationResult, NoAnswer> {
        let _place = self.place(uid)?;
        let number = self.number.fetch_add(1, Ordering::Relaxed).to_string();
        let (flags, patience) = if interactive {
            (CheckAuthorizationFlags::ALLOW_USER_INTERACTION, BY_A_PERSON)
        } else {
            (CheckAuthorizationFlags::empty(), BY_ITSELF)
        };
        let answer = self.polkit.check_authorization(subject, action, details, flags, &number);
        let result = tokio::select! {
            answer = answer => return Ok(answer?),
            gone = self.gone(sender), if interactive => gone.map_or_else(NoAnswer::Failed, |()| NoAnswer::Gone),
            () = tokio::time::sleep(patience) => NoAnswer::Late(patience),
        };
        // Takes the dialogue from the screen as well. A polkit that does not even answer this is not waited for.
        let _ = tokio::time::timeout(BY_ITSELF, self.polkit.cancel_check_authorization(&number)).await;
        Err(result)
    }

    fn place(&self, uid: u32) -> Result<Place, NoAnswer> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let in_all: usize = open.values().sum();
        let count = open.entry(uid).or_default();
        if *count == OPEN || in_all == OPEN_IN_ALL {
            return Err(NoAnswer::TooMany(*count));
        }
        *count += 1;
        Ok(Place { open: Arc::clone(&self.open), uid })
    }

    /// Returns when a caller has left the bus.
    pub(super) async fn gone(&self, sender: &UniqueName<'_>) -> zbus::Result<()> {
        let mut changes = self.bus.receive_name_owner_changed_with_args(&[(0, sender.as_str())]).await?;
        if self.bus.name_has_owner(sender.to_owned().into()).await? {
            changes.next().await;
        }
        Ok(())
    }
}
