/* Whom the engine asks: a vtpmd that has no session need not be, and says so when it has one.
 *
 * Invariant 11; and 3: what was decided without it is done before it begins one.
 */
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "ask.h"
#include "link_types.h"
#include "message.h"

enum {
    A_MOMENT_NS = 50000000,
};

static const struct message question = {.header = {LINK_ASK_RUNS}, .descriptor = -1};

static struct asker *asker;
static int vtpmd_fd;
static atomic_bool is_asked;
static int first, second; /* what asker_ask() has returned, in another thread */

static int attach(void **state)
{
    int ends[2];

    (void)state;
    is_asked = false;
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, ends), 0);
    assert_int_equal(asker_new(&asker), 0);
    asker_attach(asker, ends[0]);
    vtpmd_fd = ends[1];
    return 0;
}

static int detach(void **state)
{
    (void)state;
    asker_free(asker);
    close(vtpmd_fd);
    return 0;
}

static void *want_to_be_asked(void *argument)
{
    (void)argument;
    asker_be_asked(asker, true);
    is_asked = true;
    return NULL;
}

static void quiet_vtpmd_is_not_asked_what_may_be_decided(void **state)
{
    struct message answer = MESSAGE_NONE;

    (void)state;
    asker_be_asked(asker, false);
    assert_int_equal(asker_ask(asker, &question, true, &answer), ASKER_NOBODY);
    asker_decided(asker);
}

static void session_begins_when_what_was_decided_is_done(void **state)
{
    struct message answer = MESSAGE_NONE;
    pthread_t thread;

    (void)state;
    asker_be_asked(asker, false);
    assert_int_equal(asker_ask(asker, &question, true, &answer), ASKER_NOBODY);
    assert_int_equal(pthread_create(&thread, NULL, want_to_be_asked, NULL), 0);
    nanosleep(&(struct timespec){.tv_nsec = A_MOMENT_NS}, NULL);
    assert_false(is_asked);
    asker_decided(asker);
    assert_int_equal(pthread_join(thread, NULL), 0);
    assert_true(is_asked);
}

static const struct message wants = {.header = {LINK_ASK_STATE}, .descriptor = -1};

static void *ask(void *argument)
{
    struct message answer = MESSAGE_NONE;

    *(int *)argument = asker_ask(asker, argument == &second ? &question : &wants, false, &answer);
    assert_null(answer.payload);
    return NULL;
}

static void wait_until_asked(enum link_question number)
{
    while (!asker_is_asking(asker, number))
        nanosleep(&(struct timespec){.tv_nsec = A_MOMENT_NS / 50}, NULL);
}

static void question_is_settled_by_what_it_was_asked_of(void **state)
{
    struct message late = {.header = {LINK_ASK_STATE, .result = 9}, .descriptor = -1};
    struct message next = {.header = {LINK_ASK_RUNS}, .descriptor = -1};
    pthread_t thread;

    (void)state;
    assert_int_equal(pthread_create(&thread, NULL, ask, &first), 0);
    wait_until_asked(LINK_ASK_STATE);
    asker_settle(asker, LINK_ASK_TAIL);
    assert_true(asker_is_asking(asker, LINK_ASK_STATE));
    asker_settle(asker, LINK_ASK_STATE);
    assert_int_equal(pthread_join(thread, NULL), 0);
    assert_int_equal(first, ASKER_SETTLED);

    assert_int_equal(pthread_create(&thread, NULL, ask, &second), 0);
    wait_until_asked(LINK_ASK_RUNS);
    assert_int_equal(asker_answer(asker, &late), 0); /* nobody waits for it */
    assert_true(asker_is_asking(asker, LINK_ASK_RUNS));
    assert_int_equal(asker_answer(asker, &late), -EPROTO); /* and none is owed any more */
    assert_int_equal(asker_answer(asker, &next), 0);
    assert_int_equal(pthread_join(thread, NULL), 0);
    assert_int_equal(second, 0);
}

static void vtpmd_that_has_left_owes_no_answer(void **state)
{
    struct message late = {.header = {LINK_ASK_STATE}, .descriptor = -1};
    pthread_t thread;
    int ends[2];

    (void)state;
    assert_int_equal(pthread_create(&thread, NULL, ask, &first), 0);
    wait_until_asked(LINK_ASK_STATE);
    asker_settle(asker, LINK_ASK_STATE);
    assert_int_equal(pthread_join(thread, NULL), 0);
    asker_detach(asker);
    close(vtpmd_fd);
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, ends), 0);
    asker_attach(asker, ends[0]);
    vtpmd_fd = ends[1];
    assert_int_equal(asker_answer(asker, &late), -EPROTO);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(quiet_vtpmd_is_not_asked_what_may_be_decided, attach,
                                        detach),
        cmocka_unit_test_setup_teardown(session_begins_when_what_was_decided_is_done, attach,
                                        detach),
        cmocka_unit_test_setup_teardown(question_is_settled_by_what_it_was_asked_of, attach,
                                        detach),
        cmocka_unit_test_setup_teardown(vtpmd_that_has_left_owes_no_answer, attach, detach),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
