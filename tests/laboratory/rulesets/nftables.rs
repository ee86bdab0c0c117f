//! The table kube-proxy of its nftables mode.
//!
//! A Service with several endpoints has an anonymous map. The kernel looks for a map's name among all there are
//! (`nf_tables_set_alloc_name`), so loading 10,000 Services of ten endpoints takes 70 s (benches/RESULTS.md), and of one
//! endpoint 1 s.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use super::{Choice, Endpoint, Family, Lines, MASQUERADE_MARK, ServicePort, World, hash};

/// Chains on the kernel's hooks: name, type and hook, priority, and what they jump to.
const BASE_CHAINS: [(&str, &str, &str, &[&str]); 8] = [
    ("filter-prerouting-pre-dnat", "filter hook prerouting", "-110", &["ct state new jump firewall-check"]),
    ("filter-output-pre-dnat", "filter hook output", "-110", &["ct state new jump firewall-check"]),
    (
        "filter-input",
        "filter hook input",
        "0",
        &["ct state new jump nodeport-endpoints-check", "ct state new jump service-endpoints-check"],
    ),
    (
        "filter-forward",
        "filter hook forward",
        "0",
        &["ct state new jump service-endpoints-check", "ct state new jump cluster-ips-check"],
    ),
    (
        "filter-output",
        "filter hook output",
        "0",
        &["ct state new jump service-endpoints-check", "ct state new jump cluster-ips-check"],
    ),
    ("nat-prerouting", "nat hook prerouting", "-100", &["jump services"]),
    ("nat-output", "nat hook output", "-100", &["jump services"]),
    ("nat-postrouting", "nat hook postrouting", "100", &["jump masquerading"]),
];

const CHAINS: [&str; 7] = [
    "services",
    "masquerading",
    "service-endpoints-check",
    "nodeport-endpoints-check",
    "cluster-ips-check",
    "firewall-check",
    "reject-chain",
];

/// The rules of `world` for one family.
pub fn render(world: &World, family: Family) -> String {
    let mut table = Table::new(family);
    table.set_up(world);
    for address in family.of(&world.node) {
        table.element("nodeport-ips", &address.to_string(), "");
    }
    for service in &world.services {
        for cluster_ip in family.of(&service.cluster_ips) {
            ServiceRules::new(world, service, cluster_ip, family).write(&mut table);
        }
    }
    table.lines.0
}

/// What kube-proxy writes when the endpoints of these Services (by their places in `world`) have changed and nothing
/// else: in a partial sync (`syncProxyRules` with `skipServiceUpdate` for all others, since 1.33) their chains are added,
/// which does nothing to those that are there, emptied, and filled again. Elements of sets and maps are written only
/// where they are new or others than before (`ensureElem`): none when it is endpoints on other nodes that have changed.
pub fn render_changes(world: &World, family: Family, changed: &BTreeSet<usize>) -> String {
    let mut table = Table::new(family);
    let services = world.services.iter().enumerate().filter(|(number, _)| changed.contains(number));
    for (_, service) in services {
        for cluster_ip in family.of(&service.cluster_ips) {
            ServiceRules::new(world, service, cluster_ip, family).write(&mut table);
        }
    }
    let mut lines = Lines::default();
    add_emptied(&mut lines, table.lines.0.lines().filter(|line| !line.starts_with("add element ")));
    lines.0
}

/// What kube-proxy writes in its first sync, a full one, where the rules of an earlier process are: base chains are
/// deleted and made again (`setupNFTables`), all other chains emptied and filled again. Elements of the Services' sets
/// and maps it has read before (`readOrReset`), and they are as they should be.
pub fn render_again(world: &World, family: Family) -> String {
    let mut table = Table::new(family);
    table.set_up(world);
    let ip = table.ip;
    let mut lines = Lines::default();
    for (name, ..) in BASE_CHAINS {
        lines.add(format_args!("add chain {ip} kube-proxy {name}\ndelete chain {ip} kube-proxy {name}"));
    }
    add_emptied(&mut lines, table.lines.0.lines());
    lines.add(format_args!("flush set {ip} kube-proxy nodeport-ips"));
    let mut table = Table { lines, ..table };
    for address in family.of(&world.node) {
        table.element("nodeport-ips", &address.to_string(), "");
    }
    table.lines.0 + &render_changes(world, family, &(0..world.services.len()).collect())
}

/// Adds these lines; chains that are added in them are emptied at once: they may be there already.
fn add_emptied<'a>(lines: &mut Lines, text: impl Iterator<Item = &'a str>) {
    for line in text {
        lines.add(format_args!("{line}"));
        if let Some(chain) = line.strip_prefix("add chain ") {
            // Without the definition that a base chain has.
            let name: Vec<&str> = chain.split(' ').take(3).collect();
            lines.add(format_args!("flush chain {}", name.join(" ")));
        }
    }
}

struct Table {
    lines: Lines,
    family: Family,
    /// `ip` or `ip6`.
    ip: &'static str,
}

impl Table {
    fn new(family: Family) -> Table {
        let ip = if family == Family::V4 { "ip" } else { "ip6" };
        Table { lines: Lines::default(), family, ip }
    }

    fn add(&mut self, what: &str, name: &str, definition: &str) {
        let ip = self.ip;
        let space = if definition.is_empty() { "" } else { " " };
        self.lines.add(format_args!("add {what} {ip} kube-proxy {name}{space}{definition}"));
    }

    fn rule(&mut self, chain: &str, rule: &str) {
        self.add("rule", chain, rule);
    }

    /// An element of a set, or with a value of a map.
    fn element(&mut self, name: &str, key: &str, value: &str) {
        let colon = if value.is_empty() { "" } else { " : " };
        self.add("element", name, &format!("{{ {key}{colon}{value} }}"));
    }

    fn set_up(&mut self, world: &World) {
        let ip = self.ip;
        self.lines.add(format_args!("add table {ip} kube-proxy {{ comment \"rules for kube-proxy\" ; }}"));
        for (name, hook, priority, _) in BASE_CHAINS {
            self.add("chain", name, &format!("{{ type {hook} priority {priority} ; }}"));
        }
        for name in CHAINS {
            self.add("chain", name, "");
        }
        let address = if self.family == Family::V4 { "ipv4_addr" } else { "ipv6_addr" };
        let portal = format!("{address} . inet_proto . inet_service");
        for (kind, name, of) in [
            ("set", "cluster-ips", address),
            ("set", "nodeport-ips", address),
            ("set", "hairpin-connections", &format!("{address} . {portal}")),
            ("map", "no-endpoint-services", &format!("{portal} : verdict")),
            ("map", "no-endpoint-nodeports", "inet_proto . inet_service : verdict"),
            ("map", "firewall-ips", &format!("{portal} : verdict")),
            ("map", "service-ips", &format!("{portal} : verdict")),
            ("map", "service-nodeports", "inet_proto . inet_service : verdict"),
        ] {
            self.add(kind, name, &format!("{{ type {of} ; }}"));
        }
        for (chain, _, _, jumps) in BASE_CHAINS {
            for jump in jumps {
                self.rule(chain, jump);
            }
        }
        self.rule("reject-chain", "reject");
        let portal = format!("{ip} daddr . meta l4proto . th dport");
        let node_port = format!("{ip} daddr @nodeport-ips meta l4proto . th dport");
        if let Some(pods) = world.pods(self.family) {
            let mark = format!("meta mark set meta mark or {MASQUERADE_MARK}");
            self.rule("services", &format!("{ip} daddr @cluster-ips {ip} saddr != {pods} {mark}"));
        }
        self.rule("services", &format!("{portal} vmap @service-ips"));
        self.rule("services", &format!("{node_port} vmap @service-nodeports"));
        self.rule("service-endpoints-check", &format!("{portal} vmap @no-endpoint-services"));
        self.rule("nodeport-endpoints-check", &format!("{node_port} vmap @no-endpoint-nodeports"));
        self.rule("firewall-check", &format!("{portal} vmap @firewall-ips"));
        self.rule("cluster-ips-check", &format!("{ip} daddr @cluster-ips reject"));
        let mark = format!("meta mark and {MASQUERADE_MARK} != 0 meta mark set meta mark xor {MASQUERADE_MARK}");
        self.rule("masquerading", &format!("{mark} masquerade fully-random"));
        let hairpin = format!("{ip} saddr . {portal} @hairpin-connections");
        self.rule("masquerading", &format!("ct status dnat {hairpin} masquerade fully-random"));
    }
}

/// One Service port of one family, and the names of its chains.
struct ServiceRules<'a> {
    world: &'a World,
    service: &'a ServicePort,
    family: Family,
    choice: Choice,
    cluster_ip: IpAddr,
    /// `namespace/name/protocol/port`, what names of chains end in.
    base: String,
    cluster: String,
    local: String,
    external: String,
}

impl<'a> ServiceRules<'a> {
    fn new(world: &'a World, service: &'a ServicePort, cluster_ip: IpAddr, family: Family) -> Self {
        let protocol = service.protocol.name();
        let base = format!("{}/{}/{protocol}/{}", service.namespace, service.name, service.port_name);
        let hash = hash(&base, 8);
        ServiceRules {
            world,
            service,
            family,
            choice: service.choice(family),
            cluster_ip,
            cluster: format!("service-{hash}-{base}"),
            local: format!("local-{hash}-{base}"),
            external: format!("external-{hash}-{base}"),
            base,
        }
    }

    fn has_endpoints(&self) -> bool {
        !self.choice.cluster.is_empty()
    }

    /// Whether clients with the given policy find an endpoint here.
    fn serves(&self, is_local: bool) -> bool {
        self.has_endpoints() && !(is_local && self.choice.local.is_empty())
    }

    fn policy_chain(&self, is_local: bool) -> &str {
        if is_local { &self.local } else { &self.cluster }
    }

    /// What happens to clients that find no endpoint.
    fn refusal(&self) -> &'static str {
        if self.has_endpoints() { "drop" } else { "goto reject-chain" }
    }

    /// The key of an address in the maps.
    fn portal(&self, address: IpAddr) -> String {
        format!("{address} . {} . {}", self.service.protocol.name(), self.service.port)
    }

    fn write(&self, table: &mut Table) {
        let (service, family) = (self.service, self.family);
        let uses_cluster = self.has_endpoints() && service.uses_cluster(family);
        let uses_local = !self.choice.local.is_empty() && service.uses_local(family);
        // Chains first: elements and rules may name only what is there.
        let reachable = self.reachable(uses_cluster, uses_local);
        if service.affinity.is_some() {
            reachable.iter().for_each(|endpoint| self.write_affine_endpoint(table, endpoint));
        }
        if uses_cluster {
            self.write_policy_chain(table, &self.cluster, &self.choice.cluster);
        }
        if uses_local {
            self.write_policy_chain(table, &self.local, &self.choice.local);
        }
        for endpoint in reachable.iter().filter(|endpoint| endpoint.is_local) {
            let (ip, port, protocol) = (endpoint.at.ip(), endpoint.at.port(), service.protocol.name());
            table.element("hairpin-connections", &format!("{ip} . {ip} . {protocol} . {port}"), "");
        }
        if self.has_endpoints() && service.is_external(family) {
            self.write_external_chain(table);
        }
        self.write_addresses(table);
    }

    fn reachable(&self, uses_cluster: bool, uses_local: bool) -> Vec<&Endpoint> {
        let mut reachable: Vec<&Endpoint> = self.choice.cluster.iter().filter(|_| uses_cluster).collect();
        for local in self.choice.local.iter().filter(|_| uses_local) {
            if !reachable.contains(&local) {
                reachable.push(local);
            }
        }
        reachable
    }

    fn write_addresses(&self, table: &mut Table) {
        let service = self.service;
        table.element("cluster-ips", &self.cluster_ip.to_string(), "");
        let portal = self.portal(self.cluster_ip);
        if self.serves(service.internal_local) {
            table.element("service-ips", &portal, &format!("goto {}", self.policy_chain(service.internal_local)));
        } else {
            table.element("no-endpoint-services", &portal, self.refusal());
        }
        let addresses = self.family.of(&service.external_ips).chain(self.family.of(&service.load_balancer_ips));
        for portal in addresses.map(|address| self.portal(address)) {
            self.write_external(table, "service-ips", "no-endpoint-services", &portal);
        }
        if service.node_port != 0 {
            let key = format!("{} . {}", service.protocol.name(), service.node_port);
            self.write_external(table, "service-nodeports", "no-endpoint-nodeports", &key);
        }
        self.write_firewall(table);
    }

    fn write_external(&self, table: &mut Table, served: &str, refused: &str, key: &str) {
        if self.has_endpoints() {
            table.element(served, key, &format!("goto {}", self.external));
        }
        if !self.serves(self.service.external_local) {
            table.element(refused, key, self.refusal());
        }
    }

    fn write_firewall(&self, table: &mut Table) {
        let accepted = self.service.accepted(self.family, &self.world.node);
        let portals: Vec<String> =
            self.family.of(&self.service.load_balancer_ips).map(|address| self.portal(address)).collect();
        if accepted.is_empty() || portals.is_empty() {
            return;
        }
        let chain = format!("firewall-{}-{}", hash(&self.base, 8), self.base);
        table.add("chain", &chain, "");
        table.rule(&chain, &format!("{} saddr != {{ {} }} drop", table.ip, accepted.join(", ")));
        for portal in portals {
            table.element("firewall-ips", &portal, &format!("goto {chain}"));
        }
    }

    /// The chain that all external addresses lead to: masquerading, and which policy applies to whom.
    fn write_external_chain(&self, table: &mut Table) {
        let (ip, chain, cluster) = (table.ip, &self.external, &self.cluster);
        let mark = format!("meta mark set meta mark or {MASQUERADE_MARK}");
        table.add("chain", chain, "");
        if self.service.external_local {
            if let Some(pods) = self.world.pods(self.family) {
                table.rule(chain, &format!("{ip} saddr {pods} goto {cluster}"));
            }
            table.rule(chain, &format!("fib saddr type local {mark}"));
            table.rule(chain, &format!("fib saddr type local goto {cluster}"));
        } else {
            table.rule(chain, &mark);
        }
        if self.serves(self.service.external_local) {
            table.rule(chain, &format!("goto {}", self.policy_chain(self.service.external_local)));
        }
    }

    /// The chain that draws one of `endpoints`.
    fn write_policy_chain(&self, table: &mut Table, chain: &str, endpoints: &[Endpoint]) {
        let ip = table.ip;
        let (protocol, count) = (self.service.protocol.name(), endpoints.len());
        table.add("chain", chain, "");
        let listed = |item: &dyn Fn(&Endpoint) -> String| {
            let items: Vec<String> = endpoints.iter().enumerate().map(|(n, e)| format!("{n} : {}", item(e))).collect();
            items.join(", ")
        };
        if self.service.affinity.is_some() {
            for endpoint in endpoints {
                let name = self.endpoint_name(endpoint);
                table.rule(chain, &format!("{ip} saddr @affinity-{name} goto endpoint-{name}"));
            }
            let verdicts = listed(&|e| format!("goto endpoint-{}", self.endpoint_name(e)));
            table.rule(chain, &format!("numgen random mod {count} vmap {{ {verdicts} }}"));
        } else if let [endpoint] = endpoints {
            table.rule(chain, &format!("meta l4proto {protocol} dnat to {}", endpoint.at));
        } else {
            let targets = listed(&|e| format!("{} . {}", e.at.ip(), e.at.port()));
            let to = format!("dnat {ip} addr . port to numgen random mod {count} map {{ {targets} }}");
            table.rule(chain, &format!("meta l4proto {protocol} {to}"));
        }
    }

    /// Endpoints have a chain only where clients are to be remembered.
    fn write_affine_endpoint(&self, table: &mut Table, endpoint: &Endpoint) {
        let name = self.endpoint_name(endpoint);
        let address = if self.family == Family::V4 { "ipv4_addr" } else { "ipv6_addr" };
        let seconds = self.service.affinity.unwrap_or_default();
        let (set, chain) = (format!("affinity-{name}"), format!("endpoint-{name}"));
        table.add("set", &set, &format!("{{ type {address} ; flags dynamic,timeout ; timeout {seconds}s ; }}"));
        table.add("chain", &chain, "");
        table.rule(&chain, &format!("update @{set} {{ {} saddr }}", table.ip));
        table.rule(&chain, &format!("meta l4proto {} dnat to {}", self.service.protocol.name(), endpoint.at));
    }

    /// What the names of an endpoint's chain and set end in: hash, Service port and address, without colons.
    fn endpoint_name(&self, endpoint: &Endpoint) -> String {
        let address = |at: SocketAddr| at.ip().to_string().replace(':', ".");
        let name = format!("{}__{}/{}", self.base, address(endpoint.at), endpoint.at.port());
        format!("{}-{name}", hash(&name, 8))
    }
}
