/* A hand-over with the other engine's end of it in the test's hands: a real blackout over the TPM
 * in memory, a real lane, and rounds and tails as the other side makes them.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "blackout.h"
#include "guest.h"
#include "lane.h"
#include "tail.h"
#include "version.h"

extern const struct lane_keying a_session, another_session;

extern struct blackout *blackout;
extern int other_fd;         /* the lane's end there */
extern struct io *record_io; /* what the owner record is written through; NULL: it is not */

/* A TPM that a guest uses, and a blackout without a lane. */
void other_engine_begin(void);
void other_engine_begin_with(enum version_number version);
void other_engine_end(void);

/* Have the lane of a session, with this engine as its source or as its destination. */
void other_engine_connect(const struct lane_keying *keying, bool is_source);

/* It has a frame lie in the lane. */
void other_engine_sends(const struct lane_frame *frame);

/* It seals a frame, and says it in two pieces, as a network may bring it. */
void other_engine_says(const struct lane_frame *frame);
void other_engine_takes(const struct link_digests *digests);

/* What it hears: the frames' kinds, at most three, then 0 if the lane has ended there, or
 * LANE_HELLO. Returns their number. `take` is the last Take. */
int other_engine_hears(enum lane_kind kinds[4], struct lane_frame *take);

struct sealed_tail {
    uint8_t *bytes;
    size_t n_bytes;
};

/* The tail that it would make of these, in the session that has the lane. The caller frees the
 * bytes. */
struct sealed_tail other_engine_seals(const struct guest_states *from,
                                      const struct guest_states *to);

/* The same with any records. */
struct sealed_tail other_engine_seals_records(const struct guest_states *from,
                                              const struct guest_states *to,
                                              const struct staged_records *records);

/* Open one that this engine has made, which must be one. The caller ends it. */
struct tail other_engine_opens(const uint8_t *bytes, size_t n_bytes);

/* Have this engine's images be what was captured, by way of a round after others, or of NULL as the
 * first; and the TPM started from them if the guest has stopped by then. */
TPM_RESULT other_engine_brings(const struct guest_states *from, const struct guest_states *to,
                               bool is_last);

/* The TPM is off, as one whose guest is to come. */
void power_off(void);
