//! `kubelane explain`: what the next connection to a destination gets on this node, and why. The verdict is made of the
//! rows of the live maps; the daemon, if it runs, adds the reasons that are in no map. Where both disagree, that is said.

mod compare;
mod decide;
mod kernel;
mod render;
mod target;
mod view;
mod words;

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde::Serialize;

use super::flags::{ExplainFlags, Format, PinFlags};
use crate::abi::frontend_flag::FRONTEND_NODE_PORT;
use crate::abi::{Frontend, FrontendKey, backend_flag, backend_state, pool_member};
use crate::bpf;
use crate::chain::chain;
use crate::explain::{self as told, About, Answer, LeftOut, ask};
use crate::model::{Ipx, ObjectName, Protocol, SocketAddrx};
use crate::plan::port::row_name;
pub use decide::{Client, decide};
use decide::{Decision, decide_found};
pub use kernel::Live;
pub use render::{Group, groups};
pub use target::{Asker, Destination, Target};
pub use view::View;
use view::{Asked, LeftOutEndpoint, view};

/// A sync may come between a look at the kernel and one at the daemon: what differs is looked at again.
const SECOND_LOOK: Duration = Duration::from_millis(300);

/// Everything that is told. JSON is this object.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    /// `None`: no daemon answers, and the maps alone were asked.
    pub daemon: Option<told::Daemon>,
    pub views: Vec<View>,
    /// Where the kernel and the daemon disagree.
    pub disagreements: Vec<String>,
    /// What holds of these Services, as in the daemon's log.
    pub warnings: Vec<String>,
    /// What could not be found out, and why.
    pub notes: Vec<String>,
}

/// Runs the subcommand.
///
/// # Errors
/// When nothing is pinned there, the maps cannot be read, or no Service has the name.
pub fn run(flags: &ExplainFlags) -> anyhow::Result<()> {
    let pin_path = &flags.pins.pin_path;
    let live = Live::open(pin_path)?;
    let mut explanation = explain(flags, &live, pin_path)?;
    if !explanation.disagreements.is_empty() {
        std::thread::sleep(SECOND_LOOK);
        explanation = explain(flags, &live, pin_path)?;
    }
    super::print(&match flags.output {
        Some(Format::Json) => serde_json::to_string_pretty(&explanation)? + "\n",
        Some(Format::Yaml) => super::yaml(&explanation)?,
        None => render::text(&explanation),
    })
}

/// Of every address of a Service, for everyone who may ask.
///
/// # Errors
/// As for [`run`].
pub fn of_service(pin_path: &Path, namespace: &str, name: &str) -> anyhow::Result<Explanation> {
    let target = Target::Service { namespace: namespace.to_owned(), name: name.to_owned(), port: None };
    let pins = PinFlags { pin_path: pin_path.to_owned() };
    explain(&ExplainFlags { target, from: None, output: None, pins }, &Live::open(pin_path)?, pin_path)
}

fn explain(flags: &ExplainFlags, live: &Live, pin_path: &Path) -> anyhow::Result<Explanation> {
    let mut notes = Vec::new();
    let about = match &flags.target {
        Target::Destination(to) => {
            About::Destination { ip: to.at.ip.to_ip(), port: to.at.port, protocol: to.protocol.into() }
        }
        Target::Service { namespace, name, .. } => About::Service { namespace: namespace.clone(), name: name.clone() },
    };
    let answer = ask(pin_path, about).unwrap_or_else(|error| {
        notes.push(format!("{}: answered from the maps alone", chain(error.as_ref())));
        None
    });
    let ways = ways(flags, live, answer.as_ref())?;
    let mut explanation = Explanation {
        daemon: answer.as_ref().map(|answer| answer.daemon.clone()),
        views: Vec::new(),
        disagreements: Vec::new(),
        warnings: answer.iter().flat_map(|answer| warnings(&answer.services)).collect(),
        notes,
    };
    let mut clients = clients(flags.from, &mut explanation.notes);
    let configuration = kernel::Kernel::configuration(live);
    for (client, _) in clients.iter_mut().filter(|_| configuration.host_sockets_only) {
        if let Client::Socket { is_host: false, ip, .. } = client {
            *client = Client::PodPacket(*ip);
        }
    }
    explanation.notes.extend(live.unknown_configuration.clone());
    for (to, found) in &ways {
        for (client, from) in &clients {
            let way = Way { to: *to, found: found.as_ref(), client, from: from.clone(), is_wide: clients.len() > 1 };
            explanation.add(&way, live, answer.as_ref())?;
        }
    }
    if let Some(answer) = &answer {
        explanation.disagreements.extend(missing(live, flags, answer)?);
    }
    if clients.iter().any(|(client, _)| matches!(client, Client::Packet(_))) && kernel::Kernel::devices(live)? == 0 {
        explanation.notes.push("no device of this node has the programs for packets from outside".to_owned());
    }
    Ok(explanation)
}

fn warnings(services: &[told::Service]) -> impl Iterator<Item = String> {
    let all = services.iter().flat_map(|service| {
        service.warnings.iter().map(move |warning| format!("Service {}/{}: {warning}", service.namespace, service.name))
    });
    all.collect::<Vec<_>>().into_iter()
}

/// One destination for one kind of client.
struct Way<'a> {
    to: Destination,
    /// The frontend, where it was found by name.
    found: Option<&'a (FrontendKey, Frontend)>,
    client: &'a Client,
    from: String,
    /// Nobody said who asks: only those are told of whom it concerns.
    is_wide: bool,
}

impl Explanation {
    fn add(&mut self, way: &Way, live: &Live, answer: Option<&Answer>) -> anyhow::Result<()> {
        let decision = match way.found {
            Some((key, row)) => decide_found(live, way.to, *key, *row, way.client)?,
            None => decide(live, way.to, way.client)?,
        };
        let is_outside = matches!(way.client, Client::Packet(_));
        if way.found.is_some()
            && way.is_wide
            && decision.verdict == decide::Verdict::Untouched(decide::Reason::ClusterIpOutside)
        {
            return Ok(());
        }
        let told = answer.and_then(|answer| port_told(&decision, way.to.protocol, answer));
        if let (Some(found), Some(_)) = (&decision.found, answer) {
            self.disagreements.extend(compare::compare(found, told, is_outside));
            self.disagreements.dedup();
        }
        let is_node_port = way.found.is_some_and(|(_, row)| row.flags & FRONTEND_NODE_PORT != 0);
        let to_text = match is_node_port && way.to.at.ip.to_ip().is_unspecified() {
            true => {
                let family = if way.to.at.ip.to_ip().is_ipv6() { "IPv6" } else { "IPv4" };
                format!("the node's {family} addresses, port {}/{}", way.to.at.port, way.to.protocol.as_str())
            }
            false => way.to.to_string(),
        };
        let strangers = if answer.is_none() { strangers(live, &decision)? } else { Vec::new() };
        self.views.push(view(Asked {
            to: way.to,
            to_text,
            from_text: way.from.clone(),
            client: way.client,
            decision: &decision,
            told,
            others: answer.map(|answer| &answer.services[..]).unwrap_or_default(),
            daemon: answer.map(|answer| &answer.daemon),
            strangers,
        }));
        Ok(())
    }
}

/// What the daemon says of the Service port that the kernel has found.
fn port_told<'a>(
    decision: &Decision,
    protocol: Protocol,
    answer: &'a Answer,
) -> Option<(&'a told::Service, &'a told::Port)> {
    let name = decision.found.as_ref()?.name.as_deref()?;
    let is_of_row = |service: &told::Service, port: &told::Port| {
        let object = ObjectName::new(&service.namespace, &service.name);
        Protocol::from(port.protocol) == protocol && row_name(&object, &port.name).as_str() == name
    };
    let mut all = answer.services.iter().flat_map(|service| service.ports.iter().map(move |port| (service, port)));
    all.find(|(service, port)| is_of_row(service, port))
}

/// Where to, and what was found there if it was looked for by name.
type Ways = Vec<(Destination, Option<(FrontendKey, Frontend)>)>;

fn ways(flags: &ExplainFlags, live: &Live, answer: Option<&Answer>) -> anyhow::Result<Ways> {
    let (namespace, name, port) = match &flags.target {
        Target::Destination(to) => return Ok(vec![(*to, None)]),
        Target::Service { namespace, name, port } => (namespace, name, port.as_deref()),
    };
    let number: Option<u16> = port.and_then(|port| port.parse().ok());
    let found = live.frontends_of(namespace, name, port.filter(|_| number.is_none()))?;
    let found: Vec<_> = found.into_iter().filter(|(key, _)| number.is_none_or(|number| key.port() == number)).collect();
    if found.is_empty() && answer.is_none_or(|answer| answer.services.is_empty()) {
        let known = if answer.is_some() { ", and the daemon knows none" } else { "" };
        let port = port.map(|port| format!(" with the port {port}")).unwrap_or_default();
        bail!("no Service {namespace}/{name}{port} is in the kernel{known}: see `kubelane get services`");
    }
    let way = |(key, row): (FrontendKey, Frontend)| {
        let protocol = Protocol::of_number(key.protocol);
        let protocol = protocol.with_context(|| format!("a frontend has the protocol {}", key.protocol))?;
        Ok((Destination { at: SocketAddrx { ip: key.ip(), port: key.port() }, protocol }, Some((key, row))))
    };
    found.into_iter().map(way).collect()
}

/// Frontends that the daemon wants for what was asked, and the kernel does not have.
fn missing(live: &Live, flags: &ExplainFlags, answer: &Answer) -> anyhow::Result<Vec<String>> {
    let mut said = Vec::new();
    for service in &answer.services {
        for port in &service.ports {
            for frontend in port.frontends.iter().filter(|frontend| frontend.owner.is_none()) {
                let at = SocketAddrx { ip: Ipx::from(frontend.at.ip()), port: frontend.at.port() };
                let is_asked = match &flags.target {
                    Target::Service { .. } => true,
                    Target::Destination(to) => to.at == at && to.protocol == port.protocol.into(),
                };
                let key = FrontendKey::new(at.ip, at.port, port.protocol.into());
                if is_asked && kernel::Kernel::frontend(live, &key)?.is_none() {
                    let (namespace, name) = (&service.namespace, &service.name);
                    said.push(format!("{at}: the daemon has it for {namespace}/{name}, the kernel does not have it"));
                }
            }
        }
    }
    Ok(said)
}

/// Backends of the Service port and family that are not in the pool: what the maps know of endpoints that are left out.
fn strangers(live: &Live, decision: &Decision) -> anyhow::Result<Vec<LeftOutEndpoint>> {
    let Some(found) = &decision.found else { return Ok(Vec::new()) };
    let family = found.key.ip().family();
    let is_local_set = u32::from(found.pool.member) == pool_member::POOL_LOCAL;
    let mut strangers = Vec::new();
    for backend in live.backends_of(found.row.service_id)? {
        let (ip, is_here) = (Ipx(backend.address), u32::from(backend.flags) & backend_flag::BACKEND_NODE_LOCAL != 0);
        if ip.family() != family || backend.pools & found.pool.member != 0 {
            continue;
        }
        let reason = match () {
            () if is_local_set && !is_here => Some(LeftOut::OtherNode),
            () if u32::from(backend.state) == backend_state::BACKEND_TERMINATING => Some(LeftOut::Terminating),
            () => None,
        };
        let why = match reason {
            Some(LeftOut::OtherNode) => "on another node",
            Some(_) => "terminating, and others are ready",
            None => "in another set: hints, most likely (the daemon would say)",
        };
        strangers.push(LeftOutEndpoint {
            address: SocketAddrx { ip, port: u16::from_be_bytes(backend.port_be) }.to_string(),
            node: Some(if is_here { "this node" } else { "another node" }.to_owned()),
            reason,
            why: why.to_owned(),
        });
    }
    strangers.sort_by(|a, b| a.address.cmp(&b.address));
    Ok(strangers)
}

/// Those who ask, with the words for them.
fn clients(from: Option<Asker>, notes: &mut Vec<String>) -> Vec<(Client, String)> {
    let host = |cookies| Client::Socket { is_host: true, ip: None, cookies };
    match from {
        None => vec![(host(vec![]), "this node and its pods".to_owned()), (Client::Packet(None), "outside".to_owned())],
        Some(Asker::Node) => {
            vec![(host(bpf::own_cookie().into_iter().collect()), "this node's own processes".to_owned())]
        }
        Some(Asker::Pod(ip)) => vec![pod(ip, notes)],
        Some(Asker::Outside(None)) => vec![(Client::Packet(None), "outside".to_owned())],
        Some(Asker::Outside(Some(ip))) => vec![(Client::Packet(Some(ip.into())), format!("outside, {ip}"))],
    }
}

fn pod(ip: IpAddr, notes: &mut Vec<String>) -> (Client, String) {
    let (clients, hidden) = bpf::find_clients(ip);
    let is_host = clients.iter().any(|client| client.is_own);
    match clients.len() {
        0 => {
            let hint = match hidden {
                0 => String::new(),
                n => format!(" ({n} network namespaces could not be inspected)"),
            };
            notes.push(format!(
                "no network namespace of this node has the address {ip}{hint}: if the pod is on another node, run \
                 this there; this is what a pod on this node gets"
            ));
        }
        1 if clients[0].cookie.is_none() => {
            notes.push(
                "this kernel (before 5.14) does not distinguish network namespaces: affinity is not known".to_owned(),
            );
        }
        1 => {}
        n => notes.push(format!("{n} network namespaces have the address {ip}: one of them is remembered if any is")),
    }
    let words = if is_host { format!("{ip}, this node's own processes") } else { format!("pod {ip}") };
    let address = Some(ip.into());
    (
        Client::Socket { is_host, ip: address, cookies: clients.iter().filter_map(|client| client.cookie).collect() },
        words,
    )
}
