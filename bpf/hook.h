/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What the kernel lends a packet program: the packet's bytes, what it says about the packet, and what it does with it. All
 * other headers know a packet by these functions only. `hook` is a constant in each program, so that the branches for
 * other hooks are never compiled.
 *
 * Cost on the processor of benches/FIGURES.md: a helper that changes a packet 24 ns, bytes that are written in place 2.
 */
#ifndef KUBELANE_HOOK_H
#define KUBELANE_HOOK_H

enum {
	ETHERTYPE_IP4 = 0x0800,
	ETHERTYPE_IP6 = 0x86dd,
	ETHERNET_HEADER = 14,
	VLAN_ID_MASK = 0x0fff,
};

/*
 * Where a program is called. A program that writes in place has the kernel unshare each packet that is a clone before it
 * even begins (bpf_unclone_prologue): of what comes in few are, of the TCP that a node sends all.
 */
enum hook {
	HOOK_TC_INGRESS = 0,
	HOOK_TC_EGRESS = 1,
};

/* The verifier knows the arguments of global functions by this type: another kind of hook needs instances of its own. */
typedef struct __sk_buff hook_context;

/* The bytes in the linear part, from the link header on. The barrier keeps the compiler from computing the places of the
 * context's members, which the verifier does not allow. */
static __always_inline void *hook_bytes(hook_context *ctx)
{
	barrier_var(ctx);
	return (void *)(long)ctx->data;
}

static __always_inline void *hook_bytes_end(hook_context *ctx)
{
	barrier_var(ctx);
	return (void *)(long)ctx->data_end;
}

/* All bytes, those elsewhere too. */
static __always_inline __u32 hook_length(hook_context *ctx)
{
	return ctx->len;
}

/* Not 0: the packet is an aggregate, whose segments have as many bytes behind the transport header (GSO, GRO). */
static __always_inline __u32 hook_segment_size(hook_context *ctx)
{
	return ctx->gso_size;
}

/* How many packets it is on the wire. Of aggregates that come from a virtual machine or its host, the kernel knows only how
 * large each is (SKB_GSO_DODGY). `l4`: where the transport header is; TCP's options are taken for data. */
static __always_inline __u32 hook_packets(hook_context *ctx, __u32 l4, __u8 protocol)
{
	__u32 size = ctx->gso_size, headers = l4 + (protocol == IPPROTO_TCP ? 20 : 8), length = ctx->len;

	if (ctx->gso_segs)
		return ctx->gso_segs;
	return size && length > headers ? (length - headers + size - 1) / size : 1;
}

static __always_inline __u32 hook_interface(hook_context *ctx)
{
	return ctx->ifindex;
}

/* Where a packet that leaves came in; 0: this host has made it. */
static __always_inline __u32 hook_came_from(hook_context *ctx)
{
	return ctx->ingress_ifindex;
}

static __always_inline __u32 hook_mark(hook_context *ctx)
{
	return ctx->mark;
}

/* Not for another host, nor for all: the link header names this one. */
static __always_inline int hook_is_to_this_host(hook_context *ctx)
{
	return ctx->pkt_type == PACKET_HOST;
}

/* 4 or 6, by the frame's type; 0: neither IPv4 nor IPv6. A frame for a VLAN is met again on the VLAN's own device. */
static __always_inline int hook_family(hook_context *ctx)
{
	if (ctx->vlan_present && (ctx->vlan_tci & VLAN_ID_MASK))
		return 0;
	if (ctx->protocol == bpf_htons(ETHERTYPE_IP4))
		return 4;
	return ctx->protocol == bpf_htons(ETHERTYPE_IP6) ? 6 : 0;
}

/* Copies bytes, wherever they are. Not 0: there are not so many. */
static __always_inline long hook_load(hook_context *ctx, __u32 offset, void *to, __u32 size)
{
	return bpf_skb_load_bytes(ctx, offset, to, size);
}

/* Writes bytes that checksums in the packet make up for, so that the sum of a device that has summed it stays right. */
static __always_inline long hook_store(hook_context *ctx, __u32 offset, const void *from, __u32 size)
{
	return bpf_skb_store_bytes(ctx, offset, from, size, 0);
}

/* Writes bytes, and mends that sum (CHECKSUM_COMPLETE). */
static __always_inline long hook_store_summed(hook_context *ctx, __u32 offset, const void *from, __u32 size)
{
	return bpf_skb_store_bytes(ctx, offset, from, size, BPF_F_RECOMPUTE_CSUM);
}

/* Tells the device's sum of a change that was made in place; nothing happens where there is no such sum. */
static __always_inline void hook_sum_change(hook_context *ctx, __u32 change)
{
	bpf_csum_update(ctx, change);
}

/*
 * Changes a transport checksum as `change` changes what it covers: BPF_F_PSEUDO_HDR for what is in no header of the
 * transport's, BPF_F_MARK_MANGLED_0 for UDP. The kernel knows what the device has left to do.
 */
static __always_inline long hook_checksum_change(hook_context *ctx, __u32 offset, __u32 change, __u64 flags)
{
	return bpf_l4_csum_replace(ctx, offset, 0, change, flags);
}

/*
 * Cuts the packet to `length` bytes behind `l3`, at its front as well. A checksum that the sender left to the device
 * (CHECKSUM_PARTIAL) would be written into other bytes on its way out; the kernel forgets about it when the place where it
 * starts, less than `pulled` bytes behind `l3`, is pulled off the front (skb_postpull_rcsum), which is what growing at the
 * tail and shrinking at the front does.
 */
static __always_inline long hook_resize(hook_context *ctx, __u32 l3, __u32 length, __u32 pulled)
{
	if (bpf_skb_change_tail(ctx, l3 + length + pulled, 0))
		return -1;
	return bpf_skb_adjust_room(ctx, -(__s32)pulled, BPF_ADJ_ROOM_MAC, 0);
}

/*
 * Sends the packet, with its network header at `l3`, by `interface` to a neighbour, or (nh_family 0) to whom the kernel finds.
 * Not 0: the kernel refused. bpf_redirect_neigh() takes an Ethernet header off, and drops what has none
 * (__bpf_redirect_neigh, in all kernels): a packet of a device without link headers is given one that nobody reads.
 */
static __always_inline int hook_send(hook_context *ctx, __u32 l3, __u32 interface, struct bpf_redir_neigh *next)
{
	/* A priority tag (VLAN 0, IEEE 802.1Q) ends at the device that it came in by. */
	if (ctx->vlan_present && bpf_skb_vlan_pop(ctx))
		return -1;
	if (!l3 && bpf_skb_change_head(ctx, ETHERNET_HEADER, 0))
		return -1;
	if (!next->nh_family)
		return bpf_redirect_neigh(interface, (void *)0, 0, 0) != TC_ACT_REDIRECT;
	return bpf_redirect_neigh(interface, next, sizeof(*next), 0) != TC_ACT_REDIRECT;
}

/* Sends an Ethernet frame back by the device that it came in by, to whom it came from. Not 0: the kernel refused. */
static __always_inline int hook_send_back(hook_context *ctx)
{
	struct {
		__u8 destination[6];
		__u8 source[6];
	} from = {}, to;

	if (hook_load(ctx, 0, &from, sizeof(from)))
		return -1;
	__builtin_memcpy(to.destination, from.source, 6);
	__builtin_memcpy(to.source, from.destination, 6);
	return hook_store(ctx, 0, &to, sizeof(to)) || bpf_redirect(ctx->ifindex, 0) != TC_ACT_REDIRECT;
}

/* What the program answers. */
static __always_inline int hook_action(enum verdict verdict)
{
	if (verdict == VERDICT_PASS)
		return TC_ACT_UNSPEC;
	return verdict == VERDICT_SEND ? TC_ACT_REDIRECT : TC_ACT_SHOT;
}

#endif
