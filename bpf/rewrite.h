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
	IP6_HOP_LIMIT = 7, /* before the addresses, also to be written at once */
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

static __always_inline int rewrite_ip4(struct __sk_buff *skb, const struct packet *packet, const struct address *source,
				       const struct address *destination, __u32 mode)
{
	struct ip4_tail tail;

	ip4_tail_fill(&tail, packet, source, destination, checksum_change(&packet->tuple.ends, source, destination),
		      mode);
	return bpf_skb_store_bytes(skb, packet->l3 + IP4_TAIL, &tail, sizeof(tail), 0);
}

static __always_inline int rewrite_ip6(struct __sk_buff *skb, const struct packet *packet, const struct address *source,
				       const struct address *destination, __u32 mode)
{
	/* Nothing in the header itself makes up for the change. Inside an ICMP error the ICMP checksum does. */
	__u64 flags = mode == REWRITE_QUOTED ? 0 : BPF_F_RECOMPUTE_CSUM;
	struct {
		struct address source;
		struct address destination;
	} tail = {*source, *destination};
	__u8 ttl = packet->ttl - 1;

	if (mode == REWRITE_HOP && bpf_skb_store_bytes(skb, packet->l3 + 7, &ttl, sizeof(ttl), flags))
		return -1;
	return bpf_skb_store_bytes(skb, packet->l3 + 8, &tail, sizeof(tail), flags);
}

/* The addresses of the header at packet->l3, and what covers them there. */
static __noinline int rewrite_addresses(struct __sk_buff *skb, const struct packet *packet,
					const struct address *source, const struct address *destination, __u32 mode)
{
	if (packet->is_ip6)
		return rewrite_ip6(skb, packet, source, destination, mode);
	return rewrite_ip4(skb, packet, source, destination, mode);
}

/* The transport header with other ports, and its checksum changed by `change`. Answers how many bytes it is. */
static __always_inline void transport_fill(__be32 *to, const struct packet *packet, __be32 ports, __u32 change)
{
	__u16 check = checksum_changed(packet->check, change);

	to[0] = ports;
	if (packet->tuple.protocol == IPPROTO_TCP) {
		to[1] = packet->transport[1];
		to[2] = packet->transport[2];
		to[3] = packet->transport[3];
		to[4] = (packet->transport[4] & bpf_htonl(0xffff)) | bpf_htonl((__u32)bpf_ntohs(check) << 16);
		return;
	}
	to[1] = (packet->transport[1] & bpf_htonl(0xffff0000)) | bpf_htonl(check ? bpf_ntohs(check) : 0xffff);
}

/*
 * Where the transport header follows the addresses and its checksum can be changed here, one call writes everything from
 * the TTL on. Where the device has summed the packet (CHECKSUM_COMPLETE), its sum starts at the IP header: the IPv4
 * header's checksum makes up for all that is in it, and the transport's for what its pseudo header has, too.
 * bpf_csum_update() does nothing in other cases.
 */
static __always_inline int rewrite_whole_ip4(struct __sk_buff *skb, const struct scratch *given, __be32 ports,
					     __u32 mode)
{
	struct {
		struct ip4_tail ip;
		__be32 transport[5];
	} tail;
	const struct packet *packet = &given->packet;
	const struct ends *ends = &given->flow.ends;
	long result;

	ip4_tail_fill(&tail.ip, packet, &ends->source, &ends->destination, given->addresses, mode);
	transport_fill(tail.transport, packet, ports, given->flow.change);
	if (packet->tuple.protocol == IPPROTO_TCP)
		result = bpf_skb_store_bytes(skb, packet->l3 + IP4_TAIL, &tail, sizeof(tail), 0);
	else
		result = bpf_skb_store_bytes(skb, packet->l3 + IP4_TAIL, &tail, sizeof(tail.ip) + 8, 0);
	bpf_csum_update(skb, ~given->addresses);
	return result;
}

/* In IPv6 the transport's checksum makes up for all but the hop limit. */
static __always_inline int rewrite_whole_ip6(struct __sk_buff *skb, const struct packet *packet,
					     const struct ends *ends, __be32 ports, __u32 change, __u32 mode)
{
	struct {
		__u8 unused[IP6_HOP_LIMIT & 3];
		__u8 hop_limit;
		struct address source;
		struct address destination;
		__be32 transport[5];
	} tail = {.source = ends->source, .destination = ends->destination};
	__u32 offset = packet->l3 + IP6_HOP_LIMIT;
	long result;

	tail.hop_limit = packet->ttl - (mode == REWRITE_HOP);
	transport_fill(tail.transport, packet, ports, change);
	if (packet->tuple.protocol == IPPROTO_TCP)
		result = bpf_skb_store_bytes(skb, offset, &tail.hop_limit, 1 + 2 * sizeof(struct address) + 20, 0);
	else
		result = bpf_skb_store_bytes(skb, offset, &tail.hop_limit, 1 + 2 * sizeof(struct address) + 8, 0);
	if (mode == REWRITE_HOP)
		bpf_csum_update(skb,
				checksum_fold32((__u64)(__u16)~bpf_htons(packet->ttl) + bpf_htons(tail.hop_limit)));
	return result;
}

/* The same step by step: options or extensions between the headers, no checksum, or one that the device will make. Where
 * the ports of IPv4 follow the addresses, one call writes both. */
static __noinline int rewrite_by_parts(struct __sk_buff *skb, const struct packet *packet, const struct ends *ends,
				       __u32 mode)
{
	const struct ends *old = &packet->tuple.ends;
	__be32 old_ports = ports_word(old->source_port, old->destination_port);
	__be32 new_ports = ports_word(ends->source_port, ends->destination_port);
	struct {
		struct ip4_tail ip;
		__be32 ports;
	} tail = {.ports = new_ports};
	__u32 addresses = addresses_change(old, ends, packet->is_ip6);

	if (packet->kind != PACKET_PIECE) {
		if (checksum_set_transport(skb, packet, addresses, old_ports, new_ports))
			return -1;
		if (!packet->is_ip6 && packet->l4 == packet->l3 + sizeof(struct iphdr)) {
			ip4_tail_fill(&tail.ip, packet, &ends->source, &ends->destination, addresses, mode);
			return bpf_skb_store_bytes(skb, packet->l3 + IP4_TAIL, &tail, sizeof(tail), 0);
		}
		if (old_ports != new_ports && bpf_skb_store_bytes(skb, packet->l4, &new_ports, sizeof(new_ports), 0))
			return -1;
	}
	if (packet->is_ip6)
		return rewrite_ip6(skb, packet, &ends->source, &ends->destination, mode);
	return rewrite_ip4(skb, packet, &ends->source, &ends->destination, mode);
}

/*
 * Gives the scratch's packet (TCP, UDP or SCTP, or a piece of it) the ends of the scratch's copy of a row, whose change
 * of addresses is in the scratch as well. Not 0: the kernel refused. Global, so that it is verified once and not for each way that leads here.
 */
__noinline int rewrite_packet(struct __sk_buff *skb, __u32 mode)
{
	struct scratch *given = scratch();
	const struct packet *packet;
	const struct ends *ends;
	__be32 ports;

	if (!given)
		return -1;
	packet = &given->packet;
	ends = &given->flow.ends;
	ports = ports_word(ends->source_port, ends->destination_port);
	if (packet->kind == PACKET_PIECE || packet->tuple.protocol == IPPROTO_SCTP || !checksum_is_whole(skb, packet))
		return rewrite_by_parts(skb, packet, ends, mode);
	if (packet->is_ip6 && packet->l4 == packet->l3 + sizeof(struct ipv6hdr))
		return rewrite_whole_ip6(skb, packet, ends, ports, given->flow.change, mode);
	if (!packet->is_ip6 && packet->l4 == packet->l3 + sizeof(struct iphdr))
		return rewrite_whole_ip4(skb, given, ports, mode);
	return rewrite_by_parts(skb, packet, ends, mode);
}

#endif
