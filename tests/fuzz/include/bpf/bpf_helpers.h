/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * In the place of libbpf's header when the programs are compiled for this machine: the same declarations, with the
 * helpers as functions of the harness (maps.c, skb.c, route.c). Those of socket hooks are declared for the compiler's
 * sake and end the process: no packet program calls them.
 */
#ifndef FUZZ_BPF_HELPERS_H
#define FUZZ_BPF_HELPERS_H

#include <stdlib.h>

#define SEC(name)
#define __uint(name, val) int(*name)[val]
#define __type(name, val) typeof(val) *name
#define __array(name, val) typeof(val) *name[]
#undef __always_inline
#define __always_inline inline __attribute__((always_inline))
#define __noinline __attribute__((noinline))
#define barrier() __asm__ volatile("" ::: "memory")
#define barrier_var(var) __asm__ volatile("" : "+r"(var))

void *bpf_map_lookup_elem(void *map, const void *key);
long bpf_map_update_elem(void *map, const void *key, const void *value, __u64 flags);
long bpf_map_delete_elem(void *map, const void *key);
long bpf_spin_lock(struct bpf_spin_lock *lock);
long bpf_spin_unlock(struct bpf_spin_lock *lock);

__u64 bpf_ktime_get_ns(void);
__u64 bpf_jiffies64(void);
__u32 bpf_get_prandom_u32(void);
__u32 bpf_get_smp_processor_id(void);

long bpf_skb_load_bytes(const void *skb, __u32 offset, void *to, __u32 length);
long bpf_skb_store_bytes(struct __sk_buff *skb, __u32 offset, const void *from, __u32 length, __u64 flags);
long bpf_l4_csum_replace(struct __sk_buff *skb, __u32 offset, __u64 from, __u64 to, __u64 flags);
long bpf_csum_update(struct __sk_buff *skb, __u32 change);
__s64 bpf_csum_diff(const void *from, __u32 from_size, const void *to, __u32 to_size, __u32 seed);
long bpf_skb_change_tail(struct __sk_buff *skb, __u32 length, __u64 flags);
long bpf_skb_change_head(struct __sk_buff *skb, __u32 length, __u64 flags);
long bpf_skb_adjust_room(struct __sk_buff *skb, __s32 change, __u32 mode, __u64 flags);
long bpf_skb_vlan_pop(struct __sk_buff *skb);

long bpf_fib_lookup(void *context, struct bpf_fib_lookup *asked, int size, __u32 flags);
long bpf_redirect(__u32 interface, __u64 flags);
long bpf_redirect_neigh(__u32 interface, struct bpf_redir_neigh *next, int size, __u64 flags);
struct bpf_sock *bpf_skc_lookup_tcp(void *context, struct bpf_sock_tuple *tuple, __u32 size, __u64 netns, __u64 flags);
struct bpf_sock *bpf_sk_lookup_udp(void *context, struct bpf_sock_tuple *tuple, __u32 size, __u64 netns, __u64 flags);
long bpf_sk_release(void *sk);

/* Nobody listens. */
#define bpf_ringbuf_reserve(ring, size, flags) (abort(), (ring) && (size) && (flags) ? (void *)(ring) : (void *)0)
#define bpf_ringbuf_query(ring, what) (abort(), (ring) && (what) ? 1ULL : 0ULL)
#define bpf_ringbuf_submit(event, flags) (abort(), (void)(event), (void)(flags))
#define bpf_get_current_pid_tgid() (abort(), 0ULL)
#define bpf_get_current_comm(to, size) (abort(), (to) && (size) ? 1L : 0L)

#define bpf_get_netns_cookie(context) (abort(), (context) ? 1ULL : 0ULL)
#define bpf_bind(context, address, size) (abort(), (context) && (address) && (size) ? 1L : 0L)
#define bpf_set_retval(value) (abort(), (value) ? 1 : 0)
#define bpf_sk_storage_get(map, sk, value, flags) (abort(), (map) && (sk) && (flags) ? (void *)(value) : (void *)0)
#define bpf_sk_storage_delete(map, sk) (abort(), (map) && (sk) ? 1L : 0L)
#define bpf_sock_ops_cb_flags_set(ctx, flags) (abort(), (ctx) && (flags) ? 1L : 0L)
#define bpf_skc_to_tcp_sock(sk) (abort(), (void *)(sk))
#define bpf_seq_write(seq, data, size) (abort(), (seq) && (data) && (size) ? 1L : 0L)

#endif
