#include "long_command.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "thread.h"
#include "tpm.h"
#include "turn.h"

enum {
    THREAD_STACK_BYTES = 1 << 20, /* libtpms keeps a copy of its NV memory on the stack */
    /* What is left behind computes on, in vain, for a tenth of a second and more: not in the way of
     * the hand-over, which the guest waits for. */
    NICENESS = 10,
    STATE_TYPES = LINK_STATE_SAVESTATE + 1,
};

/* A letter for each phase: idle, running, committing, abandoned, spent. What is not here is done in
 * all of them: it needs neither libtpms nor nvram, or custody does it in no phase where it would
 * matter. */
static const char verdicts[][LONG_PHASES + 1] = {
    /*                          ircas */
    [OP_EXECUTE] = "dwwwr",
    [OP_INIT] = "dwwwd",
    [OP_INIT_CAME] = "dwwwd",
    [OP_INIT_STANDBY] = "dwwwd",
    [OP_STOP] = "dwwwd",
    [OP_STOP_FENCED] = "dwwwd",
    [OP_RETIRE_UNCHANGED] = "ddwdd",
    [OP_RETIRE_UNSERVED] = "ddwdd",
    [OP_UNRETIRE] = "ddwdd",
    [OP_RESET_ESTABLISHED] = "dwwwr",
    [OP_HASH] = "dwwwr",
    [OP_STORE_VOLATILE] = "dwwwr",
    [OP_GET_PERMANENT] = "dwwss",
    [OP_GET_OTHER] = "dwwss",
    [OP_CAPTURE] = "dswss",
    [OP_COPY] = "dswss",
    [OP_STORE_PERMANENT] = "ddwdd",
    [OP_HAS_STATE] = "ddwdd",
    [OP_GET_LINEAGE] = "ddwdd",
    [OP_RAISE_GENERATION] = "ddwdd",
    [OP_RUN_ON] = "ddwdd",
    [OP_GET_INFO] = "dwwwd",
    [OP_ABANDON] = "idiii",
};

/* What has become of the command that was executed last. */
enum outcome {
    UNDECIDED,
    ANSWERED,
    LEFT_BEHIND,
};

static struct {
    pthread_mutex_t *lock; /* the TPM's, over what follows */
    struct turn *turn;
    _Atomic enum long_phase phase; /* written with the lock, but read without it, too */
    enum outcome outcome;
    atomic_bool is_armed; /* without the lock */
    struct {
        uint8_t *bytes;
        size_t n_bytes;
    } saved[STATE_TYPES];
    /* The thread: */
    pthread_t thread;
    pthread_cond_t wanted;
    bool has_thread;
    bool has_work;
    bool is_ending;
    uint8_t *command; /* its own, and so is the response: who is not waited for has theirs back */
    size_t command_bytes;
    struct tpm_response response;
} own;

enum long_verdict long_verdict(enum tpm_operation operation, enum long_phase phase)
{
    bool is_there = operation < sizeof(verdicts) / sizeof(*verdicts) && *verdicts[operation];

    return is_there ? (enum long_verdict)verdicts[operation][phase] : LONG_DO;
}

/* The one writer of the phase. */
static void set_phase(enum long_phase phase)
{
    own.phase = phase;
    turn_change(own.turn);
}

void long_command_init(pthread_mutex_t *lock, struct turn *turn)
{
    own.lock = lock;
    own.turn = turn;
    own.is_armed = own.has_thread = own.has_work = own.is_ending = false;
    set_phase(LONG_IDLE);
}

static void forget(void)
{
    for (size_t i = 0; i < STATE_TYPES; i++) {
        if (own.saved[i].bytes)
            explicit_bzero(own.saved[i].bytes, own.saved[i].n_bytes);
        free(own.saved[i].bytes);
        own.saved[i].bytes = NULL;
        own.saved[i].n_bytes = 0;
    }
}

/* With the lock: libtpms has returned. */
static void finish(void)
{
    explicit_bzero(own.command, own.command_bytes);
    if (own.phase == LONG_ABANDONED) {
        tpm_response_wipe(&own.response);
        set_phase(LONG_SPENT);
        return;
    }
    own.outcome = ANSWERED;
    forget();
    set_phase(LONG_IDLE);
}

/* sandbox: futex */
static void *run(void *argument)
{
    (void)argument;
    pthread_mutex_lock(own.lock);
    while (!own.is_ending) {
        if (!own.has_work) {
            pthread_cond_wait(&own.wanted, own.lock);
            continue;
        }
        pthread_mutex_unlock(own.lock);
        tpm_process(own.command, own.command_bytes, &own.response);
        pthread_mutex_lock(own.lock);
        own.has_work = false;
        finish();
    }
    pthread_mutex_unlock(own.lock);
    return NULL;
}

int long_command_start(void)
{
    own.command = malloc(tpm_message_bytes_max());
    check(own.command);
    tpm_response_init(&own.response);
    check(pthread_cond_init(&own.wanted, NULL) == 0);
    const struct thread_manner gives_way = {.niceness = NICENESS};
    int r = thread_start_as(&own.thread, THREAD_STACK_BYTES, &gives_way, run, NULL);
    own.has_thread = r >= 0;
    if (r < 0) {
        pthread_cond_destroy(&own.wanted);
        tpm_response_deinit(&own.response);
        free(own.command);
    }
    return r;
}

void long_command_deinit(void)
{
    if (!own.has_thread)
        return;
    pthread_mutex_lock(own.lock);
    check(own.phase == LONG_IDLE);
    own.is_ending = true;
    pthread_cond_signal(&own.wanted);
    pthread_mutex_unlock(own.lock);
    pthread_join(own.thread, NULL);
    pthread_cond_destroy(&own.wanted);
    tpm_response_deinit(&own.response);
    free(own.command);
    own.has_thread = false;
}

bool long_command_arm(bool is_so)
{
    own.is_armed = is_so && own.has_thread;
    return own.has_thread || !is_so;
}

bool long_command_is_armed(void)
{
    return own.is_armed;
}

enum long_phase long_command_phase(void)
{
    return own.phase;
}

void long_command_save(enum link_state_type type, uint8_t *state, size_t state_bytes)
{
    check(own.phase == LONG_IDLE && !own.saved[type].bytes);
    own.saved[type].bytes = state;
    own.saved[type].n_bytes = state_bytes;
}

const uint8_t *long_command_saved(enum link_state_type type, size_t *state_bytes)
{
    *state_bytes = own.saved[type].n_bytes;
    return own.saved[type].bytes;
}

void long_command_forget(void)
{
    check(own.phase == LONG_IDLE || own.phase == LONG_SPENT);
    forget();
    set_phase(LONG_IDLE);
}

static void take_response(struct tpm_response *response)
{
    struct tpm_response answered = own.response;

    own.response = *response;
    *response = answered;
}

bool long_command_execute(const uint8_t *command, size_t command_bytes,
                          struct tpm_response *response)
{
    check(own.phase == LONG_IDLE && own.has_thread);
    memcpy(own.command, command, command_bytes);
    own.command_bytes = command_bytes;
    own.outcome = UNDECIDED;
    own.has_work = true;
    set_phase(LONG_RUNNING);
    pthread_cond_signal(&own.wanted);
    while (own.outcome == UNDECIDED)
        turn_wait(own.turn, own.lock);
    if (own.outcome == ANSWERED)
        take_response(response);
    return own.outcome == ANSWERED;
}

bool long_command_abandon(void)
{
    if (long_verdict(OP_ABANDON, own.phase) != LONG_DO)
        return false;
    own.outcome = LEFT_BEHIND;
    set_phase(LONG_ABANDONED);
    return true;
}

bool long_command_may_store(void)
{
    if (own.phase != LONG_RUNNING)
        return own.phase != LONG_ABANDONED;
    /* Only the thread comes here: who has the lock does not have libtpms in this phase. */
    pthread_mutex_lock(own.lock);
    bool may_store = own.phase == LONG_RUNNING;
    if (may_store)
        set_phase(LONG_COMMITTING);
    pthread_mutex_unlock(own.lock);
    return may_store;
}
