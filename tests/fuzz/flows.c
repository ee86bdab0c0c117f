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

/* The first piece of a datagram, with its ports. */
struct first_piece {
	struct pair pair;
	__u32 id;
};

static struct conversation conversations[CONVERSATIONS];
static struct first_piece pieces[STEPS];
static int count, piece_count;

void flows_reset(void)
{
	count = piece_count = 0;
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

/* `ports`: the packet has them; a later piece of a datagram has none. */
static int is_pair(const struct pair *known, const struct pair *seen, int ports)
{
	if (ports)
		return pair_equal(known, seen);
	return known->protocol == seen->protocol && !memcmp(known->from.address, seen->from.address, 16) &&
	       !memcmp(known->to.address, seen->to.address, 16);
}

/* Replies that go through the stack become the half of what the client asked for. */
static int is_half_reply(const struct conversation *known, const struct pair *from, const struct pair *to, int to_ports)
{
	struct pair half = half_request(known), reply = pair_reversed(&known->seen);
	struct pair expected = pair_reversed(&half);

	return known->routed && pair_equal(from, &reply) && is_pair(&expected, to, to_ports);
}

/* `from_ports`, `to_ports`: whether these pairs have them. */
static struct conversation *find_mapping(int direction, const struct pair *from, const struct pair *to, int from_ports,
					 int to_ports, struct mapping *found)
{
	for (int i = count - 1; i >= 0; i--) {
		struct mapping list[MAPPINGS];
		int length;

		list_mappings(&conversations[i], list, &length);
		for (int m = conversations[i].is_former ? 3 : 0; m < length; m++) {
			if (list[m].direction != direction || !is_pair(&list[m].from, from, from_ports) ||
			    !is_pair(&list[m].to, to, to_ports))
				continue;
			*found = list[m];
			return &conversations[i];
		}
		if (direction == DIRECTION_IN && !conversations[i].is_former &&
		    is_half_reply(&conversations[i], from, to, to_ports)) {
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

static int has_begun(void)
{
	return counted(COUNTER_FLOW_LOCAL) || counted(COUNTER_FLOW_REMOTE);
}

/* What the packet became may be half of what the backend will see: the row has all of it. */
static void begin(const struct step *step)
{
	struct pair seen = step->after.pair;

	/* It may be the very one that it pushes out, if it began before with the same ends, in the same second. */
	if (!table_find(&step->before.pair, &seen)) {
		if (!counted(COUNTER_FLOW_PUSHED_OUT))
			fail(step, "a flow that is counted and not there");
		return;
	}
	check_choice(step, &seen);
	note(step, &seen, !world_is_here(seen.to.address));
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

/* A later piece goes where the ports of its first one lead. */
static void follow_piece(const struct step *step, int direction)
{
	struct pair from = step->before.pair;
	struct mapping found;

	for (int i = 0; i < piece_count; i++) {
		if (pieces[i].id != step->before.id || !is_pair(&pieces[i].pair, &step->before.pair, 0))
			continue;
		from = pieces[i].pair;
		if (find_mapping(direction, &from, &step->after.pair, 1, 0, &found))
			return;
	}
	fail(step, "a piece that goes elsewhere than its first one");
}

void flows_note_piece(const struct step *step)
{
	if (step->before.shape != SHAPE_FIRST)
		return;
	for (int i = 0; i < piece_count; i++)
		if (pieces[i].id == step->before.id && pair_equal(&pieces[i].pair, &step->before.pair))
			return;
	pieces[piece_count++] = (struct first_piece){step->before.pair, step->before.id};
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
	if (!ports) {
		follow_piece(step, direction);
		return;
	}
	if (has_begun())
		begin(step);
	if (!find_mapping(direction, &step->before.pair, &step->after.pair, 1, 1, &found) &&
	    !counted(COUNTER_FLOW_PUSHED_OUT))
		fail(step, "rewritten, and of no connection with a Service");
}

/* A flow may begin with a packet that cannot go on: it is at the end of its hops, or too big. */
void flows_follow_dropped(const struct step *step)
{
	if (has_begun())
		begin(step);
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
	if (!find_mapping(direction_of(step), &from, &to, 1, 1, &found))
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
		    table_wants_answer(&request, &step->before) && is_same(step))
			fail(step, "an answer that does not come back");
		return;
	}
	if (!service || step->program >= OUT_ETHERNET || flows_know(step) || !is_plain(step, service))
		return;
	if (step->before.pair.protocol == PROTO_TCP && step->before.flags != FLAG_SYN)
		return;
	expect_request(step, service);
}
