//! Open connections, as far as kubelane sees their packets: those from outside, and those of pods whose packets it serves.
//! What a socket of this node has connected to is in no table.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use anyhow::Result;

use crate::abi::flow_flag::{FLOW_FIN, FLOW_PROVED, FLOW_REPLY, FLOW_RESET};
use crate::abi::{Backend, Flow, FlowKey, FlowKey4};
use crate::bpf::PinnedMap;
use crate::model::Ipx;
use crate::table::HashMap;

/// Flows that both ends have proved and none has closed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Open {
    /// By service id.
    by_port: HashMap<u32, u64>,
    /// By address and protocol of the backend.
    by_backend: HashMap<(SocketAddr, u8), u64>,
}

impl Open {
    /// Walks through the tables of flows, and holds one batch of them.
    ///
    /// # Errors
    /// When a map cannot be read.
    pub fn read(pin_path: &Path) -> Result<Open> {
        let backends = PinnedMap::open(pin_path, "backends")?;
        let mut met: HashMap<u32, Backend> = HashMap::default();
        let mut open = Open::default();
        let mut meet = |flow: &Flow, protocol: u8| -> Result<()> {
            if flow.has(FLOW_REPLY) {
                return Ok(());
            }
            let id = flow.backend_or_first;
            let backend = match met.get(&id) {
                Some(known) => *known,
                None => *met.entry(id).or_insert(backends.get(&id)?.unwrap_or_default()),
            };
            open.note(flow, protocol, &backend);
            Ok(())
        };
        PinnedMap::open(pin_path, "flows4")?.each(|key: FlowKey4, flow: Flow| meet(&flow, key.protocol))?;
        PinnedMap::open(pin_path, "flows6")?.each(|key: FlowKey, flow: Flow| meet(&flow, key.protocol))?;
        Ok(open)
    }

    /// `flow`: its requests' row. `backend`: who has its backend's id now.
    fn note(&mut self, flow: &Flow, protocol: u8, backend: &Backend) {
        // The flows of a backend that is gone are no Service's.
        if !flow.has(FLOW_PROVED)
            || flow.has(FLOW_FIN | FLOW_RESET)
            || backend.generation != flow.generation_or_interface
        {
            return;
        }
        *self.by_port.entry(backend.service_id).or_default() += 1;
        let at = SocketAddr::new(Ipx(backend.address).to_ip(), u16::from_be_bytes(backend.port_be));
        *self.by_backend.entry((at, protocol)).or_default() += 1;
    }

    /// Of a Service port. `None`: none was seen, which says nothing of sockets of this node.
    pub fn of_port(&self, service_id: u32) -> Option<u64> {
        self.by_port.get(&service_id).copied()
    }

    /// Of a backend.
    pub fn of_backend(&self, ip: IpAddr, port: u16, protocol: u8) -> Option<u64> {
        self.by_backend.get(&(SocketAddr::new(ip, port), protocol)).copied()
    }

    pub fn is_empty(&self) -> bool {
        self.by_port.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable as _;

    use super::*;

    #[test]
    fn only_flows_that_are_open_count_and_only_for_who_has_their_backend() {
        let backend = Backend {
            generation: 2,
            service_id: 7,
            address: Ipx::from(IpAddr::from([10, 0, 0, 1])).0,
            port_be: 80u16.to_be_bytes(),
            ..Backend::default()
        };
        let mut open = Open::default();
        for (state, generation) in
            [(0, 2), (FLOW_PROVED, 2), (FLOW_PROVED, 2), (FLOW_PROVED | FLOW_FIN, 2), (FLOW_PROVED, 1)]
        {
            let flow = Flow { state, generation_or_interface: generation, ..Flow::zeroed() };
            open.note(&flow, 6, &backend);
        }
        assert_eq!((open.of_port(7), open.of_port(8)), (Some(2), None));
        assert_eq!(open.of_backend([10, 0, 0, 1].into(), 80, 6), Some(2));
        assert_eq!(open.of_backend([10, 0, 0, 1].into(), 80, 17), None);
    }
}
