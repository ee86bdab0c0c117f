/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * From a frontend's pool to a backend.
 *
 * Cost: two array look-ups (slot, backend); with session affinity one LRU hash look-up before and one write after.
 */
#ifndef KUBELANE_BACKEND_H
#define KUBELANE_BACKEND_H

/* Slots that are looked at for one choice. */
enum {
	BACKEND_PICKS = 4,
	BACKEND_OWN_PICKS = 8,
};

struct choice {
	struct backend *backend;
	__u32 backend_id;
};

static __always_inline struct backend *backend_get(__u32 id)
{
	return bpf_map_lookup_elem(&backends, &id);
}

/* A record of (id, generation) still means the backend that it was made for, and that backend still answers. */
static __always_inline struct backend *backend_get_living(__u32 id, __u32 generation)
{
	struct backend *backend = backend_get(id);

	if (!backend || backend->generation != generation || backend->state == BACKEND_GONE)
		return (void *)0;
	return backend;
}

/* A pool's slot by chance, each as likely as the others: the high half of a 32 x 32 bit product, no division. */
static __always_inline __u32 pool_draw(const struct pool *pool)
{
	return (__u32)(((__u64)bpf_get_prandom_u32() * pool->count) >> 32);
}

static __always_inline __u32 pool_next(const struct pool *pool, __u32 offset)
{
	return offset + 1 < pool->count ? offset + 1 : 0;
}

static __always_inline struct choice backend_of_slot(__u32 index)
{
	struct choice choice = {};
	__u32 *id = bpf_map_lookup_elem(&slots, &index);

	if (!id)
		return choice;
	choice.backend_id = *id;
	choice.backend = backend_get(*id);
	return choice;
}

/* Unchecked; see backend_pick(). */
static __always_inline struct choice backend_pick_random(const struct pool *pool)
{
	return backend_of_slot(pool->base + pool_draw(pool));
}

/*
 * A backend by chance that is the frontend's own Service's. A program that was held up since it read the frontend may
 * find slots, or the backend that one names, in the hands of another Service: it tries the neighbours.
 */
static __always_inline struct choice backend_pick(const struct frontend *frontend, const struct pool *pool)
{
	__u32 offset = pool_draw(pool);
	struct choice choice;

	for (int i = 0; i < BACKEND_PICKS; i++) {
		choice = backend_of_slot(pool->base + offset);
		if (choice.backend && choice.backend->service_id == frontend->service_id)
			return choice;
		offset = pool_next(pool, offset);
	}
	return (struct choice){};
}

/* One of a few slots from a random one on that leads to an address of this node: what loopback reaches. */
static __always_inline struct choice backend_pick_own(const struct frontend *frontend, const struct pool *pool)
{
	__u32 offset = pool_draw(pool);
	struct choice choice;
	__u32 *flags;

	for (int i = 0; i < BACKEND_OWN_PICKS; i++) {
		choice = backend_of_slot(pool->base + offset);
		offset = pool_next(pool, offset);
		if (!choice.backend || choice.backend->service_id != frontend->service_id)
			continue;
		flags = bpf_map_lookup_elem(&addresses, &choice.backend->address);
		if (flags && *flags & (ADDRESS_NODE | ADDRESS_LOCAL))
			return choice;
	}
	return (struct choice){};
}

/* The remembered backend, if new connections may still find it in this pool. */
static __always_inline struct choice backend_recall(const struct affinity_key *key, const struct frontend *frontend,
						    const struct pool *pool, __u64 now)
{
	struct affinity *affinity = bpf_map_lookup_elem(&affinities, key);
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
	return choice;
}

static __always_inline struct choice backend_pick_affine(const struct affinity_key *key,
							 const struct frontend *frontend, const struct pool *pool)
{
	struct affinity affinity = {.used_ns = bpf_ktime_get_ns()};
	struct choice choice = backend_recall(key, frontend, pool, affinity.used_ns);

	if (!choice.backend)
		choice = backend_pick(frontend, pool);
	if (!choice.backend)
		return choice;
	affinity.backend_id = choice.backend_id;
	affinity.generation = choice.backend->generation;
	bpf_map_update_elem(&affinities, key, &affinity, BPF_ANY);
	return choice;
}

#endif
