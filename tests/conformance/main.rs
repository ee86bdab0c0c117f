//! What Kubernetes' own end-to-end tests ask of a proxy (`tests/conformance.md` lists them), asked of the real daemon in
//! the laboratory. All objects come from an API server by way of HTTP: the tests' double, or the real one that the
//! kubeconfig in `KUBELANE_TEST_KUBECONFIG` leads to (`make test-cluster`). The cases are the same, and so is their client.

#[path = "../laboratory/mod.rs"]
mod laboratory;

/// The cases of a module, by name.
macro_rules! cases {
    ($($case:ident),* $(,)?) => {
        pub const CASES: &[(&str, crate::case_cluster::Case)] = &[$((stringify!($case), $case)),*];
    };
}

mod affinity;
mod api;
mod case_cluster;
mod datagrams;
mod endpoints;
mod listed;
mod policies;
mod ports;
mod topology;
mod types;

use case_cluster::{Case, CaseCluster};

/// Runs cases one after the other in one laboratory.
fn run(cases: &[(&str, Case)]) {
    let only = std::env::var("KUBELANE_CASE").unwrap_or_default();
    CaseCluster::or_skip(|world| {
        for (name, case) in cases.iter().filter(|(name, _)| name.contains(&only)) {
            let began = std::time::Instant::now();
            println!("case {name}");
            case(world);
            println!("case {name}: passed in {:.1?}", began.elapsed());
        }
    });
}

#[test]
fn services_change_their_type_and_ports() {
    run(types::CASES);
    run(ports::CASES);
}

#[test]
fn clients_stay_where_affinity_wants_them_and_datagrams_find_living_servers() {
    run(affinity::CASES);
    run(datagrams::CASES);
}

#[test]
fn endpoints_and_policies_decide_who_answers() {
    run(endpoints::CASES);
    run(policies::CASES);
    run(topology::CASES);
}
