//! What the journal is told of a store's problems: as much as the bus, and each with its code in the field `PROBLEM`.

use std::collections::BTreeMap;

use layered_stores_model::StoreName;

use crate::supervisor::status::Problem;

/// Tells the journal of problems that are here and were not, of those that are another one now, and of those that are over.
pub(super) fn tell(name: &StoreName, before: &[(Problem, String)], now: &BTreeMap<Problem, String>) {
    for (problem, message) in came(before, now) {
        tracing::warn!(store = %name, %problem, "{name}: {message}");
    }
    for problem in went(before, now) {
        tracing::info!(store = %name, %problem, "{name}: the problem [{problem}] is over");
    }
}

fn came<'p>(
    before: &'p [(Problem, String)],
    now: &'p BTreeMap<Problem, String>,
) -> impl Iterator<Item = (&'p Problem, &'p String)> {
    now.iter().filter(|now| !before.iter().any(|(problem, message)| (problem, message) == *now))
}

fn went<'p>(before: &'p [(Problem, String)], now: &'p BTreeMap<Problem, String>) -> impl Iterator<Item = &'p Problem> {
    before.iter().map(|(problem, _)| problem).filter(|problem| !now.contains_key(problem))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_changes_and_goes_is_told_and_what_stays_is_not() {
        let before = [(Problem::Stale, "stale"), (Problem::Busy, "busy"), (Problem::Full, "full")];
        let now = [(Problem::Stale, "stale"), (Problem::Full, "fuller"), (Problem::Covered, "covered")];
        let before = before.map(|(problem, message)| (problem, message.to_owned()));
        let now = BTreeMap::from(now.map(|(problem, message)| (problem, message.to_owned())));
        let came: Vec<_> = came(&before, &now).map(|(problem, message)| (*problem, message.as_str())).collect();
        assert_eq!(came, [(Problem::Covered, "covered"), (Problem::Full, "fuller")]);
        assert_eq!(went(&before, &now).collect::<Vec<_>>(), [&Problem::Busy]);
    }
}
