//! Writing to standard output and standard error.

use std::{
    io::{self, Write as _},
    os::fd::AsFd,
};

use anyhow::Result;
use serde::Serialize;

pub(super) fn print_json(value: &impl Serialize) -> Result<()> {
    print(&format!("{}\n", serde_json::to_string_pretty(value)?))
}

/// Prints, with colour only on terminals; a reader that has seen enough (`| head`) is no failure.
pub(super) fn print(text: &str) -> Result<()> {
    match anstream::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => Ok(result?),
    }
}

/// Tells what went wrong.
pub fn complain(message: &str) {
    let message = wrapped(&format!("layered-stores: {message}"), 2, io::stderr());
    anstream::eprintln!("{message}");
}

/// A text broken between words where it would not fit on the terminal; its other lines are indented. Elsewhere it stays as
/// it is, for programs.
pub fn wrapped(text: &str, indent: usize, to: impl AsFd) -> String {
    let columns = || std::env::var("COLUMNS").ok()?.parse().ok();
    match rustix::termios::tcgetwinsize(to) {
        Ok(size) => wrap(text, indent, columns().unwrap_or(usize::from(size.ws_col))),
        Err(_) => text.to_owned(),
    }
}

fn wrap(text: &str, indent: usize, columns: usize) -> String {
    // The first line begins where whoever calls has come to.
    let room = columns.saturating_sub(indent).max(20);
    let mut lines = Vec::new();
    for paragraph in text.lines() {
        let mut line = String::new();
        for word in words(paragraph) {
            if !line.is_empty() && line.chars().count() + 1 + word.chars().count() > room {
                lines.push(std::mem::take(&mut line));
            }
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
        lines.push(line);
    }
    lines.join(&format!("\n{:indent$}", ""))
}

/// The words of a line. A command in backquotes is one, because it is to be copied.
fn words(line: &str) -> impl Iterator<Item = &str> {
    let mut is_quoted = false;
    line.split(move |c| {
        is_quoted ^= c == '`';
        c == ' ' && !is_quoted
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_broken_between_words() {
        assert_eq!(wrap("one two three four five six", 2, 22), "one two three four\n  five six");
        assert_eq!(wrap("short", 18, 80), "short");
        assert_eq!(wrap("two\nlines", 4, 80), "two\n    lines");
        assert_eq!(wrap("one two; run `do it now`, please", 2, 22), "one two; run\n  `do it now`, please");
        // What is longer than a line has one of its own.
        assert_eq!(wrap("a 12345678901234567890123 b", 0, 20), "a\n12345678901234567890123\nb");
    }
}
