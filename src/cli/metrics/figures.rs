//! The figures: one row of [`FIGURES`] each, with all there is to say about it.

use std::{collections::BTreeMap, fmt};

use layered_stores_client::{Properties, Snapshot};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _, prometheus_text},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::Registry,
};

use super::{Seen, room::Room};
use crate::supervisor::{Kind, Problem, State};

/// The states that a job is in while it is one.
const STATES_OF_JOBS: [&str; 2] = ["waiting", "running"];

/// One figure, of everything that it is had of.
struct Figure {
    /// Its name. The encoder puts `_total` behind that of a counter.
    name: &'static str,
    kind: MetricType,
    /// What it says, for people.
    help: &'static str,
    values: fn(&Seen) -> Vec<Value>,
}

/// A figure of one thing, which its labels name.
struct Value {
    labels: Vec<(&'static str, String)>,
    value: f64,
}

/// All figures. Those of stores are called `layered_stores_store_…` and have the label `store`.
///
/// The page docs/metrics.md has a table of this; a dashboard and rules for alerts that name anything else make a test red.
const FIGURES: &[Figure] = &[
    Figure {
        name: "layered_stores_up",
        kind: MetricType::Gauge,
        help: "Whether layered-storesd runs and answers. When it does not, there are no other figures.",
        values: |seen| vec![Value { labels: vec![], value: truth(seen.daemon.is_some()) }],
    },
    Figure {
        name: "layered_stores_daemon_info",
        kind: MetricType::Gauge,
        help: "Always 1; the label version has the daemon's.",
        values: |seen| {
            let info = |daemon: &Snapshot| Value { labels: vec![("version", daemon.version.clone())], value: 1.0 };
            seen.daemon.iter().map(info).collect()
        },
    },
    Figure {
        name: "layered_stores_store_state",
        kind: MetricType::Gauge,
        help: "Whether a store is in the state that the label names.",
        values: |seen| of_stores(seen, states),
    },
    Figure {
        name: "layered_stores_store_problem",
        kind: MetricType::Gauge,
        help: "Whether a store has the problem whose code the label names.",
        values: |seen| of_stores(seen, problems),
    },
    Figure {
        name: "layered_stores_store_refreshes",
        kind: MetricType::Counter,
        help: "How often the merged directory was made to agree with its layers since the daemon started: by \
               reconfiguring the mount, or by a swap for a fresh one.",
        values: |seen| of_stores(seen, refreshes),
    },
    Figure {
        name: "layered_stores_store_last_refresh_timestamp_seconds",
        kind: MetricType::Gauge,
        help: "When a store was last refreshed; missing: not since the daemon started.",
        values: |seen| of_stores(seen, last_refresh),
    },
    Figure {
        name: "layered_stores_store_upper_free_bytes",
        kind: MetricType::Gauge,
        help: "What those who build can still write to the filesystem that the upper layer is on; missing: it does not \
               answer.",
        values: |seen| of_room(seen, |room| room.free_bytes),
    },
    Figure {
        name: "layered_stores_store_upper_size_bytes",
        kind: MetricType::Gauge,
        help: "The size of the filesystem that the upper layer is on.",
        values: |seen| of_room(seen, |room| room.bytes),
    },
    Figure {
        name: "layered_stores_store_upper_free_inodes",
        kind: MetricType::Gauge,
        help: "How many files can still be made on the filesystem that the upper layer is on; missing: it has no such \
               limit, or does not answer.",
        values: |seen| of_room(seen, |room| room.free_inodes),
    },
    Figure {
        name: "layered_stores_store_upper_inodes",
        kind: MetricType::Gauge,
        help: "How many files there can be on the filesystem that the upper layer is on.",
        values: |seen| of_room(seen, |room| room.inodes),
    },
    Figure {
        name: "layered_stores_store_upper_paths",
        kind: MetricType::Gauge,
        help: "How many valid paths have their files in the upper layer; missing, as what follows: that is not known.",
        values: |seen| of_contents(seen, |store| store.upper_path_count),
    },
    Figure {
        name: "layered_stores_store_upper_nar_bytes",
        kind: MetricType::Gauge,
        help: "The size of these as NARs.",
        values: |seen| of_contents(seen, |store| store.upper_nar_size),
    },
    Figure {
        name: "layered_stores_store_shadowed_paths",
        kind: MetricType::Gauge,
        help: "How many of these have their files in the lower store as well.",
        values: |seen| of_contents(seen, |store| store.shadowed_path_count),
    },
    Figure {
        name: "layered_stores_store_shadowed_nar_bytes",
        kind: MetricType::Gauge,
        help: "The size of those as NARs, which could be had back.",
        values: |seen| of_contents(seen, |store| store.shadowed_nar_size),
    },
    Figure {
        name: "layered_stores_store_lower_paths",
        kind: MetricType::Gauge,
        help: "How many valid paths have their files in the lower store only.",
        values: |seen| of_contents(seen, |store| store.lower_path_count),
    },
    Figure {
        name: "layered_stores_store_lost_paths",
        kind: MetricType::Gauge,
        help: "How many valid paths have their files nowhere.",
        values: |seen| of_contents(seen, |store| store.lost_path_count),
    },
    Figure {
        name: "layered_stores_store_leases",
        kind: MetricType::Gauge,
        help: "How many paths are kept in the lower store for a store.",
        values: |seen| of_contents(seen, |store| store.lease_count),
    },
    Figure {
        name: "layered_stores_jobs",
        kind: MetricType::Gauge,
        help: "How many jobs there are, by what they do and whether they wait or run.",
        values: jobs,
    },
];

fn truth(is: bool) -> f64 {
    if is { 1.0 } else { 0.0 }
}

/// The values that each store has of a figure, under its name.
fn of_stores(seen: &Seen, values: fn(&Properties) -> Vec<Value>) -> Vec<Value> {
    let of = |store: &Properties| {
        let named = |mut value: Value, store: &Properties| {
            value.labels.insert(0, ("store", store.name.clone()));
            value
        };
        values(store).into_iter().map(|value| named(value, store)).collect::<Vec<_>>()
    };
    seen.daemon.iter().flat_map(|daemon| &daemon.stores).flat_map(of).collect()
}

/// What the databases of stores say, where they could be read.
fn of_contents(seen: &Seen, count: fn(&Properties) -> u64) -> Vec<Value> {
    let stores = seen.daemon.iter().flat_map(|daemon| &daemon.stores).filter(|store| store.contents_known);
    stores.map(|store| Value { labels: vec![("store", store.name.clone())], value: count(store) as f64 }).collect()
}

fn of_room(seen: &Seen, value: fn(&Room) -> Option<u64>) -> Vec<Value> {
    let rooms: BTreeMap<_, _> = seen.room.iter().collect();
    let of = |(store, room): (&String, &Room)| {
        Some(Value { labels: vec![("store", store.clone())], value: value(room)? as f64 })
    };
    rooms.into_iter().filter_map(of).collect()
}

/// 1 for those that are there and 0 for the other ones that are known; a daemon of another version may have more of them.
fn one_hot(label: &'static str, known: &[String], there: &[&str]) -> Vec<Value> {
    let others = there.iter().filter(|there| !known.iter().any(|known| known == *there));
    let all = known.iter().map(String::as_str).chain(others.copied());
    all.map(|name| Value { labels: vec![(label, name.to_owned())], value: truth(there.contains(&name)) }).collect()
}

fn states(store: &Properties) -> Vec<Value> {
    one_hot("state", &State::ALL.map(|state| state.to_string()), &[&store.state])
}

fn problems(store: &Properties) -> Vec<Value> {
    let there: Vec<_> = store.problems.iter().map(|(code, _)| code.as_str()).collect();
    one_hot("code", &Problem::ALL.map(|problem| problem.to_string()), &there)
}

fn refreshes(store: &Properties) -> Vec<Value> {
    let swapped = store.swap_count;
    let kinds = [("reconfigured", store.refresh_count.saturating_sub(swapped)), ("swapped", swapped)];
    kinds.map(|(kind, count)| Value { labels: vec![("kind", kind.to_owned())], value: count as f64 }).into()
}

fn last_refresh(store: &Properties) -> Vec<Value> {
    let seconds = store.last_refresh_usec as f64 / 1e6;
    if store.last_refresh_usec > 0 { vec![Value { labels: vec![], value: seconds }] } else { Vec::new() }
}

fn jobs(seen: &Seen) -> Vec<Value> {
    let Some(daemon) = &seen.daemon else { return Vec::new() };
    let mut counts: BTreeMap<(String, String), u32> = BTreeMap::new();
    for kind in Kind::ALL {
        counts.extend(STATES_OF_JOBS.map(|state| ((kind.to_string(), state.to_owned()), 0)));
    }
    for job in daemon.jobs.iter().filter(|job| STATES_OF_JOBS.contains(&job.state.as_str())) {
        *counts.entry((job.kind.clone(), job.state.clone())).or_default() += 1;
    }
    let value =
        |((kind, state), count)| Value { labels: vec![("kind", kind), ("state", state)], value: f64::from(count) };
    counts.into_iter().map(value).collect()
}

impl fmt::Debug for Figure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl Collector for Seen {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        for Figure { name, kind, help, values } in FIGURES {
            let values = values(self);
            if values.is_empty() {
                continue;
            }
            let mut family = encoder.encode_descriptor(name, help, None, *kind)?;
            for Value { labels, value } in &values {
                let metric = family.encode_family(labels)?;
                match kind {
                    MetricType::Counter => ConstCounter::new(*value).encode(metric)?,
                    _ => ConstGauge::new(*value).encode(metric)?,
                }
            }
        }
        Ok(())
    }
}

/// The figures in Prometheus' text format, which the node exporter's textfile collector reads as well.
pub(super) fn text(seen: Seen) -> Result<String, fmt::Error> {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(seen));
    let mut text = String::new();
    prometheus_text::encode(&mut text, &registry)?;
    Ok(text)
}

#[cfg(test)]
mod tests;
