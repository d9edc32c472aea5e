/* Threads of the engine: started once, before the sandbox is sealed. */
#pragma once

#include <pthread.h>
#include <stddef.h>

/* Start a thread, and return when it runs: what the C library calls in a new thread, the sealed
 * sandbox does not allow. Returns 0 or a negative errno. */
int thread_start(pthread_t *thread, size_t stack_bytes, void *(*run)(void *), void *argument);
