//! Real addresses in a network namespace that the test makes (root only; said aloud otherwise).

use std::future::Future;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use futures::TryStreamExt as _;
use nix::sched::{CloneFlags, unshare};
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::AddressMessage;
use rtnetlink::packet_route::link::MacVlanMode;
use rtnetlink::packet_route::route::{RouteAttribute, RouteMessage, RouteMetric};
use rtnetlink::{Handle, LinkBridge, LinkMacVlan, LinkUnspec, LinkVeth, RouteMessageBuilder};
use tokio::time::timeout;

use super::dump::own_address;
use super::*;

/// Runs `body` on a thread with a network namespace of its own, which goes when the thread ends.
fn in_new_namespace<F: Future<Output = ()> + 'static>(body: fn(Handle) -> F) {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: needs root: it makes a network namespace");
        return;
    }
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection().unwrap();
            tokio::spawn(connection);
            timeout(Duration::from_secs(20), body(handle)).await.expect("the test ends in time");
        });
    });
    thread.join().unwrap();
}

async fn add_bridge(handle: &Handle, name: &str) -> u32 {
    handle.link().add(LinkBridge::new(name).up().build()).execute().await.unwrap();
    let mut links = handle.link().get().match_name(name).execute();
    links.try_next().await.unwrap().unwrap().header.index
}

async fn add(handle: &Handle, device: u32, address: &str) {
    let ip: IpAddr = address.parse().unwrap();
    // Host prefixes: with a shared subnet, removing the first IPv4 address takes the others with it.
    handle.address().add(device, ip, if ip.is_ipv4() { 32 } else { 128 }).execute().await.unwrap();
}

async fn remove(handle: &Handle, address: &str) {
    let ip: Ipx = address.parse().unwrap();
    let all: Vec<AddressMessage> = handle.address().get().execute().try_collect().await.unwrap();
    let message = all.into_iter().find(|m| own_address(m) == Some(ip)).expect("the address is there");
    assert_ne!(message.header.family, AddressFamily::Unspec);
    handle.address().del(message).execute().await.unwrap();
}

/// Waits until the channel holds exactly these, link-local ones aside (bridges make them when they please).
async fn expect(receiver: &mut watch::Receiver<Network>, expected: &str) {
    let mut expected: Vec<Ipx> = expected.split_whitespace().map(|t| t.parse().unwrap()).collect();
    expected.sort_unstable();
    let matches = |known: &Network| NodePortAddresses::All.select(&known.addresses, &[]) == expected;
    let waited = timeout(Duration::from_secs(5), receiver.wait_for(matches)).await.map(|r| r.map(|_| ()));
    assert!(waited.is_ok_and(|r| r.is_ok()), "expected {expected:?}, got {:?}", *receiver.borrow());
}

#[test]
fn addresses_of_the_namespace_are_followed_while_they_come_and_go() {
    in_new_namespace(|handle| async move {
        let lan = add_bridge(&handle, "lan0").await;
        add(&handle, lan, "192.0.2.5").await;
        let mut receiver = watch().await.unwrap();
        expect(&mut receiver, "192.0.2.5").await;

        add(&handle, lan, "192.0.2.7").await;
        add(&handle, lan, "2001:db8::5").await;
        expect(&mut receiver, "192.0.2.5 192.0.2.7 2001:db8::5").await;

        remove(&handle, "192.0.2.5").await;
        expect(&mut receiver, "192.0.2.7 2001:db8::5").await;

        handle.link().del(lan).execute().await.unwrap();
        expect(&mut receiver, "").await;
    });
}

#[test]
fn loopback_addresses_and_the_ipvs_device_are_left_out() {
    in_new_namespace(|handle| async move {
        let mut receiver = watch().await.unwrap();
        let ipvs = add_bridge(&handle, IPVS_DEVICE).await;
        add(&handle, ipvs, "10.96.0.1").await;
        add(&handle, 1, "127.0.0.99").await;
        // An address on lo that is not a loopback address is the node's (BGP hosts announce such ones).
        add(&handle, 1, "198.51.100.1").await;
        expect(&mut receiver, "198.51.100.1").await;
    });
}

#[test]
fn many_changes_at_once_end_in_the_right_set() {
    in_new_namespace(|handle| async move {
        let lan = add_bridge(&handle, "lan0").await;
        let mut receiver = watch().await.unwrap();
        for last in 1..=250 {
            add(&handle, lan, &format!("192.0.2.{last}")).await;
        }
        for last in 1..=248 {
            remove(&handle, &format!("192.0.2.{last}")).await;
        }
        expect(&mut receiver, "192.0.2.249 192.0.2.250").await;
    });
}

/// Waits until exactly these devices face outwards.
async fn expect_outward(receiver: &mut watch::Receiver<Network>, expected: &[&str]) {
    let names = |known: &Network| -> Vec<String> {
        DeviceSelection::Found.select(&known.devices, &[]).iter().map(|d| d.name.clone()).collect()
    };
    let waited = timeout(Duration::from_secs(5), receiver.wait_for(|known| names(known) == expected)).await;
    let arrived = waited.is_ok_and(|r| r.is_ok());
    assert!(arrived, "expected {expected:?}, got {:?}", names(&receiver.borrow()));
}

#[test]
fn a_device_faces_outwards_while_it_has_a_default_route_and_until_it_vanishes() {
    in_new_namespace(|handle| async move {
        let mut receiver = watch().await.unwrap();
        expect_outward(&mut receiver, &[]).await;
        handle.link().add(LinkVeth::new("up0", "far0").up().build()).execute().await.unwrap();
        let mut links = handle.link().get().match_name("up0").execute();
        let up = links.try_next().await.unwrap().unwrap().header.index;
        let far = LinkUnspec::new_with_name("far0").up().build();
        handle.link().set(far).execute().await.unwrap();
        // A pod's end of a cable has no address, or a single one.
        add(&handle, up, "192.0.2.5").await;
        expect_outward(&mut receiver, &[]).await;

        let route = || -> RouteMessage { RouteMessageBuilder::<Ipv4Addr>::new().output_interface(up).build() };
        handle.route().add(route()).execute().await.unwrap();
        expect_outward(&mut receiver, &["up0"]).await;
        {
            let known = receiver.borrow();
            let device = known.devices.iter().find(|d| d.index == up).unwrap();
            assert_eq!(device.layer, Layer::Ethernet);
            assert_eq!(device.addresses, ["192.0.2.5".parse::<Ipx>().unwrap()]);
        }
        handle.route().del(route()).execute().await.unwrap();
        expect_outward(&mut receiver, &[]).await;
        handle.route().add(route()).execute().await.unwrap();
        expect_outward(&mut receiver, &["up0"]).await;
        handle.link().del(up).execute().await.unwrap();
        expect_outward(&mut receiver, &[]).await;
    });
}

#[test]
fn a_bridge_with_an_address_faces_outwards_while_it_has_a_member_that_leads_out_of_the_node() {
    in_new_namespace(|handle| async move {
        let lan = add_bridge(&handle, "lan0").await;
        handle.address().add(lan, "192.0.2.5".parse().unwrap(), 24).execute().await.unwrap();
        let index = async |name: &str| {
            let mut links = handle.link().get().match_name(name).execute();
            links.try_next().await.unwrap().unwrap().header.index
        };
        handle.link().add(LinkVeth::new("pod0", "far0").up().build()).execute().await.unwrap();
        let pod = index("pod0").await;
        handle.link().set(LinkUnspec::new_with_index(pod).controller(lan).build()).execute().await.unwrap();
        let mut receiver = watch().await.unwrap();
        expect_outward(&mut receiver, &[]).await;

        let below = index("far0").await;
        let uplink = LinkMacVlan::new("mac0", below, MacVlanMode::Bridge).controller(lan).build();
        handle.link().add(uplink).execute().await.unwrap();
        expect_outward(&mut receiver, &["lan0"]).await;
        handle.link().del(index("mac0").await).execute().await.unwrap();
        expect_outward(&mut receiver, &[]).await;
    });
}

#[test]
fn a_switch_of_forwarding_is_a_change_of_routes() {
    in_new_namespace(|_| async move {
        let (sender, mut changes) = tokio::sync::mpsc::unbounded_channel();
        tokio::spawn(follow_routes(move |change| {
            let _ = sender.send(change);
        }));
        for sysctl in ["ipv4/conf/all/forwarding", "ipv6/conf/all/forwarding", "ipv4/conf/lo/forwarding"] {
            // Until nothing of the start, or of the switch before, is heard any more.
            while timeout(Duration::from_millis(200), changes.recv()).await.is_ok() {}
            let path = format!("/proc/sys/net/{sysctl}");
            let old = std::fs::read_to_string(&path).unwrap();
            std::fs::write(&path, if old.trim() == "0" { "1" } else { "0" }).unwrap();
            let told = timeout(Duration::from_secs(5), changes.recv()).await;
            assert_eq!(told.unwrap_or_else(|_| panic!("{sysctl}: no notice")), Some(RouteChange::Routes));
        }
    });
}

/// Processor time of this thread, on which the test's runtime is.
fn used() -> Duration {
    let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_THREAD).unwrap();
    let of = |time: nix::sys::time::TimeVal| Duration::new(time.tv_sec() as u64, time.tv_usec() as u32 * 1000);
    of(usage.user_time()) + of(usage.system_time())
}

#[test]
fn a_device_that_comes_costs_the_same_beside_twenty_thousand_routes() {
    in_new_namespace(|handle| async move {
        let lan = add_bridge(&handle, "lan0").await;
        add(&handle, lan, "192.0.2.5").await;
        for n in 0..20_000u32 {
            let to = Ipv4Addr::from_bits(0x0a00_0000 + (n << 8));
            let route = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(to, 24).output_interface(lan);
            handle.route().add(route.build()).execute().await.unwrap();
        }
        let mut receiver = watch().await.unwrap();
        expect(&mut receiver, "192.0.2.5").await;
        // What the routes' own notices lead to.
        sleep(Duration::from_millis(500)).await;
        let before = used();
        for n in 0..10 {
            add_bridge(&handle, &format!("pod{n}")).await;
            sleep(Duration::from_millis(200)).await;
        }
        let arrived = |known: &Network| known.devices.len() == 12;
        timeout(Duration::from_secs(5), receiver.wait_for(arrived)).await.unwrap().unwrap();
        let each = (used() - before) / 10;
        eprintln!("{each:?} of processor time for each device");
        assert!(each < Duration::from_millis(25), "{each:?} of processor time for each device");
    });
}

#[test]
fn a_default_route_that_went_with_its_device_is_gone_when_the_device_is_back() {
    in_new_namespace(|handle| async move {
        let up = add_bridge(&handle, "up0").await;
        add(&handle, up, "192.0.2.5").await;
        let route = RouteMessageBuilder::<Ipv4Addr>::new().output_interface(up).build();
        handle.route().add(route).execute().await.unwrap();
        let mut receiver = watch().await.unwrap();
        let has = |known: &Network| known.device(up).is_some_and(|device| device.has_default_route);
        assert!(has(&receiver.borrow()));
        handle.link().set(LinkUnspec::new_with_index(up).down().build()).execute().await.unwrap();
        timeout(Duration::from_secs(5), receiver.wait_for(|known| !has(known))).await.unwrap().unwrap();
        handle.link().set(LinkUnspec::new_with_index(up).up().build()).execute().await.unwrap();
        let is_up = |known: &Network| known.device(up).is_some_and(|device| device.is_up);
        timeout(Duration::from_secs(5), receiver.wait_for(is_up)).await.unwrap().unwrap();
        assert!(!has(&receiver.borrow()));
    });
}

#[test]
fn the_least_mtu_of_routes_without_a_lock_is_followed() {
    in_new_namespace(|handle| async move {
        let lan = add_bridge(&handle, "lan0").await;
        add(&handle, lan, "192.0.2.5").await;
        let (sender, mut told) = tokio::sync::mpsc::unbounded_channel();
        let following = tokio::spawn(follow_routes(move |change| {
            if let RouteChange::LeastMtu(mtu) = change {
                let _ = sender.send(mtu);
            }
        }));
        let mut expect = async |expected: Option<u32>| {
            let waited = timeout(Duration::from_secs(5), async {
                while told.recv().await.expect("it is followed for ever") != expected {}
            });
            waited.await.unwrap_or_else(|_| panic!("{expected:?} was not told of"));
        };
        expect(None).await;
        let route = |to: [u8; 4], metrics: Vec<RouteMetric>| {
            let route = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(to.into(), 24).output_interface(lan);
            let mut message = route.build();
            message.attributes.push(RouteAttribute::Metrics(metrics));
            message
        };
        // A locked one is told by bpf_fib_lookup().
        let locked = route([10, 1, 0, 0], vec![RouteMetric::Lock(1 << 2), RouteMetric::Mtu(1300)]);
        let plain = route([10, 2, 0, 0], vec![RouteMetric::Mtu(1400)]);
        for one in [&locked, &plain] {
            handle.route().add(one.clone()).execute().await.unwrap();
        }
        expect(Some(1400)).await;
        handle.route().del(plain).execute().await.unwrap();
        expect(None).await;
        following.abort();
    });
}
