/* What a source offers: a tail that makes of what the destination has acknowledged what the guest
 * has left, or nothing.
 *
 * Invariants 5 and 6.
 */
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <libtpms/tpm_error.h>

#include "bytes.h"
#include "guest.h"
#include "message.h"
#include "other_engine.h"
#include "outgoing.h"
#include "pages.h"
#include "saved.h"
#include "staged.h"
#include "tail.h"
#include "tpm.h"
#include "tpm_in_memory.h"
#include "version.h"

static struct guest_states base; /* what the destination has acknowledged */

static pthread_mutex_t *the_tpms_lock;
static bool looks_for_lock;
static void (*once_let_go)(void);

int __real_pthread_mutex_unlock(pthread_mutex_t *mutex);

/* Takes the C library's place, by the linker (meson.build): what waits for the TPM happens as soon
 * as it is let go of. */
int __wrap_pthread_mutex_unlock(pthread_mutex_t *mutex)
{
    void (*happens)(void) = once_let_go;
    int r = __real_pthread_mutex_unlock(mutex);

    if (looks_for_lock)
        the_tpms_lock = mutex;
    if (happens && mutex == the_tpms_lock) {
        once_let_go = NULL;
        happens();
    }
    return r;
}

static TPM_RESULT keep(const struct guest_states *states)
{
    return blackout_keep_base(blackout, store, states->of[0].generation, states->of[1].generation);
}

static enum version_number version = VERSION_2_0;

static int begin(void **state)
{
    (void)state;
    other_engine_begin_with(version);
    guest_writes_nv();
    guest_extends_pcr();
    base = guest_states_capture();
    other_engine_connect(&a_session, true);
    assert_int_equal(keep(&base), TPM_SUCCESS);
    return 0;
}

static int end(void **state)
{
    (void)state;
    guest_states_deinit(&base);
    other_engine_end();
    return 0;
}

static struct blackout_captured offer(void)
{
    struct blackout_captured captured;

    assert_int_equal(blackout_capture(blackout, store, true, &captured), TPM_SUCCESS);
    assert_int_equal(blackout_state(blackout),
                     captured.is_offered ? HANDOVER_PREPARED : HANDOVER_NONE);
    return captured;
}

/* What QEMU gets. */
static struct message ask(void)
{
    struct message answer = MESSAGE_NONE;

    assert_true(blackout_give_tail(blackout, &answer));
    return answer;
}

/* An image of a tail is what it was captured as. */
static void makes(int which, const uint8_t *record, size_t record_bytes,
                  const struct guest_states *now)
{
    const struct image *image = &now->of[which];
    struct delta_image from = image_as_delta(&base.of[which]);
    uint8_t *made = malloc(IMAGE_BYTES_MAX);
    struct delta_header header;
    struct image_digest digest;

    assert_non_null(made);
    assert_int_equal(delta_apply(which ? LINK_STATE_VOLATILE : LINK_STATE_PERMANENT, &from, record,
                                 record_bytes, made, &header, &digest),
                     0);
    assert_int_equal(header.to_generation, image->generation);
    assert_int_equal(header.result_bytes, image->n_bytes);
    assert_memory_equal(made, image->bytes, image->n_bytes);
    free(made);
}

/* The tail makes of the base what is captured now. */
static void is_tail_of(const struct message *answer, const struct blackout_captured *captured)
{
    cleanup(guest_states_deinit) struct guest_states now = guest_states_capture();
    cleanup(tail_deinit) struct tail tail =
        other_engine_opens(answer->payload, answer->header.payload_bytes);
    const struct staged_records *records = &tail.records;
    struct link_digests digests;

    assert_true(tail_is_consistent(&tail));
    assert_int_equal(tail.permanent_from, base.of[0].generation);
    assert_int_equal(tail.volatile_from, base.of[1].generation);
    assert_int_equal(tail.permanent_to, now.of[0].generation);
    assert_int_equal(tail.volatile_to, now.of[1].generation);
    assert_int_equal(tail.power, now.said);
    assert_int_equal(captured->said, now.said);
    assert_int_equal(records->permanent_bytes == 0, tail.permanent_from == tail.permanent_to);
    assert_int_equal(records->following_bytes == 0, tail.volatile_from == tail.volatile_to);
    if (records->permanent_bytes > 0)
        makes(0, records->permanent, records->permanent_bytes, &now);
    if (records->following_bytes > 0)
        makes(1, records->following, records->following_bytes, &now);
    guest_states_digests(&now, &digests);
    assert_memory_equal(&captured->digests, &digests, sizeof(digests));
}

static void do_nothing(void)
{
}

static void do_both(void)
{
    guest_writes_nv();
    guest_extends_pcr();
}

static void do_sleep(void)
{
    guest_extends_pcr();
    guest_goes_to_sleep();
}

static void a_tail_has_what_the_guest_has_done(void **state)
{
    static const struct {
        void (*happens)(void);
        bool worked, is_permanent;
        enum link_shutdown said;
    } cases[] = {
        {do_nothing, false, false, LINK_SHUTDOWN_NONE},
        {guest_extends_pcr, true, false, LINK_SHUTDOWN_NONE},
        {guest_writes_nv, true, true, LINK_SHUTDOWN_NONE},
        {do_both, true, true, LINK_SHUTDOWN_NONE},
        {do_sleep, true, true, LINK_SHUTDOWN_STATE},
    };

    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        begin(state);
        cases[i].happens();
        struct blackout_captured captured = offer();
        assert_true(captured.is_offered);
        assert_int_equal(captured.worked, cases[i].worked);
        assert_int_equal(captured.said, cases[i].said);
        cleanup(message_deinit) struct message answer = ask();
        is_tail_of(&answer, &captured);
        cleanup(tail_deinit) struct tail tail =
            other_engine_opens(answer.payload, answer.header.payload_bytes);
        assert_int_equal(tail.records.permanent_bytes > 0, cases[i].is_permanent);
        end(state);
    }
}

static void a_tail_goes_on_from_the_base_whatever_was_captured_since(void **state)
{
    struct blackout_captured captured;

    (void)state;
    for (int i = 0; i < 3; i++) {
        do_both();
        assert_int_equal(blackout_capture(blackout, store, false, &captured), TPM_SUCCESS);
        assert_false(captured.is_offered);
    }
    captured = offer();
    assert_false(captured.worked);
    assert_true(captured.is_offered);
    cleanup(message_deinit) struct message answer = ask();
    is_tail_of(&answer, &captured);
}

static void a_round_that_is_acknowledged_is_the_next_base(void **state)
{
    (void)state;
    for (int i = 0; i < 3; i++) {
        i % 2 ? guest_extends_pcr() : do_both();
        guest_states_deinit(&base);
        base = guest_states_capture();
        assert_int_equal(keep(&base), TPM_SUCCESS);
    }
    guest_writes_nv();
    struct blackout_captured captured = offer();
    assert_true(captured.is_offered);
    cleanup(message_deinit) struct message answer = ask();
    is_tail_of(&answer, &captured);
}

/* vtpmd offers again what it has offered when an offer has gone stale: the nonce is used once more,
 * and must be with the same bytes. */
static void what_was_captured_is_offered_again_as_the_same_bytes(void **state)
{
    cleanup(message_deinit) struct message first = MESSAGE_NONE;

    (void)state;
    do_both();
    assert_true(offer().is_offered);
    assert_int_equal(blackout_say(blackout, HANDOVER_LET_GO), TPM_SUCCESS);
    assert_false(blackout_give_tail(blackout, &first));
    assert_true(offer().is_offered);
    assert_true(offer().is_offered);
    first = ask();
    struct guest_states now = guest_states_capture();
    struct sealed_tail there = other_engine_seals(&base, &now);
    assert_int_equal(there.n_bytes, first.header.payload_bytes);
    assert_memory_equal(there.bytes, first.payload, there.n_bytes);
    free(there.bytes);
    guest_states_deinit(&now);
}

static void invariant_4_only_what_was_captured_last_is_a_base(void **state)
{
    static const int offsets[][2] = {{1, 0}, {-1, 0}, {0, 1}, {0, -1}, {1, 1}};

    (void)state;
    for (size_t i = 0; i < sizeof(offsets) / sizeof(*offsets); i++) {
        struct guest_states other = base;
        other.of[0].generation += (uint64_t)offsets[i][0];
        other.of[1].generation += (uint64_t)offsets[i][1];
        assert_int_equal(keep(&other), TPM_BAD_ORDINAL);
    }
    do_both();
    struct guest_states now = guest_states_capture();
    assert_int_equal(keep(&base), TPM_BAD_ORDINAL); /* it is not what was captured last */
    struct guest_states halves = now;
    halves.of[1].generation = base.of[1].generation;
    assert_int_equal(keep(&halves), TPM_BAD_ORDINAL);
    guest_states_deinit(&now);
    /* The one that there was goes too far back, once the next is none. */
    assert_false(offer().is_offered);
}

static void what_a_journal_takes_is_no_base(void **state)
{
    uint64_t generation;

    (void)state;
    do_both(); /* that is durable, and was not captured */
    assert_int_equal(store_take_generation(store, LINK_STATE_PERMANENT, &generation), 0);
    struct guest_states other = base;
    other.of[0].generation = generation;
    assert_int_equal(keep(&other), TPM_BAD_ORDINAL);
    other.of[0].generation = generation - 1;
    assert_int_equal(keep(&other), TPM_BAD_ORDINAL);
    assert_int_equal(keep(&base), TPM_SUCCESS);
}

static void without_a_base_nothing_is_offered(void **state)
{
    (void)state;
    do_both();
    other_engine_connect(&another_session, true); /* the base was the other session's */
    assert_false(offer().is_offered);
    guest_states_deinit(&base);
    base = guest_states_capture();
    assert_int_equal(keep(&base), TPM_SUCCESS);
    assert_true(offer().is_offered);
}

static void invariant_6_what_has_run_since_it_was_captured_is_not_offered(void **state)
{
    (void)state;
    do_both();
    looks_for_lock = true;
    assert_true(tpm_has_worked(tpm));
    looks_for_lock = false;
    once_let_go = guest_extends_pcr;
    struct blackout_captured captured = offer();
    assert_null(once_let_go);
    assert_true(captured.worked);
    assert_false(captured.is_offered);
    captured = offer();
    assert_true(captured.worked);
    assert_true(captured.is_offered);
    struct message answer = ask();
    is_tail_of(&answer, &captured);
    message_deinit(&answer);
}

static void invariant_6_without_a_lane_nothing_is_offered(void **state)
{
    enum handover_state before;

    (void)state;
    assert_int_equal(blackout_withdraw(blackout, &before), TPM_SUCCESS);
    assert_false(offer().is_offered);
    assert_int_equal(keep(&base), TPM_BAD_ORDINAL);
    assert_false(offer().is_offered);
    assert_false(blackout_is_armed(blackout));
}

static void a_destination_offers_nothing(void **state)
{
    (void)state;
    other_engine_connect(&another_session, false);
    assert_int_equal(keep(&base), TPM_BAD_ORDINAL);
    assert_false(offer().is_offered);
}

static void what_is_granted_is_not_offered_again(void **state)
{
    struct blackout_captured captured = offer();
    struct message answer = ask();

    (void)state;
    message_deinit(&answer);
    assert_int_equal(blackout_say(blackout, HANDOVER_RECORDED), TPM_SUCCESS);
    other_engine_takes(&captured.digests);
    assert_int_equal(blackout_state(blackout), HANDOVER_GRANTED);
    other_engine_connect(&another_session, true);
    assert_int_equal(keep(&base), TPM_SUCCESS);
    blackout_capture(blackout, store, true, &captured);
    assert_false(captured.is_offered);
    assert_int_equal(blackout_state(blackout), HANDOVER_GRANTED);
}

/* Of states that no TPM has, and a session could have all the same. */
static void fill_store(size_t permanent_bytes, size_t following_bytes)
{
    static uint8_t bytes[IMAGE_BYTES_MAX];
    static uint64_t random = 88172645463325252; /* nothing can compress it */
    uint64_t generation;

    for (int which = 0; which < 2; which++) {
        for (size_t i = 0; i < sizeof(bytes); i++) {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            bytes[i] = (uint8_t)random;
        }
        assert_int_equal(store_capture(store, which ? LINK_STATE_VOLATILE : LINK_STATE_PERMANENT,
                                       bytes, which ? following_bytes : permanent_bytes,
                                       &generation),
                         0);
    }
}

static int make_tail_of(size_t permanent_bytes, size_t following_bytes, struct outgoing_tail *tail)
{
    cleanup(outgoing_deinit) struct outgoing outgoing = {0};
    struct tail_cipher *cipher;
    uint64_t generations[2];
    size_t n_bytes;

    fill_store(IMAGE_BYTES_MAX, IMAGE_BYTES_MAX);
    for (int which = 0; which < 2; which++)
        assert_int_equal(store_read(store, which ? LINK_STATE_VOLATILE : LINK_STATE_PERMANENT, NULL,
                                    &n_bytes, &generations[which]),
                         0);
    assert_int_equal(outgoing_keep_base(&outgoing, store, generations[0], generations[1]), 0);
    fill_store(permanent_bytes, following_bytes);
    assert_int_equal(tail_cipher_new(&cipher, &a_session), 0);
    *tail = (struct outgoing_tail){0};
    int r = outgoing_make_tail(&outgoing, store, cipher, LINK_SHUTDOWN_NONE, tail);
    tail_cipher_free(cipher);
    return r;
}

static void a_tail_is_no_larger_than_what_qemu_takes(void **state)
{
    struct outgoing_tail tail;

    (void)state;
    assert_int_equal(make_tail_of(IMAGE_BYTES_MAX, IMAGE_BYTES_MAX, &tail), -EMSGSIZE);
    assert_null(tail.bytes);
    assert_int_equal(make_tail_of(IMAGE_BYTES_MAX, IMAGE_BYTES_MAX - 512, &tail), 0);
    assert_true(tail.n_bytes > TAIL_BYTES_MAX - 512);
    assert_true(tail.n_bytes <= TAIL_BYTES_MAX);
    struct tail opened = other_engine_opens(tail.bytes, tail.n_bytes);
    assert_true(tail_is_consistent(&opened));
    tail_deinit(&opened);
    free(tail.bytes);
}

/* What TPM_SaveState saves is a state of its own, which goes behind the volatile one. */
static void a_tail_of_a_tpm_12_has_what_is_saved(void **state)
{
    (void)state;
    for (int sleeps = 0; sleeps <= 1; sleeps++) {
        size_t volatile_bytes, saved_bytes;
        guest_extends_pcr();
        if (sleeps)
            guest_goes_to_sleep();
        struct blackout_captured captured = offer();
        assert_true(captured.is_offered);
        assert_int_equal(captured.said, sleeps ? LINK_SHUTDOWN_STATE : LINK_SHUTDOWN_NONE);
        cleanup(message_deinit) struct message answer = ask();
        is_tail_of(&answer, &captured);
        cleanup(guest_states_deinit) struct guest_states now = guest_states_capture();
        assert_true(
            saved_measure(now.of[1].bytes, now.of[1].n_bytes, &volatile_bytes, &saved_bytes));
        assert_int_equal(saved_bytes > 0, sleeps);
        end(state);
        begin(state);
    }
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, begin, end)

/* What differs with a TPM 1.2. */
static int run_tpm_12(void)
{
    const struct CMUnitTest tests[] = {
        TEST(a_tail_of_a_tpm_12_has_what_is_saved),
        TEST(a_tail_goes_on_from_the_base_whatever_was_captured_since),
        TEST(what_was_captured_is_offered_again_as_the_same_bytes),
        TEST(invariant_6_what_has_run_since_it_was_captured_is_not_offered),
    };

    version = VERSION_1_2;
    return cmocka_run_group_tests(tests, NULL, NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_tail_has_what_the_guest_has_done),
        TEST(a_tail_goes_on_from_the_base_whatever_was_captured_since),
        TEST(a_round_that_is_acknowledged_is_the_next_base),
        TEST(what_was_captured_is_offered_again_as_the_same_bytes),
        TEST(invariant_4_only_what_was_captured_last_is_a_base),
        TEST(what_a_journal_takes_is_no_base),
        TEST(without_a_base_nothing_is_offered),
        TEST(invariant_6_what_has_run_since_it_was_captured_is_not_offered),
        TEST(invariant_6_without_a_lane_nothing_is_offered),
        TEST(a_destination_offers_nothing),
        TEST(what_is_granted_is_not_offered_again),
        TEST(a_tail_is_no_larger_than_what_qemu_takes),
    };

    int r = cmocka_run_group_tests(tests, NULL, NULL);
    return r ? r : run_tpm_12();
}
