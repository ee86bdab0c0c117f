/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Internet checksums (RFC 1071), changed in place (RFC 1624). Sums are kept in the byte order of the packet, so that no
 * value needs to be swapped. What is known: the change of an IPv4 header's checksum and of a pseudo header's part is the
 * same number, as both cover the same addresses.
 */
#ifndef KUBELANE_CHECKSUM_H
#define KUBELANE_CHECKSUM_H

static __always_inline __u32 checksum_fold32(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	return (sum & 0xffffffff) + (sum >> 32);
}

static __always_inline __u16 checksum_fold16(__u64 sum)
{
	__u32 folded = checksum_fold32(sum);

	folded = (folded & 0xffff) + (folded >> 16);
	return (folded & 0xffff) + (folded >> 16);
}

static __always_inline __u64 checksum_of_address(const struct address *address)
{
	const struct address_words *words = address_words(address);

	return (__u64)words->word[0] + words->word[1] + words->word[2] + words->word[3];
}

static __always_inline __u64 checksum_without_address(const struct address *address)
{
	const struct address_words *words = address_words(address);

	return (__u64)(__u32)~words->word[0] + (__u32)~words->word[1] + (__u32)~words->word[2] + (__u32)~words->word[3];
}

/* By how much the sum of two addresses changes. The prefix of IPv4 ones is the same and adds nothing. */
static __always_inline __u32 checksum_change(const struct ends *old, const struct address *source,
					     const struct address *destination)
{
	return checksum_fold32(checksum_without_address(&old->source) + checksum_without_address(&old->destination) +
			       checksum_of_address(source) + checksum_of_address(destination));
}

/* The same for a packet whose family is known: the prefix of IPv4 addresses, which adds nothing, is not looked at. */
static __always_inline __u32 addresses_change(const struct ends *old, const struct ends *ends, int is_ip6)
{
	if (is_ip6)
		return checksum_change(old, &ends->source, &ends->destination);
	return checksum_fold32((__u64)(__u32)~address_words(&old->source)->word[3] +
			       (__u32)~address_words(&old->destination)->word[3] +
			       address_words(&ends->source)->word[3] + address_words(&ends->destination)->word[3]);
}

/* Both ports as they lie in a transport header. */
static __always_inline __be32 ports_word(__be16 source, __be16 destination)
{
	return bpf_htonl((__u32)bpf_ntohs(source) << 16 | bpf_ntohs(destination));
}

/* By how much a transport checksum changes that covers addresses, whose part is known, and ports. */
static __always_inline __u32 ports_change(__u32 addresses, const struct ends *old, const struct ends *ends)
{
	return checksum_fold32((__u64)addresses + (__u32)~ports_word(old->source_port, old->destination_port) +
			       ports_word(ends->source_port, ends->destination_port));
}

static __always_inline __u32 ends_change(const struct ends *old, const struct ends *ends)
{
	return ports_change(checksum_change(old, &ends->source, &ends->destination), old, ends);
}

/* A checksum after a change, as RFC 1624 has it: of one that is complete, and written complemented. */
static __always_inline __u16 checksum_changed(__u16 check, __u32 change)
{
	return (__u16)~checksum_fold16((__u64)(__u16)~check + change);
}

/*
 * TCP and UDP: `addresses` is the change of the pseudo header. A UDP checksum of 0, "none", stays; one that becomes 0
 * is written as 0xffff (RFC 768). The kernel's helper knows what offloading has left for the device to do. SCTP's
 * covers no addresses (RFC 9260), and its ports are never changed.
 */
static __always_inline int checksum_set_transport(hook_context *ctx, const struct packet *packet, __u32 addresses,
						  __be32 old_ports, __be32 new_ports)
{
	int is_udp = packet->tuple.protocol == IPPROTO_UDP;
	__u32 offset = packet->l4 + (is_udp ? 6 : 16);
	__u64 flags = is_udp ? BPF_F_MARK_MANGLED_0 : 0;

	if (packet->tuple.protocol == IPPROTO_SCTP)
		return 0;
	if (hook_checksum_change(ctx, offset, addresses, flags | BPF_F_PSEUDO_HDR))
		return -1;
	if (old_ports == new_ports)
		return 0;
	return hook_checksum_change(ctx, offset, checksum_fold32((__u64)(__u32)~old_ports + new_ports), flags) ? -1 : 0;
}

enum checksum_state {
	CHECKSUM_IS_WHOLE = 0,
	CHECKSUM_IS_NONE = 1, /* UDP without one */
	CHECKSUM_IS_UNKNOWN = 2, /* whole, or the pseudo header's sum, which the device adds the rest to */
};

enum {
	CHECKSUM_ZERO = 0xffff, /* RFC 768: 0 would say that there is none */
};

/*
 * The kernel does not tell programs (before 6.2) whether the sender left the checksum to the device (CHECKSUM_PARTIAL, as
 * between veths). But then it is the pseudo header's sum, and every other value is a whole one. The other way round one
 * packet in 65536 has a whole checksum that looks like that sum. Of an aggregate nothing is guessed: most leave it to the
 * device, those of NETIF_F_GRO_FRAGLIST carry whole ones.
 */
static __always_inline enum checksum_state checksum_state(const struct packet *packet)
{
	const struct ends *ends = &packet->tuple.ends;
	__u64 sum = bpf_htons(packet->tuple.protocol) + bpf_htonl(packet->total - (packet->l4 - packet->l3));

	if (!packet->check && packet->tuple.protocol == IPPROTO_UDP)
		return CHECKSUM_IS_NONE;
	if (packet->is_ip6)
		sum += checksum_of_address(&ends->source) + checksum_of_address(&ends->destination);
	else
		sum += (__u64)address_words(&ends->source)->word[3] + address_words(&ends->destination)->word[3];
	if (packet->is_aggregate || checksum_fold16(sum) == packet->check)
		return CHECKSUM_IS_UNKNOWN;
	return CHECKSUM_IS_WHOLE;
}

/* Reads it again, for scratch.check. */
static __always_inline int checksum_load(hook_context *ctx, struct scratch *given, int is_udp)
{
	__be32 word;

	/* Of UDP behind the length, of TCP before the urgent pointer. */
	if (packet_load(ctx, given->packet.l4 + (is_udp ? 4 : 16), &word, sizeof(word)))
		return -1;
	given->check = bpf_htons(bpf_ntohl(word) >> (is_udp ? 0 : 16));
	return 0;
}

/*
 * Changes a checksum of which only the kernel knows what it is. It is asked to change the part of the addresses, and what
 * it makes of that tells. The new one is left in scratch.check, to be written with the ports; in the packet's bytes, and
 * in the sum of a device that has summed them (CHECKSUM_COMPLETE), the addresses' part is done. Not 0: the kernel refused. Global, so
 * that it is verified once and not for each way that leads here.
 */
__noinline int checksum_settle(hook_context *ctx)
{
	struct scratch *given = scratch();
	const struct ends *old, *ends;
	const struct packet *packet;
	__u32 offset, addresses;
	__u64 flags;
	int is_udp;

	if (!given)
		return -1;
	packet = &given->packet;
	old = &packet->tuple.ends;
	ends = &given->flow.ends;
	addresses = given->addresses;
	is_udp = packet->tuple.protocol == IPPROTO_UDP;
	flags = is_udp ? BPF_F_MARK_MANGLED_0 : 0;
	offset = packet->l4 + (is_udp ? 6 : 16);
	if (hook_checksum_change(ctx, offset, addresses, flags | BPF_F_PSEUDO_HDR) || checksum_load(ctx, given, is_udp))
		return -1;
	if (checksum_fold16(addresses) % 0xffff) {
		/* A sum grows where a checksum, which is complemented, shrinks. */
		if (given->check == checksum_fold16((__u64)packet->check + addresses))
			return 0;
		given->check = checksum_changed(given->check, ports_change(0, old, ends));
		if (!given->check && is_udp)
			given->check = CHECKSUM_ZERO;
		return 0;
	}
	if (hook_checksum_change(ctx, offset, ports_change(0, old, ends), flags))
		return -1;
	return checksum_load(ctx, given, is_udp);
}

#endif
