//! What people see.

use std::{
    fmt::Write as _,
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anstyle::{AnsiColor, Style};
use layered_stores_client::Properties;
use layered_stores_model::config::{DEFAULT_PATH, declared_names};

use super::{
    output::wrapped,
    usage::{Usage, human, human_part},
};

const GOOD: Style = AnsiColor::Green.on_default().bold();
const BAD: Style = AnsiColor::Red.on_default().bold();
const ODD: Style = AnsiColor::Yellow.on_default().bold();
const FAINT: Style = Style::new().dimmed();

fn style_of(store: &Properties) -> Style {
    match store.state.as_str() {
        "failed" => BAD,
        _ if !store.problems.is_empty() => ODD,
        "active" => GOOD,
        "inactive" => FAINT,
        _ => ODD,
    }
}

/// Whether somebody should look at a store.
pub(super) fn has_problems(store: &Properties) -> bool {
    store.state == "failed" || !store.problems.is_empty()
}

/// One store, at length.
pub(super) fn one(store: &Properties, usage: Usage) -> String {
    let now = SystemTime::now();
    let style = style_of(store);
    let Properties { name, state, state_reason, .. } = store;
    let mut text = format!("{style}●{style:#} {name}: {style}{state}{style:#}");
    if store.state_change_usec > 0 {
        let _ = write!(text, " for {}", since(store.state_change_usec, now));
    }
    if !state_reason.is_empty() && store.problems.iter().all(|(_, message)| message != state_reason) {
        let _ = write!(text, " ({state_reason})");
    }
    text.push('\n');
    let mut line = |label: &str, value: &str| {
        let _ = writeln!(text, "  {FAINT}{label:>14}{FAINT:#}  {value}");
    };
    let dir = if store.lower_store == store.lower_store_dir { "" } else { &store.lower_store_dir };
    line("lower store", format!("{}  {dir}", store.lower_store).trim_end());
    // Whoever may not look into a layer, or would have to wait for it, sees everything else.
    line("", &usage.lower.map_or_else(|| "?".to_owned(), |paths| count(paths, "path")));
    line("upper layer", &store.upper_layer);
    let held = usage.upper.map_or_else(
        || "?".to_owned(),
        |held| {
            let paths = count(held.paths, "path");
            match held.limited {
                Some((used, limit)) => format!("{paths}, {}", human_part(used, limit)),
                None => format!("{paths}, {}; {} free", human(held.bytes), human(held.free)),
            }
        },
    );
    line("", &held);
    if store.contents_known {
        let (own, lower) = contents(store);
        line("contents", &own);
        line("", &lower);
    }
    line("real store dir", &store.real_store_dir);
    line("mount unit", &store.mount_unit);
    if !store.daemon_uri.is_empty() {
        line("nix daemon", &store.daemon_uri);
    }
    line("refreshed", &refreshed(store, now));
    if store.next_try_usec > 0 {
        line("next try", &until(store.next_try_usec, now));
    }
    if !store.declared {
        line("declared", "no: it is taken down and forgotten, its data stays");
    }
    for (code, message) in &store.problems {
        let message = wrapped(&format!("{message} [{code}]"), 18, std::io::stdout());
        let _ = writeln!(text, "  {ODD}{:>14}{ODD:#}  {message}", "problem");
    }
    text
}

/// What is in a store, by its database: of its own, and of the lower store.
fn contents(store: &Properties) -> (String, String) {
    let mut own = format!("{} valid of its own, {}", store.upper_path_count, human(store.upper_nar_size));
    if store.shadowed_path_count > 0 {
        let _ = write!(own, "; {} in both, {}", store.shadowed_path_count, human(store.shadowed_nar_size));
    }
    (own, format!("{} of the lower store, {} kept there", store.lower_path_count, store.lease_count))
}

/// All stores, a line each, and then what is wrong.
pub(super) fn table(stores: &[(&Properties, Option<usize>)]) -> String {
    if stores.is_empty() && !declared_names(Path::new(DEFAULT_PATH)).is_empty() {
        return format!(
            "The daemon knows of no stores. It has not read those in {DEFAULT_PATH}; run `layered-stores reload`.\n"
        );
    }
    if stores.is_empty() {
        return "No stores are declared. Declare one in /etc/layered-stores/config.toml, for example:\n\n    \
                [stores.ci]\n    lower-store = \"daemon\"\n\nand run `layered-stores reload`.\n"
            .to_owned();
    }
    let now = SystemTime::now();
    let width = |header: &str, column: &dyn Fn(&Properties) -> usize| {
        stores.iter().map(|(store, _)| column(store)).max().unwrap_or(0).max(header.len())
    };
    let (name, state) = (width("STORE", &|s| s.name.len()), width("STATE", &|s| s.state.len()));
    let lower = width("LOWER STORE", &|s| s.lower_store.len().min(40));
    let mut text = format!(
        "{FAINT}  {:name$}  {:state$}  {:lower$}  {:>6}  REFRESHED{FAINT:#}\n",
        "STORE", "STATE", "LOWER STORE", "PATHS"
    );
    for (store, paths) in stores {
        let style = style_of(store);
        let paths = paths.map_or_else(|| "?".to_owned(), |paths| paths.to_string());
        let _ = writeln!(
            text,
            "{style}●{style:#} {:name$}  {style}{:state$}{style:#}  {:lower$}  {paths:>6}  {}",
            store.name,
            store.state,
            shortened(&store.lower_store, lower),
            refreshed(store, now)
        );
    }
    for (store, _) in stores.iter().filter(|(store, _)| has_problems(store)) {
        for (code, message) in &store.problems {
            let message = wrapped(&format!("{}: {message} [{code}]", store.name), 2, std::io::stdout());
            let message = message.strip_prefix(&store.name).unwrap_or(&message);
            let _ = writeln!(text, "\n{ODD}{}{ODD:#}{message}", store.name);
        }
    }
    text
}

/// A text that fits; its end says most of a URL or path.
fn shortened(text: &str, width: usize) -> String {
    match text.char_indices().nth_back(width.saturating_sub(2)) {
        Some((start, _)) if text.chars().count() > width => format!("…{}", &text[start..]),
        _ => text.to_owned(),
    }
}

fn refreshed(store: &Properties, now: SystemTime) -> String {
    if store.last_refresh.is_empty() {
        return "-".to_owned();
    }
    let at = UNIX_EPOCH + Duration::from_micros(store.last_refresh_usec);
    let swaps = match store.swap_count {
        0 => String::new(),
        swaps => format!(", {}", count(usize::try_from(swaps).unwrap_or(usize::MAX), "swap")),
    };
    let ago = ago(now.duration_since(at).unwrap_or_default());
    format!("{ago}: {} ({} so far{swaps})", store.last_refresh, store.refresh_count)
}

fn ago(time: Duration) -> String {
    if time.as_secs() == 0 { "just now".to_owned() } else { format!("{} ago", roughly(time)) }
}

/// How long something has been so.
fn since(usec: u64, now: SystemTime) -> String {
    roughly(now.duration_since(UNIX_EPOCH + Duration::from_micros(usec)).unwrap_or_default())
}

/// How long it is until something happens.
fn until(usec: u64, now: SystemTime) -> String {
    let left = (UNIX_EPOCH + Duration::from_micros(usec)).duration_since(now).unwrap_or_default();
    format!("in {}", roughly(left))
}

fn roughly(time: Duration) -> String {
    match time.as_secs() {
        seconds @ 0..60 => format!("{seconds} s"),
        seconds @ 60..3600 => format!("{} min", seconds / 60),
        seconds @ 3600..172_800 => format!("{} h", seconds / 3600),
        seconds => format!("{} days", seconds / 86400),
    }
}

/// A number with its noun.
pub(super) fn count(number: usize, noun: &str) -> String {
    if number == 1 { format!("1 {noun}") } else { format!("{number} {noun}s") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_texts_keep_their_end() {
        assert_eq!(shortened("daemon", 10), "daemon");
        assert_eq!(shortened("/a/very/long/path", 8), "…ng/path");
        assert_eq!(shortened("/a/very/long/path", 8).chars().count(), 8);
    }

    #[test]
    fn times_are_told_as_people_tell_them() {
        for (seconds, text) in
            [(0, "just now"), (59, "59 s ago"), (60, "1 min ago"), (7200, "2 h ago"), (200_000, "2 days ago")]
        {
            assert_eq!(ago(Duration::from_secs(seconds)), text);
        }
    }
}
