use bytemuck::Zeroable as _;

use super::*;
use crate::abi::frontend_flag::{FRONTEND_CLUSTER_IP, FRONTEND_LOAD_BALANCER, FRONTEND_NODE_PORT};
use crate::abi::pool_empty::EMPTY_DROP;
use crate::abi::{Frontend, FrontendKey, Pool, ServiceName};
use crate::model::Protocol;
use crate::sync::{Failure, MapIo, MapName};

/// Two maps.
#[derive(Default)]
struct Kernel {
    names: Vec<(u32, ServiceName)>,
    frontends: Vec<(FrontendKey, Frontend)>,
}

impl Kernel {
    fn port(&mut self, id: u32, name: &str) {
        self.names.push((id, ServiceName::new(name)));
    }

    fn frontend(&mut self, id: u32, at: &str, flags: u32, count: u32) {
        let at: std::net::SocketAddr = at.parse().unwrap();
        let pool = Pool { count, on_empty: EMPTY_DROP as u8, ..Pool::zeroed() };
        let row = Frontend { service_id: id, flags, inside: pool, outside: pool, ..Frontend::default() };
        self.frontends.push((FrontendKey::new(at.ip().into(), at.port(), Protocol::Tcp), row));
    }
}

impl MapIo for Kernel {
    fn write(&mut self, _: MapName, _: &[u8], _: &[u8], _: usize) -> Vec<Failure> {
        unreachable!("it is only read")
    }

    fn delete(&mut self, _: MapName, _: &[u8], _: usize) -> Vec<Failure> {
        unreachable!("it is only read")
    }

    fn dump(&mut self, map: MapName, each: &mut dyn FnMut(&[u8], &[u8])) -> std::io::Result<()> {
        match map {
            MapName::Services => {
                self.names.iter().for_each(|(id, name)| each(bytemuck::bytes_of(id), bytemuck::bytes_of(name)));
            }
            MapName::Frontends => {
                self.frontends.iter().for_each(|(key, row)| each(bytemuck::bytes_of(key), bytemuck::bytes_of(row)));
            }
            _ => unreachable!("two maps are enough"),
        }
        Ok(())
    }

    fn note_new_owners(&mut self) -> std::io::Result<()> {
        unreachable!("it is only read")
    }

    fn capacity(&self, _: MapName) -> u32 {
        0
    }
}

fn overview() -> Overview {
    let mut kernel = Kernel::default();
    kernel.port(1, "shop/web:http");
    kernel.frontend(1, "192.0.2.9:80", FRONTEND_LOAD_BALANCER, 1);
    kernel.frontend(1, "[fd00::1]:80", FRONTEND_CLUSTER_IP, 2);
    kernel.frontend(1, "10.96.0.10:80", FRONTEND_CLUSTER_IP, 3);
    kernel.frontend(1, "0.0.0.0:30080", FRONTEND_NODE_PORT, 3);
    kernel.port(2, "shop/dns");
    kernel.frontend(2, "10.96.0.11:53", FRONTEND_CLUSTER_IP, 0);
    kernel.port(3, "ops/\u{202e}bew\x1b[31m");
    kernel.frontend(3, "10.96.0.12:90", FRONTEND_CLUSTER_IP, 1);
    kernel.port(4, "ops/going");
    let services = Arc::new(services::service_ports(&mut kernel).unwrap());
    let rates = [("shop/dns".to_owned(), 7.5), ("shop/web:http".to_owned(), 0.0)];
    Overview { services, connections: Some(rates.into_iter().collect()), ..Overview::default() }
}

fn names(rows: &[Row]) -> Vec<String> {
    rows.iter().map(|row| row.port.full_name.clone()).collect()
}

#[test]
fn a_service_port_is_shown_by_its_cluster_ip_with_all_its_kinds() {
    let overview = overview();
    assert_eq!(overview.count(), 3, "one that has no frontend is on its way in or out");
    let rows = overview.rows("web:", Order::Name);
    let port = rows[0].port;
    assert_eq!((port.address.as_str(), port.more_addresses, port.endpoints), ("10.96.0.10:80", 3, 3));
    assert_eq!(port.kinds, ["ClusterIP", "LoadBalancer", "NodePort"]);
    assert_eq!(port.when_empty, "dropped");
}

#[test]
fn all_words_are_looked_for_in_names_addresses_and_kinds() {
    let overview = overview();
    let found = |search: &str| names(&overview.rows(search, Order::Name));
    assert_eq!(found("SHOP"), ["shop/dns", "shop/web:http"]);
    assert_eq!(found("shop nodeport"), ["shop/web:http"]);
    assert_eq!(found(" 10.96.0.11 "), ["shop/dns"]);
    assert_eq!(found("\\u202ebew"), ["ops/\u{202e}bew\x1b[31m"], "as it is shown");
    assert_eq!(found("nothing"), [""; 0]);
    assert_eq!(found("").len(), 3);
}

#[test]
fn the_busiest_come_first_and_those_that_are_not_counted_last() {
    let overview = overview();
    assert_eq!(names(&overview.rows("", Order::New))[..2], ["shop/dns", "shop/web:http"]);
    assert_eq!(names(&overview.rows("shop", Order::Open)), ["shop/dns", "shop/web:http"]);
    assert_eq!(overview.rows("ops", Order::New)[0].rate, None);
}

#[test]
fn what_succeeded_is_no_refusal() {
    let shown: Vec<&str> = counter::NAMES.iter().map(|(name, _)| *name).filter(|name| is_shown(name)).collect();
    assert!(shown.contains(&"refused_no_endpoint") && shown.contains(&"dropped_martian"));
    assert!(shown.contains(&"failed_storage") && !shown.contains(&"connect_translated"));
}
