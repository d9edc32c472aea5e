#include "link.h"

#include <errno.h>
#include <fcntl.h>
#include <libtpms/tpm_error.h>
#include <libtpms/tpm_library.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "anchor.h"
#include "ask.h"
#include "blackout.h"
#include "bytes.h"
#include "check.h"
#include "checkpoint.h"
#include "cipher.h"
#include "clock.h"
#include "data.h"
#include "error.h"
#include "holder.h"
#include "io.h"
#include "journal.h"
#include "lane.h"
#include "library.h"
#include "linear.h"
#include "message.h"
#include "nvram.h"
#include "pages.h"
#include "server.h"
#include "staged.h"
#include "tpm.h"
#include "version.h"

_Static_assert(sizeof(((struct link_journal *)0)->identity) == JOURNAL_IDENTITY_BYTES &&
                   sizeof(((struct link_journal *)0)->secret) == JOURNAL_SECRET_BYTES,
               "as a journal has them");

enum {
    FILE_MODE_MAX = 0777,
};

/* One function an operation: takes the request, fills the response, returns its result. */
typedef TPM_RESULT (*operation)(struct link *link, struct message *request,
                                struct message *response);

static TPM_RESULT do_set_version(struct link *link, struct message *request,
                                 struct message *response)
{
    (void)response;
    TPM_RESULT result = tpm_set_version(link->tpm, request->header.argument);
    if (result == TPM_BAD_VERSION)
        error_report("the libtpms of this host has no TPM %s: install one that was built with it",
                     version_now()->name);
    return result;
}

static TPM_RESULT do_load_state(struct link *link, struct message *request,
                                struct message *response)
{
    (void)response;
    return tpm_load_state(link->tpm, request->header.argument, request->payload,
                          request->header.payload_bytes);
}

static TPM_RESULT do_set_profile(struct link *link, struct message *request,
                                 struct message *response)
{
    uint32_t n_bytes = request->header.payload_bytes;

    (void)response;
    if (n_bytes == 0 || request->payload[n_bytes - 1] != '\0')
        return TPM_BAD_PARAMETER;
    return tpm_set_profile(link->tpm, (const char *)request->payload);
}

static TPM_RESULT do_get_info(struct link *link, struct message *request, struct message *response)
{
    char *info = tpm_get_info(link->tpm, request->header.argument);
    size_t n_bytes = info ? strlen(info) : 0;

    if (!info || n_bytes > LINK_PAYLOAD_BYTES_MAX) {
        free(info);
        return TPM_FAIL;
    }
    response->payload = (uint8_t *)info;
    response->header.payload_bytes = (uint32_t)n_bytes;
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

/* A vTPM that was granted to another host, and starts here, has come back. */
static TPM_RESULT start(struct link *link)
{
    TPM_RESULT result = commands_start(server_commands(link->server));
    if (result == TPM_SUCCESS)
        blackout_say(link->blackout, HANDOVER_OWNED);
    return result;
}

static TPM_RESULT do_init(struct link *link, struct message *request, struct message *response)
{
    (void)response;
    return request->header.argument == 0 ? start(link) : TPM_BAD_PARAMETER;
}

static TPM_RESULT do_stop(struct link *link, struct message *request, struct message *response)
{
    (void)response;
    return commands_stop(server_commands(link->server), request->header.argument != 0);
}

/* Returns false for a payload that is none. */
static bool get_records(const struct message *request, struct staged_records *records)
{
    const struct link_header *header = &request->header;
    uint32_t permanent_bytes;

    if (header->payload_bytes < sizeof(permanent_bytes))
        return false;
    memcpy(&permanent_bytes, request->payload, sizeof(permanent_bytes));
    const uint8_t *both = request->payload + sizeof(permanent_bytes);
    size_t both_bytes = header->payload_bytes - sizeof(permanent_bytes);
    if (permanent_bytes > both_bytes)
        return false;
    *records = (struct staged_records){
        .permanent = both,
        .permanent_bytes = permanent_bytes,
        .following = both + permanent_bytes,
        .following_bytes = both_bytes - permanent_bytes,
    };
    return true;
}

static TPM_RESULT do_stage(struct link *link, struct message *request, struct message *response)
{
    uint32_t how = request->header.argument;
    enum link_shutdown said = (how & LINK_SAID_MASK) >> LINK_SAID_SHIFT;
    bool is_held = (how & ~LINK_SAID_MASK) == LINK_STAGE_HELD;
    struct staged_records records;

    if (!get_records(request, &records) || said > LINK_SHUTDOWN_STATE || !(how == 0 || is_held))
        return TPM_BAD_PARAMETER;
    /* In the place of what QEMU has brought none is taken. */
    if (server_commands(link->server)->arrival.has_given)
        return TPM_BAD_ORDINAL;
    TPM_RESULT result = blackout_stage(link->blackout, &records, is_held ? &said : NULL);
    if (result != TPM_SUCCESS)
        response->header.argument = blackout_state(link->blackout);
    return result;
}

/* What the owner record is to say of what is captured, if anything. */
static TPM_RESULT record(struct link *link, struct message *request)
{
    if (request->header.payload_bytes == 0)
        return TPM_SUCCESS;
    if (request->header.payload_bytes != LINK_SECTOR_BYTES || request->descriptor < 0)
        return TPM_BAD_PARAMETER;
    TPM_RESULT result = blackout_record(link->blackout, request->descriptor, request->payload);
    if (result == TPM_SUCCESS)
        request->descriptor = -1; /* the blackout's now */
    return result;
}

static TPM_RESULT do_capture(struct link *link, struct message *request, struct message *response)
{
    uint32_t how = request->header.argument;
    struct blackout_captured captured;

    if (how & ~(LINK_CAPTURING_STOPPED | LINK_CAPTURING_OFFERS | LINK_CAPTURING_RECORDED))
        return TPM_BAD_PARAMETER;
    struct link_digests *digests = calloc(1, sizeof(*digests));
    if (!digests)
        return TPM_SIZE;
    response->payload = (uint8_t *)digests;
    TPM_RESULT result = record(link, request); /* a disk takes longer than all that follows */
    if (result != TPM_SUCCESS)
        return result;
    bool is_abandoned = how & LINK_CAPTURING_STOPPED && tpm_abandon(link->tpm);
    result = blackout_capture(link->blackout, link->store, how & LINK_CAPTURING_OFFERS, &captured);
    response->header.argument = (captured.worked ? LINK_CAPTURE_CHANGED : 0) |
                                (is_abandoned ? LINK_CAPTURE_ABANDONED : 0) |
                                (captured.is_offered ? LINK_CAPTURE_OFFERED : 0) |
                                (request->header.payload_bytes > 0 ? LINK_CAPTURE_RECORDS : 0) |
                                captured.said << LINK_SAID_SHIFT;
    if (captured.is_offered) {
        if (how & LINK_CAPTURING_RECORDED)
            blackout_say(link->blackout, HANDOVER_RECORDED);
        asker_settle(link->asker, LINK_ASK_STATE);
        *digests = captured.digests;
        response->header.payload_bytes = sizeof(*digests);
    }
    return result;
}

static TPM_RESULT do_keep_base(struct link *link, struct message *request, struct message *response)
{
    uint64_t generations[2];

    (void)response;
    if (request->header.payload_bytes != sizeof(generations))
        return TPM_BAD_PARAMETER;
    memcpy(generations, request->payload, sizeof(generations));
    return blackout_keep_base(link->blackout, link->store, generations[0], generations[1]);
}

static TPM_RESULT do_retire(struct link *link, struct message *request, struct message *response)
{
    (void)request, (void)response;
    TPM_RESULT result = tpm_retire(link->tpm, true);
    if (result == TPM_SUCCESS)
        blackout_say(link->blackout, HANDOVER_OWNED);
    return result;
}

static TPM_RESULT do_unretire(struct link *link, struct message *request, struct message *response)
{
    bool may_be_theirs = blackout_state(link->blackout) == HANDOVER_GRANTED;

    (void)response;
    if (may_be_theirs && request->header.argument != 1)
        return TPM_BAD_ORDINAL;
    TPM_RESULT result = tpm_unretire(link->tpm);
    /* What was granted to this host is so until it is admitted. */
    if (result == TPM_SUCCESS && may_be_theirs)
        blackout_say(link->blackout, HANDOVER_OWNED);
    return result;
}

static TPM_RESULT do_await(struct link *link, struct message *request, struct message *response)
{
    (void)response;
    return tpm_await(link->tpm, request->header.argument != 0);
}

static TPM_RESULT do_arm(struct link *link, struct message *request, struct message *response)
{
    (void)response;
    return tpm_arm(link->tpm, request->header.argument != 0);
}

static TPM_RESULT do_admit(struct link *link, struct message *request, struct message *response)
{
    struct checkpoint_lineage lineage = {0};

    (void)response;
    if (!get_lineage(request, &lineage) || request->header.argument > LINK_ADMIT_GOES_BACK)
        return TPM_BAD_PARAMETER;
    bool goes_back = request->header.argument == LINK_ADMIT_GOES_BACK;
    TPM_RESULT result = tpm_admit(link->tpm, &lineage, goes_back);
    if (result != TPM_SUCCESS)
        return result;
    if (!goes_back)
        blackout_say(link->blackout, HANDOVER_OWNED);
    blackout_unstage(link->blackout);
    return TPM_SUCCESS;
}

static TPM_RESULT do_set_lane(struct link *link, struct message *request, struct message *response)
{
    struct link_lane says;
    struct lane_keying keying;

    (void)response;
    if (request->header.payload_bytes != sizeof(says) || request->descriptor < 0)
        return TPM_BAD_PARAMETER;
    memcpy(&says, request->payload, sizeof(says));
    memcpy(keying.session, says.session, sizeof(keying.session));
    memcpy(keying.key, says.key, sizeof(keying.key));
    memcpy(keying.uuid, says.uuid, sizeof(keying.uuid));
    memcpy(keying.lineage, says.lineage, sizeof(keying.lineage));
    keying.is_greeted = says.is_greeted;
    TPM_RESULT result =
        blackout_set_lane(link->blackout, request->descriptor, &keying, says.is_source);
    if (result == TPM_SUCCESS)
        request->descriptor = -1; /* the blackout's now */
    explicit_bzero(&says, sizeof(says));
    explicit_bzero(&keying, sizeof(keying));
    return result;
}

static TPM_RESULT do_get_staged(struct link *link, struct message *request,
                                struct message *response)
{
    (void)request;
    return blackout_get_staged(link->blackout, response);
}

static TPM_RESULT do_let_go(struct link *link, struct message *request, struct message *response)
{
    (void)request, (void)response;
    return blackout_say(link->blackout, HANDOVER_LET_GO);
}

static TPM_RESULT do_record(struct link *link, struct message *request, struct message *response)
{
    (void)response;
    return request->header.payload_bytes > 0 ? record(link, request) : TPM_BAD_PARAMETER;
}

static TPM_RESULT do_recorded(struct link *link, struct message *request, struct message *response)
{
    (void)request, (void)response;
    return blackout_say(link->blackout, HANDOVER_RECORDED);
}

static TPM_RESULT do_withdraw(struct link *link, struct message *request, struct message *response)
{
    enum handover_state before;

    (void)request;
    TPM_RESULT result = blackout_withdraw(link->blackout, &before);
    response->header.argument = before;
    return result;
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

/* Put a copy of the states into `response`. */
static TPM_RESULT answer_copy(const struct tpm_copy *copy, struct message *response)
{
    const struct image *states = copy->states;
    struct link_copy says = {
        .lineage.generation = copy->lineage.generation,
        .permanent_bytes = (uint32_t)states[LINK_STATE_PERMANENT].n_bytes,
        .volatile_bytes = (uint32_t)states[LINK_STATE_VOLATILE].n_bytes,
        .savestate_bytes = (uint32_t)states[LINK_STATE_SAVESTATE].n_bytes,
    };
    size_t n_bytes = sizeof(says);

    memcpy(says.lineage.identity, copy->lineage.identity, sizeof(says.lineage.identity));
    for (int type = LINK_STATE_PERMANENT; type <= LINK_STATE_SAVESTATE; type++)
        n_bytes += states[type].n_bytes;
    if (n_bytes > LINK_PAYLOAD_BYTES_MAX || !(response->payload = malloc(n_bytes)))
        return TPM_SIZE;
    response->header.payload_bytes = (uint32_t)n_bytes;
    memcpy(response->payload, &says, sizeof(says));
    uint8_t *next = response->payload + sizeof(says);
    for (int type = LINK_STATE_PERMANENT; type <= LINK_STATE_SAVESTATE; type++) {
        if (states[type].n_bytes > 0)
            memcpy(next, states[type].bytes, states[type].n_bytes);
        next += states[type].n_bytes;
    }
    return TPM_SUCCESS;
}

static TPM_RESULT do_copy(struct link *link, struct message *request, struct message *response)
{
    struct tpm_copy copy;

    (void)request;
    TPM_RESULT result = tpm_copy(link->tpm, &copy);
    if (result == TPM_SUCCESS)
        result = answer_copy(&copy, response);
    tpm_copy_deinit(&copy);
    return result;
}

static TPM_RESULT do_take_blob(struct link *link, struct message *request, struct message *response)
{
    (void)request, (void)response;
    if (!asker_is_asking(link->asker, LINK_ASK_BLOB))
        return TPM_BAD_ORDINAL;
    return commands_take_blob(server_commands(link->server));
}

static TPM_RESULT do_get_condition(struct link *link, struct message *request,
                                   struct message *response)
{
    struct commands *commands = server_commands(link->server);
    bool has_blobs = commands->arrival.what == ARRIVED_BLOBS;
    enum tpm_custody custody;
    enum tpm_power power;

    (void)request;
    tpm_look(link->tpm, &power, &custody);
    response->header.argument = (tpm_is_running(link->tpm) ? LINK_CONDITION_RUNNING : 0) |
                                (has_blobs ? LINK_CONDITION_BLOBS : 0) |
                                (power == TPM_ON ? LINK_CONDITION_ON : 0) |
                                (commands->arrival.has_started ? LINK_CONDITION_STARTED : 0) |
                                (uint32_t)custody << LINK_CUSTODY_SHIFT;
    return TPM_SUCCESS;
}

/* sandbox: write */
void link_wake(int fd)
{
    uint64_t one = 1;

    if (write(fd, &one, sizeof(one)) < 0)
        check(errno == EAGAIN); /* it is as large as it can be: readable */
}

static TPM_RESULT do_end_control(struct link *link, struct message *request,
                                 struct message *response)
{
    (void)request, (void)response;
    link_wake(link->wake_fd);
    return TPM_SUCCESS;
}

static TPM_RESULT do_be_asked(struct link *link, struct message *request, struct message *response)
{
    (void)response;
    asker_be_asked(link->asker, request->header.argument != 0);
    return TPM_SUCCESS;
}

static TPM_RESULT do_end(struct link *link, struct message *request, struct message *response)
{
    (void)link, (void)request, (void)response;
    return TPM_SUCCESS; /* link_serve() says so */
}

static TPM_RESULT do_serve_control(struct link *link, struct message *request,
                                   struct message *response)
{
    struct link_serving says;

    (void)response;
    if (request->header.payload_bytes != sizeof(says))
        return TPM_BAD_PARAMETER;
    memcpy(&says, request->payload, sizeof(says));
    if (!memchr(says.program, 0, sizeof(says.program)) ||
        !memchr(says.socket_name, 0, sizeof(says.socket_name)) ||
        !memchr(says.link_name, 0, sizeof(says.link_name)) ||
        !memchr(says.data_name, 0, sizeof(says.data_name)) ||
        !memchr(says.pid_name, 0, sizeof(says.pid_name)) || says.control > LINK_CONTROL_NONE ||
        says.file_mode & ~FILE_MODE_MAX ||
        says.sharing > (LINK_SHARING_INCOMING | LINK_SHARING_RELEASES))
        return TPM_BAD_PARAMETER;
    link->serving = says;
    if (says.is_alone)
        asker_be_alone(link->asker);
    link->files->mode = says.file_mode;
    server_commands(link->server)->locality_max = says.locality_max;
    server_commands(link->server)->stays = says.stays;
    server_commands(link->server)->is_to_come = says.sharing & LINK_SHARING_INCOMING;
    tpm_share(link->tpm, says.sharing & LINK_SHARING_RELEASES,
              says.sharing & LINK_SHARING_INCOMING);
    server_set_control(link->server, says.control);
    if (says.ends & LINK_END_WITH_CONTROL)
        server_end_with_client(link->server);
    if (says.ends & LINK_END_WITH_DATA)
        data_channel_end_with(server_commands(link->server)->channel, link->wake_fd);
    error_set_program(link->serving.program);
    server_set_verbose(link->server, says.is_verbose);
    return TPM_SUCCESS;
}

static TPM_RESULT do_execute(struct link *link, struct message *request, struct message *response)
{
    struct tpm_response answer;

    (void)response;
    if (request->header.payload_bytes < TPM_HEADER_BYTES)
        return TPM_BAD_PARAMETER;
    tpm_response_init(&answer);
    tpm_execute(link->tpm, request->payload, request->header.payload_bytes, &answer);
    uint32_t code = get_be32(answer.bytes + TPM_AT_CODE);
    tpm_response_wipe(&answer);
    tpm_response_deinit(&answer);
    /* As with swtpm: who uses the TPM finds it powered on, and can start it up; one that has
     * resumed from a volatile state is so. Of a failure it was told. */
    if (code != 0 && code != version_now()->is_started && code != version_now()->failure)
        error_report("the TPM refuses to be started up as was asked for, with %#x: it is on, and "
                     "what uses it has to start it up",
                     code);
    return TPM_SUCCESS;
}

static TPM_RESULT do_serve_data(struct link *link, struct message *request,
                                struct message *response)
{
    (void)response;
    data_channel_serve(server_commands(link->server)->channel, LINK_FD_DATA,
                       request->header.argument);
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
    (void)response;
    return commands_forget_state(server_commands(link->server), request->header.argument != 0);
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
    if (request->header.payload_bytes != sizeof(journal) || request->header.argument > 1)
        return TPM_BAD_PARAMETER;
    memcpy(&journal, request->payload, sizeof(journal));
    if (journal.generation > GENERATION_MAX || journal.loaded > journal.generation)
        return TPM_BAD_PARAMETER;
    settings.sealed = journal.is_sealed;
    memcpy(settings.identity, journal.identity, sizeof(settings.identity));
    memcpy(settings.secret, journal.secret, sizeof(settings.secret));
    tpm_raise_generation(link->tpm, link->store, LINK_STATE_PERMANENT, journal.generation);
    TPM_RESULT result =
        tpm_set_journal(link->tpm, &settings, link->store, journal.loaded, journal.is_known);
    if (result == TPM_SUCCESS && request->header.argument == 1)
        nvram_forgo_journals();
    explicit_bzero(&journal, sizeof(journal));
    explicit_bzero(&settings, sizeof(settings));
    return result;
}

/* Who has written to it since knows of changes that the states here do not have. */
static TPM_RESULT do_expect_header(struct link *link, struct message *request,
                                   struct message *response)
{
    (void)response;
    if (!link->linear || request->header.payload_bytes != LINEAR_HEADER_BYTES)
        return TPM_BAD_PARAMETER;
    if (linear_has_header(link->linear, request->payload))
        return TPM_SUCCESS;
    error_report("another process has written to the file that the vTPM's state is in: have one of "
                 "the two alone use it");
    return TPM_BAD_ORDINAL;
}

static TPM_RESULT do_set_holder(struct link *link, struct message *request,
                                struct message *response)
{
    (void)response;
    if (link->linear || request->header.payload_bytes != HOLDER_BYTES)
        return TPM_BAD_PARAMETER;
    holder_keep(link->files, request->payload, request->header.argument == 1);
    return TPM_SUCCESS;
}

static TPM_RESULT do_set_key(struct link *link, struct message *request, struct message *response)
{
    struct cipher_key key = {.n_bytes = request->header.payload_bytes};

    (void)response;
    if (key.n_bytes != 16 && key.n_bytes != 32)
        return TPM_BAD_KEY_PROPERTY;
    memcpy(key.bytes, request->payload, key.n_bytes);
    TPM_RESULT result = TPM_SUCCESS;
    if (request->header.argument == LINK_KEY_MIGRATION)
        server_commands(link->server)->migration_key = key;
    else
        result = tpm_set_key(link->tpm, &key);
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
    [LINK_SERVE_CONTROL] = do_serve_control,
    [LINK_SET_JOURNAL] = do_set_journal,
    [LINK_SET_KEY] = do_set_key,
    [LINK_EXPECT_HEADER] = do_expect_header,
    [LINK_SET_HOLDER] = do_set_holder,
    [LINK_SET_ANCHOR] = do_set_anchor,
    [LINK_SET_VERSION] = do_set_version,
    [LINK_LOAD_STATE] = do_load_state,
    [LINK_EXECUTE] = do_execute,
    [LINK_SERVE_DATA] = do_serve_data,
    [LINK_SET_PROFILE] = do_set_profile,
    [LINK_GET_CONDITION] = do_get_condition,
    [LINK_TAKE_BLOB] = do_take_blob,
    [LINK_END_CONTROL] = do_end_control,
    [LINK_END] = do_end,
    [LINK_BE_ASKED] = do_be_asked,
    [LINK_INIT] = do_init,
    [LINK_STOP] = do_stop,
    [LINK_CAPTURE] = do_capture,
    [LINK_KEEP_BASE] = do_keep_base,
    [LINK_STAGE] = do_stage,
    [LINK_FORGET_STATE] = do_forget_state,
    [LINK_STORE_PERMANENT] = do_store_permanent,
    [LINK_RAISE_GENERATION] = do_raise_generation,
    [LINK_GET_LINEAGE] = do_get_lineage,
    [LINK_COPY] = do_copy,
    [LINK_GET_INFO] = do_get_info,
    [LINK_RETIRE] = do_retire,
    [LINK_UNRETIRE] = do_unretire,
    [LINK_AWAIT] = do_await,
    [LINK_ADMIT] = do_admit,
    [LINK_ARM] = do_arm,
    [LINK_SET_LANE] = do_set_lane,
    [LINK_GET_STAGED] = do_get_staged,
    [LINK_RECORD] = do_record,
    [LINK_LET_GO] = do_let_go,
    [LINK_WITHDRAW] = do_withdraw,
    [LINK_RECORDED] = do_recorded,
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

/* A vtpmd that has died leaves no more than this: also with something unread, or in the middle of a
 * message. */
static bool is_gone(int r)
{
    return r == MESSAGE_END || r == -ECONNRESET || r == -EPIPE;
}

int link_serve(struct link *link, int fd)
{
    cleanup(message_deinit) struct message request = MESSAGE_NONE;
    cleanup(message_deinit) struct message response = MESSAGE_NONE;

    int r = message_receive(fd, &request, clock_ms() + LINK_MESSAGE_TIMEOUT_MS);
    if (r != 0)
        return is_gone(r) ? LINK_GONE : r;
    if (request.header.operation >= LINK_ASK_INIT)
        return asker_answer(link->asker, &request);
    if (!asker_begin_request(link->asker))
        return LINK_GONE;
    r = carry_out(link, &request, &response);
    if (r == 0)
        r = asker_end_request(link->asker, &response);
    if (r != 0)
        return is_gone(r) ? LINK_GONE : r;
    return request.header.operation == LINK_END ? LINK_ENDING : 0;
}

/* sandbox: sendmsg */
int link_greet(int fd)
{
    static const int shared[LINK_SHARED] = {
        [LINK_SHARED_DIRECTORY] = LINK_FD_DIRECTORY,
        [LINK_SHARED_LOCK] = LINK_FD_LOCK,
        [LINK_SHARED_STORE] = LINK_FD_STORE,
    };
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(shared))];
    } control = {0};
    struct link_ready ready = {TPMLIB_GetVersion(), version_now()->number};
    struct link_header says = {.operation = LINK_READY, .argument = LINK_VERSION};
    char *info = TPMLIB_GetInfo((enum TPMLIB_InfoFlags)LIBRARY_INFO_AVAILABLE_PROFILES);
    size_t info_bytes = info ? strlen(info) : 0;
    struct iovec vectors[] = {{&says, sizeof(says)}, {&ready, sizeof(ready)}, {info, info_bytes}};
    struct msghdr header = {
        .msg_iov = vectors,
        .msg_iovlen = sizeof(vectors) / sizeof(*vectors),
        .msg_control = &control,
        .msg_controllen = sizeof(control),
    };

    struct cmsghdr *first = CMSG_FIRSTHDR(&header);
    first->cmsg_level = SOL_SOCKET;
    first->cmsg_type = SCM_RIGHTS;
    first->cmsg_len = CMSG_LEN(sizeof(shared));
    memcpy(CMSG_DATA(first), shared, sizeof(shared));
    says.payload_bytes = (uint32_t)(sizeof(ready) + info_bytes);
    /* It is the first, and has room. */
    int r = sendmsg(fd, &header, MSG_NOSIGNAL | MSG_DONTWAIT) < 0 ? -errno : 0;
    free(info);
    return r;
}

/* The record is complete and stays so: what wrote it has sealed it. */
static bool is_sealed(int fd)
{
    enum { SEALS = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE };

    int seals = fcntl(fd, F_GET_SEALS);
    return seals >= 0 && (seals & SEALS) == SEALS;
}

/* Returns 0, MESSAGE_END after the last request, or before one that may not be carried out yet,
 * LINK_NOT_ON, or a negative errno. */
static int boot_from_next(struct link *link, int fd, bool may_init)
{
    cleanup(message_deinit) struct message request = MESSAGE_NONE;
    cleanup(message_deinit) struct message response = MESSAGE_NONE;
    off_t at = link->boot_at;

    int r = message_read_at(fd, &at, &request);
    if (r != 0)
        return r;
    if (request.header.operation == LINK_INIT && !may_init)
        return MESSAGE_END;
    link->boot_at = at;
    if (request.header.operation == LINK_SET_ANCHOR)
        request.descriptor = LINK_FD_ANCHOR;
    r = carry_out(link, &request, &response);
    if (r != 0 || response.header.result == TPM_SUCCESS)
        return r;
    return request.header.operation == LINK_INIT ? LINK_NOT_ON : -EINVAL;
}

int link_boot_begin(struct link *link, int fd)
{
    int r = is_sealed(fd) ? 0 : -EPERM;

    while (r == 0)
        r = boot_from_next(link, fd, false);
    if (r != MESSAGE_END)
        return r;
    return *link->serving.program ? 0 : -ENOMSG;
}

int link_boot(struct link *link, int fd)
{
    int r = 0;

    while (r == 0)
        r = boot_from_next(link, fd, true);
    close(fd);
    return r == MESSAGE_END ? 0 : r;
}
