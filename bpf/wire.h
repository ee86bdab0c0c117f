/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Packets of outward devices: what comes in from the wire, and what leaves for it.
 *
 * Cost of traffic that is not ours: up to three bytes of arrays coming in, one going out.
 *
 * A TCP packet in mid-flow that belongs to no known flow begins one, as with conntrack's default: it goes to a backend
 * picked anew. Where that is the right one (the only one, or the one that session affinity remembers) the connection
 * lives on; any other answers with a reset that the client believes, its sequence numbers being right.
 */
#ifndef KUBELANE_WIRE_H
#define KUBELANE_WIRE_H

/* The first piece of a datagram leaves its ports for the others, which take them. 0: there are none to take. `is_ours`: the
 * ports are served, or known from flows; others are not remembered. */
static __noinline int fragment_ports(struct packet *packet, int is_ours)
{
	struct fragment_key key = {
		.source = packet->tuple.ends.source,
		.destination = packet->tuple.ends.destination,
		.id = packet->fragment_id,
		.protocol = packet->tuple.protocol,
	};
	struct fragment_ports *known, fresh = {packet->tuple.ends.source_port, packet->tuple.ends.destination_port};

	if (packet->kind == PACKET_FIRST) {
		if (!is_ours)
			return 1;
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

static __always_inline int wire_packet(hook_context *ctx, struct scratch *given, const int from_pod)
{
	int recall = flow_recall(ctx, given, 0), verdict;

	/* The copy may have been made while another processor wrote. */
	if (recall == RECALL_CHANGING)
		recall = flow_reread();
	if (recall == RECALL_NONE) {
		verdict = begin(ctx);
		if (verdict == VERDICT_UNKNOWN)
			return from_pod ? VERDICT_PASS : probe_answer(ctx);
		if (verdict != VERDICT_CONTINUE)
			return verdict;
	} else if (recall == RECALL_FOREIGN) {
		return VERDICT_PASS;
	} else if (recall == RECALL_CHANGING) {
		count(COUNTER_DROPPED_FLOW_CHANGING);
		return VERDICT_DROP;
	}
	return deliver_packet(ctx, HOOK_TC_INGRESS, given, from_pod);
}

/* An ICMP error is about a packet that went the other way: the flow is that of its answer. Copies its row. Those that the
 * host's stack makes are about packets as it saw them. */
static __always_inline int flow_of_quoted(hook_context *ctx, struct scratch *given, int at_egress)
{
	struct flow *flow, *half = (void *)0;

	flow_key_reverse(&given->reply, &given->quoted.tuple.ends, given->quoted.tuple.protocol);
	flow = flow_find(&given->reply);
	if (!flow && at_egress)
		flow = half = bpf_map_lookup_elem(&handed, &given->reply);
	if (!flow)
		return 0;
	given->flow = *flow;
	if (flow_is_at_egress(given->flow.state) != at_egress ||
	    ends_change(&given->reply.ends, &given->flow.ends) != given->flow.change)
		return 0;
	given->backend_ends = given->reply.ends;
	return !half || stack_has_flow(ctx, given->reply.protocol);
}

/* Translates and sends on an ICMP error. Answers a verdict. */
__noinline int wire_error(hook_context *ctx, __u32 at_egress)
{
	struct packet *quoted, *error;
	struct scratch *given = scratch();

	if (!given)
		return VERDICT_PASS;
	error = &given->packet;
	quoted = &given->quoted;
	packet_reset(quoted, error->l4 + ICMP_HEADER, error->is_ip6);
	if (!packet_parse_quoted(ctx, quoted) ||
	    !address_equal(&error->tuple.ends.destination, &quoted->tuple.ends.source))
		return VERDICT_PASS;
	return flow_of_quoted(ctx, given, at_egress) ? deliver_error(ctx, given) : VERDICT_PASS;
}

/* What the program answers. */
static __always_inline int wire_finish(hook_context *ctx, int verdict)
{
	if (verdict != VERDICT_PASS && verdict != VERDICT_SEND && verdict != VERDICT_DROP)
		verdict = icmp_answer(ctx, verdict);
	return hook_action(verdict);
}

/* Pieces whose first one was not seen. For another host's stack they would never become whole; this host's may wait. */
static __always_inline int wire_stray_piece(hook_context *ctx, const struct packet *packet, const int from_pod)
{
	__u32 ours = ADDRESS_SERVICE_VIP;

	if (from_pod || config.external_cluster_ips)
		ours |= ADDRESS_CLUSTER_IP;
	if (!(address_roles(&packet->tuple.ends.destination) & ours) || (from_pod && !owner_is_gateway(ctx, packet)))
		return VERDICT_PASS;
	count(COUNTER_DROPPED_FRAGMENT);
	return VERDICT_DROP;
}

/* The scratch with the packet that the program was called for; none: neither TCP, UDP, SCTP nor an ICMP error. */
static __always_inline struct scratch *wire_parse(hook_context *ctx, __u32 l3, __u32 is_ip6, const int from_pod)
{
	struct scratch *given = scratch();

	if (!given)
		return (void *)0;
	packet_reset(&given->packet, l3, is_ip6);
	given->from_pod = from_pod;
	given->packet.interface = hook_interface(ctx);
	given->packet.mark = hook_mark(ctx);
	packet_parse(ctx, &given->packet);
	return given->packet.kind == PACKET_OTHER ? (void *)0 : given;
}

/* Could a packet to this port be one of ours: is the port served to the wire, or do replies come to it? */
static __always_inline int wire_port_is_ours(const struct wire_filter *filter, __be16 port)
{
	__u32 index = port_index(port), zero = 0;
	struct port_table *table = bpf_map_lookup_elem(&ports, &zero);

	return filter->ports[index] || (table && table->forwarded[index]);
}

/* Could a packet to this address be one of ours, whatever its port is? The Services' addresses of the wire and the node's own
 * are asked for by their ports; a pod may ask for any Service, and is refused the ports that none has. */
enum wire_interest {
	INTEREST_NONE = 0,
	INTEREST_SOME_PORTS = 1,
	INTEREST_ALL_PORTS = 2,
};

static __always_inline enum wire_interest wire_interest(const struct wire_filter *filter,
							const struct address *destination, const int from_pod)
{
	__u32 index = address_index(destination);

	if ((from_pod || config.external_cluster_ips) && (filter->sockets[index] & SOCKET_FILTER_SERVICE))
		return INTEREST_ALL_PORTS;
	return filter->addresses[index] ? INTEREST_SOME_PORTS : INTEREST_NONE;
}

static __always_inline int wire_piece_is_ours(const struct packet *packet, const int from_pod)
{
	__u32 zero = 0;
	struct wire_filter *filter = bpf_map_lookup_elem(&wire_filter, &zero);

	return filter && (wire_interest(filter, &packet->tuple.ends.destination, from_pod) == INTEREST_ALL_PORTS ||
			  wire_port_is_ours(filter, packet->tuple.ends.destination_port));
}

/* A packet that came in and may be for us. Answers a verdict, as those below do. */
static __always_inline int wire_in(hook_context *ctx, __u32 l3, __u32 is_ip6, const int from_pod)
{
	struct scratch *given = wire_parse(ctx, l3, is_ip6, from_pod);
	struct packet *packet;
	int verdict;

	if (!given)
		return VERDICT_PASS;
	packet = &given->packet;
	if (packet->kind == PACKET_ERROR)
		verdict = wire_error(ctx, 0);
	else if (packet->kind != PACKET_WHOLE && !fragment_ports(packet, wire_piece_is_ours(packet, from_pod)))
		verdict = wire_stray_piece(ctx, packet, from_pod);
	else
		verdict = wire_packet(ctx, given, from_pod);
	return verdict;
}

/* A reply that leaves by another device than the one that its flow came in by carries an address that is not that
 * device's: it is sent by the route that its new source has. */
__noinline int wire_redirect(hook_context *ctx)
{
	struct scratch *given = scratch();
	struct route route = {};

	if (!given)
		return VERDICT_PASS;
	if (route_recall(ctx, given, &given->packet, &given->flow.ends, &route) != ROUTE_FOUND ||
	    route.interface == given->packet.interface)
		return VERDICT_PASS;
	if (route_send(ctx, given->packet.l3, &route)) {
		count(COUNTER_DROPPED_REWRITE);
		return VERDICT_DROP;
	}
	return VERDICT_SEND;
}

/* May a local backend have answered this client from this port? */
static __always_inline int wire_is_reply(__be32 source, __be32 destination, __be16 port)
{
	__u32 zero = 0;
	struct port_table *table = bpf_map_lookup_elem(&ports, &zero);

	return table && table->replies[table->replies_read & 1][reply_index(source, destination, port)];
}

static __always_inline int wire_piece_is_reply(const struct packet *packet)
{
	const struct ends *ends = &packet->tuple.ends;

	return wire_is_reply(address_words(&ends->source)->word[3], address_words(&ends->destination)->word[3],
			     ends->source_port);
}

/* A packet that leaves and may be a local backend's reply, or from a port that is served. */
static __always_inline int wire_out(hook_context *ctx, __u32 l3, __u32 is_ip6)
{
	struct scratch *given = wire_parse(ctx, l3, is_ip6, 0);
	struct packet *packet;
	int recall;

	if (!given)
		return VERDICT_PASS;
	packet = &given->packet;
	if (packet->kind == PACKET_ERROR)
		return wire_error(ctx, 1);
	if (packet->kind != PACKET_WHOLE && !fragment_ports(packet, wire_piece_is_reply(packet)))
		return VERDICT_PASS;
	recall = flow_recall(ctx, given, 1);
	if (recall == RECALL_CHANGING) {
		count(COUNTER_DROPPED_FLOW_CHANGING);
		return VERDICT_DROP;
	}
	if (recall != RECALL_SERVES) {
		if (!stack_recall(ctx, given)) {
			owner_note(ctx);
			return VERDICT_PASS;
		}
		given->flow.generation_or_interface = packet->interface;
	} else if (config.counts_traffic) {
		traffic_packet(ctx);
	}
	given->rewrite_mode = REWRITE_HOST;
	if (rewrite_packet(ctx, HOOK_TC_EGRESS, given)) {
		count(COUNTER_DROPPED_REWRITE);
		return VERDICT_DROP;
	}
	if (given->flow.generation_or_interface == packet->interface)
		return VERDICT_PASS;
	return wire_redirect(ctx);
}

/*
 * The question that all traffic pays for when it comes in: could it be for us? Its address is looked for, then its
 * port. What has no ports in the usual place, or is no TCP, UDP or SCTP, is looked at more closely if its address may
 * be one of ours.
 */
static __always_inline int wire_may_request(hook_context *ctx, __u32 l3, int family, const int from_pod)
{
	void *data = hook_bytes(ctx), *end = hook_bytes_end(ctx);
	struct ipv6hdr *ip6 = data + l3;
	struct iphdr *ip4 = data + l3;
	enum wire_interest interest;
	struct address destination;
	struct wire_filter *filter;
	__be16 *ports_at;
	__u32 zero = 0;
	__u8 protocol;

	if (family == 4) {
		ports_at = (void *)(ip4 + 1);
		if ((void *)(ports_at + 2) > end)
			return 1;
		address_set_ip4(&destination, ip4->daddr);
		protocol = ip4->protocol;
	} else {
		ports_at = (void *)(ip6 + 1);
		if ((void *)(ports_at + 2) > end)
			return 1;
		address_set_words(&destination, ip6->daddr.in6_u.u6_addr32);
		protocol = ip6->nexthdr;
	}
	filter = bpf_map_lookup_elem(&wire_filter, &zero);
	if (!filter)
		return 0;
	interest = wire_interest(filter, &destination, from_pod);
	if (interest == INTEREST_NONE)
		return 0;
	if (family == 4 && (ip4->ihl != 5 || (ip4->frag_off & bpf_htons(IP4_MORE_FRAGMENTS | IP4_FRAGMENT_OFFSET))))
		return 1;
	if (protocol_has_ports(protocol))
		return interest == INTEREST_ALL_PORTS || wire_port_is_ours(filter, ports_at[1]);
	if (protocol == (family == 4 ? IPPROTO_ICMP : IPPROTO_ICMPV6))
		return is_icmp_error(family == 6, *(__u8 *)ports_at);
	/* IPv6: extension headers may come before the ports. */
	return family == 6;
}

static __always_inline int wire_ingress(hook_context *ctx, __u32 l3)
{
	int family = hook_family(ctx);

	/* Frames for other hosts, which a switch floods, and for all: the stack would not forward them either. What has
	 * no link header is for this host. */
	if (l3 && !hook_is_to_this_host(ctx))
		return TC_ACT_UNSPEC;
	if (!family || !wire_may_request(ctx, l3, family, 0))
		return TC_ACT_UNSPEC;
	return wire_finish(ctx, wire_in(ctx, l3, family == 6, 0));
}

/* From a pod. Whether the frame is for this node is asked where a flow begins: a packet of one that has begun is. */
static __always_inline int pod_ingress(hook_context *ctx, __u32 l3)
{
	int family = hook_family(ctx);

	if (!family || !wire_may_request(ctx, l3, family, 1))
		return TC_ACT_UNSPEC;
	return wire_finish(ctx, wire_in(ctx, l3, family == 6, 1));
}

/* The same for what leaves: may it be a local backend's answer to this client, or come from a served address and port?
 * What was sent on from here by the device that it came in by is neither. */
static __always_inline int wire_may_reply(hook_context *ctx, __u32 l3, int family)
{
	void *data = hook_bytes(ctx), *end = hook_bytes_end(ctx);
	struct ipv6hdr *ip6 = data + l3;
	struct iphdr *ip4 = data + l3;
	struct wire_filter *filter;
	__be32 source, destination;
	struct address own;
	__u32 zero = 0;
	__be16 *port;

	if (family == 4) {
		port = (void *)(ip4 + 1);
		if ((void *)(port + 1) > end)
			return 1;
		if (!protocol_has_ports(ip4->protocol))
			return ip4->protocol == IPPROTO_ICMP && is_icmp_error(0, *(__u8 *)port);
		if (ip4->ihl != 5 || (ip4->frag_off & bpf_htons(IP4_MORE_FRAGMENTS | IP4_FRAGMENT_OFFSET)))
			return 1;
		source = ip4->saddr;
		destination = ip4->daddr;
		address_set_ip4(&own, source);
	} else {
		port = (void *)(ip6 + 1);
		if ((void *)(port + 1) > end)
			return 1;
		if (ip6->nexthdr == IPPROTO_ICMPV6)
			return is_icmp_error(1, *(__u8 *)port);
		if (!protocol_has_ports(ip6->nexthdr))
			return 1;
		source = ip6->saddr.in6_u.u6_addr32[3];
		address_set_words(&own, ip6->saddr.in6_u.u6_addr32);
		destination = ip6->daddr.in6_u.u6_addr32[3];
	}
	if (wire_is_reply(source, destination, *port))
		return 1;
	filter = bpf_map_lookup_elem(&wire_filter, &zero);
	return filter && filter->ports[port_index(*port)] && filter->addresses[address_index(&own)] &&
	       hook_came_from(ctx) != hook_interface(ctx);
}

static __always_inline int wire_egress(hook_context *ctx, __u32 l3)
{
	int family = hook_family(ctx);

	if (!family || !wire_may_reply(ctx, l3, family))
		return TC_ACT_UNSPEC;
	return wire_finish(ctx, wire_out(ctx, l3, family == 6));
}

#endif
