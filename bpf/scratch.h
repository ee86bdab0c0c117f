/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What is known of the packet at hand: one place for each processor, since packet programs do not interrupt each other
 * there (they run with softirqs off).
 *
 * Not on the stack, for the verifier's sake. It follows every value that it knows of on the stack, so that each way
 * through the parser would be checked again all the way to the verdict; what lies in a map it takes for anything. And
 * the rare steps (to begin a flow, to pass on an ICMP error, to answer with one) are global functions, which are
 * checked once each and by themselves, and can be handed nothing but the kernel's context and numbers.
 */
#ifndef KUBELANE_SCRATCH_H
#define KUBELANE_SCRATCH_H

enum {
	NANOSECONDS = 1000000000,
};

/* Where a packet is sent to; see route.h. */
struct route {
	struct bpf_redir_neigh next; /* nh_family 0: the kernel finds it while sending */
	__u32 interface;
	__u32 mtu; /* what fits; 0: not to be remembered */
};

/* What a health probe gets in its place; see probe.h. */
struct probe_reply {
	__u32 sequence;
	__u32 acknowledgement;
	__u32 flags; /* with TCP_PSH: an answer */
	__u32 asked; /* whose: enum probe_path, and PROBE_IS_HEAD */
	__u32 mss; /* 0: not said */
};

struct scratch {
	struct packet packet;
	struct packet quoted; /* what an ICMP error quotes */
	struct frontend frontend; /* the one that the packet asks for */
	struct pool pool; /* and that pool of it */
	struct flow flow; /* a copy of the packet's row; or the row that it begins */
	__u32 addresses; /* the part of flow.change that addresses have, of the packet at hand */
	struct route route; /* of the packet */
	__u32 sum; /* see rewrite_checksum() */
	__u16 check;
	__u16 rewrite_mode;
	struct flow_key reply; /* the other direction's key */
	struct flow reply_row; /* and row, of a flow that begins */
	struct flow former; /* the row, of a flow that has ended, that the packet's new flow replaces */
	__u32 chosen; /* why its backend: enum choice_reason */
	__u32 ended_request; /* of a flow that has ended, for those who listen: what its rows said */
	__u32 ended_reply;
	__u32 ended_backend;
	__u32 ended_generation;
	struct flow_key told_key; /* of an event: the packet's ends, and what they become */
	struct ends told_ends;
	__u32 from_pod; /* the packet came in by a pod's device, else by an outward one */
	__u32 ports_first; /* of the range that a source port is taken from */
	__u32 ports_count;
	__u32 has_former;
	__u32 own_port_is_taken; /* of it: the backend has another connection from the client's port */
	struct ends asked; /* of the cache of routes */
	struct flow_key removed; /* what flow_remove() is asked for: the requests' key */
	__u32 idle; /* of the flow that holds a port: seconds of silence */
	struct flow_key removed_partner; /* and its partner's */
	struct ends removed_ends; /* and its row's */
	struct packet smallest; /* one that fits any route, for the cache of routes */
	struct ends backend_ends; /* the backend, and this node's address towards it */
	struct probe_reply probe;
	__u32 removed_mark; /* of the flow that is meant, of an opening */
	__u32 openings; /* how many flows began on this processor */
	__u32 second; /* of CLOCK_MONOTONIC */
	__u64 tick; /* in which the clock was read */
	__u64 tick_ns; /* what it said */
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct scratch);
} scratches SEC(".maps");

static __always_inline struct scratch *scratch(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&scratches, &zero);
}

/* CLOCK_MONOTONIC in nanoseconds, as of the timer tick (1 to 10 ms): good enough for time-outs of seconds. The helper
 * for ticks is inlined; the clock itself would be asked for in each packet. */
static __always_inline __u64 clock_now(struct scratch *given)
{
	__u64 tick = bpf_jiffies64();

	if (given->tick != tick) {
		given->tick = tick;
		given->tick_ns = bpf_ktime_get_ns();
		given->second = (given->tick_ns / NANOSECONDS) & FLOW_SECOND_MASK;
	}
	return given->tick_ns;
}

/* The same in seconds, as flow.state has them. */
static __always_inline __u32 second_now(struct scratch *given)
{
	clock_now(given);
	return given->second;
}

#endif
