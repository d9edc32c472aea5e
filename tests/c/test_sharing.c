/* Who may write to the files (sharing.h): docs/ARCHITECTURE.md's table against sharing.c, and every
 * cell of it against what nvram.c does, with a lock and files that are refused.
 */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "document.h"
#include "io_memory.h"
#include "journal.h"
#include "nvram.h"
#include "pages.h"

/* nvram.c asks the one below, which sees what is asked. */
#define sharing_after sharing_after_unseen
#include "sharing.c"
#undef sharing_after

enum {
    ROW_BYTES_MAX = 32,
};

static const char *const names[SHARING_EVENTS] = {
    [SHARING_UNLOCKED] = "UNLOCKED",
    [SHARING_LOCKED] = "LOCKED",
    [SHARING_WARNED] = "WARNED",
};

static const struct journal_settings settings = {
    .identity = "this vTPM's own.",
    .file_bytes = 2 * JOURNAL_PAGE_BYTES,
};

static struct io_memory io;
static struct store *own_store, *numbers; /* of generations */
static int n_looks;                       /* at the files again */
static bool seen[SHARING_EVENTS][SHARINGS];
static enum sharing sharing; /* after the last event */

enum sharing sharing_after(enum sharing_event event, enum sharing now)
{
    seen[event][now] = true;
    sharing = sharing_after_unseen(event, now);
    return sharing;
}

static void the_tables_rows_are_the_documents(void **state)
{
    (void)state;
    for (int event = 0; event < SHARING_EVENTS; event++) {
        const char *row = sharing_rows[event];
        char wanted[ROW_BYTES_MAX];
        snprintf(wanted, sizeof(wanted), "`%c %c %c %c` |\n", row[0], row[1], row[2], row[3]);
        assert_string_equal(document_find_row(ARCHITECTURE, names[event]), wanted);
    }
}

static void look_again(struct io *any)
{
    (void)any;
    n_looks++;
}

static void store(const char *bytes)
{
    assert_int_equal(nvram_store(LINK_STATE_PERMANENT, (const uint8_t *)bytes, 1), 0);
}

/* Files cannot be written, and one that was to be may have been. */
static void fail_files(void)
{
    io.fail_from = io.calls + 1;
    assert_true(nvram_store(LINK_STATE_PERMANENT, (const uint8_t *)"2", 1) < 0);
}

static int lock_anothers(void)
{
    io.is_locked_elsewhere = true;
    return nvram_lock();
}

static int lock_failing(void)
{
    fail_files();
    return nvram_lock();
}

static int unlock_failing(void)
{
    fail_files();
    return nvram_unlock();
}

static int start_unlocked(void)
{
    nvram_start_unlocked();
    return 0;
}

static int beware(void)
{
    nvram_beware();
    return 0;
}

/* What each does in each state: and 'f' or 's' for a failure or a success. */
static const struct operation {
    const char *name;
    int (*function)(void);
    char then[SHARINGS + 1], result[SHARINGS + 1];
} operations[] = {
    {"lock", nvram_lock, "OODD", "ssss"},
    {"lock another's", lock_anothers, "OLBD", "ffff"},
    {"lock failing", lock_failing, "OLBD", "sffs"},
    {"unlock", nvram_unlock, "LLBB", "ssss"},
    {"unlock failing", unlock_failing, "OLBD", "fssf"},
    {"start unlocked", start_unlocked, "LLBB", "ssss"},
    {"beware", beware, "OBBD", "ssss"},
};

static void enter(enum sharing wanted)
{
    io_memory_init(&io);
    io.io.look_again = look_again;
    io.is_locked = true;
    sharing = SHARING_OURS;
    nvram_register(&io.io);
    assert_int_equal(store_new(&own_store), 0);
    assert_int_equal(store_map(&numbers, store_fd(own_store), true), 0);
    assert_int_equal(nvram_set_journal(&settings, numbers, 0, true), 0);
    store("1");
    if (wanted != SHARING_OURS)
        assert_int_equal(nvram_unlock(), 0);
    if (wanted == SHARING_BESET || wanted == SHARING_DOUBTED)
        nvram_beware();
    if (wanted == SHARING_DOUBTED)
        assert_int_equal(nvram_lock(), 0);
    assert_int_equal(sharing, wanted);
}

static void leave(void)
{
    nvram_deinit();
    store_free(numbers);
    store_free(own_store);
    io_memory_deinit(&io);
}

/* What is seen of it: the lock, and that the files are looked at again before each is written. */
static void check_effect(const struct operation *operation)
{
    bool is_locked = sharing == SHARING_OURS || sharing == SHARING_DOUBTED;
    bool is_wary = sharing == SHARING_BESET || sharing == SHARING_DOUBTED;

    if (operation->function != start_unlocked)
        assert_int_equal(io.is_locked, is_locked);
    io.fail_from = 0;
    n_looks = 0;
    store("3");
    assert_int_equal(n_looks, is_wary);
    n_looks = 0;
    assert_int_equal(nvram_end(), 0); /* has the file, whatever it says */
    assert_int_equal(n_looks, sharing == SHARING_DOUBTED);
    nvram_set_on(true);
    store("4");
    assert_int_equal(nvram_has_journal(), !is_wary);
}

/* Another may have left a volatile state, which is removed before a command is answered. */
static void what_another_has_left_is_to_be_removed(void **state)
{
    (void)state;
    enter(SHARING_LET_GO);
    assert_false(nvram_may_have(LINK_STATE_VOLATILE));
    assert_int_equal(nvram_lock(), 0);
    assert_true(nvram_may_have(LINK_STATE_VOLATILE));
    assert_int_equal(nvram_remove(LINK_STATE_VOLATILE), 0);
    assert_false(nvram_may_have(LINK_STATE_VOLATILE));
    leave();
}

static void every_cell_is_as_the_table_says(void **state)
{
    (void)state;
    memset(seen, 0, sizeof(seen));
    for (size_t i = 0; i < sizeof(operations) / sizeof(*operations); i++)
        for (enum sharing now = SHARING_OURS; now < SHARINGS; now++) {
            const struct operation *operation = &operations[i];
            enter(now);
            char result = operation->function() < 0 ? 'f' : 's';
            if (result != operation->result[now] ||
                sharing_letters[sharing] != operation->then[now])
                fail_msg("%s in %c: %c, then %c", operation->name, sharing_letters[now], result,
                         sharing_letters[sharing]);
            check_effect(operation);
            leave();
        }
    for (int event = 0; event < SHARING_EVENTS; event++)
        for (int now = 0; now < SHARINGS; now++)
            assert_int_equal(seen[event][now], sharing_rows[event][now] != '-');
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_tables_rows_are_the_documents),
        cmocka_unit_test(every_cell_is_as_the_table_says),
        cmocka_unit_test(what_another_has_left_is_to_be_removed),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
