//! What flows of packets from outside add up to, once a minute: by Service, for those that the metrics name, and source
//! ports towards the backend that has the most. A walk holds a batch of rows, and a number for each backend in use.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use tokio::time::{MissedTickBehavior, interval};

use crate::abi::flow_flag::{FLOW_FIN, FLOW_PROVED, FLOW_REPLY, FLOW_RESET};
use crate::abi::{Backend, Flow, FlowKey, FlowKey4, ServiceName};
use crate::bpf::{self, PinnedMap, STATES};
use crate::model::Ipx;
use crate::serve::Metrics;
use crate::table::HashMap;

const EVERY: Duration = Duration::from_secs(60);

/// Flows by [`STATES`].
type Count = [u64; 3];

/// By Service port, as of the last walk.
#[derive(Clone, Debug, Default)]
pub struct ByService(Arc<Mutex<HashMap<ServiceName, Count>>>);

impl ByService {
    /// Of one Service port, by state.
    pub fn of(&self, name: &ServiceName) -> [(&'static str, u64); 3] {
        let counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.get(name).copied().unwrap_or_default();
        std::array::from_fn(|state| (STATES[state], count[state]))
    }

    fn set(&self, counts: HashMap<ServiceName, Count>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = counts;
    }
}

/// One walk's sums.
#[derive(Debug, Default)]
struct Sums {
    by_service: HashMap<u32, Count>,
    /// By backend, its protocol, and the node's address that it sees.
    ports: HashMap<(IpAddr, [u8; 2], u8, IpAddr), u64>,
}

/// Runs for ever; a walk that fails is told of when its reason is new.
///
/// # Errors
/// When a metric's name is taken, or a walk breaks off.
pub async fn watch(pin_path: PathBuf, metrics: Arc<Metrics>, by_service: ByService) -> anyhow::Result<()> {
    let most = Arc::new(AtomicU64::new(0));
    let (read, room) = (Arc::clone(&most), bpf::snat_ports() as f64);
    const USED: &str = "Source ports in use towards the backend on another node that uses the most";
    metrics.read_gauges("kubelane_snat_ports_used", USED, &[], move || {
        vec![(vec![], read.load(Ordering::Relaxed) as f64)]
    })?;
    const ROOM: &str = "Source ports available towards each backend on another node";
    metrics.read_gauges("kubelane_snat_ports_capacity", ROOM, &[], move || vec![(vec![], room)])?;
    let mut told = None;
    let mut ticks = interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let pins = pin_path.clone();
        match tokio::task::spawn_blocking(move || walk(&pins)).await.context("counting flows failed")? {
            Ok((counts, ports)) => {
                by_service.set(counts);
                most.store(ports, Ordering::Relaxed);
                told = None;
            }
            Err(error) => {
                let error = format!("{error:#}");
                if told.as_ref() != Some(&error) {
                    tracing::warn!("{error}; trying again");
                    told = Some(error);
                }
            }
        }
    }
}

fn walk(pin_path: &Path) -> anyhow::Result<(HashMap<ServiceName, Count>, u64)> {
    let (backends, services) = (PinnedMap::open(pin_path, "backends")?, PinnedMap::open(pin_path, "services")?);
    let mut sums = Sums::default();
    let mut owners: HashMap<u32, Backend> = HashMap::default();
    let mut meet = |flow: &Flow, protocol: u8| -> anyhow::Result<()> {
        if flow.has(FLOW_REPLY) {
            return Ok(());
        }
        let id = flow.backend_or_first;
        let backend = match owners.get(&id) {
            Some(known) => *known,
            None => *owners.entry(id).or_insert(backends.get(&id)?.unwrap_or_default()),
        };
        sums.note(flow, protocol, &backend);
        Ok(())
    };
    PinnedMap::open(pin_path, "flows4")?.each(|key: FlowKey4, flow: Flow| meet(&flow, key.protocol))?;
    PinnedMap::open(pin_path, "flows6")?.each(|key: FlowKey, flow: Flow| meet(&flow, key.protocol))?;
    let mut named = HashMap::default();
    for (id, count) in sums.by_service {
        if let Some(name) = services.get::<_, ServiceName>(&id)? {
            named.insert(name, count);
        }
    }
    Ok((named, sums.ports.into_values().max().unwrap_or(0)))
}

impl Sums {
    /// `flow`: its requests' row. `backend`: who has its backend's id now.
    fn note(&mut self, flow: &Flow, protocol: u8, backend: &Backend) {
        let state = if flow.has(FLOW_FIN | FLOW_RESET) { 2 } else { usize::from(flow.has(FLOW_PROVED)) };
        // The flows of a backend that is gone are no Service's.
        if backend.generation == flow.generation_or_interface {
            self.by_service.entry(backend.service_id).or_default()[state] += 1;
        }
        if flow.is_routed() {
            let (to, from) = (Ipx(flow.ends.destination).to_ip(), Ipx(flow.ends.source).to_ip());
            *self.ports.entry((to, flow.ends.destination_port_be, protocol, from)).or_default() += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable as _;

    use super::*;
    use crate::abi::flow_path::PATH_ROUTED;

    #[test]
    fn flows_count_for_the_service_that_has_their_backend_and_ports_for_the_backend() {
        let mut sums = Sums::default();
        let backend = Backend { generation: 2, service_id: 7, ..Backend::default() };
        let flow = |flags: u32, generation: u32, last: u8| {
            let mut flow = Flow { state: flags, generation_or_interface: generation, ..Flow::zeroed() };
            flow.ends.destination[15] = last;
            flow
        };
        for (flags, generation, last) in [
            (0, 2, 1),
            (FLOW_PROVED, 2, 1),
            (FLOW_PROVED | PATH_ROUTED, 2, 2),
            (FLOW_PROVED | PATH_ROUTED | FLOW_FIN, 2, 2),
            (FLOW_PROVED | PATH_ROUTED, 1, 3),
        ] {
            sums.note(&flow(flags, generation, last), 6, &backend);
        }
        assert_eq!(sums.by_service.into_iter().collect::<Vec<_>>(), [(7, [1, 2, 1])]);
        let mut ports: Vec<u64> = sums.ports.into_values().collect();
        ports.sort_unstable();
        assert_eq!(ports, [1, 2]);
    }
}
