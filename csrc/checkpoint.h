/* A state file in swtpm's format (swtpm_format.h has its bytes), replaced atomically.
 *
 * Order of a write: create temporary, write, sync file, rename, sync directory. A crash between
 * any two steps leaves the old file or the new one, and at most a temporary file beside it.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "io.h"
#include "swtpm_format.h"

enum {
    CHECKPOINT_HEADER_BYTES = SWTPM_HEADER_BYTES + SWTPM_TLV_BYTES, /* before the state */
    CHECKPOINT_NAME_BYTES_MAX = 64,
};

/* Replace the state file of blob `name` ("permall", …), encrypted with `key`. That may be NULL, and
 * so may `lineage`. Returns 0 once it is durable. */
int checkpoint_write(struct io *io, const struct cipher_key *key, const char *name,
                     const uint8_t *state, size_t state_bytes,
                     const struct checkpoint_lineage *lineage);

/* The two halves of checkpoint_write(). If the first fails, the file is as it was; if the second
 * does, it may be the old one or the new one. */
int checkpoint_prepare(struct io *io, const struct cipher_key *key, const char *name,
                       const uint8_t *state, size_t state_bytes,
                       const struct checkpoint_lineage *lineage);
int checkpoint_publish(struct io *io, const char *name);

/* Return 0 if there is a file, or a negative errno. */
int checkpoint_find(struct io *io, const char *name);

/* In place of the second: the file is as it was. */
void checkpoint_discard(struct io *io, const char *name);

/* Remove the state file of blob `name`, if there is one. Returns 0 once that is durable. */
int checkpoint_remove(struct io *io, const char *name);
