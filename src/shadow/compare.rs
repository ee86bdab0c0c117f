//! Kubelane's rows beside kube-proxy's rules, destination by destination.

use std::collections::BTreeMap;

use super::listed::shown;
use super::{Affinity, Answer, Row, Rules};
use crate::abi::frontend_flag::{FRONTEND_EXTERNAL_IP, FRONTEND_LOAD_BALANCER, FRONTEND_NODE_PORT};
use crate::abi::pool_empty::EMPTY_DROP;
use crate::abi::{Frontend, FrontendKey, Pool};
use crate::model::{Ipx, Protocol, SocketAddrx};
use crate::plan::tables::{Tables, is_gone};
use crate::table::{HashSet, Rows as _};

/// What packets from outside may ask for.
const EXTERNAL: u32 = FRONTEND_EXTERNAL_IP | FRONTEND_LOAD_BALANCER | FRONTEND_NODE_PORT;
/// Endpoints that a line shows.
const SHOWN_MAX: usize = 5;
/// Kernels' timer frequencies.
const HERTZ: [u64; 4] = [100, 250, 300, 1000];

const BOUND: &str = "the cluster IP is bound to a device of this node, and is left to what listens there";
const SCTP: &str = "SCTP is served only where the endpoint has the Service's port, and not for the node's own sockets";
const IPVS_INSIDE: &str = "IPVS gives clients on the node what clients outside get";
const IPVS_EMPTY: &str = "IPVS refuses where the other modes of kube-proxy drop";

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Endpoints,
    OnlyInRules,
    OnlyInKubelane,
    Verdict,
    Affinity,
    /// Known and meant.
    Known,
}

/// All of them, in the words of the metric.
pub const KINDS: [(Kind, &str); 6] = [
    (Kind::Endpoints, "endpoints"),
    (Kind::OnlyInRules, "only_in_rules"),
    (Kind::OnlyInKubelane, "only_in_kubelane"),
    (Kind::Verdict, "verdict"),
    (Kind::Affinity, "affinity"),
    (Kind::Known, "known"),
];

/// Whose answers differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    All,
    Inside,
    Outside,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    pub at: FrontendKey,
    pub side: Side,
    pub kind: Kind,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// Those that only one of them has; sorted.
    Endpoints {
        rules: Vec<SocketAddrx>,
        kubelane: Vec<SocketAddrx>,
    },
    Text(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// "namespace/name:port".
    pub name: String,
    pub what: What,
}

impl Difference {
    /// Where, and for whom.
    pub fn destination(key: &Key) -> String {
        let whom = match key.side {
            Side::All => "",
            Side::Inside => " for clients on the node",
            Side::Outside => " for clients outside",
        };
        format!("{}{whom}", shown(&key.at))
    }

    pub fn text(&self) -> String {
        let (rules, kubelane) = match &self.what {
            What::Text(text) => return text.clone(),
            What::Endpoints { rules, kubelane } => (rules, kubelane),
        };
        let part = |whose: &str, endpoints: &[SocketAddrx]| {
            (!endpoints.is_empty()).then(|| format!("endpoints only in {whose}: {}", list(endpoints)))
        };
        [part("the rules", rules), part("kubelane", kubelane)].into_iter().flatten().collect::<Vec<_>>().join("; ")
    }
}

/// What one comparison finds.
#[derive(Debug, Default)]
pub struct Comparison {
    pub service_ports: usize,
    pub differences: BTreeMap<Key, Difference>,
}

/// `bound`: the addresses of this node's devices.
pub fn compare(tables: &Tables, rules: &Rules, bound: &[Ipx]) -> Comparison {
    let mut work = Work { tables, rules, result: Comparison::default() };
    let mut ports: HashSet<u32> = HashSet::default();
    tables.frontends.rows().for_each(&mut |key, row| {
        ports.insert(row.service_id);
        work.frontend(key, &row);
    });
    let mut others: HashSet<&str> = HashSet::default();
    for (key, row) in &rules.rows {
        if tables.frontends.applied(*key).is_none() {
            others.insert(&row.label);
            work.only_in_rules(*key, row, bound);
        }
    }
    work.result.service_ports = ports.len() + others.len();
    work.result
}

struct Work<'a> {
    tables: &'a Tables,
    rules: &'a Rules,
    result: Comparison,
}

impl Work<'_> {
    fn frontend(&mut self, key: FrontendKey, row: &Frontend) {
        let name = self.name(row.service_id);
        let (inside, outside) = (self.answer(row, &row.inside), self.answer(row, &row.outside));
        let Some(theirs) = self.rules.rows.get(&key) else {
            let text = format!("no rule answers here; kubelane {}", says(Some(&inside)));
            return self.add(key, Side::All, Kind::OnlyInKubelane, &name, What::Text(text));
        };
        let outside = (row.flags & EXTERNAL != 0).then_some(outside);
        let of_inside = self.differs(&inside, theirs.inside.as_ref());
        let of_outside = outside.and_then(|outside| self.differs(&outside, theirs.outside.as_ref()));
        let is_both = of_inside == of_outside;
        let is_cluster_ip = row.flags & EXTERNAL == 0;
        if let Some((mut kind, mut what)) = of_inside {
            if self.rules.is_blind() && !is_cluster_ip && of_outside.is_none() {
                (kind, what) = (Kind::Known, What::Text(IPVS_INSIDE.to_owned()));
            }
            let side = if is_both || is_cluster_ip { Side::All } else { Side::Inside };
            self.add(key, side, kind, &name, what);
        }
        if let Some((kind, what)) = of_outside.filter(|_| !is_both) {
            self.add(key, Side::Outside, kind, &name, what);
        }
        let may_remember =
            [&theirs.inside, &theirs.outside].into_iter().any(|a| matches!(a, Some(Answer::Endpoints(_))));
        if let Some(what) = affinity(row.affinity_seconds, theirs).filter(|_| may_remember) {
            self.add(key, Side::All, Kind::Affinity, &name, What::Text(what));
        }
        let is_other_port =
            |answer: &Answer| matches!(answer, Answer::Endpoints(all) if all.iter().any(|at| at.port != key.port()));
        if key.protocol == Protocol::Sctp as u8 && is_other_port(&inside) {
            self.add(key, Side::All, Kind::Known, &name, What::Text(SCTP.to_owned()));
        }
    }

    fn only_in_rules(&mut self, key: FrontendKey, row: &Row, bound: &[Ipx]) {
        let name = if row.label.is_empty() { "(no name)" } else { &row.label };
        let (kind, text) = match bound.contains(&key.ip()) {
            true => (Kind::Known, BOUND.to_owned()),
            false => {
                let answer = row.inside.as_ref().or(row.outside.as_ref());
                (Kind::OnlyInRules, format!("kubelane has no such Service port; the rules {}", say(answer)))
            }
        };
        self.add(key, Side::All, kind, name, What::Text(text));
    }

    fn differs(&self, ours: &Answer, theirs: Option<&Answer>) -> Option<(Kind, What)> {
        match (ours, theirs) {
            (_, Some(Answer::Unknown)) => None,
            (ours, Some(theirs)) if ours == theirs => None,
            (Answer::Endpoints(ours), Some(Answer::Endpoints(theirs))) => {
                let (rules, kubelane) = (missing(theirs, ours), missing(ours, theirs));
                Some((Kind::Endpoints, What::Endpoints { rules, kubelane }))
            }
            (Answer::Dropped, Some(Answer::Refused)) if self.rules.is_blind() => {
                Some((Kind::Known, What::Text(IPVS_EMPTY.to_owned())))
            }
            (ours, theirs) => {
                let text = format!("the rules {}; kubelane {}", say(theirs), says(Some(ours)));
                Some((Kind::Verdict, What::Text(text)))
            }
        }
    }

    fn add(&mut self, at: FrontendKey, side: Side, kind: Kind, name: &str, what: What) {
        self.result.differences.insert(Key { at, side, kind }, Difference { name: name.to_owned(), what });
    }

    fn name(&self, service_id: u32) -> String {
        self.tables.services.applied(service_id).map_or_else(|| "-/-".to_owned(), |name| name.as_str().to_owned())
    }

    fn answer(&self, row: &Frontend, pool: &Pool) -> Answer {
        let backend = |slot: u32| {
            let id = self.tables.slots.applied(pool.base.wrapping_add(slot))?;
            self.tables.backends.applied(id).filter(|b| b.service_id == row.service_id && !is_gone(b))
        };
        let at = |slot| backend(slot).map(|b| SocketAddrx { ip: Ipx(b.address), port: u16::from_be_bytes(b.port_be) });
        let mut endpoints: Vec<SocketAddrx> = (0..pool.count).filter_map(at).collect();
        endpoints.sort_unstable();
        endpoints.dedup();
        match (endpoints.is_empty(), u32::from(pool.on_empty) == EMPTY_DROP) {
            (false, _) => Answer::Endpoints(endpoints),
            (true, true) => Answer::Dropped,
            (true, false) => Answer::Refused,
        }
    }
}

/// What `all` has and `other` does not; both are sorted.
fn missing(all: &[SocketAddrx], other: &[SocketAddrx]) -> Vec<SocketAddrx> {
    all.iter().filter(|at| other.binary_search(at).is_err()).copied().collect()
}

fn affinity(ours: u32, theirs: &Row) -> Option<String> {
    let same = match theirs.affinity {
        Affinity::Seconds(seconds) => seconds == ours,
        Affinity::Jiffies(jiffies) => ours > 0 && HERTZ.iter().any(|hz| hz * u64::from(ours) == u64::from(jiffies)),
    };
    let words = |seconds| if seconds == 0 { "none".to_owned() } else { format!("{seconds} s") };
    let rules = match theirs.affinity {
        Affinity::Seconds(seconds) => words(seconds),
        Affinity::Jiffies(jiffies) => format!("{jiffies} jiffies"),
    };
    (!same).then(|| format!("session affinity: {rules} in the rules, {} in kubelane", words(ours)))
}

/// After "kubelane".
fn says(answer: Option<&Answer>) -> String {
    match answer {
        Some(Answer::Endpoints(all)) => format!("has the endpoints {}", list(all)),
        Some(Answer::Refused) => "refuses".to_owned(),
        Some(Answer::Dropped) => "drops".to_owned(),
        Some(Answer::Unknown) => "is not understood".to_owned(),
        None => "does nothing".to_owned(),
    }
}

/// After "the rules".
fn say(answer: Option<&Answer>) -> String {
    match answer {
        Some(Answer::Endpoints(all)) => format!("have the endpoints {}", list(all)),
        Some(Answer::Refused) => "refuse".to_owned(),
        Some(Answer::Dropped) => "drop".to_owned(),
        Some(Answer::Unknown) => "are not understood".to_owned(),
        None => "do nothing".to_owned(),
    }
}

fn list(endpoints: &[SocketAddrx]) -> String {
    let mut text: Vec<String> = endpoints.iter().take(SHOWN_MAX).map(ToString::to_string).collect();
    if endpoints.len() > SHOWN_MAX {
        text.push(format!("and {} more", endpoints.len() - SHOWN_MAX));
    }
    text.join(", ")
}
