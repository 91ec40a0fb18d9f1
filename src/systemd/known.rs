//! What systemd knows of mount units: asked about all of them at a time, however many are waited for.

use std::{collections::HashMap, time::Duration};

use layered_stores_model::MountUnitName;
use tokio::sync::{mpsc, oneshot};

use super::{
    manager::{self, ListedUnit, ManagerProxy},
    mount_unit::DESCRIPTION,
};

/// The time between two looks. Each tells of every mount unit there is, which costs PID 1 and the bus some microseconds for
/// each, so that time grows with their number. It does not go by what a look took: PID 1 may have had other things to do.
const PAUSE: Duration = Duration::from_millis(5);
const PAUSE_A_UNIT: Duration = Duration::from_micros(25);

/// How a mount unit is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Known {
    /// It is not loaded: that happens when the mount shows up, with the file that is there by then.
    No,
    /// Another unit refers to it, and there was no file when systemd looked for one. It does not look again by itself.
    Missing,
    /// It is on its way from one state to another.
    Changing,
    /// It is not mounted.
    Idle {
        /// What is loaded is a file of ours.
        ours: bool,
    },
    /// It is mounted, or was when systemd last looked at the mount table.
    Mounted {
        /// What is loaded is a file of ours.
        ours: bool,
    },
}

impl Known {
    fn of(listed: &ListedUnit) -> Self {
        let (_, description, load_state, active_state, _, _, _, job, ..) = listed;
        let ours = load_state == "loaded" && description.starts_with(DESCRIPTION);
        match (load_state.as_str(), active_state.as_str()) {
            _ if *job != 0 => Self::Changing,
            (_, "active") => Self::Mounted { ours },
            ("not-found", "inactive") => Self::Missing,
            (_, "inactive" | "failed") => Self::Idle { ours },
            _ => Self::Changing,
        }
    }
}

type Question = (MountUnitName, oneshot::Sender<zbus::Result<Known>>);

/// Where questions about units go.
#[derive(Clone, Debug)]
pub(super) struct Looks(mpsc::UnboundedSender<Question>);

impl Looks {
    pub(super) fn new(manager: ManagerProxy<'static>) -> Self {
        let (sender, questions) = mpsc::unbounded_channel();
        tokio::spawn(answer(manager, questions));
        Self(sender)
    }

    /// How a unit is, later than this call.
    pub(super) async fn at(&self, unit: &MountUnitName) -> zbus::Result<Known> {
        let (sender, known) = oneshot::channel();
        let _ = self.0.send((unit.clone(), sender));
        known.await.unwrap_or_else(|_| Err(zbus::Error::Failure("nobody asks systemd any more".to_owned())))
    }
}

async fn answer(manager: ManagerProxy<'static>, mut questions: mpsc::UnboundedReceiver<Question>) {
    let mut asked = Vec::new();
    while questions.recv_many(&mut asked, usize::MAX).await > 0 {
        let mut pause = PAUSE;
        // A pattern and not the units' names: asked by name, systemd would load them there and then.
        match manager::answer(manager.list_units_by_patterns(&[], &["*.mount"])).await {
            Ok(listed) => {
                pause += PAUSE_A_UNIT * u32::try_from(listed.len()).unwrap_or(u32::MAX);
                let units: HashMap<&str, &ListedUnit> = listed.iter().map(|unit| (unit.0.as_str(), unit)).collect();
                for (unit, asker) in asked.drain(..) {
                    // Whoever has asked may have gone away since.
                    let _ = asker.send(Ok(units.get(unit.as_str()).map_or(Known::No, |unit| Known::of(unit))));
                }
            }
            Err(error) => {
                for (_, asker) in asked.drain(..) {
                    let _ = asker.send(Err(error.clone()));
                }
            }
        }
        tokio::time::sleep(pause).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unit_is_what_load_state_and_job_make_of_its_active_state() {
        let ours = "Layered Nix store ci";
        for (description, load_state, active_state, job, known) in [
            (ours, "loaded", "active", 0, Known::Mounted { ours: true }),
            ("/srv/ci/root/nix/store", "loaded", "active", 0, Known::Mounted { ours: false }),
            (ours, "loaded", "inactive", 0, Known::Idle { ours: true }),
            (ours, "loaded", "failed", 0, Known::Idle { ours: true }),
            (ours, "loaded", "active", 7, Known::Changing),
            (ours, "loaded", "deactivating", 0, Known::Changing),
            ("ci.mount", "not-found", "inactive", 0, Known::Missing),
            ("ci.mount", "masked", "inactive", 0, Known::Idle { ours: false }),
            (ours, "error", "inactive", 0, Known::Idle { ours: false }),
        ] {
            let path = || zbus::wire::OwnedObjectPath::try_from("/").expect("a path");
            let (text, nothing) = (str::to_owned, String::new);
            let listed = (
                text("ci.mount"),
                text(description),
                text(load_state),
                text(active_state),
                nothing(),
                nothing(),
                path(),
                job,
                nothing(),
                path(),
            );
            assert_eq!(Known::of(&listed), known, "{description} {load_state} {active_state} {job}");
        }
    }
}
