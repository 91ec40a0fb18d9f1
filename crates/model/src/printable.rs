//! Text of others on its way to a terminal, a file or a command line.

/// Whether a character shows as itself. Control characters do not, and neither does what changes the direction of a line
/// or stands on the character before it: a terminal obeys them.
fn is_printable(c: char) -> bool {
    matches!(c, '\'' | '"' | '\\') || c.escape_debug().eq([c])
}

/// The first character of a text that does not show as itself.
pub fn unprintable(text: &str) -> Option<char> {
    text.chars().find(|&c| !is_printable(c))
}

/// The text with everything escaped that does not show as itself, as in `\u{1b}`.
pub fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if is_printable(c) { shown.push(c) } else { shown.extend(c.escape_debug()) }
    }
    shown
}

/// At most `most` characters of a text; "…" stands for those left out.
pub fn excerpt(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_escaped() {
        for (text, shown) in [
            ("nix-daemon", "nix-daemon"),
            ("it's \"a\\b\" ä 仓", "it's \"a\\b\" ä 仓"),
            ("\u{1b}[2Jgone", "\\u{1b}[2Jgone"),
            ("a\nb\tc\r\0", "a\\nb\\tc\\r\\0"),
            ("\u{7f}\u{9b}m", "\\u{7f}\\u{9b}m"),
            ("\u{202e}txt.exe\u{200b}", "\\u{202e}txt.exe\\u{200b}"),
            ("\u{2028}", "\\u{2028}"),
        ] {
            assert_eq!(printable(text), shown);
            assert_eq!(unprintable(text).is_some(), text != shown, "{text:?}");
        }
    }

    #[test]
    fn a_long_text_is_cut() {
        assert_eq!(excerpt("äöü", 3), "äöü");
        assert_eq!(excerpt("äöüx", 3), "äöü…");
        assert_eq!(excerpt("", 0), "");
    }
}
