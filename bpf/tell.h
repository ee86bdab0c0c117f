/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Telling those who listen: one event into the ring of each. Reads; changes nothing that the datapath looks at.
 *
 * Cost while nobody listens: one word of an array, asked where something is counted that happens once in a connection. While
 * somebody does: a clock, and some 200 bytes.
 */
#ifndef KUBELANE_TELL_H
#define KUBELANE_TELL_H

/* IPPROTO_MPTCP (262) is newer than some kernels' headers. */
enum {
	PROTOCOL_MPTCP = 262,
	PROTOCOL_UDPLITE = 136,
};

/* The protocol that Services know it by; 0: not one that has ports of theirs. */
static __always_inline __u8 request_protocol(__u32 protocol)
{
	if (protocol == IPPROTO_TCP || protocol == PROTOCOL_MPTCP)
		return IPPROTO_TCP;
	if (protocol == IPPROTO_UDP || protocol == PROTOCOL_UDPLITE)
		return IPPROTO_UDP;
	return 0;
}

enum {
	TELL_SECOND_NS = 1000000000,
	TELL_WINDOW_NS = TELL_SECOND_NS / 10,
};

/* Whether this event is one that is told, of those that are wanted. */
static __always_inline int tell_may(const struct listener *listener, struct listener_state *state, __u64 now)
{
	__u32 one_in = listener->one_in, rate = listener->rate;

	if (one_in > 1 && state->seen++ % one_in) {
		__sync_fetch_and_add(&state->sampled, 1);
		return 0;
	}
	if (!rate)
		return 1;
	if (now - state->window_ns >= TELL_WINDOW_NS) {
		state->window_ns = now;
		state->window_told = 0;
	}
	if (state->window_told >= rate) {
		__sync_fetch_and_add(&state->limited, 1);
		return 0;
	}
	state->window_told++;
	return 1;
}

/* Room in a ring for an event, with its time; NULL: it is not told. */
static __always_inline struct event *tell_begin(const struct listener *listener, void *ring, __u32 slot)
{
	struct listener_state *state = bpf_map_lookup_elem(&listener_states, &slot);
	__u64 now = bpf_ktime_get_ns();
	struct event *event;

	/* One who was killed may have left its place. */
	if (!state || now - listener->heard_ns > (__u64)LISTENER_STALE_S * TELL_SECOND_NS)
		return (void *)0;
	if (!tell_may(listener, state, now))
		return (void *)0;
	event = bpf_ringbuf_reserve(ring, sizeof(*event), 0);
	if (!event) {
		__sync_fetch_and_add(&state->lost, 1);
		return (void *)0;
	}
	__sync_fetch_and_add(&state->told, 1);
	__builtin_memset(event, 0, sizeof(*event));
	event->time_ns = now;
	return event;
}

/* The reader looks by itself many times a second, and is woken only when a quarter of the ring waits: to wake it for each
 * event would cost more than the event. */
static __always_inline void tell_end(struct event *event, void *ring)
{
	__u64 waiting = bpf_ringbuf_query(ring, BPF_RB_AVAIL_DATA);
	__u64 size = bpf_ringbuf_query(ring, BPF_RB_RING_SIZE);

	bpf_ringbuf_submit(event, waiting > size / 4 ? BPF_RB_FORCE_WAKEUP : BPF_RB_NO_WAKEUP);
}

/* If it still is whose it was. */
static __always_inline void tell_backend(struct event *event, __u32 id, __u32 generation)
{
	struct backend *backend = backend_get(id);

	event->backend_id = id;
	event->generation = generation;
	if (!backend || backend->generation != generation)
		return;
	event->service_id = backend->service_id;
	event->has_backend = 1;
}

static __always_inline const struct listener *tell_listener(__u32 slot)
{
	__u32 zero = 0;
	struct listening *all = bpf_map_lookup_elem(&listening, &zero);

	/* The mask is for verifiers before 5.11. */
	barrier_var(slot);
	return all ? &all->listeners[slot & (LISTENERS - 1)] : (void *)0;
}

static __always_inline int tell_is_wanted(const struct listener *listener, __u32 number, __u32 protocol)
{
	return number < 64 && (listener->numbers & (1ULL << number)) &&
	       (!listener->protocol || listener->protocol == protocol);
}

/* Of two pairs of ends, before and after translation, is one what is looked for? */
static __always_inline int tell_ends_are_wanted(const struct listener *listener, const struct ends *a,
						const struct ends *b)
{
	__be16 port = listener->port;

	if (listener->has_from && !address_equal(&a->source, &listener->from) &&
	    !address_equal(&b->source, &listener->from))
		return 0;
	if (listener->has_to && !address_equal(&a->destination, &listener->to) &&
	    !address_equal(&b->destination, &listener->to))
		return 0;
	return !port || a->source_port == port || a->destination_port == port || b->source_port == port ||
	       b->destination_port == port;
}

/* System calls. */

/*
 * Global, so that it is verified once: what is told of a system call is in numbers. `what`: the counter, the enum
 * choice_reason, the destination's port and the listener's slot, 16 bits each. `high`, `low`: the destination's address.
 */
__noinline int socket_tell(struct bpf_sock_addr *ctx, __u64 what, __u32 backend_id, __u64 high, __u64 low)
{
	__u32 counter = what & 0xffff, reason = what >> 16 & 0xffff, slot = what >> 48;
	const struct listener *listener = tell_listener(slot);
	void *ring = bpf_map_lookup_elem(&listener_rings, &slot);
	struct backend *backend = (void *)0;
	__u64 address[2] = {high, low};
	struct event *event;
	__u8 protocol;

	if (!ctx || !listener || !ring)
		return 0;
	protocol = request_protocol(ctx->protocol);
	if (!tell_is_wanted(listener, counter, protocol))
		return 0;
	event = tell_begin(listener, ring, slot);
	if (!event)
		return 0;
	if (reason != CHOSEN_NONE)
		backend = backend_get(backend_id);
	event->number = counter;
	event->reason = reason;
	event->protocol = protocol;
	__builtin_memcpy(&event->asked.destination, address, sizeof(address));
	event->asked.destination_port = what >> 32 & 0xffff;
	if (backend) {
		event->becomes.destination = backend->address;
		event->becomes.destination_port = backend->port;
		tell_backend(event, backend_id, backend->generation);
	}
	event->netns_cookie = bpf_get_netns_cookie(ctx);
	event->process = bpf_get_current_pid_tgid() >> 32;
	bpf_get_current_comm(event->command, sizeof(event->command));
	tell_end(event, ring);
	return 0;
}

/* The same to all who listen; and it is counted. */
__noinline int socket_tell_all(struct bpf_sock_addr *ctx, __u64 what, __u32 backend_id, __u64 high, __u64 low)
{
	__u32 slots = listening_slots();

	count_often(what & 0xffff);
	for (__u64 slot = 0; slot < LISTENERS && slots; slot++, slots >>= 1)
		if (slots & 1)
			socket_tell(ctx, what | slot << 48, backend_id, high, low);
	return 0;
}

/* Counts an event of a system call, before its destination is replaced. `backend_id` counts if `reason`, an enum
 * choice_reason, is not CHOSEN_NONE. */
static __always_inline void socket_event(struct bpf_sock_addr *ctx, const struct frontend_key *asked, __u32 counter,
					 __u32 backend_id, __u32 reason)
{
	__u64 address[2], what = counter | (__u64)reason << 16 | (__u64)asked->port << 32;

	__builtin_memcpy(address, &asked->address, sizeof(address));
	socket_tell_all(ctx, what, backend_id, address[0], address[1]);
}

#endif
