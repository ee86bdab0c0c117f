/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What a Service's clients and backends send each other, for those who want to know (config.counts_traffic): packets of
 * flows as they pass; of translated TCP sockets how long connecting took, and what they have sent and received, once they
 * are closed. Changes nothing.
 *
 * Cost of a flow's packet: an array look-up and a hash look-up; of a reply one hash look-up more, of its partner. Of a
 * socket: one call for each change of its TCP state. The programs that do not count have none of this.
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

/* The row of the Service that has this backend; NULL: the backend's id is another one's by now. */
static __always_inline struct service_traffic *traffic_of(__u32 backend_id, __u32 generation)
{
	struct backend *backend = backend_get(backend_id);
	struct service_traffic *row;
	__u32 service_id;

	if (!backend || backend->generation != generation)
		return (void *)0;
	service_id = backend->service_id;
	row = bpf_map_lookup_elem(&service_traffic, &service_id);
	if (row)
		return row;
	/* Another processor may be faster. */
	bpf_map_update_elem(&service_traffic, &service_id, &no_traffic, BPF_NOEXIST);
	return bpf_map_lookup_elem(&service_traffic, &service_id);
}

/* The scratch's packet belongs to the flow that scratch.flow is a copy of. Global, so that it is verified once. */
__noinline int traffic_packet(hook_context *ctx)
{
	struct scratch *given = scratch();
	const struct flow *request;
	struct service_traffic *row;
	__u32 is_reply;

	if (!given || !ctx)
		return 0;
	request = &given->flow;
	is_reply = given->flow.state & FLOW_REPLY;
	if (is_reply) {
		flow_key_reverse(&given->reply, &given->flow.ends, given->packet.tuple.protocol);
		request = flow_find(&given->reply);
	}
	row = request ? traffic_of(request->backend_or_first, request->generation_or_interface) : (void *)0;
	if (!row)
		return 0;
	row->amounts[is_reply ? AMOUNT_REPLY_PACKETS : AMOUNT_REQUEST_PACKETS] += hook_packets(ctx);
	row->amounts[is_reply ? AMOUNT_REPLY_BYTES : AMOUNT_REQUEST_BYTES] += hook_length(ctx) - given->packet.l3;
	return 0;
}

/* A socket connects; its record says whether it was translated. */
static __always_inline void traffic_connecting(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	const struct origin *origin = bpf_sk_storage_get(&socket_origins, sk, (void *)0, 0);
	struct socket_traffic *state;

	if (!origin)
		return;
	state = bpf_sk_storage_get(&socket_traffic, sk, (void *)0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!state) {
		count_often(COUNTER_FAILED_STORAGE);
		return;
	}
	state->backend_id = origin->backend_id;
	state->generation = origin->generation;
	state->is_connected = 0;
	state->since_ns = bpf_ktime_get_ns();
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
}

static __always_inline void traffic_connected(struct bpf_sock *sk)
{
	struct socket_traffic *state = bpf_sk_storage_get(&socket_traffic, sk, (void *)0, 0);
	__u64 taken = bpf_ktime_get_ns();
	struct service_traffic *row;
	__u32 bucket = 0;

	if (!state || state->is_connected)
		return;
	state->is_connected = 1;
	taken -= state->since_ns;
	row = traffic_of(state->backend_id, state->generation);
	if (!row)
		return;
	row->amounts[AMOUNT_CONNECT_NS] += taken;
#pragma unroll
	for (__u32 i = 0; i < CONNECT_LIMITS; i++)
		bucket += taken > connect_limits[i];
	if (bucket <= CONNECT_LIMITS)
		row->amounts[AMOUNT_CONNECTED + bucket] += 1;
}

/* (The sequence numbers of SYN and FIN count as bytes.) */
static __always_inline void traffic_closed(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	const struct socket_traffic *state = bpf_sk_storage_get(&socket_traffic, sk, (void *)0, 0);
	struct service_traffic *row;

	if (!state)
		return;
	row = traffic_of(state->backend_id, state->generation);
	if (row && !state->is_connected) {
		row->amounts[AMOUNT_CONNECT_FAILED] += 1;
	} else if (row) {
		row->amounts[AMOUNT_SOCKET_SENT] += ctx->bytes_acked;
		row->amounts[AMOUNT_SOCKET_RECEIVED] += ctx->bytes_received;
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
		traffic_connected(sk);
	else if (ctx->op == BPF_SOCK_OPS_STATE_CB && ctx->args[1] == BPF_TCP_CLOSE)
		traffic_closed(ctx, sk);
}

#endif
