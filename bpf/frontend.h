/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * From a destination to the frontend that serves it.
 *
 * Cost: a Service's own address is one hash look-up, and one more where a backend is chosen, a NodePort on a node
 * address three. Any other destination that frontend_may_exist() lets pass, and a port that a Service's address does not
 * have, is three; a port of the node's own that is served for another protocol, or a health check's, four.
 */
#ifndef KUBELANE_FRONTEND_H
#define KUBELANE_FRONTEND_H

enum lookup_result {
	LOOKUP_NOT_OURS = 0,
	LOOKUP_FOUND = 1,
	LOOKUP_UNKNOWN_PORT = 2, /* a cluster IP, but no Service has that port */
};

/* Nobody rewrites one frontend this often while it is read. */
enum {
	FRONTEND_READINGS = 4,
};

struct lookup {
	struct frontend *frontend; /* set when LOOKUP_FOUND */
	enum lookup_result result;
};

/* The key becomes that of the NodePort: the wildcard address of the destination's family. */
static __always_inline struct frontend *frontend_lookup_node_port(struct frontend_key *key)
{
	address_words(&key->address)->word[3] = 0;
	if (!address_is_ip4(&key->address)) {
		address_words(&key->address)->word[0] = 0;
		address_words(&key->address)->word[1] = 0;
		address_words(&key->address)->word[2] = 0;
	}
	return map_find(&frontends, key);
}

/* What everything pays for that is not ours: could this be a Service's? One byte, of loopback and of the node's own
 * addresses the port's. */
static __always_inline int frontend_may_exist(const struct frontend_key *key)
{
	__u32 zero = 0, port = bpf_ntohs(key->port);
	struct wire_filter *filter = bpf_map_lookup_elem(&wire_filter, &zero);
	__u8 marks;

	if (!filter)
		return 0;
	/* The mask is for verifiers before 5.11, as in address_index(). */
	barrier_var(port);
	port &= WIRE_FILTER_SIZE - 1;
	if (address_is_loopback(&key->address))
		return filter->ports[port];
	marks = filter->sockets[address_index(&key->address)];
	if (marks == SOCKET_FILTER_NODE)
		return filter->ports[port];
	return marks;
}

/* `loopback_allowed`: the client is in the node's own namespace, where 127.0.0.1 and ::1 are the node. */
static __always_inline struct lookup frontend_lookup(struct frontend_key *key, int loopback_allowed)
{
	struct lookup lookup = {};
	__u32 roles;

	if (address_is_loopback(&key->address)) {
		if (loopback_allowed)
			lookup.frontend = frontend_lookup_node_port(key);
		lookup.result = lookup.frontend ? LOOKUP_FOUND : LOOKUP_NOT_OURS;
		return lookup;
	}
	lookup.frontend = bpf_map_lookup_elem(&frontends, key);
	if (lookup.frontend) {
		lookup.result = LOOKUP_FOUND;
		return lookup;
	}
	roles = address_roles(&key->address);
	if (roles & (ADDRESS_CLUSTER_IP | ADDRESS_SERVICE_VIP)) /* see map_find() */
		lookup.frontend = bpf_map_lookup_elem(&frontends, key);
	if (!lookup.frontend && (roles & ADDRESS_NODE))
		lookup.frontend = frontend_lookup_node_port(key);
	if (lookup.frontend)
		lookup.result = LOOKUP_FOUND;
	else if ((roles & (ADDRESS_CLUSTER_IP | ADDRESS_NODE)) == ADDRESS_CLUSTER_IP)
		lookup.result = LOOKUP_UNKNOWN_PORT;
	return lookup;
}

static __always_inline int frontend_equal(const struct frontend *a, const struct frontend *b)
{
	const __u32 *x = (const void *)a, *y = (const void *)b;

	for (int i = 0; i < (int)(sizeof(*a) / sizeof(*x)); i++)
		if (x[i] != y[i])
			return 0;
	return 1;
}

/*
 * Copies the frontend that a look-up of `key` found. When the daemon rewrites a row, the kernel gives the old row's
 * memory to the next row that is written, also to another key's, while programs still read it (bpf_mem_alloc, 6.1). So
 * a copy counts when the same is found under the key afterwards. 0: the frontend went away meanwhile.
 */
static __always_inline int frontend_read(const struct frontend_key *key, const struct frontend *row,
					 struct frontend *copy)
{
	for (int i = 0; i < FRONTEND_READINGS; i++) {
		*copy = *row;
		row = map_find(&frontends, key);
		if (!row)
			return 0;
		if (frontend_equal(row, copy))
			return 1;
	}
	return 0;
}

/* Has the destination become another Service's? One that nobody serves any more has not. */
static __always_inline int frontend_has_moved(struct frontend_key *key, int loopback_allowed, __u32 service_id)
{
	struct lookup lookup = frontend_lookup(key, loopback_allowed);
	struct frontend copy;

	return lookup.frontend && lookup.frontend->service_id != service_id &&
	       frontend_read(key, lookup.frontend, &copy) && copy.service_id != service_id;
}

#endif
