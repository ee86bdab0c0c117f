//! `get devices`: where packets from outside are met.

use std::net::IpAddr;
use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use super::printer::Heads;
use super::record::{Record, written};
use crate::abi::{DeviceAddresses, rp_filter};
use crate::bpf::PinnedMap;
use crate::cli::snapshot::PortName;
use crate::model::Ipx;

pub const HEADS: Heads = Heads { all: &["DEVICE", "INDEX", "IPV4", "IPV6", "LINK-HEADER", "RP-FILTER"], narrow: 4 };

/// A device with the programs.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DeviceRecord {
    /// `None`: this network namespace has no such device.
    pub device: Option<String>,
    pub index: u32,
    /// Its first address of each family.
    pub ipv4: Option<IpAddr>,
    pub ipv6: Option<IpAddr>,
    /// Its packets begin with one.
    pub has_link_header: bool,
    /// off, strict or loose.
    pub rp_filter: &'static str,
}

impl Record for DeviceRecord {
    fn cells(&self) -> Vec<String> {
        let ip = |ip: Option<IpAddr>| ip.map_or_else(|| "-".to_owned(), |ip| ip.to_string());
        vec![
            self.device.clone().unwrap_or_else(|| "-".to_owned()),
            self.index.to_string(),
            ip(self.ipv4),
            ip(self.ipv6),
            if self.has_link_header { "yes" } else { "no" }.to_owned(),
            self.rp_filter.to_owned(),
        ]
    }

    fn name(&self) -> String {
        format!("device/{}", self.device.clone().unwrap_or_else(|| self.index.to_string()))
    }

    fn service(&self) -> Option<&PortName> {
        None
    }

    fn addresses(&self) -> Vec<IpAddr> {
        self.ipv4.into_iter().chain(self.ipv6).collect()
    }

    fn state(&self) -> String {
        String::new()
    }

    written!();
}

/// By interface index.
///
/// # Errors
/// When nothing is pinned there, or the map cannot be read.
pub fn devices(pin_path: &Path) -> Result<Vec<DeviceRecord>> {
    let mut found = Vec::new();
    PinnedMap::open(pin_path, "devices")?.each(|index: u32, row: DeviceAddresses| {
        let name = nix::net::if_::if_indextoname(index).ok();
        let ip = |address: [u8; 16]| (address != [0; 16]).then(|| Ipx(address).to_ip());
        found.push(DeviceRecord {
            device: name.map(|name| name.to_string_lossy().into_owned()),
            index,
            ipv4: ip(row.ip4),
            ipv6: ip(row.ip6),
            has_link_header: row.is_bare == 0,
            rp_filter: match row.rp_filter {
                rp_filter::RP_FILTER_STRICT => "strict",
                rp_filter::RP_FILTER_LOOSE => "loose",
                _ => "off",
            },
        });
        Ok(())
    })?;
    found.sort_by_key(|device| device.index);
    Ok(found)
}
