/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The packet programs as functions of this process, and what stands in for the kernel around them: maps (maps.c), the
 * packet (skb.c), routes, sockets and the clock (route.c).
 */
#ifndef FUZZ_NATIVE_H
#define FUZZ_NATIVE_H

#include <linux/bpf.h>
#include <linux/types.h>

enum {
	FRAME_MAX = 4096,
	/* Interfaces of the node. */
	UPLINK = 2,
	TUNNEL = 3,
	PODS = 4, /* a bridge, with two ports for pods */
	BARE = 5, /* a tunnel without link headers */
	PORT_A = 6,
	PORT_B = 7,
	VETH = 8, /* of a pod that has a route of its own */
};

struct native_map {
	const char *name;
	void *object; /* the map as the programs know it */
	__u32 type;
	__u32 key_size;
	__u32 value_size;
	__u32 max_entries;
	/* Of arrays: the values. Of hashes: rows, each the next one's index, the key, the value. */
	unsigned char *memory;
	__u32 row_size;
	__u32 free; /* the row that was given back last, plus one */
	__u32 used; /* rows that were ever given away */
	__u32 count;
	__u32 buckets[256]; /* the first row, plus one */
};

struct native_program {
	const char *name;
	int (*run)(struct __sk_buff *skb);
	__u32 l3; /* where the network layer's header is */
};

enum program {
	IN_ETHERNET = 0,
	IN_BARE = 1,
	IN_POD = 2,
	OUT_ETHERNET = 3, /* this one and the next: what leaves */
	OUT_BARE = 4,
	COLLECT = 5,
};

extern const struct native_program native_programs[];

struct native_map *native_maps(int *count);
void native_configure(__u16 snat_first, __u16 snat_ports, int tcp_be_liberal, __u32 flows, int external_cluster_ips);

/* maps.c */
void maps_open(void);
void maps_reset(void);
struct native_map *map_named(const char *name);
void *map_lookup(struct native_map *map, const void *key);
long map_update(struct native_map *map, const void *key, const void *value, __u64 flags);
long map_delete(struct native_map *map, const void *key);
/* Each row: after `previous`, or the first one; NULL at the end. Only of hashes. */
const void *map_next(struct native_map *map, const void *previous, const void **value);
int locks_held(void);

/* skb.c: how a checksum stands, as skb->ip_summed says. */
enum summed {
	SUM_NONE = 0,
	SUM_PARTIAL = 1, /* the device will add it */
	SUM_COMPLETE = 2, /* the device has summed the packet */
};

struct frame {
	__u8 bytes[FRAME_MAX];
	__u32 length;
	__u32 l3; /* 14, or 0 */
	__u8 summed; /* enum summed */
	__u8 pkt_type;
	__u16 vlan; /* tag; present if vlan_present */
	__u8 vlan_present;
	__u16 gso_size;
	__u32 mark;
	__u32 interface;
	__u32 from; /* ingress_ifindex */
	__u16 protocol; /* host order */
	__u32 sum; /* SUM_COMPLETE: of the bytes from l3 on */
};

/* What a program did besides its answer. */
struct effects {
	int action;
	__u32 redirect; /* interface; 0: none */
	int redirect_is_neigh;
	struct bpf_redir_neigh next;
	int failures; /* helpers that were made to fail */
	__u32 vlan_present;
	__u32 sum;
	__u8 summed;
};

void skb_open(void);
/* Runs the program on a copy; `after` has the packet as it leaves. `fail_at`: which of the calls that may fail does so,
 * counted from 1; 0: none. */
struct effects skb_run(enum program program, const struct frame *before, struct frame *after, int fail_at);
/* Is it this call's turn to fail? */
int fault_is_due(void);
extern struct effects *current_effects;

/* route.c */
struct node_state {
	__u64 now_ns;
	__u64 random;
	int forwarding; /* of all devices */
	int is_rerouted; /* the tunnel's networks are behind the uplink's gateway */
	int is_old; /* a kernel that names no source and takes no mark when it is asked for a route (before 6.7) */
};

extern struct node_state node;

/* The socket of a world: of this protocol, local end and, if `connected`, remote end; IPv4 as ::ffff:a.b.c.d. */
struct known_socket {
	__u8 protocol;
	__u8 connected;
	__u8 local[16], remote[16];
	__be16 local_port, remote_port;
};

extern struct known_socket known_sockets[4];
extern int known_socket_count;
int sockets_held(void);

enum way {
	WAY_NONE, /* no route, or one that refuses */
	WAY_HERE, /* the node's own, or no unicast */
	WAY_FOUND,
};

/* The way to an address, as the table of the node has it. */
struct hop {
	enum way way;
	__u32 interface;
	__u32 mtu;
	__u8 next[16];
	__u8 source[16];
	int refusal; /* of WAY_NONE: BPF_FIB_LKUP_RET_* */
	int known; /* the neighbour is */
};

struct hop route_of(const __u8 destination[16]);

#endif
