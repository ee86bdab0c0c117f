// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * kubelane's one BPF object, as a table of contents: every program that the kernel calls is here, one screen each,
 * and does three things: bring the hook's context into the common form, call the step that decides, write the
 * decision back. The steps are in the headers, in the order in which a destination passes through them:
 *
 *   abi.h        the rows of the maps, shared with the daemon
 *   observe.h    what those are told who listen
 *   maps.h       the maps
 *   config.h     what is fixed before the object is loaded
 *   count.h      counters: every refusal and drop has one
 *   address.h    128-bit addresses
 *   frontend.h   destination -> frontend: is it a Service, and which?
 *   backend.h    backends, and records of them
 *   pick.h       pool -> backend: a number chooses the slot
 *   affinity.h   the backend that a client had before
 *   origin.h     connected sockets: what was asked for, which backend it got
 *   datagram.h   unconnected sockets: the same, for each destination
 *   tell.h       telling those who listen, of system calls
 *   socket.h     the verdict on connect() and sendmsg(), the reverse for recvmsg() and getpeername()
 *   stale.h      the iterators that find connected sockets that go where they should not any more
 *
 * and, for packets from and to the wire, which share abi.h to affinity.h with them:
 *
 *   verdict.h    what becomes of a packet
 *   hook.h       what the kernel lends a packet program: the only place that knows its context
 *   packet.h     bytes -> what has to be known of a packet
 *   scratch.h    what the rare steps work on
 *   tell_packet.h  the same, of packets
 *   checksum.h   checksums, changed in place
 *   rewrite.h    new ends for a packet
 *   flow.h       the table of flows: states, proof, both directions
 *   flow_end.h   why a flow goes, and how
 *   traffic.h    what a Service's clients and backends send each other, of sockets, too
 *   snat.h       which ends a backend sees
 *   route.h      where a packet goes next
 *   icmp.h       errors that are answered with here
 *   stack.h      handing a packet to the host's stack instead
 *   deliver.h    sending on a packet, or an error, of a known flow
 *   owner.h      is the packet a connection's of this node?
 *   service.h    a packet of no flow: what it asks for, and whether it may have it
 *   begin.h      the flow that it begins
 *   probe.h      a packet of no Service that is a load balancer's health probe
 *   wire.h       the verdict on a packet
 *
 * The families differ in the entry points below, packet.h and rewrite.h (IPv4 is v4-mapped everywhere else).
 */
#include <linux/bpf.h>
#include <linux/errno.h>
#include <linux/if_packet.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>

#include "abi.h"
#include "observe.h"
#include "maps.h"
#include "config.h"
#include "count.h"
#include "address.h"
#include "frontend.h"
#include "backend.h"
#include "pick.h"
#include "affinity.h"
#include "origin.h"
#include "datagram.h"
#include "tell.h"
#include "socket.h"
#include "verdict.h"
#include "hook.h"
#include "packet.h"
#include "scratch.h"
#include "tell_packet.h"
#include "checksum.h"
#include "rewrite.h"
#include "flow.h"
#include "flow_end.h"
#include "traffic.h"
#include "snat.h"
#include "route.h"
#include "icmp.h"
#include "stack.h"
#include "deliver.h"
#include "owner.h"
#include "service.h"
#include "begin.h"
#include "probe.h"
#include "wire.h"
#include "stale.h"
#include "former.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* A cgroup program's answer: 0 fails the system call, 1 lets it go on. */
enum answer {
	ANSWER_FAIL = 0,
	ANSWER_GO_ON = 1,
};

/* connect(2) on TCP, MPTCP, UDP and UDP-Lite: translated once, nothing to do for the packets. */
SEC("cgroup/connect4")
int connect4(struct bpf_sock_addr *ctx)
{
	struct request request = {};

	request_from_ip4(&request, ctx);
	if (!socket_connect(ctx, &request))
		return ANSWER_FAIL;
	if (request.translated)
		request_to_ip4(&request, ctx);
	return ANSWER_GO_ON;
}

SEC("cgroup/connect6")
int connect6(struct bpf_sock_addr *ctx)
{
	struct request request = {};

	request_from_ip6(&request, ctx);
	if (!socket_connect(ctx, &request))
		return ANSWER_FAIL;
	if (request.translated)
		request_to_ip6(&request, ctx);
	return ANSWER_GO_ON;
}

/* sendto(2), sendmsg(2) with an address, on UDP and UDP-Lite. */
SEC("cgroup/sendmsg4")
int sendmsg4(struct bpf_sock_addr *ctx)
{
	struct request request = {};

	request_from_ip4(&request, ctx);
	if (!socket_send(ctx, &request))
		return ANSWER_FAIL;
	if (request.translated)
		request_to_ip4(&request, ctx);
	return ANSWER_GO_ON;
}

SEC("cgroup/sendmsg6")
int sendmsg6(struct bpf_sock_addr *ctx)
{
	struct request request = {};

	request_from_ip6(&request, ctx);
	if (!socket_send(ctx, &request))
		return ANSWER_FAIL;
	if (request.translated)
		request_to_ip6(&request, ctx);
	return ANSWER_GO_ON;
}

/* recvfrom(2), recvmsg(2) with room for an address: a backend's reply shows the service that was asked. */
SEC("cgroup/recvmsg4")
int recvmsg4(struct bpf_sock_addr *ctx)
{
	struct request request = {};

	request_from_ip4(&request, ctx);
	socket_receive(ctx, &request);
	if (request.translated)
		request_to_ip4(&request, ctx);
	return ANSWER_GO_ON;
}

SEC("cgroup/recvmsg6")
int recvmsg6(struct bpf_sock_addr *ctx)
{
	struct request request = {};

	request_from_ip6(&request, ctx);
	socket_receive(ctx, &request);
	if (request.translated)
		request_to_ip6(&request, ctx);
	return ANSWER_GO_ON;
}

/* getpeername(2) (5.8): the application sees the address it asked for. */
SEC("cgroup/getpeername4")
int getpeername4(struct bpf_sock_addr *ctx)
{
	struct request request = {};

	request_from_ip4(&request, ctx);
	socket_peer_name(ctx, &request);
	if (request.translated)
		request_to_ip4(&request, ctx);
	return ANSWER_GO_ON;
}

SEC("cgroup/getpeername6")
int getpeername6(struct bpf_sock_addr *ctx)
{
	struct request request = {};

	request_from_ip6(&request, ctx);
	socket_peer_name(ctx, &request);
	if (request.translated)
		request_to_ip6(&request, ctx);
	return ANSWER_GO_ON;
}

/* TCP's changes of state (5.7 for its link). On the cgroup while traffic is counted, else nowhere. */
SEC("sockops")
int tcp_states(struct bpf_sock_ops *ctx)
{
	traffic_socket(ctx);
	return 1;
}

/* Read by the daemon after a backend has gone or a frontend has changed owner: prints a struct stale_socket for each
 * socket that is still connected the old way. */
SEC("iter/bpf_sk_storage_map")
int find_stale_sockets(struct bpf_iter__bpf_sk_storage_map *ctx)
{
	print_stale_socket(ctx->meta->seq, ctx->sk, ctx->value);
	return 0;
}

/* Read once, by a daemon that takes over from map ABI v2: over that version's datagram_tables. */
SEC("iter/bpf_sk_storage_map")
int carry_datagrams(struct bpf_iter__bpf_sk_storage_map *ctx)
{
	struct former_datagram_table *from = ctx->value;

	if (ctx->sk && from)
		carry_datagram_table(ctx->sk, from);
	return 0;
}

/* The same of one network namespace, for kernels that refuse the iterator over a map. */
SEC("iter/udp")
int carry_datagrams_udp(struct bpf_iter__udp *ctx)
{
	struct sock *sk = (void *)ctx->udp_sk;
	struct former_datagram_table *from = (void *)0;

	if (sk)
		from = bpf_sk_storage_get(&datagram_tables_v2, sk, (void *)0, 0);
	if (from)
		carry_datagram_table(sk, from);
	return 0;
}

/* The same as find_stale_sockets, of one network namespace, for kernels that refuse the iterator over a map. */
SEC("iter/udp")
int find_stale_udp(struct bpf_iter__udp *ctx)
{
	struct sock *sk = (void *)ctx->udp_sk;

	if (sk)
		print_stale_socket(ctx->meta->seq, sk, bpf_sk_storage_get(&socket_origins, sk, (void *)0, 0));
	return 0;
}

/* Connected before somebody served its destination: UDP sockets of one network namespace. */
SEC("iter/udp")
int find_unserved_udp(struct bpf_iter__udp *ctx)
{
	struct sock *sk = (void *)ctx->udp_sk;

	print_unserved_socket(ctx->meta->seq, sk);
	return 0;
}

SEC("iter/tcp")
int find_stale_tcp(struct bpf_iter__tcp *ctx)
{
	struct sock_common *any = ctx->sk_common;
	/* What waits in SYN_RECV or TIME_WAIT is no whole socket. */
	struct tcp_sock *whole = any ? bpf_skc_to_tcp_sock(any) : (void *)0;

	if (whole)
		print_stale_socket(ctx->meta->seq, (void *)whole,
				   bpf_sk_storage_get(&socket_origins, whole, (void *)0, 0));
	return 0;
}

enum link_layer {
	LINK_ETHERNET = 14, /* bytes before the IP header */
	LINK_NONE = 0, /* tunnels whose packets begin with it: IPIP, SIT, WireGuard, tun */
};

/*
 * Run by the daemon, on no device: removes those of the flows whose keys are given that have ended. The "packet" has
 * COLLECT_HEAD bytes that mean nothing, then COLLECT_KEYS keys of requests' rows, or of replies' rows without a partner;
 * protocol 0 for none. Answers how many rows went.
 */
SEC("tc")
int flow_collect(hook_context *ctx)
{
	struct scratch *given = scratch();
	int removed = 0;

	if (!given)
		return 0;
	for (__u32 i = 0; i < COLLECT_KEYS; i++) {
		if (hook_load(ctx, COLLECT_HEAD + i * sizeof(struct flow_key), &given->removed, sizeof(given->removed)))
			break;
		if (given->removed.protocol)
			removed += flow_remove(ctx, REMOVE_OVER);
	}
	return removed;
}

/* Outward devices, what comes in. */
SEC("tc")
int wire_in_ethernet(hook_context *ctx)
{
	return wire_ingress(ctx, LINK_ETHERNET);
}

SEC("tc")
int wire_in_bare(hook_context *ctx)
{
	return wire_ingress(ctx, LINK_NONE);
}

/* Pods' devices, what comes in from the pod. What leaves for it may be a backend's reply, as on outward devices. */
SEC("tc")
int pod_in_ethernet(hook_context *ctx)
{
	return pod_ingress(ctx, LINK_ETHERNET);
}

/* Outward devices, and Ethernet ones of pods: what leaves. */
SEC("tc")
int wire_out_ethernet(hook_context *ctx)
{
	return wire_egress(ctx, LINK_ETHERNET);
}

SEC("tc")
int wire_out_bare(hook_context *ctx)
{
	return wire_egress(ctx, LINK_NONE);
}
