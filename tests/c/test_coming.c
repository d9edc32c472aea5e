/* What comes, beside what is here (coming.h): each lineage there can be, of bytes that are the
 * image's or not, committed or not, with a durable that does what its state says.
 */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "bytes.h"
#include "checkpoint.h"
#include "coming.h"
#include "durable.h"
#include "epoch.h"
#include "io_memory.h"
#include "journal.h"
#include "pages.h"

enum {
    IMAGE_BYTES = 100,
    HERE = 5, /* the generation of the image */
};

static const struct journal_settings settings = {
    .identity = "this vTPM's own.",
    .file_bytes = 2 * JOURNAL_PAGE_BYTES,
};
static const char others[] = "another vTPM's..";

/* By what is known of the image, whose it is, and whether the generation is an earlier one, the
 * same or a later one. */
static const enum coming_state kinds[2][2][3] = {
    [false] = {[false] = {COMING_LATER, COMING_LATER, COMING_LATER},
               [true] = {COMING_AGAIN, COMING_AGAIN, COMING_LATER}},
    [true] = {[false] = {COMING_INSTEAD, COMING_INSTEAD, COMING_INSTEAD},
              [true] = {COMING_BACK, COMING_BACK, COMING_LATER}},
};

/* A vTPM, and what comes to it. */
struct world {
    struct io_memory io;
    struct store *store, *writable;
    struct durable *durable;
    struct checkpoint_lineage lineage;
    enum coming_state kind;
    uint8_t image[IMAGE_BYTES];
};

static void world_init(struct world *world, bool is_known, bool is_same, int later)
{
    struct checkpoint_lineage ours = {.generation = HERE};

    *world = (struct world){.lineage.generation = (uint64_t)(HERE + later),
                            .kind = kinds[is_known][is_same][later + 1]};
    memcpy(ours.identity, settings.identity, sizeof(ours.identity));
    memcpy(world->lineage.identity, is_same ? (const char *)settings.identity : others,
           sizeof(ours.identity));
    assert_int_equal(coming_kind(&world->lineage, &ours, is_known), world->kind);
    io_memory_init(&world->io);
    assert_int_equal(
        checkpoint_write(&world->io.io, NULL, "permall", world->image, IMAGE_BYTES, NULL), 0);
    assert_int_equal(store_new(&world->store), 0);
    assert_int_equal(store_map(&world->writable, store_fd(world->store), true), 0);
    store_raise_generation(world->writable, JOURNAL_IMAGE_TYPE, HERE);
    assert_int_equal(durable_new(&world->durable, &world->io.io), 0);
    assert_int_equal(durable_set_journal(world->durable, &settings, world->writable, false), 0);
    assert_int_equal(durable_load(world->durable, world->image, IMAGE_BYTES, true), 0);
    durable_set_loaded(world->durable, HERE, is_known);
}

static void world_deinit(struct world *world)
{
    durable_free(world->durable);
    store_free(world->writable);
    store_free(world->store);
    io_memory_deinit(&world->io);
}

static bool is_its_identity(const struct world *world, const void *identity)
{
    struct checkpoint_lineage now = durable_lineage(world->durable);

    return memcmp(now.identity, identity, sizeof(now.identity)) == 0;
}

/* As it is once it was committed. */
static void check_committed(const struct world *world, bool is_other, bool was_written)
{
    bool is_new = world->kind == COMING_BACK || world->kind == COMING_INSTEAD;
    bool is_always = world->kind == COMING_LATER || world->kind == COMING_INSTEAD;
    uint64_t now = durable_lineage(world->durable).generation;

    assert_int_equal(was_written, is_other || is_always);
    if (!was_written)
        assert_int_equal(now, HERE);
    else
        assert_int_equal(now, is_new ? EPOCH_GENERATIONS : world->lineage.generation);
    assert_true(is_its_identity(world, world->lineage.identity));
}

enum outcome { COMMITTED, FAILED, NEVER, OUTCOMES };

static void come(struct world *world, bool is_other, enum outcome outcome)
{
    int n_calls = world->io.calls, r = -ECANCELED;

    world->image[0] = is_other;
    durable_bring(world->durable, world->image, IMAGE_BYTES);
    assert_int_equal(durable_expect(world->durable, &world->lineage), 0);
    assert_true(is_its_identity(world, world->lineage.identity));
    world->io.fail_from = outcome == FAILED ? world->io.calls + 1 : 0;
    if (outcome != NEVER)
        r = durable_commit(world->durable, world->image, IMAGE_BYTES);
    world->io.fail_from = 0;
    if (outcome == COMMITTED)
        assert_int_equal(r, 0);
    bool was_written = world->io.calls > n_calls;
    assert_int_equal(durable_has_come(world->durable), r == 0);
    if (r == 0)
        check_committed(world, is_other, was_written);
    else
        assert_true(is_its_identity(world, settings.identity));
    assert_true(durable_has_come(world->durable)); /* nothing is expected any more */
}

/* Nothing of what came is left: what is the image is not written, and what is not is this vTPM's.
 */
static void go_on(struct world *world, bool is_unsure)
{
    struct checkpoint_lineage before = durable_lineage(world->durable);
    uint8_t image[IMAGE_BYTES];
    const uint8_t *bytes;
    size_t n_bytes;
    int n_calls = world->io.calls;

    assert_true(durable_get(world->durable, &bytes, &n_bytes));
    memcpy(image, bytes, IMAGE_BYTES);
    assert_int_equal(durable_commit(world->durable, image, IMAGE_BYTES), 0);
    assert_int_equal(world->io.calls > n_calls, is_unsure);
    image[1] = 1;
    assert_int_equal(durable_commit(world->durable, image, IMAGE_BYTES), 0);
    assert_true(is_its_identity(world, before.identity));
    assert_true(durable_is_known(world->durable));
    if (!is_unsure) /* else its numbers may be used up */
        assert_int_equal(epoch_of(durable_lineage(world->durable).generation),
                         epoch_of(before.generation));
}

static void what_comes_is_committed_as_its_state_says(void **state)
{
    (void)state;
    for (int i = 0; i < 2 * 2 * 3 * 2 * OUTCOMES; i++) {
        enum outcome outcome = i % OUTCOMES;
        int later = i / OUTCOMES % 3 - 1;
        bool is_other = i / OUTCOMES / 3 % 2, is_same = i / OUTCOMES / 6 % 2;
        struct world world;
        world_init(&world, i / OUTCOMES / 12 % 2, is_same, later);
        bool is_written = is_other || world.kind == COMING_LATER || world.kind == COMING_INSTEAD;
        come(&world, is_other, outcome);
        go_on(&world, outcome == FAILED && is_written);
        world_deinit(&world);
    }
}

/* In place of what was expected before. */
static void what_is_expected_last_counts(void **state)
{
    struct checkpoint_lineage ours = {.generation = HERE}, other = {.identity = "other"}, later;
    struct coming coming = {0};

    (void)state;
    later = ours;
    later.generation++;
    for (int i = COMING_AGAIN; i < COMING_STATES; i++) {
        const struct checkpoint_lineage *next = i == COMING_LATER ? &later : &ours;
        bool is_known = i != COMING_AGAIN;
        coming_expect(&coming, i == COMING_INSTEAD ? &other : next, &ours, is_known);
        assert_int_equal(coming.state, i);
        assert_int_equal(coming.generation, coming_generation(i, next));
        assert_memory_equal(coming.before, ours.identity, sizeof(ours.identity));
    }
    coming_end(&coming);
    assert_int_equal(coming.state, COMING_NOTHING);
    assert_int_equal(coming.generation, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_comes_is_committed_as_its_state_says),
        cmocka_unit_test(what_is_expected_last_counts),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
