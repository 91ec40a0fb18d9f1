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
            let mut tail = fields.skip_while(|field| *field != "-").skip(1);
            let (Some(fs_type), Some(source)) = (tail.next(), tail.next()) else { continue };
            let (Ok(id), Ok(parent)) = (id.parse(), parent.parse()) else { continue };
            by_point.entry(point.to_owned()).or_default().push(Mount {
                id,
                parent,
                device: device.to_owned(),
                root: root.to_owned(),
                flags: flags.to_owned(),
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
mod tests {
    use proptest::prelude::*;

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
        format!("{id} {parent} 0:{id} / /m/nix/store rw,nosuid,nodev,relatime shared:7 master:3 - {tail}")
    }

    fn covered(what: &str) -> MountState {
        let point = "/m/nix/store".to_owned();
        MountState::Covered(Cover { what: what.to_owned(), hides: point.clone(), point })
    }

    #[test]
    fn what_is_on_top_decides() {
        let mounted = |twice| MountState::Mounted { read_only: false, twice, unpinned: None, flags: None };
        let root = "22 1 254:0 / / rw - ext4 /dev/vda rw";
        assert_eq!(state(&[root]), MountState::Absent);
        assert_eq!(state(&[root, &line(30, 22, OURS)]), mounted(false));
        assert_eq!(
            state(&[&line(30, 22, "tmpfs tmpfs rw"), root]),
            MountState::Foreign { what: "tmpfs from tmpfs".into() }
        );
        assert_eq!(state(&[&line(30, 22, OURS), &line(31, 30, "tmpfs none rw")]), covered("tmpfs from none"));
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
        let mounted = |twice| MountState::Mounted { read_only: false, twice, unpinned: None, flags: None };
        let foreign = "tmpfs tmpfs rw";
        // 40 was slid beneath 30, so 30 now hangs on 40.
        assert_eq!(state(&[&line(30, 40, OURS), &line(40, 22, OURS)]), mounted(true));
        assert_eq!(state(&[&line(30, 40, OURS), &line(40, 22, foreign)]), mounted(false));
        assert_eq!(state(&[&line(30, 40, foreign), &line(40, 22, OURS)]), covered("tmpfs from tmpfs"));
    }

    #[test]
    fn what_is_bound_over_a_store_is_told_from_a_swap_and_from_the_store() {
        let same = |line: String| line.replacen("0:31", "0:30", 1);
        let mounted = |twice| MountState::Mounted { read_only: false, twice, unpinned: None, flags: None };
        assert_eq!(state(&[&line(30, 22, OURS), &line(31, 30, OURS)]), mounted(true));
        assert_eq!(state(&[&line(30, 22, OURS), &same(line(31, 30, OURS))]), mounted(false));
        let directory = same(line(31, 30, OURS)).replacen(" / /m", " /some-path /m", 1);
        assert!(matches!(state(&[&line(30, 22, OURS), &directory]), MountState::Covered(_)));
    }

    #[test]
    fn a_read_only_superblock_is_seen_and_so_is_a_read_only_mount() {
        let ro = MountState::Mounted { read_only: true, twice: false, unpinned: None, flags: None };
        assert_eq!(state(&[&line(30, 22, OURS).replacen(" rw,", " ro,", 1)]), ro);
        let line = line(30, 22, &OURS.replace(" rw,", " ro,"));
        assert_eq!(state(&[&line]), MountState::Mounted { read_only: true, twice: false, unpinned: None, flags: None });
    }

    fn at(id: u64, parent: u64, device: u64, root: &str, point: &str) -> String {
        format!("{id} {parent} 0:{device} {root} {point} rw,relatime shared:7 - ext4 /dev/vda rw")
    }

    #[test]
    fn a_mount_above_hides_a_store_unless_that_hangs_on_it() {
        let table = |lines: &[&str]| MountTable::parse(&lines.join("\n"), |_| true);
        let root = at(22, 22, 22, "/", "/");
        let ours = line(30, 22, OURS);
        let above = at(31, 22, 31, "/", "/m");
        let MountState::Covered(cover) = table(&[&root, &ours, &above]).state(&layers()) else { panic!("not covered") };
        let text = "ext4 from /dev/vda is mounted at /m and hides /m/nix/store; unmount it with `umount /m`, and the store goes on";
        assert!(cover.to_string().starts_with(text), "{cover}");
        // What it hangs on was there before.
        let ours = line(30, 31, OURS);
        assert!(matches!(table(&[&root, &ours, &above]).state(&layers()), MountState::Mounted { .. }));
        // Of what is hidden, only the store counts.
        let foreign = line(30, 22, "tmpfs tmpfs rw");
        assert_eq!(table(&[&root, &foreign, &above]).state(&layers()), MountState::Absent);
        // A second one on top of the cover is not looked for below it.
        let again = line(32, 31, OURS);
        let table = table(&[&root, &line(30, 22, OURS), &above, &again]);
        assert!(matches!(table.state(&layers()), MountState::Mounted { twice: false, .. }));
        assert_eq!(table.top("/m/nix/store").map(|mount| mount.id), Some(32));
    }

    #[test]
    fn a_directory_is_hidden_by_another_one_and_not_by_itself() {
        let table = |lines: &[String]| MountTable::parse(&lines.join("\n"), |_| true);
        let (root, disk) = (at(22, 1, 22, "/", "/"), at(30, 22, 30, "/", "/data"));
        let lies = table(&[root.clone(), disk.clone()]).location("/data/ci/upper").expect("somewhere");
        let cover =
            |more: &[String]| table(&[&[root.clone(), disk.clone()], more].concat()).cover("/data/ci/upper", &lies);
        assert_eq!(cover(&[]), None);
        assert_eq!(cover(&[at(31, 30, 31, "/", "/data/other")]), None, "beside it");
        let point = |cover: Option<Cover>| cover.map(|cover| cover.point);
        assert_eq!(point(cover(&[at(31, 30, 31, "/", "/data/ci")])), Some("/data/ci".to_owned()));
        assert_eq!(point(cover(&[at(31, 22, 31, "/", "/data")])), None, "beneath it");
        assert_eq!(point(cover(&[at(31, 30, 22, "/", "/data/ci")])), Some("/data/ci".to_owned()), "a mount of another");
        assert_eq!(cover(&[at(31, 30, 30, "/ci", "/data/ci")]), None, "bound to itself");
        assert_eq!(cover(&[at(31, 30, 30, "/", "/data")]), None, "all of it bound to itself");
        assert!(cover(&[at(31, 30, 30, "/cj", "/data/ci")]).is_some(), "another directory of the same filesystem");
        assert_eq!(
            table(std::slice::from_ref(&root)).cover("/data/ci/upper", &lies),
            None,
            "it was unmounted, which is another matter"
        );
    }

    /// Bytes, words in the places of others, and lines of which something is missing.
    fn torn() -> impl Strategy<Value = Vec<u8>> {
        let field = prop_oneof![
            Just(String::new()),
            Just("-".to_owned()),
            "[0-9]{1,25}",
            "[0-4]:[0-9]{1,3}",
            points(),
            Just("/m/nix/store".to_owned()),
            Just("overlay".to_owned()),
            "(rw|ro|lowerdir=[/a:]{0,4}|upperdir=|,|=|\\\\[0-7]{0,3}){0,4}",
            any::<String>(),
        ];
        let words = proptest::collection::vec(field, 0..14).prop_map(|fields| fields.join(" ").into_bytes());
        let cut = (0_usize..200).prop_map(|end| line(30, 22, OURS).into_bytes().into_iter().take(end).collect());
        prop_oneof![proptest::collection::vec(any::<u8>(), 0..40), words, cut]
    }

    /// Directories of three levels with two names each, and the root directory.
    fn points() -> impl Strategy<Value = String> {
        proptest::collection::vec("[ab]", 0..4).prop_map(|names| format!("/{}", names.join("/")))
    }

    proptest! {
        /// The kernel's own book-keeping as the oracle: a mount is found by the mount and the directory it was put on.
        #[test]
        fn a_path_leads_where_the_kernel_leads_it(points in proptest::collection::vec(points(), 0..12), path in points()) {
            let mut children: HashMap<(u64, String), u64> = HashMap::new();
            let lookup = |children: &HashMap<(u64, String), u64>, path: &str| {
                let mut above: Vec<&str> = Path::new(path).ancestors().filter_map(Path::to_str).collect();
                above.reverse();
                let mut here = 100;
                for dir in above {
                    while let Some(&next) = children.get(&(here, dir.to_owned())) {
                        here = next;
                    }
                }
                here
            };
            let mut lines = vec![at(100, 1, 100, "/", "/")];
            for (id, point) in (101..).zip(&points) {
                let parent = lookup(&children, point);
                children.insert((parent, point.clone()), id);
                lines.push(at(id, parent, id, "/", point));
            }
            let leads_to = |lines: &[String], path: &str| {
                let table = MountTable::parse(&lines.join("\n"), |point| Path::new(path).starts_with(point));
                table.leads_to(path).map(|(_, mount)| mount.id)
            };
            prop_assert_eq!(leads_to(&lines, &path), Some(lookup(&children, &path)));
            // The kernel may list them in any order.
            lines.reverse();
            prop_assert_eq!(leads_to(&lines, &path), Some(lookup(&children, &path)));
            // Without an unmount, it is always the last mount at or above a mount point that hides what is mounted there.
            for (id, point) in (101..).zip(&points) {
                let later = (id + 1..).zip(&points[usize::try_from(id - 100).unwrap_or(0)..]);
                let last = later.filter(|(_, other)| Path::new(point).starts_with(other)).last();
                prop_assert_eq!(leads_to(&lines, point), Some(last.map_or(id, |(id, _)| id)));
            }
        }

        /// Whatever is in it. What is no line of the table is skipped, and what is a line is found beside it.
        #[test]
        fn any_text_is_read_to_its_end(bytes in proptest::collection::vec(torn(), 0..12), path in points()) {
            let text = bytes.join(&b'\n');
            let text = String::from_utf8_lossy(&text);
            let _ = MountTable::parse(&text, |_| true).state(&layers());
            let table = MountTable::parse(&format!("{text}\n{}", at(u64::MAX, 1, 9, "/", "/only/here")), |_| true);
            let _ = (table.leads_to(&path), table.location(&path), table.state(&layers()));
            prop_assert!(table.mounts().any(|(point, mount)| point == "/only/here" && mount.id == u64::MAX));
        }

        #[test]
        fn a_table_whose_mounts_hang_on_one_another_anyhow_is_walked_to_its_end(ids in proptest::collection::vec((0_u64..4, 0_u64..4, points()), 0..12), path in points()) {
            let lines: Vec<_> = ids.iter().map(|(id, parent, point)| at(*id, *parent, *id, "/", point)).collect();
            MountTable::parse(&lines.join("\n"), |_| true).leads_to(&path);
        }
    }
}
