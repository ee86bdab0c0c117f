//! kube-proxy's part of a packet filter, as `iptables-save` shows it, and what takes it away. By the same lists as
//! `kube-proxy --cleanup` (pkg/proxy/iptables/cleanup.go, and ipvs/): its chains by their names, and its jumps to them.

use std::collections::BTreeSet;

/// By table.
const CHAINS: [(&str, &[&str]); 3] = [
    (
        "nat",
        &[
            "KUBE-SERVICES",
            "KUBE-NODEPORTS",
            "KUBE-POSTROUTING",
            "KUBE-MARK-MASQ",
            "KUBE-PROXY-CANARY",
            "KUBE-LOAD-BALANCER",
            "KUBE-NODE-PORT",
        ],
    ),
    (
        "filter",
        &[
            "KUBE-SERVICES",
            "KUBE-EXTERNAL-SERVICES",
            "KUBE-FORWARD",
            "KUBE-NODEPORTS",
            "KUBE-PROXY-FIREWALL",
            "KUBE-PROXY-CANARY",
            "KUBE-NODE-PORT",
            "KUBE-SOURCE-RANGES-FIREWALL",
            "KUBE-IPVS-FILTER",
            "KUBE-IPVS-OUT-FILTER",
        ],
    ),
    ("mangle", &["KUBE-PROXY-CANARY"]),
];
/// Of Services and endpoints, in the table nat.
const PREFIXES: [&str; 6] = ["KUBE-SVC-", "KUBE-SVL-", "KUBE-SEP-", "KUBE-FW-", "KUBE-EXT-", "KUBE-XLB-"];
const BUILT_IN: [&str; 5] = ["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"];

/// What is to be given to `iptables-restore --noflush`.
#[derive(Debug, PartialEq, Eq)]
pub struct Removal {
    pub script: String,
    /// Chains that go.
    pub chains: usize,
    /// Chains that are emptied only, since somebody else's rules lead to them: "nat KUBE-MARK-MASQ".
    pub kept: Vec<String>,
}

/// `saved`: all tables. `None`: nothing of kube-proxy's is there.
pub fn removal(saved: &str) -> Option<Removal> {
    let mut removal = Removal { script: String::new(), chains: 0, kept: Vec::new() };
    let mut table = Table::default();
    for line in saved.lines() {
        if let Some(name) = line.strip_prefix('*') {
            table = Table { name, ..Table::default() };
        } else if let Some(chain) = line.strip_prefix(':').and_then(|rest| rest.split(' ').next()) {
            table.own.extend(is_kube_proxys(table.name, chain).then_some(chain));
        } else if let Some(rule) = line.strip_prefix("-A ") {
            table.rules.push(rule);
        } else if line == "COMMIT" {
            std::mem::take(&mut table).remove_from(&mut removal);
        }
    }
    (!removal.script.is_empty()).then_some(removal)
}

fn is_kube_proxys(table: &str, chain: &str) -> bool {
    let is_listed = CHAINS.iter().any(|(name, chains)| *name == table && chains.contains(&chain));
    is_listed || (table == "nat" && PREFIXES.iter().any(|prefix| chain.starts_with(prefix)))
}

#[derive(Default)]
struct Table<'s> {
    name: &'s str,
    own: BTreeSet<&'s str>,
    rules: Vec<&'s str>,
}

impl Table<'_> {
    fn remove_from(self, removal: &mut Removal) {
        let (mut jumps, mut referred) = (Vec::new(), BTreeSet::new());
        for rule in &self.rules {
            let source = rule.split(' ').next().unwrap_or_default();
            let target = target_of(rule).filter(|target| self.own.contains(target) && !self.own.contains(source));
            match target {
                Some(_) if is_plain_jump(rule) => jumps.push(*rule),
                Some(target) => drop(referred.insert(target)),
                None => {}
            }
        }
        if self.own.is_empty() {
            return;
        }
        let script = &mut removal.script;
        script.extend(["*", self.name, "\n"]);
        // A chain that is declared is emptied.
        script.extend(self.own.iter().map(|chain| format!(":{chain} - [0:0]\n")));
        script.extend(jumps.iter().map(|rule| format!("-D {rule}\n")));
        let going = self.own.iter().filter(|chain| !referred.contains(*chain));
        script.extend(going.clone().map(|chain| format!("-X {chain}\n")));
        script.push_str("COMMIT\n");
        removal.chains += going.count();
        removal.kept.extend(referred.iter().map(|chain| format!("{} {chain}", self.name)));
    }
}

/// Of `-j` or `-g`, outside of quotes: comments say what their authors like.
fn target_of(rule: &str) -> Option<&str> {
    let mut words = words(rule);
    words.find(|word| ["-j", "-g"].contains(word)).and_then(|_| words.next())
}

/// From a built-in chain, for all packets or for those that begin a connection: as kube-proxy makes them.
fn is_plain_jump(rule: &str) -> bool {
    let mut words = words(rule);
    if !words.next().is_some_and(|source| BUILT_IN.contains(&source)) {
        return false;
    }
    let mut rest: Vec<&str> = words.collect();
    for known in [&["-m", "conntrack", "--ctstate", "NEW"][..], &["-m", "comment", "--comment"]] {
        if let Some(at) = rest.windows(known.len()).position(|window| window == known) {
            // A comment has one word more.
            let length = known.len() + usize::from(known[1] == "comment");
            rest.drain(at..(at + length).min(rest.len()));
        }
    }
    matches!(rest.as_slice(), ["-j", _])
}

/// As a shell splits them: what is in quotes is one word.
fn words(rule: &str) -> impl Iterator<Item = &str> {
    let mut rest = rule;
    std::iter::from_fn(move || {
        rest = rest.trim_start();
        if rest.is_empty() {
            return None;
        }
        let (mut is_quoted, mut is_escaped) = (false, false);
        let end = rest.find(|letter| {
            let ends = letter == ' ' && !is_quoted;
            is_quoted ^= letter == '"' && !is_escaped;
            is_escaped = letter == '\\' && !is_escaped;
            ends
        });
        let (word, after) = rest.split_at(end.unwrap_or(rest.len()));
        rest = after;
        Some(word)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAVED: &str = r#"# Generated by iptables-save
*mangle
:PREROUTING ACCEPT [0:0]
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-PROXY-CANARY - [0:0]
COMMIT
*nat
:PREROUTING ACCEPT [1:60]
:POSTROUTING ACCEPT [0:0]
:CNI-HOSTPORT - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-SVC-ABC - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A PREROUTING -j CNI-HOSTPORT
-A CNI-HOSTPORT -p tcp -m comment --comment "says \" -j KUBE-SERVICES" -j DNAT --to-destination 10.0.0.1:80
-A CNI-HOSTPORT -p udp -j KUBE-MARK-MASQ
-A KUBE-SERVICES -d 10.96.0.1/32 -p tcp -j KUBE-SVC-ABC
COMMIT
*filter
:FORWARD ACCEPT [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-FORWARD - [0:0]
-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-A FORWARD -s 10.0.0.0/8 -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes" -j KUBE-FORWARD
COMMIT
"#;

    #[test]
    fn what_is_kube_proxys_goes_and_what_others_have_stays() {
        let removal = removal(SAVED).unwrap();
        let script = r#"*mangle
:KUBE-PROXY-CANARY - [0:0]
-X KUBE-PROXY-CANARY
COMMIT
*nat
:KUBE-MARK-MASQ - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-SVC-ABC - [0:0]
-D PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-X KUBE-SERVICES
-X KUBE-SVC-ABC
COMMIT
*filter
:KUBE-FORWARD - [0:0]
-D FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-D FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes" -j KUBE-FORWARD
COMMIT
"#;
        assert_eq!(removal.script, script);
        assert_eq!(
            (removal.chains, removal.kept),
            (3, vec!["nat KUBE-MARK-MASQ".into(), "filter KUBE-FORWARD".into()])
        );
        assert_eq!(super::removal("*nat\n:PREROUTING ACCEPT [0:0]\nCOMMIT\n"), None);
    }
}
