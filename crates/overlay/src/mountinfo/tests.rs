//! How the mount table is read.

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
    let cover = |more: &[String]| table(&[&[root.clone(), disk.clone()], more].concat()).cover("/data/ci/upper", &lies);
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
