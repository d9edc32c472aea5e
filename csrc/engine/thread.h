/* Threads of the engine: started once, before the sandbox is sealed. */
#pragma once

#include <pthread.h>
#include <stddef.h>

/* Start a thread, and return when it runs: what the C library calls in a new thread, the sealed
 * sandbox does not allow. Returns 0 or a negative errno. */
int thread_start(pthread_t *thread, size_t stack_bytes, void *(*run)(void *), void *argument);

/* How a thread differs from the one that starts it. */
struct thread_manner {
    const char *name; /* for people, in ps -L: 15 bytes at most; or NULL */
    int niceness;     /* it gives way to others: as nice(1) has it, 1 to 19; or 0 */
};

/* The same of one that differs. */
int thread_start_as(pthread_t *thread, size_t stack_bytes, const struct thread_manner *manner,
                    void *(*run)(void *), void *argument);
