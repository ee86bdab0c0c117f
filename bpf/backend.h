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
	BACKEND_PICKS = 8,
	BACKEND_NONE = ~0U, /* as an answer of backend_draw() */
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

/*
 * The id of a backend by chance, each slot of the pool as likely as the others (the high half of a 32 x 32 bit product,
 * no division), that is the asking Service's. A program that was held up since it read the frontend may find slots, or
 * the backend that one names, in the hands of another Service: it tries the neighbours. `own_only`: only one with an
 * address of this node, which is what loopback reaches. Global, so that it is verified once and not for each way that
 * leads here.
 */
__noinline __u32 backend_draw(__u32 service_id, __u32 base, __u32 count, __u32 own_only)
{
	__u32 offset = ((__u64)bpf_get_prandom_u32() * count) >> 32;

	for (int i = 0; i < BACKEND_PICKS; i++) {
		__u32 index = base + offset, *id = bpf_map_lookup_elem(&slots, &index);
		struct backend *backend = id ? backend_get(*id) : (void *)0;

		if (id && backend && backend->service_id == service_id &&
		    (!own_only || (address_roles(&backend->address) & (ADDRESS_NODE | ADDRESS_LOCAL))))
			return *id;
		offset = offset + 1 < count ? offset + 1 : 0;
	}
	return BACKEND_NONE;
}

static __always_inline struct choice backend_choice(__u32 id)
{
	return (struct choice){.backend_id = id, .backend = backend_get(id)};
}

static __always_inline struct choice backend_pick(const struct frontend *frontend, const struct pool *pool)
{
	return backend_choice(backend_draw(frontend->service_id, pool->base, pool->count, 0));
}

static __always_inline struct choice backend_pick_own(const struct frontend *frontend, const struct pool *pool)
{
	return backend_choice(backend_draw(frontend->service_id, pool->base, pool->count, 1));
}

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
