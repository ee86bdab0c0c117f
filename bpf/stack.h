/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Handing a packet whose source is translated, too, to the host's stack: where sending it on from here would be wrong (the
 * operator wants the host's firewall to see it, --forward-through stack; IPsec policies are in force; it is or may be too big
 * for its way), and for flows of PATH_HALVES always.
 *
 * The stack does not forward a packet whose source is the node's own (it is a martian). So the packet gets half of its
 * new ends when it comes in, its destination, and the other half, its source, when it leaves by an outward device: of a
 * request first client:port -> backend, with the port that is reserved, then node:port -> backend. `handed` has the second
 * step of both directions, so that answers are known even where the host's own NAT changed the request on its way.
 *
 * Cost: two look-ups when it comes in, two more when it leaves, and what the stack does.
 */
#ifndef KUBELANE_STACK_H
#define KUBELANE_STACK_H

/* The ends of a packet in the stack: its own source, and its new destination; ports are those that the backend sees, so
 * that both directions belong together there. */
static __always_inline void stack_ends(struct ends *ends, const struct ends *own, const struct flow *flow)
{
	const struct ends *becomes = &flow->ends;
	int is_reply = flow->state & FLOW_REPLY;

	ends->source = own->source;
	ends->destination = becomes->destination;
	ends->source_port = is_reply ? own->source_port : becomes->source_port;
	ends->destination_port = is_reply ? own->destination_port : becomes->destination_port;
}

/* What a packet with the ends of `given->reply` becomes when it leaves. */
static __always_inline void stack_note(struct scratch *given, const struct ends *ends)
{
	struct flow *known = bpf_map_lookup_elem(&handed, &given->reply), *row = &given->reply_row;
	struct port_table *table;
	__u32 zero = 0;

	if (known && ends_equal(&known->ends, ends))
		return;
	row->ends = *ends;
	row->change = ends_change(&given->reply.ends, ends);
	row->state = FLOW_REPLY | PATH_STACK; /* met when it leaves */
	/* Of two first packets only one puts its row in: a row that is replaced can be missed (map_find()). */
	bpf_map_update_elem(&handed, &given->reply, row, known ? BPF_ANY : BPF_NOEXIST);
	/* The row first: whoever renews the filter looks for rows after clearing it. */
	table = bpf_map_lookup_elem(&ports, &zero);
	if (table)
		flow_note_reply(table, &given->reply);
}

/*
 * The scratch's copy of the row becomes the first half of the packet's new ends, for rewrite_packet(). Both directions of
 * the second half are noted: the flow's own packets become flow.ends, and answers what the packet's ends are, reversed.
 */
__noinline int stack_hand(hook_context *ctx)
{
	struct scratch *given = scratch();
	struct ends *way;

	if (!given || !ctx)
		return 0;
	way = &given->backend_ends;
	stack_ends(way, &given->packet.tuple.ends, &given->flow);
	given->reply.ends = *way;
	given->reply.protocol = given->packet.tuple.protocol;
	stack_note(given, &given->flow.ends);
	if (!(given->flow.state & FLOW_REPLY)) {
		ends_reverse(&given->reply.ends, way);
		ends_reverse(&given->former.ends, &given->packet.tuple.ends);
		stack_note(given, &given->former.ends);
	}
	given->flow.ends = *way;
	given->addresses = checksum_change(&given->packet.tuple.ends, &way->source, &way->destination);
	given->flow.change = ports_change(given->addresses, &given->packet.tuple.ends, way);
	count_often(COUNTER_HANDED_TO_STACK);
	return 0;
}

/* Must this packet, which could be sent on from here, go through the stack? */
static __always_inline int stack_is_asked_for(const struct packet *packet)
{
	__u32 least = epoch_now(EPOCH_THROUGH_STACK);

	return least && packet->segment >= least && (least == 1 || !packet->is_ip6);
}

/* Is the flow still there that scratch.flow was noted for, with the ends of scratch.backend_ends in the stack? A row of
 * `handed` outlives it. The flow's row of the other direction leads back to whom the packet is from; that of the requests
 * also has the port that the backend answers to. Global, so that it is verified once. */
__noinline int stack_has_flow(hook_context *ctx, __u32 protocol)
{
	struct scratch *given = scratch();
	const struct flow *other;

	if (!given || !ctx)
		return 0;
	flow_key_reverse(&given->reply, &given->flow.ends, protocol);
	other = flow_find(&given->reply);
	if (!other || (other->state & FLOW_ENDING) ||
	    !address_equal(&other->ends.destination, &given->backend_ends.source))
		return 0;
	return (other->state & FLOW_REPLY) || other->ends.source_port == given->backend_ends.destination_port;
}

/* A packet that leaves: the second half of its new ends, in scratch.flow. 0: it was not handed over. */
static __always_inline int stack_recall(hook_context *ctx, struct scratch *given)
{
	struct flow *row = bpf_map_lookup_elem(&handed, &given->packet.tuple);

	if (!row)
		return 0;
	given->flow = *row;
	given->addresses =
		checksum_change(&given->packet.tuple.ends, &given->flow.ends.source, &given->flow.ends.destination);
	given->backend_ends = given->packet.tuple.ends;
	return ports_change(given->addresses, &given->packet.tuple.ends, &given->flow.ends) == given->flow.change &&
	       stack_has_flow(ctx, given->packet.tuple.protocol);
}

#endif
