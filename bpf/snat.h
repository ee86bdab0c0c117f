/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Choosing the ends that a backend sees, so that its replies belong to one flow only.
 *
 * A local backend sees the client as it is, or, where the client already reaches the same backend by another address
 * of the Service and from the same port, with another port. A backend elsewhere sees this node's address and a port
 * of the private range. Every backend has the whole range.
 *
 * The first port tried is the client's own plus a number that depends on the client's and the Service's addresses:
 * one client's ports never meet each other, and a client that uses a port again is given the same one again, so that
 * the backend sees what it would see from the client itself and its TIME_WAIT lets the SYN pass (RFC 6191).
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
};

enum place {
	PLACE_EMPTY = 0,
	PLACE_FREE = 1, /* its flow has ended, or is the asking one's own */
	PLACE_YIELDING = 2, /* taken, by a flow that no end has proved, or that both have closed */
	PLACE_OWN = 3, /* taken, by a connection of the same client that both ends have closed seconds ago */
	PLACE_TAKEN = 4,
};

/* What snat_reserve() has found. */
enum reserved {
	RESERVED_NONE = -1, /* every port tried belongs to an established flow */
	RESERVED_EMPTY = 0,
	RESERVED_USED = 1, /* rows of an earlier flow are there, to be removed */
};

/* A 32-bit mixer (the finaliser of MurmurHash3). */
static __always_inline __u32 snat_mix(__u32 value)
{
	value ^= value >> 16;
	value *= 0x85ebca6b;
	value ^= value >> 13;
	value *= 0xc2b2ae35;
	return value ^ value >> 16;
}

static __always_inline __u32 snat_hash(const struct flow_key *request)
{
	const struct address_words *client = address_words(&request->ends.source);
	const struct address_words *service = address_words(&request->ends.destination);
	__u32 hash = snat_mix(client->word[0] ^ service->word[0]);

	hash = snat_mix(hash ^ client->word[1] ^ service->word[1]);
	hash = snat_mix(hash ^ client->word[2] ^ service->word[2]);
	hash = snat_mix(hash ^ client->word[3]);
	hash = snat_mix(hash ^ service->word[3]);
	return snat_mix(hash ^ request->ends.destination_port);
}

/* For how many seconds after its last packet a flow holds its place against others. */
static __always_inline __u64 place_rest(const struct flow *flow, __u8 protocol)
{
	if (protocol != IPPROTO_TCP)
		return FLOW_UDP_REPLIED;
	if (flow->reset)
		return FLOW_TCP_PORT_REST;
	if (flow->client_closed && flow->backend_closed)
		return flow->backend_first ? FLOW_TCP_TIME_WAIT : FLOW_TCP_PORT_REST;
	return FLOW_TCP_ESTABLISHED;
}

static __always_inline int place_of_closed(const struct flow *flow, const struct flow_key *request, __u64 now)
{
	if (address_equal(&flow->ends.destination, &request->ends.source) &&
	    flow_idle(flow, now) > (__u64)FLOW_TCP_PORT_REST * NANOSECONDS)
		return PLACE_OWN;
	return PLACE_YIELDING;
}

/* May `request` have the replies of `reply`? *used: when the yielding flow that holds them was last used. */
static __noinline int place_state(const struct flow_key *reply, const struct flow_key *request, __u64 now, __u64 *used)
{
	struct flow *flow = bpf_map_lookup_elem(&flows, reply);

	if (flow) {
		if (ends_are_reversed(&flow->ends, &request->ends) ||
		    flow_idle(flow, now) > place_rest(flow, reply->protocol) * NANOSECONDS)
			return PLACE_FREE;
		*used = flow->used_ns;
		return flow->client_closed && flow->backend_closed ? place_of_closed(flow, request, now) : PLACE_TAKEN;
	}
	flow = bpf_map_lookup_elem(&new_flows, reply);
	if (!flow)
		return PLACE_EMPTY;
	if (ends_are_reversed(&flow->ends, &request->ends) ||
	    flow_idle(flow, now) > (__u64)FLOW_TCP_OPENING * NANOSECONDS)
		return PLACE_FREE;
	*used = flow->used_ns;
	return PLACE_YIELDING;
}

/*
 * Sets the destination port of the scratch's reply so that the place belongs to nobody else. A client that connects
 * without a pause to a backend that closes first need not wait for the end of TIME_WAIT: when a few tries find nothing
 * free, it follows a connection of its own. (The backend lets a SYN into TIME_WAIT whose timestamp is newer, RFC 6191,
 * as the same client's is.) When all ports that were tried are in use, the unproved or closed flow that has waited the
 * longest gives way: a flood of requests takes places from itself. `ports`: enum snat_ports. Answers an enum reserved.
 */
__noinline int snat_reserve(int ports)
{
	__u32 hash, step, port;
	struct scratch *wanted = scratch();
	__u64 oldest = ~0ULL, now;
	__be16 chosen = 0, own = 0;

	if (!wanted)
		return RESERVED_NONE;
	now = clock_now(wanted);
	hash = snat_hash(&wanted->packet.tuple);
	step = 1 + (hash >> 17);
	port = hash + bpf_ntohs(wanted->packet.tuple.ends.source_port);
	for (int i = 0; i < SNAT_TRIES; i++) {
		__be16 *candidate = &wanted->reply.ends.destination_port;
		__u64 used = 0;
		int state;

		*candidate = bpf_htons(config.snat_first + port % config.snat_ports);
		if (ports != SNAT_ANY && i == 0)
			*candidate = wanted->packet.tuple.ends.source_port;
		state = place_state(&wanted->reply, &wanted->packet.tuple, now, &used);
		if (state == PLACE_EMPTY)
			return RESERVED_EMPTY;
		if (state == PLACE_FREE)
			return RESERVED_USED;
		if (state == PLACE_OWN && !own)
			own = *candidate;
		if (own && i + 1 >= SNAT_TRIES_FOR_FREE) {
			*candidate = own;
			return RESERVED_USED;
		}
		if (state != PLACE_TAKEN && used < oldest) {
			oldest = used;
			chosen = *candidate;
		}
		if (ports == SNAT_KEEP)
			break;
		count(COUNTER_SNAT_RETRY);
		port += step;
	}
	if (!chosen)
		return RESERVED_NONE;
	wanted->reply.ends.destination_port = chosen;
	count(COUNTER_SNAT_RECLAIMED);
	return RESERVED_USED;
}

#endif
