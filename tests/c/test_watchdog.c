/* The watchdog: who waits for storage that stalls is told of, once, and so is the end of it.
 *
 * The storage here is one that answers when the test says so.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmocka.h>

#include "watchdog.h"

enum {
    LIMIT_MS = 20,
    SYNCED = 17, /* what a sync returns: a watched one returns the same */
    OUTPUT_BYTES_MAX = 4096,
};

/* Syncs wait until the test lets them go; all else is done at once. */
struct gate {
    struct io io;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool is_closed;
    int n_waiting;
};

static int gate_sync(struct io *io, int fd)
{
    struct gate *gate = (struct gate *)io;

    (void)fd;
    pthread_mutex_lock(&gate->lock);
    gate->n_waiting++;
    pthread_cond_broadcast(&gate->changed);
    while (gate->is_closed)
        pthread_cond_wait(&gate->changed, &gate->lock);
    gate->n_waiting--;
    pthread_mutex_unlock(&gate->lock);
    return SYNCED;
}

static int gate_unlink(struct io *io, const char *name)
{
    (void)io, (void)name;
    return -ENOENT;
}

static struct gate gate;
static struct watchdog *watchdog;
static int output, standard_error;

static int set_up(void **state)
{
    (void)state;
    gate = (struct gate){.io = {.sync = gate_sync, .unlink = gate_unlink}};
    pthread_mutex_init(&gate.lock, NULL);
    pthread_cond_init(&gate.changed, NULL);
    output = memfd_create("standard error", 0);
    standard_error = dup(STDERR_FILENO);
    dup2(output, STDERR_FILENO);
    assert_int_equal(watchdog_new(&watchdog, &gate.io, "the gate", LIMIT_MS), 0);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    watchdog_free(watchdog);
    dup2(standard_error, STDERR_FILENO);
    close(standard_error);
    close(output);
    pthread_cond_destroy(&gate.changed);
    pthread_mutex_destroy(&gate.lock);
    return 0;
}

static int count(const char *what)
{
    char text[OUTPUT_BYTES_MAX + 1];
    int n = 0;

    ssize_t n_bytes = pread(output, text, OUTPUT_BYTES_MAX, 0);
    assert_true(n_bytes >= 0);
    text[n_bytes] = 0;
    for (const char *at = text; (at = strstr(at, what)); at++)
        n++;
    return n;
}

static void wait_for_lines(const char *what, int n)
{
    while (count(what) < n)
        usleep(1000);
}

static const char stalls[] = "the storage has not answered for ";
static const char answers[] = "the storage answers again, after ";

static void *sync_one(void *argument)
{
    struct io *io = watchdog_io(watchdog);

    (void)argument;
    assert_int_equal(io->sync(io, 0), SYNCED);
    return NULL;
}

static void close_gate(void)
{
    pthread_mutex_lock(&gate.lock);
    gate.is_closed = true;
    pthread_mutex_unlock(&gate.lock);
}

static void open_gate(void)
{
    pthread_mutex_lock(&gate.lock);
    gate.is_closed = false;
    pthread_cond_broadcast(&gate.changed);
    pthread_mutex_unlock(&gate.lock);
}

static pthread_t begin_sync(int n_waiting)
{
    pthread_t thread;

    assert_int_equal(pthread_create(&thread, NULL, sync_one, NULL), 0);
    pthread_mutex_lock(&gate.lock);
    while (gate.n_waiting < n_waiting)
        pthread_cond_wait(&gate.changed, &gate.lock);
    pthread_mutex_unlock(&gate.lock);
    return thread;
}

static void each_stall_is_told_of_once_and_its_end(void **state)
{
    (void)state;
    for (int n = 1; n <= 3; n++) {
        close_gate();
        pthread_t thread = begin_sync(1);
        wait_for_lines(stalls, n);
        usleep(3 * LIMIT_MS * 1000); /* enough for a second line */
        assert_int_equal(count(stalls), n);
        assert_int_equal(count(answers), n - 1);
        open_gate();
        pthread_join(thread, NULL);
        assert_int_equal(count(answers), n);
    }
}

/* The one that folds, and the guest's. */
static void two_that_wait_are_told_of_in_one_line(void **state)
{
    (void)state;
    close_gate();
    pthread_t one = begin_sync(1), other = begin_sync(2);
    wait_for_lines(stalls, 1);
    usleep(3 * LIMIT_MS * 1000);
    assert_int_equal(count(stalls), 1);
    assert_int_equal(count("look at what holds the gate"), 1);
    open_gate();
    pthread_join(one, NULL);
    pthread_join(other, NULL);
    assert_int_equal(count(answers), count(stalls));
}

/* Another storage, as an anchor's: it has answered, and the first one has not. */
static void one_that_waits_on_is_told_of_again(void **state)
{
    struct io *io = watchdog_io(watchdog);

    (void)state;
    close_gate();
    pthread_t thread = begin_sync(1);
    wait_for_lines(stalls, 1);
    assert_int_equal(io->unlink(io, "file"), -ENOENT);
    assert_int_equal(count(answers), 1);
    wait_for_lines(stalls, 2);
    open_gate();
    pthread_join(thread, NULL);
    assert_int_equal(count(answers), 2);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(each_stall_is_told_of_once_and_its_end, set_up, tear_down),
        cmocka_unit_test_setup_teardown(two_that_wait_are_told_of_in_one_line, set_up, tear_down),
        cmocka_unit_test_setup_teardown(one_that_waits_on_is_told_of_again, set_up, tear_down),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
