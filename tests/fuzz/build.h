/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
#ifndef FUZZ_BUILD_H
#define FUZZ_BUILD_H

#include "packets.h"

/* A packet before it is bytes. */
struct content {
	int is_ip6;
	struct pair pair;
	__u8 flags, ttl, options; /* how many words of options (IPv4), or extension headers */
	__u32 sequence, acknowledgement;
	__u8 error_type, error_code;
	const __u8 *payload;
	__u32 payload_length;
	int piece; /* enum shape */
	int dont_fragment, unchecked;
	const struct step *like; /* the packet has the same ends as that one had, or is NULL */
	__u16 id;
};

/* In network order. */
void put16(__u8 *at, __u32 value);
/* The link header of a frame for an outward device, if it has one. */
void put_link(struct frame *frame);
/* Writes the packet, with right checksums; of the recipe: its options, and what is odd about its sums. */
void build(struct frame *frame, const struct content *content, const struct recipe *recipe);

#endif
