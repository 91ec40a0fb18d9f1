//! How much an upper layer holds.

use std::{collections::HashSet, fs, io, os::unix::fs::MetadataExt, path::PathBuf};

use crate::overlay::probe::is_store_path_name;

/// What an upper layer holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Usage {
    /// How many store paths.
    pub(super) paths: usize,
    /// How many bytes on disk, files with several names counted once.
    pub(super) bytes: u64,
}

/// Counts the store paths of an upper layer.
pub(super) fn paths(upper: &str) -> io::Result<usize> {
    let is_path = |entry: &fs::DirEntry| is_store_path_name(&entry.file_name().to_string_lossy());
    Ok(fs::read_dir(upper)?.flatten().filter(is_path).count())
}

/// Adds up an upper layer. Looks at every file.
pub(super) fn usage(upper: &str) -> io::Result<Usage> {
    let paths = paths(upper)?;
    let mut counted = HashSet::new();
    let mut bytes = 0;
    let mut directories = vec![PathBuf::from(upper)];
    while let Some(directory) = directories.pop() {
        // Paths come and go while they are added up.
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            let Ok(metadata) = entry.metadata() else { continue };
            if metadata.is_dir() {
                directories.push(entry.path());
            }
            if metadata.nlink() == 1 || metadata.is_dir() || counted.insert((metadata.dev(), metadata.ino())) {
                bytes += metadata.blocks() * 512;
            }
        }
    }
    Ok(Usage { paths, bytes })
}

/// A size as people read it.
pub(super) fn human(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut size = bytes as f64;
    let mut unit = 0;
    while size >= 1024.0 && unit + 1 < UNITS.len() {
        size /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{size:.1} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_with_several_names_count_once() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("00000000000000000000000000000000-a");
        fs::create_dir(&path).expect("made");
        fs::write(path.join("one"), "x").expect("written");
        let alone = usage(&dir.path().to_string_lossy()).expect("usage");
        fs::hard_link(path.join("one"), path.join("two")).expect("linked");
        assert_eq!(usage(&dir.path().to_string_lossy()).expect("usage"), alone);
        assert_eq!(alone.paths, 1);
    }

    #[test]
    fn sizes_read_well() {
        for (bytes, text) in [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 30, "5.0 GiB")] {
            assert_eq!(human(bytes), text);
        }
    }
}
