/* The states that a session brings ahead of its guest: images, made of delta records as they come
 * (docs/delta-format.md), so that no more than what has changed comes over the link.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "image.h"

struct nvram_states;

/* What the last records have replaced is kept: a source that has not heard that they had arrived
 * continues what was there before. */
struct staged {
    struct image permanent, permanent_before;
    struct image following, following_before; /* the volatile one */
};

/* A record for each image; an empty one leaves it as it is. */
struct staged_records {
    const uint8_t *permanent;
    size_t permanent_bytes;
    const uint8_t *following;
    size_t following_bytes;
};

/* Have the images be what records make of them; one whose base is generation 0 makes an image of
 * nothing. Returns 0, -EBADMSG for a record that does not apply, or -ENOMEM; nothing has changed
 * then. */
int staged_take(struct staged *staged, const struct staged_records *records);

/* Return true if both images have come, and are of these generations; or were, before the last
 * records. */
bool staged_is(const struct staged *staged, uint64_t permanent, uint64_t following);
bool staged_was(const struct staged *staged, uint64_t permanent, uint64_t following);

/* Have them be what they were, and what they are be what they were: twice is nothing. */
void staged_go_back(struct staged *staged);

/* Get what a TPM is to start from. Returns 0, or -ENOENT: one of them has not come. */
int staged_get(const struct staged *staged, struct nvram_states *states);

/* Overwrite and free. */
void staged_deinit(struct staged *staged);
