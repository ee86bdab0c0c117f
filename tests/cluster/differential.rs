//! The same clients ask the same Services twice: served by kubelane, and by the rules that kube-proxy's iptables mode
//! would write. Where the answers differ, the difference is on the list of what is meant to differ.

mod allowed;
mod matrix;
mod services;

use crate::laboratory::cluster::{Cluster, PODS};
use crate::laboratory::daemon::Daemon;
use crate::laboratory::rulesets::{Family, load};
use crate::laboratory::{process, skip};
use allowed::{DIFFERENCES, Difference};
use matrix::{Answers, Outcome, observe};
use services::{SERVICES, answer, load_rules, route, save};

fn by_kubelane(cluster: &Cluster) -> Answers {
    save(cluster);
    let _daemons = ["node1", "node2"].map(|node| Daemon::start(&cluster.lab, node, &cluster.manifests.dir).unwrap());
    observe(&cluster.lab)
}

fn by_iptables(cluster: &Cluster) -> Answers {
    load_rules(&cluster.lab);
    observe(&cluster.lab)
}

#[test]
fn kubelane_answers_as_kube_proxy_apart_from_the_listed_differences() {
    let command = load::iptables_command(Family::V4);
    if !process::in_path(command) {
        return skip(&format!("needs {command} (`make setup` installs it)"));
    }
    let (Some(first), Some(second)) = (Cluster::or_skip(), Cluster::or_skip()) else { return };
    for cluster in [&first, &second] {
        PODS.iter().for_each(|pod| answer(&cluster.lab, pod));
        route(&cluster.lab);
    }
    let (kubelane, iptables) = std::thread::scope(|scope| {
        let kubelane = scope.spawn(|| by_kubelane(&first));
        let iptables = scope.spawn(|| by_iptables(&second));
        (kubelane.join().unwrap(), iptables.join().unwrap())
    });
    assert!(kubelane.keys().eq(iptables.keys()), "both were asked the same");
    let mut times = [0; DIFFERENCES.len()];
    let mut unexpected = String::new();
    for (cell, by_kubelane) in &kubelane {
        let by_iptables = &iptables[cell];
        if by_kubelane == by_iptables && !matches!(by_kubelane, Outcome::Odd(_)) {
            continue;
        }
        let service = SERVICES.iter().find(|service| service.name == cell.service).unwrap();
        let applies = |difference: &Difference| (difference.applies)(cell, service, by_kubelane, by_iptables);
        match DIFFERENCES.iter().position(applies) {
            Some(index) => times[index] += 1,
            None => unexpected += &format!("{cell}: kubelane {by_kubelane:?}, iptables {by_iptables:?}\n"),
        }
    }
    assert!(unexpected.is_empty(), "not on the list of differences:\n{unexpected}");
    for (difference, times) in DIFFERENCES.iter().zip(times) {
        assert!(times > 0, "listed, but seen no more: {}", difference.reason);
        println!("{times} cells differ: {}", difference.reason);
    }
    println!("{} cells of {} agree", kubelane.len() - times.iter().sum::<usize>(), kubelane.len());
}
