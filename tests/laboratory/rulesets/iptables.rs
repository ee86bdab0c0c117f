//! The tables nat and filter of kube-proxy's iptables mode.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::{Choice, Endpoint, Family, Lines, MASQUERADE_MARK, ServicePort, World, hash};

/// Beyond so many endpoints kube-proxy writes no comments about them.
const LARGE: usize = 1000;

/// Which chain jumps to which, from the kernel's hooks: table, hook, condition, target.
const JUMPS: [(&str, &str, &str, &str); 14] = [
    ("filter", "INPUT", NEW, "KUBE-PROXY-FIREWALL"),
    ("filter", "INPUT", "", "KUBE-NODEPORTS"),
    ("filter", "INPUT", NEW, "KUBE-EXTERNAL-SERVICES"),
    ("filter", "INPUT", "", "KUBE-FIREWALL"),
    ("filter", "FORWARD", NEW, "KUBE-PROXY-FIREWALL"),
    ("filter", "FORWARD", "", "KUBE-FORWARD"),
    ("filter", "FORWARD", NEW, "KUBE-SERVICES"),
    ("filter", "FORWARD", NEW, "KUBE-EXTERNAL-SERVICES"),
    ("filter", "OUTPUT", NEW, "KUBE-PROXY-FIREWALL"),
    ("filter", "OUTPUT", NEW, "KUBE-SERVICES"),
    ("filter", "OUTPUT", "", "KUBE-FIREWALL"),
    ("nat", "PREROUTING", "", "KUBE-SERVICES"),
    ("nat", "OUTPUT", "", "KUBE-SERVICES"),
    ("nat", "POSTROUTING", "", "KUBE-POSTROUTING"),
];
const NEW: &str = "-m conntrack --ctstate NEW ";

const FILTER_CHAINS: [&str; 6] = [
    "KUBE-NODEPORTS",
    "KUBE-SERVICES",
    "KUBE-EXTERNAL-SERVICES",
    "KUBE-FIREWALL",
    "KUBE-FORWARD",
    "KUBE-PROXY-FIREWALL",
];
const NAT_CHAINS: [&str; 4] = ["KUBE-NODEPORTS", "KUBE-SERVICES", "KUBE-MARK-MASQ", "KUBE-POSTROUTING"];

/// The rules of `world` for one family. Loading them replaces all that the two tables held.
pub fn render(world: &World, family: Family) -> String {
    let mut tables = Tables::default();
    write_services(world, family, |_, own| tables.append(own));
    tables.finish(family, true)
}

/// What kube-proxy writes when the endpoints of these Services (by their places in `world`) have changed and nothing
/// else, for `iptables-restore --noflush`. Its partial sync (`syncProxyRules` without `doFullSync`, since 1.26) leaves
/// out the chains of Services that have not changed; the chains that all share (KUBE-SERVICES, KUBE-NODEPORTS and those
/// of the table filter) it writes as a whole, a rule or more for every Service. Jumps from the kernel's hooks are left
/// alone, and so are chains of endpoints that are gone: they are deleted later, in a large cluster once in a sync period.
pub fn render_changes(world: &World, family: Family, changed: &BTreeSet<usize>) -> String {
    let mut tables = Tables::default();
    write_services(world, family, |number, own| match changed.contains(&number) {
        true => tables.append(own),
        false => tables.append_shared(own),
    });
    tables.finish(family, false)
}

/// What kube-proxy writes in its first sync, a full one, where the rules of an earlier process are, for
/// `iptables-restore --noflush`: all chains of all Services. It has asked for the jumps from the kernel's hooks before,
/// one by one (`EnsureRule`).
pub fn render_again(world: &World, family: Family) -> String {
    render_changes(world, family, &(0..world.services.len()).collect())
}

/// What each Service adds, with its place in `world`.
fn write_services(world: &World, family: Family, mut each: impl FnMut(usize, Tables)) {
    let endpoints: usize = world.services.iter().map(|service| service.endpoints.len()).sum();
    for (number, service) in world.services.iter().enumerate() {
        for cluster_ip in family.of(&service.cluster_ips) {
            let mut own = Tables::default();
            ServiceRules::new(world, service, cluster_ip, family, endpoints <= LARGE).write(&mut own);
            each(number, own);
        }
    }
}

/// What a service adds to, in the order in which it is put together.
#[derive(Default)]
struct Tables {
    filter: Lines,
    nat_chains: Lines,
    nat: Lines,
}

impl Tables {
    fn chain(&mut self, name: &str) {
        self.nat_chains.add(format_args!(":{name} - [0:0]"));
    }

    fn append(&mut self, own: Tables) {
        self.filter.0.push_str(&own.filter.0);
        self.nat_chains.0.push_str(&own.nat_chains.0);
        self.nat.0.push_str(&own.nat.0);
    }

    /// Of a Service's rules those that are in chains of all.
    fn append_shared(&mut self, own: Tables) {
        self.filter.0.push_str(&own.filter.0);
        let shared = |line: &&str| NAT_CHAINS.iter().any(|chain| line.starts_with(&format!("-A {chain} ")));
        own.nat.0.lines().filter(shared).for_each(|line| self.nat.add(format_args!("{line}")));
    }

    /// `with_hooks`: with the kernel's own chains, and the jumps from there.
    fn finish(self, family: Family, with_hooks: bool) -> String {
        let mut all = Lines::default();
        all.add(format_args!("*filter"));
        if with_hooks {
            all.add(format_args!(":INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]"));
        }
        for chain in FILTER_CHAINS {
            all.add(format_args!(":{chain} - [0:0]"));
        }
        if with_hooks {
            jumps(&mut all, "filter");
        }
        all.0.push_str(&self.filter.0);
        if family == Family::V4 {
            // route_localnet, which NodePorts at 127.0.0.1 need, would let others in.
            all.add(format_args!(
                "-A KUBE-FIREWALL -m comment --comment \"block incoming localnet connections\" -d 127.0.0.0/8 \
                 ! -s 127.0.0.0/8 -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP"
            ));
        }
        all.add(format_args!(
            "-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP\n\
             -A KUBE-FORWARD -m comment --comment \"kubernetes forwarding rules\" -m mark --mark \
             {MASQUERADE_MARK}/{MASQUERADE_MARK} -j ACCEPT\n\
             -A KUBE-FORWARD -m comment --comment \"kubernetes forwarding conntrack rule\" -m conntrack --ctstate \
             RELATED,ESTABLISHED -j ACCEPT\nCOMMIT"
        ));
        all.add(format_args!("*nat"));
        if with_hooks {
            all.add(format_args!(":PREROUTING ACCEPT [0:0]\n:INPUT ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]"));
            all.add(format_args!(":POSTROUTING ACCEPT [0:0]"));
        }
        for chain in NAT_CHAINS {
            all.add(format_args!(":{chain} - [0:0]"));
        }
        all.0.push_str(&self.nat_chains.0);
        if with_hooks {
            jumps(&mut all, "nat");
        }
        all.add(format_args!(
            "-A KUBE-POSTROUTING -m mark ! --mark {MASQUERADE_MARK}/{MASQUERADE_MARK} -j RETURN\n\
             -A KUBE-POSTROUTING -j MARK --xor-mark {MASQUERADE_MARK}\n\
             -A KUBE-POSTROUTING -m comment --comment \"kubernetes service traffic requiring SNAT\" -j MASQUERADE \
             --random-fully\n\
             -A KUBE-MARK-MASQ -j MARK --or-mark {MASQUERADE_MARK}"
        ));
        all.0.push_str(&self.nat.0);
        // IPv6 has no route_localnet: [::1] cannot be masqueraded.
        let but_not = if family == Family::V6 { "! -d ::1/128 " } else { "" };
        all.add(format_args!(
            "-A KUBE-SERVICES -m comment --comment \"kubernetes service nodeports; NOTE: this must be the last rule in \
             this chain\" -m addrtype --dst-type LOCAL {but_not}-j KUBE-NODEPORTS\nCOMMIT"
        ));
        all.0
    }
}

fn jumps(lines: &mut Lines, table: &str) {
    for (_, hook, condition, target) in JUMPS.iter().filter(|jump| jump.0 == table) {
        lines.add(format_args!("-A {hook} {condition}-j {target}"));
    }
}

/// One Service port of one family, and the names of its chains.
struct ServiceRules<'a> {
    world: &'a World,
    service: &'a ServicePort,
    family: Family,
    choice: Choice,
    cluster_ip: IpAddr,
    title: String,
    /// `-m tcp -p tcp`.
    protocol: String,
    cluster: String,
    local: String,
    external: String,
    firewall: String,
    with_comments: bool,
}

impl<'a> ServiceRules<'a> {
    fn new(
        world: &'a World,
        service: &'a ServicePort,
        cluster_ip: IpAddr,
        family: Family,
        with_comments: bool,
    ) -> Self {
        let title = service.title();
        let protocol = service.protocol.name();
        let hash = hash(&format!("{title}{protocol}"), 16);
        ServiceRules {
            world,
            service,
            family,
            choice: service.choice(family),
            cluster_ip,
            protocol: format!("-m {protocol} -p {protocol}"),
            cluster: format!("KUBE-SVC-{hash}"),
            local: format!("KUBE-SVL-{hash}"),
            external: format!("KUBE-EXT-{hash}"),
            firewall: format!("KUBE-FW-{hash}"),
            title,
            with_comments,
        }
    }

    fn has_endpoints(&self) -> bool {
        !self.choice.cluster.is_empty()
    }

    /// Whether clients with the given policy find an endpoint here.
    fn serves(&self, is_local: bool) -> bool {
        self.has_endpoints() && !(is_local && self.choice.local.is_empty())
    }

    /// What happens to clients that find none: a comment and the filter's verdict.
    fn refusal(&self) -> (&'static str, &'static str) {
        if self.has_endpoints() { ("has no local endpoints", "DROP") } else { ("has no endpoints", "REJECT") }
    }

    fn policy_chain(&self, is_local: bool) -> &str {
        if is_local { &self.local } else { &self.cluster }
    }

    fn write(&self, tables: &mut Tables) {
        self.write_cluster_ip(tables);
        for address in self.family.of(&self.service.external_ips) {
            self.write_external(tables, address, "external IP", &self.external);
        }
        self.write_load_balancer(tables);
        self.write_node_port(tables);
        if self.has_endpoints() && self.service.is_external(self.family) {
            self.write_external_chain(tables);
        }
        let mut reachable: Vec<&Endpoint> = Vec::new();
        if self.has_endpoints() && self.service.uses_cluster(self.family) {
            self.write_policy_chain(tables, &self.cluster, &self.choice.cluster, !self.service.internal_local);
            reachable.extend(&self.choice.cluster);
        }
        if !self.choice.local.is_empty() && self.service.uses_local(self.family) {
            self.write_policy_chain(tables, &self.local, &self.choice.local, self.service.internal_local);
            reachable.extend(
                self.choice
                    .local
                    .iter()
                    .filter(|local| !self.service.uses_cluster(self.family) || !self.choice.cluster.contains(local)),
            );
        }
        for endpoint in reachable {
            self.write_endpoint(tables, endpoint);
        }
    }

    fn write_cluster_ip(&self, tables: &mut Tables) {
        let (ip, port, protocol, title) = (self.cluster_ip, self.service.port, &self.protocol, &self.title);
        let is_local = self.service.internal_local;
        if self.serves(is_local) {
            let chain = self.policy_chain(is_local);
            tables.nat.add(format_args!(
                "-A KUBE-SERVICES -m comment --comment \"{title} cluster IP\" {protocol} -d {ip} --dport {port} -j \
                 {chain}"
            ));
        } else {
            let (why, verdict) = self.refusal();
            tables.filter.add(format_args!(
                "-A KUBE-SERVICES -m comment --comment \"{title} {why}\" {protocol} -d {ip} --dport {port} -j {verdict}"
            ));
        }
    }

    /// An external or load balancer IP, whose packets go to `chain`.
    fn write_external(&self, tables: &mut Tables, ip: IpAddr, kind: &str, chain: &str) {
        let (port, protocol, title) = (self.service.port, &self.protocol, &self.title);
        if self.has_endpoints() {
            tables.nat.add(format_args!(
                "-A KUBE-SERVICES -m comment --comment \"{title} {kind}\" {protocol} -d {ip} --dport {port} -j {chain}"
            ));
        }
        if !self.serves(self.service.external_local) {
            let (why, verdict) = self.refusal();
            tables.filter.add(format_args!(
                "-A KUBE-EXTERNAL-SERVICES -m comment --comment \"{title} {why}\" {protocol} -d {ip} --dport {port} -j \
                 {verdict}"
            ));
        }
    }

    fn write_load_balancer(&self, tables: &mut Tables) {
        let accepted = self.service.accepted(self.family, &self.world.node);
        let is_guarded = !accepted.is_empty() && self.has_endpoints();
        let chain = if is_guarded { &self.firewall } else { &self.external };
        let (port, protocol, title) = (self.service.port, &self.protocol, &self.title);
        let mut any = false;
        for ip in self.family.of(&self.service.load_balancer_ips) {
            any = true;
            self.write_external(tables, ip, "loadbalancer IP", chain);
            if is_guarded {
                tables.filter.add(format_args!(
                    "-A KUBE-PROXY-FIREWALL -m comment --comment \"{title} traffic not accepted by {chain}\" \
                     {protocol} -d {ip} --dport {port} -j DROP"
                ));
            }
        }
        if any && is_guarded {
            tables.chain(chain);
            for range in accepted {
                tables.nat.add(format_args!(
                    "-A {chain} -m comment --comment \"{title} loadbalancer IP\" -s {range} -j {}",
                    self.external
                ));
            }
        }
    }

    fn write_node_port(&self, tables: &mut Tables) {
        let (port, protocol, title) = (self.service.node_port, &self.protocol, &self.title);
        if port != 0 && self.has_endpoints() {
            tables.nat.add(format_args!(
                "-A KUBE-NODEPORTS -m comment --comment {title} {protocol} --dport {port} -j {}",
                self.external
            ));
        }
        if port != 0 && !self.serves(self.service.external_local) {
            let (why, verdict) = self.refusal();
            tables.filter.add(format_args!(
                "-A KUBE-EXTERNAL-SERVICES -m comment --comment \"{title} {why}\" -m addrtype --dst-type LOCAL \
                 {protocol} --dport {port} -j {verdict}"
            ));
        }
        if self.service.health_check_node_port != 0 {
            tables.filter.add(format_args!(
                "-A KUBE-NODEPORTS -m comment --comment \"{title} health check node port\" -m tcp -p tcp --dport {} -j \
                 ACCEPT",
                self.service.health_check_node_port
            ));
        }
    }

    /// The chain that all external addresses lead to: masquerading, and which policy applies to whom.
    fn write_external_chain(&self, tables: &mut Tables) {
        let (title, chain, cluster) = (&self.title, &self.external, &self.cluster);
        tables.chain(chain);
        let mut rule = |what: &str, rest: std::fmt::Arguments| {
            tables
                .nat
                .add(format_args!("-A {chain} -m comment --comment \"{what} {title} external destinations\" {rest}"));
        };
        if self.service.external_local {
            if let Some(pods) = self.world.pods(self.family) {
                rule("pod traffic for", format_args!("-s {pods} -j {cluster}"));
            }
            rule("masquerade LOCAL traffic for", format_args!("-m addrtype --src-type LOCAL -j KUBE-MARK-MASQ"));
            rule("route LOCAL traffic for", format_args!("-m addrtype --src-type LOCAL -j {cluster}"));
        } else {
            rule("masquerade traffic for", format_args!("-j KUBE-MARK-MASQ"));
        }
        if self.serves(self.service.external_local) {
            tables.nat.add(format_args!("-A {chain} -j {}", self.policy_chain(self.service.external_local)));
        }
    }

    /// The chain that draws one of `endpoints`; with `is_internal` the cluster IP leads to it.
    fn write_policy_chain(&self, tables: &mut Tables, chain: &str, endpoints: &[Endpoint], is_internal: bool) {
        let (title, protocol) = (&self.title, &self.protocol);
        tables.chain(chain);
        if let Some(pods) = self.world.pods(self.family).filter(|_| is_internal) {
            tables.nat.add(format_args!(
                "-A {chain} -m comment --comment \"{title} cluster IP\" {protocol} -d {} --dport {} ! -s {pods} -j \
                 KUBE-MARK-MASQ",
                self.cluster_ip, self.service.port
            ));
        }
        if let Some(seconds) = self.service.affinity {
            for endpoint in endpoints {
                let target = self.endpoint_chain(endpoint);
                tables.nat.add(format_args!(
                    "-A {chain} {}-m recent --name {target} --rcheck --seconds {seconds} --reap -j {target}",
                    self.comment(Some(endpoint))
                ));
            }
        }
        for (index, endpoint) in endpoints.iter().enumerate() {
            let (comment, target) = (self.comment(Some(endpoint)), self.endpoint_chain(endpoint));
            let left = endpoints.len() - index;
            let chance = match left {
                1 => String::new(),
                _ => format!("-m statistic --mode random --probability {:.10} ", 1.0 / left as f64),
            };
            tables.nat.add(format_args!("-A {chain} {comment}{chance}-j {target}"));
        }
    }

    /// The chain of one endpoint, which may be its own client.
    fn write_endpoint(&self, tables: &mut Tables, endpoint: &Endpoint) {
        let (chain, comment, protocol) = (self.endpoint_chain(endpoint), self.comment(None), &self.protocol);
        tables.chain(&chain);
        tables.nat.add(format_args!("-A {chain} {comment}-s {} -j KUBE-MARK-MASQ", endpoint.at.ip()));
        let remember = match self.service.affinity {
            Some(_) => format!("-m recent --name {chain} --set "),
            None => String::new(),
        };
        tables
            .nat
            .add(format_args!("-A {chain} {comment}{remember}{protocol} -j DNAT --to-destination {}", endpoint.at));
    }

    fn endpoint_chain(&self, endpoint: &Endpoint) -> String {
        let name = format!("{}{}{}", self.title, self.service.protocol.name(), endpoint.at);
        format!("KUBE-SEP-{}", hash(&name, 16))
    }

    /// A comment about an endpoint or none, with a space after it.
    fn comment(&self, leads_to: Option<&Endpoint>) -> String {
        match leads_to {
            _ if !self.with_comments => String::new(),
            Some(endpoint) => format!("-m comment --comment \"{} -> {}\" ", self.title, endpoint.at),
            None => format!("-m comment --comment {} ", self.title),
        }
    }
}
