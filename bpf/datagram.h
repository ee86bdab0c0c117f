/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Unconnected datagram sockets: for each service that a socket sends to, the backend that it got, so that QUIC and
 * its like keep their session, and so that replies can be shown as the service's.
 *
 * All records are in the socket's own storage, under a lock (threads may share a socket): DATAGRAM_RECORDS in a table
 * that every such socket has, DATAGRAM_MORE_RECORDS in one that it gets when these do not suffice. Beyond both, its
 * oldest record gives way. So no socket costs another one's records, no table has to be sized for all of them, and the
 * kernel holds each socket to its allowance (net.core.optmem_max).
 *
 * A backend's replies are shown as what the socket sent to last: of two services that led it there the later one, and
 * the backend itself if the socket has sent to that since.
 */
#ifndef KUBELANE_DATAGRAM_H
#define KUBELANE_DATAGRAM_H

/*
 * The loops over records, for both tables: called with the lock held. They search without branches and remember a
 * record by its sequence, of which each has its own, because the verifier would walk on from each branch and each
 * index. The index is hidden from the compiler, which would compare addresses instead.
 */

static __always_inline struct datagram_record *record_at(struct datagram_record *records, __u32 index)
{
	barrier_var(index);
	return &records[index];
}

/* `value` if there is no difference, else 0. */
static __always_inline __u64 value_if_equal(__u64 value, __u32 difference)
{
	__u64 wide = difference;

	barrier_var(wide);
	return value & (__u64)((__s64)(wide - 1) >> 63);
}

/* Of sequences, which never come near 2^63. */
static __always_inline __u64 lower_of(__u64 a, __u64 b)
{
	__u64 difference = b - a;

	barrier_var(difference);
	return a + (difference & (__u64)((__s64)difference >> 63));
}

static __always_inline __u64 higher_of(__u64 a, __u64 b)
{
	return a + b - lower_of(a, b);
}

static __always_inline __u32 record_service_difference(const struct datagram_record *record,
						       const struct address *service, __be16 port)
{
	return address_difference(&record->origin.service_address, service) | (record->origin.service_port ^ port);
}

/* Copies the record of `service` and makes it the latest; 0 when there is none. */
static __always_inline int records_recall(struct datagram_record *records, __u32 size,
					  const struct frontend_key *service, __u64 sequence, struct origin *found)
{
	for (__u32 i = 0; i < size; i++) {
		struct datagram_record *record = record_at(records, i);

		/* A free record has port 0, which no Service has. */
		if (record_service_difference(record, &service->address, service->port))
			continue;
		record->sequence = sequence;
		record->is_direct = 0;
		*found = record->origin;
		return 1;
	}
	return 0;
}

/* Takes the place of the same service's record, else of a free one, else, if it may, of the oldest; 0: it has none. */
static __always_inline int records_put(struct datagram_record *records, __u32 size, const struct origin *origin,
				       __u64 sequence, int may_replace)
{
	__u64 same = 0, place = records[0].sequence;

	for (__u32 i = 0; i < size; i++) {
		struct datagram_record *record = record_at(records, i);

		same |= value_if_equal(record->sequence, record_service_difference(record, &origin->service_address,
										   origin->service_port));
		place = lower_of(place, record->sequence);
	}
	if (same)
		place = same;
	else if (place && !may_replace)
		return 0;
	for (__u32 i = 0; i < size; i++) {
		struct datagram_record *record = record_at(records, i);

		if (record->sequence != place)
			continue;
		record->origin = *origin;
		record->sequence = sequence;
		record->is_direct = 0;
		return 1;
	}
	return 0;
}

static __always_inline __u32 record_backend_difference(const struct datagram_record *record,
						       const struct address *backend, __be16 port)
{
	return address_difference(&record->origin.backend_address, backend) | (record->origin.backend_port ^ port);
}

/* The socket sends to this backend itself: whichever service led there before, replies are not that one's. */
static __always_inline void records_go_direct(struct datagram_record *records, __u32 size,
					      const struct address *backend, __be16 port)
{
	for (__u32 i = 0; i < size; i++) {
		struct datagram_record *record = record_at(records, i);

		if (!record_backend_difference(record, backend, port))
			record->is_direct = 1;
	}
}

/* Copies the latest record that led to this backend, if it is later than `found`. */
static __always_inline void records_reverse(struct datagram_record *records, __u32 size, const struct address *backend,
					    __be16 port, struct datagram_record *found)
{
	__u64 latest = 0;

	for (__u32 i = 0; i < size; i++) {
		struct datagram_record *record = record_at(records, i);
		__u32 difference = record_backend_difference(record, backend, port);

		latest = higher_of(latest, value_if_equal(record->sequence, difference));
	}
	if (latest <= found->sequence)
		return;
	for (__u32 i = 0; i < size; i++) {
		struct datagram_record *record = record_at(records, i);

		if (record->sequence != latest)
			continue;
		*found = *record;
		return;
	}
}

static __always_inline struct datagram_table *datagram_table_of(struct bpf_sock *sk, __u64 flags)
{
	return bpf_sk_storage_get(&datagram_tables, sk, (void *)0, flags);
}

static __always_inline struct datagram_more_table *datagram_more_of(struct bpf_sock *sk, __u64 flags)
{
	return bpf_sk_storage_get(&datagram_more, sk, (void *)0, flags);
}

/* The backend that this socket's datagrams to `service` went to before; 0 when there is none that still lives, or when
 * the destination is another Service's by now. */
static __always_inline int datagram_recall(struct bpf_sock *sk, const struct frontend_key *service, __u32 service_id,
					   struct origin *found)
{
	struct datagram_table *table = datagram_table_of(sk, 0);
	struct datagram_more_table *more;
	__u64 sequence;
	int hit;

	if (!table)
		return 0;
	bpf_spin_lock(&table->lock);
	sequence = ++table->sequence;
	hit = records_recall(table->records, DATAGRAM_RECORDS, service, sequence, found);
	bpf_spin_unlock(&table->lock);
	if (!hit) {
		more = table->overflowed ? datagram_more_of(sk, 0) : (void *)0;
		if (!more)
			return 0;
		bpf_spin_lock(&more->lock);
		hit = records_recall(more->records, DATAGRAM_MORE_RECORDS, service, sequence, found);
		bpf_spin_unlock(&more->lock);
	}
	return hit && found->service_id == service_id && backend_get_living(found->backend_id, found->generation);
}

/* 0: the kernel had no memory for it. */
static __always_inline int datagram_remember(struct bpf_sock *sk, const struct origin *origin)
{
	struct datagram_table *table = datagram_table_of(sk, BPF_SK_STORAGE_GET_F_CREATE);
	struct datagram_more_table *more;
	__u64 sequence;
	int is_put;

	if (!table)
		return 0;
	bpf_spin_lock(&table->lock);
	sequence = ++table->sequence;
	is_put = records_put(table->records, DATAGRAM_RECORDS, origin, sequence, 0);
	if (!is_put)
		table->overflowed = 1;
	bpf_spin_unlock(&table->lock);
	if (is_put)
		return 1;
	more = datagram_more_of(sk, BPF_SK_STORAGE_GET_F_CREATE);
	if (!more)
		return 0;
	bpf_spin_lock(&more->lock);
	records_put(more->records, DATAGRAM_MORE_RECORDS, origin, sequence, 1);
	bpf_spin_unlock(&more->lock);
	return 1;
}

/* The socket sends to an address that is no Service's. Nearly no socket has a table: one pointer that is NULL. */
static __always_inline void datagram_go_direct(struct bpf_sock *sk, const struct address *address, __be16 port)
{
	struct datagram_table *table = datagram_table_of(sk, 0);
	struct datagram_more_table *more;

	if (!table)
		return;
	bpf_spin_lock(&table->lock);
	records_go_direct(table->records, DATAGRAM_RECORDS, address, port);
	bpf_spin_unlock(&table->lock);
	more = table->overflowed ? datagram_more_of(sk, 0) : (void *)0;
	if (!more)
		return;
	bpf_spin_lock(&more->lock);
	records_go_direct(more->records, DATAGRAM_MORE_RECORDS, address, port);
	bpf_spin_unlock(&more->lock);
}

/* Which service a datagram from `backend` answers; 0 when it answers none. */
static __always_inline int datagram_reverse(struct bpf_sock *sk, const struct address *backend, __be16 port,
					    struct datagram_record *found)
{
	struct datagram_table *table = datagram_table_of(sk, 0);
	struct datagram_more_table *more;

	if (!table)
		return 0;
	bpf_spin_lock(&table->lock);
	records_reverse(table->records, DATAGRAM_RECORDS, backend, port, found);
	bpf_spin_unlock(&table->lock);
	more = table->overflowed ? datagram_more_of(sk, 0) : (void *)0;
	if (more) {
		bpf_spin_lock(&more->lock);
		records_reverse(more->records, DATAGRAM_MORE_RECORDS, backend, port, found);
		bpf_spin_unlock(&more->lock);
	}
	return found->sequence && !found->is_direct;
}

#endif
