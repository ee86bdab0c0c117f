/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
#ifndef FUZZ_RUN_H
#define FUZZ_RUN_H

#include <stddef.h>
#include <linux/types.h>

/* Once. The range of source ports is configured. */
void run_open(__u16 snat_first, __u16 snat_ports);
/* Runs all packets of an input, and ends the process when something is not as it must be. */
void run_input(const __u8 *bytes, size_t length);

#endif
