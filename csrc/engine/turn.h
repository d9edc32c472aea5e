/* Who waits until what a TPM is, or does, is something else: an operation, with the TPM's lock; and
 * a command, without it. Whoever has the lock may have to wait for the disk, and a command must not
 * wait longer than was said (version.h).
 */
#pragma once

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

struct turn {
    pthread_cond_t changed; /* with the TPM's lock */
    pthread_mutex_t lock;   /* of what follows, taken after the TPM's */
    pthread_cond_t told;
};

void turn_init(struct turn *turn);
void turn_deinit(struct turn *turn);

/* It is something else: have all look again. With the TPM's lock. */
void turn_change(struct turn *turn);

/* With the TPM's lock, which is given up meanwhile: wait until that may be so. */
void turn_wait(struct turn *turn, pthread_mutex_t *lock);

/* Without it: wait while `waits` says so of `argument`, which it looks at as it is at any moment,
 * but until `until_ms` by clock_ms() at most. Returns false if it still does then. */
bool turn_wait_apart(struct turn *turn, bool (*waits)(void *), void *argument, int64_t until_ms);
