//! What is wrong at present, by where it was found. A warning is reported when it appears and again only after it has
//! gone.

use std::collections::BTreeSet;

use crate::abi::FrontendKey;
use crate::model::{ObjectName, Warning};
use crate::table::{HashMap, HashSet};

/// Who found a warning and will take it back.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Origin {
    /// A source, while reading the object of this subject.
    Source(Box<str>),
    /// `compile`, for this Service.
    Compile(ObjectName),
    /// Several Services claim this frontend.
    Contest(FrontendKey),
    /// No room for this Service's rows.
    Capacity(ObjectName),
    /// The kernel's map of this name is full.
    Full(&'static str),
}

/// The warnings that hold, and those already reported.
#[derive(Debug, Default)]
pub struct WarningBook {
    current: HashMap<Origin, Vec<Warning>>,
    holders: HashMap<Warning, u32>,
    reported: HashSet<Warning>,
    touched: BTreeSet<Warning>,
}

impl WarningBook {
    /// What `origin` has to say from now on, in place of what it said before.
    pub fn set(&mut self, origin: Origin, warnings: Vec<Warning>) {
        if warnings.is_empty() && !self.current.contains_key(&origin) {
            return;
        }
        for warning in &warnings {
            *self.holders.entry(warning.clone()).or_default() += 1;
            self.touched.insert(warning.clone());
        }
        let before =
            if warnings.is_empty() { self.current.remove(&origin) } else { self.current.insert(origin, warnings) };
        for warning in before.unwrap_or_default() {
            if let Some(count) = self.holders.get_mut(&warning) {
                *count -= 1;
                if *count == 0 {
                    self.holders.remove(&warning);
                }
            }
            self.touched.insert(warning);
        }
    }

    /// All that hold now, sorted.
    pub fn all(&self) -> Vec<&Warning> {
        let mut all: Vec<&Warning> = self.holders.keys().collect();
        all.sort_unstable();
        all
    }

    /// What holds of this subject now, sorted.
    pub fn of(&self, subject: &str) -> Vec<String> {
        let of_subject = self.holders.keys().filter(|warning| warning.subject == subject);
        let mut messages: Vec<String> = of_subject.map(|warning| warning.message.clone()).collect();
        messages.sort_unstable();
        messages
    }

    /// The warnings that appeared and those that went since the last call, sorted.
    pub fn take(&mut self) -> (Vec<Warning>, Vec<Warning>) {
        let (mut new, mut resolved) = (Vec::new(), Vec::new());
        for warning in std::mem::take(&mut self.touched) {
            match (self.holders.contains_key(&warning), self.reported.contains(&warning)) {
                (true, false) => {
                    self.reported.insert(warning.clone());
                    new.push(warning);
                }
                (false, true) => {
                    self.reported.remove(&warning);
                    resolved.push(warning);
                }
                _ => {}
            }
        }
        (new, resolved)
    }
}

/// A warning whose subject is this Service.
pub fn service_warning(service: &ObjectName, message: String) -> Warning {
    Warning { subject: format!("Service {service}"), message }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn warning(message: &str) -> Warning {
        Warning { subject: "Service default/web".into(), message: message.into() }
    }

    #[test]
    fn a_warning_is_reported_once_while_it_lasts_and_again_after_it_had_gone() {
        let mut book = WarningBook::default();
        let origin = || Origin::Source("Service default/web".into());
        book.set(origin(), vec![warning("a")]);
        assert_eq!(book.take(), (vec![warning("a")], vec![]));
        book.set(origin(), vec![warning("a")]);
        assert_eq!(book.take(), (vec![], vec![]));
        book.set(origin(), vec![warning("b")]);
        assert_eq!(book.take(), (vec![warning("b")], vec![warning("a")]));
        book.set(origin(), vec![]);
        book.set(origin(), vec![warning("b")]);
        assert_eq!(book.take(), (vec![], vec![]));
        book.set(origin(), vec![]);
        assert_eq!(book.take(), (vec![], vec![warning("b")]));
        book.set(origin(), vec![warning("a")]);
        assert_eq!(book.take(), (vec![warning("a")], vec![]));
    }

    #[test]
    fn a_warning_that_two_origins_hold_lasts_until_both_let_go() {
        let mut book = WarningBook::default();
        book.set(Origin::Source("x".into()), vec![warning("a")]);
        book.set(Origin::Full("slots"), vec![warning("a")]);
        assert_eq!(book.take().0.len(), 1);
        book.set(Origin::Source("x".into()), vec![]);
        assert_eq!(book.take(), (vec![], vec![]));
        book.set(Origin::Full("slots"), vec![]);
        assert_eq!(book.take().1.len(), 1);
    }
}
