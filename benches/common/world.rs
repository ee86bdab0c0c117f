//! A world of N Services with M endpoints each: as a directory of ordinary YAML, or as the objects of an API server.

use std::fmt::Write as _;
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::ValueEnum;
use serde_json::{Value, json};

/// Port of every Service, and of every endpoint.
pub const SERVICE_PORT: u16 = 80;
pub const ENDPOINT_PORT: u16 = 8080;

/// How the objects are spread over files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Layout {
    /// One file for each Service and its EndpointSlice.
    One,
    /// Files of 1,000 Services each.
    Big,
}

/// How much an object says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Style {
    /// What a person writes.
    Plain,
    /// What an API server returns: with uid, resourceVersion, ownerReferences, targetRef, all conditions.
    Cluster,
}

const SERVICES_OF_A_BIG_FILE: usize = 1000;
/// As the EndpointSlice controller fills them (its `--max-endpoints-per-slice`).
pub const ENDPOINTS_OF_A_SLICE: usize = 100;

/// A Service by its number, with the addresses of its endpoints.
#[derive(Clone, Debug)]
pub struct BenchService {
    pub number: usize,
    pub endpoints: Vec<Ipv4Addr>,
}

impl BenchService {
    /// 10.96.0.0/12 holds a million of them; the first /24 stays free for Services that a bench adds.
    pub fn cluster_ip(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(Ipv4Addr::new(10, 96, 1, 0).to_bits() + self.number as u32)
    }

    fn yaml(&self, style: Style, into: &mut String) -> anyhow::Result<()> {
        match style {
            Style::Plain => self.plain(into),
            Style::Cluster => {
                into.push_str(&serde_norway::to_string(&self.service())?);
                for index in 0..self.slices() {
                    into.push_str("---\n");
                    into.push_str(&serde_norway::to_string(&self.slice(index))?);
                }
            }
        }
        Ok(())
    }

    fn plain(&self, into: &mut String) {
        let (number, ip) = (self.number, self.cluster_ip());
        // Writing to a String does not fail.
        let _ = write!(
            into,
            "apiVersion: v1
kind: Service
metadata:
  name: service-{number}
  namespace: bench
spec:
  clusterIP: {ip}
  ports:
    - name: http
      port: {SERVICE_PORT}
      targetPort: {ENDPOINT_PORT}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: service-{number}-x7k2p
  namespace: bench
  labels:
    kubernetes.io/service-name: service-{number}
addressType: IPv4
ports:
  - name: http
    protocol: TCP
    port: {ENDPOINT_PORT}
endpoints:
"
        );
        for (index, ip) in self.endpoints.iter().enumerate() {
            let node = index % 100;
            let _ = write!(
                into,
                "  - addresses: [{ip}]
    conditions: {{ready: true}}
    nodeName: node-{node}
"
            );
        }
    }

    /// The Service as an API server has it.
    pub fn service(&self) -> Value {
        let (number, ip) = (self.number, self.cluster_ip().to_string());
        let name = format!("service-{number}");
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {
                "creationTimestamp": "2026-01-01T00:00:00Z",
                "labels": {"app": name},
                "name": name,
                "namespace": "bench",
                "resourceVersion": (1000 + number).to_string(),
                "uid": self.uid(),
            },
            "spec": {
                "clusterIP": ip,
                "clusterIPs": [ip],
                "internalTrafficPolicy": "Cluster",
                "ipFamilies": ["IPv4"],
                "ipFamilyPolicy": "SingleStack",
                "ports": [
                    {"name": "http", "port": SERVICE_PORT, "protocol": "TCP", "targetPort": ENDPOINT_PORT},
                ],
                "selector": {"app": name},
                "sessionAffinity": "None",
                "type": "ClusterIP",
            },
            "status": {"loadBalancer": {}},
        })
    }

    /// How many EndpointSlices the controller makes of the endpoints.
    pub fn slices(&self) -> usize {
        self.endpoints.len().div_ceil(ENDPOINTS_OF_A_SLICE)
    }

    /// One of the EndpointSlices, as the controller writes it and an API server has it.
    pub fn slice(&self, index: usize) -> Value {
        let number = self.number;
        let name = format!("service-{number}");
        let first = index * ENDPOINTS_OF_A_SLICE;
        let own = self.endpoints.iter().enumerate().skip(first).take(ENDPOINTS_OF_A_SLICE);
        json!({
            "addressType": "IPv4",
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "annotations": {"endpoints.kubernetes.io/last-change-trigger-time": "2026-01-01T00:00:07Z"},
                "creationTimestamp": "2026-01-01T00:00:00Z",
                "generateName": format!("{name}-"),
                "generation": 2,
                "labels": {
                    "app": name,
                    "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
                    "kubernetes.io/service-name": name,
                },
                "name": format!("{name}-x7k{index:02}"),
                "namespace": "bench",
                "ownerReferences": [{
                    "apiVersion": "v1",
                    "blockOwnerDeletion": true,
                    "controller": true,
                    "kind": "Service",
                    "name": name,
                    "uid": self.uid(),
                }],
                "resourceVersion": (1000 + number).to_string(),
                "uid": format!("9a6d7c11-{index:04}-4000-8000-{number:012}"),
            },
            "ports": [{"name": "http", "port": ENDPOINT_PORT, "protocol": "TCP"}],
            "endpoints": own.map(|(index, ip)| self.endpoint(index, *ip)).collect::<Vec<_>>(),
        })
    }

    fn endpoint(&self, index: usize, ip: Ipv4Addr) -> Value {
        let number = self.number;
        json!({
            "addresses": [ip],
            "conditions": {"ready": true, "serving": true, "terminating": false},
            "nodeName": format!("node-{}", index % 100),
            "targetRef": {
                "kind": "Pod",
                "name": format!("service-{number}-5c9d7b9c4-p{index}"),
                "namespace": "bench",
                "uid": format!("77b3a1d0-{index:04}-4000-8000-{number:012}"),
            },
            "zone": format!("zone-{}", index % 3),
        })
    }

    fn uid(&self) -> String {
        format!("5f0f1c52-0000-4000-8000-{:012}", self.number)
    }
}

/// All Services, and where their files are.
pub struct BenchWorld {
    pub dir: PathBuf,
    pub services: Vec<BenchService>,
    layout: Layout,
    style: Style,
    next_ip: u32,
}

impl BenchWorld {
    /// Writes the files of a new world into the new directory `dir`.
    pub fn write(dir: &Path, services: usize, endpoints: usize, layout: Layout, style: Style) -> anyhow::Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
        let world = BenchWorld { dir: dir.to_owned(), layout, style, ..BenchWorld::new(services, endpoints) };
        for first in (0..world.services.len()).step_by(world.services_of_a_file()) {
            fs::write(world.path(first), world.text(first)?).context("writing the world")?;
        }
        Ok(world)
    }

    /// A new world that has no files.
    pub fn new(services: usize, endpoints: usize) -> Self {
        let mut next_ip = Ipv4Addr::new(10, 128, 0, 1).to_bits();
        let mut fresh = || {
            next_ip += 1;
            Ipv4Addr::from_bits(next_ip)
        };
        let services = (0..services)
            .map(|number| BenchService { number, endpoints: (0..endpoints).map(|_| fresh()).collect() })
            .collect();
        BenchWorld { dir: PathBuf::new(), services, layout: Layout::One, style: Style::Plain, next_ip }
    }

    fn services_of_a_file(&self) -> usize {
        match self.layout {
            Layout::One => 1,
            Layout::Big => SERVICES_OF_A_BIG_FILE,
        }
    }

    /// The file that holds a Service.
    pub fn path(&self, service: usize) -> PathBuf {
        self.dir.join(format!("services-{:05}.yaml", service / self.services_of_a_file()))
    }

    /// The whole text of the file that holds a Service.
    pub fn text(&self, service: usize) -> anyhow::Result<String> {
        let size = self.services_of_a_file();
        let first = service / size * size;
        let mut text = String::new();
        for service in &self.services[first..(first + size).min(self.services.len())] {
            if !text.is_empty() {
                text.push_str("---\n");
            }
            service.yaml(self.style, &mut text)?;
        }
        Ok(text)
    }

    /// An address that no endpoint has had.
    pub fn fresh_ip(&mut self) -> Ipv4Addr {
        self.next_ip += 1;
        Ipv4Addr::from_bits(self.next_ip)
    }

    pub fn endpoints(&self) -> usize {
        self.services.iter().map(|service| service.endpoints.len()).sum()
    }

    /// The daemon's limits, with which its maps may hold the world, what changes leave behind for a while, and what comes
    /// later.
    pub fn limits(&self) -> [String; 4] {
        let services = (self.services.len() * 5 / 4).max(262_144);
        let endpoints = (self.endpoints() * 5 / 4).max(4 << 20);
        ["--max-services".to_owned(), services.to_string(), "--max-endpoints".to_owned(), endpoints.to_string()]
    }

    /// Bytes of all files.
    pub fn size(&self) -> u64 {
        let entries = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        entries.filter_map(|entry| Some(entry.metadata().ok()?.len())).sum()
    }
}
