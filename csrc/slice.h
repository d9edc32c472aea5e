/* How long a thread has a processor at most, before another has its turn.
 *
 * One whose slices are short goes before others when it wakes up, for as long as what it then does
 * is short, and gets no larger share of a processor. Linux has it from 6.12 on (sched_setattr(2),
 * of the policy SCHED_OTHER); on others, and with another policy, nothing here does anything. */
#pragma once

/* Have this thread, and those that it starts, have the shortest slices that there are. */
void slice_be_short(void);

/* The same, as long as others have them. */
void slice_be_usual(void);
