/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What a packet of no flow asks for: whether a Service wants it, which of the Service's pools it is for, and whether its
 * client may have a backend at all.
 *
 * The same for the wire and for pods, which may ask for cluster IPs as well, and have the Service's other pool.
 *
 * Cost: the roles of its destination, one or two look-ups of the frontend (each is repeated where it finds nothing) and one more
 * to be sure of it, and whose it is;
 * for pods one more, of the device.
 */
#ifndef KUBELANE_SERVICE_H
#define KUBELANE_SERVICE_H

/* Copies the frontend that serves the packet's destination. A cluster IP serves pods, and nobody out there unless the
 * operator wants it. */
static __always_inline enum lookup_result service_find(struct scratch *given)
{
	const struct flow_key *tuple = &given->packet.tuple;
	__u32 roles = address_roles(&tuple->ends.destination);
	__u32 is_cluster_ip = (given->from_pod || config.external_cluster_ips) && (roles & ADDRESS_CLUSTER_IP);
	struct frontend_key key = {
		.address = tuple->ends.destination,
		.port = tuple->ends.destination_port,
		.protocol = tuple->protocol,
	};
	struct frontend *frontend = (void *)0;

	if (is_cluster_ip || (roles & ADDRESS_SERVICE_VIP))
		frontend = map_find(&frontends, &key);
	if (!frontend && (roles & ADDRESS_NODE))
		frontend = frontend_lookup_node_port(&key);
	if (!frontend || !frontend_read(&key, frontend, &given->frontend))
		return is_cluster_ip ? LOOKUP_UNKNOWN_PORT : LOOKUP_NOT_OURS;
	if (given->frontend.flags & (FRONTEND_EXTERNAL_IP | FRONTEND_LOAD_BALANCER | FRONTEND_NODE_PORT))
		return LOOKUP_FOUND;
	return is_cluster_ip ? LOOKUP_FOUND : LOOKUP_NOT_OURS;
}

static __always_inline int source_is_allowed(const struct frontend *frontend, const struct address *client)
{
	struct source_range_key key = {.prefix_length = 160, .service_id = frontend->service_id, .address = *client};

	return bpf_map_lookup_elem(&source_ranges, &key) != (void *)0;
}

/* What begins no flow, whoever asks for what. */
static __always_inline int service_refuse_packet(const struct packet *packet)
{
	if (packet->kind == PACKET_PIECE) {
		count(COUNTER_DROPPED_FRAGMENT);
		return 1;
	}
	if (packet->tcp_flags & TCP_RST) {
		count(COUNTER_DROPPED_UNKNOWN_RESET);
		return 1;
	}
	return 0;
}

/* Whether this client may have a backend of this frontend. */
static __always_inline int service_admit(const struct packet *packet, const struct frontend *frontend,
					 const struct pool *pool)
{
	if ((frontend->flags & FRONTEND_SOURCE_RANGES) && !source_is_allowed(frontend, &packet->tuple.ends.source)) {
		count(COUNTER_DROPPED_SOURCE_RANGE);
		count_service(frontend->service_id, SERVICE_DROPPED_SOURCE_RANGE);
		return VERDICT_DROP;
	}
	if (pool->count)
		return VERDICT_CONTINUE;
	if (pool->on_empty == EMPTY_DROP) {
		count(COUNTER_DROPPED_NO_LOCAL_ENDPOINT);
		count_service(frontend->service_id, SERVICE_DROPPED_NO_LOCAL_ENDPOINT);
		return VERDICT_DROP;
	}
	count(COUNTER_REFUSED_NO_ENDPOINT);
	count_service(frontend->service_id, SERVICE_REFUSED_NO_ENDPOINT);
	return VERDICT_ANSWER_UNREACHABLE;
}

/*
 * Openings and ICMP errors are limited on each processor, for all together. A pod that begins more flows in a second than
 * one ring of openings has room for, and gets no answers, would push out everybody else's: it has a quota of its own.
 * (Read, then added to: before 5.12 no program can do both at once. Two processors may let one more pass.)
 */
static __always_inline struct pod_device *service_quota(struct scratch *given)
{
	__u32 interface = given->packet.interface, second = second_now(given);
	struct pod_device *device = (void *)0;

	if (given->from_pod)
		device = map_find(&pod_devices, &interface);
	if (device && device->second != second) {
		device->second = second;
		device->openings = 0;
	}
	return device;
}

static __always_inline int service_judge(struct scratch *given, enum lookup_result result)
{
	if (result == LOOKUP_UNKNOWN_PORT) {
		count(COUNTER_REFUSED_UNKNOWN_PORT);
		return VERDICT_ANSWER_UNREACHABLE;
	}
	given->pool = given->from_pod ? given->frontend.inside : given->frontend.outside;
	return service_admit(&given->packet, &given->frontend, &given->pool);
}

/* VERDICT_CONTINUE: the scratch's packet asks for scratch.frontend, and may have a backend of scratch.pool. Global, for the
 * depth of the stack. */
__noinline int service_ask(hook_context *ctx)
{
	struct scratch *given = scratch();
	enum lookup_result result;
	struct pod_device *pod;
	int verdict;

	if (!given || !ctx)
		return VERDICT_DROP;
	/* Before the frontend is looked up: it may change owner meanwhile. */
	given->flow.sequence = epoch_now(EPOCH_OWNERS);
	result = service_find(given);
	if (result == LOOKUP_NOT_OURS)
		return VERDICT_UNKNOWN;
	if (owner_is_other(ctx))
		return VERDICT_PASS;
	if (service_refuse_packet(&given->packet))
		return VERDICT_DROP;
	pod = service_quota(given);
	if (pod && pod->openings >= POD_OPENINGS) {
		count(COUNTER_DROPPED_POD_QUOTA);
		if (result == LOOKUP_FOUND)
			count_service(given->frontend.service_id, SERVICE_DROPPED_POD_QUOTA);
		return VERDICT_DROP;
	}
	verdict = service_judge(given, result);
	if (pod)
		__sync_fetch_and_add(&pod->openings, verdict == VERDICT_ANSWER_UNREACHABLE ? POD_REFUSAL : 1);
	return verdict;
}

#endif
