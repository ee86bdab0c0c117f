// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* An input: eight bytes of a world, then packets of 32 bytes each. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "../../bpf/abi.h"
#include "oracle.h"
#include "run.h"

void run_open(__u16 snat_first, __u16 snat_ports)
{
	maps_open();
	skb_open();
	world_open(snat_first, snat_ports);
	native_configure(snat_first, snat_ports, 0, 1000, 0);
}

enum {
	/* A packet is repeated as often: more than the answers that are given at once. */
	ANSWERS_MOST = 104,
};

static void print_frame(const struct frame *frame)
{
	for (__u32 i = 0; i < frame->length; i++)
		fprintf(trace, "%02x", frame->bytes[i]);
}

static const char *direction_of(enum program program)
{
	if (program >= OUT_ETHERNET)
		return "out";
	return program == IN_POD ? "pod" : "in";
}

static void trace_step(const struct step *step)
{
	if (!trace)
		return;
	if (step->program == COLLECT) {
		fprintf(trace, "collect\n");
		return;
	}
	fprintf(trace, "run %s %u %u %u ", direction_of(step->program), step->in.interface,
		step->program >= OUT_ETHERNET ? step->in.from : 0, step->in.mark);
	print_frame(&step->in);
	fprintf(trace, " %d ", step->effects.action);
	print_frame(&step->out);
	for (__u32 i = 0; i < COUNTER_MAX; i++)
		if (counted(i))
			fprintf(trace, " %u:%llu", i, counted(i));
	fputc('\n', trace);
}

static void run_recipe(const struct recipe *recipe)
{
	/* None that ends within a second of a time-out: the kernel's clock goes on meanwhile. */
	static const __u32 pauses[4] = {7, 14, 63, 700};
	struct step *step = &steps[step_count];
	int times;

	node.now_ns += 1000000;
	if (recipe->time >= 224)
		world_age(recipe->time == 255 ? 90000 : pauses[recipe->time & 3]);
	if (recipe->change >= TURN_FIRST)
		world_change(recipe->change, recipe->flags ^ recipe->port);
	if (!packet_make(recipe, step))
		return;
	times = !trace && recipe->fault == 239 ? ANSWERS_MOST : 1;
	step->fail_at = !trace && recipe->fault >= 240 ? recipe->fault - 239 : 0;
	while (times--) {
		oracle_before();
		step->effects = skb_run(step->program, &step->in, &step->out, step->fail_at);
		oracle_after(step);
	}
	trace_step(step);
	step_count++;
}

void run_input(const __u8 *bytes, size_t length)
{
	__u8 world_bytes[WORLD_BYTES] = {};
	struct recipe recipe;

	memcpy(world_bytes, bytes, length < WORLD_BYTES ? length : WORLD_BYTES);
	world_make(world_bytes);
	oracle_reset();
	for (size_t at = WORLD_BYTES; at + RECIPE <= length && step_count < STEPS; at += RECIPE) {
		memcpy(&recipe, bytes + at, RECIPE);
		run_recipe(&recipe);
	}
	if (trace)
		fprintf(trace, "rows %u\n", map_named("flows4")->count + map_named("flows6")->count);
}
