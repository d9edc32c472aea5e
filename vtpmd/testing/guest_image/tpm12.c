#include "tpm12.h"

#include "device.h"
#include "failure.h"
#include "message.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* TPM main part 2, section 17, and part 3. */
enum {
    TAG_COMMAND = 0x00c1,
    ORD_EXTEND = 0x14,
    ORD_PCR_READ = 0x15,
    ORD_NV_WRITE_VALUE = 0xcd,
    ORD_NV_READ_VALUE = 0xcf,
    HEADER_SIZE = 10,
    SIZE_AT = 2,
    SHA1_SIZE = 20,
    PCR_CHAIN = 10, /* one that TPM_SaveState keeps */
    NV_INDEX = 0x00011101,
    NV_SIZE = 64,
    NV_WRITES_MAX = 48, /* without an authorisation: TPM_MAX_NV_WRITE_NOOWNER is 64 */
    RETRY = 0x800,      /* "not now": the command can be sent again as it is */
    RETRY_PAUSE_US = 20000,
    RETRIES_MAX = 500,
};

static struct {
    bool is_known; /* what the PCR held at first */
    uint8_t chain[SHA1_SIZE];
    uint8_t nv[NV_SIZE];
    uint64_t steps;
    uint64_t nv_writes;
} model;

static void begin(struct message *command, uint32_t ordinal)
{
    *command = (struct message){0};
    put_u16(command, TAG_COMMAND);
    put_u32(command, 0);
    put_u32(command, ordinal);
}

/* Linux sends nothing again that a TPM 1.2 answers with TPM_RETRY: its users do. */
static uint32_t transact(uint32_t ordinal, struct message *command, struct message *response)
{
    uint32_t code = RETRY;

    for (int i = 0; i < RETRIES_MAX && code == RETRY; i++) {
        if (i > 0)
            usleep(RETRY_PAUSE_US);
        if (device_transact(ordinal, command, response) < 0)
            return UINT32_MAX;
        take_bytes(response, HEADER_SIZE - sizeof(code));
        code = take_u32(response);
    }
    return code;
}

/* Returns 0 with the response's parameters ready to be taken, or -1. */
static int execute(uint32_t ordinal, struct message *command, struct message *response)
{
    uint32_t size = (uint32_t)command->size;

    for (size_t i = 0; i < sizeof(size); i++)
        command->data[SIZE_AT + i] = (uint8_t)(size >> (24 - 8 * i));
    if (command->broken)
        return failure("command %#x is too long", ordinal);
    uint32_t code = transact(ordinal, command, response);
    if (response->broken || code != 0)
        return failure("command %#x: the TPM answers %#x", ordinal, code);
    return 0;
}

static int pcr_read(uint8_t digest[SHA1_SIZE])
{
    struct message command, response;

    begin(&command, ORD_PCR_READ);
    put_u32(&command, PCR_CHAIN);
    if (execute(ORD_PCR_READ, &command, &response) < 0)
        return -1;
    struct span found = take_bytes(&response, SHA1_SIZE);
    if (response.broken)
        return failure("the response to TPM_PcrRead is cut");
    memcpy(digest, found.data, SHA1_SIZE);
    return 0;
}

static int pcr_extend(const uint8_t digest[SHA1_SIZE])
{
    struct message command, response;

    begin(&command, ORD_EXTEND);
    put_u32(&command, PCR_CHAIN);
    put_bytes(&command, digest, SHA1_SIZE);
    return execute(ORD_EXTEND, &command, &response);
}

static int nv_write(void)
{
    struct message command, response;

    begin(&command, ORD_NV_WRITE_VALUE);
    put_u32(&command, NV_INDEX);
    put_u32(&command, 0);
    put_u32(&command, NV_SIZE);
    put_bytes(&command, model.nv, NV_SIZE);
    return execute(ORD_NV_WRITE_VALUE, &command, &response);
}

static int check_nv(void)
{
    struct message command, response;

    begin(&command, ORD_NV_READ_VALUE);
    put_u32(&command, NV_INDEX);
    put_u32(&command, 0);
    put_u32(&command, NV_SIZE);
    if (execute(ORD_NV_READ_VALUE, &command, &response) < 0)
        return -1;
    take_u32(&response);
    struct span found = take_bytes(&response, NV_SIZE);
    if (response.broken || memcmp(found.data, model.nv, NV_SIZE) != 0)
        return failure("NV differs from what was written in step %" PRIu64, model.steps);
    return 0;
}

static int check_chain(void)
{
    uint8_t digest[SHA1_SIZE];

    if (pcr_read(digest) < 0)
        return -1;
    if (memcmp(digest, model.chain, SHA1_SIZE) != 0)
        return failure("the PCR chain broke after step %" PRIu64, model.steps);
    return 0;
}

int tpm12_step(void)
{
    uint8_t digest[DIGEST_SIZE];
    struct span spans[] = {{model.chain, SHA1_SIZE}, {digest, SHA1_SIZE}};

    if (!model.is_known && pcr_read(model.chain) < 0)
        return -1;
    model.is_known = true;
    model.steps++;
    sha256(&(struct span){&model.steps, sizeof(model.steps)}, 1, digest);
    if (pcr_extend(digest) < 0)
        return -1;
    sha1(spans, 2, model.chain);
    if (check_chain() < 0)
        return -1;
    if (model.nv_writes == NV_WRITES_MAX)
        return 0;
    model.nv_writes++;
    memcpy(model.nv, digest, DIGEST_SIZE);
    return nv_write() < 0 ? -1 : check_nv();
}

static void say(const char *name, const void *data, size_t size)
{
    const uint8_t *bytes = data;

    printf("fact %s ", name);
    for (size_t i = 0; i < size; i++)
        printf("%02x", bytes[i]);
    putchar('\n');
}

int tpm12_check(void)
{
    if (check_chain() < 0 || check_nv() < 0)
        return -1;
    say("pcr_chain", model.chain, SHA1_SIZE);
    printf("fact steps %" PRIu64 "\n", model.steps);
    return 0;
}

int tpm12_raw(const char *digits)
{
    struct message command = {0}, response;
    unsigned int byte;

    for (; sscanf(digits, "%2x", &byte) == 1; digits += 2)
        put_u8(&command, (uint8_t)byte);
    if (*digits != '\0' || command.size < HEADER_SIZE || command.broken)
        return failure("that is no command");
    if (device_transact(0, &command, &response) < 0)
        return -1;
    say("response", response.data, response.size);
    return 0;
}
