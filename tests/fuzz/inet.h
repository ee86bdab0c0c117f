/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Reading and writing packets by the RFCs, without a line of the code under test. Sums are in the order of the bytes in
 * memory (RFC 1071 2b).
 */
#ifndef FUZZ_INET_H
#define FUZZ_INET_H

#include <linux/types.h>

enum {
	PROTO_ICMP = 1,
	PROTO_TCP = 6,
	PROTO_UDP = 17,
	PROTO_ICMP6 = 58,
	PROTO_SCTP = 132,
	FLAG_FIN = 1,
	FLAG_SYN = 2,
	FLAG_RST = 4,
	FLAG_ACK = 16,
};

/* An end: an address (IPv4 as ::ffff:a.b.c.d) and a port. */
struct end {
	__u8 address[16];
	__be16 port;
};

struct pair {
	struct end from, to;
	__u8 protocol;
};

enum shape {
	SHAPE_BROKEN, /* not what its header says, or nothing that has ends */
	SHAPE_WHOLE, /* TCP, UDP, SCTP with its ports and checksum */
	SHAPE_FIRST, /* the same, the first piece */
	SHAPE_PIECE, /* a later piece: no ports */
	SHAPE_ERROR, /* ICMP error */
};

struct view {
	enum shape shape;
	int is_ip6;
	__u32 l3, l4;
	__u32 total; /* as the IP header says */
	struct pair pair;
	__u32 id; /* of a fragment */
	__u8 ttl, flags;
	__u32 sequence, acknowledgement;
	int dont_fragment;
	int has_options; /* IPv4 */
	int extensions; /* headers of IPv6 */
};

__u16 inet_fold(__u64 sum);
__u16 inet_sum(const void *bytes, __u32 length);
/* The same of bytes that begin at an odd offset of what is summed. */
__u16 inet_sum_at(const void *bytes, __u32 length, int odd);

/* `quoted`: in an ICMP error, where the ports are enough. */
struct view inet_read(const __u8 *bytes, __u32 length, __u32 l3, int is_ip6, int quoted);

int end_equal(const struct end *a, const struct end *b);
int pair_equal(const struct pair *a, const struct pair *b);
struct pair pair_reversed(const struct pair *pair);
int address_is_v4(const __u8 address[16]);
/* Where the checksum of TCP, UDP or an ICMP message is, from the transport header on; 0: none (SCTP). */
__u32 check_offset(__u8 protocol);
/* Makes the checksums of a whole packet right. `partial`: only the pseudo header's, as a sender that leaves it to the device. */
void inet_check(__u8 *bytes, const struct view *view, __u32 length, int partial);
/* By how much a whole packet's IPv4 header and transport are off: 0 if right. `length`: of what is summed. */
__u16 inet_header_fault(const __u8 *bytes, const struct view *view);
__u16 inet_fault(const __u8 *bytes, const struct view *view, __u32 length);

#endif
