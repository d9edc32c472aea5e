/* Room for a state that comes: what is on the disk when power is lost, at every call and in every
 * way; what it is not used for; and what becomes of it when the disk fails.
 *
 * Invariant 1: what was acknowledged is there after a loss of power: in its own file, in a journal,
 * or where it came. What a start makes of that is vtpmd/store/arrived.py's rule, said again here.
 */
#include <errno.h>
#include <fcntl.h>
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
#include "digest.h"
#include "durable.h"
#include "io_memory.h"
#include "room.h"
#include "state_directory.h"

enum {
    IMAGE_BYTES = 1500,
    OTHER = 4711, /* an image */
    ALL_BYTES = ROOM_BYTES,
    WAIT_MS = 10000,
};

#define ARRIVED_NAME "tpm2-00.arrived"
#define PERMANENT_NAME "tpm2-00.permall"

static const struct journal_settings settings = {.identity = "this vTPM's own.",
                                                 .file_bytes = 2 * JOURNAL_PAGE_BYTES};

static const struct checkpoint_lineage ours = {.identity = "this vTPM's own.", .generation = 700};
static const struct checkpoint_lineage anothers = {.identity = "another vTPM's..",
                                                   .generation = 5000};

static void make_image(uint32_t number, uint8_t bytes[IMAGE_BYTES])
{
    for (size_t i = 0; i < IMAGE_BYTES; i++)
        bytes[i] = (uint8_t)(i * i + i / 256 + number * 7);
    put_be32(bytes, number);
}

struct world {
    struct io_memory io;
    struct store *store, *writable;
    struct durable *durable;
    bool has_none;         /* the directory had no state */
    uint32_t acknowledged; /* the last image that was; 0: the one before, or none */
    uint32_t under_way;    /* that is being committed, or may be */
    uint32_t came;         /* what was brought since, and may have been written; 0: nothing */
};

static void start(struct world *world)
{
    uint8_t image[IMAGE_BYTES];

    assert_int_equal(store_new(&world->store), 0);
    assert_int_equal(store_map(&world->writable, store_fd(world->store), true), 0);
    assert_int_equal(durable_new(&world->durable, &world->io.io), 0);
    durable_set_journal(world->durable, &settings, world->writable, false);
    if (world->has_none)
        return;
    make_image(0, image);
    assert_int_equal(durable_load(world->durable, image, IMAGE_BYTES, true), 0);
}

static void world_init(struct world *world, bool has_none)
{
    struct checkpoint_lineage lineage = ours;
    uint8_t image[IMAGE_BYTES];

    *world = (struct world){.has_none = has_none};
    io_memory_init(&world->io);
    make_image(0, image);
    lineage.generation = 1;
    if (!has_none)
        assert_int_equal(
            checkpoint_write(&world->io.io, NULL, "permall", image, IMAGE_BYTES, &lineage), 0);
    start(world);
    world->io.calls = world->io.syncs = 0;
}

static void world_deinit(struct world *world)
{
    durable_free(world->durable);
    store_free(world->writable);
    store_free(world->store);
    io_memory_deinit(&world->io);
}

static void bring(struct world *world, uint32_t number, const struct checkpoint_lineage *lineage)
{
    uint8_t image[IMAGE_BYTES];

    make_image(number, image);
    world->came = number;
    if (lineage)
        store_raise_generation(world->writable, JOURNAL_IMAGE_TYPE, lineage->generation);
    durable_bring(world->durable, image, IMAGE_BYTES);
    durable_prepare(world->durable, image, IMAGE_BYTES, lineage);
}

static int commit(struct world *world)
{
    uint8_t image[IMAGE_BYTES];

    world->under_way++;
    make_image(world->under_way, image);
    int r = durable_commit(world->durable, image, IMAGE_BYTES);
    if (r < 0)
        return r;
    world->acknowledged = world->under_way;
    world->came = 0;
    return 0;
}

/* As INIT has it. */
static int commit_what_came(struct world *world)
{
    int r = durable_expect(world->durable, &ours);

    return r < 0 ? r : commit(world);
}

/* One step: have (r)oom, QEMU brings (i)t, or (o)ther bytes, (u)nprepare, or un(w)ait; what is to
 * be done (a)head; (C)ommit what came, (b)egin, (c)ommit, (e)nd. */
static int take_step(struct world *world, char step)
{
    switch (step) {
    case 'r':
        durable_await(world->durable);
        return 0;
    case 'i':
        bring(world, world->under_way + 1, &ours);
        return 0;
    case 'o':
        bring(world, OTHER, &ours);
        return 0;
    case 'u':
        durable_unprepare(world->durable);
        return 0;
    case 'w':
        durable_unawait(world->durable);
        return 0;
    case 'a':
        durable_work_ahead(world->durable);
        return 0;
    case 'b':
        durable_begin(world->durable);
        return 0;
    case 'c':
        return commit(world);
    case 'C':
        return commit_what_came(world);
    default:
        assert_int_equal(step, 'e');
        return durable_end(world->durable);
    }
}

static bool live(struct world *world, const char *life)
{
    for (const char *step = life; *step; step++)
        if (take_step(world, *step) < 0)
            return false;
    return true;
}

static bool is_image(const uint8_t *bytes, size_t n_bytes, uint32_t number)
{
    uint8_t expected[IMAGE_BYTES];

    make_image(number, expected);
    return n_bytes == IMAGE_BYTES && memcmp(bytes, expected, IMAGE_BYTES) == 0;
}

static bool is_allowed(const struct world *world, const uint8_t *bytes, size_t n_bytes)
{
    uint32_t number = get_be32(bytes);
    bool is_known = (number >= world->acknowledged && number <= world->under_way) ||
                    (world->came && number == world->came);

    return is_known && is_image(bytes, n_bytes, number);
}

/* The generation that a state file says in its last TLV; 0 if it is not this vTPM's. */
static uint64_t generation_of(const uint8_t *file, size_t file_bytes)
{
    const uint8_t *lineage = file + file_bytes - SWTPM_LINEAGE_BYTES;

    if (file_bytes < SWTPM_LINEAGE_BYTES ||
        memcmp(lineage, ours.identity, sizeof(ours.identity)) != 0)
        return 0;
    return get_be64(lineage + SWTPM_AT_GENERATION);
}

/* Return the state file that came, if it is whole. */
static const uint8_t *find_arrived(const struct io_memory *io, size_t *file_bytes)
{
    uint8_t digest[DIGEST_BYTES];
    const uint8_t *bytes;
    size_t n_bytes;

    if (!io_memory_read(io, ARRIVED_NAME, &bytes, &n_bytes) || n_bytes < ROOM_AT_FILE)
        return NULL;
    *file_bytes = get_be64(bytes + ROOM_AT_LENGTH);
    if (*file_bytes == 0 || *file_bytes > n_bytes - ROOM_AT_FILE)
        return NULL;
    assert_int_equal(digest_compute(bytes + ROOM_AT_FILE, *file_bytes, digest), 0);
    bool is_whole = memcmp(digest, bytes + ROOM_AT_DIGEST, DIGEST_BYTES) == 0;
    return is_whole ? bytes + ROOM_AT_FILE : NULL;
}

static uint64_t newest(uint64_t one, uint64_t other)
{
    return one > other ? one : other;
}

/* What the two files make. Returns false if they must not be used; the image may be none. */
static bool recover(const struct io_memory *after, const uint8_t **image, size_t *image_bytes,
                    uint64_t *generation)
{
    static uint8_t made[IMAGE_BYTES_MAX];
    struct journal_evidence evidence;
    struct journal_recovery recovery;
    const uint8_t *file;
    size_t file_bytes;

    *image = NULL;
    *generation = 0;
    if (!state_directory_read(after, &settings, &evidence))
        return false;
    state_directory_recover(&evidence, made, &recovery);
    if (io_memory_read(after, PERMANENT_NAME, &file, &file_bytes))
        *generation = generation_of(file, file_bytes);
    if (!journal_may_start(&recovery))
        return false;
    *generation = newest(*generation, recovery.generation);
    if (recovery.has_image)
        *image = made;
    *image_bytes = recovery.image_bytes;
    return true;
}

/* The oracle: the rule of vtpmd/store/arrived.py. */
static bool is_recovered(const struct io_memory *after, const void *context)
{
    const struct world *world = context;
    size_t n_bytes, arrived_bytes;
    const uint8_t *image, *arrived = find_arrived(after, &arrived_bytes);
    uint64_t generation;

    bool is_right = recover(after, &image, &n_bytes, &generation);
    if (arrived && generation_of(arrived, arrived_bytes) > generation)
        return is_allowed(world, arrived + CHECKPOINT_HEADER_BYTES, get_be32(arrived + 12));
    if (is_right && !image)
        return world->has_none && world->acknowledged == 0;
    return is_right && is_allowed(world, image, n_bytes);
}

static bool survives_every_power_loss(const char *life, bool has_none, int skip_sync)
{
    bool survived = true, finished = false;

    for (int call = 1; survived && !finished; call++) {
        assert_true(call < 1000);
        struct world world;
        world_init(&world, has_none);
        world.io.fail_from = call;
        world.io.skip_sync = skip_sync;
        finished = live(&world, life);
        survived = io_memory_survives(&world.io, is_recovered, &world);
        world_deinit(&world);
    }
    return survived;
}

#define COUNT(array) (sizeof(array) / sizeof(*(array)))

/* Room that is in time, late, not used, used for other bytes; a state that is stored by the worker,
 * by the next commit, and by the end; a second guest. */
static const char *const lives[] = {
    "raiaCaabcce",  "raiaCbcce",        "raiaCe",        "raiCabce",    "riaCabce",
    "raiaCcbce",    "raiaCababe",       "raoaCabce",     "raiauaabe",   "raiauaaicb",
    "raiauaiaCabe", "raiauaraiaCaabce", "rae",           "rabce",       "raiabcce",
    "rwraiaCe",     "rawaiaCabce",      "raiawaiaCabce", "raiaoaCabce",
};

static void invariant_1_every_power_loss_leaves_what_was_acknowledged(void **state)
{
    (void)state;
    for (size_t i = 0; i < COUNT(lives) * 2; i++)
        if (!survives_every_power_loss(lives[i / 2], i % 2, 0))
            fail_msg("%s, has none %d", lives[i / 2], (int)(i % 2));
}

/* The first sync is the room's, and the second its name's. */
static void canary_every_sync_that_is_left_out_is_missed(void **state)
{
    enum { NAME = 2, FILLED, FILE, FILE_NAME };

    (void)state;
    for (int sync = NAME; sync <= FILE_NAME; sync++)
        if (survives_every_power_loss("raiaCaabcce", true, sync))
            fail_msg("sync %d is not needed", sync);
}

static bool has_file(const struct world *world, const char *name)
{
    const uint8_t *bytes;
    size_t n_bytes;

    return io_memory_read(&world->io, name, &bytes, &n_bytes);
}

static void what_came_waits_for_no_file(void **state)
{
    (void)state;
    for (int has_none = 0; has_none <= 1; has_none++) {
        struct world world;
        world_init(&world, has_none);
        assert_true(live(&world, "ra"));
        assert_true(has_file(&world, ARRIVED_NAME));
        assert_true(live(&world, "ia"));
        world.io.calls = 0;
        assert_true(live(&world, "C"));
        assert_int_equal(world.io.calls, 0);
        assert_true(durable_is_in_room(world.durable));
        assert_true(live(&world, "a"));
        assert_false(durable_is_in_room(world.durable));
        assert_true(has_file(&world, PERMANENT_NAME));
        assert_true(live(&world, "a"));
        assert_false(has_file(&world, ARRIVED_NAME));
        assert_true(live(&world, "bcce"));
        world_deinit(&world);
    }
}

/* A start would not take it up, or must not. */
static void what_a_start_would_not_take_up_is_put_into_its_file(void **state)
{
    static const struct checkpoint_lineage older = {.identity = "this vTPM's own."};
    const struct checkpoint_lineage *const lineages[] = {NULL, &anothers, &older};

    (void)state;
    for (size_t i = 0; i < COUNT(lineages); i++) {
        struct world world;
        world_init(&world, false);
        durable_set_loaded(world.durable, 1, true);
        assert_true(live(&world, "ra"));
        bring(&world, 1, lineages[i]);
        assert_true(live(&world, "a"));
        if (lineages[i])
            assert_int_equal(durable_expect(world.durable, lineages[i]), 0);
        assert_int_equal(commit(&world), 0);
        assert_false(durable_is_in_room(world.durable));
        assert_true(has_file(&world, PERMANENT_NAME));
        world_deinit(&world);
    }
}

static void room_that_cannot_be_made_or_filled_is_done_without(void **state)
{
    (void)state;
    for (const char *failing = "ri"; *failing; failing++) {
        for (int call = 1; call <= 4; call++) {
            struct world world;
            world_init(&world, true);
            for (const char *step = "raiaCabce"; *step; step++) {
                if (*step == *failing) {
                    world.io.fail_from = world.io.calls + call;
                    world.io.fail_to = world.io.fail_from + 1;
                    world.io.fail_error = ENOSPC;
                }
                assert_int_equal(take_step(&world, *step), 0);
            }
            assert_true(io_memory_survives(&world.io, is_recovered, &world));
            assert_false(has_file(&world, ARRIVED_NAME));
            world_deinit(&world);
        }
    }
}

/* It stays where it came; and once the disk has room again, it has its file. */
static void what_cannot_have_its_file_stays_where_it_came(void **state)
{
    (void)state;
    for (int recovers = 0; recovers <= 1; recovers++) {
        struct world world;
        world_init(&world, true);
        assert_true(live(&world, "raiaC"));
        world.io.fail_from = world.io.calls + 1;
        world.io.fail_error = ENOSPC;
        assert_true(live(&world, "a"));
        assert_int_equal(durable_end(world.durable), -ENOSPC);
        assert_true(durable_is_in_room(world.durable));
        assert_true(io_memory_survives(&world.io, is_recovered, &world));
        if (recovers) {
            world.io.fail_from = 0;
            assert_int_equal(durable_end(world.durable), 0);
            assert_false(has_file(&world, ARRIVED_NAME));
        }
        assert_int_equal(has_file(&world, PERMANENT_NAME), recovers);
        world_deinit(&world);
    }
}

static void a_state_that_is_too_long_has_its_own_file(void **state)
{
    struct world world;

    (void)state;
    uint8_t *image = calloc(1, ALL_BYTES);
    assert_non_null(image);
    world_init(&world, true);
    assert_true(live(&world, "ra"));
    durable_bring(world.durable, image, ALL_BYTES);
    durable_prepare(world.durable, image, ALL_BYTES, &ours);
    assert_true(live(&world, "a"));
    assert_int_equal(durable_expect(world.durable, &ours), 0);
    assert_int_equal(durable_commit(world.durable, image, ALL_BYTES), 0);
    assert_false(durable_is_in_room(world.durable));
    free(image);
    world_deinit(&world);
}

/* The real thing: files, and a thread. */

struct directory {
    char path[64];
    struct io_posix io;
};

static void directory_init(struct directory *directory)
{
    snprintf(directory->path, sizeof(directory->path), "/tmp/test_room.XXXXXX");
    assert_non_null(mkdtemp(directory->path));
    directory->io = (struct io_posix){
        .io = io_posix_functions,
        .directory_fd = open(directory->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC),
        .lock_fd = -1,
    };
    assert_true(directory->io.directory_fd >= 0);
}

static bool is_there(const struct directory *directory, const char *name)
{
    return faccessat(directory->io.directory_fd, name, F_OK, 0) == 0;
}

static void directory_deinit(struct directory *directory)
{
    static const char *const names[] = {ARRIVED_NAME, PERMANENT_NAME, JOURNAL_NAME};

    for (size_t i = 0; i < COUNT(names); i++)
        unlinkat(directory->io.directory_fd, names[i], 0);
    close(directory->io.directory_fd);
    assert_int_equal(rmdir(directory->path), 0);
}

static void wait_until(const struct directory *directory, const char *name, bool is_so)
{
    for (int ms = 0; ms < WAIT_MS && is_there(directory, name) != is_so; ms++)
        usleep(1000);
    assert_int_equal(is_there(directory, name), is_so);
}

static void start_in_directory(struct world *world, struct directory *directory)
{
    directory_init(directory);
    *world = (struct world){.has_none = true};
    assert_int_equal(store_new(&world->store), 0);
    assert_int_equal(store_map(&world->writable, store_fd(world->store), true), 0);
    assert_int_equal(durable_new(&world->durable, &directory->io.io), 0);
    durable_set_journal(world->durable, &settings, world->writable, true);
}

/* Each at a moment that is drawn: for the thread sanitizer, too. */
static void room_disturbs_nothing(void **state)
{
    enum { ROUNDS = 60, PERHAPS_MADE_US = 70000 };
    static const char *const ways[] = {"iCbcce", "iuCbce", "iwCbce", "uiCbce", "oCbe",
                                       "ie",     "ubce",   "e",      "iCe",    "iCce"};
    struct directory directory;
    struct io_choices choices;
    struct world world;

    (void)state;
    io_choices_init_sampled(&choices, (uint64_t)time(NULL));
    start_in_directory(&world, &directory);
    for (int round = 0; round < ROUNDS; round++) {
        assert_true(live(&world, "r"));
        usleep(io_choose(&choices, PERHAPS_MADE_US));
        assert_true(live(&world, ways[io_choose(&choices, COUNT(ways))]));
    }
    assert_true(live(&world, "r"));
    wait_until(&directory, ARRIVED_NAME, true);
    assert_true(live(&world, "iCb"));
    wait_until(&directory, ARRIVED_NAME, false);
    assert_true(live(&world, "e"));
    durable_free(world.durable);
    store_free(world.writable);
    store_free(world.store);
    directory_deinit(&directory);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(invariant_1_every_power_loss_leaves_what_was_acknowledged),
        cmocka_unit_test(canary_every_sync_that_is_left_out_is_missed),
        cmocka_unit_test(what_came_waits_for_no_file),
        cmocka_unit_test(what_a_start_would_not_take_up_is_put_into_its_file),
        cmocka_unit_test(room_that_cannot_be_made_or_filled_is_done_without),
        cmocka_unit_test(what_cannot_have_its_file_stays_where_it_came),
        cmocka_unit_test(a_state_that_is_too_long_has_its_own_file),
        cmocka_unit_test(room_disturbs_nothing),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
