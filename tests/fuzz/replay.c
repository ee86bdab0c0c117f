// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * `replay FIRST COUNT FILE...` runs inputs and writes what the kernel has to be told, and what it has to answer: the rows
 * of the world, then each packet with its verdict, its bytes afterwards and the counters that it moved. FIRST and COUNT:
 * the range of source ports that the programs in the kernel have.
 */
#include <stdio.h>
#include <stdlib.h>
#include "run.h"
#include "world.h"

int main(int count, char **arguments)
{
	static __u8 bytes[65536];

	if (count < 3)
		return 2;
	trace = stdout;
	run_open(atoi(arguments[1]), atoi(arguments[2]));
	for (int i = 3; i < count; i++) {
		FILE *file = fopen(arguments[i], "rb");
		size_t length;

		if (!file) {
			perror(arguments[i]);
			return 1;
		}
		length = fread(bytes, 1, sizeof(bytes), file);
		fclose(file);
		printf("input %s\n", arguments[i]);
		run_input(bytes, length);
	}
	return 0;
}
