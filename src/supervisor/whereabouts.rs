//! Where a store's directories lie, by the mount table.
//!
//! An overlay goes on with the directories that it was made of, and everything else looks at what their paths lead to. Where
//! that is not the same any more, a look would find everything wrong, and a swap would go over to what hides them. For the
//! lower store that is as it should be: what its path leads to is what the store is to show. For the upper layer it never is.

use layered_stores_model::Layers;
use layered_stores_overlay::mountinfo::{Cover, Location, MountTable};

/// Where a store's directories lie.
#[derive(Debug, Default)]
pub(super) struct Whereabouts {
    /// Where upper layer and work dir lay when the store was mounted.
    layers: [Option<Location>; 2],
    /// Where the lower store lay when all was last right.
    lower: Option<Location>,
    /// Where it was last seen.
    lower_seen: Option<Location>,
    /// What hides it.
    lower_cover: Option<Cover>,
}

impl Whereabouts {
    /// Notes where they lie when the store is there: mounted `anew`, or taken over.
    pub(super) fn note(&mut self, layers: &Layers, table: &MountTable, anew: bool) {
        self.lower = table.location(layers.lower.as_str());
        // One that was hidden meanwhile may be hidden still.
        if anew || self.layers == [None, None] {
            self.layers = [&layers.upper, &layers.work].map(|dir| table.location(dir.as_str()));
        }
    }

    /// What hides the upper layer or the work dir that the store was mounted with.
    pub(super) fn cover(&self, layers: &Layers, table: &MountTable) -> Option<Cover> {
        let [upper, work] = &self.layers;
        let mut both = [(&layers.upper, upper), (&layers.work, work)].into_iter();
        both.find_map(|(dir, lies)| table.cover(dir.as_str(), lies.as_ref()?))
    }

    /// Looks where the lower store's path leads to. Whether that is another filesystem or directory than the last time.
    pub(super) fn lower_is_other(&mut self, layers: &Layers, table: &MountTable) -> bool {
        let lower = layers.lower.as_str();
        let seen = table.location(lower);
        self.lower_cover = self.lower.as_ref().and_then(|lies| table.cover(lower, lies));
        let before = std::mem::replace(&mut self.lower_seen, seen);
        before.is_some() && before != self.lower_seen
    }

    /// What hides the lower store that is shown, as far as the mount table was looked at.
    pub(super) fn lower_cover(&self) -> Option<&Cover> {
        self.lower_cover.as_ref()
    }

    /// Notes that the store shows what the lower store's path leads to.
    pub(super) fn lower_is_right(&mut self) {
        self.lower.clone_from(&self.lower_seen);
        self.lower_cover = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: &str = "22 1 0:22 / / rw - ext4 /dev/vda rw";

    fn layers() -> Layers {
        let path = |p: &str| p.parse().expect("valid");
        Layers {
            lower: path("/base/nix/store"),
            upper: path("/disk/upper"),
            work: path("/disk/work"),
            merged: path("/root/nix/store"),
            options: Vec::new(),
        }
    }

    fn table(more: &[&str]) -> MountTable {
        let mounts = more.iter().zip(30..).map(|(point, id)| format!("{id} 22 0:{id} / {point} rw - tmpfs theirs rw"));
        let lines: Vec<_> = std::iter::once(ROOT.to_owned()).chain(mounts).collect();
        MountTable::parse(&lines.join("\n"), |_| true)
    }

    #[test]
    fn a_store_that_is_taken_over_again_has_its_layers_where_it_was_mounted_with_them() {
        let (layers, mut whereabouts) = (layers(), Whereabouts::default());
        let hides =
            |whereabouts: &Whereabouts, point| whereabouts.cover(&layers, &table(&[point])).map(|cover| cover.hides);
        assert_eq!(hides(&whereabouts, "/disk"), None, "nothing is known");
        whereabouts.note(&layers, &table(&[]), true);
        assert_eq!(whereabouts.cover(&layers, &table(&[])), None);
        assert_eq!(hides(&whereabouts, "/disk").as_deref(), Some("/disk/upper"));
        assert_eq!(hides(&whereabouts, "/disk/work").as_deref(), Some("/disk/work"));
        assert_eq!(hides(&whereabouts, "/disk/other"), None);
        whereabouts.note(&layers, &table(&["/disk"]), false);
        assert!(hides(&whereabouts, "/disk").is_some(), "taken over");
        whereabouts.note(&layers, &table(&["/disk"]), true);
        assert_eq!(hides(&whereabouts, "/disk"), None, "mounted anew, on that");
    }

    #[test]
    fn the_lower_store_is_followed() {
        let (layers, mut whereabouts) = (layers(), Whereabouts::default());
        whereabouts.note(&layers, &table(&[]), true);
        assert!(!whereabouts.lower_is_other(&layers, &table(&[])), "seen for the first time");
        assert!(!whereabouts.lower_is_other(&layers, &table(&["/disk"])));
        assert_eq!(whereabouts.lower_cover(), None);
        assert!(whereabouts.lower_is_other(&layers, &table(&["/base"])));
        assert_eq!(whereabouts.lower_cover().map(|cover| cover.point.as_str()), Some("/base"));
        assert!(!whereabouts.lower_is_other(&layers, &table(&["/base"])));
        whereabouts.lower_is_right();
        assert_eq!(whereabouts.lower_cover(), None);
        assert!(whereabouts.lower_is_other(&layers, &table(&[])), "and back");
        assert_eq!(whereabouts.lower_cover(), None, "what it was swapped to was taken away, and not hidden");
    }
}
