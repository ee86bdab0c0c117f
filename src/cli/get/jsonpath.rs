//! kubectl's JSONPath templates: text with paths in braces, `{range PATH}...{end}`, and quoted text in braces. Paths are
//! RFC 9535's, with or without the `$` at their beginning.

use std::fmt::Write as _;
use std::str::FromStr;

use serde_json::Value;
use serde_json_path::JsonPath;

/// A template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template(Vec<Part>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    Path(Path),
    Range(Path, Vec<Part>),
}

/// A path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Path(JsonPath);

impl FromStr for Path {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let path = match text.trim() {
            path if path.starts_with('$') => path.to_owned(),
            "" | "." | "@" => "$".to_owned(),
            path if path.starts_with(['.', '[']) => format!("${path}"),
            path => match path.strip_prefix('@') {
                Some(path) => format!("${path}"),
                None => format!("$.{path}"),
            },
        };
        JsonPath::parse(&path).map(Path).map_err(|error| format!("{text:?} is not a JSONPath (RFC 9535): {error}"))
    }
}

impl Path {
    /// What it leads to, in order.
    pub fn find<'a>(&self, value: &'a Value) -> Vec<&'a Value> {
        self.0.query(value).all()
    }
}

impl FromStr for Template {
    type Err = String;

    /// A path alone needs no braces.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if !text.contains('{') {
            return Ok(Template(vec![Part::Path(text.parse()?)]));
        }
        let mut rest = text;
        let parts = parts(&mut rest, false)?;
        Ok(Template(parts))
    }
}

/// Up to `{end}` within a range, which is taken, too.
fn parts(rest: &mut &str, in_range: bool) -> Result<Vec<Part>, String> {
    let mut parts = Vec::new();
    while let Some((text, after)) = rest.split_once('{') {
        if !text.is_empty() {
            parts.push(Part::Text(text.to_owned()));
        }
        let end = closing_brace(after).ok_or("a template has a { without its }")?;
        let (inner, next) = (after[..end].trim(), &after[end + 1..]);
        *rest = next;
        match inner {
            "end" if in_range => return Ok(parts),
            "end" => return Err("a template has an {end} without its {range}".to_owned()),
            _ => {}
        }
        parts.push(match inner.strip_prefix("range ") {
            Some(path) => Part::Range(path.parse()?, self::parts(rest, true)?),
            None if inner.starts_with(['"', '\'']) => Part::Text(quoted(inner)?),
            None => Part::Path(inner.parse()?),
        });
    }
    if in_range {
        return Err("a template has a {range} without its {end}".to_owned());
    }
    if !rest.is_empty() {
        parts.push(Part::Text((*rest).to_owned()));
    }
    Ok(parts)
}

/// A brace in quotes is none.
fn closing_brace(text: &str) -> Option<usize> {
    let (mut quote, mut is_escaped) = (None, false);
    for (at, c) in text.char_indices() {
        match c {
            _ if is_escaped => is_escaped = false,
            '\\' if quote.is_some() => is_escaped = true,
            '"' | '\'' if quote.is_none() => quote = Some(c),
            c if quote == Some(c) => quote = None,
            '}' if quote.is_none() => return Some(at),
            _ => {}
        }
    }
    None
}

fn quoted(text: &str) -> Result<String, String> {
    let inner = text.strip_prefix('\'').and_then(|text| text.strip_suffix('\''));
    let json = match inner {
        Some(inner) => format!("\"{}\"", inner.replace('"', "\\\"")),
        None => text.to_owned(),
    };
    serde_json::from_str(&json).map_err(|_| format!("{text} is not a quoted string"))
}

impl Template {
    /// What it makes of `value`. Several values of one path stand side by side, as kubectl has them.
    pub fn render(&self, value: &Value) -> String {
        let mut text = String::new();
        render(&self.0, value, &mut text);
        text
    }
}

fn render(parts: &[Part], value: &Value, text: &mut String) {
    for part in parts {
        match part {
            Part::Text(own) => text.push_str(own),
            Part::Path(path) => {
                let found: Vec<String> = path.find(value).into_iter().map(word).collect();
                let _ = write!(text, "{}", found.join(" "));
            }
            Part::Range(path, inner) => path.find(value).into_iter().for_each(|item| render(inner, item, text)),
        }
    }
}

/// A string without its quotes, else JSON.
fn word(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn templates_are_those_of_kubectl() {
        let value = json!({"items": [
            {"name": "web", "ports": [80, 443], "kinds": ["ClusterIP"]}, {"name": "d}s", "ports": [53], "kinds": []}]});
        for (template, expected) in [
            ("{.items[*].name}", "web d}s"),
            (".items[0].name", "web"),
            ("items[0].ports", "[80,443]"),
            ("{$.items[?@.ports[0]==53].name}", "d}s"),
            ("{range .items[*]}{.name}{\"\\t\"}{.ports[0]}{\"\\n\"}{end}", "web\t80\nd}s\t53\n"),
            ("{range .items[*]}{range .ports[*]}{@}{','}{end}{'}'}{end}", "80,443,}53,}"),
            ("names: {.items[*].name}; none: {.items[*].nothing}.", "names: web d}s; none: ."),
        ] {
            assert_eq!(template.parse::<Template>().map(|t| t.render(&value)), Ok(expected.to_owned()), "{template}");
        }
        for bad in ["{.items", "{end}", "{range .items[*]}", "{.items[}", "{\"x}", "..["] {
            assert!(bad.parse::<Template>().is_err(), "{bad}");
        }
    }
}
