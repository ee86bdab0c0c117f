// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Which bytes of a packet may become others, and what their sums must be. */
#include <string.h>
#include <linux/pkt_cls.h>
#include "../../bpf/abi.h"
#include "oracle.h"

enum {
	QUOTED_MOST = 128,
};

/* The bytes that may differ, in the order of the packet, from its IP header on. */
struct mask {
	__u8 may[FRAME_MAX];
};

static void allow(struct mask *mask, __u32 at, __u32 length)
{
	if (at + length <= FRAME_MAX)
		memset(mask->may + at, 1, length);
}

static void allow_addresses(struct mask *mask, const struct view *view, __u32 l3)
{
	if (view->is_ip6) {
		allow(mask, l3 + 8, 32);
		return;
	}
	allow(mask, l3 + 10, 10);
}

/* A frame that goes back to where it came from. */
static void check_stations(const struct step *step)
{
	const __u8 *in = step->in.bytes, *out = step->out.bytes;

	if (memcmp(out, in + 6, 6) || memcmp(out + 6, in, 6) || memcmp(out + 12, in + 12, 2))
		fail(step, "sent back to another station");
}

static void compare(const struct step *step, const struct mask *mask)
{
	const struct frame *in = &step->in, *out = &step->out;

	/* A device without link headers gets one before its packet is sent on. */
	if (in->length - in->l3 != out->length - out->l3)
		fail(step, "another length");
	if (is_sent_back(step))
		check_stations(step);
	else if (in->l3 == out->l3 && memcmp(in->bytes, out->bytes, in->l3))
		fail(step, "another link header");
	for (__u32 i = 0; i < in->length - in->l3; i++)
		if (!mask->may[i] && in->bytes[in->l3 + i] != out->bytes[out->l3 + i])
			fail(step, "a byte differs that must not");
}

static __u8 ttl_of(const struct frame *frame)
{
	return frame->bytes[frame->l3 + (frame->protocol == 0x86dd ? 7 : 8)];
}

/* Forwarded here: one hop less. A packet that leaves has been forwarded already. */
static int is_hop(const struct step *step)
{
	return step->effects.action == TC_ACT_REDIRECT && step->program < IN_POD;
}

static void check_ttl(const struct step *step)
{
	__u8 before = ttl_of(&step->in), after = ttl_of(&step->out);

	if (is_hop(step) && before <= 1)
		fail(step, "forwarded at the end of its hops");
	if (after != before - is_hop(step))
		fail(step, "a wrong number of hops");
}

/* Two sums are the same, 0 and 0xffff being one. */
static int sums_equal(__u64 a, __u64 b)
{
	return inet_fold(a) % 0xffff == inet_fold(b) % 0xffff;
}

static __u64 address_sum(const struct frame *frame)
{
	const __u8 *ip = frame->bytes + frame->l3;

	return frame->protocol == 0x86dd ? inet_sum(ip + 8, 32) : inet_sum(ip + 12, 8);
}

/* Addresses, ports and checksum together add up to what they did: so the checksum is off by as much as before. */
static void check_transport(const struct step *step)
{
	__u32 in_l4 = step->before.l4, out_l4 = step->after.l4, offset = check_offset(step->before.pair.protocol);
	__u16 before, after;
	__u64 in, out;

	if (!offset)
		return;
	memcpy(&before, step->in.bytes + in_l4 + offset, 2);
	memcpy(&after, step->out.bytes + out_l4 + offset, 2);
	if (step->before.pair.protocol == PROTO_UDP && !before != !after)
		fail(step, "a checksum that says none, or says it no longer");
	if (step->before.pair.protocol == PROTO_UDP && !before)
		return;
	in = address_sum(&step->in);
	out = address_sum(&step->out);
	if (step->effects.summed == SUM_PARTIAL) {
		/* The pseudo header's sum, which the device adds the rest to. */
		in += (__u16)~before;
		out += (__u16)~after;
	} else {
		in += (__u64)before + inet_sum(step->in.bytes + in_l4, 4);
		out += (__u64)after + inet_sum(step->out.bytes + out_l4, 4);
	}
	if (!sums_equal(in, out))
		fail(step, "a wrong transport checksum");
}

static void check_header(const struct step *step)
{
	if (inet_header_fault(step->in.bytes, &step->before) != inet_header_fault(step->out.bytes, &step->after))
		fail(step, "a wrong IPv4 header checksum");
}

void check_unchanged(const struct step *step)
{
	if (step->effects.action == TC_ACT_REDIRECT)
		fail(step, "sent on as it was");
}

void check_rewritten(const struct step *step)
{
	const struct view *view = &step->before;
	__u32 offset = check_offset(view->pair.protocol), l4 = view->l4 - view->l3;
	struct mask mask = {};

	if (view->shape == SHAPE_BROKEN || step->after.shape != view->shape)
		fail(step, "rewritten, and no packet of ours");
	if (step->in.pkt_type && step->program == IN_ETHERNET)
		fail(step, "rewritten, and for another host");
	if (step->in.vlan_present && (step->in.vlan & 0xfff))
		fail(step, "rewritten, and of a VLAN");
	allow_addresses(&mask, view, 0);
	if (is_hop(step))
		allow(&mask, view->is_ip6 ? 7 : 8, 1);
	if (view->shape != SHAPE_PIECE) {
		if (view->pair.protocol != PROTO_SCTP)
			allow(&mask, l4, 4);
		if (offset)
			allow(&mask, l4 + offset, 2);
	}
	compare(step, &mask);
	check_ttl(step);
	check_header(step);
	if (view->shape != SHAPE_PIECE)
		check_transport(step);
}

void check_error_rewritten(const struct step *step)
{
	const struct frame *in = &step->in, *out = &step->out;
	__u32 inside = step->before.l4 - step->before.l3 + 8;
	int is_ip6 = step->before.is_ip6;
	struct view before = inet_read(in->bytes, in->length, in->l3 + inside, is_ip6, 1);
	struct view after = inet_read(out->bytes, out->length, out->l3 + inside, is_ip6, 1);
	struct mask mask = {};

	if (before.shape != after.shape || (before.shape != SHAPE_WHOLE && before.shape != SHAPE_FIRST))
		fail(step, "an error about something else");
	allow_addresses(&mask, &step->before, 0);
	if (is_hop(step))
		allow(&mask, is_ip6 ? 7 : 8, 1);
	allow(&mask, inside - 6, 2);
	allow_addresses(&mask, &before, inside);
	allow(&mask, before.l4 - in->l3, 4);
	compare(step, &mask);
	check_ttl(step);
	check_header(step);
	if (inet_header_fault(in->bytes, &before) != inet_header_fault(out->bytes, &after))
		fail(step, "a wrong IPv4 header checksum in what is quoted");
	if (!sums_equal(inet_fault(in->bytes, &step->before, in->length),
			inet_fault(out->bytes, &step->after, out->length)))
		fail(step, "a wrong ICMP checksum");
}

static void check_answer_kind(const struct step *step, const __u8 *message)
{
	static const __u8 kinds[2][3][2] = {{{3, 3}, {11, 0}, {3, 4}}, {{1, 4}, {3, 0}, {2, 0}}};
	int which = counted(COUNTER_ICMP_TTL_EXCEEDED) ? 1 : counted(COUNTER_ICMP_TOO_BIG) ? 2 : 0;
	__u32 mtu = (__u32)message[4] << 24 | message[5] << 16 | message[6] << 8 | message[7];

	if (memcmp(message, kinds[step->before.is_ip6][which], 2))
		fail(step, "an answer of another kind than counted");
	if (which == 2 && mtu != 1500 && mtu != 1450 && mtu != 1400)
		fail(step, "an answer with an MTU that no device has");
	if (which != 2 && mtu)
		fail(step, "an answer with an MTU");
}

static void check_answer_way(const struct step *step)
{
	if (step->effects.redirect != step->in.interface)
		fail(step, "an answer by another way");
	if (step->in.l3)
		check_stations(step);
}

/* An ICMP error in the place of the packet. */
void check_answer(const struct step *step)
{
	const struct frame *in = &step->in, *out = &step->out;
	const struct view *view = &step->after;
	__u32 quoted = step->before.total, header = view->is_ip6 ? 40 : 20;

	/* Aggregates may be longer than their header can say. */
	if (in->gso_size && quoted < header + 8)
		quoted = in->length - in->l3;
	if (quoted > QUOTED_MOST)
		quoted = QUOTED_MOST;

	if (view->shape != SHAPE_ERROR || view->l4 != out->l3 + header)
		fail(step, "no answer");
	if (out->length != out->l3 + header + 8 + quoted || view->total != header + 8 + quoted)
		fail(step, "an answer of a wrong length");
	if (memcmp(view->pair.from.address, step->before.pair.to.address, 16) ||
	    memcmp(view->pair.to.address, step->before.pair.from.address, 16))
		fail(step, "an answer to somebody else");
	if (inet_header_fault(out->bytes, view) || inet_fault(out->bytes, view, out->length))
		fail(step, "an answer with a wrong checksum");
	if (memcmp(out->bytes + view->l4 + 8, in->bytes + in->l3, quoted))
		fail(step, "an answer about something else");
	if (step->effects.summed == SUM_PARTIAL)
		fail(step, "an answer whose checksum is left to the device");
	check_answer_kind(step, out->bytes + view->l4);
	check_answer_way(step);
}
