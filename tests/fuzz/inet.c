// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
#include <string.h>
#include "inet.h"

__u16 inet_fold(__u64 sum)
{
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return sum;
}

__u16 inet_sum_at(const void *bytes, __u32 length, int odd)
{
	const __u8 *at = bytes;
	__u64 sum = 0;

	for (__u32 i = 0; i < length; i++)
		sum += (__u32)at[i] << ((i + odd) & 1 ? 8 : 0);
	return inet_fold(sum);
}

__u16 inet_sum(const void *bytes, __u32 length)
{
	return inet_sum_at(bytes, length, 0);
}

static __u16 get16(const __u8 *at)
{
	return at[0] << 8 | at[1];
}

static __u32 get32(const __u8 *at)
{
	return (__u32)get16(at) << 16 | get16(at + 2);
}

static void set_ip4(__u8 to[16], const __u8 *from)
{
	memset(to, 0, 10);
	memset(to + 10, 0xff, 2);
	memcpy(to + 12, from, 4);
}

static int has_ports(__u8 protocol)
{
	return protocol == PROTO_TCP || protocol == PROTO_UDP || protocol == PROTO_SCTP;
}

static int is_error(int is_ip6, __u8 type)
{
	return is_ip6 ? type >= 1 && type <= 4 : type == 3 || type == 11 || type == 12;
}

/* RFC 8200 4: extension headers, in any order and number. */
static int skip_extensions(const __u8 *bytes, __u32 length, struct view *view, __u8 next)
{
	__u32 at = view->l3 + 40;

	while (next == 0 || next == 43 || next == 44 || next == 60) {
		__u32 before = at;

		view->extensions++;
		if (at + 8 > length)
			return 0;
		if (next == 44) {
			memcpy(&view->id, bytes + at + 4, 4);
			if (get16(bytes + at + 2) & 0xfff8)
				view->shape = SHAPE_PIECE;
			else if (get16(bytes + at + 2) & 1)
				view->shape = SHAPE_FIRST;
			if (view->shape == SHAPE_PIECE) {
				view->pair.protocol = bytes[at];
				view->l4 = at + 8;
				return 1;
			}
		}
		at += next == 44 ? 8 : (bytes[at + 1] + 1) * 8;
		next = bytes[before];
	}
	view->pair.protocol = next;
	view->l4 = at;
	return 1;
}

static int read_ip4(const __u8 *bytes, __u32 length, struct view *view)
{
	const __u8 *ip = bytes + view->l3;
	__u16 fragment;

	if (view->l3 + 20 > length || ip[0] >> 4 != 4 || (ip[0] & 15) < 5)
		return 0;
	fragment = get16(ip + 6);
	view->l4 = view->l3 + (ip[0] & 15) * 4;
	view->has_options = (ip[0] & 15) > 5;
	view->total = get16(ip + 2);
	view->ttl = ip[8];
	view->dont_fragment = !!(fragment & 0x4000);
	view->id = ip[4] | ip[5] << 8;
	view->pair.protocol = ip[9];
	set_ip4(view->pair.from.address, ip + 12);
	set_ip4(view->pair.to.address, ip + 16);
	if (fragment & 0x1fff)
		view->shape = SHAPE_PIECE;
	else if (fragment & 0x2000)
		view->shape = SHAPE_FIRST;
	return 1;
}

static int read_ip6(const __u8 *bytes, __u32 length, struct view *view)
{
	const __u8 *ip = bytes + view->l3;

	if (view->l3 + 40 > length || ip[0] >> 4 != 6)
		return 0;
	view->total = 40 + get16(ip + 4);
	view->ttl = ip[7];
	view->dont_fragment = 1;
	memcpy(view->pair.from.address, ip + 8, 16);
	memcpy(view->pair.to.address, ip + 24, 16);
	return skip_extensions(bytes, length, view, ip[6]);
}

static void read_transport(const __u8 *bytes, __u32 length, struct view *view, int quoted)
{
	const __u8 *l4 = bytes + view->l4;
	__u32 least = view->pair.protocol == PROTO_TCP && !quoted ? 20 : 8;

	if (view->l4 + least > length) {
		view->shape = SHAPE_BROKEN;
		return;
	}
	memcpy(&view->pair.from.port, l4, 2);
	memcpy(&view->pair.to.port, l4 + 2, 2);
	if (view->pair.protocol != PROTO_TCP || quoted)
		return;
	view->sequence = get32(l4 + 4);
	view->acknowledgement = get32(l4 + 8);
	view->flags = l4[13];
}

struct view inet_read(const __u8 *bytes, __u32 length, __u32 l3, int is_ip6, int quoted)
{
	struct view view = {.shape = SHAPE_WHOLE, .is_ip6 = is_ip6, .l3 = l3};

	if (!(is_ip6 ? read_ip6(bytes, length, &view) : read_ip4(bytes, length, &view))) {
		view.shape = SHAPE_BROKEN;
	} else if (has_ports(view.pair.protocol)) {
		if (view.shape != SHAPE_PIECE)
			read_transport(bytes, length, &view, quoted);
	} else if (view.pair.protocol == (is_ip6 ? PROTO_ICMP6 : PROTO_ICMP) && view.shape == SHAPE_WHOLE &&
		   view.l4 + 8 <= length && is_error(is_ip6, bytes[view.l4])) {
		view.shape = SHAPE_ERROR;
	} else {
		view.shape = SHAPE_BROKEN;
	}
	return view;
}

int end_equal(const struct end *a, const struct end *b)
{
	return !memcmp(a->address, b->address, 16) && a->port == b->port;
}

int pair_equal(const struct pair *a, const struct pair *b)
{
	return a->protocol == b->protocol && end_equal(&a->from, &b->from) && end_equal(&a->to, &b->to);
}

struct pair pair_reversed(const struct pair *pair)
{
	return (struct pair){.from = pair->to, .to = pair->from, .protocol = pair->protocol};
}

int address_is_v4(const __u8 address[16])
{
	static const __u8 prefix[12] = {[10] = 0xff, [11] = 0xff};

	return !memcmp(address, prefix, 12);
}

__u32 check_offset(__u8 protocol)
{
	switch (protocol) {
	case PROTO_TCP:
		return 16;
	case PROTO_UDP:
		return 6;
	case PROTO_ICMP:
	case PROTO_ICMP6:
		return 2;
	default:
		return 0;
	}
}

/* Addresses, protocol and length, where the protocol's checksum covers them. */
static __u64 pseudo_sum(const __u8 *bytes, const struct view *view, __u32 length)
{
	const __u8 *ip = bytes + view->l3;
	__u32 of_transport = __builtin_bswap32(length - view->l4);
	__u64 sum = (__u64)view->pair.protocol << 8;

	if (view->pair.protocol == PROTO_ICMP)
		return 0;
	sum += view->is_ip6 ? inet_sum(ip + 8, 32) : inet_sum(ip + 12, 8);
	return sum + (of_transport & 0xffff) + (of_transport >> 16);
}

void inet_check(__u8 *bytes, const struct view *view, __u32 length, int partial)
{
	__u32 offset = check_offset(view->pair.protocol);
	__u8 *ip = bytes + view->l3, *at = bytes + view->l4 + offset;
	__u16 check = 0;

	if (!view->is_ip6) {
		memset(ip + 10, 0, 2);
		check = ~inet_sum(ip, view->l4 - view->l3);
		memcpy(ip + 10, &check, 2);
	}
	if (!offset || view->l4 + offset + 2 > length)
		return;
	memset(at, 0, 2);
	check = inet_fold(pseudo_sum(bytes, view, length));
	if (!partial)
		check = ~inet_fold((__u64)check + inet_sum(bytes + view->l4, length - view->l4));
	if (!check && view->pair.protocol == PROTO_UDP)
		check = 0xffff;
	memcpy(at, &check, 2);
}

static __u16 fault_of(__u16 sum)
{
	return sum == 0xffff ? 0 : sum;
}

__u16 inet_header_fault(const __u8 *bytes, const struct view *view)
{
	return view->is_ip6 ? 0 : fault_of(inet_sum(bytes + view->l3, view->l4 - view->l3));
}

__u16 inet_fault(const __u8 *bytes, const struct view *view, __u32 length)
{
	return fault_of(inet_fold(pseudo_sum(bytes, view, length) + inet_sum(bytes + view->l4, length - view->l4)));
}
