/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What those are told who listen (`kubelane monitor`): the rows of the maps `listening`, `listener_states` and
 * `listener_rings`, and an event. src/bpf/monitor.rs has the same structs, and compares their offsets; build.rs reads the
 * enums, as those of abi.h. Nothing of it outlives the listener.
 */
#ifndef KUBELANE_OBSERVE_H
#define KUBELANE_OBSERVE_H

enum listener_limits {
	LISTENERS = 4, /* at once; a power of two */
	LISTENER_STALE_S = 5, /* a listener that has not been heard of for so long is gone */
};

/* Why a connection has its backend. */
enum choice_reason {
	CHOSEN_NONE = 0,
	CHOSEN_BY_CHANCE = 1,
	CHOSEN_BY_AFFINITY = 2, /* the client had it before */
	CHOSEN_OWN = 3, /* by chance among those with an address of this node, for a socket bound to loopback */
};

/* Why a flow goes. */
enum removal {
	REMOVE_OVER = 0, /* silent for longer than it may be, as FLOW_LIMITS_NOW says */
	REMOVE_OPENING = 1, /* still not proved, and pushed out by others */
	REMOVE_PORT = 2, /* closed, or not proved: another wants its place */
	REMOVE_FREE = 3, /* the same, or silent for longer than it may be, as FLOW_LIMITS_SET says */
	REMOVE_REPLACED = 4, /* its client begins another with the same ends */
};

/* What events are, beside those of enum counter. */
enum event_number {
	EVENT_FLOW_ENDED = 63,
};

/* One who listens, and what is wanted, as far as it is cheap to ask. Zeros ask for nothing. */
struct listener {
	__u64 numbers; /* a bit for each enum counter and enum event_number */
	__u64 heard_ns; /* CLOCK_MONOTONIC: when the listener was last there */
	__u32 rate; /* events in a tenth of a second, on each processor */
	__u32 one_in; /* of so many events one is told */
	__u32 protocol;
	struct address from; /* of packets: whose source, before or after translation, this is */
	struct address to;
	__be16 port; /* at any end */
	__u16 has_from;
	__u16 has_to;
	__u16 zero;
	__u32 unused;
};

struct listening {
	__u32 slots; /* a bit for each who listens; 0: nobody */
	__u32 zero;
	struct listener listeners[LISTENERS];
};

/* What became of events, on each processor. */
struct listener_state {
	__u64 told;
	__u64 lost; /* there was no room */
	__u64 limited; /* beyond the rate */
	__u64 sampled; /* left out by one_in */
	__u64 window_ns; /* when the tenth of a second began */
	__u64 window_told;
	__u64 seen;
};

struct event {
	__u64 time_ns; /* CLOCK_MONOTONIC */
	__u64 netns_cookie; /* of system calls: the caller's network namespace */
	struct ends asked; /* as the packet or the system call has them; a socket may have no source yet: zeros */
	struct ends becomes; /* what the backend sees, or zeros; of an ICMP error where it goes */
	struct ends quoted; /* of an ICMP error: the packet that it is about, or zeros */
	__u32 number; /* enum counter, enum event_number */
	__u32 reason; /* enum choice_reason; of EVENT_FLOW_ENDED enum removal */
	__u32 service_id; /* with has_backend */
	__u32 backend_id;
	__u32 generation;
	__u32 interface; /* of packets: where it comes in, or leaves; of system calls 0 */
	__u32 request_state; /* flow.state of both rows */
	__u32 reply_state;
	__u32 process; /* of system calls; else 0 */
	__u32 unused;
	__u8 protocol;
	__u8 has_backend;
	__u8 tcp_flags;
	__u8 zero;
	char command[16]; /* of system calls: the process' name */
};

_Static_assert(sizeof(struct listener) == 72, "listener");
_Static_assert(sizeof(struct listening) == 296, "listening");
_Static_assert(sizeof(struct listener_state) == 56, "listener_state");
_Static_assert(sizeof(struct event) == 184, "event");

#endif
