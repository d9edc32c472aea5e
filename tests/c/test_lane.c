/* The lane: what one side seals the other opens, once, in order; anything else ends it for good.
 *
 * That the bytes are those of docs/lane-format.md is for tests/property/test_lane.py. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "bytes.h"
#include "lane.h"

static const struct lane_keying a_keying = {
    .session = "a session of 16",
    .key = "a key of 32 bytes, which is sent",
    .uuid = "uuid of a guest",
    .lineage = "a lineage of 16",
};
static const struct lane_frame hello = {.kind = LANE_HELLO},
                               take = {.kind = LANE_TAKE,
                                       .permanent_digest = "a digest of the permanent state",
                                       .volatile_digest = "a digest of the volatile state",
                                       .apply_us = 0x01020304,
                                       .start_us = 0xfffefdfc},
                               grant = {.kind = LANE_GRANT},
                               refuse = {.kind = LANE_REFUSE, .reason = 7},
                               go_on = {.kind = LANE_GO_ON};

struct frame_bytes {
    uint8_t bytes[LANE_FRAME_BYTES];
};

struct ends {
    struct lane *source, *destination;
};

static struct lane *make(const struct lane_keying *keying, bool is_source)
{
    struct lane *lane;

    assert_int_equal(lane_new(&lane, keying, is_source), 0);
    return lane;
}

static struct ends make_ends(void)
{
    return (struct ends){make(&a_keying, true), make(&a_keying, false)};
}

static void free_ends(struct ends *ends)
{
    lane_free(ends->source);
    lane_free(ends->destination);
}

static struct frame_bytes seal(struct lane *lane, const struct lane_frame *frame)
{
    struct frame_bytes sealed;

    assert_int_equal(lane_seal(lane, frame, sealed.bytes), 0);
    return sealed;
}

/* A copy of exactly that size, so that a read past its end is seen. */
static int open_into(struct lane *lane, const struct frame_bytes *sealed, struct lane_frame *frame)
{
    uint8_t *copy = malloc(LANE_FRAME_BYTES);

    memcpy(copy, sealed->bytes, LANE_FRAME_BYTES);
    int r = lane_open(lane, copy, frame);
    free(copy);
    return r;
}

static void assert_opens(struct lane *lane, const struct frame_bytes *sealed,
                         const struct lane_frame *expected)
{
    struct lane_frame frame;

    assert_int_equal(open_into(lane, sealed, &frame), 0);
    assert_memory_equal(&frame, expected, sizeof(frame));
}

/* The lane takes no more, also what would have been right, and says no more. */
static void assert_ends(struct lane *lane, const struct frame_bytes *sealed,
                        const struct frame_bytes *right, int refusal)
{
    static const struct lane_frame nothing;
    struct lane_frame frame = take;
    struct frame_bytes unused;

    assert_int_equal(open_into(lane, sealed, &frame), refusal);
    assert_memory_equal(&frame, &nothing, sizeof(frame));
    assert_int_equal(open_into(lane, right, &frame), LANE_ENDED);
    assert_memory_equal(&frame, &nothing, sizeof(frame));
    assert_int_equal(lane_seal(lane, &hello, unused.bytes), LANE_ENDED);
}

static void every_kind_passes_both_ways(void **state)
{
    cleanup(free_ends) struct ends ends = make_ends();
    const struct lane_frame *const frames[] = {&hello, &take, &grant, &refuse, &go_on, &take};

    (void)state;
    for (size_t i = 0; i < sizeof(frames) / sizeof(*frames); i++) {
        struct frame_bytes there = seal(ends.source, frames[i]);
        struct frame_bytes back = seal(ends.destination, frames[i]);
        assert_memory_not_equal(there.bytes, back.bytes, LANE_FRAME_BYTES);
        assert_opens(ends.destination, &there, frames[i]);
        assert_opens(ends.source, &back, frames[i]);
    }
}

static void what_cannot_be_the_next_frame_is_not_sealed(void **state)
{
    cleanup(free_ends) struct ends ends = make_ends();
    const struct lane_frame impossible[] = {
        {.kind = 0},
        {.kind = LANE_GO_ON + 1},
        {.kind = 256 + LANE_GRANT},
        {.kind = LANE_HELLO},
        {.kind = LANE_REFUSE},
        {.kind = LANE_TAKE, .reason = 1},
        {.kind = LANE_GRANT, .reason = 1},
        {.kind = LANE_GRANT, .apply_us = 1},
        {.kind = LANE_GRANT, .start_us = 1},
        {.kind = LANE_GO_ON, .permanent_digest = {[31] = 1}},
        {.kind = LANE_REFUSE, .reason = 1, .volatile_digest = {1}},
    };
    uint8_t bytes[LANE_FRAME_BYTES];

    (void)state;
    assert_int_equal(lane_seal(ends.source, &take, bytes), LANE_IMPOSSIBLE);
    struct frame_bytes sealed = seal(ends.source, &hello);
    assert_opens(ends.destination, &sealed, &hello);
    for (size_t i = 0; i < sizeof(impossible) / sizeof(*impossible); i++)
        assert_int_equal(lane_seal(ends.source, &impossible[i], bytes), LANE_IMPOSSIBLE);
    sealed = seal(ends.source, &take);
    assert_opens(ends.destination, &sealed, &take);
}

static void no_altered_bit_opens(void **state)
{
    (void)state;
    for (size_t bit = 0; bit < 8 * LANE_FRAME_BYTES; bit++) {
        cleanup(free_ends) struct ends ends = make_ends();
        struct frame_bytes right = seal(ends.source, &hello), altered = right;
        altered.bytes[bit / 8] ^= (uint8_t)(1 << bit % 8);
        assert_ends(ends.destination, &altered, &right, LANE_FORGED);
    }
}

static void what_came_before_or_comes_later_does_not_open(void **state)
{
    enum { N_FRAMES = 4 };

    (void)state;
    for (size_t expected = 0; expected < N_FRAMES; expected++) {
        for (size_t other = 0; other < N_FRAMES; other++) {
            cleanup(free_ends) struct ends ends = make_ends();
            struct frame_bytes frames[N_FRAMES] = {seal(ends.source, &hello)};
            for (size_t i = 1; i < N_FRAMES; i++)
                frames[i] = seal(ends.source, &grant);
            for (size_t i = 0; i < expected; i++)
                assert_opens(ends.destination, &frames[i], i == 0 ? &hello : &grant);
            if (other != expected)
                assert_ends(ends.destination, &frames[other], &frames[expected], LANE_FORGED);
        }
    }
}

static void what_is_sent_back_does_not_open(void **state)
{
    (void)state;
    for (int is_greeted = 0; is_greeted < 2; is_greeted++) {
        struct lane_keying keying = a_keying;
        keying.is_greeted = is_greeted;
        for (int is_source = 0; is_source < 2; is_source++) {
            struct lane *lane = make(&keying, is_source);
            struct frame_bytes own = seal(lane, is_greeted ? &grant : &hello);
            assert_ends(lane, &own, &own, LANE_FORGED);
            lane_free(lane);
        }
    }
}

static void another_lanes_frame_does_not_open(void **state)
{
    struct lane_keying others[] = {a_keying, a_keying, a_keying, a_keying};

    (void)state;
    others[0].session[15] ^= 1;
    others[1].key[31] ^= 1;
    others[2].uuid[15] ^= 1;
    others[3].lineage[15] ^= 1;
    for (size_t i = 0; i < sizeof(others) / sizeof(*others); i++) {
        cleanup(free_ends) struct ends ends = make_ends();
        struct lane *other = make(&others[i], true);
        struct frame_bytes sealed = seal(other, &hello), right = seal(ends.source, &hello);
        lane_free(other);
        assert_ends(ends.destination, &sealed, &right, LANE_FORGED);
    }
}

static void a_greeted_lane_goes_on_behind_hello(void **state)
{
    struct lane_keying keying = a_keying;
    uint8_t bytes[LANE_FRAME_BYTES];

    (void)state;
    keying.is_greeted = true;
    cleanup(free_ends) struct ends before = make_ends(),
                                   after = {make(&keying, true), make(&keying, false)};
    struct frame_bytes sealed = seal(before.source, &hello);
    assert_int_equal(lane_seal(after.source, &hello, bytes), LANE_IMPOSSIBLE);
    assert_opens(before.destination, &sealed, &hello);
    sealed = seal(before.source, &grant);
    assert_opens(after.destination, &sealed, &grant);
    sealed = seal(after.destination, &take);
    struct frame_bytes greeting = seal(before.destination, &hello);
    assert_opens(before.source, &greeting, &hello);
    assert_opens(before.source, &sealed, &take);
}

static void numbers_end(void **state)
{
    cleanup(free_ends) struct ends ends = make_ends();
    struct frame_bytes sealed;
    struct lane_frame frame;

    (void)state;
    for (int i = 0; i < LANE_FRAMES_MAX; i++) {
        sealed = seal(ends.source, i == 0 ? &hello : &grant);
        assert_opens(ends.destination, &sealed, i == 0 ? &hello : &grant);
    }
    assert_int_equal(lane_seal(ends.source, &grant, sealed.bytes), LANE_ENDED);
    assert_int_equal(open_into(ends.destination, &sealed, &frame), LANE_ENDED);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_kind_passes_both_ways),
        cmocka_unit_test(what_cannot_be_the_next_frame_is_not_sealed),
        cmocka_unit_test(no_altered_bit_opens),
        cmocka_unit_test(what_came_before_or_comes_later_does_not_open),
        cmocka_unit_test(what_is_sent_back_does_not_open),
        cmocka_unit_test(another_lanes_frame_does_not_open),
        cmocka_unit_test(a_greeted_lane_goes_on_behind_hello),
        cmocka_unit_test(numbers_end),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
