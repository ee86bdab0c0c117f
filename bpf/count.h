/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Counters, per CPU: counting never changes a verdict. And the daemon's epochs. */
#ifndef KUBELANE_COUNT_H
#define KUBELANE_COUNT_H

static __always_inline void count(__u32 counter)
{
	__u64 *value = bpf_map_lookup_elem(&counters, &counter);

	if (value)
		*value += 1;
}

/* A connection, a socket's first datagram to a destination, or a flow from the wire. */
static __always_inline void count_service(__u32 service_id)
{
	const __u64 none = 0;
	__u64 *value;

	if (!config.counts_services)
		return;
	value = bpf_map_lookup_elem(&service_connections, &service_id);
	if (!value) {
		/* Another processor may be faster. */
		bpf_map_update_elem(&service_connections, &service_id, &none, BPF_NOEXIST);
		value = bpf_map_lookup_elem(&service_connections, &service_id);
	}
	if (value)
		*value += 1;
}

/* `index`: enum epoch. */
static __always_inline __u32 epoch_now(__u32 index)
{
	__u32 *value = bpf_map_lookup_elem(&epochs, &index);

	return value ? *value : 0;
}

#endif
