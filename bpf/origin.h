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

static __always_inline void origin_store(struct bpf_sock *sk, const struct origin *origin)
{
	struct origin *stored = bpf_sk_storage_get(&socket_origins, sk, (void *)0, BPF_SK_STORAGE_GET_F_CREATE);

	if (stored)
		*stored = *origin;
	else
		count(COUNTER_FAILED_STORAGE);
}

/* The socket now goes somewhere else. Free when it never had a record: its storage pointer is NULL. */
static __always_inline void origin_forget(struct bpf_sock *sk)
{
	bpf_sk_storage_delete(&socket_origins, sk);
}

#endif
