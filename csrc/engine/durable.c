#include "durable.h"

#include <errno.h>
#include <libtpms/tpm_nvfilename.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "ahead.h"
#include "bytes.h"
#include "check.h"
#include "clock.h"
#include "crc32c.h"
#include "epoch.h"
#include "error.h"
#include "fold.h"
#include "image.h"
#include "link_types.h"
#include "state_files.h"
#include "version.h"
#include "worker.h"

_Static_assert(JOURNAL_IMAGE_TYPE == (int)LINK_STATE_PERMANENT, "types are the link's");

/* What is to be committed next, if it has come from elsewhere. */
struct coming {
    bool is_expected;
    bool must_be_written;                      /* also if the image is the same */
    bool begins_epoch;                         /* if the image is another */
    uint64_t generation;                       /* that it keeps; 0: it gets one here */
    uint8_t before[CHECKPOINT_IDENTITY_BYTES]; /* the identity, should it not be committed */
};

/* What QEMU has set as the permanent state. */
struct brought {
    size_t n_bytes;
    uint32_t checksum;
};

struct durable {
    struct state_files files;
    struct store *store; /* NULL: no journals */
    struct anchor anchor;
    bool is_anchor_unsure; /* it may have seen a change that was not acknowledged */
    bool on;
    bool has_no_place;    /* for journals: there never are any */
    bool is_cramped;      /* there was no room for a journal, since the TPM is on */
    pthread_mutex_t lock; /* over what follows */
    struct image current;
    struct image before;        /* of a deferred commit; or room for it */
    struct image next;          /* a view of what is being committed */
    struct delta_common common; /* to that and the current one */
    uint64_t loaded;            /* generation of an image that is not numbered anew yet */
    bool is_known;              /* the image's identity: what others have written says none */
    struct coming coming;
    struct brought brought;
    bool is_in_file;  /* the file has the image, and no journal continues it */
    bool has_others;  /* there may be a journal that another process has left */
    bool is_adopting; /* another state has begun to take the place of all, and may be half there */
    struct journal *journal;
    bool defers;        /* a commit need not wait for the journal's sync */
    bool is_deferred;   /* the last one has not: `before` is the image before it */
    bool is_broken;     /* the journal, or the file, may not have its name: to be closed first */
    bool is_unsure;     /* a commit has failed: what it was to store may be on the disk */
    const char *target; /* the file that was written last */
    struct fold fold;
    struct ahead ahead; /* not none only while there is no journal */
    struct worker worker;
};

int durable_new(struct durable **out, struct io *io)
{
    struct durable *durable = calloc(1, sizeof(*durable));

    if (!durable)
        return -ENOMEM;
    durable->files.io = io;
    durable->anchor.fd = -1;
    durable->target = TPM_PERMANENT_ALL_NAME;
    check(pthread_mutex_init(&durable->lock, NULL) == 0);
    *out = durable;
    return 0;
}

static void close_anchor(struct durable *durable)
{
    if (durable->anchor.fd >= 0)
        durable->files.io->close(durable->files.io, durable->anchor.fd);
    durable->anchor.fd = -1;
}

/* Wait until the worker has folded. */
static void join_fold(struct durable *durable)
{
    while (durable->fold.is_wanted)
        worker_wait(&durable->worker, &durable->lock);
}

/* Wait until a file that is made ahead, or removed, is so; who folds by hand does it here. */
static void join_ahead(struct durable *durable)
{
    while (ahead_has_work(&durable->ahead))
        if (durable->worker.has_thread)
            worker_wait(&durable->worker, &durable->lock);
        else
            ahead_work(&durable->ahead, &durable->files, &durable->lock);
}

/* Wait until room that is of no use any more is removed. */
static void join_room(struct durable *durable)
{
    room_hurry(&durable->ahead.room);
    worker_notify(&durable->worker);
    while (room_has_work(&durable->ahead.room))
        if (durable->worker.has_thread)
            worker_wait(&durable->worker, &durable->lock);
        else
            room_work(&durable->ahead.room, durable->files.io, &durable->lock);
}

static void drop_ahead(struct durable *durable)
{
    ahead_drop(&durable->ahead);
    worker_notify(&durable->worker);
}

static void drop_room(struct durable *durable)
{
    room_drop(&durable->ahead.room);
    worker_notify(&durable->worker);
}

/* Have no file that was made ahead, and nobody else who writes to it. Room may still be there. */
static void clear_ahead(struct durable *durable)
{
    drop_ahead(durable);
    join_ahead(durable);
}

void durable_free(struct durable *durable)
{
    pthread_mutex_lock(&durable->lock);
    clear_ahead(durable);
    drop_room(durable);
    join_room(durable);
    room_leave(&durable->ahead.room, durable->files.io);
    pthread_mutex_unlock(&durable->lock);
    worker_deinit(&durable->worker, &durable->lock);
    fold_deinit(&durable->fold);
    ahead_deinit(&durable->ahead);
    journal_free(durable->journal);
    image_deinit(&durable->current);
    image_deinit(&durable->before);
    close_anchor(durable);
    explicit_bzero(&durable->files, sizeof(durable->files));
    pthread_mutex_destroy(&durable->lock);
    free(durable);
}

int durable_set_key(struct durable *durable, const struct cipher_key *key)
{
    if (durable->on || durable->journal)
        return -EBUSY;
    pthread_mutex_lock(&durable->lock);
    clear_ahead(durable);
    durable->files.key = *key;
    pthread_mutex_unlock(&durable->lock);
    return 0;
}

int durable_set_anchor(struct durable *durable, const struct anchor *anchor)
{
    if (durable->on || !durable->store)
        return -EINVAL;
    close_anchor(durable);
    durable->anchor = *anchor;
    return 0;
}

bool durable_has_anchor(const struct durable *durable)
{
    return durable->anchor.fd >= 0;
}

void durable_set_loaded(struct durable *durable, uint64_t generation, bool is_known)
{
    check(!durable->on);
    durable->loaded = generation;
    durable->is_known = is_known;
}

static void set_identity(struct durable *durable, const uint8_t *identity)
{
    memcpy(durable->files.settings.identity, identity, sizeof(durable->files.settings.identity));
    memcpy(durable->anchor.identity, identity, sizeof(durable->anchor.identity));
}

struct checkpoint_lineage durable_lineage(const struct durable *durable)
{
    const struct image *image = &durable->current;
    struct checkpoint_lineage lineage = {
        .generation = image->is_numbered ? image->generation : durable->loaded,
    };

    memcpy(lineage.identity, durable->files.settings.identity, sizeof(lineage.identity));
    return lineage;
}

bool durable_is_known(const struct durable *durable)
{
    return durable->current.exists && durable->is_known;
}

static int write_file(struct durable *durable, const struct image *image, bool is_continued)
{
    durable->target = TPM_PERMANENT_ALL_NAME;
    clear_ahead(durable);
    return state_file_write(&durable->files, image, is_continued);
}

/* The file has been replaced, or that has failed: then it may have either image. */
static void note_file(struct durable *durable, int r)
{
    durable->is_in_file = r >= 0;
    if (r < 0)
        return;
    durable->is_unsure = false;
    room_release(&durable->ahead.room);
    worker_notify(&durable->worker);
}

static int report_anchor(int r)
{
    if (r < 0)
        error_report("cannot write the anchor: %s; make room or mount what holds it", strerror(-r));
    return r;
}

/* Returns 0 with or without a journal: where there is no room for one, files are replaced. */
static int open_journal(struct durable *durable)
{
    durable->target = "journal";
    clear_ahead(durable);
    int r = state_journal_create(&durable->files, &durable->current, &durable->journal);
    if (r < 0) {
        durable->is_cramped = true;
        error_report("cannot make %s: %s; each change replaces the whole state, which is slower: "
                     "make room, then restart the guest",
                     version_now()->journal_name, strerror(-r));
        return 0;
    }
    durable->is_in_file = false;
    r = journal_publish(durable->journal);
    if (r >= 0)
        r = write_file(durable, &durable->current, true);
    durable->is_broken = r < 0;
    return r;
}

/* Have the anchor see an image. */
static int write_anchor(struct durable *durable, const struct image *image)
{
    uint8_t digest[DIGEST_BYTES];

    int r = digest_compute(image->bytes, image->n_bytes, digest);
    if (r >= 0)
        r = anchor_write(durable->files.io, &durable->anchor, image->generation, digest);
    durable->is_anchor_unsure = r < 0; /* it may have seen it all the same */
    return report_anchor(r);
}

/* The anchor may have seen what will be nowhere: it would take the file for an older one. */
static int settle_anchor(struct durable *durable)
{
    return durable->is_anchor_unsure ? write_anchor(durable, &durable->current) : 0;
}

/* Have a deferred commit durable. If that fails the disk may have it or not, and the image is the
 * one before, as after any commit that has failed. */
static int settle_deferred(struct durable *durable)
{
    if (!durable->is_deferred)
        return 0;
    durable->is_deferred = false;
    durable->target = "journal";
    int r = journal_sync(durable->journal);
    if (r < 0)
        image_swap(&durable->current, &durable->before);
    image_wipe(&durable->before);
    return r;
}

/* The file has the image afterwards, and nothing continues it. */
static int close_journal(struct durable *durable)
{
    join_fold(durable);
    fold_abandon(&durable->fold, durable->files.io);
    if (!durable->journal)
        return 0;
    int r = settle_deferred(durable);
    if (r >= 0)
        r = settle_anchor(durable);
    if (r < 0)
        return r; /* it goes on as it is */
    durable->target = TPM_PERMANENT_ALL_NAME;
    check(durable->ahead.state == AHEAD_NONE);
    r = state_file_prepare(&durable->files, &durable->current, durable->files.settings.identity,
                           false);
    if (r < 0)
        return r;
    durable->is_broken = true;
    r = state_file_publish(&durable->files);
    if (r >= 0)
        r = journal_remove(durable->files.io);
    if (r < 0)
        return r;
    journal_free(durable->journal);
    durable->journal = NULL;
    durable->is_in_file = true;
    durable->is_unsure = false;
    return 0;
}

static int switch_fold(struct durable *durable)
{
    struct journal *before = durable->journal;

    int r = durable->is_deferred ? journal_sync(before) : 0; /* it may keep the name */
    if (r >= 0)
        r = fold_switch(&durable->fold, &durable->current, &durable->journal);
    /* If it is not known which of the two has the name, neither takes more. */
    if (durable->journal != before)
        durable->is_broken = r < 0;
    fold_abandon(&durable->fold, durable->files.io);
    return r;
}

/* The file must never have what the journal may not have. */
static int begin_fold(struct durable *durable)
{
    int r = settle_deferred(durable);

    return r < 0 ? r : fold_begin(&durable->fold, &durable->current);
}

int durable_begin_fold(struct durable *durable)
{
    pthread_mutex_lock(&durable->lock);
    int r = durable->journal && !durable->is_broken ? begin_fold(durable) : -EINVAL;
    pthread_mutex_unlock(&durable->lock);
    return r;
}

int durable_write_fold(struct durable *durable)
{
    return durable->fold.base.exists ? fold_write(&durable->fold, &durable->files) : -EINVAL;
}

int durable_switch_fold(struct durable *durable)
{
    pthread_mutex_lock(&durable->lock);
    int r = durable->fold.journal ? switch_fold(durable) : -EINVAL;
    fold_abandon(&durable->fold, durable->files.io);
    pthread_mutex_unlock(&durable->lock);
    return r;
}

/* With the lock, which is given up while it writes. */
static void do_fold(struct durable *durable)
{
    pthread_mutex_unlock(&durable->lock);
    int r = fold_write(&durable->fold, &durable->files);
    pthread_mutex_lock(&durable->lock);
    if (r >= 0)
        r = switch_fold(durable);
    fold_abandon(&durable->fold, durable->files.io);
    durable->fold.has_failed = r < 0;
    durable->fold.is_wanted = false;
    if (r < 0)
        error_report("cannot fold %s: %s; the guest is served on until the journal is full: make "
                     "room or repair the file system",
                     version_now()->journal_name, strerror(-r));
}

/* What continues another file than the one that is there now is of no use. */
static int drop_others(struct durable *durable)
{
    int r = durable->has_others ? journal_remove(durable->files.io) : 0;

    durable->has_others &= r < 0;
    return r;
}

/* Have the file of the image, and nothing that another process has left beside it. */
static int write_current(struct durable *durable)
{
    int r = durable->store ? image_number(&durable->current, durable->store) : 0;

    if (r >= 0)
        r = write_file(durable, &durable->current, false);
    if (r >= 0)
        r = drop_others(durable);
    note_file(durable, r);
    return r;
}

/* Put what room keeps into its file, if it keeps any. Commits wait meanwhile: the first that a
 * guest makes comes later than this. Returns 0 or a negative errno: it is kept then. */
static int empty_room(struct durable *durable)
{
    struct room *room = &durable->ahead.room;

    int r = room_keeps(room) ? write_current(durable) : 0;
    if (r < 0)
        room_fail(room);
    if (r < 0 && r != -ENOENT) /* else the directory is gone, of which the end tells */
        error_report("cannot write %s.%s: %s; the state is safe in %s: make room or repair the "
                     "file system",
                     version_now()->prefix, TPM_PERMANENT_ALL_NAME, strerror(-r),
                     version_now()->arrived_name);
    return r;
}

static bool has_work(struct durable *durable)
{
    struct ahead *ahead = &durable->ahead;

    return durable->fold.is_wanted || ahead_has_work(ahead) || room_has_work(&ahead->room) ||
           ahead->room.state == ROOM_KEPT;
}

/* Returns false at the end. */
static bool wait_for_work(struct durable *durable)
{
    struct worker *worker = &durable->worker;
    struct room *room = &durable->ahead.room;

    while (!has_work(durable)) {
        if (worker->is_ending)
            return false;
        if (room_is_waiting(room))
            worker_wait_until(worker, &durable->lock, room->due_ms);
        else
            worker_wait(worker, &durable->lock);
    }
    return true;
}

static void work(struct durable *durable)
{
    struct ahead *ahead = &durable->ahead;

    if (durable->fold.is_wanted)
        do_fold(durable);
    else if (ahead_has_work(ahead))
        ahead_work(ahead, &durable->files, &durable->lock);
    else if (ahead->room.state == ROOM_KEPT)
        empty_room(durable);
    else
        room_work(&ahead->room, durable->files.io, &durable->lock);
}

static void *run_worker(void *argument)
{
    struct durable *durable = argument;

    pthread_mutex_lock(&durable->lock);
    while (wait_for_work(durable)) {
        work(durable);
        worker_notify(&durable->worker);
    }
    pthread_mutex_unlock(&durable->lock);
    return NULL;
}

int durable_set_journal(struct durable *durable, const struct journal_settings *settings,
                        struct store *store, bool in_thread)
{
    if (durable->on || durable->journal)
        return -EBUSY;
    durable->files.settings = *settings;
    durable->files.keeps_journals = true;
    durable->store = store;
    return in_thread ? worker_start(&durable->worker, run_worker, durable) : 0;
}

void durable_forgo_journals(struct durable *durable)
{
    check(!durable->on && !durable->journal);
    durable->has_no_place = true;
}

static void fold_if_worn(struct durable *durable)
{
    struct fold *fold = &durable->fold;

    if (!durable->worker.has_thread || fold->is_wanted || fold->has_failed ||
        !journal_is_worn(durable->journal))
        return;
    /* Without memory it is tried again when the journal is full. */
    fold->has_failed = begin_fold(durable) < 0;
    fold->is_wanted = !fold->has_failed;
    worker_notify(&durable->worker);
}

/* All of folding that is not done yet. */
static int finish_fold(struct durable *durable)
{
    struct fold *fold = &durable->fold;

    int r = fold->base.exists ? 0 : begin_fold(durable);
    if (r >= 0 && !fold->journal)
        r = fold_write(fold, &durable->files);
    if (r >= 0)
        r = switch_fold(durable);
    fold_abandon(fold, durable->files.io);
    return r;
}

/* The journal is full: wait for its successor, or make it now. */
static int make_room(struct durable *durable)
{
    bool was_folding = durable->fold.is_wanted;

    join_fold(durable);
    if (was_folding && !durable->fold.has_failed)
        return 0;
    int r = finish_fold(durable);
    durable->fold.has_failed = r < 0;
    return r;
}

static bool is_usable(const struct durable *durable)
{
    return !durable->is_broken && !journal_is_broken(durable->journal);
}

/* Returns JOURNAL_FULL if there is no room for another. */
static int append(struct durable *durable)
{
    bool defers = durable->defers && !durable_has_anchor(durable);
    int (*write)(struct journal *, const struct delta_image *, const struct delta_image *) =
        defers ? journal_write : journal_append;
    struct delta_image base = image_as_delta(&durable->current);
    struct delta_image next = image_as_delta(&durable->next);

    next.common = &durable->common;
    durable->target = "journal";
    int r = write(durable->journal, &base, &next);
    if (r == JOURNAL_FULL && make_room(durable) >= 0) {
        r = write(durable->journal, &base, &next);
        check(r != JOURNAL_FULL);
    }
    durable->is_deferred = defers && r == 0;
    return r;
}

/* A file in place of another does not say which came later, as records of a journal do. */
static int expect(struct durable *durable, const uint8_t *digest)
{
    if (!durable_has_anchor(durable))
        return 0;
    return report_anchor(anchor_expect(durable->files.io, &durable->anchor, digest));
}

static int expect_next(struct durable *durable)
{
    const struct image *next = &durable->next;
    uint8_t digest[DIGEST_BYTES];

    if (!durable_has_anchor(durable))
        return 0;
    int r = digest_compute(next->bytes, next->n_bytes, digest);
    return r < 0 ? r : expect(durable, digest);
}

/* A change that the anchor has not seen could be rolled back unseen: it is none. */
static int show_anchor(struct durable *durable, struct image *image)
{
    if (!durable_has_anchor(durable))
        return 0;
    int r = image_number(image, durable->store);
    if (r >= 0)
        r = write_anchor(durable, image);
    if (r < 0) {
        durable->is_broken = durable->journal != NULL;
        durable->is_in_file = false;
    }
    return r;
}

/* Have the next image in a file that is durable but for its name. Returns 0 or a negative
 * errno; or 1: it is durable in room that was made for it. */
static int prepare_file(struct durable *durable)
{
    const uint8_t *identity = durable->files.settings.identity;

    join_ahead(durable);
    enum ahead_taken taken = ahead_take(&durable->ahead, &durable->next, identity);
    if (taken != AHEAD_NOTHING)
        return taken == AHEAD_IN_ROOM;
    clear_ahead(durable);
    return state_file_prepare(&durable->files, &durable->next, identity, false);
}

static int publish_file(struct durable *durable)
{
    int r = state_file_publish(&durable->files);

    if (r >= 0)
        r = drop_others(durable);
    note_file(durable, r);
    return r;
}

static int replace_file(struct durable *durable)
{
    durable->target = TPM_PERMANENT_ALL_NAME;
    int r = prepare_file(durable);
    if (r < 0)
        return r;
    if (r > 0) {
        durable->is_in_file = false;
        worker_notify(&durable->worker);
        return 0;
    }
    r = expect_next(durable);
    return r < 0 ? r : publish_file(durable);
}

/* What is numbered next begins a restore epoch. */
static void begin_epoch(struct durable *durable)
{
    uint64_t next = store_next_generation(durable->store, LINK_STATE_PERMANENT, 0);

    store_raise_generation(durable->store, LINK_STATE_PERMANENT, epoch_begin(next - 1) - 1);
}

/* libtpms may have changed it as it started. */
static bool is_as_brought(const struct durable *durable)
{
    const struct image *next = &durable->next;

    return next->n_bytes == durable->brought.n_bytes &&
           crc32c(next->bytes, next->n_bytes) == durable->brought.checksum;
}

/* In this order: a later image has the higher number. */
static int number_both(struct durable *durable)
{
    uint64_t kept = durable->coming.generation;

    if (kept > 0 && is_as_brought(durable)) {
        store_raise_generation(durable->store, LINK_STATE_PERMANENT, kept);
        return image_keep_number(&durable->next, kept);
    }
    int r = durable->current.exists ? image_number(&durable->current, durable->store) : 0;
    if (r >= 0 && durable->coming.begins_epoch)
        begin_epoch(durable);
    return r < 0 ? r : image_number(&durable->next, durable->store);
}

/* What a journal goes by. A file does not, and a guest's start waits for a file. */
static int digest_both(struct durable *durable)
{
    struct image *current = &durable->current, *next = &durable->next;

    int r = current->exists ? image_compute_digest(current, NULL, NULL) : 0;
    return r < 0 ? r : image_compute_digest(next, current, &durable->common);
}

static bool may_open_journal(const struct durable *durable)
{
    return !durable->journal && durable->on && durable->is_in_file && !durable->is_cramped &&
           !durable->has_no_place;
}

/* Returns 0 once there is a journal, or none is to be. */
static int see_to_journal(struct durable *durable)
{
    int r = number_both(durable);

    if (r >= 0 && (durable->journal || may_open_journal(durable)))
        r = digest_both(durable);
    if (r >= 0 && durable->journal && !is_usable(durable))
        r = close_journal(durable);
    if (r >= 0 && may_open_journal(durable))
        r = open_journal(durable);
    return r;
}

/* Make the next image durable, however that is done now. */
static int write_next(struct durable *durable)
{
    int r = durable->store ? see_to_journal(durable) : 0;
    if (r < 0)
        return r;
    if (durable->journal) {
        r = append(durable);
        if (r != JOURNAL_FULL)
            return r;
        r = close_journal(durable);
        if (r < 0)
            return r;
        durable->is_cramped = true;
    }
    return replace_file(durable);
}

/* Memory first: once a change is durable, nothing may fail. */
static int begin_next(struct durable *durable, const uint8_t *bytes, size_t n_bytes)
{
    struct image *current = &durable->current;

    durable->next = image_view(bytes, n_bytes);
    durable->next.time_ms = (uint64_t)clock_wall_ms();
    int r = image_reserve(current, n_bytes);
    if (r >= 0 && durable->defers)
        r = image_reserve(&durable->before, current->n_bytes);
    return r;
}

/* Have what was committed as the current image. */
static void become_next(struct durable *durable)
{
    if (durable->is_deferred)
        check(image_copy(&durable->before, &durable->current) == 0); /* there is room */
    image_follow(&durable->current, &durable->next, &durable->common);
}

static int commit(struct durable *durable, const uint8_t *bytes, size_t n_bytes)
{
    int r = settle_deferred(durable);

    if (r >= 0)
        r = begin_next(durable, bytes, n_bytes);
    if (r >= 0)
        r = write_next(durable);
    if (r >= 0)
        r = show_anchor(durable, &durable->next);
    if (r >= 0) {
        become_next(durable);
        durable->coming = (struct coming){0};
        durable->is_known = true;
        if (durable->journal)
            fold_if_worn(durable);
    }
    durable->next = (struct image){0};
    durable->is_unsure = r < 0;
    return r;
}

/* Have the image on the disk, where a commit that has failed may have left another. */
static int settle_failed(struct durable *durable)
{
    const struct image *current = &durable->current;

    if (!durable->is_unsure || !current->exists)
        return 0;
    durable->common = (struct delta_common){.prefix = current->n_bytes};
    return commit(durable, current->bytes, current->n_bytes);
}

int durable_commit(struct durable *durable, const uint8_t *bytes, size_t n_bytes)
{
    struct image *current = &durable->current;

    durable->common = delta_compare(current->bytes, current->n_bytes, bytes, n_bytes);
    /* libtpms commits at each INIT, and often nothing has changed: the image is durable. */
    if (!durable->coming.must_be_written && !durable->is_unsure && current->exists &&
        current->n_bytes == n_bytes && durable->common.prefix == n_bytes) {
        durable->coming = (struct coming){0};
        return 0;
    }
    pthread_mutex_lock(&durable->lock);
    int r = commit(durable, bytes, n_bytes);
    pthread_mutex_unlock(&durable->lock);
    return r;
}

static bool is_later(const struct checkpoint_lineage *lineage,
                     const struct checkpoint_lineage *ours)
{
    return memcmp(ours->identity, lineage->identity, sizeof(ours->identity)) == 0 &&
           lineage->generation > ours->generation;
}

/* What comes is of no later generation than what is here, or of another vTPM, in place of a known
 * one: what was written here is not all in it. So it is a snapshot: a vTPM that moves comes back
 * with a later one. */
static bool goes_back(const struct durable *durable, const struct checkpoint_lineage *lineage)
{
    struct checkpoint_lineage ours = durable_lineage(durable);

    return durable_is_known(durable) && !is_later(lineage, &ours);
}

/* What comes and is later is the state that it was elsewhere, until something changes it: so it has
 * that generation. Should it have been in vain, as the guest runs on there, what comes the next
 * time is no earlier one. */
static uint64_t kept_generation(const struct durable *durable,
                                const struct checkpoint_lineage *lineage)
{
    return goes_back(durable, lineage) ? 0 : lineage->generation;
}

/* The number that a commit will give the image, and with it its file, is known: the one that it
 * keeps, or one after that of the image that is there now, in the order of see_to_journal(). If
 * something else has taken it until then, the file is not the image's. */
static uint64_t next_generation(const struct durable *durable,
                                const struct checkpoint_lineage *lineage)
{
    const struct image *current = &durable->current;
    uint64_t kept = lineage ? kept_generation(durable, lineage) : 0;

    if (kept > 0)
        return kept;
    uint64_t next = store_next_generation(durable->store, LINK_STATE_PERMANENT,
                                          lineage ? lineage->generation : 0);

    next += current->exists && !current->is_numbered;
    return lineage && goes_back(durable, lineage) ? epoch_begin(next - 1) : next;
}

static bool may_prepare(const struct durable *durable)
{
    return durable->store && !durable->on && !durable->journal;
}

/* Only what a start may take up in place of what the directory has. */
static bool may_use_room(const struct durable *durable, const struct checkpoint_lineage *lineage)
{
    struct checkpoint_lineage ours = durable_lineage(durable);

    if (!lineage || durable_has_anchor(durable) || durable->has_others)
        return false;
    return !durable->current.exists || is_later(lineage, &ours);
}

void durable_bring(struct durable *durable, const uint8_t *bytes, size_t n_bytes)
{
    durable->brought = (struct brought){n_bytes, crc32c(bytes, n_bytes)};
}

void durable_prepare(struct durable *durable, const uint8_t *bytes, size_t n_bytes,
                     const struct checkpoint_lineage *lineage)
{
    pthread_mutex_lock(&durable->lock);
    if (may_prepare(durable)) {
        struct checkpoint_lineage wanted = lineage ? *lineage : durable_lineage(durable);
        wanted.generation = next_generation(durable, lineage);
        ahead_want(&durable->ahead, bytes, n_bytes, &wanted, may_use_room(durable, lineage));
    }
    pthread_mutex_unlock(&durable->lock);
    worker_notify(&durable->worker);
}

void durable_await(struct durable *durable)
{
    struct room *room = &durable->ahead.room;

    pthread_mutex_lock(&durable->lock);
    if (may_prepare(durable) && !durable->has_no_place && room->state == ROOM_NONE) {
        room_want(room, durable->worker.has_thread ? ROOM_DELAY_MS : 0);
        worker_notify(&durable->worker);
    }
    pthread_mutex_unlock(&durable->lock);
}

void durable_unprepare(struct durable *durable)
{
    if (durable->ahead.state == AHEAD_NONE)
        return;
    pthread_mutex_lock(&durable->lock);
    drop_ahead(durable);
    pthread_mutex_unlock(&durable->lock);
}

void durable_unawait(struct durable *durable)
{
    const struct room *room = &durable->ahead.room;

    durable_unprepare(durable);
    if (room->state == ROOM_NONE || room_keeps(room))
        return;
    pthread_mutex_lock(&durable->lock);
    drop_room(durable);
    pthread_mutex_unlock(&durable->lock);
}

void durable_work_ahead(struct durable *durable)
{
    pthread_mutex_lock(&durable->lock);
    if (has_work(durable))
        work(durable);
    pthread_mutex_unlock(&durable->lock);
}

int durable_load(struct durable *durable, const uint8_t *bytes, size_t n_bytes, bool is_in_file)
{
    if (durable->journal)
        return -EBUSY;
    int r = image_set(&durable->current, bytes, n_bytes);
    durable->is_in_file = r >= 0 && is_in_file;
    return r;
}

/* The journal first: without it the state that is elsewhere is still found. */
static int drop_journal(struct durable *durable)
{
    join_fold(durable);
    fold_abandon(&durable->fold, durable->files.io);
    if (!durable->journal)
        return 0;
    durable->is_broken = true;
    int r = journal_remove(durable->files.io);
    if (r < 0)
        return r;
    journal_free(durable->journal);
    durable->journal = NULL;
    durable->is_broken = false;
    durable->is_in_file = false;
    return 0;
}

/* Until the file has it, a start takes what is elsewhere: the anchor must have seen that. */
static int write_adopted(struct durable *durable, const uint8_t *elsewhere)
{
    struct anchor *anchor = &durable->anchor;

    int r = 0;

    if (durable_has_anchor(durable))
        r = report_anchor(
            anchor_write(durable->files.io, anchor, durable->next.generation, elsewhere));
    if (r >= 0)
        r = expect_next(durable);
    return r < 0 ? r : write_file(durable, &durable->next, false);
}

/* Without its journal the directory says nothing that the anchor has seen: so that is told first.
 */
static int adopt(struct durable *durable, const uint8_t *elsewhere, bool is_to_be_written,
                 const uint8_t *identity)
{
    int r = durable->store ? image_number(&durable->next, durable->store) : 0;
    if (r >= 0) {
        set_identity(durable, identity);
        r = expect(durable, elsewhere);
    }
    durable->is_adopting |= r >= 0;
    if (r >= 0)
        r = drop_journal(durable);
    if (r >= 0 && is_to_be_written)
        r = write_adopted(durable, elsewhere);
    return r < 0 ? r : show_anchor(durable, &durable->next);
}

int durable_adopt(struct durable *durable, const uint8_t *bytes, size_t n_bytes,
                  const uint8_t elsewhere[DIGEST_BYTES], bool is_to_be_written,
                  const uint8_t identity[CHECKPOINT_IDENTITY_BYTES])
{
    pthread_mutex_lock(&durable->lock);
    struct checkpoint_lineage ours = durable_lineage(durable);
    int r = settle_deferred(durable);
    if (r >= 0)
        r = empty_room(durable);
    if (r >= 0)
        r = begin_next(durable, bytes, n_bytes);
    if (r >= 0)
        r = adopt(durable, elsewhere, is_to_be_written, identity);
    if (r < 0) {
        set_identity(durable, ours.identity);
    } else {
        durable->common = (struct delta_common){0};
        become_next(durable);
        durable->is_known = true;
        durable->is_adopting = durable->is_unsure = false;
    }
    if (r >= 0 && is_to_be_written)
        note_file(durable, r);
    else
        durable->is_in_file = false;
    durable->next = (struct image){0};
    pthread_mutex_unlock(&durable->lock);
    return r;
}

bool durable_is_adopting(const struct durable *durable)
{
    return durable->is_adopting;
}

int durable_expect(struct durable *durable, const struct checkpoint_lineage *lineage)
{
    struct coming *coming = &durable->coming;
    int r = 0;

    check(!durable->on);
    pthread_mutex_lock(&durable->lock);
    struct checkpoint_lineage ours = durable_lineage(durable);
    bool is_same = memcmp(ours.identity, lineage->identity, sizeof(ours.identity)) == 0;
    if (!is_same) /* what the journal continues is still the other's */
        r = close_journal(durable);
    if (r >= 0) {
        coming->is_expected = true;
        coming->must_be_written = !is_same || lineage->generation > ours.generation;
        coming->begins_epoch = goes_back(durable, lineage);
        coming->generation = kept_generation(durable, lineage);
        memcpy(coming->before, ours.identity, sizeof(coming->before));
        set_identity(durable, lineage->identity);
    }
    pthread_mutex_unlock(&durable->lock);
    return r;
}

bool durable_has_come(struct durable *durable)
{
    bool has_come = !durable->coming.is_expected;

    if (!has_come)
        set_identity(durable, durable->coming.before);
    durable->coming = (struct coming){0};
    return has_come;
}

bool durable_get(const struct durable *durable, const uint8_t **bytes, size_t *n_bytes)
{
    *bytes = durable->current.bytes;
    *n_bytes = durable->current.n_bytes;
    return durable->current.exists;
}

void durable_defer(struct durable *durable, bool is_so)
{
    durable->defers = is_so;
}

int durable_store(struct durable *durable, pthread_mutex_t *lock)
{
    pthread_mutex_lock(&durable->lock);
    if (!durable->current.exists || durable->is_in_file || durable->journal) {
        pthread_mutex_unlock(&durable->lock);
        return 0;
    }
    clear_ahead(durable); /* which may give up its own lock: from here on that is kept */
    pthread_mutex_unlock(lock);
    int r = write_current(durable);
    pthread_mutex_unlock(&durable->lock);
    pthread_mutex_lock(lock);
    return r;
}

int durable_reclaim(struct durable *durable)
{
    int r = 0;

    pthread_mutex_lock(&durable->lock);
    check(!durable->journal);
    durable->has_others = true;
    durable->is_in_file = false;
    if (durable->current.exists)
        r = write_current(durable);
    pthread_mutex_unlock(&durable->lock);
    return r;
}

const char *durable_target(const struct durable *durable)
{
    return durable->target;
}

void durable_begin(struct durable *durable)
{
    if (durable->on)
        return;
    durable->on = true;
    durable->is_cramped = durable->fold.has_failed = false;
    durable_unawait(durable); /* it has started from something else */
}

void durable_pause(struct durable *durable)
{
    durable->on = false;
}

void durable_leave(struct durable *durable)
{
    durable->on = false;
    pthread_mutex_lock(&durable->lock);
    clear_ahead(durable);
    drop_room(durable);
    empty_room(durable);
    join_fold(durable);
    fold_abandon(&durable->fold, durable->files.io);
    settle_deferred(durable);
    pthread_mutex_unlock(&durable->lock);
}

bool durable_has_journal(const struct durable *durable)
{
    return durable->journal != NULL;
}

bool durable_is_in_room(const struct durable *durable)
{
    return room_keeps(&durable->ahead.room);
}

bool durable_is_removed(struct durable *durable)
{
    return durable->is_in_file && state_file_find(&durable->files) == -ENOENT;
}

int durable_end(struct durable *durable)
{
    durable->on = false;
    pthread_mutex_lock(&durable->lock);
    clear_ahead(durable);
    drop_room(durable);
    int r = empty_room(durable);
    join_room(durable);
    if (r >= 0)
        r = close_journal(durable);
    if (r >= 0)
        r = settle_failed(durable);
    pthread_mutex_unlock(&durable->lock);
    return r;
}
