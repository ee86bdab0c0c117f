/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Packets from the bytes of an input: a recipe of 32 bytes each. Most are what clients, backends and routers would send,
 * answers to packets that came out before, so that flows are reached; then each may be distorted.
 */
#ifndef FUZZ_PACKETS_H
#define FUZZ_PACKETS_H

#include "inet.h"
#include "native.h"

enum {
	STEPS = 48,
	RECIPE = 32,
};

enum order {
	ORDER_REQUEST, /* a client's to a Service */
	ORDER_ANSWER, /* of whom an earlier packet came out for */
	ORDER_AGAIN, /* an earlier packet once more, with other flags */
	ORDER_ERROR, /* about a packet that came out */
	ORDER_ONWARD, /* a packet that was passed on, as it leaves the node */
	ORDER_OWN, /* from a port of the node's */
	ORDER_RAW,
	ORDER_COLLECT,
	ORDERS,
};

struct recipe {
	__u8 order;
	__u8 actor; /* who sends, or which earlier packet is meant */
	__u8 service;
	__u8 port;
	__u8 flags; /* of TCP */
	__u8 numbers; /* distortion of sequence and acknowledgement */
	__u8 size;
	__u8 ttl;
	__u8 shape;
	__u8 sums;
	__u8 link;
	__u8 device;
	__u8 cut;
	__u8 time;
	__u8 change;
	__u8 fault;
	__u8 flips;
	__u8 flip_at[4];
	__u8 flip_by[2];
	__u8 id;
	__u8 options[8];
};

_Static_assert(sizeof(struct recipe) == RECIPE, "recipe");

struct step {
	enum program program;
	struct frame in, out;
	struct view before; /* of `in` */
	struct view after; /* of `out` */
	struct effects effects;
	/* Nothing is wrong with it: if it is a request or an answer, it has to be served. */
	int is_proper;
	int fail_at;
};

/* The steps so far; the packet's place is steps[step_count]. */
extern struct step steps[STEPS];
extern int step_count;

/* Fills in the step's program and packet; 0: there is none to make. */
int packet_make(const struct recipe *recipe, struct step *step);

#endif
