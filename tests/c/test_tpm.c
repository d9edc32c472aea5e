/* The engine's TPM on a file system that fails and loses power, with the real libtpms.
 *
 * Invariant 1: a response to a command that changed NV leaves only after the change is durable.
 * Invariant 2: never a fresh TPM in place of a damaged one.
 * Invariant 3: one that is another host's, or not yet this one's, executes and writes nothing.
 * Invariant 5: a state that was taken out and put in is bit-exact.
 * Invariant 12: what the guest's TPM2_Shutdown said holds over a stop, a reset and a move.
 * Invariant 13: a file says of which vTPM the state is that it holds, whatever fails.
 */
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>
#include <libtpms/tpm_error.h>

#include "bytes.h"
#include "checkpoint.h"
#include "digest.h"
#include "io_memory.h"
#include "nvram.h"
#include "orderly.h"
#include "pages.h"
#include "standby.h"
#include "state_directory.h"
#include "tpm.h"

static struct io_memory io;
static struct tpm *tpm;
static struct tpm_response response;
static const struct checkpoint_lineage came = {.identity = "this vTPM's own.", .generation = 9};
static atomic_bool time_stands_still;

static int set_up(void **state)
{
    (void)state;
    time_stands_still = false;
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
    uint8_t *command = malloc(n_bytes);

    assert_non_null(command);
    memcpy(command, bytes, n_bytes);
    tpm_execute(tpm, command, n_bytes, &response);
    free(command);
    assert_true(response.n_bytes >= TPM_HEADER_BYTES);
    assert_int_equal(get_be32(response.bytes + 2), response.n_bytes);
    return get_be32(response.bytes + 6);
}

#define EXECUTE(literal) execute(literal, sizeof(literal) - 1)
#define STARTUP_CLEAR "\x80\x01\0\0\0\x0c\0\0\x01\x44\0\0"
#define STARTUP_STATE "\x80\x01\0\0\0\x0c\0\0\x01\x44\0\1"
#define SHUTDOWN_CLEAR "\x80\x01\0\0\0\x0c\0\0\x01\x45\0\0"
#define SHUTDOWN_STATE "\x80\x01\0\0\0\x0c\0\0\x01\x45\0\1"
#define READ_CLOCK "\x80\x01\0\0\0\x0a\0\0\x01\x81"
#define GET_RANDOM "\x80\x01\0\0\0\x0c\0\0\x01\x7b\0\x08"
#define PCR_READ_16 "\x80\x01\0\0\0\x14\0\0\x01\x7e\0\0\0\1\0\x0b\3\0\0\1"
#define PCR_EVENT_16                                                                               \
    "\x80\x02\0\0\0\x21\0\0\x01\x3c\0\0\0\x10\0\0\0\x09\x40\0\0\x09\0\0\0\0\0\0\x04"               \
    "abcd"
#define PCR_READ_1 "\x80\x01\0\0\0\x14\0\0\x01\x7e\0\0\0\1\0\x0b\3\2\0\0"
#define PCR_EVENT_1                                                                                \
    "\x80\x02\0\0\0\x21\0\0\x01\x3c\0\0\0\1\0\0\0\x09\x40\0\0\x09\0\0\0\0\0\0\x04"                 \
    "abcd"
/* TPM2_PCR_Allocate(SHA-256): TPM2_Shutdown(STATE) is refused from then on. */
#define PCR_ALLOCATE                                                                               \
    "\x80\x02\0\0\0\x25\0\0\x01\x2b\x40\0\0\x0c\0\0\0\x09\x40\0\0\x09\0\0\0\0\0"                   \
    "\0\0\0\1\0\x0b\3\xff\xff\xff"
/* TPM2_StartAuthSession: a policy session, neither salted nor bound. */
#define START_SESSION                                                                              \
    "\x80\x01\0\0\0\x2b\0\0\x01\x76\x40\0\0\x07\x40\0\0\x07\0\x10"                                 \
    "sixteen bytes...\0\0\1\0\x10\0\x0b"
/* TPM2_HierarchyChangeAuth(lockout): writes NV, and needs no object. */
#define CHANGE_LOCKOUT_AUTH                                                                        \
    "\x80\x02\0\0\0\x24\0\0\x01\x29\x40\0\0\x0a\0\0\0\x09\x40\0\0\x09\0\0\0\0\0\0\x07"             \
    "secret!"

static void start(void)
{
    assert_int_equal(tpm_init(tpm, false), TPM_SUCCESS);
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

/* Its volatile state is one that libtpms starts nothing from, and goes with no permanent one. */
static void what_could_not_be_stored_is_not_copied(void **state)
{
    struct tpm_copy copy;

    (void)state;
    start();
    io.fail_from = io.calls + 1;
    assert_int_equal(EXECUTE(CHANGE_LOCKOUT_AUTH), TPM2_RC_FAILURE);
    io.fail_from = 0;
    assert_int_equal(tpm_copy(tpm, &copy), TPM_IOERROR);
    tpm_copy_deinit(&copy);
    start();
    assert_int_equal(tpm_copy(tpm, &copy), TPM_SUCCESS);
    tpm_copy_deinit(&copy);
}

static void invariant_2_a_damaged_state_never_becomes_a_fresh_tpm(void **state)
{
    uint8_t *bytes;
    size_t n_bytes;

    (void)state;
    start();
    assert_int_equal(tpm_get_state(tpm, LINK_STATE_PERMANENT, &bytes, &n_bytes), TPM_SUCCESS);
    assert_int_equal(EXECUTE(GET_RANDOM), 0); /* it runs on here, and is stopped for good */
    tpm_stop(tpm);
    for (size_t cut = 0; cut < n_bytes; cut += 97) {
        nvram_load(LINK_STATE_PERMANENT, bytes, cut);
        io.calls = 0;
        assert_int_not_equal(tpm_init(tpm, false), TPM_SUCCESS);
        assert_int_equal(io.calls, 0);
        assert_int_equal(EXECUTE(GET_RANDOM), TPM2_RC_FAILURE);
        /* Nor through the control channel's way in. */
        assert_int_not_equal(tpm_set_state(tpm, LINK_STATE_PERMANENT, bytes, cut), TPM_SUCCESS);
    }
    nvram_load(LINK_STATE_PERMANENT, bytes, n_bytes);
    assert_int_equal(tpm_init(tpm, false), TPM_SUCCESS);
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
    assert_int_equal(tpm_init(tpm, false), TPM_SUCCESS);
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
    assert_int_equal(tpm_init(tpm, false), TPM_SUCCESS);
    read_pcr(after);
    assert_memory_equal(before, after, sizeof(before));
    /* Else a second crash would bring back PCRs that the guest has extended since. */
    assert_false(io_memory_read(&io, "tpm2-00.volatilestate", &bytes, &n_bytes));
    assert_int_equal(tpm_init(tpm, false), TPM_SUCCESS);
    assert_int_equal(EXECUTE(PCR_READ_16), 0x100); /* TPM_RC_INITIALIZE: power was off */
}

static void a_volatile_state_is_removed_durably_or_not_resumed_from(void **state)
{
    const uint8_t *bytes;
    size_t n_bytes;
    int failures = 0;

    (void)state;
    start();
    assert_int_equal(tpm_store_volatile(tpm), TPM_SUCCESS);
    tpm_stop(tpm);
    /* Every call fails twice: a removal that was not synced is none, also when it is tried again.
     */
    for (int call = 0; call < 20; call++) {
        io.fail_from = io.calls + 1 + call / 2;
        TPM_RESULT result = tpm_init(tpm, false);
        io.fail_from = 0;
        if (result == TPM_SUCCESS)
            break;
        failures++;
        assert_true(io_memory_read_durable(&io, "tpm2-00.volatilestate", &bytes, &n_bytes));
    }
    assert_int_equal(failures, 4); /* the removal, and its sync */
    assert_false(io_memory_read_durable(&io, "tpm2-00.volatilestate", &bytes, &n_bytes));
    assert_int_equal(EXECUTE(PCR_READ_16), 0);
}

static void a_stored_volatile_state_is_not_resumed_from_when_the_guest_went_on(void **state)
{
    const uint8_t *bytes;
    size_t n_bytes;

    (void)state;
    for (int by_hash = 0; by_hash <= 1; by_hash++) {
        start();
        assert_int_equal(tpm_store_volatile(tpm), TPM_SUCCESS);
        assert_true(io_memory_read_durable(&io, "tpm2-00.volatilestate", &bytes, &n_bytes));
        /* What cannot be removed, durably, stands in the way of what would change it. */
        io.fail_error = EIO;
        for (int call = 1; call <= 2; call++) {
            io.fail_from = io.calls + call;
            assert_int_equal(EXECUTE(PCR_EVENT_16), TPM2_RC_RETRY);
            assert_int_equal(tpm_hash_start(tpm), TPM_FAIL);
            assert_true(io_memory_read_durable(&io, "tpm2-00.volatilestate", &bytes, &n_bytes));
        }
        io.fail_from = 0;
        if (by_hash)
            assert_int_equal(tpm_hash_start(tpm), TPM_SUCCESS);
        else
            assert_int_equal(EXECUTE(PCR_EVENT_16), 0);
        assert_false(io_memory_read_durable(&io, "tpm2-00.volatilestate", &bytes, &n_bytes));
        io.calls = 0;
        assert_int_equal(EXECUTE(GET_RANDOM), 0);
        assert_int_equal(io.calls, 0);
        assert_int_equal(tpm_init(tpm, false), TPM_SUCCESS);
        assert_int_equal(EXECUTE(PCR_READ_16), 0x100); /* TPM_RC_INITIALIZE: power was off */
    }
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
    assert_int_equal(tpm_init(tpm, false), TPM_SUCCESS);
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
    assert_int_equal(tpm_init(tpm, false), TPM_SUCCESS);
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
    enum link_shutdown said;
    bool worked;

    (void)state;
    assert_int_equal(store_new(&store), 0);
    struct store *writable;
    assert_int_equal(store_map(&writable, store_fd(store), true), 0);
    assert_int_equal(tpm_capture(tpm, writable, &worked, &said), TPM_BAD_ORDINAL);
    start();
    assert_int_equal(tpm_capture(tpm, writable, &worked, &said), TPM_SUCCESS);
    assert_true(worked);
    assert_int_equal(captured(store, LINK_STATE_PERMANENT, &n_bytes), 1);
    assert_true(n_bytes > 1000);
    assert_int_equal(captured(store, LINK_STATE_VOLATILE, &n_bytes), 1);
    assert_true(n_bytes > 1000);
    assert_int_equal(tpm_capture(tpm, writable, &worked, &said), TPM_SUCCESS);
    assert_false(worked);
    assert_int_equal(EXECUTE(PCR_EVENT_16), 0);
    assert_int_equal(tpm_capture(tpm, writable, &worked, &said), TPM_SUCCESS);
    assert_true(worked);
    assert_int_equal(captured(store, LINK_STATE_VOLATILE, &n_bytes), 2);
    store_free(writable);
    store_free(store);
}

static void invariant_3_a_retired_tpm_serves_nobody_and_stays_as_it_was(void **state)
{
    struct store *store, *writable;
    uint8_t before[32], after[32];
    enum link_shutdown said;
    bool worked;

    (void)state;
    assert_int_equal(store_new(&store), 0);
    assert_int_equal(store_map(&writable, store_fd(store), true), 0);
    start();
    assert_int_equal(EXECUTE(PCR_EVENT_16), 0);
    read_pcr(before);
    assert_int_equal(tpm_retire(tpm, false), TPM_FAIL); /* it was not captured */
    assert_int_equal(tpm_capture(tpm, writable, &worked, &said), TPM_SUCCESS);
    assert_int_equal(EXECUTE(GET_RANDOM), 0);
    assert_int_equal(tpm_retire(tpm, false), TPM_FAIL); /* a command ran since */
    assert_int_equal(tpm_capture(tpm, writable, &worked, &said), TPM_SUCCESS);
    assert_int_equal(tpm_retire(tpm, false), TPM_SUCCESS);

    io.calls = 0;
    assert_int_equal(EXECUTE(GET_RANDOM), TPM2_RC_FAILURE);
    assert_int_equal(EXECUTE(CHANGE_LOCKOUT_AUTH), TPM2_RC_FAILURE);
    assert_int_equal(tpm_hash_start(tpm), TPM_FAIL);
    assert_int_equal(tpm_reset_established(tpm, 3), TPM_FAIL);
    assert_int_equal(tpm_init(tpm, false), TPM_FAIL);
    assert_int_equal(io.calls, 0);

    assert_int_equal(tpm_unretire(tpm), TPM_SUCCESS);
    read_pcr(after);
    assert_memory_equal(before, after, sizeof(before));

    assert_int_equal(tpm_capture(tpm, writable, &worked, &said), TPM_SUCCESS);
    assert_int_equal(tpm_retire(tpm, false), TPM_SUCCESS);
    assert_int_equal(tpm_init(tpm, true), TPM_SUCCESS); /* the vTPM has come back */
    assert_int_equal(EXECUTE(STARTUP_CLEAR), 0);
    store_free(writable);
    store_free(store);
}

/* Both states, by their type. */
static void stand_by_from(uint8_t *const states[3], const size_t n_bytes[3],
                          enum link_shutdown said)
{
    assert_int_equal(tpm_stand_by(tpm, said, states[1], n_bytes[1], states[2], n_bytes[2]),
                     TPM_SUCCESS);
}

/* Stop, and start from a permanent state, held. */
static void init_held(const uint8_t *state, size_t state_bytes)
{
    tpm_stop(tpm);
    assert_int_equal(tpm_stand_by(tpm, LINK_SHUTDOWN_NONE, state, state_bytes, NULL, 0),
                     TPM_SUCCESS);
}

static void invariant_3_a_tpm_that_served_is_not_given_back(void **state)
{
    uint8_t *moved;
    size_t n_moved;

    (void)state;
    start();
    assert_int_equal(tpm_get_state(tpm, LINK_STATE_PERMANENT, &moved, &n_moved), TPM_SUCCESS);
    assert_int_equal(tpm_retire(tpm, true), TPM_FAIL);
    assert_int_equal(tpm_init(tpm, false), TPM_SUCCESS); /* a reset of the guest changes nothing */
    assert_int_equal(tpm_retire(tpm, true), TPM_FAIL);
    tpm_stop(tpm);
    assert_int_equal(tpm_retire(tpm, true), TPM_FAIL);
    /* Nor after QEMU's loadvm. */
    assert_int_equal(tpm_set_state(tpm, LINK_STATE_PERMANENT, moved, n_moved), TPM_SUCCESS);
    assert_int_equal(tpm_init(tpm, true), TPM_SUCCESS);
    assert_int_equal(tpm_retire(tpm, true), TPM_FAIL);
    /* Nor after a session that came to nothing. */
    init_held(moved, n_moved);
    tpm_let_go(tpm);
    assert_int_equal(tpm_retire(tpm, true), TPM_FAIL);
    /* One that has come with a session may be, until it serves. */
    init_held(moved, n_moved);
    assert_int_equal(tpm_admit(tpm, &came, false), TPM_SUCCESS);
    assert_int_equal(tpm_retire(tpm, true), TPM_SUCCESS);
    assert_int_equal(tpm_unretire(tpm), TPM_SUCCESS);
    assert_int_equal(EXECUTE(STARTUP_CLEAR), 0);
    assert_int_equal(tpm_retire(tpm, true), TPM_FAIL);
    /* Also ahead of time, and asked twice. */
    init_held(moved, n_moved);
    free(moved);
    assert_int_equal(tpm_retire(tpm, true), TPM_SUCCESS);
    assert_int_equal(tpm_retire(tpm, true), TPM_SUCCESS);
    assert_int_equal(EXECUTE(STARTUP_CLEAR), TPM2_RC_FAILURE);
}

static void a_tpm_that_never_started_may_be_given_back(void **state)
{
    (void)state;
    assert_int_equal(tpm_retire(tpm, false), TPM_FAIL);
    assert_int_equal(tpm_retire(tpm, true), TPM_SUCCESS);
    assert_int_equal(tpm_init(tpm, false), TPM_FAIL);
    assert_int_equal(tpm_store_permanent(tpm), TPM_FAIL);
    assert_int_equal(nvram_remove(LINK_STATE_VOLATILE), -EROFS);
    assert_int_equal(nvram_store(LINK_STATE_PERMANENT, (const uint8_t *)"x", 1), -EROFS);
    assert_int_equal(io.calls, 0);
    assert_int_equal(tpm_unretire(tpm), TPM_SUCCESS);
    start();
}

static void a_retired_tpm_stops_without_a_trace(void **state)
{
    struct store *store, *writable;
    enum link_shutdown said;
    bool worked;

    (void)state;
    assert_int_equal(store_new(&store), 0);
    assert_int_equal(store_map(&writable, store_fd(store), true), 0);
    start();
    assert_int_equal(tpm_capture(tpm, writable, &worked, &said), TPM_SUCCESS);
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

int __real_pthread_cond_timedwait(pthread_cond_t *condition, pthread_mutex_t *mutex,
                                  const struct timespec *until);

/* Takes the C library's place, by the linker (meson.build): where a test is of what wakes a
 * command, time alone must not. */
int __wrap_pthread_cond_timedwait(pthread_cond_t *condition, pthread_mutex_t *mutex,
                                  const struct timespec *until)
{
    if (time_stands_still)
        return pthread_cond_wait(condition, mutex);
    return __real_pthread_cond_timedwait(condition, mutex, until);
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

static void start_command(struct waiting_command *command)
{
    time_stands_still = true;
    command->answered = false;
    assert_int_equal(pthread_create(&command->thread, NULL, send_startup, command), 0);
    usleep(50000); /* if it waits by then, the test is of what wakes it; if not, it passes */
    assert_false(command->answered);
}

static uint32_t answer_to(struct waiting_command *command)
{
    struct timespec until;

    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += 60;
    assert_int_equal(pthread_timedjoin_np(command->thread, NULL, &until), 0);
    time_stands_still = false;
    return command->code;
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
    io.calls = 0;
    assert_int_equal(tpm_stand_by(tpm, LINK_SHUTDOWN_NONE, moved, n_moved, NULL, 0), TPM_SUCCESS);
    free(moved);
}

/* The same, with a command that waits for it. */
static void start_held(struct waiting_command *command)
{
    start_ahead();
    assert_int_equal(tpm_expect(tpm), TPM_SUCCESS);
    start_command(command);
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
    assert_int_equal(tpm_admit(tpm, &came, false), TPM_SUCCESS);
    assert_int_equal(EXECUTE(STARTUP_CLEAR), 0);
}

static void invariant_3_a_held_tpm_executes_and_writes_nothing_until_it_is_admitted(void **state)
{
    struct waiting_command command;
    uint8_t *held;
    size_t n_held;

    (void)state;
    start_held(&command);
    assert_int_equal(tpm_hash_start(tpm), TPM_BAD_ORDINAL);
    assert_int_equal(tpm_get_state(tpm, LINK_STATE_PERMANENT, &held, &n_held), TPM_BAD_ORDINAL);
    assert_int_equal(io.calls, 0);

    assert_int_equal(tpm_admit(tpm, &came, false), TPM_SUCCESS);
    assert_int_equal(answer_to(&command), 0);
    assert_int_equal(tpm_admit(tpm, &came, false), TPM_BAD_ORDINAL);
}

static void invariant_3_a_held_tpm_that_is_let_go_leaves_no_trace(void **state)
{
    struct waiting_command command;

    (void)state;
    start_held(&command);
    assert_int_equal(tpm_forget_state(tpm), TPM_SUCCESS);
    assert_int_equal(answer_to(&command), TPM2_RC_FAILURE);
    assert_int_equal(io.calls, 0);
    start(); /* from what the directory has */
}

static void invariant_3_a_held_tpm_that_is_let_go_ends_no_retirement(void **state)
{
    struct store *store, *writable;
    uint8_t *moved;
    size_t n_moved;
    enum link_shutdown said;
    bool worked;

    (void)state;
    assert_int_equal(store_new(&store), 0);
    assert_int_equal(store_map(&writable, store_fd(store), true), 0);
    start();
    assert_int_equal(tpm_get_state(tpm, LINK_STATE_PERMANENT, &moved, &n_moved), TPM_SUCCESS);
    assert_int_equal(tpm_capture(tpm, writable, &worked, &said), TPM_SUCCESS);
    assert_int_equal(tpm_retire(tpm, false), TPM_SUCCESS);
    tpm_stop(tpm);
    for (int i = 0; i < 2; i++) {
        assert_int_equal(tpm_stand_by(tpm, LINK_SHUTDOWN_NONE, moved, n_moved, NULL, 0),
                         TPM_SUCCESS);
        if (i == 0) {
            assert_int_equal(tpm_forget_state(tpm), TPM_SUCCESS);
            assert_int_equal(tpm_init(tpm, false), TPM_FAIL);
        }
    }
    assert_int_equal(tpm_admit(tpm, &came, false), TPM_SUCCESS);
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
    assert_int_equal(answer_to(&command), TPM2_RC_FAILURE);
    assert_int_equal(io.calls, 0);
}

/* A disk that stalls, for one thread. */
static struct {
    pthread_t thread;
    sem_t is_reached, may_pass;
    TPM_RESULT (*operation)(void);
    TPM_RESULT result;
    int (*create)(struct io *io, const char *name);
    int (*unlink)(struct io *io, const char *name);
} stall;

static void stall_here(void)
{
    if (!pthread_equal(pthread_self(), stall.thread))
        return;
    sem_post(&stall.is_reached);
    sem_wait(&stall.may_pass);
    sem_post(&stall.may_pass);
}

static int stalling_create(struct io *io, const char *name)
{
    stall_here();
    return stall.create(io, name);
}

static int stalling_unlink(struct io *io, const char *name)
{
    stall_here();
    return stall.unlink(io, name);
}

static void *run_stalling(void *argument)
{
    (void)argument;
    stall.thread = pthread_self();
    stall.result = stall.operation();
    return NULL;
}

/* Have an operation done beside the test, which stands still at the first file that it makes or
 * removes. */
static void begin_stalling(pthread_t *thread, TPM_RESULT (*operation)(void))
{
    stall.operation = operation;
    sem_init(&stall.is_reached, 0, 0);
    sem_init(&stall.may_pass, 0, 0);
    stall.create = io.io.create;
    stall.unlink = io.io.unlink;
    io.io.create = stalling_create;
    io.io.unlink = stalling_unlink;
    assert_int_equal(pthread_create(thread, NULL, run_stalling, NULL), 0);
    sem_wait(&stall.is_reached);
}

static TPM_RESULT end_stalling(pthread_t thread)
{
    sem_post(&stall.may_pass);
    pthread_join(thread, NULL);
    sem_destroy(&stall.is_reached);
    sem_destroy(&stall.may_pass);
    return stall.result;
}

static TPM_RESULT admit_it(void)
{
    return tpm_admit(tpm, &came, false);
}

static TPM_RESULT store_it(void)
{
    return tpm_store_permanent(tpm);
}

static void a_command_waits_only_so_long_while_what_admits_it_waits_for_the_disk(void **state)
{
    struct waiting_command command;
    pthread_t thread;

    (void)state;
    start_ahead();
    nvram_set_read_only(false);
    assert_int_equal(nvram_store(LINK_STATE_VOLATILE, (const uint8_t *)"old", 3), 0);
    nvram_set_read_only(true);
    assert_int_equal(tpm_expect(tpm), TPM_SUCCESS);
    begin_stalling(&thread, admit_it);
    assert_int_equal(EXECUTE(STARTUP_CLEAR), TPM2_RC_RETRY);
    start_command(&command);
    assert_int_equal(end_stalling(thread), TPM_SUCCESS);
    assert_int_equal(answer_to(&command), 0);
}

/* Have a TPM on whose state is durable elsewhere alone. */
static void start_admitted(void)
{
    start_ahead();
    assert_int_equal(tpm_expect(tpm), TPM_SUCCESS);
    assert_int_equal(tpm_admit(tpm, &came, false), TPM_SUCCESS);
}

static void a_command_that_stores_nothing_does_not_wait_for_the_state_s_own_file(void **state)
{
    pthread_t thread;

    (void)state;
    start_admitted();
    begin_stalling(&thread, store_it);
    assert_int_equal(EXECUTE(GET_RANDOM), 0x100); /* it was not started up */
    assert_int_equal(end_stalling(thread), TPM_SUCCESS);
}

static void a_command_to_a_held_tpm_waits_only_so_long(void **state)
{
    (void)state;
    start_ahead();
    assert_int_equal(tpm_expect(tpm), TPM_SUCCESS);
    assert_int_equal(EXECUTE(STARTUP_CLEAR), TPM2_RC_RETRY);
    assert_int_equal(io.calls, 0);
    assert_int_equal(tpm_admit(tpm, &came, false), TPM_SUCCESS);
    assert_int_equal(EXECUTE(STARTUP_CLEAR), 0);
}

/* A TPM that runs, and is another host's. */
static void start_retired(void)
{
    start();
    tpm_stop(tpm);
    uint8_t *state;
    size_t n_bytes;

    assert_int_equal(tpm_init(tpm, false), TPM_SUCCESS);
    assert_int_equal(tpm_get_state(tpm, LINK_STATE_PERMANENT, &state, &n_bytes), TPM_SUCCESS);
    init_held(state, n_bytes);
    free(state);
    assert_int_equal(tpm_retire(tpm, true), TPM_SUCCESS);
}

static void commands_wait_while_a_retired_tpm_is_asked_back(void **state)
{
    struct waiting_command command;

    (void)state;
    assert_int_equal(tpm_await(tpm, true), TPM_BAD_ORDINAL);
    start_retired();
    assert_int_equal(EXECUTE(STARTUP_CLEAR), TPM2_RC_FAILURE);
    assert_int_equal(tpm_await(tpm, true), TPM_SUCCESS);
    assert_int_equal(EXECUTE(STARTUP_CLEAR), TPM2_RC_RETRY);

    start_command(&command);
    assert_int_equal(tpm_unretire(tpm), TPM_SUCCESS);
    assert_int_equal(answer_to(&command), 0);
    assert_int_equal(tpm_await(tpm, true), TPM_BAD_ORDINAL);
}

static void wait_no_more(void)
{
    assert_int_equal(tpm_await(tpm, false), TPM_SUCCESS);
}

static void power_it_off(void)
{
    assert_int_equal(tpm_stop(tpm), TPM_SUCCESS);
}

static void let_it_go(void)
{
    tpm_let_go(tpm);
}

static void waiting_commands_are_answered_when_nothing_will_come(void **state)
{
    void (*const ends[])(void) = {wait_no_more, let_it_go, power_it_off};
    struct waiting_command command;

    (void)state;
    start_retired();
    for (size_t i = 0; i < sizeof(ends) / sizeof(*ends); i++) {
        assert_int_equal(tpm_await(tpm, true), TPM_SUCCESS);
        start_command(&command);
        ends[i]();
        assert_int_equal(answer_to(&command), TPM2_RC_FAILURE);
    }
    /* QEMU asks a TPM that is off for its version: that never waits. */
    assert_int_equal(tpm_await(tpm, true), TPM_SUCCESS);
    assert_int_equal(EXECUTE(STARTUP_CLEAR), TPM2_RC_FAILURE);
}

static void a_held_start_uses_nothing_that_this_host_has_itself(void **state)
{
    uint8_t *moved, digest[32];
    size_t n_moved;

    (void)state;
    start();
    assert_int_equal(tpm_get_state(tpm, LINK_STATE_PERMANENT, &moved, &n_moved), TPM_SUCCESS);
    assert_int_equal(EXECUTE(PCR_EVENT_16), 0);
    assert_int_equal(tpm_store_volatile(tpm), TPM_SUCCESS);
    tpm_stop(tpm);
    assert_int_equal(tpm_stand_by(tpm, LINK_SHUTDOWN_NONE, moved, n_moved, NULL, 0), TPM_SUCCESS);
    assert_int_equal(tpm_admit(tpm, &came, false), TPM_SUCCESS);
    assert_int_equal(EXECUTE(PCR_READ_16), 0x100); /* TPM_RC_INITIALIZE */
    assert_int_equal(EXECUTE(STARTUP_CLEAR), 0);
    read_pcr(digest);
    assert_memory_equal(digest, (const uint8_t[32]){0}, sizeof(digest));
    free(moved);
}

static void what_libtpms_does_not_take_leaves_it_off_and_the_directory_as_it_was(void **state)
{
    static const uint8_t no_state[100] = "neither libtpms nor anybody else has made this";
    uint8_t *moved;
    size_t n_moved;

    (void)state;
    start();
    assert_int_equal(tpm_get_state(tpm, LINK_STATE_PERMANENT, &moved, &n_moved), TPM_SUCCESS);
    tpm_stop(tpm);
    io.calls = 0;
    assert_int_not_equal(tpm_stand_by(tpm, LINK_SHUTDOWN_NONE, no_state, sizeof(no_state), NULL, 0),
                         TPM_SUCCESS);
    assert_int_not_equal(
        tpm_stand_by(tpm, LINK_SHUTDOWN_NONE, moved, n_moved, no_state, sizeof(no_state)),
        TPM_SUCCESS);
    assert_int_equal(io.calls, 0);
    assert_int_equal(tpm_expect(tpm), TPM_BAD_ORDINAL);
    free(moved);
    start(); /* from what the directory has */
}

static void invariant_3_a_boot_after_a_grant_starts_from_the_permanent_state_alone(void **state)
{
    uint8_t *moved[3], digest[32];
    const uint8_t *bytes;
    size_t n_moved[3], n_bytes;

    (void)state;
    start();
    assert_int_equal(EXECUTE(PCR_EVENT_16), 0);
    for (int type = LINK_STATE_PERMANENT; type <= LINK_STATE_VOLATILE; type++)
        assert_int_equal(tpm_get_state(tpm, type, &moved[type], &n_moved[type]), TPM_SUCCESS);
    assert_int_equal(tpm_store_volatile(tpm), TPM_SUCCESS);
    tpm_stop(tpm);
    stand_by_from(moved, n_moved, LINK_SHUTDOWN_NONE);
    free(moved[1]);
    free(moved[2]);
    assert_int_equal(tpm_admit(tpm, &came, false), TPM_SUCCESS);
    assert_false(io_memory_read(&io, "tpm2-00.volatilestate", &bytes, &n_bytes));
    assert_int_equal(tpm_init(tpm, false), TPM_SUCCESS);
    assert_int_equal(EXECUTE(PCR_READ_16), 0x100); /* TPM_RC_INITIALIZE */
    assert_int_equal(EXECUTE(STARTUP_CLEAR), 0);
    read_pcr(digest);
    assert_memory_equal(digest, (const uint8_t[32]){0}, sizeof(digest));
}

/* Invariant 12: the guest's own view of power. */

static void sleep_and_work_on(void)
{
    assert_int_equal(EXECUTE(PCR_EVENT_1), 0);
    assert_int_equal(EXECUTE(SHUTDOWN_STATE), 0);
    assert_int_equal(EXECUTE(GET_RANDOM), 0);
}

static bool pcr_1_is_there(void)
{
    static const uint8_t zeros[32];

    assert_int_equal(EXECUTE(PCR_READ_1), 0);
    return memcmp(response.bytes + response.n_bytes - 32, zeros, 32) != 0;
}

static void invariant_12_a_guest_that_slept_finds_its_pcrs(void **state)
{
    (void)state;
    start();
    for (int stop = 0; stop <= 2; stop++) {
        sleep_and_work_on();
        if (stop)
            tpm_stop(tpm);
        assert_int_equal(tpm_init(tpm, false), TPM_SUCCESS);
        if (stop == 2)
            assert_int_equal(tpm_init(tpm, false), TPM_SUCCESS); /* reset twice */
        assert_int_equal(EXECUTE(STARTUP_STATE), 0);
        assert_true(pcr_1_is_there());
        assert_true(clock_is_safe());
    }
    /* It is awake: what it said then is over. */
    assert_int_equal(tpm_init(tpm, false), TPM_SUCCESS);
    assert_int_not_equal(EXECUTE(STARTUP_STATE), 0);
}

/* A snapshot of a guest that stands still or sleeps, say, and then a reset or its waking up. */
static void
invariant_12_a_guest_whose_state_qemu_has_is_shut_down_when_it_starts_again(void **state)
{
    (void)state;
    for (int sleeps = 0; sleeps <= 1; sleeps++) {
        start();
        if (sleeps)
            assert_int_equal(EXECUTE(SHUTDOWN_STATE), 0);
        assert_int_equal(EXECUTE(PCR_EVENT_1), 0); /* the shutdown holds no more */
        for (int type = LINK_STATE_PERMANENT; type <= LINK_STATE_VOLATILE; type++) {
            uint8_t *bytes;
            size_t n_bytes;
            assert_int_equal(tpm_get_state(tpm, type, &bytes, &n_bytes), TPM_SUCCESS);
            free(bytes);
        }
        io.calls = 0;
        tpm_stop(tpm);
        tpm_stop(tpm);
        assert_int_equal(io.calls, 0); /* it may be another host's */
        assert_int_equal(tpm_init(tpm, false), TPM_SUCCESS);
        assert_int_equal(EXECUTE(STARTUP_STATE) == 0, sleeps);
        if (sleeps)
            assert_true(pcr_1_is_there());
        else
            assert_int_equal(EXECUTE(STARTUP_CLEAR), 0);
        assert_true(clock_is_safe());
    }
}

static void invariant_12_a_plain_reset_leaves_no_pcrs(void **state)
{
    (void)state;
    start();
    assert_int_equal(EXECUTE(PCR_EVENT_1), 0);
    assert_true(pcr_1_is_there());
    start();
    assert_false(pcr_1_is_there());
    /* The last word counts. */
    sleep_and_work_on();
    assert_int_equal(EXECUTE(SHUTDOWN_CLEAR), 0);
    assert_int_equal(EXECUTE(GET_RANDOM), 0);
    assert_int_equal(tpm_init(tpm, false), TPM_SUCCESS);
    assert_int_not_equal(EXECUTE(STARTUP_STATE), 0);
    assert_int_equal(EXECUTE(STARTUP_CLEAR), 0);
    assert_true(clock_is_safe());
}

static void invariant_12_saved_sessions_do_not_pile_up_over_resets(void **state)
{
    char save_context[] = "\x80\x01\0\0\0\x0e\0\0\x01\x62....";

    (void)state;
    for (int reset = 0; reset < 70; reset++) {
        start();
        assert_int_equal(EXECUTE(START_SESSION), 0); /* 0x905 when there are too many */
        memcpy(save_context + TPM_HEADER_BYTES, response.bytes + TPM_HEADER_BYTES, 4);
        assert_int_equal(EXECUTE(save_context), 0);
    }
}

static void invariant_12_a_shutdown_that_was_refused_is_none(void **state)
{
    (void)state;
    for (int slept = 0; slept <= 1; slept++) {
        start();
        if (slept)
            assert_int_equal(EXECUTE(SHUTDOWN_STATE), 0);
        assert_int_equal(EXECUTE(PCR_ALLOCATE), 0);
        assert_int_equal(EXECUTE(SHUTDOWN_STATE), 0x1ca);
        assert_int_equal(tpm_init(tpm, false), TPM_SUCCESS);
        assert_int_not_equal(EXECUTE(STARTUP_STATE), 0);
        assert_int_equal(EXECUTE(STARTUP_CLEAR), 0);
        assert_true(clock_is_safe());
    }
}

static void a_commit_that_changes_nothing_writes_nothing(void **state)
{
    (void)state;
    assert_int_equal(tpm_init(tpm, false), TPM_SUCCESS);
    io.calls = 0;
    assert_int_equal(tpm_init(tpm, false), TPM_SUCCESS);
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
    assert_int_equal(tpm_set_journal(tpm, &journal_settings, writable_store, 0, true), TPM_SUCCESS);
    return 0;
}

static int tear_down_journal(void **state)
{
    tear_down(state);
    store_free(writable_store);
    store_free(own_store);
    return 0;
}

/* vtpmd closes the link, and another engine is started. */
static void restart_engine(void)
{
    tpm_free(tpm);
    tpm = tpm_new(&io.io);
}

/* The same, from what a loss of power has left, and was recovered: that is in the file then. */
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
    restart_engine();
    assert_int_equal(tpm_set_journal(tpm, &journal_settings, writable_store, 0, true), TPM_SUCCESS);
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

static void a_journal_is_there_from_the_first_change_to_the_end(void **state)
{
    const uint8_t *bytes;
    size_t n_bytes;

    (void)state;
    assert_int_equal(tpm_init(tpm, false), TPM_SUCCESS);
    assert_false(has_journal());
    assert_int_equal(EXECUTE(STARTUP_CLEAR), 0);
    assert_true(has_journal());
    assert_int_equal(tpm_set_journal(tpm, &journal_settings, writable_store, 0, true),
                     TPM_BAD_ORDINAL);
    /* A guest's reset, and a stop before it: neither writes a file. */
    for (int stop = 0; stop <= 1; stop++) {
        assert_int_equal(EXECUTE(SHUTDOWN_CLEAR), 0);
        io.calls = 0;
        if (stop)
            tpm_stop(tpm);
        assert_int_equal(tpm_init(tpm, false), TPM_SUCCESS);
        assert_int_equal(io.calls, 0);
        assert_true(has_journal());
        assert_int_equal(EXECUTE(STARTUP_CLEAR), 0);
        assert_int_equal(io.calls, 2); /* a record, and its sync */
    }
    /* One whose guest was not orderly writes a record, and leaves its sync to the guest. */
    io.calls = io.syncs = 0;
    assert_int_equal(tpm_init(tpm, false), TPM_SUCCESS);
    assert_int_equal(io.calls, 1);
    assert_int_equal(io.syncs, 0);
    assert_int_equal(EXECUTE(STARTUP_CLEAR), 0);
    assert_int_equal(io.syncs, 2);
    tpm_stop(tpm);
    assert_int_equal(tpm_set_journal(tpm, &journal_settings, writable_store, 0, true),
                     TPM_BAD_ORDINAL);
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
    assert_true(recovery.generation > 5000 && recovery.generation <= 5010);
}

/* What a start would recover from the disk as it is. */
static size_t recover(uint8_t *image)
{
    struct journal_evidence evidence;
    struct journal_recovery recovery;

    assert_true(state_directory_read(&io, &journal_settings, &evidence));
    state_directory_recover(&evidence, image, &recovery);
    assert_true(journal_may_start(&recovery));
    return recovery.image_bytes;
}

static void retire_captured(void)
{
    enum link_shutdown said;
    bool worked;

    assert_int_equal(tpm_capture(tpm, writable_store, &worked, &said), TPM_SUCCESS);
    assert_int_equal(tpm_retire(tpm, false), TPM_SUCCESS);
}

static void invariant_3_a_retired_tpm_writes_nothing_whatever_is_asked(void **state)
{
    uint8_t *bytes = NULL;
    size_t n_bytes;

    (void)state;
    start();
    assert_int_equal(tpm_store_volatile(tpm), TPM_SUCCESS);
    assert_int_equal(EXECUTE(CHANGE_LOCKOUT_AUTH), 0);
    retire_captured();
    io.calls = 0;
    assert_int_equal(tpm_store_volatile(tpm), TPM_FAIL);
    assert_int_equal(tpm_get_state(tpm, LINK_STATE_PERMANENT, &bytes, &n_bytes), TPM_FAIL);
    assert_int_equal(tpm_store_permanent(tpm), TPM_FAIL);
    tpm_stop(tpm);
    assert_int_equal(tpm_store_permanent(tpm), TPM_FAIL);
    assert_int_equal(tpm_init(tpm, false), TPM_FAIL);
    restart_engine();
    assert_int_equal(io.calls, 0);
    assert_true(has_journal());
}

static void a_tpm_that_serves_again_appends_again(void **state)
{
    (void)state;
    start();
    assert_int_equal(tpm_store_volatile(tpm), TPM_SUCCESS);
    retire_captured();
    assert_int_equal(tpm_unretire(tpm), TPM_SUCCESS);
    assert_false(has_journal());
    assert_int_equal(EXECUTE(CHANGE_LOCKOUT_AUTH), 0);
    assert_true(has_journal());
}

static void invariant_3_a_retired_tpm_waits_for_its_folding(void **state)
{
    struct journal_settings settings = journal_settings;

    (void)state;
    settings.file_bytes = 8 * JOURNAL_PAGE_BYTES;
    assert_int_equal(tpm_set_journal(tpm, &settings, writable_store, 0, true), TPM_SUCCESS);
    start();
    /* The first one opens the journal, each shutdown is a record: some of these are worn ones. */
    for (int i = 0; i < 60; i++) {
        assert_int_equal(EXECUTE(SHUTDOWN_STATE), 0);
        retire_captured();
        int calls = io.calls;
        sched_yield();
        assert_int_equal(io.calls, calls);
        assert_int_equal(tpm_unretire(tpm), TPM_SUCCESS);
        assert_int_equal(EXECUTE(GET_RANDOM), 0);
    }
}

static void invariant_3_what_was_given_away_is_not_written(void **state)
{
    static uint8_t image[IMAGE_BYTES_MAX];
    uint8_t *given;
    size_t n_given;

    (void)state;
    start();
    assert_int_equal(EXECUTE(CHANGE_LOCKOUT_AUTH), 0);
    assert_int_equal(tpm_get_state(tpm, LINK_STATE_PERMANENT, &given, &n_given), TPM_SUCCESS);
    io.calls = 0;
    assert_int_equal(tpm_store_permanent(tpm), TPM_FAIL);
    tpm_stop(tpm);
    /* A session brings it back, and comes to nothing. */
    init_held(given, n_given);
    tpm_let_go(tpm);
    restart_engine();
    assert_int_equal(io.calls, 0);
    assert_int_equal(recover(image), n_given);
    assert_memory_equal(image, given, n_given);
    free(given);
}

static void a_command_runs(void)
{
    assert_int_equal(EXECUTE(GET_RANDOM), 0);
}

static void an_event_is_hashed(void)
{
    assert_int_equal(tpm_hash_start(tpm), TPM_SUCCESS);
    assert_int_equal(tpm_hash_end(tpm), TPM_SUCCESS);
}

static void the_established_bit_is_reset(void)
{
    assert_int_equal(tpm_reset_established(tpm, 3), TPM_SUCCESS);
}

static void the_guest_is_reset(void)
{
    assert_int_equal(tpm_init(tpm, false), TPM_SUCCESS);
    start();
}

static void volatile_state_is_stored(void)
{
    assert_int_equal(tpm_store_volatile(tpm), TPM_SUCCESS);
    assert_false(has_journal());
}

static void qemu_resumes(void)
{
    assert_int_equal(tpm_unretire(tpm), TPM_SUCCESS);
}

static size_t recover_after_the_end(uint8_t *image)
{
    restart_engine();
    return recover(image);
}

static void a_guest_that_runs_on_after_a_snapshot_is_served_as_before(void **state)
{
    void (*const signs[])(void) = {
        a_command_runs,     an_event_is_hashed,       the_established_bit_is_reset,
        the_guest_is_reset, volatile_state_is_stored, qemu_resumes};
    static uint8_t image[IMAGE_BYTES_MAX];
    uint8_t *given;
    size_t n_given;

    (void)state;
    for (size_t i = 0; i < sizeof(signs) / sizeof(*signs); i++) {
        start();
        assert_int_equal(EXECUTE(SHUTDOWN_STATE), 0);
        assert_true(has_journal());
        assert_int_equal(tpm_get_state(tpm, LINK_STATE_PERMANENT, &given, &n_given), TPM_SUCCESS);
        free(given);
        signs[i]();
        assert_int_equal(EXECUTE(GET_RANDOM), 0);
        size_t n_bytes = recover_after_the_end(image);
        assert_false(has_journal());
        assert_int_equal(tpm_set_journal(tpm, &journal_settings, writable_store, 0, true),
                         TPM_SUCCESS);
        assert_int_equal(nvram_load(LINK_STATE_PERMANENT, image, n_bytes), 0);
        start();
        assert_true(clock_is_safe());
        tpm_stop(tpm);
    }
}

static void a_snapshot_is_loaded_after_the_state_was_given(void **state)
{
    uint8_t *given;
    size_t n_given;

    (void)state;
    start();
    assert_int_equal(tpm_get_state(tpm, LINK_STATE_PERMANENT, &given, &n_given), TPM_SUCCESS);
    for (int i = 0; i < 2; i++) {
        if (i)
            assert_int_equal(EXECUTE(STARTUP_CLEAR), 0);
        assert_int_equal(EXECUTE(CHANGE_LOCKOUT_AUTH), 0);
        uint8_t *later;
        size_t n_later;
        assert_int_equal(tpm_get_state(tpm, LINK_STATE_PERMANENT, &later, &n_later), TPM_SUCCESS);
        free(later);
        tpm_stop(tpm);
        assert_true(has_journal());
        assert_int_equal(tpm_set_state(tpm, LINK_STATE_PERMANENT, given, n_given), TPM_SUCCESS);
        assert_int_equal(tpm_init(tpm, true), TPM_SUCCESS);
    }
    free(given);
    assert_int_equal(EXECUTE(STARTUP_CLEAR), 0);
    assert_int_equal(EXECUTE(CHANGE_LOCKOUT_AUTH), 0);
    lose_power();
    start();
    uint32_t code = EXECUTE(CHANGE_LOCKOUT_AUTH);
    assert_true(code == 0x98e || code == 0x921);
}

static void invariant_12_that_a_guest_sleeps_travels_with_its_state(void **state)
{
    enum link_shutdown said = LINK_SHUTDOWN_CLEAR;
    uint8_t *moved[3];
    size_t n_moved[3];
    bool worked;

    (void)state;
    start();
    assert_int_equal(tpm_capture(tpm, writable_store, &worked, &said), TPM_SUCCESS);
    assert_int_equal(said, LINK_SHUTDOWN_NONE);
    sleep_and_work_on();
    for (int i = 0; i < 2; i++) {
        assert_int_equal(tpm_capture(tpm, writable_store, &worked, &said), TPM_SUCCESS);
        assert_int_equal(said, LINK_SHUTDOWN_STATE);
    }
    for (int type = LINK_STATE_PERMANENT; type <= LINK_STATE_VOLATILE; type++)
        assert_int_equal(tpm_get_state(tpm, type, &moved[type], &n_moved[type]), TPM_SUCCESS);
    for (int said_there = LINK_SHUTDOWN_NONE; said_there <= LINK_SHUTDOWN_STATE; said_there += 2) {
        tpm_stop(tpm);
        stand_by_from(moved, n_moved, said_there);
        assert_int_equal(tpm_admit(tpm, &came, false), TPM_SUCCESS);
        assert_int_equal(tpm_capture(tpm, writable_store, &worked, &said), TPM_SUCCESS);
        assert_int_equal(said, said_there);
        assert_int_equal(tpm_init(tpm, false), TPM_SUCCESS); /* it wakes up */
        if (said_there == LINK_SHUTDOWN_STATE) {
            assert_int_equal(EXECUTE(STARTUP_STATE), 0);
            assert_true(pcr_1_is_there());
        } else {
            assert_int_not_equal(EXECUTE(STARTUP_STATE), 0);
        }
    }
    free(moved[1]);
    free(moved[2]);
}

/* Whole blobs, as swtpm's: they have no word of it. Only what the guest said last tells. */
static void invariant_12_that_a_guest_sleeps_is_seen_in_a_state_without_a_word_of_it(void **state)
{
    static const struct {
        const char *last;
        bool sleeps;
    } guests[] = {{SHUTDOWN_STATE, true}, {SHUTDOWN_CLEAR, false}, {NULL, false}};

    (void)state;
    for (size_t i = 0; i < sizeof(guests) / sizeof(*guests); i++) {
        uint8_t *moved[3];
        size_t n_moved[3];
        start();
        assert_int_equal(EXECUTE(PCR_EVENT_1), 0);
        if (guests[i].last)
            assert_int_equal(execute(guests[i].last, sizeof(SHUTDOWN_STATE) - 1), 0);
        assert_int_equal(EXECUTE(GET_RANDOM), 0);
        for (int type = LINK_STATE_PERMANENT; type <= LINK_STATE_VOLATILE; type++)
            assert_int_equal(tpm_get_state(tpm, type, &moved[type], &n_moved[type]), TPM_SUCCESS);
        tpm_stop(tpm);
        for (int type = LINK_STATE_PERMANENT; type <= LINK_STATE_VOLATILE; type++) {
            assert_int_equal(tpm_set_state(tpm, type, moved[type], n_moved[type]), TPM_SUCCESS);
            free(moved[type]);
        }
        assert_int_equal(tpm_init(tpm, true), TPM_SUCCESS);
        assert_int_equal(tpm_init(tpm, false), TPM_SUCCESS); /* it wakes up, or is reset */
        assert_int_equal(EXECUTE(STARTUP_STATE) == 0, guests[i].sleeps);
        if (guests[i].sleeps)
            assert_true(pcr_1_is_there());
    }
}

static enum link_shutdown shutdown_in(uint8_t *bytes, size_t n_bytes)
{
    uint8_t *copy = malloc(n_bytes); /* of that size, so that a read past its end is seen */

    assert_non_null(copy);
    memcpy(copy, bytes, n_bytes);
    enum link_shutdown said = orderly_shutdown(copy, n_bytes);
    free(copy);
    return said;
}

/* What comes from outside is not read past its end, and what is of a later format not read. */
static void a_permanent_state_that_is_cut_or_of_another_version_says_nothing_of_power(void **state)
{
    static const size_t versions[] = {0, 8}; /* where they are: of the state, of its constants */
    size_t n_bytes, needed;
    uint8_t *bytes;

    (void)state;
    start();
    assert_int_equal(EXECUTE(SHUTDOWN_STATE), 0);
    assert_int_equal(tpm_get_state(tpm, LINK_STATE_PERMANENT, &bytes, &n_bytes), TPM_SUCCESS);
    assert_int_equal(shutdown_in(bytes, n_bytes), LINK_SHUTDOWN_STATE);
    for (needed = n_bytes; shutdown_in(bytes, needed - 1) == LINK_SHUTDOWN_STATE; needed--)
        ;
    assert_true(needed >= 100 && needed <= n_bytes - 100);
    for (size_t cut = 1; cut < needed; cut++)
        assert_int_equal(shutdown_in(bytes, cut), LINK_SHUTDOWN_NONE);
    for (size_t i = 0; i < sizeof(versions) / sizeof(*versions); i++) {
        bytes[versions[i]]++;
        assert_int_equal(shutdown_in(bytes, n_bytes), LINK_SHUTDOWN_NONE);
        bytes[versions[i]]--;
    }
    for (size_t at = 0; at < needed; at++)
        for (int bit = 0; bit < 8; bit++) {
            bytes[at] ^= 1 << bit;
            shutdown_in(bytes, n_bytes);
            bytes[at] ^= 1 << bit;
        }
    free(bytes);
}

/* libtpms from 0.10 on writes a profile, and then or later counts up. */
static void a_permanent_state_with_a_profile_says_the_same_of_power(void **state)
{
    static const uint8_t data_magic[] = {0x12, 0x21, 0x34, 0x43};
    static const char profile[] = "\0\x10{\"Name\":\"none\"}";
    enum { HEADER_BYTES = 8, PROFILE_BYTES = sizeof(profile) };
    size_t n_bytes, at;
    uint8_t *bytes, *later;

    (void)state;
    start();
    assert_int_equal(EXECUTE(SHUTDOWN_STATE), 0);
    assert_int_equal(tpm_get_state(tpm, LINK_STATE_PERMANENT, &bytes, &n_bytes), TPM_SUCCESS);
    later = malloc(n_bytes + PROFILE_BYTES);
    assert_non_null(later);
    memcpy(later, bytes, HEADER_BYTES);
    later[1] = 4;
    memcpy(later + HEADER_BYTES, profile, PROFILE_BYTES);
    memcpy(later + HEADER_BYTES + PROFILE_BYTES, bytes + HEADER_BYTES, n_bytes - HEADER_BYTES);
    n_bytes += PROFILE_BYTES;
    assert_int_equal(shutdown_in(later, n_bytes), LINK_SHUTDOWN_STATE);
    for (at = 2; memcmp(later + at, data_magic, sizeof(data_magic)) != 0; at++)
        ;
    for (int version = 3; version <= 6; version++) {
        later[at - 1] = (uint8_t)version;
        bool is_known = version == 4 || version == 5;
        assert_int_equal(shutdown_in(later, n_bytes) == LINK_SHUTDOWN_STATE, is_known);
    }
    free(later);
    free(bytes);
}

static void invariant_12_a_guest_that_woke_up_after_a_move_sleeps_no_more(void **state)
{
    uint8_t *moved;
    size_t n_moved;

    (void)state;
    start();
    assert_int_equal(EXECUTE(SHUTDOWN_STATE), 0);
    assert_int_equal(tpm_get_state(tpm, LINK_STATE_PERMANENT, &moved, &n_moved), TPM_SUCCESS);
    tpm_stop(tpm);
    assert_int_equal(tpm_stand_by(tpm, LINK_SHUTDOWN_STATE, moved, n_moved, NULL, 0), TPM_SUCCESS);
    free(moved);
    assert_int_equal(tpm_admit(tpm, &came, false), TPM_SUCCESS);
    assert_int_equal(EXECUTE(STARTUP_STATE), 0);
    assert_int_equal(tpm_init(tpm, false), TPM_SUCCESS);
    assert_int_not_equal(EXECUTE(STARTUP_STATE), 0);
}

static void a_tpm_that_could_not_be_admitted_is_admitted_later(void **state)
{
    static uint8_t image[IMAGE_BYTES_MAX];
    const uint8_t *bytes;
    uint8_t *moved;
    size_t n_moved, n_bytes;
    int failures = 0;

    (void)state;
    start();
    assert_int_equal(tpm_get_state(tpm, LINK_STATE_PERMANENT, &moved, &n_moved), TPM_SUCCESS);
    assert_int_equal(tpm_store_volatile(tpm), TPM_SUCCESS);
    assert_int_equal(EXECUTE(CHANGE_LOCKOUT_AUTH), 0);
    retire_captured(); /* with a volatile state and a journal of its own, to be removed */
    init_held(moved, n_moved);
    io.fail_error = ENOSPC;
    for (;;) {
        io.fail_from = io.calls + 1 + failures;
        TPM_RESULT result = tpm_admit(tpm, &came, false);
        io.fail_from = 0;
        if (result == TPM_SUCCESS)
            break;
        failures++;
        assert_int_equal(result, TPM_FAIL);
        assert_int_equal(EXECUTE(STARTUP_CLEAR), TPM2_RC_FAILURE);
        assert_int_equal(tpm_retire(tpm, false), TPM_FAIL);
    }
    assert_true(failures >= 2);
    assert_false(io_memory_read(&io, "tpm2-00.volatilestate", &bytes, &n_bytes));
    assert_int_equal(tpm_store_permanent(tpm), TPM_SUCCESS);
    assert_int_equal(recover(image), n_moved);
    assert_memory_equal(image, moved, n_moved);
    free(moved);
    assert_int_equal(EXECUTE(STARTUP_CLEAR), 0);
    assert_int_equal(EXECUTE(CHANGE_LOCKOUT_AUTH), 0); /* of the state that came */
    lose_power();
    start();
    assert_int_not_equal(EXECUTE(CHANGE_LOCKOUT_AUTH), 0);
}

/* Return the identity that the permanent state's file has behind it. */
static const uint8_t *identity_in_file(void)
{
    const uint8_t *bytes;
    size_t n_bytes;

    assert_true(io_memory_read_durable(&io, "tpm2-00.permall", &bytes, &n_bytes));
    return bytes + n_bytes - (sizeof(came.identity) + sizeof(came.generation));
}

static void assert_lineage(const uint8_t *identity)
{
    struct checkpoint_lineage lineage;

    tpm_get_lineage(tpm, &lineage);
    assert_memory_equal(lineage.identity, identity, sizeof(lineage.identity));
    assert_memory_equal(identity_in_file(), identity, sizeof(lineage.identity));
}

static void invariant_3_vtpm_that_has_not_come_stays_another_hosts(void **state)
{
    struct checkpoint_lineage another = {.generation = 9, .identity = {9}};
    enum tpm_custody custody;
    enum tpm_power power;
    size_t n_moved;
    uint8_t *moved;

    (void)state;
    start();
    assert_int_equal(tpm_get_state(tpm, LINK_STATE_PERMANENT, &moved, &n_moved), TPM_SUCCESS);
    assert_int_equal(tpm_stop_fenced(tpm), TPM_SUCCESS);
    for (int time = 0; time < 2; time++) {
        assert_int_equal(tpm_set_state(tpm, LINK_STATE_PERMANENT, moved, n_moved), TPM_SUCCESS);
        io.fail_error = ENOSPC;
        io.fail_from = io.calls + 1;
        assert_int_not_equal(tpm_init_come(tpm, &another), TPM_SUCCESS);
        io.fail_from = 0;
        tpm_look(tpm, &power, &custody);
        assert_int_equal(power, TPM_OFF);
        assert_int_equal(custody, TPM_FENCED);
        assert_int_equal(tpm_init(tpm, false), TPM_FAIL);
    }
    free(moved);
}

static const struct checkpoint_lineage another = {.identity = "another vTPM's..", .generation = 99};

static void invariant_13_what_comes_is_of_its_own_lineage(void **state)
{
    uint8_t *moved;
    size_t n_moved;
    int failures = 0;

    (void)state;
    start();
    assert_int_equal(tpm_get_state(tpm, LINK_STATE_PERMANENT, &moved, &n_moved), TPM_SUCCESS);
    assert_int_equal(EXECUTE(CHANGE_LOCKOUT_AUTH), 0);
    assert_int_equal(tpm_stop(tpm), TPM_SUCCESS);
    assert_lineage(journal_settings.identity);
    io.fail_error = ENOSPC;
    for (;; failures++) {
        assert_int_equal(tpm_set_state(tpm, LINK_STATE_PERMANENT, moved, n_moved), TPM_SUCCESS);
        io.fail_from = io.calls + 1 + failures;
        TPM_RESULT result = tpm_init_come(tpm, &another);
        io.fail_from = 0;
        if (result == TPM_SUCCESS)
            break;
        assert_int_equal(result, TPM_FAIL);
        assert_lineage(journal_settings.identity);
    }
    assert_true(failures >= 2);
    assert_lineage(another.identity);
    assert_int_equal(EXECUTE(STARTUP_CLEAR), 0);
    assert_int_equal(EXECUTE(CHANGE_LOCKOUT_AUTH), 0);
    assert_lineage(another.identity);
    /* What comes with nothing said of it is the same vTPM's. */
    tpm_stop(tpm);
    assert_int_equal(tpm_set_state(tpm, LINK_STATE_PERMANENT, moved, n_moved), TPM_SUCCESS);
    assert_int_equal(tpm_init(tpm, true), TPM_SUCCESS);
    assert_lineage(another.identity);
    free(moved);
}

static void invariant_13_the_same_state_of_another_lineage_is_written(void **state)
{
    struct checkpoint_lineage lineage = came;
    uint8_t *moved;
    size_t n_moved;
    int calls;

    (void)state;
    start();
    tpm_stop(tpm);
    assert_int_equal(tpm_init(tpm, false), TPM_SUCCESS);
    assert_int_equal(tpm_get_state(tpm, LINK_STATE_PERMANENT, &moved, &n_moved), TPM_SUCCESS);
    for (int i = 0; i < 2; i++) {
        tpm_stop(tpm);
        tpm_get_lineage(tpm, &lineage);
        calls = io.calls;
        assert_int_equal(tpm_set_state(tpm, LINK_STATE_PERMANENT, moved, n_moved), TPM_SUCCESS);
        assert_int_equal(tpm_init_come(tpm, i == 0 ? &lineage : &another), TPM_SUCCESS);
        assert_int_equal(io.calls > calls, i != 0);
    }
    assert_lineage(another.identity);
    free(moved);
}

static void invariant_13_what_is_admitted_is_of_its_own_lineage(void **state)
{
    uint8_t *moved;
    size_t n_moved;

    (void)state;
    start();
    assert_int_equal(tpm_get_state(tpm, LINK_STATE_PERMANENT, &moved, &n_moved), TPM_SUCCESS);
    assert_int_equal(EXECUTE(CHANGE_LOCKOUT_AUTH), 0);
    retire_captured(); /* with a journal of its own */
    init_held(moved, n_moved);
    assert_lineage(journal_settings.identity);
    tpm_let_go(tpm);
    assert_lineage(journal_settings.identity);
    init_held(moved, n_moved);
    assert_int_equal(tpm_admit(tpm, &another, false), TPM_SUCCESS);
    assert_int_equal(tpm_store_permanent(tpm), TPM_SUCCESS);
    assert_lineage(another.identity);
    free(moved);
}

/* As QEMU asks for all of it, of storage that hosts share. */
static void give_and_unlock(void)
{
    uint8_t *bytes;
    size_t n_bytes;

    assert_int_equal(tpm_get_state(tpm, LINK_STATE_PERMANENT, &bytes, &n_bytes), TPM_SUCCESS);
    free(bytes);
    assert_true(io.is_locked);
    tpm_unlock_given(tpm);
    assert_false(io.is_locked);
}

static void invariant_3_what_was_given_is_gone_on_with_under_its_lock_alone(void **state)
{
    (void)state;
    io.is_locked = true;
    tpm_share(tpm, true, false);
    start();
    tpm_unlock_given(tpm); /* QEMU has not asked for the permanent state */
    assert_true(io.is_locked);
    give_and_unlock();
    io.is_locked_elsewhere = true;
    assert_int_equal(EXECUTE(GET_RANDOM), 0x101);
    assert_int_equal(tpm_hash_start(tpm), TPM_FAIL);
    assert_int_equal(tpm_reset_established(tpm, 3), TPM_FAIL);
    assert_int_equal(tpm_store_volatile(tpm), TPM_FAIL);
    assert_int_equal(tpm_init(tpm, false), TPM_FAIL);
    assert_int_equal(tpm_unretire(tpm), TPM_FAIL);
    assert_int_equal(tpm_retire(tpm, true), TPM_FAIL);
    assert_true(tpm_lock(tpm) < 0);
    assert_false(io.is_locked);
    io.is_locked_elsewhere = false;
    assert_int_equal(EXECUTE(GET_RANDOM), 0);
    assert_true(io.is_locked);
    give_and_unlock();
    assert_int_equal(tpm_stop(tpm), TPM_SUCCESS);
    assert_false(io.is_locked);
}

static void what_is_not_shared_keeps_its_lock(void **state)
{
    uint8_t *bytes;
    size_t n_bytes;

    (void)state;
    io.is_locked = true;
    start();
    assert_int_equal(tpm_get_state(tpm, LINK_STATE_PERMANENT, &bytes, &n_bytes), TPM_SUCCESS);
    tpm_unlock_given(tpm);
    assert_true(io.is_locked);
    free(bytes);
}

static void what_is_to_come_is_locked_when_it_starts(void **state)
{
    uint8_t *bytes;
    size_t n_bytes;

    (void)state;
    start();
    assert_int_equal(tpm_get_state(tpm, LINK_STATE_PERMANENT, &bytes, &n_bytes), TPM_SUCCESS);
    tpm_free(tpm);
    io_memory_deinit(&io);
    io_memory_init(&io);
    tpm = tpm_new(&io.io);
    tpm_share(tpm, false, true);
    io.is_locked_elsewhere = true;
    assert_int_equal(tpm_set_state(tpm, LINK_STATE_PERMANENT, bytes, n_bytes), TPM_SUCCESS);
    assert_int_equal(tpm_init(tpm, true), TPM_FAIL);
    assert_int_equal(io.calls, 0);
    io.is_locked_elsewhere = false;
    assert_int_equal(tpm_set_state(tpm, LINK_STATE_PERMANENT, bytes, n_bytes), TPM_SUCCESS);
    assert_int_equal(tpm_init(tpm, true), TPM_SUCCESS);
    assert_true(io.is_locked);
    free(bytes);
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
        TEST(what_could_not_be_stored_is_not_copied),
        TEST(invariant_2_a_damaged_state_never_becomes_a_fresh_tpm),
        TEST(invariant_5_a_moved_state_is_bit_exact),
        TEST(a_stored_volatile_state_resumes_once),
        TEST(a_volatile_state_is_removed_durably_or_not_resumed_from),
        TEST(a_stored_volatile_state_is_not_resumed_from_when_the_guest_went_on),
        TEST(a_stop_is_orderly_for_a_guest_that_was_not),
        TEST(commands_in_the_wrong_state_are_refused),
        TEST(a_capture_takes_both_states_and_only_when_something_ran),
        TEST(invariant_3_what_was_given_is_gone_on_with_under_its_lock_alone),
        TEST(what_is_not_shared_keeps_its_lock),
        TEST(what_is_to_come_is_locked_when_it_starts),
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
        TEST(a_command_to_a_held_tpm_waits_only_so_long),
        TEST(a_command_waits_only_so_long_while_what_admits_it_waits_for_the_disk),
        TEST(a_command_that_stores_nothing_does_not_wait_for_the_state_s_own_file),
        TEST(commands_wait_while_a_retired_tpm_is_asked_back),
        TEST(waiting_commands_are_answered_when_nothing_will_come),
        TEST(a_held_start_uses_nothing_that_this_host_has_itself),
        TEST(what_libtpms_does_not_take_leaves_it_off_and_the_directory_as_it_was),
        TEST(invariant_3_a_boot_after_a_grant_starts_from_the_permanent_state_alone),
        TEST(invariant_12_a_guest_that_slept_finds_its_pcrs),
        TEST(invariant_12_a_guest_whose_state_qemu_has_is_shut_down_when_it_starts_again),
        TEST(invariant_12_a_plain_reset_leaves_no_pcrs),
        TEST(invariant_12_saved_sessions_do_not_pile_up_over_resets),
        TEST(invariant_12_a_shutdown_that_was_refused_is_none),
        TEST(invariant_12_that_a_guest_sleeps_is_seen_in_a_state_without_a_word_of_it),
        TEST(a_permanent_state_that_is_cut_or_of_another_version_says_nothing_of_power),
        TEST(a_permanent_state_with_a_profile_says_the_same_of_power),
        TEST(a_commit_that_changes_nothing_writes_nothing),
        JOURNAL_TEST(invariant_1_an_acknowledged_change_is_durable_in_the_journal),
        JOURNAL_TEST(a_journal_is_there_from_the_first_change_to_the_end),
        JOURNAL_TEST(invariant_1_a_change_that_cannot_be_appended_is_not_acknowledged),
        JOURNAL_TEST(generations_go_on_from_what_was_used),
        JOURNAL_TEST(invariant_3_a_retired_tpm_writes_nothing_whatever_is_asked),
        JOURNAL_TEST(a_tpm_that_serves_again_appends_again),
        JOURNAL_TEST(invariant_3_a_retired_tpm_waits_for_its_folding),
        JOURNAL_TEST(invariant_3_what_was_given_away_is_not_written),
        JOURNAL_TEST(a_guest_that_runs_on_after_a_snapshot_is_served_as_before),
        JOURNAL_TEST(a_snapshot_is_loaded_after_the_state_was_given),
        JOURNAL_TEST(invariant_12_that_a_guest_sleeps_travels_with_its_state),
        JOURNAL_TEST(invariant_12_a_guest_that_woke_up_after_a_move_sleeps_no_more),
        JOURNAL_TEST(a_tpm_that_could_not_be_admitted_is_admitted_later),
        JOURNAL_TEST(invariant_3_vtpm_that_has_not_come_stays_another_hosts),
        JOURNAL_TEST(invariant_13_what_comes_is_of_its_own_lineage),
        JOURNAL_TEST(invariant_13_the_same_state_of_another_lineage_is_written),
        JOURNAL_TEST(invariant_13_what_is_admitted_is_of_its_own_lineage),
        TEST(an_h_crtm_event_sets_the_established_bit_until_it_is_reset),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
