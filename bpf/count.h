/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Counters, per CPU: counting never changes a verdict. And the daemon's epochs.
 *
 * Cost: counting is a call, and an array look-up for who listens; what may happen with every packet is counted in place.
 */
#ifndef KUBELANE_COUNT_H
#define KUBELANE_COUNT_H

/* What each packet or call of a connection may do, and is no event. */
static __always_inline void count_often(__u32 counter)
{
	__u64 *value = bpf_map_lookup_elem(&counters, &counter);

	if (value)
		*value += 1;
}

/* Who listens to events: a bit for each. */
static __always_inline __u32 listening_slots(void)
{
	__u32 zero = 0;
	const struct listening *all = bpf_map_lookup_elem(&listening, &zero);

	return all ? all->slots : 0;
}

/* See tell_packet.h. */
__noinline int packet_tell(__u32 number, __u32 reason, __u32 slot);

/* An event of packets, to all who listen: the scratch says what it is about. Global, as count(), so that it is verified once,
 * and so that who calls it is verified without it. */
__noinline int packet_event(__u32 number, __u32 reason)
{
	__u32 slots = listening_slots();

	for (__u32 slot = 0; slot < LISTENERS && slots; slot++, slots >>= 1)
		if (slots & 1)
			packet_tell(number, reason, slot);
	return 0;
}

/* What happens to packets once in a connection, and is an event. */
__noinline int count(__u32 counter)
{
	count_often(counter);
	if (listening_slots())
		packet_event(counter, 0);
	return 0;
}

const struct service_counts no_counts = {}; /* too large for some stacks */

/* Of a Service; `what` is a constant. */
static __always_inline void count_service(__u32 service_id, enum service_count what)
{
	struct service_counts *row;

	if (!config.counts_services)
		return;
	row = bpf_map_lookup_elem(&service_counts, &service_id);
	if (!row) {
		/* Another processor may be faster. */
		bpf_map_update_elem(&service_counts, &service_id, &no_counts, BPF_NOEXIST);
		row = bpf_map_lookup_elem(&service_counts, &service_id);
	}
	if (row)
		row->counts[what] += 1;
}

/* `index`: enum epoch. */
static __always_inline __u32 epoch_now(__u32 index)
{
	__u32 *value = bpf_map_lookup_elem(&epochs, &index);

	return value ? *value : 0;
}

#endif
