/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Choosing the ends that a backend sees, so that its replies belong to one flow only.
 *
 * A local backend sees the client as it is, or, where the client already reaches the same backend by another address
 * of the Service and from the same port, and of UDP under policy Cluster (begin_port_moves), with another port. A backend elsewhere sees this node's address and a port
 * of the private range. Every backend has the whole range.
 *
 * The first port tried is the client's own plus a number that depends on the client's and the Service's addresses:
 * one client's ports never meet each other, and a client that uses a port again is given the same one again, so that
 * the backend sees what it would see from the client itself and its TIME_WAIT lets the SYN pass (RFC 6191).
 *
 * A port is reserved by creating the replies' row: of two processors that want it, one has it.
 */
#ifndef KUBELANE_SNAT_H
#define KUBELANE_SNAT_H

enum {
	SNAT_TRIES = 16,
	SNAT_TRIES_FOR_FREE = 2, /* before a client may follow a closed connection of its own */
};

/* Verifiers before 5.11 do not see that a swapped port has 16 bits; the compiler does, and would drop the mask. */
static __always_inline __u32 port_index(__be16 port)
{
	__u32 index = bpf_ntohs(port);

	barrier_var(index);
	return index & 0xffff;
}

/* Which ports snat_reserve() may try. */
enum snat_ports {
	SNAT_ANY = 0, /* those of the private range */
	SNAT_KEEP_FIRST = 1, /* the client's own, then as above */
	SNAT_KEEP = 2, /* the client's own only: SCTP's checksum covers ports */
	SNAT_MOVE = 3, /* those above where clients and nodes take theirs from, and the client's own at last */
};

/* Who has the port that was tried. */
enum alloc {
	ALLOC_RESERVED = 0, /* the asking flow, from now on */
	ALLOC_OWN = 1, /* the asking flow, from before: the client uses its port again */
	ALLOC_FREE = 2, /* nobody any more, but rows are there */
	ALLOC_FOLLOWING = 3, /* a connection of the same client that both ends have closed seconds ago */
	ALLOC_YIELDING = 4, /* a flow that no end has proved, or that both have closed */
	ALLOC_TAKEN = 5,
	ALLOC_FULL = 6, /* the kernel has no room or no memory for a row */
};

static __always_inline __u32 snat_hash(const struct flow_key *request)
{
	const struct address_words *client = address_words(&request->ends.source);
	const struct address_words *service = address_words(&request->ends.destination);
	__u32 hash = mix(client->word[0] ^ service->word[0]);

	hash = mix(hash ^ client->word[1] ^ service->word[1]);
	hash = mix(hash ^ client->word[2] ^ service->word[2]);
	hash = mix(hash ^ client->word[3]);
	hash = mix(hash ^ service->word[3]);
	return mix(hash ^ request->ends.destination_port);
}

/* A port whose flow is over: for how long must it rest before others may have it? */
static __always_inline int alloc_of_closed(const struct scratch *given, __u32 request, __u32 reply, __u32 idle,
					   const struct ends *holder)
{
	__u32 rest = FLOW_TCP_PORT_REST;

	if (idle > FLOW_TCP_PORT_REST && address_equal(&holder->source, &given->packet.tuple.ends.source))
		return ALLOC_FOLLOWING;
	if ((request & reply & FLOW_FIN) && (reply & FLOW_FIN_FIRST) && !((request | reply) & FLOW_RESET))
		rest = FLOW_TCP_TIME_WAIT_REST;
	return idle > rest ? ALLOC_FREE : ALLOC_YIELDING;
}

/*
 * Whose is the row under scratch.reply that is in the way? The holder's key is left in scratch.removed, for
 * flow_remove(), and how long it has been silent in scratch.idle.
 */
static __always_inline int alloc_of_holder(struct scratch *given)
{
	const struct flow_limits *limits = flow_limits_get(FLOW_LIMITS_SET);
	struct flow *reply = flow_find(&given->reply), *request;
	__u8 protocol = given->packet.tuple.protocol;
	__u32 request_state, reply_state;

	if (!reply || !limits || !(reply->state & FLOW_REPLY))
		return ALLOC_TAKEN;
	flow_key_reverse(&given->removed, &reply->ends, protocol);
	reply_state = reply->state;
	request = flow_find(&given->removed);
	/* Another processor is about to enter its flow, or to take the port back. */
	if (!request || !ends_are_reversed(&request->ends, &given->reply.ends))
		return ALLOC_TAKEN;
	if (ends_equal(&given->removed.ends, &given->packet.tuple.ends))
		return ALLOC_OWN;
	request_state = request->state;
	given->idle = flow_idle_both(request_state, reply_state, second_now(given));
	if (protocol == IPPROTO_TCP && flow_is_closed(request_state, reply_state))
		return alloc_of_closed(given, request_state, reply_state, given->idle, &given->removed.ends);
	if (given->idle > flow_limit(limits, protocol, request_state, reply_state))
		return ALLOC_FREE;
	return request_state & FLOW_PROVED ? ALLOC_TAKEN : ALLOC_YIELDING;
}

/* Tries the port that scratch.reply names. Answers an enum alloc. */
__noinline int alloc_try(hook_context *ctx)
{
	struct scratch *given = scratch();
	long result;

	if (!given || !ctx)
		return ALLOC_FULL;
	/* A pod that comes back to itself from the Service's own port: its packets and the answers to them would have
	 * the same ends, and one row cannot be both. */
	if (ends_equal(&given->reply.ends, &given->packet.tuple.ends))
		return ALLOC_TAKEN;
	given->reply_row.change = ends_change(&given->reply.ends, &given->reply_row.ends);
	result = flow_create(&given->reply, &given->reply_row);
	if (!result)
		return ALLOC_RESERVED;
	return result == -EEXIST ? alloc_of_holder(given) : ALLOC_FULL;
}

/* The same once the flow that holds it was removed. Another processor may be faster. */
__noinline int alloc_take(hook_context *ctx)
{
	struct scratch *given = scratch();
	int alloc;

	if (!given)
		return ALLOC_FULL;
	alloc = alloc_try(ctx);
	if (alloc != ALLOC_FREE && alloc != ALLOC_FOLLOWING && alloc != ALLOC_YIELDING)
		return alloc;
	if (!flow_remove(ctx, alloc == ALLOC_FREE ? REMOVE_FREE : REMOVE_PORT))
		return ALLOC_TAKEN;
	given->reply_row.change = ends_change(&given->reply.ends, &given->reply_row.ends);
	return flow_create(&given->reply, &given->reply_row) ? ALLOC_TAKEN : ALLOC_RESERVED;
}

/* That one of the range that a number leads to. */
static __always_inline __be16 snat_port(const struct scratch *given, __u32 number)
{
	return bpf_htons(given->ports_first + number % given->ports_count);
}

/*
 * Sets the destination port of the scratch's reply so that the port belongs to nobody else. A client that connects
 * without a pause to a backend that closes first need not wait for the end of TIME_WAIT: when a few tries find nothing
 * free, it follows a connection of its own. (The backend lets a SYN into TIME_WAIT whose timestamp is newer, RFC 6191,
 * as the same client's is.) When all ports that were tried are in use, the unproved or closed flow that has waited the
 * longest gives way: a flood of requests takes ports from itself. `ports`: enum snat_ports. Answers ALLOC_RESERVED,
 * ALLOC_OWN, ALLOC_TAKEN (every port tried belongs to an established flow) or ALLOC_FULL.
 */
__noinline int snat_reserve(hook_context *ctx, int ports)
{
	struct scratch *given = scratch();
	__be16 chosen = 0, own = 0;
	__u32 hash, step, port, longest = 0;

	if (!given)
		return ALLOC_FULL;
	given->ports_first = ports == SNAT_MOVE ? config.moved_first : config.snat_first;
	given->ports_count = ports == SNAT_MOVE ? config.moved_ports : config.snat_ports;
	hash = snat_hash(&given->packet.tuple);
	step = 1 + (hash >> 17);
	port = hash + bpf_ntohs(given->packet.tuple.ends.source_port);
	given->reply.ends.destination_port = ports == SNAT_KEEP_FIRST || ports == SNAT_KEEP
						     ? given->packet.tuple.ends.source_port
						     : snat_port(given, port);
	for (int i = 0; i < SNAT_TRIES; i++) {
		__be16 *candidate = &given->reply.ends.destination_port;
		int alloc = alloc_try(ctx);

		if (alloc == ALLOC_FREE)
			alloc = alloc_take(ctx);
		if (alloc == ALLOC_RESERVED || alloc == ALLOC_OWN || alloc == ALLOC_FULL)
			return alloc;
		if (alloc == ALLOC_FOLLOWING && !own)
			own = *candidate;
		if (own && i + 1 >= SNAT_TRIES_FOR_FREE)
			break;
		if (alloc == ALLOC_YIELDING && given->idle >= longest) {
			longest = given->idle;
			chosen = *candidate;
		}
		if (ports == SNAT_KEEP)
			break;
		count(COUNTER_SNAT_RETRY);
		port += step;
		*candidate = snat_port(given, port);
	}
	if (own)
		chosen = own;
	else if (chosen)
		count(COUNTER_SNAT_RECLAIMED);
	else if (ports == SNAT_MOVE)
		chosen = given->packet.tuple.ends.source_port;
	if (!chosen)
		return ALLOC_TAKEN;
	given->reply.ends.destination_port = chosen;
	return alloc_take(ctx);
}

#endif
