/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Packets of outward devices: what comes in from the wire, and what leaves for it.
 *
 * Cost of traffic that is not ours: one hash look-up of the destination coming in, one byte of an array going out.
 *
 * A TCP packet in mid-flow that belongs to no known flow begins one, as with conntrack's default: it goes to a backend
 * picked anew. Where that is the right one (the only one, or the one that session affinity remembers) the connection
 * lives on; any other answers with a reset that the client believes, its sequence numbers being right.
 */
#ifndef KUBELANE_WIRE_H
#define KUBELANE_WIRE_H

/* Verifiers before 5.11 do not see that a swapped port has 16 bits; the compiler does, and would drop the mask. */
static __always_inline __u32 port_index(__be16 port)
{
	__u32 index = bpf_ntohs(port);

	barrier_var(index);
	return index & 0xffff;
}

static __always_inline struct port_table *port_table(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&ports, &zero);
}

static __always_inline struct flow *flow_find(const struct flow_key *key, int *proved)
{
	struct flow *flow = bpf_map_lookup_elem(&flows, key);

	*proved = flow != (void *)0;
	return flow ? flow : bpf_map_lookup_elem(&new_flows, key);
}

/* The first piece of a datagram leaves its ports for the others, which take them. 0: there are none to take. */
static __noinline int fragment_ports(struct packet *packet)
{
	struct fragment_key key = {
		.source = packet->tuple.ends.source,
		.destination = packet->tuple.ends.destination,
		.id = packet->fragment_id,
		.protocol = packet->tuple.protocol,
	};
	struct fragment_ports *known, fresh = {packet->tuple.ends.source_port, packet->tuple.ends.destination_port};

	if (packet->kind == PACKET_FIRST) {
		bpf_map_update_elem(&fragments, &key, &fresh, BPF_ANY);
		return 1;
	}
	known = bpf_map_lookup_elem(&fragments, &key);
	if (!known)
		return 0;
	packet->tuple.ends.source_port = known->source_port;
	packet->tuple.ends.destination_port = known->destination_port;
	return 1;
}

/* Could the port be one of a flow's? The table says which NodePorts were ever asked for; replies from backends
 * elsewhere come to the private range. */
static __always_inline int port_is_known(__be16 port)
{
	__u16 offset = bpf_ntohs(port) - config.snat_first;
	struct port_table *table = port_table();

	return offset < config.snat_ports || (table && table->served[port_index(port)]);
}

/* The frontend that serves packets to `ends` from the wire, if any. A cluster IP serves none. */
static __always_inline struct frontend *wire_frontend(const struct flow_key *tuple, __u32 roles)
{
	struct frontend_key key = {
		.address = tuple->ends.destination,
		.port = tuple->ends.destination_port,
		.protocol = tuple->protocol,
	};
	struct frontend *frontend = (void *)0;

	if (roles & ADDRESS_SERVICE_VIP)
		frontend = bpf_map_lookup_elem(&frontends, &key);
	if (!frontend && (roles & ADDRESS_NODE)) {
		struct port_table *table = port_table();

		frontend = frontend_lookup_node_port(&key);
		if (frontend && table)
			table->served[port_index(tuple->ends.destination_port)] = 1;
	}
	if (!frontend || !(frontend->flags & (FRONTEND_EXTERNAL_IP | FRONTEND_LOAD_BALANCER | FRONTEND_NODE_PORT)))
		return (void *)0;
	return frontend;
}

static __noinline int source_is_allowed(const struct frontend *frontend, const struct address *client)
{
	struct source_range_key key = {.prefix_length = 160, .service_id = frontend->service_id, .address = *client};

	return bpf_map_lookup_elem(&source_ranges, &key) != (void *)0;
}

/* Whether this client may have a backend of this frontend. */
static __always_inline int wire_admit(const struct packet *packet, const struct frontend *frontend)
{
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

static __always_inline struct choice wire_choose(const struct packet *packet, const struct frontend *frontend)
{
	struct affinity_key key = {.service_id = frontend->service_id, .kind = CLIENT_ADDRESS};

	if (!frontend->affinity_seconds)
		return backend_pick_random(&frontend->outside);
	__builtin_memcpy(key.client, &packet->tuple.ends.source, sizeof(key.client));
	return backend_pick_affine(&key, frontend, &frontend->outside);
}

/* The address that the backend will see as its client. */
static __always_inline int wire_source(struct __sk_buff *skb, const struct packet *packet,
				       const struct backend *backend, struct ends *ends)
{
	__u32 *roles;
	int result;

	if (backend->flags & BACKEND_NODE_LOCAL) {
		ends->source = packet->tuple.ends.source;
		return VERDICT_CONTINUE;
	}
	if (!packet->is_ip6)
		address_set_ip4(&ends->source, 0);
	result = route_source(skb, ends, packet->tuple.protocol);
	if (result != ROUTE_FOUND) {
		count(result == ROUTE_NONE ? COUNTER_DROPPED_NO_ROUTE : COUNTER_DROPPED_FORWARDING_OFF);
		return VERDICT_DROP;
	}
	/* Replies to any other address would not be looked at when they come in. */
	roles = bpf_map_lookup_elem(&addresses, &ends->source);
	if (!roles || !(*roles & (ADDRESS_LOCAL | ADDRESS_NODE))) {
		count(COUNTER_DROPPED_SNAT_SOURCE);
		return VERDICT_DROP;
	}
	return VERDICT_CONTINUE;
}

/* The first packet of a flow, to a backend that was chosen: the ends that it will see, and both rows. */
static __noinline int flow_open(struct __sk_buff *skb, const struct packet *packet, const struct backend *backend,
				__u32 backend_id)
{
	__u32 local = backend->flags & BACKEND_NODE_LOCAL;
	struct flow flow = {
		.ends = {.destination = backend->address, .destination_port = backend->port},
		.kind = local ? 0 : FLOW_FORWARDED,
		.backend_id = backend_id,
		.generation = backend->generation,
		.service_id = backend->service_id,
		.interface = skb->ifindex,
	};
	__u32 zero = 0;
	struct place_wanted *wanted = bpf_map_lookup_elem(&places_wanted, &zero);
	struct port_table *table = port_table();
	int verdict = wire_source(skb, packet, backend, &flow.ends);

	if (verdict != VERDICT_CONTINUE)
		return verdict;
	if (!wanted)
		return VERDICT_DROP;
	wanted->request = packet->tuple;
	flow_key_reverse(&wanted->reply, &flow.ends, packet->tuple.protocol);
	if (snat_reserve(local)) {
		count(COUNTER_DROPPED_SNAT_EXHAUSTED);
		return VERDICT_DROP;
	}
	flow_remove(&wanted->reply);
	flow.ends.source_port = wanted->reply.ends.destination_port;
	flow.used_ns = clock_ns();
	if (local && table)
		table->replies[port_index(backend->port)] = 1;
	if (flow_store(&packet->tuple, &flow)) {
		count(COUNTER_DROPPED_FLOW_TABLE);
		return VERDICT_DROP;
	}
	count(local ? COUNTER_FLOW_LOCAL : COUNTER_FLOW_REMOTE);
	if (packet->tuple.protocol == IPPROTO_TCP && !(packet->tcp_flags & TCP_SYN))
		count(COUNTER_FLOW_MIDSTREAM);
	return VERDICT_CONTINUE;
}

/* A packet that belongs to no flow: VERDICT_CONTINUE, and a backend, if it may begin one. */
static __noinline int wire_begin(const struct packet *packet, __u32 roles, struct choice *choice)
{
	struct frontend *frontend = wire_frontend(&packet->tuple, roles);
	int verdict;

	if (!frontend)
		return VERDICT_PASS;
	if (packet->kind == PACKET_PIECE) {
		count(COUNTER_DROPPED_FRAGMENT);
		return VERDICT_DROP;
	}
	verdict = wire_admit(packet, frontend);
	if (verdict != VERDICT_CONTINUE)
		return verdict;
	*choice = wire_choose(packet, frontend);
	if (choice->backend)
		return VERDICT_CONTINUE;
	count(COUNTER_FAILED_BACKEND_MISSING);
	return VERDICT_PASS;
}

/* A flow that ended, or whose backend is gone, makes way. A backend in TIME_WAIT keeps its replies' row, so that no
 * other client is given the same port before it has passed. */
static __always_inline void flow_make_way(const struct flow_key *key, const struct flow *flow)
{
	if (!flow->backend_first) {
		flow_remove(key);
		return;
	}
	bpf_map_delete_elem(&flows, key);
	bpf_map_delete_elem(&new_flows, key);
}

/* The row of a packet that came in, if it still serves. */
static __always_inline struct flow *flow_recall(const struct packet *packet, __u64 now)
{
	struct flow *flow;
	int proved;

	flow = flow_find(&packet->tuple, &proved);
	if (!flow || (flow->kind & FLOW_AT_EGRESS))
		return (void *)0;
	if (flow->kind & FLOW_REPLY) {
		if (!proved)
			flow_note_reply(flow, packet);
	} else if (!flow_serves(flow, packet, proved, now)) {
		flow_make_way(&packet->tuple, flow);
		return (void *)0;
	} else if (!proved && packet->kind != PACKET_PIECE && !flow_prove(packet, flow)) {
		flow_remove(&packet->tuple);
		return (void *)0;
	}
	flow_track(flow, packet, proved, now);
	return flow;
}

static __always_inline int wire_packet(struct __sk_buff *skb, struct packet *packet, __u32 roles)
{
	__u64 now = clock_ns();
	struct flow *flow = (void *)0;
	struct choice choice = {};
	int verdict;

	if ((roles & ADDRESS_SERVICE_VIP) || port_is_known(packet->tuple.ends.destination_port))
		flow = flow_recall(packet, now);
	if (!flow) {
		verdict = wire_begin(packet, roles, &choice);
		if (verdict == VERDICT_CONTINUE && choice.backend)
			verdict = flow_open(skb, packet, choice.backend, choice.backend_id);
		if (verdict != VERDICT_CONTINUE)
			return verdict;
		flow = bpf_map_lookup_elem(&new_flows, &packet->tuple);
		if (!flow) {
			count(COUNTER_DROPPED_FLOW_TABLE);
			return VERDICT_DROP;
		}
	}
	return deliver_packet(skb, packet, flow);
}

/* An ICMP error is about a packet that went the other way: the flow is that of its answer. */
static __noinline struct flow *flow_of_quoted(const struct packet *quoted, __u32 at_egress)
{
	struct port_table *table = port_table();
	struct flow_key key;
	struct flow *flow;
	int proved;

	flow_key_reverse(&key, &quoted->tuple.ends, quoted->tuple.protocol);
	if (!table || (at_egress && !table->replies[port_index(key.ends.source_port)]))
		return (void *)0;
	flow = flow_find(&key, &proved);
	if (!flow || (flow->kind & FLOW_AT_EGRESS) != at_egress)
		return (void *)0;
	return flow;
}

static __noinline int wire_error(struct __sk_buff *skb, struct packet *error, __u32 at_egress)
{
	struct packet quoted = {.l3 = error->l4 + ICMP_HEADER, .is_ip6 = error->is_ip6};
	struct flow *flow;

	if (!packet_parse_quoted(skb, &quoted) ||
	    !address_equal(&error->tuple.ends.destination, &quoted.tuple.ends.source))
		return VERDICT_PASS;
	flow = flow_of_quoted(&quoted, at_egress);
	return flow ? deliver_error(skb, error, &quoted, flow) : VERDICT_PASS;
}

static __always_inline int wire_finish(struct __sk_buff *skb, const struct packet *packet, int verdict)
{
	switch (verdict) {
	case VERDICT_PASS:
		return TC_ACT_UNSPEC;
	case VERDICT_SEND:
		return TC_ACT_REDIRECT;
	case VERDICT_DROP:
		return TC_ACT_SHOT;
	default:
		return icmp_answer(skb, packet, verdict);
	}
}

/* A packet to one of our addresses. `roles`: enum address_flag. */
static __noinline int wire_in(struct __sk_buff *skb, __u32 l3, __u32 is_ip6, __u32 roles)
{
	struct packet packet = {.l3 = l3, .is_ip6 = is_ip6};
	int verdict;

	packet_parse(skb, &packet);
	if (packet.kind == PACKET_OTHER)
		return TC_ACT_UNSPEC;
	if (packet.kind == PACKET_ERROR) {
		verdict = wire_error(skb, &packet, 0);
	} else if (packet.kind != PACKET_WHOLE && !fragment_ports(&packet)) {
		/* For another host's stack the pieces would never become whole; this host's may wait for the first. */
		if (!(roles & ADDRESS_SERVICE_VIP))
			return TC_ACT_UNSPEC;
		count(COUNTER_DROPPED_FRAGMENT);
		verdict = VERDICT_DROP;
	} else {
		verdict = wire_packet(skb, &packet, roles);
	}
	return wire_finish(skb, &packet, verdict);
}

/* A reply that leaves by another device than the one that its flow came in by carries an address that is not that
 * device's: it is sent by the route that its new source has. */
static __always_inline int wire_redirect(struct __sk_buff *skb, const struct packet *packet, const struct ends *ends)
{
	struct route route = {};

	if (route_find(skb, packet, ends, &route) != ROUTE_FOUND || route.interface == skb->ifindex)
		return TC_ACT_UNSPEC;
	return bpf_redirect_neigh(route.interface, &route.next, sizeof(route.next), 0);
}

/* A flow that is opened again has new rows before its SYN reaches the backend. One that the backend accepts on an ended
 * flow's ports came to it directly, from a client that can: it is not ours. */
static __always_inline int reply_is_anothers(const struct packet *packet, const struct flow *flow)
{
	__u32 accepting = TCP_SYN | TCP_ACK;

	return packet->tuple.protocol == IPPROTO_TCP && (packet->tcp_flags & accepting) == accepting &&
	       flow_is_closed(flow);
}

/* A packet that leaves and may be a local backend's reply. */
static __noinline int wire_out(struct __sk_buff *skb, __u32 l3, __u32 is_ip6)
{
	struct packet packet = {.l3 = l3, .is_ip6 = is_ip6};
	struct flow *flow;
	int proved;

	packet_parse(skb, &packet);
	if (packet.kind == PACKET_OTHER)
		return TC_ACT_UNSPEC;
	if (packet.kind == PACKET_ERROR)
		return wire_finish(skb, &packet, wire_error(skb, &packet, FLOW_AT_EGRESS));
	if (packet.kind != PACKET_WHOLE && !fragment_ports(&packet))
		return TC_ACT_UNSPEC;
	flow = flow_find(&packet.tuple, &proved);
	if (!flow || !(flow->kind & FLOW_AT_EGRESS))
		return TC_ACT_UNSPEC;
	if (reply_is_anothers(&packet, flow)) {
		flow_remove(&packet.tuple);
		return TC_ACT_UNSPEC;
	}
	if (!proved)
		flow_note_reply(flow, &packet);
	flow_track(flow, &packet, proved, clock_ns());
	if (rewrite_packet(skb, &packet, &flow->ends, REWRITE_HOST)) {
		count(COUNTER_DROPPED_REWRITE);
		return TC_ACT_SHOT;
	}
	return flow->interface == skb->ifindex ? TC_ACT_UNSPEC : wire_redirect(skb, &packet, &flow->ends);
}

/* The one question that all traffic pays for when it comes in: is it for one of our addresses? */
static __always_inline int wire_ingress(struct __sk_buff *skb, __u32 l3)
{
	int family = packet_family(skb);
	struct address destination;
	__u32 *roles;

	if (!family || !packet_destination(skb, l3, family, &destination))
		return TC_ACT_UNSPEC;
	roles = bpf_map_lookup_elem(&addresses, &destination);
	if (!roles || !(*roles & (ADDRESS_NODE | ADDRESS_LOCAL | ADDRESS_SERVICE_VIP)))
		return TC_ACT_UNSPEC;
	return wire_in(skb, l3, family == 6, *roles);
}

static __always_inline int protocol_is_plain(__u8 protocol)
{
	return protocol == IPPROTO_TCP || protocol == IPPROTO_UDP;
}

/*
 * The one question that all traffic pays for when it leaves: is its source port one that a local backend has replied
 * from? What has no ports in the usual place, or is no TCP or UDP, is looked at more closely if it may be for us.
 */
static __always_inline int wire_may_reply(struct __sk_buff *skb, __u32 l3, int family)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct ipv6hdr *ip6 = data + l3;
	struct iphdr *ip4 = data + l3;
	struct port_table *table;
	__be16 *port;

	if (family == 4) {
		port = (void *)(ip4 + 1);
		if ((void *)(port + 1) > end)
			return 1;
		if (!protocol_is_plain(ip4->protocol))
			return ip4->protocol == IPPROTO_ICMP && is_icmp_error(0, *(__u8 *)port);
		if (ip4->ihl != 5 || (ip4->frag_off & bpf_htons(IP4_MORE_FRAGMENTS | IP4_FRAGMENT_OFFSET)))
			return 1;
	} else {
		port = (void *)(ip6 + 1);
		if ((void *)(port + 1) > end)
			return 1;
		if (ip6->nexthdr == IPPROTO_ICMPV6)
			return is_icmp_error(1, *(__u8 *)port);
		if (!protocol_is_plain(ip6->nexthdr))
			return 1;
	}
	table = port_table();
	return table && table->replies[port_index(*port)];
}

static __always_inline int wire_egress(struct __sk_buff *skb, __u32 l3)
{
	int family = packet_family(skb);

	if (!family || !wire_may_reply(skb, l3, family))
		return TC_ACT_UNSPEC;
	return wire_out(skb, l3, family == 6);
}

#endif
