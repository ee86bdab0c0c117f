// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * The table of flows, between packets: two rows for each flow or none, each leading to the other; no row is half removed;
 * the counts are right; and a connection that both ends have proved and nobody has closed stays.
 */
#include <string.h>
#include "../../bpf/abi.h"
#include "oracle.h"

enum {
	FLOWS_MOST = 2 * STEPS,
	UDP_LIMIT = 30, /* seconds of silence, of what is not proved */
	WINDOW = 131072,
};

/* The requests' rows before the packet. */
struct known_flow {
	struct pair request, becomes;
	int is_open; /* proved by both ends, closed by none */
	int is_kept; /* its next request must have the same backend, if it begins no connection */
};

static struct known_flow flows[FLOWS_MOST];
static int flow_count;
static __u64 proved[FLOW_CLASS_MAX], proved_before[FLOW_CLASS_MAX];

static void mapped(__u8 to[16], const void *ip4)
{
	memset(to, 0, 10);
	memset(to + 10, 0xff, 2);
	memcpy(to + 12, ip4, 4);
}

static struct pair pair_of_ends(const struct ends *ends, __u8 protocol)
{
	struct pair pair = {.protocol = protocol};

	memcpy(pair.from.address, &ends->source, 16);
	memcpy(pair.to.address, &ends->destination, 16);
	pair.from.port = ends->source_port;
	pair.to.port = ends->destination_port;
	return pair;
}

static struct pair pair_of_key(const void *key, int is_ip6)
{
	const struct flow_key4 *key4 = key;
	const struct flow_key *key6 = key;
	struct pair pair = {};

	if (is_ip6)
		return pair_of_ends(&key6->ends, key6->protocol);
	mapped(pair.from.address, &key4->source);
	mapped(pair.to.address, &key4->destination);
	pair.from.port = key4->source_port;
	pair.to.port = key4->destination_port;
	pair.protocol = key4->protocol;
	return pair;
}

static const struct flow *flow_of(const struct pair *pair)
{
	struct flow_key key6 = {.protocol = pair->protocol};
	struct flow_key4 key4 = {.protocol = pair->protocol};

	if (address_is_v4(pair->to.address)) {
		memcpy(&key4.source, pair->from.address + 12, 4);
		memcpy(&key4.destination, pair->to.address + 12, 4);
		key4.source_port = pair->from.port;
		key4.destination_port = pair->to.port;
		return map_lookup(map_named("flows4"), &key4);
	}
	memcpy(&key6.ends.source, pair->from.address, 16);
	memcpy(&key6.ends.destination, pair->to.address, 16);
	key6.ends.source_port = pair->from.port;
	key6.ends.destination_port = pair->to.port;
	return map_lookup(map_named("flows6"), &key6);
}

static __u32 idle(const struct flow *flow)
{
	return ((__u32)(node.now_ns / 1000000000) - (flow->state >> FLOW_SECOND_SHIFT)) & FLOW_SECOND_MASK;
}

/* Proved by both ends, closed by none, and in use. UDP follows its Service and its backend, so that only an unchanged
 * world keeps it. */
static int is_open(const struct pair *pair, const struct flow *request)
{
	struct pair becomes = pair_of_ends(&request->ends, pair->protocol), back = pair_reversed(&becomes);
	const struct flow *reply = flow_of(&back);
	__u32 limit = pair->protocol == PROTO_TCP ? 86400 : 120;

	if (!reply || (request->state & FLOW_REPLY) || !(request->state & reply->state & FLOW_PROVED))
		return 0;
	if ((request->state | reply->state) & (FLOW_FIN | FLOW_RESET))
		return 0;
	if (pair->protocol != PROTO_TCP && world.changes)
		return 0;
	return idle(request) <= limit || idle(reply) <= limit;
}

static void each_row(void (*visit)(const struct step *, const struct pair *, const struct flow *),
		     const struct step *step)
{
	static const char *const names[2] = {"flows4", "flows6"};

	for (int i = 0; i < 2; i++) {
		const void *key = NULL, *value;

		while ((key = map_next(map_named(names[i]), key, &value))) {
			struct pair pair = pair_of_key(key, i);

			visit(step, &pair, value);
		}
	}
}

static int is_kept(const struct pair *pair, const struct flow *request, const struct flow *reply)
{
	if (pair->protocol == PROTO_TCP)
		return 1;
	return !world.changes && (idle(request) <= UDP_LIMIT || idle(reply) <= UDP_LIMIT);
}

static const struct flow *partner_of(const struct pair *pair, const struct flow *row)
{
	struct pair becomes = pair_of_ends(&row->ends, pair->protocol), back = pair_reversed(&becomes);

	return flow_of(&back);
}

static void note_flow(const struct step *step, const struct pair *pair, const struct flow *row)
{
	const struct flow *reply = partner_of(pair, row);

	(void)step;
	if (flow_count == FLOWS_MOST || (row->state & FLOW_REPLY) || !reply)
		return;
	flows[flow_count++] = (struct known_flow){
		.request = *pair,
		.becomes = pair_of_ends(&row->ends, pair->protocol),
		.is_open = is_open(pair, row),
		.is_kept = is_kept(pair, row, reply),
	};
}

void table_reset(void)
{
	memset(proved, 0, sizeof(proved));
}

void table_before(void)
{
	flow_count = 0;
	each_row(note_flow, NULL);
}

int table_keeps(const struct pair *pair)
{
	for (int i = 0; i < flow_count; i++)
		if (flows[i].is_kept && pair_equal(&flows[i].request, pair))
			return 1;
	return 0;
}

int table_has_open(const struct pair *pair)
{
	for (int i = 0; i < flow_count; i++)
		if (flows[i].is_open && pair_equal(&flows[i].request, pair))
			return 1;
	return 0;
}

int table_wants_answer(const struct pair *request, const struct view *answer)
{
	const struct flow *row = flow_of(request), *reply = row ? partner_of(request, row) : NULL;
	__u32 beyond;

	if (!reply || ((row->state | reply->state) & (FLOW_FIN | FLOW_RESET)))
		return 0;
	if (answer->pair.protocol != PROTO_TCP || (reply->state & FLOW_PROVED))
		return 1;
	beyond = answer->acknowledgement - row->sequence;
	return answer->flags == (FLAG_SYN | FLAG_ACK) && beyond - 1 < WINDOW;
}

int table_find(const struct pair *pair, struct pair *becomes)
{
	const struct flow *row = flow_of(pair);

	if (row)
		*becomes = pair_of_ends(&row->ends, pair->protocol);
	return !!row;
}

static __u32 change_of(const struct pair *from, const struct pair *to)
{
	return inet_fold((__u64)(__u16)~inet_sum(from->from.address, 16) + (__u16)~inet_sum(from->to.address, 16) +
			 inet_sum(to->from.address, 16) + inet_sum(to->to.address, 16) + (__u16)~from->from.port +
			 (__u16)~from->to.port + to->from.port + to->to.port);
}

/* A flow is proved by a packet of its client's, after the backend has answered; of TCP by one that acknowledges what the
 * backend has said. */
static void check_proof(const struct step *step)
{
	const struct flow *request = flow_of(&step->before.pair), *reply;
	struct pair becomes, back;

	if (proved[FLOW_CLASS_TCP] + proved[FLOW_CLASS_OTHER] <=
	    proved_before[FLOW_CLASS_TCP] + proved_before[FLOW_CLASS_OTHER])
		return;
	if (!request || !(request->state & FLOW_PROVED))
		fail(step, "a flow is proved by somebody else's packet");
	becomes = pair_of_ends(&request->ends, step->before.pair.protocol);
	back = pair_reversed(&becomes);
	reply = flow_of(&back);
	if (!reply || !(reply->state & FLOW_PROVED))
		fail(step, "a flow is proved that the backend has not answered");
	if (step->before.pair.protocol == PROTO_TCP &&
	    ((step->before.flags & (FLAG_ACK | FLAG_RST)) != FLAG_ACK ||
	     step->before.acknowledgement - reply->backend_or_first >= WINDOW))
		fail(step, "a flow is proved by a guess");
}

static void check_row(const struct step *step, const struct pair *pair, const struct flow *row)
{
	struct pair becomes = pair_of_ends(&row->ends, pair->protocol), back = pair_reversed(&becomes);
	struct pair expected = pair_reversed(pair), leads;
	const struct flow *partner = flow_of(&back);
	__u32 is_reply = row->state & FLOW_REPLY;

	if (!partner)
		fail(step, "a row without its partner");
	leads = pair_of_ends(&partner->ends, pair->protocol);
	if (!pair_equal(&leads, &expected))
		fail(step, "a row whose partner leads elsewhere");
	if (row->state & FLOW_ENDING)
		fail(step, "a row that is half removed");
	if (is_reply == (partner->state & FLOW_REPLY) || ((row->state ^ partner->state) & FLOW_PATH))
		fail(step, "rows that do not belong together");
	if (inet_fold(row->change) % 0xffff != change_of(pair, &becomes) % 0xffff)
		fail(step, "a row with a wrong change");
	if (!is_reply && (row->state & FLOW_PROVED))
		proved[pair->protocol == PROTO_TCP ? FLOW_CLASS_TCP : FLOW_CLASS_OTHER]++;
}

static void check_counts(const struct step *step)
{
	struct native_map *counts = map_named("flow_counts");

	for (__u32 i = 0; i < FLOW_CLASS_MAX; i++) {
		__u64 counted_rows;

		memcpy(&counted_rows, map_lookup(counts, &i), sizeof(counted_rows));
		if (counted_rows != proved[i])
			fail(step, "a wrong count of proved flows");
	}
}

void table_after(const struct step *step)
{
	memcpy(proved_before, proved, sizeof(proved));
	memset(proved, 0, sizeof(proved));
	each_row(check_row, step);
	check_counts(step);
	check_proof(step);
	for (int i = 0; i < flow_count; i++) {
		const struct flow *row = flow_of(&flows[i].request);
		struct pair becomes;

		if (!flows[i].is_open)
			continue;
		if (!row)
			fail(step, "an open connection's flow is gone");
		becomes = pair_of_ends(&row->ends, flows[i].request.protocol);
		if (!pair_equal(&becomes, &flows[i].becomes))
			fail(step, "an open connection's flow leads elsewhere");
	}
}
