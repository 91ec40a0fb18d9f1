//! Running Nix on a store.

use std::{
    collections::HashSet,
    io::{self, BufRead as _, BufReader, Read},
    process::{Command, ExitStatus, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use anstream::adapter::strip_str;
use anyhow::{Result, anyhow, bail};
use layered_stores_nix_db::{Keep, ObjectName};
use serde::Deserialize;

use crate::cli::program::said_by;

/// How long Nix may take to tell a setting.
const PATIENCE: Duration = Duration::from_secs(10);

/// Whether somebody wants all of it to end.
pub(super) static CANCELLED: AtomicBool = AtomicBool::new(false);

/// The features that a layered store needs, and one over a store that is only read. Not on the command line: a lower store's
/// daemon would be told, and would have something to say to who is not trusted.
const FEATURES: &str = "extra-experimental-features = nix-command local-overlay-store read-only-local-store";

/// A type of activity and one of result, as `logging.hh` of Nix numbers them.
const ACT_OPTIMISE_STORE: u64 = 106;
const RES_PROGRESS: u64 = 105;

/// Nix, and the store that it works on.
pub(super) struct Nix<'t> {
    pub(super) uri: &'t str,
}

/// What Nix says while it works.
pub(super) enum Said<'m> {
    /// In words, and how important that is: 0 is an error, 1 a warning.
    Words(u64, &'m str),
    /// How far it is with a look at all paths.
    Progress(u64, u64),
}

/// How a Nix has ended.
pub(super) struct Ended {
    status: ExitStatus,
    errors: Vec<String>,
    output: String,
}

/// A line of `--log-format internal-json`.
#[derive(Deserialize)]
struct Line {
    action: String,
    #[serde(default)]
    level: u64,
    #[serde(default)]
    msg: String,
    #[serde(default)]
    id: u64,
    #[serde(default, rename = "type")]
    kind: u64,
    #[serde(default)]
    fields: Vec<serde_json::Value>,
}

impl Ended {
    pub(super) fn is_well(&self) -> bool {
        self.status.success()
    }

    /// What was wrong.
    pub(super) fn error(&self) -> String {
        match self.errors.as_slice() {
            [] => format!("Nix has ended early ({})", self.status),
            errors => format!("Nix: {}", errors.join("; ")),
        }
    }

    /// The first store path in what was wrong.
    pub(super) fn path_in_error(&self) -> Option<ObjectName> {
        self.errors.iter().find_map(|error| name_in(error))
    }
}

/// The store path that a sentence is about.
pub(super) fn name_in(text: &str) -> Option<ObjectName> {
    text.split(['\'', '"', ' ']).find_map(|word| ObjectName::in_path(word).ok())
}

impl Nix<'_> {
    /// Runs one of Nix's programs on the store to its end.
    ///
    /// # Errors
    /// It cannot be run, or nothing is to be run any more.
    pub(super) fn run(&self, program: &str, arguments: &[&str], mut said: impl FnMut(Said<'_>)) -> Result<Ended> {
        if CANCELLED.load(Ordering::Relaxed) {
            bail!("cancelled");
        }
        let mut child = Command::new(program)
            .args(["--store", self.uri, "--log-format", "internal-json"])
            .args(arguments)
            .env("NIX_CONFIG", nix_config())
            .env_remove("NIX_REMOTE")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| anyhow!("cannot run {program}: {error}; install Nix, or put it on the PATH"))?;
        let (output, errors) = (child.stdout.take(), child.stderr.take());
        let output = std::thread::spawn(move || {
            let mut text = Vec::new();
            let _ = output.map(|mut output| output.read_to_end(&mut text));
            text
        });
        let errors = errors.map(|errors| listen(errors, &mut said)).transpose()?.unwrap_or_default();
        let status = child.wait()?;
        let output = output.join().unwrap_or_default();
        Ok(Ended { status, errors, output: String::from_utf8_lossy(&output).into_owned() })
    }

    /// What keeps paths alive, and by what: a link, or a description of something else.
    ///
    /// # Errors
    /// Nix's.
    pub(super) fn roots(&self) -> Result<Roots> {
        let ended = self.run("nix-store", &["--gc", "--print-roots"], |_| {})?;
        if !ended.is_well() {
            bail!(ended.error());
        }
        Ok(Roots(ended.output.lines().filter_map(root).collect()))
    }

    /// Those of some paths that are not valid.
    ///
    /// # Errors
    /// Nix's.
    pub(super) fn invalid_of(&self, paths: &[String]) -> Result<HashSet<ObjectName>> {
        let mut invalid = HashSet::new();
        for paths in paths.chunks(CHUNK) {
            let mut arguments = vec!["--check-validity", "--print-invalid"];
            arguments.extend(paths.iter().map(String::as_str));
            let ended = self.run("nix-store", &arguments, |_| {})?;
            if !ended.is_well() {
                bail!(ended.error());
            }
            invalid.extend(ended.output.lines().filter_map(|path| ObjectName::in_path(path).ok()));
        }
        Ok(invalid)
    }
}

/// How many paths a command line is given: with names of any length they fit into a quarter of the stack (execve(2)).
pub(super) const CHUNK: usize = 4_000;

/// What keeps paths alive.
pub(super) struct Roots(Vec<(String, ObjectName)>);

impl Roots {
    /// The paths, but for those that only some links keep.
    pub(super) fn without(&self, links: &[String]) -> impl Iterator<Item = ObjectName> {
        let kept = self.0.iter().filter(|(link, _)| !links.contains(link));
        kept.map(|(_, name)| name.clone())
    }

    /// The hashes of paths that somebody is at work on. What is called `.lock` or `.chroot` beside one is kept with it.
    pub(super) fn temporary(&self) -> HashSet<&str> {
        let temporary = self.0.iter().filter(|(link, _)| link.starts_with("{temp:"));
        temporary.map(|(_, name)| hash(name)).collect()
    }
}

/// The hash in a name.
pub(super) fn hash(name: &ObjectName) -> &str {
    name.as_str().split('-').next().unwrap_or_default()
}

/// A line of `nix-store --gc --print-roots`. Newer Nix puts the link in quotes.
fn root(line: &str) -> Option<(String, ObjectName)> {
    let (link, path) = line.rsplit_once(" -> ")?;
    let link = link.strip_prefix('"').and_then(|link| link.strip_suffix('"')).unwrap_or(link);
    Some((link.to_owned(), ObjectName::in_path(path).ok()?))
}

/// What keeps a path alive, by Nix's settings.
pub(super) fn keep() -> Keep {
    let is = |setting: &str, otherwise: bool| {
        let arguments = ["--extra-experimental-features", "nix-command", "config", "show", setting];
        match said_by("nix", &arguments, PATIENCE).as_deref().map(str::trim) {
            Some("true") => true,
            Some("false") => false,
            _ => otherwise,
        }
    };
    Keep { derivations: is("keep-derivations", true), outputs: is("keep-outputs", false) }
}

fn nix_config() -> String {
    match std::env::var("NIX_CONFIG") {
        Ok(config) => format!("{config}\n{FEATURES}"),
        Err(_) => FEATURES.to_owned(),
    }
}

/// Hands on what Nix says, and returns what was wrong.
fn listen(errors: impl Read, said: &mut impl FnMut(Said<'_>)) -> io::Result<Vec<String>> {
    let (mut wrong, mut optimising) = (Vec::new(), None);
    for line in BufReader::new(errors).split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        let Some(line) = line.strip_prefix("@nix ") else {
            // The remount hook's.
            said(Said::Words(1, line.trim_end()));
            continue;
        };
        let Ok(line) = serde_json::from_str::<Line>(line) else { continue };
        match (line.action.as_str(), line.fields.as_slice()) {
            ("msg", _) => {
                let words = strip_str(&line.msg).to_string();
                let words = words.split_whitespace().collect::<Vec<_>>().join(" ");
                if line.level == 0 {
                    wrong.push(words.trim_start_matches("error: ").to_owned());
                } else {
                    said(Said::Words(line.level, &words));
                }
            }
            ("start", _) if line.kind == ACT_OPTIMISE_STORE => optimising = Some(line.id),
            ("result", [done, total, ..]) if line.kind == RES_PROGRESS && optimising == Some(line.id) => {
                said(Said::Progress(done.as_u64().unwrap_or(0), total.as_u64().unwrap_or(0)));
            }
            _ => {}
        }
    }
    Ok(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HELLO: &str = "s66mzxpvicwk07gjbjfw9izjfa797vsw-hello-2.12.1";

    #[test]
    fn what_nix_says_is_understood() {
        let log = format!(
            "@nix {{\"action\":\"msg\",\"level\":3,\"msg\":\"deleting '/r/nix/store/{HELLO}'\"}}\n\
             @nix {{\"action\":\"start\",\"id\":7,\"level\":3,\"type\":106,\"text\":\"\",\"parent\":0,\"fields\":[]}}\n\
             @nix {{\"action\":\"result\",\"id\":7,\"type\":105,\"fields\":[2,9,0,0]}}\n\
             @nix {{\"action\":\"result\",\"id\":8,\"type\":105,\"fields\":[1,1,0,0]}}\n\
             @nix broken\n\
             from the hook\n\
             @nix {{\"action\":\"msg\",\"level\":0,\"msg\":\"\\u001b[31;1merror:\\u001b[0m\\n  no\\n  way\"}}\n"
        );
        let mut heard = Vec::new();
        let wrong = listen(log.as_bytes(), &mut |said| {
            heard.push(match said {
                Said::Words(level, words) => format!("{level} {words}"),
                Said::Progress(done, total) => format!("{done}/{total}"),
            });
        });
        assert_eq!(wrong.expect("read"), ["error: no way".trim_start_matches("error: ")]);
        assert_eq!(heard, [format!("3 deleting '/r/nix/store/{HELLO}'"), "2/9".into(), "1 from the hook".into()]);
        assert_eq!(name_in(&heard[0]), HELLO.parse().ok());
    }

    #[test]
    fn roots_are_read_as_every_nix_prints_them() {
        let of = |line: &str| root(line).map(|(link, name)| (link, name.to_string()));
        for (line, link) in [
            (format!("/a -> b -> /nix/store/{HELLO}"), "/a -> b"),
            (format!("\"/a\" -> /nix/store/{HELLO}"), "/a"),
            (format!("{{temp:12}} -> /nix/store/{HELLO}"), "{temp:12}"),
        ] {
            assert_eq!(of(&line), Some((link.to_owned(), HELLO.to_owned())), "{line}");
        }
        assert_eq!(of("nothing"), None);
        let temporary = Roots(vec![root(&format!("{{temp:12}} -> /nix/store/{HELLO}")).expect("a root")]);
        assert_eq!(temporary.temporary(), HashSet::from([&HELLO[..32]]));
    }
}
