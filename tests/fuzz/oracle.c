// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <linux/pkt_cls.h>
#include "../../bpf/abi.h"
#include "oracle.h"

static __u64 counters_before[COUNTER_MAX];
/* The most that a pod's device may have asked for in this second, or in the one before: the programs' clock is of ticks. */
static struct {
	__u64 second, asked;
} quotas[VETH + 1];

static void print_frame(const char *name, const struct frame *frame)
{
	fprintf(stderr,
		"%s (%u bytes, l3 at %u, interface %u from %u, type %u, vlan %u, gso %u, mark %u, summed %u): ", name,
		frame->length, frame->l3, frame->interface, frame->from, frame->pkt_type, frame->vlan_present,
		frame->gso_size, frame->mark, frame->summed);
	for (__u32 i = 0; i < frame->length; i++)
		fprintf(stderr, "%02x", frame->bytes[i]);
	fputc('\n', stderr);
}

static void print_view(const struct view *view)
{
	const struct end *ends[2] = {&view->pair.from, &view->pair.to};
	char text[INET6_ADDRSTRLEN];

	for (int i = 0; i < 2; i++) {
		inet_ntop(AF_INET6, ends[i]->address, text, sizeof(text));
		fprintf(stderr, " [%s]:%u", text, ntohs(ends[i]->port));
	}
}

/* What led there. */
static void print_steps(void)
{
	for (int i = 0; i < step_count; i++) {
		const struct step *step = &steps[i];

		fprintf(stderr, "%2d %-17s on %u, protocol %3u, shape %u, flags %02x:", i,
			native_programs[step->program].name, step->in.interface, step->before.pair.protocol,
			step->before.shape, step->before.flags);
		print_view(&step->before);
		fprintf(stderr, " -> %d", step->effects.action);
		print_view(&step->after);
		fprintf(stderr, step->effects.failures ? " (a call failed)\n" : "\n");
	}
}

void fail(const struct step *step, const char *what)
{
	print_steps();
	flows_print();
	fprintf(stderr, "WRONG: %s\nstep %d of %s, action %d, redirect to %u, failures %d\n", what, step_count,
		native_programs[step->program].name, step->effects.action, step->effects.redirect,
		step->effects.failures);
	fprintf(stderr,
		"forwarding %d, special %u, through the stack %d, hides %d, external %d, own %u, unknown %d, "
		"local %d and %d, strange %d\n",
		node.forwarding, world.special, world.through_stack, world.hides, world.external, world.pods_own,
		world.pods_unknown, world.inside_local, world.outside_local, world.tunnel_is_strange);
	print_frame("in", &step->in);
	print_frame("out", &step->out);
	for (__u32 i = 0; i < COUNTER_MAX; i++)
		if (counted(i))
			fprintf(stderr, "counter %u moved by %llu\n", i, counted(i));
	abort();
}

__u64 counted(__u32 counter)
{
	return world_counter(counter) - counters_before[counter];
}

void oracle_reset(void)
{
	flows_reset();
	choice_reset();
	table_reset();
	memset(quotas, 0, sizeof(quotas));
	step_count = 0;
}

void oracle_before(void)
{
	for (__u32 i = 0; i < COUNTER_MAX; i++)
		counters_before[i] = world_counter(i);
	table_before();
}

/* Reasons for which the sender hears of it, if it can be told. */
static __u64 counted_answers(void)
{
	return counted(COUNTER_REFUSED_NO_ENDPOINT) + counted(COUNTER_REFUSED_UNKNOWN_PORT) +
	       counted(COUNTER_ICMP_TTL_EXCEEDED) + counted(COUNTER_ICMP_TOO_BIG);
}

/* Reasons for which nobody hears of it. */
static __u64 counted_drops(void)
{
	static const __u8 reasons[] = {
		COUNTER_DROPPED_NO_LOCAL_ENDPOINT, COUNTER_DROPPED_SOURCE_RANGE,  COUNTER_DROPPED_SNAT_EXHAUSTED,
		COUNTER_DROPPED_SNAT_SOURCE,	   COUNTER_DROPPED_NO_ROUTE,	  COUNTER_DROPPED_FORWARDING_OFF,
		COUNTER_DROPPED_FRAGMENT,	   COUNTER_DROPPED_UNKNOWN_RESET, COUNTER_DROPPED_FLOW_TABLE,
		COUNTER_DROPPED_REWRITE,	   COUNTER_DROPPED_SCTP_PORT,	  COUNTER_DROPPED_FLOW_CHANGING,
		COUNTER_DROPPED_MARTIAN,	   COUNTER_DROPPED_OPTIONS,	  COUNTER_DROPPED_POD_QUOTA,
	};
	__u64 drops = 0;

	for (unsigned int i = 0; i < sizeof(reasons); i++)
		drops += counted(reasons[i]);
	return drops;
}

static int is_same(const struct step *step)
{
	return step->in.length == step->out.length && !memcmp(step->in.bytes, step->out.bytes, step->in.length);
}

struct service *service_asked(const struct step *step)
{
	return world_service(&step->before.pair.to, step->before.pair.protocol, step->program == IN_POD);
}

static int is_served_address(const __u8 address[16], int from_pod)
{
	static const char *const ours[] = {"10.0.0.1", "10.244.0.1", "192.0.2.80",
					   "fd00::1",  "fd44::1",    "2001:db8:80::80"};
	__u8 own[16];

	for (unsigned int i = 0; i < sizeof(ours) / sizeof(ours[0]); i++) {
		address_of(ours[i], own);
		if (!memcmp(own, address, 16))
			return 1;
	}
	return (from_pod || world.external) && world_is_cluster_ip(address);
}

/* What a pod sends to another gateway belongs to nobody here. */
static int is_for_others(const struct step *step)
{
	return step->program == IN_POD && !world_is_for_node(&step->in);
}

static int is_somebodys(const struct step *step)
{
	const struct pair *pair = &step->before.pair;
	const __u8 *service = step->program >= OUT_ETHERNET ? pair->from.address : pair->to.address;

	if (!is_served_address(service, step->program == IN_POD) || is_for_others(step))
		return !flows_know(step);
	return 0;
}

/* A drop has one reason, and hits nobody who does not talk to a Service. */
static void check_drop(const struct step *step)
{
	__u64 reasons = counted_drops() + counted_answers();

	if (reasons != 1)
		fail(step, reasons ? "a drop with more than one reason" : "a drop that is not counted");
	if (counted(COUNTER_DROPPED_ANSWER_LIMIT) && !counted_answers())
		fail(step, "a limit of answers, where none was due");
	if (!step->effects.failures && is_somebodys(step))
		fail(step, "a drop of somebody else's packet");
	if (counted(COUNTER_DROPPED_SOURCE_RANGE)) {
		const struct service *service = service_asked(step);

		if (!service || world_allows(service, &step->before.pair.to, step->before.pair.from.address))
			fail(step, "turned away, though it is in the range");
	}
	if (counted(COUNTER_DROPPED_POD_QUOTA) &&
	    (step->program != IN_POD || quotas[step->in.interface].asked < POD_OPENINGS))
		fail(step, "dropped by a quota that is not used up");
	if (counted(COUNTER_DROPPED_SNAT_SOURCE) && !world.tunnel_is_strange)
		fail(step, "dropped for a source that is the node's");
	if (step->effects.failures)
		return;
	if (counted(COUNTER_DROPPED_REWRITE) || counted(COUNTER_DROPPED_FLOW_TABLE) ||
	    counted(COUNTER_DROPPED_FLOW_CHANGING))
		fail(step, "dropped for a failure that did not happen");
}

/* What devices have summed stays right. (An answer is sent at once, and nobody reads the sum of what is sent.) */
static void check_sum(const struct step *step)
{
	__u16 sum = inet_sum(step->out.bytes + step->out.l3, step->out.length - step->out.l3);

	if (step->effects.summed == SUM_COMPLETE &&
	    (sum ? sum : 0xffff) != (step->effects.sum ? step->effects.sum : 0xffff))
		fail(step, "the device's sum is not the packet's any more");
}

/* UDP's "none": whoever receives it does not ask for the device's sum either (__skb_checksum_validate_needed). */
static int has_no_checksum(const struct step *step)
{
	const __u8 *check = step->in.bytes + step->before.l4 + 6;

	return step->before.pair.protocol == PROTO_UDP &&
	       (step->before.shape == SHAPE_WHOLE || step->before.shape == SHAPE_FIRST) && !check[0] && !check[1];
}

static void check_passed(struct step *step)
{
	if (counted_drops() || counted_answers())
		fail(step, "a reason to drop, of a packet that went on");
	if (!has_no_checksum(step))
		check_sum(step);
	if (is_same(step)) {
		check_unchanged(step);
		choice_note_own(step);
		return;
	}
	if (step->before.shape == SHAPE_ERROR) {
		check_error_rewritten(step);
		flows_follow_error(step);
		return;
	}
	check_rewritten(step);
	flows_follow(step);
}

static void check_sent(struct step *step)
{
	if (counted_answers() == 1 && !counted_drops()) {
		if (is_for_others(step))
			fail(step, "an answer in the place of another gateway's");
		check_answer(step);
		flows_follow_dropped(step);
		return;
	}
	if (step->effects.redirect_is_neigh && step->effects.vlan_present)
		fail(step, "a tag that is sent on");
	check_passed(step);
}

static void note_asked(const struct step *step)
{
	__u64 second = node.now_ns / 1000000000;

	if (step->program != IN_POD)
		return;
	if (quotas[step->in.interface].second + 1 < second)
		quotas[step->in.interface].asked = 0;
	quotas[step->in.interface].second = second;
	quotas[step->in.interface].asked += counted_answers() ? POD_REFUSAL : 1;
}

void oracle_after(struct step *step)
{
	if (locks_held())
		fail(step, "a lock is held");
	if (sockets_held())
		fail(step, "a socket is held");
	table_after(step);
	if (step->program == COLLECT) {
		if (step->effects.action < 0 || step->effects.action > 2 * COLLECT_KEYS)
			fail(step, "a number of rows that cannot be");
		return;
	}
	step->after = inet_read(step->out.bytes, step->out.length, step->out.l3, step->out.protocol == 0x86dd, 0);
	flows_note_piece(step);
	switch (step->effects.action) {
	case TC_ACT_UNSPEC:
		if (step->in.length != step->out.length)
			fail(step, "a packet of another length is passed on");
		check_passed(step);
		break;
	case TC_ACT_REDIRECT:
		if (!step->effects.redirect)
			fail(step, "redirected to nowhere");
		check_sent(step);
		break;
	case TC_ACT_SHOT:
		check_drop(step);
		flows_follow_dropped(step);
		break;
	default:
		fail(step, "an action that is not ours");
	}
	note_asked(step);
	if (step->effects.failures)
		choice_forget(step);
	if (step->is_proper && !step->effects.failures)
		flows_expect(step);
}
