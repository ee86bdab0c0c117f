//! Names of objects are whatever somebody wrote: what a terminal would act upon, or that hides or turns over what is
//! written beside it, is shown as its code.

use std::fmt::Write as _;

/// Control characters, and those of format (bidirectional marks and overrides, zero widths, line separators, tags).
fn is_unsafe(c: char) -> bool {
    c.is_control()
        || matches!(u32::from(c),
            0xad | 0x61c | 0x180e | 0x200b..=0x200f | 0x2028..=0x202e | 0x2060..=0x206f | 0xfeff | 0xfff9..=0xfffb
            | 0xe0000..=0xe007f)
}

/// `text` on one line, with each such character as \uXXXX (two of them beyond the basic plane), as JSON has it.
pub fn line(text: &str) -> String {
    escaped(text, is_unsafe)
}

/// The same of a text of several lines.
pub fn lines(text: &str) -> String {
    escaped(text, |c| c != '\n' && is_unsafe(c))
}

/// The same of a line of the log. `has_colours`: its colours, which begin with ESC, stay (tracing itself escapes that of
/// names).
pub fn log(text: &str, has_colours: bool) -> String {
    escaped(text, |c| c != '\n' && !(has_colours && c == '\x1b') && is_unsafe(c))
}

/// Whether JSON, as serde writes it, names no such character: neither as it is nor by its code.
pub fn is_plain_json(json: &str) -> bool {
    !json.contains("\\u00") && !json.contains(is_unsafe)
}

fn escaped(text: &str, is_unsafe: impl Fn(char) -> bool) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        if is_unsafe(c) {
            for unit in c.encode_utf16(&mut [0; 2]) {
                let _ = write!(safe, "\\u{unit:04x}");
            }
        } else {
            safe.push(c);
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_would_act_upon_is_shown_as_its_code() {
        let table = [
            ("web-1 größer 日本", "web-1 größer 日本"),
            ("\x1b[31mred\x07", "\\u001b[31mred\\u0007"),
            ("a\u{202e}b\u{2066}c\u{200f}", "a\\u202eb\\u2066c\\u200f"),
            ("\u{85}\u{7f}\u{feff}\u{e0041}", "\\u0085\\u007f\\ufeff\\udb40\\udc41"),
            ("two\nlines\r", "two\\u000alines\\u000d"),
        ];
        for (given, expected) in table {
            assert_eq!(line(given), expected);
        }
        assert_eq!(lines("two\nlines\r"), "two\nlines\\u000d");
    }

    #[test]
    fn in_json_it_means_the_same_character() {
        let name = "a\u{202e}\u{e0041}\x1b";
        let json = lines(&serde_json::to_string(name).unwrap());
        assert!(json.is_ascii());
        assert_eq!(serde_json::from_str::<String>(&json).unwrap(), name);
    }
}
