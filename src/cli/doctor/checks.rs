//! What facts about a machine mean for layered stores.

use std::{collections::BTreeSet, fmt};

use layered_stores_model::config::DEFAULT_PATH;
use layered_stores_overlay::mountinfo::{Mount, MountTable};
use rustix::fs::FsWord;
use serde::Serialize;

use super::facts::Facts;
use crate::cli::render;

/// The first Linux that can put a mount below another one (`MOVE_MOUNT_BENEATH`).
const KERNEL: (u32, u32) = (6, 5);

/// The first Nix whose layered stores work.
const NIX: (u32, u32) = (2, 26);

/// The feature of Nix that layered stores are.
const FEATURE: &str = "local-overlay-store";

/// The first util-linux whose mount(8) speaks the new mount API.
const UTIL_LINUX: (u32, u32) = (2, 39);

/// What to think of what was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Verdict {
    /// It is as it should be.
    Right,
    /// It is worth knowing.
    Note,
    /// Something will fail, or does.
    Wrong,
    /// It could not be found out.
    Unknown,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Finding {
    pub(super) check: &'static str,
    pub(super) verdict: Verdict,
    pub(super) message: String,
    /// What to do, or nothing.
    pub(super) cure: String,
}

fn right(check: &'static str, message: impl Into<String>) -> Finding {
    Finding { check, verdict: Verdict::Right, message: message.into(), cure: String::new() }
}

fn note(check: &'static str, message: impl Into<String>, cure: impl Into<String>) -> Finding {
    Finding { check, verdict: Verdict::Note, message: message.into(), cure: cure.into() }
}

fn wrong(check: &'static str, message: impl Into<String>, cure: impl Into<String>) -> Finding {
    Finding { check, verdict: Verdict::Wrong, message: message.into(), cure: cure.into() }
}

fn unknown(check: &'static str, message: impl Into<String>) -> Finding {
    Finding { check, verdict: Verdict::Unknown, message: message.into(), cure: String::new() }
}

/// All there is to say, in the order in which things stand on one another.
pub(super) fn all(facts: &Facts) -> Vec<Finding> {
    let mut findings = vec![kernel(facts), overlay(facts), mount(facts), nix(facts)];
    findings.extend(settings(facts));
    findings.extend([configuration(facts), stores(facts)]);
    findings.extend(lower(facts));
    findings.extend(nix_daemon(facts));
    findings.extend(by_hand(facts));
    findings
}

/// The first two numbers of a version that stands somewhere in a text.
fn version(text: &str) -> Option<(u32, u32)> {
    let is_of_version = |c: char| c.is_ascii_digit() || c == '.';
    text.split(|c| !is_of_version(c)).find_map(|word| {
        let mut numbers = word.split('.').map(str::parse);
        Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
    })
}

fn kernel(facts: &Facts) -> Finding {
    let check = "kernel";
    match version(&facts.kernel) {
        None => unknown(check, format!("the release {:?} has no version", facts.kernel)),
        Some(version) if version >= KERNEL => right(check, format!("Linux {}", facts.kernel)),
        Some(_) => note(
            check,
            format!(
                "Linux {} cannot replace a mount that is in use: a path that was deleted while somebody has a file of it open \
                 stays stale until that is closed",
                facts.kernel
            ),
            format!("run Linux {}.{} or newer", KERNEL.0, KERNEL.1),
        ),
    }
}

fn overlay(facts: &Facts) -> Finding {
    let check = "overlayfs";
    if facts.filesystems.lines().any(|line| line.trim_start_matches("nodev").trim() == "overlay") {
        right(check, "the kernel has it")
    } else if facts.has_module {
        right(check, "the kernel loads it when it is needed")
    } else {
        let cure = "run a kernel with CONFIG_OVERLAY_FS; a kernel that was upgraded finds its modules after a reboot";
        wrong(check, format!("Linux {} has no OverlayFS and no module of it", facts.kernel), cure)
    }
}

fn mount(facts: &Facts) -> Finding {
    let check = "mount(8)";
    let Some(said) = &facts.mount else { return unknown(check, "it cannot be run") };
    match version(said) {
        Some(version) if version >= UTIL_LINUX => note(
            check,
            format!(
                "that of util-linux {}.{} cannot remount an overlay, and a remount hook that runs it fails",
                version.0, version.1
            ),
            "leave it to `layered-stores-remount`, which is in every URL of `layered-stores uri`",
        ),
        Some(version) => right(check, format!("util-linux {}.{}", version.0, version.1)),
        None => unknown(check, "it does not say its version"),
    }
}

fn nix(facts: &Facts) -> Finding {
    let check = "nix";
    let install = format!("install Nix {}.{} or newer", NIX.0, NIX.1);
    let Some(said) = facts.nix.as_deref().map(str::trim) else {
        return wrong(check, "there is no `nix` among the programs that can be run", install);
    };
    if said.contains("Lix") {
        return wrong(check, format!("{said} has no layered stores"), install);
    }
    match version(said) {
        Some(version) if version >= NIX => right(check, said),
        Some(_) => wrong(check, format!("{said}: layered stores do not work with it"), install),
        None => unknown(check, format!("it says {said:?} of its version")),
    }
}

/// What Nix is told by whoever asks. Each is about one setting.
fn settings(facts: &Facts) -> Vec<Finding> {
    let check = "nix settings";
    let Some(settings) = &facts.settings else {
        return vec![unknown(check, "`nix config show --json` does not tell them")];
    };
    let value = |name: &str| &settings[name]["value"];
    let mut findings = Vec::new();
    if let Some(features) = value("experimental-features").as_array()
        && !features.iter().any(|feature| feature == FEATURE)
    {
        let message = format!("experimental-features has no {FEATURE}, and Nix opens no layered store directly");
        let cure = "add it in /etc/nix/nix.conf";
        // A store's own Nix daemon is told by us.
        let are_served = facts.stores.iter().flatten().all(|store| !store.daemon_uri.is_empty());
        findings.push(if are_served { note(check, message, cure) } else { wrong(check, message, cure) });
    }
    if value("auto-optimise-store").as_bool() == Some(true) {
        findings.push(wrong(
            check,
            "auto-optimise-store is on: in a layered store it copies what the lower store shares into the upper layer",
            "turn it off in nix.conf; `nix-store --optimise` in the lower store does as much",
        ));
    }
    if value("min-free").as_u64().is_some_and(|bytes| bytes > 0) {
        findings.push(wrong(
            check,
            "min-free has Nix collect garbage until so much is free, and in a layered store it takes paths of the lower store for \
             freed",
            "set it to 0 for whoever builds in a layered store",
        ));
    }
    let store = value("store").as_str().unwrap_or_default();
    if store.starts_with("local-overlay://") && !store.contains("layered-stores-remount") {
        findings.push(wrong(
            check,
            "the `store` of nix.conf is a layered one with another remount hook than this one's",
            "declare the store, and take its URL from `layered-stores uri`",
        ));
    }
    if findings.is_empty() {
        findings.push(right(check, "nothing in them hurts layered stores"));
    }
    findings
}

fn configuration(facts: &Facts) -> Finding {
    let check = "configuration";
    match &facts.mistakes {
        Some(mistakes) => {
            let first = mistakes.lines().next().unwrap_or_default();
            wrong(check, first, "`layered-stores check-config` says all there is to say")
        }
        None if facts.declared.is_empty() => note(
            check,
            format!("{DEFAULT_PATH} declares no stores"),
            "`man layered-stores.toml` shows how one is declared",
        ),
        None => right(check, format!("{} in {DEFAULT_PATH}", render::count(facts.declared.len(), "store"))),
    }
}

fn stores(facts: &Facts) -> Finding {
    let check = "stores";
    let stores = match &facts.stores {
        Ok(stores) => stores,
        Err(error) => return wrong(check, error.clone(), "see `systemctl status layered-storesd`"),
    };
    let troubled: Vec<_> =
        stores.iter().filter(|store| render::has_problems(store)).map(|store| store.name.as_str()).collect();
    let unread: Vec<_> = facts
        .declared
        .iter()
        .filter(|name| !stores.iter().any(|store| store.name == **name))
        .map(String::as_str)
        .collect();
    if !troubled.is_empty() {
        let names = troubled.join(" ");
        wrong(
            check,
            format!("not all is well with {}", troubled.join(", ")),
            format!("see `layered-stores status {names}`"),
        )
    } else if !unread.is_empty() {
        wrong(check, format!("the daemon has not read {} yet", unread.join(", ")), "run `layered-stores reload`")
    } else {
        right(check, format!("{}, and nothing wrong", render::count(stores.len(), "store")))
    }
}

/// What a filesystem means for a lower store that lies on it.
fn lower(facts: &Facts) -> Vec<Finding> {
    let check = "lower store";
    let judge = |(directory, of): &(String, Option<FsWord>)| {
        let Some(of) = of else {
            return Some(unknown(check, format!("the filesystem of {directory} does not answer, or it is not there")));
        };
        let name = match of {
            0x6969 => "NFS",
            0xff53_4d42 | 0xfe53_4d42 => "CIFS",
            0x0102_1997 => "9p",
            0x6573_5546 => "FUSE",
            _ => return None,
        };
        Some(note(
            check,
            format!(
                "{directory} is on {name}, which does not tell of what others change: that is seen with the next refresh only"
            ),
            "run `layered-stores remount NAME` after the store was changed elsewhere",
        ))
    };
    facts.lower.iter().filter_map(judge).collect()
}

/// The overlays of a mount table at mount points of which some are of interest.
fn overlays(table: &str, is_of_interest: impl Fn(&str) -> bool) -> Vec<(String, Mount)> {
    let table = MountTable::parse(table, is_of_interest);
    let overlays = table.mounts().filter(|(_, mount)| mount.fs_type == "overlay");
    overlays.map(|(point, mount)| (point.to_owned(), mount.clone())).collect()
}

/// Whether the machine's Nix daemon sees what is mounted after it was started.
fn nix_daemon(facts: &Facts) -> Option<Finding> {
    let table = facts.daemon_mounts.as_deref()?;
    let stores = facts.stores.as_ref().ok()?;
    let is_cut_off = |dir: &str| overlays(table, |point| point == dir).iter().any(|(_, mount)| !mount.is_reached);
    let cut_off: Vec<_> =
        stores.iter().filter(|store| is_cut_off(&store.real_store_dir)).map(|store| store.name.as_str()).collect();
    if cut_off.is_empty() {
        return None;
    }
    Some(wrong(
        "nix-daemon",
        format!("it has mounts of its own, and goes on seeing an old one of {}", cut_off.join(", ")),
        "take PrivateMounts= and MountFlags=private from nix-daemon.service",
    ))
}

/// Layered stores that somebody has mounted and not declared.
fn by_hand(facts: &Facts) -> Vec<Finding> {
    // Without the daemon nobody knows which are its own.
    let Ok(stores) = &facts.stores else { return Vec::new() };
    let is_declared = |point: &str| stores.iter().any(|store| store.real_store_dir == point);
    let may_be_store = |point: &str| point.ends_with("/nix/store") && !is_declared(point);
    let of_stores = overlays(&facts.mounts, may_be_store).into_iter();
    let of_stores = of_stores.filter(|(_, mount)| mount.live.lower.ends_with("/nix/store"));
    let points: BTreeSet<_> = of_stores.map(|(point, _)| point).collect();
    let told = |point: &String| {
        note(
            "mounts",
            format!("{point} is an overlay of a store that is not declared"),
            "declare it, and it is looked after",
        )
    };
    points.iter().map(told).collect()
}

#[cfg(test)]
mod tests;
