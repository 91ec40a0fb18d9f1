use std::{collections::HashMap, fs};

use layered_stores_client::JobProperties;

use super::*;
use crate::cli::fixture::store;

/// What stands in the page before and behind the table.
const MARKS: [&str; 2] = ["<!-- made from src/cli/metrics/figures.rs -->\n", "<!-- end -->\n"];
const PAGE: &str = "docs/metrics.md";

/// A daemon with a store that is well and one that is not.
fn seen() -> Seen {
    let failed = Properties {
        state: "failed".to_owned(),
        problems: vec![("stuck".to_owned(), "it is".to_owned()), ("new-one".to_owned(), "too".to_owned())],
        ..store("b")
    };
    let busy = Properties {
        refresh_count: 5,
        swap_count: 2,
        last_refresh_usec: 1_700_000_000_500_000,
        contents_known: true,
        upper_path_count: 1,
        upper_nar_size: 2,
        shadowed_path_count: 3,
        shadowed_nar_size: 4,
        lower_path_count: 5,
        lost_path_count: 6,
        lease_count: 7,
        ..store("a")
    };
    let job = |state: &str| JobProperties { kind: "verify".to_owned(), store: "a".to_owned(), state: state.to_owned() };
    let jobs = vec![job("running"), job("running"), job("succeeded")];
    let room = Room { bytes: Some(1 << 41), free_bytes: Some(1 << 40), inodes: Some(100), free_inodes: Some(7) };
    Seen {
        daemon: Some(Snapshot { version: "1.2.3".to_owned(), stores: vec![busy, failed], jobs }),
        room: HashMap::from([("a".to_owned(), room), ("b".to_owned(), Room::default())]),
    }
}

/// The samples, without zeros.
fn samples(text: &str) -> Vec<&str> {
    text.lines().filter(|line| !line.starts_with('#') && !line.ends_with(" 0") && !line.ends_with(" 0.0")).collect()
}

fn full_name(figure: &Figure) -> String {
    match figure.kind {
        MetricType::Counter => format!("{}_total", figure.name),
        _ => figure.name.to_owned(),
    }
}

/// What looks like the name of one of these figures.
fn named(text: &str) -> Vec<&str> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    text.split(|c| !is_part(c)).filter(|word| word.starts_with("layered_stores_")).collect()
}

#[test]
fn what_the_daemon_says_is_what_prometheus_is_told() {
    let text = text(seen()).expect("text");
    assert_eq!(
        samples(&text),
        [
            "layered_stores_up 1.0",
            "layered_stores_daemon_info{version=\"1.2.3\"} 1.0",
            "layered_stores_store_state{store=\"a\",state=\"active\"} 1.0",
            "layered_stores_store_state{store=\"b\",state=\"failed\"} 1.0",
            "layered_stores_store_problem{store=\"b\",code=\"stuck\"} 1.0",
            "layered_stores_store_problem{store=\"b\",code=\"new-one\"} 1.0",
            "layered_stores_store_refreshes_total{store=\"a\",kind=\"reconfigured\"} 3.0",
            "layered_stores_store_refreshes_total{store=\"a\",kind=\"swapped\"} 2.0",
            "layered_stores_store_last_refresh_timestamp_seconds{store=\"a\"} 1700000000.5",
            "layered_stores_store_upper_free_bytes{store=\"a\"} 1099511627776.0",
            "layered_stores_store_upper_size_bytes{store=\"a\"} 2199023255552.0",
            "layered_stores_store_upper_free_inodes{store=\"a\"} 7.0",
            "layered_stores_store_upper_inodes{store=\"a\"} 100.0",
            "layered_stores_store_upper_paths{store=\"a\"} 1.0",
            "layered_stores_store_upper_nar_bytes{store=\"a\"} 2.0",
            "layered_stores_store_shadowed_paths{store=\"a\"} 3.0",
            "layered_stores_store_shadowed_nar_bytes{store=\"a\"} 4.0",
            "layered_stores_store_lower_paths{store=\"a\"} 5.0",
            "layered_stores_store_lost_paths{store=\"a\"} 6.0",
            "layered_stores_store_leases{store=\"a\"} 7.0",
            "layered_stores_jobs{kind=\"verify\",state=\"running\"} 2.0",
        ]
    );
    for zero in [
        "layered_stores_store_state{store=\"b\",state=\"active\"} 0",
        "layered_stores_store_problem{store=\"a\",code=\"stuck\"} 0",
        "layered_stores_jobs{kind=\"verify\",state=\"waiting\"} 0",
    ] {
        assert!(
            text.lines().any(|line| line.strip_prefix(zero).is_some_and(|rest| matches!(rest, "" | ".0"))),
            "{zero}"
        );
    }
}

#[test]
fn without_a_daemon_there_is_that_and_nothing_else() {
    let text = text(Seen::default()).expect("text");
    let is_zero = |line: &str| line.starts_with("layered_stores_up 0");
    let samples: Vec<_> = text.lines().filter(|line| !line.starts_with('#')).collect();
    assert!(matches!(samples[..], [only] if is_zero(only)), "{text}");
}

#[test]
fn a_figure_says_how_it_is_called_and_what_it_is() {
    let text = text(seen()).expect("text");
    for figure in FIGURES {
        let (name, kind) = (full_name(figure), figure.kind.as_str());
        assert!(text.contains(&format!("# HELP {name} {}\n# TYPE {name} {kind}\n", figure.help)), "{name}");
    }
}

#[test]
fn the_manual_has_the_table() {
    let row = |figure: &Figure| {
        let labels: Vec<_> = (figure.values)(&seen())
            .first()
            .map_or_else(Vec::new, |value| value.labels.iter().map(|(label, _)| format!("`{label}`")).collect());
        format!("| `{}` | {} | {} | {} |\n", full_name(figure), figure.kind.as_str(), labels.join(", "), figure.help)
    };
    let rows: String = FIGURES.iter().map(row).collect();
    let table = format!("| figure | kind | labels | meaning |\n| --- | --- | --- | --- |\n{rows}");
    let mut page = fs::read_to_string(PAGE).expect("the page");
    let begin = page.find(MARKS[0]).expect("a mark") + MARKS[0].len();
    let end = begin + page[begin..].find(MARKS[1]).expect("an end");
    if std::env::var_os("UPDATE_EXPECT").is_some() {
        page.replace_range(begin..end, &table);
        fs::write(PAGE, page).expect("written");
    } else {
        let how = "UPDATE_EXPECT=1 cargo test -p layered-stores --lib figures";
        assert!(page[begin..end] == table, "{PAGE} is not what the table of figures says: run {how}");
    }
}

#[test]
fn the_dashboard_and_the_alerts_name_nothing_that_there_is_not() {
    let names: Vec<_> = FIGURES.iter().map(full_name).collect();
    for file in ["docs/metrics/dashboard.json", "docs/metrics/alerts.yaml", "docs/metrics/alerts.test.yaml"] {
        let text = fs::read_to_string(file).expect("the file");
        let named = named(&text);
        assert!(!named.is_empty(), "{file}");
        for name in named {
            assert!(names.iter().any(|known| known == name), "{file}: there is no figure {name}");
        }
    }
}
