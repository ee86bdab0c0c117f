// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * The packet, and the helpers that read and change it: bounds and errors are those of net/core/filter.c. The bytes lie at
 * the end of a page, before one that nobody may touch, and below 4 GiB, because a context's pointers have 32 bits. A
 * call that may move the packet in the kernel moves it here, and overwrites the place where it was.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <linux/pkt_cls.h>
#include "inet.h"
#include "native.h"

enum {
	PLACE_SIZE = 8192,
	PLACES = 2,
	LENGTH_MAX = 16384, /* SKB_MAX_ALLOC */
	CSUM_FIELD = 0x0f,
	CSUM_PSEUDO = 0x10,
	CSUM_MANGLED_0 = 0x20,
	STORE_RECOMPUTE = 1,
};

static __u8 *const places = (void *)0x20000000;
static int place_now;
static __u32 length, mac_length;
static __u8 summed;
static __u32 sum;
static int calls, fail_at;
struct effects *current_effects;

void skb_open(void)
{
	for (int i = 0; i < PLACES; i++)
		if (mmap(places + i * 2 * PLACE_SIZE, PLACE_SIZE, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) == MAP_FAILED)
			abort();
}

int fault_is_due(void)
{
	if (!fail_at || ++calls != fail_at)
		return 0;
	current_effects->failures++;
	return 1;
}

static __u8 *data_of(int place)
{
	return places + place * 2 * PLACE_SIZE + PLACE_SIZE - length;
}

/* Puts the bytes of `from`, of the new length, at the other place, and overwrites the old one. */
static void move_packet(struct __sk_buff *skb, const __u8 *from, __u32 new_length)
{
	__u8 copy[FRAME_MAX * 2];
	int old = place_now;

	memcpy(copy, from, new_length);
	memset(places + old * 2 * PLACE_SIZE, 0xdb, PLACE_SIZE);
	place_now = !old;
	length = new_length;
	memcpy(data_of(place_now), copy, length);
	skb->len = length;
	skb->data = (__u32)(unsigned long)data_of(place_now);
	skb->data_end = skb->data + length;
}

long bpf_skb_load_bytes(const void *skb, __u32 offset, void *to, __u32 count)
{
	if (!skb || locks_held())
		abort();
	if (offset > 0x7fffffff || (__u64)offset + count > length) {
		memset(to, 0, count);
		return -EFAULT;
	}
	memcpy(to, data_of(place_now) + offset, count);
	return 0;
}

/* skb->csum covers what lies behind the link header. */
static void sum_again(void)
{
	if (summed == SUM_COMPLETE)
		sum = inet_sum(data_of(place_now) + mac_length, length - mac_length);
}

long bpf_skb_store_bytes(struct __sk_buff *skb, __u32 offset, const void *from, __u32 count, __u64 flags)
{
	__u8 copy[FRAME_MAX];
	__u32 before;

	if (flags & ~3ULL)
		return -EINVAL;
	if (locks_held() || count > sizeof(copy))
		abort();
	if (offset > 0x7fffffff || (__u64)offset + count > length)
		return -EFAULT;
	if (fault_is_due())
		return -EFAULT;
	before = inet_sum_at(data_of(place_now) + offset, count, offset & 1);
	memcpy(copy, from, count);
	move_packet(skb, data_of(place_now), length);
	memcpy(data_of(place_now) + offset, copy, count);
	if ((flags & STORE_RECOMPUTE) && summed == SUM_COMPLETE)
		sum = inet_fold((__u64)sum + (__u16)~before + inet_sum_at(copy, count, offset & 1));
	return 0;
}

long bpf_l4_csum_replace(struct __sk_buff *skb, __u32 offset, __u64 from, __u64 to, __u64 flags)
{
	__u32 difference;
	__u16 check;

	if (locks_held())
		abort();
	if (flags & ~(__u64)(CSUM_FIELD | CSUM_PSEUDO | CSUM_MANGLED_0))
		return -EINVAL;
	if (offset > 0xffff || (offset & 1) || offset + 2 > length || fault_is_due())
		return -EFAULT;
	move_packet(skb, data_of(place_now), length);
	memcpy(&check, data_of(place_now) + offset, sizeof(check));
	if ((flags & CSUM_MANGLED_0) && !check)
		return 0;
	switch (flags & CSUM_FIELD) {
	case 0:
		if (from)
			return -EINVAL;
		difference = to;
		break;
	case 2:
		difference = inet_fold((__u64)(__u16)~from + (__u16)to);
		break;
	case 4:
		difference = inet_fold((__u64)(__u32)~from + (__u32)to);
		break;
	default:
		return -EINVAL;
	}
	difference = inet_fold(difference);
	if (summed != SUM_PARTIAL) {
		check = ~inet_fold((__u64)(__u16)~check + difference);
		if (summed == SUM_COMPLETE && (flags & CSUM_PSEUDO))
			sum = inet_fold((__u64)sum + (__u16)~difference);
	} else if (flags & CSUM_PSEUDO) {
		check = inet_fold((__u64)check + difference);
	}
	if ((flags & CSUM_MANGLED_0) && !check)
		check = 0xffff;
	memcpy(data_of(place_now) + offset, &check, sizeof(check));
	return 0;
}

long bpf_csum_update(struct __sk_buff *skb, __u32 change)
{
	if (!skb || summed != SUM_COMPLETE)
		return -524; /* ENOTSUPP */
	sum = inet_fold((__u64)sum + change);
	return 0;
}

__s64 bpf_csum_diff(const void *from, __u32 from_size, const void *to, __u32 to_size, __u32 seed)
{
	__u64 total = seed;

	if ((from_size | to_size) & 3 || from_size + to_size > 512)
		return -EINVAL;
	if (from_size)
		total += (__u16)~inet_sum(from, from_size);
	if (to_size)
		total += inet_sum(to, to_size);
	return (__u32)((total & 0xffffffff) + (total >> 32));
}

long bpf_skb_change_tail(struct __sk_buff *skb, __u32 count, __u64 flags)
{
	__u8 copy[FRAME_MAX * 2] = {};

	if (flags || count > LENGTH_MAX || count < mac_length)
		return -EINVAL;
	if (count > sizeof(copy))
		abort();
	if (fault_is_due())
		return -ENOMEM;
	/* __skb_grow_rcsum, __skb_trim_rcsum. */
	if (count != length && summed == SUM_COMPLETE)
		summed = SUM_NONE;
	memcpy(copy, data_of(place_now), count < length ? count : length);
	move_packet(skb, copy, count);
	skb->gso_size = 0;
	return 0;
}

long bpf_skb_change_head(struct __sk_buff *skb, __u32 count, __u64 flags)
{
	__u8 copy[FRAME_MAX * 2] = {};

	if (flags || (length + count > LENGTH_MAX && !skb->gso_size))
		return -EINVAL;
	if (fault_is_due())
		return -ENOMEM;
	memcpy(copy + count, data_of(place_now), length);
	move_packet(skb, copy, length + count);
	mac_length += count;
	return 0;
}

long bpf_skb_adjust_room(struct __sk_buff *skb, __s32 change, __u32 mode, __u64 flags)
{
	__u32 size = change < 0 ? -change : change, least = skb->protocol == 0x0008 ? 20 : 40;
	__u8 copy[FRAME_MAX * 2];

	if (flags)
		return -EINVAL;
	if (size > 0xfff)
		return -EFAULT;
	if ((skb->protocol != 0x0008 && skb->protocol != 0xdd86) || mode != BPF_ADJ_ROOM_MAC || change >= 0)
		return -524;
	if (size >= length - mac_length || length - mac_length - size < least)
		return -524;
	if (fault_is_due())
		return -ENOMEM;
	memcpy(copy, data_of(place_now), mac_length);
	memcpy(copy + mac_length, data_of(place_now) + mac_length + size, length - mac_length - size);
	move_packet(skb, copy, length - size);
	/* skb_postpull_rcsum: what was to be added lies before the packet now. */
	if (summed == SUM_PARTIAL)
		summed = SUM_NONE;
	sum_again();
	return 0;
}

long bpf_skb_vlan_pop(struct __sk_buff *skb)
{
	if (fault_is_due())
		return -ENOMEM;
	move_packet(skb, data_of(place_now), length);
	skb->vlan_present = 0;
	skb->vlan_tci = 0;
	return 0;
}

struct effects skb_run(enum program program, const struct frame *before, struct frame *after, int fail)
{
	static struct effects effects;
	struct __sk_buff skb = {
		.pkt_type = before->pkt_type,
		.mark = before->mark,
		.protocol = (__u16)__builtin_bswap16(before->protocol),
		.vlan_present = before->vlan_present,
		.vlan_tci = before->vlan,
		.ifindex = before->interface,
		.ingress_ifindex = before->from,
		.gso_size = before->gso_size,
	};

	memset(&effects, 0, sizeof(effects));
	current_effects = &effects;
	calls = 0;
	fail_at = fail;
	summed = before->summed;
	mac_length = before->l3;
	move_packet(&skb, before->bytes, before->length);
	sum = before->sum;
	effects.action = native_programs[program].run(&skb);
	*after = *before;
	memcpy(after->bytes, data_of(place_now), length);
	after->length = length;
	after->l3 = mac_length;
	effects.vlan_present = skb.vlan_present;
	effects.summed = summed;
	effects.sum = sum;
	fail_at = 0;
	return effects;
}
