/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Unconnected datagram sockets: for each service that a socket sends to, the backend that it got, so that QUIC and
 * its like keep their session, and so that replies can be shown as the service's.
 *
 * The first DATAGRAM_RECORDS destinations live in the socket's storage under a lock (threads may share a socket); the
 * rest are in an LRU hash. A record whose backend is gone gives its place away. Where two services led one socket to
 * the same backend, its replies are shown as the service that was sent to last.
 */
#ifndef KUBELANE_DATAGRAM_H
#define KUBELANE_DATAGRAM_H

static __always_inline int datagram_is_to(const struct datagram_record *record, const struct frontend_key *service)
{
	return record->sequence && record->origin.service_port == service->port &&
	       address_equal(&record->origin.service_address, &service->address);
}

/* Copies the record of `service` and marks it as the latest; 0 when there is none. */
static __always_inline int datagram_table_find(struct datagram_table *table, const struct frontend_key *service,
					       struct origin *found)
{
	int hit = 0;

	bpf_spin_lock(&table->lock);
	for (int i = 0; i < DATAGRAM_RECORDS; i++) {
		if (datagram_is_to(&table->records[i], service)) {
			table->records[i].sequence = ++table->sequence;
			*found = table->records[i].origin;
			hit = 1;
			break;
		}
	}
	bpf_spin_unlock(&table->lock);
	return hit;
}

/* The place of the same service's record, else a free one, else one whose backend is gone, else -1. */
static __always_inline int datagram_table_place(struct datagram_table *table, const struct frontend_key *service)
{
	for (int i = 0; i < DATAGRAM_RECORDS; i++)
		if (datagram_is_to(&table->records[i], service))
			return i;
	for (int i = 0; i < DATAGRAM_RECORDS; i++)
		if (!table->records[i].sequence)
			return i;
	for (int i = 0; i < DATAGRAM_RECORDS; i++)
		if (!backend_get_living(table->records[i].origin.backend_id, table->records[i].origin.generation))
			return i;
	return -1;
}

/* Two threads that send to new services at once may want one place: the later one has it, and the other service's
 * next datagram picks again. */
static __always_inline int datagram_table_put(struct datagram_table *table, const struct frontend_key *service,
					      const struct origin *origin)
{
	int place = datagram_table_place(table, service);

	if (place < 0) {
		table->overflowed = 1;
		return 0;
	}
	bpf_spin_lock(&table->lock);
	table->records[place & (DATAGRAM_RECORDS - 1)].origin = *origin;
	table->records[place & (DATAGRAM_RECORDS - 1)].sequence = ++table->sequence;
	bpf_spin_unlock(&table->lock);
	return 1;
}

/* Copies the latest record that led to this backend; returns its sequence, 0 when there is none. */
static __always_inline __u32 datagram_table_reverse(struct datagram_table *table, const struct address *backend,
						    __be16 port, struct origin *found)
{
	__u32 latest = 0;

	bpf_spin_lock(&table->lock);
	for (int i = 0; i < DATAGRAM_RECORDS; i++) {
		struct datagram_record *record = &table->records[i];

		if (record->sequence > latest && origin_is_of_backend(&record->origin, backend, port)) {
			latest = record->sequence;
			*found = record->origin;
		}
	}
	bpf_spin_unlock(&table->lock);
	return latest;
}

static __always_inline __u32 datagram_table_next_sequence(struct datagram_table *table)
{
	__u32 sequence;

	bpf_spin_lock(&table->lock);
	sequence = ++table->sequence;
	bpf_spin_unlock(&table->lock);
	return sequence;
}

static __always_inline void datagram_key_fill(struct datagram_key *key, void *ctx, const struct address *address,
					      __be16 port, __u16 direction)
{
	key->socket_cookie = bpf_get_socket_cookie(ctx);
	key->address = *address;
	key->port = port;
	key->direction = direction;
	key->zero = 0;
}

static __always_inline struct datagram_record *datagram_overflow_find(void *ctx, const struct address *address,
								      __be16 port, __u16 direction)
{
	struct datagram_key key;

	datagram_key_fill(&key, ctx, address, port, direction);
	return bpf_map_lookup_elem(&datagram_overflow, &key);
}

static __always_inline void datagram_overflow_put(void *ctx, struct datagram_table *table, const struct origin *origin)
{
	struct datagram_record record = {.origin = *origin, .sequence = datagram_table_next_sequence(table)};
	struct datagram_key key;

	datagram_key_fill(&key, ctx, &origin->service_address, origin->service_port, DATAGRAM_TO_SERVICE);
	bpf_map_update_elem(&datagram_overflow, &key, &record, BPF_ANY);
	datagram_key_fill(&key, ctx, &origin->backend_address, origin->backend_port, DATAGRAM_FROM_BACKEND);
	bpf_map_update_elem(&datagram_overflow, &key, &record, BPF_ANY);
}

/* The backend that this socket's datagrams to `service` went to before; 0 when there is none that still lives, or when
 * the destination is another Service's by now. */
static __always_inline int datagram_recall(void *ctx, struct bpf_sock *sk, const struct frontend_key *service,
					   __u32 service_id, struct origin *found)
{
	struct datagram_table *table = bpf_sk_storage_get(&datagram_tables, sk, (void *)0, 0);
	struct datagram_record *record;

	if (!table)
		return 0;
	if (!datagram_table_find(table, service, found)) {
		if (!table->overflowed)
			return 0;
		record = datagram_overflow_find(ctx, &service->address, service->port, DATAGRAM_TO_SERVICE);
		if (!record)
			return 0;
		*found = record->origin;
		/* Refreshed: the latest service that was sent to is the one that replies are shown as. */
		datagram_overflow_put(ctx, table, found);
	}
	return found->service_id == service_id && backend_get_living(found->backend_id, found->generation) != (void *)0;
}

static __always_inline void datagram_remember(void *ctx, struct bpf_sock *sk, const struct frontend_key *service,
					      const struct origin *origin)
{
	struct datagram_table *table = bpf_sk_storage_get(&datagram_tables, sk, (void *)0, BPF_SK_STORAGE_GET_F_CREATE);

	if (!table) {
		count(COUNTER_FAILED_STORAGE);
		return;
	}
	if (!datagram_table_put(table, service, origin))
		datagram_overflow_put(ctx, table, origin);
}

/* Which service a datagram from `backend` answers; 0 when it answers none. */
static __always_inline int datagram_reverse(void *ctx, struct bpf_sock *sk, const struct address *backend, __be16 port,
					    struct origin *found)
{
	struct datagram_table *table = bpf_sk_storage_get(&datagram_tables, sk, (void *)0, 0);
	struct datagram_record *record;
	__u32 latest;

	if (!table)
		return 0;
	latest = datagram_table_reverse(table, backend, port, found);
	if (!table->overflowed)
		return latest != 0;
	record = datagram_overflow_find(ctx, backend, port, DATAGRAM_FROM_BACKEND);
	/* Compared, because an LRU row's memory may be another key's by now. */
	if (record && record->sequence > latest && origin_is_of_backend(&record->origin, backend, port)) {
		latest = record->sequence;
		*found = record->origin;
	}
	return latest != 0;
}

#endif
