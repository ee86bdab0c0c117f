// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Whether a flow that begins may begin, and gets what its Service promises. */
#include <string.h>
#include <linux/pkt_cls.h>
#include "../../bpf/abi.h"
#include "oracle.h"

enum {
	REMEMBERED = 4 * STEPS,
	EXTENSIONS_FOLLOWED = 5, /* headers of IPv6 that the programs look behind */
};

/* Whom a Service has given a client that it remembers. */
struct remembered {
	const struct service *service;
	__u8 client[16];
	struct end backend;
	__u64 when_ns;
	int from_pod;
	int is_mixed; /* it came both from outside and from a pod, whose pools differ: either backend may be remembered */
};

static struct remembered affinities[REMEMBERED];
/* Answers to what has left the node. */
static struct pair own[STEPS];
static int affinity_count, own_count;

void choice_reset(void)
{
	affinity_count = own_count = 0;
}

static int is_backend_of(const struct service *service, const struct end *end, int from_pod)
{
	for (int i = 0; i < service->count; i++)
		if (world_offers(service, i, from_pod) && end_equal(&service->backends[i].end, end))
			return 1;
	return 0;
}

static int is_private_port(__be16 port)
{
	__u16 first = world.snat_first, number = port >> 8 | port << 8;

	return number >= first && number < first + world.snat_ports;
}

/* What is left above the ports that Linux gives connections of its own. */
static int is_moved_port(__be16 port)
{
	return (__u16)(port >> 8 | port << 8) >= 61000;
}

/* A backend elsewhere sees this node, as its own routes would name it, and a port of the private range. */
static void check_seen_elsewhere(const struct step *step, const struct pair *after)
{
	struct hop hop = route_of(after->to.address);

	if (memcmp(after->from.address, hop.source, 16))
		fail(step, "a backend elsewhere sees a source that is not the route's");
	if (after->protocol == PROTO_SCTP) {
		if (after->from.port != step->before.pair.from.port || after->to.port != step->before.pair.to.port)
			fail(step, "SCTP with other ports");
		return;
	}
	if (!is_private_port(after->from.port))
		fail(step, "a source port outside the private range");
}

/* RFC 1812 5.3.7, RFC 4291: what no single host has, or may send with through a router; and what is the node's own. */
int is_odd_address(const __u8 address[16])
{
	static const __u8 none[15];

	if (route_of(address).way == WAY_HERE)
		return 1;
	if (address_is_v4(address))
		return !address[12] || address[12] == 127 || address[12] >= 224;
	return address[0] == 0xff || (address[0] == 0xfe && (address[1] & 0xc0) == 0x80) ||
	       (!memcmp(address, none, 15) && address[15] <= 1);
}

int is_odd_source(const struct step *step)
{
	return is_odd_address(step->before.pair.from.address);
}

/* What the host's stack would not forward. */
static void check_source(const struct step *step)
{
	struct hop back = route_of(step->before.pair.from.address);

	if (is_odd_source(step))
		fail(step, "a source that cannot be is sent on");
	if (!world.rp_filter || step->before.is_ip6 || step->in.interface != UPLINK)
		return;
	if (back.way != WAY_FOUND || (world.rp_filter == 1 && back.interface != UPLINK))
		fail(step, "a source that fails rp_filter is sent on");
}

/* Who is not to be seen has the node's address, that of the device, and a port of the private range. */
static void check_seen_hidden(const struct step *step, const struct pair *after, const __u8 *address)
{
	const struct pair *before = &step->before.pair;

	if (memcmp(after->from.address, address, 16))
		fail(step, "a backend sees another address than the node's");
	if (before->protocol == PROTO_SCTP ? after->from.port != before->from.port : !is_private_port(after->from.port))
		fail(step, "a hidden client with a port of others");
}

/* A pod that asks for itself sees the node, or where that has no address there, the Service. */
static void check_seen_itself(const struct step *step, const struct pair *after)
{
	__u8 own[16];

	if (!world_own_address(step->in.interface, step->before.is_ip6, own))
		memcpy(own, step->before.pair.to.address, 16);
	check_seen_hidden(step, after, own);
}

/* A backend here, and any of a pod's, sees the client, or, where it is the client itself, the Service. */
static void check_seen_here(const struct step *step, const struct pair *after)
{
	const struct pair *before = &step->before.pair;
	int comes_back = !memcmp(before->from.address, after->to.address, 16);
	const __u8 *expected = comes_back ? before->to.address : before->from.address;

	if (memcmp(after->from.address, expected, 16))
		fail(step, "a backend here sees somebody else as its client");
	if (after->from.port != before->from.port && !is_private_port(after->from.port) &&
	    !(before->protocol == PROTO_UDP && is_moved_port(after->from.port) && step->program != IN_POD))
		fail(step, "a source port outside the private range");
	if (after->from.port != before->from.port && before->protocol == PROTO_SCTP)
		fail(step, "SCTP with another source port");
}

/* Where a call failed no flow may have begun, and its client be remembered with the backend that it would have had. */
void choice_forget(const struct step *step)
{
	for (int i = 0; i < affinity_count; i++)
		if (!memcmp(affinities[i].client, step->before.pair.from.address, 16))
			affinities[i].when_ns = 0;
}

/* With session affinity a client has the same backend for three hours, as long as it is there. */
static void check_affinity(const struct step *step, const struct service *service, const struct end *backend)
{
	const __u8 *client = step->before.pair.from.address;
	struct remembered *known = affinities;
	int from_pod = step->program == IN_POD;

	if (!service->affine || service->owner != service)
		return;
	while (known < affinities + affinity_count && (known->service != service || memcmp(known->client, client, 16)))
		known++;
	if (known == affinities + affinity_count)
		affinities[affinity_count++] = (struct remembered){.from_pod = from_pod};
	else if (known->from_pod != from_pod && world.inside_local != world.outside_local)
		known->is_mixed = 1;
	if (!known->is_mixed && known->when_ns && node.now_ns - known->when_ns < 10000000000000ULL &&
	    is_backend_of(service, &known->backend, from_pod) && !end_equal(&known->backend, backend) &&
	    !step->effects.failures)
		fail(step, "a client that is remembered is given another backend");
	known->service = service;
	known->backend = *backend;
	known->when_ns = node.now_ns;
	memcpy(known->client, client, 16);
}

/* An answer to a connection of the node's own, or of a masqueraded pod: it begins no flow, unless it is a SYN. */
static void check_owner(const struct step *step)
{
	const struct pair *pair = &step->before.pair;
	const __u8 both = FLAG_SYN | FLAG_ACK;

	if (pair->protocol == PROTO_TCP && (step->before.flags & both) == FLAG_SYN)
		return;
	if (pair->protocol == PROTO_TCP && (step->before.flags & both) == both)
		fail(step, "an answer to a SYN begins a flow");
	for (int i = 0; i < own_count; i++)
		if (pair_equal(&own[i], pair))
			fail(step, "an answer to what left the node begins a flow");
	for (int i = 0; i < known_socket_count; i++) {
		const struct known_socket *socket = &known_sockets[i];

		if (socket->connected && socket->protocol == pair->protocol && socket->local_port == pair->to.port &&
		    socket->remote_port == pair->from.port && !memcmp(socket->local, pair->to.address, 16) &&
		    !memcmp(socket->remote, pair->from.address, 16))
			fail(step, "a packet of the node's own socket begins a flow");
	}
}

/* What leaves from a served end and is no reply; not what was only forwarded, or lies behind more headers than are
 * followed. */
void choice_note_own(const struct step *step)
{
	const struct view *view = &step->before;

	if (step->program < OUT_ETHERNET || step->effects.failures || step->in.from != 0 || step->in.vlan_present ||
	    view->extensions > EXTENSIONS_FOLLOWED || view->shape != SHAPE_WHOLE ||
	    world_is_cluster_ip(view->pair.from.address) || !world_service(&view->pair.from, view->pair.protocol, 0))
		return;
	for (int i = 0; i < own_count; i++) {
		struct pair known = pair_reversed(&own[i]);

		if (pair_equal(&known, &view->pair))
			return;
	}
	own[own_count++] = pair_reversed(&view->pair);
}

/* The stack leads pods' packets to their backends, wherever these are. */
enum conduct choice_conduct(const struct step *step, const struct pair *seen)
{
	int from_pod = step->program == IN_POD;
	__u8 own[16];

	if (from_pod && !memcmp(seen->to.address, step->before.pair.from.address, 16))
		return CONDUCT_BACK;
	if (!from_pod && !world_is_here(seen->to.address))
		return CONDUCT_ROUTED;
	/* A node that forwards nothing is asked by its own sockets only, which see the client anyhow. */
	if (!world.hides || (!from_pod && !node.forwarding))
		return CONDUCT_STACK;
	return world_own_address(step->in.interface, step->before.is_ip6, own) ? CONDUCT_HALVES : CONDUCT_STACK;
}

void choice_complete(const struct step *step, struct pair *half)
{
	enum conduct conduct = choice_conduct(step, half);
	struct hop hop = route_of(half->to.address);

	if (step->effects.action == TC_ACT_REDIRECT)
		return;
	if (conduct == CONDUCT_ROUTED)
		memcpy(half->from.address, hop.source, 16);
	else if (conduct == CONDUCT_HALVES)
		world_own_address(step->in.interface, step->before.is_ip6, half->from.address);
}

static void check_way_of_backend(const struct step *step, const struct pair *seen)
{
	__u8 own[16];

	if (step->program != IN_POD && route_of(seen->to.address).way == WAY_NONE)
		fail(step, "sent where no route leads");
	switch (choice_conduct(step, seen)) {
	case CONDUCT_BACK:
		check_seen_itself(step, seen);
		return;
	case CONDUCT_ROUTED:
		check_source(step);
		check_seen_elsewhere(step, seen);
		return;
	case CONDUCT_HALVES:
		world_own_address(step->in.interface, step->before.is_ip6, own);
		check_seen_hidden(step, seen, own);
		return;
	default:
		check_seen_here(step, seen);
	}
}

void check_choice(const struct step *step, const struct pair *seen)
{
	const struct pair *before = &step->before.pair;
	const struct service *service = service_asked(step);

	if (!service || step->program >= OUT_ETHERNET)
		fail(step, "rewritten, and no connection of a Service's client");
	if (step->program == IN_POD && !world_is_for_node(&step->in))
		fail(step, "a frame for another gateway begins a flow");
	if (!is_backend_of(service, &seen->to, step->program == IN_POD))
		fail(step, "sent to what is no backend of the Service");
	if (!world_allows(service, &before->to, before->from.address))
		fail(step, "served, though it is outside the ranges");
	if (step->before.flags & FLAG_RST && before->protocol == PROTO_TCP)
		fail(step, "a reset begins a flow");
	check_way_of_backend(step, seen);
	if (table_has_open(before))
		fail(step, "an open connection is given another backend");
	if (!(step->before.flags & FLAG_SYN) && table_keeps(before))
		fail(step, "a packet in mid-flow is given another backend");
	check_owner(step);
	check_affinity(step, service, &seen->to);
}
