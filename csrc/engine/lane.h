/* The lane's codec: what two engines say to each other while the guest stands still, without I/O.
 * docs/lane-format.md has every byte.
 *
 * A frame is sealed with a key for its direction and the number that it has there, so that what was
 * altered, replayed, left out or sent back does not open. That ends the lane, for good and both
 * ways: nothing that comes after it can be trusted to be all that was said.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

enum {
    LANE_SESSION_BYTES = 16,
    LANE_KEY_BYTES = 32,
    LANE_UUID_BYTES = 16,
    LANE_LINEAGE_BYTES = 16,
    LANE_DIGEST_BYTES = 32,
    LANE_CONTENT_BYTES = 80,
    LANE_FRAME_BYTES = 96, /* of every kind: the content, and its tag */
    LANE_FRAMES_MAX = 64,  /* each way; a hand-over is three */
};

enum lane_kind {
    LANE_HELLO = 1,  /* the first one each way, and no other: the other side has the key */
    LANE_TAKE = 2,   /* the destination starts the state, or has; digests, apply_us, start_us */
    LANE_GRANT = 3,  /* the source serves no more */
    LANE_REFUSE = 4, /* no: reason */
    LANE_GO_ON = 5,  /* the guest goes on at the source */
};

/* What is not of its kind is 0. */
struct lane_frame {
    enum lane_kind kind;
    uint32_t reason; /* as a Refuse of the stream has it, and not 0 */
    uint8_t permanent_digest[LANE_DIGEST_BYTES], volatile_digest[LANE_DIGEST_BYTES];
    uint32_t apply_us, start_us;
};

/* What both sides know of a session. A key is used for one lane: its frames' numbers make the
 * nonces. */
struct lane_keying {
    uint8_t session[LANE_SESSION_BYTES];
    uint8_t key[LANE_KEY_BYTES]; /* the session's, which other keys are derived from */
    uint8_t uuid[LANE_UUID_BYTES];
    uint8_t lineage[LANE_LINEAGE_BYTES];
    bool is_greeted; /* HELLO has passed both ways, in another process: go on behind it */
};

/* One side of a lane, in use in one thread. */
struct lane;

/* Make the keys of a side. It keeps nothing of the keying. Returns 0 or -ENOMEM. */
int lane_new(struct lane **lane, const struct lane_keying *keying, bool is_source);

/* Overwrite and free the keys; NULL is nothing. */
void lane_free(struct lane *lane);

enum lane_refusal {
    LANE_FORGED = 1,     /* it is not what the other side sealed next */
    LANE_IMPOSSIBLE = 2, /* it is no frame, or none that has a place there */
    LANE_ENDED = 3,      /* an error before has ended the lane, or all numbers are used */
};

/* Seal the next frame for the other side. Returns 0; LANE_IMPOSSIBLE, and nothing has changed then;
 * LANE_ENDED; or -ENOMEM, which ends the lane, and `bytes` are all 0. */
int lane_seal(struct lane *lane, const struct lane_frame *frame, uint8_t bytes[LANE_FRAME_BYTES]);

/* Open the other side's next frame. Returns 0; or enum lane_refusal or -ENOMEM, which end the
 * lane, and `frame` is all 0. */
int lane_open(struct lane *lane, const uint8_t bytes[LANE_FRAME_BYTES], struct lane_frame *frame);
