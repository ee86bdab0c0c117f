/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What the kernel and the daemon share: the rows of every map, and the numbers in them. src/abi.rs holds the same
 * structs; both sides assert their sizes, a test compares every offset with this object's BTF, and the enums are
 * read from this very file by build.rs. The pin directory carries ABI_VERSION: raise it when a row changes.
 *
 * Addresses are 16 bytes in network order, IPv4 as ::ffff:a.b.c.d, so that one set of maps serves both families.
 * No struct has padding: every byte of a key is hashed.
 */
#ifndef KUBELANE_ABI_H
#define KUBELANE_ABI_H

#include <linux/types.h>

enum abi_version {
	ABI_VERSION = 3, /* the pin directory's "v3" */
};

struct address {
	__u8 bytes[16];
};

/* Why a frontend exists; more than one bit only where one address plays several roles. */
enum frontend_flag {
	FRONTEND_CLUSTER_IP = 1,
	FRONTEND_EXTERNAL_IP = 2,
	FRONTEND_LOAD_BALANCER = 4,
	FRONTEND_NODE_PORT = 8,
	/* Packets from the wire must come from one of the service's source_ranges. */
	FRONTEND_SOURCE_RANGES = 16,
};

/* Which of a service port's two endpoint sets a pool is, and which sets a backend belongs to (a bit each). */
enum pool_member {
	POOL_CLUSTER = 1,
	POOL_LOCAL = 2,
};

/* What a client of an empty pool gets. */
enum pool_empty {
	EMPTY_REFUSE = 0,
	EMPTY_DROP = 1,
};

enum backend_state {
	BACKEND_GONE = 0,
	BACKEND_ACTIVE = 1,
	BACKEND_TERMINATING = 2,
};

enum backend_flag {
	BACKEND_NODE_LOCAL = 1,
};

enum address_flag {
	/* A cluster IP: a port of it that no Service has is refused. */
	ADDRESS_CLUSTER_IP = 1,
	/* An external or load balancer IP. */
	ADDRESS_SERVICE_VIP = 2,
	/* An address of this node that serves NodePorts. */
	ADDRESS_NODE = 4,
	/* An address of an outward device of this node: what goes to a backend elsewhere may leave with it as its
	 * source, and what comes back to it is looked at. */
	ADDRESS_LOCAL = 8,
};

/* Index into the per-CPU array `counters`. */
enum counter {
	COUNTER_CONNECT_TRANSLATED = 0, /* connect() sent to a backend */
	COUNTER_DATAGRAM_TRANSLATED = 1, /* unconnected datagram sent to a backend */
	COUNTER_REPLY_TRANSLATED = 2, /* datagram whose source was shown as the service */
	COUNTER_PEER_TRANSLATED = 3, /* getpeername() answered with the service */
	COUNTER_REFUSED_NO_ENDPOINT = 4, /* refused: no usable endpoint anywhere */
	COUNTER_REFUSED_UNKNOWN_PORT = 5, /* refused: a cluster IP's port that no Service has */
	COUNTER_DROPPED_NO_LOCAL_ENDPOINT = 6, /* dropped: traffic policy Local and no local endpoint */
	COUNTER_FAILED_BACKEND_MISSING = 7, /* let through: a slot led to no backend (never expected) */
	COUNTER_FAILED_STORAGE = 8, /* translated, but the kernel had no memory for the socket's record */
	COUNTER_FLOW_LOCAL = 9, /* new flow from the wire to a backend on this node */
	COUNTER_FLOW_REMOTE = 10, /* new flow from the wire to a backend elsewhere */
	COUNTER_FLOW_MIDSTREAM = 11, /* of the new flows: TCP ones that began with a packet other than a SYN */
	COUNTER_FLOW_ESTABLISHED = 12, /* flow proved by both ends, moved to the lasting table */
	COUNTER_FLOW_TABLE_FULL = 13, /* such a flow stayed among the unproved: the lasting table is full */
	COUNTER_SNAT_RETRY = 14, /* a source port was taken and another one tried */
	COUNTER_SNAT_RECLAIMED = 15, /* a source port was taken from an unproved or closed flow, none being free */
	COUNTER_ICMP_TRANSLATED = 16, /* ICMP error about a flow passed on to the other side */
	COUNTER_ICMP_TOO_BIG = 17, /* answered with "fragmentation needed" or "packet too big" */
	COUNTER_ICMP_TTL_EXCEEDED = 18, /* answered with "time exceeded" */
	COUNTER_DROPPED_SOURCE_RANGE = 19, /* dropped: the client is outside loadBalancerSourceRanges */
	COUNTER_DROPPED_SNAT_EXHAUSTED = 20, /* dropped: no free source port towards the backend */
	COUNTER_DROPPED_SNAT_SOURCE = 21, /* dropped: the route's source is no address of an outward device */
	COUNTER_DROPPED_NO_ROUTE = 22, /* dropped: no route to the backend or back to the client */
	COUNTER_DROPPED_FORWARDING_OFF = 23, /* dropped: the sysctl `forwarding` is off for the device it came in by */
	COUNTER_DROPPED_FRAGMENT = 24, /* dropped: a fragment that came before its datagram's first one */
	COUNTER_DROPPED_UNKNOWN_RESET = 25, /* dropped: a TCP reset of an unknown flow */
	COUNTER_DROPPED_FLOW_TABLE = 26, /* dropped: the kernel had no memory for a new flow */
	COUNTER_DROPPED_REWRITE = 27, /* dropped: the kernel refused to change the packet */
	COUNTER_DROPPED_ANSWER_LIMIT = 28, /* dropped: an ICMP answer was due, but there were too many already */
	COUNTER_DROPPED_SCTP_PORT = 29, /* dropped: SCTP to a backend with another port, which its checksum rules out */
	COUNTER_NEIGHBOUR_UNKNOWN = 30, /* sent on, but nobody has told the next hop's link address yet */
	COUNTER_REFUSED_LOOPBACK_SOURCE = 31, /* refused: loopback NodePort, from a socket that loopback holds fast */
	COUNTER_MAX = 32,
};

/* frontends: what is asked for. A NodePort has the wildcard address of its family: :: or ::ffff:0.0.0.0. */
struct frontend_key {
	struct address address;
	__be16 port;
	__u8 protocol; /* IPPROTO_TCP, _UDP, _SCTP; UDP-Lite is looked up as UDP, MPTCP as TCP */
	__u8 zero;
};

/* A dense region of `slots`: backend ids at slots[base] .. slots[base + count - 1]. */
struct pool {
	__u32 base;
	__u32 count;
	__u8 member; /* enum pool_member */
	__u8 on_empty; /* enum pool_empty */
	__u16 zero;
};

struct frontend {
	__u32 service_id;
	__u32 flags; /* enum frontend_flag */
	__u32 affinity_seconds; /* 0: no session affinity */
	struct pool inside; /* for clients on this node */
	struct pool outside; /* for packets from the wire */
};

/* backends[id]. The generation counts the tenants of an id: a record with another generation is of a former one. */
struct backend {
	struct address address;
	__be16 port;
	__u8 state; /* enum backend_state */
	__u8 pools; /* enum pool_member bits: where new connections may find it */
	__u32 generation;
	__u32 service_id;
	__u8 protocol;
	__u8 flags; /* enum backend_flag */
	__u16 zero;
};

/* services[service id]: the name of a service port, "namespace/name:port" or "namespace/name", NUL padded. */
struct service_name {
	char text[192];
};

/* Who is remembered by session affinity. */
enum client_kind {
	CLIENT_NETWORK_NAMESPACE = 0, /* by IPv4; identity: the namespace's cookie, 8 bytes in host order, then zeros */
	CLIENT_ADDRESS = 1, /* identity: the client's address */
	CLIENT_NETWORK_NAMESPACE_IP6 = 2, /* as the first, by IPv6: each family has backends of its own */
};

struct affinity_key {
	__u8 client[16];
	__u32 service_id;
	__u32 kind; /* enum client_kind */
};

struct affinity {
	__u32 backend_id;
	__u32 generation;
	__u64 used_ns; /* bpf_ktime_get_ns() of the last connection */
};

/* source_ranges (a trie): which clients a service port's load balancer addresses serve. 128 bits of address, so that
 * an IPv4 range of length n has prefix_length 32 + 96 + n. */
struct source_range_key {
	__u32 prefix_length; /* 32, for the service id, plus the range's own, in bits */
	__u32 service_id;
	struct address address;
};

/* devices[interface index]: what the kernel does not tell when asked for a route. */
struct device {
	struct address ip4; /* before 6.7 (BPF_FIB_LOOKUP_SRC): its first address of each family; all zeros: none */
	struct address ip6;
	__u32 is_bare; /* its packets begin with the IP header */
};

/* Bytes by which packets and sockets that are not ours are told at the cost of array look-ups: 0, nothing of ours is there. They are
 * set before the rows that they stand for, and never cleared: one that is set for nothing only costs a look-up. */
enum wire_filter_size {
	WIRE_FILTER_SIZE = 65536,
};

enum socket_filter {
	SOCKET_FILTER_SERVICE = 1, /* some port of this address is a Service's, or is refused */
	SOCKET_FILTER_NODE = 2, /* those of the node's ports that are in `ports`: NodePorts */
};

struct wire_filter {
	__u8 addresses[WIRE_FILTER_SIZE]; /* by address_index() of node, service and outward devices' addresses */
	__u8 ports[WIRE_FILTER_SIZE]; /* by port of what is served to the wire, host order */
	__u8 sockets[WIRE_FILTER_SIZE]; /* by address_index() of what sockets ask for, enum socket_filter */
};

struct ends {
	struct address source;
	struct address destination;
	__be16 source_port;
	__be16 destination_port;
};

/* A packet as it is on the wire. */
struct flow_key {
	struct ends ends;
	__u8 protocol;
	__u8 zero[3];
};

enum flow_kind {
	FLOW_REPLY = 1, /* from the backend to the client; else from the client to the backend */
	FLOW_AT_EGRESS = 2, /* met when they leave (a local backend's replies), else when they come in */
	FLOW_FORWARDED = 4, /* the backend is elsewhere: routed here, never shown to the host's stack */
};

/* Index into the array `epochs`: what the daemon counts up when records of the datapath may be out of date. */
enum epoch {
	EPOCH_ROUTES = 0, /* a route, rule, device or address changed */
	EPOCH_HANDS = 1, /* a UDP or SCTP frontend became another Service's */
	EPOCH_MAX = 2,
};

/* What a route look-up answered. It is asked again when EPOCH_ROUTES has moved on, when the row's used_ns is written
 * (once a second), and for packets that the look-up was not made for: larger, marked, or from another device. */
struct hop {
	__u32 interface; /* where to; 0: not known */
	__u32 from; /* interface that the packet came in by */
	__u32 epoch; /* EPOCH_ROUTES at the time */
	__u16 mtu; /* at least: packets up to this size fit */
	__u16 family; /* of `next`, AF_INET or AF_INET6 */
	__be32 next[4]; /* the neighbour's address */
};

/*
 * One direction of a flow: flow_key -> what its packets become. The other direction's key is the new ends reversed, so
 * that each row leads to its partner. Both rows carry the same closing marks, bytes and not bits: each is only ever
 * set, from several processors at once.
 */
struct flow {
	struct ends ends;
	__u8 kind; /* enum flow_kind */
	__u8 replied; /* the backend has answered */
	__u8 client_closed; /* the client's FIN was seen */
	__u8 backend_closed; /* the backend's FIN was seen */
	__u8 backend_first; /* the backend's FIN was the first: the backend keeps the connection in TIME_WAIT */
	__u8 reset; /* an RST was seen, and nothing after it */
	__u16 zero;
	__u32 backend_id;
	__u32 generation;
	__u32 service_id;
	__u32 interface; /* where the client's packets come in */
	/* TCP, until proved: the sequence number of the backend's last packet, host order. Else, of requests:
	 * EPOCH_HANDS when the frontend was last seen to be this flow's Service's. */
	__u32 stamp;
	__u64 used_ns; /* bpf_ktime_get_ns() of the last packet, to within FLOW_TOUCH_NS */
	struct hop hop; /* FLOW_FORWARDED: where the last packet went */
};

/* How long rows last, in seconds of silence in both directions. */
enum flow_timeout {
	FLOW_TCP_OPENING = 60, /* handshake not completed */
	FLOW_TCP_ESTABLISHED = 86400,
	FLOW_TCP_HALF_CLOSED = 120, /* one FIN */
	FLOW_TCP_CLOSED = 10, /* both FINs, the client's first */
	FLOW_TCP_TIME_WAIT = 60, /* both FINs, the backend's first: as long as Linux keeps TIME_WAIT */
	FLOW_TCP_RESET = 10,
	FLOW_TCP_PORT_REST = 2, /* before a closed flow's source port serves another client */
	FLOW_UDP_UNREPLIED = 30,
	FLOW_UDP_REPLIED = 120,
};

/* Where a translated socket or datagram was meant to go, and where it went. */
struct origin {
	struct address service_address;
	struct address backend_address;
	__be16 service_port;
	__be16 backend_port;
	__u32 backend_id;
	__u32 generation;
	__u32 service_id;
	__u32 protocol;
};

/* A connected socket whose backend is gone, as the iterator `find_stale_sockets` prints it. */
struct stale_socket {
	struct address source_address;
	struct address backend_address;
	__be16 source_port;
	__be16 backend_port;
	__u16 family; /* AF_INET or AF_INET6: of the socket, not of the address */
	__u16 protocol;
	__u32 netns_inum; /* as stat() of /proc/PID/ns/net shows it */
	__u32 interface; /* sk_bound_dev_if */
};

_Static_assert(sizeof(struct frontend_key) == 20, "frontend_key");
_Static_assert(sizeof(struct pool) == 12, "pool");
_Static_assert(sizeof(struct frontend) == 36, "frontend");
_Static_assert(sizeof(struct backend) == 32, "backend");
_Static_assert(sizeof(struct service_name) == 192, "service_name");
_Static_assert(sizeof(struct affinity_key) == 24, "affinity_key");
_Static_assert(sizeof(struct affinity) == 16, "affinity");
_Static_assert(sizeof(struct source_range_key) == 24, "source_range_key");
_Static_assert(sizeof(struct device) == 36, "device");
_Static_assert(sizeof(struct flow_key) == 40, "flow_key");
_Static_assert(sizeof(struct hop) == 32, "hop");
_Static_assert(sizeof(struct flow) == 104, "flow");
_Static_assert(sizeof(struct origin) == 52, "origin");
_Static_assert(sizeof(struct stale_socket) == 48, "stale_socket");

#endif
