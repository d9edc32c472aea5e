/* Fuzz the delta record, both directions.
 *
 *   build/sanitize/fuzz_delta -max_total_time=60 tests/fuzz/corpus/delta
 *
 * The first byte of an input says what the rest is. The oracle:
 *   - 'e', two images: apply(base, encode(base, next)) = next, the record is not larger than the
 *     whole image in one, and no bit of it can be flipped, and nothing cut off, unnoticed; with the
 *     checksum made right again, it makes either its own result or none,
 *   - 'o', operations: under a header that is right they are accepted exactly when a decoder
 *     written another way accepts them, and make the same bytes,
 *   - 'r', a record but for its checksum: what is accepted has the digest that the record says.
 */
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "bytes.h"
#include "check.h"
#include "crc32c.h"
#include "delta.h"

enum {
    TYPE = 2,
    NEXT_BYTES_MAX = 1 << 14,
    ALTERATIONS_MAX = 16,
    CLEARED_BYTES = 1 << 12, /* of a result, to see that nothing is left there */
};

static uint8_t record[DELTA_RECORD_BYTES_MAX], altered[DELTA_RECORD_BYTES_MAX];
static uint8_t next_bytes[IMAGE_BYTES_MAX], result[IMAGE_BYTES_MAX];

static void put_checksum(uint8_t *bytes, size_t n_bytes)
{
    size_t checked = n_bytes - DELTA_CHECKSUM_BYTES;

    put_be32(bytes + checked, crc32c(bytes, checked));
}

static void check_is_empty(void)
{
    for (size_t i = 0; i < CLEARED_BYTES; i++)
        check(result[i] == 0);
}

/* Apply a record. What is accepted has the digest that it says. */
static int apply(const struct delta_image *base, const uint8_t *bytes, size_t n_bytes)
{
    struct image_digest told, digest;
    struct delta_header header;

    memset(result, 0, CLEARED_BYTES);
    /* A copy of that size, so that a read past its end is seen. */
    uint8_t *copy = malloc(n_bytes);
    check(copy || n_bytes == 0);
    if (n_bytes > 0)
        memcpy(copy, bytes, n_bytes);
    int r = delta_apply(TYPE, base, copy, n_bytes, result, &header, &told);
    free(copy);
    check(r >= 0);
    if (r != 0) {
        check_is_empty();
        return r;
    }
    check(header.type == TYPE && header.from_generation == base->generation);
    check(
        image_digest_compute(&(struct delta_image){.bytes = result, .n_bytes = header.result_bytes},
                             NULL, &digest) == 0);
    check(memcmp(digest.whole, header.result_digest, DIGEST_BYTES) == 0);
    check(memcmp(&digest, &told, sizeof(told)) == 0);
    return 0;
}

/* Make `next` from a script: pieces of the base, bytes of the script, runs of one byte. */
static size_t make_next(const struct delta_image *base, const uint8_t *script, size_t n_script)
{
    size_t n_next = 0;

    while (n_script >= 4) {
        size_t offset = get_be16(script), length = script[2] + 1U, kind = script[3] % 3;
        script += 4, n_script -= 4;
        const uint8_t *from = script;
        if (kind == 0) {
            offset = offset < base->n_bytes ? offset : 0;
            from = base->bytes + offset;
            length = length * 16 < base->n_bytes - offset ? length * 16 : base->n_bytes - offset;
        } else if (kind == 1) {
            length = length < n_script ? length : n_script;
            script += length, n_script -= length;
        }
        if (length > NEXT_BYTES_MAX - n_next)
            break;
        if (kind == 2)
            memset(next_bytes + n_next, (int)offset, length);
        else
            memcpy(next_bytes + n_next, from, length);
        n_next += length;
    }
    return n_next;
}

static void check_alteration(const struct delta_image *base, const struct delta_image *next,
                             size_t record_bytes, size_t bit)
{
    memcpy(altered, record, record_bytes);
    altered[bit / 8] ^= (uint8_t)(1 << bit % 8);
    check(apply(base, altered, record_bytes) > 0);
    put_checksum(altered, record_bytes);
    if (apply(base, altered, record_bytes) == 0)
        check(memcmp(result, next->bytes, next->n_bytes) == 0);
}

static void fuzz_encode(const uint8_t *data, size_t n_data)
{
    if (n_data < 4)
        return;
    size_t n_base = get_be16(data) < n_data - 4 ? get_be16(data) : n_data - 4;
    uint32_t step = get_be16(data + 2) | 1;
    struct delta_image base = {data + 4, n_base, n_base > 0, NULL};
    struct delta_image next = {next_bytes, 0, 7, .time_ms = step % 3 ? 0 : step};
    size_t record_bytes;

    next.n_bytes = make_next(&base, data + 4 + n_base, n_data - 4 - n_base);
    check(delta_encode(TYPE, &base, &next, record, &record_bytes) == 0);
    check(record_bytes <= (next.time_ms ? DELTA_DATED_HEADER_BYTES : DELTA_HEADER_BYTES) +
                              next.n_bytes + DELTA_OPERATIONS_EXCESS_MAX + DELTA_CHECKSUM_BYTES);
    check(apply(&base, record, record_bytes) == 0);
    check(memcmp(result, next.bytes, next.n_bytes) == 0);
    for (size_t i = 0; i < ALTERATIONS_MAX; i++) {
        check_alteration(&base, &next, record_bytes, i * step % (record_bytes * 8));
        check(apply(&base, record, i * step % record_bytes) > 0);
    }
}

/* A decoder written another way: it makes what it can of operations that only break rules 6 and 7,
 * so that a decoder that forgets such a rule finds nothing else that is wrong. */
static bool decode_number(const uint8_t **at, const uint8_t *end, uint64_t *number, bool *valid)
{
    uint64_t unit = 1, digits = 0;

    *number = 0;
    do {
        if (*at == end || digits++ == 9)
            return false;
        *number += **at % 128 * unit;
        unit *= 128;
    } while (*(*at)++ >= 128);
    *valid &= digits <= 3 && (digits == 1 || *number >= unit / 128);
    return true;
}

static bool decode(const struct delta_image *base, const uint8_t *at, size_t n_bytes,
                   size_t *n_next)
{
    const uint8_t *end = at + n_bytes;
    int64_t go_on = 0;
    bool valid = true;
    char last = 0;

    for (*n_next = 0; at != end;) {
        uint64_t head, distance = 0;
        if (!decode_number(&at, end, &head, &valid))
            return false;
        uint64_t length = head / 2;
        char kind = head % 2 ? 'i' : 'c';
        if (kind == 'c' && !decode_number(&at, end, &distance, &valid))
            return false;
        if (length == 0 || (kind == last && (kind == 'i' || distance == 0)))
            valid = false;
        int64_t offset =
            go_on + (distance % 2 ? -(int64_t)(distance / 2) - 1 : (int64_t)(distance / 2));
        int64_t room = kind == 'i' ? end - at : (int64_t)base->n_bytes - offset;
        if ((kind == 'c' && offset < 0) || room < 0 || length > (uint64_t)room)
            return false;
        if (length > IMAGE_BYTES_MAX - *n_next)
            return false;
        memcpy(next_bytes + *n_next, kind == 'i' ? at : base->bytes + offset, length);
        at += kind == 'i' ? length : 0;
        go_on = (kind == 'i' ? go_on : offset) + (int64_t)length;
        *n_next += length;
        last = kind;
    }
    return valid;
}

static size_t write_record(const struct delta_image *base, const uint8_t *operations,
                           size_t n_operations, size_t n_result)
{
    size_t record_bytes = DELTA_HEADER_BYTES + n_operations + DELTA_CHECKSUM_BYTES;
    struct image_digest digest;

    memset(record, 0, DELTA_HEADER_BYTES);
    put_be32(record, DELTA_MAGIC);
    record[4] = DELTA_VERSION;
    record[5] = TYPE;
    put_be16(record + 6, DELTA_HEADER_BYTES);
    put_be32(record + 12, (uint32_t)base->n_bytes);
    put_be64(record + 16, base->generation);
    put_be64(record + 24, base->generation + 1);
    put_be32(record + 32, (uint32_t)n_result);
    put_be32(record + 36, (uint32_t)n_operations);
    check(
        image_digest_compute(&(struct delta_image){.bytes = base->bytes, .n_bytes = base->n_bytes},
                             NULL, &digest) == 0);
    memcpy(record + 40, digest.whole, DIGEST_BYTES);
    check(image_digest_compute(&(struct delta_image){.bytes = next_bytes, .n_bytes = n_result},
                               NULL, &digest) == 0);
    memcpy(record + 72, digest.whole, DIGEST_BYTES);
    memcpy(record + DELTA_HEADER_BYTES, operations, n_operations);
    put_checksum(record, record_bytes);
    return record_bytes;
}

static void fuzz_operations(const uint8_t *data, size_t n_data)
{
    static uint8_t bytes[IMAGE_BYTES_MAX];
    size_t n_next = 0;

    if (n_data < 3)
        return;
    size_t n_base = get_be16(data) * 4U + 1U;
    for (size_t i = 0; i < n_base; i++)
        bytes[i] = (uint8_t)(i + i / 256);
    struct delta_image base = {bytes, n_base, 9, NULL};
    const uint8_t *operations = data + 2;
    size_t n_operations = n_data - 2;
    bool valid = decode(&base, operations, n_operations, &n_next);
    bool short_enough = n_operations <= n_next + DELTA_OPERATIONS_EXCESS_MAX;
    size_t record_bytes = write_record(&base, operations, n_operations, n_next);
    int r = apply(&base, record, record_bytes);
    check((r == 0) == (valid && short_enough));
    if (r == 0)
        check(memcmp(result, next_bytes, n_next) == 0);
}

static void fuzz_record(const uint8_t *data, size_t n_data)
{
    static const uint8_t bytes[] = "the image that the corpus has records for";
    struct delta_image base = {bytes, sizeof(bytes), 1, NULL};

    if (n_data > sizeof(altered) - DELTA_CHECKSUM_BYTES)
        return;
    apply(&base, data, n_data);
    memcpy(altered, data, n_data);
    put_checksum(altered, n_data + DELTA_CHECKSUM_BYTES);
    apply(&base, altered, n_data + DELTA_CHECKSUM_BYTES);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_data)
{
    if (n_data > DELTA_RECORD_BYTES_MAX / 2)
        return 0;
    if (n_data > 0 && data[0] == 'e')
        fuzz_encode(data + 1, n_data - 1);
    else if (n_data > 0 && data[0] == 'o')
        fuzz_operations(data + 1, n_data - 1);
    else if (n_data > 0 && data[0] == 'r')
        fuzz_record(data + 1, n_data - 1);
    return 0;
}
