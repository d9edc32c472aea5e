/* The permanent state's file, made ahead of the commit that is to publish it.
 *
 * What QEMU brings is committed by its INIT, which QEMU's guest waits for; but it is there before
 * that. So its file is written and synced meanwhile, all but for its name:
 *
 *     none ──ahead_want──► wanted ──ahead_work──► ready ──ahead_take──► none
 *                            │ └─ahead_work fails──┼────────────────────► none
 *                            └──────ahead_drop─────┴──► unwanted ──ahead_work──► none
 *
 * Where there is room for it (room.h), and `may_use_room`, it is written there, and has no file of
 * its own. Who takes it has that room keep it.
 *
 * Who commits takes it only if it is, byte by byte, what would be written now: of this image, this
 * number and this vTPM. It is of no use otherwise, and is removed.
 *
 * In wanted and unwanted the temporary file is the worker's, and nobody else may write it; in none
 * there is no such file. All of this is under the lock of who owns it, which only ahead_work()
 * gives up: what it reads then, nobody changes.
 */
#pragma once

#include <pthread.h>
#include <stdbool.h>

#include "checkpoint.h"
#include "image.h"
#include "room.h"

struct state_files;

enum ahead_state {
    AHEAD_NONE,
    AHEAD_WANTED,   /* it is to be made, or is being made */
    AHEAD_READY,    /* it is made, and durable but for its name */
    AHEAD_UNWANTED, /* it is to be removed, or is being removed; made wholly first, maybe */
};

struct ahead {
    _Atomic enum ahead_state state; /* who would only drop it looks at it without the lock */
    struct image image;             /* its content; numbered */
    uint8_t identity[CHECKPOINT_IDENTITY_BYTES];
    bool may_use_room;
    struct room room;
};

/* Have it made: of these bytes, as the vTPM's state `lineage` says. Without memory, or if what was
 * wanted before is not done with, that is dropped and nothing made. */
void ahead_want(struct ahead *ahead, const uint8_t *bytes, size_t n_bytes,
                const struct checkpoint_lineage *lineage, bool may_use_room);

/* It is of no use any more. */
void ahead_drop(struct ahead *ahead);

/* Return true in wanted and unwanted. */
bool ahead_has_work(const struct ahead *ahead);

/* For the worker, with the lock: make the file, or remove it. */
void ahead_work(struct ahead *ahead, struct state_files *files, pthread_mutex_t *lock);

/* What a commit finds. */
enum ahead_taken {
    AHEAD_NOTHING, /* that it could use */
    AHEAD_FILE,    /* to be published now */
    AHEAD_IN_ROOM, /* which keeps it: it is durable */
};

/* Take what was made, if it is ready, and of this image. */
enum ahead_taken ahead_take(struct ahead *ahead, const struct image *image,
                            const uint8_t identity[CHECKPOINT_IDENTITY_BYTES]);

/* In none. */
void ahead_deinit(struct ahead *ahead);
