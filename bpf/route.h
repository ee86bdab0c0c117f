/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Where a packet goes next, as the kernel's own routing would decide it: all tables, by the `ip rule`s, with the
 * packet's mark, as if forwarded from the device that it came in by. Each processor keeps the answers that it got, for a
 * second at most and for as long as the daemon tells of no change: by addresses, so that all flows of a backend share
 * them, and by ports as well where routing asks for these.
 */
#ifndef KUBELANE_ROUTE_H
#define KUBELANE_ROUTE_H

/* linux/bpf.h, of kernels newer than the headers that this may be built with. */
enum {
	FIB_LOOKUP_SRC = 1 << 4, /* 6.7 */
	FIB_LOOKUP_MARK = 1 << 5, /* 6.10 */
	MTU_LEAST = 1280, /* RFC 8200; kernels before 5.12 do not say which MTU was exceeded */
};

enum route_result {
	ROUTE_FOUND = 0,
	ROUTE_TOO_BIG = 1,
	ROUTE_NONE = 2,
	ROUTE_FORWARDING_OFF = 3,
	ROUTE_HERE = 4, /* the node itself, or a pod's device: the host's stack goes on with it */
};

static __always_inline void fib_fill(struct bpf_fib_lookup *fib, __u32 interface, const struct ends *ends,
				     __u8 protocol, __u32 length)
{
	fib->l4_protocol = protocol;
	fib->sport = ends->source_port;
	fib->dport = ends->destination_port;
	fib->tot_len = length;
	fib->ifindex = interface;
	if (address_is_ip4(&ends->destination)) {
		fib->family = FAMILY_INET;
		/* An IPv4 wildcard is "none" just as it is for the kernel. */
		fib->ipv4_src = address_words(&ends->source)->word[3];
		fib->ipv4_dst = address_words(&ends->destination)->word[3];
		return;
	}
	fib->family = FAMILY_INET6;
	for (int i = 0; i < 4; i++) {
		fib->ipv6_src[i] = address_words(&ends->source)->word[i];
		fib->ipv6_dst[i] = address_words(&ends->destination)->word[i];
	}
}

/* The mark is an input that shares its place with an output; kernels before 6.10 know no such flag and say -EINVAL. */
static __always_inline long fib_lookup(hook_context *ctx, __u32 mark, struct bpf_fib_lookup *fib, __u32 flags)
{
	long result;

	if (mark) {
		__builtin_memcpy(fib->smac, &mark, sizeof(mark));
		result = bpf_fib_lookup(ctx, fib, sizeof(*fib), flags | FIB_LOOKUP_MARK);
		if (result != -EINVAL)
			return result;
	}
	return bpf_fib_lookup(ctx, fib, sizeof(*fib), flags);
}

/*
 * The neighbour that a packet is handed to. A tunnel without a fixed end (Calico's tunl0) sends to the next hop of the
 * route that the packet carries, and drops one that carries none (ip_tunnel_xmit); the kernel attaches a route only
 * where it looks for the neighbour itself, as it is to do for all devices without link addresses.
 */
static __always_inline void route_set_next(struct route *route, const struct bpf_fib_lookup *fib)
{
	__u32 interface = fib->ifindex;
	struct device *device = map_find(&devices, &interface);

	route->interface = interface;
	if (device && device->is_bare)
		return;
	route->next.nh_family = fib->family;
	for (int i = 0; i < 4; i++)
		route->next.ipv6_nh[i] = fib->ipv6_dst[i];
}

/* Sends a packet on; not 0: the kernel refused. */
static __always_inline int route_send(hook_context *ctx, __u32 l3, struct route *route)
{
	return hook_send(ctx, l3, route->interface, &route->next);
}

static __noinline int route_find(hook_context *ctx, struct scratch *given, const struct packet *packet,
				 const struct ends *ends, struct route *route)
{
	struct bpf_fib_lookup fib = {};
	/* More than 65535 does not fit, and fits no device either. */
	__u32 length = packet->segment > 0xffff ? 0xffff : packet->segment;
	long result;

	fib_fill(&fib, given->packet.interface, ends, packet->tuple.protocol, length);
	result = fib_lookup(ctx, given->packet.mark, &fib, 0);
	/* "No neighbour" names the next hop: redirecting resolves it. */
	if (result == BPF_FIB_LKUP_RET_SUCCESS || result == BPF_FIB_LKUP_RET_NO_NEIGH) {
		route_set_next(route, &fib);
		/* The device's or the path's; before 5.12 the packet's own length, which shares the place. */
		route->mtu = fib.mtu_result;
		if (result == BPF_FIB_LKUP_RET_NO_NEIGH && route->next.nh_family) {
			count(COUNTER_NEIGHBOUR_UNKNOWN);
			route->mtu = 0;
		}
		return ROUTE_FOUND;
	}
	if (result == BPF_FIB_LKUP_RET_FRAG_NEEDED) {
		route->mtu = fib.mtu_result && fib.mtu_result < length ? fib.mtu_result : MTU_LEAST;
		return ROUTE_TOO_BIG;
	}
	if (result == BPF_FIB_LKUP_RET_NOT_FWDED)
		return ROUTE_HERE;
	return result == BPF_FIB_LKUP_RET_FWD_DISABLED ? ROUTE_FORWARDING_OFF : ROUTE_NONE;
}

/* The place in the cache of what is asked for packets of these ends. `by_address`: flows between two addresses share it. */
static __always_inline struct known_route *known_route_at(const struct ends *ends, __u32 by_address)
{
	__u32 sum = address_words(&ends->source)->word[3] + address_words(&ends->destination)->word[3] * 3, index;

	if (!by_address)
		sum += ends->source_port + ends->destination_port;
	index = mix(sum) & (ROUTES_KNOWN - 1);
	return bpf_map_lookup_elem(&known_routes, &index);
}

/* Is that what was asked for packets of these ends, a moment ago? */
static __always_inline int known_route_answers(const struct known_route *known, __u32 interface,
					       const struct ends *ends, __u32 protocol, __u32 by_address, __u32 second)
{
	if (!known->interface || known->second != second || known->from != interface ||
	    known->epoch != epoch_now(EPOCH_ROUTES) ||
	    (address_difference(&known->ends.source, &ends->source) |
	     address_difference(&known->ends.destination, &ends->destination)))
		return 0;
	/* Rules that name ports, or paths chosen by them. */
	return by_address || (known->protocol == protocol && known->ends.source_port == ends->source_port &&
			      known->ends.destination_port == ends->destination_port);
}

/* `epoch` is from before the look-up: a change that came meanwhile counts. */
static __always_inline void known_route_note(struct known_route *known, __u32 from, const struct ends *ends,
					     __u32 protocol, const struct route *route, __u32 epoch, __u32 second)
{
	known->from = from;
	/* Else the compiler loads everything before it stores anything, on a stack that has no room for it. */
	barrier();
	known->ends = *ends;
	barrier();
	known->protocol = protocol;
	known->epoch = epoch;
	known->second = second;
	known->mtu = route->mtu;
	known->family = route->next.nh_family;
	for (int i = 0; i < 4; i++)
		known->next[i] = route->next.ipv6_nh[i];
	known->interface = route->interface;
}

/* As route_find(), from what this processor knows if it does. Marks and what is larger than known to fit are asked. */
static __always_inline int route_recall(hook_context *ctx, struct scratch *given, const struct packet *packet,
					const struct ends *ends, struct route *route)
{
	__u32 second = second_now(given), by_address = epoch_now(EPOCH_ROUTES_BY_ADDRESS), epoch;
	struct known_route *known = known_route_at(ends, by_address);
	int result;

	if (known && !given->packet.mark && packet->segment <= known->mtu &&
	    known_route_answers(known, given->packet.interface, ends, packet->tuple.protocol, by_address, second)) {
		route->interface = known->interface;
		route->next.nh_family = known->family;
		for (int i = 0; i < 4; i++)
			route->next.ipv6_nh[i] = known->next[i];
		return ROUTE_FOUND;
	}
	epoch = epoch_now(EPOCH_ROUTES);
	result = route_find(ctx, given, packet, ends, route);
	if (result == ROUTE_FOUND && known && !given->packet.mark && route->mtu)
		known_route_note(known, given->packet.interface, ends, packet->tuple.protocol, route, epoch, second);
	return result;
}

/* Asks the kernel. */
static __always_inline int route_source_find(hook_context *ctx, const struct packet *packet, struct ends *ends,
					     __u8 protocol, __u32 *interface)
{
	struct bpf_fib_lookup fib = {};
	struct device *device;
	long result;

	/* Of length 1: whether the packet fits is judged later. */
	fib_fill(&fib, packet->interface, ends, protocol, 1);
	result = fib_lookup(ctx, packet->mark, &fib, FIB_LOOKUP_SRC);
	if (result == -EINVAL) {
		fib_fill(&fib, packet->interface, ends, protocol, 1);
		result = fib_lookup(ctx, packet->mark, &fib, 0);
		fib.ipv4_src = 0;
	}
	if (result == BPF_FIB_LKUP_RET_NOT_FWDED)
		return ROUTE_HERE;
	if (result == BPF_FIB_LKUP_RET_FWD_DISABLED)
		return ROUTE_FORWARDING_OFF;
	if (result != BPF_FIB_LKUP_RET_SUCCESS && result != BPF_FIB_LKUP_RET_NO_NEIGH)
		return ROUTE_NONE;
	*interface = fib.ifindex;
	device = map_find(&devices, interface);
	if (!device)
		return ROUTE_HERE;
	if (address_is_ip4(&ends->destination)) {
		address_set_ip4(&ends->source, fib.ipv4_src);
		if (!fib.ipv4_src)
			ends->source = device->ip4;
	} else {
		address_set_words(&ends->source, fib.ipv6_src);
		if (address_is_loopback(&ends->source))
			ends->source = device->ip6;
	}
	return ROUTE_FOUND;
}

/*
 * Where is ends->destination? ROUTE_HERE: on this node. ROUTE_FOUND: behind an outward device; ends->source, which must
 * be all zeros (IPv4: mapped), becomes what this node would use towards it.
 */
static __noinline int route_source(hook_context *ctx, struct scratch *given, struct ends *ends, __u8 protocol)
{
	__u32 second = second_now(given), epoch = epoch_now(EPOCH_ROUTES), interface = 0;
	__u32 by_address = epoch_now(EPOCH_ROUTES_BY_ADDRESS);
	struct known_route *known = known_route_at(ends, by_address);
	struct ends *asked = &given->asked;
	struct route route = {};
	int result;

	if (known && !given->packet.mark &&
	    known_route_answers(known, given->packet.interface, ends, protocol, by_address, second)) {
		if (!known->mtu)
			return ROUTE_HERE;
		address_set_words(&ends->source, known->next);
		return ROUTE_FOUND;
	}
	*asked = *ends;
	result = route_source_find(ctx, &given->packet, ends, protocol, &interface);
	if (!known || given->packet.mark || !interface || (result != ROUTE_FOUND && result != ROUTE_HERE))
		return result;
	route.interface = interface;
	route.mtu = result == ROUTE_FOUND;
	for (int i = 0; i < 4; i++)
		route.next.ipv6_nh[i] = address_words(&ends->source)->word[i];
	known_route_note(known, given->packet.interface, asked, protocol, &route, epoch, second);
	return result;
}

#endif
