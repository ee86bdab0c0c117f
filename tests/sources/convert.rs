//! How Kubernetes objects become domain records: field by field, with what is said of fields that cannot be used.

use kubelane::model::{Change, Node, Service, Slice, TrafficPolicy};
use kubelane::objects::Settings;
use kubelane::objects::convert::{Convert, Converter};
use kubelane::objects::wire;
use serde_json::{Value, json};

fn convert<W: Convert>(object: &Value) -> (Option<Change>, Vec<String>) {
    let mut converter = Converter::new(Settings { node_name: "n1".into(), service_proxy_name: None });
    let converted = serde_json::from_value::<W>(object.clone()).unwrap().convert(&mut converter);
    (converted.change, converted.warnings.into_iter().map(|w| w.message).collect())
}

/// A Service with one IPv4 cluster IP and one port, and these fields of its spec.
fn service(spec: Value) -> (Option<Service>, Vec<String>) {
    let mut object = json!({
        "metadata": {"name": "web", "namespace": "shop"},
        "spec": {"clusterIPs": ["10.0.0.1"], "ports": [{"port": 80}]},
    });
    for (field, value) in spec.as_object().unwrap() {
        match field.as_str() {
            "status" => object["status"] = value.clone(),
            field => object["spec"][field] = value.clone(),
        }
    }
    match convert::<wire::Service>(&object) {
        (Some(Change::Service(service)), warnings) => (Some(*service), warnings),
        (Some(Change::ServiceGone(name)), warnings) => {
            assert_eq!(name.to_string(), "shop/web");
            (None, warnings)
        }
        other => panic!("{other:?}"),
    }
}

/// An IPv4 slice with these fields.
fn slice(fields: Value) -> (Option<Slice>, Vec<String>) {
    let mut object = json!({
        "metadata": {"name": "web-1", "namespace": "shop", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "ports": [{"port": 8080}],
    });
    fields.as_object().unwrap().iter().for_each(|(field, value)| object[field] = value.clone());
    match convert::<wire::EndpointSlice>(&object) {
        (Some(Change::Slice(slice)), warnings) => (Some(*slice), warnings),
        (Some(Change::SliceGone(_)), warnings) => (None, warnings),
        other => panic!("{other:?}"),
    }
}

fn node(object: Value) -> Option<Node> {
    match convert::<wire::Node>(&object) {
        (Some(Change::Node(node)), _) => Some(*node),
        (None, _) => None,
        other => panic!("{other:?}"),
    }
}

fn text<T: ToString>(list: &[T]) -> String {
    list.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

#[test]
fn services_that_are_not_a_proxys_business_are_gone_without_a_word() {
    for spec in [
        json!({"type": "ExternalName"}),
        json!({"clusterIP": "None", "clusterIPs": ["None"]}),
        json!({"clusterIP": "None", "clusterIPs": null}),
        json!({"clusterIPs": ["None"]}),
    ] {
        assert_eq!(service(spec.clone()), (None, vec![]), "{spec}");
    }
}

#[test]
fn a_service_without_a_usable_cluster_ip_is_not_served_and_says_so() {
    for ips in [json!([]), json!(["10.00.0.256"]), json!(["0.0.0.0"]), json!(["127.0.0.1"]), json!(["224.0.0.1"])] {
        let (served, warnings) = service(json!({"clusterIPs": ips}));
        assert!(served.is_none() && warnings.last().unwrap().contains("no usable cluster IP"), "{ips}: {warnings:?}");
    }
}

#[test]
fn cluster_ips_come_from_the_list_or_from_the_older_field() {
    for (spec, expected) in [
        (json!({"clusterIP": "10.0.0.9"}), "10.0.0.1"),
        (json!({"clusterIP": "10.0.0.9", "clusterIPs": null}), "10.0.0.9"),
        (json!({"clusterIPs": ["10.0.0.1", "fd00::1", "10.0.0.1"]}), "10.0.0.1 fd00::1"),
    ] {
        let (served, warnings) = service(spec.clone());
        assert_eq!((text(&served.unwrap().cluster_ips).as_str(), warnings), (expected, vec![]), "{spec}");
    }
}

#[test]
fn other_addresses_are_kept_only_in_families_that_the_service_has() {
    let status = json!({"loadBalancer": {"ingress": [
        {"ip": "192.0.2.1"}, {"ip": "192.0.2.2", "ipMode": "VIP"}, {"ip": "192.0.2.3", "ipMode": "Proxy"},
        {"hostname": "lb.example.com"}, {"ip": "2001:db8::1"},
    ]}});
    let externals = json!(["192.0.2.9", "2001:db8::9", "nonsense"]);
    let (served, warnings) = service(json!({"externalIPs": externals, "status": status}));
    let served = served.unwrap();
    assert_eq!(
        (text(&served.external_ips), text(&served.load_balancer_ips)),
        ("192.0.2.9".into(), "192.0.2.1 192.0.2.2".into())
    );
    assert_eq!(warnings.len(), 3, "{warnings:?}");
    let dual = json!({"clusterIPs": ["10.0.0.1", "fd00::1"], "externalIPs": ["192.0.2.9", "2001:db8::9"]});
    let (served, warnings) = service(dual);
    assert_eq!((served.unwrap().external_ips.len(), warnings), (2, vec![]));
}

#[test]
fn a_port_that_cannot_be_served_costs_that_port_only() {
    let ports = json!([
        {"name": "a", "port": 80, "nodePort": 30080}, {"name": "b", "port": 0}, {"name": "c", "port": 65536},
        {"name": "d", "port": -1}, {"name": "e", "port": 81, "protocol": "QUIC"}, {"name": "f"},
        {"name": "g", "port": 80, "protocol": "UDP"}, {"name": "h", "port": 80, "protocol": "TCP"},
        {"name": "i", "port": 82, "nodePort": 70000},
    ]);
    let (served, warnings) = service(json!({"ports": ports}));
    let ports: Vec<_> = served.unwrap().ports.iter().map(|p| (p.name.to_string(), p.port, p.node_port)).collect();
    assert_eq!(ports, [("a".into(), 80, 30080), ("g".into(), 80, 0), ("i".into(), 82, 0)]);
    assert_eq!(warnings.len(), 7, "{warnings:#?}");
}

#[test]
fn affinity_is_three_hours_unless_said_otherwise_and_a_day_at_most() {
    let client_ip = |seconds: Value| json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": seconds}}});
    for (spec, expected, warned) in [
        (json!({}), None, 0),
        (json!({"sessionAffinity": "None"}), None, 0),
        (json!({"sessionAffinity": "ClientIP"}), Some(10_800), 0),
        (json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": null}), Some(10_800), 0),
        (client_ip(json!(1)), Some(1), 0),
        (client_ip(json!(86_400)), Some(86_400), 0),
        (client_ip(json!(86_401)), Some(10_800), 1),
        (client_ip(json!(0)), Some(10_800), 1),
        (json!({"sessionAffinity": "Cookie"}), None, 1),
    ] {
        let (served, warnings) = service(spec.clone());
        assert_eq!((served.unwrap().affinity_seconds, warnings.len()), (expected, warned), "{spec}");
    }
}

#[test]
fn policies_are_cluster_unless_they_are_local_and_health_ports_need_local() {
    let local =
        json!({"externalTrafficPolicy": "Local", "internalTrafficPolicy": "Local", "healthCheckNodePort": 30000});
    let (served, warnings) = service(local);
    let served = served.unwrap();
    assert_eq!((served.internal_policy, served.external_policy), (TrafficPolicy::Local, TrafficPolicy::Local));
    assert_eq!((served.health_check_node_port, warnings), (30000, vec![]));
    let (served, warnings) = service(json!({"externalTrafficPolicy": "Global", "healthCheckNodePort": 30000}));
    let served = served.unwrap();
    assert_eq!((served.external_policy, served.health_check_node_port, warnings.len()), (TrafficPolicy::Cluster, 0, 1));
}

#[test]
fn source_ranges_are_trimmed_and_a_list_without_a_usable_one_lets_nobody_in() {
    let ranges = |list: Value| {
        let (served, warnings) = service(json!({"loadBalancerSourceRanges": list}));
        let ranges: Vec<String> =
            served.unwrap().source_ranges.iter().map(|r| format!("{}/{}", r.ip, r.prefix)).collect();
        (ranges.join(" "), warnings.len())
    };
    assert_eq!(ranges(json!([" 10.0.0.7/8 ", "10.0.0.0/8", "2001:db8::/32"])), ("10.0.0.0/8 2001:db8::/32".into(), 0));
    assert_eq!(ranges(json!(["10.0.0.0/8", "10.0.0.0/40"])), ("10.0.0.0/8".into(), 1));
    assert_eq!(ranges(json!(["10.0.0.0"])), ("0.0.0.0/32 ::/128".into(), 1));
    assert_eq!(ranges(json!([])), (String::new(), 0));
    assert_eq!(ranges(json!(null)), (String::new(), 0));
}

#[test]
fn missing_conditions_have_the_defaults_of_the_api() {
    for (conditions, expected) in [
        (json!(null), (true, true, false)),
        (json!({}), (true, true, false)),
        (json!({"ready": null}), (true, true, false)),
        (json!({"ready": false}), (false, false, false)),
        (json!({"ready": false, "serving": true, "terminating": true}), (false, true, true)),
        (json!({"serving": false}), (true, false, false)),
    ] {
        let (used, _) = slice(json!({"endpoints": [{"addresses": ["10.1.0.1"], "conditions": conditions}]}));
        let endpoint = &used.unwrap().endpoints[0];
        assert_eq!((endpoint.ready, endpoint.serving, endpoint.terminating), expected, "{conditions}");
    }
}

#[test]
fn an_endpoint_that_cannot_be_used_is_left_out_and_a_second_address_is_nothing() {
    let endpoints = json!([
        {"addresses": ["10.1.0.1", "10.1.0.2"]}, {"addresses": []}, {"addresses": null}, {"addresses": ["fd00::1"]},
        {"addresses": ["10.1.0.256"]}, {"addresses": ["0.0.0.0"]}, {"addresses": ["::ffff:10.1.0.3"]},
    ]);
    let (used, warnings) = slice(json!({"endpoints": endpoints}));
    let ips: Vec<_> = used.unwrap().endpoints.iter().map(|e| e.ip).collect();
    assert_eq!((text(&ips).as_str(), warnings.len()), ("10.1.0.1 10.1.0.3", 5), "{warnings:#?}");
    let (used, warnings) = slice(json!({"addressType": "IPv6", "endpoints": [{"addresses": ["::ffff:10.1.0.3"]}]}));
    assert_eq!((used.unwrap().endpoints.len(), warnings.len()), (0, 1));
}

/// As kube-proxy reads what was written before Kubernetes 1.22.
#[test]
fn octets_with_leading_zeros_are_decimal_and_warned_of() {
    let (served, warnings) = service(json!({
        "clusterIPs": ["010.096.0.01"], "externalIPs": ["192.0.002.1"], "loadBalancerSourceRanges": ["010.0.0.0/8"],
    }));
    let served = served.unwrap();
    assert_eq!((text(&served.cluster_ips), text(&served.external_ips)), ("10.96.0.1".into(), "192.0.2.1".into()));
    assert_eq!(served.source_ranges[0].ip.to_string(), "10.0.0.0");
    let expected = "cluster IP \"010.096.0.01\" has leading zeros: it is read as 10.96.0.1, as kube-proxy does";
    assert_eq!((warnings.len(), warnings[0].as_str()), (3, expected), "{warnings:#?}");
    let (used, warnings) = slice(json!({"endpoints": [{"addresses": ["10.1.0.01"]}]}));
    assert_eq!((used.unwrap().endpoints[0].ip.to_string().as_str(), warnings.len()), ("10.1.0.1", 1));
}

#[test]
fn five_thousand_bad_endpoints_are_a_handful_of_warnings() {
    let endpoints: Vec<Value> = (0..5000).map(|_| json!({"addresses": ["nowhere"]})).collect();
    let (used, warnings) = slice(json!({"endpoints": endpoints}));
    assert!(used.unwrap().endpoints.is_empty());
    assert_eq!((warnings.len(), warnings[8].as_str()), (9, "4992 more problems of this kind"));
}

#[test]
fn slices_of_names_are_ignored_and_slices_of_nobody_are_named() {
    assert_eq!(slice(json!({"addressType": "FQDN", "endpoints": [{"addresses": ["example.com"]}]})), (None, vec![]));
    let headless = json!({"metadata": {"name": "x", "labels": {"service.kubernetes.io/headless": ""}}});
    assert_eq!(slice(headless), (None, vec![]));
    for odd in [json!({"addressType": "IPX"}), json!({"metadata": {"name": "x", "labels": null}})] {
        let (used, warnings) = slice(odd.clone());
        assert!(used.is_none() && warnings.len() == 1, "{odd}: {warnings:?}");
    }
}

#[test]
fn slices_of_the_control_plane_are_told_from_those_that_people_write() {
    let managers =
        [("endpointslice-controller.k8s.io", true), ("endpointslicemirroring-controller.k8s.io", false), ("me", false)];
    for (manager, is_controlled) in managers {
        let labels = json!({"kubernetes.io/service-name": "web", "endpointslice.kubernetes.io/managed-by": manager});
        let (used, _) = slice(json!({"metadata": {"name": "web-1", "namespace": "shop", "labels": labels}}));
        assert_eq!(used.unwrap().is_controlled, is_controlled, "{manager}");
    }
}

#[test]
fn slice_ports_without_a_number_are_for_others_and_bad_ones_are_named() {
    let ports = json!([{"port": 8080}, {"name": "all", "port": null}, {"name": "bad", "port": 99999}, {"port": 53, "protocol": "UDP"}]);
    let (used, warnings) = slice(json!({"ports": ports}));
    let ports: Vec<_> = used.unwrap().ports.iter().map(|p| (p.protocol.as_str(), p.port)).collect();
    assert_eq!((ports, warnings.len()), (vec![("TCP", 8080), ("UDP", 53)], 1));
}

#[test]
fn hints_and_nodes_are_shared_between_endpoints() {
    let endpoint = |ip: &str| json!({"addresses": [ip], "nodeName": "n7", "hints": {"forZones": [{"name": "a"}], "forNodes": null}});
    let (used, _) = slice(
        json!({"endpoints": [endpoint("10.1.0.1"), endpoint("10.1.0.2"), {"addresses": ["10.1.0.3"], "hints": {}}]}),
    );
    let used = used.unwrap();
    let [first, second, third] = &used.endpoints[..] else { panic!("{used:?}") };
    assert!(std::ptr::eq(&**first.node.as_ref().unwrap(), &**second.node.as_ref().unwrap()));
    assert!(std::ptr::eq(&**first.hints.as_ref().unwrap(), &**second.hints.as_ref().unwrap()));
    assert_eq!((third.node.as_ref(), third.hints.as_ref()), (None, None));
}

#[test]
fn times_are_read_with_fractions_and_offsets_and_bad_ones_cost_nothing_else() {
    let metadata = |time: &str| {
        json!({"metadata": {"name": "x", "labels": {"kubernetes.io/service-name": "web"},
               "annotations": {"endpoints.kubernetes.io/last-change-trigger-time": time}}})
    };
    for (time, expected, warned) in [
        ("1970-01-01T00:00:01Z", Some(1_000_000_000), 0),
        ("1970-01-01T01:00:01.5+01:00", Some(1_500_000_000), 0),
        ("yesterday", None, 1),
    ] {
        let (used, warnings) = slice(metadata(time));
        assert_eq!((used.unwrap().triggered, warnings.len()), (expected, warned), "{time}");
    }
}

#[test]
fn only_the_own_node_counts_and_its_end_is_seen_coming() {
    assert_eq!(node(json!({"metadata": {"name": "n2"}})), None);
    let plain = node(
        json!({"metadata": {"name": "n1", "labels": {"topology.kubernetes.io/zone": ""}}, "spec": {"taints": null}}),
    );
    assert_eq!(plain.map(|n| (n.zone, n.being_deleted)), Some((None, false)));
    let addresses = json!({"addresses": [{"type": "Hostname", "address": "n1"}, {"type": "InternalIP", "address": "192.0.2.1"},
        {"type": "InternalIP", "address": "2001:db8::1"}, {"type": "ExternalIP", "address": "198.51.100.1"}]});
    let addressed = node(json!({"metadata": {"name": "n1"}, "status": addresses})).unwrap();
    assert_eq!(text(&addressed.internal_ips), "192.0.2.1 2001:db8::1");
    for leaving in [
        json!({"metadata": {"name": "n1", "deletionTimestamp": "2026-01-01T00:00:00Z"}}),
        json!({"metadata": {"name": "n1"}, "spec": {"taints": [{"key": "ToBeDeletedByClusterAutoscaler"}]}}),
    ] {
        assert!(node(leaving.clone()).unwrap().being_deleted, "{leaving}");
    }
}

#[test]
fn a_port_that_is_no_number_costs_that_port_only_whatever_stands_in_its_place() {
    let odd = [json!("80"), json!(0), json!(-1), json!(70_000), json!(80.5), json!(true), json!([80]), json!({"a": 1})];
    for number in odd.into_iter().chain([json!(u64::MAX), json!(1e30), json!(null)]) {
        let ports = json!([{"name": "odd", "port": number}, {"name": "good", "port": 81, "nodePort": number}, null]);
        let (served, warnings) = service(json!({"ports": ports}));
        assert_eq!(served.unwrap().ports.iter().map(|p| (p.port, p.node_port)).collect::<Vec<_>>(), [(81, 0)]);
        assert!(warnings[0].contains("is not a port") && warnings[0].contains("odd"), "{number}: {warnings:?}");

        let (used, warnings) = slice(json!({"ports": [{"name": "odd", "port": number}, {"name": "good", "port": 81}]}));
        assert_eq!(used.unwrap().ports.len(), 1, "{number}");
        assert_eq!(warnings.is_empty(), number.is_null(), "{number}: {warnings:?}");
    }
    let (served, warnings) = service(json!({
        "sessionAffinity": "ClientIP",
        "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": "an hour"}},
        "externalTrafficPolicy": "Local", "healthCheckNodePort": "none",
    }));
    let served = served.unwrap();
    assert_eq!((served.affinity_seconds, served.health_check_node_port, warnings.len()), (Some(10_800), 0, 2));
}

#[test]
fn null_anywhere_is_the_same_as_nothing() {
    let nothing = json!({"metadata": {"name": "web", "namespace": null, "labels": null, "annotations": null},
        "spec": null, "status": null, "endpoints": null, "ports": null, "addressType": null});
    assert!(matches!(convert::<wire::Service>(&nothing).0, Some(Change::ServiceGone(_))));
    assert!(matches!(convert::<wire::EndpointSlice>(&nothing).0, Some(Change::SliceGone(_))));
    assert_eq!(node(nothing), None);

    let (served, warnings) = service(json!({
        "clusterIPs": ["10.0.0.1", null], "externalIPs": [null, "192.0.2.1"], "sessionAffinityConfig": {"clientIP": null},
        "loadBalancerSourceRanges": [null], "status": {"loadBalancer": {"ingress": [null, {"ip": null}, {"ip": "192.0.2.2"}]}},
    }));
    let served = served.unwrap();
    assert_eq!((text(&served.cluster_ips).as_str(), text(&served.external_ips).as_str()), ("10.0.0.1", "192.0.2.1"));
    assert_eq!((text(&served.load_balancer_ips).as_str(), served.source_ranges.len()), ("192.0.2.2", 0));
    assert_eq!(warnings.len(), 2, "{warnings:?}");

    let (used, warnings) = slice(json!({"endpoints": [
        null, {"addresses": null}, {"addresses": [null]},
        {"addresses": ["10.1.0.1"], "conditions": null, "hints": {"forZones": [null], "forNodes": null}, "nodeName": null},
    ]}));
    assert_eq!((used.unwrap().endpoints.len(), warnings.len()), (1, 3), "{warnings:?}");
    let odd = json!({"metadata": {"name": "n1"}, "spec": {"taints": [null]}, "status": {"addresses": [null]}});
    assert_eq!(node(odd).map(|n| n.internal_ips), Some(vec![]));
}

#[test]
fn names_that_no_row_could_tell_apart_are_not_served() {
    let long = "x".repeat(64);
    for bad in [long.as_str(), "a:b", "a/b", "a b", "a\0b", "a\n"] {
        let ports = json!([{"name": bad, "port": 80}, {"name": "good", "port": 81}]);
        let (served, warnings) = service(json!({"ports": ports}));
        assert_eq!(served.unwrap().ports.iter().map(|p| p.port).collect::<Vec<_>>(), [81], "{bad:?}");
        assert!(warnings[0].contains("is not a name"), "{warnings:?}");
        for (namespace, name) in [("shop", bad), (bad, "web")] {
            let object =
                json!({"metadata": {"name": name, "namespace": namespace}, "spec": {"clusterIPs": ["10.0.0.1"]}});
            let (change, warnings) = convert::<wire::Service>(&object);
            assert!(matches!(change, Some(Change::ServiceGone(_))), "{namespace:?}/{name:?}");
            assert!(warnings[0].contains("the Service is not served"), "{warnings:?}");
        }
    }
}

#[test]
fn what_is_absurdly_long_is_told_in_a_line() {
    let long = "\u{e9}".repeat(1 << 20);
    let fields = json!({
        "clusterIPs": ["10.0.0.1", long], "externalIPs": [long], "sessionAffinity": long, "internalTrafficPolicy": long,
        "externalTrafficPolicy": long, "loadBalancerSourceRanges": [long],
        "ports": [{"name": long, "port": 80}, {"port": long}, {"port": 81, "protocol": long}],
    });
    let (served, warnings) = service(fields);
    assert!(served.is_some());
    let (used, more) = slice(json!({"addressType": long}));
    let (_, most) = slice(json!({"endpoints": [{"addresses": [long]}], "ports": [{"name": long, "port": 0}]}));
    assert!(used.is_none());
    let all: Vec<String> = [warnings, more, most].concat();
    assert_eq!(all.len(), 12, "{all:#?}");
    assert!(all.iter().all(|w| w.len() < 500), "{:?}", all.iter().map(String::len).collect::<Vec<_>>());
}
