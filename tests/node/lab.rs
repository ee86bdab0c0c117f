//! The laboratory itself: a test that fails must fail because of kubelane, so the ground it stands on is tested first.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::laboratory::manifests::without_endpoint;
use crate::laboratory::messages::Kind::{self, *};
use crate::laboratory::{cgroup, eventually, lab_binary, lab_or_skip, netns, preflight, skip, sweep};

/// (kinds for IPv4 and IPv6, port)
const PROTOCOLS: [(Kind, Kind, u16); 4] =
    [(Tcp4, Tcp6, 9000), (Udp4, Udp6, 9000), (UdpLite4, UdpLite6, 9000), (Mptcp4, Mptcp6, 9001)];

#[test]
fn pods_and_nodes_reach_every_pod_by_every_protocol_without_a_service() {
    let Some(lab) = lab_or_skip(&[("node1", &["client", "near"]), ("node2", &["far"])]) else { return };
    let listen = "--http 8080 --tcp 9000 --mptcp 9001 --udp 9000 --udplite 9000";
    let _servers = ["near", "far"].map(|pod| lab.pod(pod).serve(listen).unwrap());
    for place in [lab.pod("client"), &lab.node("node1").host, &lab.node("node2").host] {
        let mut client = place.client().unwrap();
        for pod in ["near", "far"] {
            let [v4, v6] = lab.pod(pod).addresses();
            for (kind4, kind6, port) in PROTOCOLS {
                if let Err(errno) = client.open(kind4).map(drop) {
                    skip(&format!("{kind4:?}: {errno}"));
                    continue;
                }
                for (kind, to) in [(kind4, SocketAddr::new(v4, port)), (kind6, SocketAddr::new(v6, port))] {
                    let counts = client.ask(kind, to, 3);
                    assert_eq!(counts, [(pod.to_owned(), 3)].into(), "{kind:?} from {} to {to}", place.name);
                }
            }
            assert_eq!(client.ask_unconnected(Udp6, (v6, 9000).into(), 2), [(pod.to_owned(), 2)].into());
            assert_eq!(client.http((v4, 8080).into(), 2), [(pod.to_owned(), 2)].into());
            assert_eq!(client.ask(Tcp4, (v4, 9).into(), 1), [("ECONNREFUSED".to_owned(), 1)].into());
        }
    }
}

#[test]
fn a_dropped_laboratory_leaves_no_namespace_no_cgroup_and_no_process() {
    let Some(lab) = lab_or_skip(&[("node1", &["pod"])]) else { return };
    let server = lab.pod("pod").serve("--tcp 9000").unwrap();
    let pid = server.pid();
    // The laboratory's own end has to suffice, without the owner's.
    std::mem::forget(server);
    let dir = lab.dir.clone();
    drop(lab);
    assert_no_trace(&dir);
    // A zombie of this test process is no process any more: its state says so.
    let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    assert!(state.is_empty() || state.contains(") Z "), "the server lives: {state}");
}

#[test]
fn what_a_killed_owner_left_behind_is_swept() {
    if let Err(reason) = preflight() {
        return skip(&format!("{reason:#}"));
    }
    // This test binary again, as an owner that is killed while it waits.
    let name = "lab::an_owner_that_waits_to_be_killed";
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([name, "--exact", "--ignored", "--nocapture"]).stdin(Stdio::piped()).stdout(Stdio::null());
    let mut owner = command.spawn().unwrap();
    let dir = Path::new("/run/kubelane-lab").join(format!("{}-0", owner.id()));
    assert!(eventually(Duration::from_secs(20), || dir.join("up").exists()), "the owner laid out its laboratory");
    // Whoever begins beside this one sweeps, too.
    let nobody_sweeps = sweep::global_lock().unwrap();
    owner.kill().unwrap();
    owner.wait().unwrap();
    assert!(dir.exists(), "a killed owner cleans nothing");
    drop(nobody_sweeps);
    let status = Command::new(lab_binary().unwrap()).arg("sweep").stdout(Stdio::null()).status().unwrap();
    assert!(status.success());
    assert_no_trace(&dir);
}

#[test]
#[ignore = "run by what_a_killed_owner_left_behind_is_swept"]
fn an_owner_that_waits_to_be_killed() {
    let lab = lab_or_skip(&[("node1", &["pod"])]).unwrap();
    let _server = lab.pod("pod").serve("--tcp 9000").unwrap();
    std::fs::write(lab.dir.join("up"), "").unwrap();
    // Ends by itself if its killer died.
    let _ = std::io::read_to_string(std::io::stdin());
}

#[test]
fn a_sweep_leaves_the_laboratories_of_the_living_alone() {
    let Some(lab) = lab_or_skip(&[("node1", &["pod"])]) else { return };
    let _server = lab.pod("pod").serve("--tcp 9000").unwrap();
    sweep::sweep().unwrap();
    let mut client = lab.node("node1").host.client().unwrap();
    let to = (lab.pod("pod").v4, 9000).into();
    assert_eq!(client.ask(Tcp4, to, 1), [("pod".to_owned(), 1)].into());
}

#[test]
fn the_demos_edit_takes_one_endpoint_out_of_the_slices_and_nothing_else() {
    let text = include_str!("../../manifests/demo/web.yaml");
    let edited = without_endpoint(&without_endpoint(text, "10.244.2.11"), "fd44:0:0:2::11");
    let lost: Vec<&str> = text.lines().filter(|line| !edited.contains(line)).collect();
    assert_eq!(lost.len(), 2, "{lost:?}");
    assert_eq!(text.lines().count() - edited.lines().count(), 6);
    assert_eq!(without_endpoint(text, "10.244.2.1"), text, "an address that is only the beginning of others");
}

fn assert_no_trace(dir: &Path) {
    let id = dir.file_name().unwrap().to_str().unwrap();
    assert!(!dir.exists(), "{} is left", dir.display());
    assert!(!dir.with_extension("lock").exists(), "the lock is left");
    assert_eq!(netns::with_prefix(&format!("kllab-{id}-")), Vec::<String>::new());
    let group = cgroup::mount_point().unwrap().join(format!("kubelane-lab-{id}"));
    assert!(!group.exists(), "{} is left", group.display());
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(&dir.display().to_string()), "a mount is left");
}
