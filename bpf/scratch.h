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

struct scratch {
	struct packet packet;
	struct packet quoted; /* what an ICMP error quotes */
	struct frontend frontend; /* the one that the packet asks for */
	struct flow flow; /* the flow that it begins */
	struct flow_key reply; /* and the replies that the flow will have */
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
	}
	return given->tick_ns;
}

#endif
