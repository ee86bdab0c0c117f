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
/* By how much the step has moved a counter. */
__u64 counted(__u32 counter);

/* bytes.c: which bytes may differ, and how. */
void check_unchanged(const struct step *step);
void check_rewritten(const struct step *step);
void check_error_rewritten(const struct step *step);
void check_answer(const struct step *step);

/* flows.c: who talks to whom. */
void flows_reset(void);
/* The packet became another one. */
void flows_follow(const struct step *step);
void flows_follow_dropped(const struct step *step);
void flows_follow_error(const struct step *step);
/* A packet with nothing wrong with it that was not served. */
void flows_expect(const struct step *step);
/* Does the packet belong to somebody's connection, as far as its ends tell? */
int flows_know(const struct step *step);

/* table.c: the rows of flows. */
void table_reset(void);
void table_before(void);
void table_after(const struct step *step);
/* What a packet of these ends becomes. */
int table_find(const struct pair *pair, struct pair *becomes);
/* Is there a flow of this packet's ends that both ends keep open? */
int table_has_open(const struct pair *pair);

#endif
