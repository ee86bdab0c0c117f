/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The end of a flow: why it goes, and the one place where rows are deleted that others may know of. The daemon's collection
 * comes here by the program flow_collect, a packet that needs a port by snat.h, and a new flow by its processor's ring of
 * openings, in which each pushes out the one that has been there the longest.
 */
#ifndef KUBELANE_FLOW_END_H
#define KUBELANE_FLOW_END_H

/* What tells an unproved flow from an earlier one with the same ends: the sequence number that it began with (TCP), or
 * the second. */
static __always_inline __u32 flow_opening_mark(__u8 protocol, const struct flow *request, const struct flow *reply)
{
	return protocol == IPPROTO_TCP ? request->sequence : reply->backend_or_first;
}

/* Before its rows go: its requests' key is scratch.removed, its ends scratch.removed_ends (of REMOVE_REPLACED the packet's
 * tuple, and those of scratch.former). `row`: of its requests, which was in the state `request`. */
static __always_inline void flow_tell_end(struct scratch *given, __u32 why, const struct flow *row, __u32 request,
					  __u32 reply)
{
	given->ended_request = request;
	given->ended_reply = reply;
	given->ended_backend = row->backend_or_first;
	given->ended_generation = row->generation_or_interface;
	packet_event(EVENT_FLOW_ENDED, why);
}

static __always_inline int flow_may_go(const struct flow_limits *limits, __u8 protocol, __u32 request, __u32 reply,
				       __u32 why, __u32 second)
{
	if ((why == REMOVE_OVER || why == REMOVE_FREE) &&
	    flow_idle_both(request, reply, second) > flow_limit(limits, protocol, request, reply))
		return 1;
	if (why == REMOVE_OVER)
		return 0;
	return !(request & FLOW_PROVED) || (why != REMOVE_OPENING && flow_is_closed(request, reply));
}

/* The replies' row of a requests' row that is another flow's, or is there no more; see flow_remove(). */
static __always_inline int flow_remove_lonely(struct scratch *given, struct flow *reply)
{
	struct flow *request;
	struct flow_lock *lock;
	int is_ours = 0;

	given->removed_ends = reply->ends;
	flow_key_reverse(&given->removed_partner, &given->removed_ends, given->removed.protocol);
	request = flow_find(&given->removed_partner);
	lock = flow_lock_of(&given->removed_partner.ends);
	if (!lock)
		return 0;
	bpf_spin_lock(&lock->lock);
	if (flow_is_still(reply, &given->removed_ends) &&
	    !(request && ends_are_reversed(&request->ends, &given->removed.ends))) {
		reply->state |= FLOW_ENDING;
		is_ours = 1;
	}
	bpf_spin_unlock(&lock->lock);
	if (is_ours)
		flow_delete(&given->removed);
	return is_ours;
}

/*
 * Removes the flow whose requests' key is scratch.removed, both rows, if it still may go; `why` is an enum removal. With
 * the key of a replies' row whose partner has left it, that row. The only place where rows are deleted that others may
 * know of. Answers how many rows went.
 */
__noinline int flow_remove(hook_context *ctx, __u32 why)
{
	const struct flow_limits *limits = flow_limits_get(why == REMOVE_FREE ? FLOW_LIMITS_SET : FLOW_LIMITS_NOW);
	struct scratch *given = scratch();
	struct flow *request, *reply;
	struct flow_lock *lock;
	__u32 second, state = FLOW_ENDING;
	__u64 *proved;

	if (!given || !limits || !ctx)
		return 0;
	second = second_now(given);
	request = flow_find(&given->removed);
	if (!request)
		return 0;
	if (request->state & FLOW_REPLY)
		return why == REMOVE_OVER && flow_idle(request->state, second) > limits->tcp_opening
			       ? flow_remove_lonely(given, request)
			       : 0;
	/* As of most that were entered in the ring: no need to find its partner. */
	if (why == REMOVE_OPENING && (request->state & FLOW_PROVED))
		return 0;
	given->removed_ends = request->ends;
	flow_key_reverse(&given->removed_partner, &given->removed_ends, given->removed.protocol);
	reply = flow_find(&given->removed_partner);
	if (why == REMOVE_OPENING &&
	    (!reply || flow_opening_mark(given->removed.protocol, request, reply) != given->removed_mark))
		return 0;
	lock = flow_lock_of(&given->removed.ends);
	if (!lock)
		return 0;
	bpf_spin_lock(&lock->lock);
	if (flow_is_still(request, &given->removed_ends)) {
		/* A replies' row that leads elsewhere is another flow's by now. */
		if (reply && !ends_are_reversed(&reply->ends, &given->removed.ends))
			reply = (void *)0;
		/* An opening's row may be a later flow's since it was looked at. */
		if (why == REMOVE_OPENING &&
		    (!reply || flow_opening_mark(given->removed.protocol, request, reply) != given->removed_mark))
			state = FLOW_ENDING;
		else if (flow_may_go(limits, given->removed.protocol, request->state,
				     reply ? reply->state : request->state, why, second)) {
			state = request->state;
			request->state |= FLOW_ENDING;
			if (reply)
				reply->state |= FLOW_ENDING;
		}
	}
	bpf_spin_unlock(&lock->lock);
	if (state & FLOW_ENDING)
		return 0;
	flow_tell_end(given, why, request, state, reply ? reply->state : 0);
	proved = flow_count_of(given->removed.protocol);
	if ((state & FLOW_PROVED) && proved)
		__sync_fetch_and_add(proved, -1);
	if (reply)
		flow_delete(&given->removed_partner);
	flow_delete(&given->removed);
	return reply ? 2 : 1;
}

/* Enters a new flow into this processor's ring, and removes the one that has been there the longest if nobody has
 * proved it meanwhile. */
static __noinline int flow_note_opening(hook_context *ctx, struct scratch *given)
{
	__u32 index = bpf_get_smp_processor_id() * FLOW_OPENINGS + (given->openings++ & (FLOW_OPENINGS - 1));
	struct opening *opening = bpf_map_lookup_elem(&flow_openings, &index);

	if (!opening)
		return 0;
	given->removed = opening->key;
	given->removed_mark = opening->mark;
	opening->key = given->packet.tuple;
	opening->mark = flow_opening_mark(given->packet.tuple.protocol, &given->flow, &given->reply_row);
	if (given->removed.protocol && flow_remove(ctx, REMOVE_OPENING))
		count(COUNTER_FLOW_PUSHED_OUT);
	return 0;
}

#endif
