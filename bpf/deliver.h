/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Sending on a packet, or an ICMP error, whose flow is known. Whether it can go is asked before it is changed: an
 * answer about it quotes what its sender sent.
 */
#ifndef KUBELANE_DELIVER_H
#define KUBELANE_DELIVER_H

/* Options of the packet's IPv4 header (RFC 791) that are not forwarded: source routes, which hosts refuse and routers as a
 * rule, and what is no option. Global, so that it is verified once. */
__noinline int deliver_options_are_refused(hook_context *ctx)
{
	enum {
		OPTION_END = 0,
		OPTION_NOP = 1,
		OPTION_LSRR = 0x83,
		OPTION_SSRR = 0x89,
		OPTIONS_MAX = 40
	};
	const struct scratch *given = scratch();
	__u32 offset, l4;

	if (!given)
		return 1;
	offset = given->packet.l3 + sizeof(struct iphdr);
	l4 = given->packet.l4;
	for (int i = 0; i < OPTIONS_MAX && offset < l4; i++) {
		__u8 option[2] = {};

		if (hook_load(ctx, offset, option, sizeof(option)))
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
	return offset > l4;
}

static __always_inline int deliver_has_refused_options(hook_context *ctx, const struct packet *packet)
{
	return !packet->is_ip6 && packet->l4 != packet->l3 + sizeof(struct iphdr) && deliver_options_are_refused(ctx);
}

static __always_inline int deliver_route(hook_context *ctx, struct scratch *given, struct packet *packet,
					 const struct ends *ends)
{
	struct route *route = &given->route;

	route->next.nh_family = 0;
	if (packet->ttl <= 1) {
		count(COUNTER_ICMP_TTL_EXCEEDED);
		return VERDICT_ANSWER_TTL;
	}
	switch (route_recall(ctx, given, packet, ends, route)) {
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

/* Neither the stack's alone nor sent back: to or from a backend elsewhere, or one that is not to see its client. Answers
 * VERDICT_CONTINUE for what can be sent on by scratch.route. */
static __always_inline int deliver_routed(hook_context *ctx, struct scratch *given)
{
	struct packet *packet = &given->packet;
	int verdict = VERDICT_HAND_OVER;

	if (flow_path(given->flow.state) == PATH_ROUTED && !stack_is_asked_for(packet))
		verdict = deliver_route(ctx, given, packet, &given->flow.ends);
	if (verdict == VERDICT_HAND_OVER)
		stack_hand(ctx);
	return verdict;
}

/* Forged packets may have the ends of a flow that goes another way: a pod sends nothing on by routes, past the policies of
 * its network, and nothing from outside is sent back to where it came from. */
static __always_inline int deliver_is_possible(__u32 state, int from_pod)
{
	return flow_path(state) != (from_pod ? PATH_ROUTED : PATH_HAIRPIN);
}

/* What differs between the ways that lead to the rewriting stands in the scratch, so that the verifier follows it once. */
static __always_inline int deliver_packet(hook_context *ctx, const enum hook hook, struct scratch *given,
					  const int from_pod)
{
	int verdict;

	given->rewrite_mode = REWRITE_HOST;
	if (!deliver_is_possible(given->flow.state, from_pod))
		return VERDICT_PASS;
	if (config.counts_traffic)
		traffic_packet(ctx);
	if (flow_path(given->flow.state) != PATH_STACK && deliver_has_refused_options(ctx, &given->packet)) {
		count(COUNTER_DROPPED_OPTIONS);
		return VERDICT_DROP;
	}
	if (flow_hides_client(given->flow.state)) {
		verdict = deliver_routed(ctx, given);
		if (verdict == VERDICT_CONTINUE)
			given->rewrite_mode = REWRITE_HOP;
		else if (verdict != VERDICT_HAND_OVER)
			return verdict;
	}
	if (rewrite_packet(ctx, hook, given))
		goto refused;
	if (from_pod && flow_path(given->flow.state) == PATH_HAIRPIN) {
		if (hook_send_back(ctx))
			goto refused;
		return VERDICT_SEND;
	}
	if (given->rewrite_mode == REWRITE_HOST)
		return VERDICT_PASS;
	if (!route_send(ctx, given->packet.l3, &given->route))
		return VERDICT_SEND;
refused:
	count(COUNTER_DROPPED_REWRITE);
	return VERDICT_DROP;
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
static __noinline int rewrite_error(hook_context *ctx, const struct packet *error, const struct packet *quoted,
				    const struct ends *outer, const struct ends *ends)
{
	__be32 old_ports = ports_word(quoted->tuple.ends.source_port, quoted->tuple.ends.destination_port);
	__be32 new_ports = ports_word(ends->destination_port, ends->source_port);
	/* An IPv4 header's own checksum makes up for its addresses; in IPv6 the ICMP checksum has to. */
	__u32 inside =
		error->is_ip6 ? error_checksum_change(&quoted->tuple.ends, &ends->destination, &ends->source) : 0;
	__u32 around = error_checksum_change(&error->tuple.ends, &outer->source, &outer->destination);
	__u32 check = error->l4 + 2;

	if (rewrite_addresses(ctx, quoted, &ends->destination, &ends->source, REWRITE_QUOTED) ||
	    hook_store(ctx, quoted->l4, &new_ports, sizeof(new_ports)) ||
	    hook_checksum_change(ctx, check, checksum_fold32((__u64)(__u32)~old_ports + new_ports), 0))
		return -1;
	if (!error->is_ip6)
		return 0;
	return hook_checksum_change(ctx, check, inside, 0) ||
	       hook_checksum_change(ctx, check, around, BPF_F_PSEUDO_HDR);
}

/*
 * The error's own ends. Its source is shown as the flow's where it is the quoted packet's destination, and also
 * where it is forwarded here, since no other source of a forwarded packet would be let through everywhere. An error about
 * what goes by halves does so, too: wire_error() finds the other half when it leaves.
 */
static __noinline int deliver_error(hook_context *ctx, struct scratch *given)
{
	struct packet *error = &given->packet, *quoted = &given->quoted;
	const struct flow *flow = &given->flow;
	struct ends outer = {.source = error->tuple.ends.source, .destination = flow->ends.destination};
	__u32 way = flow_path(flow->state), routed = way == PATH_ROUTED;
	int verdict;

	if (!deliver_is_possible(way, given->from_pod))
		return VERDICT_PASS;
	if (way == PATH_HALVES)
		stack_ends(&given->flow.ends, &given->reply.ends, flow);
	if (routed || address_equal(&outer.source, &quoted->tuple.ends.destination))
		outer.source = flow->ends.source;
	if (routed) {
		verdict = deliver_route(ctx, given, error, &outer);
		/* The stack would send it in pieces. None of a proper size (RFC 1812 4.3.2.3: 576 bytes) needs that. */
		if (verdict == VERDICT_HAND_OVER)
			count(COUNTER_ICMP_TOO_BIG);
		if (verdict != VERDICT_CONTINUE)
			return VERDICT_DROP;
	}
	if (rewrite_error(ctx, error, quoted, &outer, &flow->ends) ||
	    rewrite_addresses(ctx, error, &outer.source, &outer.destination, routed ? REWRITE_HOP : REWRITE_HOST) ||
	    (routed && route_send(ctx, error->l3, &given->route)) || (way == PATH_HAIRPIN && hook_send_back(ctx))) {
		count(COUNTER_DROPPED_REWRITE);
		return VERDICT_DROP;
	}
	count(COUNTER_ICMP_TRANSLATED);
	return routed || way == PATH_HAIRPIN ? VERDICT_SEND : VERDICT_PASS;
}

#endif
