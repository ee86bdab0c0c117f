//! The device of this node's pods: its row, and packets by it.

use bytemuck::Zeroable as _;
use kubelane::abi::{PodDevice, flow_state};
use kubelane::bpf::Direction;
use kubelane::bpf::run::run_pod;
use kubelane::model::Ipx;
use libbpf_rs::{MapCore as _, MapFlags};
use nix::time::{ClockId, clock_gettime};

use super::frame::{self, Frame};
use super::{NODE4, NODE6, Node, PODS, interface_index};

impl Node {
    /// What attaching to the pods' device notes.
    pub fn note_pod_device(&self, gateway: [u8; 6], ip4: &str, ip6: &str) {
        let [ip4, ip6] = [ip4, ip6].map(|ip| ip.parse::<Ipx>().unwrap().0);
        let row = PodDevice { ip4, ip6, gateway, ..PodDevice::zeroed() };
        let index = interface_index(PODS);
        self.pinned("pod_devices").update(&index.to_ne_bytes(), bytemuck::bytes_of(&row), MapFlags::ANY).unwrap();
    }

    /// The same; and the pod has begun so many flows in the second that is returned, which is now.
    pub fn fill_pod_quota(&self, gateway: [u8; 6], openings: u32) -> u32 {
        self.note_pod_device(gateway, NODE4, NODE6);
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap();
        let second = now.tv_sec() as u32 & flow_state::FLOW_SECOND_MASK;
        let (map, index) = (self.pinned("pod_devices"), interface_index(PODS).to_ne_bytes());
        let row = map.lookup(&index, MapFlags::ANY).unwrap().unwrap();
        let row = PodDevice { second, openings: openings as i32, ..bytemuck::pod_read_unaligned(&row) };
        map.update(&index, bytemuck::bytes_of(&row), MapFlags::ANY).unwrap();
        second
    }

    /// The second that the pod's quota is of, and what it has begun in it.
    pub fn pod_quota(&self) -> (u32, i32) {
        let row = self.pinned("pod_devices").lookup(&interface_index(PODS).to_ne_bytes(), MapFlags::ANY);
        let row: PodDevice = bytemuck::pod_read_unaligned(&row.unwrap().unwrap());
        (row.second, row.openings)
    }

    /// A packet that comes in by the device of this node's pods.
    pub fn pod_in(&mut self, frame: &Frame) -> (i32, Frame) {
        let (action, bytes) = self.pod_in_bytes(&frame.bytes());
        (action, frame::parse(&bytes))
    }

    /// The same with its link header.
    pub fn pod_in_bytes(&mut self, frame: &[u8]) -> (i32, Vec<u8>) {
        let outcome = run_pod(self.datapath.devices(), frame, interface_index(PODS), 1).unwrap();
        (outcome.action, outcome.frame)
    }

    /// A packet that leaves for a pod of this node.
    pub fn pod_out(&mut self, frame: &Frame) -> (i32, Frame) {
        let outcome = self.raw(Direction::Out, interface_index(PODS), &frame.bytes());
        (outcome.action, frame::parse(&outcome.frame))
    }
}
