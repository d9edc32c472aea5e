#include "lane.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "aead.h"
#include "bytes.h"
#include "digest.h"

static const char from_source[] = "vtpmd lane 1 from source";
static const char from_destination[] = "vtpmd lane 1 from destination";

enum {
    AT_KIND = 0,
    AT_ZEROS = 1,
    AT_REASON = 4,
    AT_APPLY_US = 8,
    AT_START_US = 12,
    AT_PERMANENT_DIGEST = 16,
    AT_VOLATILE_DIGEST = 48,
};

enum { ASSOCIATED_BYTES = LANE_SESSION_BYTES + LANE_UUID_BYTES + LANE_LINEAGE_BYTES };

_Static_assert((int)LANE_KEY_BYTES == (int)AEAD_KEY_BYTES &&
                   (int)LANE_DIGEST_BYTES == (int)DIGEST_BYTES &&
                   AT_VOLATILE_DIGEST + LANE_DIGEST_BYTES == (int)LANE_CONTENT_BYTES &&
                   LANE_CONTENT_BYTES + AEAD_TAG_BYTES == (int)LANE_FRAME_BYTES,
               "as the document has them");

struct direction {
    struct aead *aead;
    uint64_t n_frames; /* the next one's number */
};

struct lane {
    struct direction out, in;
    bool has_ended;
    uint8_t associated[ASSOCIATED_BYTES];
};

static int make_direction(struct direction *direction, const struct lane_keying *keying,
                          const char *label)
{
    uint8_t key[AEAD_KEY_BYTES];

    direction->n_frames = keying->is_greeted;
    int r =
        aead_derive(keying->key, LANE_KEY_BYTES, keying->session, LANE_SESSION_BYTES, label, key);
    if (r >= 0)
        r = aead_new(&direction->aead, key);
    explicit_bzero(key, sizeof(key));
    return r;
}

int lane_new(struct lane **out, const struct lane_keying *keying, bool is_source)
{
    struct lane *lane = calloc(1, sizeof(*lane));

    if (!lane)
        return -ENOMEM;
    uint8_t *associated = lane->associated;
    associated = mempcpy(associated, keying->session, LANE_SESSION_BYTES);
    associated = mempcpy(associated, keying->uuid, LANE_UUID_BYTES);
    memcpy(associated, keying->lineage, LANE_LINEAGE_BYTES);
    int r = make_direction(&lane->out, keying, is_source ? from_source : from_destination);
    if (r >= 0)
        r = make_direction(&lane->in, keying, is_source ? from_destination : from_source);
    if (r < 0) {
        lane_free(lane);
        return r;
    }
    *out = lane;
    return 0;
}

void lane_free(struct lane *lane)
{
    if (!lane)
        return;
    aead_free(lane->out.aead);
    aead_free(lane->in.aead);
    free(lane);
}

static bool is_zero(const uint8_t *bytes, size_t n_bytes)
{
    uint8_t all = 0;

    for (size_t i = 0; i < n_bytes; i++)
        all |= bytes[i];
    return all == 0;
}

/* Whether a frame is one, and may have that number. */
static bool is_possible(const struct lane_frame *frame, uint64_t number)
{
    bool has_reason = frame->kind == LANE_REFUSE, is_take = frame->kind == LANE_TAKE;

    if (frame->kind < LANE_HELLO || frame->kind > LANE_GO_ON)
        return false;
    if ((frame->kind == LANE_HELLO) != (number == 0) || has_reason != (frame->reason != 0))
        return false;
    return is_take || (frame->apply_us == 0 && frame->start_us == 0 &&
                       is_zero(frame->permanent_digest, LANE_DIGEST_BYTES) &&
                       is_zero(frame->volatile_digest, LANE_DIGEST_BYTES));
}

static bool has_no_next(const struct lane *lane, const struct direction *direction)
{
    return lane->has_ended || direction->n_frames == LANE_FRAMES_MAX;
}

int lane_seal(struct lane *lane, const struct lane_frame *frame, uint8_t bytes[LANE_FRAME_BYTES])
{
    struct direction *out = &lane->out;

    if (has_no_next(lane, out))
        return LANE_ENDED;
    if (!is_possible(frame, out->n_frames))
        return LANE_IMPOSSIBLE;
    memset(bytes, 0, LANE_CONTENT_BYTES);
    bytes[AT_KIND] = (uint8_t)frame->kind;
    put_be32(bytes + AT_REASON, frame->reason);
    put_be32(bytes + AT_APPLY_US, frame->apply_us);
    put_be32(bytes + AT_START_US, frame->start_us);
    memcpy(bytes + AT_PERMANENT_DIGEST, frame->permanent_digest, LANE_DIGEST_BYTES);
    memcpy(bytes + AT_VOLATILE_DIGEST, frame->volatile_digest, LANE_DIGEST_BYTES);
    int r = aead_seal(out->aead, out->n_frames++, lane->associated, ASSOCIATED_BYTES, bytes,
                      LANE_CONTENT_BYTES, bytes + LANE_CONTENT_BYTES);
    lane->has_ended = r < 0;
    if (r < 0)
        memset(bytes, 0, LANE_FRAME_BYTES); /* nothing goes out in the clear */
    return r;
}

static int decode(const uint8_t content[LANE_CONTENT_BYTES], uint64_t number,
                  struct lane_frame *frame)
{
    frame->kind = content[AT_KIND];
    frame->reason = get_be32(content + AT_REASON);
    frame->apply_us = get_be32(content + AT_APPLY_US);
    frame->start_us = get_be32(content + AT_START_US);
    memcpy(frame->permanent_digest, content + AT_PERMANENT_DIGEST, LANE_DIGEST_BYTES);
    memcpy(frame->volatile_digest, content + AT_VOLATILE_DIGEST, LANE_DIGEST_BYTES);
    if (is_zero(content + AT_ZEROS, AT_REASON - AT_ZEROS) && is_possible(frame, number))
        return 0;
    memset(frame, 0, sizeof(*frame));
    return LANE_IMPOSSIBLE;
}

int lane_open(struct lane *lane, const uint8_t bytes[LANE_FRAME_BYTES], struct lane_frame *frame)
{
    struct direction *in = &lane->in;
    uint8_t content[LANE_CONTENT_BYTES];

    memset(frame, 0, sizeof(*frame));
    if (has_no_next(lane, in))
        return LANE_ENDED;
    memcpy(content, bytes, LANE_CONTENT_BYTES);
    uint64_t number = in->n_frames++;
    int r = aead_open(in->aead, number, lane->associated, ASSOCIATED_BYTES, content,
                      LANE_CONTENT_BYTES, bytes + LANE_CONTENT_BYTES);
    if (r == AEAD_FORGED)
        r = LANE_FORGED;
    else if (r == 0)
        r = decode(content, number, frame);
    lane->has_ended = r != 0;
    return r;
}
