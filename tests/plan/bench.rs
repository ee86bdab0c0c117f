//! A core on a model kernel, with short ways to change the world and to look at the rows.

use kubelane::abi::{Frontend, FrontendKey};
use kubelane::model::{Change, Endpoint, Protocol, Service, Slice};
use kubelane::sync::{Core, SyncReport};

use crate::model_kernel::ModelKernel;
use crate::records::{ip, list, new_core, ready, slice};

pub struct Bench {
    pub kernel: ModelKernel,
    pub core: Core,
}

impl Bench {
    /// A core that has listed these and synced them.
    pub fn with(services: &[Service], slices: &[Slice]) -> Self {
        Bench::on(ModelKernel::default(), services, slices)
    }

    pub fn on(kernel: ModelKernel, services: &[Service], slices: &[Slice]) -> Self {
        let mut bench = Bench { kernel, core: new_core() };
        list(&mut bench.core, services.to_vec(), slices.to_vec());
        bench.sync();
        bench
    }

    pub fn sync(&mut self) -> SyncReport {
        self.kernel.calls.clear();
        let now = self.kernel.now;
        self.core.sync(&mut self.kernel, now)
    }

    pub fn slice(&mut self, slice: Slice) -> SyncReport {
        self.core.apply(Change::Slice(Box::new(slice)));
        self.sync()
    }

    pub fn service(&mut self, service: Service) -> SyncReport {
        self.core.apply(Change::Service(Box::new(service)));
        self.sync()
    }

    /// Adopts in a new core and tells it the same world.
    pub fn restart(&mut self, services: &[Service], slices: &[Slice]) -> SyncReport {
        self.core = new_core();
        self.core.adopt(&mut self.kernel).unwrap();
        list(&mut self.core, services.to_vec(), slices.to_vec());
        self.sync()
    }

    /// The calls of the last sync as "map rows".
    pub fn calls(&self) -> Vec<String> {
        self.kernel.calls.iter().map(|(map, rows)| format!("{} {rows}", map.as_str())).collect()
    }

    pub fn row(&self, address: &str, port: u16) -> Option<&Frontend> {
        self.kernel.frontends.get(&FrontendKey::new(ip(address), port, Protocol::Tcp))
    }

    pub fn owner(&self, address: &str, port: u16) -> &str {
        self.row(address, port).map_or("", |row| self.kernel.services[&row.service_id].as_str())
    }

    /// The endpoints behind the inside pool, in slot order.
    pub fn inside(&self, address: &str, port: u16) -> Vec<String> {
        let pool = self.row(address, port).expect("the frontend is there").inside;
        let backends = (pool.base..pool.base + pool.count).map(|slot| self.kernel.backends[&self.kernel.slots[&slot]]);
        backends.map(|b| kubelane::model::Ipx(b.address).to_string()).collect()
    }
}

pub fn hosts(range: std::ops::Range<u16>) -> Vec<Endpoint> {
    range.map(|host| ready(&format!("10.1.{}.{}", host / 250, host % 250 + 1))).collect()
}

pub fn web(range: std::ops::Range<u16>) -> Slice {
    slice("web-1", "web", hosts(range))
}
