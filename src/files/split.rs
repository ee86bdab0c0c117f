//! Cuts a file into the pieces that stand for one object each: documents of a multi-document file, items of a `List`.
//! A piece is parsed on its own, so that memory is bounded by the object and not by the file, several threads can
//! share a big file, and pieces whose bytes did not change are not parsed again.
//!
//! The cut is textual and errs on the side of not cutting: a list in a style that is not recognised is one piece.

use std::hash::{BuildHasher, Hasher};

use memchr::{memchr, memchr_iter, memmem};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::fault::Fault;

/// How the bytes of a piece are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// A YAML document.
    Yaml,
    /// One `- ` entry of a YAML sequence, with its indentation.
    YamlItem,
    Json,
}

/// A piece of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece<'a> {
    pub text: &'a str,
    /// Line of the file on which the piece begins, from 1.
    pub line: usize,
    pub shape: Shape,
    /// What the entries of a `ServiceList` are: API servers leave the kind out of them.
    pub listed: Option<Identity<'a>>,
}

/// `apiVersion` and `kind`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Identity<'a> {
    pub api_version: &'a str,
    pub kind: &'a str,
}

impl Piece<'_> {
    /// Equal for pieces that mean the same: bytes, shape and surroundings.
    pub fn hash(&self) -> u64 {
        let mut hasher = foldhash::quality::FixedState::with_seed(self.shape as u64).build_hasher();
        hasher.write(self.text.as_bytes());
        hasher.write(self.listed.unwrap_or_default().kind.as_bytes());
        hasher.finish()
    }
}

/// The pieces of a file. Blank documents are left out.
///
/// # Errors
/// For JSON that is not JSON.
pub fn split(text: &str, json: bool) -> Result<Vec<Piece<'_>>, Fault> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    if json {
        return split_json(text, 1);
    }
    let mut pieces = Vec::new();
    for (document, line) in documents(text) {
        if document.trim_start().starts_with('{')
            && let Ok(found) = split_json(document, line)
        {
            pieces.extend(found);
            continue;
        }
        match items(document, line) {
            Some(found) => pieces.extend(found),
            None => pieces.push(Piece { text: document, line, shape: Shape::Yaml, listed: None }),
        }
    }
    Ok(pieces)
}

/// Lines with their byte offset and number (from 1).
fn lines(text: &str) -> impl Iterator<Item = (usize, usize, &str)> {
    let ends = memchr_iter(b'\n', text.as_bytes()).map(|at| at + 1).chain([text.len()]);
    let mut start = 0;
    let cut = ends.enumerate().map(move |(number, end)| {
        let line = (start, number + 1, &text[start..end]);
        start = end;
        line
    });
    cut.filter(|(_, _, line)| !line.is_empty())
}

fn newlines(text: &str) -> usize {
    memchr_iter(b'\n', text.as_bytes()).count()
}

/// A marker line: `---` or `...` alone or followed by a blank. YAML allows these at the start of a line nowhere else, not
/// even in block scalars (YAML 1.2, `c-forbidden`).
fn is_marker(line: &str, marker: &str) -> bool {
    line.strip_prefix(marker).is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']))
}

/// Offsets of the marker lines.
fn markers(text: &str) -> Vec<usize> {
    let mut found = Vec::new();
    for (marker, searched) in [("---", "\n---"), ("...", "\n...")] {
        let starts = memmem::find_iter(text.as_bytes(), searched).map(|at| at + 1);
        found.extend([0].into_iter().chain(starts).filter(|at| is_marker(&text[*at..], marker)));
    }
    found.sort_unstable();
    found
}

/// The documents of a YAML stream with the line on which each begins.
fn documents(text: &str) -> Vec<(&str, usize)> {
    let mut found = Vec::new();
    // The first byte after the last marker, the line it is on, and whether content stands on the marker's own line.
    let (mut from, mut line, mut beside) = (0, 1, false);
    for end in markers(text).into_iter().chain([text.len()]) {
        let section = &text[from..end];
        let is_content = |text: &str| !is_blank(text) && !text.starts_with('%');
        if let Some((offset, number, _)) = lines(section).find(|(_, _, text)| beside || is_content(text)) {
            found.push((&section[offset..], line + number - 1));
        }
        line += newlines(section);
        let marked = &text[end..];
        let marked = memchr(b'\n', marked.as_bytes()).map_or(marked, |at| &marked[..=at]);
        let rest = marked.strip_prefix("---").unwrap_or_default().trim();
        beside = !rest.is_empty() && !rest.starts_with('#');
        (from, line) = if beside { (end + 3, line) } else { (end + marked.len(), line + newlines(marked)) };
    }
    found
}

fn is_blank(line: &str) -> bool {
    let line = line.trim_start();
    line.is_empty() || line.starts_with('#')
}

fn indent(line: &str) -> usize {
    line.bytes().take_while(|b| *b == b' ').count()
}

/// The value of a plain `key: value` line.
fn scalar<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    let value = line.strip_prefix(key)?.strip_prefix(':')?;
    if !value.starts_with([' ', '\t']) {
        return None;
    }
    let value = value.split(" #").next().unwrap_or_default().trim();
    let plain = value.trim_matches(['"', '\'']);
    (!plain.is_empty() && plain.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'/' | b'.' | b'-')))
        .then_some(plain)
}

/// What a block-style piece says of itself, read off its lines; `None` when it must be parsed to know.
pub fn identity<'a>(piece: &Piece<'a>) -> Option<Identity<'a>> {
    let first = piece.text.lines().find(|l| !is_blank(l))?;
    let mut column = indent(first);
    if piece.shape == Shape::YamlItem {
        let after_dash = first[column..].strip_prefix('-')?;
        column += 1 + indent(after_dash);
    }
    let mut identity = Identity::default();
    for line in piece.text.lines() {
        let same_level = indent(line) == column || std::ptr::eq(line, first);
        let Some(line) = line.get(column..).filter(|_| same_level) else { continue };
        if let Some(kind) = scalar(line, "kind") {
            identity.kind = kind;
        } else if let Some(version) = scalar(line, "apiVersion") {
            identity.api_version = version;
        }
        if !identity.kind.is_empty() && !identity.api_version.is_empty() {
            return Some(identity);
        }
    }
    None
}

/// The identity of the entries of a list of this identity: known for typed lists only.
fn listed<'a>(list: Identity<'a>) -> Option<Identity<'a>> {
    let kind = list.kind.strip_suffix("List").filter(|k| !k.is_empty())?;
    Some(Identity { kind, ..list })
}

/// True for `List`, `ServiceList`, `EndpointSliceList`, `NodeList`.
pub fn is_list(kind: &str) -> bool {
    matches!(kind, "List" | "ServiceList" | "EndpointSliceList" | "NodeList")
}

/// The entries of a block-style list document; `None` when it is not one, or not in a style that is cut.
fn items(document: &str, line: usize) -> Option<Vec<Piece<'_>>> {
    // Most documents are no lists; a glance tells.
    if !document.starts_with("items:") && memmem::find(document.as_bytes(), b"\nitems:").is_none() {
        return None;
    }
    let whole = Piece { text: document, line, shape: Shape::Yaml, listed: None };
    let list = identity(&whole).filter(|i| is_list(i.kind))?;
    // An alias may point into another item.
    if document.contains(": *") || document.contains("- *") {
        return None;
    }
    let mut pieces: Vec<Piece> = Vec::new();
    let (mut inside, mut column, mut start) = (false, None, (0, 0));
    let mut open = false;
    let piece = |from: (usize, usize), to: usize| Piece {
        text: &document[from.0..to],
        line: line + from.1 - 1,
        shape: Shape::YamlItem,
        listed: listed(list),
    };
    for (offset, number, text) in lines(document) {
        let depth = indent(text);
        // Most lines are inside an item.
        if column.is_some_and(|c| inside && depth > c) || is_blank(text) {
            continue;
        }
        let dash = text[depth..].starts_with("- ") || text[depth..].trim_end() == "-";
        if !inside {
            inside = text.strip_prefix("items:").is_some_and(is_blank);
        } else if dash && depth == *column.get_or_insert(depth) {
            if open {
                pieces.push(piece(start, offset));
            }
            (start, open) = ((offset, number), true);
        } else if depth == 0 && open {
            // Another key of the list itself.
            pieces.push(piece(start, offset));
            (inside, open) = (false, false);
        } else {
            return None;
        }
    }
    if open {
        pieces.push(piece(start, document.len()));
    }
    column.map(|_| pieces)
}

/// A JSON document as far as it must be known to cut it.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document<'a> {
    #[serde(default, borrow)]
    api_version: &'a str,
    #[serde(default, borrow)]
    kind: &'a str,
    #[serde(default, borrow)]
    items: Option<Vec<&'a RawValue>>,
}

/// One or more JSON documents, one after the other.
fn split_json(text: &str, line: usize) -> Result<Vec<Piece<'_>>, Fault> {
    let mut pieces = Vec::new();
    let mut counted = (0, line);
    let mut line_of = |piece: &str| {
        let offset = piece.as_ptr() as usize - text.as_ptr() as usize;
        counted = (offset, counted.1 + newlines(&text[counted.0..offset]));
        counted.1
    };
    for document in serde_json::Deserializer::from_str(text).into_iter::<&RawValue>() {
        let raw = document.map_err(|e| Fault::json(&e, line))?.get();
        let begins = line_of(raw);
        match serde_json::from_str::<Document>(raw) {
            Ok(Document { kind, api_version, items: Some(items) }) if is_list(kind) => {
                let listed = listed(Identity { api_version, kind });
                for item in items {
                    pieces.push(Piece { text: item.get(), line: line_of(item.get()), shape: Shape::Json, listed });
                }
            }
            _ => pieces.push(Piece { text: raw, line: begins, shape: Shape::Json, listed: None }),
        }
    }
    Ok(pieces)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(text: &str) -> Vec<(usize, &str)> {
        split(text, false).unwrap().iter().map(|p| (p.line, p.text.trim())).collect()
    }

    #[test]
    fn documents_are_cut_at_markers_and_know_their_line() {
        for (text, expected) in [
            ("a: 1\n", vec![(1, "a: 1")]),
            ("---\na: 1\n---\nb: 2\n", vec![(2, "a: 1"), (4, "b: 2")]),
            ("# head\n---\n# only a comment\n---\na: 1\n...\n", vec![(5, "a: 1")]),
            ("%YAML 1.2\n---\na: 1\r\n---\r\nb: 2", vec![(3, "a: 1"), (5, "b: 2")]),
            ("--- # comment\na: 1\n--- {b: 2}\n", vec![(2, "a: 1"), (3, "{b: 2}")]),
            ("a: |\n  ---\n  text\n----: 1\n", vec![(1, "a: |\n  ---\n  text\n----: 1")]),
            ("--- # list\n%TAG\n\n# c\n...\n--- a: 1\nb: 2\n...\n\nc: 3\n---", vec![(6, "a: 1\nb: 2"), (10, "c: 3")]),
            ("a: \u{e9}\n... \n....\n---a\n", vec![(1, "a: \u{e9}"), (3, "....\n---a")]),
            ("", vec![]),
        ] {
            assert_eq!(cut(text), expected, "{text:?}");
        }
    }

    #[test]
    fn the_items_of_a_block_list_are_cut_wherever_they_are_indented() {
        for text in [
            "apiVersion: v1\nkind: List\nitems:\n- kind: A\n  x: 1\n\n- kind: B\n  y:\n  - 1\nmetadata: {}\n",
            "apiVersion: v1\nkind: List\nitems: # all\n  - kind: A\n    x: 1\n\n  - kind: B\n    y:\n    - 1\nmetadata: {}\n",
        ] {
            let pieces = cut(text);
            assert_eq!(pieces.iter().map(|p| p.0).collect::<Vec<_>>(), [4, 7]);
            assert!(pieces[0].1.starts_with("- kind: A") && pieces[1].1.ends_with("- 1"), "{pieces:?}");
        }
    }

    #[test]
    fn a_list_in_another_style_is_left_whole() {
        for text in
            ["apiVersion: v1\nkind: List\nitems: [{kind: A}]\n", "apiVersion: v1\nkind: List\nitems:\n  &a\n  - b\n"]
        {
            assert_eq!(cut(text).len(), 1, "{text}");
        }
    }

    #[test]
    fn json_documents_and_lists_know_their_lines() {
        let text =
            "{\"kind\":\"ServiceList\",\"apiVersion\":\"v1\",\n\"items\":[\n{\"a\":1},\n{\"b\":2}]}\n{\"c\":\n3}";
        let pieces = split(text, true).unwrap();
        let found: Vec<_> = pieces.iter().map(|p| (p.line, p.text, p.listed.map(|l| l.kind))).collect();
        assert_eq!(
            found,
            [(3, "{\"a\":1}", Some("Service")), (4, "{\"b\":2}", Some("Service")), (5, "{\"c\":\n3}", None)]
        );
    }

    #[test]
    fn the_identity_is_read_off_the_lines_of_the_piece_itself() {
        let nested = "spec:\n  kind: Inner\nkind: \"Service\" # x\napiVersion: v1\n";
        let item = "  -   apiVersion: v1\n      kind: Node\n";
        let piece = |text, shape| Piece { text, line: 1, shape, listed: None };
        assert_eq!(identity(&piece(nested, Shape::Yaml)), Some(Identity { api_version: "v1", kind: "Service" }));
        assert_eq!(identity(&piece(item, Shape::YamlItem)), Some(Identity { api_version: "v1", kind: "Node" }));
        assert_eq!(identity(&piece("{kind: Service, apiVersion: v1}", Shape::Yaml)), None);
    }
}
