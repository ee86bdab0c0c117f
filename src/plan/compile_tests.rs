//! What a Service asks for, rule by rule.

use std::sync::Arc;

use super::*;
use crate::abi::address_flag;
use crate::model::{Endpoint, ObjectName, SlicePort};
use crate::plan::quotas::{Resource, UNLIMITED};

const DROP: u8 = EMPTY_DROP as u8;
const REFUSE: u8 = EMPTY_REFUSE as u8;
const CLUSTER: u8 = POOL_CLUSTER as u8;
const LOCAL: u8 = POOL_LOCAL as u8;

fn ip(text: &str) -> Ipx {
    text.parse().unwrap()
}

fn port(name: &str, protocol: Protocol, number: u16) -> ServicePort {
    ServicePort { name: name.into(), protocol, port: number, node_port: 0 }
}

fn service() -> Service {
    Service {
        name: ObjectName::new("default", "web"),
        created: 7,
        cluster_ips: vec![ip("10.96.0.1")],
        external_ips: vec![],
        load_balancer_ips: vec![],
        ports: vec![port("http", Protocol::Tcp, 80)],
        affinity_seconds: None,
        internal_policy: TrafficPolicy::Cluster,
        external_policy: TrafficPolicy::Cluster,
        source_ranges: vec![],
        health_check_node_port: 0,
        client_source: None,
    }
}

/// Endpoints as "10.1.0.1", "@" behind it for this node, "!" for unready, "?" for terminating.
fn slice(ports: &[(&str, Protocol, u16)], endpoints: &str) -> Slice {
    let endpoint = |text: &str| Endpoint {
        ip: ip(text.trim_end_matches(['@', '!', '?'])),
        ready: !text.contains(['!', '?']),
        serving: !text.contains('!'),
        terminating: text.contains('?'),
        node: Some(if text.contains('@') { "here" } else { "there" }.into()),
        hints: None,
    };
    let port = |(name, protocol, port): &(&str, Protocol, u16)| SlicePort {
        name: Arc::from(*name),
        protocol: *protocol,
        port: *port,
    };
    Slice {
        name: ObjectName::new("default", "web-1"),
        service: "web".into(),
        is_controlled: false,
        ports: ports.iter().map(port).collect(),
        endpoints: endpoints.split_whitespace().map(endpoint).collect(),
        triggered: None,
    }
}

fn http(endpoints: &str) -> Slice {
    slice(&[("http", Protocol::Tcp, 8080)], endpoints)
}

fn run(service: &Service, slices: &[Slice]) -> Compiled {
    run_bound(service, slices, &[])
}

fn run_bound(service: &Service, slices: &[Slice], bound: &[&str]) -> Compiled {
    let bound = bound.iter().map(|a| ip(a)).collect();
    run_within(service, slices, &bound, UNLIMITED)
}

/// Of a node that says nothing special.
fn context<'a>() -> Context<'a> {
    static NONE: std::sync::LazyLock<HashSet<Ipx>> = std::sync::LazyLock::new(HashSet::default);
    Context {
        place: Place { node: "here", zone: None },
        bound: &NONE,
        limits: UNLIMITED,
        masquerade: Masquerade::default(),
        internal_ips: &[],
    }
}

fn run_in(service: &Service, slices: &[Slice], context: Context) -> Compiled {
    compile(service, &slices.iter().collect::<Vec<_>>(), context)
}

#[test]
fn clients_are_hidden_where_the_service_or_the_node_says_so_and_the_policy_allows() {
    use crate::model::ClientSource::{Client, Node};
    let slices = [http("10.1.0.1")];
    let hidden = |service: &Service, masquerade: Masquerade| -> Vec<u32> {
        let compiled = run_in(service, &slices, Context { masquerade, ..context() });
        let frontends = compiled.ports.iter().flat_map(|port| &port.frontends);
        let hidden = frontends.filter(|f| u32::from(f.flags) & FRONTEND_SOURCE_NODE != 0);
        hidden.map(|f| u32::from(f.flags) & !FRONTEND_SOURCE_NODE).collect()
    };
    let mut all = service();
    all.external_ips = vec![ip("192.0.2.1")];
    all.load_balancer_ips = vec![ip("192.0.2.2")];
    all.ports[0].node_port = 30_080;
    let external = [FRONTEND_NODE_PORT, FRONTEND_EXTERNAL_IP, FRONTEND_LOAD_BALANCER];
    let (none, node) = (Masquerade::default(), Masquerade { external: Node, all: false });
    let sorted = |mut flags: Vec<u32>| {
        flags.sort_unstable();
        flags
    };
    let expected = sorted(external.to_vec());
    assert!(hidden(&all, none).is_empty());
    assert_eq!(sorted(hidden(&all, node)), expected);
    let own = |client_source| Service { client_source: Some(client_source), ..all.clone() };
    assert!(hidden(&own(Client), node).is_empty());
    assert_eq!(sorted(hidden(&own(Node), none)), expected);
    let local = Service { external_policy: TrafficPolicy::Local, ..own(Node) };
    assert!(hidden(&local, node).is_empty(), "policy Local keeps the client");
    assert_eq!(hidden(&local, Masquerade { all: true, ..none }), [FRONTEND_CLUSTER_IP]);
}

#[test]
fn the_nodes_own_processes_are_admitted_where_a_range_holds_its_address() {
    let mut balanced = service();
    balanced.load_balancer_ips = vec![ip("192.0.2.2")];
    balanced.source_ranges = vec![IpRange { ip: ip("172.31.0.0"), prefix: 24 }];
    for (own, expected) in [("172.31.0.11", FRONTEND_NODE_ADMITTED), ("172.31.1.11", 0), ("fd31::11", 0)] {
        let own = [ip(own)];
        let compiled = run_in(&balanced, &[http("10.1.0.1")], Context { internal_ips: &own, ..context() });
        let mut frontends = compiled.ports[0].frontends.iter();
        let balanced = frontends.find(|f| u32::from(f.flags) & FRONTEND_LOAD_BALANCER != 0).unwrap();
        assert_eq!(u32::from(balanced.flags) & FRONTEND_NODE_ADMITTED, expected, "{own:?}");
    }
}

fn run_within(service: &Service, slices: &[Slice], bound: &HashSet<Ipx>, limits: Amounts) -> Compiled {
    run_in(service, slices, Context { bound, limits, ..context() })
}

/// With these rows of `resource`, and all it wants of the others.
fn run_with(service: &Service, slices: &[Slice], resource: Resource, rows: u32) -> Compiled {
    let mut limits = UNLIMITED;
    limits[resource as usize] = rows;
    let compiled = run_within(service, slices, &HashSet::default(), limits);
    assert_eq!(compiled.warnings.is_empty(), !compiled.is_cut);
    compiled
}

/// Two ports with NodePorts, two addresses of each kind.
fn large_service() -> Service {
    let mut service = service();
    service.ports = vec![port("http", Protocol::Tcp, 80), port("https", Protocol::Tcp, 443)];
    (service.ports[0].node_port, service.ports[1].node_port) = (30080, 30443);
    service.load_balancer_ips = vec![ip("192.0.2.1"), ip("192.0.2.2")];
    service.external_ips = vec![ip("198.51.100.1"), ip("198.51.100.2")];
    let range = |at: &str| IpRange { ip: ip(at), prefix: 16 };
    service.source_ranges = vec![range("10.1.0.0"), range("10.2.0.0"), range("10.3.0.0")];
    service
}

#[test]
fn a_service_that_asks_for_more_than_its_quota_keeps_what_clusters_need_most() {
    use Resource::{Addresses, Endpoints, Frontends, Ports};
    let service = large_service();
    let slice = slice(&[("http", Protocol::Tcp, 8080), ("https", Protocol::Tcp, 8443)], "10.1.0.1 10.1.0.2? 10.1.0.3@");
    // Frontends and addresses that are left, and the endpoints of each port.
    for (resource, rows, frontends, addresses, endpoints) in [
        (Frontends, 12, 12, 5, [3, 3]),
        (Frontends, 11, 10, 4, [3, 3]),
        (Frontends, 8, 8, 3, [3, 3]),
        (Frontends, 5, 4, 1, [3, 3]),
        (Frontends, 3, 2, 1, [3, 3]),
        (Frontends, 1, 1, 1, [3, 0]),
        (Frontends, 0, 0, 0, [0, 0]),
        (Addresses, 2, 6, 2, [3, 3]),
        (Ports, 1, 6, 5, [3, 0]),
        (Endpoints, 6, 12, 5, [3, 3]),
        (Endpoints, 3, 12, 5, [1, 1]),
        (Endpoints, 0, 12, 5, [0, 0]),
    ] {
        let compiled = run_with(&service, std::slice::from_ref(&slice), resource, rows);
        let of_port = |at: usize| compiled.ports.get(at).map_or(0, |port: &CompiledPort| port.endpoints.len());
        let found = (compiled.ports.iter().map(|p| p.frontends.len()).sum(), compiled.addresses.len());
        assert_eq!((found, [of_port(0), of_port(1)]), ((frontends, addresses), endpoints), "{resource:?} {rows}");
    }
    let service = Service { external_policy: TrafficPolicy::Local, ..service };
    let one_each = run_with(&service, &[slice], Endpoints, 2);
    assert_eq!(one_each.ports[0].endpoints[0].at.ip, ip("10.1.0.3"), "the one of this node");
}

#[test]
fn source_ranges_that_do_not_fit_close_the_load_balancer_ips_and_nothing_else() {
    let service = large_service();
    let all = run_with(&service, &[], Resource::SourceRanges, 6);
    assert_eq!((all.ports[1].source_ranges.len(), all.is_cut), (3, false));
    let closed = run_with(&service, &[], Resource::SourceRanges, 5);
    assert!(closed.is_cut && closed.ports.iter().all(|port| port.source_ranges.is_empty()));
    let asks = |compiled: &Compiled| frontends(compiled).iter().filter(|f| f.contains(" 20 ")).count();
    assert_eq!((asks(&closed), frontends(&closed)), (4, frontends(&all)), "each still asks for its ranges");
}

/// Frontends as "address:port/protocol number flags inside outside", a pool as C or L, with "!" when it drops.
fn frontends(compiled: &Compiled) -> Vec<String> {
    let pool = |p: PoolUse| {
        let set = if p.member == CLUSTER { "C" } else { "L" };
        format!("{set}{}", if p.on_empty == DROP { "!" } else { "" })
    };
    let all = compiled.ports.iter().flat_map(|p| &p.frontends).map(|f| {
        let at = SocketAddrx { ip: f.key.ip(), port: f.key.port() };
        format!("{at}/{} {} {} {}", f.key.protocol, f.flags, pool(f.inside), pool(f.outside))
    });
    all.collect()
}

/// Endpoints as "address:port state pools flags".
fn endpoints(compiled: &Compiled) -> Vec<String> {
    let all = compiled.ports.iter().flat_map(|p| &p.endpoints);
    all.map(|e| format!("{} {} {} {}", e.at, e.state, e.pools, e.flags)).collect()
}

#[test]
fn ready_and_serving_terminating_endpoints_have_rows_and_others_do_not() {
    let compiled = run(&service(), &[http("10.1.0.1 10.1.0.2! 10.1.0.3? 10.1.0.4@")]);
    assert_eq!(endpoints(&compiled), ["10.1.0.1:8080 1 1 0", "10.1.0.3:8080 2 0 0", "10.1.0.4:8080 1 1 1"]);
}

#[test]
fn each_kind_of_address_has_its_pools() {
    use TrafficPolicy::{Cluster, Local};
    let table: &[(TrafficPolicy, TrafficPolicy, [&str; 4])] = &[
        (Cluster, Cluster, ["C C", "C C", "C C", "C C"]),
        (Local, Cluster, ["L L", "C C", "C C", "C C"]),
        (Cluster, Local, ["C C", "C L", "C L", "C L"]),
        (Local, Local, ["L L", "C L", "C L", "C L"]),
    ];
    for (internal, external, pools) in table {
        let mut service = service();
        (service.internal_policy, service.external_policy) = (*internal, *external);
        service.external_ips = vec![ip("192.0.2.1")];
        service.load_balancer_ips = vec![ip("192.0.2.2")];
        service.ports[0].node_port = 30080;
        let compiled = run(&service, &[http("10.1.0.1@ 10.1.0.2")]);
        let mut wanted = [
            format!("10.96.0.1:80/6 1 {}", pools[0]),
            format!("192.0.2.1:80/6 2 {}", pools[1]),
            format!("192.0.2.2:80/6 4 {}", pools[2]),
            format!("0.0.0.0:30080/6 8 {}", pools[3]),
        ];
        let mut found = frontends(&compiled);
        wanted.sort();
        found.sort();
        assert_eq!(found, wanted, "internal {internal:?}, external {external:?}");
    }
}

#[test]
fn an_empty_local_pool_drops_only_while_there_are_endpoints_elsewhere() {
    let mut service = service();
    service.internal_policy = TrafficPolicy::Local;
    for (slices, pools) in [
        ("10.1.0.1", "L! L!"),
        ("10.1.0.1?", "L! L!"),
        ("10.1.0.1!", "L L"),
        ("", "L L"),
        ("10.1.0.1 10.1.0.2@", "L L"),
        ("10.1.0.1 10.1.0.2?@", "L L"),
        ("10.1.0.1 10.1.0.2!@", "L! L!"),
    ] {
        let compiled = run(&service, &[http(slices)]);
        assert_eq!(frontends(&compiled), [format!("10.96.0.1:80/6 1 {pools}")], "{slices:?}");
    }
}

#[test]
fn an_empty_cluster_pool_refuses() {
    let compiled = run(&service(), &[http("10.1.0.1!")]);
    assert_eq!(compiled.ports[0].frontends[0].inside, PoolUse { member: CLUSTER, on_empty: REFUSE });
    assert!(compiled.ports[0].endpoints.is_empty());
}

#[test]
fn the_families_of_a_dual_stack_service_are_decided_each_for_itself() {
    let mut service = service();
    service.cluster_ips.push(ip("fd00::1"));
    service.internal_policy = TrafficPolicy::Local;
    service.ports[0].node_port = 30080;
    let compiled = run(&service, &[http("10.1.0.1"), http("fd01::1@ fd01::2?")]);
    let mut found = frontends(&compiled);
    found.sort();
    assert_eq!(
        found,
        ["0.0.0.0:30080/6 8 C C", "10.96.0.1:80/6 1 L! L!", "[::]:30080/6 8 C C", "[fd00::1]:80/6 1 L L"]
    );
    assert_eq!(endpoints(&compiled), ["10.1.0.1:8080 1 1 0", "[fd01::1]:8080 1 3 1", "[fd01::2]:8080 2 0 0"].sorted());
}

trait Sorted {
    fn sorted(self) -> Self;
}

/// IPv6 sorts before v4-mapped addresses where its first bytes are lower, so the tests sort by the row's own order.
impl<const N: usize> Sorted for [&str; N] {
    fn sorted(mut self) -> Self {
        self.sort_by_key(|row| {
            let at: std::net::SocketAddr = row.split(' ').next().unwrap().parse().unwrap();
            Ipx::from(at.ip())
        });
        self
    }
}

#[test]
fn endpoints_of_a_family_the_service_does_not_have_are_left_out() {
    assert!(run(&service(), &[http("fd01::1")]).ports[0].endpoints.is_empty());
}

#[test]
fn slices_merge_by_port_name_and_each_may_have_its_own_target_port() {
    let second = slice(&[("http", Protocol::Tcp, 9090), ("other", Protocol::Tcp, 1)], "10.1.0.2 10.1.0.1");
    let compiled = run(&service(), &[http("10.1.0.1"), second]);
    assert_eq!(
        endpoints(&compiled),
        ["10.1.0.1:8080 1 1 0", "10.1.0.1:9090 1 1 0", "10.1.0.2:9090 1 1 0"],
        "one address with two target ports is two endpoints"
    );
}

#[test]
fn an_endpoint_in_two_slices_is_one_and_ready_wins_in_either_order() {
    for slices in [["10.1.0.1!", "10.1.0.1@"], ["10.1.0.1@", "10.1.0.1!"]] {
        assert_eq!(endpoints(&run(&service(), &slices.map(http))), ["10.1.0.1:8080 1 1 1"]);
    }
}

#[test]
fn tcp_and_udp_on_one_port_are_two_frontends_with_their_own_endpoints() {
    let mut service = service();
    service.ports = vec![port("dns-tcp", Protocol::Tcp, 53), port("dns", Protocol::Udp, 53)];
    let slice = slice(&[("dns", Protocol::Udp, 5353), ("dns-tcp", Protocol::Tcp, 5354)], "10.1.0.1");
    let compiled = run(&service, &[slice]);
    assert_eq!(frontends(&compiled), ["10.96.0.1:53/6 1 C C", "10.96.0.1:53/17 1 C C"]);
    assert_eq!(endpoints(&compiled), ["10.1.0.1:5354 1 1 0", "10.1.0.1:5353 1 1 0"]);
    assert!(compiled.warnings.is_empty());
}

#[test]
fn a_cluster_ip_bound_on_this_node_is_left_alone_but_external_ones_are_not() {
    let mut service = service();
    service.cluster_ips.push(ip("fd00::1"));
    service.external_ips = vec![ip("192.0.2.1")];
    service.load_balancer_ips = vec![ip("192.0.2.2")];
    service.ports[0].node_port = 30080;
    let compiled = run_bound(&service, &[http("10.1.0.1")], &["10.96.0.1", "192.0.2.1", "192.0.2.2"]);
    let mut found = frontends(&compiled);
    found.sort();
    assert_eq!(
        found,
        [
            "0.0.0.0:30080/6 8 C C",
            "192.0.2.1:80/6 2 C C",
            "192.0.2.2:80/6 4 C C",
            "[::]:30080/6 8 C C",
            "[fd00::1]:80/6 1 C C"
        ]
    );
    assert!(compiled.addresses.iter().all(|(address, _)| *address != ip("10.96.0.1")));
}

#[test]
fn addresses_say_what_they_are_and_one_in_two_roles_says_both() {
    let mut service = service();
    service.external_ips = vec![ip("192.0.2.1"), ip("10.96.0.1")];
    service.load_balancer_ips = vec![ip("192.0.2.1")];
    let compiled = run(&service, &[http("10.1.0.1")]);
    let (cluster, vip) = (address_flag::ADDRESS_CLUSTER_IP, address_flag::ADDRESS_SERVICE_VIP);
    assert_eq!(compiled.addresses, [(ip("10.96.0.1"), cluster | vip), (ip("192.0.2.1"), vip)]);
    assert_eq!(frontends(&compiled), ["10.96.0.1:80/6 3 C C", "192.0.2.1:80/6 6 C C"]);
}

#[test]
fn a_set_that_no_frontend_uses_is_in_no_backend() {
    let mut service = service();
    service.internal_policy = TrafficPolicy::Local;
    let compiled = run(&service, &[http("10.1.0.1@ 10.1.0.2")]);
    let pools: Vec<u8> = compiled.ports[0].endpoints.iter().map(|e| e.pools).collect();
    assert_eq!(pools, [LOCAL, 0]);
}

#[test]
fn what_is_odd_is_named() {
    let mut named = service();
    named.ports.push(port("admin", Protocol::Tcp, 81));
    let mut twice = service();
    twice.ports.push(port("http", Protocol::Tcp, 81));
    let mut sctp = service();
    sctp.ports = vec![port("", Protocol::Sctp, 5000)];
    let sctp_slice = slice(&[("", Protocol::Sctp, 5000)], "10.1.0.1");
    for (service, slices, message) in [
        (
            &named,
            &[slice(&[("http", Protocol::Tcp, 8080), ("amdin", Protocol::Tcp, 81)], "10.1.0.1")][..],
            "Service port admin: no EndpointSlice has a TCP port of that name; they have \"amdin\" (TCP), which the \
             Service does not have",
        ),
        (&twice, &[http("10.1.0.1")], "port http: another port has this name already: left out"),
        (
            &sctp,
            &[sctp_slice],
            "port 5000: SCTP is served for packets of pods and from outside if the endpoints have the Service's port \
             (its checksum rules out another), but not for the node's own sockets, for which the kernel has no hook",
        ),
    ] {
        let warning = Warning { subject: "Service default/web".into(), message: message.into() };
        assert_eq!(run(service, slices).warnings, [warning]);
    }
    assert_eq!(run(&sctp, &[]).ports[0].frontends.len(), 1, "SCTP is compiled like the others");
}

#[test]
fn endpoints_that_come_and_go_are_no_reason_to_warn_of_a_port() {
    let mut two = service();
    two.ports.push(port("admin", Protocol::Tcp, 81));
    let admin = || slice(&[("admin", Protocol::Tcp, 81)], "10.1.0.2");
    let odd = || slice(&[("amdin", Protocol::Tcp, 81)], "10.1.0.2");
    let controlled = |slice| Slice { is_controlled: true, ..slice };
    let worlds: [(&str, Vec<Slice>); 8] = [
        ("no slices", vec![]),
        ("a slice without endpoints and ports", vec![slice(&[], "")]),
        ("the pods of one port only", vec![http("10.1.0.1")]),
        ("those of the other", vec![admin()]),
        ("one of them is not ready", vec![http("10.1.0.1!"), admin()]),
        ("a pod that has neither of the ports", vec![slice(&[], "10.1.0.3")]),
        (
            "the port of another name has no endpoints",
            vec![http("10.1.0.1"), slice(&[("amdin", Protocol::Tcp, 81)], "")],
        ),
        ("the port was renamed, and the controller has not followed yet", vec![http("10.1.0.1"), controlled(odd())]),
    ];
    for (what, slices) in worlds {
        assert_eq!(run(&two, &slices).warnings, [], "{what}");
    }
    assert_eq!(run(&two, &[http("10.1.0.1"), odd()]).warnings.len(), 1, "somebody's own slice, with a slip of the pen");
}

#[test]
fn affinity_and_age_are_handed_on() {
    let mut service = service();
    service.affinity_seconds = Some(10_800);
    let compiled = run(&service, &[]);
    assert_eq!((compiled.created, compiled.ports[0].affinity_seconds), (7, 10_800));
}
