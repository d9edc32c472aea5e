/* Whether a TPM 1.2's volatile state says that there is a saved one: with libtpms' own states.
 *
 * Invariant 8: what has come is from outside: no length, and no byte, is trusted.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <libtpms/tpm_error.h>

#include "bytes.h"
#include "checkpoint.h"
#include "link_types.h"
#include "nvram.h"
#include "saved.h"
#include "tpm_in_memory.h"
#include "version.h"

#define FILE_NAME "tpm-00.savestate"
#define STARTUP "\0\xc1\0\0\0\x0c\0\0\0\x99\0\1"
#define STARTUP_STATE "\0\xc1\0\0\0\x0c\0\0\0\x99\0\2"
#define SAVE_STATE "\0\xc1\0\0\0\x0a\0\0\0\x98"
#define EXTEND                                                                                     \
    "\0\xc1\0\0\0\x22\0\0\0\x14\0\0\0\5"                                                           \
    "twenty bytes of it.."
#define PCR_READ "\0\xc1\0\0\0\x0e\0\0\0\x15\0\0\0\5"

#define execute(literal) execute_bytes(literal, sizeof(literal) - 1)

static struct tpm_response response;

static int set_up(void **state)
{
    (void)state;
    tpm_in_memory_begin();
    assert_int_equal(tpm_set_version(tpm, VERSION_1_2), TPM_SUCCESS);
    tpm_response_init(&response);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    tpm_response_deinit(&response);
    tpm_in_memory_end();
    version_set(VERSION_2_0);
    return 0;
}

static uint32_t execute_bytes(const char *bytes, size_t n_bytes)
{
    uint8_t command[64];

    memcpy(command, bytes, n_bytes);
    tpm_execute(tpm, command, n_bytes, &response);
    return get_be32(response.bytes + TPM_AT_CODE);
}

static void start(void)
{
    assert_int_equal(tpm_init(tpm, false), TPM_SUCCESS);
    assert_int_equal(execute(STARTUP), 0);
}

static uint8_t *get_volatile(size_t *n_bytes)
{
    uint8_t *bytes;

    assert_int_equal(tpm_get_state(tpm, LINK_STATE_VOLATILE, &bytes, n_bytes), TPM_SUCCESS);
    return bytes;
}

static bool is_of_use(void)
{
    size_t n_bytes;
    uint8_t *bytes = get_volatile(&n_bytes);

    bool is_so = saved_is_of_use(bytes, n_bytes);
    free(bytes);
    return is_so;
}

static void test_it_is_of_use_until_the_next_command(void **state)
{
    (void)state;
    start();
    assert_false(is_of_use());
    assert_int_equal(execute(SAVE_STATE), 0);
    assert_true(is_of_use());
    assert_int_equal(execute(EXTEND), 0);
    assert_false(is_of_use());
    assert_int_equal(tpm_init(tpm, false), TPM_SUCCESS); /* a reset, and no TPM_Startup yet */
    assert_true(is_of_use());
    assert_int_equal(execute(STARTUP), 0);
    assert_false(is_of_use());
}

static void test_what_is_cut_or_something_else_says_nothing(void **state)
{
    size_t n_bytes, least = 0;

    (void)state;
    start();
    assert_int_equal(execute(SAVE_STATE), 0);
    uint8_t *bytes = get_volatile(&n_bytes);
    while (!saved_is_of_use(bytes, least))
        assert_true(++least < n_bytes);
    for (size_t n = 0; n <= least; n++) { /* to the byte */
        uint8_t *cut = malloc(n ? n : 1);
        assert_non_null(cut);
        memcpy(cut, bytes, n);
        assert_int_equal(saved_is_of_use(cut, n), n == least);
        free(cut);
    }
    bytes[0] ^= 1;
    assert_false(saved_is_of_use(bytes, n_bytes));
    free(bytes);
}

/* Take a running TPM's states as a session brings them. */
static struct nvram_states capture(void)
{
    struct nvram_states states = {0};
    uint8_t *permanent, *saved = NULL;
    TPM_RESULT result;

    states.volatile_state = get_volatile(&states.volatile_bytes);
    assert_int_equal(tpm_get_state(tpm, LINK_STATE_PERMANENT, &permanent, &states.permanent_bytes),
                     TPM_SUCCESS);
    states.permanent = permanent;
    result = tpm_get_state(tpm, LINK_STATE_SAVESTATE, &saved, &states.saved_bytes);
    assert_true(result == TPM_SUCCESS || result == TPM_BLOB_NOT_FOUND);
    states.saved = saved;
    return states;
}

static void free_states(struct nvram_states *states)
{
    free((void *)states->permanent);
    free((void *)states->volatile_state);
    free((void *)states->saved);
}

static void arrive(const struct nvram_states *states)
{
    struct checkpoint_lineage came = {.identity = "this vTPM's own.", .generation = 9};

    assert_int_equal(tpm_init_standby(tpm, LINK_SHUTDOWN_NONE, states), TPM_SUCCESS);
    assert_int_equal(tpm_expect(tpm), TPM_SUCCESS);
    assert_int_equal(tpm_admit(tpm, &came, false), TPM_SUCCESS);
}

static void move_asleep(bool is_reset_before)
{
    const uint8_t *found;
    size_t n_found;
    uint8_t pcr[20];

    start();
    assert_int_equal(execute(EXTEND), 0);
    assert_int_equal(execute(PCR_READ), 0);
    memcpy(pcr, response.bytes + TPM_HEADER_BYTES, sizeof(pcr));
    assert_int_equal(execute(SAVE_STATE), 0);
    if (is_reset_before)
        assert_int_equal(tpm_init(tpm, false), TPM_SUCCESS);
    struct nvram_states states = capture();
    tear_down(NULL);
    set_up(NULL);
    arrive(&states);
    assert_true(io_memory_read_durable(&io, FILE_NAME, &found, &n_found));
    assert_memory_equal(found + n_found - states.saved_bytes, states.saved, states.saved_bytes);
    if (!is_reset_before) {
        assert_int_equal(tpm_stop(tpm), TPM_SUCCESS);
        assert_int_equal(tpm_init(tpm, false), TPM_SUCCESS);
    }
    assert_int_equal(execute(STARTUP_STATE), 0);
    assert_int_equal(execute(PCR_READ), 0);
    assert_memory_equal(response.bytes + TPM_HEADER_BYTES, pcr, sizeof(pcr));
    assert_false(io_memory_read(&io, FILE_NAME, &found, &n_found));
    free_states(&states);
}

static void test_it_moves_with_the_guest_that_sleeps(void **state)
{
    (void)state;
    move_asleep(false);
}

/* QEMU resets the TPM, moves, and lets the firmware go on there. */
static void test_it_moves_with_the_guest_that_wakes_up(void **state)
{
    (void)state;
    move_asleep(true);
}

/* One that this host had before is not the one of what has come. */
static void test_one_of_before_is_none_of_what_has_come(void **state)
{
    const uint8_t *found;
    size_t n_found;

    (void)state;
    start();
    struct nvram_states states = capture();
    assert_int_equal(execute(SAVE_STATE), 0);
    assert_true(io_memory_read_durable(&io, FILE_NAME, &found, &n_found));
    assert_int_equal(tpm_stop(tpm), TPM_SUCCESS);
    arrive(&states);
    assert_false(io_memory_read_durable(&io, FILE_NAME, &found, &n_found));
    free_states(&states);
}

static void test_an_image_of_both_is_taken_apart_as_it_was_made(void **state)
{
    static const uint8_t saved[] = "saved";
    uint8_t *both = malloc(3);
    size_t n_bytes = 3, volatile_bytes, saved_bytes;

    (void)state;
    assert_non_null(both);
    memcpy(both, "vol", 3);
    assert_int_equal(saved_append(&both, &n_bytes, saved, sizeof(saved)), 0);
    assert_true(saved_measure(both, n_bytes, &volatile_bytes, &saved_bytes));
    assert_int_equal(volatile_bytes, 3);
    assert_int_equal(saved_bytes, sizeof(saved));
    assert_memory_equal(both, "volsaved", 9);
    put_be32(both + n_bytes - 4, (uint32_t)n_bytes - 3); /* a byte more than there is */
    assert_false(saved_measure(both, n_bytes, &volatile_bytes, &saved_bytes));
    assert_false(saved_measure(both, 3, &volatile_bytes, &saved_bytes));
    free(both);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_it_is_of_use_until_the_next_command, set_up,
                                        tear_down),
        cmocka_unit_test_setup_teardown(test_what_is_cut_or_something_else_says_nothing, set_up,
                                        tear_down),
        cmocka_unit_test_setup_teardown(test_it_moves_with_the_guest_that_sleeps, set_up,
                                        tear_down),
        cmocka_unit_test_setup_teardown(test_it_moves_with_the_guest_that_wakes_up, set_up,
                                        tear_down),
        cmocka_unit_test(test_an_image_of_both_is_taken_apart_as_it_was_made),
        cmocka_unit_test_setup_teardown(test_one_of_before_is_none_of_what_has_come, set_up,
                                        tear_down),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
