/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Connected sockets: the record, in the socket's own storage, of what the application asked for and what it got.
 * Nothing has to be found again by a key, so nothing can be evicted, and the kernel frees it with the socket.
 */
#ifndef KUBELANE_ORIGIN_H
#define KUBELANE_ORIGIN_H

static __always_inline void origin_fill(struct origin *origin, const struct frontend_key *service, __u32 protocol,
					const struct choice *choice)
{
	origin->service_address = service->address;
	origin->service_port = service->port;
	origin->backend_address = choice->backend->address;
	origin->backend_port = choice->backend->port;
	origin->backend_id = choice->backend_id;
	origin->generation = choice->backend->generation;
	origin->service_id = choice->backend->service_id;
	origin->protocol = protocol;
}

static __always_inline int origin_is_of_backend(const struct origin *origin, const struct address *address, __be16 port)
{
	return origin->backend_port == port && address_equal(&origin->backend_address, address);
}

/*
 * Is the socket connected to this address? The kernel hands it what its peer sends, nothing else. connect() to
 * AF_UNSPEC passes no hook, so that a record says what the socket was connected to, and only the socket whether it
 * still is. (The port: the kernel leaves an IPv6 socket's address behind.)
 */
static __always_inline int socket_is_connected_to(struct bpf_sock *sk, const struct address *address, __be16 port)
{
	struct address peer;
	__be32 ip4;

	if (!port || sk->dst_port != port)
		return 0;
	if (sk->family == FAMILY_INET) {
		ip4 = sk->dst_ip4;
		/* Else the compiler reads one word for both families, by an address that it computes. */
		barrier_var(ip4);
		address_set_ip4(&peer, ip4);
	} else {
		address_words(&peer)->word[0] = sk->dst_ip6[0];
		address_words(&peer)->word[1] = sk->dst_ip6[1];
		address_words(&peer)->word[2] = sk->dst_ip6[2];
		address_words(&peer)->word[3] = sk->dst_ip6[3];
	}
	return address_equal(&peer, address);
}

/* What the socket is connected to, if it is `service`: a datagram that names the service goes to the same backend, as
 * another one's reply would not reach the socket. */
static __always_inline int origin_recall(struct bpf_sock *sk, const struct frontend_key *service, __u32 service_id,
					 struct origin *found)
{
	struct origin *stored;

	if (!sk->dst_port)
		return 0;
	stored = bpf_sk_storage_get(&socket_origins, sk, (void *)0, 0);
	if (!stored || stored->service_id != service_id || stored->service_port != service->port ||
	    !address_equal(&stored->service_address, &service->address))
		return 0;
	*found = *stored;
	return socket_is_connected_to(sk, &found->backend_address, found->backend_port) &&
	       backend_get_living(found->backend_id, found->generation);
}

/* 0: the kernel had no memory for it. */
static __always_inline int origin_store(struct bpf_sock *sk, const struct origin *origin)
{
	struct origin *stored = bpf_sk_storage_get(&socket_origins, sk, (void *)0, BPF_SK_STORAGE_GET_F_CREATE);

	if (!stored)
		return 0;
	*stored = *origin;
	return 1;
}

/* The socket now goes somewhere else. Nearly none has a record, which a look-up tells at the cost of a pointer that is
 * NULL; a deletion would count up and down the references to the socket. */
static __always_inline void origin_forget(struct bpf_sock *sk)
{
	if (bpf_sk_storage_get(&socket_origins, sk, (void *)0, 0))
		bpf_sk_storage_delete(&socket_origins, sk);
}

#endif
