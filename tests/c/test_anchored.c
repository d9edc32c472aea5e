/* The anchor and the state directory together, over a file system that loses power at every call.
 *
 * What a start finds is always something that the anchor lets it start from; and what is older than
 * the last change that was acknowledged never is. The rows are those of vtpmd/store/anchor.py.
 */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "anchor.h"
#include "bytes.h"
#include "checkpoint.h"
#include "crc32c.h"
#include "durable.h"
#include "io_memory.h"
#include "pages.h"
#include "state_directory.h"

enum {
    IMAGE_BYTES = 600,
    COMMITS = 4,
};

static const char name[] = "anchor";
static const struct journal_settings settings = {
    .identity = "this vTPM's own.",
    .secret = "a secret of thirty-two bytes....",
    .sealed = true,
    .file_bytes = 2 * JOURNAL_PAGE_BYTES,
};

struct world {
    struct io_memory io;
    struct store *store, *writable;
    struct durable *durable;
    uint32_t acknowledged;
};

static void make_image(uint32_t number, uint8_t bytes[IMAGE_BYTES])
{
    for (size_t i = 0; i < IMAGE_BYTES; i++)
        bytes[i] = (uint8_t)(i * i);
    put_be32(bytes, number);
}

static void digest_of(uint32_t number, uint8_t digest[DIGEST_BYTES])
{
    uint8_t image[IMAGE_BYTES];

    make_image(number, image);
    assert_int_equal(digest_compute(image, IMAGE_BYTES, digest), 0);
}

/* The newer slot of the anchor that is whole, or NULL. */
static const uint8_t *newest_slot(const struct io_memory *io)
{
    const uint8_t *bytes, *newest = NULL;
    size_t n_bytes;

    assert_true(io_memory_read(io, name, &bytes, &n_bytes));
    for (size_t at = 0; at < n_bytes; at += ANCHOR_SLOT_STRIDE) {
        const uint8_t *slot = bytes + at;
        if (crc32c(slot, 508) == get_be32(slot + 508) && get_be64(slot) == ANCHOR_MAGIC &&
            (!newest || get_be64(slot + 32) > get_be64(newest + 32)))
            newest = slot;
    }
    return newest;
}

/* `generation` is 0 where no journal says it. */
static bool admits(const uint8_t *slot, const uint8_t digest[DIGEST_BYTES], uint64_t generation)
{
    return memcmp(slot + 48, digest, DIGEST_BYTES) == 0 ||
           memcmp(slot + 80, digest, DIGEST_BYTES) == 0 || generation > get_be64(slot + 40);
}

/* An anchor that has seen image 0, which is in its file. */
static void world_init(struct world *world)
{
    static const uint8_t zeros[ANCHOR_BYTES];
    struct anchor anchor = {.identity = "this vTPM's own."};
    uint8_t image[IMAGE_BYTES], digest[DIGEST_BYTES];

    *world = (struct world){0};
    io_memory_init(&world->io);
    struct io *io = &world->io.io;
    make_image(0, image);
    assert_int_equal(checkpoint_write(io, NULL, "permall", image, IMAGE_BYTES, NULL), 0);
    anchor.fd = io->create(io, name);
    assert_true(anchor.fd >= 0);
    assert_int_equal(io->write_at(io, anchor.fd, zeros, sizeof(zeros), 0), 0);
    assert_int_equal(io->sync(io, anchor.fd), 0);
    assert_int_equal(io->sync_directory(io), 0);
    digest_of(0, digest);
    assert_int_equal(anchor_write(io, &anchor, 1, digest), 0);
    assert_int_equal(store_new(&world->store), 0);
    assert_int_equal(store_map(&world->writable, store_fd(world->store), true), 0);
    store_raise_generation(world->writable, JOURNAL_IMAGE_TYPE, 1);
    assert_int_equal(durable_new(&world->durable, io), 0);
    assert_int_equal(durable_set_anchor(world->durable, &anchor), -EINVAL);
    assert_int_equal(durable_set_journal(world->durable, &settings, world->writable, false), 0);
    assert_int_equal(durable_set_anchor(world->durable, &anchor), 0);
    assert_int_equal(durable_load(world->durable, image, IMAGE_BYTES, true), 0);
    world->io.calls = world->io.syncs = 0;
}

static void world_deinit(struct world *world)
{
    durable_end(world->durable);
    durable_free(world->durable);
    store_free(world->writable);
    store_free(world->store);
    io_memory_deinit(&world->io);
}

static bool commit(struct world *world)
{
    uint8_t image[IMAGE_BYTES];

    make_image(world->acknowledged + 1, image);
    if (durable_commit(world->durable, image, IMAGE_BYTES) < 0)
        return false;
    world->acknowledged++;
    return true;
}

/* With `journal`, through one; else each commit replaces the file. Returns false if it was cut. */
static bool live(struct world *world, bool journal)
{
    if (journal)
        durable_begin(world->durable);
    for (int i = 0; i < COMMITS; i++)
        if (!commit(world))
            return false;
    return durable_end(world->durable) == 0;
}

/* Returns true if a start from what there is goes on, with what was acknowledged or the next. */
static bool goes_on(const struct world *world, const struct io_memory *after)
{
    struct journal_evidence evidence;
    struct journal_recovery recovery;
    static uint8_t image[IMAGE_BYTES_MAX];
    uint8_t digest[DIGEST_BYTES];

    if (!state_directory_read(after, &settings, &evidence))
        return false;
    state_directory_recover(&evidence, image, &recovery);
    const uint8_t *slot = newest_slot(after);
    if (!slot || recovery.verdict == STATE_UNREADABLE || !journal_may_start(&recovery))
        return false;
    uint32_t number = get_be32(image);
    digest_of(number, digest);
    uint64_t generation = evidence.journal ? recovery.generation : 0;
    bool is_last = number == world->acknowledged || number == world->acknowledged + 1;
    return is_last && admits(slot, digest, generation);
}

/* Returns true if the anchor would let a start go on from an image that was superseded. */
static bool admits_older(const struct world *world, const struct io_memory *after)
{
    const uint8_t *slot = newest_slot(after);
    uint8_t digest[DIGEST_BYTES];

    for (uint32_t number = 0; number < world->acknowledged; number++) {
        digest_of(number, digest);
        if (admits(slot, digest, 0))
            return true;
    }
    return false;
}

static bool goes_on_rightly(const struct io_memory *after, const void *context)
{
    return goes_on(context, after) && !admits_older(context, after);
}

/* Returns false if a loss of power at some call, of any kind, is not gone on from. */
static bool survives(bool journal, int skip_sync)
{
    bool survived = true;

    for (int step = 1;; step++) {
        struct world world;
        world_init(&world);
        world.io.skip_sync = skip_sync;
        world.io.fail_from = step;
        bool whole = live(&world, journal);
        survived &= io_memory_survives(&world.io, goes_on_rightly, &world);
        world.io.fail_from = 0;
        world_deinit(&world);
        if (whole)
            return survived;
        assert_true(step < 200);
    }
}

static void a_journals_commits_are_gone_on_from(void **state)
{
    (void)state;
    assert_true(survives(true, 0));
}

/* The anchor must not be ahead: a commit that need not wait for the disk waits all the same. */
static void a_deferred_commit_is_durable_before_the_anchor_has_seen_it(void **state)
{
    struct world world;

    (void)state;
    world_init(&world);
    durable_begin(world.durable);
    assert_true(commit(&world));
    durable_defer(world.durable, true);
    assert_true(commit(&world));
    assert_true(io_memory_survives(&world.io, goes_on_rightly, &world));
    world_deinit(&world);
}

static void files_in_place_of_files_are_gone_on_from(void **state)
{
    (void)state;
    assert_true(survives(false, 0));
}

static void canary_a_skipped_sync_is_caught(void **state)
{
    int caught = 0;

    (void)state;
    for (int sync = 1; sync <= 6; sync++)
        caught += !survives(false, sync);
    assert_true(caught >= 4);
}

static void a_commit_that_the_anchor_has_not_seen_is_none(void **state)
{
    static const bool with_journal[] = {false, true};

    (void)state;
    for (size_t i = 0; i < 2; i++) {
        struct world world;
        world_init(&world);
        if (with_journal[i])
            durable_begin(world.durable);
        assert_true(commit(&world));
        assert_true(commit(&world));
        /* Every call of a commit fails once; what comes after goes on from what was acknowledged.
         */
        for (int call = 1; call <= 8; call++) {
            world.io.calls = 0;
            world.io.fail_from = call;
            world.io.fail_to = call + 1;
            world.io.fail_error = ENOSPC;
            bool acknowledged = commit(&world);
            world.io.fail_from = world.io.fail_to = 0;
            const uint8_t *bytes;
            size_t n_bytes;
            assert_true(durable_get(world.durable, &bytes, &n_bytes));
            assert_int_equal(get_be32(bytes), world.acknowledged);
            if (!acknowledged) {
                assert_int_equal(durable_end(world.durable), 0);
                if (with_journal[i])
                    durable_begin(world.durable);
            }
            assert_true(commit(&world));
            assert_true(goes_on(&world, &world.io));
        }
        world_deinit(&world);
    }
}

/* A disk that says that a sync failed, and did it: so for each call of a commit, and then a stop in
 * order, a loss of power, or a guest that goes on. */
static void a_failure_that_came_too_late_locks_nobody_out(void **state)
{
    static struct io_choices choices;

    (void)state;
    for (int call = 1; call <= 12; call++)
        for (char then = 'a'; then <= 'c'; then++) {
            struct io_memory after;
            struct world world;
            world_init(&world);
            durable_begin(world.durable);
            assert_true(commit(&world) && commit(&world));
            world.io.fail_late = true;
            world.io.fail_from = world.io.calls + call;
            world.io.fail_to = world.io.fail_from + 1;
            commit(&world);
            world.io.fail_from = world.io.fail_to = 0;
            if (then == 'a')
                assert_int_equal(durable_end(world.durable), 0);
            if (then == 'b')
                assert_true(commit(&world));
            io_memory_init(&after);
            io_choices_init(&choices);
            io_memory_lose_power(&world.io, &choices, &after);
            if (!goes_on(&world, &after))
                fail_msg("call %d, then %c", call, then);
            io_memory_deinit(&after);
            world_deinit(&world);
        }
}

enum {
    ELSEWHERE = 40, /* the image of a peer's that a session's file has */
    CHANGED = 41,   /* the same after libtpms has started from it */
    WHOLE = 42,     /* what QEMU's stream has brought */
};

/* Returns true if a start goes on with the directory's own state, and that is one of two. */
static bool own_goes_on(const struct io_memory *after, uint32_t before, uint32_t then)
{
    struct journal_evidence evidence;
    struct journal_recovery recovery;
    static uint8_t image[IMAGE_BYTES_MAX];
    uint8_t digest[DIGEST_BYTES];

    if (!state_directory_read(after, &settings, &evidence))
        return false;
    state_directory_recover(&evidence, image, &recovery);
    if (recovery.verdict == STATE_UNREADABLE || !journal_may_start(&recovery))
        return false;
    uint32_t number = get_be32(image);
    digest_of(number, digest);
    return (number == before || number == then) &&
           admits(newest_slot(after), digest, evidence.journal ? recovery.generation : 0);
}

/* Returns true if a start takes up what is elsewhere: nobody has written the file since, and the
 * anchor has heard of it (start.py). */
static bool elsewhere_is_taken(const struct io_memory *before, const struct io_memory *after)
{
    const uint8_t *old, *now;
    size_t n_old, n_now;
    uint8_t digest[DIGEST_BYTES];

    digest_of(ELSEWHERE, digest);
    return io_memory_read(before, "tpm2-00.permall", &old, &n_old) &&
           io_memory_read(after, "tpm2-00.permall", &now, &n_now) && n_old == n_now &&
           memcmp(old, now, n_old) == 0 && admits(newest_slot(after), digest, 0);
}

/* One that was here before, whose guest has changed it; its journal is left. */
static void begin_with_journal(struct world *world)
{
    world_init(world);
    durable_begin(world->durable);
    assert_true(commit(world) && commit(world));
    durable_leave(world->durable);
}

static int adopt(struct world *world, uint32_t number, bool is_to_be_written)
{
    uint8_t image[IMAGE_BYTES], digest[DIGEST_BYTES];

    make_image(number, image);
    digest_of(ELSEWHERE, digest);
    return durable_adopt(world->durable, image, IMAGE_BYTES, digest, is_to_be_written,
                         settings.identity);
}

static void lose_power_at(struct world *world, int step, const struct io_memory *before,
                          uint32_t then)
{
    static struct io_choices choices;

    io_choices_init(&choices);
    do {
        struct io_memory after;
        io_memory_init(&after);
        io_memory_lose_power(&world->io, &choices, &after);
        if (!own_goes_on(&after, world->acknowledged, then) && !elsewhere_is_taken(before, &after))
            fail_msg("call %d, to %u", step, then);
        io_memory_deinit(&after);
    } while (io_choices_next(&choices));
}

/* What is granted is taken up by the next start, at whatever call the power fails. */
static void what_comes_to_where_it_was_before_is_gone_on_from(void **state)
{
    static const uint32_t comes[] = {ELSEWHERE, CHANGED};

    (void)state;
    for (size_t i = 0; i < 2; i++)
        for (int step = 1, r = -1; r < 0; step++) {
            struct io_memory before;
            struct world world;
            begin_with_journal(&world);
            static struct io_choices none;
            io_choices_init(&none);
            io_memory_init(&before);
            io_memory_lose_power(&world.io, &none, &before);
            world.io.fail_from = world.io.calls + step;
            r = adopt(&world, comes[i], comes[i] == CHANGED);
            lose_power_at(&world, step, &before, comes[i]);
            world.io.fail_from = 0;
            io_memory_deinit(&before);
            world_deinit(&world);
            assert_true(step < 50);
        }
}

/* Its guest is served before its state is in its own file. */
static void what_has_come_is_gone_on_from_with_what_was_acknowledged(void **state)
{
    static struct io_choices choices;

    (void)state;
    for (int step = 1, r = -1; r < 0; step++) {
        struct io_memory before, after;
        struct world world;
        uint8_t image[IMAGE_BYTES];
        begin_with_journal(&world);
        assert_int_equal(adopt(&world, ELSEWHERE, false), 0);
        io_choices_init(&choices);
        io_memory_init(&before);
        io_memory_lose_power(&world.io, &choices, &before);
        durable_begin(world.durable);
        make_image(CHANGED, image);
        world.io.fail_from = world.io.calls + step;
        r = durable_commit(world.durable, image, IMAGE_BYTES);
        bool is_acknowledged = r >= 0;
        if (r >= 0)
            r = state_directory_store(world.durable);
        io_choices_init(&choices);
        do {
            io_memory_init(&after);
            io_memory_lose_power(&world.io, &choices, &after);
            if (!own_goes_on(&after, CHANGED, is_acknowledged ? CHANGED : ELSEWHERE) &&
                (is_acknowledged || !elsewhere_is_taken(&before, &after)))
                fail_msg("call %d", step);
            io_memory_deinit(&after);
        } while (io_choices_next(&choices));
        world.io.fail_from = 0;
        io_memory_deinit(&before);
        world_deinit(&world);
        assert_true(step < 50);
    }
}

/* Where any call of it fails, and it is given back: the directory has a whole state. */
static void what_goes_back_leaves_a_whole_directory(void **state)
{
    (void)state;
    for (int call = 1, r = -1; r < 0; call++) {
        struct world world;
        begin_with_journal(&world);
        world.io.fail_from = world.io.calls + call;
        world.io.fail_to = world.io.fail_from + 1;
        r = adopt(&world, ELSEWHERE, false);
        if (r < 0 && durable_is_adopting(world.durable))
            assert_int_equal(adopt(&world, ELSEWHERE, true), 0);
        assert_false(durable_is_adopting(world.durable));
        if (r < 0 && !own_goes_on(&world.io, world.acknowledged, ELSEWHERE))
            fail_msg("call %d", call);
        world_deinit(&world);
        assert_true(call < 50);
    }
}

/* Without a journal its file is made ahead. Returns what its commit does. */
static int bring_whole(struct world *world, const struct checkpoint_lineage *lineage, int step)
{
    uint8_t image[IMAGE_BYTES];

    make_image(WHOLE, image);
    world->io.fail_from = world->io.calls + step;
    durable_bring(world->durable, image, IMAGE_BYTES);
    durable_prepare(world->durable, image, IMAGE_BYTES, lineage);
    durable_work_ahead(world->durable);
    store_raise_generation(world->writable, JOURNAL_IMAGE_TYPE, lineage->generation);
    int r = durable_expect(world->durable, lineage);
    return r < 0 ? r : durable_commit(world->durable, image, IMAGE_BYTES);
}

/* Between the anchor's announcement and the file, too. */
static void whole_blobs_are_gone_on_from(void **state)
{
    static const struct checkpoint_lineage comes[] = {
        {.identity = "this vTPM's own.", .generation = 100},
        {.identity = "another vTPM's..", .generation = 100},
    };
    void (*const begins[])(struct world *) = {world_init, begin_with_journal};

    (void)state;
    for (size_t i = 0; i < 4; i++)
        for (int step = 1, r = -1; r < 0; step++) {
            struct io_memory before;
            struct world world;
            begins[i / 2](&world);
            io_memory_init(&before);
            r = bring_whole(&world, &comes[i % 2], step);
            lose_power_at(&world, step, &before, WHOLE);
            world.io.fail_from = 0;
            io_memory_deinit(&before);
            world_deinit(&world);
            assert_true(step < 50);
        }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_journals_commits_are_gone_on_from),
        cmocka_unit_test(a_deferred_commit_is_durable_before_the_anchor_has_seen_it),
        cmocka_unit_test(files_in_place_of_files_are_gone_on_from),
        cmocka_unit_test(canary_a_skipped_sync_is_caught),
        cmocka_unit_test(a_commit_that_the_anchor_has_not_seen_is_none),
        cmocka_unit_test(a_failure_that_came_too_late_locks_nobody_out),
        cmocka_unit_test(what_comes_to_where_it_was_before_is_gone_on_from),
        cmocka_unit_test(what_has_come_is_gone_on_from_with_what_was_acknowledged),
        cmocka_unit_test(what_goes_back_leaves_a_whole_directory),
        cmocka_unit_test(whole_blobs_are_gone_on_from),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
