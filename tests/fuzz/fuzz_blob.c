/* Fuzz state blobs: arbitrary ones, and what is made of right ones.
 *
 *   build/sanitize/fuzz_blob -max_total_time=600 tests/fuzz/corpus/blob
 *
 * Input: a letter that says what is done, a byte of options (see enum option), then
 *
 *   d    a blob, taken as it is and with its header's length put right
 *   m    u16 ciphertext's length, ciphertext, IV: a blob whose HMAC is right
 *   e    u16 a place to alter, then a state: a blob of it, altered there, and cut there
 *
 * The oracle:
 *   - what is taken gives at most as many bytes as the blob has, and a state that is in the blob,
 *     or that has been decrypted; what is refused gives none, and has a result and a reason,
 *   - what is decrypted is what another decryption makes of it, if its padding is right,
 *   - a blob of a state gives that state, with its lineage; altered in one bit it is refused, or,
 *     if it is encrypted, gives that very state; cut it is refused.
 */
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <stdlib.h>
#include <string.h>

#include "blob.h"
#include "bytes.h"
#include "check.h"

enum option {
    WITH_KEY = 1,
    WITH_256_BITS = 2,
    SAID_TO_BE_ENCRYPTED = 4,
    WITH_LINEAGE = 8,
    WITH_MIGRATION_KEY = 16, /* of the other length */
};

enum { BLOB_BYTES_MAX = 1 << 13 };

static const struct cipher_key keys[] = {{16, "a key of 16 byte"},
                                         {32, "a key of 32 bytes, twice as long"}};

static const struct cipher_key *key_of(uint8_t options)
{
    return options & WITH_KEY ? &keys[(options & WITH_256_BITS) != 0] : NULL;
}

static struct blob_keys keys_of(uint8_t options)
{
    const struct cipher_key *other = &keys[(options & WITH_256_BITS) == 0];

    return (struct blob_keys){key_of(options), options & WITH_MIGRATION_KEY ? other : NULL};
}

/* Unwrap a copy of exactly that size, so that a read past its end is seen. */
static int decode(const uint8_t *blob, size_t n_blob, uint8_t options, uint8_t *state,
                  size_t *n_state, struct blob_content *content)
{
    uint8_t *copy = malloc(n_blob);

    check(copy || n_blob == 0);
    if (n_blob > 0)
        memcpy(copy, blob, n_blob);
    struct blob_keys with = keys_of(options);
    int r = blob_decode(copy, n_blob, options & SAID_TO_BE_ENCRYPTED, &with, content);
    check(r >= 0);
    if (r > 0) {
        check(!content->state && content->state_bytes == 0 && !content->has_lineage);
        check(blob_result(r) > 0 && blob_reason(r));
    } else if (content->state_bytes > 0) {
        const uint8_t *all = content->decrypted ? content->decrypted : copy;
        size_t n_all = content->decrypted ? content->decrypted_bytes : n_blob;
        check(n_all <= n_blob && content->state >= all);
        check(content->state_bytes <= n_all - (size_t)(content->state - all));
        memcpy(state, content->state, content->state_bytes);
    }
    *n_state = content->state_bytes;
    struct blob_content ended = *content; /* the caller looks at the lineage still */
    blob_content_deinit(&ended);
    check(!ended.state && !ended.has_lineage);
    free(copy);
    return r;
}

static void fuzz_decode(const uint8_t *data, size_t n_data, uint8_t options)
{
    static uint8_t blob[BLOB_BYTES_MAX], state[BLOB_BYTES_MAX];
    struct blob_content content;
    size_t n_state;

    decode(data, n_data, options, state, &n_state, &content);
    if (n_data < SWTPM_HEADER_BYTES)
        return;
    memcpy(blob, data, n_data);
    put_be32(blob + SWTPM_AT_TOTAL_BYTES, (uint32_t)n_data);
    decode(blob, n_data, options, state, &n_state, &content);
}

static size_t put_tlv(uint8_t *out, uint16_t tag, const uint8_t *bytes, size_t n_bytes)
{
    put_be16(out, tag);
    put_be32(out + 2, (uint32_t)n_bytes);
    if (n_bytes > 0)
        memcpy(out + 6, bytes, n_bytes);
    return 6 + n_bytes;
}

/* Decrypt apart from the code under test. Returns the state's length, or -1 if it is not right. */
static int decrypt(const struct cipher_key *key, const uint8_t *bytes, size_t n_bytes, size_t n_iv,
                   uint8_t *out)
{
    int n = 0;

    if (n_bytes == 0 || n_bytes % key->n_bytes != 0 || (n_iv != 16 && n_iv != key->n_bytes))
        return -1;
    EVP_CIPHER_CTX *context = EVP_CIPHER_CTX_new();
    check(EVP_DecryptInit_ex(context, key->n_bytes == 16 ? EVP_aes_128_cbc() : EVP_aes_256_cbc(),
                             NULL, key->bytes, bytes + n_bytes) == 1);
    EVP_CIPHER_CTX_set_padding(context, 0);
    check(EVP_DecryptUpdate(context, out, &n, bytes, (int)n_bytes) == 1);
    EVP_CIPHER_CTX_free(context);
    size_t padding = out[n_bytes - 1];
    if (padding < 1 || padding > key->n_bytes)
        return -1;
    for (size_t i = 1; i <= padding; i++)
        if (out[n_bytes - i] != padding)
            return -1;
    return (int)(n_bytes - padding);
}

static void fuzz_authentic(const uint8_t *data, size_t n_data, uint8_t options)
{
    static uint8_t blob[BLOB_BYTES_MAX + 128], state[BLOB_BYTES_MAX], expected[BLOB_BYTES_MAX];
    const struct cipher_key *key = key_of(options |= WITH_KEY);
    struct blob_content content;
    uint8_t mac[32];
    size_t n_state;

    if (n_data < 2)
        return;
    size_t n = get_be16(data) < n_data - 2 ? get_be16(data) : n_data - 2;
    data += 2, n_data -= 2;
    HMAC(EVP_sha256(), key->bytes, (int)key->n_bytes, data, n_data, mac, NULL);
    uint8_t *out = blob + 16;
    out += put_tlv(out, 2, data, n);
    out += put_tlv(out, 3, mac, sizeof(mac));
    out += put_tlv(out, 6, data + n, n_data - n);
    size_t n_blob = (size_t)(out - blob);
    memcpy(blob, (const uint8_t[]){2, 1, 0, 10, 0, key->n_bytes == 16 ? 5 : 13}, 6);
    put_be32(blob + 6, (uint32_t)n_blob);
    put_be16(blob + 10, 4);
    put_be32(blob + 12, (uint32_t)(n_blob - 16));
    int length = decrypt(key, data, n, n_data - n, expected);
    int r = decode(blob, n_blob, options, state, &n_state, &content);
    check(r == (length < 0 ? BLOB_DOES_NOT_OPEN : 0));
    check(length < 0 || (n_state == (size_t)length && memcmp(state, expected, n_state) == 0));
}

static size_t encode(const uint8_t *state, size_t n_state, uint8_t options,
                     const struct checkpoint_lineage *lineage, uint8_t *out)
{
    struct swtpm_wrapped wrapped;
    struct blob_keys with = keys_of(options);
    struct iovec pieces[SWTPM_PIECES];
    size_t n = 0;

    check(swtpm_wrap(SWTPM_BLOB, with.file, state, n_state, lineage, &wrapped) == 0);
    check(!with.migration || swtpm_seal_blob(&wrapped, with.migration) == 0);
    swtpm_wrapped_pieces(&wrapped, pieces);
    for (size_t i = 0; i < SWTPM_PIECES; i++) {
        if (pieces[i].iov_len > 0)
            memcpy(out + n, pieces[i].iov_base, pieces[i].iov_len);
        n += pieces[i].iov_len;
    }
    swtpm_wrapped_deinit(&wrapped);
    return n;
}

static void fuzz_encode(const uint8_t *data, size_t n_data, uint8_t options)
{
    static uint8_t blob[BLOB_BYTES_MAX + 256], state[BLOB_BYTES_MAX + 256];
    static const struct checkpoint_lineage lineage = {"an identity of 1", 9, false};
    bool has_lineage = options & WITH_LINEAGE;
    struct blob_content content;
    size_t n_state;

    if (n_data < 2)
        return;
    size_t place = get_be16(data);
    data += 2, n_data -= 2;
    options &= (uint8_t)~SAID_TO_BE_ENCRYPTED;
    size_t n_blob = encode(data, n_data, options, has_lineage ? &lineage : NULL, blob);
    check(decode(blob, n_blob, options, state, &n_state, &content) == 0);
    check(n_state == n_data && memcmp(state, data, n_data) == 0);
    check(content.has_lineage == has_lineage);
    check(!has_lineage || (memcmp(content.lineage.identity, lineage.identity, 16) == 0 &&
                           content.lineage.generation == lineage.generation));
    size_t kept = place % n_blob;
    check(kept == 0 || decode(blob, kept, options, state, &n_state, &content) > 0);
    blob[place / 8 % n_blob] ^= (uint8_t)(1 << place % 8);
    if (options & (WITH_KEY | WITH_MIGRATION_KEY) &&
        decode(blob, n_blob, options | (options & WITH_KEY ? SAID_TO_BE_ENCRYPTED : 0), state,
               &n_state, &content) == 0)
        check(n_state == n_data && memcmp(state, data, n_data) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_data)
{
    if (n_data < 2 || n_data > BLOB_BYTES_MAX)
        return 0;
    if (data[0] == 'd')
        fuzz_decode(data + 2, n_data - 2, data[1]);
    else if (data[0] == 'm')
        fuzz_authentic(data + 2, n_data - 2, data[1]);
    else if (data[0] == 'e')
        fuzz_encode(data + 2, n_data - 2, data[1]);
    return 0;
}
