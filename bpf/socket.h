/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The socket hooks' decisions, free of families: a request comes in as a destination and leaves, if translated, with
 * another one.
 *
 * Cost of connect() to a Service: two hash look-ups, three array look-ups, one socket storage; to anything else: one
 * array look-up, and the socket's storage, which is NULL.
 */
#ifndef KUBELANE_SOCKET_H
#define KUBELANE_SOCKET_H

struct request {
	struct frontend_key target; /* destination of connect and send, source of receive, peer of getpeername */
	__u32 translated; /* 1: target was replaced */
};

static __always_inline void request_from_ip4(struct request *request, struct bpf_sock_addr *ctx)
{
	address_set_ip4(&request->target.address, ctx->user_ip4);
	request->target.port = (__be16)ctx->user_port;
	request->target.protocol = request_protocol(ctx->protocol);
}

static __always_inline void request_from_ip6(struct request *request, struct bpf_sock_addr *ctx)
{
	struct address_words *words = address_words(&request->target.address);

	words->word[0] = ctx->user_ip6[0];
	words->word[1] = ctx->user_ip6[1];
	words->word[2] = ctx->user_ip6[2];
	words->word[3] = ctx->user_ip6[3];
	request->target.port = (__be16)ctx->user_port;
	request->target.protocol = request_protocol(ctx->protocol);
}

static __always_inline void request_to_ip4(const struct request *request, struct bpf_sock_addr *ctx)
{
	ctx->user_ip4 = address_words(&request->target.address)->word[3];
	ctx->user_port = request->target.port;
}

static __always_inline void request_to_ip6(const struct request *request, struct bpf_sock_addr *ctx)
{
	const struct address_words *words = address_words(&request->target.address);

	ctx->user_ip6[0] = words->word[0];
	ctx->user_ip6[1] = words->word[1];
	ctx->user_ip6[2] = words->word[2];
	ctx->user_ip6[3] = words->word[3];
	ctx->user_port = request->target.port;
}

static __always_inline void request_go_to_backend(struct request *request, const struct origin *origin)
{
	request->target.address = origin->backend_address;
	request->target.port = origin->backend_port;
	request->translated = 1;
}

static __always_inline void request_show_service(struct request *request, const struct origin *origin)
{
	request->target.address = origin->service_address;
	request->target.port = origin->service_port;
	request->translated = 1;
}

/* Fails the system call with `error` where the kernel lets a program choose (5.18), else with EPERM. */
static __always_inline int fail_with(int error)
{
	if (config.has_set_retval)
		bpf_set_retval(-error);
	return 0;
}

/*
 * An empty pool. Refused is ECONNREFUSED, as an ICMP port unreachable would show. Dropped (traffic policy Local, none
 * here) must not be refused: a TCP client sees at once the ETIMEDOUT that a dropped SYN would end in, a datagram the
 * EPERM that a drop in the host's own output chain gives.
 */
static __always_inline int fail_empty(struct bpf_sock_addr *ctx, const struct frontend_key *asked,
				      const struct pool *pool, __u8 protocol)
{
	if (pool->on_empty == EMPTY_DROP) {
		socket_event(ctx, asked, COUNTER_DROPPED_NO_LOCAL_ENDPOINT, 0, CHOSEN_NONE);
		return protocol == IPPROTO_TCP ? fail_with(ETIMEDOUT) : 0;
	}
	socket_event(ctx, asked, COUNTER_REFUSED_NO_ENDPOINT, 0, CHOSEN_NONE);
	return fail_with(ECONNREFUSED);
}

/* `key` becomes that of the frontend which is found. */
static __always_inline struct lookup request_lookup(struct bpf_sock_addr *ctx, struct frontend_key *key)
{
	int loopback = 0;

	if (!key->protocol || !frontend_may_exist(key) || (config.host_sockets_only && !in_host_namespace(ctx)))
		return (struct lookup){};
	if (address_is_loopback(&key->address))
		loopback = in_host_namespace(ctx);
	return frontend_lookup(key, loopback);
}

/*
 * A socket that is bound to loopback asks a NodePort there. The kernel lets nothing leave the node with such a source,
 * and nothing comes back to it:
 *
 * - connect() of a socket that has no port yet (IP_BIND_ADDRESS_NO_PORT): bpf_bind() to the wildcard frees it, and the
 *   kernel chooses the source as for a socket that is not bound.
 * - Once it has a port, bpf_bind() fails (EINVAL, like a second bind()). sendmsg programs could change the datagram's
 *   source (msg_src_ip4), but the reply to that would find no socket. So TCP gets one of the node's own backends, which
 *   loopback reaches, if the Service has one. All else gets EADDRNOTAVAIL: UDP as well, because a server on the
 *   wildcard would answer 127.0.0.1 from 127.0.0.1, and not from the address that it was asked at.
 *
 * (bpf_bind() and these rules of routing are older than 5.10.)
 */
enum binding {
	BINDING_FREE = 0,
	BINDING_LOOPBACK = 1,
};

static __always_inline enum binding request_binding(struct bpf_sock *sk, const struct frontend_key *target)
{
	struct address source = {};
	__be32 ip4;

	if (!address_is_loopback(&target->address))
		return BINDING_FREE;
	if (sk->family == FAMILY_INET) {
		ip4 = sk->src_ip4;
		barrier_var(ip4);
		address_set_ip4(&source, ip4);
	} else {
		address_words(&source)->word[0] = sk->src_ip6[0];
		address_words(&source)->word[1] = sk->src_ip6[1];
		address_words(&source)->word[2] = sk->src_ip6[2];
		address_words(&source)->word[3] = sk->src_ip6[3];
	}
	/* The wildcards have a last word of 0, and are no binding. */
	return address_words(&source)->word[3] && address_is_loopback(&source) ? BINDING_LOOPBACK : BINDING_FREE;
}

/* In connect programs only: the helper is theirs. */
static __always_inline enum binding request_unbind(struct bpf_sock_addr *ctx, struct bpf_sock *sk)
{
	struct sockaddr_in6 any = {.sin6_family = FAMILY_INET6};
	struct sockaddr_in any4 = {.sin_family = FAMILY_INET};
	long error;

	if (sk->src_port)
		return BINDING_LOOPBACK;
	if (sk->family == FAMILY_INET)
		error = bpf_bind(ctx, (void *)&any4, sizeof(any4));
	else
		error = bpf_bind(ctx, (void *)&any, sizeof(any));
	return error ? BINDING_LOOPBACK : BINDING_FREE;
}

/* A cluster IP's port that no Service has. */
static __always_inline int fail_unknown_port(struct bpf_sock_addr *ctx, const struct frontend_key *asked)
{
	socket_event(ctx, asked, COUNTER_REFUSED_UNKNOWN_PORT, 0, CHOSEN_NONE);
	return fail_with(ECONNREFUSED);
}

static __always_inline int fail_loopback_source(struct bpf_sock_addr *ctx, const struct frontend_key *asked)
{
	socket_event(ctx, asked, COUNTER_REFUSED_LOOPBACK_SOURCE, 0, CHOSEN_NONE);
	return fail_with(EADDRNOTAVAIL);
}

/* What becomes of a request to a frontend: the first two are what a system call is answered with. */
enum decision {
	DECISION_FAIL = 0,
	DECISION_GO_ON = 1, /* untranslated */
	DECISION_CHOSEN = 2,
};

static __always_inline struct choice request_pick(void *ctx, const struct frontend *frontend, int is_ip4)
{
	struct affinity_key key = {
		.service_id = frontend->service_id,
		.kind = is_ip4 ? CLIENT_NETWORK_NAMESPACE : CLIENT_NETWORK_NAMESPACE_IP6,
	};
	__u64 cookie;

	if (!frontend->affinity_seconds)
		return backend_pick(frontend, &frontend->inside);
	/* A socket's source address is not chosen yet; the network namespace is the pod. */
	cookie = bpf_get_netns_cookie(ctx);
	__builtin_memcpy(key.client, &cookie, sizeof(cookie));
	return backend_pick_affine(&key, frontend, &frontend->inside);
}

/*
 * Is a pod's connection left to its packets? Then it goes to the Service's own address, which the pod's device translates:
 * that is where the pod has an address, for a Service that asks for it. The node's own processes have the node's.
 */
static __always_inline int request_is_left_to_packets(struct bpf_sock_addr *ctx, const struct frontend *frontend)
{
	return config.has_pod_devices && (frontend->flags & FRONTEND_SOURCE_RANGES) && !in_host_namespace(ctx);
}

/*
 * Nobody serves it now. A socket whose datagrams are sent without a further question must not be refused for ever: a pod's
 * goes to the Service's own address, where its packets are refused, and served as soon as they can be.
 */
static __always_inline int request_waits_for_endpoints(struct bpf_sock_addr *ctx, const struct frontend_key *key)
{
	return config.has_pod_devices && key->protocol == IPPROTO_UDP && !in_host_namespace(ctx);
}

/* Whether this client may have a backend of the frontend at all. */
static __always_inline int request_is_barred(struct bpf_sock_addr *ctx, const struct frontend *frontend)
{
	return (frontend->flags & (FRONTEND_SOURCE_RANGES | FRONTEND_NODE_ADMITTED)) == FRONTEND_SOURCE_RANGES &&
	       in_host_namespace(ctx);
}

/* As a client outside its ranges sees it: nothing comes back. */
static __always_inline int fail_barred(struct bpf_sock_addr *ctx, const struct frontend_key *asked, __u8 protocol)
{
	socket_event(ctx, asked, COUNTER_DROPPED_SOURCE_RANGE, 0, CHOSEN_NONE);
	return protocol == IPPROTO_TCP ? fail_with(ETIMEDOUT) : 0;
}

/* `row` is what a look-up of `key` found, which is the frontend's of what was asked for. */
static __always_inline enum decision request_choose(struct bpf_sock_addr *ctx, const struct frontend_key *asked,
						    const struct frontend_key *key, const struct frontend *row,
						    enum binding binding, const int connects, struct choice *choice)
{
	struct frontend frontend;

	if (!frontend_read(key, row, &frontend))
		return DECISION_GO_ON;
	if (request_is_left_to_packets(ctx, &frontend))
		return DECISION_GO_ON;
	if (request_is_barred(ctx, &frontend)) {
		count_service(frontend.service_id, SERVICE_DROPPED_SOURCE_RANGE);
		return fail_barred(ctx, asked, key->protocol);
	}
	if (!frontend.inside.count && connects && request_waits_for_endpoints(ctx, key))
		return DECISION_GO_ON;
	if (!frontend.inside.count) {
		if (frontend.inside.on_empty == EMPTY_DROP)
			count_service(frontend.service_id, SERVICE_DROPPED_NO_LOCAL_ENDPOINT);
		else
			count_service(frontend.service_id, SERVICE_REFUSED_NO_ENDPOINT);
		return fail_empty(ctx, asked, &frontend.inside, key->protocol);
	}
	if (binding == BINDING_LOOPBACK) {
		if (key->protocol != IPPROTO_TCP)
			return fail_loopback_source(ctx, asked);
		*choice = backend_pick_own(&frontend, &frontend.inside);
		return choice->backend ? DECISION_CHOSEN : fail_loopback_source(ctx, asked);
	}
	*choice = request_pick(ctx, &frontend, address_is_ip4(&key->address));
	if (choice->backend)
		return DECISION_CHOSEN;
	socket_event(ctx, asked, COUNTER_FAILED_BACKEND_MISSING, 0, CHOSEN_NONE);
	return DECISION_GO_ON;
}

/* 1: go on (translated or not), 0: the system call fails. */
static __always_inline int socket_connect(struct bpf_sock_addr *ctx, struct request *request)
{
	const struct frontend_key *asked = &request->target;
	struct frontend_key key = request->target;
	struct lookup lookup = request_lookup(ctx, &key);
	struct bpf_sock *sk = ctx->sk;
	struct origin origin = {};
	struct choice choice;
	enum decision decision;
	enum binding binding;

	if (lookup.result == LOOKUP_NOT_OURS) {
		/* Whatever this socket was connected to before, it is not any more. */
		origin_forget(sk);
		if (key.protocol == IPPROTO_UDP)
			datagram_go_direct(sk, &request->target.address, request->target.port);
		return 1;
	}
	if (lookup.result == LOOKUP_UNKNOWN_PORT || !lookup.frontend)
		return fail_unknown_port(ctx, asked);
	binding = request_binding(sk, &request->target);
	if (binding == BINDING_LOOPBACK)
		binding = request_unbind(ctx, sk);
	decision = request_choose(ctx, asked, &key, lookup.frontend, binding, 1, &choice);
	if (decision == DECISION_GO_ON)
		origin_forget(sk);
	if (decision != DECISION_CHOSEN)
		return decision;
	origin_fill(&origin, &request->target, ctx->protocol, &choice);
	socket_event(ctx, asked, COUNTER_CONNECT_TRANSLATED, choice.backend_id, choice.reason);
	if (!origin_store(sk, &origin))
		socket_event(ctx, asked, COUNTER_FAILED_STORAGE, choice.backend_id, choice.reason);
	request_go_to_backend(request, &origin);
	count_service(origin.service_id, SERVICE_CONNECTIONS);
	return 1;
}

/* 1: go on (translated or not), 0: the system call fails. */
static __always_inline int socket_send(struct bpf_sock_addr *ctx, struct request *request)
{
	const struct frontend_key *asked = &request->target;
	struct frontend_key key = request->target;
	struct lookup lookup = request_lookup(ctx, &key);
	struct bpf_sock *sk = ctx->sk;
	struct origin origin = {};
	struct choice choice;
	enum decision decision;
	__u32 service_id;

	if (lookup.result == LOOKUP_NOT_OURS) {
		datagram_go_direct(sk, &request->target.address, request->target.port);
		return 1;
	}
	if (lookup.result == LOOKUP_UNKNOWN_PORT || !lookup.frontend)
		return fail_unknown_port(ctx, asked);
	service_id = lookup.frontend->service_id;
	if (!origin_recall(sk, &request->target, service_id, &origin) &&
	    !datagram_recall(sk, &request->target, service_id, &origin)) {
		if (request_binding(sk, &request->target) == BINDING_LOOPBACK)
			return fail_loopback_source(ctx, asked);
		decision = request_choose(ctx, asked, &key, lookup.frontend, BINDING_FREE, 0, &choice);
		if (decision != DECISION_CHOSEN)
			return decision;
		origin_fill(&origin, &request->target, ctx->protocol, &choice);
		socket_event(ctx, asked, COUNTER_DATAGRAM_TRANSLATED, choice.backend_id, choice.reason);
		if (!datagram_remember(sk, &origin))
			socket_event(ctx, asked, COUNTER_FAILED_STORAGE, choice.backend_id, choice.reason);
		count_service(origin.service_id, SERVICE_CONNECTIONS);
	} else {
		count_often(COUNTER_DATAGRAM_TRANSLATED);
	}
	request_go_to_backend(request, &origin);
	return 1;
}

/* A reply of a connected socket's peer is shown as what the socket is connected to: a plain send() passes no hook, so
 * that nobody knows whether it or a datagram with an address came last. */
static __always_inline void socket_receive(struct bpf_sock_addr *ctx, struct request *request)
{
	const struct address *source = &request->target.address;
	struct bpf_sock *sk = ctx->sk;
	struct datagram_record record = {};
	__be16 port = request->target.port;
	struct origin *connected;

	if (socket_is_connected_to(sk, source, port)) {
		connected = bpf_sk_storage_get(&socket_origins, sk, (void *)0, 0);
		if (connected && origin_is_of_backend(connected, source, port))
			request_show_service(request, connected);
	} else if (datagram_reverse(sk, source, port, &record)) {
		request_show_service(request, &record.origin);
	}
	if (request->translated)
		count_often(COUNTER_REPLY_TRANSLATED);
}

static __always_inline void socket_peer_name(struct bpf_sock_addr *ctx, struct request *request)
{
	struct bpf_sock *sk = ctx->sk;
	struct origin *origin = bpf_sk_storage_get(&socket_origins, sk, (void *)0, 0);

	if (!origin || !origin_is_of_backend(origin, &request->target.address, request->target.port))
		return;
	request_show_service(request, origin);
	count_often(COUNTER_PEER_TRANSLATED);
}

#endif
