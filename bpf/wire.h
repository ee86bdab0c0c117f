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

static __always_inline int wire_packet(struct __sk_buff *skb, struct scratch *given)
{
	struct packet *packet = &given->packet;
	struct flow *flow = flow_recall(packet, clock_now(given));
	int verdict;

	if (!flow) {
		verdict = begin(skb);
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
static __always_inline struct flow *flow_of_quoted(const struct packet *quoted, __u32 at_egress)
{
	struct flow_key key;
	struct flow *flow;
	int proved;

	flow_key_reverse(&key, &quoted->tuple.ends, quoted->tuple.protocol);
	flow = flow_find(&key, &proved);
	if (!flow || (flow->kind & FLOW_AT_EGRESS) != at_egress)
		return (void *)0;
	return flow;
}

/* Translates and sends on an ICMP error. Answers a verdict. */
__noinline int wire_error(struct __sk_buff *skb, __u32 at_egress)
{
	struct packet *quoted, *error;
	struct scratch *given = scratch();
	struct flow *flow;

	if (!given)
		return VERDICT_PASS;
	error = &given->packet;
	quoted = &given->quoted;
	packet_reset(quoted, error->l4 + ICMP_HEADER, error->is_ip6);
	if (!packet_parse_quoted(skb, quoted) ||
	    !address_equal(&error->tuple.ends.destination, &quoted->tuple.ends.source))
		return VERDICT_PASS;
	flow = flow_of_quoted(quoted, at_egress);
	return flow ? deliver_error(skb, error, quoted, flow) : VERDICT_PASS;
}

static __always_inline int wire_finish(struct __sk_buff *skb, int verdict)
{
	switch (verdict) {
	case VERDICT_PASS:
		return TC_ACT_UNSPEC;
	case VERDICT_SEND:
		return TC_ACT_REDIRECT;
	case VERDICT_DROP:
		return TC_ACT_SHOT;
	default:
		return icmp_answer(skb, verdict);
	}
}

/* Pieces whose first one was not seen. For another host's stack they would never become whole; this host's may wait. */
static __always_inline int wire_stray_piece(const struct packet *packet)
{
	if (!(address_roles(&packet->tuple.ends.destination) & ADDRESS_SERVICE_VIP))
		return VERDICT_PASS;
	count(COUNTER_DROPPED_FRAGMENT);
	return VERDICT_DROP;
}

/* The scratch with the packet that the program was called for; none: neither TCP, UDP, SCTP nor an ICMP error. */
static __always_inline struct scratch *wire_parse(struct __sk_buff *skb, __u32 l3, __u32 is_ip6)
{
	struct scratch *given = scratch();

	if (!given)
		return (void *)0;
	packet_reset(&given->packet, l3, is_ip6);
	packet_parse(skb, &given->packet);
	return given->packet.kind == PACKET_OTHER ? (void *)0 : given;
}

/* A packet that came in and may be for us. */
static __always_inline int wire_in(struct __sk_buff *skb, __u32 l3, __u32 is_ip6)
{
	struct scratch *given = wire_parse(skb, l3, is_ip6);
	struct packet *packet;
	int verdict;

	if (!given)
		return TC_ACT_UNSPEC;
	packet = &given->packet;
	if (packet->kind == PACKET_ERROR)
		verdict = wire_error(skb, 0);
	else if (packet->kind != PACKET_WHOLE && !fragment_ports(packet))
		verdict = wire_stray_piece(packet);
	else
		verdict = wire_packet(skb, given);
	return wire_finish(skb, verdict);
}

/* A reply that leaves by another device than the one that its flow came in by carries an address that is not that
 * device's: it is sent by the route that its new source has. */
static __always_inline int wire_redirect(struct __sk_buff *skb, const struct packet *packet, const struct ends *ends)
{
	struct route route = {};

	if (route_find(skb, packet, ends, &route) != ROUTE_FOUND || route.interface == skb->ifindex)
		return TC_ACT_UNSPEC;
	if (route_send(skb, packet->l3, &route)) {
		count(COUNTER_DROPPED_REWRITE);
		return TC_ACT_SHOT;
	}
	return TC_ACT_REDIRECT;
}

/* A packet that leaves and may be a local backend's reply. */
static __always_inline int wire_out(struct __sk_buff *skb, __u32 l3, __u32 is_ip6)
{
	struct scratch *given = wire_parse(skb, l3, is_ip6);
	struct packet *packet;
	struct flow *flow;
	int proved;

	if (!given)
		return TC_ACT_UNSPEC;
	packet = &given->packet;
	if (packet->kind == PACKET_ERROR)
		return wire_finish(skb, wire_error(skb, FLOW_AT_EGRESS));
	if (packet->kind != PACKET_WHOLE && !fragment_ports(packet))
		return TC_ACT_UNSPEC;
	flow = flow_find(&packet->tuple, &proved);
	if (!flow || !(flow->kind & FLOW_AT_EGRESS))
		return TC_ACT_UNSPEC;
	if (flow_is_left(flow, packet)) {
		flow_remove(&packet->tuple);
		return TC_ACT_UNSPEC;
	}
	if (!proved)
		flow_note_reply(flow, packet);
	flow_track(flow, packet, proved, clock_now(given));
	if (rewrite_packet(skb, packet, &flow->ends, REWRITE_HOST)) {
		count(COUNTER_DROPPED_REWRITE);
		return TC_ACT_SHOT;
	}
	return flow->interface == skb->ifindex ? TC_ACT_UNSPEC : wire_redirect(skb, packet, &flow->ends);
}

/* Could a packet to this port be one of ours: is the port served to the wire, or do replies come to it? */
static __always_inline int wire_port_is_ours(const struct wire_filter *filter, __be16 port)
{
	__u32 index = port_index(port), zero = 0;
	struct port_table *table = bpf_map_lookup_elem(&ports, &zero);

	return filter->ports[index] || (table && table->forwarded[index]);
}

/*
 * The question that all traffic pays for when it comes in: could it be for us? Its address is looked for, then its
 * port. What has no ports in the usual place, or is no TCP, UDP or SCTP, is looked at more closely if its address may
 * be one of ours.
 */
static __always_inline int wire_may_request(struct __sk_buff *skb, __u32 l3, int family)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct ipv6hdr *ip6 = data + l3;
	struct iphdr *ip4 = data + l3;
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
	if (!filter || !filter->addresses[address_index(&destination)])
		return 0;
	if (family == 4 && (ip4->ihl != 5 || (ip4->frag_off & bpf_htons(IP4_MORE_FRAGMENTS | IP4_FRAGMENT_OFFSET))))
		return 1;
	if (protocol_has_ports(protocol))
		return wire_port_is_ours(filter, ports_at[1]);
	if (protocol == (family == 4 ? IPPROTO_ICMP : IPPROTO_ICMPV6))
		return is_icmp_error(family == 6, *(__u8 *)ports_at);
	/* IPv6: extension headers may come before the ports. */
	return family == 6;
}

static __always_inline int wire_ingress(struct __sk_buff *skb, __u32 l3)
{
	int family = packet_family(skb);

	if (!family || !wire_may_request(skb, l3, family))
		return TC_ACT_UNSPEC;
	return wire_in(skb, l3, family == 6);
}

/* The same for what leaves: is its source port one that a local backend has replied from? */
static __always_inline int wire_may_reply(struct __sk_buff *skb, __u32 l3, int family)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct ipv6hdr *ip6 = data + l3;
	struct iphdr *ip4 = data + l3;
	struct port_table *table;
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
	} else {
		port = (void *)(ip6 + 1);
		if ((void *)(port + 1) > end)
			return 1;
		if (ip6->nexthdr == IPPROTO_ICMPV6)
			return is_icmp_error(1, *(__u8 *)port);
		if (!protocol_has_ports(ip6->nexthdr))
			return 1;
	}
	table = bpf_map_lookup_elem(&ports, &zero);
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
