// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * Who talks to whom, as the packets that came out tell: each connection of a client to a Service, the backend that it was
 * given, and the ends that the backend sees. Every other packet that is rewritten has to belong to one of them.
 */
#include <string.h>
#include <linux/pkt_cls.h>
#include "../../bpf/abi.h"
#include "oracle.h"

enum {
	CONVERSATIONS = 4 * STEPS,
	MAPPINGS = 5,
	DIRECTION_IN = 0,
	DIRECTION_OUT = 1,
};

struct conversation {
	struct pair request; /* the client to the Service */
	struct pair seen; /* what the backend sees */
	int routed;
	/* Another has its client's port, or its place towards the backend. What was handed to the stack for it meanwhile
	 * is still known on its way out. */
	int is_former;
};

/* One way of a packet: where it is met, from what it becomes what. */
struct mapping {
	int direction;
	struct pair from, to;
};

static struct conversation conversations[CONVERSATIONS];
static int count;

void flows_reset(void)
{
	count = 0;
}

/* Through the host's stack a packet gets its destination first, and its source when it leaves. */
static struct pair half_request(const struct conversation *known)
{
	struct pair half = known->seen;

	memcpy(half.from.address, known->request.from.address, 16);
	return half;
}

static void list_mappings(const struct conversation *known, struct mapping list[MAPPINGS], int *length)
{
	struct pair half = half_request(known), back = pair_reversed(&known->request);

	list[0] = (struct mapping){DIRECTION_IN, known->request, known->seen};
	list[1] = (struct mapping){known->routed ? DIRECTION_IN : DIRECTION_OUT, pair_reversed(&known->seen), back};
	*length = 2;
	if (!known->routed)
		return;
	list[2] = (struct mapping){DIRECTION_IN, known->request, half};
	list[3] = (struct mapping){DIRECTION_OUT, half, known->seen};
	list[4] = (struct mapping){DIRECTION_OUT, pair_reversed(&half), back};
	*length = 5;
}

/* Replies that go through the stack become the half of what the client asked for. */
static int is_half_reply(const struct conversation *known, const struct pair *from, const struct pair *to)
{
	struct pair half = half_request(known), reply = pair_reversed(&known->seen);
	struct pair expected = pair_reversed(&half);

	return known->routed && pair_equal(from, &reply) && pair_equal(to, &expected);
}

/* `ports`: the packet has them; a later piece of a datagram has none. */
static int is_pair(const struct pair *known, const struct pair *seen, int ports)
{
	if (ports)
		return pair_equal(known, seen);
	return known->protocol == seen->protocol && !memcmp(known->from.address, seen->from.address, 16) &&
	       !memcmp(known->to.address, seen->to.address, 16);
}

static struct conversation *find_mapping(int direction, const struct pair *from, const struct pair *to, int ports,
					 struct mapping *found)
{
	for (int i = count - 1; i >= 0; i--) {
		struct mapping list[MAPPINGS];
		int length;

		list_mappings(&conversations[i], list, &length);
		for (int m = conversations[i].is_former ? 3 : 0; m < length; m++) {
			if (list[m].direction != direction || !is_pair(&list[m].from, from, ports) ||
			    !is_pair(&list[m].to, to, ports))
				continue;
			*found = list[m];
			return &conversations[i];
		}
		if (direction == DIRECTION_IN && ports && !conversations[i].is_former &&
		    is_half_reply(&conversations[i], from, to)) {
			*found = (struct mapping){direction, *from, *to};
			return &conversations[i];
		}
	}
	return NULL;
}

static int direction_of(const struct step *step)
{
	return step->program >= OUT_ETHERNET ? DIRECTION_OUT : DIRECTION_IN;
}

int flows_know(const struct step *step)
{
	struct view quoted = inet_read(step->in.bytes, step->in.length, step->before.l4 + 8, step->before.is_ip6, 1);
	struct pair asked = step->before.pair;
	int ports = step->before.shape != SHAPE_PIECE;

	if (step->before.shape == SHAPE_ERROR)
		asked = pair_reversed(&quoted.pair);
	for (int i = 0; i < count; i++) {
		struct mapping list[MAPPINGS];
		int length;

		list_mappings(&conversations[i], list, &length);
		for (int m = 0; m < length; m++)
			if (is_pair(&list[m].from, &asked, ports))
				return 1;
	}
	return 0;
}

static int is_backend_of(const struct service *service, const struct end *end)
{
	for (int i = 0; i < service->count; i++)
		if (!service->backends[i].gone && end_equal(&service->backends[i].end, end))
			return 1;
	return 0;
}

static int is_private_port(__be16 port)
{
	__u16 first = world.snat_first, number = port >> 8 | port << 8;

	return number >= first && number < first + world.snat_ports;
}

/* A backend elsewhere sees this node, as its own routes would name it, and a port of the private range. */
static void check_seen_elsewhere(const struct step *step, const struct pair *after, int through_stack)
{
	struct hop hop = route_of(after->to.address);

	if (!through_stack && memcmp(after->from.address, hop.source, 16))
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
static int is_odd_source(const struct step *step)
{
	const __u8 *source = step->before.pair.from.address, *ip4 = source + 12;
	static const __u8 none[15];

	if (route_of(source).way == WAY_HERE)
		return 1;
	if (!step->before.is_ip6)
		return !ip4[0] || ip4[0] == 127 || ip4[0] >= 224;
	return source[0] == 0xff || (source[0] == 0xfe && (source[1] & 0xc0) == 0x80) ||
	       (!memcmp(source, none, 15) && source[15] <= 1);
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

/* A backend here sees the client, or, where it is the client itself, the Service. */
static void check_seen_here(const struct step *step, const struct pair *after)
{
	const struct pair *before = &step->before.pair;
	int comes_back = !memcmp(before->from.address, after->to.address, 16);
	const __u8 *expected = comes_back ? before->to.address : before->from.address;

	if (memcmp(after->from.address, expected, 16))
		fail(step, "a backend here sees somebody else as its client");
	if (after->from.port != before->from.port && !is_private_port(after->from.port))
		fail(step, "a source port outside the private range");
	if (after->from.port != before->from.port && before->protocol == PROTO_SCTP)
		fail(step, "SCTP with another source port");
}

static void note(const struct step *step, const struct pair *seen, int routed)
{
	for (int i = 0; i < count; i++)
		if (pair_equal(&conversations[i].request, &step->before.pair) ||
		    pair_equal(&conversations[i].seen, seen))
			conversations[i].is_former = 1;
	if (count == CONVERSATIONS)
		fail(step, "more connections than packets");
	conversations[count++] = (struct conversation){
		.request = step->before.pair,
		.seen = *seen,
		.routed = routed,
	};
}

/* `seen`: what the backend sees, or, through the stack, half of it. */
static void begin(const struct step *step, struct pair seen)
{
	const struct pair *before = &step->before.pair;
	const struct service *service = world_service(&before->to, before->protocol);
	struct hop hop = route_of(seen.to.address);
	int here = world_is_here(seen.to.address), through_stack = 0;

	if (!service || step->program >= OUT_ETHERNET)
		fail(step, "rewritten, and no connection of a Service's client");
	if (!is_backend_of(service, &seen.to))
		fail(step, "sent to what is no backend of the Service");
	if (!world_allows(service, before->from.address))
		fail(step, "served, though it is outside the ranges");
	if (hop.way == WAY_NONE)
		fail(step, "sent where no route leads");
	if (step->before.flags & FLAG_RST && before->protocol == PROTO_TCP)
		fail(step, "a reset begins a flow");
	if (!here && step->effects.action == TC_ACT_UNSPEC)
		through_stack = 1;
	if (here && step->effects.action == TC_ACT_REDIRECT)
		fail(step, "to a backend here, past the host's stack");
	if (here) {
		check_seen_here(step, &seen);
	} else {
		check_source(step);
		check_seen_elsewhere(step, &seen, through_stack);
		memcpy(seen.from.address, hop.source, 16);
	}
	if (table_has_open(before))
		fail(step, "an open connection is given another backend");
	note(step, &seen, !here);
}

/* Sent on: by the way that its new destination has. */
static void check_way(const struct step *step)
{
	struct hop hop = route_of(step->after.pair.to.address);
	const struct bpf_redir_neigh *next = &step->effects.next;
	__u8 address[16] = {};

	if (hop.way != WAY_FOUND || !step->effects.redirect_is_neigh || step->effects.redirect != hop.interface)
		fail(step, "sent on by another way than the route's");
	if (step->before.total > hop.mtu && !step->in.gso_size && step->program < OUT_ETHERNET)
		fail(step, "sent on, and too big for its way");
	if (hop.interface == BARE) {
		if (next->nh_family)
			fail(step, "a neighbour of a device that has none");
		return;
	}
	if (next->nh_family == 2) {
		memset(address + 10, 0xff, 2);
		memcpy(address + 12, &next->ipv4_nh, 4);
	} else {
		memcpy(address, next->ipv6_nh, 16);
	}
	if (memcmp(address, hop.next, 16))
		fail(step, "sent to another neighbour");
}

/* RFC 791: source routes are not forwarded. */
static void check_options(const struct step *step)
{
	const __u8 *options = step->in.bytes + step->before.l3 + 20;
	__u32 length = step->before.l4 - step->before.l3 - 20, at = 0;

	while (at < length && options[at]) {
		if (options[at] == 0x83 || options[at] == 0x89)
			fail(step, "a source route is sent on");
		if (options[at] == 1) {
			at++;
			continue;
		}
		if (at + 1 >= length || options[at + 1] < 2 || at + options[at + 1] > length)
			fail(step, "broken options are sent on");
		at += options[at + 1];
	}
}

void flows_follow(const struct step *step)
{
	int ports = step->before.shape != SHAPE_PIECE, direction = direction_of(step);
	struct mapping found;

	if (step->effects.action == TC_ACT_REDIRECT) {
		check_way(step);
		if (step->before.has_options && direction == DIRECTION_IN)
			check_options(step);
	}
	if (find_mapping(direction, &step->before.pair, &step->after.pair, ports, &found))
		return;
	if (!ports)
		fail(step, "a piece of no datagram that is known");
	begin(step, step->after.pair);
}

/* A flow may begin with a packet that cannot go on: it is at the end of its hops, or too big. */
void flows_follow_dropped(const struct step *step)
{
	struct pair seen;

	/* It may be the very one that it pushes out, if it began before with the same ends and in the same second. */
	if ((!counted(COUNTER_FLOW_LOCAL) && !counted(COUNTER_FLOW_REMOTE)) || counted(COUNTER_FLOW_PUSHED_OUT))
		return;
	if (!table_find(&step->before.pair, &seen))
		fail(step, "a flow that is counted and not there");
	begin(step, seen);
}

void flows_follow_error(const struct step *step)
{
	__u32 before_l3 = step->before.l4 + 8, after_l3 = step->after.l4 + 8;
	struct view before = inet_read(step->in.bytes, step->in.length, before_l3, step->before.is_ip6, 1);
	struct view after = inet_read(step->out.bytes, step->out.length, after_l3, step->after.is_ip6, 1);
	struct pair from = pair_reversed(&before.pair), to = pair_reversed(&after.pair);
	struct mapping found;

	if (counted(COUNTER_ICMP_TRANSLATED) != 1)
		fail(step, "an error that is translated and not counted");
	if (step->effects.action == TC_ACT_REDIRECT)
		check_way(step);
	if (!find_mapping(direction_of(step), &from, &to, 1, &found))
		fail(step, "an error about nobody's packet");
	if (memcmp(step->before.pair.to.address, before.pair.from.address, 16))
		fail(step, "an error to somebody who did not send what it quotes");
	if (memcmp(step->after.pair.to.address, to.to.address, 16))
		fail(step, "an error that goes elsewhere than the flow");
	if (memcmp(step->after.pair.from.address, to.from.address, 16) &&
	    memcmp(step->after.pair.from.address, step->before.pair.from.address, 16))
		fail(step, "an error by somebody else");
}

static int is_same(const struct step *step)
{
	return step->in.length == step->out.length && !memcmp(step->in.bytes, step->out.bytes, step->in.length);
}

/* Nothing of the world is in the way of a client of this Service. */
static int is_plain(const struct step *step, const struct service *service)
{
	struct native_map *outgoing = map_named("outgoing");
	const void *value;

	return node.forwarding && !known_socket_count && !map_next(outgoing, NULL, &value) && !service->moved &&
	       step->before.total <= 1380 && !is_odd_source(step) &&
	       route_of(step->before.pair.from.address).interface == UPLINK;
}

static int living(const struct service *service)
{
	int number = 0;

	for (int i = 0; i < service->count; i++)
		number += !service->backends[i].gone;
	return number;
}

static void expect_request(const struct step *step, const struct service *service)
{
	int special = service->kind == KIND_SPECIAL ? (int)world.special : -1;

	if (!world_allows(service, step->before.pair.from.address)) {
		if (!counted(COUNTER_DROPPED_SOURCE_RANGE))
			fail(step, "a client outside the ranges is not turned away");
		return;
	}
	if (!living(service)) {
		if (!counted(special == SPECIAL_DROP ? COUNTER_DROPPED_NO_LOCAL_ENDPOINT : COUNTER_REFUSED_NO_ENDPOINT))
			fail(step, "a Service without endpoints is not refused");
		return;
	}
	if (special == SPECIAL_NO_ROUTE && !counted(COUNTER_DROPPED_NO_ROUTE))
		fail(step, "a backend without a route is not counted");
	if (special == SPECIAL_NO_BACKEND && !counted(COUNTER_FAILED_BACKEND_MISSING))
		fail(step, "a missing backend is not counted");
	if (special == SPECIAL_NO_ROUTE || special == SPECIAL_NO_BACKEND)
		return;
	if (special == SPECIAL_OTHER_PORT && service->protocol == PROTO_SCTP) {
		if (!counted(COUNTER_DROPPED_SCTP_PORT))
			fail(step, "SCTP to another port is not dropped");
		return;
	}
	if (is_same(step) && !counted(COUNTER_DROPPED_SNAT_EXHAUSTED))
		fail(step, "a request that is not served");
}

/* A client's first packet is served; the backend's answer to it comes back. */
void flows_expect(const struct step *step)
{
	const struct service *service = world_service(&step->before.pair.to, step->before.pair.protocol);
	struct pair request;
	struct mapping list[MAPPINGS];
	int length;

	for (int i = 0; i < count; i++) {
		list_mappings(&conversations[i], list, &length);
		request = conversations[i].request;
		if (conversations[i].is_former || !pair_equal(&list[1].from, &step->before.pair))
			continue;
		if (list[1].direction == direction_of(step) && node.forwarding &&
		    route_of(request.from.address).way == WAY_FOUND && step->before.total <= 1380 &&
		    table_has_open(&request) && is_same(step))
			fail(step, "an answer that does not come back");
		return;
	}
	if (!service || step->program >= OUT_ETHERNET || flows_know(step) || !is_plain(step, service))
		return;
	if (step->before.pair.protocol == PROTO_TCP && step->before.flags != FLAG_SYN)
		return;
	expect_request(step, service);
}
