//! Which Service ports nobody on this node answers although others do: kube-proxy counts them for dashboards.

use super::compile::{Compiled, CompiledPort};
use crate::abi::frontend_flag::{
    FRONTEND_CLUSTER_IP, FRONTEND_EXTERNAL_IP, FRONTEND_LOAD_BALANCER, FRONTEND_NODE_PORT,
};
use crate::abi::pool_empty::EMPTY_DROP;
use crate::model::Family;

/// Roles that `externalTrafficPolicy` is for.
const EXTERNAL: u32 = FRONTEND_EXTERNAL_IP | FRONTEND_LOAD_BALANCER | FRONTEND_NODE_PORT;

/// Numbers of Service ports whose traffic policy is Local, with endpoints on other nodes only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NoLocal {
    /// By `internalTrafficPolicy`: IPv4, IPv6.
    pub internal: [u64; 2],
    /// By `externalTrafficPolicy`: IPv4, IPv6.
    pub external: [u64; 2],
}

impl NoLocal {
    /// Of one Service.
    pub fn of(compiled: &Compiled) -> NoLocal {
        let mut sum = NoLocal::default();
        compiled.ports.iter().for_each(|port| sum.add(of_port(port)));
        sum
    }

    pub fn add(&mut self, other: NoLocal) {
        for family in 0..2 {
            self.internal[family] += other.internal[family];
            self.external[family] += other.external[family];
        }
    }

    /// Takes away what was added before.
    pub fn subtract(&mut self, other: NoLocal) {
        for family in 0..2 {
            self.internal[family] -= other.internal[family];
            self.external[family] -= other.external[family];
        }
    }
}

/// A port counts once for each family and policy, however many addresses it has.
fn of_port(port: &CompiledPort) -> NoLocal {
    let mut counts = NoLocal::default();
    for frontend in &port.frontends {
        let family = usize::from(frontend.key.ip().family() == Family::Ipv6);
        let drops = |on_empty: u8| u32::from(on_empty) == EMPTY_DROP;
        if u32::from(frontend.flags) & FRONTEND_CLUSTER_IP != 0 && drops(frontend.inside.on_empty) {
            counts.internal[family] = 1;
        }
        if u32::from(frontend.flags) & EXTERNAL != 0 && drops(frontend.outside.on_empty) {
            counts.external[family] = 1;
        }
    }
    counts
}
