/* swtpm's format for a state: what libtpms marshalled, wrapped for the disk or for the way.
 *
 *     file    header, content, lineage                                  (checkpoint.h)
 *     blob    header, TLV MIGRATION_DATA (content), lineage, sleeps     (engine/blob.h)
 *
 * The content is the TLV DATA, or, when encrypted, ENCRYPTED_DATA, HMAC and IV. With a migration
 * key the TLVs ENCRYPTED_MIGRATION_DATA, HMAC and MIGRATION_IV are in MIGRATION_DATA's place. The
 * lineage is the TLV LINEAGE, or nothing; of a guest that sleeps there is the TLV SLEEPS, without
 * data. swtpm looks at neither. Numbers are big-endian:
 *
 *     Offset  Size  Field of the header
 *     0       1     version, 2
 *     1       1     minimum version, 1; 255 while a journal continues the file: no swtpm takes it
 *     2       2     size of the header, 10
 *     4       2     flags
 *     6       4     length of everything, the header included
 *
 *     Offset  Size  Field of a TLV
 *     0       2     tag
 *     2       4     length
 *     6       …     data
 *
 *     Offset  Size  Data of the TLV LINEAGE
 *     0       16    identity of the vTPM
 *     16      8     generation of the state
 *
 * Sources: swtpm's swtpm_nvstore.c and tlv.c; docs/state-format.md.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include "cipher.h"

enum {
    SWTPM_AT_VERSION = 0,
    SWTPM_AT_MINIMUM_VERSION = 1,
    SWTPM_AT_HEADER_BYTES = 2,
    SWTPM_AT_FLAGS = 4,
    SWTPM_AT_TOTAL_BYTES = 6,
    SWTPM_HEADER_BYTES = 10,

    SWTPM_AT_TAG = 0,
    SWTPM_AT_LENGTH = 2,
    SWTPM_TLV_BYTES = 6, /* before its data */

    CHECKPOINT_IDENTITY_BYTES = 16,
    SWTPM_AT_IDENTITY = 0,
    SWTPM_AT_GENERATION = SWTPM_AT_IDENTITY + CHECKPOINT_IDENTITY_BYTES,
    SWTPM_LINEAGE_BYTES = SWTPM_AT_GENERATION + 8,

    SWTPM_VERSION = 2,
    SWTPM_MINIMUM_VERSION = 1,
    SWTPM_MINIMUM_VERSION_CONTINUED = 255,
};

enum swtpm_flag {
    SWTPM_ENCRYPTED = 0x01,
    SWTPM_MIGRATION_ENCRYPTED = 0x02,
    SWTPM_MIGRATION_DATA = 0x04,
    SWTPM_ENCRYPTED_256_BIT_KEY = 0x08,
    SWTPM_MIGRATION_256_BIT_KEY = 0x10,
};

enum swtpm_tag {
    SWTPM_TAG_DATA = 1,
    SWTPM_TAG_ENCRYPTED_DATA = 2,
    SWTPM_TAG_HMAC = 3,
    SWTPM_TAG_MIGRATION_DATA = 4,
    SWTPM_TAG_ENCRYPTED_MIGRATION_DATA = 5,
    SWTPM_TAG_IV = 6,
    SWTPM_TAG_MIGRATION_IV = 7,
    SWTPM_TAG_SLEEPS = 0x5653,
    SWTPM_TAG_LINEAGE = 0x5654,
};

/* Where a state stands in its vTPM's history. */
struct checkpoint_lineage {
    uint8_t identity[CHECKPOINT_IDENTITY_BYTES];
    uint64_t generation;
    bool continued; /* by a journal: the file alone is not the state */
    bool sleeps;    /* of a blob: its guest's last TPM2_Shutdown was STATE */
};

/* A state, wrapped: three pieces that make one file or blob. */
enum {
    SWTPM_BEFORE_BYTES_MAX = SWTPM_HEADER_BYTES + 2 * SWTPM_TLV_BYTES,
    SWTPM_AFTER_BYTES_MAX =
        4 * SWTPM_TLV_BYTES + DIGEST_BYTES + CIPHER_KEY_BYTES_MAX + SWTPM_LINEAGE_BYTES,
    SWTPM_PIECES = 3,
};

struct swtpm_wrapped {
    uint8_t before[SWTPM_BEFORE_BYTES_MAX];
    size_t before_bytes;
    const uint8_t *data; /* of the first TLV: the state itself, or `sealed` */
    size_t data_bytes;
    uint8_t after[SWTPM_AFTER_BYTES_MAX];
    size_t after_bytes;
    struct cipher_output sealed;
};

enum swtpm_kind { SWTPM_FILE, SWTPM_BLOB };

/* Wrap a state, which has to stay in its place. `key` and `lineage` may be NULL; only a file is
 * continued, and only a blob's guest sleeps. Returns 0 or what cipher_encrypt() does; the caller
 * ends `wrapped` either way. */
int swtpm_wrap(enum swtpm_kind kind, const struct cipher_key *key, const uint8_t *state,
               size_t state_bytes, const struct checkpoint_lineage *lineage,
               struct swtpm_wrapped *wrapped);

/* Encrypt a blob that was wrapped, for the way: all of it but what tells its place in history.
 * Returns 0 or what cipher_encrypt() does; `wrapped` is as it was then. */
int swtpm_seal_blob(struct swtpm_wrapped *wrapped, const struct cipher_key *migration_key);

void swtpm_wrapped_deinit(struct swtpm_wrapped *wrapped);

/* The bytes, in order. They are in `wrapped` and where the state is. */
void swtpm_wrapped_pieces(struct swtpm_wrapped *wrapped, struct iovec pieces[SWTPM_PIECES]);
