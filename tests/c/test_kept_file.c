/* A state's file that follows its image (kept_file.h): each operation in each state, with calls
 * that fail; after each, a loss of power leaves what the state says.
 */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "checkpoint.h"
#include "io_memory.h"
#include "kept_file.h"

enum {
    STATE_BYTES = 20,
    CALLS_TO_WRITE = 5, /* and have the name, synced */
    CALLS_MAX = 50,
};

#define FILE_NAME "tpm2-00.volatilestate"

static const uint8_t one[STATE_BYTES] = "one state", other[STATE_BYTES] = "another state";

static struct io_memory io;
static struct kept_file file;

static int store_one(void)
{
    return kept_store(&file, &io.io, NULL, one, sizeof(one));
}

static int store_other(void)
{
    return kept_store(&file, &io.io, NULL, other, sizeof(other));
}

static int remove_it(void)
{
    return kept_remove(&file, &io.io);
}

static int reclaim(void)
{
    return kept_reclaim(&file, &io.io, NULL);
}

/* Ways into the states, unsure with an image and without. */

static void enter_absent(void)
{
    file = (struct kept_file){.name = "volatilestate"};
    io_memory_init(&io);
    assert_int_equal(file.state, KEPT_ABSENT);
}

static void enter_there(void)
{
    enter_absent();
    assert_int_equal(store_one(), 0);
    assert_int_equal(file.state, KEPT_THERE);
}

/* All of it is done, but not synced. */
static void fail_last_sync(int (*function)(void))
{
    io.fail_from = io.calls + CALLS_TO_WRITE;
    assert_true(function() < 0);
    io.fail_from = 0;
    assert_int_equal(file.state, KEPT_UNSURE);
}

static void enter_unsure(void)
{
    enter_absent();
    fail_last_sync(store_other);
    assert_false(file.image.exists);
}

static void enter_unsure_with_image(void)
{
    enter_there();
    fail_last_sync(store_other);
    assert_true(file.image.exists);
}

static void enter_not_removed(void)
{
    enter_there();
    io.fail_from = io.calls + 2; /* the directory is not synced */
    assert_true(remove_it() < 0);
    io.fail_from = 0;
    assert_int_equal(file.state, KEPT_UNSURE);
    assert_true(file.image.exists);
}

static void (*const enters[])(void) = {enter_absent, enter_there, enter_unsure,
                                       enter_unsure_with_image, enter_not_removed};

static const struct {
    int (*function)(void);
    enum kept_state with_image, without; /* if it succeeds */
} operations[] = {
    {store_one, KEPT_THERE, KEPT_THERE},
    {store_other, KEPT_THERE, KEPT_THERE},
    {remove_it, KEPT_ABSENT, KEPT_ABSENT},
    {reclaim, KEPT_THERE, KEPT_UNSURE},
};

/* What the state says of the file. */
static bool is_as_it_says(const struct io_memory *after, const void *context)
{
    const uint8_t *bytes;
    size_t n_bytes;
    bool is_there = io_memory_read(after, FILE_NAME, &bytes, &n_bytes);

    (void)context;
    if (file.state == KEPT_UNSURE)
        return true;
    if (file.state == KEPT_ABSENT)
        return !is_there;
    return is_there && n_bytes == CHECKPOINT_HEADER_BYTES + STATE_BYTES &&
           memcmp(bytes + CHECKPOINT_HEADER_BYTES, file.image.bytes, STATE_BYTES) == 0;
}

/* Returns true if no call failed. */
static bool try_operation(size_t enter, size_t operation, int call, int how)
{
    enters[enter]();
    bool had_image = file.image.exists;
    int calls = io.calls;
    io.fail_from = calls + call;
    io.fail_half = how == 1;
    io.fail_late = how == 2;
    int r = operations[operation].function();
    bool is_over = io.calls < calls + call;
    io.fail_from = 0;
    if (is_over)
        assert_int_equal(r, 0);
    if (r == 0)
        assert_int_equal(file.state, had_image ? operations[operation].with_image
                                               : operations[operation].without);
    else
        assert_int_equal(file.state, KEPT_UNSURE);
    assert_true(io_memory_survives(&io, is_as_it_says, NULL));
    assert_int_equal(operations[operation].function(), 0); /* once more, and it is well */
    assert_true(io_memory_survives(&io, is_as_it_says, NULL));
    kept_deinit(&file);
    io_memory_deinit(&io);
    return is_over;
}

static void every_operation_in_every_state_leaves_what_that_says(void **state)
{
    (void)state;
    for (size_t enter = 0; enter < sizeof(enters) / sizeof(*enters); enter++)
        for (size_t i = 0; i < sizeof(operations) / sizeof(*operations); i++)
            for (int how = 0; how <= 2; how++)
                for (int call = 1; !try_operation(enter, i, call, how); call++)
                    assert_true(call < CALLS_MAX);
}

/* What is there is not written again. */
static void what_is_there_is_left(void **state)
{
    (void)state;
    enter_there();
    int calls = io.calls;
    assert_int_equal(store_one(), 0);
    assert_int_equal(io.calls, calls);
    kept_deinit(&file);
    assert_int_equal(kept_load(&file, other, sizeof(other)), 0);
    assert_int_equal(file.state, KEPT_THERE);
    assert_int_equal(store_other(), 0);
    assert_int_equal(io.calls, calls);
    kept_deinit(&file);
    assert_int_equal(file.state, KEPT_ABSENT);
    assert_int_equal(remove_it(), 0);
    assert_int_equal(io.calls, calls);
    io_memory_deinit(&io);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_operation_in_every_state_leaves_what_that_says),
        cmocka_unit_test(what_is_there_is_left),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
