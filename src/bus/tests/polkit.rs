//! An authority that says what a test wants it to say.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use zbus::{Connection, interface, wire::OwnedVariant};

use super::bus::Bus;

/// What it says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Says {
    Yes,
    #[default]
    No,
    /// Somebody has to authenticate first.
    Challenge,
    /// It says nothing.
    Silence,
}

/// The authority.
#[derive(Clone, Debug, Default)]
pub(super) struct Polkit(Arc<Mutex<Known>>);

#[derive(Debug, Default)]
struct Known {
    says: Says,
    asked: Vec<(String, Option<String>)>,
    cancelled: Vec<String>,
}

struct Authority(Polkit);

type Answer = ((bool, bool, HashMap<String, String>),);

#[interface(name = "org.freedesktop.PolicyKit1.Authority")]
impl Authority {
    async fn check_authorization(
        &self,
        _subject: (String, HashMap<String, OwnedVariant>),
        action: String,
        mut details: HashMap<String, String>,
        _flags: u32,
        _number: String,
    ) -> Answer {
        let says = {
            let mut known = self.0.lock();
            known.asked.push((action, details.remove("store")));
            known.says
        };
        if says == Says::Silence {
            std::future::pending::<()>().await;
        }
        ((says == Says::Yes, says == Says::Challenge, HashMap::new()),)
    }

    fn cancel_check_authorization(&self, number: String) {
        self.0.lock().cancelled.push(number);
    }
}

impl Polkit {
    /// Begins on a bus. It is there for as long as the connection is.
    pub(super) async fn begin(bus: &Bus) -> (Self, Connection) {
        let (polkit, connection) = (Self::default(), bus.connect(0).await);
        let authority = Authority(polkit.clone());
        connection
            .object_server()
            .at("/org/freedesktop/PolicyKit1/Authority", authority)
            .await
            .expect("a place for it");
        connection.request_name("org.freedesktop.PolicyKit1").await.expect("its name");
        (polkit, connection)
    }

    pub(super) fn says(&self, says: Says) {
        self.lock().says = says;
    }

    /// What it was asked since the last time: actions, and the stores that they are about.
    pub(super) fn asked(&self) -> Vec<(String, Option<String>)> {
        std::mem::take(&mut self.lock().asked)
    }

    /// How many questions were taken back.
    pub(super) fn cancelled(&self) -> usize {
        self.lock().cancelled.len()
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
