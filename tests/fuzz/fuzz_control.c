/* Fuzz the control channel's codec: arbitrary bytes and descriptors as a client's commands.
 *
 *   build/sanitize/fuzz_control -max_total_time=600 tests/fuzz/corpus/control
 *
 * Input: one byte that says how many descriptors come with the command's first byte, then the bytes
 * of a client's commands. tests/property/test_control_properties.py has the same corpus.
 *
 * The oracle:
 *   - whatever one read brings, the verdict is that of a model with a table of its own: nothing
 *     that its row forbids in this power is ever a request, and an answer is as long as it says,
 *   - a command's bytes one by one give that same event, and none before the last,
 *   - the event's fields, written again as a client would, are the bytes that came,
 *   - no descriptor is left open but one that is taken,
 *   - after a refusal that does not close, and after an answer, the next command is understood.
 */
#include <fcntl.h>
#include <libtpms/tpm_error.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bytes.h"
#include "check.h"
#include "control.h"

/* Not derived from the code under test: 's'topped, 'r'unning, 'a'ny, 'b'uffer size. */
static const struct row {
    size_t fixed_bytes;
    size_t data_bytes_max;
    bool drops_excess;
    char powers;
    size_t answer_bytes, error_bytes;
} rows[] = {
    [1] = {4, 0, true, 'a', 8, 4},         [2] = {8, 0, false, 'a', 4, 4},
    [3] = {4, 0, false, 'a', 4, 4},        [4] = {4, 0, false, 'r', 8, 8},
    [5] = {5, 0, true, 'a', 4, 4},         [6] = {4, 0, false, 'r', 4, 4},
    [7] = {8, 65536, false, 'r', 4, 4},    [8] = {4, 0, false, 'r', 4, 4},
    [9] = {4, 0, false, 'r', 4, 4},        [10] = {4, 0, false, 'r', 4, 4},
    [11] = {5, 0, true, 'r', 4, 4},        [12] = {16, 0, true, 'r', 16, 16},
    [13] = {16, 524288, false, 's', 4, 4}, [14] = {4, 0, false, 'a', 4, 4},
    [15] = {4, 0, false, 'a', 8, 4},       [16] = {4, 0, true, 'a', 4, 4},
    [17] = {8, 0, true, 'b', 16, 4},       [18] = {20, 0, true, 'a', 12, 4},
    [19] = {8, 0, true, 'a', 4, 4},
};

enum { N_ROWS = sizeof(rows) / sizeof(*rows), DESCRIPTORS_MAX = 4 };

struct expected {
    int verdict;
    uint32_t result;
    bool closes;
    size_t command_bytes;
};

static bool is_allowed(const struct row *row, const uint8_t *data, enum control_power power)
{
    switch (row->powers) {
    case 's':
        return power == CONTROL_STOPPED;
    case 'r':
        return power == CONTROL_RUNNING;
    case 'b':
        return power == CONTROL_STOPPED || get_be32(data + 4) == 0;
    default:
        return true;
    }
}

/* Judge one read by the table alone. */
static struct expected judge(const uint8_t *data, size_t n_data, size_t n_descriptors,
                             enum control_power power)
{
    const struct expected need_data = {.verdict = CONTROL_NEED_DATA},
                          bad_ordinal = {CONTROL_REFUSED, 0x0a, false, 0},
                          bad_parameter = {CONTROL_REFUSED, 0x03, false, 0};

    if (n_data < 4)
        return need_data;
    uint32_t number = get_be32(data);
    if (number == 0 || number >= N_ROWS)
        return bad_ordinal;
    const struct row *row = &rows[number];
    if (n_data < row->fixed_bytes)
        return need_data;
    size_t announced = row->data_bytes_max ? get_be32(data + row->fixed_bytes - 4) : 0;
    if (announced > row->data_bytes_max)
        return (struct expected){CONTROL_REFUSED, 0x03, true, 0};
    if (n_data < row->fixed_bytes + announced)
        return need_data;
    if (n_data > row->fixed_bytes + announced && !row->drops_excess)
        return bad_parameter;
    if (number == 16 && n_descriptors != 1)
        return bad_parameter;
    if (!is_allowed(row, data, power))
        return bad_ordinal;
    return (struct expected){CONTROL_REQUEST, 0, false, row->fixed_bytes + announced};
}

/* Compare an event's fields with the bytes that they came from. */
static void check_fields(const struct control_event *event, const uint8_t *data)
{
    bool is_blob = event->number == 12 || event->number == 13;

    check(event->number == get_be32(data));
    check(event->flags == (event->number == 2 || is_blob ? get_be32(data + 4)
                           : event->number == 18         ? get_be64(data + 4)
                                                         : 0));
    check(event->type == (is_blob ? get_be32(data + 8) : 0));
    check(event->offset == (event->number == 12 || event->number == 18 ? get_be32(data + 12) : 0));
    check(event->locality == (event->number == 5 || event->number == 11 ? data[4] : 0));
    check(event->wanted_bytes == (event->number == 17 ? get_be32(data + 4) : 0));
    check(event->retries == (event->number == 19 ? get_be32(data + 4) : 0));
    check((event->descriptor >= 0) == (event->number == 16));
    if (event->number == 7 || event->number == 13) {
        size_t at = rows[event->number].fixed_bytes;
        check(event->data_bytes == get_be32(data + at - 4));
        check(event->data_bytes == 0 || memcmp(event->data, data + at, event->data_bytes) == 0);
    } else {
        check(event->data_bytes == 0 && !event->data);
    }
}

/* Send all of the answer; return its length. */
static size_t send_answer(struct control *control)
{
    struct iovec *vectors;
    size_t n_bytes = 0;

    for (size_t n; (n = control_output(control, &vectors)) > 0;) {
        size_t length = n_bytes % 7 + 1 < vectors->iov_len ? n_bytes % 7 + 1 : vectors->iov_len;
        n_bytes += length;
        control_sent(control, length);
    }
    return n_bytes;
}

/* Answer as the engine would; return the length that the model says. */
static size_t answer(struct control *control, const struct control_event *event)
{
    static uint8_t blob[] = "a blob in";
    static const char text[] = "a text";
    const struct row *row = &rows[event->number];
    struct iovec pieces[] = {{blob, 4}, {blob + 4, 5}};
    size_t offset = event->offset;

    switch (event->number) {
    case CONTROL_GET_CAPABILITY:
        control_answer_capability(control, true);
        return row->answer_bytes;
    case CONTROL_GET_TPMESTABLISHED:
        control_answer_established(control, true);
        return row->answer_bytes;
    case CONTROL_GET_CONFIG:
        control_answer_config(control, 0);
        return row->answer_bytes;
    case CONTROL_SET_BUFFERSIZE:
        control_answer_buffer_size(control, 3, 1, 4);
        return row->answer_bytes;
    case CONTROL_GET_STATEBLOB:
        control_answer_state_blob(control, pieces, 2, false);
        return row->answer_bytes + (offset < 9 ? 9 - offset : 0);
    case CONTROL_GET_INFO:
        control_answer_info(control, text);
        return offset < 6 ? row->answer_bytes + 7 - offset : row->error_bytes;
    case CONTROL_SET_DATAFD:
        check(close(control_take_descriptor(control)) == 0);
        break;
    }
    control_answer_result(control, TPM_SUCCESS);
    return row->answer_bytes;
}

static void check_next_is_understood(struct control *control)
{
    static const uint8_t stop[] = {0, 0, 0, CONTROL_STOP};
    struct control_event event;

    check(control_next(control, CONTROL_RUNNING, &event) == CONTROL_NEED_DATA);
    check(!control_is_partial(control));
    control_receive(control, stop, sizeof(stop), NULL, 0);
    check(control_next(control, CONTROL_RUNNING, &event) == CONTROL_REQUEST);
    check(event.number == CONTROL_STOP);
    control_answer_result(control, TPM_SUCCESS);
    check(send_answer(control) == 4);
}

static void check_verdict(struct control *control, const struct expected *expected,
                          const uint8_t *data, size_t n_data, enum control_power power)
{
    struct control_event event;

    check(control_next(control, power, &event) == expected->verdict);
    if (expected->verdict == CONTROL_NEED_DATA) {
        check(control_is_partial(control) == (n_data > 0));
        return;
    }
    if (expected->verdict == CONTROL_REQUEST) {
        check_fields(&event, data);
        size_t answer_bytes = answer(control, &event);
        check(send_answer(control) == answer_bytes);
    } else {
        uint32_t number = get_be32(data);
        check(event.number == number && event.result == expected->result && event.reason);
        size_t error_bytes = number > 0 && number < N_ROWS ? rows[number].error_bytes : 4;
        check(send_answer(control) == error_bytes);
    }
    if (expected->closes)
        check(control_next(control, power, &event) == CONTROL_CLOSED);
    else
        check_next_is_understood(control);
}

/* Open descriptors, and see to it that none is left of them. */
static size_t open_descriptors(int *descriptors, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        descriptors[i] = open("/dev/null", O_RDONLY | O_CLOEXEC);
        check(descriptors[i] >= 0);
    }
    return n;
}

static void check_closed(const int *descriptors, size_t n)
{
    for (size_t i = 0; i < n; i++)
        check(fcntl(descriptors[i], F_GETFD) < 0);
}

static void read_at_once(const uint8_t *data, size_t n_data, size_t n, enum control_power power)
{
    struct expected expected = judge(data, n_data, n, power);
    int descriptors[DESCRIPTORS_MAX];
    struct control control;

    control_init(&control);
    control_receive(&control, data, n_data, descriptors, open_descriptors(descriptors, n));
    check_verdict(&control, &expected, data, n_data, power);
    control_deinit(&control);
    check_closed(descriptors, n);
}

static void read_byte_by_byte(const uint8_t *data, size_t n_data, size_t n,
                              enum control_power power)
{
    int descriptors[DESCRIPTORS_MAX];
    struct control control;

    control_init(&control);
    for (size_t i = 0; i < n_data; i++) {
        struct expected expected = judge(data, i + 1, n, power);
        control_receive(&control, data + i, 1, descriptors,
                        i == 0 ? open_descriptors(descriptors, n) : 0);
        check_verdict(&control, &expected, data, i + 1, power);
        if (expected.verdict != CONTROL_NEED_DATA)
            break;
    }
    control_deinit(&control);
    check_closed(descriptors, n_data > 0 ? n : 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_data)
{
    if (n_data == 0)
        return 0;
    size_t n_descriptors = data[0] % DESCRIPTORS_MAX;
    for (enum control_power power = CONTROL_STOPPED; power <= CONTROL_RUNNING; power++) {
        read_at_once(data + 1, n_data - 1, n_descriptors, power);
        read_byte_by_byte(data + 1, n_data - 1, n_descriptors, power);
    }
    return 0;
}
