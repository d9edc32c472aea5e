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
