/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * A small cluster: 24 Services (two families, TCP, UDP and SCTP, four kinds) with up to three backends each, as the first
 * bytes of an input say. What it writes into the maps is what the daemon would.
 */
#ifndef FUZZ_WORLD_H
#define FUZZ_WORLD_H

#include <stdio.h>
#include "inet.h"
#include "native.h"

enum {
	FAMILIES = 2,
	PROTOCOLS = 3,
	KINDS = 4,
	SERVICES = FAMILIES * PROTOCOLS * KINDS,
	BACKENDS_EACH = 3,
	WORLD_BYTES = 8,
	/* Of a recipe's byte: less than the first changes nothing, less than the second only turns the ring of openings. */
	TURN_FIRST = 232,
	CHANGE_FIRST = 240,
};

/* What a Service is for: by its index, / (FAMILIES * PROTOCOLS). */
enum service_kind {
	KIND_HERE, /* a load balancer address, pods of this node */
	KIND_ELSEWHERE, /* the same, backends behind outward devices */
	KIND_NODE_PORT, /* some of both */
	KIND_SPECIAL, /* as enum special says */
};

enum special {
	SPECIAL_REFUSE, /* no endpoint */
	SPECIAL_DROP, /* policy Local, and none here */
	SPECIAL_RANGED, /* loadBalancerSourceRanges */
	SPECIAL_CLUSTER_IP,
	SPECIAL_OTHER_PORT, /* of SCTP: to another port, which cannot be */
	SPECIAL_NO_BACKEND, /* slots lead to nothing */
	SPECIAL_NO_ROUTE,
	SPECIAL_NODE, /* the node itself */
	SPECIALS,
};

struct known_backend {
	struct end end;
	int gone;
};

struct service {
	struct end end; /* of a NodePort: the node's own address */
	struct end cluster_ip; /* which serves pods; SPECIAL_CLUSTER_IP has no other end */
	__u8 protocol;
	int is_ip6;
	enum service_kind kind;
	int count; /* of its backends */
	int is_served; /* to the wire */
	int is_ranged;
	int affine;
	const struct service *owner; /* who has its frontend: itself, or the Service that it was moved to */
	struct known_backend backends[BACKENDS_EACH];
};

/* The node's address that hides pods from their backends, as the rows of pods' devices say. */
enum pods_own {
	OWN_NODE,
	OWN_TUNNEL,
	OWN_NONE,
	OWN_STRANGE, /* an address at which nothing is looked at */
};

struct world {
	struct service services[SERVICES];
	enum special special;
	enum pods_own pods_own;
	int pods_unknown; /* their devices have no rows */
	int hides; /* backends see the node as their client (--masquerade-all) */
	int tunnel_is_strange; /* nothing is looked at that comes to the tunnel's address */
	int external; /* cluster IPs serve the wire as well */
	int inside_local, outside_local; /* pools of policy Local have the last backend of each Service only */
	int rp_filter, through_stack, by_ports;
	__u16 snat_first, snat_ports;
	int changes; /* of anything, since the beginning */
};

extern struct world world;
extern const char *const node_address[FAMILIES], *const tunnel_address[FAMILIES];

/* A trace says what has to be written into the kernel's maps for the same world. NULL: none. In one, nothing depends on
 * chance or on this machine: pools of one backend, no sockets, no failures. */
extern FILE *trace;

void world_open(__u16 snat_first, __u16 snat_ports);
void world_make(const __u8 bytes[WORLD_BYTES]);
/* One thing becomes different. */
void world_change(__u8 what, __u8 which);
/* So many seconds pass. */
void world_age(__u32 seconds);
/* The Service that serves this end to the wire or, `from_pod`, to pods; NULL: none. */
struct service *world_service(const struct end *end, __u8 protocol, int from_pod);
/* May the client have this Service by this end of it? */
int world_allows(const struct service *service, const struct end *end, const __u8 client[16]);
/* Is this backend one for who asks? */
int world_offers(const struct service *service, int index, int from_pod);
int world_is_here(const __u8 address[16]);
int world_is_cluster_ip(const __u8 address[16]);
/* pods.c */
int is_pod_device(__u32 interface);
/* The device by which packets from and to this address go: a pod's, or the route's. */
__u32 world_device(const __u8 address[16]);
/* Link addresses: of a device, and the one at which its pods reach the node. */
const __u8 *world_station(__u32 interface);
const __u8 *world_gateway(__u32 interface);
/* Does this frame of a pod's go to the node? */
int world_is_for_node(const struct frame *frame);
/* The address that hides clients whose packets come in there; 0: they are not hidden. */
int world_own_address(__u32 interface, int is_ip6, __u8 own[16]);
/* From text. */
void address_of(const char *text, __u8 to[16]);
__u64 world_counter(__u32 index);

#endif
