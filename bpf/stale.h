/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Finding the connected sockets whose backend is gone, or whose destination became another Service's. One iterator
 * walks the sockets that have an origin, in every network namespace, and those only. Where a kernel refuses it, two
 * others walk all sockets of one namespace and of UDP or TCP, and the daemon asks them in each namespace. A third kind is
 * connected to a Service that was not served yet. The daemon connects what they print anew, or destroys it
 * (src/bpf/stale.rs).
 *
 * Kernel structs are declared with the few members that are read; libbpf moves the offsets to the running kernel's.
 */
#ifndef KUBELANE_STALE_H
#define KUBELANE_STALE_H

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct seq_file;
struct bpf_map;

struct bpf_iter_meta {
	struct seq_file *seq;
};

struct ns_common {
	unsigned int inum;
};

struct net {
	struct ns_common ns;
};

typedef struct {
	struct net *net;
} possible_net_t;

/* Of struct sock_common: its members inside anonymous unions are found by name. */
struct sock_common {
	__be32 skc_daddr;
	__be32 skc_rcv_saddr;
	__be16 skc_dport;
	__u16 skc_num;
	unsigned short skc_family;
	int skc_bound_dev_if;
	possible_net_t skc_net;
	struct in6_addr skc_v6_daddr;
	struct in6_addr skc_v6_rcv_saddr;
};

struct sock {
	struct sock_common __sk_common;
	__u16 sk_protocol;
};

struct udp_sock;
struct tcp_sock;

struct bpf_iter__bpf_sk_storage_map {
	struct bpf_iter_meta *meta;
	struct bpf_map *map;
	struct sock *sk;
	void *value;
};

struct bpf_iter__udp {
	struct bpf_iter_meta *meta;
	struct udp_sock *udp_sk;
};

struct bpf_iter__tcp {
	struct bpf_iter_meta *meta;
	struct sock_common *sk_common;
};

#pragma clang attribute pop

static __always_inline void address_set_ip6(struct address *address, const struct in6_addr *ip6)
{
	struct address_words *words = address_words(address);

	words->word[0] = ip6->in6_u.u6_addr32[0];
	words->word[1] = ip6->in6_u.u6_addr32[1];
	words->word[2] = ip6->in6_u.u6_addr32[2];
	words->word[3] = ip6->in6_u.u6_addr32[3];
}

/* A datagram socket's destination is another Service's by now: its datagrams pass no hook that would notice. (A TCP
 * connection is one flow to one pod, and runs on.) */
static __always_inline int origin_has_moved(const struct origin *origin)
{
	struct frontend_key key = {.address = origin->service_address, .port = origin->service_port};

	key.protocol = request_protocol(origin->protocol);
	return key.protocol == IPPROTO_UDP && frontend_has_moved(&key, 1, origin->service_id);
}

static __always_inline void stale_fill(struct stale_socket *stale, struct sock *sk)
{
	stale->family = sk->__sk_common.skc_family;
	if (stale->family == FAMILY_INET) {
		address_set_ip4(&stale->source_address, sk->__sk_common.skc_rcv_saddr);
		address_set_ip4(&stale->backend_address, sk->__sk_common.skc_daddr);
	} else {
		address_set_ip6(&stale->source_address, &sk->__sk_common.skc_v6_rcv_saddr);
		address_set_ip6(&stale->backend_address, &sk->__sk_common.skc_v6_daddr);
	}
	stale->source_port = bpf_htons(sk->__sk_common.skc_num);
	stale->backend_port = sk->__sk_common.skc_dport;
	stale->netns_inum = sk->__sk_common.skc_net.net->ns.inum;
	stale->interface = sk->__sk_common.skc_bound_dev_if;
}

static __always_inline void print_stale_socket(struct seq_file *seq, struct sock *sk, const struct origin *origin)
{
	struct stale_socket stale = {};

	if (!sk || !origin)
		return;
	if (backend_get_living(origin->backend_id, origin->generation) && !origin_has_moved(origin))
		return;
	stale_fill(&stale, sk);
	/* Disconnected since, or connected to something else. */
	if (!origin_is_of_backend(origin, &stale.backend_address, stale.backend_port))
		return;
	stale.protocol = origin->protocol;
	stale.service_address = origin->service_address;
	stale.service_port = origin->service_port;
	bpf_seq_write(seq, &stale, sizeof(stale));
}

/*
 * A UDP socket that is connected to a Service's own address, because nobody served that when it connected: its datagrams
 * pass no hook that would translate them, and no pod's device does it either.
 */
static __always_inline void print_unserved_socket(struct seq_file *seq, struct sock *sk)
{
	struct stale_socket stale = {};
	struct frontend_key key = {.protocol = IPPROTO_UDP};
	struct frontend *frontend;
	struct flow_key by_packets = {.protocol = IPPROTO_UDP};

	if (!sk || !sk->__sk_common.skc_dport)
		return;
	stale_fill(&stale, sk);
	key.address = stale.backend_address;
	key.port = stale.backend_port;
	frontend = map_find(&frontends, &key);
	if (!frontend || !frontend->inside.count || (frontend->flags & FRONTEND_SOURCE_RANGES))
		return;
	by_packets.ends.source = stale.source_address;
	by_packets.ends.source_port = stale.source_port;
	by_packets.ends.destination = stale.backend_address;
	by_packets.ends.destination_port = stale.backend_port;
	if (flow_find(&by_packets))
		return;
	stale.protocol = IPPROTO_UDP;
	stale.service_address = stale.backend_address;
	stale.service_port = stale.backend_port;
	bpf_seq_write(seq, &stale, sizeof(stale));
}

#endif
