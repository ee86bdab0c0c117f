//! How many connections, refusals and drops each Service had, and what its clients and backends sent each other, if the
//! programs count it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use libbpf_rs::{MapCore, MapFlags, MapHandle};

use super::batch::Batches;
use super::pinned;
use super::settings::Counting;
use super::skeleton::KubelaneSkel;
use crate::abi::service_amount::{self, AMOUNT_CONNECTED, AMOUNT_MAX};
use crate::abi::service_count::{self, SERVICE_COUNT_MAX};
use crate::abi::{ServiceName, counter};
use crate::table::HashSet;

const ROWS_AT_ONCE: usize = 1024;

/// The verdicts that are counted of Services, and the [`counter`] of the same name, by [`service_count`] less 1.
const VERDICTS: [u32; SERVICE_COUNT_MAX as usize - 1] = [
    counter::COUNTER_REFUSED_NO_ENDPOINT,
    counter::COUNTER_DROPPED_NO_LOCAL_ENDPOINT,
    counter::COUNTER_DROPPED_SOURCE_RANGE,
    counter::COUNTER_DROPPED_POD_QUOTA,
    counter::COUNTER_DROPPED_SNAT_EXHAUSTED,
    counter::COUNTER_DROPPED_SNAT_SOURCE,
    counter::COUNTER_DROPPED_NO_ROUTE,
    counter::COUNTER_DROPPED_FORWARDING_OFF,
    counter::COUNTER_DROPPED_FLOW_TABLE,
    counter::COUNTER_DROPPED_MARTIAN,
    counter::COUNTER_DROPPED_SCTP_PORT,
];

const _: () = {
    assert!(service_count::SERVICE_CONNECTIONS == 0);
    assert!(service_count::SERVICE_REFUSED_NO_ENDPOINT == 1);
    assert!(service_count::SERVICE_DROPPED_SCTP_PORT as usize == VERDICTS.len());
};

/// By [`service_amount`].
type Amounts = [u64; AMOUNT_MAX as usize];
/// Of the times that connecting took.
const BUCKETS: usize = (AMOUNT_MAX - AMOUNT_CONNECTED) as usize;

/// The maps that the programs count in, which belong to this daemon alone.
pub(super) struct CountMaps {
    counts: MapHandle,
    traffic: Option<TrafficMaps>,
}

struct TrafficMaps {
    amounts: MapHandle,
    births: MapHandle,
    /// Upper limits of the buckets, in nanoseconds.
    limits: [u64; BUCKETS - 1],
}

impl CountMaps {
    /// `None`: the programs do not count.
    pub fn new(skeleton: &KubelaneSkel<'_>, counting: Counting) -> Result<Option<CountMaps>> {
        if counting == Counting::Nothing {
            return Ok(None);
        }
        let counts = MapHandle::try_from(&skeleton.maps.service_counts)?;
        let mut traffic = None;
        if counting == Counting::Traffic {
            let rodata = skeleton.maps.rodata_data.context("the BPF object has no read-only data")?;
            traffic = Some(TrafficMaps {
                amounts: MapHandle::try_from(&skeleton.maps.service_traffic)?,
                births: MapHandle::try_from(&skeleton.maps.service_births)?,
                limits: rodata.connect_limits,
            });
        }
        Ok(Some(CountMaps { counts, traffic }))
    }

    /// A second handle on each, that of births first: what has no birth is not counted any more.
    pub fn handles(&self) -> Result<Vec<MapHandle>> {
        let traffic = self.traffic.iter().flat_map(|maps| [&maps.births, &maps.amounts]);
        let all = traffic.chain([&self.counts]);
        Ok(all.map(MapHandle::try_from).collect::<Result<_, _>>()?)
    }
}

/// Handles on the counts, and on the names of those who have them.
pub struct ServiceCounts {
    maps: CountMaps,
    /// Where names are pinned: the map may be another one tomorrow.
    names: PathBuf,
}

/// What a Service port had since the daemon started.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ServiceCount {
    pub name: ServiceName,
    /// Connections, first datagrams of sockets, and flows.
    pub connections: u64,
    /// By [`ServiceCount::verdicts`].
    refused: [u64; VERDICTS.len()],
    /// `None`: it is not measured.
    pub traffic: Option<Traffic>,
}

impl ServiceCount {
    /// As kubelane_datapath_verdicts_total names them, and how many there were, if any.
    pub fn verdicts(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let all = VERDICTS.iter().zip(self.refused).filter(|(_, count)| *count > 0);
        all.filter_map(|(counter, count)| Some((counter::NAMES.get(*counter as usize)?.0, count)))
    }
}

/// What the clients and backends of a Service port have sent each other.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Traffic {
    amounts: Amounts,
    limits: [u64; BUCKETS - 1],
}

impl Traffic {
    /// Packets of flows: from clients, from backends.
    pub fn packets(&self) -> [u64; 2] {
        [service_amount::AMOUNT_REQUEST_PACKETS, service_amount::AMOUNT_REPLY_PACKETS].map(|index| self.amount(index))
    }

    /// Bytes of these packets, with their IP headers; an aggregate has one header.
    pub fn packet_bytes(&self) -> [u64; 2] {
        [service_amount::AMOUNT_REQUEST_BYTES, service_amount::AMOUNT_REPLY_BYTES].map(|index| self.amount(index))
    }

    /// Bytes of TCP sockets that were translated and have closed: from clients, from backends. Up to two more than were
    /// written, for SYN and FIN.
    pub fn socket_bytes(&self) -> [u64; 2] {
        [service_amount::AMOUNT_SOCKET_SENT, service_amount::AMOUNT_SOCKET_RECEIVED].map(|index| self.amount(index))
    }

    /// Sockets that were closed before they were connected: refused, timed out or given up.
    pub fn connects_failed(&self) -> u64 {
        self.amount(service_amount::AMOUNT_CONNECT_FAILED)
    }

    /// Seconds that connecting took, of all sockets that were connected.
    pub fn connect_seconds(&self) -> f64 {
        self.amount(service_amount::AMOUNT_CONNECT_NS) as f64 / 1e9
    }

    /// Upper limit in seconds, and how many took no longer; the last has all.
    pub fn connects(&self) -> impl Iterator<Item = (f64, u64)> {
        let limits = self.limits.into_iter().map(|limit| limit as f64 / 1e9).chain([f64::INFINITY]);
        let counts = self.amounts.into_iter().skip(AMOUNT_CONNECTED as usize);
        limits.zip(counts.scan(0, |sum, count| {
            *sum += count;
            Some(*sum)
        }))
    }

    fn amount(&self, index: u32) -> u64 {
        self.amounts.get(index as usize).copied().unwrap_or(0)
    }
}

impl ServiceCounts {
    pub(super) fn new(maps: CountMaps, pin_path: &Path) -> ServiceCounts {
        ServiceCounts { maps, names: pinned::maps_directory(pin_path).join("services") }
    }

    /// Whether packets, bytes and times are counted, too.
    pub fn has_traffic(&self) -> bool {
        self.maps.traffic.is_some()
    }

    /// The `most` Service ports with the most connections, refusals and drops, sorted by name. Reads the row of every
    /// Service that had one, or traffic.
    ///
    /// # Errors
    /// When a map cannot be read.
    pub fn busiest(&self, most: usize) -> Result<Vec<ServiceCount>> {
        let counts = each::<{ SERVICE_COUNT_MAX as usize }>(&self.maps.counts)?;
        let mut rows: Vec<_> =
            counts.into_iter().map(|(id, counts)| (counts.iter().sum::<u64>(), id, counts)).collect();
        if let Some(maps) = &self.maps.traffic {
            // Flows may be older than this daemon.
            let known: HashSet<[u8; 4]> = rows.iter().map(|(_, id, _)| *id).collect();
            let others = each::<{ AMOUNT_MAX as usize }>(&maps.amounts)?.into_iter().map(|(id, _)| id);
            rows.extend(others.filter(|id| !known.contains(id)).map(|id| (0, id, [0; SERVICE_COUNT_MAX as usize])));
        }
        rows.sort_unstable_by(|a, b| b.cmp(a));
        rows.truncate(most);
        let names = pinned::open_map_at(&self.names)?;
        let mut named = Vec::with_capacity(rows.len());
        for (_, id, [connections, refused @ ..]) in rows {
            let name = names.lookup(&id, MapFlags::ANY).context("cannot read the names of Services")?;
            // Without a name: the Service went a moment ago.
            if let Some(name) = name.and_then(|name| bytemuck::try_pod_read_unaligned::<ServiceName>(&name).ok()) {
                named.push(ServiceCount { name, connections, refused, traffic: self.traffic(&id)? });
            }
        }
        named.sort_unstable_by_key(|count| count.name.text);
        Ok(named)
    }

    fn traffic(&self, id: &[u8]) -> Result<Option<Traffic>> {
        let Some(TrafficMaps { amounts, limits, .. }) = &self.maps.traffic else { return Ok(None) };
        let row = amounts.lookup_percpu(id, MapFlags::ANY).context("cannot read the traffic of Services")?;
        Ok(Some(Traffic { amounts: sum(&row.unwrap_or_default().concat()), limits: *limits }))
    }
}

/// The rows of a map, summed over the processors.
fn each<const N: usize>(map: &MapHandle) -> Result<Vec<([u8; 4], [u64; N])>> {
    let (mut rows, mut batches) = (Vec::new(), Batches::new(map));
    loop {
        let batch = batches.next(map, ROWS_AT_ONCE).context("cannot read the counts of Services")?;
        rows.extend(batch.rows().filter_map(|(id, values)| Some((id.try_into().ok()?, sum(values)))));
        if batch.ended {
            return Ok(rows);
        }
    }
}

/// Over the processors.
fn sum<const N: usize>(values: &[u8]) -> [u64; N] {
    let mut sums = [0; N];
    for (at, value) in values.as_chunks::<8>().0.iter().enumerate() {
        sums[at % N] += u64::from_ne_bytes(*value);
    }
    sums
}
