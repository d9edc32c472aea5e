/* The sealed tail: what QEMU's own stream carries in place of the permanent blob. A codec, without
 * I/O; docs/stream-format.md has its every byte.
 *
 *     Offset  Size  Field
 *     0       8     magic, "VTPMTAIL"
 *     8       2     version, 3
 *     10      2     incompatible flags, 0
 *     12      16    session
 *     28      8     permanent: generation that the destination has acknowledged
 *     36      8     permanent: generation that the tail makes of it
 *     44      8     volatile: generation that the destination has acknowledged
 *     52      8     volatile: generation that the tail makes of it
 *     60      12    nonce
 *     72      …     AES-256-GCM of: u8 power, u32 length and delta record (permanent), the same
 *                   (volatile)
 *     end-16  16    its tag
 *
 * Associated data are bytes 0 to 71, the VM's uuid and the vTPM's lineage: a tail of another
 * session or another vTPM does not open. The nonce is the beginning of an HMAC-SHA256 of all that
 * is sealed and associated: two tails have one nonce only if they are the same tail.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "link_types.h"
#include "staged.h"

struct lane_keying;
struct tail_cipher;

enum {
    TAIL_VERSION = 3,
    TAIL_HEADER_BYTES = 72,
    TAIL_BYTES_MAX = 512 * 1024, /* two images of the largest size, each whole, and their headers */
};

/* Tell a tail from a state blob: swtpm's begins with a version below ten. */
bool tail_is(const uint8_t *bytes, size_t n_bytes);

/* What a tail says. */
struct tail {
    uint64_t permanent_from, permanent_to;
    uint64_t volatile_from, volatile_to;
    uint8_t power; /* enum link_shutdown: what the guest's last TPM2_Shutdown said */
    struct staged_records records;
    uint8_t *content; /* of one that was opened: what the records are in */
    size_t content_bytes;
};

/* Overwrite and free what was opened. */
void tail_deinit(struct tail *tail);

/* Make what seals and opens the tails of a session. It keeps the session's name, but nothing else
 * of the keying. Returns 0 or -ENOMEM. */
int tail_cipher_new(struct tail_cipher **cipher, const struct lane_keying *keying);

/* Overwrite and free the keys; NULL is nothing. */
void tail_cipher_free(struct tail_cipher *cipher);

/* Seal a tail. The same one is the same bytes, each time and at both sides. Returns 0, and the
 * caller frees `*bytes`; -EMSGSIZE for one above TAIL_BYTES_MAX; or -ENOMEM. */
int tail_seal(struct tail_cipher *cipher, const struct tail *tail, uint8_t **bytes,
              size_t *n_bytes);

/* Open a tail. Returns 0, and the caller ends it; or up to LINK_TAIL_IMPOSSIBLE of enum link_tail,
 * or -ENOMEM, and then it is empty. */
int tail_open(struct tail_cipher *cipher, const uint8_t *bytes, size_t n_bytes, struct tail *tail);

/* Return true if the records lead from where the tail says that it begins to where it says that it
 * ends, so far as they say so themselves. */
bool tail_is_consistent(const struct tail *tail);
