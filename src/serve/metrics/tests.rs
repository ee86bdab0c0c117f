//! What is observed, as it is exposed.

use std::collections::BTreeMap;

use super::*;

/// Sample lines by "name{labels}", checked against the exposition format as they are read.
fn parse(text: &str) -> BTreeMap<String, f64> {
    let mut typed = Vec::new();
    let mut samples = BTreeMap::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
            typed.push(name.to_owned());
        } else if !line.starts_with("# HELP ") {
            let (series, value) = line.rsplit_once(' ').unwrap();
            let name = series.split('{').next().unwrap();
            assert!(typed.iter().any(|t| name.starts_with(t.as_str())), "no TYPE before {line}");
            assert!(samples.insert(series.to_owned(), value.parse().unwrap()).is_none(), "twice: {series}");
        }
    }
    samples
}

#[test]
fn what_was_observed_is_in_the_exposition() {
    let metrics = Metrics::new().unwrap();
    let duration = Duration::from_millis(3);
    metrics.synced(SyncSample { duration, full: true, rows_written: 7, rows_deleted: 2, calls: 4, failures: 1 });
    metrics.queued(SystemTime::UNIX_EPOCH + Duration::from_millis(1_500));
    metrics.up_to_date(SystemTime::UNIX_EPOCH + Duration::from_secs(2));
    metrics.set_totals(Totals { services: 3, endpoints: 9, frontends: 5, degraded: 2 });
    metrics.set_map("frontends", 5, 1000);
    metrics.programmed(Family::Ipv6, Duration::from_secs(271));
    let changes = |total, pending| Changes { total, pending };
    metrics.set_changes(changes(4, 1), changes(8, 2));
    metrics.set_changes(changes(5, 0), changes(8, 2));
    metrics.set_no_local([1, 2], [3, 4]);
    metrics.set_flows("TCP", "opening", 6);
    metrics.drifted("slots", 3);
    metrics.audited(SystemTime::UNIX_EPOCH + Duration::from_secs(3));
    metrics.healthz_answered(503);
    let samples = parse(&metrics.text().unwrap());
    let version = format!("kubelane_build_info{{version=\"{}\"}}", env!("CARGO_PKG_VERSION"));
    for (series, value) in [
        ("kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"}", 1.0),
        ("kubeproxy_sync_proxy_rules_duration_seconds_bucket{ip_family=\"IPv6\",le=\"0.004\"}", 1.0),
        ("kubeproxy_sync_proxy_rules_duration_seconds_bucket{ip_family=\"IPv6\",le=\"0.002\"}", 0.0),
        ("kubeproxy_sync_full_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"}", 1.0),
        ("kubeproxy_sync_partial_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"}", 0.0),
        ("kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds{ip_family=\"IPv4\"}", 1.5),
        ("kubeproxy_sync_proxy_rules_last_timestamp_seconds{ip_family=\"IPv6\"}", 2.0),
        ("kubeproxy_network_programming_duration_seconds_bucket{ip_family=\"IPv6\",le=\"300\"}", 1.0),
        ("kubeproxy_network_programming_duration_seconds_bucket{ip_family=\"IPv6\",le=\"270\"}", 0.0),
        ("kubeproxy_network_programming_duration_seconds_count{ip_family=\"IPv4\"}", 0.0),
        ("kubeproxy_sync_proxy_rules_service_changes_total", 5.0),
        ("kubeproxy_sync_proxy_rules_service_changes_pending", 0.0),
        ("kubeproxy_sync_proxy_rules_endpoint_changes_total", 8.0),
        ("kubeproxy_sync_proxy_rules_endpoint_changes_pending", 2.0),
        ("kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family=\"IPv4\",traffic_policy=\"internal\"}", 1.0),
        ("kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family=\"IPv6\",traffic_policy=\"external\"}", 4.0),
        ("kubelane_flows{protocol=\"TCP\",state=\"opening\"}", 6.0),
        ("kubelane_drift_total{map=\"slots\"}", 3.0),
        ("kubelane_last_audit_timestamp_seconds", 3.0),
        ("kubeproxy_proxy_healthz_total{code=\"503\"}", 1.0),
        ("kubelane_sync_rows_total{operation=\"write\"}", 7.0),
        ("kubelane_sync_rows_total{operation=\"delete\"}", 2.0),
        ("kubelane_sync_calls_total", 4.0),
        ("kubelane_sync_failures_total", 1.0),
        ("kubelane_services", 3.0),
        ("kubelane_endpoints", 9.0),
        ("kubelane_frontends", 5.0),
        ("kubelane_map_entries{map=\"frontends\"}", 5.0),
        ("kubelane_map_capacity{map=\"frontends\"}", 1000.0),
        (version.as_str(), 1.0),
    ] {
        assert_eq!(samples.get(series), Some(&value), "{series} in {samples:#?}");
    }
}

#[test]
fn what_others_count_is_read_at_each_scrape() {
    let metrics = Metrics::new().unwrap();
    let scrapes = std::sync::atomic::AtomicU32::new(0);
    let read = move || {
        let n = scrapes.fetch_add(1, std::sync::atomic::Ordering::Relaxed) + 1;
        vec![(vec!["refused".to_owned()], f64::from(n) * 10.0)]
    };
    metrics.read_counters("kubelane_test_total", "Counts", &["verdict"], read).unwrap();
    metrics.read_gauges("kubelane_test", "Measures", &[], || vec![(vec![], 0.5)]).unwrap();
    parse(&metrics.text().unwrap());
    let samples = parse(&metrics.text().unwrap());
    assert_eq!(samples["kubelane_test_total{verdict=\"refused\"}"], 20.0);
    assert_eq!(samples["kubelane_test"], 0.5);
}

#[test]
fn a_name_is_taken_once() {
    let metrics = Metrics::new().unwrap();
    let error = metrics.read_gauges("kubelane_services", "again", &[], Vec::new).unwrap_err();
    assert!(error.to_string().contains("Duplicate"), "{error}");
}
