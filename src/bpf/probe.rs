//! What this kernel can do, asked of the kernel itself and never guessed from its version.

use std::path::Path;

use libbpf_rs::{MapType, ProgramType};

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
    program.is_helper_supported(helper).unwrap_or(false)
}

fn has_map(map: MapType) -> bool {
    map.is_supported().unwrap_or(false)
}

/// bpf_set_retval for cgroup socket address programs (5.18).
pub fn has_set_retval() -> bool {
    has_helper(SOCK_ADDR, libbpf_sys::BPF_FUNC_set_retval)
}

/// bpf_ktime_get_coarse_ns (5.11).
pub fn has_coarse_clock() -> bool {
    has_helper(ProgramType::SchedCls, libbpf_sys::BPF_FUNC_ktime_get_coarse_ns)
        && has_helper(ProgramType::CgroupSockAddr, libbpf_sys::BPF_FUNC_ktime_get_coarse_ns)
}

/// BTF of the running kernel, which the socket iterator is relocated against.
pub fn has_kernel_btf() -> bool {
    Path::new("/sys/kernel/btf/vmlinux").exists()
}

/// Every feature, the required ones first. Needs CAP_BPF (or CAP_SYS_ADMIN): without it nothing is found.
pub fn features() -> Vec<Feature> {
    vec![
        Feature {
            name: "cgroup socket address programs",
            found: SOCK_ADDR.is_supported().unwrap_or(false),
            required: true,
            needed_for: "connect, sendmsg, recvmsg and getpeername to Services",
            without: "a kernel from 5.10 with CONFIG_CGROUP_BPF is needed",
        },
        Feature {
            name: "socket storage",
            found: has_map(MapType::SkStorage) && has_helper(SOCK_ADDR, libbpf_sys::BPF_FUNC_sk_storage_get),
            required: true,
            needed_for: "the record of what a socket asked for",
            without: "a kernel from 5.10 is needed",
        },
        Feature {
            name: "network namespace cookies",
            found: has_helper(SOCK_ADDR, libbpf_sys::BPF_FUNC_get_netns_cookie),
            required: true,
            needed_for: "session affinity, NodePorts on loopback",
            without: "a kernel from 5.7 is needed",
        },
        Feature {
            name: "LRU hash maps",
            found: has_map(MapType::LruHash),
            required: true,
            needed_for: "session affinity",
            without: "a kernel from 5.10 is needed",
        },
        Feature {
            name: "packet programs (TC)",
            found: has_helper(ProgramType::SchedCls, libbpf_sys::BPF_FUNC_fib_lookup)
                && has_helper(ProgramType::SchedCls, libbpf_sys::BPF_FUNC_redirect_neigh)
                && has_map(MapType::LpmTrie),
            required: true,
            needed_for: "NodePorts, load balancer and external IPs from outside",
            without: "a kernel from 5.10 with CONFIG_NET_CLS_BPF and CONFIG_NET_SCH_INGRESS is needed",
        },
        Feature {
            name: "bpf_set_retval",
            found: has_set_retval(),
            required: false,
            needed_for: "ECONNREFUSED and ETIMEDOUT from connect()",
            without: "applications see EPERM instead (kernels before 5.18)",
        },
        Feature {
            name: "kernel BTF",
            found: has_kernel_btf(),
            required: false,
            needed_for: "finding sockets whose backend is gone",
            without: "connected UDP sockets keep a removed backend until they fail by themselves (CONFIG_DEBUG_INFO_BTF)",
        },
        Feature {
            name: "destroying sockets through sock_diag",
            found: super::stale::can_destroy(),
            required: false,
            needed_for: "ending sockets whose backend is gone",
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
