/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Flows: two rows each, one for each direction, and each leads to the other.
 *
 * Who may do what, on how many processors ever at once:
 *
 *   - A place is taken by creating the replies' row (BPF_NOEXIST), then the requests' row in the same way. Of two
 *     processors that begin one flow, the second finds a row there: it removes what it has made and uses the other's.
 *   - Everything that changes a row afterwards happens under the flow's lock, which the requests' key chooses: flags,
 *     the second of use, other ends. (Sequence numbers are hints, and written without it.)
 *   - A row is deleted by whoever has set FLOW_ENDING in it, under the lock, and by nobody else. So no one deletes by its
 *     key a row that another has made meanwhile. flow_remove() (flow_end.h) is the only place.
 *   - Packets read rows without the lock. The kernel may give a deleted row's memory to another row at once, and ends
 *     are replaced in place where a client uses a port again: so a copy counts only if its ends explain flow.change.
 *
 * A flow that is not proved yet has an entry in its processor's ring, `flow_openings`: when the ring has gone round, the
 * flow is removed. So a flood of requests pushes out its like, and no flow that is proved.
 *
 * Cost: one hash look-up for a packet of a proved flow, of UDP two array look-ups more. Once a second, and for the
 * packets that begin or end a connection, two more and the lock.
 */
#ifndef KUBELANE_FLOW_H
#define KUBELANE_FLOW_H

enum {
	/* How far beyond a sequence number a packet of the same connection may lie: two of the largest aggregates. One
	 * in 32768 of a blind attacker's guesses gets that right, as with conntrack's windows. */
	SEQUENCE_WINDOW = 131072,
	/* conntrack takes UDP for a stream when it has gone both ways for as long as this, in seconds. */
	UDP_STREAM_AGE = 2,
	/* Another processor's clock may have been read this much later. */
	FLOW_CLOCK_SKEW = 60,
};

static __always_inline __u32 ends_difference_reversed(const struct ends *a, const struct ends *b)
{
	return address_difference(&a->source, &b->destination) | address_difference(&a->destination, &b->source) |
	       (a->source_port ^ b->destination_port) | (a->destination_port ^ b->source_port);
}

static __always_inline int ends_are_reversed(const struct ends *a, const struct ends *b)
{
	return !ends_difference_reversed(a, b);
}

static __always_inline int ends_equal(const struct ends *a, const struct ends *b)
{
	return !(address_difference(&a->source, &b->source) | address_difference(&a->destination, &b->destination) |
		 (a->source_port ^ b->source_port) | (a->destination_port ^ b->destination_port));
}

static __always_inline void ends_reverse(struct ends *to, const struct ends *from)
{
	to->source = from->destination;
	to->destination = from->source;
	to->source_port = from->destination_port;
	to->destination_port = from->source_port;
}

static __always_inline void flow_key_reverse(struct flow_key *key, const struct ends *ends, __u8 protocol)
{
	ends_reverse(&key->ends, ends);
	key->protocol = protocol;
	key->zero[0] = 0;
	key->zero[1] = 0;
	key->zero[2] = 0;
}

static __always_inline void flow_key4_fill(struct flow_key4 *to, const struct flow_key *key)
{
	to->source = address_words(&key->ends.source)->word[3];
	to->destination = address_words(&key->ends.destination)->word[3];
	to->source_port = key->ends.source_port;
	to->destination_port = key->ends.destination_port;
	to->protocol = key->protocol;
	to->zero[0] = 0;
	to->zero[1] = 0;
	to->zero[2] = 0;
}

static __always_inline struct flow *flow_find(const struct flow_key *key)
{
	struct flow_key4 key4;

	if (!address_is_ip4(&key->ends.destination))
		return bpf_map_lookup_elem(&flows6, key);
	flow_key4_fill(&key4, key);
	return bpf_map_lookup_elem(&flows4, &key4);
}

/* Out of line, as all that happens once in a flow. Not 0: there is a row, or no room for one. */
static __noinline long flow_create(const struct flow_key *key, const struct flow *flow)
{
	struct flow_key4 key4;

	if (!address_is_ip4(&key->ends.destination))
		return bpf_map_update_elem(&flows6, key, flow, BPF_NOEXIST);
	flow_key4_fill(&key4, key);
	return bpf_map_update_elem(&flows4, &key4, flow, BPF_NOEXIST);
}

/* For who has set FLOW_ENDING in the row, or has made it and shown it to nobody. */
static __noinline int flow_delete(const struct flow_key *key)
{
	struct flow_key4 key4;

	if (!address_is_ip4(&key->ends.destination))
		return bpf_map_delete_elem(&flows6, key);
	flow_key4_fill(&key4, key);
	return bpf_map_delete_elem(&flows4, &key4);
}

/* Before a packet goes on: what leaves with the key of its answers, at egress, is looked at from now on. */
static __always_inline void flow_note_reply(struct port_table *table, const struct flow_key *reply)
{
	__u32 index = reply_index(address_words(&reply->ends.source)->word[3],
				  address_words(&reply->ends.destination)->word[3], reply->ends.source_port);

	table->replies[0][index] = 1;
	table->replies[1][index] = 1;
}

/* A 32-bit mixer (the finaliser of MurmurHash3). */
static __always_inline __u32 mix(__u32 value)
{
	value ^= value >> 16;
	value *= 0x85ebca6b;
	value ^= value >> 13;
	value *= 0xc2b2ae35;
	return value ^ value >> 16;
}

static __always_inline struct flow_lock *flow_lock_of(const struct ends *request)
{
	__u32 index = mix(address_words(&request->source)->word[3] ^
			  ports_word(request->source_port, request->destination_port)) &
		      (FLOW_LOCKS - 1);

	return bpf_map_lookup_elem(&flow_locks, &index);
}

/* Seconds since the row's last packet. */
static __always_inline __u32 flow_idle(__u32 state, __u32 second)
{
	__u32 idle = (second - (state >> FLOW_SECOND_SHIFT)) & FLOW_SECOND_MASK;

	return idle > FLOW_SECOND_MASK - FLOW_CLOCK_SKEW ? 0 : idle;
}

static __always_inline __u32 flow_idle_both(__u32 request, __u32 reply, __u32 second)
{
	__u32 a = flow_idle(request, second), b = flow_idle(reply, second);

	return a < b ? a : b;
}

static __always_inline int flow_is_closed(__u32 request, __u32 reply)
{
	return ((request | reply) & FLOW_RESET) || (request & reply & FLOW_FIN);
}

static __always_inline const struct flow_limits *flow_limits_get(__u32 index)
{
	return bpf_map_lookup_elem(&flow_limits, &index);
}

/* For how many seconds of silence a flow in this state is kept. */
static __always_inline __u32 flow_limit(const struct flow_limits *limits, __u8 protocol, __u32 request, __u32 reply)
{
	if (protocol != IPPROTO_TCP)
		return request & FLOW_PROVED ? limits->udp_stream : limits->udp;
	if ((request | reply) & FLOW_RESET)
		return limits->tcp_reset;
	if (request & reply & FLOW_FIN)
		return reply & FLOW_FIN_FIRST ? limits->tcp_time_wait : limits->tcp_closed;
	if ((request | reply) & FLOW_FIN)
		return limits->tcp_half_closed;
	return request & FLOW_PROVED ? limits->tcp_established : limits->tcp_opening;
}

static __always_inline __u64 *flow_count_of(__u8 protocol)
{
	__u32 index = protocol == IPPROTO_TCP ? FLOW_CLASS_TCP : FLOW_CLASS_OTHER;

	return bpf_map_lookup_elem(&flow_counts, &index);
}

/* Does the row still belong to the flow that these ends were read of? State first: who sets FLOW_ENDING is done with
 * that before the row's memory can become another's. */
static __always_inline int flow_is_still(const struct flow *flow, const struct ends *ends)
{
	if (flow->state & FLOW_ENDING)
		return 0;
	barrier();
	return ends_equal(&flow->ends, ends);
}

/* Is the row what the copy was made of, with nothing done to it since? One that another processor has put in its place may
 * have the same ends. */
static __always_inline int flow_is_unchanged(const struct flow *flow, const struct flow *copy)
{
	return flow_is_still(flow, &copy->ends) && flow->state == copy->state &&
	       flow->backend_or_first == copy->backend_or_first &&
	       flow->generation_or_interface == copy->generation_or_interface;
}

/*
 * Sets and clears flags of the row that scratch.flow is a copy of, and notes the second. `request`: the ends of the
 * requests' key. Answers the state before; FLOW_ENDING: the row is not this flow's any more.
 */
static __noinline __u32 flow_mark(struct scratch *given, struct flow *flow, const struct ends *request, __u32 set,
				  __u32 clear)
{
	__u32 before = FLOW_ENDING, second = second_now(given);
	struct flow_lock *lock = flow_lock_of(request);

	if (!lock)
		return before;
	bpf_spin_lock(&lock->lock);
	if (flow_is_still(flow, &given->flow.ends)) {
		before = flow->state;
		flow->state = (before & FLOW_FLAGS & ~clear) | set | second << FLOW_SECOND_SHIFT;
	}
	bpf_spin_unlock(&lock->lock);
	return before;
}

static __always_inline int sequence_is_near(__u32 sequence, __u32 known)
{
	return sequence - known + SEQUENCE_WINDOW < 2 * SEQUENCE_WINDOW;
}

/* 0: of a flow that an earlier version began, nothing is known. */
static __always_inline void flow_note_sequence(struct flow *flow, __u32 sequence)
{
	if (!flow->sequence || (__s32)(sequence - flow->sequence) > 0)
		flow->sequence = sequence;
}

/* What a look-up has found. */
enum recall {
	RECALL_NONE = 0, /* no flow; or one that has ended, copied to scratch.former: the packet begins another */
	RECALL_SERVES = 1, /* scratch.flow is a copy of the row */
	RECALL_FOREIGN = 2, /* a packet of the same ends that is not the flow's */
	RECALL_CHANGING = 3, /* another processor is just replacing the row */
};

/* Which flags a segment's own flags change, if its sequence number is one that the other end would take (RFC 5961). */
static __always_inline void flow_judge_flags(const struct packet *packet, const struct flow *flow, __u32 *set,
					     __u32 *clear)
{
	if (!(packet->tcp_flags & TCP_RST))
		*clear |= FLOW_RESET;
	if (!(packet->tcp_flags & (TCP_FIN | TCP_RST)))
		return;
	/* Where nothing is known a FIN counts, as it does for the liberal, and a reset does not. */
	if (!sequence_is_near(packet->sequence, flow->sequence) &&
	    ((flow->sequence && !config.tcp_be_liberal) || (packet->tcp_flags & TCP_RST)))
		return;
	*set |= packet->tcp_flags & TCP_RST ? FLOW_RESET : FLOW_FIN;
}

/* UDP and SCTP: a frontend that became another Service's takes its flows along. Asked once for each change of owners. */
static __noinline int flow_is_owned(const struct packet *packet, struct flow *flow, __u32 owners)
{
	struct frontend_key key = {
		.address = packet->tuple.ends.destination,
		.port = packet->tuple.ends.destination_port,
		.protocol = packet->tuple.protocol,
	};
	struct backend *backend = backend_get_living(flow->backend_or_first, flow->generation_or_interface);

	if (!backend || frontend_has_moved(&key, 0, backend->service_id))
		return 0;
	flow->sequence = owners;
	return 1;
}

/* Whether a request may still use its flow; else it begins another. `reply`: the partner, or NULL. */
static __always_inline int flow_serves(const struct packet *packet, struct flow *flow, const struct flow *reply,
				       __u32 second)
{
	const struct flow_limits *limits = flow_limits_get(FLOW_LIMITS_SET);
	__u32 owners;

	/* A requests' row without its partner is made whole by a new beginning. */
	if (!reply || !limits)
		return 0;
	if (packet->tuple.protocol == IPPROTO_TCP) {
		if ((packet->tcp_flags & (TCP_SYN | TCP_ACK)) != TCP_SYN)
			return 1;
		/* Another connection answers in this one's place: the client asks again, from a port that is free. */
		if ((reply->state & (FLOW_SHADOWED | FLOW_PROVED)) == FLOW_SHADOWED)
			return 0;
		/* A SYN to a backend that is gone would wait in vain; on an open connection it is the backend's to
		 * judge (RFC 5961). */
		return !flow_is_closed(flow->state, reply->state) &&
		       ((flow->state & FLOW_PROVED) ||
			backend_get_living(flow->backend_or_first, flow->generation_or_interface));
	}
	if (flow_idle_both(flow->state, reply->state, second) >
		    flow_limit(limits, packet->tuple.protocol, flow->state, reply->state) ||
	    !backend_get_living(flow->backend_or_first, flow->generation_or_interface))
		return 0;
	owners = epoch_now(EPOCH_OWNERS);
	return flow->sequence == owners || flow_is_owned(packet, flow, owners);
}

/*
 * Does this request prove its flow? Of TCP: it acknowledges what the backend has said, which only somebody who receives
 * its packets can know. Of UDP: both ends have sent for some time.
 */
static __always_inline int flow_is_proof(const struct packet *packet, const struct flow *reply, __u32 second)
{
	if (!(reply->state & FLOW_PROVED))
		return 0;
	if (packet->tuple.protocol != IPPROTO_TCP)
		return packet->kind != PACKET_PIECE &&
		       ((second - reply->backend_or_first) & FLOW_SECOND_MASK) >= UDP_STREAM_AGE;
	return (packet->tcp_flags & (TCP_ACK | TCP_RST)) == TCP_ACK &&
	       packet->acknowledgement - reply->backend_or_first < SEQUENCE_WINDOW;
}

/* The client of a proved flow is remembered, or remembered anew. */
static __noinline int flow_remember_client(const struct packet *packet, const struct flow *flow)
{
	struct backend *backend = backend_get_living(flow->backend_or_first, flow->generation_or_interface);
	struct affinity affinity = {
		.backend_id = flow->backend_or_first,
		.generation = flow->generation_or_interface,
		.used_ns = bpf_ktime_get_ns(),
	};
	struct affinity_key key = {.kind = CLIENT_ADDRESS};
	struct affinity *known;

	if (!backend)
		return 0;
	key.service_id = backend->service_id;
	__builtin_memcpy(key.client, &packet->tuple.ends.source, sizeof(key.client));
	known = bpf_map_lookup_elem(&affinities, &key);
	if (known && known->backend_id == affinity.backend_id && known->generation == affinity.generation) {
		known->used_ns = affinity.used_ns;
		return 0;
	}
	return bpf_map_update_elem(&affinities, &key, &affinity, BPF_ANY);
}

static __always_inline void flow_prove(struct scratch *given, struct flow *flow)
{
	const struct packet *packet = &given->packet;
	__u64 *proved = flow_count_of(packet->tuple.protocol);
	__u32 most = packet->tuple.protocol == IPPROTO_TCP ? config.flows_tcp : config.flows_other;

	if (!proved)
		return;
	if (*proved >= most) {
		count(COUNTER_FLOW_TABLE_FULL);
		return;
	}
	if (flow_mark(given, flow, &packet->tuple.ends, FLOW_PROVED, 0) & (FLOW_ENDING | FLOW_PROVED))
		return;
	__sync_fetch_and_add(proved, 1);
	count(COUNTER_FLOW_ESTABLISHED);
	if (given->flow.state & FLOW_AFFINE)
		flow_remember_client(packet, &given->flow);
}

/* Another processor has put a flow in the place of the one that scratch.flow is a copy of, or is about to: copies what is
 * there now. Answers an enum recall. Global, so that it is verified once. */
__noinline int flow_reread(void)
{
	struct scratch *given = scratch();
	const struct flow *row;

	if (!given)
		return RECALL_CHANGING;
	row = flow_find(&given->packet.tuple);
	if (!row)
		return RECALL_NONE;
	given->flow = *row;
	given->addresses =
		checksum_change(&given->packet.tuple.ends, &given->flow.ends.source, &given->flow.ends.destination);
	if ((given->flow.state & (FLOW_ENDING | FLOW_REPLY)) ||
	    ports_change(given->addresses, &given->packet.tuple.ends, &given->flow.ends) != given->flow.change)
		return RECALL_CHANGING;
	return RECALL_SERVES;
}

/* A request that cannot be dealt with by a look at its row alone. */
static __always_inline int flow_attend_request(struct scratch *given, struct flow *flow, const struct flow *reply)
{
	const struct packet *packet = &given->packet;
	__u32 second = second_now(given), set = 0, clear = 0, before;

	if (!flow_serves(packet, flow, reply, second)) {
		given->former = given->flow;
		given->has_former = 1;
		given->own_port_is_taken = reply && (reply->state & FLOW_SHADOWED);
		return RECALL_NONE;
	}
	if (packet->tuple.protocol == IPPROTO_TCP) {
		flow_judge_flags(packet, flow, &set, &clear);
		/* Until the backend has answered, its first packet is what an answer acknowledges. */
		if (flow->state & FLOW_PROVED)
			flow_note_sequence(flow, packet->sequence);
	}
	before = flow_mark(given, flow, &packet->tuple.ends, set, clear);
	/* The copy's answers would find no row. */
	if (before & FLOW_ENDING)
		return flow_reread();
	if (!(before & FLOW_PROVED) && reply && flow_is_proof(packet, reply, second))
		flow_prove(given, flow);
	return RECALL_SERVES;
}

/*
 * Is the first answer to a flow the flow's? The client may have come to the backend itself from the same port: then the
 * backend's packets are that connection's, and a SYN that somebody has forged takes none of them. TCP's acknowledge what
 * was forwarded, or refuse it by the sequence number that it asked for.
 */
static __always_inline int flow_is_answered(const struct packet *packet, const struct flow *flow,
					    const struct flow *request)
{
	__u32 beyond = packet->acknowledgement - request->sequence;

	if (packet->tuple.protocol != IPPROTO_TCP)
		return 1;
	if (!(packet->tcp_flags & TCP_ACK))
		return (packet->tcp_flags & TCP_RST) && packet->sequence == flow->sequence;
	if (packet->tcp_flags & TCP_SYN)
		return beyond - 1 < SEQUENCE_WINDOW;
	return beyond < SEQUENCE_WINDOW;
}

/* What a backend still says on a connection that has ended. Anything else is of another one, which the client has made to
 * the backend itself from the same port: a new request of the flow would have made it anew. */
static __always_inline int flow_is_farewell(const struct packet *packet, const struct flow *flow)
{
	return !(packet->tcp_flags & TCP_SYN) && sequence_is_near(packet->sequence, flow->sequence);
}

/* Answered for the first time: the scratch's flow is none that fills the quota of the pod which has begun it. `before`: the
 * replies' state until then; of two processors that meet an answer at once, one has seen it without. A reset is no answer.
 * Global, so that it is verified by itself. */
__noinline int flow_give_back_quota(__u32 before, __u32 set)
{
	struct scratch *given = scratch();
	struct pod_device *device;
	__u32 interface;

	if (!given || !config.has_pod_devices || !(set & FLOW_PROVED) || (before & (FLOW_PROVED | FLOW_ENDING)))
		return 0;
	interface = given->flow.generation_or_interface;
	device = map_find(&pod_devices, &interface);
	if (device)
		__sync_fetch_and_add(&device->openings, -1);
	return 0;
}

/* The same of a reply. */
static __always_inline int flow_attend_reply(struct scratch *given, struct flow *flow, const struct flow *request)
{
	const struct packet *packet = &given->packet;
	__u32 set = 0, clear = 0, before;
	struct ends request_ends;

	if (!request)
		return RECALL_FOREIGN;
	ends_reverse(&request_ends, &given->flow.ends);
	if (!(flow->state & FLOW_PROVED)) {
		if (!flow_is_answered(packet, flow, request)) {
			if (!(given->flow.state & FLOW_SHADOWED))
				flow_mark(given, flow, &request_ends, FLOW_SHADOWED, 0);
			return RECALL_FOREIGN;
		}
		clear = FLOW_SHADOWED;
		if (packet->tuple.protocol == IPPROTO_TCP)
			flow->sequence = packet->sequence;
		if (packet->tuple.protocol == IPPROTO_TCP && !(packet->tcp_flags & TCP_RST))
			flow->backend_or_first = packet->sequence;
		if (!(packet->tcp_flags & TCP_RST))
			set = FLOW_PROVED;
	} else if (flow_is_closed(request->state, flow->state) && !flow_is_farewell(packet, flow)) {
		/* From now on the flow must be answered anew: the other connection's numbers may be near. */
		if (packet->tcp_flags & TCP_SYN)
			flow_mark(given, flow, &request_ends, 0, FLOW_PROVED);
		return RECALL_FOREIGN;
	}
	if (packet->tuple.protocol == IPPROTO_TCP) {
		flow_judge_flags(packet, flow, &set, &clear);
		if ((set & FLOW_FIN) && !((request->state | flow->state) & FLOW_FIN))
			set |= FLOW_FIN_FIRST;
		flow_note_sequence(flow, packet->sequence);
	}
	before = flow_mark(given, flow, &request_ends, set, clear);
	flow_give_back_quota(before, set);
	return RECALL_SERVES;
}

/* Finds both rows of the flow that scratch.flow is a copy of. `partner`: NULL if it leads elsewhere by now. */
static __always_inline struct flow *flow_find_both(struct scratch *given, struct flow **partner)
{
	flow_key_reverse(&given->reply, &given->flow.ends, given->packet.tuple.protocol);
	*partner = flow_find(&given->reply);
	if (*partner && !ends_are_reversed(&(*partner)->ends, &given->packet.tuple.ends))
		*partner = (void *)0;
	return flow_find(&given->packet.tuple);
}

/* These two are global, so that they are verified by themselves. They answer an enum recall for the scratch's packet and
 * copy of its row. */
__noinline int flow_attend_to_request(hook_context *ctx)
{
	struct scratch *given = scratch();
	struct flow *flow, *partner;

	if (!given || !ctx)
		return RECALL_CHANGING;
	flow = flow_find_both(given, &partner);
	return flow ? flow_attend_request(given, flow, partner) : RECALL_CHANGING;
}

__noinline int flow_attend_to_reply(hook_context *ctx)
{
	struct scratch *given = scratch();
	struct flow *flow, *partner;

	if (!given || !ctx)
		return RECALL_CHANGING;
	flow = flow_find_both(given, &partner);
	return flow ? flow_attend_reply(given, flow, partner) : RECALL_CHANGING;
}

/* Is there more to do than to translate? Once a second, and where a connection begins or ends; of UDP also where the
 * backend is gone, or the frontend may have become another Service's. */
static __always_inline int flow_wants_attention(struct scratch *given, const struct packet *packet)
{
	const struct flow *flow = &given->flow;

	__u32 state = flow->state;

	if ((state & (FLOW_RESET | FLOW_ENDING)) || state >> FLOW_SECOND_SHIFT != second_now(given))
		return 1;
	if (packet->tuple.protocol == IPPROTO_TCP)
		return !(state & FLOW_PROVED) || (packet->tcp_flags & (TCP_SYN | TCP_FIN | TCP_RST));
	/* That a request proves its flow takes seconds; that a reply answers the first one does not. */
	if (state & FLOW_REPLY)
		return !(state & FLOW_PROVED);
	return flow->sequence != epoch_now(EPOCH_OWNERS) ||
	       !backend_get_living(flow->backend_or_first, flow->generation_or_interface);
}

static __always_inline __u32 flow_path(__u32 state)
{
	return state & FLOW_PATH;
}

/* Does the backend see this node as its client (PATH_ROUTED, PATH_HALVES)? */
static __always_inline __u32 flow_hides_client(__u32 state)
{
	return state & PATH_ROUTED;
}

/* Are packets of this row met when they leave? Else when they come in. */
static __always_inline int flow_is_at_egress(__u32 state)
{
	return (state & (FLOW_REPLY | FLOW_PATH)) == (FLOW_REPLY | PATH_STACK);
}

/* Looks for the flow of the scratch's packet, and copies its row. Answers an enum recall. */
static __always_inline int flow_recall(hook_context *ctx, struct scratch *given, int at_egress)
{
	const struct packet *packet = &given->packet;
	struct flow *flow = flow_find(&packet->tuple);

	given->has_former = 0;
	given->own_port_is_taken = 0;
	if (!flow)
		return RECALL_NONE;
	given->flow = *flow;
	/* Its partner is met on the other way: there is a flow of these ends, but this packet does not go that way. */
	if (flow_is_at_egress(given->flow.state) != at_egress)
		return RECALL_NONE;
	given->addresses = addresses_change(&packet->tuple.ends, &given->flow.ends, packet->is_ip6);
	if (ports_change(given->addresses, &packet->tuple.ends, &given->flow.ends) != given->flow.change)
		return RECALL_CHANGING;
	if (flow_wants_attention(given, packet))
		return at_egress || (given->flow.state & FLOW_REPLY) ? flow_attend_to_reply(ctx)
								     : flow_attend_to_request(ctx);
	if (packet->tuple.protocol == IPPROTO_TCP)
		flow_note_sequence(flow, packet->sequence);
	return RECALL_SERVES;
}

#endif
