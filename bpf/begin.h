/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * A packet from the wire that belongs to no flow: whether a Service wants it, who may have it, and the flow that it
 * begins.
 *
 * Cost, once for each flow: the roles of its destination, one or two look-ups of the frontend and one more to be sure
 * of it, the pick, at least two look-ups for a free place, and both rows.
 */
#ifndef KUBELANE_BEGIN_H
#define KUBELANE_BEGIN_H

static __always_inline __u32 address_roles(const struct address *address)
{
	__u32 *roles = bpf_map_lookup_elem(&addresses, address);

	return roles ? *roles : 0;
}

/* Copies the frontend that serves the packet's destination to the wire. A cluster IP serves nobody out there. */
static __always_inline int begin_frontend(struct scratch *given)
{
	const struct flow_key *tuple = &given->packet.tuple;
	__u32 roles = address_roles(&tuple->ends.destination);
	struct frontend_key key = {
		.address = tuple->ends.destination,
		.port = tuple->ends.destination_port,
		.protocol = tuple->protocol,
	};
	struct frontend *frontend = (void *)0;

	if (roles & ADDRESS_SERVICE_VIP)
		frontend = bpf_map_lookup_elem(&frontends, &key);
	if (!frontend && (roles & ADDRESS_NODE))
		frontend = frontend_lookup_node_port(&key);
	return frontend && frontend_read(&key, frontend, &given->frontend) &&
	       (given->frontend.flags & (FRONTEND_EXTERNAL_IP | FRONTEND_LOAD_BALANCER | FRONTEND_NODE_PORT));
}

static __always_inline int source_is_allowed(const struct frontend *frontend, const struct address *client)
{
	struct source_range_key key = {.prefix_length = 160, .service_id = frontend->service_id, .address = *client};

	return bpf_map_lookup_elem(&source_ranges, &key) != (void *)0;
}

/* Whether this client may have a backend of this frontend. */
static __always_inline int begin_admit(const struct packet *packet, const struct frontend *frontend)
{
	if (packet->kind == PACKET_PIECE) {
		count(COUNTER_DROPPED_FRAGMENT);
		return VERDICT_DROP;
	}
	if (packet->tcp_flags & TCP_RST) {
		count(COUNTER_DROPPED_UNKNOWN_RESET);
		return VERDICT_DROP;
	}
	if ((frontend->flags & FRONTEND_SOURCE_RANGES) && !source_is_allowed(frontend, &packet->tuple.ends.source)) {
		count(COUNTER_DROPPED_SOURCE_RANGE);
		return VERDICT_DROP;
	}
	if (frontend->outside.count)
		return VERDICT_CONTINUE;
	if (frontend->outside.on_empty == EMPTY_DROP) {
		count(COUNTER_DROPPED_NO_LOCAL_ENDPOINT);
		return VERDICT_DROP;
	}
	count(COUNTER_REFUSED_NO_ENDPOINT);
	return VERDICT_ANSWER_UNREACHABLE;
}

static __always_inline struct choice begin_choose(const struct packet *packet, const struct frontend *frontend)
{
	struct affinity_key key = {.service_id = frontend->service_id, .kind = CLIENT_ADDRESS};

	if (!frontend->affinity_seconds)
		return backend_pick_random(&frontend->outside);
	__builtin_memcpy(key.client, &packet->tuple.ends.source, sizeof(key.client));
	return backend_pick_affine(&key, frontend, &frontend->outside);
}

/* This node's address towards a backend elsewhere. */
static __always_inline int begin_source_of_node(struct __sk_buff *skb, const struct packet *packet, struct ends *ends)
{
	int result;

	if (!packet->is_ip6)
		address_set_ip4(&ends->source, 0);
	result = route_source(skb, ends, packet->tuple.protocol);
	if (result != ROUTE_FOUND) {
		count(result == ROUTE_NONE ? COUNTER_DROPPED_NO_ROUTE : COUNTER_DROPPED_FORWARDING_OFF);
		return VERDICT_DROP;
	}
	/* Replies to any other address would not be looked at when they come in. */
	if (address_roles(&ends->source) & (ADDRESS_LOCAL | ADDRESS_NODE))
		return VERDICT_CONTINUE;
	count(COUNTER_DROPPED_SNAT_SOURCE);
	return VERDICT_DROP;
}

/*
 * The address that the backend will see as its client, and what its port may be. A pod that has come back to itself
 * (out of the node, and in again by a load balancer) sees the Service's address: its own would never leave it. Its
 * replies go out by an outward device like others, and are sent to it from there, as interface 0 says.
 */
static __always_inline int begin_source(struct __sk_buff *skb, const struct packet *packet, struct flow *flow,
					__u32 *ports)
{
	int is_sctp = packet->tuple.protocol == IPPROTO_SCTP;

	*ports = is_sctp ? SNAT_KEEP : SNAT_KEEP_FIRST;
	if (!(flow->kind & FLOW_FORWARDED)) {
		flow->ends.source = packet->tuple.ends.source;
		if (address_equal(&flow->ends.source, &flow->ends.destination)) {
			flow->ends.source = packet->tuple.ends.destination;
			flow->interface = 0;
		}
		return VERDICT_CONTINUE;
	}
	if (!is_sctp)
		*ports = SNAT_ANY;
	return begin_source_of_node(skb, packet, &flow->ends);
}

static __always_inline void begin_note_ports(const struct scratch *given)
{
	__u32 zero = 0;
	struct port_table *table = bpf_map_lookup_elem(&ports, &zero);

	if (!table)
		return;
	if (given->flow.kind & FLOW_FORWARDED)
		table->forwarded[port_index(given->reply.ends.destination_port)] = 1;
	else
		table->replies[port_index(given->reply.ends.source_port)] = 1;
}

/* The flow of a packet to a backend that was chosen: the ends that it will see, and both rows. */
static __noinline int begin_flow(struct __sk_buff *skb, struct scratch *given)
{
	const struct packet *packet = &given->packet;
	struct flow *flow = &given->flow;
	__u32 ports;
	int verdict = begin_source(skb, packet, flow, &ports), reserved;

	if (verdict != VERDICT_CONTINUE)
		return verdict;
	flow_key_reverse(&given->reply, &flow->ends, packet->tuple.protocol);
	reserved = snat_reserve(ports);
	if (reserved == RESERVED_NONE) {
		count(COUNTER_DROPPED_SNAT_EXHAUSTED);
		return VERDICT_DROP;
	}
	if (reserved == RESERVED_USED)
		flow_remove(&given->reply);
	flow->ends.source_port = given->reply.ends.destination_port;
	flow->used_ns = clock_now(given);
	begin_note_ports(given);
	if (flow_store(&packet->tuple, flow)) {
		count(COUNTER_DROPPED_FLOW_TABLE);
		return VERDICT_DROP;
	}
	count(flow->kind & FLOW_FORWARDED ? COUNTER_FLOW_REMOTE : COUNTER_FLOW_LOCAL);
	count_service(flow->service_id);
	if (packet->tuple.protocol == IPPROTO_TCP && !(packet->tcp_flags & TCP_SYN))
		count(COUNTER_FLOW_MIDSTREAM);
	return VERDICT_CONTINUE;
}

static __always_inline void begin_fill(struct flow *flow, const struct backend *backend, __u32 backend_id)
{
	__builtin_memset(flow, 0, sizeof(*flow));
	flow->ends.destination = backend->address;
	flow->ends.destination_port = backend->port;
	flow->kind = backend->flags & BACKEND_NODE_LOCAL ? 0 : FLOW_FORWARDED;
	flow->backend_id = backend_id;
	flow->generation = backend->generation;
	flow->service_id = backend->service_id;
}

/* VERDICT_CONTINUE: the packet has a flow from now on. */
__noinline int begin(struct __sk_buff *skb)
{
	struct scratch *given = scratch();
	struct choice choice;
	__u32 hands;
	int verdict;

	if (!given)
		return VERDICT_DROP;
	/* Before the frontend is looked up: it may change hands meanwhile. */
	hands = epoch_now(EPOCH_HANDS);
	if (!begin_frontend(given))
		return VERDICT_PASS;
	verdict = begin_admit(&given->packet, &given->frontend);
	if (verdict != VERDICT_CONTINUE)
		return verdict;
	choice = begin_choose(&given->packet, &given->frontend);
	if (!choice.backend) {
		count(COUNTER_FAILED_BACKEND_MISSING);
		return VERDICT_PASS;
	}
	begin_fill(&given->flow, choice.backend, choice.backend_id);
	if (given->packet.tuple.protocol == IPPROTO_SCTP &&
	    given->flow.ends.destination_port != given->packet.tuple.ends.destination_port) {
		count(COUNTER_DROPPED_SCTP_PORT);
		return VERDICT_DROP;
	}
	given->flow.interface = skb->ifindex;
	given->flow.stamp = hands;
	return begin_flow(skb, given);
}

#endif
