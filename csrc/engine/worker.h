/* A thread that is started once, and works beside its owner's: it waits until there is something
 * to do. What that is the owner knows, under a lock of its own.
 */
#pragma once

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

struct worker {
    pthread_t thread;
    pthread_cond_t changed;
    bool has_thread;
    bool is_ending; /* under the owner's lock */
};

/* Start the thread, which calls `run` with `argument`. Returns 0, also if it was started before, or
 * a negative errno. */
int worker_start(struct worker *worker, void *(*run)(void *), void *argument);

/* The same of one with a name (thread.h). */
int worker_start_named(struct worker *worker, const char *name, void *(*run)(void *),
                       void *argument);

/* With the lock or just after it, of either thread: something is to be done, or is done. */
void worker_notify(struct worker *worker);

/* With the lock, which is given up meanwhile: wait until that may be so. */
void worker_wait(struct worker *worker, pthread_mutex_t *lock);

/* The same, no longer than until then by clock_ms(). */
void worker_wait_until(struct worker *worker, pthread_mutex_t *lock, int64_t ms);

/* Without the lock: end the thread, which returns from `run` once nothing is left to do. */
void worker_deinit(struct worker *worker, pthread_mutex_t *lock);
