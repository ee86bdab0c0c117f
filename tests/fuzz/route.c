// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * The node around the packet: its routing table and neighbours, its sockets, the clock, chance. The table is the one of
 * tests/laboratory/packets/mod.rs, whose namespaces the same packets are replayed in, and besides a tunnel without link headers and a
 * pod with a route of its own. What bpf_fib_lookup() answers, and in which order it asks, is that of net/core/filter.c.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <linux/pkt_cls.h>
#include "inet.h"
#include "native.h"

enum {
	INET = 2,
	INET6 = 10,
	LOOKUP_SRC = 1 << 4,
	LOOKUP_MARK = 1 << 5,
};

struct node_state node;
struct known_socket known_sockets[4];
int known_socket_count;
static int held;

struct route_row {
	const char *prefix; /* as bytes */
	int bits;
	enum way way;
	__u32 interface;
	__u32 mtu;
	const char *gateway; /* NULL: on the link */
	const char *source;
	int refusal;
};

#define MAPPED "\0\0\0\0\0\0\0\0\0\0\xff\xff"

static const struct route_row rows[] = {
	{MAPPED "\x0a\x00\x00\x01", 128, WAY_HERE, 1, 65535, NULL, NULL, 0},
	{MAPPED "\x0a\x00\x00\xff", 128, WAY_HERE, 1, 65535, NULL, NULL, 0},
	{MAPPED "\x0a\xf4\x00\x01", 128, WAY_HERE, 1, 65535, NULL, NULL, 0},
	{MAPPED "\x0a\xf4\xff\xff", 128, WAY_HERE, 1, 65535, NULL, NULL, 0},
	{MAPPED "\x7f\x00\x00\x00", 104, WAY_HERE, 1, 65535, NULL, NULL, 0},
	{MAPPED "\x0a\x00\x00\x00", 120, WAY_FOUND, UPLINK, 1500, NULL, MAPPED "\x0a\x00\x00\x01", 0},
	{MAPPED "\x0a\xf4\x00\x00", 112, WAY_FOUND, TUNNEL, 1450, NULL, MAPPED "\x0a\xf4\x00\x01", 0},
	{MAPPED "\x0a\x01\x00\x00", 112, WAY_FOUND, PODS, 1500, NULL, MAPPED "\x0a\x00\x00\x01", 0},
	{MAPPED "\x0a\x01\x00\x07", 128, WAY_FOUND, VETH, 1500, NULL, MAPPED "\x0a\x00\x00\x01", 0},
	{MAPPED "\x0a\x4d\x00\x00", 112, WAY_FOUND, BARE, 1400, NULL, MAPPED "\x0a\xf4\x00\x01", 0},
	{MAPPED "\x0a\x09\x00\x00", 112, WAY_NONE, 0, 0, NULL, NULL, BPF_FIB_LKUP_RET_UNREACHABLE},
	{MAPPED "\x0a\x0a\x00\x00", 112, WAY_NONE, 0, 0, NULL, NULL, BPF_FIB_LKUP_RET_BLACKHOLE},
	{MAPPED "\x00\x00\x00\x00", 96, WAY_FOUND, UPLINK, 1500, MAPPED "\x0a\x00\x00\xfe", MAPPED "\x0a\x00\x00\x01",
	 0},
	{"\xfd\x00\0\0\0\0\0\0\0\0\0\0\0\0\0\x01", 128, WAY_HERE, 1, 65535, NULL, NULL, 0},
	{"\xfd\x00\0\0\0\0\0\0\0\0\0\0\0\0\0\x00", 128, WAY_HERE, 1, 65535, NULL, NULL, 0},
	{"\xfd\x44\0\0\0\0\0\0\0\0\0\0\0\0\0\x01", 128, WAY_HERE, 1, 65535, NULL, NULL, 0},
	{"\xfd\x44\0\0\0\0\0\0\0\0\0\0\0\0\0\x00", 128, WAY_HERE, 1, 65535, NULL, NULL, 0},
	{"\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x01", 128, WAY_HERE, 1, 65535, NULL, NULL, 0},
	{"\xfd\x00\0\0\0\0\0\0", 64, WAY_FOUND, UPLINK, 1500, NULL, "\xfd\x00\0\0\0\0\0\0\0\0\0\0\0\0\0\x01", 0},
	{"\xfd\x44\0\0", 32, WAY_FOUND, TUNNEL, 1450, NULL, "\xfd\x44\0\0\0\0\0\0\0\0\0\0\0\0\0\x01", 0},
	{"\xfd\x01\0\0\0\0\0\0", 64, WAY_FOUND, PODS, 1500, NULL, "\xfd\x00\0\0\0\0\0\0\0\0\0\0\0\0\0\x01", 0},
	{"\xfd\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\x07", 128, WAY_FOUND, VETH, 1500, NULL,
	 "\xfd\x00\0\0\0\0\0\0\0\0\0\0\0\0\0\x01", 0},
	{"\xfd\x4d\0\0", 32, WAY_FOUND, BARE, 1400, NULL, "\xfd\x44\0\0\0\0\0\0\0\0\0\0\0\0\0\x01", 0},
	{"\xfd\x09\0\0", 32, WAY_NONE, 0, 0, NULL, NULL, BPF_FIB_LKUP_RET_UNREACHABLE},
	{"\xfd\x0a\0\0", 32, WAY_NONE, 0, 0, NULL, NULL, BPF_FIB_LKUP_RET_BLACKHOLE},
	{"", 0, WAY_FOUND, UPLINK, 1500, "\xfd\x00\0\0\0\0\0\0\0\0\0\0\0\0\0\xfe",
	 "\xfd\x00\0\0\0\0\0\0\0\0\0\0\0\0\0\x01", 0},
};

enum {
	DEFAULT4 = 12,
	DEFAULT6 = sizeof(rows) / sizeof(rows[0]) - 1,
};

static const char *const neighbours[] = {
	MAPPED "\x0a\x00\x00\xfe",
	MAPPED "\x0a\xf4\x01\x05",
	"\xfd\x00\0\0\0\0\0\0\0\0\0\0\0\0\0\xfe",
	"\xfd\x44\0\0\0\0\0\0\0\0\0\0\0\x01\0\x05",
};

static int matches(const struct route_row *row, const __u8 address[16])
{
	/* An IPv4 address has IPv4 routes only. */
	if (address_is_v4(address) != (row->bits >= 96 && !memcmp(row->prefix, MAPPED, 12)))
		return 0;
	return !memcmp(row->prefix, address, row->bits / 8);
}

struct hop route_of(const __u8 destination[16])
{
	struct hop hop = {.way = WAY_NONE, .refusal = BPF_FIB_LKUP_RET_NOT_FWDED};
	const struct route_row *best = NULL;

	for (unsigned int i = 0; i < sizeof(rows) / sizeof(rows[0]); i++)
		if (matches(&rows[i], destination) && (!best || rows[i].bits > best->bits))
			best = &rows[i];
	if (!best)
		return hop;
	if (node.is_rerouted && best->interface == TUNNEL)
		best = &rows[address_is_v4(destination) ? DEFAULT4 : DEFAULT6];
	hop.way = best->way;
	hop.refusal = best->refusal;
	hop.interface = best->interface;
	hop.mtu = best->mtu;
	memcpy(hop.next, best->gateway ? (const __u8 *)best->gateway : destination, 16);
	if (best->source)
		memcpy(hop.source, best->source, 16);
	for (unsigned int i = 0; i < sizeof(neighbours) / sizeof(neighbours[0]); i++)
		hop.known |= !memcmp(neighbours[i], hop.next, 16);
	return hop;
}

/* Multicast, link-local, loopback: never forwarded (rt6_need_strict). */
static int is_strict(const __u8 address[16])
{
	static const __u8 loopback[16] = {[15] = 1};

	return address[0] == 0xff || (address[0] == 0xfe && (address[1] & 0xc0) == 0x80) ||
	       !memcmp(address, loopback, 16);
}

static void asked_addresses(const struct bpf_fib_lookup *asked, __u8 source[16], __u8 destination[16])
{
	memset(source, 0, 16);
	memset(destination, 0, 16);
	if (asked->family == INET6) {
		memcpy(source, asked->ipv6_src, 16);
		memcpy(destination, asked->ipv6_dst, 16);
		return;
	}
	memset(source + 10, 0xff, 2);
	memset(destination + 10, 0xff, 2);
	memcpy(source + 12, &asked->ipv4_src, 4);
	memcpy(destination + 12, &asked->ipv4_dst, 4);
}

long bpf_fib_lookup(void *context, struct bpf_fib_lookup *asked, int size, __u32 flags)
{
	__u8 source[16], destination[16];
	int is_ip6 = asked->family == INET6;
	struct hop hop;

	if (locks_held() || !context || size != sizeof(*asked) || (asked->family != INET && !is_ip6))
		abort();
	if (flags & ~(node.is_old ? 0 : LOOKUP_SRC | LOOKUP_MARK))
		return -EINVAL;
	if (asked->ifindex < UPLINK || asked->ifindex > VETH)
		return -ENODEV;
	asked_addresses(asked, source, destination);
	if (is_ip6 && (is_strict(source) || is_strict(destination)))
		return BPF_FIB_LKUP_RET_NOT_FWDED;
	if (!node.forwarding)
		return BPF_FIB_LKUP_RET_FWD_DISABLED;
	hop = route_of(destination);
	if (hop.way != WAY_FOUND)
		return hop.way == WAY_HERE ? BPF_FIB_LKUP_RET_NOT_FWDED : hop.refusal;
	if (asked->tot_len > hop.mtu) {
		asked->mtu_result = hop.mtu;
		return BPF_FIB_LKUP_RET_FRAG_NEEDED;
	}
	asked->ifindex = hop.interface;
	if (is_ip6)
		memcpy(asked->ipv6_dst, hop.next, 16);
	else
		memcpy(&asked->ipv4_dst, hop.next + 12, 4);
	if ((flags & LOOKUP_SRC) && is_ip6)
		memcpy(asked->ipv6_src, hop.source, 16);
	else if (flags & LOOKUP_SRC)
		memcpy(&asked->ipv4_src, hop.source + 12, 4);
	if (!hop.known)
		return BPF_FIB_LKUP_RET_NO_NEIGH;
	memset(asked->smac, 2, sizeof(asked->smac));
	memset(asked->dmac, 2, sizeof(asked->dmac));
	asked->h_vlan_proto = asked->h_vlan_TCI = 0;
	asked->mtu_result = hop.mtu;
	return BPF_FIB_LKUP_RET_SUCCESS;
}

long bpf_redirect(__u32 interface, __u64 flags)
{
	if (flags & ~1ULL)
		return TC_ACT_SHOT;
	current_effects->redirect = interface;
	current_effects->redirect_is_neigh = 0;
	return TC_ACT_REDIRECT;
}

long bpf_redirect_neigh(__u32 interface, struct bpf_redir_neigh *next, int size, __u64 flags)
{
	if (flags || (size && size < (int)sizeof(*next)) || (!!next != !!size))
		return TC_ACT_SHOT;
	current_effects->redirect = interface;
	current_effects->redirect_is_neigh = 1;
	memset(&current_effects->next, 0, sizeof(current_effects->next));
	if (next)
		current_effects->next = *next;
	return TC_ACT_REDIRECT;
}

/* A connected socket of exactly these ends, or one that is bound to the local end. */
static struct bpf_sock *find_socket(const struct bpf_sock_tuple *tuple, __u32 size, __u8 protocol)
{
	static struct bpf_sock found;
	struct pair asked = {.protocol = protocol};

	if (size == sizeof(tuple->ipv4)) {
		memset(asked.from.address + 10, 0xff, 2);
		memset(asked.to.address + 10, 0xff, 2);
		memcpy(asked.from.address + 12, &tuple->ipv4.saddr, 4);
		memcpy(asked.to.address + 12, &tuple->ipv4.daddr, 4);
		asked.from.port = tuple->ipv4.sport;
		asked.to.port = tuple->ipv4.dport;
	} else {
		memcpy(asked.from.address, tuple->ipv6.saddr, 16);
		memcpy(asked.to.address, tuple->ipv6.daddr, 16);
		asked.from.port = tuple->ipv6.sport;
		asked.to.port = tuple->ipv6.dport;
	}
	for (int i = 0; i < known_socket_count; i++) {
		const struct known_socket *socket = &known_sockets[i];

		if (socket->protocol != protocol || socket->local_port != asked.to.port ||
		    memcmp(socket->local, asked.to.address, 16))
			continue;
		if (socket->connected &&
		    (socket->remote_port != asked.from.port || memcmp(socket->remote, asked.from.address, 16)))
			continue;
		found = (struct bpf_sock){.state = socket->connected ? 1 : 10};
		found.dst_port = socket->connected ? socket->remote_port : 0;
		held++;
		return &found;
	}
	return NULL;
}

struct bpf_sock *bpf_skc_lookup_tcp(void *context, struct bpf_sock_tuple *tuple, __u32 size, __u64 netns, __u64 flags)
{
	return context && netns && !flags ? find_socket(tuple, size, PROTO_TCP) : NULL;
}

struct bpf_sock *bpf_sk_lookup_udp(void *context, struct bpf_sock_tuple *tuple, __u32 size, __u64 netns, __u64 flags)
{
	return context && netns && !flags ? find_socket(tuple, size, PROTO_UDP) : NULL;
}

long bpf_sk_release(void *sk)
{
	if (!sk || !held)
		abort();
	held--;
	return 0;
}

int sockets_held(void)
{
	return held;
}

__u64 bpf_ktime_get_ns(void)
{
	return node.now_ns;
}

/* Ticks of 4 ms. */
__u64 bpf_jiffies64(void)
{
	return 4294667296ULL + node.now_ns / 4000000;
}

__u32 bpf_get_prandom_u32(void)
{
	node.random ^= node.random >> 12;
	node.random ^= node.random << 25;
	node.random ^= node.random >> 27;
	return (node.random * 0x2545f4914f6cdd1dULL) >> 32;
}

__u32 bpf_get_smp_processor_id(void)
{
	return 0;
}
