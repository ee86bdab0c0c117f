// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * Who talks to whom, as the packets that came out tell: each connection of a client to a Service, the backend that it was
 * given, and the ends that the backend sees. Every other packet that is rewritten has to belong to one of them.
 */
#include <arpa/inet.h>
#include <stdio.h>
#include <string.h>
#include <linux/pkt_cls.h>
#include "../../bpf/abi.h"
#include "oracle.h"

enum {
	CONVERSATIONS = 4 * STEPS,
	MAPPINGS = 6,
	/* Where a packet is met. */
	MET_WIRE = 1,
	MET_POD = 2,
	MET_IN = MET_WIRE | MET_POD,
	MET_OUT = 4,
};

/* What becomes of it. */
enum fate {
	FATE_PASSED,
	FATE_SENT, /* by its route */
	FATE_SENT_BACK,
	FATE_LEAVES, /* as it was to, or by its route */
};

struct conversation {
	struct pair request; /* the client to the Service */
	struct pair seen; /* what the backend sees */
	enum conduct conduct;
	__u32 interface; /* where the client's packets come in */
	int is_handed; /* a request went into the stack, to leave with another source */
	/* Another has its client's port, or its place towards the backend. What was handed to the stack for it meanwhile
	 * is still known on its way out. */
	int is_former;
};

/* One way of a packet: where it is met, from what it becomes what. */
struct mapping {
	int met;
	enum fate fate;
	struct pair from, to;
	int is_handed; /* the second half of what the stack was handed */
};

/* The first piece of a datagram, with its ports. */
struct first_piece {
	struct pair pair;
	__u32 id;
};

/* What happened to whom, so that libFuzzer looks for all of it, though it may be no new way through the programs. */
enum reached {
	REACHED_WHOLE,
	REACHED_PIECE,
	REACHED_ERROR,
	REACHED_EXPECTED, /* a packet that had to be translated */
	REACHED_MAX,
};

__attribute__((section("__libfuzzer_extra_counters"), used)) static __u8 reached[CONDUCTS][MAPPINGS][REACHED_MAX];

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

/* Its requests come first, then its answers. Answers how many. */
static int list_mappings(const struct conversation *known, struct mapping list[MAPPINGS])
{
	struct pair half = half_request(known), half_back = pair_reversed(&half), answer = pair_reversed(&known->seen);
	struct pair back = pair_reversed(&known->request);
	struct mapping halves[4] = {
		{MET_IN, FATE_PASSED, known->request, half, 0},
		{MET_IN, FATE_PASSED, answer, half_back, 0},
		{MET_OUT, FATE_PASSED, half, known->seen, 1},
		{MET_OUT, FATE_PASSED, half_back, back, 1},
	};

	switch (known->conduct) {
	case CONDUCT_STACK:
		list[0] = (struct mapping){MET_IN, FATE_PASSED, known->request, known->seen, 0};
		list[1] = (struct mapping){MET_OUT, FATE_LEAVES, answer, back, 0};
		return 2;
	case CONDUCT_BACK:
		list[0] = (struct mapping){MET_POD, FATE_SENT_BACK, known->request, known->seen, 0};
		list[1] = (struct mapping){MET_POD, FATE_SENT_BACK, answer, back, 0};
		return 2;
	case CONDUCT_ROUTED:
		list[0] = (struct mapping){MET_WIRE, FATE_SENT, known->request, known->seen, 0};
		list[1] = (struct mapping){MET_WIRE, FATE_SENT, answer, back, 0};
		memcpy(list + 2, halves, sizeof(halves));
		list[2].met = list[3].met = MET_WIRE;
		return 6;
	default:
		memcpy(list, halves, sizeof(halves));
	}
	return 4;
}

/* `ports`: the packet has them; a later piece of a datagram has none. */
static int is_pair(const struct pair *known, const struct pair *seen, int ports)
{
	if (ports)
		return pair_equal(known, seen);
	return known->protocol == seen->protocol && !memcmp(known->from.address, seen->from.address, 16) &&
	       !memcmp(known->to.address, seen->to.address, 16);
}

int is_sent_back(const struct step *step)
{
	return step->effects.action == TC_ACT_REDIRECT && step->program == IN_POD;
}

static int is_met(const struct mapping *mapping, const struct step *step)
{
	if (step->program >= OUT_ETHERNET)
		return mapping->met & MET_OUT;
	return mapping->met & (step->program == IN_POD ? MET_POD : MET_WIRE);
}

static int is_fate(enum fate fate, const struct step *step)
{
	if (step->effects.action != TC_ACT_REDIRECT)
		return fate == FATE_PASSED || fate == FATE_LEAVES;
	if (is_sent_back(step))
		return fate == FATE_SENT_BACK;
	return fate == FATE_SENT || fate == FATE_LEAVES;
}

static void note_reached(const struct step *step, struct conversation *known, int mapping)
{
	enum reached what = REACHED_WHOLE;

	if (step->before.shape == SHAPE_ERROR)
		what = REACHED_ERROR;
	else if (step->before.shape != SHAPE_WHOLE)
		what = REACHED_PIECE;
	reached[known->conduct][mapping][what] = 1;
	if (known->conduct == CONDUCT_HALVES && !mapping && what == REACHED_WHOLE)
		known->is_handed = 1;
}

/* `from_ports`, `to_ports`: whether these pairs have them. */
static struct conversation *find_mapping(const struct step *step, const struct pair *from, const struct pair *to,
					 int from_ports, int to_ports, struct mapping *found)
{
	for (int i = count - 1; i >= 0; i--) {
		struct mapping list[MAPPINGS];
		int length = list_mappings(&conversations[i], list);

		for (int m = 0; m < length; m++) {
			if (conversations[i].is_former || !is_met(&list[m], step) || !is_fate(list[m].fate, step) ||
			    !is_pair(&list[m].from, from, from_ports) || !is_pair(&list[m].to, to, to_ports))
				continue;
			*found = list[m];
			note_reached(step, &conversations[i], m);
			return &conversations[i];
		}
	}
	return NULL;
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
		int length = list_mappings(&conversations[i], list);

		for (int m = 0; m < length; m++)
			if (is_pair(&list[m].from, &asked, ports))
				return 1;
	}
	return 0;
}

static struct conversation *note(const struct step *step, const struct pair *seen)
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
		.conduct = choice_conduct(step, seen),
		.interface = step->in.interface,
	};
	return &conversations[count - 1];
}

static void print_pair(const struct pair *pair)
{
	const struct end *ends[2] = {&pair->from, &pair->to};
	char text[INET6_ADDRSTRLEN];

	for (int i = 0; i < 2; i++) {
		inet_ntop(AF_INET6, ends[i]->address, text, sizeof(text));
		fprintf(stderr, " [%s]:%u", text, ntohs(ends[i]->port));
	}
}

void flows_print(void)
{
	for (int i = 0; i < count; i++) {
		fprintf(stderr, "connection by %u, conduct %u%s:", conversations[i].interface, conversations[i].conduct,
			conversations[i].is_former ? ", former" : "");
		print_pair(&conversations[i].request);
		fputs(" ->", stderr);
		print_pair(&conversations[i].seen);
		fputc('\n', stderr);
	}
}

static int has_begun(void)
{
	return counted(COUNTER_FLOW_LOCAL) || counted(COUNTER_FLOW_REMOTE) || counted(COUNTER_FLOW_POD);
}

/* What the packet became may be half of what the backend will see: the row has all of it. */
static void begin(const struct step *step, int is_rewritten)
{
	struct pair seen;

	if (table_find(&step->before.pair, &seen)) {
		check_choice(step, &seen);
		note(step, &seen);
		return;
	}
	if (!counted(COUNTER_FLOW_PUSHED_OUT))
		fail(step, "a flow that is counted and not there");
	/* It is the very one that it pushes out: it began before with the same ends, in the same second. But its packet may
	 * be in the stack. */
	if (!is_rewritten)
		return;
	seen = step->after.pair;
	choice_complete(step, &seen);
	check_choice(step, &seen);
	note(step, &seen)->is_former = 1;
}

/* Back to the pod, by the device that it came in by. */
static void check_way_back(const struct step *step)
{
	if (step->effects.redirect_is_neigh || step->effects.redirect != step->in.interface)
		fail(step, "sent back by another way");
}

/* Sent on: by the way that its new destination has. */
static void check_way(const struct step *step)
{
	struct hop hop = route_of(step->after.pair.to.address);
	const struct bpf_redir_neigh *next = &step->effects.next;
	__u8 address[16] = {};

	if (is_sent_back(step)) {
		check_way_back(step);
		return;
	}
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
static void follow_piece(const struct step *step)
{
	struct pair from = step->before.pair;
	struct mapping found;

	for (int i = 0; i < piece_count; i++) {
		if (pieces[i].id != step->before.id || !is_pair(&pieces[i].pair, &step->before.pair, 0))
			continue;
		from = pieces[i].pair;
		if (find_mapping(step, &from, &step->after.pair, 1, 0, &found))
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

/* A reply leaves by the device that its client's packets come in by; else by the route to the client. */
static void check_way_out(const struct step *step, const struct conversation *known, const struct mapping *mapping)
{
	const __u8 *client = known->request.from.address;
	struct hop hop = route_of(client);

	if (mapping->fate != FATE_LEAVES)
		return;
	if (step->effects.action == TC_ACT_REDIRECT) {
		/* A pod that came back to itself by the wire is reached by its route. */
		if (step->in.interface == known->interface && memcmp(client, known->seen.to.address, 16))
			fail(step, "a reply is taken from its client's device");
		return;
	}
	if (step->in.interface == known->interface || !node.forwarding || step->before.total > 1380 ||
	    step->in.gso_size || is_odd_address(client) || hop.way != WAY_FOUND)
		return;
	if (hop.interface != step->in.interface)
		fail(step, "a reply leaves by another device than its client's");
}

void flows_follow(const struct step *step)
{
	const struct conversation *known;
	struct mapping found;

	if (step->effects.action == TC_ACT_REDIRECT) {
		check_way(step);
		if (step->before.has_options && step->program < OUT_ETHERNET)
			check_options(step);
	}
	if (step->before.shape == SHAPE_PIECE) {
		follow_piece(step);
		return;
	}
	if (has_begun())
		begin(step, 1);
	known = find_mapping(step, &step->before.pair, &step->after.pair, 1, 1, &found);
	if (known)
		check_way_out(step, known, &found);
	else if (!counted(COUNTER_FLOW_PUSHED_OUT))
		fail(step, "rewritten, and of no connection with a Service");
}

/* A flow may begin with a packet that cannot go on: it is at the end of its hops, or too big. */
void flows_follow_dropped(const struct step *step)
{
	if (has_begun())
		begin(step, 0);
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
	if (!find_mapping(step, &from, &to, 1, 1, &found))
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

	if (known_socket_count || map_next(outgoing, NULL, &value) || (service && service->owner != service))
		return 0;
	return step->program == IN_POD || (node.forwarding && step->before.total <= 1380 && !is_odd_source(step) &&
					   route_of(step->before.pair.from.address).interface == UPLINK);
}

static int offered(const struct service *service, int from_pod)
{
	int number = 0;

	for (int i = 0; i < service->count; i++)
		number += world_offers(service, i, from_pod);
	return number;
}

/* Which the backend would not be looked at for. */
static int is_source_strange(const struct step *step)
{
	return counted(COUNTER_DROPPED_SNAT_SOURCE) && world.tunnel_is_strange && step->program != IN_POD;
}

static void expect_request(const struct step *step, const struct service *service)
{
	int special = service->kind == KIND_SPECIAL ? (int)world.special : -1, from_pod = step->program == IN_POD;

	if (!world_allows(service, &step->before.pair.to, step->before.pair.from.address)) {
		if (!counted(COUNTER_DROPPED_SOURCE_RANGE))
			fail(step, "a client outside the ranges is not turned away");
		return;
	}
	if (!offered(service, from_pod)) {
		if (!counted(special == SPECIAL_DROP ? COUNTER_DROPPED_NO_LOCAL_ENDPOINT : COUNTER_REFUSED_NO_ENDPOINT))
			fail(step, "a Service without endpoints is not refused");
		return;
	}
	if (special == SPECIAL_NO_BACKEND && !counted(COUNTER_FAILED_BACKEND_MISSING))
		fail(step, "a missing backend is not counted");
	if (special == SPECIAL_NO_ROUTE && !from_pod && !counted(COUNTER_DROPPED_NO_ROUTE))
		fail(step, "a backend without a route is not counted");
	if ((special == SPECIAL_NO_ROUTE && !from_pod) || special == SPECIAL_NO_BACKEND)
		return;
	if (special == SPECIAL_OTHER_PORT && service->protocol == PROTO_SCTP) {
		if (!counted(COUNTER_DROPPED_SCTP_PORT))
			fail(step, "SCTP to another port is not dropped");
		return;
	}
	if (is_same(step) && !counted(COUNTER_DROPPED_SNAT_EXHAUSTED) && !is_source_strange(step))
		fail(step, "a request that is not served");
}

static int is_in_table(const struct conversation *known)
{
	struct pair becomes;

	return table_find(&known->request, &becomes) && pair_equal(&becomes, &known->seen);
}

/* The answer to what a client was given comes back, if the table has it so. 0: the packet is none. */
static int expect_answer(const struct step *step)
{
	for (int i = 0; i < count; i++) {
		struct mapping list[MAPPINGS];
		struct pair request = conversations[i].request;
		int length = list_mappings(&conversations[i], list), which = 1;

		/* A backend that is the node itself sees its client, and answers it. */
		if (conversations[i].is_handed && pair_equal(&list[length - 1].from, &step->before.pair))
			which = length - 1;
		else if (!pair_equal(&list[1].from, &step->before.pair))
			continue;
		if (conversations[i].is_former)
			continue;
		if (!is_met(&list[which], step) || !node.forwarding ||
		    route_of(request.from.address).way != WAY_FOUND || step->before.total > 1380 ||
		    !(which == 1 ? table_wants_answer(&request, &step->before) : is_in_table(&conversations[i])))
			return 1;
		if (is_same(step))
			fail(step, "an answer that does not come back");
		reached[conversations[i].conduct][which][REACHED_EXPECTED] = 1;
		return 1;
	}
	return 0;
}

/* A client's first packet is served; the backend's answer to it comes back. */
void flows_expect(const struct step *step)
{
	const struct service *service = service_asked(step);

	if (counted(COUNTER_DROPPED_POD_QUOTA) || expect_answer(step) || step->program >= OUT_ETHERNET ||
	    flows_know(step) || !is_plain(step, service))
		return;
	if (step->before.pair.protocol == PROTO_TCP && step->before.flags != FLAG_SYN)
		return;
	if (service)
		expect_request(step, service);
	else if (step->program == IN_POD && world_is_cluster_ip(step->before.pair.to.address) &&
		 !counted(COUNTER_REFUSED_UNKNOWN_PORT))
		fail(step, "a port that no Service has is not refused");
}
