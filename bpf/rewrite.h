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

static __always_inline void ip4_tail_fill(struct ip4_tail *tail, const struct packet *packet,
					  const struct address *source, const struct address *destination, __u32 mode)
{
	__u16 before = bpf_htons((__u16)packet->ttl << 8 | packet->tuple.protocol);
	__u8 ttl = packet->ttl - (mode == REWRITE_HOP);
	__u64 sum = (__u16)~packet->ip4_check;

	tail->ttl_protocol = bpf_htons((__u16)ttl << 8 | packet->tuple.protocol);
	tail->source = address_words(source)->word[3];
	tail->destination = address_words(destination)->word[3];
	sum += (__u16)~before + tail->ttl_protocol;
	tail->check = (__u16)~checksum_fold16(sum + checksum_change(&packet->tuple.ends, source, destination));
}

static __always_inline int rewrite_ip4(struct __sk_buff *skb, const struct packet *packet, const struct address *source,
				       const struct address *destination, __u32 mode)
{
	struct ip4_tail tail;

	ip4_tail_fill(&tail, packet, source, destination, mode);
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

/* Where the ports follow the addresses, one call writes both, and the hop limit before them. */
static __always_inline int rewrite_plain_ip4(struct __sk_buff *skb, const struct packet *packet,
					     const struct ends *ends, __be32 ports, __u32 mode)
{
	struct {
		struct ip4_tail ip;
		__be32 ports;
	} tail = {.ports = ports};

	ip4_tail_fill(&tail.ip, packet, &ends->source, &ends->destination, mode);
	return bpf_skb_store_bytes(skb, packet->l3 + IP4_TAIL, &tail, sizeof(tail), 0);
}

/*
 * `change`: of the addresses. Where the device has summed the packet (CHECKSUM_COMPLETE), its sum takes in the addresses
 * and the hop limit, for which nothing in the header makes up; bpf_csum_update() does nothing in other cases. What the
 * ports change, the transport checksum makes up for.
 */
static __always_inline int rewrite_plain_ip6(struct __sk_buff *skb, const struct packet *packet,
					     const struct ends *ends, __be32 ports, __u32 change, __u32 mode)
{
	struct {
		__u8 unused[IP6_HOP_LIMIT & 3];
		__u8 hop_limit;
		struct address source;
		struct address destination;
		__be32 ports;
	} tail = {.source = ends->source, .destination = ends->destination, .ports = ports};

	tail.hop_limit = packet->ttl - (mode == REWRITE_HOP);
	if (bpf_skb_store_bytes(skb, packet->l3 + IP6_HOP_LIMIT, &tail.hop_limit, 1 + 2 * sizeof(struct address) + 4,
				0))
		return -1;
	bpf_csum_update(skb,
			checksum_fold32((__u64)change + (__u16)~bpf_htons(packet->ttl) + bpf_htons(tail.hop_limit)));
	return 0;
}

/* Gives a TCP, UDP or SCTP packet, or a piece of one, new ends. Not 0: the kernel refused. */
static __always_inline int rewrite_packet(struct __sk_buff *skb, const struct packet *packet, const struct ends *ends,
					  __u32 mode)
{
	const struct ends *old = &packet->tuple.ends;
	__be32 old_ports = ports_word(old->source_port, old->destination_port);
	__be32 new_ports = ports_word(ends->source_port, ends->destination_port);

	if (packet->kind != PACKET_PIECE) {
		__u32 change = checksum_change(old, &ends->source, &ends->destination);

		if (checksum_set_transport(skb, packet, change, old_ports, new_ports))
			return -1;
		if (packet->is_ip6 && packet->l4 == packet->l3 + sizeof(struct ipv6hdr))
			return rewrite_plain_ip6(skb, packet, ends, new_ports, change, mode);
		if (!packet->is_ip6 && packet->l4 == packet->l3 + sizeof(struct iphdr))
			return rewrite_plain_ip4(skb, packet, ends, new_ports, mode);
		if (old_ports != new_ports && bpf_skb_store_bytes(skb, packet->l4, &new_ports, sizeof(new_ports), 0))
			return -1;
	}
	if (packet->is_ip6)
		return rewrite_ip6(skb, packet, &ends->source, &ends->destination, mode);
	return rewrite_ip4(skb, packet, &ends->source, &ends->destination, mode);
}

#endif
