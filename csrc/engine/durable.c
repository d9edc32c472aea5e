#include "durable.h"

#include <errno.h>
#include <libtpms/tpm_nvfilename.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "bytes.h"
#include "check.h"
#include "checkpoint.h"
#include "error.h"
#include "link_types.h"
#include "pages.h"

enum {
    FOLD_STACK_BYTES = 256 << 10,
};

_Static_assert(JOURNAL_IMAGE_TYPE == (int)LINK_STATE_PERMANENT, "types are the link's");
_Static_assert((int)CHECKPOINT_IDENTITY_BYTES == (int)JOURNAL_IDENTITY_BYTES, "the same identity");

struct image {
    uint8_t *bytes;
    size_t n_bytes, n_allocated;
    bool exists;
    bool is_numbered; /* what follows is known */
    uint64_t generation;
    uint8_t digest[DIGEST_BYTES];
};

struct fold {
    struct image base;
    struct journal *journal; /* its successor, unnamed */
    pthread_t thread;
    bool is_running; /* a thread is to be joined */
    bool is_over;    /* it will not wait for the lock any more */
    bool has_failed; /* the last one: not tried again until there is no other way */
};

/* What is to be committed next, if it has come from elsewhere. */
struct coming {
    bool is_expected;
    bool must_be_written;                      /* also if the image is the same */
    uint8_t before[CHECKPOINT_IDENTITY_BYTES]; /* the identity, should it not be committed */
};

struct durable {
    struct io *io;
    struct store *store; /* NULL: no journals */
    struct journal_settings settings;
    struct cipher_key key; /* of no bytes: the file is in the clear */
    struct anchor anchor;
    bool in_thread;
    bool on;
    pthread_mutex_t lock; /* over what follows */
    struct image current;
    struct image next; /* room for what is being committed */
    uint64_t loaded;   /* generation of an image that is not numbered anew yet */
    struct coming coming;
    bool is_in_file; /* the file has the image, and no journal continues it */
    struct journal *journal;
    bool is_broken; /* the journal, or the file, may not have its name: to be closed first */
    struct fold fold;
};

static void image_deinit(struct image *image)
{
    if (image->bytes)
        explicit_bzero(image->bytes, image->n_bytes);
    free(image->bytes);
    *image = (struct image){0};
}

static void image_wipe(struct image *image)
{
    if (image->bytes)
        explicit_bzero(image->bytes, image->n_bytes);
    image->n_bytes = 0;
    image->exists = image->is_numbered = false;
}

/* Memory first: without it the image stays as it is. */
static int image_set(struct image *image, const uint8_t *bytes, size_t n_bytes)
{
    uint8_t *larger = NULL;

    if (n_bytes > image->n_allocated || !image->bytes) {
        larger = malloc(n_bytes ? n_bytes : 1);
        if (!larger)
            return -ENOMEM;
    }
    image_wipe(image);
    if (larger) {
        free(image->bytes);
        image->bytes = larger;
        image->n_allocated = n_bytes;
    }
    if (n_bytes > 0)
        memcpy(image->bytes, bytes, n_bytes);
    image->n_bytes = n_bytes;
    image->exists = true;
    return 0;
}

static int image_number(struct image *image, struct store *store)
{
    if (image->is_numbered)
        return 0;
    if (image->n_bytes > IMAGE_BYTES_MAX)
        return -EMSGSIZE;
    int r = digest_compute(image->bytes, image->n_bytes, image->digest);
    if (r >= 0)
        r = store_take_generation(store, LINK_STATE_PERMANENT, &image->generation);
    image->is_numbered = r >= 0;
    return r;
}

static struct delta_image as_delta_image(const struct image *image)
{
    return (struct delta_image){image->bytes, image->n_bytes, image->generation, image->digest};
}

int durable_new(struct durable **out, struct io *io)
{
    struct durable *durable = calloc(1, sizeof(*durable));

    if (!durable)
        return -ENOMEM;
    durable->io = io;
    durable->anchor.fd = -1;
    check(pthread_mutex_init(&durable->lock, NULL) == 0);
    *out = durable;
    return 0;
}

void durable_free(struct durable *durable)
{
    check(!durable->fold.is_running);
    journal_free(durable->journal);
    journal_free(durable->fold.journal);
    image_deinit(&durable->current);
    image_deinit(&durable->next);
    image_deinit(&durable->fold.base);
    explicit_bzero(&durable->settings, sizeof(durable->settings));
    explicit_bzero(&durable->key, sizeof(durable->key));
    close_descriptor(&durable->anchor.fd);
    pthread_mutex_destroy(&durable->lock);
    free(durable);
}

void durable_set_journal(struct durable *durable, const struct journal_settings *settings,
                         struct store *store, bool in_thread)
{
    check(!durable->on && !durable->journal);
    durable->settings = *settings;
    durable->store = store;
    durable->in_thread = in_thread;
}

void durable_set_key(struct durable *durable, const struct cipher_key *key)
{
    check(!durable->on);
    durable->key = *key;
}

int durable_set_anchor(struct durable *durable, const struct anchor *anchor)
{
    check(!durable->on);
    if (!durable->store)
        return -EINVAL;
    durable->anchor = *anchor;
    return 0;
}

void durable_set_loaded(struct durable *durable, uint64_t generation)
{
    check(!durable->on);
    durable->loaded = generation;
}

static void set_identity(struct durable *durable, const uint8_t *identity)
{
    memcpy(durable->settings.identity, identity, sizeof(durable->settings.identity));
    memcpy(durable->anchor.identity, identity, sizeof(durable->anchor.identity));
}

struct checkpoint_lineage durable_lineage(const struct durable *durable)
{
    const struct image *image = &durable->current;
    struct checkpoint_lineage lineage = {
        .generation = image->is_numbered ? image->generation : durable->loaded,
    };

    memcpy(lineage.identity, durable->settings.identity, sizeof(lineage.identity));
    return lineage;
}

/* The one place where the permanent state's file is made. */
static int prepare_file(struct durable *durable, const struct image *image, bool is_continued)
{
    struct checkpoint_lineage lineage = {
        .generation = image->generation,
        .continued = is_continued,
    };

    memcpy(lineage.identity, durable->settings.identity, sizeof(lineage.identity));
    return checkpoint_prepare(durable->io, durable->key.n_bytes ? &durable->key : NULL,
                              TPM_PERMANENT_ALL_NAME, image->bytes, image->n_bytes,
                              durable->store ? &lineage : NULL);
}

static int publish_file(struct durable *durable)
{
    return checkpoint_publish(durable->io, TPM_PERMANENT_ALL_NAME);
}

static int write_file(struct durable *durable, const struct image *image, bool is_continued)
{
    int r = prepare_file(durable, image, is_continued);

    return r < 0 ? r : publish_file(durable);
}

/* sandbox: getrandom */
static int create_journal(struct durable *durable, const struct image *image,
                          struct journal **journal)
{
    uint8_t salt[JOURNAL_SALT_BYTES];
    struct delta_image base = as_delta_image(image);

    if (getrandom(salt, sizeof(salt), 0) != sizeof(salt))
        return -EIO;
    return journal_create(durable->io, &durable->settings, salt, &base, journal);
}

static int open_journal(struct durable *durable)
{
    int r = create_journal(durable, &durable->current, &durable->journal);

    if (r < 0)
        return r;
    durable->is_in_file = false;
    r = journal_publish(durable->journal);
    if (r >= 0)
        r = write_file(durable, &durable->current, true);
    durable->is_broken = r < 0;
    return r;
}

/* The file has the image afterwards, and nothing continues it. */
static int close_journal(struct durable *durable)
{
    if (!durable->journal)
        return 0;
    int r = prepare_file(durable, &durable->current, false);
    if (r < 0)
        return r; /* it goes on as it is */
    durable->is_broken = true;
    r = publish_file(durable);
    if (r >= 0)
        r = journal_remove(durable->io);
    if (r < 0)
        return r;
    journal_free(durable->journal);
    durable->journal = NULL;
    durable->is_in_file = true;
    return 0;
}

static int begin_fold(struct durable *durable)
{
    struct image *base = &durable->fold.base;

    int r = image_set(base, durable->current.bytes, durable->current.n_bytes);
    if (r < 0)
        return r;
    base->is_numbered = true;
    base->generation = durable->current.generation;
    memcpy(base->digest, durable->current.digest, DIGEST_BYTES);
    return 0;
}

static int write_fold(struct durable *durable)
{
    struct fold *fold = &durable->fold;

    int r = write_file(durable, &fold->base, true);
    return r < 0 ? r : create_journal(durable, &fold->base, &fold->journal);
}

/* What was committed since folding began. */
static void abandon_fold(struct durable *durable)
{
    struct fold *fold = &durable->fold;

    if (fold->journal)
        journal_remove_temporary(durable->io);
    journal_free(fold->journal);
    fold->journal = NULL;
    image_wipe(&fold->base);
}

/* What was committed since folding began. */
static int catch_up(struct durable *durable)
{
    struct delta_image base = as_delta_image(&durable->fold.base);
    struct delta_image current = as_delta_image(&durable->current);

    if (base.generation == current.generation)
        return 0;
    int r = journal_append(durable->fold.journal, &base, &current);
    check(r != JOURNAL_FULL); /* a new journal has room for any record */
    return r;
}

static int switch_fold(struct durable *durable)
{
    struct fold *fold = &durable->fold;

    int r = catch_up(durable);
    if (r < 0)
        return r;
    r = journal_publish(fold->journal);
    journal_free(durable->journal);
    durable->journal = fold->journal;
    fold->journal = NULL;
    /* If it is not known which of the two has the name, neither takes more. */
    durable->is_broken = r < 0;
    return r;
}

/* All of folding that is not done yet. */
static int finish_fold(struct durable *durable)
{
    int r = durable->fold.base.exists ? 0 : begin_fold(durable);

    if (r >= 0 && !durable->fold.journal)
        r = write_fold(durable);
    if (r >= 0)
        r = switch_fold(durable);
    abandon_fold(durable);
    return r;
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
    return durable->fold.base.exists ? write_fold(durable) : -EINVAL;
}

int durable_switch_fold(struct durable *durable)
{
    pthread_mutex_lock(&durable->lock);
    int r = durable->fold.journal ? switch_fold(durable) : -EINVAL;
    abandon_fold(durable);
    pthread_mutex_unlock(&durable->lock);
    return r;
}

static void *run_fold(void *argument)
{
    struct durable *durable = argument;

    int r = write_fold(durable);
    pthread_mutex_lock(&durable->lock);
    if (r >= 0)
        r = switch_fold(durable);
    abandon_fold(durable);
    durable->fold.has_failed = r < 0;
    durable->fold.is_over = true;
    pthread_mutex_unlock(&durable->lock);
    if (r < 0)
        error_report("cannot fold tpm2-00.journal into tpm2-00.permall: %s; the guest is served "
                     "on until the journal is full: make room or repair the file system",
                     strerror(-r));
    return NULL;
}

/* clone3() has its flags in memory, where no filter sees them: the C library then takes clone().
 * sandbox: clone3=ENOSYS mprotect(arg2 lacks PROT_EXEC) set_robust_list rseq
 *          clone(arg0 == CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SYSVSEM | CLONE_SIGHAND |
 *                CLONE_THREAD | CLONE_SETTLS | CLONE_PARENT_SETTID | CLONE_CHILD_CLEARTID) */
static void start_fold(struct durable *durable)
{
    pthread_attr_t attributes;

    check(pthread_attr_init(&attributes) == 0);
    check(pthread_attr_setstacksize(&attributes, FOLD_STACK_BYTES) == 0);
    /* Without memory it is tried again when the journal is full. */
    durable->fold.is_running =
        begin_fold(durable) >= 0 &&
        pthread_create(&durable->fold.thread, &attributes, run_fold, durable) == 0;
    durable->fold.has_failed = !durable->fold.is_running;
    pthread_attr_destroy(&attributes);
}

/* With the lock, which the thread needs to get done. */
/* sandbox: futex */
static void join_fold(struct durable *durable)
{
    if (!durable->fold.is_running)
        return;
    pthread_mutex_unlock(&durable->lock);
    pthread_join(durable->fold.thread, NULL);
    pthread_mutex_lock(&durable->lock);
    durable->fold.is_running = durable->fold.is_over = false;
}

static void fold_if_worn(struct durable *durable)
{
    struct fold *fold = &durable->fold;

    if (fold->is_over)
        join_fold(durable);
    if (durable->in_thread && !fold->is_running && !fold->has_failed &&
        journal_is_worn(durable->journal))
        start_fold(durable);
}

/* The journal is full: wait for its successor, or make it now. */
static int make_room(struct durable *durable)
{
    bool was_folding = durable->fold.is_running;

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

static int append(struct durable *durable)
{
    int r = durable->journal ? 0 : open_journal(durable);

    if (r < 0)
        return r;
    struct delta_image base = as_delta_image(&durable->current);
    struct delta_image next = as_delta_image(&durable->next);
    r = journal_append(durable->journal, &base, &next);
    if (r == JOURNAL_FULL) {
        r = make_room(durable);
        if (r >= 0)
            r = journal_append(durable->journal, &base, &next);
        check(r != JOURNAL_FULL);
    }
    return r;
}

static int report_anchor(int r)
{
    if (r < 0)
        error_report("cannot write the anchor: %s; make room or mount what holds it", strerror(-r));
    return r;
}

/* A file in place of another does not say which came later, as records of a journal do. */
static int expect_next(struct durable *durable)
{
    if (durable->anchor.fd < 0)
        return 0;
    return report_anchor(anchor_expect(durable->io, &durable->anchor, durable->next.digest));
}

/* A change that the anchor has not seen could be rolled back unseen: it is none. */
static int show_anchor(struct durable *durable, struct image *image)
{
    if (durable->anchor.fd < 0)
        return 0;
    int r = image_number(image, durable->store);
    if (r >= 0)
        r = anchor_write(durable->io, &durable->anchor, image->generation, image->digest);
    if (report_anchor(r) < 0) {
        durable->is_broken = durable->journal != NULL;
        durable->is_in_file = false;
    }
    return r;
}

/* Make the next image durable, however that is done now. */
static int write_next(struct durable *durable)
{
    if (durable->store) {
        /* In this order: a later image has the higher number. */
        int r = durable->current.exists ? image_number(&durable->current, durable->store) : 0;
        if (r >= 0)
            r = image_number(&durable->next, durable->store);
        if (r >= 0 && durable->journal && !is_usable(durable))
            r = close_journal(durable);
        if (r < 0)
            return r;
        if (durable->journal || (durable->on && durable->is_in_file))
            return append(durable);
    }
    int r = expect_next(durable);
    if (r < 0)
        return r;
    r = write_file(durable, &durable->next, false);
    durable->is_in_file = r >= 0; /* else it may have either */
    return r;
}

static int commit(struct durable *durable, const uint8_t *bytes, size_t n_bytes)
{
    /* Memory first: once the change is durable, nothing may fail. */
    int r = image_set(&durable->next, bytes, n_bytes);
    if (r >= 0)
        r = write_next(durable);
    if (r >= 0)
        r = show_anchor(durable, &durable->next);
    if (r >= 0) {
        struct image before = durable->current;
        durable->current = durable->next;
        durable->next = before;
        durable->coming = (struct coming){0};
        if (durable->journal)
            fold_if_worn(durable);
    }
    image_wipe(&durable->next);
    return r;
}

int durable_commit(struct durable *durable, const uint8_t *bytes, size_t n_bytes)
{
    const struct image *current = &durable->current;

    /* libtpms commits at each INIT, and often nothing has changed: the image is durable. */
    if (current->exists && current->n_bytes == n_bytes && !durable->coming.must_be_written &&
        memcmp(current->bytes, bytes, n_bytes) == 0) {
        durable->coming = (struct coming){0};
        return 0;
    }
    pthread_mutex_lock(&durable->lock);
    int r = commit(durable, bytes, n_bytes);
    pthread_mutex_unlock(&durable->lock);
    return r;
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
    if (!durable->journal)
        return 0;
    durable->is_broken = true;
    int r = journal_remove(durable->io);
    if (r < 0)
        return r;
    journal_free(durable->journal);
    durable->journal = NULL;
    durable->is_broken = false;
    durable->is_in_file = false;
    return 0;
}

static int adopt(struct durable *durable, bool is_elsewhere, const uint8_t *identity)
{
    int r = durable->store ? image_number(&durable->next, durable->store) : 0;
    if (r >= 0)
        r = drop_journal(durable);
    if (r >= 0)
        set_identity(durable, identity);
    if (r >= 0 && !is_elsewhere)
        r = expect_next(durable);
    if (r >= 0 && !is_elsewhere)
        r = write_file(durable, &durable->next, false);
    return r < 0 ? r : show_anchor(durable, &durable->next);
}

int durable_adopt(struct durable *durable, const uint8_t *bytes, size_t n_bytes, bool is_elsewhere,
                  const uint8_t identity[CHECKPOINT_IDENTITY_BYTES])
{
    pthread_mutex_lock(&durable->lock);
    struct checkpoint_lineage ours = durable_lineage(durable);
    int r = image_set(&durable->next, bytes, n_bytes);
    if (r >= 0)
        r = adopt(durable, is_elsewhere, identity);
    if (r < 0) {
        set_identity(durable, ours.identity);
    } else {
        struct image before = durable->current;
        durable->current = durable->next;
        durable->next = before;
    }
    durable->is_in_file = r >= 0 && !is_elsewhere;
    image_wipe(&durable->next);
    pthread_mutex_unlock(&durable->lock);
    return r;
}

int durable_expect(struct durable *durable, const struct checkpoint_lineage *lineage)
{
    struct coming *coming = &durable->coming;

    check(!durable->on);
    pthread_mutex_lock(&durable->lock);
    /* What the journal continues is still the other's. */
    int r = close_journal(durable);
    if (r >= 0) {
        struct checkpoint_lineage ours = durable_lineage(durable);
        bool is_same = memcmp(ours.identity, lineage->identity, sizeof(ours.identity)) == 0;
        coming->is_expected = true;
        coming->must_be_written = !is_same || lineage->generation > ours.generation;
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

int durable_store(struct durable *durable)
{
    int r = 0;

    pthread_mutex_lock(&durable->lock);
    if (durable->current.exists && !durable->is_in_file && !durable->journal) {
        if (durable->store)
            r = image_number(&durable->current, durable->store);
        if (r >= 0)
            r = write_file(durable, &durable->current, false);
        durable->is_in_file = r >= 0;
    }
    pthread_mutex_unlock(&durable->lock);
    return r;
}

void durable_begin(struct durable *durable)
{
    durable->on = true;
}

static void leave(struct durable *durable)
{
    durable->on = false;
    join_fold(durable);
    abandon_fold(durable);
    durable->fold.has_failed = false;
}

void durable_leave(struct durable *durable)
{
    pthread_mutex_lock(&durable->lock);
    leave(durable);
    pthread_mutex_unlock(&durable->lock);
}

int durable_end(struct durable *durable)
{
    pthread_mutex_lock(&durable->lock);
    leave(durable);
    int r = close_journal(durable);
    pthread_mutex_unlock(&durable->lock);
    return r;
}
