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
#include "coming.h"
#include "crc32c.h"
#include "epoch.h"
#include "error.h"
#include "fold.h"
#include "image.h"
#include "link_types.h"
#include "standing.h"
#include "state_files.h"
#include "version.h"
#include "worker.h"

_Static_assert(JOURNAL_IMAGE_TYPE == (int)LINK_STATE_PERMANENT, "types are the link's");

/* Whether a journal may be opened. */
enum journals {
    JOURNALS_OFF, /* as the TPM is */
    JOURNALS_ON,
    JOURNALS_CRAMPED, /* the TPM is on, and there was no room for one since */
    JOURNALS_STATES,
};

enum journals_event {
    JOURNALS_BEGUN,
    JOURNALS_PAUSED,
    JOURNALS_NO_ROOM,
    JOURNALS_EVENTS,
};

static const enum journals journals_after[JOURNALS_EVENTS][JOURNALS_STATES] = {
    /* of               JOURNALS_OFF, JOURNALS_ON, JOURNALS_CRAMPED */
    [JOURNALS_BEGUN] = {JOURNALS_ON, JOURNALS_ON, JOURNALS_CRAMPED},
    [JOURNALS_PAUSED] = {JOURNALS_OFF, JOURNALS_OFF, JOURNALS_OFF},
    [JOURNALS_NO_ROOM] = {JOURNALS_OFF, JOURNALS_CRAMPED, JOURNALS_CRAMPED},
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
    bool has_no_place;     /* for journals: there never are any */
    enum journals journals;
    pthread_mutex_t lock; /* over what follows */
    struct image current;
    struct image before;        /* of a deferred commit; or room for it */
    struct image next;          /* a view of what is being committed */
    struct delta_common common; /* to that and the current one */
    uint64_t loaded;            /* generation of an image that is not numbered anew yet */
    bool is_known;              /* the image's identity: what others have written says none */
    struct coming coming;
    struct brought brought;
    _Atomic struct standing standing;
    bool has_others; /* there may be a journal that another process has left */
    struct journal *journal;
    bool defers;        /* a commit need not wait for the journal's sync */
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

/* The one writer of how the image stands. */
static void note(struct durable *durable, enum standing_event event)
{
    struct standing after = standing_after(event, durable->standing);
    bool has_journal = after.place >= PLACE_JOURNAL && after.place <= PLACE_REMOVING;

    check((durable->journal != NULL) == has_journal);
    durable->standing = after;
}

static enum standing_place place_of(const struct durable *durable)
{
    struct standing now = durable->standing;

    return now.place;
}

static enum standing_last last_of(const struct durable *durable)
{
    struct standing now = durable->standing;

    return now.last;
}

/* The one writer of whether a journal may be opened. */
static void note_journals(struct durable *durable, enum journals_event event)
{
    durable->journals = journals_after[event][durable->journals];
}

static bool is_on(const struct durable *durable)
{
    return durable->journals != JOURNALS_OFF;
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
    if (is_on(durable) || durable->journal)
        return -EBUSY;
    pthread_mutex_lock(&durable->lock);
    clear_ahead(durable);
    durable->files.key = *key;
    pthread_mutex_unlock(&durable->lock);
    return 0;
}

int durable_set_anchor(struct durable *durable, const struct anchor *anchor)
{
    if (is_on(durable) || !durable->store)
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
    check(!is_on(durable));
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

/* It keeps nothing that is not in its file. */
static void release_room(struct durable *durable)
{
    room_release(&durable->ahead.room);
    worker_notify(&durable->worker);
}

/* The file has been replaced, or that has failed: then it may have either image. */
static void note_file(struct durable *durable, int r)
{
    note(durable, r < 0 ? STANDING_NOT_WRITTEN : STANDING_WRITTEN);
    if (r < 0)
        return;
    release_room(durable);
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
        note_journals(durable, JOURNALS_NO_ROOM);
        error_report("cannot make %s: %s; each change replaces the whole state, which is slower: "
                     "make room, then restart the guest",
                     version_now()->journal_name, strerror(-r));
        return 0;
    }
    note(durable, STANDING_OPENING);
    r = journal_publish(durable->journal);
    if (r >= 0)
        r = write_file(durable, &durable->current, true);
    if (r >= 0)
        note(durable, STANDING_OPENED);
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
    if (last_of(durable) != LAST_DEFERRED)
        return 0;
    durable->target = "journal";
    int r = journal_sync(durable->journal);
    note(durable, r < 0 ? STANDING_NOT_SYNCED : STANDING_SYNCED);
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
    note(durable, STANDING_CLOSING);
    r = state_file_publish(&durable->files);
    if (r >= 0)
        r = journal_remove(durable->files.io);
    if (r < 0)
        return r;
    journal_free(durable->journal);
    durable->journal = NULL;
    note(durable, STANDING_CLOSED);
    return 0;
}

static int switch_fold(struct durable *durable)
{
    struct journal *before = durable->journal;

    bool is_deferred = last_of(durable) == LAST_DEFERRED;
    int r = is_deferred ? journal_sync(before) : 0; /* it may keep the name */
    if (r >= 0)
        r = fold_switch(&durable->fold, &durable->current, &durable->journal);
    /* If it is not known which of the two has the name, neither takes more. Both have all of it. */
    if (durable->journal != before) {
        note(durable, r < 0 ? STANDING_NOT_SWITCHED : STANDING_SWITCHED);
        image_wipe(&durable->before);
    }
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
    int r = place_of(durable) == PLACE_JOURNAL ? begin_fold(durable) : -EINVAL;
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
    if (is_on(durable) || durable->journal)
        return -EBUSY;
    durable->files.settings = *settings;
    durable->files.keeps_journals = true;
    durable->store = store;
    return in_thread ? worker_start(&durable->worker, run_worker, durable) : 0;
}

void durable_forgo_journals(struct durable *durable)
{
    check(!is_on(durable) && !durable->journal);
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
    return place_of(durable) == PLACE_JOURNAL && !journal_is_broken(durable->journal);
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
    if (defers && r == 0)
        note(durable, STANDING_DEFERRED);
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
    if (r < 0)
        note(durable, STANDING_UNSEEN);
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
        note(durable, STANDING_IN_ROOM);
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
    if (r >= 0 && coming_begins_epoch(durable->coming.state))
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
    return durable->journals == JOURNALS_ON && place_of(durable) == PLACE_FILE &&
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
        note_journals(durable, JOURNALS_NO_ROOM);
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
    if (last_of(durable) == LAST_DEFERRED)
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
        note(durable, STANDING_COMMITTED);
        become_next(durable);
        coming_end(&durable->coming);
        durable->is_known = true;
        if (durable->journal)
            fold_if_worn(durable);
    } else {
        note(durable, STANDING_NOT_COMMITTED);
    }
    durable->next = (struct image){0};
    return r;
}

/* Have the image on the disk, where a commit that has failed may have left another. */
static int settle_failed(struct durable *durable)
{
    const struct image *current = &durable->current;

    if (last_of(durable) != LAST_UNSURE || !current->exists)
        return 0;
    durable->common = (struct delta_common){.prefix = current->n_bytes};
    return commit(durable, current->bytes, current->n_bytes);
}

int durable_commit(struct durable *durable, const uint8_t *bytes, size_t n_bytes)
{
    struct image *current = &durable->current;

    durable->common = delta_compare(current->bytes, current->n_bytes, bytes, n_bytes);
    /* libtpms commits at each INIT, and often nothing has changed: the image is durable. */
    if (!coming_is_written(durable->coming.state) && last_of(durable) != LAST_UNSURE &&
        current->exists && current->n_bytes == n_bytes && durable->common.prefix == n_bytes) {
        coming_end(&durable->coming);
        return 0;
    }
    pthread_mutex_lock(&durable->lock);
    int r = commit(durable, bytes, n_bytes);
    pthread_mutex_unlock(&durable->lock);
    return r;
}

/* What a state of this lineage is, where there is the image. */
static enum coming_state kind_of(const struct durable *durable,
                                 const struct checkpoint_lineage *lineage)
{
    struct checkpoint_lineage ours = durable_lineage(durable);

    return coming_kind(lineage, &ours, durable_is_known(durable));
}

/* The number that a commit will give the image, and with it its file, is known: the one that it
 * keeps, or one after that of the image that is there now, in the order of see_to_journal(). If
 * something else has taken it until then, the file is not the image's. */
static uint64_t next_generation(const struct durable *durable,
                                const struct checkpoint_lineage *lineage)
{
    const struct image *current = &durable->current;
    enum coming_state kind = lineage ? kind_of(durable, lineage) : COMING_NOTHING;
    uint64_t kept = lineage ? coming_generation(kind, lineage) : 0;

    if (kept > 0)
        return kept;
    uint64_t next = store_next_generation(durable->store, LINK_STATE_PERMANENT,
                                          lineage ? lineage->generation : 0);

    next += current->exists && !current->is_numbered;
    return coming_begins_epoch(kind) ? epoch_begin(next - 1) : next;
}

static bool may_prepare(const struct durable *durable)
{
    return durable->store && !is_on(durable) && !durable->journal;
}

/* Only what a start may take up in place of what the directory has. */
static bool may_use_room(const struct durable *durable, const struct checkpoint_lineage *lineage)
{
    struct checkpoint_lineage ours = durable_lineage(durable);

    if (!lineage || durable_has_anchor(durable) || durable->has_others)
        return false;
    return !durable->current.exists || coming_is_later(lineage, &ours);
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
    note(durable, r >= 0 && is_in_file ? STANDING_LOADED : STANDING_LOADED_ELSEWHERE);
    return r;
}

/* The journal first: without it the state that is elsewhere is still found. */
static int drop_journal(struct durable *durable)
{
    if (!durable->journal)
        return 0;
    int r = journal_remove(durable->files.io);
    if (r < 0)
        return r;
    journal_free(durable->journal);
    durable->journal = NULL;
    note(durable, STANDING_REMOVED);
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
    if (r >= 0) {
        join_fold(durable);
        fold_abandon(&durable->fold, durable->files.io);
        note(durable, STANDING_ADOPTING);
        r = drop_journal(durable);
    }
    if (r >= 0 && is_to_be_written)
        r = write_adopted(durable, elsewhere);
    return r < 0 ? r : show_anchor(durable, &durable->next);
}

static void become_adopted(struct durable *durable, bool is_in_file)
{
    durable->common = (struct delta_common){0};
    become_next(durable);
    durable->is_known = true;
    note(durable, is_in_file ? STANDING_ADOPTED_FILE : STANDING_ADOPTED);
    if (is_in_file)
        release_room(durable);
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
        note(durable, STANDING_NOT_ADOPTED);
    } else {
        become_adopted(durable, is_to_be_written);
    }
    durable->next = (struct image){0};
    pthread_mutex_unlock(&durable->lock);
    return r;
}

bool durable_is_adopting(const struct durable *durable)
{
    enum standing_place place = place_of(durable);

    return place == PLACE_REMOVING || place == PLACE_HALF;
}

int durable_expect(struct durable *durable, const struct checkpoint_lineage *lineage)
{
    int r = 0;

    check(!is_on(durable));
    pthread_mutex_lock(&durable->lock);
    struct checkpoint_lineage ours = durable_lineage(durable);
    bool is_same = memcmp(ours.identity, lineage->identity, sizeof(ours.identity)) == 0;
    if (!is_same) /* what the journal continues is still the other's */
        r = close_journal(durable);
    if (r >= 0) {
        coming_expect(&durable->coming, lineage, &ours, durable_is_known(durable));
        set_identity(durable, lineage->identity);
    }
    pthread_mutex_unlock(&durable->lock);
    return r;
}

bool durable_has_come(struct durable *durable)
{
    bool has_come = durable->coming.state == COMING_NOTHING;

    if (!has_come)
        set_identity(durable, durable->coming.before);
    coming_end(&durable->coming);
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
    if (!durable->current.exists || place_of(durable) == PLACE_FILE || durable->journal) {
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
    note(durable, STANDING_RECLAIMED);
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
    bool was_on = is_on(durable);

    note_journals(durable, JOURNALS_BEGUN);
    if (was_on)
        return;
    durable->fold.has_failed = false;
    durable_unawait(durable); /* it has started from something else */
}

void durable_pause(struct durable *durable)
{
    note_journals(durable, JOURNALS_PAUSED);
}

void durable_leave(struct durable *durable)
{
    note_journals(durable, JOURNALS_PAUSED);
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
    return place_of(durable) == PLACE_FILE && state_file_find(&durable->files) == -ENOENT;
}

int durable_end(struct durable *durable)
{
    note_journals(durable, JOURNALS_PAUSED);
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
