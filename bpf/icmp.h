/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * ICMP and ICMPv6 errors: those that kubelane answers with itself, in the place of the packet that they are about.
 */
#ifndef KUBELANE_ICMP_H
#define KUBELANE_ICMP_H

enum {
	QUOTE_MAX = 128, /* an IP header with options or extensions, and the transport header; a power of two */
	ANSWER_TTL = 64,
	/* As many answers as this in as many nanoseconds, on each processor: a flood is not answered by another. */
	ANSWERS_AT_ONCE = 100,
	ANSWERS_INTERVAL_NS = 100000000,
};

struct icmp_message {
	__u8 type;
	__u8 code;
	__u16 check;
	__be32 rest;
	__u8 quote[QUOTE_MAX];
};

static __always_inline void icmp_fill(struct icmp_message *message, int is_ip6, __u32 verdict, __u32 mtu)
{
	if (verdict == VERDICT_ANSWER_UNREACHABLE) {
		message->type = is_ip6 ? 1 : 3;
		message->code = is_ip6 ? 4 : 3;
	} else if (verdict == VERDICT_ANSWER_TTL) {
		message->type = is_ip6 ? 3 : 11;
	} else {
		message->type = is_ip6 ? 2 : 3;
		message->code = is_ip6 ? 0 : 4;
		/* RFC 1191: the lower half; RFC 4443: all of it. */
		message->rest = bpf_htonl(mtu);
	}
}

/* RFC 1122 3.2.2, RFC 4443 2.4: no error about a source that is no single host. */
static __always_inline int icmp_may_answer(const struct address *source)
{
	__u32 first = bpf_ntohl(address_words(source)->word[address_is_ip4(source) ? 3 : 0]);

	if (address_is_loopback(source))
		return 0;
	return address_is_ip4(source) ? first < 0xe0000000 : first >> 24 != 0xff;
}

/* The IP header of what is answered in the packet's place, with `length` bytes behind it. */
static __always_inline int answer_store_ip4(hook_context *ctx, const struct packet *packet, const __u8 protocol,
					    __u32 length)
{
	struct iphdr ip = {
		.version = 4,
		.ihl = 5,
		/* RFC 1812 4.3.2.5: internetwork control, as Linux does */
		.tos = protocol == IPPROTO_ICMP ? 0xc0 : 0,
		.tot_len = bpf_htons(sizeof(struct iphdr) + length),
		/* TCP: as Linux does, too. */
		.frag_off = protocol == IPPROTO_TCP ? bpf_htons(IP4_DONT_FRAGMENT) : 0,
		.ttl = ANSWER_TTL,
		.protocol = protocol,
		.saddr = address_words(&packet->tuple.ends.destination)->word[3],
		.daddr = address_words(&packet->tuple.ends.source)->word[3],
	};

	ip.check = (__u16)~checksum_fold16(bpf_csum_diff((void *)0, 0, (void *)&ip, sizeof(ip), 0));
	return hook_store(ctx, packet->l3, &ip, sizeof(ip));
}

static __always_inline int answer_store_ip6(hook_context *ctx, const struct packet *packet, const __u8 protocol,
					    __u32 length)
{
	struct ipv6hdr ip = {
		.version = 6,
		.payload_len = bpf_htons(length),
		.nexthdr = protocol,
		.hop_limit = ANSWER_TTL,
	};

	address_set_words((struct address *)&ip.saddr, address_words(&packet->tuple.ends.destination)->word);
	address_set_words((struct address *)&ip.daddr, address_words(&packet->tuple.ends.source)->word);
	return hook_store(ctx, packet->l3, &ip, sizeof(ip));
}

/* RFC 8200 8.1: addresses, length and protocol are covered too. */
static __always_inline __u32 icmp_seed(const struct packet *packet, __u32 length)
{
	const struct ends *ends = &packet->tuple.ends;

	if (!packet->is_ip6)
		return 0;
	return checksum_fold32(checksum_of_address(&ends->source) + checksum_of_address(&ends->destination) +
			       bpf_htonl(length) + bpf_htonl(IPPROTO_ICMPV6));
}

/* Back to where the packet came from, which has shown that it knows the way. Answers a verdict. */
static __always_inline int answer_return(hook_context *ctx, const struct packet *packet)
{
	struct route back = {.interface = packet->interface};

	if (!packet->l3)
		return route_send(ctx, packet->l3, &back) ? VERDICT_DROP : VERDICT_SEND;
	return hook_send_back(ctx) ? VERDICT_DROP : VERDICT_SEND;
}

static __always_inline int icmp_take_budget(__u64 now)
{
	__u32 zero = 0;
	struct answer_budget *budget = bpf_map_lookup_elem(&answer_budgets, &zero);

	if (!budget)
		return 0;
	if (now - budget->refilled_ns >= ANSWERS_INTERVAL_NS) {
		budget->refilled_ns = now;
		budget->left = ANSWERS_AT_ONCE;
	}
	if (!budget->left)
		return 0;
	budget->left--;
	return 1;
}

/* The same number again, for the verifier: those before 5.12 forget the bounds of what was put on the stack. */
static __always_inline __u64 quote_length(__u64 length)
{
	length -= 1;
	barrier_var(length);
	return (length & (QUOTE_MAX - 1)) + 1;
}

/* An answer to what was asked for, not to what is broken, a part or an error itself (RFC 1122 3.2.2). */
static __always_inline int icmp_is_due(hook_context *ctx, const struct packet *packet)
{
	return packet->kind != PACKET_PIECE && packet->kind != PACKET_ERROR &&
	       icmp_may_answer(&packet->tuple.ends.source) && packet->total <= hook_length(ctx) - packet->l3 &&
	       packet->total >= sizeof(struct iphdr) + ICMP_HEADER;
}

static __always_inline int icmp_store(hook_context *ctx, const struct packet *packet,
				      const struct icmp_message *message, __u64 quoted)
{
	__u64 header = packet->is_ip6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr);

	/* The longest transport header before a checksum, and a little more. */
	return hook_resize(ctx, packet->l3, header + ICMP_HEADER + quoted, packet->l4 - packet->l3 + 40) ||
	       (packet->is_ip6 ? answer_store_ip6(ctx, packet, IPPROTO_ICMPV6, ICMP_HEADER + quoted)
			       : answer_store_ip4(ctx, packet, IPPROTO_ICMP, ICMP_HEADER + quoted)) ||
	       hook_store(ctx, packet->l3 + header, message, ICMP_HEADER + quote_length(quoted));
}

/* Turns the packet into an error about itself, as `verdict` says. Answers VERDICT_SEND or VERDICT_DROP. */
__noinline int icmp_answer(hook_context *ctx, __u32 verdict)
{
	struct icmp_message message = {};
	struct scratch *given = scratch();
	const struct packet *packet;
	__u64 quoted;

	if (!given)
		return VERDICT_DROP;
	packet = &given->packet;
	if (!icmp_is_due(ctx, packet))
		return VERDICT_DROP;
	if (!icmp_take_budget(clock_now(given))) {
		count(COUNTER_DROPPED_ANSWER_LIMIT);
		return VERDICT_DROP;
	}
	quoted = packet->total < QUOTE_MAX ? packet->total : QUOTE_MAX;
	if (hook_load(ctx, packet->l3, message.quote, quote_length(quoted)))
		return VERDICT_DROP;
	icmp_fill(&message, packet->is_ip6, verdict, packet->mtu);
	/* What was not quoted is zero and adds nothing. */
	message.check = (__u16)~checksum_fold16((__u32)bpf_csum_diff((void *)0, 0, (void *)&message, sizeof(message),
								     icmp_seed(packet, ICMP_HEADER + quoted)));
	return icmp_store(ctx, packet, &message, quoted) ? VERDICT_DROP : answer_return(ctx, packet);
}

#endif
