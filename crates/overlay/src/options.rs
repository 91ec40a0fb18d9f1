//! The options of an overlay mount: those we give, and those the kernel shows.

use layered_stores_model::{Layers, MountOption};
use rustix::mount::{MountAttrFlags, MountFlags};

/// Options that every store is mounted with, whatever the kernel was built with.
///
/// With `index=on` a lower store that was replaced answers `ESTALE`; `metacopy` and `redirect_dir` make layers refer to
/// each other in ways that a change of the lower store breaks; `xino`'s default varies by kernel build and decides which
/// inode numbers the merged view shows, which [`probe`](super::probe) relies on.
pub const PINNED: [(&str, &str); 5] =
    [("index", "off"), ("metacopy", "off"), ("nfs_export", "off"), ("redirect_dir", "off"), ("xino", "off")];

/// Flags of the mount point. A Nix store holds no device nodes, and Nix strips set-user-ID bits from what it adds.
pub const MOUNT_FLAGS: [&str; 2] = ["nosuid", "nodev"];

/// The value for `Options=` of a mount unit.
///
/// Lower and upper directory are the words that Nix's `check-mount` looks for in `/proc/self/mounts`.
pub fn mount_options(layers: &Layers) -> String {
    let mut options: Vec<String> = MOUNT_FLAGS.iter().map(|&flag| flag.to_owned()).collect();
    options.extend(layers.options.iter().map(ToString::to_string));
    options.extend(superblock_options(layers).map(|(key, value)| format!("{key}={value}")));
    options.join(",")
}

/// The same flags for `fsmount(2)`.
pub fn mount_attributes(layers: &Layers) -> MountAttrFlags {
    let always = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    // One of three values and no set of flags (mount_setattr(2)); of several the last one counts, as in mount(8).
    let access_times = MountAttrFlags::MOUNT_ATTR_NOATIME | MountAttrFlags::MOUNT_ATTR_STRICTATIME;
    layers.options.iter().fold(always, |flags, option| match option {
        MountOption::Noatime => (flags - access_times) | MountAttrFlags::MOUNT_ATTR_NOATIME,
        MountOption::Relatime => flags - access_times,
        MountOption::Strictatime => (flags - access_times) | MountAttrFlags::MOUNT_ATTR_STRICTATIME,
        MountOption::Nodiratime => flags | MountAttrFlags::MOUNT_ATTR_NODIRATIME,
        MountOption::Noexec => flags | MountAttrFlags::MOUNT_ATTR_NOEXEC,
    })
}

/// The same flags for mount(2).
pub fn mount_flags(layers: &Layers) -> MountFlags {
    let attributes = mount_attributes(layers);
    let mut flags = MountFlags::NOSUID | MountFlags::NODEV;
    flags.set(MountFlags::NOEXEC, attributes.contains(MountAttrFlags::MOUNT_ATTR_NOEXEC));
    flags.set(MountFlags::NODIRATIME, attributes.contains(MountAttrFlags::MOUNT_ATTR_NODIRATIME));
    flags
        | if attributes.contains(MountAttrFlags::MOUNT_ATTR_NOATIME) {
            MountFlags::NOATIME
        } else if attributes.contains(MountAttrFlags::MOUNT_ATTR_STRICTATIME) {
            MountFlags::STRICTATIME
        } else {
            MountFlags::RELATIME
        }
}

/// The flags of a mount as `mountinfo` shows them, those that stores have or may have: what is not shown is not set, and
/// neither `relatime` nor `noatime` is `strictatime` (`show_mnt_opts`).
const SHOWN: [(&str, MountFlags); 6] = [
    ("nosuid", MountFlags::NOSUID),
    ("nodev", MountFlags::NODEV),
    ("noexec", MountFlags::NOEXEC),
    ("noatime", MountFlags::NOATIME),
    ("nodiratime", MountFlags::NODIRATIME),
    ("relatime", MountFlags::RELATIME),
];

/// In what the flags of a mount, as `mountinfo` shows them, differ from those that a store's mount is to have; `None`: in
/// nothing.
pub fn other_flags(shown: &str, layers: &Layers) -> Option<String> {
    let wanted = mount_flags(layers);
    let is_shown = |word: &str| shown.split(',').any(|flag| flag == word);
    let differ = |is_wanted: bool| {
        let words =
            SHOWN.iter().filter(move |(word, flag)| wanted.contains(*flag) == is_wanted && is_shown(word) != is_wanted);
        words.map(|(word, _)| *word).collect::<Vec<_>>().join(", ")
    };
    match (differ(true), differ(false)) {
        (without, with) if without.is_empty() && with.is_empty() => None,
        (without, with) if with.is_empty() => Some(format!("without {without}")),
        (without, with) if without.is_empty() => Some(format!("with {with}")),
        (without, with) => Some(format!("without {without} and with {with}")),
    }
}

/// Keys and values that make the superblock of a store.
pub fn superblock_options(layers: &Layers) -> impl Iterator<Item = (&str, &str)> {
    [("lowerdir", layers.lower.as_str()), ("upperdir", layers.upper.as_str()), ("workdir", layers.work.as_str())]
        .into_iter()
        .chain(PINNED)
}

/// What the mount table says of a superblock, as far as stores are concerned.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LiveOptions {
    /// `lowerdir=`, as shown.
    pub lower: String,
    /// `upperdir=`, as shown.
    pub upper: String,
    /// `workdir=`, as shown.
    pub work: String,
    /// Whether the superblock refuses writes.
    pub read_only: bool,
    /// Whether an option that is pinned has another value than it should have.
    pub unpinned: Option<String>,
}

impl LiveOptions {
    /// Reads the superblock options of a line of `mountinfo`.
    pub fn parse(options: &str) -> Self {
        let mut live = Self::default();
        for option in options.split(',') {
            let (key, value) = option.split_once('=').unwrap_or((option, ""));
            match key {
                "lowerdir" => live.lower = value.to_owned(),
                "upperdir" => live.upper = value.to_owned(),
                "workdir" => live.work = value.to_owned(),
                "ro" => live.read_only = true,
                _ => {}
            }
            // The kernel shows an option only where it differs from its build's default, so absence says nothing.
            let pinned = PINNED.iter().find(|(pinned, _)| *pinned == key);
            // `redirect_dir=off` becomes one of two others, by `redirect_always_follow` of the module (`ovl_parse_param`).
            let is_off = key == "redirect_dir" && matches!(value, "follow" | "nofollow");
            if pinned.is_some_and(|(_, wanted)| value != *wanted) && !is_off {
                live.unpinned = Some(option.to_owned());
            }
        }
        live
    }

    /// Whether these are the directories of `layers`.
    pub fn has_layers(&self, layers: &Layers) -> bool {
        self.lower == layers.lower.as_str() && self.upper == layers.upper.as_str() && self.work == layers.work.as_str()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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

    #[test]
    fn options_hold_the_words_nix_looks_for_each_followed_by_a_comma() {
        let options = mount_options(&layers());
        for word in ["lowerdir=/l/nix/store,", "upperdir=/u,", "index=off", "xino=off"] {
            assert!(options.contains(word), "{word} in {options}");
        }
    }

    #[test]
    fn a_store_has_the_flags_that_were_declared_and_of_access_times_the_last() {
        use MountOption::{Noatime, Nodiratime, Noexec, Relatime, Strictatime};
        type Attr = MountAttrFlags;
        for (options, attributes, flags) in [
            (&[][..], Attr::empty(), MountFlags::RELATIME),
            (&[Noatime], Attr::MOUNT_ATTR_NOATIME, MountFlags::NOATIME),
            (&[Strictatime], Attr::MOUNT_ATTR_STRICTATIME, MountFlags::STRICTATIME),
            (&[Strictatime, Noatime], Attr::MOUNT_ATTR_NOATIME, MountFlags::NOATIME),
            (&[Noatime, Strictatime], Attr::MOUNT_ATTR_STRICTATIME, MountFlags::STRICTATIME),
            (&[Noatime, Relatime], Attr::empty(), MountFlags::RELATIME),
            (&[Strictatime, Relatime], Attr::empty(), MountFlags::RELATIME),
            (
                &[Noexec, Nodiratime, Noatime, Noexec, Nodiratime],
                Attr::MOUNT_ATTR_NOEXEC | Attr::MOUNT_ATTR_NODIRATIME | Attr::MOUNT_ATTR_NOATIME,
                MountFlags::NOEXEC | MountFlags::NODIRATIME | MountFlags::NOATIME,
            ),
        ] {
            let layers = Layers { options: options.to_vec(), ..layers() };
            let always = Attr::MOUNT_ATTR_NOSUID | Attr::MOUNT_ATTR_NODEV;
            assert_eq!(mount_attributes(&layers), always | attributes, "{options:?}");
            assert_eq!(mount_flags(&layers), MountFlags::NOSUID | MountFlags::NODEV | flags, "{options:?}");
        }
    }

    #[test]
    fn flags_that_differ_from_those_declared_are_named() {
        let declared = |options: &[MountOption]| Layers { options: options.to_vec(), ..layers() };
        let (none, both) = (declared(&[]), declared(&[MountOption::Noexec, MountOption::Noatime]));
        for (shown, layers, differ) in [
            ("rw,nosuid,nodev,relatime", &none, None),
            ("ro,nosuid,nodev,relatime", &none, None),
            ("rw,relatime", &none, Some("without nosuid, nodev")),
            ("rw,nosuid,nodev,noexec,relatime", &none, Some("with noexec")),
            ("rw,nosuid,nodev", &none, Some("without relatime")),
            ("rw,nosuid,nodev", &declared(&[MountOption::Strictatime]), None),
            ("rw,nosuid,nodev,noexec,noatime", &both, None),
            ("rw,nosuid,noexec,relatime", &both, Some("without nodev, noatime and with relatime")),
        ] {
            assert_eq!(other_flags(shown, layers).as_deref(), differ, "{shown}");
        }
    }

    #[test]
    fn the_live_mount_is_compared_by_meaning_not_by_text() {
        let shown = "rw,workdir=/w,lowerdir=/l/nix/store,upperdir=/u,uuid=on";
        let live = LiveOptions::parse(shown);
        assert!(live.has_layers(&layers()) && !live.read_only && live.unpinned.is_none());
        assert!(LiveOptions::parse("ro,lowerdir=/l/nix/store,upperdir=/u,workdir=/w").read_only);
        assert!(!LiveOptions::parse("rw,lowerdir=/l/nix/store:/x,upperdir=/u,workdir=/w").has_layers(&layers()));
        for other in ["/x,upperdir=/u,workdir=/w", "/l/nix/store,upperdir=/x,workdir=/w", "/l/nix/store,upperdir=/u"] {
            assert!(!LiveOptions::parse(&format!("rw,lowerdir={other}")).has_layers(&layers()), "{other}");
        }
        for (shown, unpinned) in [
            ("rw,metacopy=on", Some("metacopy=on")),
            ("rw,index=off,metacopy=off,nfs_export=off,redirect_dir=off,xino=off", None),
            ("rw,redirect_dir=nofollow", None),
            ("rw,redirect_dir=follow", None),
            ("rw,redirect_dir=on", Some("redirect_dir=on")),
            ("rw,xino=nofollow", Some("xino=nofollow")),
        ] {
            assert_eq!(LiveOptions::parse(shown).unpinned.as_deref(), unpinned, "{shown}");
        }
    }
}
