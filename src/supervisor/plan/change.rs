//! Which stores that are declared otherwise than they are stay as they are: a pure function.
//!
//! A store that goes down for a mistyped directory and comes up no more is what nobody who reloads wants. So what is up changes
//! only if it can most likely come up again. One that stays as it is may have others stay with it: those that would lie on it
//! where it is not, those on which it lies, and those that are to have one of its directories.

use std::collections::BTreeMap;

use layered_stores_model::{StoreName, StoreSpec};

use super::Lower;

/// What a look ahead has found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::supervisor) enum Found {
    /// Nobody has looked.
    Nothing,
    /// The store can most likely come up.
    Fine,
    /// It cannot.
    Wrong(String),
}

/// A store that is declared otherwise than it is, for which it has to go down.
#[derive(Clone, Debug)]
pub(in crate::supervisor) struct Change<'a> {
    pub now: &'a StoreSpec,
    pub then: &'a StoreSpec,
    /// It is up, and has something to lose.
    pub is_up: bool,
    pub found: Found,
}

/// Why a store stays as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::supervisor) enum Stay {
    /// It is being looked at, or something that it depends on.
    ForNow,
    /// It would not come up.
    Because(String),
}

/// Which stores stay as they are. The others have nothing to lose, or can change. What a store is that does not change is told by
/// `lower`; `stuck` are those that are to go down and cannot.
pub(in crate::supervisor) fn staying(
    changes: &[Change<'_>],
    stuck: &[&StoreSpec],
    lower: impl Fn(&StoreName) -> Lower,
) -> BTreeMap<StoreName, Stay> {
    let mut staying = BTreeMap::new();
    loop {
        let is_open = |change: &&Change<'_>| change.is_up && !staying.contains_key(&change.now.name);
        let more: Vec<_> = changes
            .iter()
            .filter(is_open)
            .filter_map(|change| Some((change.now.name.clone(), stays(change, changes, stuck, &staying, &lower)?)))
            .collect();
        if more.is_empty() {
            return staying;
        }
        staying.extend(more);
    }
}

fn stays(
    change: &Change<'_>,
    changes: &[Change<'_>],
    stuck: &[&StoreSpec],
    staying: &BTreeMap<StoreName, Stay>,
    lower: impl Fn(&StoreName) -> Lower,
) -> Option<Stay> {
    let Change { now, then, found, .. } = change;
    match found {
        Found::Nothing => return Some(Stay::ForNow),
        Found::Wrong(why) => return Some(Stay::Because(why.clone())),
        Found::Fine => {}
    }
    for (other, how) in changes.iter().filter_map(|other| Some((other.now, staying.get(&other.now.name)?))) {
        let name = &other.name;
        let why = if then.lower_name() == Some(name) && then.layers.lower != other.layers.merged {
            format!("its lower store {name} goes on as it was")
        } else if other.lower_name() == Some(&now.name) && now.layers.merged != then.layers.merged {
            format!("{name} lies on it and goes on as it was")
        } else if then.shares_directories_with(other) {
            format!("{name} has one of its directories and goes on as it was")
        } else {
            continue;
        };
        return Some(if *how == Stay::ForNow { Stay::ForNow } else { Stay::Because(why) });
    }
    let is_in_the_way = |other: &&&StoreSpec| other.name != now.name && then.shares_directories_with(other);
    if let Some(other) = stuck.iter().find(is_in_the_way) {
        let why = format!("{0} has one of its directories and cannot go; see `layered-stores status {0}`", other.name);
        return Some(Stay::Because(why));
    }
    let name = then.lower_name()?;
    let changes_too = changes.iter().any(|other| other.now.name == *name && !staying.contains_key(name));
    if changes_too || lower(name) != Lower::Unavailable {
        return None;
    }
    Some(Stay::Because(format!("its lower store {name} is not up; see `layered-stores status {name}`")))
}

#[cfg(test)]
mod tests {
    use layered_stores_model::fixture;

    use super::*;

    const A_AND_C: &str = "[stores.a]\nlower-store = \"/srv\"\n[stores.b]\nlower-store = \"/srv\"\n\
                           [stores.c]\nlower-store = \"layered:a\"\n";

    fn specs(text: &str) -> Vec<StoreSpec> {
        fixture::declared("/state", text)
    }

    /// Stores as they are, and as they are to be, with what was found of those that change.
    fn staying_of(now: &str, then: &str, found: [&Found; 3], below: Lower) -> BTreeMap<String, Stay> {
        let (now, then) = (specs(now), specs(then));
        let pairs = now.iter().zip(&then).zip(found);
        let changes: Vec<_> = pairs
            .filter(|((now, then), _)| now.needs_restart_for(then))
            .map(|((now, then), found)| Change { now, then, is_up: true, found: found.clone() })
            .collect();
        staying(&changes, &[], |_| below).into_iter().map(|(name, stay)| (name.to_string(), stay)).collect()
    }

    fn wrong() -> Found {
        Found::Wrong("it is mistyped".to_owned())
    }

    fn because(why: &str) -> Stay {
        Stay::Because(why.to_owned())
    }

    fn is(expected: &[(&str, Stay)]) -> BTreeMap<String, Stay> {
        expected.iter().map(|(name, stay)| ((*name).to_owned(), stay.clone())).collect()
    }

    #[test]
    fn what_can_come_up_changes_and_the_rest_stays() {
        let noatime = A_AND_C.replace("[stores.b]\n", "[stores.b]\nmount-options = [\"noatime\"]\n");
        let found = |found: &Found| staying_of(A_AND_C, &noatime, [&Found::Fine, found, &Found::Fine], Lower::Ready);
        assert_eq!(found(&Found::Fine), is(&[]));
        assert_eq!(found(&Found::Nothing), is(&[("b", Stay::ForNow)]));
        assert_eq!(found(&wrong()), is(&[("b", because("it is mistyped"))]));
    }

    #[test]
    fn what_is_down_has_nothing_to_lose() {
        let (now, then) = (specs(A_AND_C), specs(&A_AND_C.replace("/srv", "/srv/other")));
        let change = Change { now: &now[0], then: &then[0], is_up: false, found: Found::Nothing };
        assert_eq!(staying(&[change], &[], |_| Lower::Unavailable), BTreeMap::new());
    }

    #[test]
    fn a_store_that_moves_takes_those_on_it_along_or_stays_with_them() {
        let moved = A_AND_C.replace("[stores.a]\n", "[stores.a]\nroot = \"/elsewhere\"\n");
        let found = |a: &Found, c: &Found| staying_of(A_AND_C, &moved, [a, &Found::Fine, c], Lower::Ready);
        assert_eq!(found(&Found::Fine, &Found::Fine), is(&[]));
        let stays = [("a", because("it is mistyped")), ("c", because("its lower store a goes on as it was"))];
        assert_eq!(found(&wrong(), &Found::Fine), is(&stays));
        let stays = [("a", because("c lies on it and goes on as it was")), ("c", because("it is mistyped"))];
        assert_eq!(found(&Found::Fine, &wrong()), is(&stays));
        assert_eq!(found(&Found::Nothing, &Found::Fine), is(&[("a", Stay::ForNow), ("c", Stay::ForNow)]));
        assert_eq!(found(&Found::Fine, &Found::Nothing), is(&[("a", Stay::ForNow), ("c", Stay::ForNow)]));
    }

    #[test]
    fn a_store_that_changes_where_it_is_does_so_whatever_is_on_it() {
        let both = A_AND_C.replace("[stores.a]\n", "[stores.a]\nmount-options = [\"noatime\"]\n")
            + "mount-options = [\"noatime\"]\n";
        let found = |a: &Found, c: &Found| staying_of(A_AND_C, &both, [a, &Found::Fine, c], Lower::Ready);
        assert_eq!(found(&Found::Fine, &wrong()), is(&[("c", because("it is mistyped"))]));
        assert_eq!(found(&wrong(), &Found::Fine), is(&[("a", because("it is mistyped"))]));
    }

    #[test]
    fn directories_are_not_taken_from_what_stays() {
        let now = "[stores.a]\nlower-store = \"/srv\"\nupper-layer = \"/u/a\"\nwork-dir = \"/u/wa\"\n\
                   [stores.b]\nlower-store = \"/srv\"\nupper-layer = \"/u/b\"\nwork-dir = \"/u/wb\"\n\
                   [stores.c]\nlower-store = \"/srv\"\n";
        let then = now.replace("/u/a", "/u/x").replace("/u/b", "/u/a").replace("/u/x", "/u/b");
        let found = |a: &Found| staying_of(now, &then, [a, &Found::Fine, &Found::Fine], Lower::Ready);
        assert_eq!(found(&Found::Fine), is(&[]), "they change places");
        let stays =
            [("a", because("it is mistyped")), ("b", because("a has one of its directories and goes on as it was"))];
        assert_eq!(found(&wrong()), is(&stays));
    }

    #[test]
    fn a_store_goes_over_to_another_one_that_is_up() {
        let then = A_AND_C.replace("layered:a", "layered:b");
        let found = |below| staying_of(A_AND_C, &then, [&Found::Fine; 3], below);
        assert_eq!(found(Lower::Ready), is(&[]));
        assert_eq!(found(Lower::Leaving), is(&[]));
        assert_eq!(found(Lower::Pending), is(&[]), "whoever waited for it to come up might wait for what this one has");
        let why = "its lower store b is not up; see `layered-stores status b`";
        assert_eq!(found(Lower::Unavailable), is(&[("c", because(why))]));
        let changed = then.replace("[stores.b]\n", "[stores.b]\nmount-options = [\"noatime\"]\n");
        let found = |b: &Found| staying_of(A_AND_C, &changed, [&Found::Fine, b, &Found::Fine], Lower::Unavailable);
        assert_eq!(found(&Found::Fine), is(&[]), "as it is to be, that may come up");
        let stays = [("b", because("it is mistyped")), ("c", because(why))];
        assert_eq!(found(&wrong()), is(&stays));
    }

    #[test]
    fn what_cannot_go_keeps_its_directories() {
        let text =
            |c: &str| format!("[stores.c]\nlower-store = \"/srv\"\nupper-layer = \"/u/{c}\"\nwork-dir = \"/u/w{c}\"\n");
        let (now, then, other) =
            (specs(&text("c")), specs(&text("d")), specs(&text("d").replace("stores.c", "stores.x")));
        let change = Change { now: &now[0], then: &then[0], is_up: true, found: Found::Fine };
        let staying = staying(&[change], &[&other[0]], |_| Lower::Ready);
        let why = "x has one of its directories and cannot go; see `layered-stores status x`";
        assert_eq!(staying, [(now[0].name.clone(), because(why))].into());
        let elsewhere = specs(&text("e").replace("stores.c", "stores.x"));
        let change = Change { now: &now[0], then: &then[0], is_up: true, found: Found::Fine };
        let staying = super::staying(&[change], &[&elsewhere[0], &now[0]], |_| Lower::Ready);
        assert_eq!(staying, BTreeMap::new(), "others, and itself, are not in its way");
    }
}
