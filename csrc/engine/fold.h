/* Folding: a new file with the image as it is now, and a new journal that goes on from it, made
 * beside the commits that come meanwhile.
 *
 *     idle ──fold_begin──► begun ──fold_write──► written ──fold_switch──► idle
 *                            └────────────┴───fold_abandon─────────────────▲
 *
 * fold_begin() and fold_switch() need the image to stand still, fold_write() does not: a thread of
 * its own, which is started once and waits, calls it without the lock.
 */
#pragma once

#include <pthread.h>

#include "state_files.h"

struct fold {
    struct image base;
    struct journal *journal; /* its successor, unnamed */
    bool has_failed;         /* the last one: not tried again until there is no other way */
    /* The thread: */
    pthread_t thread;
    pthread_cond_t changed; /* what follows, under the lock of who owns this */
    bool has_thread;
    bool is_wanted; /* it is begun, and the thread has not yet got it done */
    bool is_ending;
};

int fold_begin(struct fold *fold, const struct image *image);
int fold_write(struct fold *fold, struct state_files *files);

/* Append what was committed since, and give the new journal its name, in place of `*journal`.
 * Returns 0; or a negative errno, and `*journal` may be either. */
int fold_switch(struct fold *fold, const struct image *image, struct journal **journal);

void fold_abandon(struct fold *fold, struct io *io);

/* Start the thread, which calls `run` with `argument`. Returns 0 or a negative errno. */
int fold_start_thread(struct fold *fold, void *(*run)(void *), void *argument);

/* With the lock: have the thread do what was begun, or wait until it has. */
void fold_want(struct fold *fold);
void fold_join(struct fold *fold, pthread_mutex_t *lock);

/* End the thread, when what it does is done, and free the image. */
void fold_deinit(struct fold *fold, pthread_mutex_t *lock);

/* For the thread, with the lock: returns false at the end. */
bool fold_wait_for_work(struct fold *fold, pthread_mutex_t *lock);
void fold_is_done(struct fold *fold);
