//! Who may do what: root may do everything, a store's owner may refresh it, and polkit decides the rest.

use std::{collections::HashMap, fmt, sync::Arc};

use serde::Serialize;
use zbus::{
    fdo,
    message::{Flags, Header},
    names::UniqueName,
};
use zbus_polkit::policykit1::Subject;

use super::{
    error::{BusError, Result},
    gate::Gate,
    questions::{NoAnswer, Questions},
};
use crate::supervisor::{Caller, Kind};

/// A polkit action of `data/org.layeredstores1.policy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Action {
    Start,
    Stop,
    Remount,
    Reload,
    RemoveData,
    /// Have a job done; it is named after the job.
    #[serde(untagged)]
    Job(Kind),
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("org.layeredstores1.")?;
        self.serialize(f)
    }
}

/// Finds out who a caller is and asks polkit what it may do.
#[derive(Clone, Debug)]
pub(super) struct Authorization {
    bus: fdo::DBusProxy<'static>,
    gate: Arc<Gate>,
    questions: Questions,
}

impl Authorization {
    pub(super) fn new(bus: fdo::DBusProxy<'static>, gate: Arc<Gate>, questions: Questions) -> Self {
        Self { bus, gate, questions }
    }

    /// Lets the caller of a method pass, or says why not.
    ///
    /// `owner` is a user who may do this without being asked anything; `store` is shown in the question to others.
    pub(super) async fn check(
        &self,
        call: &Header<'_>,
        action: Action,
        store: Option<&str>,
        owner: Option<u32>,
    ) -> Result<()> {
        let action = action.to_string();
        let what = store.map_or_else(|| action.clone(), |store| format!("{action} on store {store:?}"));
        let denied = |why: String| BusError::access_denied(format!("{what} is refused: {why}"));
        let way_out = if owner.is_some() { "run it as root or as the store's owner" } else { "run it as root" };
        let sender = call.sender().ok_or_else(|| denied("the caller is not known to the bus".to_owned()))?;
        let uid = self.uid(sender).await;
        let uid = uid.map_err(|error| denied(format!("the bus does not know the caller: {error}")))?;
        // As systemd does it: root is not asked, so that nothing depends on polkit being there.
        if uid == 0 || owner == Some(uid) {
            return Ok(());
        }
        let subject = Subject::new_for_message_header(call).map_err(|error| denied(error.to_string()))?;
        let interactive = call.primary().flags().contains(Flags::ALLOW_INTERACTIVE_AUTH);
        let details: HashMap<&str, &str> = store.map(|store| ("store", store)).into_iter().collect();
        match self.questions.ask(sender, uid, &subject, &action, &details, interactive).await {
            Ok(answer) if answer.is_authorized => Ok(()),
            Ok(answer) if answer.is_challenge && !interactive => {
                let message = format!("{what} needs authentication; {way_out}");
                Err(BusError::interactive_authorization_required(message))
            }
            Ok(_) => Err(denied(format!("polkit does not allow it; {way_out}"))),
            Err(why @ NoAnswer::TooMany(_)) => Err(BusError::limits_exceeded(format!("{what} is refused: {why}"))),
            Err(why) => Err(denied(format!("{why}; {way_out}"))),
        }
    }

    /// Who a caller is, for what is between them and their own.
    pub(super) async fn caller(&self, call: &Header<'_>) -> Result<Caller> {
        let unknown = |why: String| BusError::access_denied(format!("the bus does not know the caller: {why}"));
        let sender = call.sender().ok_or_else(|| unknown("it has no name".to_owned()))?;
        let uid = self.uid(sender).await.map_err(|error| unknown(error.to_string()))?;
        Ok(Caller { name: sender.to_string(), uid })
    }

    /// Returns when a caller has left the bus.
    pub(super) async fn gone(&self, caller: &Caller) -> zbus::Result<()> {
        self.questions.gone(&UniqueName::try_from(caller.name.as_str())?).await
    }

    async fn uid(&self, sender: &UniqueName<'_>) -> fdo::Result<u32> {
        match self.gate.uid(sender) {
            Some(uid) => Ok(uid),
            // The gate remembers only so many of those it does not limit.
            None => self.bus.get_connection_unix_user(sender.to_owned().into()).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::{
        Action::{self, Reload, Remount, RemoveData, Start, Stop},
        Kind,
    };

    #[test]
    fn every_action_is_one_that_polkit_knows() {
        let policy = include_str!("../../data/org.layeredstores1.policy");
        let known = policy.split("<action id=\"").skip(1).filter_map(|rest| rest.split('"').next()).map(str::to_owned);
        let actions = [Start, Stop, Remount, RemoveData, Reload].into_iter().chain(Kind::ALL.map(Action::Job));
        assert_eq!(actions.map(|action| action.to_string()).collect::<BTreeSet<_>>(), known.collect());
    }
}
