//! YAML and JSON as kube-proxy reads a v1alpha1 configuration when its strict reader has refused it: of a field given
//! twice the last one counts, and what follows the first document is not read.

use std::cell::RefCell;
use std::fmt;

use serde::Deserialize as _;
use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_norway::{Error, Mapping, Value};

/// The first document, and what of the text is odd.
///
/// # Errors
/// When it is neither YAML nor JSON.
pub fn read(text: &str) -> Result<(Value, Vec<String>), Error> {
    let odd: RefCell<Vec<String>> = RefCell::default();
    let bare = text.strip_prefix('\u{feff}');
    if bare.is_some() {
        odd.borrow_mut().push("a byte-order mark at the beginning (skipped)".to_owned());
    }
    let mut documents = serde_norway::Deserializer::from_str(bare.unwrap_or(text));
    let first = documents.next().map(|document| Place { path: "", odd: &odd }.deserialize(document));
    let value = first.transpose()?.unwrap_or_default();
    if documents.any(|document| !matches!(Value::deserialize(document), Ok(Value::Null))) {
        odd.borrow_mut().push("a second document (not read)".to_owned());
    }
    Ok((value, odd.into_inner()))
}

/// Where a field is, as `path.to.field`.
pub fn below(path: &str, field: &str) -> String {
    if path.is_empty() { field.to_owned() } else { format!("{path}.{field}") }
}

/// Reads the value at `path`.
#[derive(Clone, Copy)]
struct Place<'a> {
    path: &'a str,
    odd: &'a RefCell<Vec<String>>,
}

impl<'de> DeserializeSeed<'de> for Place<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Place<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value without a tag")
    }

    /// A document without anything in it.
    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element_seed(self)? {
            list.push(item);
        }
        Ok(list.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut mapping = Mapping::new();
        while let Some(key) = entries.next_key::<Value>()? {
            let name = name(&key).ok_or_else(|| A::Error::custom("a field name is not a string"))?;
            let path = below(self.path, &name);
            let value = entries.next_value_seed(Place { path: &path, odd: self.odd })?;
            if mapping.insert(name.into(), value).is_some() {
                self.odd.borrow_mut().push(format!("{path} (given twice: the last one counts)"));
            }
        }
        Ok(mapping.into())
    }
}

/// A scalar as the text that JSON would have in its place.
fn name(key: &Value) -> Option<String> {
    match key {
        Value::Null => Some("null".to_owned()),
        Value::Bool(on) => Some(on.to_string()),
        Value::Number(number) => Some(number.to_string()),
        Value::String(text) => Some(text.clone()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_of_two_fields_counts_and_what_is_odd_is_named() {
        let table = [
            ("a: 1", "a: 1\n", ""),
            ("{\"a\": {\"b\": 1, \"b\": 2}}", "a:\n  b: 2\n", "a.b (given twice: the last one counts)"),
            ("a: {b: 1, c: 2}\na: {c: 3}", "a:\n  c: 3\n", "a (given twice: the last one counts)"),
            ("a: [{b: 1, b: x}]", "a:\n- b: x\n", "a.b (given twice: the last one counts)"),
            ("\u{feff}---\na: x", "a: x\n", "a byte-order mark at the beginning (skipped)"),
            ("a: 1\n---\n", "a: 1\n", ""),
            ("a: 1\n...\n---\na: 2\n", "a: 1\n", "a second document (not read)"),
            ("1: 2\ntrue: ~", "'1': 2\n'true': null\n", ""),
            ("", "null\n", ""),
        ];
        for (text, expected, odd) in table {
            let (value, found) = read(text).unwrap();
            let found = (serde_norway::to_string(&value).unwrap(), found.join("; "));
            assert_eq!(found, (expected.to_owned(), odd.to_owned()), "{text:?}");
        }
        for bad in ["a: [", "? [1]\n: 2", "a: !odd b"] {
            assert!(read(bad).is_err(), "{bad:?}");
        }
    }
}
