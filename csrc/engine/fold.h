/* Folding: a new file with the image as it is now, and a new journal that goes on from it, made
 * beside the commits that come meanwhile.
 *
 *     idle ──fold_begin──► begun ──fold_write──► written ──fold_switch──► idle
 *                            └────────────┴───fold_abandon─────────────────▲
 *
 * fold_begin() and fold_switch() need the image to stand still, fold_write() does not: a worker
 * (worker.h) calls it without the lock.
 */
#pragma once

#include "state_files.h"

struct fold {
    struct image base;
    struct journal *journal; /* its successor, unnamed */
    bool has_failed;         /* the last one: not tried again until there is no other way */
    bool is_wanted;          /* it is begun, and the worker has not yet got it done */
};

int fold_begin(struct fold *fold, const struct image *image);
int fold_write(struct fold *fold, struct state_files *files);

/* Append what was committed since, and give the new journal its name, in place of `*journal`.
 * Returns 0; or a negative errno, and `*journal` may be either. */
int fold_switch(struct fold *fold, const struct image *image, struct journal **journal);

void fold_abandon(struct fold *fold, struct io *io);

/* Free the image. */
void fold_deinit(struct fold *fold);
