/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Sending on a packet, or an ICMP error, whose flow is known. Whether it can go is asked before it is changed: an
 * answer about it quotes what its sender sent.
 */
#ifndef KUBELANE_DELIVER_H
#define KUBELANE_DELIVER_H

/* Options of an IPv4 header (RFC 791) that are not forwarded: source routes, which hosts refuse and routers as a rule, and
 * what is no option. */
static __noinline int deliver_options_are_refused(struct __sk_buff *skb, const struct packet *packet)
{
	enum {
		OPTION_END = 0,
		OPTION_NOP = 1,
		OPTION_LSRR = 0x83,
		OPTION_SSRR = 0x89,
		OPTIONS_MAX = 40
	};
	__u32 offset = packet->l3 + sizeof(struct iphdr);

	for (int i = 0; i < OPTIONS_MAX && offset < packet->l4; i++) {
		__u8 option[2] = {};

		if (bpf_skb_load_bytes(skb, offset, option, sizeof(option)))
			return 1;
		if (option[0] == OPTION_END)
			return 0;
		if (option[0] == OPTION_NOP) {
			offset++;
			continue;
		}
		if (option[0] == OPTION_LSRR || option[0] == OPTION_SSRR || option[1] < 2)
			return 1;
		offset += option[1];
	}
	return offset > packet->l4;
}

static __always_inline int deliver_route(struct __sk_buff *skb, struct scratch *given, struct packet *packet,
					 const struct ends *ends, struct route *route)
{
	if (packet->ttl <= 1) {
		count(COUNTER_ICMP_TTL_EXCEEDED);
		return VERDICT_ANSWER_TTL;
	}
	switch (route_recall(skb, given, packet, ends, route)) {
	case ROUTE_FOUND:
		return VERDICT_CONTINUE;
	case ROUTE_TOO_BIG:
		if (packet->may_fragment)
			return VERDICT_HAND_OVER;
		count(COUNTER_ICMP_TOO_BIG);
		packet->mtu = route->mtu;
		return VERDICT_ANSWER_TOO_BIG;
	case ROUTE_FORWARDING_OFF:
		count(COUNTER_DROPPED_FORWARDING_OFF);
		return VERDICT_DROP;
	default:
		count(COUNTER_DROPPED_NO_ROUTE);
		return VERDICT_DROP;
	}
}

/* To or from a backend elsewhere: routed here, with one hop less to live. */
static __always_inline int deliver_routed(struct __sk_buff *skb, struct scratch *given)
{
	struct packet *packet = &given->packet;
	struct route route = {};
	int verdict;

	if (!packet->is_ip6 && packet->l4 != packet->l3 + sizeof(struct iphdr) &&
	    deliver_options_are_refused(skb, packet)) {
		count(COUNTER_DROPPED_OPTIONS);
		return VERDICT_DROP;
	}
	verdict = VERDICT_HAND_OVER;
	if (!stack_is_asked_for())
		verdict = deliver_route(skb, given, packet, &given->flow.ends, &route);
	if (verdict == VERDICT_HAND_OVER)
		stack_hand(skb);
	if (verdict != VERDICT_CONTINUE)
		return verdict;
	if (rewrite_packet(skb, REWRITE_HOP) || route_send(skb, packet->l3, &route)) {
		count(COUNTER_DROPPED_REWRITE);
		return VERDICT_DROP;
	}
	return VERDICT_SEND;
}

static __always_inline int deliver_packet(struct __sk_buff *skb, struct scratch *given)
{
	int verdict = VERDICT_HAND_OVER;

	if (given->flow.state & FLOW_ROUTED)
		verdict = deliver_routed(skb, given);
	if (verdict != VERDICT_HAND_OVER)
		return verdict;
	if (rewrite_packet(skb, REWRITE_HOST)) {
		count(COUNTER_DROPPED_REWRITE);
		return VERDICT_DROP;
	}
	return VERDICT_PASS;
}

/* Out of line: errors are rare, and their path is the deepest (the kernel allows 512 bytes of stack in all). */
static __noinline __u32 error_checksum_change(const struct ends *old, const struct address *source,
					      const struct address *destination)
{
	return checksum_change(old, source, destination);
}

/*
 * The packet that an ICMP error quotes went the other way: its source becomes the flow's new destination. The checksum
 * of what is quoted is left as it is, since most errors quote too little to have it.
 */
static __noinline int rewrite_error(struct __sk_buff *skb, const struct packet *error, const struct packet *quoted,
				    const struct ends *outer, const struct ends *ends)
{
	__be32 old_ports = ports_word(quoted->tuple.ends.source_port, quoted->tuple.ends.destination_port);
	__be32 new_ports = ports_word(ends->destination_port, ends->source_port);
	/* An IPv4 header's own checksum makes up for its addresses; in IPv6 the ICMP checksum has to. */
	__u32 inside =
		error->is_ip6 ? error_checksum_change(&quoted->tuple.ends, &ends->destination, &ends->source) : 0;
	__u32 around = error_checksum_change(&error->tuple.ends, &outer->source, &outer->destination);
	__u32 check = error->l4 + 2;

	if (rewrite_addresses(skb, quoted, &ends->destination, &ends->source, REWRITE_QUOTED) ||
	    bpf_skb_store_bytes(skb, quoted->l4, &new_ports, sizeof(new_ports), 0) ||
	    bpf_l4_csum_replace(skb, check, old_ports, new_ports, 4))
		return -1;
	if (!error->is_ip6)
		return 0;
	return bpf_l4_csum_replace(skb, check, 0, inside, 0) ||
	       bpf_l4_csum_replace(skb, check, 0, around, BPF_F_PSEUDO_HDR);
}

/*
 * The error's own ends. Its source is shown as the flow's where it is the quoted packet's destination, and also
 * where it is forwarded here, since no other source of a forwarded packet would be let through everywhere.
 */
static __noinline int deliver_error(struct __sk_buff *skb, struct scratch *given)
{
	struct packet *error = &given->packet, *quoted = &given->quoted;
	const struct flow *flow = &given->flow;
	struct ends outer = {.source = error->tuple.ends.source, .destination = flow->ends.destination};
	__u32 routed = flow->state & FLOW_ROUTED;
	struct route route = {};
	int verdict;

	if (routed || address_equal(&outer.source, &quoted->tuple.ends.destination))
		outer.source = flow->ends.source;
	if (routed) {
		verdict = deliver_route(skb, given, error, &outer, &route);
		/* The stack would send it in pieces. None of a proper size (RFC 1812 4.3.2.3: 576 bytes) needs that. */
		if (verdict == VERDICT_HAND_OVER)
			count(COUNTER_ICMP_TOO_BIG);
		if (verdict != VERDICT_CONTINUE)
			return VERDICT_DROP;
	}
	if (rewrite_error(skb, error, quoted, &outer, &flow->ends) ||
	    rewrite_addresses(skb, error, &outer.source, &outer.destination, routed ? REWRITE_HOP : REWRITE_HOST) ||
	    (routed && route_send(skb, error->l3, &route))) {
		count(COUNTER_DROPPED_REWRITE);
		return VERDICT_DROP;
	}
	count(COUNTER_ICMP_TRANSLATED);
	return routed ? VERDICT_SEND : VERDICT_PASS;
}

#endif
