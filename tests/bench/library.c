/* Times what a commit costs libtpms alone: it runs here, and keeps in memory what it stores.
 *
 *     library STATE SAMPLES COMMAND...
 *
 * STATE is a file with a permanent state as libtpms marshals it. The TPM starts from it and carries
 * out the commands, in hexadecimal, in turn. Each has to succeed and, after some that warm up, to
 * store the state. Writes the nanoseconds of each as a JSON array. Exit status: 0 measured, 1
 * something failed, 2 usage.
 */
#include <err.h>
#include <inttypes.h>
#include <libtpms/tpm_error.h>
#include <libtpms/tpm_library.h>
#include <libtpms/tpm_nvfilename.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    COMMAND_BYTES_MAX = 4096,
    COMMANDS_MAX = 2,
    HEADER_BYTES = 10,
    AT_CODE = 6,
    STATE_BYTES_MAX = 1 << 18,
    SAMPLES_MAX = 100000,
    WARM_UP_SAMPLES = 20,
};

struct command {
    uint32_t n_bytes;
    uint8_t bytes[COMMAND_BYTES_MAX];
};

static uint8_t state[STATE_BYTES_MAX];
static uint32_t state_bytes;
static unsigned n_stored;

static TPM_RESULT on_init(void)
{
    return TPM_SUCCESS;
}

static TPM_RESULT on_load(unsigned char **data, uint32_t *length, uint32_t tpm_number,
                          const char *name)
{
    (void)tpm_number;
    if (strcmp(name, TPM_PERMANENT_ALL_NAME) != 0)
        return TPM_RETRY; /* "there is no such file" */
    *data = malloc(state_bytes);
    if (!*data)
        return TPM_SIZE;
    memcpy(*data, state, state_bytes);
    *length = state_bytes;
    return TPM_SUCCESS;
}

static TPM_RESULT on_store(const unsigned char *data, uint32_t length, uint32_t tpm_number,
                           const char *name)
{
    (void)tpm_number;
    if (strcmp(name, TPM_PERMANENT_ALL_NAME) != 0 || length > sizeof(state))
        return TPM_FAIL;
    memcpy(state, data, length);
    state_bytes = length;
    n_stored++;
    return TPM_SUCCESS;
}

static TPM_RESULT on_delete(uint32_t tpm_number, const char *name, TPM_BOOL must_exist)
{
    (void)tpm_number;
    (void)name;
    return must_exist ? TPM_FAIL : TPM_SUCCESS;
}

static void power_on(const char *state_file)
{
    struct libtpms_callbacks callbacks = {
        .sizeOfStruct = sizeof(callbacks),
        .tpm_nvram_init = on_init,
        .tpm_nvram_loaddata = on_load,
        .tpm_nvram_storedata = on_store,
        .tpm_nvram_deletename = on_delete,
        .tpm_io_init = on_init,
    };
    FILE *file = fopen(state_file, "rb");

    if (!file)
        err(1, "%s", state_file);
    state_bytes = (uint32_t)fread(state, 1, sizeof(state), file);
    fclose(file);
    if (TPMLIB_ChooseTPMVersion(TPMLIB_TPM_VERSION_2) != TPM_SUCCESS ||
        TPMLIB_RegisterCallbacks(&callbacks) != TPM_SUCCESS || TPMLIB_MainInit() != TPM_SUCCESS)
        errx(1, "libtpms does not start from %s", state_file);
}

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000U + (uint64_t)now.tv_nsec;
}

/* Returns how long it took. */
static uint64_t execute(struct command *command)
{
    static const uint8_t success[4];
    static uint8_t *response;
    static uint32_t n_allocated;
    uint32_t n_bytes = 0;
    uint64_t start_ns = now_ns();

    TPM_RESULT result =
        TPMLIB_Process(&response, &n_bytes, &n_allocated, command->bytes, command->n_bytes);
    uint64_t end_ns = now_ns();
    if (result != TPM_SUCCESS || n_bytes < HEADER_BYTES ||
        memcmp(response + AT_CODE, success, sizeof(success)) != 0)
        errx(1, "the TPM refused a command");
    return end_ns - start_ns;
}

static void measure(struct command *commands, unsigned n_commands, unsigned n_samples)
{
    for (unsigned i = 0; i < WARM_UP_SAMPLES + n_samples; i++) {
        unsigned n_before = n_stored;
        uint64_t took_ns = execute(&commands[i % n_commands]);
        if (i < WARM_UP_SAMPLES)
            continue;
        if (n_stored == n_before)
            errx(1, "a command changed nothing");
        printf("%s%" PRIu64, i == WARM_UP_SAMPLES ? "[" : ", ", took_ns);
    }
    puts("]");
}

static bool parse(struct command *command, const char *hex)
{
    for (command->n_bytes = 0; *hex; hex += 2) {
        if (command->n_bytes == COMMAND_BYTES_MAX ||
            sscanf(hex, "%2hhx", &command->bytes[command->n_bytes++]) != 1 || !hex[1])
            return false;
    }
    return command->n_bytes >= HEADER_BYTES;
}

int main(int argc, char **argv)
{
    static struct command startup = {12, {0x80, 0x01, 0, 0, 0, 12, 0, 0, 0x01, 0x44, 0, 0}};
    static struct command commands[COMMANDS_MAX];
    unsigned n_commands = argc > 3 ? (unsigned)argc - 3 : 0;
    unsigned n_samples = n_commands ? (unsigned)strtoul(argv[2], NULL, 10) : 0;
    bool is_right =
        n_commands >= 1 && n_commands <= COMMANDS_MAX && n_samples >= 1 && n_samples <= SAMPLES_MAX;

    for (unsigned i = 0; is_right && i < n_commands; i++)
        is_right = parse(&commands[i], argv[i + 3]);
    if (!is_right)
        errx(2, "usage: library STATE SAMPLES COMMAND...");
    power_on(argv[1]);
    execute(&startup);
    measure(commands, n_commands, n_samples);
    TPMLIB_Terminate();
    return 0;
}
