/* A command that may be long, with the real libtpms, held where a test wants it: what is done of
 * each operation in each phase (docs/ARCHITECTURE.md's table against a TPM), and what becomes of
 * the command, its effect and the TPM.
 *
 * Invariant 1: a command that commits is answered only when that is durable.
 * Invariant 3: one that was abandoned changes no file, whatever custody becomes.
 * Invariant 5: the state that is given out is the one from before it, bit by bit.
 */
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>
#include <libtpms/tpm_error.h>

#include "bytes.h"
#include "checkpoint.h"
#include "io_memory.h"
#include "journal.h"
#include "long_command.h"
#include "pages.h"
#include "tpm.h"

enum {
    LINE_BYTES_MAX = 400,
    JOIN_S = 60,
    RC_INITIALIZE = 0x100,   /* before TPM2_Startup */
    RC_REFERENCE_H0 = 0x910, /* there is no such object */
    RC_FLUSH_HANDLE = 0x1cb,
    RC_AUTH_FAIL = 0x98e,
};

#define COMMAND(literal) ((struct command){literal, sizeof(literal) - 1})
#define STARTUP_CLEAR "\x80\x01\0\0\0\x0c\0\0\x01\x44\0\0"
#define GET_RANDOM "\x80\x01\0\0\0\x0c\0\0\x01\x7b\0\x08"
#define SELF_TEST_FULL "\x80\x01\0\0\0\x0b\0\0\x01\x43\1"
#define SELF_TEST_REST "\x80\x01\0\0\0\x0b\0\0\x01\x43\0"
#define PCR_READ_16 "\x80\x01\0\0\0\x14\0\0\x01\x7e\0\0\0\1\0\x0b\3\0\0\1"
#define PCR_EVENT_16                                                                               \
    "\x80\x02\0\0\0\x21\0\0\x01\x3c\0\0\0\x10\0\0\0\x09\x40\0\0\x09\0\0\0\0\0\0\x04"               \
    "abcd"
#define START_SESSION                                                                              \
    "\x80\x01\0\0\0\x2b\0\0\x01\x76\x40\0\0\x07\x40\0\0\x07\0\x10"                                 \
    "sixteen bytes...\0\0\1\0\x10\0\x0b"
/* TPM2_CreatePrimary(owner): an HMAC key, which is quick to make. */
#define CREATE_PRIMARY                                                                             \
    "\x80\x02\0\0\0\x39\0\0\x01\x31\x40\0\0\x01\0\0\0\x09\x40\0\0\x09\0\0\0\0\0"                   \
    "\0\x04\0\0\0\0"                                                                               \
    "\0\x10\0\x08\0\x0b\0\x04\0\x72\0\0\0\x05\0\x0b\0\0"                                           \
    "\0\0\0\0\0\0"
/* The same of an RSA-2048 key. */
#define CREATE_PRIMARY_RSA                                                                         \
    "\x80\x02\0\0\0\x41\0\0\x01\x31\x40\0\0\x01\0\0\0\x09\x40\0\0\x09\0\0\0\0\0"                   \
    "\0\x04\0\0\0\0"                                                                               \
    "\0\x18\0\x01\0\x0b\0\x04\0\x72\0\0\0\x10\0\x14\0\x0b\x08\0\0\0\0\0\0\0"                       \
    "\0\0\0\0\0\0"
/* TPM2_FlushContext of transient objects and the first session, and TPM2_ReadPublic. */
#define HMAC_WITH_WRONG_PASSWORD                                                                   \
    "\x80\x02\0\0\0\x21\0\0\x01\x55\x80\0\0\0\0\0\0\x0a\x40\0\0\x09\0\0\0\0\1x"                    \
    "\0\1a\0\x0b"
#define FLUSH_FIRST "\x80\x01\0\0\0\x0e\0\0\x01\x65\x80\0\0\0"
#define FLUSH_SECOND "\x80\x01\0\0\0\x0e\0\0\x01\x65\x80\0\0\1"
#define FLUSH_SESSION "\x80\x01\0\0\0\x0e\0\0\x01\x65\x02\0\0\0"
#define READ_CLOCK "\x80\x01\0\0\0\x0a\0\0\x01\x81"
/* Their codes, with too little behind them. */
#define CREATE "\x80\x02\0\0\0\x0a\0\0\x01\x53"
#define CREATE_LOADED "\x80\x02\0\0\0\x0a\0\0\x01\x91"
#define READ_PUBLIC "\x80\x01\0\0\0\x0e\0\0\x01\x73\x80\0\0\0"

struct command {
    const char *bytes;
    size_t n_bytes;
};

/* Where a command can be held: before libtpms has it, or when what it changes is to be stored. */
enum place {
    NOWHERE,
    IN_LIBRARY,
    IN_STORAGE,
};

static struct io_memory io;
static struct io real_io;
static struct store *own_store, *store;
static struct tpm *tpm;
static _Atomic enum place held_at;
static sem_t is_there, may_go_on;
/* Of the thread that tries an operation. */
static _Thread_local bool is_trying;
static sem_t has_paused; /* it waits, or is done */
static atomic_bool waits;
static atomic_int n_main_inits, n_get_states;

static void hold(enum place place)
{
    if (held_at != place || is_trying)
        return;
    held_at = NOWHERE;
    sem_post(&is_there);
    while (sem_wait(&may_go_on) < 0) {
    }
}

/* What takes a library's place. */

TPM_RESULT TPMLIB_Process(unsigned char **response, uint32_t *response_bytes,
                          uint32_t *allocated_bytes, unsigned char *command, uint32_t command_bytes)
{
    static TPM_RESULT (*real)(unsigned char **, uint32_t *, uint32_t *, unsigned char *, uint32_t);

    *(void **)&real = dlsym(RTLD_NEXT, "TPMLIB_Process");
    hold(IN_LIBRARY);
    return real(response, response_bytes, allocated_bytes, command, command_bytes);
}

static atomic_bool starts_fail;

TPM_RESULT TPMLIB_MainInit(void)
{
    TPM_RESULT (*real)(void);

    *(void **)&real = dlsym(RTLD_NEXT, "TPMLIB_MainInit");
    n_main_inits++;
    return starts_fail ? TPM_FAIL : real();
}

static bool states_are_refused;

TPM_RESULT TPMLIB_SetState(enum TPMLIB_StateType type, const unsigned char *bytes, uint32_t n_bytes)
{
    TPM_RESULT (*real)(enum TPMLIB_StateType, const unsigned char *, uint32_t);

    *(void **)&real = dlsym(RTLD_NEXT, "TPMLIB_SetState");
    return real(type, bytes, states_are_refused ? 1 : n_bytes);
}

static struct given {
    uint8_t bytes[IMAGE_BYTES_MAX];
    size_t n_bytes;
} given[IMAGE_TYPE_MAX + 1]; /* what libtpms gave out last */

TPM_RESULT TPMLIB_GetState(enum TPMLIB_StateType type, unsigned char **bytes, uint32_t *n_bytes)
{
    TPM_RESULT (*real)(enum TPMLIB_StateType, unsigned char **, uint32_t *);

    *(void **)&real = dlsym(RTLD_NEXT, "TPMLIB_GetState");
    n_get_states++;
    TPM_RESULT result = states_are_refused ? TPM_FAIL : real(type, bytes, n_bytes);
    if (result == TPM_SUCCESS && type != TPMLIB_STATE_SAVE_STATE) {
        struct given *last =
            &given[type == TPMLIB_STATE_PERMANENT ? LINK_STATE_PERMANENT : LINK_STATE_VOLATILE];
        assert_true(*n_bytes <= sizeof(last->bytes));
        memcpy(last->bytes, *bytes, *n_bytes);
        last->n_bytes = *n_bytes;
    }
    return result;
}

int __real_pthread_cond_wait(pthread_cond_t *condition, pthread_mutex_t *mutex);

/* By the linker (meson.build), as what follows. */
int __wrap_pthread_cond_wait(pthread_cond_t *condition, pthread_mutex_t *mutex)
{
    if (is_trying && !waits) {
        waits = true;
        sem_post(&has_paused);
    }
    return __real_pthread_cond_wait(condition, mutex);
}

static atomic_bool time_is_over;

/* Time alone wakes nobody, unless a test says that it is over. */
int __wrap_pthread_cond_timedwait(pthread_cond_t *condition, pthread_mutex_t *mutex,
                                  const struct timespec *until)
{
    (void)until;
    return time_is_over ? ETIMEDOUT : pthread_cond_wait(condition, mutex);
}

static atomic_int time_passed_s;

/* Takes the C library's place: a TPM forgets a wrong password when hours have passed. */
int clock_gettime(clockid_t clock, struct timespec *now)
{
    int (*real)(clockid_t, struct timespec *);

    *(void **)&real = dlsym(RTLD_NEXT, "clock_gettime");
    int r = real(clock, now);
    now->tv_sec += time_passed_s;
    return r;
}

static int create_held(struct io *seam, const char *name)
{
    hold(IN_STORAGE);
    return real_io.create(seam, name);
}

static uint32_t execute(struct command command, struct tpm_response *response)
{
    uint8_t *bytes = malloc(command.n_bytes);

    assert_non_null(bytes);
    memcpy(bytes, command.bytes, command.n_bytes);
    tpm_execute(tpm, bytes, command.n_bytes, response);
    free(bytes);
    assert_int_equal(get_be32(response->bytes + TPM_AT_SIZE), response->n_bytes);
    return get_be32(response->bytes + TPM_AT_CODE);
}

static uint32_t code_of(struct command command)
{
    struct tpm_response response;

    tpm_response_init(&response);
    uint32_t code = execute(command, &response);
    tpm_response_deinit(&response);
    return code;
}

#define EXECUTE(literal) code_of(COMMAND(literal))

static int set_up(void **state)
{
    (void)state;
    held_at = NOWHERE;
    time_is_over = false;
    sem_init(&is_there, 0, 0);
    sem_init(&may_go_on, 0, 0);
    sem_init(&has_paused, 0, 0);
    io_memory_init(&io);
    real_io = io.io;
    io.io.create = create_held;
    tpm = tpm_new(&io.io);
    assert_int_equal(store_new(&own_store), 0);
    assert_int_equal(store_map(&store, store_fd(own_store), true), 0);
    assert_int_equal(tpm_start_long_commands(tpm), 0);
    assert_int_equal(tpm_init(tpm, false), TPM_SUCCESS);
    assert_int_equal(EXECUTE(STARTUP_CLEAR), 0);
    assert_int_equal(tpm_arm(tpm, true), TPM_SUCCESS);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    tpm_free(tpm);
    store_free(store);
    store_free(own_store);
    io_memory_deinit(&io);
    return 0;
}

/* The next command, whatever it is, has one try less to remember. */
static void have_the_next_command_commit(void)
{
    assert_int_equal(EXECUTE(CREATE_PRIMARY), 0);
    while (EXECUTE(HMAC_WITH_WRONG_PASSWORD) != RC_AUTH_FAIL) {
    }
    assert_int_equal(EXECUTE(FLUSH_FIRST), 0);
    time_passed_s += 2 * 60 * 60;
}

/* The guest's command, on the data channel's thread. */
struct guest {
    pthread_t thread;
    struct command command;
    uint32_t code;
};

static void *run_guest(void *argument)
{
    struct guest *guest = argument;

    guest->code = code_of(guest->command);
    return NULL;
}

static void join(pthread_t thread)
{
    struct timespec until;

    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += JOIN_S;
    assert_int_equal(pthread_timedjoin_np(thread, NULL, &until), 0);
}

static void wait_for(sem_t *semaphore)
{
    struct timespec until;

    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += JOIN_S;
    assert_int_equal(sem_timedwait(semaphore, &until), 0);
}

static void begin_at(struct guest *guest, struct command command, enum place place)
{
    held_at = place;
    guest->command = command;
    assert_int_equal(pthread_create(&guest->thread, NULL, run_guest, guest), 0);
    wait_for(&is_there);
}

static uint32_t end(struct guest *guest)
{
    sem_post(&may_go_on);
    join(guest->thread);
    return guest->code;
}

static void wait_until(enum long_phase phase)
{
    while (long_command_phase() != phase)
        sched_yield();
}

/* Have a command abandoned in the middle of libtpms; its thread stays there. */
static void abandon(struct guest *guest, struct command command)
{
    begin_at(guest, command, IN_LIBRARY);
    assert_int_equal(long_command_phase(), LONG_RUNNING);
    tpm_abandon(tpm);
    join(guest->thread);
    assert_int_equal(guest->code, TPM2_RC_RETRY);
    assert_int_equal(long_command_phase(), LONG_ABANDONED);
}

static void run_out(void)
{
    sem_post(&may_go_on);
    wait_until(LONG_SPENT);
}

static TPM_RESULT do_capture(void)
{
    enum link_shutdown said;
    bool worked;

    return tpm_capture(tpm, store, &worked, &said);
}

static TPM_RESULT get_type(enum link_state_type type)
{
    uint8_t *bytes = NULL;
    size_t n_bytes;

    TPM_RESULT result = tpm_get_state(tpm, type, &bytes, &n_bytes);
    free(bytes);
    return result;
}

/* Operations, as the table calls them. */

static TPM_RESULT do_execute(void)
{
    uint32_t code = EXECUTE(GET_RANDOM);

    return code == RC_INITIALIZE ? TPM_SUCCESS : code;
}

static TPM_RESULT do_init(void)
{
    return tpm_init(tpm, false);
}

static TPM_RESULT do_stop(void)
{
    return tpm_stop(tpm);
}

static TPM_RESULT do_stop_fenced(void)
{
    return tpm_stop_fenced(tpm);
}

static TPM_RESULT do_has_state(void)
{
    return tpm_has_state(tpm) ? TPM_SUCCESS : TPM_FAIL;
}

static TPM_RESULT do_retire(void)
{
    tpm_retire(tpm, false);
    return TPM_SUCCESS;
}

static TPM_RESULT do_unretire(void)
{
    return tpm_unretire(tpm);
}

static TPM_RESULT do_get_established(void)
{
    bool established;

    return tpm_get_established(tpm, &established);
}

static TPM_RESULT do_reset_established(void)
{
    return tpm_reset_established(tpm, 3);
}

static TPM_RESULT do_hash_start(void)
{
    return tpm_hash_start(tpm);
}

static TPM_RESULT do_hash_data(void)
{
    return tpm_hash_data(tpm, (const uint8_t *)"", 0);
}

static TPM_RESULT do_hash_end(void)
{
    return tpm_hash_end(tpm);
}

static TPM_RESULT do_cancel(void)
{
    return tpm_cancel(tpm);
}

static TPM_RESULT do_set_locality(void)
{
    return tpm_set_locality(tpm, 0);
}

static TPM_RESULT do_store_volatile(void)
{
    return tpm_store_volatile(tpm);
}

static TPM_RESULT do_get_states(void)
{
    TPM_RESULT result = get_type(LINK_STATE_PERMANENT);

    if (result == TPM_SUCCESS)
        result = get_type(LINK_STATE_VOLATILE);
    assert_int_equal(get_type(LINK_STATE_SAVESTATE), TPM_BLOB_NOT_FOUND);
    return result;
}

static TPM_RESULT do_copy(void)
{
    struct tpm_copy copy;

    TPM_RESULT result = tpm_copy(tpm, &copy);
    tpm_copy_deinit(&copy);
    return result;
}

static TPM_RESULT do_store_permanent(void)
{
    return tpm_store_permanent(tpm);
}

static TPM_RESULT do_get_lineage(void)
{
    struct checkpoint_lineage lineage;

    tpm_get_lineage(tpm, &lineage);
    return TPM_SUCCESS;
}

static TPM_RESULT do_raise_generation(void)
{
    tpm_raise_generation(tpm, store, LINK_STATE_PERMANENT, 1);
    return TPM_SUCCESS;
}

static TPM_RESULT do_run_on(void)
{
    tpm_run_on(tpm);
    return TPM_SUCCESS;
}

static TPM_RESULT do_get_info(void)
{
    char *info = tpm_get_info(tpm, 1);

    free(info);
    return info ? TPM_SUCCESS : TPM_FAIL;
}

static TPM_RESULT do_arm(void)
{
    return tpm_arm(tpm, true);
}

static TPM_RESULT do_abandon(void)
{
    tpm_abandon(tpm);
    return TPM_SUCCESS;
}

static const struct operation {
    const char *name;
    TPM_RESULT (*function)(void);
    bool stops; /* with TPM2_Shutdown, which needs the TPM itself */
    int main_inits, get_states;
    enum tpm_operation operation; /* of what asks for states: which it gets shows, not the letter */
} operations[] = {
    {"EXECUTE", do_execute},
    {"INIT", do_init, .stops = true, .main_inits = 1},
    {"STOP", do_stop, .stops = true},
    {"STOP_FENCED", do_stop_fenced, .stops = true},
    {"HAS_STATE", do_has_state},
    {"RETIRE", do_retire},
    {"UNRETIRE", do_unretire},
    {"GET_ESTABLISHED", do_get_established},
    {"RESET_ESTABLISHED", do_reset_established},
    {"HASH_START", do_hash_start},
    {"HASH_DATA", do_hash_data},
    {"HASH_END", do_hash_end},
    {"CANCEL", do_cancel},
    {"SET_LOCALITY", do_set_locality},
    {"STORE_VOLATILE", do_store_volatile},
    {"GET_STATE", do_get_states, .get_states = 3, .operation = OP_GET_PERMANENT},
    {"CAPTURE", do_capture, .get_states = 2, .operation = OP_CAPTURE},
    {"COPY", do_copy, .get_states = 1, .operation = OP_COPY},
    {"STORE_PERMANENT", do_store_permanent},
    {"GET_LINEAGE", do_get_lineage},
    {"RAISE_GENERATION", do_raise_generation},
    {"RUN_ON", do_run_on},
    {"GET_INFO", do_get_info},
    {"ARM", do_arm},
    {"ABANDON", do_abandon},
};

/* Find the row that has an operation among its names, and return its letters. */
static void read_row(const char *operation, char letters[LONG_PHASES + 1])
{
    static const char header[] = "| operation of a TPM that is on | idle";
    char line[LINE_BYTES_MAX], cell[LINE_BYTES_MAX], name[64];
    bool is_in_table = false;

    FILE *file = fopen(ARCHITECTURE, "r");
    assert_non_null(file);
    snprintf(name, sizeof(name), " %s,", operation);
    letters[0] = 0;
    while (fgets(line, sizeof(line), file)) {
        is_in_table |= strncmp(line, header, strlen(header)) == 0;
        is_in_table &= *line != '\n';
        if (!is_in_table || sscanf(line, "|%[^|]|", cell) != 1)
            continue;
        cell[strlen(cell) - 1] = ','; /* as after each name but the last */
        if (!strstr(cell, name))
            continue;
        assert_int_equal(letters[0], 0);
        sscanf(strchr(line, '`'), "`%c %c %c %c %c`", &letters[0], &letters[1], &letters[2],
               &letters[3], &letters[4]);
    }
    fclose(file);
    letters[LONG_PHASES] = 0;
    if (!letters[0])
        fail_msg("%s has no row for %s", ARCHITECTURE, operation);
}

static void enter(enum long_phase phase, struct guest *guest)
{
    switch (phase) {
    case LONG_RUNNING:
        begin_at(guest, COMMAND(CREATE_PRIMARY), IN_LIBRARY);
        break;
    case LONG_COMMITTING:
        have_the_next_command_commit();
        begin_at(guest, COMMAND(CREATE_PRIMARY), IN_STORAGE);
        break;
    case LONG_ABANDONED:
        abandon(guest, COMMAND(CREATE_PRIMARY));
        break;
    case LONG_SPENT:
        abandon(guest, COMMAND(CREATE_PRIMARY));
        run_out();
        break;
    default:
        break;
    }
    assert_int_equal(long_command_phase(), phase);
}

/* An operation that is tried, on a thread that may wait. */
struct trial {
    pthread_t thread;
    const struct operation *operation;
    TPM_RESULT result;
};

static void *run_trial(void *argument)
{
    struct trial *trial = argument;

    is_trying = true;
    trial->result = trial->operation->function();
    sem_post(&has_paused);
    return NULL;
}

static char verdict_seen(const struct operation *operation, enum long_phase phase)
{
    if (waits)
        return LONG_WAIT;
    if (operation->function == do_abandon)
        return long_command_phase() == phase ? LONG_NOTHING : LONG_DO;
    if (operation->get_states > 0 && n_get_states == 0)
        return LONG_SAVED;
    return n_main_inits > operation->main_inits && !operation->stops ? LONG_TAKE_BACK : LONG_DO;
}

static void try_cell(const struct operation *operation, enum long_phase phase, char expected)
{
    struct trial trial = {.operation = operation};
    struct guest guest;

    set_up(NULL);
    enter(phase, &guest);
    waits = false;
    n_main_inits = n_get_states = 0;
    assert_int_equal(pthread_create(&trial.thread, NULL, run_trial, &trial), 0);
    wait_for(&has_paused);
    char seen = verdict_seen(operation, phase);
    if (seen != expected)
        fail_msg("%s in phase %d: %c, not %c", operation->name, phase, seen, expected);
    bool is_taken_back = n_main_inits > operation->main_inits;
    assert_int_equal(is_taken_back,
                     phase == LONG_SPENT && (expected == LONG_TAKE_BACK || operation->stops));
    if (phase == LONG_RUNNING || phase == LONG_COMMITTING) {
        bool is_abandoned = operation->function == do_abandon && expected == LONG_DO;
        assert_int_equal(end(&guest), is_abandoned ? TPM2_RC_RETRY : 0);
    } else if (phase == LONG_ABANDONED) {
        sem_post(&may_go_on);
    }
    join(trial.thread);
    assert_int_equal(trial.result, TPM_SUCCESS);
    tear_down(NULL);
}

static void every_operation_in_every_phase_is_as_the_table_says(void **state)
{
    char letters[LONG_PHASES + 1];

    (void)state;
    for (size_t i = 0; i < sizeof(operations) / sizeof(*operations); i++) {
        read_row(operations[i].name, letters);
        for (enum long_phase phase = LONG_IDLE; phase < LONG_PHASES; phase++) {
            if (operations[i].get_states > 0)
                assert_int_equal(long_verdict(operations[i].operation, phase), letters[phase]);
            try_cell(&operations[i], phase, letters[phase]);
        }
    }
}

static void only_what_may_be_long_runs_apart_and_only_while_armed(void **state)
{
    static const struct {
        struct command command;
        bool is_armed, is_apart;
    } cases[] = {
        {COMMAND(CREATE_PRIMARY), true, true},  {COMMAND(CREATE_PRIMARY), false, false},
        {COMMAND(SELF_TEST_FULL), true, true},  {COMMAND(SELF_TEST_FULL), false, false},
        {COMMAND(SELF_TEST_REST), true, false}, {COMMAND(GET_RANDOM), true, false},
        {COMMAND(STARTUP_CLEAR), true, false},  {COMMAND(PCR_EVENT_16), true, false},
        {COMMAND(CREATE), true, true},          {COMMAND(CREATE_LOADED), true, true},
    };

    (void)state;
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        assert_int_equal(tpm_arm(tpm, cases[i].is_armed), TPM_SUCCESS);
        n_get_states = 0;
        code_of(cases[i].command);
        assert_int_equal(n_get_states > 0, cases[i].is_apart);
    }
}

static void without_its_thread_a_tpm_cannot_be_armed(void **state)
{
    (void)state;
    tpm_free(tpm);
    tpm = tpm_new(&io.io);
    assert_int_equal(tpm_arm(tpm, true), TPM_BAD_ORDINAL);
    assert_int_equal(tpm_arm(tpm, false), TPM_SUCCESS);
}

static bool is_captured(enum link_state_type type)
{
    uint8_t *image = malloc(IMAGE_BYTES_MAX);
    uint64_t generation;
    size_t n_image;

    assert_non_null(image);
    assert_int_equal(store_read(store, type, image, &n_image, &generation), 0);
    bool is_so = n_image == given[type].n_bytes && !memcmp(image, given[type].bytes, n_image);
    free(image);
    return is_so;
}

static bool is_given_out(enum link_state_type type)
{
    uint8_t *bytes;
    size_t n_bytes;

    assert_int_equal(tpm_get_state(tpm, type, &bytes, &n_bytes), TPM_SUCCESS);
    bool is_so = n_bytes == given[type].n_bytes && !memcmp(bytes, given[type].bytes, n_bytes);
    free(bytes);
    return is_so;
}

static void invariant_5_the_state_is_the_one_from_before_an_abandoned_command(void **state)
{
    struct guest guest;

    (void)state;
    assert_int_equal(EXECUTE(PCR_EVENT_16), 0);
    abandon(&guest, COMMAND(CREATE_PRIMARY_RSA));
    for (int i = 0; i < 2; i++) {
        assert_true(is_given_out(LINK_STATE_PERMANENT));
        assert_true(is_given_out(LINK_STATE_VOLATILE));
        assert_int_equal(do_capture(), TPM_SUCCESS);
        assert_true(is_captured(LINK_STATE_PERMANENT));
        assert_true(is_captured(LINK_STATE_VOLATILE));
        if (i == 0)
            run_out();
    }
}

static void a_capture_beside_a_command_that_runs_is_not_the_last_one(void **state)
{
    enum link_shutdown said;
    struct guest guest;
    bool worked;

    (void)state;
    begin_at(&guest, COMMAND(CREATE_PRIMARY), IN_LIBRARY);
    assert_int_equal(tpm_capture(tpm, store, &worked, &said), TPM_SUCCESS);
    assert_true(worked);
    assert_int_equal(tpm_capture(tpm, store, &worked, &said), TPM_SUCCESS);
    assert_false(worked);
    assert_true(tpm_has_worked(tpm));
    assert_int_equal(end(&guest), 0);
    assert_int_equal(tpm_retire(tpm, false), TPM_FAIL);
    assert_int_equal(tpm_capture(tpm, store, &worked, &said), TPM_SUCCESS);
    assert_true(worked);
    assert_int_equal(tpm_retire(tpm, false), TPM_SUCCESS);
}

static void an_abandoned_command_is_none_that_has_worked(void **state)
{
    struct guest guest;

    (void)state;
    assert_int_equal(EXECUTE(GET_RANDOM), 0);
    abandon(&guest, COMMAND(CREATE_PRIMARY));
    assert_true(tpm_has_worked(tpm)); /* what ran before it was not captured */
    run_out();
    assert_int_equal(EXECUTE(GET_RANDOM), 0);
    assert_int_equal(do_capture(), TPM_SUCCESS);
    abandon(&guest, COMMAND(CREATE_PRIMARY));
    assert_false(tpm_has_worked(tpm));
    assert_int_equal(tpm_retire(tpm, false), TPM_SUCCESS);
    run_out();
}

static TPM_RESULT do_init_come(void)
{
    return tpm_init(tpm, true);
}

static void invariant_3_a_start_that_waits_does_not_end_a_retirement_if_it_fails(void **state)
{
    struct operation operation = {"INIT, came", do_init_come};
    struct trial trial = {.operation = &operation};
    struct guest guest;

    (void)state;
    abandon(&guest, COMMAND(CREATE_PRIMARY));
    waits = false;
    assert_int_equal(pthread_create(&trial.thread, NULL, run_trial, &trial), 0);
    wait_for(&has_paused);
    assert_true(waits);
    assert_int_equal(do_capture(), TPM_SUCCESS);
    assert_int_equal(tpm_retire(tpm, false), TPM_SUCCESS);
    starts_fail = true;
    sem_post(&may_go_on);
    join(trial.thread);
    starts_fail = false;
    assert_int_equal(trial.result, TPM_FAIL);
    assert_int_equal(tpm_init(tpm, false), TPM_FAIL); /* it is another host's */
}

static void a_guest_goes_on_from_before_an_abandoned_command(void **state)
{
    struct tpm_response first, second;
    struct guest guest;
    bool established;

    (void)state;
    tpm_response_init(&first);
    tpm_response_init(&second);
    assert_int_equal(tpm_hash_start(tpm), TPM_SUCCESS); /* sets the established bit */
    assert_int_equal(tpm_hash_end(tpm), TPM_SUCCESS);
    assert_int_equal(EXECUTE(STARTUP_CLEAR), RC_INITIALIZE);
    assert_int_equal(EXECUTE(PCR_EVENT_16), 0);
    assert_int_equal(EXECUTE(START_SESSION), 0);
    assert_int_equal(EXECUTE(CREATE_PRIMARY), 0);
    assert_int_equal(execute(COMMAND(READ_PUBLIC), &first), 0);
    abandon(&guest, COMMAND(CREATE_PRIMARY_RSA));
    run_out();
    assert_int_equal(execute(COMMAND(READ_PUBLIC), &second), 0);
    assert_int_equal(long_command_phase(), LONG_IDLE);
    assert_int_equal(second.n_bytes, first.n_bytes);
    assert_memory_equal(second.bytes, first.bytes, first.n_bytes);
    assert_int_equal(EXECUTE(FLUSH_SECOND), RC_FLUSH_HANDLE); /* the abandoned one made none */
    assert_int_equal(EXECUTE(FLUSH_SESSION), 0);
    assert_int_equal(tpm_get_established(tpm, &established), TPM_SUCCESS);
    assert_true(established);
    assert_int_equal(EXECUTE(CREATE_PRIMARY_RSA), 0);
    assert_int_equal(EXECUTE(FLUSH_SECOND), 0);
    tpm_response_deinit(&first);
    tpm_response_deinit(&second);
}

static const uint8_t *durable_file(size_t *n_bytes)
{
    const uint8_t *bytes;

    assert_true(io_memory_read_durable(&io, "tpm2-00.permall", &bytes, n_bytes));
    return bytes;
}

/* Whose commit is under way is not abandoned, and its response is that of a durable change. */
static void invariant_1_a_command_that_commits_is_done(void **state)
{
    struct guest guest;
    size_t n_bytes;

    (void)state;
    have_the_next_command_commit();
    const uint8_t *before = durable_file(&n_bytes);
    begin_at(&guest, COMMAND(CREATE_PRIMARY), IN_STORAGE);
    tpm_abandon(tpm);
    assert_int_equal(long_command_phase(), LONG_COMMITTING);
    assert_ptr_equal(durable_file(&n_bytes), before);
    assert_int_equal(end(&guest), 0);
    assert_ptr_not_equal(durable_file(&n_bytes), before);
    assert_int_equal(EXECUTE(READ_PUBLIC), 0);
}

static void abandon_what_would_commit(struct guest *guest)
{
    have_the_next_command_commit();
    abandon(guest, COMMAND(CREATE_PRIMARY));
    io.calls = 0;
}

static void invariant_3_an_abandoned_command_writes_nothing(void **state)
{
    struct guest guest;

    (void)state;
    abandon_what_would_commit(&guest);
    run_out();
    assert_int_equal(io.calls, 0);
    assert_int_equal(EXECUTE(READ_PUBLIC), RC_REFERENCE_H0);
    assert_int_not_equal(EXECUTE(CREATE_PRIMARY), TPM2_RC_FAILURE);
}

static void invariant_3_a_vtpm_that_moves_in_the_middle_of_a_command_leaves_no_trace(void **state)
{
    struct guest guest;

    (void)state;
    abandon_what_would_commit(&guest);
    assert_int_equal(do_capture(), TPM_SUCCESS);
    assert_int_equal(tpm_retire(tpm, false), TPM_SUCCESS);
    assert_int_equal(EXECUTE(GET_RANDOM), TPM2_RC_FAILURE);
    run_out();
    assert_int_equal(EXECUTE(GET_RANDOM), TPM2_RC_FAILURE);
    tpm_stop(tpm);
    assert_int_equal(io.calls, 0);
}

static void a_vtpm_that_comes_back_goes_on_from_before_the_command(void **state)
{
    struct guest guest;

    (void)state;
    assert_int_equal(EXECUTE(CREATE_PRIMARY), 0);
    abandon(&guest, COMMAND(CREATE_PRIMARY));
    assert_int_equal(do_capture(), TPM_SUCCESS);
    assert_int_equal(tpm_retire(tpm, false), TPM_SUCCESS);
    assert_int_equal(tpm_await(tpm, true), TPM_SUCCESS);
    run_out();
    assert_int_equal(tpm_unretire(tpm), TPM_SUCCESS);
    assert_int_equal(EXECUTE(READ_PUBLIC), 0);
    assert_int_equal(EXECUTE(FLUSH_SECOND), RC_FLUSH_HANDLE);
}

static void commands_wait_for_an_abandoned_one_only_so_long(void **state)
{
    struct guest guest;

    (void)state;
    abandon(&guest, COMMAND(CREATE_PRIMARY));
    time_is_over = true;
    assert_int_equal(EXECUTE(GET_RANDOM), TPM2_RC_RETRY);
    run_out();
    assert_int_equal(EXECUTE(GET_RANDOM), 0);
}

static void a_state_that_cannot_be_gone_back_to_is_not_gone_on_from(void **state)
{
    struct guest guest;

    (void)state;
    assert_int_equal(EXECUTE(PCR_EVENT_16), 0);
    abandon(&guest, COMMAND(CREATE_PRIMARY));
    run_out();
    states_are_refused = true;
    assert_int_equal(EXECUTE(PCR_READ_16), TPM2_RC_FAILURE);
    states_are_refused = false;
    assert_int_equal(EXECUTE(PCR_READ_16), TPM2_RC_FAILURE);
    assert_int_equal(tpm_init(tpm, false), TPM_SUCCESS);
    assert_int_equal(EXECUTE(STARTUP_CLEAR), 0);
}

static void a_guest_that_is_reset_meanwhile_finds_a_clean_tpm(void **state)
{
    struct guest guest;

    (void)state;
    abandon(&guest, COMMAND(CREATE_PRIMARY));
    run_out();
    assert_int_equal(tpm_init(tpm, false), TPM_SUCCESS);
    assert_int_equal(EXECUTE(STARTUP_CLEAR), 0);
    assert_int_equal(EXECUTE(READ_PUBLIC), RC_REFERENCE_H0);
    assert_int_equal(EXECUTE(READ_CLOCK), 0);
    abandon(&guest, COMMAND(CREATE_PRIMARY)); /* still armed */
    run_out();
}

static void no_command_is_left_behind_without_a_state_to_go_back_to(void **state)
{
    (void)state;
    states_are_refused = true;
    assert_int_equal(EXECUTE(CREATE_PRIMARY), 0);
    assert_int_equal(long_command_phase(), LONG_IDLE);
    states_are_refused = false;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_operation_in_every_phase_is_as_the_table_says),
#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)
        TEST(only_what_may_be_long_runs_apart_and_only_while_armed),
        TEST(without_its_thread_a_tpm_cannot_be_armed),
        TEST(invariant_5_the_state_is_the_one_from_before_an_abandoned_command),
        TEST(a_capture_beside_a_command_that_runs_is_not_the_last_one),
        TEST(an_abandoned_command_is_none_that_has_worked),
        TEST(invariant_3_a_start_that_waits_does_not_end_a_retirement_if_it_fails),
        TEST(a_guest_goes_on_from_before_an_abandoned_command),
        TEST(invariant_1_a_command_that_commits_is_done),
        TEST(invariant_3_an_abandoned_command_writes_nothing),
        TEST(invariant_3_a_vtpm_that_moves_in_the_middle_of_a_command_leaves_no_trace),
        TEST(a_vtpm_that_comes_back_goes_on_from_before_the_command),
        TEST(commands_wait_for_an_abandoned_one_only_so_long),
        TEST(a_state_that_cannot_be_gone_back_to_is_not_gone_on_from),
        TEST(a_guest_that_is_reset_meanwhile_finds_a_clean_tpm),
        TEST(no_command_is_left_behind_without_a_state_to_go_back_to),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
