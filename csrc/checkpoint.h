/* A state file in swtpm's format, replaced atomically.
 *
 *     Offset  Size  Field
 *     0       1     version, 2
 *     1       1     minimum version, 1
 *     2       2     size of this header, 10
 *     4       2     flags: 0, or 1 when encrypted, and 8 with a key of 256 bits
 *     6       4     length of the whole file
 *     10      2     TLV tag, 1: data, or 2: encrypted data
 *     12      4     TLV length
 *     16      …     the state as libtpms marshals it, or its ciphertext
 *
 * and, when encrypted, the TLVs 3 (HMAC) and 6 (IV). All numbers are big-endian (swtpm's
 * swtpm_nvstore.c; docs/state-format.md).
 *
 * Order of a write: create temporary, write, sync file, rename, sync directory. A crash between
 * any two steps leaves the old file or the new one, and at most a temporary file beside it.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "cipher.h"
#include "io.h"

enum {
    CHECKPOINT_HEADER_BYTES = 16,
    CHECKPOINT_MODE = 0640, /* swtpm's default */
    CHECKPOINT_NAME_BYTES_MAX = 64,
};

/* Replace the state file of blob `name` ("permall", …), encrypted with `key` unless that is NULL.
 * Returns 0 once it is durable. */
int checkpoint_write(struct io *io, const struct cipher_key *key, const char *name,
                     const uint8_t *state, size_t state_bytes);

/* Remove the state file of blob `name`, if there is one. Returns 0 once that is durable. */
int checkpoint_remove(struct io *io, const char *name);
