/* What the commands of the control channel do: docs/control-channel.md.
 *
 * vtpmd is asked first where a session may make something else of a command (enum link_question);
 * without one, unasked.h says what becomes of it.
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
    struct asker *asker;
    struct blackout *blackout;
    struct arrival arrival;
    struct { /* the blob that vtpmd is asked about, or NULL */
        uint32_t type;
        const struct blob_content *content;
    } coming;
    struct { /* what vtpmd has done of what it is asked about, should it die before it answers */
        bool is_so;
        TPM_RESULT result;
    } done;
    struct cipher_key migration_key; /* of no bytes: there is none */
    uint32_t locality_max;           /* that SET_LOCALITY may set */
    bool stays;                      /* SHUTDOWN ends no more than QEMU's use of the TPM */
    bool is_to_come;                 /* QEMU has to bring the state before an INIT */
    uint32_t number;                 /* of the command that is carried out */
    struct {                         /* what an answer is made of, until it is out */
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

/* The connection that they came on is over. */
void commands_disconnected(struct commands *commands);

/* What vtpmd has done about a command that it is asked about; of the link's thread. They return a
 * TPM_RESULT. */

/* Start the TPM from what QEMU has brought, or what there is. */
TPM_RESULT commands_start(struct commands *commands);

/* Stop it; `fenced`, the vTPM is another host's then. */
TPM_RESULT commands_stop(struct commands *commands, bool fenced);

/* Take the blob. */
TPM_RESULT commands_take_blob(struct commands *commands);

/* Drop what libtpms was given for the next start, and a TPM on standby; unless it `goes_on`, there
 * are no more records to come, either. */
TPM_RESULT commands_forget_state(struct commands *commands, bool goes_on);
