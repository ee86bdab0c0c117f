//! Who may have a connection. A newcomer always gets a place: when all are taken, somebody else's is. That keeps a crowd of
//! strangers from blocking the probes, whose failure ends the daemon, and a load balancer's checks.
//!
//! | | |
//! |---|---|
//! | the node itself (the kubelet) | has places that no stranger takes |
//! | each server | keeps a few connections that newcomers of other servers do not take |
//! | of the strangers | the client with the most connections loses one: the one that was not used for the longest time |

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// Connections of strangers, and of the node itself, to all servers together.
const STRANGERS: usize = 512;
const OWN: usize = 64;
/// Connections of a server that newcomers of other servers do not take.
const OF_A_SERVER: usize = 8;

/// All connections. Shared by all servers of the daemon.
#[derive(Debug, Default)]
pub struct Limits {
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    /// Counts connections and uses; the later, the higher.
    clock: u64,
    strangers: usize,
    own: usize,
    open: BTreeMap<u64, Open>,
    /// How many each client has. Those of none are gone.
    clients: HashMap<IpAddr, Arc<AtomicUsize>>,
}

#[derive(Debug)]
struct Open {
    server: Server,
    client: IpAddr,
    of_client: Arc<AtomicUsize>,
    is_own: bool,
    /// When it came, or last asked something.
    used: u64,
    taken: Arc<Notify>,
}

/// A server, and how many connections it has.
#[derive(Clone, Debug, Default)]
pub struct Server(Arc<AtomicUsize>);

/// One connection's place. Dropping it frees the place.
#[derive(Debug)]
pub struct Place {
    limits: Arc<Limits>,
    id: u64,
    taken: Arc<Notify>,
}

impl Limits {
    /// A place for a connection from `peer` to `server`. `is_own`: it comes from the node itself.
    pub fn admit(self: &Arc<Self>, server: &Server, peer: IpAddr, is_own: bool) -> Place {
        let mut table = self.lock();
        table.make_room(server, is_own);
        let id = table.tick();
        let client = client_of(peer);
        let of_client = Arc::clone(table.clients.entry(client).or_default());
        let taken = Arc::new(Notify::new());
        let open = Open { server: server.clone(), client, of_client, is_own, used: id, taken: Arc::clone(&taken) };
        table.insert(id, open);
        Place { limits: Arc::clone(self), id, taken }
    }

    #[cfg(test)]
    pub fn count(&self) -> usize {
        self.lock().open.len()
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    fn insert(&mut self, id: u64, open: Open) {
        open.server.0.fetch_add(1, Relaxed);
        open.of_client.fetch_add(1, Relaxed);
        *self.of_sort(open.is_own) += 1;
        self.open.insert(id, open);
    }

    fn remove(&mut self, id: u64) -> Option<Open> {
        let open = self.open.remove(&id)?;
        open.server.0.fetch_sub(1, Relaxed);
        *self.of_sort(open.is_own) -= 1;
        if open.of_client.fetch_sub(1, Relaxed) == 1 {
            self.clients.remove(&open.client);
        }
        Some(open)
    }

    fn of_sort(&mut self, is_own: bool) -> &mut usize {
        if is_own { &mut self.own } else { &mut self.strangers }
    }

    fn make_room(&mut self, server: &Server, is_own: bool) {
        let limit = if is_own { OWN } else { STRANGERS };
        if *self.of_sort(is_own) < limit {
            return;
        }
        if let Some(open) = self.loser(server, is_own).and_then(|id| self.remove(id)) {
            open.taken.notify_one();
        }
    }

    /// The connection that gives way to a newcomer at `server`.
    fn loser(&self, server: &Server, is_own: bool) -> Option<u64> {
        let is_kept =
            |open: &Open| !Arc::ptr_eq(&open.server.0, &server.0) && open.server.0.load(Relaxed) <= OF_A_SERVER;
        let rank = |open: &Open| (!is_kept(open), open.of_client.load(Relaxed), std::cmp::Reverse(open.used));
        let peers = self.open.iter().filter(|(_, open)| open.is_own == is_own);
        peers.max_by_key(|(_, open)| rank(open)).map(|(id, _)| *id)
    }
}

impl Place {
    /// A request came.
    pub fn is_used(&self) {
        let mut table = self.limits.lock();
        let now = table.tick();
        if let Some(open) = table.open.get_mut(&self.id) {
            open.used = now;
        }
    }

    /// Resolves when a newcomer has the place.
    pub async fn taken(&self) {
        self.taken.notified().await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.limits.lock().remove(self.id);
    }
}

/// Who counts as one client: an IPv4 address, or the /64 that an IPv6 host chooses its addresses from.
fn client_of(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64).into(),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn client(n: u32) -> IpAddr {
        Ipv4Addr::from(0x0a00_0000 + n).into()
    }

    fn has(limits: &Limits, place: &Place) -> bool {
        limits.lock().open.contains_key(&place.id)
    }

    #[test]
    fn the_client_with_the_most_connections_gives_up_the_one_that_it_used_least() {
        let limits = Arc::new(Limits::default());
        let server = Server::default();
        let few: Vec<Place> = (0..100).map(|n| limits.admit(&server, client(n), false)).collect();
        let many: Vec<Place> = (0..STRANGERS - 100).map(|_| limits.admit(&server, client(500), false)).collect();
        many[0].is_used();
        let newcomer = limits.admit(&server, client(600), false);
        assert!(has(&limits, &newcomer) && few.iter().all(|place| has(&limits, place)));
        assert!(has(&limits, &many[0]) && !has(&limits, &many[1]) && has(&limits, &many[2]));
        drop((few, many, newcomer));
        assert_eq!(limits.count(), 0);
    }

    #[test]
    fn the_node_has_places_of_its_own_and_strangers_are_bounded() {
        let limits = Arc::new(Limits::default());
        let server = Server::default();
        let own: Vec<Place> = (0..OWN).map(|_| limits.admit(&server, client(1), true)).collect();
        let strangers: Vec<Place> = (0..2000).map(|n| limits.admit(&server, client(2 + n), false)).collect();
        assert!(own.iter().all(|place| has(&limits, place)));
        assert_eq!(limits.count(), OWN + STRANGERS);
        drop((own, strangers));
    }

    #[test]
    fn a_server_keeps_some_connections_whatever_goes_on_at_others() {
        let limits = Arc::new(Limits::default());
        let (metrics, health) = (Server::default(), Server::default());
        let scrapes: Vec<Place> = (0..OF_A_SERVER).map(|_| limits.admit(&metrics, client(1), false)).collect();
        let crowd: Vec<Place> = (0..5000).map(|n| limits.admit(&health, client(10 + n), false)).collect();
        assert!(scrapes.iter().all(|place| has(&limits, place)));
        // A crowd of servers has the same places as one of clients.
        let servers: Vec<Place> = (0..5000).map(|n| limits.admit(&Server::default(), client(n), false)).collect();
        assert_eq!(limits.count(), STRANGERS);
        assert!(has(&limits, servers.last().unwrap()));
        drop((scrapes, crowd));
        drop(servers);
        assert!(limits.count() == 0 && limits.lock().clients.is_empty());
    }

    #[test]
    fn hosts_with_many_addresses_are_one_client() {
        let client = |text: &str| client_of(text.parse().unwrap()).to_string();
        assert_eq!(client("::ffff:10.0.0.1"), "10.0.0.1");
        assert_eq!(client("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::");
    }
}
