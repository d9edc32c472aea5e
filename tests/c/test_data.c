/* The data channel: its parser, and its thread on a real socket with the real libtpms. */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cmocka.h>
#include <libtpms/tpm_error.h>

#include "blackout.h"
#include "bytes.h"
#include "checkpoint.h"
#include "data.h"
#include "io_memory.h"
#include "standby.h"
#include "tpm.h"

static const struct checkpoint_lineage own = {.identity = "this vTPM's own.", .generation = 1};

static struct io_memory io;
static struct tpm *tpm;
static struct data_channel *channel;
static struct blackout *blackout;
static int guest, served;
static atomic_bool commands_wait_for_ever, a_command_waits;

static const uint8_t get_random[] = {0x80, 1, 0, 0, 0, 12, 0, 0, 1, 0x7b, 0, 8};

/* Takes the C library's place, by the linker (meson.build). */
int __wrap_pthread_cond_timedwait(pthread_cond_t *condition, pthread_mutex_t *mutex,
                                  const struct timespec *until)
{
    (void)until;
    if (!commands_wait_for_ever)
        return ETIMEDOUT;
    a_command_waits = true;
    return pthread_cond_wait(condition, mutex);
}

static atomic_int buffer_is_less_by; /* than the library's */

/* Takes the library's place. */
TPM_RESULT TPMLIB_GetTPMProperty(enum TPMLIB_TPMProperty property, int *result)
{
    union {
        void *symbol;
        TPM_RESULT (*function)(enum TPMLIB_TPMProperty, int *);
    } real = {dlsym(RTLD_NEXT, "TPMLIB_GetTPMProperty")};

    TPM_RESULT r = real.function(property, result);
    *result -= buffer_is_less_by;
    return r;
}

static void connect_guest(void)
{
    struct timeval limit = {.tv_sec = 20};
    int pair[2];

    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), 0);
    assert_int_equal(data_channel_set_socket(channel, pair[0]), 0);
    served = pair[0];
    guest = pair[1];
    setsockopt(guest, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
}

static int set_up(void **state)
{
    static uint8_t startup[] = {0x80, 1, 0, 0, 0, 12, 0, 0, 1, 0x44, 0, 0};
    struct tpm_response response;

    (void)state;
    commands_wait_for_ever = a_command_waits = false;
    io_memory_init(&io);
    tpm = tpm_new(&io.io);
    assert_int_equal(tpm_init(tpm, false), TPM_SUCCESS);
    tpm_response_init(&response);
    tpm_execute(tpm, startup, sizeof(startup), &response);
    tpm_response_deinit(&response);
    assert_int_equal(blackout_new(&blackout, tpm, NULL, NULL), 0);
    assert_int_equal(data_channel_new(&channel, tpm, blackout), 0);
    data_channel_begin(channel);
    connect_guest();
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    close(guest);
    data_channel_free(channel);
    blackout_free(blackout);
    tpm_free(tpm);
    io_memory_deinit(&io);
    return 0;
}

static void say(const void *bytes, size_t n_bytes)
{
    assert_int_equal(send(guest, bytes, n_bytes, MSG_NOSIGNAL), n_bytes);
}

static uint32_t hear(void)
{
    uint8_t header[TPM_HEADER_BYTES];

    ssize_t n = recv(guest, header, sizeof(header), 0);
    assert_int_equal(n, TPM_HEADER_BYTES);
    size_t n_left = get_be32(header + 2) - (size_t)n;
    uint8_t *rest = malloc(n_left + 1);
    assert_non_null(rest);
    assert_int_equal(recv(guest, rest, n_left + 1, MSG_DONTWAIT), n_left ? (ssize_t)n_left : -1);
    free(rest);
    return get_be32(header + 6);
}

enum {
    BYTES_MAX = 300, /* of a command, for the parser alone */
    RC_SIZE = 0x095, /* TPM_RC_SIZE: libtpms finds more than the command's parameters */
};

static void every_truncation_needs_more(void **state)
{
    struct data_command command;

    (void)state;
    for (size_t n = 0; n < sizeof(get_random); n++)
        assert_int_equal(data_parse(get_random, n, BYTES_MAX, true, &command), DATA_NEED_MORE);
    assert_int_equal(data_parse(get_random, sizeof(get_random), BYTES_MAX, true, &command),
                     DATA_COMMAND);
    assert_int_equal(command.n_bytes, sizeof(get_random));
    assert_int_equal(command.start, 0);
    assert_false(command.has_prefix);
}

static void a_prefix_has_to_go_with_its_command(void **state)
{
    uint8_t bytes[DATA_PREFIX_BYTES + sizeof(get_random)] = {0, 0, 0, 8, 3, 0, 0, 0, 0};
    struct data_command command;

    (void)state;
    put_be32(bytes + 5, sizeof(get_random));
    memcpy(bytes + DATA_PREFIX_BYTES, get_random, sizeof(get_random));
    for (size_t n = 0; n < sizeof(bytes); n++) {
        assert_int_equal(data_parse(bytes, n, BYTES_MAX, true, &command), DATA_NEED_MORE);
        assert_int_equal(command.n_bytes, 0);
    }
    assert_int_equal(data_parse(bytes, sizeof(bytes), BYTES_MAX, true, &command), DATA_COMMAND);
    assert_true(command.has_prefix);
    assert_int_equal(command.start, DATA_PREFIX_BYTES);
    assert_int_equal(command.n_bytes, sizeof(get_random));
    assert_int_equal(command.locality, 3);
    /* From QEMU's socket it would be the guest that chooses. */
    assert_int_equal(data_parse(bytes, sizeof(bytes), BYTES_MAX, false, &command), DATA_MALFORMED);
    bytes[4] = DATA_LOCALITY_MAX + 1;
    assert_int_equal(data_parse(bytes, sizeof(bytes), BYTES_MAX, true, &command), DATA_MALFORMED);
    bytes[4] = DATA_LOCALITY_MAX;
    bytes[8]++;
    assert_int_equal(data_parse(bytes, sizeof(bytes), BYTES_MAX, true, &command), DATA_MALFORMED);
}

static void only_sizes_of_commands_are_accepted(void **state)
{
    static uint8_t bytes[BYTES_MAX];
    const uint32_t sizes[] = {0, 9, 10, BYTES_MAX, BYTES_MAX + 1, 0x7fffffff, 0xffffffff};

    (void)state;
    for (size_t i = 0; i < sizeof(sizes) / sizeof(*sizes); i++) {
        struct data_command command;
        bool possible = sizes[i] >= TPM_HEADER_BYTES && sizes[i] <= BYTES_MAX;
        put_be32(bytes + 2, sizes[i]);
        assert_int_equal(data_parse(bytes, sizeof(bytes), BYTES_MAX, true, &command),
                         possible ? DATA_COMMAND : DATA_MALFORMED);
        assert_int_equal(command.n_bytes, possible ? sizes[i] : 0);
    }
}

static void a_command_may_come_in_pieces(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof(get_random); i++) {
        say(get_random + i, 1);
        usleep(1000);
    }
    assert_int_equal(hear(), 0);
}

static void bytes_in_excess_are_dropped(void **state)
{
    uint8_t bytes[2 * sizeof(get_random)];

    (void)state;
    memcpy(bytes, get_random, sizeof(get_random));
    memset(bytes + sizeof(get_random), 0xff, sizeof(get_random));
    say(bytes, sizeof(bytes));
    assert_int_equal(hear(), 0);
    say(get_random, sizeof(get_random));
    assert_int_equal(hear(), 0);
}

static void a_malformed_command_is_answered_and_the_next_one_served(void **state)
{
    static uint8_t bytes[16384] = {0x80, 1, 0xff};

    (void)state;
    say(bytes, sizeof(bytes));
    assert_int_equal(hear(), TPM2_RC_COMMAND_SIZE);
    say(get_random, sizeof(get_random));
    assert_int_equal(hear(), 0);
}

static void a_rest_that_does_not_come_is_answered(void **state)
{
    (void)state;
    say(get_random, sizeof(get_random) - 1);
    assert_int_equal(hear(), TPM2_RC_COMMAND_SIZE);
    say(get_random, sizeof(get_random));
    assert_int_equal(hear(), 0);
}

static void a_second_socket_is_refused_until_the_first_hangs_up(void **state)
{
    int pair[2];

    (void)state;
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), 0);
    assert_int_equal(data_channel_set_socket(channel, pair[0]), DATA_SOCKET_BUSY);
    close(pair[0]);
    close(pair[1]);
    close(guest);
    connect_guest();
    say(get_random, sizeof(get_random));
    assert_int_equal(hear(), 0);
}

static void a_socket_is_taken_while_a_command_waits(void **state)
{
    (void)state;
    assert_int_equal(tpm_stop(tpm), TPM_SUCCESS);
    assert_int_equal(tpm_stand_by_again(tpm), TPM_SUCCESS);
    assert_int_equal(tpm_expect(tpm), TPM_SUCCESS);
    commands_wait_for_ever = true;
    say(get_random, sizeof(get_random));
    while (!a_command_waits)
        usleep(1000);
    /* Also a second time: QEMU's, and then another's. */
    for (int i = 0; i < 2; i++) {
        close(guest);
        connect_guest();
    }
    assert_int_equal(tpm_admit(tpm, &own, false), TPM_SUCCESS);
    say(get_random, sizeof(get_random));
    assert_int_equal(hear(), 0x100); /* TPM_RC_INITIALIZE: it was executed */
}

static void a_socket_that_does_not_block_is_served(void **state)
{
    const struct timeval soon = {.tv_usec = 1000};

    (void)state;
    for (int limited = 0; limited <= 1; limited++) {
        if (limited)
            setsockopt(served, SOL_SOCKET, SO_RCVTIMEO, &soon, sizeof(soon));
        else
            assert_int_equal(fcntl(served, F_SETFL, O_NONBLOCK), 0);
        for (int i = 0; i < 3; i++) {
            say(get_random, sizeof(get_random));
            assert_int_equal(hear(), 0);
            usleep(20000);
        }
        close(guest);
        connect_guest();
    }
}

/* As libtpms has it, asked in another way; and as another libtpms may have it. */
static void the_longest_command_is_what_libtpms_says(void **state)
{
    uint32_t sizes[3];

    (void)state;
    assert_int_equal(tpm_set_buffer_size(tpm, 0, sizes), TPM_SUCCESS);
    for (buffer_is_less_by = 0; buffer_is_less_by <= 100; buffer_is_less_by += 100) {
        uint32_t longest = sizes[2] - (uint32_t)buffer_is_less_by;
        uint8_t *command = calloc(1, longest + 1);
        assert_non_null(command);
        memcpy(command, get_random, sizeof(get_random));
        data_channel_free(channel);
        close(guest);
        assert_int_equal(data_channel_new(&channel, tpm, blackout), 0);
        data_channel_begin(channel);
        connect_guest();
        put_be32(command + 2, longest);
        say(command, longest);
        assert_int_equal(hear(), RC_SIZE);
        put_be32(command + 2, longest + 1);
        say(command, longest + 1);
        assert_int_equal(hear(), TPM2_RC_COMMAND_SIZE);
        free(command);
    }
    buffer_is_less_by = 0;
}

static void who_does_not_read_does_not_hold_the_end(void **state)
{
    (void)state;
    assert_int_equal(fcntl(guest, F_SETFL, O_NONBLOCK), 0);
    for (int idle = 0; idle < 100; idle++) {
        while (send(guest, get_random, sizeof(get_random), MSG_NOSIGNAL) > 0)
            idle = 0;
        usleep(1000);
    }
}

#define TEST(function) cmocka_unit_test_setup_teardown(function, set_up, tear_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_truncation_needs_more),
        cmocka_unit_test(a_prefix_has_to_go_with_its_command),
        cmocka_unit_test(only_sizes_of_commands_are_accepted),
        TEST(a_command_may_come_in_pieces),
        TEST(bytes_in_excess_are_dropped),
        TEST(a_malformed_command_is_answered_and_the_next_one_served),
        TEST(a_rest_that_does_not_come_is_answered),
        TEST(a_second_socket_is_refused_until_the_first_hangs_up),
        TEST(a_socket_is_taken_while_a_command_waits),
        TEST(a_socket_that_does_not_block_is_served),
        TEST(the_longest_command_is_what_libtpms_says),
        TEST(who_does_not_read_does_not_hold_the_end),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
