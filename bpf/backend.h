/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Backends, and records of them. */
#ifndef KUBELANE_BACKEND_H
#define KUBELANE_BACKEND_H

struct choice {
	struct backend *backend;
	__u32 backend_id;
	__u32 reason; /* enum choice_reason */
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

#endif
