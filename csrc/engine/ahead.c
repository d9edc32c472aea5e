#include "ahead.h"

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
                const struct checkpoint_lineage *lineage)
{
    ahead_drop(ahead);
    if (ahead->state != AHEAD_NONE || image_set(&ahead->image, bytes, n_bytes) < 0)
        return;
    ahead->image.is_numbered = true;
    ahead->image.generation = lineage->generation;
    memcpy(ahead->identity, lineage->identity, sizeof(ahead->identity));
    set(ahead, AHEAD_WANTED);
}

void ahead_drop(struct ahead *ahead)
{
    if (ahead->state != AHEAD_NONE)
        set(ahead, AHEAD_UNWANTED);
}

bool ahead_has_work(const struct ahead *ahead)
{
    return ahead->state == AHEAD_WANTED || ahead->state == AHEAD_UNWANTED;
}

/* If that fails nobody is told: who commits tries again, and says so. */
static void make(struct ahead *ahead, struct state_files *files, pthread_mutex_t *lock)
{
    pthread_mutex_unlock(lock);
    int r = state_file_prepare(files, &ahead->image, ahead->identity, false);
    pthread_mutex_lock(lock);
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

bool ahead_take(struct ahead *ahead, const struct image *image,
                const uint8_t identity[CHECKPOINT_IDENTITY_BYTES])
{
    if (ahead->state != AHEAD_READY || !image->is_numbered ||
        image->generation != ahead->image.generation ||
        !image_is(&ahead->image, image->bytes, image->n_bytes) ||
        memcmp(identity, ahead->identity, sizeof(ahead->identity)) != 0)
        return false;
    set(ahead, AHEAD_NONE);
    return true;
}

void ahead_deinit(struct ahead *ahead)
{
    check(ahead->state == AHEAD_NONE);
    image_deinit(&ahead->image);
}
