//! `layered-stores log`: what the journal has about a store.

use std::{fs::File, io, os::unix::process::CommandExt as _, path::PathBuf, process::Command};

use anyhow::{Result, anyhow, bail};
use layered_stores_client::Client;
use layered_stores_model::{StoreName, nearest};

use super::output::complain;

/// Where the machine's journal is (systemd-journald.service(8)), below a directory with the machine's id.
const JOURNALS: [&str; 2] = ["/var/log/journal", "/run/log/journal"];

/// Which entries, and how they are shown.
#[derive(Debug, clap::Args)]
pub struct Shown {
    /// Go on showing new ones, until interrupted
    #[arg(long, short)]
    follow: bool,
    /// Only those since then: "2027-01-31 18:00", "yesterday", "-2h" (see systemd.time(7))
    #[arg(long, short = 'S', value_name = "WHEN", allow_hyphen_values = true)]
    since: Option<String>,
    /// Only so many, the newest
    #[arg(long, short = 'n', value_name = "NUMBER")]
    lines: Option<u32>,
    /// Print JSON: an object a line, with all fields
    #[arg(long)]
    json: bool,
}

/// What journalctl finds the entries by that the daemon has written about a store.
///
/// By the unit as well, which is journald's word: `STORE=` can be written into the journal by anybody.
pub(super) fn matches(name: &str) -> [String; 2] {
    ["_SYSTEMD_UNIT=layered-storesd.service".to_owned(), format!("STORE={name}")]
}

/// Becomes journalctl. Returns only when that cannot be.
pub(super) async fn log(name: &StoreName, shown: &Shown) -> Result<std::convert::Infallible> {
    if !may_read() {
        bail!(
            "you may not read the machine's journal, where the entries about {name} are; run `sudo layered-stores log \
             {name}`, or have root add you to the group systemd-journal and log in anew"
        );
    }
    // Of a store that is gone, or while no daemon runs, the journal has what it has.
    let known = Client::names().await.unwrap_or_else(|| vec![name.to_string()]);
    if !known.iter().any(|known| known == name.as_str()) {
        let meant = nearest(name.as_str(), known.iter().map(String::as_str));
        let meant = meant.map_or_else(String::new, |meant| format!("; did you mean {meant:?}?"));
        complain(&format!("there is no store {:?} now{meant}", name.as_str()));
    }
    let error = Command::new("journalctl").args(arguments(name, shown)).exec();
    Err(anyhow!("cannot run journalctl: {error}"))
}

fn arguments(name: &StoreName, shown: &Shown) -> Vec<String> {
    let mut arguments: Vec<String> = matches(name.as_str()).into();
    arguments.extend(shown.follow.then(|| "--follow".to_owned()));
    arguments.extend(shown.since.as_ref().map(|since| format!("--since={since}")));
    arguments.extend(shown.lines.map(|lines| format!("--lines={lines}")));
    arguments.extend(shown.json.then(|| "--output=json".to_owned()));
    arguments
}

/// Whether whoever calls may read the machine's journal. journalctl would show what there is of the caller's own instead.
fn may_read() -> bool {
    let id = std::fs::read_to_string("/etc/machine-id").unwrap_or_default();
    let refused = |directory: &str| {
        let file = PathBuf::from(directory).join(id.trim()).join("system.journal");
        File::open(file).err().map(|error| error.kind())
    };
    let refused = JOURNALS.map(refused);
    // What else is in the way, journalctl says.
    refused.contains(&None) || !refused.contains(&Some(io::ErrorKind::PermissionDenied))
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::args::{Arguments, Command};

    fn asked(line: &str) -> Vec<String> {
        match Arguments::parse_from(line.split(' ')).command {
            Command::Log { name, shown } => arguments(&name, &shown),
            command => panic!("{command:?}"),
        }
    }

    #[test]
    fn what_is_asked_for_is_what_journalctl_is_told() {
        let of = ["_SYSTEMD_UNIT=layered-storesd.service", "STORE=ci"];
        assert_eq!(asked("layered-stores log ci"), of);
        let all = asked("layered-stores log ci --follow --since -2h -n 3 --json");
        assert_eq!(all[..2], of);
        assert_eq!(all[2..], ["--follow", "--since=-2h", "--lines=3", "--output=json"]);
    }
}
