#include "delta.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "bytes.h"
#include "check.h"
#include "crc32c.h"

/* The header. */
enum {
    AT_VERSION = 4,
    AT_TYPE = 5,
    AT_HEADER_BYTES = 6,
    AT_COMPATIBLE = 8,
    AT_INCOMPATIBLE = 10,
    AT_BASE_BYTES = 12,
    AT_FROM = 16,
    AT_TO = 24,
    AT_RESULT_BYTES = 32,
    AT_OPERATIONS_BYTES = 36,
    AT_BASE_DIGEST = 40,
    AT_RESULT_DIGEST = 72,
    AT_TIME = 104,
};

/* Decoding. */

static bool is_dated(const struct delta_header *header)
{
    return header->compatible_flags & DELTA_DATED;
}

static bool is_time(uint64_t ms)
{
    return ms > 0 && ms <= DELTA_TIME_MS_MAX;
}

static bool is_within_limits(const struct delta_header *header)
{
    return (!is_dated(header) || is_time(header->time_ms)) && header->type >= IMAGE_TYPE_MIN &&
           header->type <= IMAGE_TYPE_MAX && header->from_generation < header->to_generation &&
           header->to_generation <= GENERATION_MAX &&
           (header->from_generation > 0 || header->base_bytes == 0) &&
           header->base_bytes <= IMAGE_BYTES_MAX && header->result_bytes <= IMAGE_BYTES_MAX &&
           header->operations_bytes <= header->result_bytes + DELTA_OPERATIONS_EXCESS_MAX;
}

static void read_header(const uint8_t *record, struct delta_header *header)
{
    header->type = record[AT_TYPE];
    header->header_bytes = get_be16(record + AT_HEADER_BYTES);
    header->compatible_flags = get_be16(record + AT_COMPATIBLE);
    header->incompatible_flags = get_be16(record + AT_INCOMPATIBLE);
    header->base_bytes = get_be32(record + AT_BASE_BYTES);
    header->from_generation = get_be64(record + AT_FROM);
    header->to_generation = get_be64(record + AT_TO);
    header->result_bytes = get_be32(record + AT_RESULT_BYTES);
    header->operations_bytes = get_be32(record + AT_OPERATIONS_BYTES);
    header->time_ms = 0;
    memcpy(header->base_digest, record + AT_BASE_DIGEST, DIGEST_BYTES);
    memcpy(header->result_digest, record + AT_RESULT_DIGEST, DIGEST_BYTES);
}

static bool is_header_right(const struct delta_header *header)
{
    size_t least = is_dated(header) ? DELTA_DATED_HEADER_BYTES : DELTA_HEADER_BYTES;
    size_t most = header->compatible_flags ? DELTA_HEADER_BYTES_MAX : DELTA_HEADER_BYTES;

    return header->header_bytes >= least && header->header_bytes <= most;
}

static int inspect(unsigned version, const uint8_t *record, size_t record_bytes,
                   struct delta_header *header)
{
    if (record_bytes < DELTA_HEADER_BYTES)
        return DELTA_SHORT;
    if (get_be32(record) != DELTA_MAGIC)
        return DELTA_NO_RECORD;
    if (record[AT_VERSION] != version)
        return DELTA_VERSION_UNKNOWN;
    read_header(record, header);
    if (header->incompatible_flags != 0)
        return DELTA_FLAG_UNKNOWN;
    if (!is_header_right(header))
        return DELTA_HEADER_WRONG;
    if (record_bytes !=
        (uint64_t)header->header_bytes + header->operations_bytes + DELTA_CHECKSUM_BYTES)
        return DELTA_LENGTH_WRONG;
    if (is_dated(header))
        header->time_ms = get_be64(record + AT_TIME);
    size_t checked_bytes = record_bytes - DELTA_CHECKSUM_BYTES;
    if (crc32c(record, checked_bytes) != get_be32(record + checked_bytes))
        return DELTA_CHECKSUM_WRONG;
    return is_within_limits(header) ? 0 : DELTA_LIMIT_BROKEN;
}

int delta_inspect(const uint8_t *record, size_t record_bytes, struct delta_header *header)
{
    return inspect(DELTA_VERSION, record, record_bytes, header);
}

int delta_inspect_first(const uint8_t *record, size_t record_bytes, struct delta_header *header)
{
    return inspect(DELTA_VERSION_FIRST, record, record_bytes, header);
}

/* What is left to read of the operations. */
struct cursor {
    const uint8_t *bytes;
    size_t n_bytes;
};

static bool take_number(struct cursor *cursor, uint32_t *number)
{
    *number = 0;
    for (size_t i = 0; i < DELTA_NUMBER_BYTES_MAX && i < cursor->n_bytes; i++) {
        uint8_t byte = cursor->bytes[i];
        *number |= (uint32_t)(byte & 0x7f) << (7 * i);
        if (byte & 0x80)
            continue;
        cursor->bytes += i + 1;
        cursor->n_bytes -= i + 1;
        return byte != 0 || i == 0; /* a top group of zeros could be left out */
    }
    return false;
}

static int64_t distance_of(uint32_t number)
{
    return number & 1 ? -(int64_t)(number >> 1) - 1 : (int64_t)(number >> 1);
}

/* The state of an application; `expected` is where in the base an unchanged image would go on. */
struct application {
    const uint8_t *base;
    size_t base_bytes;
    uint8_t *result;
    size_t n_result, result_bytes;
    int64_t expected;
};

enum operation { OPERATION_NONE, OPERATION_COPY, OPERATION_INSERT };

static bool apply_insert(struct application *to, struct cursor *from, size_t length)
{
    if (length > from->n_bytes)
        return false;
    memcpy(to->result + to->n_result, from->bytes, length);
    from->bytes += length;
    from->n_bytes -= length;
    return true;
}

static bool apply_copy(struct application *to, struct cursor *from, size_t length,
                       enum operation previous)
{
    uint32_t number;

    if (!take_number(from, &number) || (number == 0 && previous == OPERATION_COPY))
        return false;
    int64_t offset = to->expected + distance_of(number);
    if (offset < 0 || length > to->base_bytes || (size_t)offset > to->base_bytes - length)
        return false;
    memcpy(to->result + to->n_result, to->base + offset, length);
    to->expected = offset;
    return true;
}

static bool apply_operations(struct application *to, struct cursor from)
{
    enum operation previous = OPERATION_NONE;

    while (from.n_bytes > 0) {
        uint32_t number;
        if (!take_number(&from, &number))
            return false;
        size_t length = number >> 1;
        enum operation operation = number & 1 ? OPERATION_INSERT : OPERATION_COPY;
        if (length == 0 || length > to->result_bytes - to->n_result)
            return false;
        if (operation == OPERATION_COPY
                ? !apply_copy(to, &from, length, previous)
                : previous == OPERATION_INSERT || !apply_insert(to, &from, length))
            return false;
        to->n_result += length;
        to->expected += (int64_t)length;
        previous = operation;
    }
    return to->n_result == to->result_bytes;
}

/* Have `image` know its digest, which is computed into `room` if it does not. Returns 0 or -ENOMEM.
 */
static int know_digest(struct delta_image *image, const struct delta_image *before,
                       struct image_digest *room)
{
    if (image->digest)
        return 0;
    image->digest = room;
    return image_digest_compute(image, before, room);
}

static int check_base(unsigned type, struct delta_image *base, const struct delta_header *header,
                      struct image_digest *room)
{
    if (header->type != type)
        return DELTA_OTHER_TYPE;
    if (header->from_generation != base->generation || header->base_bytes != base->n_bytes)
        return DELTA_OTHER_BASE;
    int r = know_digest(base, NULL, room);
    if (r < 0)
        return r;
    return memcmp(base->digest->whole, header->base_digest, DIGEST_BYTES) == 0 ? 0
                                                                               : DELTA_BASE_DIFFERS;
}

int delta_make(const struct delta_image *base, const uint8_t *record,
               const struct delta_header *header, uint8_t *result)
{
    struct cursor operations = {record + header->header_bytes, header->operations_bytes};
    struct application application = {
        .base = base->bytes,
        .base_bytes = base->n_bytes,
        .result = result,
        .result_bytes = header->result_bytes,
    };

    if (header->base_bytes != base->n_bytes)
        return DELTA_OTHER_BASE;
    return apply_operations(&application, operations) ? 0 : DELTA_OPERATION_WRONG;
}

static int make_result(const struct delta_image *base, const uint8_t *record,
                       const struct delta_header *header, uint8_t *result,
                       struct image_digest *digest)
{
    struct delta_image made = {.bytes = result, .n_bytes = header->result_bytes};

    int r = delta_make(base, record, header, result);
    if (r == 0)
        r = image_digest_compute(&made, base, digest);
    if (r != 0)
        return r;
    return memcmp(digest->whole, header->result_digest, DIGEST_BYTES) == 0 ? 0
                                                                           : DELTA_RESULT_DIFFERS;
}

int delta_apply(unsigned type, const struct delta_image *base, const uint8_t *record,
                size_t record_bytes, uint8_t *result, struct delta_header *header,
                struct image_digest *digest)
{
    struct image_digest base_digest;
    struct delta_image known = *base;

    check(base->n_bytes <= IMAGE_BYTES_MAX);
    int r = delta_inspect(record, record_bytes, header);
    if (r == 0)
        r = check_base(type, &known, header, &base_digest);
    if (r != 0)
        return r;
    r = make_result(&known, record, header, result, digest);
    if (r != 0)
        explicit_bzero(result, header->result_bytes);
    return r;
}

/* Encoding.
 *
 * What the images have in common at their ends is found by comparing from the ends; what is between
 * by comparing in place: where the image goes on as the base does after the last COPY. Once
 * IN_PLACE_INSERTS_MAX bytes were found nowhere, content has probably moved. Then the base's blocks
 * of BLOCK_BYTES are put into a table by their hash, and the image's bytes are looked up in it at
 * each offset.
 *
 * A guest chooses the content, so no content may make this slow: a table entry is one block, the
 * first with its hash. Each offset costs one look-up and one comparison of a block. Following a
 * match forwards is paid by the bytes that the encoder then skips, of two matches the longer one;
 * following it backwards ends at the last COPY.
 */

enum {
    IN_PLACE_INSERTS_MAX = 128,
    IN_PLACE_MATCH_BYTES_MIN = 4, /* a COPY in place and another INSERT cost three bytes */
    BLOCK_BYTES = 32,
    STRIDE_BYTES = 512, /* what the C library compares at once is compared four times as fast */
    TABLE_BITS = 14,    /* twice the blocks of the largest image */
    NO_BLOCK = 0,       /* numbers in the table begin at 1 */
};

_Static_assert(IMAGE_BYTES_MAX / BLOCK_BYTES * 2 == 1 << TABLE_BITS, "see TABLE_BITS");

/* A block of the base by its number, and what of its hash does not follow from the place. */
struct table_entry {
    uint16_t number;
    uint16_t rest;
};

struct encoder {
    const uint8_t *base, *next;
    size_t base_end, next_end; /* of what is to be compared */
    size_t base_start;
    struct table_entry *table; /* NULL until it is needed */
    size_t n_inserted;
    /* What was written, and what is to be written once it is known how long it is. */
    uint8_t *out;
    size_t n_out, out_bytes;
    bool full;
    size_t insert_start;
    size_t copy_offset, copy_bytes;
    size_t expected;
};

static void put_number(struct encoder *encoder, size_t number)
{
    check(number < 1U << (7 * DELTA_NUMBER_BYTES_MAX));
    do {
        encoder->full |= encoder->n_out == encoder->out_bytes;
        if (encoder->full)
            return;
        encoder->out[encoder->n_out++] = (uint8_t)(number | (number >= 0x80 ? 0x80 : 0));
        number >>= 7;
    } while (number > 0);
}

static void put_insert(struct encoder *encoder, size_t start, size_t end)
{
    size_t length = end - start;

    if (length == 0)
        return;
    put_number(encoder, length << 1 | 1);
    encoder->full |= length > encoder->out_bytes - encoder->n_out;
    if (encoder->full)
        return;
    memcpy(encoder->out + encoder->n_out, encoder->next + start, length);
    encoder->n_out += length;
    encoder->expected += length;
}

static void flush_copy(struct encoder *encoder)
{
    int64_t distance = (int64_t)encoder->copy_offset - (int64_t)encoder->expected;

    if (encoder->copy_bytes == 0)
        return;
    put_number(encoder, encoder->copy_bytes << 1);
    put_number(encoder, distance < 0 ? (size_t)(-distance * 2 - 1) : (size_t)distance * 2);
    encoder->expected = encoder->copy_offset + encoder->copy_bytes;
    encoder->copy_bytes = 0;
}

/* Say that next[start, start + length) is base[offset, offset + length). What was not said of the
 * image before `start` is inserted. A COPY that goes on where the last one ended makes it longer.
 */
static void add_copy(struct encoder *encoder, size_t start, size_t offset, size_t length)
{
    if (length == 0)
        return;
    if (start > encoder->insert_start || offset != encoder->copy_offset + encoder->copy_bytes) {
        flush_copy(encoder);
        put_insert(encoder, encoder->insert_start, start);
        encoder->copy_offset = offset;
    }
    encoder->copy_bytes += length;
    encoder->insert_start = start + length;
}

static size_t smaller(size_t a, size_t b)
{
    return a < b ? a : b;
}

static uint64_t get_word(const uint8_t *bytes)
{
    uint64_t word;

    memcpy(&word, bytes, sizeof(word));
    return word;
}

static size_t common_prefix(const uint8_t *a, const uint8_t *b, size_t n_bytes)
{
    size_t n = 0;

    while (n_bytes - n >= STRIDE_BYTES && memcmp(a + n, b + n, STRIDE_BYTES) == 0)
        n += STRIDE_BYTES;
    while (n_bytes - n >= 8 && get_word(a + n) == get_word(b + n))
        n += 8;
    while (n < n_bytes && a[n] == b[n])
        n++;
    return n;
}

/* `a` and `b` are ends, and `n_bytes` are before each of them. */
static size_t common_suffix(const uint8_t *a, const uint8_t *b, size_t n_bytes)
{
    size_t n = 0;

    while (n_bytes - n >= STRIDE_BYTES &&
           memcmp(a - n - STRIDE_BYTES, b - n - STRIDE_BYTES, STRIDE_BYTES) == 0)
        n += STRIDE_BYTES;
    while (n_bytes - n >= 8 && get_word(a - n - 8) == get_word(b - n - 8))
        n += 8;
    while (n < n_bytes && a[-1 - (ptrdiff_t)n] == b[-1 - (ptrdiff_t)n])
        n++;
    return n;
}

static uint64_t hash_block(const uint8_t *bytes)
{
    /* Odd constants with well mixed bits, one for each word, so that order counts. */
    uint64_t hash = get_word(bytes) * UINT64_C(0x9e3779b97f4a7c15);

    hash ^= get_word(bytes + 8) * UINT64_C(0xbf58476d1ce4e5b9);
    hash ^= get_word(bytes + 16) * UINT64_C(0x94d049bb133111eb);
    hash ^= get_word(bytes + 24) * UINT64_C(0xd6e8feb86659fd93);
    hash ^= hash >> 32; /* the top bits of a product depend on all bits below, not the reverse */
    return hash * UINT64_C(0x9e3779b97f4a7c15);
}

static int fill_table(struct encoder *encoder)
{
    size_t n_blocks = (encoder->base_end - encoder->base_start) / BLOCK_BYTES;

    encoder->table = calloc(1 << TABLE_BITS, sizeof(*encoder->table));
    if (!encoder->table)
        return -ENOMEM;
    for (size_t block = 0; block < n_blocks; block++) {
        const uint8_t *bytes = encoder->base + encoder->base_start + block * BLOCK_BYTES;
        uint64_t hash = hash_block(bytes);
        struct table_entry *entry = &encoder->table[hash >> (64 - TABLE_BITS)];
        if (entry->number == NO_BLOCK)
            *entry = (struct table_entry){(uint16_t)(block + 1), (uint16_t)hash};
    }
    return 0;
}

/* Where next[start, start + length) is in the base. */
struct match {
    size_t start, offset, length;
};

static struct match match_at(const struct encoder *encoder, size_t start, size_t offset)
{
    size_t n_bytes = smaller(encoder->next_end - start, encoder->base_end - offset);

    return (struct match){
        .start = start,
        .offset = offset,
        .length = common_prefix(encoder->next + start, encoder->base + offset, n_bytes),
    };
}

static struct match find_in_place(const struct encoder *encoder, size_t start)
{
    size_t offset = encoder->copy_offset + encoder->copy_bytes + (start - encoder->insert_start);

    if (offset >= encoder->base_end || encoder->base[offset] != encoder->next[start])
        return (struct match){0};
    struct match match = match_at(encoder, start, offset);
    return match.length >= IN_PLACE_MATCH_BYTES_MIN ? match : (struct match){0};
}

static struct match find_moved(const struct encoder *encoder, size_t start)
{
    const uint8_t *next = encoder->next + start;

    if (encoder->next_end - start < BLOCK_BYTES)
        return (struct match){0};
    uint64_t hash = hash_block(next);
    struct table_entry entry = encoder->table[hash >> (64 - TABLE_BITS)];
    if (entry.rest != (uint16_t)hash || entry.number == NO_BLOCK)
        return (struct match){0};
    size_t offset = encoder->base_start + (entry.number - 1U) * BLOCK_BYTES;
    struct match match = match_at(encoder, start, offset);
    if (match.length < BLOCK_BYTES)
        return (struct match){0};
    size_t before = smaller(start - encoder->insert_start, offset - encoder->base_start);
    size_t more = common_suffix(encoder->base + offset, next, before);
    return (struct match){start - more, offset - more, match.length + more};
}

static int find_copies(struct encoder *encoder)
{
    size_t start = encoder->insert_start;

    while (start < encoder->next_end) {
        struct match match = find_in_place(encoder, start);
        if (encoder->n_inserted >= IN_PLACE_INSERTS_MAX) {
            int r = encoder->table ? 0 : fill_table(encoder);
            if (r < 0)
                return r;
            struct match moved = find_moved(encoder, start);
            if (moved.length > match.length)
                match = moved;
        }
        if (match.length > 0) {
            add_copy(encoder, match.start, match.offset, match.length);
            start = match.start + match.length;
        } else {
            encoder->n_inserted++;
            start++;
        }
    }
    return 0;
}

struct delta_common delta_compare(const uint8_t *base, size_t base_bytes, const uint8_t *next,
                                  size_t next_bytes)
{
    size_t n_common = smaller(base_bytes, next_bytes);

    if (n_common == 0) /* one may be nothing, without an address */
        return (struct delta_common){0};
    size_t prefix = common_prefix(base, next, n_common);
    return (struct delta_common){
        .prefix = prefix,
        .suffix = common_suffix(base + base_bytes, next + next_bytes, n_common - prefix),
    };
}

static int encode_operations(struct encoder *encoder, struct delta_common common, size_t base_bytes,
                             size_t next_bytes)
{
    encoder->base_start = common.prefix;
    encoder->base_end = base_bytes - common.suffix;
    encoder->next_end = next_bytes - common.suffix;
    add_copy(encoder, 0, 0, common.prefix);
    int r = encoder->base_end > common.prefix ? find_copies(encoder) : 0;
    free(encoder->table);
    if (r < 0)
        return r;
    add_copy(encoder, encoder->next_end, encoder->base_end, common.suffix);
    flush_copy(encoder);
    put_insert(encoder, encoder->insert_start, next_bytes);
    return 0;
}

static void put_whole_image(struct encoder *encoder, size_t next_bytes)
{
    encoder->full = false;
    encoder->n_out = 0;
    put_insert(encoder, 0, next_bytes);
    check(!encoder->full);
}

static void write_header(uint8_t *record, const struct delta_header *header)
{
    put_be32(record, DELTA_MAGIC);
    record[AT_VERSION] = DELTA_VERSION;
    record[AT_TYPE] = header->type;
    put_be16(record + AT_HEADER_BYTES, header->header_bytes);
    put_be16(record + AT_COMPATIBLE, header->compatible_flags);
    put_be16(record + AT_INCOMPATIBLE, header->incompatible_flags);
    put_be32(record + AT_BASE_BYTES, header->base_bytes);
    put_be64(record + AT_FROM, header->from_generation);
    put_be64(record + AT_TO, header->to_generation);
    put_be32(record + AT_RESULT_BYTES, header->result_bytes);
    put_be32(record + AT_OPERATIONS_BYTES, header->operations_bytes);
    memcpy(record + AT_BASE_DIGEST, header->base_digest, DIGEST_BYTES);
    memcpy(record + AT_RESULT_DIGEST, header->result_digest, DIGEST_BYTES);
    if (is_dated(header))
        put_be64(record + AT_TIME, header->time_ms);
}

static int describe(unsigned type, struct delta_image base, struct delta_image next,
                    struct delta_header *header)
{
    struct image_digest base_digest, next_digest;

    int r = know_digest(&base, NULL, &base_digest);
    if (r >= 0)
        r = know_digest(&next, &base, &next_digest);
    if (r < 0)
        return r;
    bool dated = is_time(next.time_ms);
    *header = (struct delta_header){
        .header_bytes = dated ? DELTA_DATED_HEADER_BYTES : DELTA_HEADER_BYTES,
        .compatible_flags = dated ? DELTA_DATED : 0,
        .time_ms = dated ? next.time_ms : 0,
        .type = (uint8_t)type,
        .from_generation = base.generation,
        .to_generation = next.generation,
        .base_bytes = (uint32_t)base.n_bytes,
        .result_bytes = (uint32_t)next.n_bytes,
    };
    memcpy(header->base_digest, base.digest->whole, DIGEST_BYTES);
    memcpy(header->result_digest, next.digest->whole, DIGEST_BYTES);
    return 0;
}

int delta_encode(unsigned type, const struct delta_image *base, const struct delta_image *next,
                 uint8_t *record, size_t *record_bytes)
{
    struct delta_header header;
    struct encoder encoder = {
        .base = base->bytes,
        .next = next->bytes,
        .out_bytes = next->n_bytes + DELTA_OPERATIONS_EXCESS_MAX,
    };

    int r = describe(type, *base, *next, &header);
    if (r < 0)
        return r;
    check(is_within_limits(&header));
    encoder.out = record + header.header_bytes;
    struct delta_common common =
        next->common ? *next->common
                     : delta_compare(base->bytes, base->n_bytes, next->bytes, next->n_bytes);
    r = encode_operations(&encoder, common, base->n_bytes, next->n_bytes);
    if (r < 0)
        return r;
    if (encoder.full)
        put_whole_image(&encoder, next->n_bytes);
    header.operations_bytes = (uint32_t)encoder.n_out;
    write_header(record, &header);
    size_t checked_bytes = header.header_bytes + encoder.n_out;
    put_be32(record + checked_bytes, crc32c(record, checked_bytes));
    *record_bytes = checked_bytes + DELTA_CHECKSUM_BYTES;
    return 0;
}
