/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Session affinity: which backend a client got, for as long as the Service asks for.
 *
 * Cost: one LRU hash look-up; who is new to the Service is written down, too.
 */
#ifndef KUBELANE_AFFINITY_H
#define KUBELANE_AFFINITY_H

/* The remembered backend, if new connections may still find it in this pool. */
static __always_inline struct choice backend_recall(const struct affinity *seen, const struct frontend *frontend,
						    const struct pool *pool, __u64 now)
{
	struct choice choice = {};
	struct backend *backend;

	/* Another processor may have used it since this one asked for the time. */
	if (!seen->used_ns || (__s64)(now - seen->used_ns) >= (__s64)(frontend->affinity_seconds * 1000000000ULL))
		return choice;
	backend = backend_get_living(seen->backend_id, seen->generation);
	/* An LRU row's memory may be another key's by now. */
	if (!backend || !(backend->pools & pool->member) || backend->service_id != frontend->service_id)
		return choice;
	choice.backend = backend;
	choice.backend_id = seen->backend_id;
	choice.reason = CHOSEN_BY_AFFINITY;
	return choice;
}

/* A copy of a row, or nothing. What it is judged by must be what is returned. */
static __always_inline void affinity_read(const struct affinity *row, struct affinity *seen)
{
	if (!row)
		return;
	*(__u64 *)&seen->backend_id = *(const volatile __u64 *)&row->backend_id;
	seen->used_ns = *(const volatile __u64 *)&row->used_ns;
}

/*
 * The row of a client whose backend has gone becomes `chosen`, unless another processor was first: then `seen` becomes what
 * that one wrote, and this answers 0. The locks are those of flows.
 */
static __always_inline int affinity_replace(const struct affinity_key *key, struct affinity *row, struct affinity *seen,
					    const struct affinity *chosen)
{
	const __u32 *client = (const void *)key->client;
	__u32 index = (key->service_id ^ client[0] ^ client[3]) & (FLOW_LOCKS - 1);
	struct flow_lock *guard = bpf_map_lookup_elem(&flow_locks, &index);
	int is_first;

	if (!guard)
		return 1;
	bpf_spin_lock(&guard->lock);
	is_first = row->backend_id == seen->backend_id && row->generation == seen->generation &&
		   row->used_ns == seen->used_ns;
	if (is_first)
		*row = *chosen;
	else
		affinity_read(row, seen);
	bpf_spin_unlock(&guard->lock);
	return is_first;
}

static __always_inline void affinity_fill(struct affinity *affinity, const struct choice *choice, __u64 now)
{
	affinity->backend_id = choice->backend_id;
	affinity->generation = choice->backend->generation;
	affinity->used_ns = now;
}

/*
 * The backend that `map` remembers for this client, else one that it remembers from now on. Who asks at the same time on
 * another processor gets the same: of two that find no row, or one whose backend has gone, the second gets the first one's.
 */
static __always_inline struct choice affinity_pick(void *map, const struct affinity_key *key,
						   const struct frontend *frontend, const struct pool *pool, __u64 now)
{
	struct affinity *known = bpf_map_lookup_elem(map, key), seen = {}, chosen;
	struct choice choice, theirs;
	int is_first;

	affinity_read(known, &seen);
	choice = backend_recall(&seen, frontend, pool, now);
	if (known && choice.backend) {
		/* In place: a row that is replaced can be missed meanwhile (map_find()). Should its memory be another key's by
		 * now, that one has just been written, too. */
		known->used_ns = now;
		return choice;
	}
	choice = backend_pick(frontend, pool);
	if (!choice.backend)
		return choice;
	affinity_fill(&chosen, &choice, now);
	if (known) {
		is_first = affinity_replace(key, known, &seen, &chosen);
	} else {
		is_first = !bpf_map_update_elem(map, key, &chosen, BPF_NOEXIST);
		if (!is_first)
			affinity_read(bpf_map_lookup_elem(map, key), &seen);
	}
	if (is_first)
		return choice;
	theirs = backend_recall(&seen, frontend, pool, now);
	return theirs.backend ? theirs : choice;
}

static __always_inline struct choice backend_pick_affine(const struct affinity_key *key,
							 const struct frontend *frontend, const struct pool *pool)
{
	return affinity_pick(&affinities, key, frontend, pool, bpf_ktime_get_ns());
}

/* The same for a client that anybody may have forged. It is among the lasting ones once its flow is proved. */
static __always_inline struct choice backend_pick_unproved(const struct affinity_key *key,
							   const struct frontend *frontend, const struct pool *pool)
{
	__u64 now = bpf_ktime_get_ns();
	struct affinity seen = {};
	struct choice choice;

	affinity_read(bpf_map_lookup_elem(&affinities, key), &seen);
	choice = backend_recall(&seen, frontend, pool, now);
	return choice.backend ? choice : affinity_pick(&new_affinities, key, frontend, pool, now);
}

#endif
