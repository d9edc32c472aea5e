/* What is done of a hand-over (handover.h): QEMU's commands, the lane's frames and vtpmd's words
 * become events, and the actions that follow are carried out.
 *
 * Three threads call in. The link's takes what vtpmd says and what the lane brings; the control
 * channel's, what QEMU says; the data channel's, that the guest does something. One lock is over
 * all, and is held while the TPM retires.
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
struct lane_keying;
struct message;
struct store;
struct tpm;

enum {
    BLACKOUT_OFFER_MS = 1000, /* how long an offer is good without vtpmd's being asked again:
                                 the destination was heard of then */
    BLACKOUT_GRANT_TIMEOUT_MS = 2000, /* from INIT to the Grant: a round trip. QEMU's main loop
                                         stands still meanwhile, on both hosts */
    BLACKOUT_NO_LANE = -1,
};

/* How long a destination took so far, for the source's report. */
struct blackout_times {
    uint32_t apply_us, start_us;
};

/* `asker` is NULL in an engine that is alone. Returns 0 or -ENOMEM. */
int blackout_new(struct blackout **blackout, struct tpm *tpm, struct asker *asker);

/* NULL is none. */
void blackout_free(struct blackout *blackout);

/* Of vtpmd: the link's thread. */

/* Speak with the other engine over a connected socket, which is the blackout's then; the lane
 * before it is closed. Returns a TPM_RESULT. */
TPM_RESULT blackout_set_lane(struct blackout *blackout, int fd, const struct lane_keying *keying,
                             bool is_source);

/* QEMU gets this tail when it asks, and the vTPM is granted to who started from these digests, once
 * the owner record says offered (HANDOVER_RECORDED). TPM_BAD_ORDINAL if that cannot be now. */
TPM_RESULT blackout_offer(struct blackout *blackout, const struct link_digests *digests,
                          const uint8_t *tail, size_t tail_bytes);

/* The TPM on standby was started from these digests, and nothing else has come since. */
TPM_RESULT blackout_hold(struct blackout *blackout, const struct link_digests *digests,
                         const struct blackout_times *times, const uint8_t *tail,
                         size_t tail_bytes);

/* tpm_capture(). What has run since the tail was made is forgotten by that: the tail is no longer
 * given, and nothing granted for it. */
TPM_RESULT blackout_capture(struct blackout *blackout, struct store *store, bool *worked,
                            enum link_shutdown *said);

/* RECORDED, DETACHED, LET_GO or OWNED. TPM_BAD_ORDINAL if it is too late for that. */
TPM_RESULT blackout_say(struct blackout *blackout, enum handover_event event);

/* The session is to end without a Grant. TPM_BAD_ORDINAL if it is too late for that. `before` is
 * what it was. */
TPM_RESULT blackout_withdraw(struct blackout *blackout, enum handover_state *before);

/* What the lane has to be polled for, or BLACKOUT_NO_LANE: there is none, or INIT waits for what
 * comes there; and take what has come there. */
int blackout_lane_fd(struct blackout *blackout);
void blackout_receive(struct blackout *blackout);

enum handover_state blackout_state(struct blackout *blackout);

/* Of QEMU: the control channel's thread. */

/* True while a session may make something else of the state that QEMU asks for. */
bool blackout_is_armed(struct blackout *blackout);

/* Put the tail into `answer`, which is MESSAGE_NONE. Returns false if there is none to give. */
bool blackout_give_tail(struct blackout *blackout, struct message *answer);

/* Take a tail that says what the TPM on standby has anyway. Returns false for any other. */
bool blackout_take_tail(struct blackout *blackout, const uint8_t *tail, size_t tail_bytes);

/* Wait for the Grant. Returns false if no tail was taken: it is not for the blackout to say. Else
 * `*result` is INIT's. */
bool blackout_init(struct blackout *blackout, TPM_RESULT *result);

/* The guest runs here. */
void blackout_runs(struct blackout *blackout);

/* Of the guest: the data channel's thread has executed a command. Where nothing is offered it is a
 * look at one word. */
void blackout_worked(struct blackout *blackout);
