/* The permanent state's whole life on a file system that fails and loses power: opening, appending,
 * folding between commits and beside them, closing.
 *
 * Invariant 1: a commit that was acknowledged is there after a loss of power at any later call.
 * Invariant 2: what a start recovers is the last image that was acknowledged, or the one under way;
 * and if the journal were gone, the start would not go without it.
 * A file that was made ahead is published only if it is what the commit would have written, and is
 * there no more once it is of no use.
 * No nonce is used twice with a key, across failures, losses of power and folds.
 *
 * Short lives are enumerated: a loss of power at every call, in every way. Long ones are sampled;
 * the seed is printed, and DURABLE_SEED=n in the environment repeats it.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "bytes.h"
#include "checkpoint.h"
#include "durable.h"
#include "epoch.h"
#include "io_memory.h"
#include "pages.h"
#include "state_directory.h"

enum {
    FILE_BYTES = 2 * JOURNAL_PAGE_BYTES,
    IMAGE_BYTES = 1500,
    SMALL_CHANGE = 8,
    LARGE_CHANGE = 500,
    SEALED = 1,
    PLAIN = 0,
    OTHER = 4711, /* an image */
    WAIT_MS = 10000,
};

#define TEMPORARY_NAME "TMP2-00.permall"

static const struct journal_settings settings_of[] = {
    [PLAIN] = {.identity = "this vTPM's own.", .file_bytes = FILE_BYTES},
    [SEALED] = {.identity = "this vTPM's own.",
                .secret = "a secret of thirty-two bytes....",
                .sealed = true,
                .file_bytes = FILE_BYTES},
};

/* Image `number`: it begins with its number, and differs from the one before as much as a change
 * of NV memory does. */
static void make_image(uint32_t number, uint8_t bytes[IMAGE_BYTES])
{
    size_t n_changed = number % 5 == 4 ? LARGE_CHANGE : SMALL_CHANGE;

    for (size_t i = 0; i < IMAGE_BYTES; i++)
        bytes[i] = (uint8_t)(i * i + i / 256);
    for (size_t i = 0; i < n_changed; i++)
        bytes[(size_t)number * 37 % 900 + i] = (uint8_t)(number * 7 + i * i);
    put_be32(bytes, number);
}

static bool is_image(const uint8_t *bytes, size_t n_bytes, uint32_t number)
{
    uint8_t expected[IMAGE_BYTES];

    make_image(number, expected);
    return n_bytes == IMAGE_BYTES && memcmp(bytes, expected, IMAGE_BYTES) == 0;
}

/* A state directory, and the engine's part that writes to it. */
struct world {
    struct io_memory io;
    struct store *store, *writable;
    struct durable *durable;
    const struct journal_settings *settings;
    bool on;
    bool is_file_unsure;   /* to write it has failed: it may have either image */
    bool is_elsewhere;     /* and the file has image OTHER, until the first commit */
    uint32_t acknowledged; /* the last image that was */
    uint32_t deferred;     /* the last that was committed without waiting; it need not be there */
    uint32_t under_way;    /* the last of those that came after it, and may be there too */
};

static void start(struct world *world, const uint8_t *image, bool is_in_file)
{
    assert_int_equal(store_new(&world->store), 0);
    assert_int_equal(store_map(&world->writable, store_fd(world->store), true), 0);
    assert_int_equal(durable_new(&world->durable, &world->io.io), 0);
    durable_set_journal(world->durable, world->settings, world->writable, false);
    assert_int_equal(durable_load(world->durable, image, IMAGE_BYTES, is_in_file), 0);
}

/* As the process ends: nothing is written. */
static void quit(struct world *world)
{
    durable_free(world->durable);
    store_free(world->writable);
    store_free(world->store);
}

/* Image 0 is in a file as swtpm writes it, or, durable elsewhere, another is. */
static void world_init(struct world *world, int sealed, bool is_in_file)
{
    uint8_t image[IMAGE_BYTES];

    *world = (struct world){.settings = &settings_of[sealed], .is_elsewhere = !is_in_file};
    io_memory_init(&world->io);
    make_image(is_in_file ? 0 : OTHER, image);
    assert_int_equal(checkpoint_write(&world->io.io, NULL, "permall", image, IMAGE_BYTES, NULL), 0);
    make_image(0, image);
    start(world, image, is_in_file);
    world->io.calls = world->io.syncs = 0;
}

static void world_deinit(struct world *world)
{
    quit(world);
    io_memory_deinit(&world->io);
}

static int commit_next(struct world *world)
{
    uint8_t image[IMAGE_BYTES];

    world->under_way++;
    make_image(world->under_way, image);
    int r = durable_commit(world->durable, image, IMAGE_BYTES);
    world->is_file_unsure = r < 0 && !world->on;
    return r;
}

static int commit(struct world *world)
{
    int r = commit_next(world);

    if (r == 0)
        world->acknowledged = world->under_way;
    return r;
}

static int commit_deferred(struct world *world)
{
    durable_defer(world->durable, true);
    int r = commit_next(world);
    durable_defer(world->durable, false);
    if (r == 0)
        world->deferred = world->under_way;
    return r;
}

/* Of the vTPM's own lineage, unless another is given. */
static void prepare(struct world *world, uint32_t number, const struct checkpoint_lineage *lineage)
{
    uint8_t image[IMAGE_BYTES];

    make_image(number, image);
    durable_bring(world->durable, image, IMAGE_BYTES);
    durable_prepare(world->durable, image, IMAGE_BYTES, lineage);
}

static uint32_t number_of_image(const struct world *world)
{
    const uint8_t *bytes;
    size_t n_bytes;

    assert_true(durable_get(world->durable, &bytes, &n_bytes));
    return get_be32(bytes);
}

static void begin(struct world *world)
{
    durable_begin(world->durable);
    world->on = true;
}

static int end(struct world *world)
{
    int r = durable_end(world->durable);

    world->on = false;
    if (r == 0 && !world->is_file_unsure) {
        uint32_t number = number_of_image(world);
        assert_true(number == world->acknowledged || number == world->deferred);
        world->under_way = world->acknowledged = number;
    }
    return r;
}

/* A snapshot of the image that is here is loaded over it, as by tpm_init_come(); the TPM is off. */
static int commit_restored(struct world *world, const struct checkpoint_lineage *lineage)
{
    durable_pause(world->durable);
    world->on = false;
    store_raise_generation(world->writable, JOURNAL_IMAGE_TYPE, lineage->generation);
    int r = durable_expect(world->durable, lineage);
    if (r >= 0)
        r = commit(world);
    assert_int_equal(durable_has_come(world->durable), r == 0);
    return r;
}

static int restore(struct world *world)
{
    struct checkpoint_lineage lineage = durable_lineage(world->durable);

    return commit_restored(world, &lineage);
}

/* One step of a life: (b)egin, (c)ommit, commit (d)eferred, (e)nd; the parts of folding: (f),
 * (w)rite, (s)witch; (r)estore a snapshot; and the next commit's file: (p)repare it, or (o)ther's,
 * (u)nprepare, and what is to be done (a)head for that. */
static int take_step(struct world *world, char step)
{
    switch (step) {
    case 'b':
        begin(world);
        return 0;
    case 'c':
        return commit(world);
    case 'd':
        return commit_deferred(world);
    case 'e':
        return end(world);
    case 'f':
        return durable_begin_fold(world->durable);
    case 'w':
        return durable_write_fold(world->durable);
    case 'p':
        prepare(world, world->under_way + 1, NULL);
        return 0;
    case 'o':
        prepare(world, OTHER, NULL);
        return 0;
    case 'r':
        return restore(world);
    case 'u':
        durable_unprepare(world->durable);
        return 0;
    case 'a':
        durable_work_ahead(world->durable);
        return 0;
    default:
        assert_int_equal(step, 's');
        return durable_switch_fold(world->durable);
    }
}

/* Returns true if nothing failed. */
static bool live(struct world *world, const char *life)
{
    for (const char *step = life; *step; step++)
        if (take_step(world, *step) < 0)
            return false;
    return true;
}

static bool is_allowed(const struct world *world, const uint8_t *bytes, size_t n_bytes)
{
    uint32_t number = get_be32(bytes);

    if (number == OTHER)
        return world->is_elsewhere && world->acknowledged == 0 && is_image(bytes, n_bytes, OTHER);
    return number >= world->acknowledged && number <= world->under_way &&
           is_image(bytes, n_bytes, number);
}

/* The oracle. */
static bool is_recovered(const struct io_memory *after, const void *context)
{
    const struct world *world = context;
    static uint8_t image[IMAGE_BYTES_MAX];
    struct journal_evidence evidence;
    struct journal_recovery recovery;

    if (!state_directory_read(after, world->settings, &evidence))
        return false;
    for (int lost = 0; lost <= 1; lost++) {
        if (lost)
            evidence.journal = NULL;
        state_directory_recover(&evidence, image, &recovery);
        if (lost && !journal_may_start(&recovery))
            continue;
        if (!journal_may_start(&recovery) || !recovery.has_image ||
            !is_allowed(world, image, recovery.image_bytes))
            return false;
    }
    return true;
}

/* Lose power at every call, in every way. Returns false at the first image that was lost. */
static bool survives_every_power_loss(const char *life, int sealed, bool is_in_file, int skip_sync)
{
    bool survived = true, finished = false;

    for (int call = 1; survived && !finished; call++) {
        assert_true(call < 1000);
        struct world world;
        world_init(&world, sealed, is_in_file);
        world.io.fail_from = call;
        world.io.skip_sync = skip_sync;
        finished = live(&world, life);
        survived = io_memory_survives(&world.io, is_recovered, &world);
        world_deinit(&world);
    }
    return survived;
}

/* Commits before, between and after the parts of folding, folds one after the other, a full
 * journal, ends and beginnings. Outside of b and e a commit writes the file, as does the first of a
 * state that is elsewhere. */
static const char *const lives[] = {
    "cbccce",
    "bcfwsce",
    "bccfcwcscce",
    "bcfwcsfcwsce",
    "bcccebcce",
    "bcfwcebcfwcsce",
    "bcccccccccccccccccccccce",
    "bcd",
    "bcdcdebdce",
    "bcddfwsdce",
    "bcfdwdscfwdcsdce",
    "bcccccccccccddddddddddde",
    "pacbcce",
    "pcbcce",
    "oacbcce",
    "ocbcce",
    "paucpacbce",
    "puacbcce",
    "papcbce",
    "ppacbce",
    "pabcce",
    "paece",
    "pabcebce",
    "bccrbcce",
    "crbccrrebcce",
    "bcdrebce",
    "bcfwrscbcrfwsce",
};
static const char *const lives_from_elsewhere[] = {"bcccebce", "cbcce", "bccfcwcsce", "pacbcce",
                                                   "pabcce"};

static void check_lives(const char *const *which, size_t n, bool is_in_file)
{
    for (size_t i = 0; i < n; i++)
        for (int sealed = PLAIN; sealed <= SEALED; sealed++)
            if (!survives_every_power_loss(which[i], sealed, is_in_file, 0))
                fail_msg("%s, sealed %d, in file %d", which[i], sealed, is_in_file);
}

#define COUNT(array) (sizeof(array) / sizeof(*(array)))

static void invariant_1_every_power_loss_leaves_what_was_acknowledged(void **state)
{
    (void)state;
    check_lives(lives, COUNT(lives), true);
    check_lives(lives_from_elsewhere, COUNT(lives_from_elsewhere), false);
}

/* How many calls a life makes, and how many syncs of them. */
static int count_calls(const char *life, int *n_syncs)
{
    struct world world;

    world_init(&world, PLAIN, true);
    assert_true(live(&world, life));
    *n_syncs = world.io.syncs;
    int n = world.io.calls;
    world_deinit(&world);
    return n;
}

/* One that is not missed would be one too many. Only the last is: a journal whose removal was not
 * synced may be there again, with nothing in it that the file does not have. */
static void canary_every_sync_that_is_left_out_is_missed(void **state)
{
    static const char *const some[] = {"bccfwsce", "bccce",  "bcdce", "bcdfwsce",
                                       "bcde",     "pacbce", "bcrbce"};

    (void)state;
    for (size_t i = 0; i < COUNT(some); i++) {
        int n_syncs;
        count_calls(some[i], &n_syncs);
        for (int sync = 1; sync < n_syncs; sync++)
            if (survives_every_power_loss(some[i], PLAIN, true, sync))
                fail_msg("sync %d of %d in %s is not needed", sync, n_syncs, some[i]);
        assert_true(survives_every_power_loss(some[i], PLAIN, true, n_syncs));
    }
}

/* Files that were once seen, by their salt. */
struct seen {
    uint8_t (*files)[FILE_BYTES];
    size_t n_files, n_allocated;
};

static uint8_t *find_seen(struct seen *seen, const uint8_t *file)
{
    for (size_t i = 0; i < seen->n_files; i++)
        if (memcmp(seen->files[i] + JOURNAL_AT_SALT, file + JOURNAL_AT_SALT, JOURNAL_SALT_BYTES) ==
            0)
            return seen->files[i];
    if (seen->n_files == seen->n_allocated) {
        /* A sanitizer copies all of it each time. */
        seen->n_allocated = seen->n_allocated * 2 + 16;
        seen->files = realloc(seen->files, seen->n_allocated * FILE_BYTES);
        assert_non_null(seen->files);
    }
    memset(seen->files[seen->n_files], 0, FILE_BYTES);
    return seen->files[seen->n_files++];
}

/* A salt makes the key and a place in the file has one sequence number: so a sector that once held
 * something may be gone, but never hold anything else. */
static void check_nonces(struct seen *seen, const struct io_memory *io)
{
    static const uint8_t empty[JOURNAL_SECTOR_BYTES];

    for (int i = 0; i < IO_MEMORY_FILES_MAX; i++) {
        const struct io_memory_file *file = &io->files[i];
        if (!file->used || file->n_bytes < FILE_BYTES || get_be64(file->bytes) != JOURNAL_MAGIC)
            continue;
        uint8_t *before = find_seen(seen, file->bytes);
        for (size_t at = 0; at < FILE_BYTES; at += JOURNAL_SECTOR_BYTES) {
            if (memcmp(file->bytes + at, empty, sizeof(empty)) == 0)
                continue;
            if (memcmp(before + at, empty, sizeof(empty)) != 0)
                assert_memory_equal(file->bytes + at, before + at, JOURNAL_SECTOR_BYTES);
            memcpy(before + at, file->bytes + at, JOURNAL_SECTOR_BYTES);
        }
    }
}

static void check_every_power_loss(const struct world *world)
{
    assert_true(io_memory_survives(&world->io, is_recovered, world));
}

static bool is_off(const struct world *world)
{
    return world->io.off_from && world->io.calls >= world->io.off_from;
}

/* libtpms has stopped the TPM, and the guest restarts. */
static void restart(struct world *world)
{
    assert_true(end(world) == 0 || is_off(world));
    begin(world);
}

/* Go through a life of which a call fails, and end before the next if the power is off. Of a
 * fold that is over the other parts do nothing. */
static void live_with_a_failure(struct world *world, const char *life, bool restarts)
{
    struct seen seen = {0};

    for (const char *step = life; *step && !is_off(world); step++) {
        int r = take_step(world, *step);
        check_nonces(&seen, &world->io);
        if (!restarts || r == 0 || is_off(world))
            continue;
        if (*step == 'c' || *step == 'd')
            restart(world);
        else if (*step == 'e')
            assert_true(end(world) == 0 || is_off(world));
    }
    free(seen.files);
}

/* A call fails once, half-way or when all is done with a guest that restarts, or before it began
 * with one that does not; power is lost at any later call. Without that, all is well again after a
 * restart. */
static void what_fails_once_loses_nothing(void **state)
{
    static const char *const some[] = {"bcccfcwcsce", "bccecbcce", "bccebcce",
                                       "bcfwsce",     "bcdcde",    "bcfdwsdfwsce",
                                       "pacbce",      "oaucpcbce", "pabcce"};
    enum { GOES_ON, HALF_AND_RESTARTS, LATE_AND_RESTARTS, VARIANTS };

    (void)state;
    for (size_t i = 0; i < COUNT(some) * VARIANTS; i++) {
        int variant = i % VARIANTS, n_syncs, n_calls = count_calls(some[i / VARIANTS], &n_syncs);
        for (int call = 1; call <= n_calls; call++) {
            bool went_off = true;
            for (int off = call + 1; went_off; off++) {
                struct world world;
                world_init(&world, SEALED, true);
                world.io.fail_from = call;
                world.io.fail_to = call + 1;
                world.io.fail_half = variant == HALF_AND_RESTARTS;
                world.io.fail_late = variant == LATE_AND_RESTARTS;
                world.io.fail_error = ENOSPC;
                world.io.off_from = off;
                live_with_a_failure(&world, some[i / VARIANTS], variant != GOES_ON);
                check_every_power_loss(&world);
                went_off = is_off(&world);
                if (!went_off) {
                    world.io.off_from = 0;
                    restart(&world);
                    for (int n = 0; n < 3; n++)
                        assert_int_equal(commit(&world), 0);
                    check_every_power_loss(&world);
                }
                world_deinit(&world);
            }
        }
    }
}

/* Lose power, start again from what was recovered, and go on. */
static void lose_power(struct world *world, struct io_choices *choices)
{
    static uint8_t image[IMAGE_BYTES_MAX];
    struct journal_evidence evidence;
    struct journal_recovery recovery;
    struct io_memory after;

    io_memory_init(&after);
    io_memory_lose_power(&world->io, choices, &after);
    assert_true(is_recovered(&after, world));
    assert_true(state_directory_read(&after, world->settings, &evidence));
    state_directory_recover(&evidence, image, &recovery);
    state_directory_fold(&after, world->settings, image, &recovery);
    quit(world);
    io_memory_deinit(&world->io);
    world->io = after;
    world->under_way = world->acknowledged = world->deferred = get_be32(image);
    start(world, image, true);
}

static void live_at_random(uint64_t seed, struct seen *seen)
{
    enum { CRASHES = 6, STEPS_MAX = 120, CALLS_MAX = 300 };
    struct io_choices choices;
    struct world world;

    io_choices_init_sampled(&choices, seed);
    world_init(&world, SEALED, true);
    for (int crash = 0; crash < CRASHES; crash++) {
        const char *fold = "";
        world.io.fail_from = 1 + (int)io_choose(&choices, CALLS_MAX);
        durable_begin(world.durable);
        for (int step = 0; step < STEPS_MAX; step++) {
            uint32_t dice = io_choose(&choices, 20);
            bool ending = dice == 0 && !*fold;
            if (dice == 1 && !*fold && world.acknowledged % 3 == 0)
                fold = "fws";
            char commits = dice % 3 == 2 ? 'd' : 'c';
            char next = dice < 4 && *fold ? *fold++ : ending ? 'e' : commits;
            int r = take_step(&world, next);
            check_nonces(seen, &world.io);
            if (r == -EINVAL)
                fold = "";
            else if (r < 0)
                break;
            if (ending)
                durable_begin(world.durable);
        }
        lose_power(&world, &choices);
    }
    world_deinit(&world);
}

static void long_lives_survive_power_losses(void **state)
{
    enum { LIVES = 150 };
    const char *wanted = getenv("DURABLE_SEED");
    uint64_t first = wanted ? strtoull(wanted, NULL, 0) : (uint64_t)time(NULL);
    struct seen seen = {0};

    (void)state;
    printf("seeds %llu and the %d after it\n", (unsigned long long)first, LIVES - 1);
    for (uint64_t seed = first; seed < first + LIVES; seed++) {
        live_at_random(seed, &seen);
        if (seen.n_files > 200)
            seen.n_files = 0;
    }
    free(seen.files);
}

static void without_a_journal_every_commit_writes_the_file(void **state)
{
    struct io_memory io;
    struct durable *durable;
    const uint8_t *bytes;
    size_t n_bytes;
    uint8_t image[IMAGE_BYTES];

    (void)state;
    io_memory_init(&io);
    assert_int_equal(durable_new(&durable, &io.io), 0);
    durable_begin(durable);
    for (uint32_t number = 0; number < 3; number++) {
        make_image(number, image);
        assert_int_equal(durable_commit(durable, image, IMAGE_BYTES), 0);
        assert_true(io_memory_read_durable(&io, "tpm2-00.permall", &bytes, &n_bytes));
        assert_int_equal(n_bytes, CHECKPOINT_HEADER_BYTES + IMAGE_BYTES);
        assert_memory_equal(bytes + CHECKPOINT_HEADER_BYTES, image, IMAGE_BYTES);
        assert_false(io_memory_read(&io, JOURNAL_NAME, &bytes, &n_bytes));
    }
    assert_int_equal(durable_end(durable), 0);
    durable_free(durable);
    io_memory_deinit(&io);
}

static void a_tpm_that_is_off_has_no_journal(void **state)
{
    struct world world;
    const uint8_t *bytes;
    size_t n_bytes;

    (void)state;
    world_init(&world, PLAIN, true);
    assert_int_equal(commit(&world), 0);
    assert_false(io_memory_read(&world.io, JOURNAL_NAME, &bytes, &n_bytes));
    durable_begin(world.durable);
    assert_false(io_memory_read(&world.io, JOURNAL_NAME, &bytes, &n_bytes));
    assert_int_equal(commit(&world), 0);
    assert_true(io_memory_read(&world.io, JOURNAL_NAME, &bytes, &n_bytes));
    assert_int_equal(durable_end(world.durable), 0);
    assert_false(io_memory_read(&world.io, JOURNAL_NAME, &bytes, &n_bytes));
    assert_true(io_memory_read_durable(&world.io, "tpm2-00.permall", &bytes, &n_bytes));
    assert_int_equal(bytes[1], 1); /* swtpm takes it */
    assert_true(is_image(bytes + CHECKPOINT_HEADER_BYTES, IMAGE_BYTES, 2));
    world_deinit(&world);
}

/* As the journal of a vTPM on another host, which had the directory meanwhile. */
static void leave_a_journal(struct io *io)
{
    int fd = io->create(io, "TMP2-00.journal");

    assert_true(fd >= 0);
    io->close(io, fd);
    assert_int_equal(io->rename(io, "TMP2-00.journal", JOURNAL_NAME), 0);
    assert_int_equal(io->find(io, JOURNAL_NAME), 0);
}

static void what_another_process_has_left_is_replaced(void **state)
{
    struct world world;
    const uint8_t *bytes;
    uint8_t image[IMAGE_BYTES];
    size_t n_bytes;

    (void)state;
    world_init(&world, PLAIN, true);
    durable_begin(world.durable);
    assert_int_equal(commit(&world), 0);
    assert_int_equal(durable_end(world.durable), 0);
    leave_a_journal(&world.io.io);
    make_image(OTHER, image);
    assert_int_equal(checkpoint_write(&world.io.io, NULL, "permall", image, IMAGE_BYTES, NULL), 0);
    int n_failed = 0, r = -EIO;
    for (; r < 0; n_failed += r < 0) {
        world.io.fail_from = world.io.calls + 1 + n_failed;
        r = durable_reclaim(world.durable);
    }
    world.io.fail_from = 0;
    assert_true(n_failed > 3);
    assert_true(io_memory_read_durable(&world.io, "tpm2-00.permall", &bytes, &n_bytes));
    assert_true(is_image(bytes + CHECKPOINT_HEADER_BYTES, IMAGE_BYTES, 1));
    assert_false(io_memory_read_durable(&world.io, JOURNAL_NAME, &bytes, &n_bytes));
    world_deinit(&world);
}

static void what_comes_replaces_what_another_process_has_left(void **state)
{
    struct io_memory io;
    struct durable *durable;
    const uint8_t *bytes;
    uint8_t image[IMAGE_BYTES];
    size_t n_bytes;

    (void)state;
    io_memory_init(&io);
    assert_int_equal(durable_new(&durable, &io.io), 0);
    leave_a_journal(&io.io);
    assert_int_equal(durable_reclaim(durable), 0);
    assert_true(io_memory_read(&io, JOURNAL_NAME, &bytes, &n_bytes));
    make_image(0, image);
    assert_int_equal(durable_commit(durable, image, IMAGE_BYTES), 0);
    assert_false(io_memory_read_durable(&io, JOURNAL_NAME, &bytes, &n_bytes));
    durable_free(durable);
    io_memory_deinit(&io);
}

static void a_small_commit_writes_one_sector_and_syncs_once(void **state)
{
    struct world world;

    (void)state;
    world_init(&world, SEALED, true);
    durable_begin(world.durable);
    assert_int_equal(commit(&world), 0);
    world.io.calls = world.io.syncs = 0;
    assert_int_equal(commit(&world), 0);
    assert_int_equal(world.io.calls, 2);
    assert_int_equal(world.io.syncs, 1);
    world_deinit(&world);
}

/* The sync that one need not wait for is another's: of the next, or of who leaves the directory. */
static void a_deferred_commit_syncs_with_the_next(void **state)
{
    struct world world;

    (void)state;
    world_init(&world, SEALED, true);
    begin(&world);
    assert_int_equal(commit(&world), 0);
    for (int leaves = 0; leaves <= 1; leaves++) {
        world.io.calls = world.io.syncs = 0;
        assert_int_equal(commit_deferred(&world), 0);
        assert_int_equal(world.io.calls, 1);
        assert_int_equal(world.io.syncs, 0);
        check_every_power_loss(&world);
        if (leaves)
            durable_leave(world.durable);
        else
            assert_int_equal(commit(&world), 0);
        assert_int_equal(world.io.syncs, leaves ? 1 : 2);
        world.acknowledged = number_of_image(&world);
        check_every_power_loss(&world);
    }
    world_deinit(&world);
}

static void what_comes_takes_the_place_of_a_deferred_commit(void **state)
{
    uint8_t image[IMAGE_BYTES], digest[DIGEST_BYTES];
    struct world world;

    (void)state;
    world_init(&world, SEALED, true);
    begin(&world);
    assert_int_equal(commit(&world), 0);
    assert_int_equal(commit_deferred(&world), 0);
    make_image(OTHER, image);
    assert_int_equal(digest_compute(image, IMAGE_BYTES, digest), 0);
    assert_int_equal(
        durable_adopt(world.durable, image, IMAGE_BYTES, digest, true, world.settings->identity),
        0);
    assert_int_equal(number_of_image(&world), OTHER);
    world.under_way = world.acknowledged = 0;
    assert_int_equal(commit(&world), 0);
    check_every_power_loss(&world);
    world_deinit(&world);
}

static void an_image_that_is_elsewhere_is_put_into_its_file(void **state)
{
    struct world world;
    const uint8_t *bytes;
    size_t n_bytes;

    (void)state;
    world_init(&world, PLAIN, false);
    assert_int_equal(state_directory_store(world.durable), 0);
    assert_true(io_memory_read_durable(&world.io, "tpm2-00.permall", &bytes, &n_bytes));
    assert_true(is_image(bytes + CHECKPOINT_HEADER_BYTES, IMAGE_BYTES, 0));
    int calls = world.io.calls;
    assert_int_equal(state_directory_store(world.durable), 0);
    assert_int_equal(world.io.calls, calls);
    /* With a journal it is in the two together. */
    durable_begin(world.durable);
    assert_int_equal(commit(&world), 0);
    calls = world.io.calls;
    assert_int_equal(state_directory_store(world.durable), 0);
    assert_int_equal(world.io.calls, calls);
    assert_int_equal(durable_load(world.durable, bytes, IMAGE_BYTES, false), -EBUSY);
    world_deinit(&world);
}

/* A full disk: the file for folding cannot be made. The journal serves on for as long as it can. */
static void a_journal_that_cannot_be_folded_goes_on_until_it_is_full(void **state)
{
    struct world world;
    int n = 0;

    (void)state;
    world_init(&world, PLAIN, true);
    world.io.fail_error = ENOSPC;
    world.io.fails_to_create = true;
    durable_begin(world.durable);
    assert_int_equal(commit(&world), -ENOSPC); /* nor opened */
    world.io.fails_to_create = false;
    restart(&world);
    assert_int_equal(commit(&world), 0);
    world.io.fails_to_create = true;
    while (commit(&world) == 0)
        n++;
    assert_true(n >= 5 && n <= FILE_BYTES / JOURNAL_SECTOR_BYTES);
    check_every_power_loss(&world);
    /* There is room again: also without a restart, as nothing was written. */
    world.io.fails_to_create = false;
    for (n = 0; n < 100; n++)
        assert_int_equal(commit(&world), 0);
    check_every_power_loss(&world);
    world_deinit(&world);
}

static uint64_t time_of_last_record(const struct world *world)
{
    static uint8_t image[IMAGE_BYTES_MAX];
    static struct journal_history history;
    struct journal_evidence evidence;
    struct journal_recovery recovery;

    assert_true(state_directory_read(&world->io, world->settings, &evidence));
    assert_int_equal(journal_recover_history(&evidence, image, &recovery, &history), 0);
    assert_true(history.n_steps > 0);
    return history.steps[history.n_steps - 1].header.time_ms;
}

static uint64_t wall_ms(void)
{
    struct timespec now;

    clock_gettime(CLOCK_REALTIME, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

static void a_record_says_when_it_was_committed(void **state)
{
    const struct timespec some_ms = {.tv_nsec = 3000000};
    struct world world;

    (void)state;
    for (int sealed = 0; sealed <= 1; sealed++) {
        world_init(&world, sealed, true);
        uint64_t before = wall_ms();
        assert_true(live(&world, "bcfwcc"));
        uint64_t written = time_of_last_record(&world);
        assert_true(written >= before && written <= wall_ms());
        nanosleep(&some_ms, NULL);
        assert_true(live(&world, "s")); /* what is carried over is as old as it was */
        assert_true(time_of_last_record(&world) == written);
        world_deinit(&world);
    }
}

static bool has_journal(const struct world *world)
{
    const uint8_t *bytes;
    size_t n_bytes;

    return io_memory_read(&world->io, JOURNAL_NAME, &bytes, &n_bytes);
}

/* A disk with room for files, and none for a journal; or not for another one beside it. */
static void where_a_journal_has_no_room_files_are_replaced(void **state)
{
    (void)state;
    for (int opened = 0; opened <= 1; opened++) {
        struct world world;
        world_init(&world, SEALED, true);
        world.io.fail_error = ENOSPC;
        begin(&world);
        if (opened)
            assert_int_equal(commit(&world), 0);
        assert_int_equal(has_journal(&world), opened);
        world.io.no_room_for = JOURNAL_TEMPORARY_NAME;
        for (int n = 0; n < 100; n++)
            assert_int_equal(commit(&world), 0);
        assert_false(has_journal(&world));
        check_every_power_loss(&world);
        /* There is room again, and the guest restarts. */
        world.io.no_room_for = NULL;
        durable_pause(world.durable);
        begin(&world);
        assert_int_equal(commit(&world), 0);
        assert_true(has_journal(&world));
        check_every_power_loss(&world);
        world_deinit(&world);
    }
}

/* Whether a file is image `number`'s as the commit has made it: of this vTPM and generation. */
static bool is_file_of(const struct world *world, const char *file_name, uint32_t number,
                       const struct checkpoint_lineage *lineage)
{
    const uint8_t *bytes, *found;
    size_t n_bytes;

    if (!io_memory_read_durable(&world->io, file_name, &bytes, &n_bytes) ||
        n_bytes != CHECKPOINT_HEADER_BYTES + IMAGE_BYTES + SWTPM_TLV_BYTES + SWTPM_LINEAGE_BYTES)
        return false;
    found = bytes + n_bytes - SWTPM_LINEAGE_BYTES;
    return bytes[SWTPM_AT_MINIMUM_VERSION] == SWTPM_MINIMUM_VERSION &&
           is_image(bytes + CHECKPOINT_HEADER_BYTES, IMAGE_BYTES, number) &&
           get_be64(found + SWTPM_AT_GENERATION) == lineage->generation &&
           memcmp(found + SWTPM_AT_IDENTITY, lineage->identity, sizeof(lineage->identity)) == 0;
}

static bool has_temporary(const struct world *world)
{
    const uint8_t *bytes;
    size_t n_bytes;

    return io_memory_read(&world->io, TEMPORARY_NAME, &bytes, &n_bytes);
}

static const struct checkpoint_lineage another_vtpm = {.identity = "another vTPM's..",
                                                       .generation = 5000};

/* What a QEMU brings: image 1, of this vTPM or another. */
static void bring(struct world *world, const struct checkpoint_lineage *lineage)
{
    prepare(world, 1, lineage);
    durable_work_ahead(world->durable);
    assert_true(has_temporary(world));
    world->io.calls = 0;
}

/* What INIT does: as arrival_start() and tpm_init_come(). Returns how many calls it made. */
static int commit_what_came(struct world *world, const struct checkpoint_lineage *lineage)
{
    if (lineage) {
        store_raise_generation(world->writable, JOURNAL_IMAGE_TYPE, lineage->generation);
        assert_int_equal(durable_expect(world->durable, lineage), 0);
    }
    assert_int_equal(commit(world), 0);
    assert_true(durable_has_come(world->durable));
    int n_calls = world->io.calls;
    struct checkpoint_lineage now = durable_lineage(world->durable);
    assert_true(is_file_of(world, "tpm2-00.permall", world->under_way, &now));
    assert_true(!lineage || now.generation >= lineage->generation);
    assert_false(has_temporary(world));
    begin(world);
    assert_int_equal(commit(world), 0); /* the journal has higher numbers than its base */
    assert_int_equal(end(world), 0);
    check_every_power_loss(world);
    return n_calls;
}

enum {
    PUBLISH_CALLS = 2, /* the name, and the directory's sync */
    WRITE_CALLS = 3 + PUBLISH_CALLS,
    REMOVE_CALLS = 1,
};

static void what_was_made_ahead_is_only_published(void **state)
{
    const struct checkpoint_lineage *const lineages[] = {NULL, &another_vtpm};

    (void)state;
    for (size_t i = 0; i < COUNT(lineages); i++) {
        for (int times = 1; times <= 2; times++) {
            struct world world;
            world_init(&world, SEALED, true);
            if (times == 2) /* over an image that is numbered */
                assert_int_equal(commit(&world), 0);
            prepare(&world, world.under_way + 1, lineages[i]);
            durable_work_ahead(world.durable);
            world.io.calls = 0;
            assert_int_equal(commit_what_came(&world, lineages[i]), PUBLISH_CALLS);
            world_deinit(&world);
        }
    }
}

/* What may come in between: each makes the file another one than the commit's. */
static void come_another_image(struct world *world)
{
    world->under_way++;
}

static void come_another_vtpm(struct world *world)
{
    assert_int_equal(durable_expect(world->durable, &another_vtpm), 0);
}

static void come_a_number(struct world *world)
{
    uint64_t taken;

    assert_int_equal(store_take_generation(world->writable, JOURNAL_IMAGE_TYPE, &taken), 0);
}

static void come_a_floor(struct world *world)
{
    store_raise_generation(world->writable, JOURNAL_IMAGE_TYPE, 7000);
}

static void what_was_made_ahead_of_something_else_is_not_used(void **state)
{
    void (*const comes[])(struct world *) = {come_another_image, come_another_vtpm, come_a_number,
                                             come_a_floor};

    (void)state;
    for (size_t i = 0; i < COUNT(comes); i++) {
        struct world world;
        world_init(&world, SEALED, true);
        bring(&world, NULL);
        comes[i](&world);
        world.io.calls = 0;
        assert_int_equal(commit_what_came(&world, NULL), REMOVE_CALLS + WRITE_CALLS);
        world_deinit(&world);
    }
}

/* Returns the generation of what a start makes of the directory. */
static uint64_t recovered_generation(const struct world *world)
{
    static uint8_t image[IMAGE_BYTES_MAX];
    struct journal_evidence evidence;
    struct journal_recovery recovery;

    assert_true(state_directory_read(&world->io, world->settings, &evidence));
    state_directory_recover(&evidence, image, &recovery);
    assert_true(journal_may_start(&recovery));
    return recovery.generation;
}

static uint64_t generation_now(const struct world *world)
{
    return durable_lineage(world->durable).generation;
}

/* The guest that was there runs on from what is there: nothing else may be there then. */
static void run_on(struct world *world)
{
    uint8_t image[IMAGE_BYTES];

    make_image(number_of_image(world), image);
    assert_int_equal(durable_commit(world->durable, image, IMAGE_BYTES), 0);
    begin(world);
    world->under_way = number_of_image(world);
}

/* It is not loaded, and the disk may have it all the same: until the TPM starts from what was there
 * before, or is ended in order. Whatever its commit fails at, before, half-way or when all is done.
 */
static void what_could_not_be_put_back_is_gone_when_the_guest_runs_on(void **state)
{
    static const char *const before[] = {"c", "bc", "bce", "bcd", "bcccccccccccccccccccce"};
    enum { NOT_DONE, HALF_DONE, DONE, VARIANTS };
    int n_failed = 0;

    (void)state;
    for (size_t i = 0; i < COUNT(before) * VARIANTS * 2; i++) {
        int variant = (int)(i % VARIANTS);
        bool is_ended = i / VARIANTS % 2;
        for (int call = 1, r = -1; call < 30; call++) {
            struct world world;
            world_init(&world, SEALED, true);
            assert_true(live(&world, before[i / VARIANTS / 2]));
            world.io.fail_from = world.io.calls + call;
            world.io.fail_to = world.io.fail_from + 1;
            world.io.fail_half = variant == HALF_DONE;
            world.io.fail_late = variant == DONE;
            world.io.fail_error = EIO;
            r = restore(&world);
            n_failed += r < 0;
            check_every_power_loss(&world);
            if (r < 0 && is_ended) {
                assert_int_equal(durable_end(world.durable), 0);
                world.under_way = number_of_image(&world);
            } else if (r < 0) {
                run_on(&world);
            }
            check_every_power_loss(&world);
            world_deinit(&world);
        }
    }
    assert_true(n_failed > 100);
}

/* Three in a row, older by this much: each the first of the next epoch, where a start finds it. */
static void check_epochs(struct world *world, uint64_t back)
{
    for (uint64_t epoch = 1; epoch <= 3; epoch++) {
        struct checkpoint_lineage lineage = durable_lineage(world->durable);
        lineage.generation -= back;
        assert_int_equal(commit_restored(world, &lineage), 0);
        assert_int_equal(generation_now(world), epoch * EPOCH_GENERATIONS);
        if (durable_has_journal(world->durable))
            assert_int_equal(recovered_generation(world), epoch * EPOCH_GENERATIONS);
        check_every_power_loss(world);
        begin(world);
        assert_int_equal(commit(world), 0);
        /* Where there was no journal, it begins with the number of its base. */
        assert_int_equal(generation_now(world), epoch * EPOCH_GENERATIONS + 1);
        assert_int_equal(recovered_generation(world), epoch * EPOCH_GENERATIONS + 1);
        check_every_power_loss(world);
    }
}

static void a_state_that_is_put_back_begins_the_next_epoch(void **state)
{
    (void)state;
    for (int sealed = PLAIN; sealed <= SEALED; sealed++) {
        for (uint64_t back = 0; back < 2; back++) {
            for (int has_journal = 0; has_journal <= 1; has_journal++) {
                struct world world;
                world_init(&world, sealed, true);
                begin(&world);
                assert_int_equal(commit(&world), 0);
                if (!has_journal)
                    assert_int_equal(end(&world), 0);
                check_epochs(&world, back);
                world_deinit(&world);
            }
        }
    }
}

/* A later one is of a vTPM that comes back; the same is here; and of what nobody knows whose it is,
 * nobody knows what it was. */
static void what_puts_nothing_back_begins_no_epoch(void **state)
{
    uint8_t image[IMAGE_BYTES];
    struct world world;

    (void)state;
    world_init(&world, PLAIN, true);
    struct checkpoint_lineage lineage = durable_lineage(world.durable);
    assert_int_equal(commit_restored(&world, &lineage), 0);
    assert_int_equal(epoch_of(generation_now(&world)), 0);
    lineage = durable_lineage(world.durable);
    assert_int_equal(durable_expect(world.durable, &lineage), 0);
    make_image(world.acknowledged, image);
    assert_int_equal(durable_commit(world.durable, image, IMAGE_BYTES), 0);
    assert_true(durable_has_come(world.durable));
    lineage.generation++;
    assert_int_equal(commit_restored(&world, &lineage), 0);
    assert_int_equal(generation_now(&world), lineage.generation + 1);
    world_deinit(&world);
}

/* It is the state that it was elsewhere; what libtpms has changed, as it started, is one of its
 * own. What is changed then has a later number. */
static void what_comes_keeps_its_generation(void **state)
{
    uint8_t image[IMAGE_BYTES];

    (void)state;
    for (int has_journal = 0; has_journal <= 1; has_journal++) {
        for (uint32_t changed = 0; changed <= 1; changed++) {
            struct world world;
            world_init(&world, SEALED, true);
            if (has_journal)
                assert_true(live(&world, "bc"));
            struct checkpoint_lineage lineage = durable_lineage(world.durable);
            lineage.generation = 5000;
            make_image(world.under_way + 1 + changed, image);
            durable_bring(world.durable, image, IMAGE_BYTES);
            assert_int_equal(commit_restored(&world, &lineage), 0);
            assert_int_equal(generation_now(&world) == 5000, !changed);
            assert_int_equal(epoch_of(generation_now(&world)), 0);
            check_every_power_loss(&world);
            begin(&world);
            assert_int_equal(commit(&world), 0);
            assert_true(generation_now(&world) > 5000);
            assert_int_equal(recovered_generation(&world), generation_now(&world));
            world_deinit(&world);
        }
    }
}

/* The last ones are for imports. */
static void a_state_is_put_back_when_no_epoch_is_left(void **state)
{
    const uint64_t last = GENERATION_GIVEN_MAX - EPOCHS_OF_IMPORTS * EPOCH_GENERATIONS;
    struct world world;

    (void)state;
    world_init(&world, PLAIN, true);
    assert_int_equal(commit(&world), 0);
    store_raise_generation(world.writable, JOURNAL_IMAGE_TYPE, last - EPOCH_GENERATIONS - 1);
    assert_int_equal(commit(&world), 0);
    assert_int_equal(restore(&world), 0);
    assert_int_equal(generation_now(&world), last - EPOCH_GENERATIONS + 1);
    check_every_power_loss(&world);
    store_raise_generation(world.writable, JOURNAL_IMAGE_TYPE, GENERATION_GIVEN_MAX);
    assert_int_equal(commit(&world), 0);
    assert_int_equal(restore(&world), 0);
    assert_int_equal(generation_now(&world), GENERATION_GIVEN_MAX + 2);
    world_deinit(&world);
}

/* Over a state that was made ahead: its file is of the epoch that it begins. */
static void a_snapshot_that_was_made_ahead_is_only_published(void **state)
{
    struct world world;

    (void)state;
    for (int is_numbered = 0; is_numbered <= 1; is_numbered++) {
        world_init(&world, PLAIN, true);
        if (is_numbered)
            assert_int_equal(commit(&world), 0);
        durable_set_loaded(world.durable, 1, true);
        struct checkpoint_lineage lineage = durable_lineage(world.durable);
        prepare(&world, world.under_way + 1, &lineage);
        durable_work_ahead(world.durable);
        world.io.calls = 0;
        assert_int_equal(commit_what_came(&world, &lineage), PUBLISH_CALLS);
        assert_int_equal(epoch_of(generation_now(&world)), 1);
        world_deinit(&world);
    }
}

static void a_key_that_comes_later_encrypts_the_file(void **state)
{
    struct cipher_key key = {.n_bytes = 16, .bytes = "a key of sixteen"};
    const uint8_t *bytes;
    size_t n_bytes;
    struct world world;

    (void)state;
    world_init(&world, SEALED, true);
    bring(&world, NULL);
    assert_int_equal(durable_set_key(world.durable, &key), 0);
    assert_int_equal(commit(&world), 0);
    assert_true(io_memory_read_durable(&world.io, "tpm2-00.permall", &bytes, &n_bytes));
    assert_true(get_be16(bytes + SWTPM_AT_FLAGS) & SWTPM_ENCRYPTED);
    world_deinit(&world);
}

/* What else is done with the directory. */

static void store_it(struct world *world)
{
    assert_int_equal(state_directory_store(world->durable), 0);
}

static void adopt_it(struct world *world)
{
    uint8_t image[IMAGE_BYTES], digest[DIGEST_BYTES];

    make_image(0, image);
    assert_int_equal(digest_compute(image, IMAGE_BYTES, digest), 0);
    assert_int_equal(
        durable_adopt(world->durable, image, IMAGE_BYTES, digest, true, another_vtpm.identity), 0);
}

static void leave_it(struct world *world)
{
    durable_leave(world->durable);
}

static void end_it(struct world *world)
{
    assert_int_equal(durable_end(world->durable), 0);
}

static void what_was_made_ahead_is_gone_once_something_else_is_done(void **state)
{
    void (*const ways[])(struct world *) = {store_it, adopt_it, leave_it, end_it};

    (void)state;
    for (size_t i = 0; i < COUNT(ways) * 2; i++) {
        struct world world;
        world_init(&world, PLAIN, false);
        prepare(&world, 1, NULL);
        if (i % 2)
            durable_work_ahead(world.durable);
        ways[i / 2](&world);
        assert_false(has_temporary(&world));
        assert_int_equal(commit(&world), 0);
        check_every_power_loss(&world);
        world_deinit(&world);
    }
}

/* By who need not wait for the disk. */
static void what_is_of_no_use_is_removed_later(void **state)
{
    void (*const ways[])(struct durable *) = {durable_unprepare, durable_begin};

    (void)state;
    for (size_t i = 0; i < COUNT(ways); i++) {
        struct world world;
        world_init(&world, PLAIN, true);
        bring(&world, NULL);
        ways[i](world.durable);
        assert_int_equal(world.io.calls, 0);
        durable_work_ahead(world.durable);
        assert_false(has_temporary(&world));
        assert_int_equal(commit(&world), 0);
        check_every_power_loss(&world);
        world_deinit(&world);
    }
}

static void nothing_is_made_ahead_while_on_or_with_a_journal(void **state)
{
    struct world world;

    (void)state;
    world_init(&world, PLAIN, true);
    begin(&world);
    prepare(&world, 1, NULL);
    assert_int_equal(commit(&world), 0);
    durable_pause(world.durable);
    int calls = world.io.calls;
    prepare(&world, 2, NULL);
    durable_work_ahead(world.durable);
    assert_int_equal(world.io.calls, calls);
    world_deinit(&world);
}

/* At whichever call: the commit does all of it, and says if it cannot. */
static void what_cannot_be_made_ahead_is_made_by_the_commit(void **state)
{
    enum { CALLS = 3 };

    (void)state;
    for (int call = 1; call <= CALLS; call++) {
        for (int goes_on = 0; goes_on <= 1; goes_on++) {
            struct world world;
            world_init(&world, SEALED, true);
            world.io.fail_error = ENOSPC;
            world.io.fail_half = true;
            world.io.fail_from = call;
            prepare(&world, 1, NULL);
            durable_work_ahead(world.durable);
            if (goes_on)
                assert_int_equal(commit(&world), -ENOSPC);
            world.io.fail_from = 0;
            world.under_way = 0;
            assert_int_equal(commit(&world), 0);
            assert_false(has_temporary(&world));
            check_every_power_loss(&world);
            world_deinit(&world);
        }
    }
}

/* The real thing: files, and a thread that folds beside the commits. */

struct directory {
    char path[64];
    struct io_posix io;
};

static void directory_init(struct directory *directory)
{
    snprintf(directory->path, sizeof(directory->path), "/tmp/test_durable.XXXXXX");
    assert_non_null(mkdtemp(directory->path));
    directory->io = (struct io_posix){
        .io = io_posix_functions,
        .directory_fd = open(directory->path, O_RDONLY | O_DIRECTORY),
    };
}

static void directory_deinit(struct directory *directory)
{
    unlinkat(directory->io.directory_fd, "tpm2-00.permall", 0);
    unlinkat(directory->io.directory_fd, JOURNAL_NAME, 0);
    close(directory->io.directory_fd);
    assert_int_equal(rmdir(directory->path), 0);
}

/* With a thread that folds, and image 0 in its file. */
static void start_in_directory(struct world *world, struct directory *directory)
{
    uint8_t image[IMAGE_BYTES];

    directory_init(directory);
    assert_int_equal(store_new(&world->store), 0);
    assert_int_equal(store_map(&world->writable, store_fd(world->store), true), 0);
    assert_int_equal(durable_new(&world->durable, &directory->io.io), 0);
    durable_set_journal(world->durable, world->settings, world->writable, true);
    make_image(0, image);
    assert_int_equal(durable_commit(world->durable, image, IMAGE_BYTES), 0);
}

/* Put a file as it is into the directory in memory, durably. */
static void copy_file(const struct directory *directory, const char *name, struct io_memory *io)
{
    static uint8_t bytes[JOURNAL_BYTES];
    int from = openat(directory->io.directory_fd, name, O_RDONLY);

    if (from < 0)
        return;
    ssize_t n = read(from, bytes, sizeof(bytes));
    assert_true(n >= 0);
    close(from);
    int to = io->io.create(&io->io, name);
    assert_int_equal(io->io.write_at(&io->io, to, bytes, (size_t)n, 0), 0);
}

static bool files_are_of(const struct directory *directory, ino_t inodes[2])
{
    static const char *const names[] = {"tpm2-00.permall", JOURNAL_NAME};
    bool same = true;

    for (int i = 0; i < 2; i++) {
        struct stat status = {0};
        fstatat(directory->io.directory_fd, names[i], &status, 0);
        same &= inodes[i] == status.st_ino;
        inodes[i] = status.st_ino;
    }
    return same;
}

/* What is there now, while a fold may be under way: again, until no file was replaced meanwhile. */
static void check_files(const struct directory *directory, const struct world *world)
{
    ino_t inodes[2] = {0};
    struct io_memory copy;

    for (;;) {
        io_memory_init(&copy);
        files_are_of(directory, inodes);
        copy_file(directory, "tpm2-00.permall", &copy);
        copy_file(directory, JOURNAL_NAME, &copy);
        if (files_are_of(directory, inodes))
            break;
        io_memory_deinit(&copy);
    }
    assert_true(is_recovered(&copy, world));
    io_memory_deinit(&copy);
}

static void folding_beside_the_commits_loses_none(void **state)
{
    enum { COMMITS = 3000, CHECKED_EVERY = 37 };
    struct journal_settings settings = settings_of[SEALED];
    struct directory directory;
    struct world world = {.settings = &settings};

    (void)state;
    settings.file_bytes = 8 * JOURNAL_PAGE_BYTES;
    start_in_directory(&world, &directory);
    durable_begin(world.durable);
    for (int i = 0; i < COMMITS; i++) {
        assert_int_equal(commit(&world), 0);
        if (i % CHECKED_EVERY == 0)
            check_files(&directory, &world);
    }
    assert_int_equal(durable_end(world.durable), 0);
    check_files(&directory, &world);
    assert_int_equal(faccessat(directory.io.directory_fd, JOURNAL_NAME, F_OK, 0), -1);
    quit(&world);
    directory_deinit(&directory);
}

/* In time, and not only when there is no other way. */
static void a_worn_journal_is_folded_in_a_thread(void **state)
{
    enum { SECTORS = FILE_BYTES / JOURNAL_SECTOR_BYTES };
    struct journal_settings settings = settings_of[PLAIN];
    struct directory directory;
    struct world world = {.settings = &settings};
    struct stat before, after;
    uint8_t image[IMAGE_BYTES];

    (void)state;
    start_in_directory(&world, &directory);
    make_image(0, image);
    durable_begin(world.durable);
    for (uint32_t number = 1; number <= SECTORS / 4 * 3; number++) {
        put_be32(image, number);
        if (number > 1) {
            assert_int_equal(fstatat(directory.io.directory_fd, JOURNAL_NAME, &before, 0), 0);
            assert_true(number == 2 || before.st_ino == after.st_ino);
            after = before;
        }
        assert_int_equal(durable_commit(world.durable, image, IMAGE_BYTES), 0);
    }
    for (int ms = 0; ms < WAIT_MS && before.st_ino == after.st_ino; ms++) {
        usleep(1000);
        assert_int_equal(fstatat(directory.io.directory_fd, JOURNAL_NAME, &after, 0), 0);
    }
    assert_int_not_equal(before.st_ino, after.st_ino);
    assert_int_equal(durable_end(world.durable), 0);
    quit(&world);
    directory_deinit(&directory);
}

/* A thread that folds, and that stands still at its first file until the test waits for it. */
static struct {
    pthread_t committer; /* the test */
    sem_t is_reached, may_pass;
    bool is_closed;
    bool was_passed; /* by a commit that wrote beside it */
    bool fails;      /* the next write in place does */
    int n_created;   /* files, by commits */
} gate;

static void open_gate(void)
{
    if (!gate.is_closed)
        return;
    gate.is_closed = false;
    sem_post(&gate.may_pass);
}

/* Takes the C library's place, by the linker (meson.build): there, a commit waits for the fold. */
int __wrap_pthread_cond_wait(pthread_cond_t *condition, pthread_mutex_t *mutex)
{
    struct timespec until;

    if (pthread_equal(pthread_self(), gate.committer))
        open_gate();
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += 1;
    int error = pthread_cond_timedwait(condition, mutex, &until);
    return error == ETIMEDOUT ? 0 : error;
}

static void close_gate(void)
{
    gate.is_closed = true;
    gate.was_passed = false;
    gate.n_created = 0;
    sem_init(&gate.is_reached, 0, 0);
    sem_init(&gate.may_pass, 0, 0);
}

/* The thread has ended. */
static void open_gate_for_good(void)
{
    sem_destroy(&gate.is_reached);
    sem_destroy(&gate.may_pass);
    gate.is_closed = false;
}

static int gated_create(struct io *io, const char *name)
{
    if (!pthread_equal(pthread_self(), gate.committer)) {
        sem_post(&gate.is_reached);
        sem_wait(&gate.may_pass);
        sem_post(&gate.may_pass);
    } else {
        gate.n_created++;
        gate.was_passed |= gate.is_closed;
        open_gate();
    }
    return io_posix_functions.create(io, name);
}

static int gated_write_at(struct io *io, int fd, const uint8_t *bytes, size_t n_bytes, off_t offset)
{
    if (gate.fails && pthread_equal(pthread_self(), gate.committer)) {
        gate.fails = false;
        return -EIO;
    }
    return io_posix_functions.write_at(io, fd, bytes, n_bytes, offset);
}

/* Commit until the thread folds, which stands still at its first file. */
static void start_folding(struct world *world, struct directory *directory)
{
    enum { COMMITS = 35 }; /* wear the journal, and leave room */

    close_gate();
    durable_begin(world->durable);
    assert_int_equal(commit(world), 0); /* makes the journal */
    directory->io.io.create = gated_create;
    for (int n = 0; n < COMMITS; n++)
        assert_int_equal(commit(world), 0);
    sem_wait(&gate.is_reached);
    assert_true(gate.is_closed);
}

static void a_commit_after_a_failed_one_waits_for_the_fold(void **state)
{
    struct journal_settings settings = settings_of[SEALED];
    struct directory directory;
    struct world world = {.settings = &settings};

    (void)state;
    settings.file_bytes = 8 * JOURNAL_PAGE_BYTES;
    start_in_directory(&world, &directory);
    directory.io.io.write_at = gated_write_at;
    start_folding(&world, &directory);
    gate.fails = true;
    assert_int_equal(commit(&world), -EIO);
    assert_int_equal(commit(&world), 0);
    assert_false(gate.is_closed);
    assert_false(gate.was_passed);
    check_files(&directory, &world);
    assert_int_equal(durable_end(world.durable), 0);
    check_files(&directory, &world);
    quit(&world);
    open_gate_for_good();
    directory_deinit(&directory);
}

/* It is not switched to while the journal is being removed. */
static void what_is_adopted_waits_for_the_fold(void **state)
{
    struct journal_settings settings = settings_of[SEALED];
    struct directory directory;
    struct world world = {.settings = &settings};

    (void)state;
    settings.file_bytes = 8 * JOURNAL_PAGE_BYTES;
    start_in_directory(&world, &directory);
    start_folding(&world, &directory);
    adopt_it(&world);
    assert_false(gate.is_closed);
    assert_false(durable_has_journal(world.durable));
    assert_int_equal(faccessat(directory.io.directory_fd, JOURNAL_NAME, F_OK, 0), -1);
    quit(&world);
    open_gate_for_good();
    directory_deinit(&directory);
}

static bool has_temporary_file(const struct directory *directory)
{
    return faccessat(directory->io.directory_fd, TEMPORARY_NAME, F_OK, 0) == 0;
}

static void wait_until_there_is_no_temporary_file(const struct directory *directory)
{
    for (int ms = 0; ms < WAIT_MS && has_temporary_file(directory); ms++)
        usleep(1000);
    assert_false(has_temporary_file(directory));
}

/* The thread stands still as it is about to make the file. */
static void prepare_at_the_gate(struct world *world, struct directory *directory)
{
    close_gate();
    directory->io.io.create = gated_create;
    prepare(world, world->under_way + 1, NULL);
    sem_wait(&gate.is_reached);
    assert_true(gate.is_closed);
}

static void stop_at_the_gate(struct world *world, struct directory *directory)
{
    assert_false(gate.was_passed);
    quit(world);
    assert_false(has_temporary_file(directory));
    open_gate_for_good();
    directory_deinit(directory);
}

static void a_commit_waits_for_the_file_that_is_made_ahead(void **state)
{
    struct world world = {.settings = &settings_of[SEALED]};
    struct directory directory;

    (void)state;
    start_in_directory(&world, &directory);
    prepare_at_the_gate(&world, &directory);
    assert_int_equal(commit(&world), 0);
    assert_false(gate.is_closed);
    assert_int_equal(gate.n_created, 0); /* it has published that one */
    check_files(&directory, &world);
    stop_at_the_gate(&world, &directory);
}

/* Who forgets does not wait for the disk; who ends does. */
static void what_is_forgotten_while_it_is_made_is_removed(void **state)
{
    (void)state;
    for (int ends = 0; ends <= 1; ends++) {
        struct world world = {.settings = &settings_of[SEALED]};
        struct directory directory;
        start_in_directory(&world, &directory);
        prepare_at_the_gate(&world, &directory);
        durable_unprepare(world.durable);
        prepare(&world, OTHER, NULL); /* is dropped: the first is not done with */
        assert_true(gate.is_closed);
        if (!ends) {
            open_gate();
            wait_until_there_is_no_temporary_file(&directory);
            check_files(&directory, &world);
        }
        stop_at_the_gate(&world, &directory);
    }
}

/* In each order that is drawn, with the thread and the disk as they happen to be: for the thread
 * sanitizer, too. */
static void what_is_made_ahead_disturbs_nothing(void **state)
{
    enum { ROUNDS = 200 };
    struct world world = {.settings = &settings_of[SEALED]};
    struct directory directory;
    struct io_choices choices;

    (void)state;
    io_choices_init_sampled(&choices, (uint64_t)time(NULL));
    start_in_directory(&world, &directory);
    for (int round = 0; round < ROUNDS; round++) {
        static const char *const ways[] = {"pc", "puc", "oc", "pucpc", "pbcce", "obe", "ope", "pe"};
        usleep(io_choose(&choices, 3) * 300);
        assert_true(live(&world, ways[io_choose(&choices, COUNT(ways))]));
        if (io_choose(&choices, 8) == 0)
            check_files(&directory, &world);
    }
    assert_int_equal(durable_end(world.durable), 0);
    assert_false(has_temporary_file(&directory));
    check_files(&directory, &world);
    quit(&world);
    directory_deinit(&directory);
}

#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define LOOKS_FOR_RACES true
#endif
#endif
#ifndef LOOKS_FOR_RACES
#define LOOKS_FOR_RACES false
#endif

int main(void)
{
    /* Theirs is the process's one thread: there is no race to be found, in a minute of it. */
    const struct CMUnitTest whole_lives[] = {
        cmocka_unit_test(invariant_1_every_power_loss_leaves_what_was_acknowledged),
        cmocka_unit_test(canary_every_sync_that_is_left_out_is_missed),
        cmocka_unit_test(what_fails_once_loses_nothing),
        cmocka_unit_test(long_lives_survive_power_losses),
    };
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(without_a_journal_every_commit_writes_the_file),
        cmocka_unit_test(a_tpm_that_is_off_has_no_journal),
        cmocka_unit_test(a_record_says_when_it_was_committed),
        cmocka_unit_test(a_small_commit_writes_one_sector_and_syncs_once),
        cmocka_unit_test(a_deferred_commit_syncs_with_the_next),
        cmocka_unit_test(what_comes_takes_the_place_of_a_deferred_commit),
        cmocka_unit_test(an_image_that_is_elsewhere_is_put_into_its_file),
        cmocka_unit_test(a_journal_that_cannot_be_folded_goes_on_until_it_is_full),
        cmocka_unit_test(where_a_journal_has_no_room_files_are_replaced),
        cmocka_unit_test(what_another_process_has_left_is_replaced),
        cmocka_unit_test(what_comes_replaces_what_another_process_has_left),
        cmocka_unit_test(a_worn_journal_is_folded_in_a_thread),
        cmocka_unit_test(folding_beside_the_commits_loses_none),
        cmocka_unit_test(a_commit_after_a_failed_one_waits_for_the_fold),
        cmocka_unit_test(what_is_adopted_waits_for_the_fold),
        cmocka_unit_test(what_was_made_ahead_is_only_published),
        cmocka_unit_test(what_was_made_ahead_of_something_else_is_not_used),
        cmocka_unit_test(a_state_that_is_put_back_begins_the_next_epoch),
        cmocka_unit_test(what_could_not_be_put_back_is_gone_when_the_guest_runs_on),
        cmocka_unit_test(what_puts_nothing_back_begins_no_epoch),
        cmocka_unit_test(what_comes_keeps_its_generation),
        cmocka_unit_test(a_state_is_put_back_when_no_epoch_is_left),
        cmocka_unit_test(a_snapshot_that_was_made_ahead_is_only_published),
        cmocka_unit_test(a_key_that_comes_later_encrypts_the_file),
        cmocka_unit_test(what_was_made_ahead_is_gone_once_something_else_is_done),
        cmocka_unit_test(what_is_of_no_use_is_removed_later),
        cmocka_unit_test(nothing_is_made_ahead_while_on_or_with_a_journal),
        cmocka_unit_test(what_cannot_be_made_ahead_is_made_by_the_commit),
        cmocka_unit_test(a_commit_waits_for_the_file_that_is_made_ahead),
        cmocka_unit_test(what_is_forgotten_while_it_is_made_is_removed),
        cmocka_unit_test(what_is_made_ahead_disturbs_nothing),
    };

    gate.committer = pthread_self();
    int n_failed = LOOKS_FOR_RACES ? 0 : cmocka_run_group_tests(whole_lives, NULL, NULL);
    return n_failed + cmocka_run_group_tests(tests, NULL, NULL);
}
