/* What a destination makes of a tail: it is what the tail ends at, or what it was.
 *
 * Invariants 5 and 13.
 */
#include <dlfcn.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <libtpms/tpm_error.h>
#include <libtpms/tpm_library.h>

#include "bytes.h"
#include "checkpoint.h"
#include "guest.h"
#include "message.h"
#include "other_engine.h"
#include "saved.h"
#include "staged.h"
#include "tpm.h"
#include "tpm_in_memory.h"
#include "version.h"

enum {
    ROUNDS = 4,
    NOISE = 3, /* and not the bytes of anything */
};

static struct guest_states rounds[ROUNDS]; /* what the guest had at the source, one after another */
static int n_starts;

/* Takes libtpms' place. */
TPM_RESULT TPMLIB_MainInit(void)
{
    TPM_RESULT (*real)(void);

    *(void **)&real = dlsym(RTLD_NEXT, "TPMLIB_MainInit");
    n_starts++;
    return real();
}

static enum version_number version = VERSION_2_0;

/* Both states change from each round to the next. */
static int begin(void **state)
{
    (void)state;
    other_engine_begin_with(version);
    for (int i = 0; i < ROUNDS; i++) {
        guest_writes_nv();
        guest_extends_pcr();
        rounds[i] = guest_states_capture();
    }
    power_off();
    other_engine_connect(&a_session, false);
    n_starts = 0;
    return 0;
}

static int end(void **state)
{
    (void)state;
    for (int i = 0; i < ROUNDS; i++)
        guest_states_deinit(&rounds[i]);
    other_engine_end();
    return 0;
}

static void bring(int from, int to, bool is_last)
{
    const struct guest_states *before = from < 0 ? NULL : &rounds[from];

    assert_int_equal(other_engine_brings(before, &rounds[to], is_last), TPM_SUCCESS);
}

/* Have QEMU bring a tail. Returns true if it is taken. */
static bool take_tail(const struct guest_states *from, const struct guest_states *to)
{
    enum handover_state before = blackout_state(blackout);
    struct sealed_tail tail = other_engine_seals(from, to);

    bool is_taken = blackout_take_tail(blackout, tail.bytes, tail.n_bytes) == 0;
    assert_int_equal(blackout_state(blackout), is_taken ? HANDOVER_STARTING : before);
    free(tail.bytes);
    blackout_start_tail(blackout);
    assert_int_equal(blackout_state(blackout), is_taken ? HANDOVER_TAKING : before);
    return is_taken;
}

static bool take_tail_of(int from, int to)
{
    return take_tail(&rounds[from], &rounds[to]);
}

/* It asks the source for just that. */
static void asks_for(int round)
{
    struct link_digests wanted;
    struct lane_frame take;
    enum lane_kind kinds[4];

    guest_states_digests(&rounds[round], &wanted);
    assert_int_equal(other_engine_hears(kinds, &take), 1);
    assert_int_equal(kinds[0], LANE_TAKE);
    assert_memory_equal(take.permanent_digest, wanted.permanent_digest, LANE_DIGEST_BYTES);
    assert_memory_equal(take.volatile_digest, wanted.volatile_digest, LANE_DIGEST_BYTES);
}

static void asks_for_nothing(void)
{
    enum lane_kind kinds[4];

    assert_int_equal(other_engine_hears(kinds, NULL), 0);
    assert_int_equal(kinds[0], LANE_HELLO);
}

/* The permanent state that has come is that of a round. */
static void has_staged(int round)
{
    cleanup(message_deinit) struct message answer = MESSAGE_NONE;
    const struct image *image = &rounds[round].of[0];
    uint64_t generation;

    assert_int_equal(blackout_get_staged(blackout, &answer), TPM_SUCCESS);
    assert_int_equal(answer.header.payload_bytes, sizeof(generation) + image->n_bytes);
    memcpy(&generation, answer.payload, sizeof(generation));
    assert_int_equal(generation, image->generation);
    assert_memory_equal(answer.payload + sizeof(generation), image->bytes, image->n_bytes);
}

static void has_staged_nothing(void)
{
    cleanup(message_deinit) struct message answer = MESSAGE_NONE;

    assert_int_equal(blackout_get_staged(blackout, &answer), TPM_BAD_ORDINAL);
}

/* The source grants the vTPM, and the guest goes on with the state of a round. */
static void goes_on_with(int round)
{
    const struct checkpoint_lineage lineage = {.identity = "this vTPM's own.", .generation = 1000};
    const struct image *image = &rounds[round].of[0];
    TPM_RESULT result;
    uint8_t *bytes;
    size_t n_bytes;

    asks_for(round);
    has_staged(round);
    assert_false(guest_is_served());
    other_engine_says(&(struct lane_frame){.kind = LANE_GRANT});
    assert_true(blackout_init(blackout, &result));
    assert_int_equal(result, TPM_SUCCESS);
    assert_int_equal(tpm_admit(tpm, &lineage, false), TPM_SUCCESS);
    assert_int_equal(tpm_get_state(tpm, LINK_STATE_PERMANENT, &bytes, &n_bytes), TPM_SUCCESS);
    assert_int_equal(n_bytes, image->n_bytes);
    assert_memory_equal(bytes, image->bytes, n_bytes);
    free(bytes);
    assert_true(guest_is_served());
}

static void a_tail_continues_what_has_come(void **state)
{
    (void)state;
    bring(-1, 0, false);
    assert_true(take_tail_of(0, 1));
    assert_int_equal(n_starts, 1);
    goes_on_with(1);
}

static void a_tail_continues_what_the_tpm_was_started_from_ahead(void **state)
{
    (void)state;
    bring(-1, 0, true);
    assert_true(take_tail_of(0, 1));
    assert_int_equal(n_starts, 2);
    goes_on_with(1);
}

/* The source has not heard of the last round's Ack. */
static void a_tail_continues_what_was_there_before_the_last_round(void **state)
{
    (void)state;
    for (int is_last = 0; is_last <= 1; is_last++) {
        bring(-1, 0, false);
        bring(0, 1, is_last);
        assert_true(take_tail_of(0, 2));
        goes_on_with(2);
        if (!is_last) {
            end(NULL);
            begin(NULL);
        }
    }
}

static void what_a_tail_ends_at_is_not_started_again(void **state)
{
    (void)state;
    bring(-1, 0, false);
    bring(0, 1, true);
    assert_int_equal(n_starts, 1);
    assert_true(take_tail_of(0, 1));
    assert_int_equal(n_starts, 1);
    goes_on_with(1);
}

static void a_tail_that_says_that_nothing_was_done_is_taken(void **state)
{
    (void)state;
    for (int is_last = 0; is_last <= 1; is_last++) {
        bring(-1, 0, is_last);
        assert_true(take_tail_of(0, 0));
        assert_int_equal(n_starts, 1);
        goes_on_with(0);
        if (!is_last) {
            end(NULL);
            begin(NULL);
        }
    }
}

/* What the guest's last TPM2_Shutdown said decides what its next TPM2_Startup needs. */
static void what_a_tail_ends_at_is_started_again_for_a_guest_that_sleeps(void **state)
{
    (void)state;
    bring(-1, 0, true);
    struct guest_states asleep = rounds[0];
    asleep.said = LINK_SHUTDOWN_STATE;
    assert_true(take_tail(&rounds[0], &asleep));
    assert_int_equal(n_starts, 2);
    asks_for(0);
}

static void what_was_let_go_since_is_started_again(void **state)
{
    (void)state;
    bring(-1, 0, true);
    tpm_let_go(tpm);
    assert_true(take_tail_of(0, 0));
    assert_int_equal(n_starts, 2);
    goes_on_with(0);
}

static void invariant_13_a_tail_that_continues_nothing_is_refused(void **state)
{
    (void)state;
    assert_false(take_tail_of(0, 1)); /* of a session that has brought nothing */
    assert_false(take_tail_of(0, 0));
    has_staged_nothing();
    bring(-1, 0, false);
    bring(0, 1, false);
    bring(1, 2, true);
    int n_before = n_starts;
    assert_false(take_tail_of(3, 3));
    assert_false(take_tail_of(0, 3)); /* it was there two rounds ago */
    struct guest_states halves = rounds[1];
    halves.of[1] = rounds[2].of[1]; /* never there at once */
    assert_false(take_tail(&halves, &rounds[3]));
    halves = rounds[2];
    halves.of[1] = rounds[1].of[1];
    assert_false(take_tail(&halves, &rounds[3]));
    assert_int_equal(n_starts, n_before);
    asks_for_nothing();
    has_staged(2);
    assert_true(take_tail_of(2, 3));
    goes_on_with(3);
}

/* It has the right generations, and is of other states. */
static struct guest_states in_the_name_of(int bytes, int name)
{
    struct guest_states states = rounds[bytes];

    states.of[0].generation = rounds[name].of[0].generation;
    states.of[1].generation = rounds[name].of[1].generation;
    return states;
}

static void invariant_5_of_a_tail_that_does_not_apply_nothing_is_used(void **state)
{
    const struct guest_states other_base = in_the_name_of(2, 0), other_last = in_the_name_of(2, 1);

    (void)state;
    bring(-1, 0, false);
    bring(0, 1, true);
    assert_int_equal(n_starts, 1);
    assert_false(take_tail(&other_last, &rounds[3])); /* continues what is there */
    has_staged(1);
    assert_false(take_tail(&other_base, &rounds[3])); /* or what was there before */
    has_staged(1);
    struct guest_states halves = rounds[0];
    halves.of[1] = other_base.of[1];
    assert_false(take_tail(&halves, &rounds[3])); /* the first record applies */
    has_staged(1);
    asks_for_nothing();
    assert_int_equal(n_starts, 1);
    assert_true(take_tail_of(1, 1)); /* what is there is there, */
    asks_for(1);
}

static void invariant_5_what_was_there_before_is_so_after_a_tail_that_does_not_apply(void **state)
{
    const struct guest_states other_base = in_the_name_of(2, 0);

    (void)state;
    bring(-1, 0, false);
    bring(0, 1, true);
    assert_false(take_tail(&other_base, &rounds[3]));
    assert_true(take_tail_of(0, 2)); /* and what was there before, too */
    goes_on_with(2);
}

/* What the destination has acknowledged, it does not go back behind. */
static void invariant_10_a_tail_ends_at_no_earlier_generation_than_has_come(void **state)
{
    (void)state;
    for (int which = 0; which < 2; which++) {
        bring(-1, 0, false);
        struct guest_states last = rounds[3], earlier = rounds[3];
        assert_int_equal(other_engine_brings(&rounds[0], &last, true), TPM_SUCCESS);
        earlier.of[which] = rounds[2].of[which];
        assert_false(take_tail(&rounds[0], &earlier));
        has_staged(3);
        assert_true(take_tail_of(0, 3));
        asks_for(3);
        end(NULL);
        begin(NULL);
    }
}

static void records_that_lead_elsewhere_are_refused(void **state)
{
    struct guest_states says = rounds[1];
    struct sealed_tail tail;

    (void)state;
    bring(-1, 0, false);
    struct staged_records records = guest_states_encode(&rounds[0], &rounds[2]);
    tail = other_engine_seals_records(&rounds[0], &says, &records);
    assert_int_not_equal(blackout_take_tail(blackout, tail.bytes, tail.n_bytes), 0);
    free(tail.bytes);
    records.permanent_bytes = 0; /* one has gone missing */
    tail = other_engine_seals_records(&rounds[0], &rounds[2], &records);
    assert_int_not_equal(blackout_take_tail(blackout, tail.bytes, tail.n_bytes), 0);
    free(tail.bytes);
    guest_records_free(&records);
    has_staged(0);
    assert_int_equal(n_starts, 0);
    assert_true(take_tail_of(0, 1));
}

/* A source that lies: what it seals applies, and is no state. It is asked for the vTPM by then, and
 * told at once that it is not taken. */
static void a_state_that_libtpms_refuses_ends_the_session(void **state)
{
    static uint8_t noise[2][IMAGE_BYTES_MAX];
    enum lane_kind kinds[4];

    (void)state;
    for (int which = 0; which < 2; which++) {
        bring(-1, 0, true);
        struct guest_states lie = rounds[1 + which];
        memset(noise[which], NOISE, sizeof(noise[which]));
        lie.of[which].bytes = noise[which];
        lie.of[which].n_bytes = sizeof(noise[which]) - (size_t)(1024 * which);
        lie.of[which].is_digested = false;
        assert_int_equal(image_compute_digest(&lie.of[which], NULL, NULL), 0);
        struct sealed_tail tail = other_engine_seals(&rounds[0], &lie);
        int r = blackout_take_tail(blackout, tail.bytes, tail.n_bytes);
        free(tail.bytes);
        if (version == VERSION_1_2 && which == 1) { /* it is seen before that */
            assert_int_equal(r, LINK_TAIL_NOT_NEXT);
            break;
        }
        assert_int_equal(r, 0);
        blackout_start_tail(blackout);
        assert_int_equal(blackout_state(blackout), HANDOVER_NONE);
        assert_int_equal(other_engine_hears(kinds, NULL), 2);
        assert_int_equal(kinds[0], LANE_TAKE);
        assert_int_equal(kinds[1], LANE_REFUSE);
        assert_int_equal(kinds[2], 0); /* the lane is closed */
        assert_false(guest_is_served());
        end(NULL);
        begin(NULL);
    }
}

static void invariant_3_a_tpm_that_is_in_use_is_not_replaced(void **state)
{
    (void)state;
    bring(-1, 0, false);
    assert_int_equal(tpm_init(tpm, false), TPM_SUCCESS);
    int n_before = n_starts;
    assert_false(take_tail_of(0, 0));
    assert_false(take_tail_of(0, 1));
    assert_true(guest_is_served());
    assert_int_equal(n_starts, n_before);
    has_staged(0);
}

static void what_is_forgotten_is_not_continued(void **state)
{
    enum lane_kind kinds[4];

    (void)state;
    bring(-1, 0, true);
    assert_int_equal(blackout_forget(blackout, true, false), TPM_SUCCESS);
    has_staged(0); /* the session goes on */
    assert_int_equal(blackout_forget(blackout, false, false), TPM_SUCCESS);
    has_staged_nothing();
    assert_false(take_tail_of(0, 0));
    assert_false(take_tail_of(0, 1));
    assert_int_equal(other_engine_hears(kinds, NULL), 0);
    assert_int_equal(kinds[0], 0);
    assert_int_equal(n_starts, 1);
}

static void a_session_that_goes_on_after_it_was_let_go_is_continued(void **state)
{
    (void)state;
    bring(-1, 0, true);
    assert_int_equal(blackout_forget(blackout, true, false), TPM_SUCCESS);
    assert_true(take_tail_of(0, 1));
    goes_on_with(1);
}

static void what_is_not_staged_any_more_is_not_continued(void **state)
{
    (void)state;
    bring(-1, 0, true);
    blackout_unstage(blackout);
    has_staged_nothing();
    assert_false(take_tail_of(0, 0));
    assert_false(take_tail_of(0, 1));
    asks_for_nothing();
}

static void another_session_s_tail_is_refused(void **state)
{
    (void)state;
    bring(-1, 0, true);
    struct sealed_tail tail = other_engine_seals(&rounds[0], &rounds[1]);
    other_engine_connect(&another_session, false);
    assert_int_not_equal(blackout_take_tail(blackout, tail.bytes, tail.n_bytes), 0);
    assert_int_equal(blackout_state(blackout), HANDOVER_NONE);
    free(tail.bytes);
}

static void a_source_takes_no_tail(void **state)
{
    (void)state;
    other_engine_connect(&another_session, true);
    bring(-1, 0, true);
    assert_false(take_tail_of(0, 0));
    assert_false(take_tail_of(0, 1));
    asks_for_nothing();
}

static void invariant_13_a_session_does_not_continue_what_another_has_brought(void **state)
{
    (void)state;
    bring(-1, 0, true);
    other_engine_connect(&another_session, false); /* and its peer knows what there is */
    assert_false(take_tail_of(0, 0));
    assert_false(take_tail_of(0, 1));
    has_staged_nothing();
    bring(-1, 2, true);
    assert_true(take_tail_of(2, 3));
    goes_on_with(3);
}

/* What it is asked for is what it is, until that is settled. */
static void nothing_more_is_staged_or_forgotten_once_the_tail_is_taken(void **state)
{
    TPM_RESULT result;

    (void)state;
    bring(-1, 0, true);
    assert_true(take_tail_of(0, 1));
    asks_for(1);
    for (int step = 0; step < 3; step++) {
        for (int is_last = 0; is_last <= 1; is_last++) {
            assert_int_equal(other_engine_brings(&rounds[1], &rounds[2], is_last), TPM_BAD_ORDINAL);
            assert_int_equal(blackout_forget(blackout, is_last, false), TPM_BAD_ORDINAL);
            assert_int_equal(blackout_forget(blackout, is_last, true), TPM_BAD_ORDINAL);
        }
        assert_false(take_tail_of(1, 2));
        assert_false(take_tail_of(1, 1));
        has_staged(1);
        if (step == 0)
            other_engine_says(&(struct lane_frame){.kind = LANE_GRANT});
        if (step == 1)
            assert_true(blackout_init(blackout, &result));
    }
    assert_int_equal(blackout_state(blackout), HANDOVER_STARTED);
    assert_int_equal(n_starts, 2);
}

/* What TPM_SaveState has saved is behind the volatile state, in one image. */
static void a_tail_of_a_tpm_12_brings_what_is_saved(void **state)
{
    const struct checkpoint_lineage lineage = {.identity = "this vTPM's own.", .generation = 1000};
    TPM_RESULT result;
    uint8_t *bytes;
    size_t n_bytes, volatile_bytes, saved_bytes;

    (void)state;
    end(NULL);
    other_engine_begin_with(version);
    rounds[0] = guest_states_capture();
    guest_writes_nv();
    guest_goes_to_sleep();
    rounds[1] = guest_states_capture();
    power_off();
    other_engine_connect(&a_session, false);
    bring(-1, 0, true);
    assert_true(take_tail_of(0, 1));
    asks_for(1);
    const struct image *image = &rounds[1].of[1];
    assert_true(saved_measure(image->bytes, image->n_bytes, &volatile_bytes, &saved_bytes));
    assert_true(saved_bytes > 0);
    other_engine_says(&(struct lane_frame){.kind = LANE_GRANT});
    assert_true(blackout_init(blackout, &result));
    assert_int_equal(tpm_admit(tpm, &lineage, false), TPM_SUCCESS);
    assert_int_equal(tpm_get_state(tpm, LINK_STATE_SAVESTATE, &bytes, &n_bytes), TPM_SUCCESS);
    assert_int_equal(n_bytes, saved_bytes);
    assert_memory_equal(bytes, image->bytes + volatile_bytes, n_bytes);
    free(bytes);
}

/* Invariant 8: how long that is, the image says, of a source that lies. */
static void invariant_8_a_tpm_12_s_image_that_is_not_of_two_states_is_refused(void **state)
{
    const uint32_t room = (uint32_t)(rounds[1].of[1].n_bytes - sizeof(room));
    const uint32_t lies[] = {room + 1, INT32_MAX, UINT32_MAX};

    (void)state;
    for (size_t i = 0; i < sizeof(lies) / sizeof(*lies); i++) {
        struct guest_states lie = rounds[1];
        uint8_t *bytes = malloc(lie.of[1].n_bytes);
        assert_non_null(bytes);
        memcpy(bytes, lie.of[1].bytes, lie.of[1].n_bytes);
        put_be32(bytes + room, lies[i]);
        lie.of[1].bytes = bytes;
        lie.of[1].is_digested = false;
        assert_int_equal(image_compute_digest(&lie.of[1], NULL, NULL), 0);
        bring(-1, 0, false);
        assert_false(take_tail(&rounds[0], &lie));
        asks_for_nothing();
        assert_int_equal(n_starts, 0);
        assert_true(take_tail_of(0, 2));
        asks_for(2);
        free(bytes);
        end(NULL);
        begin(NULL);
    }
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, begin, end)

/* What differs with a TPM 1.2, which takes a key's making to start. */
static int run_tpm_12(void)
{
    const struct CMUnitTest tests[] = {
        TEST(a_tail_continues_what_has_come),
        TEST(a_tail_continues_what_was_there_before_the_last_round),
        TEST(what_a_tail_ends_at_is_not_started_again),
        TEST(a_tail_of_a_tpm_12_brings_what_is_saved),
        TEST(invariant_5_of_a_tail_that_does_not_apply_nothing_is_used),
        TEST(invariant_8_a_tpm_12_s_image_that_is_not_of_two_states_is_refused),
        TEST(a_state_that_libtpms_refuses_ends_the_session),
    };

    version = VERSION_1_2;
    return cmocka_run_group_tests(tests, NULL, NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(a_tail_continues_what_has_come),
        TEST(a_tail_continues_what_the_tpm_was_started_from_ahead),
        TEST(a_tail_continues_what_was_there_before_the_last_round),
        TEST(what_a_tail_ends_at_is_not_started_again),
        TEST(a_tail_that_says_that_nothing_was_done_is_taken),
        TEST(what_a_tail_ends_at_is_started_again_for_a_guest_that_sleeps),
        TEST(what_was_let_go_since_is_started_again),
        TEST(invariant_13_a_tail_that_continues_nothing_is_refused),
        TEST(invariant_5_of_a_tail_that_does_not_apply_nothing_is_used),
        TEST(invariant_5_what_was_there_before_is_so_after_a_tail_that_does_not_apply),
        TEST(invariant_10_a_tail_ends_at_no_earlier_generation_than_has_come),
        TEST(records_that_lead_elsewhere_are_refused),
        TEST(a_state_that_libtpms_refuses_ends_the_session),
        TEST(invariant_3_a_tpm_that_is_in_use_is_not_replaced),
        TEST(what_is_forgotten_is_not_continued),
        TEST(a_session_that_goes_on_after_it_was_let_go_is_continued),
        TEST(what_is_not_staged_any_more_is_not_continued),
        TEST(another_session_s_tail_is_refused),
        TEST(a_source_takes_no_tail),
        TEST(invariant_13_a_session_does_not_continue_what_another_has_brought),
        TEST(nothing_more_is_staged_or_forgotten_once_the_tail_is_taken),
    };

    int r = cmocka_run_group_tests(tests, NULL, NULL);
    return r ? r : run_tpm_12();
}
