/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What must hold after each packet, whatever it is. Nothing here knows the code under test but for the rows of its maps.
 */
#ifndef FUZZ_ORACLE_H
#define FUZZ_ORACLE_H

#include "packets.h"
#include "world.h"

/* Ends the process. */
__attribute__((noreturn)) void fail(const struct step *step, const char *what);

/* oracle.c: the verdict, the counters. */
void oracle_reset(void);
void oracle_before(void);
void oracle_after(struct step *step);
/* The Service that its packet asks for; NULL: none that serves such clients. */
struct service *service_asked(const struct step *step);
/* By how much the step has moved a counter. */
__u64 counted(__u32 counter);

/* bytes.c: which bytes may differ, and how. */
void check_unchanged(const struct step *step);
void check_rewritten(const struct step *step);
void check_error_rewritten(const struct step *step);
void check_answer(const struct step *step);

/* flows.c: who talks to whom. */
void flows_reset(void);
void flows_print(void);
/* The packet became another one. */
void flows_follow(const struct step *step);
void flows_follow_dropped(const struct step *step);
/* Before anything else is asked of it. */
void flows_note_piece(const struct step *step);
void flows_follow_error(const struct step *step);
/* A packet with nothing wrong with it that was not served. */
void flows_expect(const struct step *step);
/* Is it sent back to the pod that it came from? */
int is_sent_back(const struct step *step);
/* Does the packet belong to somebody's connection, as far as its ends tell? */
int flows_know(const struct step *step);

/* How the packets of a connection go on. */
enum conduct {
	CONDUCT_STACK, /* by the host's stack: requests are met when they come in, replies when they leave */
	CONDUCT_ROUTED, /* sent on at once, both when they come in; or by halves, where the stack is asked for */
	CONDUCT_BACK, /* sent back to the pod that they came from, both */
	CONDUCT_HALVES, /* by the host's stack, half translated */
	CONDUCTS,
};

/* choice.c: what a Service's client is given. `seen`: what the backend sees. */
void choice_reset(void);
enum conduct choice_conduct(const struct step *step, const struct pair *seen);
void check_choice(const struct step *step, const struct pair *seen);
/* From what a request became when it came in to what the backend sees. */
void choice_complete(const struct step *step, struct pair *half);
void choice_forget(const struct step *step);
int is_odd_address(const __u8 address[16]);
int is_odd_source(const struct step *step);
/* A packet that left as it was. */
void choice_note_own(const struct step *step);

/* table.c: the rows of flows. */
void table_reset(void);
void table_before(void);
void table_after(const struct step *step);
/* What a packet of these ends becomes. */
int table_find(const struct pair *pair, struct pair *becomes);
/* Had this request a flow before the packet, which a packet that begins no connection stays with? */
int table_keeps(const struct pair *pair);
/* Had it one that both ends keep open? */
int table_has_open(const struct pair *pair);
/* Is this answer of the backend's one that the flow of the request waits for? */
int table_wants_answer(const struct pair *request, const struct view *answer);

#endif
