/* State blobs: what is wrapped is unwrapped, what is altered is refused, and with which result.
 *
 * That Python and swtpm make and take the same blobs is for tests/property/test_codecs.py and
 * tests/unit/test_swtpm_format.py. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <libtpms/tpm_error.h>

#include "blob.h"
#include "bytes.h"
#include "pages.h"

static const uint8_t a_state[] = "a state as libtpms marshalled it";
static const struct cipher_key key_128 = {16, "a key of 16 byte"},
                               key_256 = {32, "a key of 32 bytes, twice as long"};
static const struct checkpoint_lineage a_lineage = {.identity = "an identity of 1",
                                                    .generation = 0x0102030405060708};

struct buffer {
    uint8_t bytes[512];
    size_t n_bytes;
};

static struct buffer wrap_with(struct blob_keys keys, const uint8_t *state, size_t state_bytes,
                               const struct checkpoint_lineage *lineage)
{
    cleanup(swtpm_wrapped_deinit) struct swtpm_wrapped wrapped;
    struct iovec pieces[SWTPM_PIECES];
    struct buffer blob = {.n_bytes = 0};

    assert_int_equal(swtpm_wrap(SWTPM_BLOB, keys.file, state, state_bytes, lineage, &wrapped), 0);
    if (keys.migration)
        assert_int_equal(swtpm_seal_blob(&wrapped, keys.migration), 0);
    swtpm_wrapped_pieces(&wrapped, pieces);
    for (size_t i = 0; i < SWTPM_PIECES; i++) {
        assert_true(pieces[i].iov_len <= sizeof(blob.bytes) - blob.n_bytes);
        if (pieces[i].iov_len > 0)
            memcpy(blob.bytes + blob.n_bytes, pieces[i].iov_base, pieces[i].iov_len);
        blob.n_bytes += pieces[i].iov_len;
    }
    return blob;
}

static struct buffer wrap(const struct cipher_key *key, const uint8_t *state, size_t state_bytes,
                          const struct checkpoint_lineage *lineage)
{
    return wrap_with((struct blob_keys){.file = key}, state, state_bytes, lineage);
}

/* Unwrap a copy of exactly that size, so that a read past its end is seen. What is not refused
 * holds `state`. Returns what blob_decode() does. */
static int unwrap_with(struct blob_keys keys, const struct buffer *blob, bool is_encrypted,
                       const uint8_t *state, size_t state_bytes, struct checkpoint_lineage *lineage)
{
    cleanup(blob_content_deinit) struct blob_content content;
    uint8_t *copy = blob->n_bytes > 0 ? malloc(blob->n_bytes) : NULL;

    if (copy)
        memcpy(copy, blob->bytes, blob->n_bytes);
    int r = blob_decode(copy, blob->n_bytes, is_encrypted, &keys, &content);
    if (r == 0) {
        assert_int_equal(content.state_bytes, state_bytes);
        if (state_bytes > 0)
            assert_memory_equal(content.state, state, state_bytes);
    } else {
        assert_null(content.state);
        assert_int_equal(content.state_bytes, 0);
        assert_false(content.has_lineage);
    }
    if (lineage && content.has_lineage)
        *lineage = content.lineage;
    free(copy);
    return r;
}

static int unwrap(const struct buffer *blob, bool is_encrypted, const struct cipher_key *key,
                  const uint8_t *state, size_t state_bytes, struct checkpoint_lineage *lineage)
{
    return unwrap_with((struct blob_keys){.file = key}, blob, is_encrypted, state, state_bytes,
                       lineage);
}

static void a_blob_is_laid_out_as_swtpm_does(void **state)
{
    const uint8_t expected[] = {2, 1, 0, 10, 0, 4, 0,   0,   0,  25, /* header */
                                0, 4, 0, 0,  0, 9,                   /* TLV MIGRATION_DATA */
                                0, 1, 0, 0,  0, 3, 'a', 'b', 'c'};
    struct buffer blob = wrap(NULL, (const uint8_t *)"abc", 3, NULL);

    (void)state;
    assert_int_equal(blob.n_bytes, sizeof(expected));
    assert_memory_equal(blob.bytes, expected, sizeof(expected));
    blob = wrap(&key_128, a_state, sizeof(a_state), NULL);
    assert_int_equal(get_be16(blob.bytes + SWTPM_AT_FLAGS), 0x05);
    blob = wrap(&key_256, a_state, sizeof(a_state), NULL);
    assert_int_equal(get_be16(blob.bytes + SWTPM_AT_FLAGS), 0x0d);
}

static void what_is_wrapped_is_unwrapped(void **state)
{
    const struct cipher_key *keys[] = {NULL, &key_128, &key_256};
    uint8_t bytes[70];

    (void)state;
    memset(bytes, 0x10, sizeof(bytes)); /* as padding is */
    for (size_t i = 0; i < 3; i++) {
        for (size_t n = 0; n <= sizeof(bytes); n++) {
            struct checkpoint_lineage lineage = {.generation = 7};
            struct buffer blob = wrap(keys[i], bytes, n, NULL);
            assert_int_equal(unwrap(&blob, false, keys[i], bytes, n, &lineage), 0);
            assert_int_equal(lineage.generation, 7);
            blob = wrap(keys[i], bytes, n, &a_lineage);
            assert_int_equal(unwrap(&blob, false, keys[i], bytes, n, &lineage), 0);
            assert_memory_equal(lineage.identity, a_lineage.identity, sizeof(lineage.identity));
            assert_int_equal(lineage.generation, a_lineage.generation);
            assert_false(lineage.sleeps);
            struct checkpoint_lineage asleep = a_lineage;
            asleep.sleeps = true;
            blob = wrap(keys[i], bytes, n, &asleep);
            assert_int_equal(unwrap(&blob, keys[i] != NULL, keys[i], bytes, n, &lineage), 0);
            assert_int_equal(lineage.generation, a_lineage.generation);
            assert_true(lineage.sleeps);
        }
    }
}

static const struct blob_keys sealing_keys[] = {
    {NULL, &key_128}, {NULL, &key_256}, {&key_128, &key_256}, {&key_256, &key_128}};
enum { N_SEALING_KEYS = sizeof(sealing_keys) / sizeof(*sealing_keys) };

static void what_is_sealed_for_the_way_is_unwrapped(void **state)
{
    struct checkpoint_lineage lineage = {.generation = 7};

    (void)state;
    for (size_t i = 0; i < N_SEALING_KEYS; i++) {
        const struct blob_keys *keys = &sealing_keys[i];
        uint16_t flags = (keys->file ? SWTPM_ENCRYPTED : 0) | SWTPM_MIGRATION_DATA |
                         SWTPM_MIGRATION_ENCRYPTED |
                         (keys->file == &key_256 ? SWTPM_ENCRYPTED_256_BIT_KEY : 0) |
                         (keys->migration == &key_256 ? SWTPM_MIGRATION_256_BIT_KEY : 0);
        struct buffer blob = wrap_with(*keys, a_state, sizeof(a_state), &a_lineage);
        assert_int_equal(get_be16(blob.bytes + SWTPM_AT_FLAGS), flags);
        assert_int_equal(unwrap_with(*keys, &blob, false, a_state, sizeof(a_state), &lineage), 0);
        assert_int_equal(lineage.generation, a_lineage.generation);
        struct blob_keys none = {keys->file, NULL};
        assert_int_equal(unwrap_with(none, &blob, false, NULL, 0, NULL), BLOB_MIGRATION_KEY_NEEDED);
        blob = wrap_with(*keys, NULL, 0, NULL);
        assert_int_equal(unwrap_with(*keys, &blob, false, NULL, 0, NULL), 0);
    }
}

static void no_altered_bit_of_a_sealed_blob_changes_the_state(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_SEALING_KEYS; i++) {
        const struct blob_keys *keys = &sealing_keys[i];
        const struct buffer blob = wrap_with(*keys, a_state, sizeof(a_state), NULL);
        for (size_t bit = 0; bit < 8 * blob.n_bytes; bit++) {
            struct buffer altered = blob;
            altered.bytes[bit / 8] ^= (uint8_t)(1 << bit % 8);
            int r =
                unwrap_with(*keys, &altered, keys->file != NULL, a_state, sizeof(a_state), NULL);
            assert_true(r >= 0);
            assert_true(r != 0 || bit / 8 < SWTPM_AT_TOTAL_BYTES); /* version, unknown flags */
        }
    }
}

static void no_altered_bit_of_an_encrypted_blob_changes_the_state(void **state)
{
    const struct cipher_key *keys[] = {&key_128, &key_256};

    (void)state;
    for (size_t i = 0; i < 2; i++) {
        const struct buffer blob = wrap(keys[i], a_state, sizeof(a_state), NULL);
        size_t n_taken = 0;
        for (size_t bit = 0; bit < 8 * blob.n_bytes; bit++) {
            struct buffer altered = blob;
            altered.bytes[bit / 8] ^= (uint8_t)(1 << bit % 8);
            int r = unwrap(&altered, true, keys[i], a_state, sizeof(a_state), NULL);
            assert_true(r >= 0);
            n_taken += r == 0;
            assert_true(r != 0 || bit / 8 < SWTPM_AT_TOTAL_BYTES); /* version, unknown flags */
        }
        assert_true(n_taken > 0);
    }
}

static void no_part_of_a_blob_is_one(void **state)
{
    const struct cipher_key *keys[] = {NULL, &key_128, &key_256};

    (void)state;
    for (size_t i = 0; i < 3; i++) {
        struct buffer blob = wrap(keys[i], a_state, sizeof(a_state), NULL);
        while (--blob.n_bytes > 0) {
            assert_true(unwrap(&blob, false, keys[i], NULL, 0, NULL) > 0);
            /* And with a length that is right. */
            struct buffer cut = blob;
            put_be32(cut.bytes + SWTPM_AT_TOTAL_BYTES, (uint32_t)cut.n_bytes);
            if (cut.n_bytes != SWTPM_HEADER_BYTES)
                assert_true(unwrap(&cut, false, keys[i], NULL, 0, NULL) > 0);
        }
    }
}

static void add(struct buffer *buffer, const void *bytes, size_t n_bytes)
{
    assert_true(n_bytes <= sizeof(buffer->bytes) - buffer->n_bytes);
    memcpy(buffer->bytes + buffer->n_bytes, bytes, n_bytes);
    buffer->n_bytes += n_bytes;
}

static struct buffer tlv(uint16_t tag, const void *bytes, size_t n_bytes)
{
    struct buffer out = {.n_bytes = 6};

    put_be16(out.bytes, tag);
    put_be32(out.bytes + 2, (uint32_t)n_bytes);
    add(&out, bytes, n_bytes);
    return out;
}

/* A blob of a tag with another tag inside, and one behind that. */
static struct buffer nested(uint16_t flags, uint16_t outer, uint16_t inner, size_t n_bytes,
                            uint16_t behind)
{
    static const uint8_t bytes[33];
    struct buffer content = tlv(inner, bytes, n_bytes), second = tlv(behind, bytes, 32), blob;

    add(&content, second.bytes, second.n_bytes);
    content = tlv(outer, content.bytes, content.n_bytes);
    blob = (struct buffer){{2, 1, 0, 10, 0, (uint8_t)flags}, SWTPM_HEADER_BYTES};
    add(&blob, content.bytes, content.n_bytes);
    put_be32(blob.bytes + SWTPM_AT_TOTAL_BYTES, (uint32_t)blob.n_bytes);
    return blob;
}

static struct buffer patched(size_t at, uint8_t byte)
{
    struct buffer blob = nested(4, 4, 1, 0, 3);

    blob.bytes[at] = byte;
    return blob;
}

static void refusals_have_the_results_of_swtpm(void **state)
{
    const struct {
        struct buffer blob;
        const struct cipher_key *key;
        bool is_encrypted; /* as the client says */
        int refusal;
        uint32_t result;
    } cases[] = {
        {{{2, 1, 0, 10}, 9}, NULL, false, BLOB_SHORT, TPM_BAD_PARAMETER},
        {patched(9, 0), NULL, false, BLOB_LENGTH_WRONG, TPM_BAD_PARAMETER},
        {patched(1, 3), NULL, false, BLOB_VERSION_UNKNOWN, TPM_BAD_VERSION},
        {patched(1, 255), NULL, false, BLOB_VERSION_UNKNOWN, TPM_BAD_VERSION},
        {patched(3, 12), NULL, false, BLOB_HEADER_WRONG, TPM_BAD_DATASIZE},
        {patched(13, 255), NULL, false, BLOB_TLV_CUT, TPM_FAIL},
        {patched(19, 255), NULL, false, BLOB_TLV_CUT, TPM_FAIL},
        {patched(11, 9), NULL, false, BLOB_TLV_MISSING, TPM_FAIL},
        {patched(17, 9), NULL, false, BLOB_TLV_MISSING, TPM_FAIL},
        {nested(6, 5, 1, 0, 3), NULL, false, BLOB_MIGRATION_KEY_NEEDED, TPM_KEYNOTFOUND},
        {nested(4, 5, 1, 0, 3), &key_128, false, BLOB_MIGRATION_KEY_NEEDED, TPM_KEYNOTFOUND},
        {nested(5, 4, 2, 16, 3), NULL, false, BLOB_FILE_KEY_NEEDED, TPM_KEYNOTFOUND},
        {nested(4, 4, 2, 16, 3), NULL, false, BLOB_FILE_KEY_NEEDED, TPM_KEYNOTFOUND},
        {nested(4, 4, 2, 16, 3), &key_128, false, BLOB_FILE_KEY_NEEDED, TPM_KEYNOTFOUND},
        {nested(4, 4, 1, 16, 3), NULL, true, BLOB_FILE_KEY_NEEDED, TPM_KEYNOTFOUND},
        {nested(5, 4, 2, 16, 3), &key_256, false, BLOB_KEY_LENGTH_WRONG, TPM_BAD_KEY_PROPERTY},
        {nested(13, 4, 2, 16, 3), &key_128, false, BLOB_KEY_LENGTH_WRONG, TPM_BAD_KEY_PROPERTY},
        {patched(0, 1), &key_128, true, BLOB_DOES_NOT_OPEN, TPM_DECRYPT_ERROR},
        {nested(5, 4, 3, 31, 2), &key_128, false, BLOB_HMAC_LENGTH_WRONG, TPM_FAIL},
        {nested(5, 4, 3, 33, 2), &key_128, false, BLOB_HMAC_LENGTH_WRONG, TPM_FAIL},
        {nested(5, 4, 2, 16, 6), &key_128, false, BLOB_TLV_MISSING, TPM_FAIL},
        {nested(5, 4, 3, 32, 2), &key_128, false, BLOB_TLV_MISSING, TPM_FAIL},
        {nested(5, 4, 3, 32, 6), &key_128, false, BLOB_TLV_MISSING, TPM_FAIL},
        {wrap(&key_128, a_state, sizeof(a_state), NULL),
         &(const struct cipher_key){16, "another key!"}, false, BLOB_DOES_NOT_OPEN,
         TPM_DECRYPT_ERROR},
    };

    (void)state;
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        int r = unwrap(&cases[i].blob, cases[i].is_encrypted, cases[i].key, NULL, 0, NULL);
        if (r != cases[i].refusal)
            print_error("case %zu\n", i);
        assert_int_equal(r, cases[i].refusal);
        assert_int_equal(blob_result(r), cases[i].result);
        assert_non_null(blob_reason(r));
    }
}

static void what_holds_no_state_is_taken_as_none(void **state)
{
    struct buffer blob = {{2, 1, 0, 10, 0, 4, 0, 0, 0, 10}, 10};

    (void)state;
    assert_int_equal(unwrap(&blob, false, NULL, NULL, 0, NULL), 0);
    blob.n_bytes = 0;
    assert_int_equal(unwrap(&blob, true, NULL, NULL, 0, NULL), 0);
}

static void what_swtpm_takes_is_taken(void **state)
{
    struct buffer blob = {{1, 1, 0, 10, 0, 0, 0, 0, 0, 13, 'a', 'b', 'c'}, 13};
    static const uint8_t zeros[3];

    (void)state;
    assert_int_equal(unwrap(&blob, false, NULL, (const uint8_t *)"abc", 3, NULL), 0);
    blob = nested(4, 4, 1, 3, 1);
    assert_int_equal(unwrap(&blob, false, &key_256, zeros, 3, NULL), 0); /* in the clear */
    blob.bytes[0] = 3;
    assert_int_equal(unwrap(&blob, false, NULL, zeros, 3, NULL), 0);
    blob = nested(0, 4, 9, 3, 1);
    static const uint8_t more[32];
    assert_int_equal(unwrap(&blob, false, NULL, more, 32, NULL), 0);
}

static void what_is_no_lineage_is_none(void **state)
{
    struct buffer blob = wrap(NULL, a_state, sizeof(a_state), &a_lineage);
    struct checkpoint_lineage lineage = {.generation = 7};

    (void)state;
    blob.bytes[22 + sizeof(a_state) + 1]++; /* its tag */
    assert_int_equal(unwrap(&blob, false, NULL, a_state, sizeof(a_state), &lineage), 0);
    blob.bytes[22 + sizeof(a_state) + 1]--;
    blob.bytes[22 + sizeof(a_state) + 5]++; /* its length */
    assert_int_equal(unwrap(&blob, false, NULL, a_state, sizeof(a_state), &lineage), 0);
    assert_int_equal(lineage.generation, 7);
}

static void a_generation_that_would_use_up_the_numbers_is_refused(void **state)
{
    const struct cipher_key *keys[] = {NULL, &key_128, &key_256};
    struct checkpoint_lineage lineage = {.generation = GENERATION_GIVEN_MAX};

    (void)state;
    for (size_t i = 0; i < 3; i++) {
        lineage.generation = GENERATION_GIVEN_MAX;
        struct buffer blob = wrap(keys[i], a_state, sizeof(a_state), &lineage);
        assert_int_equal(unwrap(&blob, false, keys[i], a_state, sizeof(a_state), &lineage), 0);
        lineage.generation++;
        blob = wrap(keys[i], a_state, sizeof(a_state), &lineage);
        int r = unwrap(&blob, false, keys[i], NULL, 0, &lineage);
        assert_int_equal(r, BLOB_GENERATION_WRONG);
        assert_int_equal(blob_result(r), TPM_BAD_PARAMETER);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_blob_is_laid_out_as_swtpm_does),
        cmocka_unit_test(what_is_wrapped_is_unwrapped),
        cmocka_unit_test(what_is_sealed_for_the_way_is_unwrapped),
        cmocka_unit_test(no_altered_bit_of_a_sealed_blob_changes_the_state),
        cmocka_unit_test(no_altered_bit_of_an_encrypted_blob_changes_the_state),
        cmocka_unit_test(no_part_of_a_blob_is_one),
        cmocka_unit_test(refusals_have_the_results_of_swtpm),
        cmocka_unit_test(what_holds_no_state_is_taken_as_none),
        cmocka_unit_test(what_swtpm_takes_is_taken),
        cmocka_unit_test(what_is_no_lineage_is_none),
        cmocka_unit_test(a_generation_that_would_use_up_the_numbers_is_refused),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
