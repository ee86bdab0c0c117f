//! What the worker tells the metrics, and what it does about rows that others have changed.

use super::super::super::audit;
use super::*;
use crate::model::TrafficPolicy;

/// `slice(n, Tcp, count)`, triggered this long ago.
fn triggered(n: u8, count: u8, ago: Duration) -> Change {
    let at = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap() - ago;
    match slice(n, Protocol::Tcp, count) {
        Change::Slice(slice) => Change::Slice(Box::new(Slice { triggered: Some(at.as_nanos() as i64), ..*slice })),
        other => other,
    }
}

#[tokio::test(start_paused = true)]
async fn changes_are_measured_from_their_trigger_until_they_are_in_the_kernel() {
    const PROGRAMMED: &str = "kubeproxy_network_programming_duration_seconds_count{ip_family=\"IPv4\"}";
    const PENDING: &str = "kubeproxy_sync_proxy_rules_endpoint_changes_pending";
    const TOTAL: &str = "kubeproxy_sync_proxy_rules_endpoint_changes_total";
    const SUM: &str = "kubeproxy_network_programming_duration_seconds_sum{ip_family=\"IPv4\"}";
    let mut maps = Model::default();
    let mut stage = Stage::new(&maps);
    stage.inputs.as_mut().unwrap().started = Instant::now() - Duration::from_secs(60);
    let app = stage.app.clone();
    let metric = |name: &str| -> f64 {
        let text = app.metrics.text().unwrap();
        text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok()).unwrap()
    };
    let mut worker = stage.worker(&mut maps);
    stage.send(world());
    stage.send([triggered(1, 2, Duration::from_secs(3600))]);
    run_for(&mut worker, MOMENT).await;
    assert_eq!((metric(PROGRAMMED), metric(PENDING), metric(TOTAL)), (0.0, 0.0, 4.0), "older than the daemon");

    stage.maps.state().failing = 3;
    stage.send([triggered(1, 4, Duration::from_secs(20)), triggered(2, 3, Duration::from_secs(10))]);
    run_for(&mut worker, Duration::from_millis(1)).await;
    assert_eq!((metric(PROGRAMMED), metric(PENDING)), (0.0, 2.0), "the kernel has not taken it");
    run_for(&mut worker, Duration::from_secs(300)).await;
    assert_eq!((metric(PROGRAMMED), metric(PENDING), metric(TOTAL)), (2.0, 0.0, 6.0));
    assert!((30.0..40.0).contains(&metric(SUM)), "{}", metric(SUM));
    let full = "kubeproxy_sync_full_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"}";
    let partial = "kubeproxy_sync_partial_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"}";
    assert_eq!((metric(full), metric(full) + metric(partial)), (1.0, stage.syncs() as f64));
}

#[tokio::test(start_paused = true)]
async fn service_ports_without_a_local_endpoint_are_counted_while_others_have_one() {
    let mut maps = Model::default();
    let mut stage = Stage::new(&maps);
    let app = stage.app.clone();
    let of = |policy: &str| {
        let name = "kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family=\"IPv4\",traffic_policy=";
        let (text, name) = (app.metrics.text().unwrap(), format!("{name}\"{policy}\"}} "));
        text.lines().find_map(|line| line.strip_prefix(&name)?.parse::<u32>().ok()).unwrap()
    };
    let local = |n: u8| match service(n, Protocol::Tcp) {
        Change::Service(mut local) => {
            local.internal_policy = TrafficPolicy::Local;
            local.external_policy = TrafficPolicy::Local;
            local.external_ips = vec![format!("192.0.2.{n}").parse().unwrap()];
            Change::Service(local)
        }
        other => other,
    };
    let mut worker = stage.worker(&mut maps);
    stage.send(world());
    stage.send([local(1), local(2), local(7)]);
    run_for(&mut worker, MOMENT).await;
    assert_eq!((of("internal"), of("external")), (2, 2), "the third has no endpoint at all");
    let here = match slice(1, Protocol::Tcp, 2) {
        Change::Slice(mut slice) => {
            slice.endpoints[0].node = Some("node-a".into());
            Change::Slice(slice)
        }
        other => other,
    };
    stage.send([here, Change::ServiceGone(ObjectName::new("default", "web-2"))]);
    run_for(&mut worker, MOMENT).await;
    assert_eq!((of("internal"), of("external")), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn rows_that_somebody_else_changed_are_counted_and_written_again() {
    let mut maps = Model::default();
    let mut stage = Stage::new(&maps);
    let app = stage.app.clone();
    let mut worker = stage.worker(&mut maps);
    stage.send(world());
    run_for(&mut worker, MOMENT).await;
    let maps = stage.maps.clone();
    tokio::spawn(audit::run(move || Ok(maps.clone()), stage.requests.clone(), app.clone()));
    run_for(&mut worker, Duration::from_secs(700)).await;
    let text = app.metrics.text().unwrap();
    assert!(text.contains("kubelane_drift_total{map=\"frontends\"} 0\n"), "{text}");
    assert!(!text.contains("kubelane_last_audit_timestamp_seconds 0\n"), "{text}");
    let (written, before) = stage.maps.written();

    let number = |n: u32| n.to_ne_bytes().to_vec();
    let mut foreign = [0; size_of::<crate::abi::Frontend>()];
    let mut unwanted = foreign;
    unwanted[0] = 77;
    foreign[8] = 1;
    let mut expected = before.clone();
    {
        let mut state = stage.maps.state();
        fn rows(state: &mut State, map: MapName) -> &mut BTreeMap<Vec<u8>, Vec<u8>> {
            state.rows.get_mut(&map).unwrap()
        }
        let first = |map: MapName| before[&map].keys().next().unwrap().clone();
        rows(&mut state, MapName::Frontends).remove(&first(MapName::Frontends));
        rows(&mut state, MapName::Frontends).insert(vec![9; 20], unwanted.to_vec());
        rows(&mut state, MapName::Frontends).insert(vec![8; 20], foreign.to_vec());
        rows(&mut state, MapName::Backends).get_mut(&first(MapName::Backends)).unwrap()[18] ^= 3;
        rows(&mut state, MapName::Backends)
            .insert(number(500), before[&MapName::Backends].values().next().unwrap().clone());
        rows(&mut state, MapName::Backends)
            .insert(number(0), before[&MapName::Backends].values().next().unwrap().clone());
        rows(&mut state, MapName::Slots).insert(number(900), number(3));
        rows(&mut state, MapName::Slots).insert(first(MapName::Slots), number(0));
        rows(&mut state, MapName::Addresses).insert(vec![7; 16], number(0));
        rows(&mut state, MapName::Addresses).remove(&first(MapName::Addresses));
        rows(&mut state, MapName::Services).get_mut(&first(MapName::Services)).unwrap()[0] ^= 1;
        // The trial's rows are left alone, as is a slot that nobody sees; a backend that nobody has is gone.
        let mut row =
            |map, key: Vec<u8>| expected.get_mut(&map).unwrap().insert(key.clone(), state.rows[&map][&key].clone());
        row(MapName::Frontends, vec![8; 20]);
        row(MapName::Backends, number(0));
        row(MapName::Slots, number(900));
        row(MapName::Backends, number(500));
    }
    let gone = expected.get_mut(&MapName::Backends).unwrap().get_mut(&number(500)).unwrap();
    gone[18..20].fill(0);
    run_for(&mut worker, Duration::from_secs(700)).await;
    let text = app.metrics.text().unwrap();
    for (map, rows) in [("frontends", 2), ("backends", 2), ("slots", 2), ("addresses", 2), ("services", 1)] {
        assert!(text.contains(&format!("kubelane_drift_total{{map=\"{map}\"}} {rows}\n")), "{map}: {text}");
    }
    let (repaired, after) = stage.maps.written();
    assert!(repaired > written);
    assert_eq!(after, expected);
    run_for(&mut worker, Duration::from_secs(2000)).await;
    assert_eq!(stage.maps.written(), (repaired, expected), "it goes on though all is repaired");
}
