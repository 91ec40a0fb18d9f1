//! What can go from a store, and what that frees.

use std::{
    collections::{HashMap, HashSet},
    ffi::OsStr,
    os::{fd::OwnedFd, unix::ffi::OsStrExt as _},
    path::Path,
};

use anyhow::{Context as _, Result};
use layered_stores_nix_db::{Database, DatabaseError, Dead, Graph, Keep, ObjectName};
use layered_stores_overlay::probe::is_store_path_name;
use rustix::{
    fs::{AtFlags, CWD, Dir, FileType, Mode, ResolveFlags},
    io::Errno,
};

use super::nix::{Roots, hash};
use crate::cli::disk::{FLAGS, Sizes};

/// The directory of the upper layer.
pub(super) struct Upper(OwnedFd);

impl Upper {
    pub(super) fn open(path: &str) -> Result<Self> {
        let opened = rustix::fs::openat2(CWD, path, FLAGS, Mode::empty(), ResolveFlags::NO_SYMLINKS);
        Ok(Self(opened.with_context(|| format!("cannot open the upper layer {path}"))?))
    }

    /// The names of the store objects in it.
    pub(super) fn names(&self) -> Result<Vec<ObjectName>> {
        names_in(&self.0)
    }

    /// Whether an object has gone from it. OverlayFS marks one that the lower store has as well.
    pub(super) fn is_without(&self, name: &ObjectName) -> bool {
        match rustix::fs::statat(&self.0, name.as_str(), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice,
            Err(error) => error == Errno::NOENT,
        }
    }

    pub(super) fn sizes<'n>(&self, names: impl IntoIterator<Item = &'n ObjectName>) -> Result<Sizes> {
        Ok(Sizes::measure(&self.0, names.into_iter().map(ObjectName::as_str))?)
    }

    /// The files that have a name in `.links`, which goes with the last of their others.
    pub(super) fn links(&self) -> Result<HashSet<u64>> {
        let opened = rustix::fs::openat2(&self.0, ".links", FLAGS, Mode::empty(), ResolveFlags::NO_SYMLINKS);
        let links = match opened {
            Ok(links) => links,
            Err(Errno::NOENT) => return Ok(HashSet::new()),
            Err(error) => return Err(error.into()),
        };
        Ok(Dir::new(links)?.map(|entry| Ok(entry?.ino())).collect::<rustix::io::Result<_>>()?)
    }

    /// How many bytes can be added.
    pub(super) fn free(&self) -> Result<u64> {
        // What was deleted is not free on every filesystem before it has written that down.
        rustix::fs::syncfs(&self.0)?;
        let filesystem = rustix::fs::fstatvfs(&self.0)?;
        Ok(filesystem.f_bavail * filesystem.f_frsize)
    }

    /// How many bytes its filesystem has in all.
    pub(super) fn capacity(&self) -> Result<u64> {
        let filesystem = rustix::fs::fstatvfs(&self.0)?;
        Ok(filesystem.f_blocks * filesystem.f_frsize)
    }
}

fn names_in(directory: &OwnedFd) -> Result<Vec<ObjectName>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        if is_store_path_name(name) && entry.file_type() != FileType::CharacterDevice {
            names.extend(name.to_str().and_then(|name| name.parse().ok()));
        }
    }
    names.sort();
    Ok(names)
}

/// The names of the store objects in a lower store.
pub(super) fn names_below(lower_store_dir: &str) -> Result<HashSet<ObjectName>> {
    let opened = rustix::fs::openat2(CWD, lower_store_dir, FLAGS, Mode::empty(), ResolveFlags::NO_SYMLINKS);
    let opened = opened.with_context(|| format!("cannot open the lower store's directory {lower_store_dir}"))?;
    Ok(names_in(&opened)?.into_iter().collect())
}

/// The paths that are valid in a store, with what keeps them. A store that was never used has none.
pub(super) fn graph(state_dir: &str) -> Result<Graph> {
    match Database::open(&Path::new(state_dir).join("db")) {
        Err(DatabaseError::Absent(_)) => Ok(Graph::default()),
        opened => Ok(opened?.read(|snapshot| snapshot.graph())?),
    }
}

/// What nothing keeps. What only the lower store has is in it: it is not deleted, but what it refers to stays if it is not
/// named to Nix as well.
pub(super) struct Plan {
    items: Vec<Dead>,
    sizes: Sizes,
    links: HashSet<u64>,
    /// What each takes in the upper layer, if it is there.
    bytes: HashMap<usize, u64>,
}

impl Plan {
    /// What of the upper layer would go if garbage were collected, without the roots that `doomed` links are.
    pub(super) fn make(upper: &Upper, state_dir: &str, roots: &Roots, doomed: &[String], keep: Keep) -> Result<Self> {
        let (graph, temporary) = (graph(state_dir)?, roots.temporary());
        let mut items = graph.dead(roots.without(doomed), keep);
        let names = upper.names()?;
        // What is no valid path is garbage, unless somebody is making it.
        let strays = names.iter().filter(|name| !graph.contains(name) && !temporary.contains(hash(name)));
        items.extend(strays.map(|name| Dead { name: name.clone(), registered: 0, with: Vec::new() }));
        Self::of(upper, items, &names)
    }

    /// Some paths, each by itself.
    pub(super) fn of_names(upper: &Upper, names: &[ObjectName]) -> Result<Self> {
        let alone = |name: &ObjectName| Dead { name: name.clone(), registered: 0, with: Vec::new() };
        Self::of(upper, names.iter().map(alone).collect(), names)
    }

    fn of(upper: &Upper, items: Vec<Dead>, in_upper: &[ObjectName]) -> Result<Self> {
        let in_upper: HashSet<_> = in_upper.iter().collect();
        let sizes = upper.sizes(items.iter().map(|item| &item.name))?;
        let each = sizes.each();
        let there = items.iter().enumerate().filter(|(_, item)| in_upper.contains(&item.name));
        let bytes = there.map(|(place, _)| (place, each[place])).collect();
        Ok(Self { items, sizes, links: upper.links()?, bytes })
    }

    /// The places of all that is in the upper layer.
    pub(super) fn all(&self) -> Vec<usize> {
        let mut all: Vec<_> = self.bytes.keys().copied().collect();
        all.sort_unstable();
        all
    }

    pub(super) fn name(&self, place: usize) -> &ObjectName {
        &self.items[place].name
    }

    /// Those of some that are in the upper layer, with what each takes.
    pub(super) fn listed(&self, places: &HashSet<usize>) -> Vec<(String, u64)> {
        let there = places.iter().filter_map(|place| Some((self.name(*place).to_string(), *self.bytes.get(place)?)));
        let mut listed: Vec<_> = there.collect();
        listed.sort();
        listed
    }

    /// What is freed when some go.
    pub(super) fn freed(&self, gone: &HashSet<usize>, with_links: bool) -> u64 {
        let none = HashSet::new();
        self.sizes.freed(|place| gone.contains(&place), if with_links { &self.links } else { &none })
    }

    /// Those that have gone meanwhile.
    pub(super) fn gone(&self, upper: &Upper) -> HashSet<usize> {
        self.bytes.keys().copied().filter(|place| upper.is_without(self.name(*place))).collect()
    }

    /// The oldest that make room for so many bytes, in groups of what has to go together; nothing of which one of `kept` is a
    /// part. All there is, if that is not enough.
    pub(super) fn oldest(&self, needed: u64, kept: &HashSet<ObjectName>) -> Vec<Vec<usize>> {
        let mut order = self.all();
        order.sort_by_key(|place| (self.items[*place].registered, self.name(*place)));
        let (mut chosen, mut groups, mut sum) = (HashSet::new(), Vec::new(), 0);
        for place in order {
            if sum >= needed {
                break;
            }
            let group = self.group(place, &chosen);
            if group.iter().any(|place| kept.contains(self.name(*place))) {
                continue;
            }
            sum += group.iter().filter_map(|place| self.bytes.get(place)).sum::<u64>();
            chosen.extend(&group);
            if !group.is_empty() {
                groups.push(group);
            }
        }
        groups
    }

    /// What has to go for one to go, but for what is chosen already.
    fn group(&self, place: usize, chosen: &HashSet<usize>) -> Vec<usize> {
        let (mut seen, mut open) = (HashSet::new(), vec![place]);
        while let Some(place) = open.pop() {
            if !chosen.contains(&place) && seen.insert(place) {
                open.extend(&self.items[place].with);
            }
        }
        let mut group: Vec<_> = seen.into_iter().collect();
        group.sort_unstable();
        group
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn name(name: &str) -> ObjectName {
        format!("{:0>32}-{name}", "").parse().expect("a name")
    }

    /// `old` is referred to by `lower`, which is not in the upper layer, and that by `new`; `middle` is alone.
    fn plan() -> Plan {
        let dir = tempfile::tempdir().expect("a directory");
        for there in ["old", "middle", "new"] {
            fs::write(dir.path().join(name(there).as_str()), vec![1; 100_000]).expect("written");
        }
        let upper = Upper::open(&dir.path().canonicalize().expect("there").to_string_lossy()).expect("opened");
        let dead = |path: &str, registered, with: &[usize]| Dead { name: name(path), registered, with: with.to_vec() };
        let items = vec![dead("old", 1, &[1]), dead("lower", 9, &[2]), dead("new", 3, &[]), dead("middle", 2, &[])];
        let plan = Plan::of(&upper, items, &upper.names().expect("listed")).expect("measured");
        assert_eq!(plan.gone(&upper), HashSet::new());
        fs::remove_file(dir.path().join(name("old").as_str())).expect("removed");
        assert_eq!(plan.gone(&upper), HashSet::from([0]));
        plan
    }

    #[test]
    fn the_oldest_go_first_and_with_them_what_cannot_stay() {
        let plan = plan();
        let none = HashSet::new();
        assert_eq!(plan.oldest(1, &none), [vec![0, 1, 2]]);
        assert_eq!(plan.oldest(250_000, &none), [vec![0, 1, 2], vec![3]]);
        assert_eq!(plan.oldest(u64::MAX, &none), [vec![0, 1, 2], vec![3]]);
        assert_eq!(plan.oldest(0, &none), Vec::<Vec<usize>>::new());
        // What turned out to be in use stays, and so does what it needs.
        for kept in ["old", "lower", "new"] {
            let groups = plan.oldest(u64::MAX, &HashSet::from([name(kept)]));
            assert!(!groups.concat().contains(&0) && groups.concat().contains(&3), "{kept}: {groups:?}");
        }
    }

    #[test]
    fn what_is_not_in_the_upper_layer_is_not_listed() {
        let plan = plan();
        assert_eq!(plan.all(), [0, 2, 3]);
        let listed = plan.listed(&HashSet::from([0, 1]));
        assert_eq!(listed.len(), 1);
        assert!(listed[0].1 >= 100_000 && listed[0].1 < 120_000, "{listed:?}");
        assert_eq!(plan.freed(&HashSet::from([0, 1]), true), listed[0].1);
    }
}
