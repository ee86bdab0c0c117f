// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* From what a packet is to say to its bytes. */
#include <string.h>
#include "build.h"

void put16(__u8 *at, __u32 value)
{
	at[0] = value >> 8;
	at[1] = value;
}

static void put32(__u8 *at, __u32 value)
{
	put16(at, value >> 16);
	put16(at + 2, value);
}

void put_link(struct frame *frame)
{
	if (!frame->l3)
		return;
	memcpy(frame->bytes, "\x02\0\0\0\0\x01\x02\0\0\0\0\x02", 12);
	put16(frame->bytes + 12, frame->protocol);
}

/* The transport's bytes; answers how many. */
static __u32 put_transport(__u8 *at, const struct content *content)
{
	const struct pair *pair = &content->pair;
	__u32 header = pair->protocol == PROTO_TCP ? 20 : pair->protocol == PROTO_SCTP ? 12 : 8;

	memset(at, 0, header);
	if (pair->protocol == PROTO_ICMP || pair->protocol == PROTO_ICMP6) {
		at[0] = content->error_type;
		at[1] = content->error_code;
		put32(at + 4, 1300);
	} else {
		memcpy(at, &pair->from.port, 2);
		memcpy(at + 2, &pair->to.port, 2);
	}
	if (pair->protocol == PROTO_TCP) {
		put32(at + 4, content->sequence);
		put32(at + 8, content->acknowledgement);
		at[12] = 0x50;
		at[13] = content->flags;
		put16(at + 14, 0xffff);
	} else if (pair->protocol == PROTO_UDP) {
		put16(at + 4, header + content->payload_length);
	}
	memcpy(at + header, content->payload, content->payload_length);
	return header + content->payload_length;
}

/* Options of RFC 791, as a list of them says; or any bytes. */
static void put_options(__u8 *at, __u32 length, const __u8 *list)
{
	static const __u8 kinds[8] = {1, 1, 0x83, 0x89, 0x07, 0x44, 0x94, 0};

	for (__u32 i = 0, used = 0; used < length; i++) {
		__u8 kind = list[7] & 1 ? list[i % 8] : kinds[list[i % 7] & 7];
		__u32 size = list[7] & 1 || kind <= 1 ? 1 : 4;

		if (used + size > length)
			size = 1;
		memset(at + used, 4, size);
		at[used] = kind;
		if (size > 1)
			at[used + 1] = size;
		used += size;
	}
}

static __u32 put_ip4(__u8 *at, const struct content *content, const __u8 *options)
{
	__u32 header = 20 + content->options * 4;
	__u32 fragment = content->dont_fragment ? 0x4000 : 0;

	memset(at, 0, header);
	at[0] = 0x40 | header / 4;
	put16(at + 4, content->id);
	if (content->piece == SHAPE_FIRST)
		fragment = 0x2000;
	else if (content->piece == SHAPE_PIECE)
		fragment = 5;
	put16(at + 6, fragment);
	at[8] = content->ttl;
	at[9] = content->pair.protocol;
	memcpy(at + 12, content->pair.from.address + 12, 4);
	memcpy(at + 16, content->pair.to.address + 12, 4);
	put_options(at + 20, header - 20, options);
	return header;
}

/* Extension headers: as many as there are options, and one of a fragment. */
static __u32 put_ip6(__u8 *at, const struct content *content, const __u8 *options)
{
	static const __u8 kinds[4] = {0, 60, 43, 60};
	__u8 *next = at + 6;
	__u32 header = 40;

	memset(at, 0, 40);
	at[0] = 0x60;
	at[7] = content->ttl;
	memcpy(at + 8, content->pair.from.address, 16);
	memcpy(at + 24, content->pair.to.address, 16);
	for (int i = 0; i < content->options; i++) {
		*next = kinds[i & 3];
		next = at + header;
		memset(next, 0, 8);
		next[1] = options[i & 7] == 0xff ? 1 : 0;
		memset(next + 8, 1, 8);
		header += (next[1] + 1) * 8;
	}
	if (content->piece == SHAPE_FIRST || content->piece == SHAPE_PIECE) {
		*next = 44;
		next = at + header;
		memset(next, 0, 8);
		put16(next + 2, content->piece == SHAPE_FIRST ? 1 : 40);
		put32(next + 4, content->id);
		header += 8;
	}
	*next = content->pair.protocol;
	return header;
}

static __u16 ends_sum(const struct pair *pair)
{
	return inet_fold((__u64)inet_sum(pair->from.address, 16) + inet_sum(pair->to.address, 16) + pair->from.port +
			 pair->to.port);
}

/* Makes the payload such that the packet's checksum is 0 once it has its new ends: in UDP that says "none". */
static void aim_at_zero(struct frame *frame, const struct content *content, const struct view *view)
{
	__u32 offset = check_offset(content->pair.protocol);
	__u8 *payload = frame->bytes + view->l4 + (content->pair.protocol == PROTO_TCP ? 20 : 8);
	__u16 check, word, wanted;

	if (!offset || content->payload_length < 2)
		return;
	wanted = inet_fold((__u64)(__u16)~ends_sum(&content->like->before.pair) + ends_sum(&content->like->after.pair));
	memcpy(&check, frame->bytes + view->l4 + offset, 2);
	memcpy(&word, payload, 2);
	word = inet_fold((__u64)word + (__u16)~wanted + check);
	memcpy(payload, &word, 2);
	inet_check(frame->bytes, view, frame->length, 0);
}

void build(struct frame *frame, const struct content *content, const struct recipe *recipe)
{
	__u8 *ip = frame->bytes + frame->l3;
	__u32 header = content->is_ip6 ? put_ip6(ip, content, recipe->options) : put_ip4(ip, content, recipe->options);
	__u32 total = header + put_transport(ip + header, content);
	__u32 offset = check_offset(content->pair.protocol);
	struct view view;

	/* Aggregates beyond 64 KiB have no length. */
	if (content->is_ip6)
		put16(ip + 4, frame->gso_size && (recipe->link & 2) ? 0 : total - 40);
	else
		put16(ip + 2, frame->gso_size && (recipe->link & 2) ? 0 : total);
	frame->length = frame->l3 + total;
	frame->protocol = content->is_ip6 ? 0x86dd : 0x0800;
	view = inet_read(frame->bytes, frame->length, frame->l3, content->is_ip6, 0);
	view.l4 = frame->l3 + header;
	inet_check(frame->bytes, &view, frame->length, frame->summed == SUM_PARTIAL && view.shape == SHAPE_WHOLE);
	if (content->like && frame->summed == SUM_NONE && (recipe->sums & 0x40) && view.shape == SHAPE_WHOLE)
		aim_at_zero(frame, content, &view);
	if (content->unchecked && content->pair.protocol == PROTO_UDP)
		memset(ip + header + offset, 0, 2);
	put_link(frame);
}
