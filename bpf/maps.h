/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The maps. The daemon fills the first five (sync/ gives the order of writes and why each state in between is safe);
 * the programs fill the others. Those of max_entries 1 that are no arrays of one get theirs from the daemon before
 * loading. All are pinned under the ABI's directory.
 */
#ifndef KUBELANE_MAPS_H
#define KUBELANE_MAPS_H

/* Allocated row by row: the capacity costs 8 to 16 bytes a row until it is used. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__type(key, struct frontend_key);
	__type(value, struct frontend);
} frontends SEC(".maps");

/* Arrays: the JIT inlines the look-up to a bounds check and an addition. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} slots SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct backend);
} backends SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__type(key, struct address);
	__type(value, __u32); /* enum address_flag */
} addresses SEC(".maps");

/* For people and for a restarted daemon; no program reads it. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct service_name);
} services SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct affinity_key);
	__type(value, struct affinity);
} affinities SEC(".maps");

/* The same for clients from outside that have not proved to be there: a flood of forged ones pushes out its like. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct affinity_key);
	__type(value, struct affinity);
} new_affinities SEC(".maps");

/* Connected sockets. Lives and dies with the socket; nothing is ever evicted. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct origin);
} socket_origins SEC(".maps");

/* Unconnected sockets: a few destinations, and more for the few sockets that have more. See datagram.h. */
enum datagram_limits {
	DATAGRAM_RECORDS = 8,
	DATAGRAM_MORE_RECORDS = 56, /* under 4 KiB: before 6.7 a socket may have 20 KiB of storage and options */
};

struct datagram_record {
	struct origin origin;
	__u32 is_direct; /* the socket has sent to the backend itself since */
	__u64 sequence; /* of the last datagram sent; 0: free */
};

struct datagram_table {
	struct bpf_spin_lock lock;
	__u32 overflowed; /* not 0: some destinations are in datagram_more */
	__u64 sequence;
	struct datagram_record records[DATAGRAM_RECORDS];
};

struct datagram_more_table {
	struct bpf_spin_lock lock;
	__u32 zero;
	struct datagram_record records[DATAGRAM_MORE_RECORDS];
};

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct datagram_table);
} datagram_tables SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct datagram_more_table);
} datagram_more SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, COUNTER_MAX);
	__type(key, __u32);
	__type(value, __u64);
} counters SEC(".maps");

/* Connections, refusals and drops of each Service, if somebody wants to know (config.counts_services; the daemon sets
 * max_entries then). Not pinned: the counts are the daemon's, and begin with it. */
struct service_counts {
	__u64 counts[SERVICE_COUNT_MAX];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__type(key, __u32); /* service id */
	__type(value, struct service_counts);
} service_counts SEC(".maps");

/* What the clients and backends of each Service send each other; likewise (config.counts_traffic). */
struct service_traffic {
	__u64 amounts[AMOUNT_MAX];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__type(key, __u32); /* service id */
	__type(value, struct service_traffic);
} service_traffic SEC(".maps");

/* When a Service's traffic was first measured, by bpf_ktime_get_ns(): who has its id later has another. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__type(key, __u32); /* service id */
	__type(value, __u64);
} service_births SEC(".maps");

/* Sockets that this daemon's programs have seen connecting. */
struct socket_traffic {
	__u64 since_ns;
	__u64 service_birth;
	__u32 service_id;
	__u32 is_connected;
};

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct socket_traffic);
} socket_traffic SEC(".maps");

/* Who listens to events, by slot, and what they have missed; the rings are theirs. See observe.h. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct listening);
} listening SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, LISTENERS);
	__type(key, __u32);
	__type(value, struct listener_state);
} listener_states SEC(".maps");

/* Listeners choose the size. */
struct listener_ring {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4096);
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, LISTENERS);
	__type(key, __u32);
	__array(values, struct listener_ring);
} listener_rings SEC(".maps");

/* Packets from the wire. */

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct source_range_key);
	__type(value, __u32); /* 1 */
} source_ranges SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1024);
	__type(key, __u32);
	__type(value, struct device);
} devices SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 16384);
	__type(key, __u32);
	__type(value, struct pod_device);
} pod_devices SEC(".maps");

/* Flows, a table for each family. Nothing is ever evicted; flow.h says who removes what, and when. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__type(key, struct flow_key4);
	__type(value, struct flow);
} flows4 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__type(key, struct flow_key);
	__type(value, struct flow);
} flows6 SEC(".maps");

/* One lock for many flows, by their requests' keys. Each has a cache line. */
enum flow_lock_count {
	FLOW_LOCKS = 1024,
};

struct flow_lock {
	struct bpf_spin_lock lock;
	__u8 unused[60];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, FLOW_LOCKS);
	__type(key, __u32);
	__type(value, struct flow_lock);
} flow_locks SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, FLOW_LIMITS_MAX);
	__type(key, __u32);
	__type(value, struct flow_limits);
} flow_limits SEC(".maps");

/* Proved flows, by enum flow_class. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, FLOW_CLASS_MAX);
	__type(key, __u32);
	__type(value, __u64);
} flow_counts SEC(".maps");

/* A ring for each processor, FLOW_OPENINGS after FLOW_OPENINGS: its latest flows. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, FLOW_OPENINGS);
	__type(key, __u32);
	__type(value, struct opening);
} flow_openings SEC(".maps");

/* What this node, or a pod that is masqueraded as the node, has sent from a port that is served: the answer's key -> the
 * second of the last packet. See owner.h. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1);
	__type(key, struct flow_key);
	__type(value, __u32);
} outgoing SEC(".maps");

/* Packets that were handed to the host's stack: their ends in the stack -> what they become when they leave, a row like
 * those of flows. Each is written again by the flow's next packet, should it be evicted. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1);
	__type(key, struct flow_key);
	__type(value, struct flow);
} handed SEC(".maps");

/* The ports of a datagram that comes in pieces: only the first has them. */
struct fragment_key {
	struct address source;
	struct address destination;
	__u32 id; /* as in the packet; of IPv4 16 bits */
	__u32 protocol;
};

struct fragment_ports {
	__be16 source_port;
	__be16 destination_port;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, struct fragment_key);
	__type(value, struct fragment_ports);
} fragments SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct port_table);
} ports SEC(".maps");

/* The same for packets and sockets, set by the daemon. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct wire_filter);
} wire_filter SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, EPOCH_MAX);
	__type(key, __u32);
	__type(value, __u32);
} epochs SEC(".maps");

/* Health probes that are answered here, and since when the daemon has been silent; see probe.h. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 16384);
	__type(key, struct probe_key);
	__type(value, struct probe);
} probes SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct probe_state);
} probe_state SEC(".maps");

/* What a route look-up answered, on this processor; see route.h. */
enum route_cache_size {
	ROUTES_KNOWN = 1024,
};

struct known_route {
	struct ends ends; /* ports: 0 where routing does not ask for them */
	__u32 from; /* interface that the packet came in by */
	__u32 protocol; /* 0, as the ports */
	__u32 epoch; /* EPOCH_ROUTES at the time */
	__u32 second; /* when */
	__u32 interface; /* where to; 0: nothing is known */
	__u16 mtu; /* of a source's row 1: behind an outward device; 0: on this node */
	__u16 family; /* of `next`, AF_INET or AF_INET6; 0: the kernel finds it while sending */
	__be32 next[4]; /* the neighbour's address; of a source's row, this node's address */
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, ROUTES_KNOWN);
	__type(key, __u32);
	__type(value, struct known_route);
} known_routes SEC(".maps");

/* How many answers this processor may give; see icmp.h. */
struct answer_budget {
	__u64 refilled_ns;
	__u64 left;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct answer_budget);
} answer_budgets SEC(".maps");

/*
 * Looks for a row of a hash map whose rows are rewritten. The kernel puts the new row in at the head of its bucket before it
 * takes the old one out further down (htab_map_update_elem()): who has passed the head by then meets neither, and meets the
 * new one next time. Rows that are only put in, changed in place and deleted need no second look.
 */
static __always_inline void *map_find(void *map, const void *key)
{
	void *row = bpf_map_lookup_elem(map, key);

	return row ? row : bpf_map_lookup_elem(map, key);
}

#endif
