/* A state file in swtpm's format, replaced atomically.
 *
 *     Offset  Size  Field
 *     0       1     version, 2
 *     1       1     minimum version, 1; 255 while a journal continues the file: no swtpm takes it
 *     2       2     size of this header, 10
 *     4       2     flags: 0, or 1 when encrypted, and 8 with a key of 256 bits
 *     6       4     length of the whole file
 *     10      2     TLV tag, 1: data, or 2: encrypted data
 *     12      4     TLV length
 *     16      …     the state as libtpms marshals it, or its ciphertext
 *
 * then, when encrypted, the TLVs 3 (HMAC) and 6 (IV); and then, if the file has a lineage, in a TLV
 * that swtpm does not look at:
 *
 *     …       2     TLV tag, 0x5654
 *     …       4     TLV length, 24
 *     …       16    identity of the vTPM
 *     …       8     generation of the state
 *
 * All numbers are big-endian (swtpm's swtpm_nvstore.c; docs/state-format.md).
 *
 * Order of a write: create temporary, write, sync file, rename, sync directory. A crash between
 * any two steps leaves the old file or the new one, and at most a temporary file beside it.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "cipher.h"
#include "io.h"

enum {
    CHECKPOINT_HEADER_BYTES = 16,
    CHECKPOINT_IDENTITY_BYTES = 16,
    CHECKPOINT_LINEAGE_BYTES = 30,
    CHECKPOINT_MODE = 0640, /* swtpm's default */
    CHECKPOINT_NAME_BYTES_MAX = 64,
};

/* Where a state stands in its vTPM's history. */
struct checkpoint_lineage {
    uint8_t identity[CHECKPOINT_IDENTITY_BYTES];
    uint64_t generation;
    bool continued; /* by a journal: the file alone is not the state */
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

/* Remove the state file of blob `name`, if there is one. Returns 0 once that is durable. */
int checkpoint_remove(struct io *io, const char *name);
