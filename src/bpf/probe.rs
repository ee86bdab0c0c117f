//! What this kernel can do, asked of the kernel itself and never guessed from its version.

use std::path::Path;

use libbpf_rs::{MapType, ProgramType};

use super::hook;
use super::signals::uninterrupted;
use super::trial::{self, FibFlag};

/// The type of every program that is attached to the cgroup.
const SOCK_ADDR: ProgramType = ProgramType::CgroupSockAddr;

/// One feature and what depends on it.
#[derive(Clone, Debug)]
pub struct Feature {
    pub name: &'static str,
    pub found: bool,
    /// Without it kubelane cannot run.
    pub required: bool,
    pub needed_for: &'static str,
    /// What happens, or is to be done, without it.
    pub without: &'static str,
}

fn has_helper(program: ProgramType, helper: u32) -> bool {
    uninterrupted(|| program.is_helper_supported(helper)).unwrap_or(false)
}

fn has_map(map: MapType) -> bool {
    map.is_supported().unwrap_or(false)
}

/// bpf_set_retval for cgroup socket address programs (5.18).
pub fn has_set_retval() -> bool {
    has_helper(SOCK_ADDR, libbpf_sys::BPF_FUNC_set_retval)
}

/// Whether bpf_fib_lookup names the source of a route (BPF_FIB_LOOKUP_SRC, 6.7).
pub fn has_route_source() -> bool {
    trial::fib_lookup_knows(FibFlag::Source)
}

/// Whether bpf_fib_lookup says which MTU was exceeded (5.12). It has no flag; bpf_check_mtu came with it.
pub fn has_route_mtu() -> bool {
    has_helper(ProgramType::SchedCls, libbpf_sys::BPF_FUNC_check_mtu)
}

/// BTF of the running kernel, which the socket iterators are relocated against.
pub fn has_kernel_btf() -> bool {
    Path::new("/sys/kernel/btf/vmlinux").exists()
}

/// How connected sockets are found whose backend is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SocketSearch {
    /// The iterator over the map of their origins, in all network namespaces (5.8).
    Origins,
    /// The iterators over UDP and TCP sockets (bpf_sk_storage_get() there: 5.11), in one namespace after the other.
    Namespaces,
    /// Not at all: no BTF, or the kernel refuses these programs.
    None,
}

/// The first of these that the kernel has. Hardened kernels have been met that refuse the iterators over maps only.
pub fn socket_search() -> SocketSearch {
    let has_storage = |target| trial::iterator_knows(target, libbpf_sys::BPF_FUNC_sk_storage_get);
    if !has_kernel_btf() {
        SocketSearch::None
    } else if trial::iterator_knows(c"bpf_sk_storage_map", libbpf_sys::BPF_FUNC_seq_write) {
        SocketSearch::Origins
    } else if has_storage(c"udp") && has_storage(c"tcp") {
        SocketSearch::Namespaces
    } else {
        SocketSearch::None
    }
}

/// Every feature, the required ones first. Needs CAP_BPF (or CAP_SYS_ADMIN): without it nothing is found.
pub fn features() -> Vec<Feature> {
    [required(), of_sockets(), of_packets()].concat()
}

fn required() -> Vec<Feature> {
    vec![
        Feature {
            name: "cgroup socket address programs",
            found: uninterrupted(|| SOCK_ADDR.is_supported()).unwrap_or(false),
            required: true,
            needed_for: "connect, sendmsg, recvmsg and getpeername to Services",
            without: "Linux 5.10 or newer with CONFIG_CGROUP_BPF is needed",
        },
        Feature {
            name: "socket storage",
            found: has_map(MapType::SkStorage) && has_helper(SOCK_ADDR, libbpf_sys::BPF_FUNC_sk_storage_get),
            required: true,
            needed_for: "the record of a socket's original destination",
            without: "Linux 5.10 or newer is needed",
        },
        Feature {
            name: "network namespace cookies",
            found: has_helper(SOCK_ADDR, libbpf_sys::BPF_FUNC_get_netns_cookie),
            required: true,
            needed_for: "session affinity, NodePorts on loopback",
            without: "Linux 5.7 or newer is needed",
        },
        Feature {
            name: "LRU hash maps",
            found: has_map(MapType::LruHash),
            required: true,
            needed_for: "session affinity",
            without: "Linux 5.10 or newer is needed",
        },
        Feature {
            name: "ring buffers",
            found: has_map(MapType::RingBuf) && has_helper(SOCK_ADDR, libbpf_sys::BPF_FUNC_ringbuf_reserve),
            required: true,
            needed_for: "telling `kubelane monitor` what happens",
            without: "a kernel from 5.8 is needed",
        },
        Feature {
            name: "packet programs (TC)",
            found: has_helper(ProgramType::SchedCls, libbpf_sys::BPF_FUNC_fib_lookup)
                && has_helper(ProgramType::SchedCls, libbpf_sys::BPF_FUNC_redirect_neigh)
                && has_map(MapType::LpmTrie),
            required: true,
            needed_for: "NodePorts, load balancer and external IPs from outside",
            without: "Linux 5.10 or newer with CONFIG_NET_CLS_BPF and CONFIG_NET_SCH_INGRESS is needed",
        },
        Feature {
            name: "batch operations on hash maps",
            found: trial::has_hash_batches(),
            required: true,
            needed_for: "writing many map entries at once, removing ended flows",
            without: "Linux 5.6 or newer is needed",
        },
    ]
}

fn of_sockets() -> Vec<Feature> {
    vec![
        Feature {
            name: "bpf_set_retval",
            found: has_set_retval(),
            required: false,
            needed_for: "ECONNREFUSED and ETIMEDOUT from connect()",
            without: "applications see EPERM instead (kernels before 5.18)",
        },
        Feature {
            name: "socket iterators",
            found: socket_search() != SocketSearch::None,
            required: false,
            needed_for: "finding sockets whose backend is gone",
            without: "connected UDP sockets keep a removed backend until they fail by themselves (CONFIG_DEBUG_INFO_BTF)",
        },
        Feature {
            name: "destroying sockets through sock_diag",
            found: super::stale::can_destroy(),
            required: false,
            needed_for: "destroying sockets whose backend is gone",
            without: "connected UDP sockets keep a removed backend until they fail by themselves (CONFIG_INET_DIAG_DESTROY)",
        },
        Feature {
            name: "SO_NETNS_COOKIE",
            found: super::namespaces::own_cookie().is_some(),
            required: false,
            needed_for: "NodePorts on 127.0.0.1 and ::1 in a namespace other than the machine's first",
            without: "the machine's first network namespace is taken for the node's (kernels before 5.14)",
        },
    ]
}

fn of_packets() -> Vec<Feature> {
    vec![
        Feature {
            name: "tcx links",
            found: hook::has_tcx(),
            required: false,
            needed_for: "a link that keeps each program on its device, ahead of other programs",
            without: "filters of a clsact qdisc are used (kernels before 6.6)",
        },
        Feature {
            name: "sources of routes in bpf_fib_lookup",
            found: has_route_source(),
            required: false,
            needed_for: "the source address towards a backend on another node",
            without: "the first address of the route's device is taken (kernels before 6.7)",
        },
        Feature {
            name: "marks in bpf_fib_lookup",
            found: trial::fib_lookup_knows(FibFlag::Mark),
            required: false,
            needed_for: "routing rules that match a packet's mark",
            without: "such rules are not followed for backends on other nodes (kernels before 6.10)",
        },
        Feature {
            name: "MTUs of routes in bpf_fib_lookup",
            found: has_route_mtu(),
            required: false,
            needed_for: "the path MTU that is reported to clients and backends",
            without: "1280 is reported whenever a packet does not fit (kernels before 5.12)",
        },
    ]
}
