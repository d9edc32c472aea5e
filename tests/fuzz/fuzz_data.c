/* Fuzz the engine's data channel: arbitrary bytes as the guest's commands, into the real libtpms.
 *
 *   build/sanitize/fuzz_data -max_total_time=60 tests/fuzz/corpus/data
 *
 * The oracle:
 *   - the verdict is that of a parser written another way, and a prefix of a command is never one,
 *   - each command gets one whole response, its length the one in its header,
 *   - whatever was executed, the permanent state that libtpms gives out is one that it takes back.
 */
#include <libtpms/tpm_error.h>
#include <stdlib.h>
#include <string.h>

#include "bytes.h"
#include "check.h"
#include "data.h"
#include "io_memory.h"
#include "tpm.h"

static struct io_memory io;
static struct tpm *tpm;
static struct tpm_response response;

static void execute(const uint8_t *bytes, size_t n_bytes)
{
    uint8_t *command = malloc(n_bytes);

    check(command);
    memcpy(command, bytes, n_bytes);
    tpm_execute(tpm, command, n_bytes, &response);
    free(command);
    check(response.n_bytes >= TPM_HEADER_BYTES && response.n_bytes <= tpm_message_bytes_max());
    check(get_be32(response.bytes + 2) == response.n_bytes);
    tpm_response_wipe(&response);
}

static uint64_t number_at(const uint8_t *bytes, size_t at)
{
    uint64_t number = 0;

    for (size_t i = at; i < at + 4; i++)
        number = number * 256 + bytes[i];
    return number;
}

static int expected_verdict(const uint8_t *bytes, size_t n_bytes)
{
    if (n_bytes < 6)
        return DATA_NEED_MORE;
    size_t start = number_at(bytes, 0) == 8 ? 9 : 0;
    if (n_bytes < start + 6)
        return DATA_NEED_MORE;
    uint64_t size = number_at(bytes, start + 2);
    if (size < 10 || size > tpm_message_bytes_max())
        return DATA_MALFORMED;
    if (start > 0 && (bytes[4] > 4 || number_at(bytes, 5) != size))
        return DATA_MALFORMED;
    return start + size <= n_bytes ? DATA_COMMAND : DATA_NEED_MORE;
}

static void check_state_is_accepted(void)
{
    uint8_t *state;
    size_t state_bytes;

    check(tpm_get_state(tpm, LINK_STATE_PERMANENT, &state, &state_bytes) == TPM_SUCCESS);
    tpm_stop(tpm);
    check(tpm_set_state(tpm, LINK_STATE_PERMANENT, state, state_bytes) == TPM_SUCCESS);
    free(state);
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc, (void)argv;
    io_memory_init(&io);
    tpm = tpm_new(&io.io);
    tpm_response_init(&response);
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_data)
{
    static const uint8_t startup[] = {0x80, 1, 0, 0, 0, 12, 0, 0, 1, 0x44, 0, 0};

    check(tpm_init(tpm, false) == TPM_SUCCESS);
    execute(startup, sizeof(startup));
    for (;;) {
        struct data_command command;
        int verdict = data_parse(data, n_data, tpm_message_bytes_max(), true, &command);
        check(verdict == expected_verdict(data, n_data));
        if (verdict != DATA_COMMAND)
            break;
        size_t end = command.start + command.n_bytes;
        check(command.n_bytes > 0 && end <= n_data);
        for (size_t n = 0; n < end; n++) {
            struct data_command none;
            check(data_parse(data, n, tpm_message_bytes_max(), true, &none) == DATA_NEED_MORE &&
                  none.n_bytes == 0);
        }
        execute(data + command.start, command.n_bytes);
        data += end;
        n_data -= end;
    }
    check_state_is_accepted();
    return 0;
}
