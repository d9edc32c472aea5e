/* Who has the lock by its record, as an engine takes it, keeps it and gives it back: invariant 3.
 *
 * On a real file, whose lock nobody else has: only the record says that another host does.
 */
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "holder.h"
#include "io.h"

#define BOOT "11111111-1111-1111-1111-111111111111"
#define OTHER_BOOT "22222222-2222-2222-2222-222222222222"
#define MACHINE "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
#define NO_MACHINE "--------------------------------"
#define NAMESPACE "00000000004026531836"
#define OTHER_NAMESPACE "00000000004026532000"

struct says {
    const char *state, *boot, *machine, *namespace, *host;
};

static const struct says mine = {"held", BOOT, MACHINE, NAMESPACE, "web1"};

/* What a record says, and what is found: docs/state-format.md has the table. */
static const struct {
    struct says says;
    enum holder_found found;
} rows[] = {
    {{"free", OTHER_BOOT, MACHINE, NAMESPACE, "web2"}, HOLDER_FREE},
    {{"held", BOOT, MACHINE, NAMESPACE, "web1"}, HOLDER_HERE},
    {{"held", BOOT, NO_MACHINE, NAMESPACE, "web2"}, HOLDER_HERE},
    {{"held", OTHER_BOOT, MACHINE, OTHER_NAMESPACE, "web1"}, HOLDER_HERE},
    {{"held", BOOT, MACHINE, OTHER_NAMESPACE, "web1"}, HOLDER_ELSEWHERE},
    {{"held", OTHER_BOOT, MACHINE, NAMESPACE, "web2"}, HOLDER_ELSEWHERE},
    {{"held", OTHER_BOOT, NO_MACHINE, NAMESPACE, "web1"}, HOLDER_ELSEWHERE},
    {{"lost", OTHER_BOOT, MACHINE, NAMESPACE, "web1"}, HOLDER_DAMAGED},
};

static struct io_posix files;

static void make(const struct says *says, uint8_t *record)
{
    char text[HOLDER_BYTES + 1];
    int n =
        snprintf(text, sizeof(text),
                 "vtpmlock1\n%s\n%s\n%s\n%s\n%010d\n%020d\n2026-11-28T19:00:00Z\n%-64s\n%287s\n",
                 says->state, says->boot, says->machine, says->namespace, 42, 7, says->host, "");

    assert_int_equal(n, HOLDER_BYTES);
    memcpy(record, text, HOLDER_BYTES);
}

static int set_up(void **state)
{
    char name[] = "/tmp/test_holder-XXXXXX";

    (void)state;
    files = (struct io_posix){.io = io_posix_functions, .lock_fd = mkstemp(name)};
    assert_true(files.lock_fd >= 0);
    unlink(name);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    holder_end();
    close(files.lock_fd);
    return 0;
}

static void put(const uint8_t *record, size_t n_bytes)
{
    assert_int_equal(files.io.write_at(&files.io, files.lock_fd, record, n_bytes, 0), 0);
}

/* The record is this process's, and says that. */
static void assert_says(const char *state)
{
    uint8_t record[HOLDER_BYTES], wanted[HOLDER_BYTES];
    struct says says = mine;

    says.state = state;
    make(&says, wanted);
    files.io.read_at(&files.io, files.lock_fd, record, HOLDER_BYTES, 0);
    assert_memory_equal(record, wanted, HOLDER_BYTES);
}

static void keep(bool is_held)
{
    uint8_t record[HOLDER_BYTES];

    make(&mine, record);
    if (is_held)
        put(record, HOLDER_BYTES);
    holder_keep(&files, record, is_held);
}

static void test_nothing_is_anybodys(void **state)
{
    uint8_t own[HOLDER_BYTES], nothing[HOLDER_BYTES] = {0};

    (void)state;
    make(&mine, own);
    assert_int_equal(holder_find(nothing, own), HOLDER_NOTHING);
}

static void test_what_is_found_is_taken_or_left(void **state)
{
    uint8_t own[HOLDER_BYTES], record[HOLDER_BYTES], now[HOLDER_BYTES];

    make(&mine, own);
    for (size_t i = 0; i < sizeof(rows) / sizeof(*rows); i++) {
        make(&rows[i].says, record);
        assert_int_equal(holder_find(record, own), rows[i].found);
        put(record, HOLDER_BYTES);
        keep(false);
        bool is_others = rows[i].found >= HOLDER_ELSEWHERE;
        assert_int_equal(files.io.lock(&files.io, true), is_others ? -EBUSY : 0);
        assert_int_equal(holder_other() != NULL, is_others);
        if (is_others) {
            files.io.read_at(&files.io, files.lock_fd, now, HOLDER_BYTES, 0);
            assert_memory_equal(now, record, HOLDER_BYTES);
        } else {
            assert_says("held");
        }
        tear_down(state);
        set_up(state);
    }
}

static void test_a_lock_is_given_back_before_it_is_let_go_of(void **state)
{
    (void)state;
    keep(true);
    assert_int_equal(files.io.lock(&files.io, true), 0);
    assert_int_equal(files.io.lock(&files.io, false), 0);
    assert_says("free");
    assert_int_equal(files.io.lock(&files.io, true), 0);
    assert_says("held");
    holder_end();
    assert_says("free");
}

static void test_what_another_has_written_over_it_stays(void **state)
{
    uint8_t record[HOLDER_BYTES], now[HOLDER_BYTES];

    (void)state;
    keep(true);
    make(&rows[5].says, record);
    put(record, HOLDER_BYTES);
    assert_int_equal(files.io.lock(&files.io, true), -EBUSY);
    assert_string_equal(holder_other(), "host web2, process 42, since 2026-11-28T19:00:00Z");
    holder_end();
    files.io.read_at(&files.io, files.lock_fd, now, HOLDER_BYTES, 0);
    assert_memory_equal(now, record, HOLDER_BYTES);
}

/* Invariant 8: no byte of it is trusted, in a line for people neither. */
static void test_what_is_named_is_printable(void **state)
{
    uint8_t record[HOLDER_BYTES];

    for (size_t at = 0; at < HOLDER_BYTES - 1; at++) {
        make(&rows[5].says, record);
        record[at] = '\033';
        put(record, HOLDER_BYTES);
        keep(false);
        int r = files.io.lock(&files.io, true);
        assert_true(r == -EBUSY);
        assert_null(strchr(holder_other(), '\033'));
        tear_down(state);
        set_up(state);
    }
}

static void test_what_has_no_lock_says_nothing(void **state)
{
    uint8_t record[HOLDER_BYTES], now[HOLDER_BYTES];

    (void)state;
    make(&rows[5].says, record);
    put(record, HOLDER_BYTES);
    keep(false);
    assert_int_equal(files.io.lock(&files.io, false), 0);
    holder_end();
    files.io.read_at(&files.io, files.lock_fd, now, HOLDER_BYTES, 0);
    assert_memory_equal(now, record, HOLDER_BYTES);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_nothing_is_anybodys, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_what_is_found_is_taken_or_left, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_a_lock_is_given_back_before_it_is_let_go_of, set_up,
                                        tear_down),
        cmocka_unit_test_setup_teardown(test_what_another_has_written_over_it_stays, set_up,
                                        tear_down),
        cmocka_unit_test_setup_teardown(test_what_is_named_is_printable, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_what_has_no_lock_says_nothing, set_up, tear_down),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
