/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Counters, per CPU. Counting never changes a verdict. */
#ifndef KUBELANE_COUNT_H
#define KUBELANE_COUNT_H

static __always_inline void count(__u32 counter)
{
	__u64 *value = bpf_map_lookup_elem(&counters, &counter);

	if (value)
		*value += 1;
}

#endif
