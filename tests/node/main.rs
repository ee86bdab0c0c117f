//! Nodes with real daemons, and clients outside: NodePorts, other people's CNIs, pods of other kernels. Needs root.

#[path = "../laboratory/mod.rs"]
mod laboratory;

mod cni;
mod cni_devices;
mod cni_shapes;
mod direct;
mod lab;
mod links;
mod node_ports;
mod pods;
mod reach;
mod tap_pods;
mod tracked;
mod vm_pods;
