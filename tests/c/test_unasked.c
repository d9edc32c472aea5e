/* What becomes of commands when vtpmd is not there: the table of docs/ARCHITECTURE.md, cell by
 * cell.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "unasked.h"

enum {
    LINE_BYTES_MAX = 512,
    STATES_OFF = TPM_FENCED + 1,
};

static const char *const names[UNASKED_COMMANDS] = {
    [UNASKED_INIT] = "INIT",
    [UNASKED_INIT_NEW] = "INIT, no state to start from",
    [UNASKED_INIT_TAIL] = "INIT, of a guest that came with a tail",
    [UNASKED_STOP] = "STOP, SHUTDOWN of a vTPM that was granted and is not admitted",
    [UNASKED_STATE] = "GET_STATEBLOB",
    [UNASKED_BLOB] = "SET_STATEBLOB",
    [UNASKED_TAIL] = "SET_STATEBLOB, a tail",
    [UNASKED_CONNECTED] = "SET_DATAFD",
    [UNASKED_RUNS] = "LOCK_STORAGE",
};

/* Append the letters of the cells of a line, which is found by what it begins with. */
static void read_row(const char *start, char *letters)
{
    char line[LINE_BYTES_MAX];
    bool is_in_table = false, is_found = false;
    size_t n = 0;

    FILE *file = fopen(ARCHITECTURE, "r");
    assert_non_null(file);
    while (!is_found && fgets(line, sizeof(line), file)) {
        is_in_table |= strncmp(line, "### Without vtpmd", 17) == 0;
        is_found = is_in_table && strncmp(line, start, strlen(start)) == 0;
    }
    fclose(file);
    if (!is_found)
        fail_msg("%s has no row %s", ARCHITECTURE, start);
    for (const char *cell = line + strlen(start); *cell; cell++) {
        if (strchr("giawr", *cell)) {
            assert_true(n < STATES_OFF + TPM_CUSTODIES);
            letters[n++] = *cell;
        }
    }
    assert_int_equal(n, STATES_OFF + TPM_CUSTODIES);
}

static void try_command(enum unasked_command command)
{
    char start[LINE_BYTES_MAX], letters[STATES_OFF + TPM_CUSTODIES];

    snprintf(start, sizeof(start), "| %s | ", names[command]);
    read_row(start, letters);
    for (int custody = TPM_ACTIVE; custody <= TPM_FENCED; custody++)
        assert_int_equal(unasked_verdict(command, TPM_OFF, (enum tpm_custody)custody),
                         letters[custody]);
    for (int custody = TPM_ACTIVE; custody <= TPM_PENDING; custody++)
        assert_int_equal(unasked_verdict(command, TPM_ON, (enum tpm_custody)custody),
                         letters[STATES_OFF + custody]);
}

static void invariant_11_each_command_goes_on_or_is_refused_as_the_table_says(void **state)
{
    (void)state;
    for (int command = 0; command < UNASKED_COMMANDS; command++)
        try_command((enum unasked_command)command);
}

/* What is another host's, or may be, or is held, never starts, and takes nothing. */
static void invariant_3_nothing_of_another_host_is_started(void **state)
{
    static const enum unasked_command starts[] = {
        UNASKED_INIT,
        UNASKED_INIT_NEW,
        UNASKED_INIT_TAIL,
        UNASKED_BLOB,
    };

    (void)state;
    for (size_t i = 0; i < sizeof(starts) / sizeof(*starts); i++) {
        assert_int_equal(unasked_verdict(starts[i], TPM_OFF, TPM_FENCED), UNASKED_REFUSE);
        for (int custody = TPM_FENCED; custody <= TPM_PENDING; custody++) {
            enum unasked verdict = unasked_verdict(starts[i], TPM_ON, (enum tpm_custody)custody);
            assert_true(verdict == UNASKED_REFUSE || verdict == UNASKED_WAIT);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(invariant_11_each_command_goes_on_or_is_refused_as_the_table_says),
        cmocka_unit_test(invariant_3_nothing_of_another_host_is_started),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
