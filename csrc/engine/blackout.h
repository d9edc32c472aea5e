/* What is done of a hand-over (handover.h): QEMU's commands, the lane's frames and vtpmd's words
 * become events, and the actions that follow are carried out.
 *
 * Four threads call in. The link's takes what vtpmd says and what the lane brings; the control
 * channel's, what QEMU says; the data channel's, that the guest does something; the recorder's,
 * that the owner record says offered. One lock is over all, and is held while the TPM retires.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <libtpms/tpm_library.h>

#include "handover.h"
#include "link_types.h"

struct asker;
struct blackout;
struct io;
struct lane_keying;
struct message;
struct staged_records;
struct store;
struct tpm;

enum {
    BLACKOUT_OFFER_MS = 1000, /* how long an offer is good without vtpmd's being asked again:
                                 the destination was heard of then */
    BLACKOUT_GRANT_TIMEOUT_MS = 2000, /* from INIT to the Grant: a round trip. QEMU's main loop
                                         stands still meanwhile, on both hosts */
    BLACKOUT_NO_LANE = -1,
};

/* What a capture has found. */
struct blackout_captured {
    bool worked;                 /* something has run since the last one */
    enum link_shutdown said;     /* the guest's last TPM2_Shutdown */
    bool is_offered;             /* a tail of it is */
    struct link_digests digests; /* of what that ends at */
};

/* `asker` is NULL in an engine that is alone; the owner record is written through `io`, NULL
 * where no vtpmd comes that has one. Returns 0 or a negative errno. */
int blackout_new(struct blackout **blackout, struct tpm *tpm, struct asker *asker, struct io *io);

/* Waits for the disk, where the owner record is written. NULL is none. */
void blackout_free(struct blackout *blackout);

/* Of vtpmd: the link's thread. */

/* Speak with the other engine over a connected socket, which is the blackout's then; the session
 * before this one ends, as by blackout_withdraw(), with what has come of it. Returns a TPM_RESULT:
 * TPM_BAD_ORDINAL if that was granted to this host, and is not settled yet. */
TPM_RESULT blackout_set_lane(struct blackout *blackout, int fd, const struct lane_keying *keying,
                             bool is_source);

/* The destination has what was captured last, if that is of these generations. Returns a
 * TPM_RESULT. */
TPM_RESULT blackout_keep_base(struct blackout *blackout, struct store *store, uint64_t permanent,
                              uint64_t following);

/* Have the owner record say that the vTPM is offered in the session that has the lane: write the
 * sector to its start, by a descriptor that is the blackout's then. Once that is durable it is
 * HANDOVER_RECORDED, if that may be, and vtpmd hears of it in any case. Returns a TPM_RESULT:
 * TPM_BAD_ORDINAL while another one is written. */
TPM_RESULT blackout_record(struct blackout *blackout, int fd,
                           const uint8_t sector[LINK_SECTOR_BYTES]);

/* Wait until none is. */
void blackout_wait_for_record(struct blackout *blackout);

/* tpm_capture(). What has run since the tail was made is forgotten by that: the tail is no longer
 * given, and nothing granted for it. If it `offers`, QEMU gets the tail of what was captured when
 * it asks, and the vTPM is granted to who started from that, once the owner record says offered
 * (HANDOVER_RECORDED); unless there is no base, or that cannot be now. */
TPM_RESULT blackout_capture(struct blackout *blackout, struct store *store, bool offers,
                            struct blackout_captured *captured);

/* incoming_stage(), unless QEMU has brought the tail by then: TPM_BAD_ORDINAL. */
TPM_RESULT blackout_stage(struct blackout *blackout, const struct staged_records *records,
                          const enum link_shutdown *said);

/* Put the permanent state that has come, and its generation before it, into `answer`, which is
 * MESSAGE_NONE. Returns a TPM_RESULT. */
TPM_RESULT blackout_get_staged(struct blackout *blackout, struct message *answer);

/* No more records come, nor a tail, or, if it `goes_on`, they do; and unless QEMU `has_given` a
 * state, nothing of them is started from. TPM_BAD_ORDINAL if QEMU has brought the tail. */
TPM_RESULT blackout_forget(struct blackout *blackout, bool goes_on, bool has_given);

/* The TPM was admitted: no more records come. */
void blackout_unstage(struct blackout *blackout);

/* RECORDED, DETACHED, LET_GO or OWNED. TPM_BAD_ORDINAL if it is too late for that. */
TPM_RESULT blackout_say(struct blackout *blackout, enum handover_event event);

/* The session is to end without a Grant. TPM_BAD_ORDINAL if it is too late for that. `before` is
 * what it was. */
TPM_RESULT blackout_withdraw(struct blackout *blackout, enum handover_state *before);

/* What the lane has to be polled for, or BLACKOUT_NO_LANE: there is none, or INIT waits for what
 * comes there; and take what has come there, when the TPM of a tail has started. */
int blackout_lane_fd(struct blackout *blackout);
void blackout_receive(struct blackout *blackout);

enum handover_state blackout_state(struct blackout *blackout);

/* Of QEMU: the control channel's thread. */

/* True while a session may make something else of the state that QEMU asks for. */
bool blackout_is_armed(struct blackout *blackout);

/* Put the tail into `answer`, which is MESSAGE_NONE. Returns false if there is none to give. */
bool blackout_give_tail(struct blackout *blackout, struct message *answer);

/* Take the tail of the session that has the lane, and ask for the vTPM. Returns 0, or why the tail
 * is of no use: enum link_tail. */
int blackout_take_tail(struct blackout *blackout, const uint8_t *tail, size_t tail_bytes);

/* Have the TPM be on standby from what a tail that was taken ends at, or end the session; nothing
 * where none was. Of a tail that continues what libtpms took libtpms hardly ever refuses the end:
 * so QEMU, and the source, need not wait for that. */
void blackout_start_tail(struct blackout *blackout);

/* Wait for the Grant. Returns false if no tail was taken: it is not for the blackout to say. Else
 * `*result` is INIT's. */
bool blackout_init(struct blackout *blackout, TPM_RESULT *result);

/* The guest runs here. */
void blackout_runs(struct blackout *blackout);

/* Of the guest: the data channel's thread has executed a command. Where nothing is offered it is a
 * look at one word. */
void blackout_worked(struct blackout *blackout);
