/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Flows: two rows each, one for each direction, and each leads to the other. A flow begins in `new_flows`, an LRU that
 * a flood may churn, and moves to `flows`, from which nothing is ever evicted, once both ends have proved that they
 * are there. Both rows are written, closed and removed together; one that has lost its partner is made whole again by
 * its next packet, or collected.
 *
 * Cost: one hash look-up for a packet of an established flow, of UDP two array look-ups more.
 */
#ifndef KUBELANE_FLOW_H
#define KUBELANE_FLOW_H

enum {
	NANOSECONDS = 1000000000,
	/* A row's time of use is written this seldom, so that a busy flow does not keep its cache line moving. */
	FLOW_TOUCH_NS = NANOSECONDS,
	/* How far beyond the backend's last sequence number a client's acknowledgement may lie: two of the largest
	 * aggregates. One in 32768 of a blind attacker's guesses gets that right. */
	ACKNOWLEDGED_MAX = 131072,
};

static __always_inline int ends_are_reversed(const struct ends *a, const struct ends *b)
{
	return !(address_difference(&a->source, &b->destination) | address_difference(&a->destination, &b->source) |
		 (a->source_port ^ b->destination_port) | (a->destination_port ^ b->source_port));
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

static __always_inline int flow_is_closed(const struct flow *flow)
{
	return flow->reset || (flow->client_closed && flow->backend_closed);
}

static __always_inline __u64 flow_idle(const struct flow *flow, __u64 now)
{
	/* Another processor's clock may have been read later. */
	return now > flow->used_ns ? now - flow->used_ns : 0;
}

static __always_inline void flow_remove_in(void *map, const struct flow_key *key)
{
	struct flow *flow = bpf_map_lookup_elem(map, key), *partner;
	struct flow_key partner_key;

	if (!flow)
		return;
	flow_key_reverse(&partner_key, &flow->ends, key->protocol);
	partner = bpf_map_lookup_elem(map, &partner_key);
	if (partner && ends_are_reversed(&partner->ends, &key->ends))
		bpf_map_delete_elem(map, &partner_key);
	bpf_map_delete_elem(map, key);
}

/* Removes both rows, wherever they are. */
static __noinline int flow_remove(const struct flow_key *key)
{
	flow_remove_in(&flows, key);
	flow_remove_in(&new_flows, key);
	return 0;
}

static __always_inline void flow_mark_closing(struct flow *flow, const struct flow *from)
{
	if (from->client_closed)
		flow->client_closed = 1;
	if (from->backend_closed)
		flow->backend_closed = 1;
	if (from->backend_first)
		flow->backend_first = 1;
	flow->reset = from->reset;
	flow->used_ns = from->used_ns;
}

/* A FIN, an RST, or the first packet after an RST: both rows learn of it. */
static __noinline int flow_change_state(struct flow *flow, const struct packet *packet, int proved, __u64 now)
{
	struct flow_key partner_key;
	struct flow *partner;

	flow->reset = (packet->tcp_flags & TCP_RST) != 0;
	if (packet->tcp_flags & TCP_FIN) {
		if (!(flow->kind & FLOW_REPLY)) {
			flow->client_closed = 1;
		} else if (!flow->backend_closed) {
			flow->backend_first = !flow->client_closed;
			flow->backend_closed = 1;
		}
	}
	flow->used_ns = now;
	flow_key_reverse(&partner_key, &flow->ends, packet->tuple.protocol);
	if (proved)
		partner = bpf_map_lookup_elem(&flows, &partner_key);
	else
		partner = bpf_map_lookup_elem(&new_flows, &partner_key);
	if (partner && ends_are_reversed(&partner->ends, &packet->tuple.ends))
		flow_mark_closing(partner, flow);
	return 0;
}

/* Notes that a packet of the flow has passed. Its route is asked for again as often as that is written down. */
static __always_inline void flow_track(struct flow *flow, const struct packet *packet, int proved, __u64 now)
{
	if (flow_idle(flow, now) > FLOW_TOUCH_NS) {
		flow->used_ns = now;
		flow->hop.interface = 0;
	}
	if ((packet->tcp_flags & (TCP_FIN | TCP_RST)) || flow->reset)
		flow_change_state(flow, packet, proved, now);
}

/* The row of the other direction, as the one of the requests says. */
static __always_inline void flow_make_reply(struct flow *reply, const struct flow *flow, const struct ends *request)
{
	*reply = *flow;
	ends_reverse(&reply->ends, request);
	reply->kind |= FLOW_REPLY;
	if (!(flow->kind & FLOW_FORWARDED))
		reply->kind |= FLOW_AT_EGRESS;
}

/* The replies' row first: no request goes to a backend whose answers would not be known. */
static __noinline int flow_store(const struct flow_key *key, const struct flow *flow)
{
	struct flow_key reply_key;
	struct flow reply;

	flow_make_reply(&reply, flow, &key->ends);
	flow_key_reverse(&reply_key, &flow->ends, key->protocol);
	if (bpf_map_update_elem(&new_flows, &reply_key, &reply, BPF_ANY))
		return -1;
	if (!bpf_map_update_elem(&new_flows, key, flow, BPF_ANY))
		return 0;
	bpf_map_delete_elem(&new_flows, &reply_key);
	return -1;
}

/* Moves both rows to the lasting table, or leaves both where they are. */
static __always_inline void flow_promote(const struct flow_key *key, const struct flow *flow,
					 const struct flow_key *reply_key, const struct flow *reply)
{
	if (bpf_map_update_elem(&flows, reply_key, reply, BPF_ANY)) {
		count(COUNTER_FLOW_TABLE_FULL);
		return;
	}
	if (bpf_map_update_elem(&flows, key, flow, BPF_ANY)) {
		bpf_map_delete_elem(&flows, reply_key);
		count(COUNTER_FLOW_TABLE_FULL);
		return;
	}
	bpf_map_delete_elem(&new_flows, key);
	bpf_map_delete_elem(&new_flows, reply_key);
	count(COUNTER_FLOW_ESTABLISHED);
}

/*
 * A request of a flow that is not proved yet. Proof is, for TCP, an acknowledgement of what the backend has said, which
 * only somebody who receives its packets can know; for UDP a second datagram after the backend's answer. 0: the
 * flow is no more, its place towards the backend was given to another.
 */
static __noinline int flow_prove(const struct packet *packet, struct flow *flow)
{
	const struct flow_key *key = &packet->tuple;
	struct flow_key reply_key;
	struct flow *reply;

	flow_key_reverse(&reply_key, &flow->ends, key->protocol);
	reply = bpf_map_lookup_elem(&new_flows, &reply_key);
	if (!reply) {
		/* Evicted, unless the other row was too late for a flow that has moved on. */
		if (bpf_map_lookup_elem(&flows, &reply_key))
			return 0;
		return !flow_store(key, flow);
	}
	if (!ends_are_reversed(&reply->ends, &key->ends))
		return 0;
	if (!reply->replied || reply->reset)
		return 1;
	if (key->protocol == IPPROTO_TCP &&
	    (!(packet->tcp_flags & TCP_ACK) || packet->acknowledgement - reply->stamp >= ACKNOWLEDGED_MAX))
		return 1;
	flow->replied = 1;
	flow_promote(key, flow, &reply_key, reply);
	return 1;
}

/* A reply of a flow that is not proved yet. */
static __always_inline void flow_note_reply(struct flow *flow, const struct packet *packet)
{
	if (packet->tcp_flags & TCP_RST)
		return;
	flow->stamp = packet->sequence;
	flow->replied = 1;
}

/* UDP and SCTP: a frontend that became another Service's takes its flows along. Asked once for each change of hands. */
static __noinline int flow_is_owned(const struct packet *packet, struct flow *flow, __u32 hands)
{
	struct frontend_key key = {
		.address = packet->tuple.ends.destination,
		.port = packet->tuple.ends.destination_port,
		.protocol = packet->tuple.protocol,
	};

	if (frontend_has_moved(&key, 0, flow->service_id))
		return 0;
	flow->stamp = hands;
	return 1;
}

/* A backend that opens a connection with the ends of a flow that has ended talks to somebody who has come to it
 * directly, from the port that the flow's client had: a new request of the flow would have made it anew. */
static __always_inline int flow_is_left(const struct flow *flow, const struct packet *packet)
{
	const __u8 both = TCP_SYN | TCP_ACK;

	return flow_is_closed(flow) && (packet->tcp_flags & both) == both;
}

/* May a request still use this flow, or does it begin another? */
static __always_inline int flow_serves(struct flow *flow, const struct packet *packet, int proved, __u64 now)
{
	__u32 hands;

	if (packet->tuple.protocol == IPPROTO_TCP) {
		if (!(packet->tcp_flags & TCP_SYN) || (packet->tcp_flags & TCP_ACK))
			return 1;
		/* A SYN to a backend that is gone would wait in vain; on an open connection it is the backend's to
		 * judge (RFC 5961). */
		return !flow_is_closed(flow) && (proved || backend_get_living(flow->backend_id, flow->generation));
	}
	/* Others: a backend that is gone is left at once. */
	if (flow_idle(flow, now) > (__u64)FLOW_UDP_REPLIED * NANOSECONDS ||
	    !backend_get_living(flow->backend_id, flow->generation))
		return 0;
	hands = epoch_now(EPOCH_HANDS);
	return flow->stamp == hands || flow_is_owned(packet, flow, hands);
}

#endif
