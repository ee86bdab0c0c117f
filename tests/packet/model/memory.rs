//! Session affinity: which backend a client of a Service port must get again.

use std::collections::HashMap;

use kubelane::model::Ipx;

use super::flow::{End, Flow};
use super::random_cluster::RandomCluster;
use super::semantics::{PortId, Sent, is_usable};

/// A client whose connection is proved cannot be made to forget by somebody who forges its address: what is proved is kept
/// apart from what is not, and goes first. They differ where the client asks both pools of a Service.
#[derive(Clone, Copy, Debug, Default)]
struct Remembered {
    proved: Option<End>,
    fresh: Option<End>,
}

/// By client and Service port, whichever address was asked, and from wherever.
#[derive(Default)]
pub struct Memory(HashMap<(Ipx, PortId), Remembered>);

impl Memory {
    /// What cannot be had any more is forgotten. Whether there is affinity is asked when a connection begins.
    pub fn world_changed(&mut self, world: &RandomCluster) {
        for ((_, port), remembered) in &mut self.0 {
            let keep = |end: Option<End>| end.filter(|(ip, number)| is_usable(world, port, *ip, *number));
            *remembered = Remembered { proved: keep(remembered.proved), fresh: keep(remembered.fresh) };
        }
    }

    /// Where this client must be sent, if it matters.
    pub fn recall(&self, client: Ipx, sent: &Sent) -> Option<End> {
        let may_be_had = |end: &End| sent.targets.iter().any(|target| target.end() == *end);
        let remembered = self.0.get(&(client, sent.port.clone())).filter(|_| sent.affine)?;
        remembered.proved.filter(may_be_had).or(remembered.fresh.filter(may_be_had))
    }

    /// A connection began. `backend`: None for one that was chosen and then not used.
    pub fn began(&mut self, client: Ipx, sent: &Sent, backend: Option<End>) {
        if sent.affine && self.recall(client, sent).is_none() {
            self.0.entry((client, sent.port.clone())).or_default().fresh = backend;
        }
    }

    /// Its client has shown that it hears the backend.
    pub fn proved(&mut self, flow: &Flow) {
        if flow.affine {
            let key = (flow.request.client.0, flow.port.clone());
            self.0.entry(key).or_default().proved = Some(flow.target.end());
        }
    }
}
