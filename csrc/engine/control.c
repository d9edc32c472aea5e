#include "control.h"

#include <libtpms/tpm_error.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bytes.h"
#include "check.h"
#include "vectors.h"

enum state {
    RECEIVING,
    ASKED,     /* an answer is due */
    ANSWERING, /* an answer is being sent */
    CLOSED,
};

enum {
    /* Of answers. */
    AT_RESULT = 0,
    AT_CAPABILITIES = 4,
    AT_ESTABLISHED = 4,
    AT_CONFIG = 4,
    AT_BLOB_FLAGS = 4,
    AT_BLOB_TOTAL = 8,
    AT_BLOB_LENGTH = 12,
    AT_SIZE = 4,
    AT_SIZE_MIN = 8,
    AT_SIZE_MAX = 12,
    AT_INFO_TOTAL = 4,
    AT_INFO_LENGTH = 8,
    RESULT_BYTES = 4,

    PADDING_AT = UINT8_MAX, /* a field that is not looked at */
};

#define AT(field) offsetof(struct control_event, field)

_Static_assert(sizeof(struct control_event) < PADDING_AT, "a field's place fits into a byte");

/* Excess is dropped or refused as swtpm does. An error is as long as QEMU 7.2 reads: it would wait
 * for ever for what is missing. */
static const struct control_command commands[CONTROL_N_NUMBERS] = {
    [CONTROL_GET_CAPABILITY] = {.name = "GET_CAPABILITY",
                                .drops_excess = true,
                                .powers = CONTROL_ANY_POWER,
                                .answer_bytes = 8},
    [CONTROL_INIT] = {.name = "INIT",
                      .fields = {{4, AT(flags)}},
                      .powers = CONTROL_ANY_POWER,
                      .capability = CONTROL_CAN_INIT},
    [CONTROL_SHUTDOWN] = {.name = "SHUTDOWN",
                          .powers = CONTROL_ANY_POWER,
                          .capability = CONTROL_CAN_SHUTDOWN},
    [CONTROL_GET_TPMESTABLISHED] = {.name = "GET_TPMESTABLISHED",
                                    .powers = CONTROL_RUNNING,
                                    .answer_bytes = 8,
                                    .error_bytes = 8,
                                    .capability = CONTROL_CAN_GET_TPMESTABLISHED},
    [CONTROL_SET_LOCALITY] = {.name = "SET_LOCALITY",
                              .fields = {{1, AT(locality)}},
                              .drops_excess = true,
                              .powers = CONTROL_ANY_POWER,
                              .capability = CONTROL_CAN_SET_LOCALITY},
    [CONTROL_HASH_START] = {.name = "HASH_START",
                            .powers = CONTROL_RUNNING,
                            .capability = CONTROL_CAN_HASHING},
    [CONTROL_HASH_DATA] = {.name = "HASH_DATA",
                           .fields = {{4, AT(data_bytes)}},
                           .data_bytes_max = CONTROL_HASH_DATA_BYTES_MAX,
                           .powers = CONTROL_RUNNING,
                           .capability = CONTROL_CAN_HASHING},
    [CONTROL_HASH_END] = {.name = "HASH_END",
                          .powers = CONTROL_RUNNING,
                          .capability = CONTROL_CAN_HASHING},
    [CONTROL_CANCEL_TPM_CMD] = {.name = "CANCEL_TPM_CMD",
                                .powers = CONTROL_RUNNING,
                                .capability = CONTROL_CAN_CANCEL_TPM_CMD},
    [CONTROL_STORE_VOLATILE] = {.name = "STORE_VOLATILE",
                                .powers = CONTROL_RUNNING,
                                .capability = CONTROL_CAN_STORE_VOLATILE},
    [CONTROL_RESET_TPMESTABLISHED] = {.name = "RESET_TPMESTABLISHED",
                                      .fields = {{1, AT(locality)}},
                                      .drops_excess = true,
                                      .powers = CONTROL_RUNNING,
                                      .capability = CONTROL_CAN_RESET_TPMESTABLISHED},
    [CONTROL_GET_STATEBLOB] = {.name = "GET_STATEBLOB",
                               .fields = {{4, AT(flags)}, {4, AT(type)}, {4, AT(offset)}},
                               .drops_excess = true,
                               .powers = CONTROL_RUNNING,
                               .answer_bytes = 16,
                               .error_bytes = 16,
                               .capability = CONTROL_CAN_GET_STATEBLOB},
    [CONTROL_SET_STATEBLOB] = {.name = "SET_STATEBLOB",
                               .fields = {{4, AT(flags)}, {4, AT(type)}, {4, AT(data_bytes)}},
                               .data_bytes_max = CONTROL_BLOB_BYTES_MAX,
                               .powers = CONTROL_STOPPED,
                               .capability = CONTROL_CAN_SET_STATEBLOB},
    [CONTROL_STOP] = {.name = "STOP", .powers = CONTROL_ANY_POWER, .capability = CONTROL_CAN_STOP},
    [CONTROL_GET_CONFIG] = {.name = "GET_CONFIG",
                            .powers = CONTROL_ANY_POWER,
                            .answer_bytes = 8,
                            .capability = CONTROL_CAN_GET_CONFIG},
    [CONTROL_SET_DATAFD] = {.name = "SET_DATAFD",
                            .drops_excess = true,
                            .n_descriptors = 1,
                            .powers = CONTROL_ANY_POWER,
                            .capability = CONTROL_CAN_SET_DATAFD},
    [CONTROL_SET_BUFFERSIZE] = {.name = "SET_BUFFERSIZE",
                                .fields = {{4, AT(wanted_bytes)}},
                                .drops_excess = true,
                                .powers = CONTROL_STOPPED,
                                .powers_to_ask = CONTROL_ANY_POWER,
                                .answer_bytes = 16,
                                .capability = CONTROL_CAN_SET_BUFFERSIZE},
    [CONTROL_GET_INFO] = {.name = "GET_INFO",
                          .fields = {{8, AT(flags)}, {4, AT(offset)}, {4, PADDING_AT}},
                          .drops_excess = true,
                          .powers = CONTROL_ANY_POWER,
                          .answer_bytes = 12,
                          .capability = CONTROL_CAN_GET_INFO},
    [CONTROL_LOCK_STORAGE] = {.name = "LOCK_STORAGE",
                              .fields = {{4, AT(retries)}},
                              .drops_excess = true,
                              .powers = CONTROL_ANY_POWER,
                              .capability = CONTROL_CAN_LOCK_STORAGE},
};

const struct control_command *control_command_of(uint32_t number)
{
    return number < CONTROL_N_NUMBERS && commands[number].name ? &commands[number] : NULL;
}

size_t control_request_bytes(const struct control_command *command)
{
    size_t n_bytes = CONTROL_NUMBER_BYTES;

    for (size_t i = 0; i < CONTROL_FIELDS_MAX; i++)
        n_bytes += command->fields[i].n_bytes;
    return n_bytes;
}

static void close_descriptors(struct control *control)
{
    while (control->n_descriptors > 0)
        close(control->descriptors[--control->n_descriptors]);
}

static void free_data(struct control *control)
{
    if (control->data)
        explicit_bzero(control->data, control->data_bytes);
    free(control->data);
    control->data = NULL;
}

/* Forget the command that has come. */
static void clear_request(struct control *control)
{
    free_data(control);
    close_descriptors(control);
    control->request_bytes = control->data_bytes = control->excess_bytes = 0;
    control->is_parsed = false;
    control->event = (struct control_event){.descriptor = -1};
}

void control_init(struct control *control)
{
    *control = (struct control){.state = RECEIVING};
    clear_request(control);
}

void control_deinit(struct control *control)
{
    clear_request(control);
    control->n_output = 0;
    control->state = CLOSED;
}

/* Bytes that are still to be taken from a read. */
struct rest {
    const uint8_t *bytes;
    size_t n_bytes;
};

/* Take bytes until there are `wanted`. Returns whether there are. */
static bool take(struct rest *rest, uint8_t *out, size_t *n_bytes, size_t wanted)
{
    size_t missing = wanted > *n_bytes ? wanted - *n_bytes : 0;
    size_t n = missing < rest->n_bytes ? missing : rest->n_bytes;

    if (n > 0) {
        memcpy(out + *n_bytes, rest->bytes, n);
        *n_bytes += n;
        rest->bytes += n;
        rest->n_bytes -= n;
    }
    return n == missing;
}

static uint64_t get_number(const uint8_t *bytes, size_t n_bytes)
{
    switch (n_bytes) {
    case 1:
        return bytes[0];
    case 4:
        return get_be32(bytes);
    default:
        check(n_bytes == 8);
        return get_be64(bytes);
    }
}

static void parse_fields(struct control_event *event, const uint8_t *bytes)
{
    for (size_t i = 0; i < CONTROL_FIELDS_MAX; i++) {
        struct control_field field = event->command->fields[i];
        if (field.n_bytes == 0)
            break;
        uint64_t number = get_number(bytes, field.n_bytes);
        if (field.at != PADDING_AT)
            memcpy((uint8_t *)event + field.at, &number, sizeof(number));
        bytes += field.n_bytes;
    }
}

/* Take number and fields, and make room for the data that is announced. */
static void take_request(struct control *control, struct rest *rest)
{
    struct control_event *event = &control->event;

    if (!take(rest, control->request, &control->request_bytes, CONTROL_NUMBER_BYTES))
        return;
    event->number = get_be32(control->request);
    event->command = control_command_of(event->number);
    if (!event->command || !take(rest, control->request, &control->request_bytes,
                                 control_request_bytes(event->command)))
        return;
    parse_fields(event, control->request + CONTROL_NUMBER_BYTES);
    if (event->data_bytes > 0 && event->data_bytes <= event->command->data_bytes_max)
        control->data = malloc(event->data_bytes);
    control->is_parsed = true;
}

/* Keep the first ones: more than a command may have are not told apart. */
static void take_descriptors(struct control *control, const int *descriptors, size_t n_descriptors)
{
    for (size_t i = 0; i < n_descriptors; i++) {
        if (control->state == RECEIVING && control->n_descriptors < CONTROL_DESCRIPTORS_MAX)
            control->descriptors[control->n_descriptors++] = descriptors[i];
        else
            close(descriptors[i]);
    }
}

void control_receive(struct control *control, const uint8_t *bytes, size_t n_bytes,
                     const int *descriptors, size_t n_descriptors)
{
    struct rest rest = {bytes, n_bytes};

    take_descriptors(control, descriptors, n_descriptors);
    if (control->state == RECEIVING) {
        if (!control->is_parsed)
            take_request(control, &rest);
        if (control->data)
            take(&rest, control->data, &control->data_bytes, control->event.data_bytes);
    }
    control->excess_bytes += rest.n_bytes;
    if (control->state != RECEIVING && control->excess_bytes > CONTROL_EXCESS_BYTES_MAX) {
        control->state = CLOSED;
        control->n_output = 0;
    }
}

static bool is_allowed(const struct control_event *event, enum control_power power)
{
    const struct control_command *command = event->command;
    bool asks = command->powers_to_ask && event->wanted_bytes == 0;

    return (asks ? command->powers_to_ask : command->powers) & power;
}

/* What is wrong with a request. */
struct fault {
    uint32_t result;
    const char *reason;
    bool closes; /* nobody can tell where the next command would begin */
};

/* Judge what has come, its form before the TPM's power. Returns an enum control_verdict. */
static int judge(const struct control *control, enum control_power power, struct fault *fault)
{
    const struct control_event *event = &control->event;
    const struct control_command *command = event->command;

    if (control->request_bytes < CONTROL_NUMBER_BYTES)
        return CONTROL_NEED_DATA;
    if (!command)
        *fault = (struct fault){TPM_BAD_ORDINAL, "there is no such command", false};
    else if (!control->is_parsed)
        return CONTROL_NEED_DATA;
    else if (event->data_bytes > command->data_bytes_max)
        *fault = (struct fault){TPM_BAD_PARAMETER, "it announces more data than it may", true};
    else if (event->data_bytes > 0 && !control->data)
        *fault = (struct fault){TPM_FAIL, "there is no memory for its data", true};
    else if (control->data_bytes < event->data_bytes)
        return CONTROL_NEED_DATA;
    else if (control->excess_bytes > 0 && !command->drops_excess)
        *fault = (struct fault){TPM_BAD_PARAMETER, "it has bytes in excess", false};
    else if (command->n_descriptors > 0 && control->n_descriptors != command->n_descriptors)
        *fault = (struct fault){TPM_BAD_PARAMETER, "it needs exactly one descriptor", false};
    else if (!is_allowed(event, power))
        *fault = (struct fault){TPM_BAD_ORDINAL, "the TPM's power is not right for it", false};
    else
        return CONTROL_REQUEST;
    return CONTROL_REFUSED;
}

int control_next(struct control *control, enum control_power power, struct control_event *event)
{
    struct fault fault = {0};

    check(power == CONTROL_STOPPED || power == CONTROL_RUNNING);
    check(control->state != ASKED);
    if (control->state == CLOSED)
        return CONTROL_CLOSED;
    int verdict = control->state == RECEIVING ? judge(control, power, &fault) : CONTROL_NEED_DATA;
    if (verdict == CONTROL_NEED_DATA)
        return verdict;
    control->state = ASKED;
    control->excess_bytes = 0; /* what comes before the answer is counted by itself */
    control->closes = fault.closes;
    *event = control->event;
    event->result = fault.result;
    event->reason = fault.reason;
    if (verdict == CONTROL_REFUSED) {
        control_answer_result(control, fault.result);
        return verdict;
    }
    event->data = control->data;
    if (event->command->n_descriptors == 0)
        close_descriptors(control);
    else
        event->descriptor = control->descriptors[0];
    return verdict;
}

bool control_is_partial(const struct control *control)
{
    return control->state == RECEIVING && control->request_bytes > 0;
}

int control_take_descriptor(struct control *control)
{
    check(control->state != RECEIVING && control->n_descriptors == 1);
    return control->descriptors[--control->n_descriptors];
}

/* Begin an answer with a result and zeros. What came is not needed any more. */
static void begin_answer(struct control *control, uint32_t result, size_t n_bytes)
{
    check(control->state == ASKED || control->state == CLOSED);
    check(n_bytes <= sizeof(control->answer));
    clear_request(control);
    if (control->state == CLOSED)
        return;
    memset(control->answer, 0, sizeof(control->answer));
    put_be32(control->answer + AT_RESULT, result);
    control->output[0] = (struct iovec){control->answer, n_bytes};
    control->n_output = 1;
    control->state = ANSWERING;
}

static void begin_success(struct control *control, enum control_number number)
{
    check(control->event.number == number);
    begin_answer(control, TPM_SUCCESS, commands[number].answer_bytes);
}

void control_answer_result(struct control *control, uint32_t result)
{
    const struct control_command *command = control->event.command;
    size_t n_bytes = command && command->error_bytes ? command->error_bytes : RESULT_BYTES;

    check(result != TPM_SUCCESS || command->answer_bytes == 0);
    begin_answer(control, result, n_bytes);
}

void control_answer_capability(struct control *control, bool takes_prefix)
{
    uint32_t flags = takes_prefix ? CONTROL_CAN_SEND_COMMAND_HEADER : 0;

    for (size_t i = 0; i < CONTROL_N_NUMBERS; i++)
        flags |= commands[i].capability;
    begin_success(control, CONTROL_GET_CAPABILITY);
    put_be32(control->answer + AT_CAPABILITIES, flags);
}

void control_answer_established(struct control *control, bool established)
{
    begin_success(control, CONTROL_GET_TPMESTABLISHED);
    control->answer[AT_ESTABLISHED] = established;
}

void control_answer_config(struct control *control, uint32_t flags)
{
    begin_success(control, CONTROL_GET_CONFIG);
    put_be32(control->answer + AT_CONFIG, flags);
}

void control_answer_buffer_size(struct control *control, uint32_t bytes, uint32_t bytes_min,
                                uint32_t bytes_max)
{
    begin_success(control, CONTROL_SET_BUFFERSIZE);
    put_be32(control->answer + AT_SIZE, bytes);
    put_be32(control->answer + AT_SIZE_MIN, bytes_min);
    put_be32(control->answer + AT_SIZE_MAX, bytes_max);
}

static void add_output(struct control *control, const void *bytes, size_t n_bytes)
{
    if (control->state != ANSWERING || n_bytes == 0)
        return;
    check(control->n_output < sizeof(control->output) / sizeof(*control->output));
    control->output[control->n_output++] = (struct iovec){(void *)bytes, n_bytes};
}

void control_answer_state_blob(struct control *control, const struct iovec *pieces, size_t n_pieces,
                               bool is_encrypted)
{
    size_t offset = control->event.offset, total_bytes = 0;

    begin_success(control, CONTROL_GET_STATEBLOB);
    for (size_t i = 0; i < n_pieces; i++) {
        size_t skipped = offset < pieces[i].iov_len ? offset : pieces[i].iov_len;
        add_output(control, (const uint8_t *)pieces[i].iov_base + skipped,
                   pieces[i].iov_len - skipped);
        total_bytes += pieces[i].iov_len - skipped;
        offset -= skipped;
    }
    check(total_bytes <= UINT32_MAX);
    put_be32(control->answer + AT_BLOB_FLAGS, is_encrypted ? CONTROL_STATE_ENCRYPTED : 0);
    put_be32(control->answer + AT_BLOB_TOTAL, (uint32_t)total_bytes);
    put_be32(control->answer + AT_BLOB_LENGTH, (uint32_t)total_bytes);
}

void control_answer_info(struct control *control, const char *text)
{
    size_t offset = control->event.offset, text_bytes = strlen(text);

    if (offset >= text_bytes) {
        control_answer_result(control, TPM_BAD_PARAMETER);
        return;
    }
    size_t total_bytes = text_bytes + 1, n_bytes = total_bytes - offset;
    if (n_bytes > CONTROL_INFO_BYTES_MAX)
        n_bytes = CONTROL_INFO_BYTES_MAX;
    check(total_bytes <= UINT32_MAX);
    begin_success(control, CONTROL_GET_INFO);
    put_be32(control->answer + AT_INFO_TOTAL, (uint32_t)total_bytes);
    put_be32(control->answer + AT_INFO_LENGTH, (uint32_t)n_bytes);
    add_output(control, text + offset, n_bytes);
}

size_t control_output(struct control *control, struct iovec **vectors)
{
    *vectors = control->output;
    return control->n_output;
}

void control_sent(struct control *control, size_t n_bytes)
{
    struct iovec *left = control->output;

    if (control->state == CLOSED)
        return;
    vectors_advance(&left, &control->n_output, n_bytes);
    memmove(control->output, left, control->n_output * sizeof(*left));
    if (control->n_output > 0)
        return;
    check(control->state == ANSWERING);
    control->excess_bytes = 0;
    control->state = control->closes ? CLOSED : RECEIVING;
}
