/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What a Service's clients and backends send each other, for those who want to know (config.counts_traffic): packets of
 * flows as they come; of translated TCP sockets how long connecting took, and what they have sent and received, once they
 * are closed. Changes nothing.
 *
 * Cost of a flow's packet: an array look-up and a hash look-up; of a reply one hash look-up more, of its partner. The
 * kernel calls the program of sockets some five times in the life of each TCP socket of the cgroup, which looks at a number,
 * and for those that were translated once more when they close.
 */
#ifndef KUBELANE_TRAFFIC_H
#define KUBELANE_TRAFFIC_H

const struct service_traffic no_traffic = {}; /* too large for some stacks */

/* Upper limits in nanoseconds: 0.1 and 0.5 ms, and so on to 5 s. (A SYN that is lost is sent again after 1 s.) */
enum connect_limit_count {
	CONNECT_LIMITS = AMOUNT_MAX - AMOUNT_CONNECTED - 1,
};

const __u64 connect_limits[CONNECT_LIMITS] = {
	100000, 500000, 1000000, 5000000, 10000000, 50000000, 100000000, 500000000, 1000000000, 5000000000,
};

static __always_inline struct service_traffic *traffic_of(__u32 service_id)
{
	struct service_traffic *row = bpf_map_lookup_elem(&service_traffic, &service_id);

	if (row)
		return row;
	/* Another processor may be faster. */
	bpf_map_update_elem(&service_traffic, &service_id, &no_traffic, BPF_NOEXIST);
	return bpf_map_lookup_elem(&service_traffic, &service_id);
}

/* The scratch's packet belongs to the flow that scratch.flow is a copy of. Counts while the flow's backend is there: the
 * id of one that has gone, and of its Service, may be another's. Global, so that it is verified once. */
__noinline int traffic_packet(hook_context *ctx)
{
	struct scratch *given = scratch();
	struct service_traffic *row;
	const struct backend *backend;
	const struct flow *request;
	__u32 is_reply;

	if (!given || !ctx)
		return 0;
	request = &given->flow;
	is_reply = given->flow.state & FLOW_REPLY;
	if (is_reply) {
		flow_key_reverse(&given->reply, &given->flow.ends, given->packet.tuple.protocol);
		request = flow_find(&given->reply);
	}
	if (!request)
		return 0;
	backend = backend_get_living(request->backend_or_first, request->generation_or_interface);
	row = backend ? traffic_of(backend->service_id) : (void *)0;
	if (!row)
		return 0;
	row->amounts[is_reply ? AMOUNT_REPLY_PACKETS : AMOUNT_REQUEST_PACKETS] +=
		hook_packets(ctx, given->packet.l4, given->packet.tuple.protocol);
	row->amounts[is_reply ? AMOUNT_REPLY_BYTES : AMOUNT_REQUEST_BYTES] += hook_length(ctx) - given->packet.l3;
	return 0;
}

/* When the Service's traffic was first measured; 0: that cannot be known. */
static __always_inline __u64 traffic_birth(__u32 service_id)
{
	__u64 *known = bpf_map_lookup_elem(&service_births, &service_id), now = bpf_ktime_get_ns();

	if (known)
		return *known;
	bpf_map_update_elem(&service_births, &service_id, &now, BPF_NOEXIST);
	known = bpf_map_lookup_elem(&service_births, &service_id);
	return known ? *known : 0;
}

/* A socket connects; its record says whether it was translated. */
static __always_inline void traffic_connecting(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	const struct origin *origin = bpf_sk_storage_get(&socket_origins, sk, (void *)0, 0);
	struct socket_traffic *state;

	if (!origin)
		return;
	state = bpf_sk_storage_get(&socket_traffic, sk, (void *)0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!state)
		return;
	state->service_id = origin->service_id;
	state->service_birth = traffic_birth(origin->service_id);
	state->is_connected = 0;
	state->since_ns = bpf_ktime_get_ns();
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
}

/* The row of the Service that the socket was connected to, if it still is there. */
static __always_inline struct service_traffic *traffic_of_socket(const struct socket_traffic *state)
{
	__u32 service_id = state->service_id;
	const __u64 *birth = bpf_map_lookup_elem(&service_births, &service_id);

	return birth && *birth == state->service_birth ? traffic_of(service_id) : (void *)0;
}

/* Calls for sockets come from processes and from softirqs, which interrupt them. */
static __always_inline void traffic_add(struct service_traffic *row, __u32 index, __u64 amount)
{
	if (index < AMOUNT_MAX)
		__sync_fetch_and_add(&row->amounts[index], amount);
}

static __always_inline void traffic_connected(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	struct socket_traffic *state = bpf_sk_storage_get(&socket_traffic, sk, (void *)0, 0);
	__u64 taken = bpf_ktime_get_ns();
	struct service_traffic *row;
	__u32 bucket = 0;

	if (!state || state->is_connected)
		return;
	state->is_connected = 1;
	/* Somebody else's program may have set flags of its own, and no others, meanwhile. */
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
	taken -= state->since_ns;
	row = traffic_of_socket(state);
	if (!row)
		return;
	traffic_add(row, AMOUNT_CONNECT_NS, taken);
#pragma unroll
	for (__u32 i = 0; i < CONNECT_LIMITS; i++)
		bucket += taken > connect_limits[i];
	traffic_add(row, AMOUNT_CONNECTED + bucket, 1);
}

/* (The sequence numbers of SYN and FIN count as bytes.) */
static __always_inline void traffic_closed(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	const struct socket_traffic *state = bpf_sk_storage_get(&socket_traffic, sk, (void *)0, 0);
	struct service_traffic *row;

	if (!state)
		return;
	row = traffic_of_socket(state);
	if (row && !state->is_connected) {
		traffic_add(row, AMOUNT_CONNECT_FAILED, 1);
	} else if (row) {
		traffic_add(row, AMOUNT_SOCKET_SENT, ctx->bytes_acked);
		traffic_add(row, AMOUNT_SOCKET_RECEIVED, ctx->bytes_received);
	}
	bpf_sk_storage_delete(&socket_traffic, sk);
}

/* What TCP says of a socket. Other programs' answers are left as they are. */
static __always_inline void traffic_socket(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;

	if (!sk)
		return;
	if (ctx->op == BPF_SOCK_OPS_TCP_CONNECT_CB)
		traffic_connecting(ctx, sk);
	else if (ctx->op == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB)
		traffic_connected(ctx, sk);
	else if (ctx->op == BPF_SOCK_OPS_STATE_CB && ctx->args[1] == BPF_TCP_CLOSE)
		traffic_closed(ctx, sk);
}

#endif
