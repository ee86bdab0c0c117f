/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* 128-bit addresses in network order; IPv4 is ::ffff:a.b.c.d (RFC 4291 section 2.5.5.2). */
#ifndef KUBELANE_ADDRESS_H
#define KUBELANE_ADDRESS_H

/* AF_INET and AF_INET6. */
enum {
	FAMILY_INET = 2,
	FAMILY_INET6 = 10,
};

/* Written as words: the rows that hold addresses are aligned to four bytes. */
struct address_words {
	__be32 word[4];
};

static __always_inline struct address_words *address_words(const struct address *address)
{
	return (struct address_words *)address;
}

static __always_inline void address_set_ip4(struct address *address, __be32 ip4)
{
	struct address_words *words = address_words(address);

	words->word[0] = 0;
	words->word[1] = 0;
	words->word[2] = bpf_htonl(0xffff);
	words->word[3] = ip4;
}

static __always_inline int address_is_ip4(const struct address *address)
{
	const struct address_words *words = address_words(address);

	return !(words->word[0] | words->word[1] | (words->word[2] ^ bpf_htonl(0xffff)));
}

/* 0 when they are equal. Without branches, for the processor's sake and for the verifier's, which follows each. */
static __always_inline __u32 address_difference(const struct address *a, const struct address *b)
{
	const struct address_words *x = address_words(a), *y = address_words(b);

	return (x->word[0] ^ y->word[0]) | (x->word[1] ^ y->word[1]) | (x->word[2] ^ y->word[2]) |
	       (x->word[3] ^ y->word[3]);
}

static __always_inline int address_equal(const struct address *a, const struct address *b)
{
	return !address_difference(a, b);
}

/*
 * Index into wire_filter.addresses: the upper half of a sum of products, so that addresses in a row lie apart.
 * src/abi.rs computes the same. (The mask is for verifiers before 5.11.)
 */
static __always_inline __u32 address_index(const struct address *address)
{
	const struct address_words *words = address_words(address);
	__u32 sum = words->word[0] * 0x85ebca6b + words->word[1] * 0xc2b2ae35 + words->word[2] * 0x27d4eb2f +
		    words->word[3] * 0x9e3779b1;
	__u32 index = sum >> 16;

	barrier_var(index);
	return index & (WIRE_FILTER_SIZE - 1);
}

/* Index into port_table.replies: of a backend's answers to a client, by the ends of their addresses and its port. (The
 * mask is for verifiers before 5.11.) */
static __always_inline __u32 reply_index(__be32 backend, __be32 client, __be16 port)
{
	__u32 index = (backend * 0x85ebca6b + client * 0x9e3779b1 + port * 0xc2b2ae35) >> 14;

	barrier_var(index);
	return index & (REPLY_FILTER_SIZE - 1);
}

/* 127.0.0.0/8, ::1, and the two wildcards, which connect() takes for "this host" as well. */
static __always_inline int address_is_loopback(const struct address *address)
{
	const struct address_words *words = address_words(address);

	if (address_is_ip4(address))
		return !words->word[3] || (words->word[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
	return !words->word[0] && !words->word[1] && !words->word[2] &&
	       (!words->word[3] || words->word[3] == bpf_htonl(1));
}

/* An address that no single host can have as its source on the wire (RFC 1812 5.3.7, RFC 4291): unspecified, loopback,
 * multicast, reserved; link-local ones of IPv6, which are never forwarded. */
static __always_inline int address_is_martian(const struct address *address)
{
	__u32 first = bpf_ntohl(address_words(address)->word[0]);

	if (address_is_loopback(address))
		return 1;
	if (!address_is_ip4(address))
		return first >> 24 == 0xff || first >> 22 == 0xfe80 >> 6;
	first = bpf_ntohl(address_words(address)->word[3]);
	return first >> 24 == 0 || first >= 0xe0000000;
}

static __always_inline __u32 address_roles(const struct address *address)
{
	__u32 *roles = map_find(&addresses, address);

	return roles ? *roles : 0;
}

#endif
