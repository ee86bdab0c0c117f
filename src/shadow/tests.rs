//! Texts of tools, and what they come to.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::compare::{Comparison, Difference, Key, Kind, Side, What};
use super::listed::shown;
use super::{Affinity, Answer, Ledger, Rules, iptables, nftables};
use crate::abi::FrontendKey;
use crate::model::{Family, Protocol};

fn from_iptables(text: &str) -> Rules {
    iptables::parse(&mut text.as_bytes(), Family::Ipv4).unwrap()
}

/// "destination: inside / outside, affinity", sorted.
fn lines(rules: &Rules) -> Vec<String> {
    let answer = |answer: &Option<Answer>| match answer {
        Some(Answer::Endpoints(all)) => all.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "),
        other => format!("{other:?}"),
    };
    let mut lines: Vec<String> = Vec::new();
    for (key, row) in &rules.rows {
        let mut line = format!("{} {}: {}", row.label, shown(key), answer(&row.inside));
        if row.inside != row.outside {
            write!(line, " / {}", answer(&row.outside)).unwrap();
        }
        if row.affinity != Affinity::Seconds(0) {
            write!(line, ", {:?}", row.affinity).unwrap();
        }
        lines.push(line);
    }
    lines.sort();
    lines
}

/// `rules` in the table nat, after the jump from the kernel's hook.
fn nat(rules: &str) -> String {
    format!("*nat\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -j KUBE-SERVICES\n{rules}\nCOMMIT\n")
}

#[test]
fn comments_are_whatever_somebody_wrote() {
    let hostile = r#"-A KUBE-SERVICES -d 10.96.0.1/32 -p tcp -m comment --comment "a\" -d 10.9.9.9/32 -j DROP \\" -m tcp --dport 80 -j KUBE-SVC-A
-A KUBE-SVC-A -m comment --comment "-j DROP" -j KUBE-SEP-A
-A KUBE-SEP-A -s 10.1.1.1/32 -m comment --comment -j -j KUBE-MARK-MASQ
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-SEP-A -p tcp -m tcp -j DNAT --to-destination 10.1.1.1:8080"#;
    let rules = from_iptables(&nat(hostile));
    assert_eq!(lines(&rules), ["a\\\" 10.96.0.1:80/TCP: 10.1.1.1:8080"]);
    let odd = from_iptables(&nat("-A KUBE-SERVICES -m mark --mark 0x1 -m comment --comment \"\u{1b}[31m\" -j KUBE-X"));
    let remark = odd.remarks.first().unwrap();
    assert!(remark.contains("\\u001b[31m") && !remark.contains('\u{1b}'), "{remark}");
}

#[test]
fn what_no_packet_meets_is_none() {
    let unused = "*nat\n-A KUBE-SERVICES -d 10.96.0.1/32 -p tcp -m tcp --dport 80 -j KUBE-SVC-A\nCOMMIT\n";
    assert_eq!(lines(&from_iptables(unused)).len(), 0);
}

#[test]
fn a_chain_that_lets_packets_through_or_never_ends_is_not_guessed() {
    let service = "-A KUBE-SERVICES -d 10.96.0.1/32 -p tcp -m tcp --dport 80 -j KUBE-SVC-A\n";
    let table = [
        ("by chance", "-A KUBE-SVC-A -m statistic --mode random --probability 0.5 -j KUBE-SEP-A"),
        ("a condition", "-A KUBE-SVC-A -m mark --mark 0x1 -j KUBE-SEP-A"),
        ("a target", "-A KUBE-SVC-A -j KUBE-SEP-A\n-A KUBE-SVC-A -j TPROXY"),
        ("a range of addresses", "-A KUBE-SVC-A -j DNAT --to-destination 10.1.1.1-10.1.1.9:80"),
        ("itself", "-A KUBE-SVC-A -m mark --mark 0x1 -j KUBE-SVC-A\n-A KUBE-SVC-A -j KUBE-SVC-A"),
    ];
    for (name, rules) in table {
        let text = nat(&format!("{service}{rules}\n-A KUBE-SEP-A -p tcp -j DNAT --to-destination 10.1.1.1:80"));
        let rules = from_iptables(&text);
        let found = lines(&rules);
        // What comes after a sure target does not matter.
        let expected = if name == "a target" { "10.1.1.1:80" } else { "Some(Unknown)" };
        assert_eq!(found, [format!(" 10.96.0.1:80/TCP: {expected}")], "{name}");
        assert_eq!(rules.remarks.len(), usize::from(name != "a target"), "{name}: {:?}", rules.remarks);
    }
}

#[test]
fn ranges_admit_clients_also_where_the_others_are_marked_to_be_dropped() {
    // As kube-proxy wrote them until 1.25.
    let rules = from_iptables(&nat("-A KUBE-SERVICES -d 192.0.2.1/32 -p tcp -m tcp --dport 80 -j KUBE-FW-A\n\
         -A KUBE-FW-A -j KUBE-MARK-MASQ\n-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000\n\
         -A KUBE-FW-A -s 172.31.0.0/24 -j KUBE-SVC-A\n-A KUBE-FW-A -s 172.31.1.0/24 -j KUBE-SVC-A\n\
         -A KUBE-FW-A -j KUBE-MARK-DROP\n-A KUBE-MARK-DROP -j MARK --set-xmark 0x8000/0x8000\n\
         -A KUBE-SVC-A -p tcp -j DNAT --to-destination 10.1.1.1:80"));
    assert_eq!(lines(&rules), [" 192.0.2.1:80/TCP: 10.1.1.1:80"]);
}

#[test]
fn rules_of_ipvs_mode_are_no_services_of_iptables_mode() {
    let rules = from_iptables(&nat(
        "-A KUBE-SERVICES -m comment --comment \"Kubernetes service cluster ip + port for masquerade purpose\" -m set \
         --match-set KUBE-CLUSTER-IP src,dst -j KUBE-MARK-MASQ\n\
         -A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODE-PORT\n\
         -A KUBE-SERVICES -m set --match-set KUBE-CLUSTER-IP dst,dst -j ACCEPT\n\
         -A KUBE-NODE-PORT -p tcp -m set --match-set KUBE-NODE-PORT-TCP dst -j KUBE-MARK-MASQ",
    ));
    assert!(rules.rows.is_empty() && rules.remarks.is_empty(), "{rules:?}");
}

#[test]
fn elements_with_comments_and_chains_of_endpoints_are_read() {
    // As kube-proxy 1.31 wrote them: a chain for each endpoint, and addresses of which some have a comment.
    let text = r#"{"nftables": [{"metainfo": {"version": "1.1.0"}},
        {"map": {"name": "service-ips", "elem": [
            [{"elem": {"val": {"concat": ["10.96.0.1", "tcp", 80]}, "comment": "x"}}, {"goto": {"target": "service-AAAA-ns/a/tcp/p"}}],
            [{"concat": ["10.96.0.2", 132, 80]}, {"goto": {"target": "service-BBBB-ns/b/sctp/"}}]]}},
        {"chain": {"name": "nat-prerouting", "type": "nat", "hook": "prerouting"}},
        {"rule": {"chain": "nat-prerouting", "expr": [{"jump": {"target": "services"}}]}},
        {"rule": {"chain": "services", "expr": [{"vmap": {"key": {"concat": [{"payload": {"protocol": "ip", "field": "daddr"}},
            {"meta": {"key": "l4proto"}}, {"payload": {"protocol": "th", "field": "dport"}}]}, "data": "@service-ips"}}]}},
        {"rule": {"chain": "service-AAAA-ns/a/tcp/p", "expr": [{"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "daddr"}}, "right": "10.96.0.1"}},
            {"jump": {"target": "mark-for-masquerade"}}]}},
        {"rule": {"chain": "service-AAAA-ns/a/tcp/p", "expr": [{"vmap": {"key": {"numgen": {"mode": "random", "mod": 2}},
            "data": {"set": [[0, {"goto": {"target": "endpoint-1"}}], [1, {"goto": {"target": "endpoint-2"}}]]}}}]}},
        {"rule": {"chain": "service-BBBB-ns/b/sctp/", "expr": [{"goto": {"target": "endpoint-1"}}, {"unheard": {}}]}},
        {"rule": {"chain": "endpoint-1", "expr": [{"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "saddr"}}, "right": "10.1.1.1"}},
            {"jump": {"target": "mark-for-masquerade"}}]}},
        {"rule": {"chain": "endpoint-1", "expr": [{"match": {"op": "==", "left": {"meta": {"key": "l4proto"}}, "right": "tcp"}}, {"dnat": {"addr": "10.1.1.1", "port": 80}}]}},
        {"rule": {"chain": "endpoint-2", "expr": [{"dnat": {"addr": "10.1.1.2", "port": 80}}]}},
        {"rule": {"chain": "mark-for-masquerade", "expr": [{"mangle": {"key": {"meta": {"key": "mark"}}, "value": 1}}]}}]}"#;
    let rules = nftables::parse(&mut text.as_bytes(), Family::Ipv4).unwrap();
    let expected = ["ns/a:p 10.96.0.1:80/TCP: 10.1.1.1:80 10.1.1.2:80", "ns/b 10.96.0.2:80/SCTP: Some(Unknown)"];
    assert_eq!(lines(&rules), expected);
    for odd in ["", "[]", "{\"nftables\": 3}", "{\"nftables\": [{\"rule\": 3}]}"] {
        assert!(nftables::parse(&mut odd.as_bytes(), Family::Ipv4).is_err(), "{odd}");
    }
}

fn found(what: &[(&str, What)]) -> Comparison {
    let difference = |(ip, what): &(&str, What)| {
        let at = FrontendKey::new(ip.parse().unwrap(), 80, Protocol::Tcp);
        let kind = if matches!(what, What::Text(_)) { Kind::Verdict } else { Kind::Endpoints };
        (Key { at, side: Side::All, kind }, Difference { name: format!("ns/{ip}"), what: what.clone() })
    };
    Comparison { service_ports: 3, differences: what.iter().map(difference).collect::<BTreeMap<_, _>>() }
}

fn endpoints(rules: &[&str]) -> What {
    let at = |text: &&str| {
        let at: std::net::SocketAddr = text.parse().unwrap();
        crate::model::SocketAddrx { ip: at.ip().into(), port: at.port() }
    };
    What::Endpoints { rules: rules.iter().map(at).collect(), kubelane: Vec::new() }
}

#[test]
fn only_what_two_comparisons_find_counts() {
    let mut ledger = Ledger::default();
    let lasting = ("10.96.0.1", What::Text("x".to_owned()));
    let news = ledger.take(found(&[lasting.clone(), ("10.96.0.2", endpoints(&["10.1.1.1:80", "10.1.1.2:80"]))]));
    assert!(news.begun.is_empty() && news.is_open && ledger.service_ports() == 0);
    let news = ledger.take(found(&[lasting.clone(), ("10.96.0.2", endpoints(&["10.1.1.2:80", "10.1.1.3:80"]))]));
    assert_eq!(news.begun.len(), 2);
    assert_eq!(news.begun[1].1.text(), "endpoints only in the rules: 10.1.1.2:80");
    assert!(!news.is_open && ledger.service_ports() == 2);
    // All endpoints are others: it is late, and that is all.
    let news = ledger.take(found(&[lasting.clone(), ("10.96.0.2", endpoints(&["10.1.1.4:80"]))]));
    assert_eq!((news.begun.len(), news.over.len(), news.is_open), (0, 1, true));
    let news = ledger.take(found(&[]));
    assert_eq!((news.begun.len(), news.over.len(), news.is_open), (0, 1, false));
    assert_eq!(ledger.counts().iter().map(|(_, count)| count).sum::<usize>(), 0);
}

const UNBOUND: &[crate::model::Ipx] = &[];

/// Kubelane's rows of one Service with a NodePort, external policy Local, affinity of 60 s, and an endpoint on another node;
/// its cluster IP is 10.96.0.`number`.
fn core_with(number: u8, protocol: Protocol) -> crate::sync::Core {
    use crate::model::{Change, Endpoint, Kind, ObjectName, Service, ServicePort, Slice, SlicePort, TrafficPolicy};
    let mut core =
        crate::sync::Core::new(crate::sync::CoreSettings { node_name: "node-a".into(), ..Default::default() });
    let service = Service {
        name: ObjectName::new("ns", "a"),
        created: 1,
        cluster_ips: vec![format!("10.96.0.{number}").parse().unwrap()],
        external_ips: vec![],
        load_balancer_ips: vec![],
        ports: vec![ServicePort { name: "p".into(), protocol, port: 80, node_port: 30_001 }],
        affinity_seconds: Some(60),
        internal_policy: TrafficPolicy::Cluster,
        external_policy: TrafficPolicy::Local,
        source_ranges: vec![],
        health_check_node_port: 0,
        client_source: None,
    };
    let end = Endpoint {
        ip: "10.244.2.1".parse().unwrap(),
        ready: true,
        serving: true,
        terminating: false,
        node: Some("node-b".into()),
        hints: None,
    };
    let slice = Slice {
        name: ObjectName::new("ns", "a-1"),
        service: "a".into(),
        is_controlled: false,
        ports: vec![SlicePort { name: "p".into(), protocol, port: 8080 }],
        endpoints: vec![end],
        triggered: None,
    };
    for kind in [Kind::Services, Kind::EndpointSlices] {
        core.apply(Change::ListBegin(kind));
    }
    core.apply(Change::Service(Box::new(service)));
    core.apply(Change::Slice(Box::new(slice)));
    for kind in [Kind::Services, Kind::EndpointSlices] {
        core.apply(Change::ListEnd(kind));
    }
    core.sync(&mut super::Nowhere { capacity: crate::bpf::rows_at_most(100, 1000, 100) }, std::time::Instant::now());
    core
}

fn compared(core: &crate::sync::Core, rules: &Rules, bound: &[crate::model::Ipx]) -> Vec<String> {
    let comparison = super::compare(core.tables(), rules, bound);
    let line = |(key, difference): (&Key, &Difference)| {
        format!("{:?} {}: {}", key.kind, Difference::destination(key), difference.text())
    };
    comparison.differences.iter().map(line).collect()
}

#[test]
fn what_ipvs_cannot_do_is_known() {
    let core = core_with(1, Protocol::Tcp);
    let text = "TCP  0A600001:0050 rr persistent 15000 FFFFFFFF\n  -> 0AF40201:1F90      Masq    1      0          0\n\
                TCP  AC1F000B:7531 rr persistent 60000 FFFFFFFF\n";
    let node = ["172.31.0.11".parse().unwrap()];
    let rules = super::ipvs::parse(&mut text.as_bytes(), &node).unwrap();
    let expected = [
        "Verdict NodePort 30001/TCP (IPv4) for clients on the node: the rules refuse; kubelane has the endpoints \
         10.244.2.1:8080",
        "Known NodePort 30001/TCP (IPv4) for clients outside: IPVS refuses where the other modes of kube-proxy drop",
    ];
    assert_eq!(compared(&core, &rules, UNBOUND), expected);
    let other = text.replace("15000", "7000");
    let rules = super::ipvs::parse(&mut other.as_bytes(), &node).unwrap();
    let found = compared(&core, &rules, UNBOUND);
    assert!(
        found.contains(
            &"Affinity 10.96.0.1:80/TCP: session affinity: 7000 jiffies in the rules, 60 s in kubelane".to_owned()
        ),
        "{found:?}"
    );
}

#[test]
fn bound_cluster_ips_and_ports_of_sctp_are_known() {
    let core = core_with(1, Protocol::Sctp);
    let rules = from_iptables(&nat("-A KUBE-SERVICES -d 10.96.0.1/32 -p sctp -m sctp --dport 80 -j KUBE-SVC-A\n\
         -A KUBE-SERVICES -d 10.96.0.9/32 -p tcp -m tcp --dport 80 -j KUBE-SVC-A\n\
         -A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\n\
         -A KUBE-SVC-A -m recent --rcheck --seconds 60 --reap --name A -j KUBE-SEP-A\n-A KUBE-SVC-A -j KUBE-SEP-A\n\
         -A KUBE-SEP-A -m recent --set --name A -p sctp -j DNAT --to-destination 10.244.2.1:8080"));
    let found = compared(&core, &rules, &["10.96.0.9".parse().unwrap()]);
    let known: Vec<&str> = found.iter().filter_map(|line| line.strip_prefix("Known ")).collect();
    assert_eq!(known.len(), 2, "{found:?}");
    assert!(known[0].starts_with("10.96.0.1:80/SCTP: SCTP is served only"), "{found:?}");
    assert!(known[1].starts_with("10.96.0.9:80/TCP: the cluster IP is bound"), "{found:?}");
    assert!(found.iter().any(|line| line.starts_with("OnlyInKubelane NodePort 30001/SCTP")), "{found:?}");
}
