#include "ahead.h"

#include <errno.h>
#include <string.h>

#include "check.h"
#include "state_files.h"

/* The one writer of its state. */
static void set(struct ahead *ahead, enum ahead_state state)
{
    if (state == AHEAD_NONE)
        image_wipe(&ahead->image);
    ahead->state = state;
}

void ahead_want(struct ahead *ahead, const uint8_t *bytes, size_t n_bytes,
                const struct checkpoint_lineage *lineage, bool may_use_room)
{
    if (ahead->state != AHEAD_NONE) {
        ahead_drop(ahead);
        return;
    }
    if (image_set(&ahead->image, bytes, n_bytes) < 0)
        return;
    ahead->image.is_numbered = true;
    ahead->image.generation = lineage->generation;
    memcpy(ahead->identity, lineage->identity, sizeof(ahead->identity));
    ahead->may_use_room = may_use_room;
    set(ahead, AHEAD_WANTED);
}

void ahead_drop(struct ahead *ahead)
{
    if (ahead->state != AHEAD_NONE)
        set(ahead, AHEAD_UNWANTED);
    room_discard(&ahead->room);
}

bool ahead_has_work(const struct ahead *ahead)
{
    return ahead->state == AHEAD_WANTED || ahead->state == AHEAD_UNWANTED;
}

/* Returns 0 or a negative errno: then there is no room for it. */
static int fill(struct ahead *ahead, struct state_files *files, pthread_mutex_t *lock)
{
    if (!ahead->may_use_room || ahead->room.state != ROOM_MADE)
        return -ENOSPC;
    pthread_mutex_unlock(lock);
    int r = state_file_fill(files, &ahead->room, &ahead->image, ahead->identity);
    pthread_mutex_lock(lock);
    room_was_filled(&ahead->room, r);
    return r;
}

static int prepare(struct ahead *ahead, struct state_files *files, pthread_mutex_t *lock)
{
    pthread_mutex_unlock(lock);
    int r = state_file_prepare(files, &ahead->image, ahead->identity, false);
    pthread_mutex_lock(lock);
    return r;
}

/* If that fails nobody is told: who commits tries again, and says so. */
static void make(struct ahead *ahead, struct state_files *files, pthread_mutex_t *lock)
{
    int r = fill(ahead, files, lock);

    if (r < 0)
        r = prepare(ahead, files, lock);
    if (ahead->state == AHEAD_WANTED)
        set(ahead, r < 0 ? AHEAD_NONE : AHEAD_READY);
}

void ahead_work(struct ahead *ahead, struct state_files *files, pthread_mutex_t *lock)
{
    check(ahead_has_work(ahead));
    if (ahead->state == AHEAD_WANTED) {
        make(ahead, files, lock);
        return;
    }
    pthread_mutex_unlock(lock);
    state_file_discard(files);
    pthread_mutex_lock(lock);
    set(ahead, AHEAD_NONE);
}

enum ahead_taken ahead_take(struct ahead *ahead, const struct image *image,
                            const uint8_t identity[CHECKPOINT_IDENTITY_BYTES])
{
    if (ahead->state != AHEAD_READY || !image->is_numbered ||
        image->generation != ahead->image.generation ||
        !image_is(&ahead->image, image->bytes, image->n_bytes) ||
        memcmp(identity, ahead->identity, sizeof(ahead->identity)) != 0)
        return AHEAD_NOTHING;
    set(ahead, AHEAD_NONE);
    return room_keep(&ahead->room) ? AHEAD_IN_ROOM : AHEAD_FILE;
}

void ahead_deinit(struct ahead *ahead)
{
    check(ahead->state == AHEAD_NONE && ahead->room.state == ROOM_NONE);
    image_deinit(&ahead->image);
}
