/* What is done, and what refused, of each operation in each state: docs/ARCHITECTURE.md's table
 * against a TPM, with the real libtpms. Every row is tried in every state there is, and after it
 * the state is told from what is answered.
 *
 * Invariant 3: one that is another host's, or not yet this one's, executes and writes nothing.
 */
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>
#include <libtpms/tpm_error.h>

#include "bytes.h"
#include "checkpoint.h"
#include "cipher.h"
#include "custody.h"
#include "document.h"
#include "guest.h"
#include "journal.h"
#include "pages.h"
#include "standby.h"
#include "tpm_in_memory.h"

/* tpm.c asks the one below, which sees what is asked. */
#define activity_after activity_after_unseen
#include "activity.c"
#undef activity_after

enum {
    STATES_OFF = TPM_FENCED + 1,
};

static const char letters[] = "AGFRSP"; /* of custodies, as the table has them */

static const struct checkpoint_lineage own = {.identity = "this vTPM's own.", .generation = 1};

static struct tpm_response response;
static bool has_started_up; /* the guest */

static bool seen_activities[ACTIVITY_EVENTS][ACTIVITIES];
static enum activity activity; /* after the last event */

enum activity activity_after(enum activity_event event, enum activity now)
{
    seen_activities[event][now] = true;
    activity = activity_after_unseen(event, now);
    return activity;
}

/* Takes the C library's place, by the linker (meson.build): no command waits for time to pass. */
int __wrap_pthread_cond_timedwait(pthread_cond_t *condition, pthread_mutex_t *mutex,
                                  const struct timespec *until)
{
    (void)condition, (void)mutex, (void)until;
    return ETIMEDOUT;
}

static TPM_RESULT do_capture(void)
{
    enum link_shutdown said;
    bool worked;

    return tpm_capture(tpm, store, &worked, &said);
}

static TPM_RESULT do_copy(void)
{
    struct tpm_copy copy;

    TPM_RESULT result = tpm_copy(tpm, &copy);
    assert_int_equal(copy.states[LINK_STATE_PERMANENT].exists, result == TPM_SUCCESS);
    tpm_copy_deinit(&copy);
    return result;
}

static TPM_RESULT get(enum link_state_type type)
{
    uint8_t *bytes = NULL;
    size_t n_bytes;

    TPM_RESULT result = tpm_get_state(tpm, type, &bytes, &n_bytes);
    free(bytes);
    return result;
}

/* Bring a TPM that is active, and was captured, there. `before` is what a standby goes back to. */
static void go_to(enum tpm_power power, enum tpm_custody custody, enum tpm_custody before)
{
    enum tpm_custody own = custody_is_ahead(custody) ? before : custody;

    if (own == TPM_GIVEN)
        assert_int_equal(get(LINK_STATE_PERMANENT), TPM_SUCCESS);
    if (own == TPM_FENCED || own == TPM_RECLAIMING)
        assert_int_equal(tpm_retire(tpm, false), TPM_SUCCESS);
    if (own == TPM_RECLAIMING)
        assert_int_equal(tpm_await(tpm, true), TPM_SUCCESS);
    if (power == TPM_OFF)
        assert_int_equal(tpm_stop(tpm), TPM_SUCCESS);
    if (custody_is_ahead(custody))
        assert_int_equal(tpm_stand_by_again(tpm), TPM_SUCCESS);
    if (custody == TPM_PENDING)
        assert_int_equal(tpm_expect(tpm), TPM_SUCCESS);
    io.calls = 0;
}

/* A new TPM, of which nothing has run. */
static void enter(enum tpm_power power, enum tpm_custody custody, enum tpm_custody before)
{
    tpm_in_memory_begin();
    assert_int_equal(tpm_init(tpm, false), TPM_SUCCESS);
    assert_int_equal(do_capture(), TPM_SUCCESS);
    go_to(power, custody, before);
}

/* Operations, as the table calls them. What each needs to succeed has been seen to. */

static TPM_RESULT do_execute(void)
{
    uint8_t get_random[] = {0x80, 1, 0, 0, 0, 12, 0, 0, 1, 0x7b, 0, 8};

    tpm_execute(tpm, get_random, sizeof(get_random), &response);
    uint32_t code = get_be32(response.bytes + 6);
    if (code == TPM2_RC_FAILURE)
        return TPM_FAIL;
    if (code == TPM2_RC_RETRY)
        return code;
    assert_int_equal(code, has_started_up ? 0 : 0x100); /* TPM_RC_INITIALIZE: it was executed */
    return TPM_SUCCESS;
}

static TPM_RESULT do_init(void)
{
    return tpm_init(tpm, false);
}

static TPM_RESULT do_init_came(void)
{
    return tpm_init(tpm, true);
}

static TPM_RESULT do_init_standby(void)
{
    return tpm_stand_by_again(tpm);
}

static TPM_RESULT do_expect(void)
{
    return tpm_expect(tpm);
}

static TPM_RESULT do_admit(void)
{
    return tpm_admit(tpm, &own, false);
}

static TPM_RESULT do_let_go(void)
{
    tpm_let_go(tpm);
    return TPM_SUCCESS;
}

static TPM_RESULT do_forget_state(void)
{
    return tpm_forget_state(tpm);
}

static TPM_RESULT do_stop(void)
{
    return tpm_stop(tpm);
}

static TPM_RESULT do_stop_fenced(void)
{
    return tpm_stop_fenced(tpm);
}

static TPM_RESULT do_await(void)
{
    return tpm_await(tpm, true);
}

static TPM_RESULT do_await_no_more(void)
{
    return tpm_await(tpm, false);
}

static TPM_RESULT do_retire_unchanged(void)
{
    return tpm_retire(tpm, false);
}

static TPM_RESULT do_retire_unserved(void)
{
    return tpm_retire(tpm, true);
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

static TPM_RESULT do_store_volatile(void)
{
    return tpm_store_volatile(tpm);
}

static TPM_RESULT do_get_permanent(void)
{
    return get(LINK_STATE_PERMANENT);
}

static TPM_RESULT do_get_volatile(void)
{
    return get(LINK_STATE_VOLATILE);
}

static TPM_RESULT do_set_state(void)
{
    return tpm_set_state(tpm, LINK_STATE_VOLATILE, NULL, 0);
}

static TPM_RESULT do_store_permanent(void)
{
    return tpm_store_permanent(tpm);
}

static TPM_RESULT do_load_state(void)
{
    return tpm_load_state(tpm, LINK_STATE_VOLATILE, (const uint8_t *)"x", 1);
}

static TPM_RESULT do_set_key(void)
{
    struct cipher_key key = {.n_bytes = 16};

    return tpm_set_key(tpm, &key);
}

static TPM_RESULT do_set_buffer_size(void)
{
    uint32_t sizes[3];

    return tpm_set_buffer_size(tpm, 4096, sizes);
}

static const struct operation {
    const char *name;
    TPM_RESULT (*function)(void);
    enum tpm_operation operation;
} operations[] = {
    {"EXECUTE", do_execute, OP_EXECUTE},
    {"INIT", do_init, OP_INIT},
    {"INIT, came", do_init_came, OP_INIT_CAME},
    {"INIT, standby", do_init_standby, OP_INIT_STANDBY},
    {"EXPECT", do_expect, OP_EXPECT},
    {"ADMIT", do_admit, OP_ADMIT},
    {"the link's end", do_let_go, OP_LET_GO},
    {"FORGET_STATE", do_forget_state, OP_FORGET_STATE},
    {"STOP, fenced", do_stop_fenced, OP_STOP_FENCED},
    {"STOP", do_stop, OP_STOP},
    {"AWAIT 1", do_await, OP_AWAIT},
    {"AWAIT 0", do_await_no_more, OP_AWAIT_NO_MORE},
    {"RETIRE, unchanged", do_retire_unchanged, OP_RETIRE_UNCHANGED},
    {"RETIRE, unserved", do_retire_unserved, OP_RETIRE_UNSERVED},
    {"UNRETIRE", do_unretire, OP_UNRETIRE},
    {"GET_ESTABLISHED", do_get_established, OP_GET_ESTABLISHED},
    {"RESET_ESTABLISHED", do_reset_established, OP_RESET_ESTABLISHED},
    {"HASH_START", do_hash_start, OP_HASH},
    {"HASH_DATA", do_hash_data, OP_HASH},
    {"HASH_END", do_hash_end, OP_HASH},
    {"CANCEL", do_cancel, OP_CANCEL},
    {"STORE_VOLATILE", do_store_volatile, OP_STORE_VOLATILE},
    {"GET_STATE, permanent", do_get_permanent, OP_GET_PERMANENT},
    {"GET_STATE, other", do_get_volatile, OP_GET_OTHER},
    {"SET_STATE", do_set_state, OP_SET_STATE},
    {"CAPTURE", do_capture, OP_CAPTURE},
    {"COPY", do_copy, OP_COPY},
    {"STORE_PERMANENT", do_store_permanent, OP_STORE_PERMANENT},
    {"LOAD_STATE", do_load_state, OP_SET_UP},
    {"SET_KEY", do_set_key, OP_SET_UP},
    {"SET_BUFFER_SIZE", do_set_buffer_size, OP_SET_BUFFER_SIZE},
};

/* Returns what an answer says of the verdict: idle is a success, as done is. */
static char verdict_of(TPM_RESULT result)
{
    switch (result) {
    case TPM_SUCCESS:
        return 'd';
    case TPM_BAD_ORDINAL:
        return 'n';
    case TPM2_RC_RETRY:
        return 'w';
    default:
        assert_int_equal(result, TPM_FAIL);
        return 'f';
    }
}

/* Tell custody by what is answered, which changes it. */
static char find_custody(void)
{
    bool is_on = do_cancel() == TPM_SUCCESS;

    if (do_store_permanent() == TPM_SUCCESS)
        return 'A';
    if (!is_on)
        return do_init() == TPM_SUCCESS ? 'G' : 'F';
    if (do_get_established() != TPM_SUCCESS)
        return 'S';
    switch (verdict_of(do_execute())) {
    case 'd':
        return 'G';
    case 'f':
        return 'F';
    default:
        return do_await_no_more() == TPM_SUCCESS ? 'R' : 'P';
    }
}

struct row {
    char off[STATES_OFF + 1], on[TPM_CUSTODIES + 1], then[TPM_CUSTODIES + 1];
};

static struct row read_row(const char *name)
{
    struct row row;

    const char *cell =
        document_read_cell(document_find_row(ARCHITECTURE, name), row.off, STATES_OFF);
    cell = document_read_cell(cell, row.on, TPM_CUSTODIES);
    document_read_cell(cell, row.then, TPM_CUSTODIES);
    return row;
}

/* What the row says: the verdict that is seen, and the custody then. */
struct outcome {
    char verdict, custody, before;
};

static struct outcome outcome_of(const struct row *row, enum tpm_power power,
                                 enum tpm_custody custody, enum tpm_custody before)
{
    char verdict = (power == TPM_ON ? row->on : row->off)[custody];

    if (verdict == 'l') {
        custody = before;
        verdict = row->off[custody];
    }
    char then = verdict == 'd' ? row->then[custody] : '.';
    struct outcome outcome = {verdict == 'i' ? 'd' : verdict, letters[custody], letters[before]};
    if (then == 'a')
        outcome.before = 'A';
    else if (then == 'S')
        outcome.before = custody == TPM_RECLAIMING ? 'F' : letters[custody];
    if (then != '.' && then != 'a')
        outcome.custody = then;
    return outcome;
}

/* What custody.c has, also where nothing is seen of it: an operation that takes no notice of it. */
static void the_tables_rows_are_the_documents(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof(operations) / sizeof(*operations); i++) {
        struct row row = read_row(operations[i].name);
        for (enum tpm_custody custody = TPM_ACTIVE; custody < TPM_CUSTODIES; custody++) {
            enum tpm_operation operation = operations[i].operation;
            if (custody < STATES_OFF)
                assert_int_equal(custody_verdict(operation, TPM_OFF, custody), row.off[custody]);
            assert_int_equal(custody_verdict(operation, TPM_ON, custody), row.on[custody]);
            enum tpm_custody before = TPM_FENCED;
            enum tpm_custody after = custody_after(operation, custody, &before);
            char then = row.then[custody];
            assert_int_equal(letters[after], strchr(".a", then) ? letters[custody] : then);
            assert_int_equal(before == TPM_ACTIVE, then == 'a' || (then == 'S' && custody == 0));
        }
    }
}

static void try_cell(const struct operation *operation, enum tpm_power power,
                     enum tpm_custody custody, enum tpm_custody before)
{
    struct row row = read_row(operation->name);
    struct outcome expected = outcome_of(&row, power, custody, before), seen = {0};

    enter(power, custody, before);
    seen.verdict = verdict_of(operation->function());
    bool has_written = io.calls > 0;
    seen.custody = find_custody();
    if (expected.custody == 'S' || expected.custody == 'P')
        tpm_let_go(tpm);
    seen.before =
        expected.custody == 'S' || expected.custody == 'P' ? find_custody() : expected.before;
    if (memcmp(&seen, &expected, sizeof(seen)) != 0)
        fail_msg("%s when %s, %c over %c: %c %c %c, not %c %c %c", operation->name,
                 power == TPM_ON ? "on" : "off", letters[custody], letters[before], seen.verdict,
                 seen.custody, seen.before, expected.verdict, expected.custody, expected.before);
    if (has_written)
        assert_true(expected.verdict == 'd' && expected.custody == 'A');
    tpm_in_memory_end();
}

static void invariant_3_every_operation_in_every_state_is_as_the_table_says(void **state)
{
    (void)state;
    tpm_response_init(&response);
    for (size_t i = 0; i < sizeof(operations) / sizeof(*operations); i++) {
        for (enum tpm_custody custody = TPM_ACTIVE; custody <= TPM_FENCED; custody++)
            try_cell(&operations[i], TPM_OFF, custody, TPM_ACTIVE);
        for (enum tpm_custody custody = TPM_ACTIVE; custody <= TPM_RECLAIMING; custody++)
            try_cell(&operations[i], TPM_ON, custody, TPM_ACTIVE);
        for (enum tpm_custody before = TPM_ACTIVE; before <= TPM_FENCED; before++) {
            try_cell(&operations[i], TPM_ON, TPM_STANDBY, before);
            try_cell(&operations[i], TPM_ON, TPM_PENDING, before);
        }
    }
    tpm_response_deinit(&response);
}

/* What ran. */

static const char *const event_names[ACTIVITY_EVENTS] = {
    [ACTIVITY_STARTED] = "STARTED", [ACTIVITY_CAME] = "CAME", [ACTIVITY_RESET] = "RESET",
    [ACTIVITY_WORKED] = "WORKED",   [ACTIVITY_SAID] = "SAID",
};

static void what_ran_is_the_documents(void **state)
{
    char cell[ACTIVITIES + 1];

    (void)state;
    for (int event = 0; event < ACTIVITY_EVENTS; event++) {
        document_read_cell(document_find_row(ARCHITECTURE, event_names[event]), cell, ACTIVITIES);
        assert_string_equal(cell, activity_rows[event]);
    }
}

/* Of a guest that has started up, and was shut down. */
static struct guest_states came;

static uint32_t execute(const char *command, size_t command_bytes)
{
    uint8_t copy[16];

    memcpy(copy, command, command_bytes);
    tpm_execute(tpm, copy, command_bytes, &response);
    return get_be32(response.bytes + 6);
}

#define EXECUTE(command) execute(command, sizeof(command) - 1)
#define STARTUP_CLEAR "\x80\x01\0\0\0\x0c\0\0\x01\x44\0\0"
#define SHUTDOWN_CLEAR "\x80\x01\0\0\0\x0c\0\0\x01\x45\0\0"

static void start_as_it_came(void)
{
    struct checkpoint_lineage lineage = own;
    const struct image *permanent = &came.of[0], *rest = &came.of[1];

    lineage.generation = 1000;
    assert_int_equal(tpm_set_come(tpm, &lineage, permanent->bytes, permanent->n_bytes), 0);
    assert_int_equal(tpm_set_state(tpm, LINK_STATE_VOLATILE, rest->bytes, rest->n_bytes), 0);
    assert_int_equal(tpm_init_come(tpm, &lineage), TPM_SUCCESS);
}

/* Bring a TPM there, active and captured, of a guest that has started up. */
static void enter_activity(enum activity wanted)
{
    tpm_in_memory_begin();
    if (wanted == ACTIVITY_AS_IT_CAME) {
        start_as_it_came();
    } else {
        assert_int_equal(tpm_init(tpm, false), TPM_SUCCESS);
        assert_int_equal(EXECUTE(STARTUP_CLEAR), 0);
    }
    if (wanted == ACTIVITY_SHUT_DOWN)
        assert_int_equal(EXECUTE(SHUTDOWN_CLEAR), 0);
    assert_int_equal(activity, wanted);
    assert_int_equal(do_capture(), TPM_SUCCESS);
}

/* What an operation leaves, if it is done. */
static enum activity activity_left(enum tpm_operation operation, enum activity before)
{
    switch (operation) {
    case OP_EXECUTE:
    case OP_RESET_ESTABLISHED:
    case OP_HASH:
    case OP_INIT:
    case OP_INIT_CAME:
    case OP_INIT_STANDBY:
        return ACTIVITY_USED;
    default:
        return before;
    }
}

static void try_activity(const struct operation *operation, enum tpm_power power,
                         enum tpm_custody custody, enum tpm_custody own, enum activity wanted)
{
    struct row row = read_row(operation->name);

    enter_activity(wanted);
    go_to(power, custody, own);
    enum activity before = activity;
    assert_int_equal(before, custody_is_ahead(custody) ? ACTIVITY_USED : wanted);
    operation->function();
    struct outcome outcome = outcome_of(&row, power, custody, own);
    enum activity expected =
        outcome.verdict == 'd' ? activity_left(operation->operation, before) : before;
    if (activity != expected)
        fail_msg("%s when %s, %c over %c, %d: %d, not %d", operation->name,
                 power == TPM_ON ? "on" : "off", letters[custody], letters[own], wanted, activity,
                 expected);
    tpm_in_memory_end();
}

static void try_activity_everywhere(const struct operation *operation, enum activity wanted)
{
    for (enum tpm_custody custody = TPM_ACTIVE; custody <= TPM_FENCED; custody++)
        try_activity(operation, TPM_OFF, custody, TPM_ACTIVE, wanted);
    for (enum tpm_custody custody = TPM_ACTIVE; custody <= TPM_RECLAIMING; custody++)
        try_activity(operation, TPM_ON, custody, TPM_ACTIVE, wanted);
    for (enum tpm_custody own = TPM_ACTIVE; own <= TPM_FENCED; own++) {
        try_activity(operation, TPM_ON, TPM_STANDBY, own, wanted);
        try_activity(operation, TPM_ON, TPM_PENDING, own, wanted);
    }
}

static int set_up_came(void **state)
{
    (void)state;
    tpm_response_init(&response);
    tpm_in_memory_begin();
    assert_int_equal(tpm_init(tpm, false), TPM_SUCCESS);
    assert_int_equal(EXECUTE(STARTUP_CLEAR), 0);
    came = guest_states_capture();
    tpm_in_memory_end();
    memset(seen_activities, 0, sizeof(seen_activities));
    has_started_up = true;
    return 0;
}

static int tear_down_came(void **state)
{
    (void)state;
    guest_states_deinit(&came);
    tpm_response_deinit(&response);
    return 0;
}

static void every_operation_leaves_what_ran_as_the_table_says(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof(operations) / sizeof(*operations); i++)
        for (enum activity wanted = ACTIVITY_USED; wanted < ACTIVITIES; wanted++)
            try_activity_everywhere(&operations[i], wanted);
    for (int event = 0; event < ACTIVITY_EVENTS; event++)
        for (int i = 0; i < ACTIVITIES; i++)
            assert_int_equal(seen_activities[event][i], activity_rows[event][i] != '-');
}

static uint64_t generation_now(void)
{
    struct checkpoint_lineage now;

    assert_true(tpm_get_lineage(tpm, &now));
    return now.generation;
}

/* Each TPM2_Shutdown changes the permanent state: it has the TPM's clock, which goes on. */
static void a_stop_goes_by_what_ran(void **state)
{
    static const struct timespec clock_tick = {.tv_nsec = 5000000};

    (void)state;
    for (enum activity wanted = ACTIVITY_USED; wanted < ACTIVITIES; wanted++)
        for (enum tpm_custody custody = TPM_ACTIVE; custody <= TPM_RECLAIMING; custody++) {
            enter_activity(wanted);
            go_to(TPM_ON, custody, TPM_ACTIVE);
            uint64_t before = generation_now();
            nanosleep(&clock_tick, NULL);
            assert_int_equal(tpm_stop(tpm), TPM_SUCCESS);
            bool says = generation_now() > before;
            assert_int_equal(says, wanted == ACTIVITY_USED && custody == TPM_ACTIVE);
            before = generation_now();
            if (tpm_init(tpm, false) == TPM_SUCCESS) {
                bool is_kept = wanted == ACTIVITY_AS_IT_CAME || custody == TPM_GIVEN;
                bool says_now = generation_now() > before;
                assert_int_equal(says_now, is_kept && wanted != ACTIVITY_SHUT_DOWN);
            }
            tpm_in_memory_end();
        }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_tables_rows_are_the_documents),
        cmocka_unit_test(invariant_3_every_operation_in_every_state_is_as_the_table_says),
        cmocka_unit_test(what_ran_is_the_documents),
        cmocka_unit_test_setup_teardown(every_operation_leaves_what_ran_as_the_table_says,
                                        set_up_came, tear_down_came),
        cmocka_unit_test_setup_teardown(a_stop_goes_by_what_ran, set_up_came, tear_down_came),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
