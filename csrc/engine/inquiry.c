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
#include "version.h"

enum {
    MESSAGES_MAX = 4, /* a profile, and a state of each type */
    SECONDS_MAX = 10, /* many times what libtpms takes; then SIGALRM ends it */
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

static bool choose(uint32_t version)
{
    struct libtpms_callbacks callbacks = {
        .sizeOfStruct = sizeof(callbacks),
        .tpm_nvram_loaddata = load_made,
        .tpm_nvram_storedata = store_made,
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

/* sandbox: write */
static enum link_inquiry say_new_state(uint32_t flags)
{
    bool is_made = TPMLIB_MainInit() == TPM_SUCCESS && made.exists;

    (void)flags;
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

enum link_inquiry inquiry_make(void)
{
    return run(VERSION_2_0, say_new_state, 0);
}
