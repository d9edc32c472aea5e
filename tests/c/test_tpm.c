/* The engine's TPM on a file system that fails and loses power, with the real libtpms.
 *
 * Invariant 1: a response to a command that changed NV leaves only after the change is durable.
 * Invariant 2: never a fresh TPM in place of a damaged one.
 * Invariant 5: a state that was taken out and put in is bit-exact.
 */
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>
#include <libtpms/tpm_error.h>

#include "bytes.h"
#include "checkpoint.h"
#include "io_memory.h"
#include "nvram.h"
#include "pages.h"
#include "state_directory.h"
#include "tpm.h"

static struct io_memory io;
static struct tpm *tpm;
static struct tpm_response response;

static int set_up(void **state)
{
    (void)state;
    io_memory_init(&io);
    tpm = tpm_new(&io.io);
    tpm_response_init(&response);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    io.fail_from = 0;
    tpm_response_deinit(&response);
    tpm_free(tpm);
    io_memory_deinit(&io);
    return 0;
}

/* Execute a command and return its response code. */
static uint32_t execute(const char *bytes, size_t n_bytes)
{
    uint8_t command[TPM_COMMAND_BYTES_MAX];

    memcpy(command, bytes, n_bytes);
    tpm_execute(tpm, command, n_bytes, &response);
    assert_true(response.n_bytes >= TPM_HEADER_BYTES);
    assert_int_equal(get_be32(response.bytes + 2), response.n_bytes);
    return get_be32(response.bytes + 6);
}

#define EXECUTE(literal) execute(literal, sizeof(literal) - 1)
#define STARTUP_CLEAR "\x80\x01\0\0\0\x0c\0\0\x01\x44\0\0"
#define STARTUP_STATE "\x80\x01\0\0\0\x0c\0\0\x01\x44\0\1"
#define READ_CLOCK "\x80\x01\0\0\0\x0a\0\0\x01\x81"
#define GET_RANDOM "\x80\x01\0\0\0\x0c\0\0\x01\x7b\0\x08"
#define PCR_READ_16 "\x80\x01\0\0\0\x14\0\0\x01\x7e\0\0\0\1\0\x0b\3\0\0\1"
#define PCR_EVENT_16                                                                               \
    "\x80\x02\0\0\0\x21\0\0\x01\x3c\0\0\0\x10\0\0\0\x09\x40\0\0\x09\0\0\0\0\0\0\x04"               \
    "abcd"
/* TPM2_HierarchyChangeAuth(lockout): writes NV, and needs no object. */
#define CHANGE_LOCKOUT_AUTH                                                                        \
    "\x80\x02\0\0\0\x24\0\0\x01\x29\x40\0\0\x0a\0\0\0\x09\x40\0\0\x09\0\0\0\0\0\0\x07"             \
    "secret!"

static void start(void)
{
    assert_int_equal(tpm_init(tpm, 0), TPM_SUCCESS);
    assert_int_equal(EXECUTE(STARTUP_CLEAR), 0);
}

static void read_pcr(uint8_t *digest)
{
    assert_int_equal(EXECUTE(PCR_READ_16), 0);
    assert_true(response.n_bytes >= 32);
    memcpy(digest, response.bytes + response.n_bytes - 32, 32);
}

static bool clock_is_safe(void)
{
    assert_int_equal(EXECUTE(READ_CLOCK), 0);
    return response.bytes[34];
}

static void restart_from_durable_state(void)
{
    const uint8_t *bytes;
    size_t n_bytes;

    tpm_stop(tpm);
    assert_true(io_memory_read_durable(&io, "tpm2-00.permall", &bytes, &n_bytes));
    assert_int_equal(nvram_load(LINK_STATE_PERMANENT, bytes + CHECKPOINT_HEADER_BYTES,
                                n_bytes - CHECKPOINT_HEADER_BYTES),
                     0);
}

static void a_stopped_tpm_answers_failure(void **state)
{
    (void)state;
    assert_int_equal(EXECUTE(GET_RANDOM), TPM2_RC_FAILURE);
}

static void invariant_1_an_acknowledged_change_is_durable(void **state)
{
    (void)state;
    start();
    assert_int_equal(EXECUTE(CHANGE_LOCKOUT_AUTH), 0);
    io.fail_from = 1; /* the power is off: nothing more reaches the disk */
    restart_from_durable_state();
    io.fail_from = 0;
    start();
    /* The old, empty authorisation is refused: TPM_RC_AUTH_FAIL for session 1, or in lockout. */
    uint32_t code = EXECUTE(CHANGE_LOCKOUT_AUTH);
    assert_true(code == 0x98e || code == 0x921);
}

static void invariant_1_a_change_that_cannot_be_stored_is_not_acknowledged(void **state)
{
    (void)state;
    for (int step = 1; step <= 5; step++) {
        start();
        io.calls = 0;
        io.fail_from = step;
        io.fail_error = ENOSPC;
        assert_int_equal(EXECUTE(CHANGE_LOCKOUT_AUTH), TPM2_RC_FAILURE);
        assert_int_equal(EXECUTE(GET_RANDOM), TPM2_RC_FAILURE);
        io.fail_from = 0;
        /* Room was made and the guest restarted: all is well but for the lost change. */
        if (step < 5) {
            start();
            assert_int_equal(EXECUTE(GET_RANDOM), 0);
        }
        tpm_stop(tpm);
    }
}

static void invariant_2_a_damaged_state_never_becomes_a_fresh_tpm(void **state)
{
    uint8_t *bytes;
    size_t n_bytes;

    (void)state;
    start();
    assert_int_equal(tpm_get_state(tpm, LINK_STATE_PERMANENT, &bytes, &n_bytes), TPM_SUCCESS);
    tpm_stop(tpm);
    for (size_t cut = 0; cut < n_bytes; cut += 97) {
        nvram_load(LINK_STATE_PERMANENT, bytes, cut);
        io.calls = 0;
        assert_int_not_equal(tpm_init(tpm, 0), TPM_SUCCESS);
        assert_int_equal(io.calls, 0);
        assert_int_equal(EXECUTE(GET_RANDOM), TPM2_RC_FAILURE);
        /* Nor through the control channel's way in. */
        assert_int_not_equal(tpm_set_state(tpm, LINK_STATE_PERMANENT, bytes, cut), TPM_SUCCESS);
    }
    nvram_load(LINK_STATE_PERMANENT, bytes, n_bytes);
    assert_int_equal(tpm_init(tpm, 0), TPM_SUCCESS);
    free(bytes);
}

static void invariant_5_a_moved_state_is_bit_exact(void **state)
{
    uint8_t *moved[4] = {0}, *again, before[32], after[32];
    size_t n_moved[4], n_again;

    (void)state;
    start();
    assert_int_equal(EXECUTE(PCR_EVENT_16), 0);
    read_pcr(before);
    for (int type = LINK_STATE_PERMANENT; type <= LINK_STATE_VOLATILE; type++)
        assert_int_equal(tpm_get_state(tpm, type, &moved[type], &n_moved[type]), TPM_SUCCESS);
    assert_int_equal(tpm_get_state(tpm, LINK_STATE_SAVESTATE, &moved[3], &n_moved[3]),
                     TPM_BLOB_NOT_FOUND);
    tpm_stop(tpm);
    for (int type = LINK_STATE_PERMANENT; type <= LINK_STATE_VOLATILE; type++)
        assert_int_equal(tpm_set_state(tpm, type, moved[type], n_moved[type]), TPM_SUCCESS);
    assert_int_equal(tpm_init(tpm, 0), TPM_SUCCESS);
    assert_int_equal(tpm_get_state(tpm, LINK_STATE_PERMANENT, &again, &n_again), TPM_SUCCESS);
    assert_int_equal(n_again, n_moved[LINK_STATE_PERMANENT]);
    assert_memory_equal(again, moved[LINK_STATE_PERMANENT], n_again);
    read_pcr(after);
    assert_memory_equal(before, after, sizeof(before));
    free(again);
    for (int type = LINK_STATE_PERMANENT; type <= LINK_STATE_SAVESTATE; type++)
        free(moved[type]);
}

static void a_stored_volatile_state_resumes_once(void **state)
{
    uint8_t before[32], after[32];
    const uint8_t *bytes;
    size_t n_bytes;

    (void)state;
    start();
    assert_int_equal(EXECUTE(PCR_EVENT_16), 0);
    read_pcr(before);
    assert_int_equal(tpm_store_volatile(tpm), TPM_SUCCESS);
    assert_true(io_memory_read(&io, "tpm2-00.volatilestate", &bytes, &n_bytes));
    assert_int_equal(tpm_init(tpm, 0), TPM_SUCCESS);
    read_pcr(after);
    assert_memory_equal(before, after, sizeof(before));
    /* Else a second crash would bring back PCRs that the guest has extended since. */
    assert_false(io_memory_read(&io, "tpm2-00.volatilestate", &bytes, &n_bytes));
    assert_int_equal(tpm_init(tpm, 0), TPM_SUCCESS);
    assert_int_equal(EXECUTE(PCR_READ_16), 0x100); /* TPM_RC_INITIALIZE: power was off */
}

static void a_stop_is_orderly_for_a_guest_that_was_not(void **state)
{
    (void)state;
    start();
    tpm_stop(tpm);
    start();
    assert_true(clock_is_safe());
    /* PCRs come back only to a guest that asked for it. */
    tpm_stop(tpm);
    assert_int_equal(tpm_init(tpm, 0), TPM_SUCCESS);
    assert_int_not_equal(EXECUTE(STARTUP_STATE), 0);
}

static void commands_in_the_wrong_state_are_refused(void **state)
{
    bool established;
    uint8_t *bytes = NULL;
    uint32_t sizes[3];
    size_t n_bytes;

    (void)state;
    assert_int_equal(tpm_get_established(tpm, &established), TPM_BAD_ORDINAL);
    assert_int_equal(tpm_reset_established(tpm, 3), TPM_BAD_ORDINAL);
    assert_int_equal(tpm_hash_start(tpm), TPM_BAD_ORDINAL);
    assert_int_equal(tpm_hash_data(tpm, (const uint8_t *)"", 0), TPM_BAD_ORDINAL);
    assert_int_equal(tpm_hash_end(tpm), TPM_BAD_ORDINAL);
    assert_int_equal(tpm_store_volatile(tpm), TPM_BAD_ORDINAL);
    assert_int_equal(tpm_cancel(tpm), TPM_BAD_ORDINAL);
    assert_int_equal(tpm_get_state(tpm, LINK_STATE_PERMANENT, &bytes, &n_bytes), TPM_BAD_ORDINAL);
    assert_int_equal(tpm_set_state(tpm, 9, (const uint8_t *)"x", 1), TPM_BAD_PARAMETER);
    start();
    assert_int_equal(tpm_cancel(tpm), TPM_SUCCESS);
    assert_int_equal(tpm_get_state(tpm, 9, &bytes, &n_bytes), TPM_BAD_PARAMETER);
    assert_int_equal(tpm_set_state(tpm, LINK_STATE_PERMANENT, (const uint8_t *)"x", 1),
                     TPM_BAD_ORDINAL);
    assert_int_equal(tpm_set_buffer_size(tpm, 3000, sizes), TPM_BAD_ORDINAL);
    assert_int_equal(tpm_set_buffer_size(tpm, 0, sizes), TPM_SUCCESS);
    assert_true(sizes[1] <= sizes[0] && sizes[0] <= sizes[2]);
    assert_int_equal(tpm_set_locality(tpm, 5), TPM_BAD_LOCALITY);
    assert_int_equal(tpm_set_locality(tpm, 4), TPM_SUCCESS);
    assert_int_equal(tpm_set_locality(tpm, 0), TPM_SUCCESS);
    assert_int_equal(tpm_reset_established(tpm, 5), TPM_BAD_LOCALITY);
    assert_int_equal(tpm_reset_established(tpm, 0), TPM_BAD_LOCALITY);
}

static void an_h_crtm_event_sets_the_established_bit_until_it_is_reset(void **state)
{
    bool established = true;

    (void)state;
    assert_int_equal(tpm_init(tpm, 0), TPM_SUCCESS);
    assert_int_equal(tpm_get_established(tpm, &established), TPM_SUCCESS);
    assert_false(established);
    assert_int_equal(tpm_hash_start(tpm), TPM_SUCCESS);
    assert_int_equal(tpm_hash_data(tpm, (const uint8_t *)"crtm", 4), TPM_SUCCESS);
    assert_int_equal(tpm_hash_end(tpm), TPM_SUCCESS);
    assert_int_equal(tpm_get_established(tpm, &established), TPM_SUCCESS);
    assert_true(established);
    assert_int_equal(tpm_reset_established(tpm, 3), TPM_SUCCESS);
    assert_int_equal(tpm_get_established(tpm, &established), TPM_SUCCESS);
    assert_false(established);
}

static uint64_t captured(struct store *store, enum link_state_type type, size_t *n_bytes)
{
    uint64_t generation;

    assert_int_equal(store_read(store, type, NULL, n_bytes, &generation), 0);
    return generation;
}

static void a_capture_takes_both_states_and_only_when_something_ran(void **state)
{
    struct store *store;
    size_t n_bytes;
    bool worked;

    (void)state;
    assert_int_equal(store_new(&store), 0);
    struct store *writable;
    assert_int_equal(store_map(&writable, store_fd(store), true), 0);
    assert_int_equal(tpm_capture(tpm, writable, &worked), TPM_BAD_ORDINAL);
    start();
    assert_int_equal(tpm_capture(tpm, writable, &worked), TPM_SUCCESS);
    assert_true(worked);
    assert_int_equal(captured(store, LINK_STATE_PERMANENT, &n_bytes), 1);
    assert_true(n_bytes > 1000);
    assert_int_equal(captured(store, LINK_STATE_VOLATILE, &n_bytes), 1);
    assert_true(n_bytes > 1000);
    assert_int_equal(tpm_capture(tpm, writable, &worked), TPM_SUCCESS);
    assert_false(worked);
    assert_int_equal(EXECUTE(PCR_EVENT_16), 0);
    assert_int_equal(tpm_capture(tpm, writable, &worked), TPM_SUCCESS);
    assert_true(worked);
    assert_int_equal(captured(store, LINK_STATE_VOLATILE, &n_bytes), 2);
    store_free(writable);
    store_free(store);
}

static void invariant_3_a_retired_tpm_serves_nobody_and_stays_as_it_was(void **state)
{
    struct store *store, *writable;
    uint8_t before[32], after[32];
    bool worked;

    (void)state;
    assert_int_equal(store_new(&store), 0);
    assert_int_equal(store_map(&writable, store_fd(store), true), 0);
    start();
    assert_int_equal(EXECUTE(PCR_EVENT_16), 0);
    read_pcr(before);
    assert_int_equal(tpm_retire(tpm, false), TPM_FAIL); /* it was not captured */
    assert_int_equal(tpm_capture(tpm, writable, &worked), TPM_SUCCESS);
    assert_int_equal(EXECUTE(GET_RANDOM), 0);
    assert_int_equal(tpm_retire(tpm, false), TPM_FAIL); /* a command ran since */
    assert_int_equal(tpm_capture(tpm, writable, &worked), TPM_SUCCESS);
    assert_int_equal(tpm_retire(tpm, false), TPM_SUCCESS);

    io.calls = 0;
    assert_int_equal(EXECUTE(GET_RANDOM), TPM2_RC_FAILURE);
    assert_int_equal(EXECUTE(CHANGE_LOCKOUT_AUTH), TPM2_RC_FAILURE);
    assert_int_equal(tpm_hash_start(tpm), TPM_FAIL);
    assert_int_equal(tpm_reset_established(tpm, 3), TPM_FAIL);
    assert_int_equal(tpm_init(tpm, 0), TPM_FAIL);
    assert_int_equal(io.calls, 0);

    assert_int_equal(tpm_unretire(tpm), TPM_SUCCESS);
    read_pcr(after);
    assert_memory_equal(before, after, sizeof(before));

    assert_int_equal(tpm_capture(tpm, writable, &worked), TPM_SUCCESS);
    assert_int_equal(tpm_retire(tpm, false), TPM_SUCCESS);
    assert_int_equal(tpm_init(tpm, LINK_INIT_CAME), TPM_SUCCESS); /* the vTPM has come back */
    assert_int_equal(EXECUTE(STARTUP_CLEAR), 0);
    store_free(writable);
    store_free(store);
}

static void invariant_3_a_tpm_that_served_is_not_given_back(void **state)
{
    uint8_t *moved;
    size_t n_moved;

    (void)state;
    start();
    assert_int_equal(tpm_get_state(tpm, LINK_STATE_PERMANENT, &moved, &n_moved), TPM_SUCCESS);
    assert_int_equal(tpm_retire(tpm, true), TPM_FAIL);
    assert_int_equal(tpm_init(tpm, 0), TPM_SUCCESS); /* a reset of the guest changes nothing */
    assert_int_equal(tpm_retire(tpm, true), TPM_FAIL);
    tpm_stop(tpm);
    assert_int_equal(tpm_retire(tpm, true), TPM_FAIL);
    assert_int_equal(tpm_set_state(tpm, LINK_STATE_PERMANENT, moved, n_moved), TPM_SUCCESS);
    free(moved);
    assert_int_equal(tpm_init(tpm, LINK_INIT_CAME), TPM_SUCCESS);
    assert_int_equal(tpm_retire(tpm, true), TPM_SUCCESS);
    assert_int_equal(EXECUTE(STARTUP_CLEAR), TPM2_RC_FAILURE);
}

static void a_tpm_that_never_started_may_be_given_back(void **state)
{
    (void)state;
    assert_int_equal(tpm_retire(tpm, false), TPM_FAIL);
    assert_int_equal(tpm_retire(tpm, true), TPM_SUCCESS);
    assert_int_equal(tpm_init(tpm, 0), TPM_FAIL);
}

static void a_retired_tpm_stops_without_a_trace(void **state)
{
    struct store *store, *writable;
    bool worked;

    (void)state;
    assert_int_equal(store_new(&store), 0);
    assert_int_equal(store_map(&writable, store_fd(store), true), 0);
    start();
    assert_int_equal(tpm_capture(tpm, writable, &worked), TPM_SUCCESS);
    assert_int_equal(tpm_retire(tpm, false), TPM_SUCCESS);
    io.calls = 0;
    tpm_stop(tpm);
    assert_int_equal(io.calls, 0); /* TPM2_Shutdown would have written */
    store_free(writable);
    store_free(store);
}

static void a_state_that_is_forgotten_is_not_started_from(void **state)
{
    uint8_t *moved, *again;
    size_t n_moved, n_again;

    (void)state;
    start();
    assert_int_equal(tpm_get_state(tpm, LINK_STATE_PERMANENT, &moved, &n_moved), TPM_SUCCESS);
    assert_int_equal(EXECUTE(CHANGE_LOCKOUT_AUTH), 0);
    tpm_stop(tpm);
    assert_int_equal(tpm_set_state(tpm, LINK_STATE_PERMANENT, moved, n_moved), TPM_SUCCESS);
    assert_int_equal(tpm_forget_state(tpm), TPM_SUCCESS);
    start();
    assert_int_equal(tpm_get_state(tpm, LINK_STATE_PERMANENT, &again, &n_again), TPM_SUCCESS);
    uint32_t code = EXECUTE(CHANGE_LOCKOUT_AUTH);
    assert_true(code == 0x98e || code == 0x921); /* the authorisation is the changed one */
    free(moved);
    free(again);
}

struct waiting_command {
    pthread_t thread;
    atomic_bool answered;
    uint32_t code;
};

static void *send_startup(void *argument)
{
    struct waiting_command *command = argument;

    command->code = EXECUTE(STARTUP_CLEAR);
    command->answered = true;
    return NULL;
}

/* Start a TPM from another one's state, held. */
static void start_ahead(void)
{
    uint8_t *moved;
    size_t n_moved;

    start();
    assert_int_equal(EXECUTE(CHANGE_LOCKOUT_AUTH), 0);
    assert_int_equal(tpm_get_state(tpm, LINK_STATE_PERMANENT, &moved, &n_moved), TPM_SUCCESS);
    tpm_stop(tpm);
    assert_int_equal(tpm_set_state(tpm, LINK_STATE_PERMANENT, moved, n_moved), TPM_SUCCESS);
    free(moved);
    io.calls = 0;
    assert_int_equal(tpm_init(tpm, LINK_INIT_CAME | LINK_INIT_HELD), TPM_SUCCESS);
}

/* The same, with a command that waits for it. */
static void start_held(struct waiting_command *command)
{
    start_ahead();
    assert_int_equal(tpm_expect(tpm), TPM_SUCCESS);
    command->answered = false;
    assert_int_equal(pthread_create(&command->thread, NULL, send_startup, command), 0);
    usleep(50000);
}

static void a_tpm_that_is_held_ahead_of_time_answers_as_a_stopped_one(void **state)
{
    bool established;

    (void)state;
    assert_int_equal(tpm_expect(tpm), TPM_BAD_ORDINAL);
    start_ahead();
    assert_int_equal(EXECUTE(STARTUP_CLEAR), TPM2_RC_FAILURE);
    assert_int_equal(tpm_get_established(tpm, &established), TPM_BAD_ORDINAL);
    assert_int_equal(tpm_expect(tpm), TPM_SUCCESS);
    assert_int_equal(tpm_get_established(tpm, &established), TPM_SUCCESS);
    assert_int_equal(io.calls, 0);
    assert_int_equal(tpm_admit(tpm), TPM_SUCCESS);
    assert_int_equal(EXECUTE(STARTUP_CLEAR), 0);
}

static void invariant_3_a_held_tpm_executes_and_writes_nothing_until_it_is_admitted(void **state)
{
    struct waiting_command command;
    uint8_t *held;
    size_t n_held;

    (void)state;
    start_held(&command);
    assert_false(command.answered);
    assert_int_equal(tpm_hash_start(tpm), TPM_BAD_ORDINAL);
    assert_int_equal(tpm_get_state(tpm, LINK_STATE_PERMANENT, &held, &n_held), TPM_BAD_ORDINAL);
    assert_int_equal(io.calls, 0);

    assert_int_equal(tpm_admit(tpm), TPM_SUCCESS);
    pthread_join(command.thread, NULL);
    assert_int_equal(command.code, 0);
    assert_int_equal(tpm_admit(tpm), TPM_BAD_ORDINAL);
}

static void invariant_3_a_held_tpm_that_is_let_go_leaves_no_trace(void **state)
{
    struct waiting_command command;

    (void)state;
    start_held(&command);
    assert_int_equal(tpm_forget_state(tpm), TPM_SUCCESS);
    pthread_join(command.thread, NULL);
    assert_int_equal(command.code, TPM2_RC_FAILURE);
    assert_int_equal(io.calls, 0);
    start(); /* from what the directory has */
}

static void invariant_3_a_held_tpm_that_is_let_go_ends_no_retirement(void **state)
{
    struct store *store, *writable;
    uint8_t *moved;
    size_t n_moved;
    bool worked;

    (void)state;
    assert_int_equal(store_new(&store), 0);
    assert_int_equal(store_map(&writable, store_fd(store), true), 0);
    start();
    assert_int_equal(tpm_get_state(tpm, LINK_STATE_PERMANENT, &moved, &n_moved), TPM_SUCCESS);
    assert_int_equal(tpm_capture(tpm, writable, &worked), TPM_SUCCESS);
    assert_int_equal(tpm_retire(tpm, false), TPM_SUCCESS);
    tpm_stop(tpm);
    for (int i = 0; i < 2; i++) {
        assert_int_equal(tpm_set_state(tpm, LINK_STATE_PERMANENT, moved, n_moved), TPM_SUCCESS);
        assert_int_equal(tpm_init(tpm, LINK_INIT_CAME | LINK_INIT_HELD), TPM_SUCCESS);
        if (i == 0) {
            assert_int_equal(tpm_forget_state(tpm), TPM_SUCCESS);
            assert_int_equal(tpm_init(tpm, 0), TPM_FAIL);
        }
    }
    assert_int_equal(tpm_admit(tpm), TPM_SUCCESS);
    assert_int_equal(EXECUTE(STARTUP_CLEAR), 0);
    free(moved);
    store_free(writable);
    store_free(store);
}

static void a_held_tpm_that_is_retired_serves_nothing(void **state)
{
    struct waiting_command command;

    (void)state;
    start_held(&command);
    assert_int_equal(tpm_retire(tpm, true), TPM_SUCCESS);
    pthread_join(command.thread, NULL);
    assert_int_equal(command.code, TPM2_RC_FAILURE);
    assert_int_equal(io.calls, 0);
}

static void a_commit_that_changes_nothing_writes_nothing(void **state)
{
    (void)state;
    assert_int_equal(tpm_init(tpm, 0), TPM_SUCCESS);
    io.calls = 0;
    assert_int_equal(tpm_init(tpm, 0), TPM_SUCCESS);
    assert_int_equal(io.calls, 0);
    assert_int_equal(tpm_store_permanent(tpm), TPM_SUCCESS);
    assert_int_equal(io.calls, 0);
}

/* With journals: what libtpms really commits, and when. */

static const struct journal_settings journal_settings = {
    .identity = "this vTPM's own.",
    .secret = "a secret of thirty-two bytes....",
    .sealed = true,
    .file_bytes = JOURNAL_BYTES,
};
static struct store *own_store, *writable_store;

static int set_up_journal(void **state)
{
    set_up(state);
    assert_int_equal(store_new(&own_store), 0);
    assert_int_equal(store_map(&writable_store, store_fd(own_store), true), 0);
    assert_int_equal(tpm_set_journal(tpm, &journal_settings, writable_store), TPM_SUCCESS);
    return 0;
}

static int tear_down_journal(void **state)
{
    tear_down(state);
    store_free(writable_store);
    store_free(own_store);
    return 0;
}

/* Lose power, and load what a start would recover. */
static uint8_t lose_power(void)
{
    static uint8_t image[IMAGE_BYTES_MAX];
    static struct io_choices choices;
    struct journal_evidence evidence;
    struct journal_recovery recovery;
    struct io_memory after;

    io_memory_init(&after);
    io_choices_init(&choices);
    io_memory_lose_power(&io, &choices, &after);
    assert_true(state_directory_read(&after, &journal_settings, &evidence));
    state_directory_recover(&evidence, image, &recovery);
    assert_true(journal_may_start(&recovery));
    io_memory_deinit(&after);
    tpm_stop(tpm);
    assert_int_equal(nvram_load(LINK_STATE_PERMANENT, image, recovery.image_bytes), 0);
    return recovery.verdict;
}

static bool has_journal(void)
{
    const uint8_t *bytes;
    size_t n_bytes;

    return io_memory_read(&io, JOURNAL_NAME, &bytes, &n_bytes);
}

static void invariant_1_an_acknowledged_change_is_durable_in_the_journal(void **state)
{
    (void)state;
    start();
    assert_int_equal(EXECUTE(CHANGE_LOCKOUT_AUTH), 0);
    assert_true(has_journal());
    assert_int_equal(lose_power(), JOURNAL_O_WHOLE);
    start();
    uint32_t code = EXECUTE(CHANGE_LOCKOUT_AUTH);
    assert_true(code == 0x98e || code == 0x921);
}

static void a_journal_is_there_while_the_tpm_is_on(void **state)
{
    const uint8_t *bytes;
    size_t n_bytes;

    (void)state;
    assert_int_equal(tpm_init(tpm, 0), TPM_SUCCESS);
    assert_false(has_journal());
    assert_int_equal(EXECUTE(STARTUP_CLEAR), 0);
    assert_true(has_journal());
    assert_int_equal(tpm_set_journal(tpm, &journal_settings, writable_store), TPM_BAD_ORDINAL);
    /* A guest's reset. */
    assert_int_equal(tpm_init(tpm, 0), TPM_SUCCESS);
    assert_false(has_journal());
    assert_int_equal(EXECUTE(STARTUP_CLEAR), 0);
    assert_true(has_journal());
    assert_int_equal(lose_power(), JOURNAL_O_WHOLE);
    assert_false(has_journal());
    /* Swtpm's again: it may be resumed from there. */
    start();
    assert_int_equal(tpm_store_volatile(tpm), TPM_SUCCESS);
    assert_false(has_journal());
    assert_true(io_memory_read_durable(&io, "tpm2-00.permall", &bytes, &n_bytes));
    assert_int_equal(bytes[1], 1);
    assert_int_equal(EXECUTE(CHANGE_LOCKOUT_AUTH), 0);
    assert_true(has_journal());
}

static void invariant_1_a_change_that_cannot_be_appended_is_not_acknowledged(void **state)
{
    (void)state;
    for (int half = 0; half <= 1; half++) {
        start();
        io.fail_from = io.calls + 1 + half;
        io.fail_half = half;
        io.fail_error = ENOSPC;
        assert_int_equal(EXECUTE(CHANGE_LOCKOUT_AUTH), TPM2_RC_FAILURE);
        assert_int_equal(EXECUTE(GET_RANDOM), TPM2_RC_FAILURE);
        io.fail_from = 0;
        /* Room was made and the guest restarted: all is well but for the lost change. */
        start();
        assert_int_equal(EXECUTE(GET_RANDOM), 0);
        lose_power();
    }
    start();
    assert_int_equal(EXECUTE(CHANGE_LOCKOUT_AUTH), 0);
}

static void generations_go_on_from_what_was_used(void **state)
{
    struct journal_evidence evidence;
    struct journal_recovery recovery;
    static uint8_t image[IMAGE_BYTES_MAX];

    (void)state;
    tpm_raise_generation(tpm, writable_store, LINK_STATE_PERMANENT, 5000);
    start();
    assert_int_equal(EXECUTE(CHANGE_LOCKOUT_AUTH), 0);
    assert_true(state_directory_read(&io, &journal_settings, &evidence));
    state_directory_recover(&evidence, image, &recovery);
    assert_in_range(recovery.generation, 5001, 5010);
}

#define TEST(function) cmocka_unit_test_setup_teardown(function, set_up, tear_down)
#define JOURNAL_TEST(function)                                                                     \
    cmocka_unit_test_setup_teardown(function, set_up_journal, tear_down_journal)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(a_stopped_tpm_answers_failure),
        TEST(invariant_1_an_acknowledged_change_is_durable),
        TEST(invariant_1_a_change_that_cannot_be_stored_is_not_acknowledged),
        TEST(invariant_2_a_damaged_state_never_becomes_a_fresh_tpm),
        TEST(invariant_5_a_moved_state_is_bit_exact),
        TEST(a_stored_volatile_state_resumes_once),
        TEST(a_stop_is_orderly_for_a_guest_that_was_not),
        TEST(commands_in_the_wrong_state_are_refused),
        TEST(a_capture_takes_both_states_and_only_when_something_ran),
        TEST(invariant_3_a_retired_tpm_serves_nobody_and_stays_as_it_was),
        TEST(invariant_3_a_tpm_that_served_is_not_given_back),
        TEST(a_tpm_that_never_started_may_be_given_back),
        TEST(a_retired_tpm_stops_without_a_trace),
        TEST(a_state_that_is_forgotten_is_not_started_from),
        TEST(a_tpm_that_is_held_ahead_of_time_answers_as_a_stopped_one),
        TEST(invariant_3_a_held_tpm_executes_and_writes_nothing_until_it_is_admitted),
        TEST(invariant_3_a_held_tpm_that_is_let_go_leaves_no_trace),
        TEST(invariant_3_a_held_tpm_that_is_let_go_ends_no_retirement),
        TEST(a_held_tpm_that_is_retired_serves_nothing),
        TEST(a_commit_that_changes_nothing_writes_nothing),
        JOURNAL_TEST(invariant_1_an_acknowledged_change_is_durable_in_the_journal),
        JOURNAL_TEST(a_journal_is_there_while_the_tpm_is_on),
        JOURNAL_TEST(invariant_1_a_change_that_cannot_be_appended_is_not_acknowledged),
        JOURNAL_TEST(generations_go_on_from_what_was_used),
        TEST(an_h_crtm_event_sets_the_established_bit_until_it_is_reset),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
