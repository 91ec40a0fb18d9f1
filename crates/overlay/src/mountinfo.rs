//! The mount table (`/proc/PID/mountinfo`, proc_pid_mountinfo(5)), as far as mount points of stores are concerned.

use std::{collections::HashMap, fmt, fs, io, path::Path};

use layered_stores_model::Layers;

use super::options::{LiveOptions, other_flags};

/// One mount of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// The mount's number. The kernel uses a number again once its mount is gone.
    pub id: u64,
    /// The number of the mount it is attached to; one at the same mount point lies beneath it.
    pub parent: u64,
    /// The superblock's device. Mounts of one superblock have one device.
    pub device: String,
    /// The directory of the filesystem that is mounted; `/` for all of it.
    pub root: String,
    /// The mount's own options.
    pub flags: String,
    /// Whether what is mounted there in another mount namespace may show up: it is shared, or the slave of one that is.
    pub is_reached: bool,
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
        /// In what the flags differ from those that were declared.
        flags: Option<String>,
    },
    /// The store's overlay with something else on top of it, or of a directory above one of its own.
    Covered(Cover),
    /// Something that is not the store's overlay.
    Foreign {
        /// What it is, for people.
        what: String,
    },
}

/// A mount that hides a directory from whoever comes by path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cover {
    /// What it is, for people.
    pub what: String,
    /// Where it is mounted.
    pub point: String,
    /// The directory that it hides.
    pub hides: String,
}

impl fmt::Display for Cover {
    /// A sentence that says the way out.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, point, hides } = self;
        if point == hides {
            return write!(f, "{what} is mounted on top of {point}; unmount it with `umount {point}`");
        }
        write!(
            f,
            "{what} is mounted at {point} and hides {hides}; unmount it with `umount {point}`, and the store goes on. If the \
             store is to lie on it, stop the store then, and before that is mounted again"
        )
    }
}

/// Where a directory lies, whatever is mounted above it later.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Location {
    /// The mount, and where that is mounted.
    mount: u64,
    point: String,
    /// The superblock's device, and the directory's path in its filesystem: the same by way of every mount of that.
    device: String,
    path: String,
}

impl Mount {
    /// What it is, for people.
    pub fn describe(&self) -> String {
        let Self { fs_type, source, live, .. } = self;
        if fs_type == "overlay" {
            format!("an overlay of {} over {}", live.upper, live.lower)
        } else {
            format!("{fs_type} from {source}")
        }
    }
}

/// All mounts at a set of mount points. What is said of a path needs those at every directory above it.
#[derive(Clone, Debug)]
pub struct MountTable {
    by_point: HashMap<String, Vec<Mount>>,
    /// Which lengths mount points have. Most directories on the way to a path are told by this to be none.
    lengths: [bool; 256],
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

    /// Reads what the calling thread's mount table has on the way to a path.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn read_on_the_way_to(path: &str) -> io::Result<Self> {
        Self::read(|point| Path::new(path).starts_with(point))
    }

    /// Reads a mount table from text; lines of other mount points than those of interest are skipped.
    pub fn parse(table: &str, is_of_interest: impl Fn(&str) -> bool) -> Self {
        let mut by_point: HashMap<String, Vec<Mount>> = HashMap::new();
        for line in table.lines() {
            // id parent major:minor root MOUNT-POINT options [optional…] - TYPE SOURCE SUPER-OPTIONS
            let mut fields = line.split(' ');
            let (Some(id), Some(parent)) = (fields.next(), fields.next()) else { continue };
            let (Some(device), Some(root)) = (fields.next(), fields.next()) else { continue };
            let Some(point) = fields.next().filter(|point| is_of_interest(point)) else { continue };
            let flags = fields.next().unwrap_or_default();
            let reaches = |field: &str| field.starts_with("shared:") || field.starts_with("master:");
            let is_reached = fields.by_ref().take_while(|field| *field != "-").fold(false, |is, it| is | reaches(it));
            let mut tail = fields;
            let (Some(fs_type), Some(source)) = (tail.next(), tail.next()) else { continue };
            let (Ok(id), Ok(parent)) = (id.parse(), parent.parse()) else { continue };
            by_point.entry(point.to_owned()).or_default().push(Mount {
                id,
                parent,
                device: device.to_owned(),
                root: root.to_owned(),
                flags: flags.to_owned(),
                is_reached,
                fs_type: fs_type.to_owned(),
                source: source.to_owned(),
                live: LiveOptions::parse(tail.next().unwrap_or_default()),
            });
        }
        for mounts in by_point.values_mut().filter(|mounts| mounts.len() > 1) {
            sort_bottom_first(mounts);
        }
        let mut lengths = [false; 256];
        for point in by_point.keys() {
            lengths[point.len().min(255)] = true;
        }
        Self { by_point, lengths }
    }

    /// The parent of a mount of the calling thread's mount table; `None` when it is not mounted.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn parent_of(id: u64) -> io::Result<Option<u64>> {
        let table = fs::read("/proc/thread-self/mountinfo")?;
        let table = String::from_utf8_lossy(&table);
        let mut lines = table.lines().map(|line| line.splitn(3, ' '));
        let line = lines.find(|fields| fields.clone().next().is_some_and(|first| first.parse() == Ok(id)));
        Ok(line.and_then(|mut fields| fields.nth(1)?.parse().ok()))
    }

    /// All mounts, with their mount points.
    pub fn mounts(&self) -> impl Iterator<Item = (&str, &Mount)> {
        self.by_point.iter().flat_map(|(point, mounts)| mounts.iter().map(move |mount| (point.as_str(), mount)))
    }

    /// What is mounted on top at a mount point, if the path leads to that.
    pub fn top(&self, point: &str) -> Option<&Mount> {
        self.leads_to(point).filter(|(at, _)| *at == point).map(|(_, mount)| mount)
    }

    /// The mount that a path without symbolic links leads to, and where it is mounted.
    pub fn leads_to(&self, path: &str) -> Option<(&str, &Mount)> {
        let mut end = None;
        self.walk(path, |point, mount| end = Some((point, mount)));
        end
    }

    /// Where the directory at a path lies.
    pub fn location(&self, path: &str) -> Option<Location> {
        let (point, mount) = self.leads_to(path)?;
        let below = path.strip_prefix(point)?.trim_start_matches('/');
        let path = format!("{}/{below}", mount.root.trim_end_matches('/'));
        Some(Location { mount: mount.id, point: point.to_owned(), device: mount.device.clone(), path })
    }

    /// What hides a directory that lies there, if its path leads to another one now, and the mount it lies on is there still.
    pub fn cover(&self, path: &str, lies: &Location) -> Option<Cover> {
        let (point, mount) = self.leads_to(path)?;
        if mount.id == lies.mount && mount.device == lies.device {
            return None;
        }
        let is_there = |mount: &Mount| mount.id == lies.mount && mount.device == lies.device;
        let is_the_same = |now: Location| (&now.device, &now.path) == (&lies.device, &lies.path);
        if !self.by_point.get(&lies.point).is_some_and(|mounts| mounts.iter().any(is_there))
            || self.location(path).is_some_and(is_the_same)
        {
            return None;
        }
        Some(Cover { what: mount.describe(), point: point.to_owned(), hides: path.to_owned() })
    }

    /// Goes the way that the kernel goes to a path (`step_into` in fs/namei.c): of what is mounted at a directory on the way,
    /// only that counts which hangs on the mount that the way has led to so far, and on that, what is on top.
    fn walk<'t>(&'t self, path: &str, mut enter: impl FnMut(&'t str, &'t Mount)) {
        let mut here: Option<&Mount> = None;
        let is_end = |at: usize| path.as_bytes().get(at).is_none_or(|byte| *byte == b'/');
        let may_be = |end: usize| self.lengths[end.min(255)] && (end == 1 || is_end(end));
        for end in (1..=path.len()).filter(|&end| may_be(end)) {
            let Some((point, mounts)) = self.by_point.get_key_value(&path[..end]) else { continue };
            // As often as there are mounts, and no more: it may be any text.
            for _ in mounts {
                let next = match here {
                    // The lowest one that is shown: what the root directory itself hangs on is not.
                    None => mounts.first(),
                    Some(here) => mounts.iter().find(|mount| mount.parent == here.id && mount.id != here.id),
                };
                let Some(mount) = next else { break };
                enter(point, mount);
                here = Some(mount);
            }
        }
    }

    /// What is mounted where a store with these layers should be.
    pub fn state(&self, layers: &Layers) -> MountState {
        let at = layers.merged.as_str();
        let is_ours = |mount: &Mount| {
            // Nix's check wants the word `overlay` as the source. A directory of the store that was bound there is not the store.
            mount.fs_type == "overlay"
                && mount.source == "overlay"
                && mount.root == "/"
                && mount.live.has_layers(layers)
        };
        let mut end = None;
        let (mut top, mut beneath): (Option<&Mount>, Option<&Mount>) = (None, None);
        self.walk(at, |point, mount| {
            end = Some((point, mount));
            if point == at {
                beneath = top.replace(mount);
            }
        });
        if let Some(top) = top.filter(|top| is_ours(top)) {
            return MountState::Mounted {
                read_only: top.live.read_only || top.flags.split(',').any(|flag| flag == "ro"),
                // A swap makes another superblock. The same one again is what somebody has bound there.
                twice: beneath.is_some_and(|mount| is_ours(mount) && mount.device != top.device),
                unpinned: top.live.unpinned.clone(),
                flags: other_flags(&top.flags, layers),
            };
        }
        let is_there = self.by_point.get(at).is_some_and(|mounts| mounts.iter().any(is_ours));
        match (end, top) {
            (Some((point, mount)), _) if is_there => {
                MountState::Covered(Cover { what: mount.describe(), point: point.to_owned(), hides: at.to_owned() })
            }
            (_, Some(top)) => MountState::Foreign { what: top.describe() },
            (_, None) => MountState::Absent,
        }
    }
}

/// Orders the mounts of one mount point from the bottom to the top.
///
/// The order of lines is no guide: the kernel lists by number, and a mount slid beneath another has a higher one. But
/// each mount's parent is the one directly beneath it.
fn sort_bottom_first(mounts: &mut Vec<Mount>) {
    let is_here = |id: u64, mounts: &[Mount]| mounts.iter().any(|m| m.id == id);
    // The root of a namespace hangs on itself.
    let is_bottom = |m: &Mount| m.parent == m.id || !is_here(m.parent, mounts);
    let Some(bottom) = mounts.iter().position(is_bottom) else { return };
    let mut sorted = vec![mounts.swap_remove(bottom)];
    while let Some(next) = sorted.last().and_then(|top| mounts.iter().position(|m| m.parent == top.id)) {
        sorted.push(mounts.swap_remove(next));
    }
    sorted.append(mounts);
    *mounts = sorted;
}

#[cfg(test)]
mod tests;
