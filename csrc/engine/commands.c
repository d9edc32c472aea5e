#include "commands.h"

#include <errno.h>
#include <libtpms/tpm_error.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "ask.h"
#include "blackout.h"
#include "bytes.h"
#include "check.h"
#include "data.h"
#include "error.h"

/* What a command is about. */
struct context {
    struct commands *commands;
    struct control *control;
    const struct control_event *event;
};

/* Ask vtpmd, if there is one. Returns what it says; an engine that is alone goes on by itself. */
static TPM_RESULT ask(struct commands *commands, enum link_question number, uint32_t argument,
                      const uint8_t *payload, size_t payload_bytes, struct message *answer)
{
    struct message question = {
        .header = {number, .argument = argument, .payload_bytes = (uint32_t)payload_bytes},
        .payload = (uint8_t *)payload,
        .descriptor = -1,
    };

    if (!commands->asker)
        return TPM_SUCCESS;
    int r = asker_ask(commands->asker, &question, answer);
    return r < 0 ? TPM_FAIL : answer->header.result;
}

static TPM_RESULT ask_whether(struct commands *commands, enum link_question number)
{
    cleanup(message_deinit) struct message answer = MESSAGE_NONE;

    return ask(commands, number, 0, NULL, 0, &answer);
}

static void do_get_capability(struct context *context)
{
    control_answer_capability(context->control);
}

static void do_get_config(struct context *context)
{
    bool has_key = tpm_key(context->commands->tpm) != NULL;

    control_answer_config(context->control, has_key ? CONTROL_CONFIG_FILE_KEY : 0);
}

/* Most commands have a result alone. */
static void answer(struct context *context, TPM_RESULT result)
{
    control_answer_result(context->control, result);
}

/* Start the TPM, in one way or another. */
static TPM_RESULT start(struct commands *commands, bool is_incoming)
{
    cleanup(message_deinit) struct message reply = MESSAGE_NONE;
    struct arrival *arrival = &commands->arrival;
    bool is_tail = arrival->what == ARRIVED_TAIL && !commands->asker;
    uint32_t says = (is_incoming ? LINK_ASKED_INCOMING : 0) |
                    (arrival->what == ARRIVED_BLOBS ? LINK_ASKED_BLOBS : 0) |
                    (arrival->what == ARRIVED_TAIL ? LINK_ASKED_TAIL : 0);

    TPM_RESULT result;

    if (is_incoming && arrival->what == ARRIVED_TAIL && blackout_init(commands->blackout, &result))
        return result;
    if (is_incoming && (is_tail || arrival->what == ARRIVED_UNUSABLE)) {
        error_report("INIT is refused: QEMU's guest came with a state that could not be used; "
                     "migrate again");
        return TPM_FAIL;
    }
    if (commands->asker)
        return ask(commands, LINK_ASK_INIT, says, NULL, 0, &reply);
    return arrival_start(arrival, commands->tpm, commands->store);
}

static void do_init(struct context *context)
{
    struct commands *commands = context->commands;
    bool is_incoming = context->event->flags & CONTROL_INIT_DELETE_VOLATILE;
    struct link_restored restored;

    TPM_RESULT result = start(commands, is_incoming);
    if (arrival_end(&commands->arrival, commands->tpm, result, is_incoming, &restored)) {
        error_report("an older state of the vTPM was restored: generation %llu, and there was %llu",
                     (unsigned long long)restored.generation, (unsigned long long)restored.newest);
        if (commands->asker)
            asker_tell(commands->asker, LINK_TELL_RESTORED, 0, &restored, sizeof(restored));
    }
    answer(context, result);
}

/* A migration that took a tail is over, though nobody has said so. */
static void run_on(struct commands *commands)
{
    commands->gave_tail = false;
    blackout_runs(commands->blackout);
}

/* What was started ahead of time is the only state there is, until vtpmd has made that durable. */
static bool is_granted(struct commands *commands)
{
    enum handover_state state = blackout_state(commands->blackout);

    return state == HANDOVER_ENTITLED || state == HANDOVER_STARTED;
}

static TPM_RESULT stop(struct commands *commands, bool is_shutdown)
{
    cleanup(message_deinit) struct message reply = MESSAGE_NONE;

    arrival_forget(&commands->arrival, commands->tpm, ARRIVED_NOTHING);
    /* QEMU ends. A frozen TPM stays on: the destination may still ask for it. */
    if (is_shutdown && blackout_state(commands->blackout) == HANDOVER_FROZEN)
        return TPM_SUCCESS;
    /* It stops the TPM before it loads a state, with the guest standing still, and at a reset. */
    run_on(commands);
    TPM_RESULT result = TPM_SUCCESS;
    if (is_granted(commands))
        result = ask(commands, LINK_ASK_STOP, is_shutdown, NULL, 0, &reply);
    if (result != TPM_SUCCESS || !tpm_is_running(commands->tpm))
        return result;
    return tpm_stop(commands->tpm);
}

static void do_stop(struct context *context)
{
    answer(context, stop(context->commands, false));
}

static void do_shutdown(struct context *context)
{
    answer(context, stop(context->commands, true));
    context->commands->has_shut_down = true;
}

static void do_get_established(struct context *context)
{
    bool established = false;

    TPM_RESULT result = tpm_get_established(context->commands->tpm, &established);
    if (result == TPM_SUCCESS)
        control_answer_established(context->control, established);
    else
        answer(context, result);
}

static void do_set_locality(struct context *context)
{
    answer(context, tpm_set_locality(context->commands->tpm, (uint32_t)context->event->locality));
}

static void do_reset_established(struct context *context)
{
    uint32_t locality = (uint32_t)context->event->locality;

    answer(context, tpm_reset_established(context->commands->tpm, locality));
}

static void do_hash_start(struct context *context)
{
    answer(context, tpm_hash_start(context->commands->tpm));
}

static void do_hash_data(struct context *context)
{
    const struct control_event *event = context->event;

    answer(context, tpm_hash_data(context->commands->tpm, event->data, event->data_bytes));
}

static void do_hash_end(struct context *context)
{
    answer(context, tpm_hash_end(context->commands->tpm));
}

static void do_cancel(struct context *context)
{
    answer(context, tpm_cancel(context->commands->tpm));
}

static void do_store_volatile(struct context *context)
{
    answer(context, tpm_store_volatile(context->commands->tpm));
}

/* sandbox: getsockopt */
static bool is_stream_socket(int fd)
{
    int type;
    socklen_t n_bytes = sizeof(type);

    return getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &n_bytes) == 0 && type == SOCK_STREAM;
}

static TPM_RESULT set_data_socket(struct context *context)
{
    struct commands *commands = context->commands;

    if (!is_stream_socket(context->event->descriptor))
        return TPM_BAD_PARAMETER;
    int fd = control_take_descriptor(context->control);
    if (data_channel_set_socket(commands->channel, fd) == DATA_SOCKET_BUSY) {
        close_descriptor(&fd);
        return TPM_IOERROR;
    }
    arrival_begin(&commands->arrival, commands->tpm);
    return ask_whether(commands, LINK_ASK_CONNECTED);
}

static void do_set_data_socket(struct context *context)
{
    answer(context, set_data_socket(context));
}

static void do_set_buffer_size(struct context *context)
{
    uint32_t wanted = (uint32_t)context->event->wanted_bytes, sizes[3];

    TPM_RESULT result = tpm_set_buffer_size(context->commands->tpm, wanted, sizes);
    if (result == TPM_SUCCESS)
        control_answer_buffer_size(context->control, sizes[0], sizes[1], sizes[2]);
    else
        answer(context, result);
}

static void do_get_info(struct context *context)
{
    struct commands *commands = context->commands;

    commands->answer.info = tpm_get_info(commands->tpm, (uint32_t)context->event->flags);
    if (commands->answer.info)
        control_answer_info(context->control, commands->answer.info);
    else
        answer(context, TPM_SIZE);
}

/* QEMU's guest runs here again: what was given away may be changed. vtpmd knows if it may not. */
static void do_lock_storage(struct context *context)
{
    struct commands *commands = context->commands;

    run_on(commands);
    if (!commands->asker)
        tpm_run_on(commands->tpm);
    answer(context, ask_whether(commands, LINK_ASK_RUNS));
}

/* Make the blob of the TPM's own state. Returns a TPM_RESULT. */
static TPM_RESULT wrap_own_state(struct commands *commands, uint32_t type, bool is_encrypted)
{
    const struct cipher_key *key = is_encrypted ? tpm_key(commands->tpm) : NULL;
    struct checkpoint_lineage lineage;
    uint8_t **state = &commands->answer.state;

    TPM_RESULT result = tpm_get_state(commands->tpm, type, state, &commands->answer.state_bytes);
    if (result != TPM_SUCCESS)
        return result;
    tpm_get_lineage(commands->tpm, &lineage);
    lineage.continued = false;
    int r = swtpm_wrap(SWTPM_BLOB, key, *state, commands->answer.state_bytes,
                       type == LINK_STATE_PERMANENT ? &lineage : NULL, &commands->answer.blob);
    return r < 0 ? TPM_SIZE : TPM_SUCCESS;
}

static void answer_own_state(struct context *context)
{
    struct commands *commands = context->commands;
    const struct control_event *event = context->event;
    bool is_encrypted = tpm_key(commands->tpm) && !(event->flags & CONTROL_STATE_DECRYPTED);
    struct iovec pieces[SWTPM_PIECES];

    TPM_RESULT result = wrap_own_state(commands, (uint32_t)event->type, is_encrypted);
    if (result != TPM_SUCCESS) {
        answer(context, result);
        return;
    }
    swtpm_wrapped_pieces(&commands->answer.blob, pieces);
    control_answer_state_blob(context->control, pieces, SWTPM_PIECES, is_encrypted);
}

/* Put the tail into the answer. Returns false where there is none to give: it is the whole state
 * then that QEMU gets (invariant 6). */
static bool give_tail(struct commands *commands, TPM_RESULT *result)
{
    cleanup(message_deinit) struct message reply = MESSAGE_NONE;
    struct message *tail = &commands->answer.tail;

    *result = TPM_SUCCESS;
    if (!blackout_is_armed(commands->blackout))
        return false;
    if (blackout_give_tail(commands->blackout, tail))
        return true;
    *result = ask(commands, LINK_ASK_STATE, 0, NULL, 0, &reply);
    return *result == TPM_SUCCESS && blackout_give_tail(commands->blackout, tail);
}

static void answer_permanent_state(struct context *context)
{
    struct commands *commands = context->commands;
    TPM_RESULT result;

    commands->gave_tail = give_tail(commands, &result);
    if (result != TPM_SUCCESS) {
        answer(context, result);
        return;
    }
    if (!commands->gave_tail) {
        answer_own_state(context);
        commands->gave_whole = true;
        return;
    }
    struct iovec piece = {commands->answer.tail.payload,
                          commands->answer.tail.header.payload_bytes};
    control_answer_state_blob(context->control, &piece, 1, false);
}

static void do_get_state_blob(struct context *context)
{
    struct commands *commands = context->commands;
    struct iovec nothing = {NULL, 0};

    if (context->event->type == LINK_STATE_PERMANENT)
        answer_permanent_state(context);
    else if (!commands->gave_tail)
        answer_own_state(context);
    else if (blackout_state(commands->blackout) == HANDOVER_FROZEN)
        /* The tail has it all. QEMU sets no empty blob at the other side. */
        control_answer_state_blob(context->control, &nothing, 1, false);
    else {
        error_report("GET_STATEBLOB is refused: the session ended while QEMU took the state; its "
                     "migration fails: try again");
        answer(context, TPM_FAIL);
    }
}

static TPM_RESULT set_tail(struct context *context)
{
    cleanup(message_deinit) struct message reply = MESSAGE_NONE;
    struct commands *commands = context->commands;
    const struct control_event *event = context->event;

    if (!arrival_take_tail(&commands->arrival, commands->tpm))
        return TPM_BAD_PARAMETER;
    if (!commands->asker) {
        error_report("the tail is refused: no source has a session here; the guest goes on at the "
                     "source: migrate again");
        return TPM_BAD_PARAMETER;
    }
    if (blackout_take_tail(commands->blackout, event->data, event->data_bytes))
        return TPM_SUCCESS;
    TPM_RESULT result = ask(commands, LINK_ASK_TAIL, 0, event->data, event->data_bytes, &reply);
    if (result != TPM_SUCCESS)
        return result;
    bool is_taken = blackout_take_tail(commands->blackout, event->data, event->data_bytes);
    return is_taken ? TPM_SUCCESS : TPM_BAD_PARAMETER;
}

TPM_RESULT commands_take_blob(struct commands *commands)
{
    if (!commands->coming.content)
        return TPM_BAD_ORDINAL;
    return arrival_take_blob(&commands->arrival, commands->tpm, commands->coming.type,
                             commands->coming.content);
}

static TPM_RESULT take_content(struct commands *commands, uint32_t type,
                               const struct blob_content *content)
{
    cleanup(message_deinit) struct message reply = MESSAGE_NONE;
    TPM_RESULT result;

    commands->coming.type = type;
    commands->coming.content = content;
    if (commands->asker)
        result = ask(commands, LINK_ASK_BLOB, type, NULL, 0, &reply);
    else
        result = commands_take_blob(commands);
    commands->coming.content = NULL;
    return result;
}

static TPM_RESULT unwrap_and_take(struct commands *commands, const struct control_event *event)
{
    cleanup(blob_content_deinit) struct blob_content content = {0};
    bool is_encrypted = event->flags & CONTROL_STATE_ENCRYPTED;

    int r =
        blob_decode(event->data, event->data_bytes, is_encrypted, tpm_key(commands->tpm), &content);
    if (r < 0)
        return TPM_SIZE;
    if (r > 0) {
        error_report("the state blob of type %u is refused: %s", (unsigned)event->type,
                     blob_reason((enum blob_refusal)r));
        return blob_result((enum blob_refusal)r);
    }
    return take_content(commands, (uint32_t)event->type, &content);
}

static TPM_RESULT set_blob(struct context *context)
{
    struct commands *commands = context->commands;

    if (commands->arrival.what == ARRIVED_TAIL) {
        error_report("SET_STATEBLOB is refused: QEMU has brought a tail before: the blob is not of "
                     "the same stream");
        return TPM_FAIL;
    }
    TPM_RESULT result = unwrap_and_take(commands, context->event);
    if (result != TPM_SUCCESS)
        arrival_forget(&commands->arrival, commands->tpm, ARRIVED_UNUSABLE);
    return result;
}

static void do_set_state_blob(struct context *context)
{
    bool is_tail = blob_is_tail(context->event->data, context->event->data_bytes);

    answer(context, is_tail ? set_tail(context) : set_blob(context));
}

static void (*const carry_out[CONTROL_N_NUMBERS])(struct context *context) = {
    [CONTROL_GET_CAPABILITY] = do_get_capability,
    [CONTROL_INIT] = do_init,
    [CONTROL_SHUTDOWN] = do_shutdown,
    [CONTROL_GET_TPMESTABLISHED] = do_get_established,
    [CONTROL_SET_LOCALITY] = do_set_locality,
    [CONTROL_HASH_START] = do_hash_start,
    [CONTROL_HASH_DATA] = do_hash_data,
    [CONTROL_HASH_END] = do_hash_end,
    [CONTROL_CANCEL_TPM_CMD] = do_cancel,
    [CONTROL_STORE_VOLATILE] = do_store_volatile,
    [CONTROL_RESET_TPMESTABLISHED] = do_reset_established,
    [CONTROL_GET_STATEBLOB] = do_get_state_blob,
    [CONTROL_SET_STATEBLOB] = do_set_state_blob,
    [CONTROL_STOP] = do_stop,
    [CONTROL_GET_CONFIG] = do_get_config,
    [CONTROL_SET_DATAFD] = do_set_data_socket,
    [CONTROL_SET_BUFFERSIZE] = do_set_buffer_size,
    [CONTROL_GET_INFO] = do_get_info,
    [CONTROL_LOCK_STORAGE] = do_lock_storage,
};

void commands_carry_out(struct commands *commands, struct control *control,
                        const struct control_event *event)
{
    struct context context = {commands, control, event};

    commands->number = event->number;
    carry_out[event->number](&context);
}

static void free_answer(struct commands *commands)
{
    swtpm_wrapped_deinit(&commands->answer.blob);
    if (commands->answer.state)
        explicit_bzero(commands->answer.state, commands->answer.state_bytes);
    free(commands->answer.state);
    message_deinit(&commands->answer.tail);
    free(commands->answer.info);
    memset(&commands->answer, 0, sizeof(commands->answer));
    commands->answer.tail = MESSAGE_NONE;
}

void commands_answered(struct commands *commands)
{
    bool runs = tpm_is_running(commands->tpm);

    free_answer(commands);
    if (!commands->asker)
        return;
    if (runs != commands->told_running)
        asker_tell(commands->asker, LINK_TELL_RUNNING, runs, NULL, 0);
    commands->told_running = runs;
    if (commands->gave_whole)
        asker_tell(commands->asker, LINK_TELL_GIVEN, 0, NULL, 0);
    commands->gave_whole = false;
    if (commands->number == CONTROL_INIT)
        asker_tell(commands->asker, LINK_TELL_INIT, 0, NULL, 0);
    if (commands->has_shut_down)
        asker_tell(commands->asker, LINK_TELL_SHUTDOWN, 0, NULL, 0);
}
