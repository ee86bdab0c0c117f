/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Health probes of load balancers, answered in the place of the daemon's sockets, which go with its process: programs and
 * maps stay. The daemon writes each answer before anybody asks, and vouches for all of them twice a second. Answers that
 * nobody vouches for are not given: the packets go to the host's stack, as all others do.
 *
 * A connection leaves no trace here. Its client sends everything again that gets no answer, and each segment says where the
 * connection stands, because the sequence number of the first SYN-ACK is a cookie:
 *
 *   base + 512 * fingerprint      base: a keyed hash of the ends and of the minute (SipHash-1-3)
 *                                 fingerprint: seven bits of the client's first sequence number
 *
 * An acknowledgement is that plus what the client has received, at most 509 bytes, as an answer is one segment with a FIN. So
 *
 *   SYN                           SYN-ACK, not longer than the SYN
 *   the first data                the answer and a FIN
 *   a FIN without data before     FIN-ACK: a client that only wanted to be connected
 *   a FIN or data after           ACK
 *   data after the first, and     dropped: to acknowledge it would acknowledge the first, too, whose answer may be lost.
 *   nothing received              The client sends all of it again
 *   an ACK, and no more           dropped, as a server takes it: no drop is counted
 *   no cookie                     the stack's: a connection of the daemon's listener, of before the rows were vouched for
 *
 * A forged address gets a SYN-ACK, as from every server, and no answer: its owner alone sees the cookie.
 *
 * Cost: nothing for other ports. A row for all addresses is found by the third look-up.
 */
#ifndef KUBELANE_PROBE_H
#define KUBELANE_PROBE_H

enum {
	COOKIE_STEP = 512,
	COOKIE_PRINTS = 128, /* as many fingerprints, whose bits are the topmost */
	COOKIE_PRINT_SHIFT = 25,
	COOKIE_PERIOD_SHIFT = 36, /* 69 s in nanoseconds; cookies are good for one to two of them */
	PROBE_WINDOW = 65535,
	TCP_HEADER = 20,
	TCP_MSS_OPTION = 4,
	REQUEST_SHORTEST = 16, /* no request has fewer bytes */
};

/* What a segment's acknowledgement says. */
struct probe_stage {
	__u32 is_known; /* it has a cookie */
	__u32 is_first; /* it begins what the client sends */
	__u32 received; /* bytes of the answer, and its FIN */
};

struct sip {
	__u64 v0, v1, v2, v3;
};

static __always_inline __u64 sip_rotate(__u64 word, const int bits)
{
	return word << bits | word >> (64 - bits);
}

static __always_inline void sip_round(struct sip *sip)
{
	sip->v0 += sip->v1;
	sip->v1 = sip_rotate(sip->v1, 13) ^ sip->v0;
	sip->v0 = sip_rotate(sip->v0, 32);
	sip->v2 += sip->v3;
	sip->v3 = sip_rotate(sip->v3, 16) ^ sip->v2;
	sip->v0 += sip->v3;
	sip->v3 = sip_rotate(sip->v3, 21) ^ sip->v0;
	sip->v2 += sip->v1;
	sip->v1 = sip_rotate(sip->v1, 17) ^ sip->v2;
	sip->v2 = sip_rotate(sip->v2, 32);
}

static __always_inline void sip_add(struct sip *sip, __u64 word)
{
	sip->v3 ^= word;
	sip_round(sip);
	sip->v0 ^= word;
}

static __always_inline __u64 sip_word(const struct address *address, const int half)
{
	return (__u64)address_words(address)->word[2 * half] << 32 | address_words(address)->word[2 * half + 1];
}

/* The lower half is the base of a cookie, the upper half keys the fingerprint. */
static __noinline __u64 probe_hash(const struct packet *packet, const struct probe_state *state, __u32 period)
{
	const struct ends *ends = &packet->tuple.ends;
	__u64 k0 = state->secret[0], k1 = state->secret[1];
	struct sip sip = {
		.v0 = k0 ^ 0x736f6d6570736575ULL,
		.v1 = k1 ^ 0x646f72616e646f6dULL,
		.v2 = k0 ^ 0x6c7967656e657261ULL,
		.v3 = k1 ^ 0x7465646279746573ULL,
	};

	sip_add(&sip, sip_word(&ends->source, 0));
	sip_add(&sip, sip_word(&ends->source, 1));
	sip_add(&sip, sip_word(&ends->destination, 0));
	sip_add(&sip, sip_word(&ends->destination, 1));
	sip_add(&sip, (__u64)ports_word(ends->source_port, ends->destination_port) << 32 | period);
	/* 40 bytes, in the topmost of the last word. */
	sip_add(&sip, (__u64)40 << 56);
	sip.v2 ^= 0xff;
	sip_round(&sip);
	sip_round(&sip);
	sip_round(&sip);
	return sip.v0 ^ sip.v1 ^ sip.v2 ^ sip.v3;
}

static __always_inline __u32 probe_print(__u64 hash, __u32 first)
{
	return ((first ^ (__u32)(hash >> 32)) * 0x9e3779b1) >> COOKIE_PRINT_SHIFT;
}

static __always_inline __u32 probe_cookie(__u64 hash, __u32 first)
{
	return (__u32)hash + probe_print(hash, first) * COOKIE_STEP;
}

/* Of a segment with an acknowledgement; `now`: the period. */
static __always_inline void probe_stage(const struct packet *packet, const struct probe_state *state, __u32 now,
					struct probe_stage *stage)
{
	for (__u32 age = 0; age < 2; age++) {
		__u64 hash = probe_hash(packet, state, now - age);
		__u32 offset = packet->acknowledgement - 1 - (__u32)hash;

		if (offset >= COOKIE_PRINTS * COOKIE_STEP)
			continue;
		stage->is_known = 1;
		stage->received = offset % COOKIE_STEP;
		stage->is_first = !stage->received && offset / COOKIE_STEP == probe_print(hash, packet->sequence - 1);
		return;
	}
}

/* The answer at this very address, else at all of the node's. */
static __always_inline struct probe *probe_find(const struct packet *packet, __u16 path)
{
	struct probe_key key = {
		.address = packet->tuple.ends.destination,
		.port = packet->tuple.ends.destination_port,
		.path = path,
	};
	struct probe *row = map_find(&probes, &key);

	if (row)
		return row;
	address_words(&key.address)->word[3] = 0;
	if (!packet->is_ip6)
		return map_find(&probes, &key);
	address_words(&key.address)->word[0] = 0;
	address_words(&key.address)->word[1] = 0;
	address_words(&key.address)->word[2] = 0;
	return map_find(&probes, &key);
}

static __always_inline int probe_ends_path(__u32 byte)
{
	return byte == ' ' || byte == '?';
}

/* Which of the paths `words` begin with, in host order: /healthz, /livez, /readyz. */
static __always_inline __u16 probe_path(const __u32 *words)
{
	if (words[0] == 0x2f686561 && words[1] == 0x6c74687a && probe_ends_path(words[2] >> 24))
		return PROBE_HEALTHZ;
	if (words[0] == 0x2f6c6976 && words[1] >> 16 == 0x657a && probe_ends_path(words[1] >> 8 & 0xff))
		return PROBE_LIVEZ;
	if (words[0] == 0x2f726561 && words[1] >> 8 == 0x64797a && probe_ends_path(words[1] & 0xff))
		return PROBE_READYZ;
	return PROBE_ANY;
}

enum {
	PROBE_IS_HEAD = 256, /* with a path: only the head of the answer is asked for */
};

/* What a request of `length` bytes asks for, by its beginning: enum probe_path, and PROBE_IS_HEAD. */
static __noinline __u32 probe_request(hook_context *ctx, const struct packet *packet, __u32 length)
{
	__u32 words[4] = {}, path[3];

	if (length < REQUEST_SHORTEST || hook_load(ctx, packet->l3 + packet->total - length, words, sizeof(words)))
		return PROBE_ANY;
	for (int i = 0; i < 4; i++)
		words[i] = bpf_ntohl(words[i]);
	/* "GET " */
	if (words[0] == 0x47455420)
		return probe_path(&words[1]);
	/* "HEAD " */
	if (words[0] != 0x48454144 || words[1] >> 24 != ' ')
		return PROBE_METHOD;
	for (int i = 0; i < 2; i++)
		path[i] = words[i + 1] << 8 | words[i + 2] >> 24;
	path[2] = words[3] << 8;
	return PROBE_IS_HEAD | probe_path(path);
}

/* The same number again, for the verifier: see quote_length(). */
static __always_inline __u64 probe_length(__u64 length)
{
	length -= 1;
	barrier_var(length);
	return (length & (PROBE_BYTES - 1)) + 1;
}

/* Writes the segment `reply` in the place of the packet, with an answer from `row` if there is one, and sends it back. */
static __always_inline int probe_write(hook_context *ctx, const struct packet *packet, const struct probe *row,
				       const struct probe_reply *reply)
{
	const struct ends *ends = &packet->tuple.ends;
	__u32 ip = packet->l4 - packet->l3, header = TCP_HEADER + (reply->mss ? TCP_MSS_OPTION : 0), bytes = 0;
	__be32 words[6] = {
		ports_word(ends->destination_port, ends->source_port),
		bpf_htonl(reply->sequence),
		bpf_htonl(reply->acknowledgement),
		bpf_htonl(header / 4 << 28 | reply->flags << 16 | PROBE_WINDOW),
		0,
		reply->mss ? bpf_htonl(2 << 24 | TCP_MSS_OPTION << 16 | reply->mss) : 0,
	};
	__u64 sum = 0;

	if (row) {
		bytes = reply->asked & PROBE_IS_HEAD ? row->head_length : row->length;
		sum = reply->asked & PROBE_IS_HEAD ? row->head_sum : row->sum;
		if (!bytes || bytes > PROBE_LONGEST)
			return -1;
	}
	for (int i = 0; i < 6; i++)
		sum += words[i];
	sum += checksum_of_address(&ends->source) + checksum_of_address(&ends->destination) +
	       bpf_htonl(header + bytes) + bpf_htonl(IPPROTO_TCP);
	words[4] = bpf_htonl((__u32)bpf_ntohs((__u16)~checksum_fold16(sum)) << 16);
	if (hook_resize(ctx, packet->l3, ip + header + bytes, ip + 40) ||
	    (packet->is_ip6 ? answer_store_ip6(ctx, packet, IPPROTO_TCP, header + bytes)
			    : answer_store_ip4(ctx, packet, IPPROTO_TCP, header + bytes)) ||
	    hook_store(ctx, packet->l4, words, TCP_HEADER) ||
	    (reply->mss && hook_store(ctx, packet->l4 + TCP_HEADER, &words[5], TCP_MSS_OPTION)))
		return -1;
	if (!row)
		return 0;
	return hook_store(ctx, packet->l4 + TCP_HEADER, row->bytes, probe_length(bytes)) ||
	       row->port != ends->destination_port || row->path != reply->asked % PROBE_IS_HEAD;
}

/* Sends scratch.probe. Answers a verdict. Global, so that it is verified once, and not for each way that leads here. */
__noinline int probe_send(hook_context *ctx)
{
	struct scratch *given = scratch();
	struct probe *row = (void *)0;
	const struct packet *packet;

	if (!given || !ctx)
		return VERDICT_DROP;
	packet = &given->packet;
	if (given->probe.flags & TCP_PSH) {
		row = probe_find(packet, given->probe.asked % PROBE_IS_HEAD);
		if (!row)
			return VERDICT_DROP;
	}
	return probe_write(ctx, packet, row, &given->probe) ? VERDICT_DROP : answer_return(ctx, packet);
}

/* A whole TCP segment, without IP options, from somebody else to an address of this node. */
static __always_inline int probe_may_be(hook_context *ctx, const struct packet *packet)
{
	const __u32 own = ADDRESS_NODE | ADDRESS_LOCAL;

	return packet->kind == PACKET_WHOLE && packet->tuple.protocol == IPPROTO_TCP &&
	       packet->l4 - packet->l3 == (packet->is_ip6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr)) &&
	       packet->total <= hook_length(ctx) - packet->l3 &&
	       (address_roles(&packet->tuple.ends.destination) & own) &&
	       !address_is_martian(&packet->tuple.ends.source) && !(address_roles(&packet->tuple.ends.source) & own);
}

static __always_inline void probe_greet(struct scratch *given, const struct probe_state *state, __u32 period)
{
	const struct packet *packet = &given->packet;
	struct probe_reply *reply = &given->probe;

	reply->sequence = probe_cookie(probe_hash(packet, state, period), packet->sequence);
	reply->acknowledgement = packet->sequence + 1;
	reply->flags = TCP_SYN | TCP_ACK;
	reply->mss = packet->is_ip6 ? 1440 : 1460;
	/* A SYN without options gets an answer without them, which is no longer. */
	if (bpf_ntohl(packet->transport[3]) >> 28 == TCP_HEADER / 4)
		reply->mss = 0;
}

/* Data, a FIN or both. 0: there is nothing to say. */
static __always_inline int probe_serve(hook_context *ctx, struct scratch *given, const struct probe *row, __u32 length,
				       const struct probe_stage *stage)
{
	const struct packet *packet = &given->packet;
	struct probe_reply *reply = &given->probe;

	reply->sequence = packet->acknowledgement;
	reply->acknowledgement = packet->sequence + length + (packet->tcp_flags & TCP_FIN);
	reply->flags = TCP_ACK;
	reply->mss = 0;
	if (stage->received)
		return 1;
	reply->flags = TCP_ACK | TCP_FIN;
	if (length) {
		reply->flags = TCP_ACK | TCP_FIN | TCP_PSH;
		reply->asked = probe_request(ctx, packet, length);
		if (!row->has_paths)
			reply->asked = reply->asked & PROBE_IS_HEAD;
		if (stage->is_first)
			count_often(COUNTER_PROBE_ANSWERED);
	}
	return stage->is_first;
}

/* A packet from the wire that no Service and no flow has. Answers a verdict. Global, so that it is verified by itself. */
__noinline int probe_answer(hook_context *ctx)
{
	struct scratch *given = scratch();
	struct probe_stage stage = {};
	const struct probe_state *state;
	const struct packet *packet;
	__u32 zero = 0, header, length;
	const struct probe *row;
	int verdict;
	__u64 alive, now;

	if (!given || !ctx)
		return VERDICT_DROP;
	packet = &given->packet;
	if (!probe_may_be(ctx, packet))
		return VERDICT_PASS;
	row = probe_find(packet, PROBE_ANY);
	state = bpf_map_lookup_elem(&probe_state, &zero);
	if (!row || !state)
		return VERDICT_PASS;
	/* In this order, so that it is not later than now. */
	alive = state->alive_ns;
	now = bpf_ktime_get_ns();
	if (now - alive >= (__u64)PROBE_FRESH_MS * 1000000)
		return VERDICT_PASS;
	header = packet->l4 - packet->l3 + (bpf_ntohl(packet->transport[3]) >> 28) * 4;
	if (header < packet->l4 - packet->l3 + TCP_HEADER || packet->total < header)
		return VERDICT_PASS;
	length = packet->total - header;
	if ((packet->tcp_flags & (TCP_SYN | TCP_ACK | TCP_RST | TCP_FIN)) == TCP_SYN) {
		probe_greet(given, state, now >> COOKIE_PERIOD_SHIFT);
	} else {
		if ((packet->tcp_flags & (TCP_SYN | TCP_ACK | TCP_RST)) != TCP_ACK)
			return VERDICT_PASS;
		probe_stage(packet, state, now >> COOKIE_PERIOD_SHIFT, &stage);
		if (!stage.is_known)
			return VERDICT_PASS;
		if (!length && !(packet->tcp_flags & TCP_FIN))
			return VERDICT_DROP;
		if (!probe_serve(ctx, given, row, length, &stage))
			return VERDICT_DROP;
	}
	verdict = probe_send(ctx);
	if (verdict == VERDICT_DROP)
		count(COUNTER_DROPPED_REWRITE);
	return verdict;
}

#endif
