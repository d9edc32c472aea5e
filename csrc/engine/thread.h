/* Threads of the engine: started once, before the sandbox is sealed. */
#pragma once

#include <pthread.h>
#include <stddef.h>

/* Start a thread, and return when it runs: what the C library calls in a new thread, the sealed
 * sandbox does not allow. Returns 0 or a negative errno. */
int thread_start(pthread_t *thread, size_t stack_bytes, void *(*run)(void *), void *argument);

/* The same of one that gives way to others: as nice(1) has it, 1 to 19. */
int thread_start_nice(pthread_t *thread, size_t stack_bytes, int niceness, void *(*run)(void *),
                      void *argument);

/* Have this thread, and those that it starts, go before others when they wake up, for as long as
 * what they then do is short: an answer of the TPM takes microseconds, and who asks waits. They get
 * no larger share of a processor. Linux has it from 6.12 on (sched_setattr(2), of the policy
 * SCHED_OTHER: the slice); on others, and with another policy, it does nothing. */
void thread_ask_for_short_slices(void);
