//! What changes under a client's feet: pods that go, daemons that stop, crash and come back, and cleanup.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::laboratory::cluster::{Cluster, PODS, all, mapped, names, vip};
use crate::laboratory::daemon::{Daemon, PATIENCE};
use crate::laboratory::load::{Load, failures};
use crate::laboratory::manifests::Endpoint;
use crate::laboratory::messages::Kind::{self, *};
use crate::laboratory::{eventually, process, skip};

/// The other pod of the two that these tests use.
fn other(pod: &str) -> &'static str {
    if pod == "a" { "b" } else { "a" }
}

#[test]
fn an_unconnected_socket_moves_at_once_when_its_pod_goes_and_is_refused_when_the_last_goes() {
    let Some(cluster) = Cluster::or_skip() else { return };
    for (kind, family) in [(Udp4, 0), (Udp6, 1)] {
        let to = vip(10, 53)[family];
        cluster.put("echo", 10, json!({}), &cluster.ready(&["a", "b"]));
        let daemon = cluster.start();
        let mut client = cluster.client("client");
        let mut socket = client.open(kind).unwrap();
        let (first, _) = socket.ask_at(to).unwrap();
        cluster.put("echo", 10, json!({}), &cluster.ready(&[other(&first)]));
        cluster.wait_for_backend(cluster.lab.pod(&first).addresses()[family], false);
        for _ in 0..10 {
            assert_eq!(socket.ask_at(to).unwrap(), (other(&first).to_owned(), to), "{kind:?}");
        }
        cluster.put("echo", 10, json!({}), &[]);
        cluster.wait_for_backend(cluster.lab.pod(other(&first)).addresses()[family], false);
        assert_eq!(socket.send_to(to), Err("ECONNREFUSED".to_owned()), "{kind:?}");
        daemon.terminate().unwrap();
    }
}

#[test]
fn an_unconnected_socket_stays_with_its_terminating_pod_only_while_no_other_is_ready() {
    let Some(cluster) = Cluster::or_skip() else { return };
    cluster.put("echo", 10, json!({}), &cluster.ready(&["a"]));
    let _daemon = cluster.start();
    let to = vip(10, 53)[0];
    let mut client = cluster.client("client");
    let mut socket = client.open(Udp4).unwrap();
    assert_eq!(socket.ask_at(to).unwrap().0, "a");
    let leaving = cluster.endpoints(Endpoint::terminating, &["a"]);
    cluster.put("echo", 10, json!({}), &[leaving.clone(), cluster.endpoints(Endpoint::unready, &["b"])].concat());
    for _ in 0..50 {
        assert_eq!(socket.ask_at(to).unwrap().0, "a", "no other pod is ready");
    }
    cluster.put("echo", 10, json!({}), &[leaving, cluster.ready(&["b"])].concat());
    cluster.wait_for_backend(cluster.lab.pod("b").v4.into(), true);
    assert!(eventually(PATIENCE, || cluster.client("other").ask(Udp4, to, 10) == all("b", 10)), "new sockets go to b");
}

#[test]
fn a_connected_datagram_socket_goes_on_with_another_pod_when_its_own_is_gone() {
    let Some(cluster) = Cluster::or_skip() else { return };
    let [v4, v6] = vip(10, 53);
    goes_on_with_another_pod(&cluster, Udp4, v4, 0);
    goes_on_with_another_pod(&cluster, Udp6, v6, 1);
    goes_on_with_another_pod(&cluster, Udp6, mapped(v4), 0);
}

/// How often the daemon said that it has connected sockets anew.
fn reconnections(daemon: &Daemon) -> usize {
    daemon.log().matches("UDP sockets without a backend were reconnected").count()
}

fn goes_on_with_another_pod(cluster: &Cluster, kind: Kind, to: SocketAddr, family: usize) {
    cluster.put("echo", 10, json!({}), &cluster.ready(&["a", "b"]));
    let daemon = cluster.start();
    // In a pod and on the node: the socket is found in whichever namespace it is.
    for mut client in [cluster.client("client"), cluster.host_client()] {
        cluster.put("echo", 10, json!({}), &cluster.ready(&["a", "b"]));
        for pod in ["a", "b"] {
            cluster.wait_for_backend(cluster.lab.pod(pod).addresses()[family], true);
        }
        let mut socket = client.open(kind).unwrap();
        socket.connect(to).unwrap();
        let first = socket.ask().unwrap();
        // A socket of the same process that is connected to the pod that stays.
        let number = socket.number();
        let mut bystander = None;
        for _ in 0..60 {
            let mut candidate = client.open(kind).unwrap();
            candidate.connect(to).unwrap();
            if candidate.ask().unwrap() != first {
                bystander = Some((candidate.number(), candidate.local().unwrap()));
                break;
            }
        }
        let (bystander, bound_to) = bystander.expect("sixty sockets reach both pods");
        let (began, before) = (Instant::now(), reconnections(&daemon));
        cluster.put("echo", 10, json!({}), &cluster.ready(&[other(&first)]));
        // Until then nothing is asked: an answer under way when a socket gets another peer is not the socket's any more.
        let is_connected_anew = || reconnections(&daemon) > before;
        assert!(eventually(PATIENCE, is_connected_anew), "{kind:?} to {to}: {}", daemon.log());
        eprintln!("{kind:?} to {to}: connected anew {:?} after the change of a file", began.elapsed());
        // The former pod still answers, so that nothing but the daemon takes the socket away from it.
        assert_eq!(client.socket(number).ask().expect("no error is seen"), other(&first), "{kind:?} to {to}");
        assert_eq!(client.socket(number).peer(), Ok(to));
        assert_eq!(client.socket(bystander).ask().unwrap(), other(&first), "{kind:?} to {to}: not its business");
        assert_eq!(client.socket(bystander).local(), Ok(bound_to));
    }
    daemon.terminate().unwrap();
}

/// What kube-proxy's rules would do for each datagram.
#[test]
fn a_connected_datagram_socket_is_refused_without_endpoints_and_served_when_there_are_some_again() {
    let Some(cluster) = Cluster::or_skip() else { return };
    let refused = Err("ECONNREFUSED".to_owned());
    for options in [&[][..], &["--pod-devices", "none"]] {
        cluster.put("echo", 10, json!({}), &cluster.ready(&["a"]));
        let daemon = Daemon::start_with(&cluster.lab, "node1", &cluster.manifests.dir, options).unwrap();
        let mut client = cluster.client("client");
        for (kind, family) in [(Udp4, 0), (Udp6, 1)] {
            let to = vip(10, 53)[family];
            let mut early = client.open(kind).unwrap();
            early.connect(to).unwrap();
            assert_eq!(early.ask(), Ok("a".to_owned()));
            let early = early.number();
            cluster.put("echo", 10, json!({}), &[]);
            cluster.wait_for_backend(cluster.lab.pod("a").addresses()[family], false);
            let mut late = client.open(kind).unwrap();
            let connected = late.connect(to);
            if !options.is_empty() {
                assert_eq!(connected, refused.clone().map(drop), "nobody would tell it later");
                cluster.put("echo", 10, json!({}), &cluster.ready(&["a"]));
                cluster.wait_for_backend(cluster.lab.pod("a").addresses()[family], true);
                continue;
            }
            assert_eq!((connected, late.ask()), (Ok(()), refused.clone()), "{kind:?}");
            let late = late.number();
            assert!(eventually(PATIENCE, || client.socket(early).ask() == refused), "{kind:?}: {}", daemon.log());
            cluster.put("echo", 10, json!({}), &cluster.ready(&["b"]));
            for socket in [early, late] {
                let served = || client.socket(socket).ask() == Ok("b".to_owned());
                assert!(eventually(PATIENCE, served), "{kind:?}: {}", daemon.log());
            }
            cluster.put("echo", 10, json!({}), &cluster.ready(&["a"]));
            cluster.wait_for_backend(cluster.lab.pod("a").addresses()[family], true);
        }
        daemon.terminate().unwrap();
    }
}

#[test]
fn a_datagram_socket_that_was_connected_before_its_service_came_is_served_when_it_is_there() {
    let Some(cluster) = Cluster::or_skip() else { return };
    for (number, options) in [(10, &[][..]), (11, &["--pod-devices", "none"])] {
        let daemon = Daemon::start_with(&cluster.lab, "node1", &cluster.manifests.dir, options).unwrap();
        let mut sockets = Vec::new();
        for mut client in [cluster.client("client"), cluster.host_client()] {
            for (kind, family) in [(Udp4, 0), (Udp6, 1)] {
                let mut socket = client.open(kind).unwrap();
                socket.connect(vip(number, 53)[family]).unwrap();
                socket.send().unwrap();
                sockets.push((kind, socket.number()));
            }
            let sockets = std::mem::take(&mut sockets);
            cluster.put("echo", number, json!({}), &cluster.ready(&["b"]));
            for (kind, socket) in sockets {
                let served = || client.socket(socket).ask() == Ok("b".to_owned());
                assert!(eventually(PATIENCE, served), "{kind:?} {options:?}: {}", daemon.log());
            }
            cluster.manifests.save("echo", &[]);
            cluster.wait_for_backend(cluster.lab.pod("b").v4.into(), false);
        }
        daemon.terminate().unwrap();
    }
}

#[test]
fn a_connected_datagram_socket_that_may_not_be_connected_anew_learns_that_its_pod_is_gone() {
    let Some(cluster) = Cluster::or_skip() else { return };
    cluster.put("echo", 10, json!({}), &cluster.ready(&["a"]));
    let daemon =
        Daemon::start_without(&cluster.lab, "node1", &cluster.manifests.dir, "sys_ptrace").expect("the daemon starts");
    let mut client = cluster.client("client");
    for (kind, family) in [(Udp4, 0), (Udp6, 1)] {
        let mut socket = client.open(kind).unwrap();
        socket.connect(vip(10, 53)[family]).unwrap();
        assert_eq!(socket.ask(), Ok("a".to_owned()));
        let number = socket.number();
        cluster.put("echo", 10, json!({}), &cluster.ready(&["b"]));
        let mut asked = Ok(String::new());
        eventually(PATIENCE, || {
            asked = client.socket(number).ask();
            asked.is_err()
        });
        let asked = asked.expect_err("the socket no longer speaks to the pod that is gone");
        // A send on the disconnected socket fails in its own way; the next receive says what happened.
        let told = asked == "ECONNABORTED" || client.socket(number).receive() == Err("ECONNABORTED".to_owned());
        assert!(told, "{kind:?}: {asked}: {}", daemon.log());
        cluster.put("echo", 10, json!({}), &cluster.ready(&["a"]));
        cluster.wait_for_backend(cluster.lab.pod("a").addresses()[family], true);
    }
}

/// On the node itself nobody would refuse its packets later.
#[test]
fn a_connected_datagram_socket_of_the_node_learns_that_its_last_pod_is_gone() {
    let Some(cluster) = Cluster::or_skip() else { return };
    cluster.put("echo", 10, json!({}), &cluster.ready(&["a"]));
    let daemon = cluster.start();
    let mut client = cluster.host_client();
    let mut socket = client.open(Udp4).unwrap();
    socket.connect(vip(10, 53)[0]).unwrap();
    assert_eq!(socket.ask(), Ok("a".to_owned()));
    let number = socket.number();
    cluster.put("echo", 10, json!({}), &[]);
    let mut asked = Ok(String::new());
    eventually(PATIENCE, || {
        asked = client.socket(number).ask();
        asked.is_err()
    });
    let told =
        asked == Err("ECONNABORTED".to_owned()) || client.socket(number).receive() == Err("ECONNABORTED".to_owned());
    assert!(told, "{asked:?}: {}", daemon.log());
    // It says so after it has done so.
    assert!(eventually(PATIENCE, || daemon.log().contains("destroyed=1")), "{}", daemon.log());
}

#[test]
fn a_destination_that_becomes_another_services_takes_its_datagram_sockets_along() {
    let Some(cluster) = Cluster::or_skip() else { return };
    cluster.put("one", 10, json!({}), &cluster.ready(&["a"]));
    cluster.put("two", 11, json!({}), &cluster.ready(&["b"]));
    let _daemon = cluster.start();
    let mut client = cluster.client("client");
    let to = vip(10, 53)[0];
    let mut connected = client.open(Udp4).unwrap();
    connected.connect(to).unwrap();
    assert_eq!(connected.ask().unwrap(), "a");
    let connected = connected.number();
    let mut unconnected = client.open(Udp4).unwrap();
    assert_eq!(unconnected.ask_at(to).unwrap(), ("a".to_owned(), to));
    let unconnected = unconnected.number();

    // The two exchange their cluster IPs; both go on with the pods that they have.
    cluster.put("one", 11, json!({}), &cluster.ready(&["a"]));
    cluster.put("two", 10, json!({}), &cluster.ready(&["b"]));
    assert!(eventually(PATIENCE, || cluster.client("other").ask(Udp4, to, 3) == all("b", 3)));
    assert_eq!(client.socket(unconnected).ask_at(to).unwrap(), ("b".to_owned(), to));
    let moved = || client.socket(connected).ask() == Ok("b".to_owned());
    assert!(eventually(PATIENCE, moved), "it still speaks to the former Service");
}

#[test]
fn a_tcp_connection_runs_on_while_its_pod_still_answers() {
    let Some(cluster) = Cluster::or_skip() else { return };
    cluster.put("echo", 10, json!({}), &cluster.ready(&["a", "b"]));
    let _daemon = cluster.start();
    let to = vip(10, 90)[0];
    let mut client = cluster.client("client");
    let mut socket = client.open(Tcp4).unwrap();
    socket.connect(to).unwrap();
    let first = socket.ask().unwrap();
    let number = socket.number();
    cluster.put("echo", 10, json!({}), &cluster.ready(&[other(&first)]));
    cluster.wait_for_backend(cluster.lab.pod(&first).v4.into(), false);
    for _ in 0..5 {
        assert_eq!(client.socket(number).ask().unwrap(), first);
        assert_eq!(client.socket(number).peer().unwrap(), to);
    }
    assert_eq!(client.ask(Tcp4, to, 30), all(other(&first), 30), "new connections go elsewhere");
}

#[test]
fn endpoints_and_services_come_and_go_while_the_daemon_runs() {
    let Some(cluster) = Cluster::or_skip() else { return };
    let _daemon = cluster.start();
    let mut client = cluster.client("client");
    let to = vip(10, 90)[0];
    cluster.put("echo", 10, json!({}), &[]);
    assert!(eventually(PATIENCE, || client.open(Tcp4).unwrap().connect(to) == Err("ECONNREFUSED".to_owned())));
    for pods in [&PODS[..1], &PODS, &PODS[1..2]] {
        cluster.put("echo", 10, json!({}), &cluster.ready(pods));
        let spread = eventually(PATIENCE, || names(&client.ask(Tcp4, to, 60)) == pods);
        assert!(spread, "{pods:?}: {:?}", client.ask(Tcp4, to, 60));
    }
    cluster.manifests.delete("echo");
    assert!(eventually(PATIENCE, || client.ask_unconnected(Udp4, vip(10, 53)[0], 1) == all("EAGAIN", 1)));
    let services = cluster.lab.node("node1").get("services", &["-o", "json"]).unwrap();
    assert!(!services.contains("default/echo") && !services.contains("\"echo\""), "{services}");
}

#[test]
fn a_daemon_that_stops_crashes_and_comes_back_is_not_missed() {
    let Some(cluster) = Cluster::or_skip() else { return };
    cluster.put("echo", 10, json!({}), &cluster.ready(&PODS));
    let daemon = cluster.start();
    let node = cluster.lab.node("node1");
    let backends = node.get("backends", &["-o", "json"]).unwrap();
    let loads: Vec<Load> = vip(10, 80).iter().map(|to| Load::start(cluster.lab.pod("client"), *to).unwrap()).collect();
    let mut client = cluster.client("client");
    let mut socket = client.open(Udp4).unwrap();
    let sticky = socket.ask_at(vip(10, 53)[0]).unwrap();

    let status = daemon.terminate().unwrap();
    assert!(status.success(), "{status}");
    std::thread::sleep(Duration::from_millis(200));
    cluster.start().kill();
    std::thread::sleep(Duration::from_millis(200));
    let _daemon = cluster.start();
    std::thread::sleep(Duration::from_millis(200));

    assert_eq!(socket.ask_at(vip(10, 53)[0]).unwrap(), sticky, "a flow outlives its daemon");
    assert_eq!(node.get("backends", &["-o", "json"]).unwrap(), backends, "nothing was renumbered");
    for load in loads {
        let records = load.finish().unwrap();
        assert!(records.len() > 50, "{} requests", records.len());
        assert_eq!(failures(&records), Vec::<&String>::new());
    }
}

#[test]
fn what_changed_while_no_daemon_ran_is_caught_up_with() {
    let Some(cluster) = Cluster::or_skip() else { return };
    cluster.put("echo", 10, json!({}), &cluster.ready(&["a", "b"]));
    cluster.put("gone", 11, json!({}), &cluster.ready(&["c"]));
    cluster.start().kill();
    cluster.put("echo", 10, json!({}), &cluster.ready(&["c"]));
    cluster.manifests.delete("gone");
    cluster.put("new", 12, json!({}), &cluster.ready(&["b"]));
    let mut client = cluster.client("client");
    assert_eq!(names(&client.ask(Tcp4, vip(10, 90)[0], 60)), ["a", "b"], "the dead daemon's state still serves");
    let _daemon = cluster.start();
    assert_eq!(client.ask(Tcp4, vip(10, 90)[0], 30), all("c", 30));
    assert_eq!(client.ask(Tcp4, vip(12, 90)[0], 30), all("b", 30));
    assert_eq!(client.ask_unconnected(Udp4, vip(11, 53)[0], 1), all("EAGAIN", 1));
}

#[test]
fn cleanup_removes_every_trace() {
    let Some(cluster) = Cluster::or_skip() else { return };
    cluster.put("echo", 10, json!({}), &cluster.ready(&PODS));
    cluster.start().terminate().unwrap();
    let node = cluster.lab.node("node1");
    let mut client = cluster.client("client");
    assert_eq!(names(&client.ask(Udp4, vip(10, 53)[0], 60)), PODS, "served until cleanup");
    node.cleanup().unwrap();
    let pins = std::fs::read_dir(&node.pin_path).map_or(0, Iterator::count);
    assert_eq!(pins, 0, "pins in {}", node.pin_path.display());
    assert_eq!(client.ask(Udp4, vip(10, 53)[0], 1), all("EAGAIN", 1), "nothing translates any more, at once");
    if process::in_path("bpftool") {
        let output = std::process::Command::new("bpftool").args(["cgroup", "tree"]).arg(&node.cgroup).output().unwrap();
        let tree = String::from_utf8_lossy(&output.stdout);
        assert!(!tree.contains("connect4") && !tree.contains("sendmsg"), "{tree}");
    } else {
        skip("bpftool is not installed: programs left on the cgroup would go unseen");
    }
    node.cleanup().expect("a second cleanup has nothing to do and says so by success");
}

/// What upstream's test of connections that one end has closed asks of a node.
#[test]
fn the_nodes_connection_tracking_is_set_as_kube_proxy_sets_it_and_never_lowered() {
    let Some(cluster) = Cluster::or_skip() else { return };
    let host = &cluster.lab.node("node1").host;
    let netfilter = std::path::Path::new("/proc/sys/net/netfilter");
    let read = |name: &str| {
        let name = netfilter.join(format!("nf_conntrack_{name}"));
        host.inside(|| Ok(std::fs::read_to_string(name)?.trim().to_owned())).unwrap_or_default()
    };
    if !netfilter.exists() {
        return skip("this kernel has no connection tracking, or has not loaded it (CONFIG_NF_CONNTRACK)");
    }
    host.sysctl(&[("netfilter/nf_conntrack_tcp_timeout_established", "60")]).unwrap();
    host.sysctl(&[("netfilter/nf_conntrack_udp_timeout", "20")]).unwrap();
    let daemon = cluster.start();
    assert!(eventually(PATIENCE, || read("tcp_timeout_close_wait") == "3600"), "{}", daemon.log());
    assert!(eventually(PATIENCE, || read("tcp_timeout_established") == "86400"), "{}", daemon.log());
    assert_eq!((read("udp_timeout").as_str(), read("tcp_be_liberal").as_str()), ("20", "0"), "nobody asked");
    assert!(daemon.log().contains("nf_conntrack_tcp_timeout_close_wait: 3600 (60 before)"), "{}", daemon.log());
    daemon.terminate().unwrap();

    host.sysctl(&[("netfilter/nf_conntrack_tcp_timeout_close_wait", "7200")]).unwrap();
    host.sysctl(&[("netfilter/nf_conntrack_tcp_timeout_established", "60")]).unwrap();
    let options =
        ["--conntrack-udp-timeout=90s", "--conntrack-tcp-be-liberal", "--conntrack-tcp-timeout-established=0"];
    let manifests = &cluster.manifests.dir;
    let daemon = Daemon::start_with(&cluster.lab, "node1", manifests, &options).unwrap();
    assert!(eventually(PATIENCE, || read("udp_timeout") == "90"), "{}", daemon.log());
    assert!(eventually(PATIENCE, || read("tcp_be_liberal") == "1"), "{}", daemon.log());
    assert_eq!(read("tcp_timeout_close_wait"), "7200", "raised only");
    assert_eq!(read("tcp_timeout_established"), "60", "0 leaves it alone");
}

#[test]
fn check_and_cleanup_tell_of_loopback_addresses_that_kube_proxy_left_open() {
    let Some(cluster) = Cluster::or_skip() else { return };
    let node = cluster.lab.node("node1");
    let cgroup = node.cgroup.display().to_string();
    let pins = node.pin_path.display().to_string();
    let check = || node.kubelane(&["check", "--pin-path", &pins, "--cgroup", &cgroup]).unwrap();
    assert!(!check().contains("CVE-2020-8558") && !node.cleanup().unwrap().contains("CVE-2020-8558"));
    node.host.sysctl(&[("ipv4/conf/all/route_localnet", "1")]).unwrap();
    let said = check();
    let line = said.lines().find(|line| line.contains("CVE-2020-8558")).unwrap_or_else(|| panic!("{said}"));
    assert!(line.starts_with("warn") && line.contains("sysctl -w net.ipv4.conf.all.route_localnet=0"), "{line}");
    assert!(node.cleanup().unwrap().contains("CVE-2020-8558"));
}
