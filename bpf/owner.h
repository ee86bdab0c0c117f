/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Whose is a packet that has a served address and port as its destination, and no flow? A connection of this node, or of
 * a pod that is masqueraded as the node, may have a NodePort's number as its own source port: then the packet answers it.
 *
 *   - A SYN answers nothing. A SYN with an acknowledgement answers whoever sent the SYN, and begins no flow of ours.
 *   - The node's own sockets are asked for: of TCP any that is not listening, of UDP one that is connected to this very
 *     end. (A listener on the NodePort's number is not asked: the Service took over from it.)
 *   - What has left from a served address and port without being a flow's reply was noted on its way out: masqueraded
 *     pods, and UDP sockets that are not connected. The daemon notes what netfilter tracks when the port becomes served
 *     (src/bpf/tracked.rs), and the TCP connections that kube-proxy has translated.
 *
 * What this does not see: a datagram that an unconnected socket sent before the port was served, and that nothing tracks.
 *
 * Cost: nothing for a SYN; one socket and one hash look-up for a flow that begins in another way.
 */
#ifndef KUBELANE_OWNER_H
#define KUBELANE_OWNER_H

enum {
	SOCKET_LISTENS = 10, /* BPF_TCP_LISTEN */
};

/* As the kernel wants it; answers its size. */
static __always_inline __u32 socket_tuple_fill(struct bpf_sock_tuple *tuple, const struct packet *packet)
{
	const struct ends *ends = &packet->tuple.ends;

	if (!packet->is_ip6) {
		tuple->ipv4.saddr = address_words(&ends->source)->word[3];
		tuple->ipv4.daddr = address_words(&ends->destination)->word[3];
		tuple->ipv4.sport = ends->source_port;
		tuple->ipv4.dport = ends->destination_port;
		return sizeof(tuple->ipv4);
	}
	for (int i = 0; i < 4; i++) {
		tuple->ipv6.saddr[i] = address_words(&ends->source)->word[i];
		tuple->ipv6.daddr[i] = address_words(&ends->destination)->word[i];
	}
	tuple->ipv6.sport = ends->source_port;
	tuple->ipv6.dport = ends->destination_port;
	return sizeof(tuple->ipv6);
}

/* Does a socket of the node's wait for this packet, and for no other client's? */
static __always_inline int owner_is_socket(hook_context *ctx, const struct packet *packet)
{
	struct bpf_sock_tuple tuple = {};
	__u32 size = socket_tuple_fill(&tuple, packet);
	struct bpf_sock *sk;
	int is_owner;

	if (packet->tuple.protocol == IPPROTO_TCP) {
		sk = bpf_skc_lookup_tcp(ctx, &tuple, size, BPF_F_CURRENT_NETNS, 0);
		if (!sk)
			return 0;
		is_owner = sk->state != SOCKET_LISTENS;
	} else if (packet->tuple.protocol == IPPROTO_UDP) {
		sk = bpf_sk_lookup_udp(ctx, &tuple, size, BPF_F_CURRENT_NETNS, 0);
		if (!sk)
			return 0;
		/* The look-up finds a connected socket only for the end that it is connected to. */
		is_owner = sk->dst_port != 0;
	} else {
		return 0;
	}
	bpf_sk_release(sk);
	return is_owner;
}

/*
 * Does a pod's frame go to this node, which is its gateway? A bridge gives frames that are not for itself to others, a
 * router outside for instance, and those of its ports have link addresses of their own.
 */
static __always_inline int owner_is_gateway(hook_context *ctx, const struct packet *packet)
{
	__u32 interface = packet->interface;
	struct pod_device *device;
	__be16 to[3] = {}, *gateway;

	if (hook_is_to_this_host(ctx))
		return 1;
	device = map_find(&pod_devices, &interface);
	if (!device || hook_load(ctx, 0, to, sizeof(to)))
		return 0;
	gateway = (void *)device->gateway;
	return to[0] == gateway[0] && to[1] == gateway[1] && to[2] == gateway[2];
}

/* Is the packet somebody's who is no Service? Global, so that it is verified by itself. */
__noinline int owner_is_other(hook_context *ctx)
{
	const __u8 both = TCP_SYN | TCP_ACK;
	struct scratch *given = scratch();
	const struct packet *packet;

	if (!given)
		return 0;
	packet = &given->packet;
	if (given->from_pod && !owner_is_gateway(ctx, packet))
		return 1;
	if (packet->tuple.protocol == IPPROTO_TCP && (packet->tcp_flags & both) == TCP_SYN)
		return 0;
	if (packet->tuple.protocol == IPPROTO_TCP && (packet->tcp_flags & both) == both)
		return 1;
	return bpf_map_lookup_elem(&outgoing, &packet->tuple) || owner_is_socket(ctx, packet);
}

/*
 * A packet that leaves from a port that is served, and is no reply of a local backend's: if the address is served, too,
 * its answers are its sender's. Once a second for each.
 */
__noinline int owner_note(hook_context *ctx)
{
	struct scratch *given = scratch();
	__u32 second, from, *noted;

	if (!given)
		return 0;
	/* What came in by an outward device and leaves by one was sent on from here. */
	from = hook_came_from(ctx);
	if (from && map_find(&devices, &from))
		return 0;
	second = second_now(given);
	flow_key_reverse(&given->reply, &given->packet.tuple.ends, given->packet.tuple.protocol);
	noted = bpf_map_lookup_elem(&outgoing, &given->reply);
	if (noted) {
		*noted = second;
		return 0;
	}
	if (!(address_roles(&given->packet.tuple.ends.source) & (ADDRESS_NODE | ADDRESS_SERVICE_VIP)))
		return 0;
	/* Nobody replaces a row, so that each is found (map_find()). */
	bpf_map_update_elem(&outgoing, &given->reply, &second, BPF_NOEXIST);
	return 0;
}

#endif
