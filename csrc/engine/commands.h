/* What the commands of the control channel do: docs/control-channel.md.
 *
 * vtpmd is asked first where a session may make something else of a command (enum link_question).
 * An engine that is alone has no sessions: it is asked nothing, and a tail is of no use to it.
 */
#pragma once

#include "arrival.h"
#include "control.h"
#include "message.h"
#include "swtpm_format.h"

struct asker;
struct blackout;
struct data_channel;
struct store;
struct tpm;

struct commands {
    struct tpm *tpm;
    struct store *store;
    struct data_channel *channel;
    struct asker *asker; /* NULL: the engine is alone */
    struct blackout *blackout;
    struct arrival arrival;
    struct { /* the blob that vtpmd is asked about, or NULL */
        uint32_t type;
        const struct blob_content *content;
    } coming;
    uint32_t number; /* of the command that is carried out */
    struct {         /* what an answer is made of, until it is out */
        struct swtpm_wrapped blob;
        uint8_t *state;
        size_t state_bytes;
        struct message tail;
        char *info;
    } answer;
    bool gave_whole; /* the command has given the TPM's own permanent state */
    bool gave_tail;  /* QEMU takes a state, and has got a tail for the permanent one */
    bool has_shut_down;
    bool told_running; /* what vtpmd was told last */
};

/* Carry out a request, and answer it. */
void commands_carry_out(struct commands *commands, struct control *control,
                        const struct control_event *event);

/* The answer is out, or cannot be sent: overwrite and free what it was made of, and do what the
 * command leads to. */
void commands_answered(struct commands *commands);

/* Take the blob that vtpmd is being asked about, by its leave. Returns a TPM_RESULT. */
TPM_RESULT commands_take_blob(struct commands *commands);
