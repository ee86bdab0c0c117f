/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What unconnected datagram sockets remember, as map ABI v2 had it: src/bpf/upgrade.rs carries it over, since nothing but a
 * program reaches other processes' sockets. (What else is carried over, the daemon writes.)
 */
#ifndef KUBELANE_FORMER_H
#define KUBELANE_FORMER_H

struct former_datagram_record {
	struct origin origin;
	__u32 sequence; /* of the last datagram sent; 0: free */
};

struct former_datagram_table {
	__u32 lock;
	__u32 sequence;
	__u32 overflowed;
	struct former_datagram_record records[DATAGRAM_RECORDS];
};

/* Never made: that version's map is put in its place. (libbpf then calls it as the kernel calls that, "datagram_tables",
 * unless its own name begins with that, cut to the 15 bytes of the kernel's names.) */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct former_datagram_table);
} datagram_tables_v2 SEC(".maps");

/* A socket that has sent by a program of this version already keeps what that remembered. */
static __always_inline void carry_datagram_table(struct sock *sk, const struct former_datagram_table *from)
{
	struct datagram_table *to = bpf_sk_storage_get(&datagram_tables, sk, (void *)0, BPF_SK_STORAGE_GET_F_CREATE);

	if (!to)
		return;
	bpf_spin_lock(&to->lock);
	if (!to->sequence) {
		to->sequence = from->sequence;
#pragma unroll
		for (int i = 0; i < DATAGRAM_RECORDS; i++) {
			to->records[i].origin = from->records[i].origin;
			to->records[i].sequence = from->records[i].sequence;
		}
	}
	bpf_spin_unlock(&to->lock);
}

#endif
