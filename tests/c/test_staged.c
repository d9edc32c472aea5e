/* The states that a session brings, record by record: all that records make, or what was there. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "link_types.h"
#include "nvram.h"
#include "pages.h"
#include "staged.h"

enum { STATE_BYTES = 3000 };

static struct staged staged;
static uint8_t record[2][DELTA_RECORD_BYTES_MAX]; /* by what it is for: the permanent state first */
static size_t record_bytes[2];

static int end(void **unused)
{
    (void)unused;
    staged_deinit(&staged);
    return 0;
}

/* Make a record from a generation, of which all bytes are its number, to the next one. */
static void encode(int which, uint64_t from)
{
    uint8_t before[STATE_BYTES], after[STATE_BYTES];
    struct delta_image base = {before, from ? sizeof(before) : 0, from, NULL};
    struct delta_image next = {after, sizeof(after), from + 1, NULL};

    memset(before, (int)from, sizeof(before));
    memset(after, (int)from + 1, sizeof(after));
    unsigned type = which ? LINK_STATE_VOLATILE : LINK_STATE_PERMANENT;
    assert_int_equal(delta_encode(type, &base, &next, record[which], &record_bytes[which]), 0);
}

static int take(bool permanent, bool following)
{
    struct staged_records records = {
        .permanent = record[0],
        .permanent_bytes = permanent ? record_bytes[0] : 0,
        .following = record[1],
        .following_bytes = following ? record_bytes[1] : 0,
    };

    return staged_take(&staged, &records);
}

/* What is staged are these generations. */
static void check_states(int permanent, int following)
{
    struct nvram_states states;
    uint8_t wanted[STATE_BYTES];
    struct image_digest digest;

    assert_int_equal(staged_get(&staged, &states), 0);
    assert_int_equal(states.permanent_bytes, STATE_BYTES);
    assert_int_equal(states.volatile_bytes, STATE_BYTES);
    memset(wanted, permanent, sizeof(wanted));
    assert_memory_equal(states.permanent, wanted, sizeof(wanted));
    assert_int_equal(
        image_digest_compute(&(struct delta_image){.bytes = wanted, .n_bytes = sizeof(wanted)},
                             NULL, &digest),
        0);
    assert_memory_equal(states.permanent_digest, digest.whole, DIGEST_BYTES);
    memset(wanted, following, sizeof(wanted));
    assert_memory_equal(states.volatile_state, wanted, sizeof(wanted));
    assert_int_equal(
        image_digest_compute(&(struct delta_image){.bytes = wanted, .n_bytes = sizeof(wanted)},
                             NULL, &digest),
        0);
    assert_memory_equal(states.volatile_digest, digest.whole, DIGEST_BYTES);
}

static void bring_both(void)
{
    encode(0, 0);
    encode(1, 0);
    assert_int_equal(take(true, true), 0);
}

static void there_is_nothing_to_start_from_until_both_have_come(void **unused)
{
    struct nvram_states states;

    (void)unused;
    assert_int_equal(staged_get(&staged, &states), -ENOENT);
    encode(0, 0);
    assert_int_equal(take(true, false), 0);
    assert_int_equal(staged_get(&staged, &states), -ENOENT);
    encode(1, 0);
    assert_int_equal(take(false, true), 0);
    check_states(1, 1);
}

static void each_record_continues_its_state(void **unused)
{
    (void)unused;
    bring_both();
    encode(0, 1);
    assert_int_equal(take(true, false), 0);
    check_states(2, 1);
    encode(0, 2);
    encode(1, 1);
    assert_int_equal(take(true, true), 0);
    check_states(3, 2);
    assert_int_equal(take(false, false), 0);
    check_states(3, 2);
}

static void a_whole_state_takes_the_place_of_what_was_there(void **unused)
{
    (void)unused;
    bring_both();
    encode(0, 1);
    assert_int_equal(take(true, false), 0);
    bring_both();
    check_states(1, 1);
}

static void invariant_5_of_records_that_do_not_apply_nothing_is_used(void **unused)
{
    (void)unused;
    bring_both();
    encode(0, 1);
    encode(1, 3); /* continues what has not come */
    assert_int_equal(take(true, true), -EBADMSG);
    check_states(1, 1);
    encode(1, 1);
    record[1][record_bytes[1] / 2] ^= 1;
    assert_int_equal(take(true, true), -EBADMSG);
    check_states(1, 1);
    memcpy(record[1], record[0], record_bytes[0]); /* one of the other state */
    record_bytes[1] = record_bytes[0];
    assert_int_equal(take(false, true), -EBADMSG);
    record_bytes[1] = 1;
    assert_int_equal(take(false, true), -EBADMSG);
    check_states(1, 1);
    encode(1, 1);
    assert_int_equal(take(true, true), 0);
    check_states(2, 2);
}

static void what_was_there_before_the_last_records_can_be_gone_back_to(void **unused)
{
    (void)unused;
    bring_both();
    encode(0, 1);
    encode(1, 1);
    assert_int_equal(take(true, true), 0);
    assert_true(staged_is(&staged, 2, 2));
    assert_true(staged_was(&staged, 1, 1));
    assert_false(staged_was(&staged, 1, 2));
    assert_false(staged_was(&staged, 2, 1));
    assert_false(staged_is(&staged, 1, 1));
    staged_go_back(&staged);
    check_states(1, 1);
    assert_true(staged_is(&staged, 1, 1));
    staged_go_back(&staged); /* and nothing is lost by that */
    check_states(2, 2);
    staged_go_back(&staged);
    encode(0, 1);
    assert_int_equal(take(true, false), 0);
    check_states(2, 1);
    assert_true(staged_was(&staged, 1, 1)); /* the same again */
}

/* What the last records have left alone was there before, too. */
static void what_has_not_changed_is_what_it_was(void **unused)
{
    (void)unused;
    bring_both();
    encode(0, 1);
    assert_int_equal(take(true, false), 0);
    assert_true(staged_is(&staged, 2, 1));
    assert_true(staged_was(&staged, 1, 1));
    encode(1, 1);
    assert_int_equal(take(false, true), 0);
    assert_true(staged_is(&staged, 2, 2));
    assert_true(staged_was(&staged, 2, 1));
    assert_false(staged_was(&staged, 1, 1)); /* that was two rounds ago */
    staged_go_back(&staged);
    check_states(2, 1);
    assert_int_equal(take(false, false), 0);
    assert_true(staged_was(&staged, 2, 1));
    assert_false(staged_was(&staged, 2, 2));
}

static void what_has_not_come_is_of_no_generation(void **unused)
{
    (void)unused;
    assert_false(staged_is(&staged, 0, 0));
    assert_false(staged_was(&staged, 0, 0));
    encode(0, 0);
    assert_int_equal(take(true, false), 0);
    assert_false(staged_is(&staged, 1, 0));
    assert_false(staged_was(&staged, 1, 0));
    assert_false(staged_was(&staged, 0, 0));
    staged_go_back(&staged);
    encode(1, 0);
    assert_int_equal(take(false, true), 0);
    assert_false(staged_was(&staged, 1, 0));
    assert_true(staged_is(&staged, 1, 1));
}

/* Make a record of a whole permanent state of a generation. */
static void encode_whole(uint64_t generation)
{
    static const uint8_t bytes[STATE_BYTES];
    struct delta_image base = {(const uint8_t *)"", 0, 0, NULL};
    struct delta_image next = {bytes, sizeof(bytes), generation, NULL};

    assert_int_equal(delta_encode(LINK_STATE_PERMANENT, &base, &next, record[0], &record_bytes[0]),
                     0);
}

static void invariant_10_generations_are_not_used_up_by_who_gives_them(void **unused)
{
    (void)unused;
    bring_both();
    encode_whole(GENERATION_GIVEN_MAX + 1);
    assert_int_equal(take(true, false), -EBADMSG);
    encode_whole(GENERATION_MAX);
    assert_int_equal(take(true, false), -EBADMSG);
    check_states(1, 1);
    encode_whole(GENERATION_GIVEN_MAX);
    assert_int_equal(take(true, false), 0);
    assert_true(staged_is(&staged, GENERATION_GIVEN_MAX, 1));
}

#define TEST(name) cmocka_unit_test_teardown(name, end)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(there_is_nothing_to_start_from_until_both_have_come),
        TEST(each_record_continues_its_state),
        TEST(a_whole_state_takes_the_place_of_what_was_there),
        TEST(what_was_there_before_the_last_records_can_be_gone_back_to),
        TEST(what_has_not_changed_is_what_it_was),
        TEST(what_has_not_come_is_of_no_generation),
        TEST(invariant_10_generations_are_not_used_up_by_who_gives_them),
        TEST(invariant_5_of_records_that_do_not_apply_nothing_is_used),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
