//! Profiles of a store, and their generations.
//!
//! Not by `nix-collect-garbage`: whatever store it works on, it removes the generations of the machine's own profiles.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

use super::nix::{Nix, Said};

/// How deep profiles lie below their directory: Nix has `per-user/NAME` there.
const DEPTH: usize = 8;

/// Removes generations of the profiles in a store's state directory that are older than so many days, and returns their links.
///
/// # Errors
/// Nix's; those that have gone until then are in `gone`.
pub(super) fn remove(nix: &Nix<'_>, state_dir: &str, days: u32, dry_run: bool, gone: &mut Vec<String>) -> Result<()> {
    let directory = Path::new(state_dir).join("profiles");
    let profiles = profiles(&directory).with_context(|| format!("cannot look at {}", directory.display()))?;
    for profile in profiles {
        let profile = profile.to_string_lossy();
        let age = format!("{days}d");
        let mut arguments = vec!["--profile", &profile, "--delete-generations", &age];
        arguments.extend(dry_run.then_some("--dry-run"));
        let ended = nix.run("nix-env", &arguments, |said| {
            if let Said::Words(_, words) = said
                && let Some(number) = generation(words)
            {
                gone.push(format!("{profile}-{number}-link"));
            }
        })?;
        if !ended.is_well() {
            bail!(ended.error());
        }
    }
    Ok(())
}

/// The generation that a sentence of Nix's says is removed.
fn generation(words: &str) -> Option<u64> {
    words.split_once("profile version ").filter(|(what, _)| what.contains("remov"))?.1.parse().ok()
}

/// The profiles below a directory that have old generations. Directories of others than whoever looks are left alone.
fn profiles(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let (mut found, mut open) = (Vec::new(), vec![(directory.to_owned(), 0)]);
    let mine = rustix::process::geteuid().as_raw();
    while let Some((directory, depth)) = open.pop() {
        let entries = match fs::symlink_metadata(&directory) {
            Ok(metadata) if metadata.is_dir() && metadata.uid() == mine => fs::read_dir(&directory)?,
            Ok(_) => continue,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        let mut generations: BTreeMap<PathBuf, usize> = BTreeMap::new();
        for entry in entries {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() && depth < DEPTH {
                open.push((entry.path(), depth + 1));
            }
            if kind.is_symlink()
                && let Some(profile) = profile_of(&entry.file_name().to_string_lossy())
            {
                *generations.entry(directory.join(profile)).or_default() += 1;
            }
        }
        let has_old = |(profile, count): (PathBuf, usize)| {
            (count > 1 && fs::symlink_metadata(&profile).is_ok_and(|metadata| metadata.is_symlink())).then_some(profile)
        };
        found.extend(generations.into_iter().filter_map(has_old));
    }
    found.sort();
    Ok(found)
}

/// The profile whose generation a link is, by its name: `NAME-7-link`.
fn profile_of(link: &str) -> Option<&str> {
    let (profile, number) = link.strip_suffix("-link")?.rsplit_once('-')?;
    (!profile.is_empty() && number.parse::<u64>().is_ok()).then_some(profile)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn profiles_with_old_generations_are_found() {
        let dir = tempfile::tempdir().expect("a directory");
        let link = |name: &str| symlink("/nix/store/x", dir.path().join(name)).expect("linked");
        fs::create_dir_all(dir.path().join("per-user/me")).expect("made");
        for name in ["a-1-link", "a-2-link", "a", "b-1-link", "b", "c-1-link", "c-2-link", "per-user/me/p-1-link"] {
            link(name);
        }
        symlink(dir.path().join("per-user/me"), dir.path().join("per-user/other")).expect("linked");
        link("per-user/me/p-22-link");
        link("per-user/me/p");
        let found = profiles(dir.path()).expect("looked at");
        // `c` has no generation that is current, and what is current of `b` is all it has.
        assert_eq!(found, ["a", "per-user/me/p"].map(|name| dir.path().join(name)));
        assert_eq!(profiles(&dir.path().join("missing")).expect("looked at"), [] as [PathBuf; 0]);
    }

    #[test]
    fn generations_are_those_that_nix_says_it_removes() {
        assert_eq!(generation("removing profile version 3"), Some(3));
        assert_eq!(generation("would remove profile version 12"), Some(12));
        assert_eq!(generation("switching to profile version 3"), None);
        assert_eq!(generation("removing profile version"), None);
    }
}
