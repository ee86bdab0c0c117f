/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What becomes of a packet. */
#ifndef KUBELANE_VERDICT_H
#define KUBELANE_VERDICT_H

enum verdict {
	VERDICT_PASS = 0, /* to whoever comes next: other programs, then the host's stack */
	VERDICT_DROP = 1,
	VERDICT_SEND = 2, /* by a device of our choice: the kernel was told which */
	VERDICT_ANSWER_UNREACHABLE = 3, /* port unreachable */
	VERDICT_ANSWER_TTL = 4, /* time exceeded */
	VERDICT_ANSWER_TOO_BIG = 5, /* fragmentation needed, packet too big: packet->mtu fits */
	VERDICT_CONTINUE = 6, /* none yet */
	VERDICT_HAND_OVER = 7, /* to the host's stack, which fragments it */
	VERDICT_UNKNOWN = 8, /* no Service's: to the stack, if it is no health probe */
};

#endif
