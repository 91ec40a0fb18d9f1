//! Who keeps a mount busy.

use std::{fs, os::unix::fs::MetadataExt, path::Path};

use layered_stores_model::{AbsolutePath, printable};

/// How many processes are named. More would not help to find the culprit.
const NAMED: usize = 3;

/// Processes with their working directory, root, executable or an open file below `merged`, as `name (pid N)`.
///
/// Looks at processes that see the same path at the same device; others that hold the mount in a namespace of their own
/// may be missing.
pub fn holders(merged: &AbsolutePath) -> Vec<String> {
    let Ok(device) = fs::metadata(merged.as_path()).map(|metadata| metadata.dev()) else { return Vec::new() };
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    let mut found = Vec::new();
    for process in processes.flatten() {
        let pid = process.file_name().to_string_lossy().into_owned();
        if !pid.bytes().all(|b| b.is_ascii_digit()) || !holds(&process.path(), merged, device) {
            continue;
        }
        // A process gives itself any name it likes (prctl(2), PR_SET_NAME), and root's terminal will show it.
        let name = fs::read(process.path().join("comm")).unwrap_or_default();
        let name = String::from_utf8_lossy(name.strip_suffix(b"\n").unwrap_or(&name)).into_owned();
        found.push(format!("{} (pid {pid})", printable(&name)));
        if found.len() == NAMED {
            break;
        }
    }
    found
}

fn holds(process: &Path, merged: &AbsolutePath, device: u64) -> bool {
    let is_below = |link: &Path| fs::read_link(link).is_ok_and(|target| target.starts_with(merged.as_path()));
    let links = ["cwd", "root", "exe"].map(|name| process.join(name));
    if links.iter().any(|link| is_below(link)) {
        return true;
    }
    let files = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
    // Behind a deleted path there may be a file of another mount of the same name; the device tells.
    files.map(|file| file.path()).any(|link| is_below(&link) && fs::metadata(&link).is_ok_and(|m| m.dev() == device))
        || fs::read_to_string(process.join("maps")).is_ok_and(|maps| maps.contains(&format!(" {merged}/")))
}
