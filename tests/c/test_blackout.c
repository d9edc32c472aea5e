/* The hand-over as an engine does it: every event in every state of handover.c's table, with a real
 * TPM, and the other engine's end of a real lane in the test's hands.
 *
 * Invariant 3: what was granted is fenced before the Grant is sent, and nothing ends it any more.
 */
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>
#include <libtpms/tpm_error.h>

#include "blackout.h"
#include "bytes.h"
#include "clock.h"
#include "guest.h"
#include "handover.h"
#include "io.h"
#include "lane.h"
#include "message.h"
#include "other_engine.h"
#include "staged.h"
#include "tpm.h"
#include "tpm_in_memory.h"

static struct guest_states captured; /* the base, or what was staged */
static struct link_digests digests;  /* of what the tail ends at */
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

/* No command waits for time to pass, or for another thread: there is none that could end it. The
 * linker puts this there (meson.build). */
int __wrap_pthread_cond_timedwait(pthread_cond_t *condition, pthread_mutex_t *mutex,
                                  const struct timespec *until)
{
    (void)condition, (void)mutex, (void)until;
    return ETIMEDOUT;
}

static void begin(bool is_source)
{
    other_engine_begin();
    guest_writes_nv();
    captured = guest_states_capture();
    other_engine_connect(&a_session, is_source);
    if (is_source)
        assert_int_equal(blackout_keep_base(blackout, store, captured.of[0].generation,
                                            captured.of[1].generation),
                         TPM_SUCCESS);
}

static void end(void)
{
    guest_states_deinit(&captured);
    other_engine_end();
}

static int hear(enum lane_kind kinds[4])
{
    return other_engine_hears(kinds, NULL);
}

static void stage(void)
{
    power_off();
    assert_int_equal(other_engine_brings(NULL, &captured, true), TPM_SUCCESS);
}

/* The events, each as whoever it is of has it happen. Returns false where it was refused. */

static bool capture(bool offers)
{
    struct blackout_captured found;

    blackout_capture(blackout, store, offers, &found);
    if (found.is_offered)
        digests = found.digests;
    return found.is_offered;
}

static bool do_offer(void)
{
    return capture(true);
}

static bool do_let_go(void)
{
    return blackout_say(blackout, HANDOVER_LET_GO) == TPM_SUCCESS;
}

static bool do_record(void)
{
    return blackout_say(blackout, HANDOVER_RECORDED) == TPM_SUCCESS;
}

static uint8_t sector[LINK_SECTOR_BYTES];

static TPM_RESULT begin_record(void)
{
    int fd = memfd_create("owner record", MFD_CLOEXEC);

    assert_true(fd >= 0);
    memset(sector, '.', sizeof(sector));
    TPM_RESULT result = blackout_record(blackout, fd, sector);
    if (result != TPM_SUCCESS)
        close(fd);
    return result;
}

/* The engine writes it, whatever the state is, and takes that where it may. */
static bool do_write_record(void)
{
    enum handover_state before = blackout_state(blackout);

    assert_int_equal(begin_record(), TPM_SUCCESS);
    blackout_wait_for_record(blackout);
    return handover_step(before, HANDOVER_RECORDED).is_possible;
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

    if (blackout_give_tail(blackout, &answer)) {
        struct sealed_tail tail = other_engine_seals(&captured, &captured);
        assert_int_equal(answer.header.payload_bytes, tail.n_bytes);
        assert_memory_equal(answer.payload, tail.bytes, tail.n_bytes);
        free(tail.bytes);
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
    struct sealed_tail tail = other_engine_seals(&captured, &captured);

    guest_states_digests(&captured, &digests);
    assert_int_not_equal(blackout_take_tail(blackout, tail.bytes, tail.n_bytes - 1), 0);
    tail.bytes[tail.n_bytes - 1]++;
    assert_int_not_equal(blackout_take_tail(blackout, tail.bytes, tail.n_bytes), 0);
    tail.bytes[tail.n_bytes - 1]--;
    bool is_taken = blackout_take_tail(blackout, tail.bytes, tail.n_bytes) == 0;
    free(tail.bytes);
    return is_taken;
}

static bool do_start(void)
{
    bool is_its_turn = blackout_state(blackout) == HANDOVER_STARTING;

    blackout_start_tail(blackout);
    return is_its_turn;
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
    other_engine_takes(&digests);
    return true;
}

static bool do_take_other(void)
{
    struct link_digests others = digests;

    others.volatile_digest[DIGEST_BYTES - 1]++;
    other_engine_takes(&others);
    return true;
}

static bool do_take_other_permanent(void)
{
    struct link_digests others = digests;

    others.permanent_digest[0]++;
    other_engine_takes(&others);
    return true;
}

static bool do_grant(void)
{
    other_engine_says(&(struct lane_frame){.kind = LANE_GRANT});
    return true;
}

static bool do_end(void)
{
    other_engine_says(&(struct lane_frame){.kind = LANE_REFUSE, .reason = 7});
    return true;
}

static bool do_go_on(void)
{
    other_engine_says(&(struct lane_frame){.kind = LANE_GO_ON});
    return true;
}

static bool do_lose(void)
{
    shutdown(other_fd, SHUT_WR);
    blackout_receive(blackout);
    return true;
}

static bool do_forge(void)
{
    uint8_t bytes[LANE_FRAME_BYTES] = {0};

    assert_int_equal(write(other_fd, bytes, sizeof(bytes)), sizeof(bytes));
    blackout_receive(blackout);
    return true;
}

static bool may_be_source(enum handover_state state)
{
    return state <= HANDOVER_GRANTED;
}

static bool may_be_destination(enum handover_state state)
{
    return state == HANDOVER_NONE || state >= HANDOVER_GRANTED;
}

static void enter_as_source(enum handover_state state)
{
    begin(true);
    if (state != HANDOVER_NONE)
        assert_true(do_offer());
    if (state == HANDOVER_OFFERED || state == HANDOVER_FROZEN || state == HANDOVER_GRANTED)
        assert_true(do_record());
    if (handover_has_given(state) || state == HANDOVER_GRANTED)
        do_ask();
    if (state == HANDOVER_WANTED || state == HANDOVER_GRANTED)
        do_take();
}

static void enter_as_destination(enum handover_state state)
{
    if (state == HANDOVER_GRANTED) {
        enter_as_source(state); /* and it comes back */
        other_engine_connect(&another_session, false);
    } else {
        begin(false);
    }
    stage();
    if (state >= HANDOVER_STARTING)
        assert_true(do_tail());
    if (state >= HANDOVER_TAKING)
        assert_true(do_start());
    if (state >= HANDOVER_ENTITLED)
        do_grant();
    if (state == HANDOVER_STARTED)
        assert_true(do_init());
}

/* How each state is reached. */
static void enter(enum handover_state state, bool is_source)
{
    is_source ? enter_as_source(state) : enter_as_destination(state);
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
    {HANDOVER_RECORDED, do_write_record, false},
    {HANDOVER_DETACHED, do_detach, false},
    {HANDOVER_LET_GO, do_let_go, false},
    {HANDOVER_WITHDRAW, do_withdraw, false},
    {HANDOVER_OWNED, do_owned, false},
    {HANDOVER_ASKED, do_ask, false},
    {HANDOVER_RUNS, do_run, false},
    {HANDOVER_TAIL, do_tail, false},
    {HANDOVER_READY, do_start, false},
    {HANDOVER_INIT, do_init, false},
    {HANDOVER_TAKE, do_take, true},
    {HANDOVER_TAKE_OTHER, do_take_other, true},
    {HANDOVER_TAKE_OTHER, do_take_other_permanent, true},
    {HANDOVER_GRANT, do_grant, true},
    {HANDOVER_END, do_end, true},
    {HANDOVER_END, do_go_on, true},
    {HANDOVER_LOST, do_lose, true},
    {HANDOVER_LOST, do_forge, true},
};

/* What the table says of an event, with what follows from it at once; and what the lane says,
 * which is of one side. */
static struct handover_step expected(enum handover_state state, bool is_source,
                                     const struct deed *deed)
{
    if (deed->is_of_lane && state == HANDOVER_STARTING)
        state = HANDOVER_TAKING; /* it has started before that is heard */
    struct handover_step step = handover_step(state, deed->event);

    if ((deed->event == HANDOVER_OFFER && !is_source) ||
        (deed->event == HANDOVER_TAIL && is_source))
        return (struct handover_step){false, state, 0};
    if (deed->event == HANDOVER_WITHDRAW && state == HANDOVER_GRANTED && !is_source)
        return (struct handover_step){true, state, HANDOVER_DO_CLOSE};
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

static void try_in(enum handover_state state, bool is_source, const struct deed *deed)
{
    enum lane_kind before[4];
    struct handover_step step = expected(state, is_source, deed);

    enter(state, is_source);
    hear(before);
    bool happened = deed->happen();
    assert_int_equal(blackout_state(blackout), step.state);
    if (!deed->is_of_lane && deed->event != HANDOVER_ASKED && deed->event != HANDOVER_RUNS)
        assert_int_equal(happened, step.is_possible);
    check_frames(step.is_possible ? step.actions : 0, is_source);
    assert_int_equal(guest_is_served(),
                     is_source && step.state != HANDOVER_GRANTED && state != HANDOVER_GRANTED);
    end();
}

static void test_every_event_in_every_state(void **state)
{
    (void)state;
    for (int each = HANDOVER_NONE; each < HANDOVER_N_STATES; each++) {
        if (each == HANDOVER_RETIRING || each == HANDOVER_WAITING)
            continue;
        for (size_t i = 0; i < sizeof(deeds) / sizeof(*deeds); i++) {
            if (may_be_source((enum handover_state)each))
                try_in((enum handover_state)each, true, &deeds[i]);
            if (may_be_destination((enum handover_state)each))
                try_in((enum handover_state)each, false, &deeds[i]);
        }
    }
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
        struct handover_step step = expected(HANDOVER_WAITING, false, deed);
        enter(HANDOVER_WAITING, false);
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
        assert_false(guest_is_served());
        end();
    }
}

static void try_to_change_what_was_taken(void)
{
    assert_int_equal(other_engine_brings(NULL, &captured, true), TPM_BAD_ORDINAL);
    assert_int_equal(blackout_forget(blackout, false, false), TPM_BAD_ORDINAL);
    assert_int_equal(blackout_forget(blackout, true, false), TPM_BAD_ORDINAL);
}

static void test_what_was_taken_is_not_changed_while_init_waits(void **state)
{
    (void)state;
    enter(HANDOVER_WAITING, false);
    other_engine_sends(&(struct lane_frame){.kind = LANE_GRANT});
    while_waiting = try_to_change_what_was_taken;
    assert_true(do_init());
    assert_int_equal(seen_waiting, HANDOVER_WAITING);
    assert_int_equal(blackout_state(blackout), HANDOVER_STARTED);
    end();
}

static void test_invariant_3_what_ran_since_the_tail_is_not_granted(void **state)
{
    enum lane_kind kinds[4];

    (void)state;
    enter(HANDOVER_FROZEN, true);
    guest_extends_pcr();
    do_take();
    assert_int_equal(blackout_state(blackout), HANDOVER_NONE);
    assert_int_equal(hear(kinds), 1);
    assert_int_equal(kinds[0], LANE_GO_ON);
    assert_true(guest_is_served());
    end();
}

static void test_invariant_3_nothing_is_granted_before_the_record_says_offered(void **state)
{
    enum lane_kind kinds[4];

    (void)state;
    for (int works = 0; works <= 1; works++) {
        enter(HANDOVER_GIVEN, true);
        do_take();
        assert_int_equal(hear(kinds), 0);
        if (works)
            assert_true(guest_is_served()); /* that is work, too */
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
    enter(HANDOVER_OFFERED, true);
    guest_extends_pcr();
    assert_false(blackout_give_tail(blackout, &answer));
    assert_int_equal(blackout_state(blackout), HANDOVER_NONE);
    end();
}

static void test_invariant_3_what_is_captured_after_the_tail_ends_it(void **state)
{
    static const enum handover_state states[] = {HANDOVER_PREPARED, HANDOVER_OFFERED,
                                                 HANDOVER_GIVEN, HANDOVER_WANTED, HANDOVER_FROZEN};
    cleanup(message_deinit) struct message answer = MESSAGE_NONE;
    struct blackout_captured found;

    (void)state;
    for (size_t i = 0; i < sizeof(states) / sizeof(*states); i++) {
        enter(states[i], true);
        assert_int_equal(blackout_capture(blackout, store, false, &found), TPM_SUCCESS);
        assert_false(found.worked);
        assert_int_equal(blackout_state(blackout), states[i]);
        guest_extends_pcr();
        assert_int_equal(blackout_capture(blackout, store, false, &found), TPM_SUCCESS);
        assert_true(found.worked);
        assert_int_equal(blackout_state(blackout), HANDOVER_NONE);
        assert_false(blackout_give_tail(blackout, &answer));
        assert_true(guest_is_served());
        end();
    }
}

static void test_without_a_lane_nothing_is_offered_or_taken(void **state)
{
    (void)state;
    for (int is_source = 0; is_source <= 1; is_source++) {
        enter(HANDOVER_NONE, is_source);
        do_lose();
        assert_false(do_offer());
        assert_false(do_tail());
        assert_int_equal(blackout_lane_fd(blackout), BLACKOUT_NO_LANE);
        assert_int_equal(blackout_state(blackout), HANDOVER_NONE);
        end();
    }
}

static void test_a_session_has_one_lane(void **state)
{
    int ends[2];

    (void)state;
    begin(true);
    do_lose();
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, ends), 0);
    assert_int_equal(blackout_set_lane(blackout, ends[0], &a_session, true), TPM_BAD_ORDINAL);
    assert_int_equal(blackout_set_lane(blackout, ends[0], &another_session, true), TPM_SUCCESS);
    close(ends[1]);
    end();
}

/* A tail of one session is neither granted to the peer of another, nor by it. */
static void test_invariant_3_a_lane_ends_the_session_before(void **state)
{
    enum lane_kind kinds[4];
    int ends[2];

    (void)state;
    for (int each = HANDOVER_NONE; each < HANDOVER_N_STATES; each++) {
        bool is_source = may_be_source((enum handover_state)each);
        bool is_granted = each == HANDOVER_ENTITLED || each == HANDOVER_STARTED;
        if (each == HANDOVER_RETIRING || each == HANDOVER_WAITING)
            continue;
        enter((enum handover_state)each, is_source);
        hear(kinds);
        assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, ends), 0);
        assert_int_equal(blackout_set_lane(blackout, ends[0], &another_session, is_source),
                         is_granted ? TPM_BAD_ORDINAL : TPM_SUCCESS);
        assert_int_equal(blackout_state(blackout), is_granted || each == HANDOVER_GRANTED
                                                       ? (enum handover_state)each
                                                       : HANDOVER_NONE);
        bool is_told = each == HANDOVER_STARTING || each == HANDOVER_TAKING ||
                       handover_has_given((enum handover_state)each);
        assert_int_equal(hear(kinds), is_told);
        if (is_told)
            assert_int_equal(kinds[0], is_source ? LANE_GO_ON : LANE_REFUSE);
        assert_int_equal(kinds[is_told] == 0, !is_granted);
        if (is_granted)
            close(ends[0]);
        close(ends[1]);
        end();
    }
}

/* What was granted before to another host is that one's for as long as nobody has granted it back.
 */
static void test_invariant_3_what_was_granted_stays_so_without_a_lane_back(void **state)
{
    enum handover_state before;
    enum lane_kind kinds[4];

    (void)state;
    enter(HANDOVER_GRANTED, false);
    assert_int_equal(blackout_withdraw(blackout, &before), TPM_SUCCESS);
    assert_int_equal(before, HANDOVER_GRANTED);
    assert_int_equal(hear(kinds), 0);
    assert_int_equal(kinds[0], 0);
    assert_int_equal(blackout_state(blackout), HANDOVER_GRANTED);
    assert_false(do_tail());
    assert_false(guest_is_served());
    end();
}

static void test_a_command_that_ends_late_ends_the_offer_at_once(void **state)
{
    (void)state;
    enter(HANDOVER_OFFERED, true);
    blackout_worked(blackout); /* what it does not do by itself */
    assert_int_equal(blackout_state(blackout), HANDOVER_OFFERED);
    guest_extends_pcr();
    blackout_worked(blackout);
    assert_int_equal(blackout_state(blackout), HANDOVER_NONE);
    guest_states_deinit(&captured);
    captured = guest_states_capture();
    assert_true(do_offer()); /* the lane is as it was */
    end();
}

/* A disk in the test's hands. */
static struct io_posix posix;
static sem_t reached, goes_on;
static int sync_error;

static int slow_sync(struct io *io, int fd)
{
    sem_post(&reached);
    while (sem_wait(&goes_on) < 0) {
    }
    return sync_error ? sync_error : io_posix_functions.sync_data(io, fd);
}

static void use_slow_disk(void)
{
    sem_init(&reached, 0, 0);
    sem_init(&goes_on, 0, 0);
    posix.io.sync_data = slow_sync;
}

static int use_disk(void **state)
{
    (void)state;
    posix.io = io_posix_functions;
    sync_error = 0;
    record_io = &posix.io;
    return 0;
}

static void go_on(void)
{
    sem_post(&goes_on);
    blackout_wait_for_record(blackout);
}

static void test_invariant_3_record_counts_once_it_is_durable(void **state)
{
    enum lane_kind kinds[4];

    (void)state;
    use_slow_disk();
    enter(HANDOVER_WANTED, true);
    assert_int_equal(begin_record(), TPM_SUCCESS);
    sem_wait(&reached);
    assert_int_equal(blackout_state(blackout), HANDOVER_WANTED);
    assert_int_equal(hear(kinds), 0);
    go_on();
    assert_int_equal(blackout_state(blackout), HANDOVER_GRANTED);
    assert_int_equal(hear(kinds), 1);
    assert_int_equal(kinds[0], LANE_GRANT);
    end();
}

static void test_invariant_3_record_that_failed_grants_nothing(void **state)
{
    (void)state;
    use_slow_disk();
    sync_error = -EIO;
    enter(HANDOVER_WANTED, true);
    assert_int_equal(begin_record(), TPM_SUCCESS);
    go_on();
    assert_int_equal(blackout_state(blackout), HANDOVER_WANTED);
    end();
}

static void test_invariant_3_record_of_a_session_says_nothing_of_the_next(void **state)
{
    (void)state;
    use_slow_disk();
    enter(HANDOVER_PREPARED, true);
    assert_int_equal(begin_record(), TPM_SUCCESS);
    sem_wait(&reached);
    other_engine_connect(&another_session, true);
    assert_int_equal(
        blackout_keep_base(blackout, store, captured.of[0].generation, captured.of[1].generation),
        TPM_SUCCESS);
    assert_true(do_offer());
    go_on();
    assert_int_equal(blackout_state(blackout), HANDOVER_PREPARED);
    end();
}

static void test_one_record_is_written_at_a_time(void **state)
{
    (void)state;
    use_slow_disk();
    enter(HANDOVER_PREPARED, true);
    assert_int_equal(begin_record(), TPM_SUCCESS);
    assert_int_equal(begin_record(), TPM_BAD_ORDINAL);
    go_on();
    assert_int_equal(begin_record(), TPM_SUCCESS);
    go_on();
    end();
}

static void test_engine_that_ends_has_written_the_record(void **state)
{
    int fd = memfd_create("owner record", MFD_CLOEXEC);
    uint8_t bytes[LINK_SECTOR_BYTES + 1];

    (void)state;
    enter(HANDOVER_PREPARED, true);
    memset(sector, 'x', sizeof(sector));
    assert_int_equal(blackout_record(blackout, dup(fd), sector), TPM_SUCCESS);
    end();
    assert_int_equal(pread(fd, bytes, sizeof(bytes), 0), LINK_SECTOR_BYTES);
    assert_memory_equal(bytes, sector, sizeof(sector));
    close(fd);
}

static void test_engine_that_no_vtpmd_comes_to_writes_none(void **state)
{
    (void)state;
    record_io = NULL;
    enter(HANDOVER_PREPARED, true);
    assert_int_equal(begin_record(), TPM_BAD_ORDINAL);
    blackout_wait_for_record(blackout);
    end();
}

#define TEST(name) cmocka_unit_test_setup(name, use_disk)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_every_event_in_every_state),
        TEST(test_every_event_while_init_waits),
        TEST(test_what_was_taken_is_not_changed_while_init_waits),
        TEST(test_invariant_3_what_ran_since_the_tail_is_not_granted),
        TEST(test_invariant_3_nothing_is_granted_before_the_record_says_offered),
        TEST(test_invariant_6_a_tail_is_of_no_use_once_something_ran),
        TEST(test_a_session_has_one_lane),
        TEST(test_invariant_3_a_lane_ends_the_session_before),
        TEST(test_a_command_that_ends_late_ends_the_offer_at_once),
        TEST(test_invariant_3_what_is_captured_after_the_tail_ends_it),
        TEST(test_invariant_3_record_counts_once_it_is_durable),
        TEST(test_invariant_3_record_that_failed_grants_nothing),
        TEST(test_invariant_3_record_of_a_session_says_nothing_of_the_next),
        TEST(test_one_record_is_written_at_a_time),
        TEST(test_engine_that_ends_has_written_the_record),
        TEST(test_engine_that_no_vtpmd_comes_to_writes_none),
        TEST(test_without_a_lane_nothing_is_offered_or_taken),
        TEST(test_invariant_3_what_was_granted_stays_so_without_a_lane_back),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
