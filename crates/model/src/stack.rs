//! The stack of stores: which lies on which, how deep, and that no two share a directory.

mod conflict;

use std::collections::BTreeMap;

pub use conflict::{Conflict, Reason};

use super::{AbsolutePath, Declaration, Layers, LowerStore, MountUnitName, NIX_STORE_DIR, StoreName, StoreSpec};

/// `FILESYSTEM_MAX_STACK_DEPTH` of the kernel: an overlay on an overlay mounts, a third level is `EINVAL`.
pub const MAX_DEPTH: usize = 2;

/// Resolves declarations into specifications, each after the store it lies on.
///
/// # Errors
/// Every [`Conflict`] there is, not only the first.
pub fn stack(declarations: Vec<Declaration>, remount_hook: &AbsolutePath) -> Result<Vec<StoreSpec>, Vec<Conflict>> {
    let by_name: BTreeMap<_, _> = declarations.into_iter().map(|d| (d.name.clone(), d)).collect();
    let mut conflicts = Vec::new();
    let mut ordered: Vec<StoreSpec> = Vec::with_capacity(by_name.len());
    let mut index = BTreeMap::new();

    // Stores on plain lowers come first, then those on them: with two levels at most, sorting by depth is an order.
    let mut depths: Vec<(usize, &Declaration)> = Vec::with_capacity(by_name.len());
    for declaration in by_name.values() {
        match depth(declaration, &by_name) {
            Ok(depth) => depths.push((depth, declaration)),
            Err(reason) => conflicts.push(Conflict {
                store: declaration.name.clone(),
                key: "lower-store",
                value: declaration.lower_store.to_string(),
                reason,
            }),
        }
    }
    depths.sort_by_key(|(depth, _)| *depth);
    for (_, declaration) in depths {
        let (lower_url, lower_dir) = match &declaration.lower_store {
            LowerStore::Nix { url, store_dir, .. } => (url.clone(), store_dir.clone()),
            LowerStore::Layered(name) => match index.get(name) {
                Some(&i) => {
                    let lower: &StoreSpec = &ordered[i];
                    (lower.uri(), lower.layers.merged.clone())
                }
                // The store underneath has a conflict of its own, which is reported.
                None => continue,
            },
        };
        match resolve(declaration, lower_url, lower_dir, remount_hook) {
            Ok(spec) => {
                index.insert(spec.name.clone(), ordered.len());
                ordered.push(spec);
            }
            Err(reason) => conflicts.push(Conflict {
                store: declaration.name.clone(),
                key: "root",
                value: declaration.root.to_string(),
                reason,
            }),
        }
    }
    overlaps(&by_name, &ordered, &mut conflicts);
    shared_sockets(&by_name, &mut conflicts);
    if conflicts.is_empty() { Ok(ordered) } else { Err(conflicts) }
}

fn resolve(
    declaration: &Declaration,
    lower_url: String,
    lower: AbsolutePath,
    remount_hook: &AbsolutePath,
) -> Result<StoreSpec, Reason> {
    let below_root = |tail: &'static str| declaration.root.join(tail).map_err(|error| Reason::Derived { tail, error });
    let merged = below_root(&NIX_STORE_DIR[1..])?;
    Ok(StoreSpec {
        terms: declaration.terms.clone(),
        lower_url,
        mount_unit: MountUnitName::of(&merged)?,
        layers: Layers {
            lower,
            upper: declaration.upper_layer.clone(),
            work: declaration.work_dir.clone(),
            merged,
            options: declaration.mount_options.clone(),
        },
        state_dir: below_root("nix/var/nix")?,
        remount_hook: remount_hook.clone(),
    })
}

/// How many overlays a store is high, itself included.
fn depth(store: &Declaration, by_name: &BTreeMap<StoreName, Declaration>) -> Result<usize, Reason> {
    let mut names = vec![store.name.clone()];
    let mut current = store;
    while let LowerStore::Layered(name) = &current.lower_store {
        let Some(lower) = by_name.get(name) else {
            // Only the store that names it is told: the ones above it are not at fault.
            if names.len() > 1 {
                break;
            }
            let nearest = nearest(name.as_str(), by_name.keys().map(StoreName::as_str));
            return Err(Reason::NoSuchStore(name.clone(), nearest.map(str::to_owned)));
        };
        let is_loop = names.contains(name);
        names.push(name.clone());
        if is_loop {
            return Err(Reason::Loop(names));
        }
        current = lower;
    }
    if names.len() > MAX_DEPTH {
        return Err(Reason::TooDeep(names));
    }
    if let Some(lower) = names.get(1).and_then(|name| by_name.get(name))
        && owner(lower) != owner(store)
    {
        return Err(Reason::OtherOwner(lower.name.clone(), owner(lower).to_owned(), owner(store).to_owned()));
    }
    Ok(names.len())
}

fn owner(store: &Declaration) -> &str {
    store.ownership.owner.as_deref().filter(|owner| *owner != "0").unwrap_or("root")
}

/// The candidate that `text` is most likely meant to be: the one it is the beginning of, or a misspelling.
pub fn nearest<'a>(text: &str, candidates: impl Iterator<Item = &'a str> + Clone) -> Option<&'a str> {
    let begins = |candidate: &&str| candidate.strip_prefix(text).is_some_and(|rest| rest.starts_with('-'));
    if let Some(begun) = candidates.clone().find(begins) {
        return Some(begun);
    }
    // Of two letters one may be wrong, of five two. Two that changed places are one mistake.
    let most = ((text.chars().count() + 1) / 3).min(2);
    candidates
        .map(|candidate| (strsim::osa_distance(text, candidate), candidate))
        .filter(|(distance, _)| *distance <= most)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// Finds directories that are used twice or lie inside one another.
fn overlaps(by_name: &BTreeMap<StoreName, Declaration>, specs: &[StoreSpec], conflicts: &mut Vec<Conflict>) {
    // Sorted by component, everything inside a directory follows it directly, so that one pass with the chain of
    // enclosing directories finds every pair.
    let mut directories: Vec<(&AbsolutePath, &StoreName, &'static str)> = by_name
        .values()
        .flat_map(|d| match &d.ephemeral {
            // All of its directories are on one filesystem, which has to be all its own.
            Some(ephemeral) => vec![(&ephemeral.directory, &d.name, "ephemeral-size")],
            None => vec![
                (&d.root, &d.name, "root"),
                (&d.upper_layer, &d.name, "upper-layer"),
                (&d.work_dir, &d.name, "work-dir"),
            ],
        })
        .collect();
    let noun = |key| if key == "ephemeral-size" { "filesystem" } else { key };
    directories.sort_by_key(|(path, name, key)| (path.as_path(), *name, *key));
    let mut enclosing: Vec<(&AbsolutePath, &StoreName, &'static str)> = Vec::new();
    for &(path, store, key) in &directories {
        while enclosing.last().is_some_and(|(outer, ..)| !path.is_within(outer)) {
            enclosing.pop();
        }
        if let Some(&(outer, owner, outer_key)) = enclosing.last() {
            conflicts.push(Conflict {
                store: store.clone(),
                key,
                value: path.to_string(),
                reason: Reason::Overlap {
                    owner: (owner != store).then(|| owner.clone()),
                    key: noun(outer_key),
                    value: outer.clone(),
                    nested: path != outer,
                },
            });
        }
        enclosing.push((path, store, key));
    }

    // Several stores may share one lower store; the first of them is named.
    let on_plain_lower = || specs.iter().filter(|spec| spec.lower_name().is_none());
    let merged: BTreeMap<_, _> = specs.iter().map(|spec| (&spec.layers.merged, &spec.name)).collect();
    let written: BTreeMap<_, _> = directories.iter().map(|entry| (entry.0.as_path(), entry)).collect();
    let lowers: BTreeMap<_, _> = on_plain_lower().rev().map(|s| (s.layers.lower.as_path(), s)).collect();
    for spec in on_plain_lower() {
        let lower = &spec.layers.lower;
        let reason = match merged.get(lower) {
            Some(&name) if name != &spec.name => Some(Reason::WriteLayered(name.clone())),
            _ => lower.as_path().ancestors().find_map(|dir| written.get(dir)).map(|&&(value, owner, key)| {
                Reason::LowerInside {
                    dir: lower.clone(),
                    owner: (owner != &spec.name).then(|| owner.clone()),
                    key: noun(key),
                    value: value.clone(),
                }
            }),
        };
        if let Some(reason) = reason {
            conflicts.push(Conflict {
                store: spec.name.clone(),
                key: "lower-store",
                value: spec.lower_store.to_string(),
                reason,
            });
        }
    }
    // The other way round: a directory that is written, inside a lower store's directory.
    for (path, store, key) in directories {
        if let Some(on_it) = path.as_path().ancestors().find_map(|dir| lowers.get(dir)) {
            conflicts.push(Conflict {
                store: store.clone(),
                key,
                value: path.to_string(),
                reason: Reason::Overlap {
                    owner: (on_it.name != *store).then(|| on_it.name.clone()),
                    key: "lower store's directory",
                    value: on_it.layers.lower.clone(),
                    nested: *path != on_it.layers.lower,
                },
            });
        }
    }
}

/// Finds Nix daemons that would listen on the same socket.
fn shared_sockets(by_name: &BTreeMap<StoreName, Declaration>, conflicts: &mut Vec<Conflict>) {
    let mut owners: BTreeMap<&AbsolutePath, &StoreName> = BTreeMap::new();
    for store in by_name.values() {
        let Some(daemon) = &store.daemon else { continue };
        match owners.get(&daemon.socket_path) {
            Some(&owner) => conflicts.push(Conflict {
                store: store.name.clone(),
                key: "daemon.socket-path",
                value: daemon.socket_path.to_string(),
                reason: Reason::SharedSocket(owner.clone()),
            }),
            None => drop(owners.insert(&daemon.socket_path, &store.name)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::{prelude::*, strategy::ValueTree as _};

    use super::*;
    use crate::fixture;

    fn declare(name: &str, lower: &str) -> Declaration {
        let path = |tail: &str| format!("/s/{name}/{tail}").parse().expect("valid");
        let mut terms = fixture::spec(name, "/l").terms;
        (terms.lower_store, terms.root) = (lower.parse().expect("valid"), path("root"));
        Declaration { terms, upper_layer: path("upper"), work_dir: path("work"), mount_options: Vec::new() }
    }

    fn hook() -> AbsolutePath {
        "/usr/bin/layered-stores-remount".parse().expect("valid")
    }

    fn stacked(declarations: Vec<Declaration>) -> Result<Vec<StoreSpec>, Vec<String>> {
        stack(declarations, &hook())
            .map_err(|conflicts| conflicts.iter().map(|c| format!("{} {}: {c}", c.store, c.key)).collect())
    }

    #[test]
    fn a_misspelling_is_told_from_another_name() {
        for (text, meant) in [
            ("bsae", Some("base")),
            ("bas", Some("base")),
            ("builsd", Some("builds")),
            ("bilds", Some("builds")),
            ("to", Some("top")),
            ("nope", None),
            ("tape", None),
            ("x", None),
            ("builds-new", None),
        ] {
            assert_eq!(nearest(text, ["base", "builds", "top"].into_iter()), meant, "{text}");
        }
    }

    #[test]
    fn a_store_comes_after_the_one_it_lies_on() {
        let specs = stacked(vec![declare("a", "layered:z"), declare("z", "/lower")]).expect("a stack");
        assert_eq!(specs.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(), ["z", "a"]);
        assert_eq!(specs[1].layers.lower, specs[0].layers.merged);
    }

    #[test]
    fn the_uri_of_a_store_on_a_store_is_encoded_once_a_level() {
        let specs =
            stacked(vec![declare("top", "layered:base"), declare("base", "/l?read-only=true")]).expect("a stack");
        assert_eq!(
            specs[0].uri(),
            "local-overlay://?root=/s/base/root&lower-store=/l%3Fread-only%3Dtrue&upper-layer=/s/base/upper\
             &remount-hook=/usr/bin/layered-stores-remount"
        );
        assert_eq!(
            specs[1].uri(),
            "local-overlay://?root=/s/top/root&lower-store=local-overlay%3A//%3Froot%3D/s/base/root\
             %26lower-store%3D/l%253Fread-only%253Dtrue%26upper-layer%3D/s/base/upper\
             %26remount-hook%3D/usr/bin/layered-stores-remount\
             &upper-layer=/s/top/upper&remount-hook=/usr/bin/layered-stores-remount"
        );
    }

    #[test]
    fn a_store_on_somebody_elses_store_is_refused() {
        let of = |name, lower, owner: Option<&str>| {
            let mut store = declare(name, lower);
            store.terms.ownership.owner = owner.map(str::to_owned);
            store
        };
        for (below, above, who) in [
            (Some("alice"), None, "alice and this one to root"),
            (None, Some("alice"), "root and this one to alice"),
            (Some("alice"), Some("bob"), "alice and this one to bob"),
        ] {
            let said = stacked(vec![of("base", "/l", below), of("top", "layered:base", above)]);
            let expected = format!(
                "top lower-store: the store \"base\" belongs to {who}, and Nix opens both as one user; give both the same owner"
            );
            assert_eq!(said, Err(vec![expected]));
        }
        for (below, above) in [(Some("alice"), Some("alice")), (Some("root"), None), (None, Some("0"))] {
            assert!(stacked(vec![of("base", "/l", below), of("top", "layered:base", above)]).is_ok());
        }
    }

    #[test]
    fn a_stack_the_kernel_would_not_take_is_refused() {
        for (declarations, expected) in [
            (
                vec![declare("a", "/l"), declare("b", "layered:a"), declare("c", "layered:b")],
                "c lower-store: the kernel stacks at most 2 overlays and this would be number 3 (c on b on a); \
                 use the lower store of b instead",
            ),
            (
                vec![declare("a", "layered:a")],
                "a lower-store: the store lies on itself (a on a); let one of them have a lower store of its own",
            ),
            (
                vec![declare("base", "/l"), declare("b", "layered:bsae")],
                "b lower-store: no store \"bsae\" is declared here; did you mean \"base\"?",
            ),
        ] {
            assert_eq!(stacked(declarations), Err(vec![expected.to_owned()]));
        }
    }

    #[test]
    fn no_directory_serves_twice() {
        let with = |change: fn(&mut Declaration)| {
            let mut b = declare("b", "/l");
            change(&mut b);
            stacked(vec![declare("a", "/l"), b]).expect_err("a conflict").join("; ")
        };
        for (problem, expected) in [
            (
                with(|b| b.upper_layer = "/s/a/upper".parse().expect("valid")),
                "b upper-layer: it is also the upper-layer of store \"a\" (/s/a/upper); give each a directory of its own",
            ),
            (
                with(|b| b.upper_layer = "/s/a/work/x".parse().expect("valid")),
                "b upper-layer: it lies inside the work-dir of store \"a\" (/s/a/work); give each a directory of its own",
            ),
            (
                with(|b| b.work_dir = "/s/b/upper/work".parse().expect("valid")),
                "b work-dir: it lies inside the upper-layer of the same store (/s/b/upper); \
                 give each a directory of its own",
            ),
            (
                with(|b| b.terms.lower_store = "/s/a/root".parse().expect("valid")),
                "b lower-store: this is the store \"a\" of this configuration; write \"layered:a\"",
            ),
            (
                with(|b| b.terms.lower_store = "/s/b/upper/x".parse().expect("valid")),
                "b lower-store: the lower store's directory /s/b/upper/x/nix/store lies inside the upper-layer of \
                 the same store (/s/b/upper); a lower store has to lie apart",
            ),
            (
                with(|b| b.upper_layer = "/l/nix/store/up".parse().expect("valid")),
                "b upper-layer: it lies inside the lower store's directory of store \"a\" (/l/nix/store); \
                 give each a directory of its own",
            ),
        ] {
            assert_eq!(problem, expected);
        }
    }

    #[test]
    fn what_is_too_long_with_the_store_below_it_is_refused() {
        let mut a = declare("a", "/l");
        a.terms.root = format!("/{}", "r".repeat(250)).parse().expect("valid");
        let conflicts = stacked(vec![a]).expect_err("too long");
        assert!(
            conflicts[0].starts_with("a root: with nix/store below it: the path is 261 bytes long"),
            "{conflicts:?}"
        );
    }

    /// What stands for a lower store that is no layered one. Every other number is the store of that number, if there is one.
    const PLAIN: usize = 8;

    /// The lower stores of up to eight stores: most of them plain, or a store that lies on a plain one, and some anything.
    fn lowers() -> impl Strategy<Value = Vec<usize>> {
        prop::collection::vec((0usize..20, 0..=PLAIN), 0..8).prop_map(|drawn| {
            let plain: Vec<_> = (0..drawn.len()).filter(|&store| drawn[store].0 < 9).collect();
            let lower = |&(kind, any): &(usize, usize)| match kind {
                0..9 => PLAIN,
                9..19 if !plain.is_empty() => plain[any % plain.len()],
                _ => any,
            };
            drawn.iter().map(lower).collect()
        })
    }

    fn declarations(lowers: &[usize]) -> Vec<Declaration> {
        let url = |lower: usize| if lower == PLAIN { "/l".to_owned() } else { format!("layered:s{lower}") };
        lowers.iter().enumerate().map(|(i, lower)| declare(&format!("s{i}"), &url(*lower))).collect()
    }

    #[test]
    fn stacks_that_stand_are_drawn_and_such_that_do_not() {
        let mut runner = prop::test_runner::TestRunner::deterministic();
        let (mut stand, mut refused) = (0, 0);
        for _ in 0..256 {
            let lowers = lowers().new_tree(&mut runner).expect("drawn").current();
            match stack(declarations(&lowers), &hook()) {
                Ok(specs) => stand += usize::from(specs.iter().any(|spec| spec.lower_name().is_some())),
                Err(_) => refused += 1,
            }
        }
        assert!(stand >= 64 && refused >= 32, "{stand} with a store on a store, {refused} refused");
    }

    proptest! {
        /// Whatever is declared: if each store lies on one that is no layered store, or on one that does, all are resolved, after
        /// those they lie on; else there is a conflict.
        #[test]
        fn stacks_are_ordered_and_bounded(lowers in lowers()) {
            let declarations = declarations(&lowers);
            let lies_on = |store: usize| lowers.get(lowers[store]).map(|_| lowers[store]);
            // One that is not declared is nobody, too.
            let stands = |store: usize| match (lowers[store], lies_on(store)) {
                (PLAIN, _) => true,
                (_, Some(lower)) => lowers[lower] == PLAIN,
                (_, None) => false,
            };
            let resolved = stack(declarations.clone(), &hook());
            prop_assert_eq!(resolved.is_ok(), (0..lowers.len()).all(stands), "{:?}", resolved);
            for (i, spec) in resolved.iter().flatten().enumerate() {
                if let Some(lower) = spec.lower_name() {
                    prop_assert!(resolved.iter().flatten().take(i).any(|below| below.name == *lower));
                }
            }
            prop_assert!(resolved.is_err() || resolved.iter().flatten().count() == declarations.len());
        }
    }
}
