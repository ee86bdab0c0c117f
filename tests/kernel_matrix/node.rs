//! A node to throw away: a BPF file system, a cgroup and a network namespace, a process that lives in all three, and
//! the real datapath attached to it.
//!
//! A socket belongs to the cgroup that its maker is in when it makes it, and a namespace needs a process for others to
//! find it by. So each test runs itself once more in a process of its own, started inside the namespace, which enters
//! the cgroup before anything else.

use std::fs;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use bytemuck::bytes_of;
use kubelane::abi::{
    Backend, FlowLimits, Frontend, FrontendKey, Pool, address_flag, backend_state, frontend_flag, pool_member,
};
use kubelane::bpf::{Datapath, Settings};
use kubelane::model::{Ipx, Protocol};
use kubelane::sync::{MapIo, MapName};
use nix::sched::{CloneFlags, unshare};

use crate::laboratory::pins::Pins;
use crate::laboratory::{self, cgroup};

/// Tells the second process which node it lives in.
const NODE: &str = "KUBELANE_TEST_NODE";
/// Of one test, in a guest in software emulation.
const PATIENCE: Duration = Duration::from_secs(100);

/// The pods' addresses, on the loopback device of every namespace that a test makes.
pub const PODS: [[&str; 2]; 2] = [["10.244.0.1", "10.244.0.2"], ["fd00:244::1", "fd00:244::2"]];
/// An address of the node, which serves NodePorts.
pub const NODE_ADDRESSES: [&str; 2] = ["192.0.2.10", "2001:db8::10"];

/// Runs `test` on a node of its own, in another process.
pub fn on_a_node<T: Fn(&mut Node)>(test: T) {
    match std::env::var_os(NODE) {
        Some(directory) => test(&mut Node::enter(Path::new(&directory))),
        None if can_run() => run_in_another_process(test_name::<T>()),
        None => {}
    }
}

/// False, said aloud, on a machine that cannot run these tests.
pub fn can_run() -> bool {
    laboratory::preflight().inspect_err(|reason| laboratory::skip(&format!("{reason:#}"))).is_ok()
}

/// A test's name as libtest knows it, from the name of a closure in it: "crate::test::{{closure}}".
fn test_name<T>() -> &'static str {
    let name = std::any::type_name::<T>().trim_end_matches("::{{closure}}");
    name.split_once("::").unwrap().1
}

fn run_in_another_process(test: &str) {
    let pins = Pins::new();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([test, "--exact", "--nocapture", "--test-threads=1"]).env(NODE, pins.bpffs.as_os_str());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = in_new_namespace(move || command.spawn().unwrap());
    let pid = nix::unistd::Pid::from_raw(child.id() as i32);
    let (done, timer) = channel::<()>();
    let watchdog = std::thread::spawn(move || {
        if timer.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        }
    });
    let output = child.wait_with_output().unwrap();
    drop(done);
    watchdog.join().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        // By the test's own thread, so that libtest keeps it with the test.
        print!("{text}{}", String::from_utf8_lossy(&output.stderr));
        panic!("{test}, in its own process: {}", output.status);
    }
    assert!(text.contains("1 passed"), "the other process ran no test named {test}");
}

/// Runs `work` on a thread in a new network namespace that has the pods' and the node's addresses.
pub fn in_new_namespace<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    on_a_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        ip(&["link", "set", "lo", "up"]);
        for address in PODS.iter().flatten().chain(&NODE_ADDRESSES) {
            let length = if address.contains(':') { 128 } else { 32 };
            ip(&["address", "add", &format!("{address}/{length}"), "dev", "lo"]);
            wait_for_address(address.parse().unwrap());
        }
        work()
    })
}

/// Runs `work` on a thread of its own: a namespace belongs to a thread, and this one ends.
pub fn on_a_thread<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| match scope.spawn(work).join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

/// The kernel makes an IPv6 address usable, and its route, a moment after it was added, on loopback as well.
fn wait_for_address(address: IpAddr) {
    let is_up = || UdpSocket::bind((address, 0)).and_then(|socket| socket.connect((address, 9))).is_ok();
    assert!(laboratory::eventually(Duration::from_secs(10), is_up), "{address} does not come up");
}

fn ip(arguments: &[&str]) {
    let output = Command::new("ip").args(arguments).output().unwrap();
    assert!(output.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The datapath, and the rows that the test has written.
pub struct Node {
    settings: Settings,
    datapath: Option<Datapath>,
    next_backend: u32,
    next_slot: u32,
    next_service: u32,
}

/// What a test asks of a service beyond its address and its backends.
#[derive(Clone, Copy, Default)]
pub struct Options {
    pub affinity_seconds: u32,
    pub on_empty: u32,
    /// Not a cluster IP but a NodePort, at the wildcard address.
    pub node_port: bool,
}

/// The rows of a service.
#[derive(Clone, Debug)]
pub struct Service {
    key: FrontendKey,
    frontend: Frontend,
    backends: Vec<(u32, Backend)>,
}

impl Node {
    fn enter(directory: &Path) -> Node {
        let cgroup = cgroup::mount_point().unwrap().join(directory.file_name().unwrap());
        fs::write(cgroup.join("cgroup.procs"), "0").unwrap();
        let settings = Settings {
            pin_path: directory.join("kl"),
            cgroup,
            max_endpoints: 256,
            max_services: 64,
            max_source_ranges: 65_536,
            discard_newer: false,
            flow_limits: FlowLimits::default(),
            tcp_be_liberal: false,
            host_sockets_only: false,
            has_pod_devices: true,
            external_cluster_ips: false,
        };
        let datapath = Some(Datapath::open(&settings).unwrap());
        Node { settings, datapath, next_backend: 1, next_slot: 0, next_service: 1 }
    }

    pub fn pin_path(&self) -> &Path {
        &self.settings.pin_path
    }

    pub fn datapath(&mut self) -> &mut Datapath {
        self.datapath.as_mut().expect("the daemon is not stopped")
    }

    /// The daemon goes; what it attached stays.
    pub fn stop(&mut self) {
        self.datapath = None;
    }

    pub fn start(&mut self) {
        self.datapath = Some(Datapath::open(&self.settings).unwrap());
    }

    /// Writes a service at `ip`:`port`, in the order in which the daemon does: nothing points at what is not there.
    pub fn serve(
        &mut self,
        ip: IpAddr,
        port: u16,
        protocol: Protocol,
        pods: &[SocketAddr],
        options: Options,
    ) -> Service {
        let service_id = self.next_service;
        self.next_service += 1;
        let flags =
            if options.node_port { frontend_flag::FRONTEND_NODE_PORT } else { frontend_flag::FRONTEND_CLUSTER_IP };
        let pool =
            Pool { member: pool_member::POOL_CLUSTER as u8, on_empty: options.on_empty as u8, ..Pool::default() };
        let frontend =
            Frontend { service_id, flags, affinity_seconds: options.affinity_seconds, inside: pool, outside: pool };
        let mut service = Service { key: FrontendKey::new(ip.into(), port, protocol), frontend, backends: Vec::new() };
        if !options.node_port {
            self.write(MapName::Addresses, &Ipx::from(ip).0, bytes_of(&address_flag::ADDRESS_CLUSTER_IP));
        }
        self.set_pods(&mut service, pods);
        service
    }

    /// Moves the service to new backends: a new region of slots, then the frontend, then the former ones are gone.
    pub fn set_pods(&mut self, service: &mut Service, pods: &[SocketAddr]) {
        let former = std::mem::take(&mut service.backends);
        let base = self.next_slot;
        for (slot, pod) in (base..).zip(pods) {
            let backend = Backend {
                address: Ipx::from(pod.ip()).0,
                port_be: pod.port().to_be_bytes(),
                state: backend_state::BACKEND_ACTIVE as u8,
                pools: pool_member::POOL_CLUSTER as u8,
                generation: 1,
                service_id: service.frontend.service_id,
                protocol: service.key.protocol,
                ..Backend::default()
            };
            let id = self.next_backend;
            self.next_backend += 1;
            self.write(MapName::Backends, bytes_of(&id), bytes_of(&backend));
            self.write(MapName::Slots, bytes_of(&slot), bytes_of(&id));
            service.backends.push((id, backend));
        }
        self.next_slot += pods.len() as u32;
        service.frontend.inside = Pool { base, count: pods.len() as u32, ..service.frontend.inside };
        self.write(MapName::Frontends, bytes_of(&service.key), bytes_of(&service.frontend));
        for (id, mut backend) in former {
            backend.state = backend_state::BACKEND_GONE as u8;
            backend.pools = 0;
            self.write(MapName::Backends, bytes_of(&id), bytes_of(&backend));
        }
    }

    /// Runs `work` while this process is in the root cgroup, where no program is attached.
    pub fn outside_the_cgroup<T>(&self, work: impl FnOnce() -> T) -> T {
        fs::write(cgroup::mount_point().unwrap().join("cgroup.procs"), "0").unwrap();
        let result = work();
        fs::write(self.settings.cgroup.join("cgroup.procs"), "0").unwrap();
        result
    }

    /// Makes `ip` an address of the node.
    pub fn add_node_address(&mut self, ip: IpAddr) {
        self.write(MapName::Addresses, &Ipx::from(ip).0, bytes_of(&address_flag::ADDRESS_NODE));
    }

    fn write(&mut self, map: MapName, key: &[u8], value: &[u8]) {
        let failures = self.datapath().maps().write(map, key, value, 1);
        assert!(failures.is_empty(), "{map:?}: {failures:?}");
    }
}
