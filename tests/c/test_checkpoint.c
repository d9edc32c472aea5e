/* Invariant 2: after a loss of power at any step, the state file is the last durable one or the
 * next, whole; and once a write was acknowledged, it is that one. */
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "checkpoint.h"
#include "io_memory.h"

static const uint8_t old_state[] = "the state as it was", new_state[] = "what the guest wrote";

enum outcome { ABSENT, TORN, OLD, NEW };

static bool holds(const uint8_t *bytes, size_t n_bytes, const uint8_t *state, size_t state_bytes)
{
    return n_bytes == CHECKPOINT_HEADER_BYTES + state_bytes &&
           memcmp(bytes + CHECKPOINT_HEADER_BYTES, state, state_bytes) == 0;
}

static enum outcome state_file(const struct io_memory *io)
{
    const uint8_t *bytes;
    size_t n_bytes;

    if (!io_memory_read(io, "tpm2-00.permall", &bytes, &n_bytes))
        return ABSENT;
    if (holds(bytes, n_bytes, old_state, sizeof(old_state)))
        return OLD;
    return holds(bytes, n_bytes, new_state, sizeof(new_state)) ? NEW : TORN;
}

/* Returns the outcomes, as bits, of all losses of power that are possible now. */
static unsigned after_power_loss(const struct io_memory *io)
{
    static struct io_choices choices;
    unsigned outcomes = 0;

    io_choices_init(&choices);
    do {
        struct io_memory after;
        io_memory_init(&after);
        io_memory_lose_power(io, &choices, &after);
        outcomes |= 1U << state_file(&after);
        io_memory_deinit(&after);
    } while (io_choices_next(&choices));
    return outcomes;
}

/* Lose power at every call of a write. Returns false if a state was lost at any of them. */
static bool survives_every_power_loss(int skip_sync)
{
    bool survived = true;

    for (int step = 1;; step++) {
        struct io_memory io;
        io_memory_init(&io);
        assert_int_equal(checkpoint_write(&io.io, "permall", old_state, sizeof(old_state), NULL),
                         0);
        io.syncs = io.calls = 0;
        io.skip_sync = skip_sync;
        io.fail_from = step;
        bool acknowledged =
            checkpoint_write(&io.io, "permall", new_state, sizeof(new_state), NULL) == 0;
        unsigned allowed = acknowledged ? 1U << NEW : 1U << OLD | 1U << NEW;
        survived &= (after_power_loss(&io) & ~allowed) == 0;
        io_memory_deinit(&io);
        if (acknowledged)
            return survived;
        assert_true(step < 20);
    }
}

static void invariant_2_every_power_loss_leaves_a_whole_state(void **state)
{
    (void)state;
    assert_true(survives_every_power_loss(0));
}

static void canary_either_sync_is_missed(void **state)
{
    (void)state;
    assert_false(survives_every_power_loss(1));
    assert_false(survives_every_power_loss(2));
    assert_true(survives_every_power_loss(3)); /* there is no third */
}

static void a_failed_write_keeps_the_old_state_and_leaves_no_temporary_file(void **state)
{
    (void)state;
    for (int step = 1; step <= 4; step++) {
        struct io_memory io;
        const uint8_t *bytes;
        size_t n_bytes;
        io_memory_init(&io);
        assert_int_equal(checkpoint_write(&io.io, "permall", old_state, sizeof(old_state), NULL),
                         0);
        io.calls = 0;
        io.fail_from = step;
        io.fail_error = ENOSPC;
        assert_int_equal(checkpoint_write(&io.io, "permall", new_state, sizeof(new_state), NULL),
                         -ENOSPC);
        assert_true(io_memory_read(&io, "tpm2-00.permall", &bytes, &n_bytes));
        assert_true(holds(bytes, n_bytes, old_state, sizeof(old_state)));
        io.fail_from = 0;
        assert_int_equal(checkpoint_write(&io.io, "permall", new_state, sizeof(new_state), NULL),
                         0);
        assert_false(io_memory_read(&io, "TMP2-00.permall", &bytes, &n_bytes));
        io_memory_deinit(&io);
    }
}

static void removal_is_durable_and_may_be_repeated(void **state)
{
    struct io_memory io;

    (void)state;
    io_memory_init(&io);
    assert_int_equal(checkpoint_write(&io.io, "permall", old_state, sizeof(old_state), NULL), 0);
    assert_int_equal(checkpoint_remove(&io.io, "permall"), 0);
    assert_int_equal(after_power_loss(&io), 1U << ABSENT);
    assert_int_equal(checkpoint_remove(&io.io, "permall"), 0);
    io_memory_deinit(&io);
}

static void a_link_in_the_temporary_files_place_is_not_written_through(void **state)
{
    char path[] = "/tmp/test_checkpoint.XXXXXX", victim[64], content[16] = "";
    struct stat status;

    (void)state;
    assert_non_null(mkdtemp(path));
    int directory = open(path, O_RDONLY | O_DIRECTORY);
    snprintf(victim, sizeof(victim), "%s/victim", path);
    int fd = open(victim, O_RDWR | O_CREAT, 0600);
    assert_int_equal(write(fd, "mine", 4), 4);
    assert_int_equal(symlinkat("victim", directory, "TMP2-00.permall"), 0);

    struct io_posix io = {.io = io_posix_functions, .directory_fd = directory};
    assert_int_equal(checkpoint_write(&io.io, "permall", new_state, sizeof(new_state), NULL), 0);

    assert_int_equal(pread(fd, content, sizeof(content), 0), 4);
    assert_string_equal(content, "mine");
    assert_int_equal(fstatat(directory, "tpm2-00.permall", &status, AT_SYMLINK_NOFOLLOW), 0);
    assert_true(S_ISREG(status.st_mode));
    assert_int_equal(status.st_mode & 07777, CHECKPOINT_MODE);
    unlinkat(directory, "victim", 0);
    unlinkat(directory, "tpm2-00.permall", 0);
    close(fd);
    close(directory);
    rmdir(path);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(invariant_2_every_power_loss_leaves_a_whole_state),
        cmocka_unit_test(canary_either_sync_is_missed),
        cmocka_unit_test(a_failed_write_keeps_the_old_state_and_leaves_no_temporary_file),
        cmocka_unit_test(removal_is_durable_and_may_be_repeated),
        cmocka_unit_test(a_link_in_the_temporary_files_place_is_not_written_through),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
