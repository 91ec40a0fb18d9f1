//! Whether all stores have come to where they should be, since the start or the last reload.

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
};

use layered_stores_model::StoreName;

use crate::supervisor::entry::Entry;

/// Notes which stores have come to where they should be, or were given up on. That counts whatever is done about them later.
pub(super) fn arrive(entries: &mut BTreeMap<StoreName, Entry>) {
    // A store that waits for the one on top of it to become free has been given up on for now as well. Which ones that are is
    // found out once for all: this is called at each look at the mount table, of which there are many while many come up.
    let waits = |entry: &&Entry| entry.retries.due().is_some() || entry.stuck.is_some();
    let above: Vec<_> = entries.values().filter(waits).map(|entry| Arc::clone(&entry.spec)).collect();
    let blocked: HashSet<_> = above.iter().filter_map(|spec| spec.lower_name()).collect();
    for entry in entries.values_mut().filter(|entry| !entry.reached) {
        entry.reached = entry.is_settled() || blocked.contains(&entry.spec.name);
    }
}

/// Whether all have that somebody waits for: those that are required, or `all`.
pub(super) fn have_arrived(entries: &BTreeMap<StoreName, Entry>, all: bool) -> bool {
    entries.values().filter(|entry| all || entry.spec.required).all(|entry| entry.reached)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::supervisor::{entry::Op, plan::Phase};
    use layered_stores_model::fixture;

    fn entries(text: &str) -> BTreeMap<StoreName, Entry> {
        let stores = fixture::declared("/state", text).into_iter();
        stores.map(|spec| (spec.name.clone(), Entry::new(Arc::new(spec), true))).collect()
    }

    fn is_up(entry: &mut Entry) {
        entry.serving.made(None, tokio::time::Instant::now());
        (entry.phase, entry.op) = (Phase::Active, None);
    }

    #[test]
    fn stores_that_are_never_all_at_rest_at_a_time_have_all_come_so_far() {
        let mut entries = entries("[stores.a]\nlower-store = \"/srv\"\n[stores.b]\nlower-store = \"/srv\"");
        let names: Vec<StoreName> = entries.keys().cloned().collect();
        let entry = |entries: &mut BTreeMap<_, Entry>, of: usize, change: fn(&mut Entry)| {
            change(entries.get_mut(&names[of]).expect("it is there"));
            arrive(entries);
        };
        entry(&mut entries, 0, is_up);
        assert!(!have_arrived(&entries, false), "the other one has not");
        entry(&mut entries, 0, |a| a.op = Some(Op::Stop));
        entry(&mut entries, 1, is_up);
        assert!(have_arrived(&entries, true));
    }

    #[test]
    fn only_a_reload_waits_for_what_is_not_required() {
        let mut entries =
            entries("[stores.a]\nlower-store = \"/srv\"\n[stores.b]\nlower-store = \"/srv\"\nrequired = false");
        is_up(entries.values_mut().next().expect("it is there"));
        arrive(&mut entries);
        assert!(have_arrived(&entries, false) && !have_arrived(&entries, true));
    }

    #[test]
    fn a_store_that_waits_for_the_one_on_top_of_it_has_been_given_up_on() {
        let mut entries = entries("[stores.a]\nlower-store = \"/srv\"\n[stores.b]\nlower-store = \"layered:a\"");
        let has_arrived =
            |entries: &BTreeMap<_, Entry>| entries.values().map(|entry| entry.reached).collect::<Vec<_>>();
        arrive(&mut entries);
        assert_eq!(has_arrived(&entries), [false, false]);
        if let Some(b) = entries.values_mut().last() {
            b.op = Some(Op::Stop);
            b.stuck = Some("its filesystem does not answer".to_owned());
        }
        arrive(&mut entries);
        assert_eq!(has_arrived(&entries), [true, true]);
    }

    #[test]
    fn many_stores_that_have_not_arrived_are_looked_at_once_and_not_each_for_all() {
        let mut entries = entries("[stores.a]\nlower-store = \"/srv\"");
        let spec = entries.values().next().map(|entry| (*entry.spec).clone()).expect("it is there");
        for number in 0..5000 {
            let name: StoreName = format!("a{number}").parse().expect("valid");
            let spec = fixture::with(&spec, |terms| terms.name = name.clone());
            entries.insert(name, Entry::new(Arc::new(spec), true));
        }
        let began = Instant::now();
        arrive(&mut entries);
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
        assert!(!have_arrived(&entries, false));
    }
}
