//! What a change of some endpoints of a large Service changes, without a look at the others: what all of them decide
//! together is known by counting (`select::Tally`), and as long as that is the same, each endpoint stands for itself.
//!
//! Only for Services as nearly all are: each address once, the same ports in every slice. For all else, and whenever the
//! others are concerned, the Service is compiled as a whole.

use super::compile::{Compiled, CompiledEndpoint, compile_endpoint};
use super::select::{Candidate, Choice, Place, Tally};
use crate::model::{Endpoint, Family, Ipx, Service, Slice, SlicePort, SocketAddrx};
use crate::table::{HashMap, HashSet};

/// One Service's endpoints.
#[derive(Debug)]
pub struct Large {
    /// Of every slice that has endpoints.
    slice_ports: Vec<SlicePort>,
    slices: usize,
    addresses: HashSet<Ipx>,
    /// In the order of `Compiled::ports`.
    ports: Vec<PortSets>,
    /// Ready ones of this node, by family.
    local_ready: [usize; 2],
    /// What has changed since the Service was last laid out.
    changed: HashMap<Ipx, Option<Endpoint>>,
}

/// The endpoints of one Service port, by family.
#[derive(Debug)]
struct PortSets {
    /// Of the slices.
    number: u16,
    tallies: [Tally; 2],
    /// As it was last laid out.
    choices: [Choice; 2],
    /// Bits of `abi::pool_member` that frontends ask for. `None`: a family that the Service does not have.
    needed: [Option<u8>; 2],
}

/// What becomes of some endpoints of one Service port; those that are `None` have no row any more. Sorted.
pub type PortChange = Vec<(SocketAddrx, Option<CompiledEndpoint>)>;

fn index(ip: Ipx) -> usize {
    usize::from(ip.family() == Family::Ipv6)
}

impl Large {
    /// `compiled`: what has just been made of `service` and `slices`.
    pub fn new(service: &Service, slices: &[&Slice], compiled: &Compiled, place: Place) -> Option<Large> {
        let slice_ports = slices.iter().find(|slice| !slice.endpoints.is_empty())?.ports.clone();
        let is_simple = !compiled.is_cut && compiled.ports.len() == service.ports.len();
        let ports = compiled.ports.iter().filter(|_| is_simple).map(|port| {
            let mut targets = slice_ports.iter().filter(|p| p.name == port.name && p.protocol == port.protocol);
            let target = targets.next().filter(|_| targets.next().is_none())?;
            let mut needed = [None; 2];
            let ips = [&service.cluster_ips, &service.external_ips, &service.load_balancer_ips];
            ips.into_iter().flatten().for_each(|ip| needed[index(*ip)] = Some(0));
            for frontend in &port.frontends {
                let sets = needed[index(frontend.key.ip())].get_or_insert(0);
                *sets |= frontend.inside.member | frontend.outside.member;
            }
            let tallies = [Tally::default(); 2];
            Some(PortSets { number: target.port, tallies, choices: tallies.map(|tally| tally.decide()), needed })
        });
        let ports: Vec<PortSets> = ports.collect::<Option<_>>()?;
        let (addresses, changed) = (HashSet::default(), HashMap::default());
        let mut all = Large { slice_ports, slices: 0, addresses, ports, local_ready: [0; 2], changed };
        for slice in slices.iter().filter(|slice| !slice.endpoints.is_empty()) {
            (is_simple && all.change(None, Some(slice), place)).then_some(())?;
        }
        // Not cleared: a map as large as all endpoints would be walked with the first change.
        all.changed = HashMap::default();
        all.ports.iter_mut().for_each(|port| port.choices = port.tallies.map(|tally| tally.decide()));
        Some(all)
    }

    /// The slice `before` is `now`. False: the Service has to be compiled as a whole, and this is of no more use.
    pub fn change(&mut self, before: Option<&Slice>, now: Option<&Slice>, place: Place) -> bool {
        let [before, now] = [before, now].map(|slice| slice.filter(|slice| !slice.endpoints.is_empty()));
        if [before, now].iter().flatten().any(|slice| slice.ports != self.slice_ports) {
            return false;
        }
        self.slices = self.slices + usize::from(now.is_some()) - usize::from(before.is_some());
        let of_before = before.into_iter().flat_map(|slice| &slice.endpoints);
        let mut gone: HashMap<Ipx, &Endpoint> = of_before.map(|endpoint| (endpoint.ip, endpoint)).collect();
        let mut came = Vec::new();
        for endpoint in now.into_iter().flat_map(|slice| &slice.endpoints) {
            match gone.get(&endpoint.ip) {
                Some(known) if *known == endpoint => drop(gone.remove(&endpoint.ip)),
                _ => came.push(endpoint),
            }
        }
        for endpoint in gone.into_values() {
            self.addresses.remove(&endpoint.ip);
            self.count(endpoint, place, false);
            self.changed.insert(endpoint.ip, None);
        }
        let is_new = came.into_iter().all(|endpoint| {
            self.count(endpoint, place, true);
            self.changed.insert(endpoint.ip, Some(endpoint.clone()));
            self.addresses.insert(endpoint.ip)
        });
        is_new && self.slices > 0
    }

    fn count(&mut self, endpoint: &Endpoint, place: Place, comes: bool) {
        let family = index(endpoint.ip);
        for port in &mut self.ports {
            let candidate = Candidate::new(endpoint, port.number, place);
            match comes {
                true => port.tallies[family].add(&candidate, place),
                false => port.tallies[family].remove(&candidate, place),
            }
        }
        if endpoint.ready && endpoint.node.as_deref() == Some(place.node) {
            let count = &mut self.local_ready[family];
            *count = if comes { *count + 1 } else { *count - 1 };
        }
    }

    /// What has changed since this was last asked, for each port. `None`: other endpoints are concerned, too.
    pub fn take_changes(&mut self, place: Place) -> Option<Vec<PortChange>> {
        let is_same = |port: &PortSets| port.choices == port.tallies.map(|tally| tally.decide());
        if !self.ports.iter().all(is_same) {
            return None;
        }
        let changed = std::mem::take(&mut self.changed);
        let of_port = |port: &PortSets| {
            let mut rows: PortChange = changed.iter().map(|(ip, now)| port.change(*ip, now.as_ref(), place)).collect();
            rows.sort_unstable_by_key(|(at, _)| *at);
            rows
        };
        Some(self.ports.iter().map(of_port).collect())
    }

    /// Ready endpoints of this node, of the family that has more.
    pub fn local_endpoints(&self) -> usize {
        self.local_ready[0].max(self.local_ready[1])
    }
}

impl PortSets {
    fn change(&self, ip: Ipx, now: Option<&Endpoint>, place: Place) -> (SocketAddrx, Option<CompiledEndpoint>) {
        let (choice, needed) = (self.choices[index(ip)], self.needed[index(ip)]);
        let candidate = now.map(|endpoint| Candidate::new(endpoint, self.number, place));
        let usable = candidate.filter(Candidate::is_usable).zip(needed);
        let row = usable.map(|(usable, needed)| compile_endpoint(&usable, choice, place, needed));
        (SocketAddrx { ip, port: self.number }, row)
    }
}
