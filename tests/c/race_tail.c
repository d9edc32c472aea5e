/* A tail that QEMU brings while vtpmd, and the other engine, go on with the session.
 *
 *     race_tail RACES
 *
 * Two threads: one is the control channel's, and takes the tail; the other is the link's, and does
 * what a session's vtpmd may have begun by then. Invariant: either is first, and wholly so. A tail
 * that is taken is asked for as what it ends at, is what has come, and nothing of that is changed
 * or forgotten any more; one that is refused has left what the other thread has made.
 *
 * Exit status: 0 if that held in all races, 1 if not, 2 for wrong usage.
 */
#include <fcntl.h>
#include <libtpms/tpm_error.h>
#include <libtpms/tpm_library.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#include "bytes.h"
#include "check.h"
#include "clock.h"
#include "guest.h"
#include "message.h"
#include "other_engine.h"
#include "staged.h"
#include "tpm.h"
#include "tpm_in_memory.h"

enum {
    ROUNDS = 4,
    GETS = 20,
    DELAY_NS_MAX = 2 * NS_PER_MS, /* of what takes some milliseconds */
    DELAY_NS_STEP = 37 * NS_PER_US,
};

static struct guest_states rounds[ROUNDS];
static pthread_barrier_t barrier;
static struct {
    struct sealed_tail bytes; /* from round 1 to round 3 */
    int64_t delay_ns;
    bool is_taken;
} tail;
static unsigned n_taken, n_refused, n_overtaken; /* of the last, the other thread was too late */

static void wait_ns(int64_t ns)
{
    nanosleep(&(struct timespec){.tv_nsec = ns}, NULL);
}

static void *take_tail(void *unused)
{
    (void)unused;
    pthread_barrier_wait(&barrier);
    wait_ns(tail.delay_ns);
    tail.is_taken = blackout_take_tail(blackout, tail.bytes.bytes, tail.bytes.n_bytes) == 0;
    blackout_start_tail(blackout);
    return NULL;
}

/* Return the generation of the permanent state that has come, which is what the source had then. */
static uint64_t staged_generation(void)
{
    cleanup(message_deinit) struct message answer = MESSAGE_NONE;
    uint64_t generation;

    if (blackout_get_staged(blackout, &answer) != TPM_SUCCESS)
        return 0;
    memcpy(&generation, answer.payload, sizeof(generation));
    for (int i = 0; i < ROUNDS; i++) {
        const struct image *image = &rounds[i].of[0];
        if (image->generation != generation)
            continue;
        check(answer.header.payload_bytes == sizeof(generation) + image->n_bytes);
        check(memcmp(answer.payload + sizeof(generation), image->bytes, image->n_bytes) == 0);
        return generation;
    }
    check(false);
    return 0;
}

static uint64_t generation_of(int round)
{
    return rounds[round].of[0].generation;
}

/* What the link's thread does; then what is so, whoever was first. */

static TPM_RESULT result;

static void stage_next(void)
{
    result = other_engine_brings(&rounds[1], &rounds[2], true);
}

static void stage_next_off(void)
{
    result = other_engine_brings(&rounds[1], &rounds[2], false);
}

static void forget(void)
{
    result = blackout_forget(blackout, false, false);
}

static void let_go(void)
{
    result = blackout_forget(blackout, true, false);
}

static void look(void)
{
    result = TPM_SUCCESS;
    for (int i = 0; i < GETS; i++) {
        uint64_t generation = staged_generation();
        check(generation == generation_of(1) || generation == generation_of(3));
        blackout_state(blackout);
        blackout_lane_fd(blackout);
        wait_ns(DELAY_NS_STEP);
    }
}

static void receive(void)
{
    blackout_receive(blackout);
    result = TPM_SUCCESS;
}

static bool is_in(enum handover_state state)
{
    return blackout_state(blackout) == state;
}

static bool was_overtaken(void)
{
    return result == TPM_BAD_ORDINAL && tail.is_taken && is_in(HANDOVER_TAKING);
}

/* The source has not heard of the round's Ack; the tail has what the round has. */
static bool is_right_after_stage(void)
{
    return was_overtaken() || (result == TPM_SUCCESS && tail.is_taken && is_in(HANDOVER_TAKING));
}

static bool is_right_after_forget(void)
{
    return was_overtaken() || (result == TPM_SUCCESS && !tail.is_taken && is_in(HANDOVER_NONE) &&
                               staged_generation() == 0);
}

static bool is_right_after_look(void)
{
    return tail.is_taken && is_in(HANDOVER_TAKING);
}

static bool is_right_after_grant(void)
{
    /* Before it was asked for it ends the lane. */
    return is_in(tail.is_taken ? HANDOVER_ENTITLED : HANDOVER_NONE);
}

static bool is_right_after_end(void)
{
    return is_in(HANDOVER_NONE);
}

static const struct deed {
    void (*function)(void);
    bool (*is_right)(void);
    enum lane_kind said; /* by the source, ahead; or 0 */
} deeds[] = {
    {stage_next, is_right_after_stage, 0},
    {stage_next_off, is_right_after_stage, 0},
    {forget, is_right_after_forget, 0},
    {let_go, is_right_after_stage, 0},
    {look, is_right_after_look, 0},
    {receive, is_right_after_look, 0},
    {receive, is_right_after_grant, LANE_GRANT},
    {receive, is_right_after_end, LANE_GO_ON},
};

enum { N_DEEDS = sizeof(deeds) / sizeof(*deeds) };

static void begin_session(unsigned number, const struct deed *deed)
{
    struct lane_keying keying = a_session;

    memcpy(keying.session, &number, sizeof(number));
    other_engine_connect(&keying, false);
    check(other_engine_brings(NULL, &rounds[0], false) == TPM_SUCCESS);
    check(other_engine_brings(&rounds[0], &rounds[1], number % 3 != 0) == TPM_SUCCESS);
    tail.bytes = other_engine_seals(&rounds[1], &rounds[3]);
    if (deed->said)
        other_engine_sends(&(struct lane_frame){.kind = deed->said});
}

static void check_taken(void)
{
    struct link_digests wanted;
    struct lane_frame take;
    enum lane_kind kinds[4];

    guest_states_digests(&rounds[3], &wanted);
    check(other_engine_hears(kinds, &take) == 1 && kinds[0] == LANE_TAKE);
    check(memcmp(take.permanent_digest, wanted.permanent_digest, LANE_DIGEST_BYTES) == 0);
    check(memcmp(take.volatile_digest, wanted.volatile_digest, LANE_DIGEST_BYTES) == 0);
    check(staged_generation() == generation_of(3));
}

static void end_session(void)
{
    enum handover_state before;

    free(tail.bytes.bytes);
    if (is_in(HANDOVER_ENTITLED))
        check(blackout_say(blackout, HANDOVER_OWNED) == TPM_SUCCESS);
    check(blackout_withdraw(blackout, &before) == TPM_SUCCESS);
    check(blackout_forget(blackout, false, false) == TPM_SUCCESS);
}

static void race_once(unsigned number)
{
    const struct deed *deed = &deeds[number % N_DEEDS];
    pthread_t control;

    begin_session(number + 1, deed);
    tail.delay_ns = number / N_DEEDS * DELAY_NS_STEP % DELAY_NS_MAX;
    check(pthread_create(&control, NULL, take_tail, NULL) == 0);
    pthread_barrier_wait(&barrier);
    wait_ns(number / N_DEEDS % 2 * DELAY_NS_MAX / 2);
    deed->function();
    pthread_join(control, NULL);
    check(deed->is_right());
    if (tail.is_taken)
        check_taken();
    n_taken += tail.is_taken;
    n_refused += !tail.is_taken;
    n_overtaken += was_overtaken();
    end_session();
}

static void begin(void)
{
    TPMLIB_SetDebugFD(open("/dev/null", O_WRONLY | O_CLOEXEC));
    other_engine_begin();
    for (int i = 0; i < ROUNDS; i++) {
        guest_writes_nv();
        guest_extends_pcr();
        rounds[i] = guest_states_capture();
    }
    power_off();
    check(pthread_barrier_init(&barrier, NULL, 2) == 0);
}

static void end(void)
{
    pthread_barrier_destroy(&barrier);
    for (int i = 0; i < ROUNDS; i++)
        guest_states_deinit(&rounds[i]);
    other_engine_end();
}

int main(int n_arguments, char **arguments)
{
    unsigned n_races = n_arguments == 2 ? (unsigned)strtoul(arguments[1], NULL, 10) : 0;

    if (n_races == 0) {
        fprintf(stderr, "usage: race_tail RACES\n");
        return 2;
    }
    begin();
    for (unsigned i = 0; i < n_races; i++)
        race_once(i);
    end();
    printf("%u races: %u tails taken, %u of them first; %u refused\n", n_races, n_taken,
           n_overtaken, n_refused);
    check(n_races < 100 || (n_overtaken > 0 && n_refused > 0));
    return 0;
}
