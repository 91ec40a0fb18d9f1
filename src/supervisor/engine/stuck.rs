//! Stores on filesystems that do not answer.

use std::{path::Path, time::Duration};

use layered_stores_model::{StoreName, StoreSpec};
use layered_stores_overlay::{
    progress::Spot,
    refresh::{Changes, Rung},
};
use tokio::time::Instant;

use super::Engine;
use crate::supervisor::{
    Error,
    entry::{Entry, Op},
    machine::Machine,
    plan::{Phase, Want},
    status::Problem,
    threads::DEADLINE,
};

/// How often it is looked whether what is stuck goes on.
const LOOK: Duration = Duration::from_secs(1);

impl Engine {
    /// Looks which stores have not got any further for [`DEADLINE`], and which go on.
    pub(super) fn look_at_stuck(&mut self, now: Instant) {
        let mut changed = Vec::new();
        for entry in self.entries.values_mut() {
            let hangs = entry.waits_for().filter(|(_, since)| *since + DEADLINE <= now);
            match (hangs, &entry.stuck) {
                (Some((spot, _)), None) => {
                    let error = stick(entry, spot, &*self.machine);
                    self.jobs.fail_all_of(&entry.spec.name, &error, now);
                }
                (None, Some(_)) => go_on(entry, now),
                _ => continue,
            }
            changed.push(entry.spec.name.clone());
        }
        self.look_at_stuck = self.entries.values().any(|entry| entry.stuck.is_some()).then_some(now + LOOK);
        for name in &changed {
            self.publish(name);
            // Those on top of it are waited for no more, or may be started again.
            for above in self.lying_on(name) {
                above.try_again();
            }
        }
        if !changed.is_empty() {
            self.look_soon();
        }
    }
}

/// Gives up waiting for a store. What is being done about it goes on if it can. Returns what those are told who wait for it.
fn stick(entry: &mut Entry, spot: Spot, machine: &dyn Machine) -> Error {
    let message = describe(&entry.spec, spot, machine);
    entry.stuck = Some(message.clone());
    entry.problem(Problem::Stuck, message.clone());
    let name: StoreName = entry.spec.name.clone();
    let is_stop_refused = !entry.waiting.stopping.is_empty() && entry.want == Want::Down && entry.op != Some(Op::Stop);
    let error = Error::Stuck(name, message);
    entry.waiting.answer_all(&error);
    if is_stop_refused {
        // It has no effect, now or later.
        entry.want(Want::Up);
    }
    error
}

fn go_on(entry: &mut Entry, now: Instant) {
    let name = &entry.spec.name;
    tracing::info!(store = %name, "{name}: its filesystems answer again");
    entry.stuck = None;
    entry.clear(&[Problem::Stuck]);
    if entry.phase == Phase::Active {
        // Whoever has asked for a refresh meanwhile was sent away.
        entry.refreshes.owed.demand(Changes::default(), Rung::Reconfigure, now);
    }
}

/// That a directory does not answer, and the way out.
pub(super) fn silent(what: &str, dir: &Path, machine: &dyn Machine) -> String {
    let silent = format!("{what} {} has not answered for {} s; see to what serves", dir.display(), DEADLINE.as_secs());
    match machine.mount_point_of(dir) {
        Some(point) if point != "/" => {
            format!("{silent} the filesystem at {point}, or give that up with `umount --force --lazy {point}`")
        }
        _ => format!("{silent} its filesystem"),
    }
}

pub(super) fn describe(spec: &StoreSpec, spot: Spot, machine: &dyn Machine) -> String {
    let layers = &spec.layers;
    let seconds = DEADLINE.as_secs();
    let directory =
        |what: &str, dir: &Path| format!("{}; the store goes on by itself then", silent(what, dir, machine));
    match spot {
        Spot::Lower => directory("the lower store", layers.lower.as_path()),
        Spot::Upper => directory("the upper layer", layers.upper.as_path()),
        Spot::Work => directory("the work dir", layers.work.as_path()),
        // That is where something else may be mounted below the root.
        Spot::Root => directory("the state dir", spec.state_dir.as_path()),
        Spot::Records => directory("the daemon's state directory", &machine.records()),
        Spot::Merged => format!(
            "the merged directory {} has not answered for {seconds} s, which means that the filesystem of its lower store {} \
             or of its upper layer {} does not; the store goes on by itself when that answers",
            layers.merged, layers.lower, layers.upper
        ),
        Spot::Accounts => format!(
            "the name service has not told for {seconds} s who its owner and group are; see to nscd, sssd or what else \
             /etc/nsswitch.conf names, or give numbers; the store goes on by itself then"
        ),
        Spot::Others => format!(
            "other stores on the same filesystems have been stuck for {seconds} s, and this one waits for them; see \
             `layered-stores status`"
        ),
        Spot::Elsewhere => format!(
            "what is being done about it has got no further for {seconds} s; see `systemctl status layered-storesd`; it goes \
             on by itself when it can"
        ),
    }
}

#[cfg(test)]
mod tests {
    use layered_stores_model::fixture;

    use super::*;
    use crate::supervisor::simulation;

    #[test]
    fn what_does_not_answer_is_named_with_the_way_out() {
        let (spec, machine) = (fixture::spec("a", "/lower"), simulation::machine());
        let upper = spec.layers.upper.as_str();
        for (spot, words) in [
            (Spot::Lower, ["the lower store /lower has not answered for 10 s", "see to what serves"]),
            (Spot::Upper, ["the upper layer", upper]),
            (Spot::Work, ["the work dir", spec.layers.work.as_str()]),
            (Spot::Root, ["the state dir", spec.state_dir.as_str()]),
            (Spot::Records, ["the daemon's state directory", "/"]),
            (Spot::Merged, [spec.layers.merged.as_str(), upper]),
            (Spot::Accounts, ["the name service has not told for 10 s", "/etc/nsswitch.conf"]),
            (Spot::Others, ["stuck for 10 s", "`layered-stores status`"]),
            (Spot::Elsewhere, ["no further for 10 s", "`systemctl status layered-storesd`"]),
        ] {
            let said = describe(&spec, spot, &machine);
            assert!(words.iter().all(|words| said.contains(words)), "{spot:?}: {said}");
        }
        let said = silent("the upper layer", spec.layers.upper.as_path(), &machine);
        assert!(said.ends_with("see to what serves its filesystem"), "the root filesystem is not given up: {said}");
    }
}
