//! What a store's paths have to do with one another, and which of them its garbage collector would take.

use std::collections::{HashMap, HashSet};

use super::{DatabaseError, ObjectName, Snapshot};

/// The paths that are valid in a store, and what keeps them.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    nodes: Vec<Node>,
    numbers: HashMap<ObjectName, usize>,
}

/// One path. Others are their numbers.
#[derive(Clone, Debug)]
struct Node {
    name: ObjectName,
    /// When it was registered, in seconds since 1970.
    registered: i64,
    references: Vec<usize>,
    /// The derivation that it was made by, if that is valid.
    deriver: Option<usize>,
    /// What it makes, for a derivation, if that is valid.
    outputs: Vec<usize>,
}

/// What keeps a path alive beside what refers to it: settings of Nix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keep {
    /// A derivation is kept for what it has made (`keep-derivations`).
    pub derivations: bool,
    /// What a derivation has made is kept for the derivation (`keep-outputs`).
    pub outputs: bool,
}

/// A path that nothing keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dead {
    /// What it is called.
    pub name: ObjectName,
    /// When it was registered, in seconds since 1970.
    pub registered: i64,
    /// What has to go with it, by the places in the list that this is in: what refers to it, and for a derivation, what it has
    /// made, and the other way round.
    pub with: Vec<usize>,
}

impl Graph {
    /// Reads it.
    ///
    /// # Errors
    /// [`DatabaseError`].
    pub(crate) fn read(snapshot: &Snapshot<'_>) -> Result<Self, DatabaseError> {
        let (mut graph, mut places, mut derivers) = (Self::default(), HashMap::new(), Vec::new());
        snapshot.each("SELECT id, path, registrationTime, deriver FROM ValidPaths", |row| {
            let (id, path, registered, deriver): (i64, String, i64, Option<String>) =
                (row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?);
            if let Ok(name) = ObjectName::in_path(&path) {
                places.insert(id, graph.add(name, registered));
                derivers.push(deriver.and_then(|path| ObjectName::in_path(&path).ok()));
            }
            Ok(())
        })?;
        for (place, deriver) in derivers.into_iter().enumerate() {
            graph.nodes[place].deriver = deriver.and_then(|name| graph.numbers.get(&name).copied());
        }
        snapshot.each("SELECT referrer, reference FROM Refs", |row| {
            let of = |id: i64| places.get(&id).copied();
            if let (Some(referrer), Some(reference)) = (of(row.get(0)?), of(row.get(1)?))
                && referrer != reference
            {
                graph.nodes[referrer].references.push(reference);
            }
            Ok(())
        })?;
        snapshot.each("SELECT drv, path FROM DerivationOutputs", |row| {
            let (drv, output): (i64, String) = (row.get(0)?, row.get(1)?);
            let output = ObjectName::in_path(&output).ok().and_then(|name| graph.numbers.get(&name).copied());
            if let (Some(drv), Some(output)) = (places.get(&drv), output) {
                graph.nodes[*drv].outputs.push(output);
            }
            Ok(())
        })?;
        Ok(graph)
    }

    fn add(&mut self, name: ObjectName, registered: i64) -> usize {
        self.numbers.insert(name.clone(), self.nodes.len());
        self.nodes.push(Node { name, registered, references: Vec::new(), deriver: None, outputs: Vec::new() });
        self.nodes.len() - 1
    }

    /// Whether a path is valid.
    pub fn contains(&self, name: &ObjectName) -> bool {
        self.numbers.contains_key(name)
    }

    /// The paths that nothing keeps, when these are the roots: as Nix's garbage collector decides it (`computeFSClosure`).
    pub fn dead(&self, roots: impl IntoIterator<Item = ObjectName>, keep: Keep) -> Vec<Dead> {
        let mut open: Vec<usize> = roots.into_iter().filter_map(|name| self.numbers.get(&name).copied()).collect();
        let mut live = HashSet::new();
        while let Some(number) = open.pop() {
            if !live.insert(number) {
                continue;
            }
            let node = &self.nodes[number];
            open.extend(&node.references);
            open.extend(node.deriver.filter(|_| keep.derivations));
            open.extend(node.outputs.iter().filter(|_| keep.outputs));
        }
        let dead: Vec<usize> = (0..self.nodes.len()).filter(|number| !live.contains(number)).collect();
        let places: HashMap<usize, usize> = dead.iter().enumerate().map(|(place, number)| (*number, place)).collect();
        let list = dead.iter().map(|number| {
            let Node { name, registered, .. } = &self.nodes[*number];
            Dead { name: name.clone(), registered: *registered, with: Vec::new() }
        });
        let mut list: Vec<Dead> = list.collect();
        for (place, number) in dead.iter().enumerate() {
            let node = &self.nodes[*number];
            for reference in &node.references {
                if let Some(reference) = places.get(reference) {
                    list[*reference].with.push(place);
                }
            }
            for other in node.outputs.iter().chain(&node.deriver).filter_map(|other| places.get(other)) {
                list[place].with.push(*other);
                list[*other].with.push(place);
            }
        }
        list
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOTH: [Keep; 2] = [Keep { derivations: true, outputs: false }, Keep { derivations: false, outputs: true }];

    fn name(name: &str) -> ObjectName {
        format!("{:0>32}-{name}", "").parse().expect("a name")
    }

    /// `app` refers to `lib`, `app.drv` made `app`, `lone` is alone.
    fn graph() -> Graph {
        let mut graph = Graph::default();
        for (time, path) in ["lib", "app", "app.drv", "lone"].into_iter().enumerate() {
            graph.add(name(path), i64::try_from(time).expect("small"));
        }
        graph.nodes[1].references.push(0);
        graph.nodes[1].deriver = Some(2);
        graph.nodes[2].outputs.push(1);
        graph
    }

    fn dead(roots: &[&str], keep: Keep) -> Vec<String> {
        let dead = graph().dead(roots.iter().map(|root| name(root)), keep);
        dead.iter().map(|dead| dead.name.as_str()[33..].to_owned()).collect()
    }

    #[test]
    fn what_a_root_leads_to_is_kept_and_the_rest_is_not() {
        let [derivations, outputs] = BOTH;
        for keep in BOTH {
            assert_eq!(dead(&[], keep), ["lib", "app", "app.drv", "lone"]);
            assert_eq!(dead(&["lib", "elsewhere"], keep), ["app", "app.drv", "lone"]);
        }
        assert_eq!(dead(&["app"], derivations), ["lone"]);
        assert_eq!(dead(&["app"], outputs), ["app.drv", "lone"]);
        assert_eq!(dead(&["app.drv"], derivations), ["lib", "app", "lone"]);
        assert_eq!(dead(&["app.drv"], outputs), ["lone"]);
    }

    #[test]
    fn what_cannot_stay_without_a_path_goes_with_it() {
        let dead = graph().dead([], BOTH[0]);
        let with = |path: &str| {
            let of = dead.iter().find(|dead| dead.name == name(path)).expect("dead");
            let mut with: Vec<_> = of.with.iter().map(|place| dead[*place].name.as_str()[33..].to_owned()).collect();
            with.sort();
            with.dedup();
            with
        };
        assert_eq!(with("lib"), ["app"]);
        assert_eq!(with("app"), ["app.drv"]);
        assert_eq!(with("app.drv"), ["app"]);
        assert!(with("lone").is_empty());
    }
}
