// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* The harness as libFuzzer wants it. Mutations keep packets whole: one is added, repeated, taken out, or changed. */
#include <string.h>
#include "packets.h"
#include "run.h"
#include "world.h"

size_t LLVMFuzzerMutate(__u8 *bytes, size_t length, size_t most);

int LLVMFuzzerInitialize(int *count, char ***arguments)
{
	(void)count;
	(void)arguments;
	run_open(1024, 28976);
	return 0;
}

int LLVMFuzzerTestOneInput(const __u8 *bytes, size_t length)
{
	run_input(bytes, length);
	return 0;
}

static __u32 chance(__u32 *state)
{
	*state = *state * 1664525 + 1013904223;
	return *state >> 8;
}

/* Answers the new number of packets. */
static size_t mutate_packets(__u8 *packets, size_t count, size_t most, __u32 *state)
{
	size_t at = count ? chance(state) % count : 0, from = count ? chance(state) % count : 0;
	__u32 what = chance(state) % 8;
	__u8 copy[RECIPE] = {};

	if (what < 2 || !count) {
		if (count >= most)
			return count;
		if (what == 1 && count)
			memcpy(copy, packets + from * RECIPE, RECIPE);
		else
			for (int i = 0; i < 8; i++)
				copy[i] = chance(state);
		if (count)
			at++;
		memmove(packets + (at + 1) * RECIPE, packets + at * RECIPE, (count - at) * RECIPE);
		memcpy(packets + at * RECIPE, copy, RECIPE);
		return count + 1;
	}
	if (what == 2 && count > 1) {
		memmove(packets + at * RECIPE, packets + (at + 1) * RECIPE, (count - at - 1) * RECIPE);
		return count - 1;
	}
	if (what < 6)
		packets[at * RECIPE + chance(state) % RECIPE] = chance(state);
	else
		LLVMFuzzerMutate(packets + at * RECIPE, RECIPE, RECIPE);
	return count;
}

size_t LLVMFuzzerCustomMutator(__u8 *bytes, size_t length, size_t most, unsigned int seed)
{
	__u32 state = seed;
	size_t count, room;

	if (most < WORLD_BYTES + RECIPE)
		return length;
	if (length < WORLD_BYTES) {
		memset(bytes + length, 0, WORLD_BYTES - length);
		length = WORLD_BYTES;
	}
	count = (length - WORLD_BYTES) / RECIPE;
	room = (most - WORLD_BYTES) / RECIPE;
	if (room > STEPS)
		room = STEPS;
	if (chance(&state) % 8 == 0)
		bytes[chance(&state) % WORLD_BYTES] = chance(&state);
	for (__u32 times = 1 + chance(&state) % 4; times; times--)
		count = mutate_packets(bytes + WORLD_BYTES, count, room, &state);
	return WORLD_BYTES + count * RECIPE;
}
