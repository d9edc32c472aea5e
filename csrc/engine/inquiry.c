#include "inquiry.h"

#include <libtpms/tpm_error.h>
#include <libtpms/tpm_library.h>
#include <libtpms/tpm_nvfilename.h>
#include <openssl/crypto.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bytes.h"
#include "image.h"
#include "library.h"
#include "message.h"
#include "sandbox.h"
#include "tpm.h"
#include "version.h"

enum {
    MESSAGES_MAX = 4, /* a profile, and a state of each type */
    SECONDS_MAX = 20, /* many times what libtpms takes, also for keys; then SIGALRM ends it */
};

/* The permanent state of a TPM that is made: libtpms stores it, and loads it at once. */
static struct image made;

/* All of them, in order: `from` is closed to what comes later. Returns how many, or -1. */
static int read_messages(int from, struct message messages[MESSAGES_MAX])
{
    for (int n = 0; n < MESSAGES_MAX; n++) {
        int r = message_read(from, &messages[n]);
        if (r != 0)
            return r == MESSAGE_END ? n : -1;
    }
    return -1;
}

static bool state_type(uint32_t type, enum TPMLIB_StateType *found)
{
    static const enum TPMLIB_StateType types[] = {
        [LINK_STATE_PERMANENT] = TPMLIB_STATE_PERMANENT,
        [LINK_STATE_VOLATILE] = TPMLIB_STATE_VOLATILE,
        [LINK_STATE_SAVESTATE] = TPMLIB_STATE_SAVE_STATE,
    };

    if (type < LINK_STATE_PERMANENT || type > LINK_STATE_SAVESTATE)
        return false;
    *found = types[type];
    return true;
}

static TPM_RESULT give(const struct message *message)
{
    const struct link_header *header = &message->header;
    enum TPMLIB_StateType type;

    if (header->payload_bytes == 0)
        return TPM_BAD_PARAMETER;
    if (header->operation == LINK_LOAD_STATE && state_type(header->argument, &type))
        return TPMLIB_SetState(type, message->payload, header->payload_bytes);
    if (header->operation == LINK_SET_PROFILE &&
        message->payload[header->payload_bytes - 1] == '\0')
        return library_set_profile((const char *)message->payload);
    return TPM_BAD_PARAMETER;
}

/* There are no files: without a permanent state a TPM 1.2's others are refused. */
static TPM_RESULT load_made(unsigned char **data, uint32_t *n_bytes, uint32_t tpm_number,
                            const char *name)
{
    (void)tpm_number;
    if (!made.exists || strcmp(name, TPM_PERMANENT_ALL_NAME) != 0)
        return TPM_RETRY;
    *data = malloc(made.n_bytes);
    if (!*data)
        return TPM_SIZE;
    memcpy(*data, made.bytes, made.n_bytes);
    *n_bytes = (uint32_t)made.n_bytes;
    return TPM_SUCCESS;
}

static TPM_RESULT store_made(const unsigned char *data, uint32_t n_bytes, uint32_t tpm_number,
                             const char *name)
{
    (void)tpm_number;
    if (n_bytes == 0 || strcmp(name, TPM_PERMANENT_ALL_NAME) != 0)
        return TPM_FAIL;
    return image_set(&made, data, n_bytes) < 0 ? TPM_SIZE : TPM_SUCCESS;
}

/* A TPM 1.2 asks at its start, and removes what it has saved. */
static TPM_RESULT begin(void)
{
    return TPM_SUCCESS;
}

static TPM_RESULT delete_made(uint32_t tpm_number, const char *name, TPM_BOOL must_exist)
{
    (void)tpm_number;
    (void)name;
    return must_exist ? TPM_FAIL : TPM_SUCCESS;
}

static bool choose(uint32_t version)
{
    struct libtpms_callbacks callbacks = {
        .sizeOfStruct = sizeof(callbacks),
        .tpm_nvram_init = begin,
        .tpm_nvram_loaddata = load_made,
        .tpm_nvram_storedata = store_made,
        .tpm_nvram_deletename = delete_made,
        .tpm_io_init = begin,
    };

    return version_set(version) && TPMLIB_RegisterCallbacks(&callbacks) == TPM_SUCCESS &&
           TPMLIB_ChooseTPMVersion((TPMLIB_TPMVersion)version_now()->library) == TPM_SUCCESS;
}

/* Returns false once libtpms has refused one, which is said then. */
static bool give_all(const struct message *messages, int n)
{
    uint32_t version = TPMLIB_GetVersion();

    dprintf(STDOUT_FILENO, "%u.%u.%u\n", version >> 16, version >> 8 & 0xff, version & 0xff);
    for (int i = 0; i < n; i++) {
        TPM_RESULT result = give(&messages[i]);
        if (result == TPM_SUCCESS)
            continue;
        dprintf(STDOUT_FILENO, "%u %u %u\n", messages[i].header.operation,
                messages[i].header.argument, result);
        return false;
    }
    return true;
}

static enum link_inquiry say_info(uint32_t flags)
{
    char *info = TPMLIB_GetInfo((enum TPMLIB_InfoFlags)flags);
    bool is_out = info && dprintf(STDOUT_FILENO, "%s\n", info) >= 0;

    free(info);
    return is_out ? LINK_INQUIRY_ANSWERED : LINK_INQUIRY_FAILED;
}

static bool execute(uint8_t *command, size_t n_bytes)
{
    struct tpm_response response;

    tpm_response_init(&response);
    tpm_process(command, n_bytes, &response);
    bool is_done = get_be32(response.bytes + TPM_AT_CODE) == 0;
    tpm_response_deinit(&response);
    return is_done;
}

/* What a TPM 1.2 has of its maker: the endorsement key, with which libtpms makes the secrets of
 * DAA. All others are made with its owner. TPM main part 3, 3.2 and 14.1; part 2, 10.1. */
static bool make_endorsement_key(void)
{
    uint8_t startup[] = {0, 0xc1, 0, 0, 0, 12, 0, 0, 0, 0x99, 0, 1};
    uint8_t create[54] = {0, 0xc1, 0, 0, 0, sizeof(create), 0, 0, 0, 0x78};
    uint8_t *parameters = create + TPM_HEADER_BYTES + 20; /* behind a nonce, of zeros */

    put_be32(parameters, 1);         /* RSA, */
    put_be16(parameters + 4, 3);     /* to encrypt by OAEP, */
    put_be16(parameters + 6, 1);     /* and not to sign; */
    put_be32(parameters + 8, 12);    /* bytes of what follows: */
    put_be32(parameters + 12, 2048); /* bits, */
    put_be32(parameters + 16, 2);    /* primes, and the exponent that all have */
    return execute(startup, sizeof(startup)) && execute(create, sizeof(create));
}

/* sandbox: write */
static enum link_inquiry say_new_state(uint32_t flags)
{
    bool is_made = TPMLIB_MainInit() == TPM_SUCCESS;

    (void)flags;
    if (is_made && version_now()->number == VERSION_1_2)
        is_made = make_endorsement_key();
    is_made = is_made && made.exists;
    TPMLIB_Terminate();
    if (is_made)
        is_made = write(STDOUT_FILENO, made.bytes, made.n_bytes) == (ssize_t)made.n_bytes;
    image_deinit(&made);
    return is_made ? LINK_INQUIRY_ANSWERED : LINK_INQUIRY_FAILED;
}

static enum link_inquiry run(uint32_t version, enum link_inquiry (*say)(uint32_t), uint32_t flags)
{
    struct message messages[MESSAGES_MAX] = {MESSAGE_NONE, MESSAGE_NONE, MESSAGE_NONE,
                                             MESSAGE_NONE};
    enum link_inquiry answer = LINK_INQUIRY_FAILED;

    alarm(SECONDS_MAX);
    /* libcrypto reads its configuration now: later it would be killed for opening it. */
    OPENSSL_init_crypto(OPENSSL_INIT_LOAD_CONFIG, NULL);
    TPMLIB_SetDebugFD(STDERR_FILENO);
    bool is_closed = sandbox_enter() >= 0;
    int n = read_messages(STDIN_FILENO, messages);
    if (is_closed && n >= 0 && choose(version) && sandbox_seal() >= 0)
        answer = give_all(messages, n) ? say(flags) : LINK_INQUIRY_REFUSED;
    for (int i = 0; i < MESSAGES_MAX; i++)
        message_deinit(&messages[i]);
    return answer;
}

enum link_inquiry inquiry_run(uint32_t version, uint32_t flags)
{
    return run(version, say_info, flags);
}

enum link_inquiry inquiry_make(uint32_t version)
{
    return run(version, say_new_state, 0);
}
