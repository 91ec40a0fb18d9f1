//! The mount table (`/proc/PID/mountinfo`, proc_pid_mountinfo(5)), as far as mount points of stores are concerned.

use std::{collections::HashMap, fs, io};

use super::options::LiveOptions;
use crate::store::Layers;

/// One mount of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// The mount's number. The kernel uses a number again once its mount is gone.
    pub id: u64,
    /// The number of the mount it is attached to; one at the same mount point lies beneath it.
    pub parent: u64,
    /// The type of the filesystem, such as `overlay`.
    pub fs_type: String,
    /// What was mounted.
    pub source: String,
    /// The superblock's options.
    pub live: LiveOptions,
}

/// What is mounted where a store should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MountState {
    /// Nothing is mounted there.
    Absent,
    /// The store's overlay, and nothing on top of it.
    Mounted {
        /// The superblock refuses writes.
        read_only: bool,
        /// More than one mount of this store lies there: a swap was interrupted before the old one was taken away.
        twice: bool,
        /// A pinned option has another value.
        unpinned: Option<String>,
    },
    /// The store's overlay with something else on top of it.
    Covered {
        /// What is on top, for people.
        by: String,
    },
    /// Something that is not the store's overlay.
    Foreign {
        /// What it is, for people.
        what: String,
    },
}

impl Mount {
    fn describe(&self) -> String {
        let Self { fs_type, source, live, .. } = self;
        if fs_type == "overlay" {
            format!("an overlay of {} over {}", live.upper, live.lower)
        } else {
            format!("{fs_type} from {source}")
        }
    }
}

/// All mounts at a set of mount points.
#[derive(Clone, Debug, Default)]
pub struct MountTable {
    by_point: HashMap<String, Vec<Mount>>,
}

impl MountTable {
    /// Reads the calling thread's mount table.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn read(is_of_interest: impl Fn(&str) -> bool) -> io::Result<Self> {
        // The kernel writes octal escapes, so that the table is ASCII but for names in other encodings, of which none
        // can be a store's.
        let table = fs::read("/proc/thread-self/mountinfo")?;
        Ok(Self::parse(&String::from_utf8_lossy(&table), is_of_interest))
    }

    /// Reads a mount table from text; lines of other mount points than those of interest are skipped.
    pub fn parse(table: &str, is_of_interest: impl Fn(&str) -> bool) -> Self {
        let mut by_point: HashMap<String, Vec<Mount>> = HashMap::new();
        for line in table.lines() {
            // id parent major:minor root MOUNT-POINT options [optional…] - TYPE SOURCE SUPER-OPTIONS
            let mut fields = line.split(' ');
            let (Some(id), Some(parent)) = (fields.next(), fields.next()) else { continue };
            let Some(point) = fields.nth(2).filter(|point| is_of_interest(point)) else { continue };
            let mut tail = fields.skip_while(|field| *field != "-").skip(1);
            let (Some(fs_type), Some(source)) = (tail.next(), tail.next()) else { continue };
            let (Ok(id), Ok(parent)) = (id.parse(), parent.parse()) else { continue };
            by_point.entry(point.to_owned()).or_default().push(Mount {
                id,
                parent,
                fs_type: fs_type.to_owned(),
                source: source.to_owned(),
                live: LiveOptions::parse(tail.next().unwrap_or_default()),
            });
        }
        for mounts in by_point.values_mut().filter(|mounts| mounts.len() > 1) {
            sort_bottom_first(mounts);
        }
        Self { by_point }
    }

    /// What is mounted on top at a mount point.
    pub fn top(&self, point: &str) -> Option<&Mount> {
        self.by_point.get(point)?.last()
    }

    /// What is mounted where a store with these layers should be.
    pub fn state(&self, layers: &Layers) -> MountState {
        let mounts = self.by_point.get(layers.merged.as_str()).map_or(&[][..], Vec::as_slice);
        let is_ours = |mount: &Mount| {
            // Nix's check wants the word `overlay` as the source.
            mount.fs_type == "overlay" && mount.source == "overlay" && mount.live.has_layers(layers)
        };
        let Some((top, beneath)) = mounts.split_last() else { return MountState::Absent };
        if is_ours(top) {
            MountState::Mounted {
                read_only: top.live.read_only,
                twice: beneath.last().is_some_and(is_ours),
                unpinned: top.live.unpinned.clone(),
            }
        } else if beneath.iter().any(is_ours) {
            MountState::Covered { by: top.describe() }
        } else {
            MountState::Foreign { what: top.describe() }
        }
    }
}

/// Orders the mounts of one mount point from the bottom to the top.
///
/// The order of lines is no guide: the kernel lists by number, and a mount slid beneath another has a higher one. But
/// each mount's parent is the one directly beneath it.
fn sort_bottom_first(mounts: &mut Vec<Mount>) {
    let is_here = |id: u64, mounts: &[Mount]| mounts.iter().any(|m| m.id == id);
    let Some(bottom) = mounts.iter().position(|m| !is_here(m.parent, mounts)) else { return };
    let mut sorted = vec![mounts.swap_remove(bottom)];
    while let Some(next) = sorted.last().and_then(|top| mounts.iter().position(|m| m.parent == top.id)) {
        sorted.push(mounts.swap_remove(next));
    }
    sorted.append(mounts);
    *mounts = sorted;
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: &str = "overlay overlay rw,lowerdir=/l/nix/store,upperdir=/u,workdir=/w";

    fn layers() -> Layers {
        let path = |p: &str| p.parse().expect("valid");
        Layers {
            lower: path("/l/nix/store"),
            upper: path("/u"),
            work: path("/w"),
            merged: path("/m/nix/store"),
            options: Vec::new(),
        }
    }

    fn state(lines: &[&str]) -> MountState {
        MountTable::parse(&lines.join("\n"), |point| point == "/m/nix/store").state(&layers())
    }

    fn line(id: u64, parent: u64, tail: &str) -> String {
        format!("{id} {parent} 0:40 / /m/nix/store rw,nosuid,nodev relatime shared:7 master:3 - {tail}")
    }

    #[test]
    fn what_is_on_top_decides() {
        let mounted = |twice| MountState::Mounted { read_only: false, twice, unpinned: None };
        let root = "22 1 254:0 / / rw - ext4 /dev/vda rw";
        assert_eq!(state(&[root]), MountState::Absent);
        assert_eq!(state(&[root, &line(30, 22, OURS)]), mounted(false));
        assert_eq!(
            state(&[&line(30, 22, "tmpfs tmpfs rw"), root]),
            MountState::Foreign { what: "tmpfs from tmpfs".into() }
        );
        assert_eq!(
            state(&[&line(30, 22, OURS), &line(31, 30, "tmpfs none rw")]),
            MountState::Covered { by: "tmpfs from none".into() }
        );
        assert_eq!(
            state(&[&line(30, 22, "overlay overlay rw,lowerdir=/x,upperdir=/u,workdir=/w")]),
            MountState::Foreign { what: "an overlay of /u over /x".into() }
        );
        // Nix's check would not find an overlay with another word as its source.
        assert!(matches!(
            state(&[&line(30, 22, &OURS.replacen("overlay overlay", "overlay none", 1))]),
            MountState::Foreign { .. }
        ));
    }

    #[test]
    fn a_mount_slid_beneath_is_told_from_one_on_top_by_its_parent() {
        let mounted = |twice| MountState::Mounted { read_only: false, twice, unpinned: None };
        let foreign = "tmpfs tmpfs rw";
        // 40 was slid beneath 30, so 30 now hangs on 40.
        assert_eq!(state(&[&line(30, 40, OURS), &line(40, 22, OURS)]), mounted(true));
        assert_eq!(state(&[&line(30, 40, OURS), &line(40, 22, foreign)]), mounted(false));
        assert_eq!(
            state(&[&line(30, 40, foreign), &line(40, 22, OURS)]),
            MountState::Covered { by: "tmpfs from tmpfs".into() }
        );
    }

    #[test]
    fn a_read_only_superblock_is_seen() {
        let line = line(30, 22, &OURS.replace(" rw,", " ro,"));
        assert_eq!(state(&[&line]), MountState::Mounted { read_only: true, twice: false, unpinned: None });
    }
}
