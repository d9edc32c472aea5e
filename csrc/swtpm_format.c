#include "swtpm_format.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "bytes.h"
#include "check.h"

static void format_tlv(uint8_t *out, enum swtpm_tag tag, size_t n_bytes)
{
    check(n_bytes <= UINT32_MAX);
    put_be16(out + SWTPM_AT_TAG, tag);
    put_be32(out + SWTPM_AT_LENGTH, (uint32_t)n_bytes);
}

static void add_tlv(struct swtpm_wrapped *wrapped, enum swtpm_tag tag, const uint8_t *bytes,
                    size_t n_bytes)
{
    uint8_t *out = wrapped->after + wrapped->after_bytes;

    check(SWTPM_TLV_BYTES + n_bytes <= sizeof(wrapped->after) - wrapped->after_bytes);
    format_tlv(out, tag, n_bytes);
    if (n_bytes > 0)
        memcpy(out + SWTPM_TLV_BYTES, bytes, n_bytes);
    wrapped->after_bytes += SWTPM_TLV_BYTES + n_bytes;
}

static void add_lineage(struct swtpm_wrapped *wrapped, const struct checkpoint_lineage *lineage)
{
    uint8_t bytes[SWTPM_LINEAGE_BYTES];

    memcpy(bytes + SWTPM_AT_IDENTITY, lineage->identity, sizeof(lineage->identity));
    put_be64(bytes + SWTPM_AT_GENERATION, lineage->generation);
    add_tlv(wrapped, SWTPM_TAG_LINEAGE, bytes, sizeof(bytes));
    if (lineage->sleeps)
        add_tlv(wrapped, SWTPM_TAG_SLEEPS, NULL, 0);
}

/* Have what is encrypted be the first TLV's data, and the first of what follows it. */
static void take_sealed(struct swtpm_wrapped *wrapped, const struct cipher_key *key,
                        enum swtpm_tag iv_tag)
{
    const struct cipher_output *sealed = &wrapped->sealed;

    wrapped->data = sealed->ciphertext;
    wrapped->data_bytes = sealed->n_bytes;
    wrapped->after_bytes = 0;
    add_tlv(wrapped, SWTPM_TAG_HMAC, sealed->mac, sizeof(sealed->mac));
    add_tlv(wrapped, iv_tag, sealed->iv, key->n_bytes);
}

static int seal(struct swtpm_wrapped *wrapped, const struct cipher_key *key)
{
    int r = cipher_encrypt(key, wrapped->data, wrapped->data_bytes, &wrapped->sealed);
    if (r == 0)
        take_sealed(wrapped, key, SWTPM_TAG_IV);
    return r;
}

static size_t total_bytes(const struct swtpm_wrapped *wrapped)
{
    size_t n_bytes = wrapped->before_bytes + wrapped->data_bytes + wrapped->after_bytes;

    check(n_bytes <= UINT32_MAX);
    return n_bytes;
}

/* After all else, as it has the lengths. Those of the TLVs before the lineage are `content_bytes`.
 */
static void format_before(struct swtpm_wrapped *wrapped, uint16_t flags, uint8_t minimum_version,
                          size_t content_bytes)
{
    uint8_t *header = wrapped->before, *out = header + SWTPM_HEADER_BYTES;
    bool is_blob = flags & SWTPM_MIGRATION_DATA;

    wrapped->before_bytes = SWTPM_HEADER_BYTES + (is_blob ? 2 : 1) * SWTPM_TLV_BYTES;
    header[SWTPM_AT_VERSION] = SWTPM_VERSION;
    header[SWTPM_AT_MINIMUM_VERSION] = minimum_version;
    put_be16(header + SWTPM_AT_HEADER_BYTES, SWTPM_HEADER_BYTES);
    put_be16(header + SWTPM_AT_FLAGS, flags);
    put_be32(header + SWTPM_AT_TOTAL_BYTES, (uint32_t)total_bytes(wrapped));
    if (is_blob) {
        format_tlv(out, SWTPM_TAG_MIGRATION_DATA, content_bytes);
        out += SWTPM_TLV_BYTES;
    }
    format_tlv(out, flags & SWTPM_ENCRYPTED ? SWTPM_TAG_ENCRYPTED_DATA : SWTPM_TAG_DATA,
               wrapped->data_bytes);
}

int swtpm_wrap(enum swtpm_kind kind, const struct cipher_key *key, const uint8_t *state,
               size_t state_bytes, const struct checkpoint_lineage *lineage,
               struct swtpm_wrapped *wrapped)
{
    bool continued = lineage && lineage->continued;
    uint16_t flags = kind == SWTPM_BLOB ? SWTPM_MIGRATION_DATA : 0;

    check(kind == SWTPM_FILE ? !(lineage && lineage->sleeps) : !continued);
    *wrapped = (struct swtpm_wrapped){.data = state, .data_bytes = state_bytes};
    if (key) {
        int r = seal(wrapped, key);
        if (r < 0)
            return r;
        flags |= SWTPM_ENCRYPTED | (key->n_bytes == 32 ? SWTPM_ENCRYPTED_256_BIT_KEY : 0);
    }
    size_t content_bytes = SWTPM_TLV_BYTES + wrapped->data_bytes + wrapped->after_bytes;
    if (lineage)
        add_lineage(wrapped, lineage);
    format_before(wrapped, flags,
                  continued ? SWTPM_MINIMUM_VERSION_CONTINUED : SWTPM_MINIMUM_VERSION,
                  content_bytes);
    return 0;
}

/* The content's bytes, one after the other, which are as many as MIGRATION_DATA says. */
static void join_content(const struct swtpm_wrapped *wrapped, uint8_t *out, size_t content_bytes)
{
    const uint8_t *content_tlv = wrapped->before + SWTPM_HEADER_BYTES + SWTPM_TLV_BYTES;

    memcpy(out, content_tlv, SWTPM_TLV_BYTES);
    if (wrapped->data_bytes > 0)
        memcpy(out + SWTPM_TLV_BYTES, wrapped->data, wrapped->data_bytes);
    size_t n_bytes = SWTPM_TLV_BYTES + wrapped->data_bytes;
    memcpy(out + n_bytes, wrapped->after, content_bytes - n_bytes);
}

static int encrypt_content(const struct swtpm_wrapped *wrapped, const struct cipher_key *key,
                           size_t content_bytes, struct cipher_output *sealed)
{
    uint8_t *content = malloc(content_bytes);

    if (!content)
        return -ENOMEM;
    join_content(wrapped, content, content_bytes);
    int r = cipher_encrypt(key, content, content_bytes, sealed);
    explicit_bzero(content, content_bytes);
    free(content);
    if (r < 0)
        cipher_output_deinit(sealed);
    return r;
}

int swtpm_seal_blob(struct swtpm_wrapped *wrapped, const struct cipher_key *migration_key)
{
    uint8_t *header = wrapped->before, *tlv = header + SWTPM_HEADER_BYTES;
    uint8_t lineage[SWTPM_AFTER_BYTES_MAX];
    struct cipher_output sealed;

    check(get_be16(tlv + SWTPM_AT_TAG) == SWTPM_TAG_MIGRATION_DATA);
    size_t content_bytes = get_be32(tlv + SWTPM_AT_LENGTH);
    size_t lineage_bytes =
        SWTPM_TLV_BYTES + wrapped->data_bytes + wrapped->after_bytes - content_bytes;
    memcpy(lineage, wrapped->after + wrapped->after_bytes - lineage_bytes, lineage_bytes);
    int r = encrypt_content(wrapped, migration_key, content_bytes, &sealed);
    if (r < 0)
        return r;
    cipher_output_deinit(&wrapped->sealed);
    wrapped->sealed = sealed;
    take_sealed(wrapped, migration_key, SWTPM_TAG_MIGRATION_IV);
    check(lineage_bytes <= sizeof(wrapped->after) - wrapped->after_bytes);
    memcpy(wrapped->after + wrapped->after_bytes, lineage, lineage_bytes);
    wrapped->after_bytes += lineage_bytes;
    wrapped->before_bytes = SWTPM_HEADER_BYTES + SWTPM_TLV_BYTES;
    uint16_t flags = get_be16(header + SWTPM_AT_FLAGS) | SWTPM_MIGRATION_ENCRYPTED;
    flags |= migration_key->n_bytes == 32 ? SWTPM_MIGRATION_256_BIT_KEY : 0;
    put_be16(header + SWTPM_AT_FLAGS, flags);
    format_tlv(tlv, SWTPM_TAG_ENCRYPTED_MIGRATION_DATA, wrapped->data_bytes);
    put_be32(header + SWTPM_AT_TOTAL_BYTES, (uint32_t)total_bytes(wrapped));
    return 0;
}

void swtpm_wrapped_deinit(struct swtpm_wrapped *wrapped)
{
    cipher_output_deinit(&wrapped->sealed);
}

void swtpm_wrapped_pieces(struct swtpm_wrapped *wrapped, struct iovec pieces[SWTPM_PIECES])
{
    pieces[0] = (struct iovec){wrapped->before, wrapped->before_bytes};
    pieces[1] = (struct iovec){(void *)wrapped->data, wrapped->data_bytes};
    pieces[2] = (struct iovec){wrapped->after, wrapped->after_bytes};
}
