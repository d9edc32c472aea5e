#include "link.h"

#include <errno.h>
#include <fcntl.h>
#include <libtpms/tpm_error.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "anchor.h"
#include "bytes.h"
#include "check.h"
#include "checkpoint.h"
#include "cipher.h"
#include "data.h"
#include "error.h"
#include "journal.h"
#include "message.h"
#include "pages.h"
#include "tpm.h"

_Static_assert(sizeof(((struct link_journal *)0)->identity) == JOURNAL_IDENTITY_BYTES &&
                   sizeof(((struct link_journal *)0)->secret) == JOURNAL_SECRET_BYTES,
               "as a journal has them");

/* One function an operation: takes the request, fills the response, returns its result. */
typedef TPM_RESULT (*operation)(struct link *link, struct message *request,
                                struct message *response);

static TPM_RESULT do_load_state(struct link *link, struct message *request,
                                struct message *response)
{
    (void)response;
    return tpm_load_state(link->tpm, request->header.argument, request->payload,
                          request->header.payload_bytes);
}

static TPM_RESULT do_set_data_socket(struct link *link, struct message *request,
                                     struct message *response)
{
    (void)response;
    if (request->descriptor < 0)
        return TPM_BAD_PARAMETER;
    if (data_channel_set_socket(link->channel, request->descriptor) == DATA_SOCKET_BUSY)
        return TPM_IOERROR;
    request->descriptor = -1; /* the channel's now */
    return TPM_SUCCESS;
}

static bool get_lineage(const struct message *request, struct checkpoint_lineage *lineage)
{
    struct link_lineage says;

    if (request->header.payload_bytes != sizeof(says))
        return false;
    memcpy(&says, request->payload, sizeof(says));
    lineage->generation = says.generation;
    memcpy(lineage->identity, says.identity, sizeof(lineage->identity));
    return says.generation <= GENERATION_MAX;
}

static TPM_RESULT init_now(struct link *link, struct message *request)
{
    struct checkpoint_lineage lineage = {0};
    bool has_come = request->header.argument & LINK_INIT_CAME;

    if (request->header.payload_bytes == 0)
        return tpm_init(link->tpm, has_come);
    if (!has_come || !get_lineage(request, &lineage))
        return TPM_BAD_PARAMETER;
    tpm_raise_generation(link->tpm, link->store, LINK_STATE_PERMANENT, lineage.generation);
    return tpm_init_come(link->tpm, &lineage);
}

static TPM_RESULT do_init(struct link *link, struct message *request, struct message *response)
{
    uint32_t from = request->header.argument;
    enum link_shutdown said = (from & LINK_SAID_MASK) >> LINK_SAID_SHIFT;
    struct link_digests *digests;

    if (!(from & LINK_INIT_HELD))
        return said ? TPM_BAD_PARAMETER : init_now(link, request);
    if (said > LINK_SHUTDOWN_STATE)
        return TPM_BAD_PARAMETER;
    digests = calloc(1, sizeof(*digests));
    if (!digests)
        return TPM_SIZE;
    response->payload = (uint8_t *)digests;
    TPM_RESULT result = tpm_init_standby(link->tpm, from & LINK_INIT_CAME, said, digests);
    if (result == TPM_SUCCESS)
        response->header.payload_bytes = sizeof(*digests);
    return result;
}

static TPM_RESULT do_stop(struct link *link, struct message *request, struct message *response)
{
    (void)request, (void)response;
    return tpm_stop(link->tpm);
}

static TPM_RESULT do_get_established(struct link *link, struct message *request,
                                     struct message *response)
{
    bool established = false;

    (void)request;
    TPM_RESULT result = tpm_get_established(link->tpm, &established);
    response->header.argument = established;
    return result;
}

static TPM_RESULT do_reset_established(struct link *link, struct message *request,
                                       struct message *response)
{
    (void)response;
    return tpm_reset_established(link->tpm, request->header.argument);
}

static TPM_RESULT do_set_locality(struct link *link, struct message *request,
                                  struct message *response)
{
    (void)response;
    return tpm_set_locality(link->tpm, request->header.argument);
}

static TPM_RESULT do_hash_start(struct link *link, struct message *request,
                                struct message *response)
{
    (void)request, (void)response;
    return tpm_hash_start(link->tpm);
}

static TPM_RESULT do_hash_data(struct link *link, struct message *request, struct message *response)
{
    (void)response;
    return tpm_hash_data(link->tpm, request->payload, request->header.payload_bytes);
}

static TPM_RESULT do_hash_end(struct link *link, struct message *request, struct message *response)
{
    (void)request, (void)response;
    return tpm_hash_end(link->tpm);
}

static TPM_RESULT do_cancel(struct link *link, struct message *request, struct message *response)
{
    (void)request, (void)response;
    return tpm_cancel(link->tpm);
}

static TPM_RESULT do_store_volatile(struct link *link, struct message *request,
                                    struct message *response)
{
    (void)request, (void)response;
    return tpm_store_volatile(link->tpm);
}

static TPM_RESULT do_get_state(struct link *link, struct message *request, struct message *response)
{
    size_t n_bytes = 0;

    TPM_RESULT result =
        tpm_get_state(link->tpm, request->header.argument, &response->payload, &n_bytes);
    check(n_bytes <= LINK_PAYLOAD_BYTES_MAX);
    response->header.payload_bytes = (uint32_t)n_bytes;
    return result;
}

static TPM_RESULT do_set_state(struct link *link, struct message *request, struct message *response)
{
    (void)response;
    return tpm_set_state(link->tpm, request->header.argument, request->payload,
                         request->header.payload_bytes);
}

static TPM_RESULT do_set_both_states(struct link *link, struct message *request,
                                     struct message *response)
{
    uint32_t permanent_bytes = request->header.argument;
    uint32_t both_bytes = request->header.payload_bytes;

    (void)response;
    if (permanent_bytes > both_bytes)
        return TPM_BAD_PARAMETER;
    TPM_RESULT result =
        tpm_set_state(link->tpm, LINK_STATE_PERMANENT, request->payload, permanent_bytes);
    if (result != TPM_SUCCESS)
        return result;
    return tpm_set_state(link->tpm, LINK_STATE_VOLATILE, request->payload + permanent_bytes,
                         both_bytes - permanent_bytes);
}

static TPM_RESULT do_set_buffer_size(struct link *link, struct message *request,
                                     struct message *response)
{
    uint32_t sizes[3];

    TPM_RESULT result = tpm_set_buffer_size(link->tpm, request->header.argument, sizes);
    if (result != TPM_SUCCESS)
        return result;
    response->payload = malloc(2 * sizeof(*sizes));
    if (!response->payload)
        return TPM_SIZE;
    memcpy(response->payload, sizes + 1, 2 * sizeof(*sizes));
    response->header.payload_bytes = 2 * sizeof(*sizes);
    response->header.argument = sizes[0];
    return TPM_SUCCESS;
}

static TPM_RESULT do_get_info(struct link *link, struct message *request, struct message *response)
{
    char *text = tpm_get_info(link->tpm, request->header.argument);
    if (!text)
        return TPM_SIZE;
    response->payload = (uint8_t *)text;
    response->header.payload_bytes = (uint32_t)strlen(text);
    return TPM_SUCCESS;
}

static TPM_RESULT do_capture(struct link *link, struct message *request, struct message *response)
{
    enum link_shutdown said = LINK_SHUTDOWN_NONE;
    bool worked = false;

    (void)request;
    TPM_RESULT result = tpm_capture(link->tpm, link->store, &worked, &said);
    response->header.argument = (worked ? LINK_CAPTURE_CHANGED : 0) | said << LINK_SAID_SHIFT;
    return result;
}

static TPM_RESULT do_retire(struct link *link, struct message *request, struct message *response)
{
    (void)response;
    return tpm_retire(link->tpm, request->header.argument == LINK_RETIRE_UNSERVED);
}

static TPM_RESULT do_unretire(struct link *link, struct message *request, struct message *response)
{
    (void)request, (void)response;
    return tpm_unretire(link->tpm);
}

static TPM_RESULT do_await(struct link *link, struct message *request, struct message *response)
{
    (void)response;
    return tpm_await(link->tpm, request->header.argument != 0);
}

static TPM_RESULT do_expect(struct link *link, struct message *request, struct message *response)
{
    (void)request, (void)response;
    return tpm_expect(link->tpm);
}

static TPM_RESULT do_admit(struct link *link, struct message *request, struct message *response)
{
    struct checkpoint_lineage lineage = {0};

    (void)response;
    if (!get_lineage(request, &lineage) || request->header.argument > LINK_ADMIT_GOES_BACK)
        return TPM_BAD_PARAMETER;
    return tpm_admit(link->tpm, &lineage, request->header.argument == LINK_ADMIT_GOES_BACK);
}

static TPM_RESULT do_get_lineage(struct link *link, struct message *request,
                                 struct message *response)
{
    struct checkpoint_lineage lineage;
    struct link_lineage *says = calloc(1, sizeof(*says));

    (void)request;
    if (!says)
        return TPM_SIZE;
    tpm_get_lineage(link->tpm, &lineage);
    says->generation = lineage.generation;
    memcpy(says->identity, lineage.identity, sizeof(says->identity));
    response->payload = (uint8_t *)says;
    response->header.payload_bytes = sizeof(*says);
    return TPM_SUCCESS;
}

static TPM_RESULT do_store_permanent(struct link *link, struct message *request,
                                     struct message *response)
{
    (void)request, (void)response;
    return tpm_store_permanent(link->tpm);
}

static TPM_RESULT do_forget_state(struct link *link, struct message *request,
                                  struct message *response)
{
    (void)request, (void)response;
    return tpm_forget_state(link->tpm);
}

static TPM_RESULT do_raise_generation(struct link *link, struct message *request,
                                      struct message *response)
{
    uint64_t floors[2];

    (void)response;
    if (request->header.payload_bytes != sizeof(floors))
        return TPM_BAD_PARAMETER;
    memcpy(floors, request->payload, sizeof(floors));
    if (floors[0] > GENERATION_MAX || floors[1] > GENERATION_MAX)
        return TPM_BAD_PARAMETER;
    tpm_raise_generation(link->tpm, link->store, LINK_STATE_PERMANENT, floors[0]);
    tpm_raise_generation(link->tpm, link->store, LINK_STATE_VOLATILE, floors[1]);
    return TPM_SUCCESS;
}

static TPM_RESULT do_set_journal(struct link *link, struct message *request,
                                 struct message *response)
{
    struct journal_settings settings = {.file_bytes = JOURNAL_BYTES};
    struct link_journal journal;

    (void)response;
    if (request->header.payload_bytes != sizeof(journal))
        return TPM_BAD_PARAMETER;
    memcpy(&journal, request->payload, sizeof(journal));
    if (journal.generation > GENERATION_MAX || journal.loaded > journal.generation)
        return TPM_BAD_PARAMETER;
    settings.sealed = journal.is_sealed;
    memcpy(settings.identity, journal.identity, sizeof(settings.identity));
    memcpy(settings.secret, journal.secret, sizeof(settings.secret));
    tpm_raise_generation(link->tpm, link->store, LINK_STATE_PERMANENT, journal.generation);
    TPM_RESULT result = tpm_set_journal(link->tpm, &settings, link->store, journal.loaded);
    explicit_bzero(&journal, sizeof(journal));
    explicit_bzero(&settings, sizeof(settings));
    return result;
}

static TPM_RESULT do_set_key(struct link *link, struct message *request, struct message *response)
{
    struct cipher_key key = {.n_bytes = request->header.payload_bytes};

    (void)response;
    if (key.n_bytes != 16 && key.n_bytes != 32)
        return TPM_BAD_KEY_PROPERTY;
    memcpy(key.bytes, request->payload, key.n_bytes);
    TPM_RESULT result = tpm_set_key(link->tpm, &key);
    explicit_bzero(&key, sizeof(key));
    return result;
}

static TPM_RESULT do_set_anchor(struct link *link, struct message *request,
                                struct message *response)
{
    struct link_anchor says;

    (void)response;
    if (request->header.payload_bytes != sizeof(says) || request->descriptor < 0)
        return TPM_BAD_PARAMETER;
    memcpy(&says, request->payload, sizeof(says));
    struct anchor anchor = {
        .fd = request->descriptor,
        .serial = says.serial,
        .generation = says.generation,
    };
    memcpy(anchor.identity, says.identity, sizeof(anchor.identity));
    memcpy(anchor.digest, says.digest, sizeof(anchor.digest));
    TPM_RESULT result = tpm_set_anchor(link->tpm, &anchor);
    if (result == TPM_SUCCESS)
        request->descriptor = -1; /* the TPM's now */
    return result;
}

static const operation operations[] = {
    [LINK_LOAD_STATE] = do_load_state,
    [LINK_SET_DATA_SOCKET] = do_set_data_socket,
    [LINK_INIT] = do_init,
    [LINK_STOP] = do_stop,
    [LINK_GET_ESTABLISHED] = do_get_established,
    [LINK_RESET_ESTABLISHED] = do_reset_established,
    [LINK_SET_LOCALITY] = do_set_locality,
    [LINK_HASH_START] = do_hash_start,
    [LINK_HASH_DATA] = do_hash_data,
    [LINK_HASH_END] = do_hash_end,
    [LINK_CANCEL] = do_cancel,
    [LINK_STORE_VOLATILE] = do_store_volatile,
    [LINK_GET_STATE] = do_get_state,
    [LINK_SET_STATE] = do_set_state,
    [LINK_SET_BUFFER_SIZE] = do_set_buffer_size,
    [LINK_GET_INFO] = do_get_info,
    [LINK_CAPTURE] = do_capture,
    [LINK_RETIRE] = do_retire,
    [LINK_UNRETIRE] = do_unretire,
    [LINK_FORGET_STATE] = do_forget_state,
    [LINK_RAISE_GENERATION] = do_raise_generation,
    [LINK_STORE_PERMANENT] = do_store_permanent,
    [LINK_SET_BOTH_STATES] = do_set_both_states,
    [LINK_ADMIT] = do_admit,
    [LINK_SET_KEY] = do_set_key,
    [LINK_SET_ANCHOR] = do_set_anchor,
    [LINK_SET_JOURNAL] = do_set_journal,
    [LINK_EXPECT] = do_expect,
    [LINK_AWAIT] = do_await,
    [LINK_GET_LINEAGE] = do_get_lineage,
};

/* Carry out a request. Returns 0, or -EPROTO for one that is none. */
static int carry_out(struct link *link, struct message *request, struct message *response)
{
    uint32_t number = request->header.operation;

    if (number >= sizeof(operations) / sizeof(*operations) || !operations[number])
        return -EPROTO;
    response->header.operation = number;
    response->header.result = operations[number](link, request, response);
    return 0;
}

static int serve_request(struct link *link)
{
    cleanup(message_deinit) struct message request = MESSAGE_NONE;
    cleanup(message_deinit) struct message response = MESSAGE_NONE;

    int r = message_receive(link->fd, &request);
    if (r != 0)
        return r;
    r = carry_out(link, &request, &response);
    return r < 0 ? r : message_send(link->fd, &response);
}

int link_serve(struct link *link, enum link_locked locked)
{
    uint32_t version = TPMLIB_GetVersion();
    struct message ready = {
        .header = {LINK_READY, .argument = locked, .payload_bytes = sizeof(version)},
        .payload = (uint8_t *)&version,
        .descriptor = -1,
    };

    int r = message_send(link->fd, &ready);
    while (r == 0)
        r = serve_request(link);
    return r == MESSAGE_END ? 0 : r;
}

/* The record is complete and stays so: what wrote it has sealed it. */
static bool is_sealed(int fd)
{
    enum { SEALS = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE };

    int seals = fcntl(fd, F_GET_SEALS);
    return seals >= 0 && (seals & SEALS) == SEALS;
}

static int boot_from_next(struct link *link, int fd)
{
    cleanup(message_deinit) struct message request = MESSAGE_NONE;
    cleanup(message_deinit) struct message response = MESSAGE_NONE;

    int r = message_read(fd, &request);
    if (r != 0)
        return r;
    if (request.header.operation == LINK_SET_ANCHOR)
        request.descriptor = LINK_FD_ANCHOR;
    r = carry_out(link, &request, &response);
    if (r == 0 && response.header.result != TPM_SUCCESS)
        r = -EINVAL;
    return r;
}

int link_boot(struct link *link, int fd)
{
    int r = is_sealed(fd) ? 0 : -EPERM;

    while (r == 0)
        r = boot_from_next(link, fd);
    close(fd);
    return r == MESSAGE_END ? 0 : r;
}
