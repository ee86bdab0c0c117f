//! `kubelane run --shadow`: what the rules that kube-proxy has written on this node answer, beside what kubelane would.
//!
//! `read` runs the tools, `iptables`, `nftables` and `ipvs` make [`Rules`] of what they say, `compare` puts these beside
//! kubelane's rows, and `ledger` tells what lasts from what is only late. Nothing here writes anything anywhere.

mod chains;
mod compare;
mod iptables;
mod ipvs;
mod ledger;
mod listed;
mod nftables;
mod nowhere;
mod read;

use std::collections::BTreeSet;

pub use compare::{Comparison, Difference, KINDS, Key, Kind, Side, What, compare};
pub use ledger::{Ledger, News};
pub use nowhere::Nowhere;
pub use read::{Unreadable, read};

use crate::abi::FrontendKey;
use crate::model::SocketAddrx;
use crate::table::HashMap;

/// Remarks about rules that are kept of one reading.
const REMARKS_MAX: usize = 20;
/// Characters of a rule that a remark shows.
const RULE_MAX: usize = 300;

/// Who connects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Client {
    /// A process of this node; pods of it get the same.
    Inside,
    Outside,
}

/// What a new connection gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// One of these; sorted.
    Endpoints(Vec<SocketAddrx>),
    Refused,
    Dropped,
    /// The rules are not understood.
    Unknown,
}

/// How long a client is remembered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Affinity {
    /// 0: not at all.
    Seconds(u32),
    /// As IPVS shows it; how many of them are a second is the kernel's secret.
    Jiffies(u32),
}

/// What the rules have for one destination: an address and a port, or with the wildcard address a NodePort.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// The Service's name as the rules have it, for people.
    pub label: String,
    /// `None`: nothing; it is left as it is.
    pub inside: Option<Answer>,
    pub outside: Option<Answer>,
    pub affinity: Affinity,
}

/// Everything that kube-proxy's rules answer.
#[derive(Debug, Default)]
pub struct Rules {
    /// "iptables", "nftables" or "IPVS".
    pub mode: &'static str,
    pub rows: HashMap<FrontendKey, Row>,
    /// What was not understood.
    pub remarks: BTreeSet<String>,
}

impl Rules {
    pub fn new(mode: &'static str) -> Rules {
        Rules { mode, ..Rules::default() }
    }

    /// The rules of another family.
    pub fn extend(&mut self, other: Rules) {
        self.rows.extend(other.rows);
        self.remarks.extend(other.remarks);
    }

    /// Clients on the node and outside get the same, whatever the traffic policies say.
    pub fn is_blind(&self) -> bool {
        self.mode == ipvs::MODE
    }
}

/// Adds a remark while there is room for it. `rule`: its text, which may be anything.
fn remark(remarks: &mut BTreeSet<String>, about: &str, rule: &str) {
    if remarks.len() < REMARKS_MAX {
        let shown: String = rule.chars().take(RULE_MAX).collect();
        remarks.insert(format!("{about}: {}", crate::escape::line(&shown)));
    }
}

#[cfg(test)]
mod tests;
