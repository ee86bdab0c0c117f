/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The maps. The daemon fills the first five (sync/ gives the order of writes and why each state in between is safe)
 * and sets their max_entries before loading; the programs fill the others. All are pinned under the ABI's directory.
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

/* Connected sockets. Lives and dies with the socket; nothing is ever evicted. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct origin);
} socket_origins SEC(".maps");

/* Unconnected sockets, their first destinations: as exact as socket_origins. */
enum datagram_limits {
	DATAGRAM_RECORDS = 8,
};

struct datagram_record {
	struct origin origin;
	__u32 sequence; /* of the last datagram sent; 0: free */
};

struct datagram_table {
	struct bpf_spin_lock lock;
	__u32 sequence;
	__u32 overflowed; /* not 0: some destinations are in datagram_overflow */
	struct datagram_record records[DATAGRAM_RECORDS];
};

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct datagram_table);
} datagram_tables SEC(".maps");

/* Unconnected sockets, destinations beyond DATAGRAM_RECORDS: an LRU shared by all sockets. */
enum datagram_direction {
	DATAGRAM_TO_SERVICE = 0,
	DATAGRAM_FROM_BACKEND = 1,
};

struct datagram_key {
	__u64 socket_cookie;
	struct address address;
	__be16 port;
	__u16 direction;
	__u32 zero;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct datagram_key);
	__type(value, struct datagram_record);
} datagram_overflow SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, COUNTER_MAX);
	__type(key, __u32);
	__type(value, __u64);
} counters SEC(".maps");

#endif
