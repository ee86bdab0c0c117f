//! `kubelane get status`: what the state in the kernel amounts to.

use std::collections::HashSet;
use std::path::Path;

use serde::Serialize;

use super::get::Output;
use super::snapshot;
use super::table;
use crate::abi::ServiceName;
use crate::bpf::{self, MapMemory, Maps};
use crate::sync::MapName;

pub const MIB: f64 = (1 << 20) as f64;

/// JSON and YAML are this object.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// Services that have a port in the kernel.
    services: usize,
    /// What the kernel accounts for all maps.
    map_bytes: u64,
    maps: Vec<Map>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Map {
    name: String,
    bytes: u64,
    /// Rows that fit.
    capacity: u32,
}

impl Status {
    /// # Errors
    /// When nothing is pinned there, or the maps cannot be read.
    pub fn read(pin_path: &Path) -> anyhow::Result<Status> {
        let names: Vec<(u32, ServiceName)> = snapshot::rows(&mut Maps::open(pin_path)?, MapName::Services)?;
        Ok(Status::new(names.iter().map(|(_, name)| name.as_str()), bpf::map_memory(pin_path)?))
    }

    /// `ports`: "namespace/name:port" of each Service port.
    fn new<'a>(ports: impl Iterator<Item = &'a str>, maps: Vec<MapMemory>) -> Status {
        let map = |map: MapMemory| Map { name: map.name, bytes: map.bytes, capacity: map.capacity };
        let map_bytes = maps.iter().map(|map| map.bytes).sum();
        Status { services: count_services(ports), map_bytes, maps: maps.into_iter().map(map).collect() }
    }

    pub fn render(&self, output: Option<&Output>) -> anyhow::Result<String> {
        let plural = if self.services == 1 { "" } else { "s" };
        let mut text = format!("maps: {:.1} MiB for {} service{plural}\n", self.map_bytes as f64 / MIB, self.services);
        match output {
            Some(Output::Json) => return Ok(serde_json::to_string_pretty(self)? + "\n"),
            Some(Output::Yaml) => return super::yaml(self),
            Some(Output::Wide) => {
                let row = |map: &Map| {
                    vec![map.name.clone(), format!("{:.3}", map.bytes as f64 / MIB), map.capacity.to_string()]
                };
                text.push('\n');
                text += &table::render(&["MAP", "MIB", "CAPACITY"], &self.maps.iter().map(row).collect::<Vec<_>>());
            }
            _ => {}
        }
        Ok(text)
    }
}

/// Of "namespace/name:port", each Service once.
pub fn count_services<'a>(ports: impl Iterator<Item = &'a str>) -> usize {
    let services: HashSet<&str> = ports.map(|port| port.split(':').next().unwrap_or(port)).collect();
    services.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_of_one_service_are_one_service_and_maps_are_summed_up() {
        let map = |name: &str, bytes| MapMemory { name: name.to_owned(), bytes, capacity: 64 };
        let maps = vec![map("backends", 3 << 20), map("slots", 1 << 19)];
        let status = Status::new(["shop/web:http", "shop/web:https", "shop/dns"].into_iter(), maps);
        assert_eq!(status.render(None).unwrap(), "maps: 3.5 MiB for 2 services\n");
        assert_eq!(
            status.render(Some(&Output::Wide)).unwrap(),
            "maps: 3.5 MiB for 2 services\n\n\
             MAP        MIB     CAPACITY\n\
             backends   3.000   64\n\
             slots      0.500   64\n"
        );
        let json: serde_json::Value = serde_json::from_str(&status.render(Some(&Output::Json)).unwrap()).unwrap();
        let yaml: serde_json::Value = serde_norway::from_str(&status.render(Some(&Output::Yaml)).unwrap()).unwrap();
        assert_eq!(json, yaml);
        assert_eq!((&json["services"], &json["mapBytes"]), (&2.into(), &((3 << 20) + (1 << 19)).into()));
    }
}
