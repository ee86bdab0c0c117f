/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Changing the ends of a packet. Families differ here in where the addresses lie and what covers them.
 */
#ifndef KUBELANE_REWRITE_H
#define KUBELANE_REWRITE_H

enum rewrite_mode {
	REWRITE_HOST = 0, /* for this host's stack, which takes care of the TTL */
	REWRITE_HOP = 1, /* forwarded here: one hop less to live */
	REWRITE_QUOTED = 2, /* inside an ICMP error */
};

enum {
	IP6_HOP_LIMIT = 7,
	IP6_TAIL = 4, /* where length, next header, hop limit and both addresses lie side by side */
	IP6_ADDRESSES = 8,
	IP4_TAIL = 8, /* where TTL, protocol, checksum and both addresses lie side by side, to be written at once */
};

struct ip4_tail {
	__u16 ttl_protocol;
	__u16 check;
	__be32 source;
	__be32 destination;
};

/* `change`: of the addresses. */
static __always_inline void ip4_tail_fill(struct ip4_tail *tail, const struct packet *packet,
					  const struct address *source, const struct address *destination, __u32 change,
					  __u32 mode)
{
	__u16 before = bpf_htons((__u16)packet->ttl << 8 | packet->tuple.protocol);
	__u8 ttl = packet->ttl - (mode == REWRITE_HOP);
	__u64 sum = (__u16)~packet->ip4_check;

	tail->ttl_protocol = bpf_htons((__u16)ttl << 8 | packet->tuple.protocol);
	tail->source = address_words(source)->word[3];
	tail->destination = address_words(destination)->word[3];
	sum += (__u16)~before + tail->ttl_protocol;
	tail->check = (__u16)~checksum_fold16(sum + change);
}

static __always_inline int rewrite_ip4(hook_context *ctx, const struct packet *packet, const struct address *source,
				       const struct address *destination, __u32 mode)
{
	struct ip4_tail tail;

	ip4_tail_fill(&tail, packet, source, destination, checksum_change(&packet->tuple.ends, source, destination),
		      mode);
	return hook_store(ctx, packet->l3 + IP4_TAIL, &tail, sizeof(tail));
}

static __always_inline int rewrite_ip6(hook_context *ctx, const struct packet *packet, const struct address *source,
				       const struct address *destination, __u32 mode)
{
	struct {
		struct address source;
		struct address destination;
	} tail = {*source, *destination};
	__u8 ttl = packet->ttl - 1;

	/* Inside an ICMP error its checksum makes up for the change, else nothing does. */
	if (mode == REWRITE_QUOTED)
		return hook_store(ctx, packet->l3 + IP6_ADDRESSES, &tail, sizeof(tail));
	if (mode == REWRITE_HOP && hook_store_summed(ctx, packet->l3 + IP6_HOP_LIMIT, &ttl, sizeof(ttl)))
		return -1;
	return hook_store_summed(ctx, packet->l3 + IP6_ADDRESSES, &tail, sizeof(tail));
}

/* The addresses of the header at packet->l3, and what covers them there. */
static __noinline int rewrite_addresses(hook_context *ctx, const struct packet *packet, const struct address *source,
					const struct address *destination, __u32 mode)
{
	if (packet->is_ip6)
		return rewrite_ip6(ctx, packet, source, destination, mode);
	return rewrite_ip4(ctx, packet, source, destination, mode);
}

/* The transport header with other ports and another checksum. */
static __always_inline void transport_fill(__be32 *to, const struct packet *packet, const struct ends *ends,
					   __u16 check)
{
	to[0] = ports_word(ends->source_port, ends->destination_port);
	if (packet->tuple.protocol == IPPROTO_TCP) {
		to[1] = packet->transport[1];
		to[2] = packet->transport[2];
		to[3] = packet->transport[3];
		to[4] = (packet->transport[4] & bpf_htonl(0xffff)) | bpf_htonl((__u32)bpf_ntohs(check) << 16);
		return;
	}
	to[1] = (packet->transport[1] & bpf_htonl(0xffff0000)) | bpf_htonl(bpf_ntohs(check));
}

/* Where the transport header follows the addresses, everything from the TTL on is written at once. */
static __always_inline int rewrite_plain_ip4(hook_context *ctx, const enum hook hook, const struct scratch *given)
{
	struct {
		struct ip4_tail ip;
		__be32 transport[5];
	} tail;
	const struct packet *packet = &given->packet;
	const struct ends *ends = &given->flow.ends;
	__u32 offset = packet->l3 + IP4_TAIL;

	ip4_tail_fill(&tail.ip, packet, &ends->source, &ends->destination, given->addresses, given->rewrite_mode);
	transport_fill(tail.transport, packet, ends, given->check);
	if (packet->tuple.protocol == IPPROTO_TCP)
		return packet_store(ctx, hook, offset, &tail, sizeof(tail), given->sum);
	return packet_store(ctx, hook, offset, &tail, sizeof(tail.ip) + UDP_HEADER, given->sum);
}

static __always_inline int rewrite_plain_ip6(hook_context *ctx, const enum hook hook, const struct scratch *given)
{
	struct {
		__be32 length_hop_limit;
		struct address source;
		struct address destination;
		__be32 transport[5];
	} tail;
	const struct packet *packet = &given->packet;
	const struct ends *ends = &given->flow.ends;
	__u32 offset = packet->l3 + IP6_TAIL, sum;

	tail.length_hop_limit = packet->ip6_length_hop_limit - bpf_htonl(given->rewrite_mode == REWRITE_HOP);
	tail.source = ends->source;
	tail.destination = ends->destination;
	transport_fill(tail.transport, packet, ends, given->check);
	sum = checksum_fold32((__u64)given->sum + (__u32)~packet->ip6_length_hop_limit + tail.length_hop_limit);
	if (packet->tuple.protocol == IPPROTO_TCP)
		return packet_store(ctx, hook, offset, &tail, sizeof(tail), sum);
	return packet_store(ctx, hook, offset, &tail, 4 + 2 * sizeof(struct address) + UDP_HEADER, sum);
}

/* The same step by step: pieces, SCTP, options or extensions between the headers. Global, so that it is verified once. */
__noinline int rewrite_by_parts(hook_context *ctx)
{
	const struct scratch *given = scratch();
	const struct packet *packet;
	const struct ends *old, *ends;
	__be32 old_ports, new_ports;

	if (!given)
		return -1;
	packet = &given->packet;
	old = &packet->tuple.ends;
	ends = &given->flow.ends;
	old_ports = ports_word(old->source_port, old->destination_port);
	new_ports = ports_word(ends->source_port, ends->destination_port);
	if (packet->kind != PACKET_PIECE) {
		if (checksum_set_transport(ctx, packet, addresses_change(old, ends, packet->is_ip6), old_ports,
					   new_ports))
			return -1;
		if (old_ports != new_ports && hook_store(ctx, packet->l4, &new_ports, sizeof(new_ports)))
			return -1;
	}
	if (packet->is_ip6)
		return rewrite_ip6(ctx, packet, &ends->source, &ends->destination, given->rewrite_mode);
	return rewrite_ip4(ctx, packet, &ends->source, &ends->destination, given->rewrite_mode);
}

/* The transport checksum that is to be written, left in the scratch, as is by how much the sum of the packet's bytes changes
 * once the addresses, the ports and it are: the IPv4 header's own checksum makes up for all that is in that header. Not 0:
 * the kernel refused. */
static __always_inline int rewrite_checksum(hook_context *ctx, struct scratch *given)
{
	struct packet *packet = &given->packet;
	const struct ends *old = &packet->tuple.ends, *ends = &given->flow.ends;
	__u32 addresses = given->addresses;

	given->sum = packet->is_ip6 ? addresses : 0;
	switch (checksum_state(packet)) {
	case CHECKSUM_IS_WHOLE:
		given->check = checksum_changed(packet->check, given->flow.change);
		if (!given->check && packet->tuple.protocol == IPPROTO_UDP)
			given->check = CHECKSUM_ZERO;
		/* It makes up for the ports, and for the addresses, which IPv4 has covered already. */
		given->sum = packet->is_ip6 ? 0 : ~addresses;
		return 0;
	case CHECKSUM_IS_NONE:
		given->check = 0;
		given->sum = ports_change(given->sum, old, ends);
		return 0;
	case CHECKSUM_IS_UNKNOWN:
		break;
	}
	return checksum_settle(ctx);
}

/*
 * Gives the scratch's packet (TCP, UDP or SCTP, or a piece of it) the ends of the scratch's copy of a row, whose change
 * of addresses is in the scratch as well, as is the mode. Not 0: the kernel refused.
 */
static __always_inline int rewrite_packet(hook_context *ctx, const enum hook hook, struct scratch *given)
{
	const struct packet *packet = &given->packet;

	if (packet->kind == PACKET_PIECE || packet->tuple.protocol == IPPROTO_SCTP ||
	    packet->l4 - packet->l3 != (packet->is_ip6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr)))
		return rewrite_by_parts(ctx);
	if (rewrite_checksum(ctx, given))
		return -1;
	if (packet->is_ip6)
		return rewrite_plain_ip6(ctx, hook, given);
	return rewrite_plain_ip4(ctx, hook, given);
}

#endif
