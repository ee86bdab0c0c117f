//! Signs that a run measured something else than its path: retransmissions, timeouts, refused or lost packets.

use std::collections::BTreeMap;
use std::fs;

use anyhow::Context as _;

/// Counters of /proc/net/netstat and /proc/net/snmp that stand still in a good run.
const SIGNS: [&str; 7] = [
    "TcpExt:TCPSynRetrans",
    "TcpExt:TCPTimeouts",
    "TcpExt:ListenOverflows",
    "TcpExt:ListenDrops",
    "Tcp:RetransSegs",
    "Tcp:AttemptFails",
    "Udp:RcvbufErrors",
];

/// The counters, of one namespace or the sum of several.
pub struct Trouble(BTreeMap<String, u64>);

impl Trouble {
    /// The counters of the calling thread's namespace.
    pub fn read() -> anyhow::Result<Trouble> {
        let mut counters = BTreeMap::new();
        for file in ["netstat", "snmp"] {
            let path = format!("/proc/thread-self/net/{file}");
            let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
            // Pairs of lines: names, then values, both behind the group's name.
            let lines: Vec<&str> = text.lines().collect();
            for pair in lines.chunks_exact(2) {
                let Some((group, names)) = pair[0].split_once(' ') else { continue };
                let values = pair[1].split(' ').skip(1);
                for (name, value) in names.split(' ').zip(values) {
                    counters.insert(format!("{group}{name}"), value.parse().unwrap_or(0));
                }
            }
        }
        Ok(Trouble(counters))
    }

    /// The sum of both.
    pub fn and(mut self, other: Trouble) -> Trouble {
        for (name, value) in other.0 {
            *self.0.entry(name).or_default() += value;
        }
        self
    }

    /// What moved since `earlier`, apart from what is `no_trouble`; `None` when nothing did.
    pub fn since(&self, earlier: &Trouble, no_trouble: &[&str]) -> Option<String> {
        let count = |of: &Trouble, name: &str| of.0.get(name).copied().unwrap_or(0);
        let moved = SIGNS.iter().filter(|name| !no_trouble.contains(name)).filter_map(|name| {
            let more = count(self, name).saturating_sub(count(earlier, name));
            (more > 0).then(|| format!("{name} +{more}"))
        });
        let moved: Vec<String> = moved.collect();
        (!moved.is_empty()).then(|| moved.join(", "))
    }
}
