//! Reads the text that /metrics has, as far as it is the daemon's own: no exemplars, no timestamps.

/// One sample.
#[derive(Debug, PartialEq)]
pub struct Sample<'a> {
    pub name: &'a str,
    labels: Vec<(&'a str, String)>,
    pub value: f64,
}

impl Sample<'_> {
    /// Empty when it has no such label.
    pub fn label(&self, name: &str) -> &str {
        self.labels.iter().find(|(label, _)| *label == name).map_or("", |(_, value)| value)
    }
}

/// The samples of these families, in the order of the text. Lines that cannot be read are left out.
pub fn samples<'a>(text: &'a str, families: &'a [&'a str]) -> impl Iterator<Item = Sample<'a>> {
    text.lines().filter_map(move |line| {
        let end = line.find(['{', ' '])?;
        let name = &line[..end];
        if !families.contains(&name) {
            return None;
        }
        let (labels, value) = match line[end..].strip_prefix('{') {
            Some(rest) => labels(rest)?,
            None => (Vec::new(), &line[end..]),
        };
        Some(Sample { name, labels, value: value.trim().parse().ok()? })
    })
}

/// The labels up to the closing brace, and what is behind it.
fn labels(mut rest: &str) -> Option<(Vec<(&str, String)>, &str)> {
    let mut labels = Vec::new();
    loop {
        if let Some(behind) = rest.strip_prefix('}') {
            return Some((labels, behind));
        }
        let (name, after) = rest.split_once("=\"")?;
        let (value, length) = value(after)?;
        labels.push((name, value));
        rest = &after[length..];
        rest = rest.strip_prefix(',').unwrap_or(rest);
    }
}

/// A label's value, and how long it was with the closing quote.
fn value(text: &str) -> Option<(String, usize)> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((value, at + 1)),
            '\\' => match chars.next()?.1 {
                'n' => value.push('\n'),
                other => value.push(other),
            },
            c => value.push(c),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use prometheus::{Encoder as _, GaugeVec, Opts, Registry, TextEncoder};

    use super::*;

    #[test]
    fn what_is_written_is_read_whatever_the_labels_are() {
        let registry = Registry::new();
        let family = GaugeVec::new(Opts::new("wanted", "Words \\ \"quoted\""), &["name", "port"]).unwrap();
        registry.register(Box::new(family.clone())).unwrap();
        let names = ["plain", "a\"b", "back\\slash", "two\nlines", "brace}, x=\"1\"", "\u{202e}rtl", ""];
        for (value, name) in names.iter().enumerate() {
            family.with_label_values(&[*name, "http"]).set(value as f64 + 0.5);
        }
        let mut text = Vec::new();
        TextEncoder::new().encode(&registry.gather(), &mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        let mut read: Vec<(String, f64)> =
            samples(&text, &["wanted"]).map(|sample| (sample.label("name").to_owned(), sample.value)).collect();
        read.sort_by(|(_, a), (_, b)| a.total_cmp(b));
        let written: Vec<(String, f64)> =
            names.iter().enumerate().map(|(value, name)| ((*name).to_owned(), value as f64 + 0.5)).collect();
        assert_eq!(read, written);
        assert!(samples(&text, &["wanted"]).all(|sample| sample.label("port") == "http"));
        assert_eq!(samples(&text, &["want"]).count(), 0);
    }

    #[test]
    fn lines_that_cannot_be_read_are_left_out() {
        let text = "wanted\nwanted{\nwanted{a=\"b} 1\nwanted{a=\"b\\\nwanted one\n# wanted 3\n\nwanted 4\nwanted{} 5\n";
        let values: Vec<f64> = samples(text, &["wanted"]).map(|sample| sample.value).collect();
        assert_eq!(values, [4.0, 5.0]);
    }
}
