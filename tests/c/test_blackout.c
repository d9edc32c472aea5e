/* The hand-over as an engine does it: every event in every state of handover.c's table, with a real
 * TPM, and the other engine's end of a real lane in the test's hands.
 *
 * Invariant 3: what was granted is fenced before the Grant is sent, and nothing ends it any more.
 */
#include <poll.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>
#include <libtpms/tpm_error.h>

#include "blackout.h"
#include "bytes.h"
#include "clock.h"
#include "digest.h"
#include "lane.h"
#include "message.h"
#include "standby.h"
#include "tpm.h"
#include "tpm_in_memory.h"

static const struct lane_keying keying = {
    .session = "a session of 16",
    .key = "a key of 32 bytes, which is sent",
    .is_greeted = true,
};
static const uint8_t tail[] = "VTPMTAIL and all", other_tail[] = "VTPMTAIL and ALL";
static const struct link_digests some_digests = {"of the permanent state", "of the volatile one"};

static struct blackout *blackout;
static struct link_digests digests; /* that the TPM has, or was started from */
static struct lane *peer;
static int peer_fd;
static void (*while_waiting)(void);
static enum handover_state seen_waiting;
static time_t clock_is_ahead_s;

/* Takes the C library's place: what happens while INIT waits happens now, or the time is over. */
int poll(struct pollfd *entries, nfds_t n_entries, int timeout_ms)
{
    void (*happens)(void) = while_waiting;

    (void)entries, (void)n_entries, (void)timeout_ms;
    while_waiting = NULL;
    if (happens) {
        happens();
        seen_waiting = blackout_state(blackout);
        if (seen_waiting == HANDOVER_WAITING)
            assert_int_equal(blackout_lane_fd(blackout), BLACKOUT_NO_LANE);
    } else {
        clock_is_ahead_s += BLACKOUT_GRANT_TIMEOUT_MS / MS_PER_S;
    }
    return 0;
}

/* And so does time. */
int clock_gettime(clockid_t clock, struct timespec *now)
{
    long r = syscall(SYS_clock_gettime, clock, now);

    now->tv_sec += clock_is_ahead_s;
    return (int)r;
}

static void capture(void)
{
    enum link_shutdown said;
    bool worked;

    assert_int_equal(tpm_capture(tpm, store, &worked, &said), TPM_SUCCESS);
}

static void begin(bool is_source)
{
    int ends[2];

    tpm_in_memory_begin();
    assert_int_equal(tpm_init(tpm, false), TPM_SUCCESS);
    capture();
    assert_int_equal(blackout_new(&blackout, tpm, NULL), 0);
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, ends), 0);
    assert_int_equal(blackout_set_lane(blackout, ends[0], &keying, is_source), TPM_SUCCESS);
    peer_fd = ends[1];
    assert_int_equal(lane_new(&peer, &keying, !is_source), 0);
    digests = some_digests;
}

static void end(void)
{
    lane_free(peer);
    close_descriptor(&peer_fd);
    blackout_free(blackout);
    tpm_in_memory_end();
}

static void say(const struct lane_frame *frame)
{
    uint8_t bytes[LANE_FRAME_BYTES];

    assert_int_equal(lane_seal(peer, frame, bytes), 0);
    /* In two pieces, as a network may bring it. */
    assert_int_equal(write(peer_fd, bytes, 10), 10);
    blackout_receive(blackout);
    assert_int_equal(write(peer_fd, bytes + 10, sizeof(bytes) - 10), sizeof(bytes) - 10);
    blackout_receive(blackout);
}

/* What the other engine hears: the kinds of frames, and 0 at the end. Returns their number. */
static int hear(enum lane_kind kinds[4])
{
    uint8_t bytes[LANE_FRAME_BYTES];
    struct lane_frame frame;

    for (int n = 0; n < 4; n++) {
        ssize_t got = recv(peer_fd, bytes, sizeof(bytes), MSG_DONTWAIT | MSG_WAITALL);
        if (got <= 0) {
            kinds[n] = got == 0 ? 0 : LANE_HELLO; /* HELLO: nothing yet */
            return n;
        }
        assert_int_equal(lane_open(peer, bytes, &frame), 0);
        kinds[n] = frame.kind;
    }
    fail();
    return 0;
}

static void do_work(void)
{
    uint8_t get_random[] = {0x80, 1, 0, 0, 0, 12, 0, 0, 1, 0x7b, 0, 8};
    struct tpm_response response;

    tpm_response_init(&response);
    tpm_execute(tpm, get_random, sizeof(get_random), &response);
    tpm_response_deinit(&response);
}

static void start_standby(void)
{
    uint8_t *states[2];
    size_t sizes[2];

    for (int i = 0; i < 2; i++)
        assert_int_equal(tpm_get_state(tpm, i ? LINK_STATE_VOLATILE : LINK_STATE_PERMANENT,
                                       &states[i], &sizes[i]),
                         TPM_SUCCESS);
    tpm_run_on(tpm);
    assert_int_equal(tpm_stop(tpm), TPM_SUCCESS);
    assert_int_equal(
        tpm_stand_by(tpm, LINK_SHUTDOWN_NONE, states[0], sizes[0], states[1], sizes[1]),
        TPM_SUCCESS);
    for (int i = 0; i < 2; i++) {
        assert_int_equal(digest_compute(states[i], sizes[i],
                                        i ? digests.volatile_digest : digests.permanent_digest),
                         0);
        free(states[i]);
    }
}

/* The events, each as whoever it is of has it happen. Returns false where it was refused. */

static bool do_offer(void)
{
    return blackout_offer(blackout, &digests, tail, sizeof(tail)) == TPM_SUCCESS;
}

static bool do_hold(void)
{
    static const struct blackout_times times = {11, 22};

    return blackout_hold(blackout, &digests, &times, tail, sizeof(tail)) == TPM_SUCCESS;
}

static bool do_let_go(void)
{
    return blackout_say(blackout, HANDOVER_LET_GO) == TPM_SUCCESS;
}

static bool do_record(void)
{
    return blackout_say(blackout, HANDOVER_RECORDED) == TPM_SUCCESS;
}

static bool do_detach(void)
{
    return blackout_say(blackout, HANDOVER_DETACHED) == TPM_SUCCESS;
}

static bool do_withdraw(void)
{
    enum handover_state was = blackout_state(blackout), before;
    bool is_withdrawn = blackout_withdraw(blackout, &before) == TPM_SUCCESS;

    assert_int_equal(before, was);
    return is_withdrawn;
}

static bool do_owned(void)
{
    return blackout_say(blackout, HANDOVER_OWNED) == TPM_SUCCESS;
}

static bool do_ask(void)
{
    cleanup(message_deinit) struct message answer = MESSAGE_NONE;
    bool is_given = blackout_give_tail(blackout, &answer);

    if (is_given) {
        assert_int_equal(answer.header.payload_bytes, sizeof(tail));
        assert_memory_equal(answer.payload, tail, sizeof(tail));
    } else {
        assert_null(answer.payload);
    }
    return true; /* the table says what becomes of it */
}

static bool do_run(void)
{
    blackout_runs(blackout);
    return true;
}

static bool do_tail(void)
{
    assert_false(blackout_take_tail(blackout, other_tail, sizeof(other_tail)));
    assert_false(blackout_take_tail(blackout, tail, sizeof(tail) - 1));
    return blackout_take_tail(blackout, tail, sizeof(tail));
}

static bool do_init(void)
{
    TPM_RESULT result;
    bool is_said = blackout_init(blackout, &result);

    if (is_said)
        assert_int_equal(result == TPM_SUCCESS, blackout_state(blackout) == HANDOVER_STARTED);
    return is_said;
}

static bool do_take(void)
{
    struct lane_frame frame = {.kind = LANE_TAKE};

    memcpy(frame.permanent_digest, digests.permanent_digest, LANE_DIGEST_BYTES);
    memcpy(frame.volatile_digest, digests.volatile_digest, LANE_DIGEST_BYTES);
    say(&frame);
    return true;
}

static bool do_take_other(void)
{
    struct lane_frame frame = {.kind = LANE_TAKE, .volatile_digest = "of another state"};

    memcpy(frame.permanent_digest, digests.permanent_digest, LANE_DIGEST_BYTES);
    say(&frame);
    return true;
}

static bool do_take_after_work(void)
{
    do_work();
    return do_take();
}

static bool do_grant(void)
{
    say(&(struct lane_frame){.kind = LANE_GRANT});
    return true;
}

static bool do_end(void)
{
    say(&(struct lane_frame){.kind = LANE_REFUSE, .reason = 7});
    return true;
}

static bool do_go_on(void)
{
    say(&(struct lane_frame){.kind = LANE_GO_ON});
    return true;
}

static bool do_lose(void)
{
    shutdown(peer_fd, SHUT_WR);
    blackout_receive(blackout);
    return true;
}

static bool do_forge(void)
{
    uint8_t bytes[LANE_FRAME_BYTES] = {0};

    assert_int_equal(write(peer_fd, bytes, sizeof(bytes)), sizeof(bytes));
    blackout_receive(blackout);
    return true;
}

/* How each state is reached. */
static void enter(enum handover_state state)
{
    begin(state <= HANDOVER_GRANTED);
    if (state >= HANDOVER_HELD) {
        start_standby();
        assert_true(do_hold());
    } else if (state != HANDOVER_NONE) {
        assert_true(do_offer());
    }
    if (state == HANDOVER_OFFERED || state == HANDOVER_FROZEN || state == HANDOVER_GRANTED)
        assert_true(do_record());
    if (handover_has_given(state) || state == HANDOVER_GRANTED)
        do_ask();
    if (state == HANDOVER_WANTED || state == HANDOVER_GRANTED)
        do_take();
    if (state >= HANDOVER_TAKING)
        assert_true(do_tail());
    if (state >= HANDOVER_ENTITLED)
        do_grant();
    if (state == HANDOVER_STARTED)
        assert_true(do_init());
    if (state != HANDOVER_WAITING)
        assert_int_equal(blackout_state(blackout), state);
}

struct deed {
    enum handover_event event;
    bool (*happen)(void);
    bool is_of_lane; /* what is not possible there ends the lane */
};

static const struct deed deeds[] = {
    {HANDOVER_OFFER, do_offer, false},
    {HANDOVER_RECORDED, do_record, false},
    {HANDOVER_DETACHED, do_detach, false},
    {HANDOVER_HOLD, do_hold, false},
    {HANDOVER_LET_GO, do_let_go, false},
    {HANDOVER_WITHDRAW, do_withdraw, false},
    {HANDOVER_OWNED, do_owned, false},
    {HANDOVER_ASKED, do_ask, false},
    {HANDOVER_RUNS, do_run, false},
    {HANDOVER_TAIL, do_tail, false},
    {HANDOVER_INIT, do_init, false},
    {HANDOVER_TAKE, do_take, true},
    {HANDOVER_TAKE_OTHER, do_take_other, true},
    {HANDOVER_GRANT, do_grant, true},
    {HANDOVER_END, do_end, true},
    {HANDOVER_END, do_go_on, true},
    {HANDOVER_LOST, do_lose, true},
    {HANDOVER_LOST, do_forge, true},
};

/* What the table says of an event, with what follows from it at once. */
static struct handover_step expected(enum handover_state state, const struct deed *deed)
{
    struct handover_step step = handover_step(state, deed->event);

    if (!step.is_possible && deed->is_of_lane)
        step = handover_step(state, HANDOVER_LOST);
    if (step.is_possible && step.state == HANDOVER_RETIRING) {
        struct handover_step then = handover_step(step.state, HANDOVER_RETIRED);
        step.state = then.state;
        step.actions |= then.actions;
    }
    if (step.is_possible && step.state == HANDOVER_WAITING && state != HANDOVER_WAITING) {
        struct handover_step then = handover_step(step.state, HANDOVER_TIMED_OUT);
        step.state = then.state;
        step.actions |= then.actions;
    }
    return step;
}

static void check_frames(uint32_t actions, bool is_source)
{
    enum lane_kind kinds[4];
    int n = 0, heard = hear(kinds);

    if (actions & HANDOVER_DO_SEND_TAKE)
        assert_int_equal(kinds[n++], LANE_TAKE);
    if (actions & HANDOVER_DO_SEND_GRANT)
        assert_int_equal(kinds[n++], LANE_GRANT);
    if (actions & HANDOVER_DO_SEND_END)
        assert_int_equal(kinds[n++], is_source ? LANE_GO_ON : LANE_REFUSE);
    assert_int_equal(heard, n);
    bool is_closed = kinds[n] == 0;
    assert_int_equal(is_closed, (actions & HANDOVER_DO_CLOSE) != 0);
}

static bool executes(void)
{
    uint8_t get_random[] = {0x80, 1, 0, 0, 0, 12, 0, 0, 1, 0x7b, 0, 8};
    struct tpm_response response;

    tpm_response_init(&response);
    tpm_execute(tpm, get_random, sizeof(get_random), &response);
    uint32_t code = get_be32(response.bytes + TPM_AT_CODE);
    tpm_response_deinit(&response);
    return code != TPM2_RC_FAILURE && code != TPM2_RC_RETRY;
}

static void try_in(enum handover_state state, const struct deed *deed)
{
    enum lane_kind before[4];
    struct handover_step step = expected(state, deed);
    bool is_source = state <= HANDOVER_GRANTED;

    enter(state);
    hear(before);
    bool happened = deed->happen();
    assert_int_equal(blackout_state(blackout), step.state);
    if (!deed->is_of_lane && deed->event != HANDOVER_ASKED && deed->event != HANDOVER_RUNS)
        assert_int_equal(happened, step.is_possible);
    check_frames(step.is_possible ? step.actions : 0, is_source);
    assert_int_equal(executes(),
                     is_source && step.state != HANDOVER_GRANTED && state != HANDOVER_GRANTED);
    end();
}

static void test_every_event_in_every_state(void **state)
{
    (void)state;
    for (int each = HANDOVER_NONE; each < HANDOVER_N_STATES; each++)
        for (size_t i = 0; i < sizeof(deeds) / sizeof(*deeds); i++)
            if (each != HANDOVER_RETIRING && each != HANDOVER_WAITING)
                try_in((enum handover_state)each, &deeds[i]);
}

static const struct deed *deed_while_waiting;
static bool happened_while_waiting;

static void happen_while_waiting(void)
{
    happened_while_waiting = deed_while_waiting->happen();
}

/* What happens while QEMU's INIT waits is of the link, or of the lane. */
static void test_every_event_while_init_waits(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof(deeds) / sizeof(*deeds); i++) {
        enum lane_kind before[4];
        const struct deed *deed = &deeds[i];
        if (deed->event >= HANDOVER_ASKED && deed->event <= HANDOVER_INIT)
            continue; /* QEMU waits for its answer */
        struct handover_step step = expected(HANDOVER_WAITING, deed);
        enter(HANDOVER_WAITING);
        hear(before);
        deed_while_waiting = deed;
        while_waiting = happen_while_waiting;
        assert_true(do_init());
        if (!deed->is_of_lane)
            assert_int_equal(happened_while_waiting, step.is_possible);
        /* What comes by the lane is taken by the thread that waits for it, and no other. */
        bool is_taken = step.is_possible && !deed->is_of_lane;
        assert_int_equal(seen_waiting, is_taken ? step.state : HANDOVER_WAITING);
        assert_int_equal(blackout_state(blackout), step.is_possible ? step.state : HANDOVER_NONE);
        assert_false(executes());
        end();
    }
}

static void test_invariant_3_what_ran_since_the_tail_is_not_granted(void **state)
{
    enum lane_kind kinds[4];

    (void)state;
    enter(HANDOVER_FROZEN);
    do_take_after_work();
    assert_int_equal(blackout_state(blackout), HANDOVER_NONE);
    assert_int_equal(hear(kinds), 1);
    assert_int_equal(kinds[0], LANE_GO_ON);
    assert_true(executes());
    end();
}

static void test_invariant_3_nothing_is_granted_before_the_record_says_offered(void **state)
{
    enum lane_kind kinds[4];

    (void)state;
    for (int works = 0; works <= 1; works++) {
        enter(HANDOVER_GIVEN);
        do_take();
        assert_int_equal(hear(kinds), 0);
        assert_true(executes());
        if (!works) /* that was work, too */
            capture();
        do_record();
        assert_int_equal(blackout_state(blackout), works ? HANDOVER_NONE : HANDOVER_GRANTED);
        assert_int_equal(hear(kinds), 1);
        assert_int_equal(kinds[0], works ? LANE_GO_ON : LANE_GRANT);
        end();
    }
}

static void test_invariant_6_a_tail_is_of_no_use_once_something_ran(void **state)
{
    cleanup(message_deinit) struct message answer = MESSAGE_NONE;

    (void)state;
    enter(HANDOVER_OFFERED);
    do_work();
    assert_false(blackout_give_tail(blackout, &answer));
    assert_int_equal(blackout_state(blackout), HANDOVER_NONE);
    end();
}

static void test_invariant_6_what_ran_since_it_was_captured_is_not_offered(void **state)
{
    (void)state;
    begin(true);
    do_work();
    assert_int_equal(blackout_offer(blackout, &digests, tail, sizeof(tail)), TPM_RETRY);
    assert_int_equal(blackout_state(blackout), HANDOVER_NONE);
    capture();
    assert_true(do_offer());
    end();
}

static void test_invariant_3_what_is_captured_after_the_tail_ends_it(void **state)
{
    static const enum handover_state states[] = {HANDOVER_PREPARED, HANDOVER_OFFERED,
                                                 HANDOVER_GIVEN, HANDOVER_WANTED, HANDOVER_FROZEN};
    cleanup(message_deinit) struct message answer = MESSAGE_NONE;
    enum link_shutdown said;
    bool worked;

    (void)state;
    for (size_t i = 0; i < sizeof(states) / sizeof(*states); i++) {
        enter(states[i]);
        assert_int_equal(blackout_capture(blackout, store, &worked, &said), TPM_SUCCESS);
        assert_false(worked);
        assert_int_equal(blackout_state(blackout), states[i]);
        do_work();
        assert_int_equal(blackout_capture(blackout, store, &worked, &said), TPM_SUCCESS);
        assert_true(worked);
        assert_int_equal(blackout_state(blackout), HANDOVER_NONE);
        assert_false(blackout_give_tail(blackout, &answer));
        assert_true(executes());
        end();
    }
}

static void test_without_a_lane_nothing_is_offered_or_held(void **state)
{
    (void)state;
    begin(true);
    do_lose();
    assert_false(do_offer());
    assert_false(do_hold());
    assert_int_equal(blackout_lane_fd(blackout), BLACKOUT_NO_LANE);
    end();
}

static void test_a_session_has_one_lane(void **state)
{
    int ends[2];

    (void)state;
    begin(true);
    do_lose();
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, ends), 0);
    assert_int_equal(blackout_set_lane(blackout, ends[0], &keying, true), TPM_BAD_ORDINAL);
    struct lane_keying another = keying;
    another.session[0]++;
    assert_int_equal(blackout_set_lane(blackout, ends[0], &another, true), TPM_SUCCESS);
    close(ends[1]);
    end();
}

static void test_a_command_that_ends_late_ends_the_offer_at_once(void **state)
{
    (void)state;
    enter(HANDOVER_OFFERED);
    blackout_worked(blackout); /* what it does not do by itself */
    assert_int_equal(blackout_state(blackout), HANDOVER_OFFERED);
    do_work();
    blackout_worked(blackout);
    assert_int_equal(blackout_state(blackout), HANDOVER_NONE);
    capture();
    assert_true(do_offer()); /* the lane is as it was */
    end();
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_event_in_every_state),
        cmocka_unit_test(test_every_event_while_init_waits),
        cmocka_unit_test(test_invariant_3_what_ran_since_the_tail_is_not_granted),
        cmocka_unit_test(test_invariant_3_nothing_is_granted_before_the_record_says_offered),
        cmocka_unit_test(test_invariant_6_a_tail_is_of_no_use_once_something_ran),
        cmocka_unit_test(test_a_session_has_one_lane),
        cmocka_unit_test(test_a_command_that_ends_late_ends_the_offer_at_once),
        cmocka_unit_test(test_invariant_6_what_ran_since_it_was_captured_is_not_offered),
        cmocka_unit_test(test_invariant_3_what_is_captured_after_the_tail_ends_it),
        cmocka_unit_test(test_without_a_lane_nothing_is_offered_or_held),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
