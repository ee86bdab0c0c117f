/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * From the bytes of a packet to what the datapath needs to know of it. Families differ here in the parsing only.
 *
 * Cost: no call for what is in the linear part of the packet; one for each IPv6 extension header (MAX_EXTENSIONS of
 * them are followed).
 */
#ifndef KUBELANE_PACKET_H
#define KUBELANE_PACKET_H

enum {
	MAX_EXTENSIONS = 6,
	UDP_HEADER = 8,
	SCTP_HEADER = 12,
	ICMP_HEADER = 8,
	IP4_DONT_FRAGMENT = 0x4000,
	IP4_MORE_FRAGMENTS = 0x2000,
	IP4_FRAGMENT_OFFSET = 0x1fff,
	IP6_MORE_FRAGMENTS = 0x0001,
	IP6_FRAGMENT_OFFSET = 0xfff8,
	TCP_FIN = 0x01,
	TCP_SYN = 0x02,
	TCP_RST = 0x04,
	TCP_PSH = 0x08,
	TCP_ACK = 0x10,
};

enum packet_kind {
	PACKET_OTHER = 0, /* none of the below: not for us */
	PACKET_WHOLE = 1, /* TCP, UDP or SCTP with its ports */
	PACKET_FIRST = 2, /* the same, the first piece of a fragmented datagram */
	PACKET_PIECE = 3, /* of the same, a later piece: no ports */
	PACKET_ERROR = 4, /* ICMP or ICMPv6 error message */
};

struct packet {
	struct flow_key tuple;
	__u32 interface; /* where it comes in, or leaves */
	__u32 mark;
	__u32 l3; /* offset of the IP header */
	__u32 l4; /* offset of the transport header */
	__u32 total; /* bytes from the IP header on */
	__u32 segment; /* the same, of the largest packet that will be on the wire (GSO) */
	__u32 sequence; /* TCP, host order */
	__u32 acknowledgement;
	__u32 fragment_id;
	__u32 mtu; /* what an answer "too big" will say */
	__be32 transport[5]; /* the transport header as it is: 20 bytes of TCP, 8 of others */
	__be32 ip6_length_hop_limit; /* the second word of an IPv6 header, as it is */
	__u16 ip4_check;
	__u16 check; /* the transport header's, of TCP and UDP */
	__u8 kind; /* enum packet_kind */
	__u8 is_ip6;
	__u8 ttl; /* or hop limit */
	__u8 tcp_flags;
	__u8 may_fragment; /* IPv4 without DF */
	__u8 is_aggregate;
	__u8 zero[2];
};

static __always_inline void address_set_words(struct address *address, const __u32 *words)
{
	struct address_words *to = address_words(address);

	to->word[0] = words[0];
	to->word[1] = words[1];
	to->word[2] = words[2];
	to->word[3] = words[3];
}

/* Copies `size` bytes, a multiple of four: in place where they are in the linear part, which saves a call. */
static __always_inline int packet_load(hook_context *ctx, __u64 offset, void *to, const __u32 size)
{
	void *data, *end;
	__u32 *from, *words = to;

	data = hook_bytes(ctx);
	end = hook_bytes_end(ctx);
	barrier_var(offset);
	if (offset < 1024) {
		from = data + offset;
		if ((void *)from + size <= end) {
			for (__u32 i = 0; i < size / 4; i++)
				words[i] = from[i];
			return 0;
		}
	}
	return hook_load(ctx, offset, to, size);
}

/*
 * The other way: in place where the hook may, and the bytes are in the linear part. `sum`: by how much that changes the
 * sum of the packet's bytes, for packets that the device has summed (CHECKSUM_COMPLETE; of others there is nothing to
 * do). Not 0: the kernel refused.
 */
static __always_inline int packet_store(hook_context *ctx, const enum hook hook, __u64 offset, const void *from,
					const __u32 size, __u32 sum)
{
	const __u32 *words = from;
	void *data, *end;
	__u32 *to;

	if (hook == HOOK_TC_EGRESS)
		return hook_store_summed(ctx, offset, from, size);
	data = hook_bytes(ctx);
	end = hook_bytes_end(ctx);
	barrier_var(offset);
	if (offset < 1024) {
		to = data + offset;
		if ((void *)to + size <= end) {
			for (__u32 i = 0; i < size / 4; i++)
				to[i] = words[i];
			if (sum)
				hook_sum_change(ctx, sum);
			return 0;
		}
	}
	return hook_store_summed(ctx, offset, from, size);
}

static __always_inline int is_icmp_error(int is_ip6, __u8 type)
{
	/* RFC 792: unreachable, time exceeded, parameter problem; RFC 4443: errors are 0 to 127. */
	return is_ip6 ? type >= 1 && type <= 4 : type == 3 || type == 11 || type == 12;
}

/* The protocols that Services have: all begin with both ports. */
static __always_inline int protocol_has_ports(__u8 protocol)
{
	return protocol == IPPROTO_TCP || protocol == IPPROTO_UDP || protocol == IPPROTO_SCTP;
}

/* Follows IPv6 extension headers from `next` on, up to the transport header. 0: there is none to be found. */
static __noinline int packet_skip_extensions(hook_context *ctx, struct packet *packet, __u32 next)
{
	__u32 offset = packet->l3 + sizeof(struct ipv6hdr);

	for (int i = 0; i < MAX_EXTENSIONS; i++) {
		struct {
			__u8 next;
			__u8 length;
			__be16 offset;
			__be32 id;
		} header = {};

		if (next != IPPROTO_HOPOPTS && next != IPPROTO_ROUTING && next != IPPROTO_DSTOPTS &&
		    next != IPPROTO_FRAGMENT) {
			packet->l4 = offset;
			packet->tuple.protocol = next;
			return 1;
		}
		if (hook_load(ctx, offset, &header, sizeof(header)))
			return 0;
		if (next == IPPROTO_FRAGMENT) {
			packet->fragment_id = header.id;
			if (header.offset & bpf_htons(IP6_FRAGMENT_OFFSET)) {
				packet->kind = PACKET_PIECE;
				packet->tuple.protocol = header.next;
				return 1;
			}
			if (header.offset & bpf_htons(IP6_MORE_FRAGMENTS))
				packet->kind = PACKET_FIRST;
			offset += sizeof(header);
		} else {
			offset += (header.length + 1) * 8;
		}
		next = header.next;
	}
	return 0;
}

static __always_inline int packet_parse_ip4(hook_context *ctx, struct packet *packet)
{
	struct iphdr ip = {};

	if (packet_load(ctx, packet->l3, &ip, sizeof(ip)) || ip.version != 4 || ip.ihl < 5)
		return 0;
	address_set_ip4(&packet->tuple.ends.source, ip.saddr);
	address_set_ip4(&packet->tuple.ends.destination, ip.daddr);
	packet->tuple.protocol = ip.protocol;
	packet->l4 = packet->l3 + ip.ihl * 4;
	packet->total = bpf_ntohs(ip.tot_len);
	packet->ttl = ip.ttl;
	packet->ip4_check = ip.check;
	packet->fragment_id = ip.id;
	packet->may_fragment = !(ip.frag_off & bpf_htons(IP4_DONT_FRAGMENT));
	if (ip.frag_off & bpf_htons(IP4_FRAGMENT_OFFSET))
		packet->kind = PACKET_PIECE;
	else if (ip.frag_off & bpf_htons(IP4_MORE_FRAGMENTS))
		packet->kind = PACKET_FIRST;
	return 1;
}

static __always_inline int packet_parse_ip6(hook_context *ctx, struct packet *packet)
{
	struct ipv6hdr ip = {};

	if (packet_load(ctx, packet->l3, &ip, sizeof(ip)) || ip.version != 6)
		return 0;
	address_set_words(&packet->tuple.ends.source, ip.saddr.in6_u.u6_addr32);
	address_set_words(&packet->tuple.ends.destination, ip.daddr.in6_u.u6_addr32);
	packet->total = sizeof(ip) + bpf_ntohs(ip.payload_len);
	packet->ttl = ip.hop_limit;
	packet->ip6_length_hop_limit =
		bpf_htonl((__u32)bpf_ntohs(ip.payload_len) << 16 | (__u32)ip.nexthdr << 8 | ip.hop_limit);
	if (protocol_has_ports(ip.nexthdr)) {
		packet->tuple.protocol = ip.nexthdr;
		packet->l4 = packet->l3 + sizeof(ip);
		return 1;
	}
	return packet_skip_extensions(ctx, packet, ip.nexthdr);
}

/* The length of one wire packet: an aggregate's segments have segment_size bytes behind the transport header. */
static __always_inline void packet_measure(hook_context *ctx, struct packet *packet, __u32 transport_header)
{
	__u32 segment_size = hook_segment_size(ctx);

	/* Aggregates beyond 64 KiB ("BIG TCP") say 0. */
	if (segment_size && packet->total < packet->l4 - packet->l3 + transport_header)
		packet->total = hook_length(ctx) - packet->l3;
	packet->is_aggregate = segment_size != 0;
	packet->segment = segment_size ? packet->l4 - packet->l3 + transport_header + segment_size : packet->total;
}

static __always_inline void packet_parse_tcp(hook_context *ctx, struct packet *packet)
{
	__be32 *words = packet->transport; /* RFC 9293: ports, sequence, acknowledgement, flags and window, checksum */

	if (packet_load(ctx, packet->l4, words, sizeof(packet->transport))) {
		packet->kind = PACKET_OTHER;
		return;
	}
	packet->tuple.ends.source_port = bpf_htons(bpf_ntohl(words[0]) >> 16);
	packet->tuple.ends.destination_port = bpf_htons(bpf_ntohl(words[0]));
	packet->sequence = bpf_ntohl(words[1]);
	packet->acknowledgement = bpf_ntohl(words[2]);
	packet->tcp_flags = bpf_ntohl(words[3]) >> 16;
	packet->check = bpf_htons(bpf_ntohl(words[4]) >> 16);
	packet_measure(ctx, packet, (bpf_ntohl(words[3]) >> 28) * 4);
}

/* UDP and SCTP (RFC 768, RFC 9260): ports, and nothing else that matters here. */
static __always_inline void packet_parse_ports(hook_context *ctx, struct packet *packet)
{
	__be32 *words = packet->transport;

	if (packet_load(ctx, packet->l4, words, 8)) {
		packet->kind = PACKET_OTHER;
		return;
	}
	packet->tuple.ends.source_port = bpf_htons(bpf_ntohl(words[0]) >> 16);
	packet->tuple.ends.destination_port = bpf_htons(bpf_ntohl(words[0]));
	packet->check = bpf_htons(bpf_ntohl(words[1])); /* of UDP */
	packet_measure(ctx, packet, packet->tuple.protocol == IPPROTO_UDP ? UDP_HEADER : SCTP_HEADER);
}

/* For a new packet: what the parsers do not set for each. */
static __always_inline void packet_reset(struct packet *packet, __u32 l3, __u32 is_ip6)
{
	packet->l3 = l3;
	packet->is_ip6 = is_ip6;
	packet->kind = PACKET_WHOLE;
	packet->tcp_flags = 0;
	packet->may_fragment = 0;
	packet->fragment_id = 0;
}

/* After packet_reset(). `kind` says what the packet is. */
static __always_inline int packet_parse(hook_context *ctx, struct packet *packet)
{
	__u8 type = 0;

	if (!(packet->is_ip6 ? packet_parse_ip6(ctx, packet) : packet_parse_ip4(ctx, packet))) {
		packet->kind = PACKET_OTHER;
		return 0;
	}
	packet->segment = packet->total;
	if (protocol_has_ports(packet->tuple.protocol)) {
		if (packet->kind == PACKET_PIECE)
			return 0;
		if (packet->tuple.protocol == IPPROTO_TCP)
			packet_parse_tcp(ctx, packet);
		else
			packet_parse_ports(ctx, packet);
		return 0;
	}
	if (packet->kind == PACKET_WHOLE &&
	    packet->tuple.protocol == (packet->is_ip6 ? IPPROTO_ICMPV6 : IPPROTO_ICMP) &&
	    !hook_load(ctx, packet->l4, &type, sizeof(type)) && is_icmp_error(packet->is_ip6, type))
		packet->kind = PACKET_ERROR;
	else
		packet->kind = PACKET_OTHER;
	return 0;
}

/* What an ICMP error quotes: an IP header and at least eight bytes behind it, the ports being the first four. */
static __noinline int packet_parse_quoted(hook_context *ctx, struct packet *quoted)
{
	__be16 halves[4] = {};

	if (!(quoted->is_ip6 ? packet_parse_ip6(ctx, quoted) : packet_parse_ip4(ctx, quoted)))
		return 0;
	if (quoted->kind == PACKET_PIECE || !protocol_has_ports(quoted->tuple.protocol) ||
	    hook_load(ctx, quoted->l4, halves, sizeof(halves)))
		return 0;
	quoted->tuple.ends.source_port = halves[0];
	quoted->tuple.ends.destination_port = halves[1];
	return 1;
}

#endif
