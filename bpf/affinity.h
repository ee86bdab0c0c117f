/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Session affinity: which backend a client got, for as long as the Service asks for.
 *
 * Cost: one LRU hash look-up before the pick and one write after it.
 */
#ifndef KUBELANE_AFFINITY_H
#define KUBELANE_AFFINITY_H

/* The remembered backend, if new connections may still find it in this pool. */
static __always_inline struct choice backend_recall(const struct affinity *affinity, const struct frontend *frontend,
						    const struct pool *pool, __u64 now)
{
	struct choice choice = {};
	struct backend *backend;

	if (!affinity || now - affinity->used_ns >= (__u64)frontend->affinity_seconds * 1000000000ULL)
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

static __always_inline struct choice backend_pick_affine(const struct affinity_key *key,
							 const struct frontend *frontend, const struct pool *pool)
{
	struct affinity *known = bpf_map_lookup_elem(&affinities, key), affinity;
	__u64 now = bpf_ktime_get_ns();
	struct choice choice = backend_recall(known, frontend, pool, now);

	if (!choice.backend)
		choice = backend_pick(frontend, pool);
	if (!choice.backend)
		return choice;
	affinity_fill(&affinity, &choice, now);
	bpf_map_update_elem(&affinities, key, &affinity, BPF_ANY);
	return choice;
}

/* The same for a client that anybody may have forged. It is among the lasting ones once its flow is proved. */
static __always_inline struct choice backend_pick_unproved(const struct affinity_key *key,
							   const struct frontend *frontend, const struct pool *pool)
{
	struct affinity *known = bpf_map_lookup_elem(&affinities, key), affinity;
	__u64 now = bpf_ktime_get_ns();
	struct choice choice = backend_recall(known, frontend, pool, now);

	if (choice.backend)
		return choice;
	known = bpf_map_lookup_elem(&new_affinities, key);
	choice = backend_recall(known, frontend, pool, now);
	if (!choice.backend)
		choice = backend_pick(frontend, pool);
	if (!choice.backend)
		return choice;
	affinity_fill(&affinity, &choice, now);
	bpf_map_update_elem(&new_affinities, key, &affinity, BPF_ANY);
	return choice;
}

#endif
