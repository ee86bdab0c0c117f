//! The only door to libbpf and the only `unsafe`: loading, pinning and attaching the BPF object, the kernel maps as a
//! [`MapIo`](crate::sync::MapIo), probes of kernel features, the programs of outward
//! devices, the collection of ended flows, the search for sockets whose backend is gone, what maps take up,
//! and listening to what happens.

mod account;
mod attach;
mod attached;
mod batch;
mod btf;
mod cleanup;
mod ctnetlink;
mod devices;
mod epochs;
mod filter;
mod flows;
mod former;
mod grow;
mod hand_over;
mod hook;
mod link;
mod load;
mod maps;
pub mod memory;
mod monitor;
mod namespaces;
mod object;
mod packet_trial;
pub mod pinned;
mod pins;
mod ports;
mod privileges;
pub mod probe;
mod probes;
mod read;
mod reconnect;
#[cfg(feature = "lab")]
pub mod reference;
mod rehearsal;
mod reply_filter;
pub mod run;
mod service_counts;
mod settings;
mod signals;
mod sizes;
mod skeleton;
mod stale;
mod test_run;
mod tracked;
mod trial;
mod upgrade;
mod usage;
pub mod verifier;

pub use account::{MapMemory, map_memory};
pub use attach::SocketHooks;
pub use attached::{Attachment, Configuration, attachments, configuration};
pub use cleanup::{Cleanup, cleanup};
pub use devices::{Device, Devices, LinkLayer, Method, Role};
pub use epochs::{RouteEpoch, ThroughStack};
pub use flows::{FlowCollector, FlowPass, PROTOCOLS, STATES};
pub use hook::{Direction, Fault, programs_before_ours};
pub use link::Attached;
pub use load::Datapath;
pub use maps::Maps;
pub use monitor::{Event, Listening, Tally, Wanted, sweep_listeners};
pub use namespaces::{Client, NetworkNamespace, find_clients, in_other_namespaces, look_into, own_cookie};
pub use packet_trial::{PacketTrial, hardware_address};
pub use pins::Pins;
pub use ports::snat_ports;
pub use privileges::Privileges;
pub use probes::{ProbeRows, clock_ns};
pub use read::{PinnedMap, WireMarks};
pub use rehearsal::{Change, Hook, Rehearsal, Trial};
pub use service_counts::{ServiceCount, ServiceCounts, Traffic};
pub use settings::{Counting, Settings};
pub use sizes::rows_at_most;
pub use stale::{Search, StalePass, StaleSockets};
pub use usage::MapUsage;
