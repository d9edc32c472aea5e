/* The control channel's codec, as docs/control-channel.md has its rules: what a request is, in how
 * many pieces it may come, who is refused with how many bytes, and what becomes of descriptors.
 *
 * That any bytes give the events that the document says is for tests/property; arbitrary bytes and
 * descriptors are for tests/fuzz/fuzz_control.c. */
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>
#include <libtpms/tpm_error.h>

#include "bytes.h"
#include "control.h"

static struct control control;
static struct control_event event;

static int set_up(void **state)
{
    (void)state;
    control_init(&control);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    control_deinit(&control);
    return 0;
}

static void receive(const void *bytes, size_t n_bytes)
{
    control_receive(&control, bytes, n_bytes, NULL, 0);
}

/* Write a request of numbers; the data that the last one announces is not written. */
static size_t write_request(uint8_t *out, uint32_t number, const uint32_t *fields, size_t n_fields)
{
    put_be32(out, number);
    for (size_t i = 0; i < n_fields; i++)
        put_be32(out + 4 + 4 * i, fields[i]);
    return 4 + 4 * n_fields;
}

static int say(uint32_t number, const uint32_t *fields, size_t n_fields, enum control_power power)
{
    uint8_t bytes[64];

    receive(bytes, write_request(bytes, number, fields, n_fields));
    return control_next(&control, power, &event);
}

/* Send all of the answer, `piece_bytes` at a time, and return how much there was. */
static size_t hear(uint8_t *out, size_t out_bytes, size_t piece_bytes)
{
    struct iovec *vectors;
    size_t n = 0;

    while (control_output(&control, &vectors) > 0) {
        size_t length = vectors->iov_len < piece_bytes ? vectors->iov_len : piece_bytes;
        assert_true(length > 0 && length <= out_bytes - n);
        memcpy(out + n, vectors->iov_base, length);
        n += length;
        control_sent(&control, length);
    }
    return n;
}

static void assert_answer(const void *expected, size_t expected_bytes)
{
    uint8_t answer[256];

    assert_int_equal(hear(answer, sizeof(answer), sizeof(answer)), expected_bytes);
    assert_memory_equal(answer, expected, expected_bytes);
}

static void assert_result(uint32_t result, size_t answer_bytes)
{
    uint8_t expected[16] = {0};

    put_be32(expected, result);
    assert_answer(expected, answer_bytes);
}

static bool is_open(int fd)
{
    return fcntl(fd, F_GETFD) >= 0 || errno != EBADF;
}

/* docs/control-channel.md once more, apart from the code under test. */
static const struct {
    uint32_t number;
    size_t request_bytes, error_bytes;
    bool drops_excess, when_stopped, when_running;
} table[] = {
    {1, 4, 4, true, true, true},     {2, 8, 4, false, true, true},  {3, 4, 4, false, true, true},
    {4, 4, 8, false, false, true},   {5, 5, 4, true, true, true},   {6, 4, 4, false, false, true},
    {7, 8, 4, false, false, true},   {8, 4, 4, false, false, true}, {9, 4, 4, false, false, true},
    {10, 4, 4, false, false, true},  {11, 5, 4, true, false, true}, {12, 16, 16, true, false, true},
    {13, 16, 4, false, true, false}, {14, 4, 4, false, true, true}, {15, 4, 4, false, true, true},
    {16, 4, 4, true, true, true},    {17, 8, 4, true, true, true},  {18, 20, 4, true, true, true},
    {19, 8, 4, true, true, true},
};

enum { N_COMMANDS = sizeof(table) / sizeof(*table) };

/* Bring a request of zeros, and a descriptor where one is needed. */
static int bring_zeros(size_t row, size_t n_bytes, enum control_power power)
{
    uint8_t bytes[32] = {0};
    int fd = table[row].number == CONTROL_SET_DATAFD ? open("/dev/null", O_RDONLY) : -1;

    put_be32(bytes, table[row].number);
    control_receive(&control, bytes, n_bytes, &fd, fd >= 0);
    return control_next(&control, power, &event);
}

static void every_command_has_its_row(void **state)
{
    (void)state;
    assert_int_equal(N_COMMANDS, CONTROL_N_NUMBERS - 1);
    for (size_t i = 0; i < N_COMMANDS; i++) {
        const struct control_command *command = control_command_of(table[i].number);
        assert_int_equal(control_request_bytes(command), table[i].request_bytes);
        assert_int_equal(bring_zeros(i, table[i].request_bytes - 1, CONTROL_RUNNING),
                         CONTROL_NEED_DATA);
        assert_true(control_is_partial(&control));
        tear_down(NULL);
        set_up(NULL);
    }
    assert_null(control_command_of(0));
    assert_null(control_command_of(CONTROL_N_NUMBERS));
    assert_null(control_command_of(UINT32_MAX));
}

static void every_command_is_carried_out_or_refused_as_its_power_says(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_COMMANDS; i++) {
        for (enum control_power power = CONTROL_STOPPED; power <= CONTROL_RUNNING; power++) {
            bool is_allowed =
                power == CONTROL_STOPPED ? table[i].when_stopped : table[i].when_running;
            int verdict = bring_zeros(i, table[i].request_bytes, power);
            assert_int_equal(verdict, is_allowed ? CONTROL_REQUEST : CONTROL_REFUSED);
            assert_int_equal(event.number, table[i].number);
            if (is_allowed)
                control_answer_result(&control, TPM_FAIL);
            assert_result(is_allowed ? TPM_FAIL : TPM_BAD_ORDINAL, table[i].error_bytes);
        }
    }
}

static void a_buffer_size_is_asked_for_at_any_time_and_set_when_stopped(void **state)
{
    const uint32_t wanted[] = {3000};
    const uint8_t expected[] = {0, 0, 0, 0, 0, 0, 0xb, 0xb8, 0, 0, 0xa, 0xf8, 0, 0, 0x10, 0};

    (void)state;
    assert_int_equal(say(CONTROL_SET_BUFFERSIZE, wanted, 1, CONTROL_RUNNING), CONTROL_REFUSED);
    assert_result(TPM_BAD_ORDINAL, 4);
    assert_int_equal(say(CONTROL_SET_BUFFERSIZE, wanted, 1, CONTROL_STOPPED), CONTROL_REQUEST);
    assert_int_equal(event.wanted_bytes, 3000);
    control_answer_buffer_size(&control, 3000, 2808, 4096);
    assert_answer(expected, sizeof(expected));
}

static void excess_is_refused_before_the_power_is_looked_at_or_dropped(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_COMMANDS; i++) {
        int verdict = bring_zeros(i, table[i].request_bytes + 1, CONTROL_STOPPED);
        if (table[i].drops_excess && table[i].when_stopped) {
            assert_int_equal(verdict, CONTROL_REQUEST);
            control_answer_result(&control, TPM_FAIL);
            assert_result(TPM_FAIL, table[i].error_bytes);
        } else {
            assert_int_equal(verdict, CONTROL_REFUSED);
            assert_result(table[i].drops_excess ? TPM_BAD_ORDINAL : TPM_BAD_PARAMETER,
                          table[i].error_bytes);
        }
    }
}

static void excess_is_not_the_next_command(void **state)
{
    const uint8_t two[] = {0, 0, 0, CONTROL_GET_CAPABILITY, 0, 0, 0, CONTROL_STOP};

    (void)state;
    receive(two, sizeof(two));
    assert_int_equal(control_next(&control, CONTROL_RUNNING, &event), CONTROL_REQUEST);
    assert_int_equal(event.number, CONTROL_GET_CAPABILITY);
    receive(two + 4, 4); /* and what comes before the answer is dropped, too */
    control_answer_capability(&control, true);
    receive(two + 4, 4);
    assert_int_equal(control_next(&control, CONTROL_RUNNING, &event), CONTROL_NEED_DATA);
    assert_answer((const uint8_t[]){0, 0, 0, 0, 0, 1, 0xff, 0xff}, 8);
    assert_int_equal(control_next(&control, CONTROL_RUNNING, &event), CONTROL_NEED_DATA);
    assert_false(control_is_partial(&control));
    assert_int_equal(say(CONTROL_GET_CONFIG, NULL, 0, CONTROL_RUNNING), CONTROL_REQUEST);
    control_answer_config(&control, CONTROL_CONFIG_FILE_KEY);
    assert_answer((const uint8_t[]){0, 0, 0, 0, 0, 0, 0, 1}, 8);
}

static void an_unknown_command_is_refused_and_the_next_understood(void **state)
{
    const uint32_t numbers[] = {0, CONTROL_N_NUMBERS, 0x61616161, UINT32_MAX};

    (void)state;
    for (size_t i = 0; i < sizeof(numbers) / sizeof(*numbers); i++) {
        assert_int_equal(say(numbers[i], numbers, 3, CONTROL_RUNNING), CONTROL_REFUSED);
        assert_null(event.command);
        assert_int_equal(event.number, numbers[i]);
        assert_result(TPM_BAD_ORDINAL, 4);
        assert_int_equal(say(CONTROL_STOP, NULL, 0, CONTROL_RUNNING), CONTROL_REQUEST);
        control_answer_result(&control, TPM_SUCCESS);
        assert_result(TPM_SUCCESS, 4);
    }
}

static void fields_are_where_the_document_has_them(void **state)
{
    const uint32_t fields[] = {0x01020304, 0x05060708, 0x090a0b0c, 0x0d0e0f10};

    (void)state;
    assert_int_equal(say(CONTROL_INIT, fields, 1, CONTROL_STOPPED), CONTROL_REQUEST);
    assert_int_equal(event.flags, 0x01020304);
    control_answer_result(&control, TPM_SUCCESS);
    assert_result(TPM_SUCCESS, 4);
    assert_int_equal(say(CONTROL_SET_LOCALITY, fields, 1, CONTROL_STOPPED), CONTROL_REQUEST);
    assert_int_equal(event.locality, 1); /* QEMU sends three bytes more */
    control_answer_result(&control, TPM_SUCCESS);
    assert_result(TPM_SUCCESS, 4);
    assert_int_equal(say(CONTROL_LOCK_STORAGE, fields, 1, CONTROL_STOPPED), CONTROL_REQUEST);
    assert_int_equal(event.retries, 0x01020304);
    control_answer_result(&control, TPM_SUCCESS);
    assert_result(TPM_SUCCESS, 4);
    assert_int_equal(say(CONTROL_GET_INFO, fields, 4, CONTROL_STOPPED), CONTROL_REQUEST);
    assert_int_equal(event.flags, UINT64_C(0x0102030405060708));
    assert_int_equal(event.offset, 0x090a0b0c);
    control_answer_info(&control, "short");
    assert_result(TPM_BAD_PARAMETER, 4);
    assert_int_equal(say(CONTROL_GET_STATEBLOB, fields, 3, CONTROL_RUNNING), CONTROL_REQUEST);
    assert_int_equal(event.flags, 0x01020304);
    assert_int_equal(event.type, 0x05060708);
    assert_int_equal(event.offset, 0x090a0b0c);
    control_answer_result(&control, TPM_FAIL);
    assert_result(TPM_FAIL, 16);
}

static void data_may_come_byte_by_byte(void **state)
{
    const uint8_t bytes[] = {0, 0, 0, 13, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 3, 'a', 'b', 'c'};

    (void)state;
    for (size_t i = 0; i < sizeof(bytes); i++) {
        assert_int_equal(control_next(&control, CONTROL_STOPPED, &event), CONTROL_NEED_DATA);
        assert_int_equal(control_is_partial(&control), i > 0);
        receive(bytes + i, 1);
    }
    assert_int_equal(control_next(&control, CONTROL_STOPPED, &event), CONTROL_REQUEST);
    assert_int_equal(event.flags, CONTROL_STATE_ENCRYPTED);
    assert_int_equal(event.type, 1);
    assert_int_equal(event.data_bytes, 3);
    assert_memory_equal(event.data, "abc", 3);
    control_answer_result(&control, TPM_SUCCESS);
    assert_null(control.data);
    assert_result(TPM_SUCCESS, 4);
}

static void announced_data_may_reach_its_limit_and_no_further(void **state)
{
    static uint8_t data[CONTROL_BLOB_BYTES_MAX];
    uint32_t fields[] = {0, 1, CONTROL_BLOB_BYTES_MAX};

    (void)state;
    assert_int_equal(say(CONTROL_SET_STATEBLOB, fields, 3, CONTROL_STOPPED), CONTROL_NEED_DATA);
    receive(data, sizeof(data) - 1);
    assert_int_equal(control_next(&control, CONTROL_STOPPED, &event), CONTROL_NEED_DATA);
    receive("x", 1);
    assert_int_equal(control_next(&control, CONTROL_STOPPED, &event), CONTROL_REQUEST);
    assert_int_equal(event.data_bytes, CONTROL_BLOB_BYTES_MAX);
    assert_int_equal(event.data[CONTROL_BLOB_BYTES_MAX - 1], 'x');
    control_answer_result(&control, TPM_SUCCESS);
    assert_result(TPM_SUCCESS, 4);

    fields[2]++;
    assert_int_equal(say(CONTROL_SET_STATEBLOB, fields, 3, CONTROL_STOPPED), CONTROL_REFUSED);
    assert_null(control.data);
    assert_result(TPM_BAD_PARAMETER, 4);
    assert_int_equal(say(CONTROL_STOP, NULL, 0, CONTROL_RUNNING), CONTROL_CLOSED);
}

static void excess_without_end_closes_the_connection(void **state)
{
    static uint8_t bytes[CONTROL_EXCESS_BYTES_MAX];
    struct iovec *vectors;

    (void)state;
    assert_int_equal(say(CONTROL_STOP, NULL, 0, CONTROL_RUNNING), CONTROL_REQUEST);
    receive(bytes, sizeof(bytes));
    control_answer_result(&control, TPM_SUCCESS);
    assert_result(TPM_SUCCESS, 4);
    assert_int_equal(say(CONTROL_STOP, NULL, 0, CONTROL_RUNNING), CONTROL_REQUEST);
    receive(bytes, sizeof(bytes));
    receive(bytes, 1);
    control_answer_result(&control, TPM_SUCCESS);
    assert_int_equal(control_output(&control, &vectors), 0);
    assert_int_equal(control_next(&control, CONTROL_RUNNING, &event), CONTROL_CLOSED);
}

static void excess_of_one_read_has_no_limit(void **state)
{
    static uint8_t bytes[CONTROL_EXCESS_BYTES_MAX + 5] = {0, 0, 0, CONTROL_GET_CAPABILITY};

    (void)state;
    receive(bytes, sizeof(bytes));
    assert_int_equal(control_next(&control, CONTROL_RUNNING, &event), CONTROL_REQUEST);
    control_answer_capability(&control, true);
    assert_answer((const uint8_t[]){0, 0, 0, 0, 0, 1, 0xff, 0xff}, 8);
}

static void an_answer_may_be_sent_byte_by_byte_and_from_any_offset(void **state)
{
    struct iovec pieces[] = {{"ab", 2}, {"", 0}, {"cde", 3}};

    (void)state;
    for (uint32_t offset = 0; offset < 8; offset++) {
        const uint32_t fields[] = {0, 1, offset};
        uint8_t answer[32], left = offset < 5 ? (uint8_t)(5 - offset) : 0;
        const uint8_t head[] = {0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, left, 0, 0, 0, left};
        assert_int_equal(say(CONTROL_GET_STATEBLOB, fields, 3, CONTROL_RUNNING), CONTROL_REQUEST);
        control_answer_state_blob(&control, pieces, 3, true);
        assert_int_equal(hear(answer, sizeof(answer), 1), sizeof(head) + left);
        assert_memory_equal(answer, head, sizeof(head));
        assert_memory_equal(answer + sizeof(head), &"abcde"[5 - left], left);
    }
}

static void a_text_is_given_in_pieces_with_a_nul_at_its_end(void **state)
{
    static char text[CONTROL_INFO_BYTES_MAX + 101], together[sizeof(text)];
    uint8_t answer[CONTROL_ANSWER_BYTES_MAX + CONTROL_INFO_BYTES_MAX];
    size_t n_together = 0;

    (void)state;
    memset(text, 'x', sizeof(text) - 1);
    while (n_together < sizeof(text)) {
        const uint32_t fields[] = {0, 1, (uint32_t)n_together, 0xffffffff};
        assert_int_equal(say(CONTROL_GET_INFO, fields, 4, CONTROL_STOPPED), CONTROL_REQUEST);
        control_answer_info(&control, text);
        size_t n = hear(answer, sizeof(answer), sizeof(answer));
        assert_int_equal(get_be32(answer + 4), sizeof(text));
        assert_int_equal(get_be32(answer + 8), n - 12);
        assert_true(n - 12 <= sizeof(together) - n_together);
        memcpy(together + n_together, answer + 12, n - 12);
        n_together += n - 12;
    }
    assert_memory_equal(together, text, sizeof(text));
    for (uint32_t offset = sizeof(text) - 1; offset < sizeof(text) + 2; offset++) {
        const uint32_t fields[] = {0, 1, offset, 0};
        assert_int_equal(say(CONTROL_GET_INFO, fields, 4, CONTROL_STOPPED), CONTROL_REQUEST);
        control_answer_info(&control, text);
        assert_result(TPM_BAD_PARAMETER, 4);
    }
}

static void set_datafd_has_exactly_one_descriptor(void **state)
{
    uint8_t bytes[4];

    (void)state;
    write_request(bytes, CONTROL_SET_DATAFD, NULL, 0);
    for (size_t n = 0; n <= 4; n++) {
        int fds[4];
        for (size_t i = 0; i < n; i++)
            fds[i] = open("/dev/null", O_RDONLY);
        control_receive(&control, bytes, 2, fds, n / 2); /* they may come with any byte */
        control_receive(&control, bytes + 2, 2, fds + n / 2, n - n / 2);
        int verdict = control_next(&control, CONTROL_STOPPED, &event);
        assert_int_equal(verdict, n == 1 ? CONTROL_REQUEST : CONTROL_REFUSED);
        if (n == 1) {
            assert_int_equal(event.descriptor, fds[0]);
            assert_true(is_open(fds[0]));
            control_answer_result(&control, TPM_SUCCESS);
        }
        assert_result(n == 1 ? TPM_SUCCESS : TPM_BAD_PARAMETER, 4);
        for (size_t i = 0; i < n; i++)
            assert_false(is_open(fds[i]));
    }
}

static void a_descriptor_that_is_taken_stays_open(void **state)
{
    int fd = open("/dev/null", O_RDONLY);

    (void)state;
    control_receive(&control, (const uint8_t[]){0, 0, 0, CONTROL_SET_DATAFD}, 4, &fd, 1);
    assert_int_equal(control_next(&control, CONTROL_STOPPED, &event), CONTROL_REQUEST);
    assert_int_equal(control_take_descriptor(&control), fd);
    control_answer_result(&control, TPM_SUCCESS);
    assert_result(TPM_SUCCESS, 4);
    control_deinit(&control);
    assert_true(is_open(fd));
    close(fd);
}

static void descriptors_that_no_command_takes_are_closed(void **state)
{
    const uint8_t stop[] = {0, 0, 0, CONTROL_STOP};
    int fd = open("/dev/null", O_RDONLY);

    (void)state;
    control_receive(&control, stop, 4, &fd, 1);
    assert_int_equal(control_next(&control, CONTROL_RUNNING, &event), CONTROL_REQUEST);
    assert_int_equal(event.descriptor, -1);
    assert_false(is_open(fd));
    fd = open("/dev/null", O_RDONLY);
    control_receive(&control, stop, 4, &fd, 1); /* in excess */
    assert_false(is_open(fd));
    control_answer_result(&control, TPM_SUCCESS);
    assert_result(TPM_SUCCESS, 4);
    fd = open("/dev/null", O_RDONLY);
    control_receive(&control, stop, 2, &fd, 1);
    assert_true(is_open(fd));
    control_deinit(&control);
    assert_false(is_open(fd));
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)
    const struct CMUnitTest tests[] = {
        TEST(every_command_has_its_row),
        TEST(every_command_is_carried_out_or_refused_as_its_power_says),
        TEST(a_buffer_size_is_asked_for_at_any_time_and_set_when_stopped),
        TEST(excess_is_refused_before_the_power_is_looked_at_or_dropped),
        TEST(excess_is_not_the_next_command),
        TEST(an_unknown_command_is_refused_and_the_next_understood),
        TEST(fields_are_where_the_document_has_them),
        TEST(data_may_come_byte_by_byte),
        TEST(announced_data_may_reach_its_limit_and_no_further),
        TEST(excess_without_end_closes_the_connection),
        TEST(excess_of_one_read_has_no_limit),
        TEST(an_answer_may_be_sent_byte_by_byte_and_from_any_offset),
        TEST(a_text_is_given_in_pieces_with_a_nul_at_its_end),
        TEST(set_datafd_has_exactly_one_descriptor),
        TEST(a_descriptor_that_is_taken_stays_open),
        TEST(descriptors_that_no_command_takes_are_closed),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
