#include "commands.h"

#include <errno.h>
#include <libtpms/tpm_error.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "ask.h"
#include "blackout.h"
#include "bytes.h"
#include "check.h"
#include "clock.h"
#include "data.h"
#include "error.h"
#include "tail.h"
#include "tpm.h"
#include "unasked.h"
#include "version.h"

enum {
    LOCK_RETRY_MS = 10,      /* as QEMU counts them */
    LOCK_RETRIES_MAX = 1000, /* QEMU asks for 300 */
    INIT_LOCK_RETRIES = 100, /* who has given the state away lets go of it at once */
};

/* What a command is about. */
struct context {
    struct commands *commands;
    struct control *control;
    const struct control_event *event;
};

/* What a command is about that vtpmd is asked about. */
struct asked {
    enum unasked_command command;
    struct message question;
    struct message answer;
};

#define ASKED(command_, number, argument_)                                                         \
    {                                                                                              \
        .command = (command_),                                                                     \
        .question = {.header = {(number), .argument = (argument_)}, .descriptor = -1},             \
        .answer = MESSAGE_NONE,                                                                    \
    }

static void asked_deinit(struct asked *asked)
{
    message_deinit(&asked->answer);
}

static void say_refused(enum unasked_command command, enum tpm_custody custody)
{
    static const char *const names[UNASKED_COMMANDS] = {
        [UNASKED_INIT] = "INIT",
        [UNASKED_INIT_NEW] = "INIT",
        [UNASKED_STOP] = "STOP",
        [UNASKED_BLOB] = "SET_STATEBLOB",
    };

    if (command == UNASKED_TAIL)
        error_report("the tail is refused: no source has a session here; the guest goes on at the "
                     "source: migrate again");
    else if (command == UNASKED_INIT_TAIL)
        error_report("INIT is refused: QEMU's guest came with a state that could not be used; "
                     "migrate again");
    else if (custody == TPM_FENCED || custody == TPM_RECLAIMING)
        error_report("%s is refused: the vTPM may be another host's, and no vtpmd is there to ask; "
                     "attach one: see vtpmd attach --help",
                     names[command]);
    else
        error_report("%s is refused: a peer may have sent a vTPM, and no vtpmd is there to tell; "
                     "attach one: see vtpmd attach --help",
                     names[command]);
}

/* There is nobody to ask. Returns what the table says. */
static enum unasked look_up(struct commands *commands, enum unasked_command command)
{
    enum tpm_custody custody;
    enum tpm_power power;

    tpm_look(commands->tpm, &power, &custody);
    /* A session that a vtpmd has left gives nothing to start from. */
    if (power == TPM_OFF && !asker_is_alone(commands->asker))
        commands_forget_state(commands, false);
    enum unasked verdict = unasked_verdict(command, power, custody);
    if (verdict == UNASKED_REFUSE)
        say_refused(command, custody);
    return verdict;
}

/* The engine needs nobody for what the table has go on. */
static bool may_decide(struct commands *commands, enum unasked_command command)
{
    enum tpm_custody custody;
    enum tpm_power power;

    tpm_look(commands->tpm, &power, &custody);
    return unasked_verdict(command, power, custody) == UNASKED_GO_ON;
}

/* Nobody is there, and nobody has come. */
static enum unasked refuse(struct commands *commands, enum unasked_command command)
{
    enum tpm_custody custody;
    enum tpm_power power;

    tpm_look(commands->tpm, &power, &custody);
    say_refused(command, custody);
    return UNASKED_REFUSE;
}

enum {
    ANSWERED = 'y', /* by vtpmd; else enum unasked, but not UNASKED_WAIT */
    SETTLED = 's',  /* by what vtpmd has done, before it answers */
};

/* Ask vtpmd, if one is there and has something to say, or look up what is to be done. `*result` is
 * what the command fails with, or success, whoever says so. */
static int ask(struct commands *commands, struct asked *asked, TPM_RESULT *result)
{
    int64_t deadline_ms = clock_ms() + UNASKED_WAIT_MS;
    enum unasked verdict = UNASKED_WAIT;

    commands->done.is_so = false;
    while (verdict == UNASKED_WAIT) {
        int r = asker_ask(commands->asker, &asked->question, may_decide(commands, asked->command),
                          &asked->answer);
        if (r == ASKER_SETTLED) {
            *result = TPM_SUCCESS;
            return SETTLED;
        }
        if (r == 0)
            *result = asked->answer.header.result;
        else if (r == ASKER_CLOSED)
            *result = TPM_FAIL;
        else if (commands->done.is_so)
            *result = commands->done.result;
        if (r != ASKER_NOBODY || commands->done.is_so)
            return ANSWERED;
        verdict = look_up(commands, asked->command);
        if (verdict == UNASKED_WAIT && !asker_wait(commands->asker, deadline_ms))
            verdict = refuse(commands, asked->command);
    }
    *result = verdict == UNASKED_REFUSE ? TPM_FAIL : TPM_SUCCESS;
    return (int)verdict;
}

static void do_get_capability(struct context *context)
{
    control_answer_capability(context->control, version_now()->takes_prefix);
}

static struct blob_keys blob_keys(struct commands *commands)
{
    const struct cipher_key *migration = &commands->migration_key;

    return (struct blob_keys){tpm_key(commands->tpm), migration->n_bytes > 0 ? migration : NULL};
}

static void do_get_config(struct context *context)
{
    struct blob_keys keys = blob_keys(context->commands);

    control_answer_config(context->control,
                          (keys.file ? CONTROL_CONFIG_FILE_KEY : 0) |
                              (keys.migration ? CONTROL_CONFIG_MIGRATION_KEY : 0));
}

/* Most commands have a result alone. */
static void answer(struct context *context, TPM_RESULT result)
{
    control_answer_result(context->control, result);
}

static enum unasked_command init_command(struct commands *commands, bool is_incoming)
{
    enum arrived what = commands->arrival.what;

    if (is_incoming && what == ARRIVED_TAIL)
        return UNASKED_INIT_TAIL;
    if (what == ARRIVED_BLOBS || tpm_has_state(commands->tpm))
        return UNASKED_INIT;
    return asker_is_alone(commands->asker) ? UNASKED_INIT : UNASKED_INIT_NEW;
}

/* Another host's vTPM may have the state's files for a moment still. */
static bool lock_files(struct commands *commands, uint64_t retries)
{
    int r = tpm_lock(commands->tpm);

    for (uint64_t n = 0; r < 0 && n < retries && n < LOCK_RETRIES_MAX; n++) {
        poll(NULL, 0, LOCK_RETRY_MS);
        r = tpm_lock(commands->tpm);
    }
    if (r < 0)
        tpm_say_locked(r);
    return r >= 0;
}

/* What is there is another host's, and may be an older state. */
static bool has_not_come(struct commands *commands)
{
    if (!commands->is_to_come || commands->arrival.what == ARRIVED_BLOBS ||
        tpm_has_state(commands->tpm))
        return false;
    error_report("INIT is refused: the vTPM's state is to come from another host, and has not; "
                 "leave out --migration incoming to start from what is there");
    return true;
}

/* Start the TPM, in one way or another. */
static TPM_RESULT start(struct commands *commands, bool is_incoming)
{
    struct arrival *arrival = &commands->arrival;
    uint32_t says = (is_incoming ? LINK_ASKED_INCOMING : 0) |
                    (arrival->what == ARRIVED_BLOBS ? LINK_ASKED_BLOBS : 0) |
                    (arrival->what == ARRIVED_TAIL ? LINK_ASKED_TAIL : 0);
    cleanup(asked_deinit) struct asked asked =
        ASKED(init_command(commands, is_incoming), LINK_ASK_INIT, says);
    TPM_RESULT result;

    if (arrival->what == ARRIVED_BLOBS && !arrival->has_lineage)
        tpm_beware(commands->tpm);
    if (has_not_come(commands) || !lock_files(commands, INIT_LOCK_RETRIES))
        return TPM_FAIL;
    if (is_incoming && arrival->what == ARRIVED_TAIL && blackout_init(commands->blackout, &result))
        return result;
    if (is_incoming && arrival->what == ARRIVED_UNUSABLE) {
        say_refused(UNASKED_INIT_TAIL, TPM_ACTIVE);
        return TPM_FAIL;
    }
    if (ask(commands, &asked, &result) == UNASKED_GO_ON)
        return arrival_start(arrival, commands->tpm, commands->store);
    return result;
}

TPM_RESULT commands_start(struct commands *commands)
{
    commands->done.result = arrival_start(&commands->arrival, commands->tpm, commands->store);
    commands->done.is_so = true;
    return commands->done.result;
}

TPM_RESULT commands_stop(struct commands *commands, bool fenced)
{
    commands->done.is_so = false;
    return fenced ? tpm_stop_fenced(commands->tpm) : tpm_stop(commands->tpm);
}

static void do_init(struct context *context)
{
    struct commands *commands = context->commands;
    bool is_incoming = context->event->flags & CONTROL_INIT_DELETE_VOLATILE;
    struct link_restored restored;
    uint32_t epoch;

    commands->gave_tail = false;
    TPM_RESULT result = start(commands, is_incoming);
    if (arrival_end(&commands->arrival, commands->tpm, result, is_incoming, &restored, &epoch))
        asker_tell(commands->asker, LINK_TELL_RESTORED, epoch, &restored, sizeof(restored));
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
    cleanup(asked_deinit) struct asked asked = ASKED(UNASKED_STOP, LINK_ASK_STOP, is_shutdown);
    TPM_RESULT result = TPM_SUCCESS;

    arrival_forget(&commands->arrival, commands->tpm, ARRIVED_NOTHING);
    /* QEMU ends. A frozen TPM stays on: the destination may still ask for it. */
    if (is_shutdown && handover_has_given(blackout_state(commands->blackout)))
        return TPM_SUCCESS;
    /* It stops the TPM before it loads a state, with the guest standing still, and at a reset. */
    run_on(commands);
    if (is_granted(commands))
        ask(commands, &asked, &result);
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
    struct commands *commands = context->commands;

    answer(context, stop(commands, true));
    commands->has_shut_down = !commands->stays;
    if (commands->stays)
        tpm_rest(commands->tpm);
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
    struct commands *commands = context->commands;
    uint32_t locality = (uint32_t)context->event->locality;

    answer(context, locality > commands->locality_max ? TPM_BAD_LOCALITY
                                                      : tpm_set_locality(commands->tpm, locality));
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
    cleanup(asked_deinit) struct asked asked = ASKED(UNASKED_CONNECTED, LINK_ASK_CONNECTED, 0);
    struct commands *commands = context->commands;
    TPM_RESULT result;

    if (!is_stream_socket(context->event->descriptor))
        return TPM_BAD_PARAMETER;
    int fd = control_take_descriptor(context->control);
    if (data_channel_set_socket(commands->channel, fd) == DATA_SOCKET_BUSY) {
        close_descriptor(&fd);
        return TPM_IOERROR;
    }
    arrival_begin(&commands->arrival, commands->tpm);
    ask(commands, &asked, &result);
    return result;
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
    cleanup(asked_deinit) struct asked asked = ASKED(UNASKED_RUNS, LINK_ASK_RUNS, 0);
    struct commands *commands = context->commands;
    TPM_RESULT result;

    if (!lock_files(commands, context->event->retries)) {
        answer(context, TPM_FAIL);
        return;
    }
    run_on(commands);
    int verdict = ask(commands, &asked, &result);
    if (verdict == UNASKED_GO_ON)
        tpm_run_on(commands->tpm);
    if (verdict == UNASKED_AWAIT)
        result = tpm_await(commands->tpm, true);
    answer(context, result);
}

/* Make the blob of the TPM's own state. Returns a TPM_RESULT. */
static TPM_RESULT wrap_own_state(struct commands *commands, uint32_t type, bool is_encrypted)
{
    struct blob_keys keys = blob_keys(commands);
    struct swtpm_wrapped *blob = &commands->answer.blob;
    struct checkpoint_lineage lineage;
    uint8_t **state = &commands->answer.state;

    TPM_RESULT result = tpm_get_state(commands->tpm, type, state, &commands->answer.state_bytes);
    if (result != TPM_SUCCESS)
        return result;
    tpm_get_lineage(commands->tpm, &lineage);
    lineage.continued = false;
    int r = swtpm_wrap(SWTPM_BLOB, is_encrypted ? keys.file : NULL, *state,
                       commands->answer.state_bytes, type == LINK_STATE_PERMANENT ? &lineage : NULL,
                       blob);
    if (r == 0 && keys.migration)
        r = swtpm_seal_blob(blob, keys.migration);
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
    cleanup(asked_deinit) struct asked asked = ASKED(UNASKED_STATE, LINK_ASK_STATE, 0);
    struct message *tail = &commands->answer.tail;

    *result = TPM_SUCCESS;
    if (!blackout_is_armed(commands->blackout))
        return false;
    bool is_given = blackout_give_tail(commands->blackout, tail);
    for (int verdict = SETTLED; verdict == SETTLED && !is_given;) {
        verdict = ask(commands, &asked, result);
        is_given = *result == TPM_SUCCESS && blackout_give_tail(commands->blackout, tail);
    }
    return is_given;
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

static void answer_last_states(struct context *context)
{
    answer_own_state(context);
    if (context->event->type == LINK_STATE_SAVESTATE)
        tpm_unlock_given(context->commands->tpm); /* before the answer: who has it may lock */
}

static void do_get_state_blob(struct context *context)
{
    struct commands *commands = context->commands;
    struct iovec nothing = {NULL, 0};

    if (context->event->type == LINK_STATE_PERMANENT)
        answer_permanent_state(context);
    else if (!commands->gave_tail)
        answer_last_states(context);
    else if (handover_has_given(blackout_state(commands->blackout)))
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
    cleanup(asked_deinit) struct asked asked = ASKED(UNASKED_TAIL, LINK_ASK_TAIL, 0);
    struct commands *commands = context->commands;
    const struct control_event *event = context->event;
    TPM_RESULT result;

    if (!arrival_take_tail(&commands->arrival, commands->tpm))
        return TPM_BAD_PARAMETER;
    int refusal = blackout_take_tail(commands->blackout, event->data, event->data_bytes);
    if (refusal == 0)
        return TPM_SUCCESS;
    asked.question.header.argument = (uint32_t)refusal;
    bool is_answered = ask(commands, &asked, &result) == ANSWERED;
    return is_answered && result != TPM_SUCCESS ? result : TPM_BAD_PARAMETER;
}

TPM_RESULT commands_forget_state(struct commands *commands, bool goes_on)
{
    return blackout_forget(commands->blackout, goes_on, commands->arrival.has_given);
}

TPM_RESULT commands_take_blob(struct commands *commands)
{
    if (!commands->coming.content)
        return TPM_BAD_ORDINAL;
    commands->done.result = arrival_take_blob(&commands->arrival, commands->tpm,
                                              commands->coming.type, commands->coming.content);
    commands->done.is_so = true;
    return commands->done.result;
}

static TPM_RESULT take_content(struct commands *commands, uint32_t type,
                               const struct blob_content *content)
{
    cleanup(asked_deinit) struct asked asked = ASKED(UNASKED_BLOB, LINK_ASK_BLOB, type);
    TPM_RESULT result;

    commands->coming.type = type;
    commands->coming.content = content;
    if (ask(commands, &asked, &result) == UNASKED_GO_ON)
        result = commands_take_blob(commands);
    commands->coming.content = NULL;
    return result;
}

static TPM_RESULT unwrap_and_take(struct commands *commands, const struct control_event *event)
{
    cleanup(blob_content_deinit) struct blob_content content = {0};
    bool is_encrypted = event->flags & CONTROL_STATE_ENCRYPTED;

    struct blob_keys keys = blob_keys(commands);
    int r = blob_decode(event->data, event->data_bytes, is_encrypted, &keys, &content);
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
    bool is_tail = tail_is(context->event->data, context->event->data_bytes);

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
    asker_decided(commands->asker);
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

    if (commands->number == CONTROL_SET_STATEBLOB)
        blackout_start_tail(commands->blackout);
    free_answer(commands);
    if (runs != commands->told_running)
        asker_tell(commands->asker, LINK_TELL_RUNNING, runs, NULL, 0);
    commands->told_running = runs;
    if (commands->gave_whole)
        asker_tell(commands->asker, LINK_TELL_GIVEN, 0, NULL, 0);
    commands->gave_whole = false;
    if (commands->number == CONTROL_SET_DATAFD)
        tpm_warm_up(); /* a QEMU is there, and has what it waits for: its guest comes next */
    if (commands->number == CONTROL_SET_BUFFERSIZE && !runs)
        tpm_await_state(commands->tpm);
    if (commands->number == CONTROL_INIT)
        asker_tell(commands->asker, LINK_TELL_INIT, 0, NULL, 0);
    if (commands->has_shut_down)
        asker_tell(commands->asker, LINK_TELL_SHUTDOWN, 0, NULL, 0);
}

/* The INIT of what has come does not, or on another connection: then it takes its time. Of a TPM
 * that is on nothing is awaited, and a command may have its lock for as long as the storage stalls.
 */
void commands_disconnected(struct commands *commands)
{
    if (!tpm_is_running(commands->tpm))
        tpm_unawait_state(commands->tpm);
}
