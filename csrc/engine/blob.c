#include "blob.h"

#include <errno.h>
#include <libtpms/tpm_error.h>
#include <stdlib.h>
#include <string.h>

#include "bytes.h"
#include "check.h"
#include "pages.h"

static const struct {
    uint32_t result;
    const char *reason;
} refusals[] = {
    [BLOB_SHORT] = {TPM_BAD_PARAMETER, "it is shorter than a header"},
    [BLOB_LENGTH_WRONG] = {TPM_BAD_PARAMETER, "its length is not the one in its header"},
    [BLOB_VERSION_UNKNOWN] = {TPM_BAD_VERSION, "it needs a later version of the format"},
    [BLOB_HEADER_WRONG] = {TPM_BAD_DATASIZE, "its header has another size"},
    [BLOB_TLV_CUT] = {TPM_FAIL, "a TLV announces more than is left"},
    [BLOB_TLV_MISSING] = {TPM_FAIL, "it lacks a TLV"},
    [BLOB_FILE_KEY_NEEDED] = {TPM_KEYNOTFOUND,
                              "it is encrypted with swtpm's file key: give it with --key"},
    [BLOB_MIGRATION_KEY_NEEDED] = {TPM_KEYNOTFOUND, "it is encrypted with swtpm's migration key: "
                                                    "give it with --migration-key"},
    [BLOB_KEY_LENGTH_WRONG] = {TPM_BAD_KEY_PROPERTY,
                               "it is encrypted with a key of another length"},
    [BLOB_HMAC_LENGTH_WRONG] = {TPM_FAIL, "its HMAC has another length"},
    [BLOB_DOES_NOT_OPEN] = {TPM_DECRYPT_ERROR, "it does not open with this key: the key is another "
                                               "one, or it was altered"},
    [BLOB_GENERATION_WRONG] = {TPM_BAD_PARAMETER, "it is of a generation that is none"},
};

uint32_t blob_result(enum blob_refusal refusal)
{
    check(refusal >= BLOB_SHORT && refusal <= BLOB_GENERATION_WRONG);
    return refusals[refusal].result;
}

const char *blob_reason(enum blob_refusal refusal)
{
    check(refusal >= BLOB_SHORT && refusal <= BLOB_GENERATION_WRONG);
    return refusals[refusal].reason;
}

struct span {
    const uint8_t *bytes;
    size_t n_bytes;
};

/* Which TLVs that are encrypted are skipped. */
enum skipped { SKIP_NONE, SKIP_FILE_KEY, SKIP_ALL };

/* Find the first TLV with a tag (rule 5). Returns 0 or an enum blob_refusal. */
static int find(struct span in, enum swtpm_tag wanted, enum skipped skipped, struct span *found)
{
    while (in.n_bytes >= SWTPM_TLV_BYTES) {
        uint16_t tag = get_be16(in.bytes + SWTPM_AT_TAG);
        uint32_t n_bytes = get_be32(in.bytes + SWTPM_AT_LENGTH);
        in.bytes += SWTPM_TLV_BYTES;
        in.n_bytes -= SWTPM_TLV_BYTES;
        if (n_bytes > in.n_bytes)
            return BLOB_TLV_CUT;
        *found = (struct span){in.bytes, n_bytes};
        if (tag == wanted)
            return 0;
        if (tag == SWTPM_TAG_ENCRYPTED_DATA && skipped < SKIP_FILE_KEY)
            return BLOB_FILE_KEY_NEEDED;
        if (tag == SWTPM_TAG_ENCRYPTED_MIGRATION_DATA && skipped < SKIP_ALL)
            return BLOB_MIGRATION_KEY_NEEDED;
        in.bytes += n_bytes;
        in.n_bytes -= n_bytes;
    }
    return BLOB_TLV_MISSING;
}

/* Check rule 2. Returns 0 or an enum blob_refusal. */
static int check_header(struct span blob)
{
    if (blob.n_bytes < SWTPM_HEADER_BYTES)
        return BLOB_SHORT;
    if (get_be32(blob.bytes + SWTPM_AT_TOTAL_BYTES) != blob.n_bytes)
        return BLOB_LENGTH_WRONG;
    if (blob.bytes[SWTPM_AT_MINIMUM_VERSION] > SWTPM_VERSION)
        return BLOB_VERSION_UNKNOWN;
    if (get_be16(blob.bytes + SWTPM_AT_HEADER_BYTES) != SWTPM_HEADER_BYTES)
        return BLOB_HEADER_WRONG;
    return 0;
}

/* How something in a blob is encrypted. */
struct sealing {
    enum swtpm_tag data, iv;
    enum skipped skipped; /* which others are in the way of its HMAC and IV */
    uint16_t flag_256_bit_key;
};

static const struct sealing state_sealing = {SWTPM_TAG_ENCRYPTED_DATA, SWTPM_TAG_IV, SKIP_FILE_KEY,
                                             SWTPM_ENCRYPTED_256_BIT_KEY},
                            migration_sealing = {SWTPM_TAG_ENCRYPTED_MIGRATION_DATA,
                                                 SWTPM_TAG_MIGRATION_IV, SKIP_ALL,
                                                 SWTPM_MIGRATION_256_BIT_KEY};

/* Find the three TLVs of what is encrypted. Returns 0 or an enum blob_refusal. */
static int find_encrypted(struct span in, const struct sealing *sealing, struct cipher_input *input)
{
    struct span mac, ciphertext, iv;

    int r = find(in, SWTPM_TAG_HMAC, sealing->skipped, &mac);
    if (r != 0)
        return r;
    if (mac.n_bytes != DIGEST_BYTES)
        return BLOB_HMAC_LENGTH_WRONG;
    r = find(in, sealing->data, SKIP_NONE, &ciphertext);
    if (r != 0)
        return r;
    r = find(in, sealing->iv, sealing->skipped, &iv);
    if (r != 0)
        return r;
    *input = (struct cipher_input){
        .ciphertext = ciphertext.bytes,
        .n_bytes = ciphertext.n_bytes,
        .iv = iv.bytes,
        .iv_bytes = iv.n_bytes,
        .mac = mac.bytes,
    };
    return 0;
}

static void wipe(struct blob_content *content)
{
    if (content->decrypted)
        explicit_bzero(content->decrypted, content->decrypted_bytes);
    free(content->decrypted);
    content->decrypted = NULL;
}

/* Decrypt into `content`. What it has decrypted before, and the input may be of, it has no more. */
static int decrypt_input(bool is_old, const struct cipher_key *key,
                         const struct cipher_input *input, struct blob_content *content)
{
    uint8_t *out = malloc(input->n_bytes);
    size_t n_bytes;

    if (!out && input->n_bytes > 0)
        return -ENOMEM;
    int r = is_old ? cipher_decrypt_old(key, input->ciphertext, input->n_bytes, out, &n_bytes)
                   : cipher_decrypt(key, input, out, &n_bytes);
    wipe(content);
    content->decrypted = out;
    content->decrypted_bytes = input->n_bytes;
    if (r != 0)
        return r == CIPHER_DOES_NOT_OPEN ? BLOB_DOES_NOT_OPEN : r;
    content->state = out;
    content->state_bytes = n_bytes;
    return 0;
}

static int decrypt(struct span in, uint8_t version, uint16_t flags, const struct sealing *sealing,
                   const struct cipher_key *key, struct blob_content *content)
{
    struct cipher_input input = {.ciphertext = in.bytes, .n_bytes = in.n_bytes};

    if (version < SWTPM_VERSION)
        return decrypt_input(true, key, &input, content);
    if (key->n_bytes != (flags & sealing->flag_256_bit_key ? 32 : 16))
        return BLOB_KEY_LENGTH_WRONG;
    int r = find_encrypted(in, sealing, &input);
    return r != 0 ? r : decrypt_input(false, key, &input, content);
}

/* What swtpm does not look at may be damaged, and is none then. But what would use up the numbers
 * of its vTPM is none of vtpmd's. Returns 0 or BLOB_GENERATION_WRONG. */
static int read_lineage(struct span in, struct blob_content *content)
{
    struct span found;

    if (find(in, SWTPM_TAG_LINEAGE, SKIP_ALL, &found) != 0 || found.n_bytes != SWTPM_LINEAGE_BYTES)
        return 0;
    struct checkpoint_lineage lineage = {.generation = get_be64(found.bytes + SWTPM_AT_GENERATION)};
    if (lineage.generation > GENERATION_GIVEN_MAX)
        return BLOB_GENERATION_WRONG;
    memcpy(lineage.identity, found.bytes + SWTPM_AT_IDENTITY, sizeof(lineage.identity));
    lineage.sleeps = find(in, SWTPM_TAG_SLEEPS, SKIP_ALL, &found) == 0;
    content->lineage = lineage;
    content->has_lineage = true;
    return 0;
}

/* What a TLV holds; of version 1, all there is. */
static int open_plain(struct span in, uint8_t version, enum swtpm_tag tag,
                      struct blob_content *content)
{
    struct span found = in;
    int r = version < SWTPM_VERSION ? 0 : find(in, tag, SKIP_NONE, &found);

    if (r == 0) {
        content->state = found.bytes;
        content->state_bytes = found.n_bytes;
    }
    return r;
}

/* Unwrap what follows a header (rules 3 and 4). */
static int decode_body(struct span body, uint8_t version, uint16_t flags, bool is_encrypted,
                       const struct blob_keys *keys, struct blob_content *content)
{
    bool is_sealed = flags & SWTPM_MIGRATION_ENCRYPTED;

    is_encrypted |= (flags & SWTPM_ENCRYPTED) != 0;
    if (is_sealed && !keys->migration)
        return BLOB_MIGRATION_KEY_NEEDED;
    if (is_encrypted && !keys->file)
        return BLOB_FILE_KEY_NEEDED;
    int r = is_sealed ? decrypt(body, version, flags, &migration_sealing, keys->migration, content)
                      : open_plain(body, version, SWTPM_TAG_MIGRATION_DATA, content);
    if (r != 0)
        return r;
    struct span inner = {content->state, content->state_bytes};
    return is_encrypted ? decrypt(inner, version, flags, &state_sealing, keys->file, content)
                        : open_plain(inner, version, SWTPM_TAG_DATA, content);
}

int blob_decode(const uint8_t *blob, size_t blob_bytes, bool is_encrypted,
                const struct blob_keys *keys, struct blob_content *content)
{
    *content = (struct blob_content){0};
    if (blob_bytes == 0)
        return 0;
    int r = check_header((struct span){blob, blob_bytes});
    if (r != 0 || blob_bytes == SWTPM_HEADER_BYTES)
        return r;
    struct span body = {blob + SWTPM_HEADER_BYTES, blob_bytes - SWTPM_HEADER_BYTES};
    uint8_t version = blob[SWTPM_AT_VERSION];
    uint16_t flags = get_be16(blob + SWTPM_AT_FLAGS);
    r = decode_body(body, version, flags, is_encrypted, keys, content);
    if (r == 0 && version >= SWTPM_VERSION)
        r = read_lineage(body, content);
    if (r != 0)
        blob_content_deinit(content);
    return r;
}

void blob_content_deinit(struct blob_content *content)
{
    wipe(content);
    *content = (struct blob_content){0};
}
