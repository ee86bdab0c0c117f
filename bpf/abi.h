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
	/* Clients must have an address in one of the service's source_ranges. */
	FRONTEND_SOURCE_RANGES = 16,
	/* Backends see this node as their client, and not who asks. */
	FRONTEND_SOURCE_NODE = 32,
	/* With FRONTEND_SOURCE_RANGES: one of them holds the node's own address, whose processes are served. */
	FRONTEND_NODE_ADMITTED = 64,
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
	COUNTER_FLOW_ESTABLISHED = 12, /* flow proved by both ends */
	COUNTER_FLOW_TABLE_FULL = 13, /* such a flow stayed unproved: its protocol's share is full */
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
	COUNTER_FLOW_PUSHED_OUT = 31, /* an unproved flow was removed, because more came than have room */
	COUNTER_DROPPED_FLOW_CHANGING = 32, /* dropped: another processor was just removing or replacing its flow */
	COUNTER_DROPPED_MARTIAN = 33, /* dropped: a source that cannot be, or fails rp_filter */
	COUNTER_DROPPED_OPTIONS = 34, /* dropped: an IPv4 source route, or broken options */
	COUNTER_HANDED_TO_STACK = 35, /* to or from a backend elsewhere, through the host's stack */
	COUNTER_REFUSED_LOOPBACK_SOURCE = 36, /* refused: loopback NodePort, from a socket that loopback holds fast */
	COUNTER_FLOW_POD = 37, /* new flow of a pod's packets */
	COUNTER_DROPPED_POD_QUOTA = 38, /* dropped: the pod begins more flows that nobody answers than it may */
	COUNTER_PROBE_ANSWERED = 39, /* a load balancer's health probe answered by the packet programs */
	COUNTER_MAX = 40,
};

/* What is counted of each Service, if somebody wants to know: indices into struct service_counts. But for the first, as
 * the counters of these names count, where a Service was found. */
enum service_count {
	SERVICE_CONNECTIONS = 0,
	SERVICE_REFUSED_NO_ENDPOINT = 1,
	SERVICE_DROPPED_NO_LOCAL_ENDPOINT = 2,
	SERVICE_DROPPED_SOURCE_RANGE = 3,
	SERVICE_DROPPED_POD_QUOTA = 4,
	SERVICE_DROPPED_SNAT_EXHAUSTED = 5,
	SERVICE_DROPPED_SNAT_SOURCE = 6,
	SERVICE_DROPPED_NO_ROUTE = 7,
	SERVICE_DROPPED_FORWARDING_OFF = 8,
	SERVICE_DROPPED_FLOW_TABLE = 9,
	SERVICE_DROPPED_MARTIAN = 10,
	SERVICE_DROPPED_SCTP_PORT = 11,
	SERVICE_COUNT_MAX = 12,
};

/* What is measured of each Service's traffic, if somebody wants to know: indices into struct service_traffic. */
enum service_amount {
	AMOUNT_REQUEST_PACKETS = 0, /* packets of flows, from clients to backends */
	AMOUNT_REQUEST_BYTES = 1, /* of these, with their IP headers */
	AMOUNT_REPLY_PACKETS = 2, /* the same from backends to clients */
	AMOUNT_REPLY_BYTES = 3, /* of these */
	AMOUNT_SOCKET_SENT = 4, /* bytes of translated TCP sockets that have closed, which the backends acknowledged */
	AMOUNT_SOCKET_RECEIVED = 5, /* and which they received */
	AMOUNT_CONNECT_FAILED = 6, /* translated TCP sockets that closed before they were connected */
	AMOUNT_CONNECT_NS = 7, /* how long all took that were connected */
	AMOUNT_CONNECTED = 8, /* and how many took up to each of connect_limits; the last: longer */
	AMOUNT_MAX = 19,
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
	struct pool inside; /* for clients on this node: sockets, and packets of pods */
	struct pool outside; /* for packets from the wire */
};

/* backends[id]. The generation counts the assignments of an id: a record with another generation is of a former one. */
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
	__u32 rp_filter; /* enum rp_filter, as its sysctl and that of `all` say together */
};

/* pod_devices[interface index]: the node's end of a pod's or virtual machine's device. */
struct pod_device {
	struct address ip4; /* an address of the node, for FRONTEND_SOURCE_NODE; all zeros: none */
	struct address ip6;
	__u8 gateway[6]; /* the link address at which pods reach this node: the device's own, or that of its bridge */
	__u16 zero;
	__u32 second; /* of `openings` */
	__s32 openings; /* flows that began in that second, less those that were answered in it */
};

/* What a pod may begin in a second, see service.h. */
enum pod_quota {
	POD_OPENINGS = 8192, /* flows that nobody has answered */
	POD_REFUSAL = 32, /* an ICMP error counts as so many of them */
};

/* Is a source looked for in the routing table (RFC 3704)? */
enum rp_filter {
	RP_FILTER_OFF = 0,
	RP_FILTER_STRICT = 1, /* it must lead back to the same device */
	RP_FILTER_LOOSE = 2, /* there must be a route */
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

/* What ports have been used for, a byte each, set by the programs: bytes can be set without a lock, and one that is set
 * for nothing only costs a look-up. */
enum reply_filter_size {
	REPLY_FILTER_SIZE = 262144,
};

struct port_table {
	__u8 forwarded[65536]; /* by destination port of what comes in: replies of backends elsewhere */
	/* By reply_index() of what leaves: a local backend's answers to a client. Both are set, one is read, and the
	 * daemon renews the other: clears it, sets what the flows need that there are, and lets it be read. */
	__u8 replies[2][REPLY_FILTER_SIZE];
	__u32 replies_read; /* bit 0: which of them; the others count renewals that have begun */
};

struct ends {
	struct address source;
	struct address destination;
	__be16 source_port;
	__be16 destination_port;
};

/* A packet as it is on the wire, and the key of an IPv6 row of the flow table. */
struct flow_key {
	struct ends ends;
	__u8 protocol;
	__u8 zero[3];
};

/* The key of an IPv4 row: the same in 16 bytes, which are hashed and compared in a fraction of the time. */
struct flow_key4 {
	__be32 source;
	__be32 destination;
	__be16 source_port;
	__be16 destination_port;
	__u8 protocol;
	__u8 zero[3];
};

/* The lower bits of flow.state. Each is changed only under the flow's lock. */
enum flow_flag {
	FLOW_REPLY = 1, /* packets from the backend to the client; else from the client to the backend */
	FLOW_PATH = 6, /* both bits of enum flow_path */
	FLOW_PROVED = 8, /* of requests: both ends have proved to be there; of replies: the backend has answered */
	FLOW_FIN = 16, /* this side has closed (TCP) */
	FLOW_FIN_FIRST = 32, /* of replies: before the client did, so that the backend keeps TIME_WAIT */
	FLOW_RESET = 64, /* this side has reset the connection, and sent nothing since */
	FLOW_AFFINE = 128, /* of requests: the Service remembers its clients */
	FLOW_ENDING = 256, /* whoever set this deletes both rows; nobody else uses or changes them any more */
	FLOW_SHADOWED = 512, /* of replies: the client has a connection to the backend itself from this port (TCP) */
	FLOW_FLAGS = 1023, /* all of them */
};

/* How a flow's packets go on. Those of the first way are met when requests come in and when replies leave, all others when
 * they come in. */
enum flow_path {
	PATH_STACK = 0, /* the host's stack sends them on */
	PATH_ROUTED = 2, /* sent on from here: the stack does not see them */
	PATH_HAIRPIN = 4, /* sent back by the pod's device that they came in by: a pod is its own backend */
	PATH_HALVES = 6, /* the stack sends them on, between the halves of their translation; see stack.h */
};

enum flow_state {
	FLOW_SECOND_SHIFT = 10, /* above the flags: the second of CLOCK_MONOTONIC in which the last packet passed */
	FLOW_SECOND_MASK = 0x3fffff, /* 48 days; silence is never longer */
};

/* Index into the array `epochs`: what the daemon counts up when records of the datapath may be out of date. */
enum epoch {
	EPOCH_ROUTES = 0, /* a route, rule, device or address changed */
	EPOCH_OWNERS = 1, /* a UDP or SCTP frontend became another Service's */
	EPOCH_ROUTES_BY_ADDRESS = 2, /* no epoch: 1 while routes are chosen by addresses, never by ports */
	/* No epoch: packets that are routed here and have as many bytes go through the host's stack. 1: all; else those of
	 * IPv4 that may be larger than a route allows, which bpf_fib_lookup() does not tell; 0: none. */
	EPOCH_THROUGH_STACK = 3,
	EPOCH_MAX = 4,
};

/*
 * One direction of a flow: its key -> what its packets become. The other direction's key is these ends reversed, so
 * that each row leads to its partner. A fact stands in one row: what the client has done in that of the requests, what
 * the backend has done in that of the replies.
 */
struct flow {
	struct ends ends;
	/* The checksum's change from the key's ends to these. Who copies the ends compares it: the kernel may give a
	 * deleted row's memory to another flow while a program reads it. */
	__u32 change;
	__u32 state; /* enum flow_flag, enum flow_state */
	/* TCP: the highest sequence number that this side was seen to send, host order. Else, of requests: EPOCH_OWNERS
	 * when the frontend was last seen to be this flow's Service's. */
	__u32 sequence;
	/* Of requests: the backend's id. Of replies: the first sequence number that the backend used (TCP), or the
	 * second in which the flow began. */
	__u32 backend_or_first;
	/* Of requests: the backend's generation. Of replies: interface where the client's packets come in; 0: replies
	 * are sent by the route to the client. */
	__u32 generation_or_interface;
};

/* How long rows last, in seconds of silence in both directions: flow_limits[enum flow_limits_of]. */
struct flow_limits {
	__u32 tcp_opening; /* handshake not completed */
	__u32 tcp_established;
	__u32 tcp_half_closed; /* one FIN */
	__u32 tcp_closed; /* both FINs, the client's first */
	__u32 tcp_time_wait; /* both FINs, the backend's first: as long as Linux keeps TIME_WAIT */
	__u32 tcp_reset;
	__u32 udp; /* UDP and SCTP, not proved */
	__u32 udp_stream;
};

enum flow_limits_of {
	FLOW_LIMITS_SET = 0, /* as the daemon was told */
	FLOW_LIMITS_NOW = 1, /* the same, less while the table is full: what is collected */
	FLOW_LIMITS_MAX = 2,
};

/* Before a closed flow's source port serves another client, in seconds. */
enum flow_rest {
	FLOW_TCP_PORT_REST = 2,
	FLOW_TCP_TIME_WAIT_REST = 60, /* the backend closed first: as long as Linux keeps TIME_WAIT */
};

/* What the program flow_collect is given. */
enum flow_collect_input {
	COLLECT_HEAD = 16, /* bytes; the kernel takes the first 14 for a link header */
	COLLECT_KEYS = 64,
};

/* Who has a share of the table: flow_counts[...] of them are proved. */
enum flow_class {
	FLOW_CLASS_TCP = 0,
	FLOW_CLASS_OTHER = 1,
	FLOW_CLASS_MAX = 2,
};

/* Flows that are not proved yet, on each processor: one more pushes out the oldest. */
enum flow_openings {
	FLOW_OPENINGS = 8192,
};

struct opening {
	struct flow_key key; /* protocol 0: none yet */
	__u32 mark; /* flow_opening_mark() of the flow: a later one with the same ends is not meant */
};

/* Which answer of a port that load balancers probe. */
enum probe_path {
	PROBE_ANY = 0, /* every path; of a port with several answers, every other path */
	PROBE_HEALTHZ = 1,
	PROBE_LIVEZ = 2,
	PROBE_READYZ = 3,
	PROBE_METHOD = 4, /* of a port with several answers: neither GET nor HEAD */
};

enum probe_limit {
	PROBE_BYTES = 512, /* of a row; a power of two */
	/* The longest answer: with its headers less than the 576 bytes that every IPv4 host takes, and with its FIN less
	 * than a step of the cookies (probe.h). */
	PROBE_LONGEST = 508,
	/* Rows are used for as long after the daemon has vouched for them. */
	PROBE_FRESH_MS = 4800,
};

/* probes: what is answered at an address (the wildcard of its family: at all of the node's) and port. */
struct probe_key {
	struct address address;
	__be16 port;
	__u16 path; /* enum probe_path */
};

struct probe {
	/* As in the key. Who has sent the bytes compares them: the kernel may give a replaced row's memory to another key
	 * while a program reads it. */
	__be16 port;
	__u16 path;
	/* Checksums of the whole answer and of its head. They do not fit if the bytes changed meanwhile, so that the client
	 * takes no answer that is half of one. */
	__u32 sum;
	__u32 head_sum;
	__u16 length;
	__u16 head_length;
	__u32 has_paths; /* of PROBE_ANY: the other paths have rows of their own */
	__u8 bytes[PROBE_BYTES]; /* an HTTP response */
};

/* probe_state[0] */
struct probe_state {
	__u64 alive_ns; /* when the daemon last vouched for the rows, by bpf_ktime_get_ns() */
	__u64 secret[2]; /* of the cookies: chosen once, so that a restart of the daemon breaks no connection */
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

/* A connected socket that does not go where its Service is, as the iterators of stale.h print it. */
struct stale_socket {
	struct address source_address;
	struct address backend_address;
	__be16 source_port;
	__be16 backend_port;
	__u16 family; /* AF_INET or AF_INET6: of the socket, not of the address */
	__u16 protocol;
	__u32 netns_inum; /* as stat() of /proc/PID/ns/net shows it */
	__u32 interface; /* sk_bound_dev_if */
	struct address service_address; /* what was asked for; as the backend's: the socket was never translated */
	__be16 service_port;
	__be16 unused;
};

_Static_assert(sizeof(struct frontend_key) == 20, "frontend_key");
_Static_assert(sizeof(struct pool) == 12, "pool");
_Static_assert(sizeof(struct frontend) == 36, "frontend");
_Static_assert(sizeof(struct backend) == 32, "backend");
_Static_assert(sizeof(struct service_name) == 192, "service_name");
_Static_assert(sizeof(struct affinity_key) == 24, "affinity_key");
_Static_assert(sizeof(struct affinity) == 16, "affinity");
_Static_assert(sizeof(struct source_range_key) == 24, "source_range_key");
_Static_assert(sizeof(struct device) == 40, "device");
_Static_assert(sizeof(struct pod_device) == 48, "pod_device");
_Static_assert(sizeof(struct flow_key) == 40, "flow_key");
_Static_assert(sizeof(struct flow_key4) == 16, "flow_key4");
_Static_assert(sizeof(struct flow) == 56, "flow");
_Static_assert(sizeof(struct flow_limits) == 32, "flow_limits");
_Static_assert(sizeof(struct opening) == 44, "opening");
_Static_assert(sizeof(struct port_table) == 589828, "port_table");
_Static_assert(sizeof(struct probe_key) == 20, "probe_key");
_Static_assert(sizeof(struct probe) == 532, "probe");
_Static_assert(sizeof(struct probe_state) == 24, "probe_state");
_Static_assert(sizeof(struct origin) == 52, "origin");
_Static_assert(sizeof(struct stale_socket) == 68, "stale_socket");

#endif
