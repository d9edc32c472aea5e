/* State blobs: what GET_STATEBLOB gives and SET_STATEBLOB takes, in swtpm's format.
 *
 * swtpm_format.h has the bytes, and wraps a state as a blob. This unwraps one, from anywhere:
 *
 *     1. An empty blob, and one that is a header alone, hold no state.
 *     2. A header's length is that of the blob, its minimum version is one that is known, and its
 *        size is right.
 *     3. Of version 1, the rest is the content. Later, the TLV MIGRATION_DATA has it, or
 *        ENCRYPTED_MIGRATION_DATA, HMAC and MIGRATION_IV are, if a flag of the header says so.
 *     4. In it, DATA is the state, or ENCRYPTED_DATA, HMAC and IV are, if a flag of the header or
 *        the client says so. Of version 1, what is encrypted has no TLVs (cipher.h).
 *     5. What is looked for is the first TLV with its tag. Others before it are skipped, but for
 *        one that is encrypted where nothing encrypted is looked for: it says which key is needed.
 *
 * The results are those that swtpm gives for the same blob (SWTPM_NVRAM_SetStateBlob() in
 * swtpm_nvstore.c), but for what is of version 1 and does not open: swtpm has two results for it.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "swtpm_format.h"

/* Why a blob was refused. */
enum blob_refusal {
    BLOB_SHORT = 1, /* shorter than a header */
    BLOB_LENGTH_WRONG = 2,
    BLOB_VERSION_UNKNOWN = 3,
    BLOB_HEADER_WRONG = 4,
    BLOB_TLV_CUT = 5,
    BLOB_TLV_MISSING = 6,
    BLOB_FILE_KEY_NEEDED = 7,
    BLOB_MIGRATION_KEY_NEEDED = 8,
    BLOB_KEY_LENGTH_WRONG = 9,
    BLOB_HMAC_LENGTH_WRONG = 10,
    BLOB_DOES_NOT_OPEN = 11,    /* it was altered, or the key is another one */
    BLOB_GENERATION_WRONG = 12, /* the lineage's is above GENERATION_GIVEN_MAX */
};

/* What a blob may be encrypted with; NULL where there is no such key. */
struct blob_keys {
    const struct cipher_key *file; /* the state's own */
    const struct cipher_key *migration;
};

/* What a blob holds. */
struct blob_content {
    const uint8_t *state; /* in the blob, or on the heap; NULL if there is none */
    size_t state_bytes;
    uint8_t *decrypted; /* what of it is on the heap, or NULL */
    size_t decrypted_bytes;
    bool has_lineage; /* which is not sealed, with a key neither */
    struct checkpoint_lineage lineage;
};

/* Unwrap a blob. `is_encrypted` is what the client says of it. A blob in the clear is taken with
 * keys, too: it comes from QEMU, not from the disk. Returns 0, an enum blob_refusal or -ENOMEM; and
 * then `content` is empty. The caller ends it when it is 0. */
int blob_decode(const uint8_t *blob, size_t blob_bytes, bool is_encrypted,
                const struct blob_keys *keys, struct blob_content *content);

/* Overwrite and free what was decrypted. */
void blob_content_deinit(struct blob_content *content);

/* The TPM_RESULT that a refused blob is answered with. */
uint32_t blob_result(enum blob_refusal refusal);

/* Why, in words that follow on "the state blob is refused: ". */
const char *blob_reason(enum blob_refusal refusal);
