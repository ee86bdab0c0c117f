/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The same of packets: what is told is in the scratch. */
#ifndef KUBELANE_TELL_PACKET_H
#define KUBELANE_TELL_PACKET_H

/* A bit for each enum counter. */
#define BIT(counter) (1ULL << (counter))

/* Those that begin a flow. */
#define TELL_BEGINNINGS (BIT(COUNTER_FLOW_LOCAL) | BIT(COUNTER_FLOW_REMOTE) | BIT(COUNTER_FLOW_POD))

/* Those of which scratch.flow is what the packet becomes, or would have become. */
#define TELL_FLOWS                                                                                                     \
	(TELL_BEGINNINGS | BIT(COUNTER_FLOW_ESTABLISHED) | BIT(COUNTER_FLOW_TABLE_FULL) | BIT(COUNTER_SNAT_RETRY) |    \
	 BIT(COUNTER_SNAT_RECLAIMED) | BIT(COUNTER_DROPPED_SNAT_EXHAUSTED) | BIT(COUNTER_DROPPED_SNAT_SOURCE) |        \
	 BIT(COUNTER_DROPPED_FLOW_TABLE) | BIT(COUNTER_DROPPED_MARTIAN) | BIT(COUNTER_DROPPED_SCTP_PORT) |             \
	 BIT(COUNTER_DROPPED_NO_ROUTE) | BIT(COUNTER_DROPPED_FORWARDING_OFF) | BIT(COUNTER_DROPPED_OPTIONS) |          \
	 BIT(COUNTER_DROPPED_REWRITE) | BIT(COUNTER_ICMP_TOO_BIG) | BIT(COUNTER_ICMP_TTL_EXCEEDED) |                   \
	 BIT(COUNTER_NEIGHBOUR_UNKNOWN))

/* Those of them that scratch.chosen is about. */
#define TELL_CHOICES (TELL_BEGINNINGS | BIT(COUNTER_SNAT_RETRY) | BIT(COUNTER_SNAT_RECLAIMED))

/* What an event is about goes to one place in the scratch, so that the verifier walks on from there once. */
static __always_inline void tell_gather(struct scratch *given, __u32 number, __u32 reason)
{
	if (number == EVENT_FLOW_ENDED && reason != REMOVE_REPLACED) {
		given->told_key = given->removed;
		given->told_ends = given->removed_ends;
		return;
	}
	given->told_key = number == COUNTER_ICMP_TRANSLATED ? given->quoted.tuple : given->packet.tuple;
	if (number == EVENT_FLOW_ENDED)
		given->told_ends = given->former.ends;
	else if (BIT(number & 63) & TELL_FLOWS)
		given->told_ends = given->flow.ends;
	else
		given->told_ends = given->told_key.ends;
}

static __always_inline void tell_ended(struct event *event, const struct scratch *given)
{
	event->asked = given->told_key.ends;
	event->becomes = given->told_ends;
	event->request_state = given->ended_request;
	event->reply_state = given->ended_reply;
	tell_backend(event, given->ended_backend, given->ended_generation);
}

static __always_inline void tell_packet(struct event *event, const struct scratch *given, __u32 counter)
{
	const struct packet *packet = &given->packet;
	const struct flow *flow = &given->flow;
	__u64 bit = BIT(counter & 63);

	event->asked = packet->tuple.ends;
	event->interface = packet->interface;
	event->tcp_flags = packet->tcp_flags;
	/* These have no ports, and the scratch has the last packet's. */
	if (bit & (BIT(COUNTER_ICMP_TRANSLATED) | BIT(COUNTER_DROPPED_FRAGMENT))) {
		event->asked.source_port = 0;
		event->asked.destination_port = 0;
	}
	if (counter == COUNTER_ICMP_TRANSLATED) {
		event->quoted = given->quoted.tuple.ends;
		event->becomes.destination = flow->ends.destination;
		event->becomes.destination_port = flow->ends.destination_port;
	}
	if (bit & TELL_CHOICES)
		event->reason = given->chosen;
	if (!(bit & TELL_FLOWS))
		return;
	event->becomes = flow->ends;
	event->request_state = flow->state;
	/* A replies' row knows no backend. */
	if (!(flow->state & FLOW_REPLY))
		tell_backend(event, flow->backend_or_first, flow->generation_or_interface);
}

/* Global, so that it is verified once. `number`: enum counter or enum event_number; `reason`: of the end of a flow. */
__noinline int packet_tell(__u32 number, __u32 reason, __u32 slot)
{
	const struct listener *listener = tell_listener(slot);
	void *ring = bpf_map_lookup_elem(&listener_rings, &slot);
	struct scratch *given = scratch();
	struct event *event;

	if (!listener || !ring || !given)
		return 0;
	tell_gather(given, number, reason);
	/* The ends of an ICMP error are those of two packets, which is for the process to look at. */
	if (!tell_is_wanted(listener, number, given->told_key.protocol) ||
	    (number != COUNTER_ICMP_TRANSLATED &&
	     !tell_ends_are_wanted(listener, &given->told_key.ends, &given->told_ends)))
		return 0;
	event = tell_begin(listener, ring, slot);
	if (!event)
		return 0;
	event->number = number;
	event->reason = reason;
	event->protocol = given->told_key.protocol;
	if (number == EVENT_FLOW_ENDED)
		tell_ended(event, given);
	else
		tell_packet(event, given, number);
	tell_end(event, ring);
	return 0;
}

#endif
