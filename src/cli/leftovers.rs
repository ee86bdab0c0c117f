//! What kube-proxy leaves on a node: chains, the IPVS device, a sysctl, and its process on the ports that kubelane wants.

use std::collections::BTreeSet;
use std::fs;

use crate::tool::output_of;

/// Tools that list the packet filter's chains, with what else must exist for them to be asked: iptables-legacy loads
/// kernel modules when it is asked in vain.
const TOOLS: [(&[&str], Option<&str>); 5] = [
    (&["nft", "list", "chains"], None),
    (&["iptables-save"], None),
    (&["ip6tables-save"], None),
    (&["iptables-legacy-save"], Some("/proc/net/ip_tables_names")),
    (&["ip6tables-legacy-save"], Some("/proc/net/ip6_tables_names")),
];

/// kube-proxy's chains in the packet filter, or `None` when no tool that could list them is installed.
pub fn kube_proxy_chains() -> Option<BTreeSet<String>> {
    let mut listed = false;
    let mut chains = BTreeSet::new();
    for (command, precondition) in TOOLS {
        if precondition.is_some_and(|path| fs::read(path).unwrap_or_default().is_empty()) {
            continue;
        }
        if let Some(text) = output_of(command) {
            listed = true;
            chains.extend(chains_in(&text));
        }
    }
    listed.then_some(chains)
}

/// kube-proxy's chains and tables in the output of `nft list chains` or `iptables-save`. Chains that the kubelet makes
/// (or made, before Kubernetes 1.28) are no sign of kube-proxy.
fn chains_in(text: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for line in text.lines().map(str::trim) {
        let mut words = line.split_whitespace();
        match (words.next(), words.next(), words.next()) {
            (Some("table"), Some(family), Some("kube-proxy")) => {
                found.insert(format!("table {family} kube-proxy"));
            }
            (Some("chain"), Some(chain), _) if is_kube_proxys(chain) => {
                found.insert(chain.to_owned());
            }
            (Some(first), ..) => {
                let chain = first.strip_prefix(':').filter(|chain| is_kube_proxys(chain));
                found.extend(chain.map(str::to_owned));
            }
            _ => {}
        }
    }
    found
}

fn is_kube_proxys(chain: &str) -> bool {
    const KUBELETS: [&str; 5] =
        ["KUBE-FIREWALL", "KUBE-KUBELET-CANARY", "KUBE-MARK-MASQ", "KUBE-MARK-DROP", "KUBE-POSTROUTING"];
    chain.starts_with("KUBE-") && !KUBELETS.contains(&chain)
}

/// Whether packets for 127.0.0.0/8 may come from other hosts. kube-proxy's iptables mode sets the sysctl for NodePorts on
/// 127.0.0.1, and drops what comes from elsewhere by a rule that its cleanup takes away, while the sysctl stays.
pub fn routes_loopback() -> bool {
    let value = fs::read_to_string("/proc/sys/net/ipv4/conf/all/route_localnet");
    value.is_ok_and(|value| value.trim() != "0")
}

/// What [`routes_loopback`] means.
pub const LOOPBACK_IS_ROUTED: &str = "net.ipv4.conf.all.route_localnet is on, as kube-proxy sets it: without its \
    rules, hosts on the same network can reach what listens on 127.0.0.1 here (CVE-2020-8558)";
/// What to do about it.
pub const LOOPBACK_REMEDY: &str = "kubelane does not need it; if kube-proxy is gone for good: sysctl -w \
    net.ipv4.conf.all.route_localnet=0, and remove it from /etc/sysctl.d";

/// "name (pid N)" of the process that listens on a TCP port of this network namespace.
pub fn listener_on(port: u16) -> Option<String> {
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"];
    let inode = tables.iter().find_map(|t| listening_inode(&fs::read_to_string(t).ok()?, port))?;
    let wanted = format!("socket:[{inode}]");
    let holds = |pid: &u32| {
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        descriptors.filter_map(|d| fs::read_link(d.path()).ok()).any(|target| target.as_os_str() == wanted.as_str())
    };
    let pids = fs::read_dir("/proc").ok()?.flatten().filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
    let pid = pids.into_iter().find(holds)?;
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    Some(format!("{} (pid {pid})", name.trim()))
}

/// The inode of the listening socket on `port`, in the format of /proc/net/tcp (proc_pid_net(5)).
fn listening_inode(table: &str, port: u16) -> Option<u64> {
    const LISTEN: &str = "0A";
    table.lines().skip(1).find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let local = u16::from_str_radix(fields.get(1)?.rsplit_once(':')?.1, 16).ok()?;
        (local == port && *fields.get(3)? == LISTEN).then(|| fields.get(9)?.parse().ok()).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kube_proxys_chains_are_told_from_the_kubelets() {
        let table = [
            (
                "iptables-save",
                "*nat\n:PREROUTING ACCEPT [0:0]\n:KUBE-SERVICES - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n-A PREROUTING -j KUBE-SERVICES\nCOMMIT\n",
                vec!["KUBE-SERVICES"],
            ),
            (
                "the kubelet alone",
                ":KUBE-FIREWALL - [0:0]\n:KUBE-KUBELET-CANARY - [0:0]\n:KUBE-POSTROUTING - [0:0]\n",
                vec![],
            ),
            (
                "iptables-nft through nft",
                "table ip nat {\n\tchain KUBE-SVC-ABC {\n\t}\n\tchain OUTPUT {\n\t}\n}\n",
                vec!["KUBE-SVC-ABC"],
            ),
            (
                "nftables mode",
                "table ip kube-proxy {\n\tchain services {\n\t}\n}\ntable ip6 kube-proxy {\n}\n",
                vec!["table ip kube-proxy", "table ip6 kube-proxy"],
            ),
            ("nothing", "", vec![]),
        ];
        for (name, text, expected) in table {
            assert_eq!(chains_in(text).into_iter().collect::<Vec<_>>(), expected, "{name}");
        }
    }

    #[test]
    fn a_listening_socket_is_found_and_its_process_named() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        let found = listener_on(at.port()).expect("our own socket is listed");
        assert!(found.ends_with(&format!("(pid {})", std::process::id())), "{found}");
        // Not the listener's own port after its end: a process that another test forks holds the socket until it
        // becomes another program.
        let client = std::net::TcpStream::connect(at).unwrap();
        assert_eq!(listener_on(client.local_addr().unwrap().port()), None);
    }
}
