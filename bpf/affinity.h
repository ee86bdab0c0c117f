/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Session affinity: which backend a client got, for as long as the Service asks for.
 *
 * Cost: one LRU hash look-up; who is new to the Service is written down, too.
 */
#ifndef KUBELANE_AFFINITY_H
#define KUBELANE_AFFINITY_H

/* The remembered backend, if new connections may still find it in this pool. */
static __always_inline struct choice backend_recall(const struct affinity *affinity, const struct frontend *frontend,
						    const struct pool *pool, __u64 now)
{
	struct choice choice = {};
	struct backend *backend;

	/* Another processor may have used it since this one asked for the time. */
	if (!affinity || (__s64)(now - affinity->used_ns) >= (__s64)(frontend->affinity_seconds * 1000000000ULL))
		return choice;
	backend = backend_get_living(affinity->backend_id, affinity->generation);
	/* An LRU row's memory, too, may be another key's by now. */
	if (!backend || !(backend->pools & pool->member) || backend->service_id != frontend->service_id)
		return choice;
	choice.backend = backend;
	choice.backend_id = affinity->backend_id;
	choice.reason = CHOSEN_BY_AFFINITY;
	return choice;
}

static __always_inline void affinity_fill(struct affinity *affinity, const struct choice *choice, __u64 now)
{
	affinity->backend_id = choice->backend_id;
	affinity->generation = choice->backend->generation;
	affinity->used_ns = now;
}

/*
 * The backend that `map` remembers for this client, else one that it remembers from now on. Who asks at the same time on
 * another processor gets the same: of two that find no row, the second finds the first one's.
 */
static __always_inline struct choice affinity_pick(void *map, const struct affinity_key *key,
						   const struct frontend *frontend, const struct pool *pool, __u64 now)
{
	struct affinity *known = bpf_map_lookup_elem(map, key), affinity;
	struct choice choice = backend_recall(known, frontend, pool, now), theirs;

	if (known && choice.backend) {
		/* In place: a row that was replaced could be missed meanwhile (map_find()). Should its memory be another
		 * key's by now, that one has just been written, too. */
		known->used_ns = now;
		return choice;
	}
	choice = backend_pick(frontend, pool);
	if (!choice.backend)
		return choice;
	affinity_fill(&affinity, &choice, now);
	if (!bpf_map_update_elem(map, key, &affinity, known ? BPF_ANY : BPF_NOEXIST))
		return choice;
	theirs = backend_recall(bpf_map_lookup_elem(map, key), frontend, pool, now);
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
	struct affinity *known = bpf_map_lookup_elem(&affinities, key);
	__u64 now = bpf_ktime_get_ns();
	struct choice choice = backend_recall(known, frontend, pool, now);

	return choice.backend ? choice : affinity_pick(&new_affinities, key, frontend, pool, now);
}

#endif
