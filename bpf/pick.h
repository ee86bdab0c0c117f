/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * From a pool to a backend: a number, spread evenly over the slots of the pool's region. By chance here; a number that is
 * counted up takes them in turn, and one that depends on the flow finds the same slot again, in a region that the daemon
 * has filled for that.
 *
 * Cost: two array look-ups (slot, backend).
 */
#ifndef KUBELANE_PICK_H
#define KUBELANE_PICK_H

/* Slots that are looked at for one choice. */
enum {
	PICK_TRIES = 8,
	PICK_NONE = ~0U, /* as an answer of pick_slot() */
};

/*
 * The id of a backend that is the asking Service's: `number`, of 32 bits, chooses the slot (the high half of a product, no
 * division). A program that was held up since it read the frontend may find slots, or the backend that one names, in the
 * hands of another Service: it tries the neighbours. `own_only`: only one with an address of this node, which is what
 * loopback reaches. Global, so that it is verified once and not for each way that leads here.
 */
__noinline __u32 pick_slot(__u32 service_id, __u32 base, __u32 count, __u32 number, __u32 own_only)
{
	__u32 offset = ((__u64)number * count) >> 32;

	for (int i = 0; i < PICK_TRIES; i++) {
		__u32 index = base + offset, *id = bpf_map_lookup_elem(&slots, &index);
		struct backend *backend = id ? backend_get(*id) : (void *)0;

		if (id && backend && backend->service_id == service_id &&
		    (!own_only || (address_roles(&backend->address) & (ADDRESS_NODE | ADDRESS_LOCAL))))
			return *id;
		offset = offset + 1 < count ? offset + 1 : 0;
	}
	return PICK_NONE;
}

static __always_inline struct choice backend_choice(__u32 id, __u32 reason)
{
	return (struct choice){.backend_id = id, .backend = backend_get(id), .reason = reason};
}

static __always_inline struct choice backend_pick(const struct frontend *frontend, const struct pool *pool)
{
	return backend_choice(pick_slot(frontend->service_id, pool->base, pool->count, bpf_get_prandom_u32(), 0),
			      CHOSEN_BY_CHANCE);
}

static __always_inline struct choice backend_pick_own(const struct frontend *frontend, const struct pool *pool)
{
	return backend_choice(pick_slot(frontend->service_id, pool->base, pool->count, bpf_get_prandom_u32(), 1),
			      CHOSEN_OWN);
}

#endif
