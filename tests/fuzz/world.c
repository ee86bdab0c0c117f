// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
#include <arpa/inet.h>
#include <stdlib.h>
#include <string.h>
#include "../../bpf/abi.h"
#include "native.h"
#include "world.h"

struct world world;
FILE *trace;

static const __u8 protocols[PROTOCOLS] = {PROTO_TCP, PROTO_UDP, PROTO_SCTP};
static const char *const vip[FAMILIES] = {"192.0.2.80", "2001:db8:80::80"};
const char *const node_address[FAMILIES] = {"10.0.0.1", "fd00::1"};
const char *const tunnel_address[FAMILIES] = {"10.244.0.1", "fd44::1"};
static const char *const cluster_ip[FAMILIES] = {"10.96.0.1", "fd96::1"};
static const char *const backends[KINDS][BACKENDS_EACH][FAMILIES] = {
	{{"10.1.0.5", "fd01::5"}, {"10.1.0.6", "fd01::6"}, {"10.1.0.7", "fd01::7"}},
	{{"10.244.1.5", "fd44::1:5"}, {"10.244.1.6", "fd44::1:6"}, {"10.0.0.9", "fd00::9"}},
	{{"10.1.0.5", "fd01::5"}, {"10.244.1.5", "fd44::1:5"}, {"10.77.0.5", "fd4d::5"}},
	{{"10.1.0.5", "fd01::5"}, {"10.244.1.5", "fd44::1:5"}, {"10.1.0.6", "fd01::6"}},
};

static struct native_map *frontends, *slots, *backend_rows, *addresses, *ranges, *devices, *pod_devices, *epochs,
	*limits, *filters, *counters, *flows4, *flows6;

void address_of(const char *text, __u8 to[16])
{
	memset(to, 0, 16);
	if (inet_pton(AF_INET6, text, to) == 1)
		return;
	memset(to + 10, 0xff, 2);
	if (inet_pton(AF_INET, text, to + 12) != 1)
		abort();
}

static void print_bytes(const void *bytes, __u32 length)
{
	fputc(' ', trace);
	for (__u32 i = 0; i < length; i++)
		fprintf(trace, "%02x", ((const __u8 *)bytes)[i]);
}

static void write_row(struct native_map *map, const void *key, const void *value)
{
	if (map_update(map, key, value, BPF_ANY))
		abort();
	if (!trace)
		return;
	fprintf(trace, "map %s", map->name);
	print_bytes(key, map->key_size);
	print_bytes(value, map->value_size);
	fputc('\n', trace);
}

static void write_number(struct native_map *map, __u32 key, __u32 value)
{
	write_row(map, &key, &value);
}

void world_open(__u16 snat_first, __u16 snat_ports)
{
	world.snat_first = snat_first;
	world.snat_ports = snat_ports;
	frontends = map_named("frontends");
	slots = map_named("slots");
	backend_rows = map_named("backends");
	addresses = map_named("addresses");
	ranges = map_named("source_ranges");
	devices = map_named("devices");
	pod_devices = map_named("pod_devices");
	epochs = map_named("epochs");
	limits = map_named("flow_limits");
	filters = map_named("wire_filter");
	counters = map_named("counters");
	flows4 = map_named("flows4");
	flows6 = map_named("flows6");
}

/* As src/abi.rs and src/bpf/filter.rs have it. */
static void pass_address(const __u8 address[16], __u32 roles)
{
	static const __u32 factors[4] = {0x85ebca6b, 0xc2b2ae35, 0x27d4eb2f, 0x9e3779b1};
	__u32 zero = 0, sum = 0, word;
	struct wire_filter *filter = map_lookup(filters, &zero);

	for (int i = 0; i < 4; i++) {
		memcpy(&word, address + 4 * i, 4);
		sum += word * factors[i];
	}
	if (roles & (ADDRESS_NODE | ADDRESS_LOCAL | ADDRESS_SERVICE_VIP)) {
		filter->addresses[sum >> 16] = 1;
		if (trace)
			fprintf(trace, "pass address %u\n", sum >> 16);
	}
	if (roles & (ADDRESS_CLUSTER_IP | ADDRESS_SERVICE_VIP)) {
		filter->sockets[sum >> 16] = SOCKET_FILTER_SERVICE;
		if (trace)
			fprintf(trace, "pass service %u\n", sum >> 16);
	}
}

static void pass_port(__be16 port)
{
	__u32 zero = 0;
	struct wire_filter *filter = map_lookup(filters, &zero);

	filter->ports[ntohs(port)] = 1;
	if (trace)
		fprintf(trace, "pass port %u\n", ntohs(port));
}

static void add_address(const char *text, __u32 roles)
{
	__u8 address[16];

	address_of(text, address);
	pass_address(address, roles);
	write_row(addresses, address, &roles);
}

/* In a trace the node's devices have other numbers, and are there. */
static void add_device(__u32 interface, const char *ip4, const char *ip6, int is_bare)
{
	struct device device = {.is_bare = is_bare, .rp_filter = interface == UPLINK ? world.rp_filter : 0};

	address_of(ip4, device.ip4.bytes);
	address_of(ip6, device.ip6.bytes);
	if (map_update(devices, &interface, &device, BPF_ANY))
		abort();
}

static void add_pod_device(__u32 interface)
{
	static const char *const own[][FAMILIES] = {
		[OWN_NODE] = {"10.0.0.1", "fd00::1"},
		[OWN_TUNNEL] = {"10.244.0.1", "fd44::1"},
		[OWN_NONE] = {"::", "::"},
		[OWN_STRANGE] = {"10.1.0.1", "fd01::1"},
	};
	struct pod_device row = {};

	address_of(own[world.pods_own][0], row.ip4.bytes);
	address_of(own[world.pods_own][1], row.ip6.bytes);
	memcpy(row.gateway, world_gateway(interface), sizeof(row.gateway));
	write_row(pod_devices, &interface, &row);
}

static void add_pod_devices(void)
{
	for (__u32 interface = PORT_A; interface <= VETH && !world.pods_unknown; interface++)
		add_pod_device(interface);
}

static void make_node(void)
{
	const struct flow_limits set = {60, 86400, 3600, 10, 60, 10, 30, 120};

	add_device(UPLINK, node_address[0], node_address[1], 0);
	add_device(TUNNEL, tunnel_address[0], tunnel_address[1], 0);
	add_device(BARE, tunnel_address[0], tunnel_address[1], 1);
	add_pod_devices();
	for (int family = 0; family < FAMILIES; family++) {
		add_address(node_address[family], ADDRESS_NODE | ADDRESS_LOCAL);
		add_address(tunnel_address[family], ADDRESS_LOCAL);
		add_address(vip[family], ADDRESS_SERVICE_VIP);
		add_address(cluster_ip[family], ADDRESS_CLUSTER_IP);
	}
	for (__u32 i = 0; i < FLOW_LIMITS_MAX; i++)
		write_row(limits, &i, &set);
	write_number(epochs, EPOCH_ROUTES, 1);
	write_number(epochs, EPOCH_OWNERS, 1);
	write_number(epochs, EPOCH_ROUTES_BY_ADDRESS, !world.by_ports);
	write_number(epochs, EPOCH_THROUGH_STACK, world.through_stack);
	if (trace)
		fprintf(trace, "rp_filter %d\nforwarding %d\n", world.rp_filter, node.forwarding);
}

static void place_backend(const struct service *service, int index, int member, struct end *end)
{
	int other = service->protocol != PROTO_SCTP ||
		    (service->kind == KIND_SPECIAL && world.special == SPECIAL_OTHER_PORT);

	address_of(backends[service->kind][member][service->is_ip6], end->address);
	end->port = other ? htons(8080) : service->end.port;
	if (service->kind != KIND_SPECIAL)
		return;
	if (world.special == SPECIAL_NO_ROUTE)
		address_of(service->is_ip6 ? (index ? "fd0a::5" : "fd09::5") : (index ? "10.10.0.5" : "10.9.0.5"),
			   end->address);
	if (world.special == SPECIAL_NODE)
		address_of(node_address[service->is_ip6], end->address);
}

static __u32 backend_id(const struct service *service, int index)
{
	return 1 + (service - world.services) * BACKENDS_EACH + index;
}

static void write_backend(const struct service *service, int index)
{
	const struct known_backend *known = &service->backends[index];
	__u32 id = backend_id(service, index);
	struct backend row = {
		.port = known->end.port,
		.state = known->gone ? BACKEND_GONE : BACKEND_ACTIVE,
		.pools = known->gone ? 0 : POOL_CLUSTER | (index == service->count - 1 ? POOL_LOCAL : 0),
		.generation = 1,
		.service_id = 1 + (service - world.services),
		.protocol = service->protocol,
		.flags = world_is_here(known->end.address) ? BACKEND_NODE_LOCAL : 0,
	};

	memcpy(row.address.bytes, known->end.address, 16);
	write_row(backend_rows, &id, &row);
}

static __u32 flags_of(const struct service *service, int is_cluster_ip)
{
	__u32 hides = world.hides ? FRONTEND_SOURCE_NODE : 0;

	if (is_cluster_ip)
		return FRONTEND_CLUSTER_IP | hides;
	if (service->kind == KIND_NODE_PORT)
		return FRONTEND_NODE_PORT | hides;
	return FRONTEND_LOAD_BALANCER | (service->is_ranged ? FRONTEND_SOURCE_RANGES : 0) | hides;
}

int world_offers(const struct service *service, int index, int from_pod)
{
	int is_local = from_pod ? world.inside_local : world.outside_local;

	return !service->backends[index].gone && (!is_local || index == service->count - 1);
}

/* The pool has the backends that are there, in order. `owner`: whose they are. */
static struct pool make_pool(const struct service *service, const struct service *owner, int from_pod)
{
	struct pool pool = {
		.base = ((owner - world.services) + from_pod * SERVICES) * BACKENDS_EACH,
		.member = (from_pod ? world.inside_local : world.outside_local) ? POOL_LOCAL : POOL_CLUSTER,
	};

	for (int i = 0; i < owner->count; i++)
		if (world_offers(owner, i, from_pod))
			write_number(slots, pool.base + pool.count++,
				     world.special == SPECIAL_NO_BACKEND && owner->kind == KIND_SPECIAL
					     ? 1000
					     : backend_id(owner, i));
	if (service->kind == KIND_SPECIAL && world.special == SPECIAL_DROP)
		pool.on_empty = EMPTY_DROP;
	return pool;
}

static void write_end(const struct service *service, const struct end *end, const struct frontend *row)
{
	struct frontend_key key = {.port = end->port, .protocol = service->protocol};

	memcpy(key.address.bytes, end->address, 16);
	/* A NodePort has the wildcard address of its family. */
	if (row->flags & FRONTEND_NODE_PORT)
		memset(key.address.bytes + (service->is_ip6 ? 0 : 12), 0, service->is_ip6 ? 16 : 4);
	if (!(row->flags & FRONTEND_CLUSTER_IP))
		pass_port(key.port);
	write_row(frontends, &key, row);
}

static void write_frontend(const struct service *service)
{
	const struct service *owner = service->owner;
	struct frontend row = {
		.service_id = 1 + (owner - world.services),
		.flags = flags_of(service, 1),
		.affinity_seconds = service->affine ? 10800 : 0,
		.inside = make_pool(service, owner, 1),
		.outside = make_pool(service, owner, 0),
	};

	write_end(service, &service->cluster_ip, &row);
	if (!service->is_served)
		return;
	row.flags = flags_of(service, 0);
	write_end(service, &service->end, &row);
}

static void make_service(struct service *service, int index, const __u8 *bytes)
{
	static const __u16 ports[KINDS] = {80, 81, 30080, 82};
	int member = bytes[2] >> 4, count = 1 + (bytes[2] & 15) % BACKENDS_EACH;

	memset(service, 0, sizeof(*service));
	service->is_ip6 = index & 1;
	service->protocol = protocols[index / FAMILIES % PROTOCOLS];
	service->kind = index / (FAMILIES * PROTOCOLS);
	service->end.port = htons(ports[service->kind]);
	service->is_served = 1;
	service->owner = service;
	service->affine = !!(bytes[0] & 64);
	address_of(service->kind == KIND_NODE_PORT ? node_address[service->is_ip6] : vip[service->is_ip6],
		   service->end.address);
	service->cluster_ip.port = service->end.port;
	address_of(cluster_ip[service->is_ip6], service->cluster_ip.address);
	/* What chance would choose, a trace's world has only one of. */
	service->count = trace ? 1 : count;
	if (service->kind == KIND_SPECIAL) {
		service->is_ranged = world.special == SPECIAL_RANGED;
		service->is_served = world.special != SPECIAL_CLUSTER_IP;
		if (!service->is_served)
			service->end = service->cluster_ip;
		if (world.special == SPECIAL_REFUSE || world.special == SPECIAL_DROP)
			service->count = 0;
	}
	for (int i = 0; i < service->count; i++) {
		/* The namespaces of a trace have no device without link headers. */
		place_backend(service, i, (i + member) % (trace && service->kind == KIND_NODE_PORT ? 2 : BACKENDS_EACH),
			      &service->backends[i].end);
		write_backend(service, i);
	}
	write_frontend(service);
}

/* Clients of this range only, by family. */
static void make_range(__u32 service_id, int is_ip6)
{
	struct source_range_key key = {.prefix_length = 32 + (is_ip6 ? 48 : 96 + 25), .service_id = service_id};
	__u32 one = 1;

	address_of(is_ip6 ? "2001:db8::" : "198.51.100.0", key.address.bytes);
	write_row(ranges, &key, &one);
}

/* A socket of the node's that is connected to a client, or listens, on the number of a NodePort. */
static void make_sockets(__u8 which)
{
	known_socket_count = 0;
	if (trace || !(which & 3))
		return;
	for (int family = 0; family < FAMILIES; family++) {
		struct known_socket *socket = &known_sockets[known_socket_count++];

		socket->protocol = which & 4 ? PROTO_TCP : PROTO_UDP;
		socket->connected = !!(which & 1);
		socket->local_port = htons(30080);
		socket->remote_port = htons(5000);
		address_of(node_address[family], socket->local);
		address_of(family ? "2001:db8::7" : "198.51.100.7", socket->remote);
	}
}

void world_make(const __u8 bytes[WORLD_BYTES])
{
	__u8 seed[8] = {bytes[3], bytes[6], bytes[7], 1};

	world.special = bytes[1] % SPECIALS;
	world.rp_filter = bytes[0] % 4 % 3;
	world.through_stack = !!(bytes[0] & 4);
	world.by_ports = !!(bytes[0] & 8);
	world.hides = !!(bytes[4] & 16);
	world.external = !trace && (bytes[4] & 32);
	world.pods_own = bytes[4] >> 6;
	world.inside_local = !!(bytes[5] & 8);
	world.pods_unknown = !trace && (bytes[5] & 16);
	world.outside_local = !!(bytes[5] & 32);
	world.tunnel_is_strange = 0;
	world.changes = 0;
	node.is_rerouted = 0;
	node.is_old = !trace && (bytes[4] & 8);
	node.forwarding = (bytes[0] & 0x30) != 0x30;
	node.now_ns = 1000000000000ULL;
	memcpy(&node.random, seed, sizeof(seed));
	maps_reset();
	if (trace)
		fprintf(trace, "world\n");
	else
		native_configure(world.snat_first, bytes[4] & 1 ? 4 : world.snat_ports, !!(bytes[4] & 2),
				 bytes[4] & 4 ? 1 : 1000, world.external);
	make_node();
	for (int i = 0; i < SERVICES; i++) {
		make_service(&world.services[i], i, bytes);
		if (world.services[i].is_ranged)
			make_range(1 + i, world.services[i].is_ip6);
	}
	make_sockets(bytes[5]);
}

/* As if this processor's ring had gone round: the next flow pushes out the one that began first. */
static void turn_ring(void)
{
	struct native_map *ring = map_named("flow_openings");
	const struct opening *first, *next;

	for (__u32 i = 0; i < 128; i++) {
		__u32 zero = 0;

		next = map_lookup(ring, &i);
		first = map_lookup(ring, &zero);
		if (next->key.protocol)
			continue;
		map_update(ring, &i, first, BPF_ANY);
		return;
	}
}

static void advance_routes(void)
{
	__u32 index = EPOCH_ROUTES, *epoch = map_lookup(epochs, &index);

	write_number(epochs, EPOCH_ROUTES, *epoch + 1);
}

void world_change(__u8 what, __u8 which)
{
	struct service *service = &world.services[which % SERVICES], *other;
	__u32 index = EPOCH_OWNERS, *owners = map_lookup(epochs, &index);

	if (what < CHANGE_FIRST) {
		if (!trace)
			turn_ring();
		return;
	}
	world.changes++;
	switch (what & 7) {
	case 0: /* A backend goes, or comes back. */
		if (!service->count || service->owner != service)
			return;
		index = which / SERVICES % service->count;
		service->backends[index].gone = !service->backends[index].gone;
		if (service->backends[index].gone)
			write_frontend(service);
		write_backend(service, index);
		if (!service->backends[index].gone)
			write_frontend(service);
		return;
	case 1: /* The destination becomes another Service's, of the same family and protocol. */
		other = &world.services[which % (FAMILIES * PROTOCOLS)];
		if (service->kind == KIND_SPECIAL || service->kind == KIND_HERE || service->owner != service ||
		    other->owner != other)
			return;
		service->owner = other;
		write_frontend(service);
		memcpy(service->backends, other->backends, sizeof(service->backends));
		service->count = other->count;
		write_number(epochs, EPOCH_OWNERS, *owners + 1);
		return;
	case 2:
		world.through_stack = !world.through_stack;
		write_number(epochs, EPOCH_THROUGH_STACK, world.through_stack);
		return;
	case 3:
		node.is_rerouted = !trace && !node.is_rerouted;
		advance_routes();
		return;
	case 4: /* Backends see the node as their client from now on, or no longer. */
		world.hides = !world.hides;
		for (int i = 0; i < SERVICES; i++)
			write_frontend(&world.services[i]);
		return;
	case 5:
		world.pods_own = (world.pods_own + 1) & 3;
		add_pod_devices();
		return;
	case 6:
		node.forwarding = trace ? node.forwarding : !node.forwarding;
		advance_routes();
		return;
	default:
		if (trace)
			return;
		world.tunnel_is_strange = !world.tunnel_is_strange;
		for (int family = 0; family < FAMILIES; family++)
			add_address(tunnel_address[family], world.tunnel_is_strange ? 0 : ADDRESS_LOCAL);
		advance_routes();
	}
}

/* In a trace flows become older, because the kernel's clock cannot be moved; else time passes. */
void world_age(__u32 seconds)
{
	struct native_map *tables[] = {flows4, flows6};

	if (!trace) {
		node.now_ns += seconds * 1000000000ULL;
		return;
	}
	for (int i = 0; i < 2; i++) {
		const void *key = NULL, *value;

		while ((key = map_next(tables[i], key, &value))) {
			struct flow *flow = (struct flow *)value;
			__u8 protocol = i ? ((const struct flow_key *)key)->protocol
					  : ((const struct flow_key4 *)key)->protocol;
			__u32 second = ((flow->state >> FLOW_SECOND_SHIFT) - seconds) & FLOW_SECOND_MASK;

			flow->state = (flow->state & FLOW_FLAGS) | second << FLOW_SECOND_SHIFT;
			if ((flow->state & FLOW_REPLY) && protocol != PROTO_TCP)
				flow->backend_or_first -= seconds;
		}
	}
	fprintf(trace, "age %u\n", seconds);
}

struct service *world_service(const struct end *end, __u8 protocol, int from_pod)
{
	for (int i = 0; i < SERVICES; i++) {
		struct service *service = &world.services[i];

		if (service->protocol != protocol)
			continue;
		if (service->is_served && end_equal(&service->end, end))
			return service;
		if ((from_pod || world.external) && end_equal(&service->cluster_ip, end))
			return service;
	}
	return NULL;
}

int world_allows(const struct service *service, const struct end *end, const __u8 client[16])
{
	__u8 range[16];

	if (!service->is_ranged || end_equal(&service->cluster_ip, end))
		return 1;
	address_of(service->is_ip6 ? "2001:db8::" : "198.51.100.0", range);
	if (service->is_ip6)
		return !memcmp(range, client, 6);
	return !memcmp(range, client, 15) && !(client[15] & 0x80);
}

int world_is_here(const __u8 address[16])
{
	struct hop hop = route_of(address);

	return hop.way == WAY_HERE || (hop.way == WAY_FOUND && (hop.interface == PODS || hop.interface == VETH));
}

int world_is_cluster_ip(const __u8 address[16])
{
	__u8 own[16];

	address_of(cluster_ip[!address_is_v4(address)], own);
	return !memcmp(own, address, 16);
}

__u64 world_counter(__u32 index)
{
	__u64 value;

	memcpy(&value, map_lookup(counters, &index), sizeof(value));
	return value;
}
