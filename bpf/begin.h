/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The flow that a packet begins, once it is known what it asks for (service.h): its backend, where that is, and both rows.
 *
 * Cost: the pick, where the backend is, both rows, and the row of the flow that it may push out.
 */
#ifndef KUBELANE_BEGIN_H
#define KUBELANE_BEGIN_H

static __always_inline struct choice begin_choose(const struct packet *packet, const struct frontend *frontend,
						  const struct pool *pool)
{
	struct affinity_key key = {.service_id = frontend->service_id, .kind = CLIENT_ADDRESS};

	if (!frontend->affinity_seconds)
		return backend_pick(frontend, pool);
	__builtin_memcpy(key.client, &packet->tuple.ends.source, sizeof(key.client));
	return backend_pick_unproved(&key, frontend, pool);
}

/*
 * A packet that is routed here never meets the checks of the host's stack: sources that nobody can have (RFC 1812
 * 5.3.7), the node's own ones, and the reverse path (RFC 3704), where the device asks for it (rp_filter, IPv4 only).
 */
static __always_inline int begin_source_is_valid(hook_context *ctx, struct scratch *given)
{
	struct ends *back = &given->backend_ends;
	__u32 interface = given->packet.interface;
	struct route route = {};
	struct device *device;
	int result;

	if (address_is_martian(&given->packet.tuple.ends.source))
		return 0;
	ends_reverse(back, &given->packet.tuple.ends);
	/* Whether the answer fits is judged when it comes. */
	given->smallest.segment = 1;
	result = route_recall(ctx, given, &given->smallest, back, &route);
	if (result == ROUTE_HERE)
		return 0;
	device = map_find(&devices, &interface);
	if (given->packet.is_ip6 || !device || !device->rp_filter)
		return 1;
	return result == ROUTE_FOUND && (device->rp_filter == RP_FILTER_LOOSE || route.interface == interface);
}

/* This node's address, by which clients are hidden: that of the device that the packet came in by, of a pod's the one that
 * was noted there. NULL: it has none of the family, or one at which replies would not be looked at. */
static __always_inline const struct address *begin_own_address(const struct scratch *given)
{
	__u32 interface = given->packet.interface;
	struct pod_device *inside = map_find(&pod_devices, &interface);
	struct device *outward = map_find(&devices, &interface);
	const struct address *own;

	if (given->from_pod && inside)
		own = given->packet.is_ip6 ? &inside->ip6 : &inside->ip4;
	else if (outward)
		own = given->packet.is_ip6 ? &outward->ip6 : &outward->ip4;
	else
		return (void *)0;
	return address_roles(own) & (ADDRESS_LOCAL | ADDRESS_NODE) ? own : (void *)0;
}

/* A backend that the host's stack leads to is to see this node as its client, if the Service is so. Global, so that it is
 * verified once. */
__noinline int begin_hide_client(hook_context *ctx)
{
	struct scratch *given = scratch();
	const struct address *own;

	if (!given || !ctx || !(given->frontend.flags & FRONTEND_SOURCE_NODE))
		return 0;
	own = begin_own_address(given);
	if (!own)
		return 0;
	given->flow.ends.source = *own;
	given->flow.state |= PATH_HALVES;
	return 0;
}

/* A pod that asks for itself sees this node as its client: its own address would never leave it, and a cluster IP is none
 * that its sockets may answer to. Global, for the same reason. */
__noinline int begin_turn_back(hook_context *ctx)
{
	struct scratch *given = scratch();
	const struct address *own;

	if (!given || !ctx)
		return 0;
	own = begin_own_address(given);
	given->flow.ends.source = own ? *own : given->packet.tuple.ends.destination;
	given->flow.state |= PATH_HAIRPIN;
	return 0;
}

/* Where the backend is: as routes and devices say, whatever the name of its node. Answers VERDICT_CONTINUE, and sets
 * PATH_ROUTED and this node's address for one that is elsewhere. */
static __always_inline int begin_find_backend(hook_context *ctx, struct scratch *given, int is_named_local)
{
	struct ends *ends = &given->backend_ends;
	__u32 roles;

	ends->destination = given->flow.ends.destination;
	ends->destination_port = given->flow.ends.destination_port;
	ends->source_port = 0;
	address_set_ip4(&ends->source, 0);
	if (given->packet.is_ip6)
		address_words(&ends->source)->word[2] = 0;
	switch (route_source(ctx, given, ends, given->packet.tuple.protocol)) {
	case ROUTE_HERE:
		begin_hide_client(ctx);
		return VERDICT_CONTINUE;
	case ROUTE_FOUND:
		break;
	case ROUTE_FORWARDING_OFF:
		/* The node itself needs no forwarding. For a pod the host's stack says no. */
		if (is_named_local || (address_roles(&given->flow.ends.destination) & (ADDRESS_LOCAL | ADDRESS_NODE)))
			return VERDICT_CONTINUE;
		count(COUNTER_DROPPED_FORWARDING_OFF);
		count_service(given->frontend.service_id, SERVICE_DROPPED_FORWARDING_OFF);
		return VERDICT_DROP;
	default:
		count(COUNTER_DROPPED_NO_ROUTE);
		count_service(given->frontend.service_id, SERVICE_DROPPED_NO_ROUTE);
		return VERDICT_DROP;
	}
	/* Replies to any other address would not be looked at when they come in. */
	roles = address_roles(&ends->source);
	if (!(roles & (ADDRESS_LOCAL | ADDRESS_NODE))) {
		count(COUNTER_DROPPED_SNAT_SOURCE);
		count_service(given->frontend.service_id, SERVICE_DROPPED_SNAT_SOURCE);
		return VERDICT_DROP;
	}
	given->flow.ends.source = ends->source;
	given->flow.state |= PATH_ROUTED;
	if (begin_source_is_valid(ctx, given))
		return VERDICT_CONTINUE;
	count(COUNTER_DROPPED_MARTIAN);
	count_service(given->frontend.service_id, SERVICE_DROPPED_MARTIAN);
	return VERDICT_DROP;
}

/* The stack leads a pod's packets to their backend, wherever that is, but for the pod itself. */
static __always_inline void begin_find_backend_of_pod(hook_context *ctx, struct scratch *given)
{
	if (address_equal(&given->flow.ends.destination, &given->packet.tuple.ends.source))
		begin_turn_back(ctx);
	else
		begin_hide_client(ctx);
}

/*
 * Does the client get another port although its own is free? Datagrams of a client that asks the backend itself from the
 * same port are not seen here, and their answers could not be told from the flow's. (Of TCP sequence numbers tell them.)
 * Where the policy is Local, and for pods, the port is the client's, as with kube-proxy, which masquerades all others.
 */
static __always_inline int begin_port_moves(const struct scratch *given)
{
	return !given->from_pod && given->packet.tuple.protocol == IPPROTO_UDP && given->pool.member == POOL_CLUSTER;
}

/*
 * The address that the backend will see as its client, and what its port may be. A pod that has come back to itself
 * (out of the node, and in again by a load balancer) sees the Service's address: its own would never leave it. Its
 * replies go out by an outward device like others, and are sent to it from there, as interface 0 says.
 */
static __always_inline __u32 begin_source(const struct scratch *given, struct flow *flow, __u32 *interface)
{
	const struct packet *packet = &given->packet;
	int is_sctp = packet->tuple.protocol == IPPROTO_SCTP;

	if (flow_path(flow->state) != PATH_STACK)
		return is_sctp ? SNAT_KEEP : SNAT_ANY;
	flow->ends.source = packet->tuple.ends.source;
	if (address_equal(&flow->ends.source, &flow->ends.destination)) {
		flow->ends.source = packet->tuple.ends.destination;
		*interface = 0;
	}
	if (given->own_port_is_taken)
		return SNAT_ANY;
	if (begin_port_moves(given))
		return SNAT_MOVE;
	return is_sctp ? SNAT_KEEP : SNAT_KEEP_FIRST;
}

/* Before the packet goes on: its answers are looked at. */
static __always_inline void begin_note_ports(const struct scratch *given)
{
	__u32 zero = 0;
	struct port_table *table = bpf_map_lookup_elem(&ports, &zero);

	if (!table)
		return;
	if (flow_path(given->flow.state) != PATH_STACK)
		table->forwarded[port_index(given->reply.ends.destination_port)] = 1;
	else
		flow_note_reply(table, &given->reply);
}

/* The replies' row, but for its port. */
static __always_inline void begin_fill_reply(struct scratch *given, __u32 interface)
{
	const struct packet *packet = &given->packet;
	struct flow *reply = &given->reply_row;

	flow_key_reverse(&given->reply, &given->flow.ends, packet->tuple.protocol);
	ends_reverse(&reply->ends, &packet->tuple.ends);
	reply->state = FLOW_REPLY | flow_path(given->flow.state) | second_now(given) << FLOW_SECOND_SHIFT;
	/* By which a reset without an acknowledgement is known, until the backend has answered. */
	reply->sequence = packet->acknowledgement;
	reply->backend_or_first = second_now(given);
	reply->generation_or_interface = interface;
}

/* The client uses its port again: the row of its former flow becomes that of the new one, in place, if no other
 * processor was faster. Answers the former row's state; FLOW_ENDING: one was. */
static __noinline __u32 begin_replace(struct scratch *given, struct flow *request, int alloc)
{
	struct flow_lock *lock = flow_lock_of(&given->packet.tuple.ends);
	struct flow *former, *reply;
	__u32 state = FLOW_ENDING, leaves = 0;

	flow_key_reverse(&given->removed_partner, &given->former.ends, given->packet.tuple.protocol);
	former = flow_find(&given->removed_partner);
	reply = flow_find(&given->reply);
	if (!lock || !reply)
		return state;
	bpf_spin_lock(&lock->lock);
	if (flow_is_unchanged(request, &given->former) && flow_is_still(reply, &given->reply_row.ends)) {
		state = request->state;
		*request = given->flow;
		if (alloc == ALLOC_OWN) {
			*reply = given->reply_row;
		} else if (former && flow_is_still(former, &given->reply_row.ends)) {
			former->state |= FLOW_ENDING;
			leaves = 1;
		}
	}
	bpf_spin_unlock(&lock->lock);
	if (leaves)
		flow_delete(&given->removed_partner);
	return state;
}

/* What was made for a flow that is not entered goes. */
static __always_inline void begin_release(struct scratch *given, int alloc)
{
	struct flow *row;

	if (alloc != ALLOC_RESERVED)
		return;
	given->removed = given->reply;
	row = flow_find(&given->reply);
	if (row)
		flow_remove_lonely(given, row);
}

/* Another processor has begun the same flow: its row counts. */
static __noinline int begin_yield(struct scratch *given, int alloc)
{
	begin_release(given, alloc);
	if (flow_reread() == RECALL_SERVES)
		return VERDICT_CONTINUE;
	count(COUNTER_DROPPED_FLOW_CHANGING);
	return VERDICT_DROP;
}

static __noinline int begin_give_up(struct scratch *given, int alloc)
{
	begin_release(given, alloc);
	count(COUNTER_DROPPED_FLOW_TABLE);
	count_service(given->frontend.service_id, SERVICE_DROPPED_FLOW_TABLE);
	return VERDICT_DROP;
}

/* Enters the requests' row, once the replies' stands: no request goes to a backend whose answers would not be known. */
static __noinline int begin_enter(hook_context *ctx, struct scratch *given, int alloc)
{
	struct flow *request = (void *)0;
	__u64 *proved;
	__u32 state;
	long result;

	if (given->has_former)
		request = flow_find(&given->packet.tuple);
	if (request) {
		state = begin_replace(given, request, alloc);
		if (state & FLOW_ENDING)
			return begin_yield(given, alloc);
		flow_tell_end(given, REMOVE_REPLACED, &given->former, state, 0);
		proved = flow_count_of(given->packet.tuple.protocol);
		if ((state & FLOW_PROVED) && proved)
			__sync_fetch_and_add(proved, -1);
	} else {
		result = flow_create(&given->packet.tuple, &given->flow);
		if (result)
			return result == -EEXIST ? begin_yield(given, alloc) : begin_give_up(given, alloc);
	}
	flow_note_opening(ctx, given);
	if (given->from_pod)
		count(COUNTER_FLOW_POD);
	else
		count(flow_path(given->flow.state) == PATH_ROUTED ? COUNTER_FLOW_REMOTE : COUNTER_FLOW_LOCAL);
	if (given->packet.tuple.protocol == IPPROTO_TCP && !(given->packet.tcp_flags & TCP_SYN))
		count(COUNTER_FLOW_MIDSTREAM);
	return VERDICT_CONTINUE;
}

/* The flow of a packet to a backend that was chosen: the ends that it will see, and both rows. Global, for the depth of
 * the stack. */
__noinline int begin_flow(hook_context *ctx)
{
	struct scratch *given = scratch();
	__u32 interface, ports;
	int alloc, verdict;

	if (!given)
		return VERDICT_DROP;
	interface = given->packet.interface;
	ports = begin_source(given, &given->flow, &interface);
	begin_fill_reply(given, interface);
	alloc = snat_reserve(ctx, ports);
	if (alloc == ALLOC_TAKEN || alloc == ALLOC_FULL) {
		count(alloc == ALLOC_FULL ? COUNTER_DROPPED_FLOW_TABLE : COUNTER_DROPPED_SNAT_EXHAUSTED);
		if (alloc == ALLOC_FULL)
			count_service(given->frontend.service_id, SERVICE_DROPPED_FLOW_TABLE);
		else
			count_service(given->frontend.service_id, SERVICE_DROPPED_SNAT_EXHAUSTED);
		return VERDICT_DROP;
	}
	given->flow.ends.source_port = given->reply.ends.destination_port;
	given->addresses =
		checksum_change(&given->packet.tuple.ends, &given->flow.ends.source, &given->flow.ends.destination);
	given->flow.change = ports_change(given->addresses, &given->packet.tuple.ends, &given->flow.ends);
	begin_note_ports(given);
	verdict = begin_enter(ctx, given, alloc);
	if (verdict == VERDICT_CONTINUE)
		count_service(given->frontend.service_id, SERVICE_CONNECTIONS);
	return verdict;
}

static __always_inline void begin_fill(struct scratch *given, const struct choice *choice)
{
	const struct packet *packet = &given->packet;
	struct flow *flow = &given->flow;

	flow->ends.destination = choice->backend->address;
	flow->ends.destination_port = choice->backend->port;
	flow->state = second_now(given) << FLOW_SECOND_SHIFT;
	if (given->frontend.affinity_seconds)
		flow->state |= FLOW_AFFINE;
	if (packet->tuple.protocol == IPPROTO_TCP)
		flow->sequence = packet->sequence;
	flow->backend_or_first = choice->backend_id;
	flow->generation_or_interface = choice->backend->generation;
	given->chosen = choice->reason;
}

/* Global, for the same reason. VERDICT_CONTINUE: scratch.flow has a backend, and how it is reached. */
__noinline int begin_choose_backend(hook_context *ctx)
{
	struct scratch *given = scratch();
	struct choice choice;

	if (!given)
		return VERDICT_DROP;
	choice = begin_choose(&given->packet, &given->frontend, &given->pool);
	if (!choice.backend) {
		count(COUNTER_FAILED_BACKEND_MISSING);
		return VERDICT_PASS;
	}
	begin_fill(given, &choice);
	if (given->packet.tuple.protocol == IPPROTO_SCTP &&
	    given->flow.ends.destination_port != given->packet.tuple.ends.destination_port) {
		count(COUNTER_DROPPED_SCTP_PORT);
		count_service(given->frontend.service_id, SERVICE_DROPPED_SCTP_PORT);
		return VERDICT_DROP;
	}
	if (!given->from_pod)
		return begin_find_backend(ctx, given, choice.backend->flags & BACKEND_NODE_LOCAL);
	begin_find_backend_of_pod(ctx, given);
	return VERDICT_CONTINUE;
}

/* VERDICT_CONTINUE: the packet has a flow from now on, and scratch.flow is a copy of its row. */
static __always_inline int begin(hook_context *ctx)
{
	int verdict = service_ask(ctx);

	if (verdict == VERDICT_CONTINUE)
		verdict = begin_choose_backend(ctx);
	return verdict == VERDICT_CONTINUE ? begin_flow(ctx) : verdict;
}

#endif
