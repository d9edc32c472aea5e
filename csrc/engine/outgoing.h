/* What a session has sent from this host: the images that its destination has, and the tail that
 * says what has changed since. Who calls sees to it that one thread at a time does.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "image.h"
#include "link_types.h"

struct store;
struct tail_cipher;

/* What the destination has acknowledged: there are both images, or neither. */
struct outgoing {
    struct image permanent;
    struct image following; /* the volatile one */
};

bool outgoing_has_base(const struct outgoing *outgoing);

/* The destination has what was captured last, if that is of these generations. Returns 0, -ESTALE
 * if it is not, or -ENOMEM; there is no base then: it goes two rounds back at most. */
int outgoing_keep_base(struct outgoing *outgoing, struct store *store, uint64_t permanent,
                       uint64_t following);

/* What a tail is, and what it ends at. */
struct outgoing_tail {
    uint8_t *bytes;
    size_t n_bytes;
    struct link_digests digests;
};

/* Make the tail that makes of the base what was captured last, of a guest that has `said` so last.
 * Returns 0, and the caller frees the bytes; -EMSGSIZE for one that is too large; or -ENOMEM. */
int outgoing_make_tail(struct outgoing *outgoing, struct store *store, struct tail_cipher *cipher,
                       enum link_shutdown said, struct outgoing_tail *tail);

/* Overwrite and free; there is no base then. */
void outgoing_deinit(struct outgoing *outgoing);
