/* The delta record: what turns an image of one generation into that of another.
 *
 * One format for the stream to a peer, for the disk and for what an inspector shows;
 * docs/delta-format.md is its description for other programs. A header, then operations, then a
 * checksum; numbers are big-endian:
 *
 *     Offset  Size  Field
 *     0       4     magic, "VTPD"
 *     4       1     version, 2
 *     5       1     image type: 1 permanent, 2 volatile, 3 savestate
 *     6       2     size of this header, 104, or 112 if it is dated
 *     8       2     compatible flags
 *     10      2     incompatible flags
 *     12      4     base length
 *     16      8     from-generation: the base's
 *     24      8     to-generation: the result's
 *     32      4     result length
 *     36      4     operations length
 *     40      32    digest of the base (image_digest.h)
 *     72      32    digest of the result
 *     104     8     if it is dated: when the result was made, in ms since 1970
 *     …       …     operations
 *     …       4     CRC-32C of everything before it
 *
 * An operation begins with a number, its length times two, plus one if it is an INSERT:
 *
 *     COPY    length × 2, distance    take `length` bytes of the base
 *     INSERT  length × 2 + 1, bytes   take the `length` bytes that follow
 *
 * A number is in groups of seven bits, the lowest first, with the top bit set in each byte but the
 * last. A distance says where in the base to copy from, counted from where an unchanged image would
 * go on: the end of the COPY before (0 if there is none) plus the length of the INSERT in between.
 * It is signed: 0, -1, 1, -2, … are the numbers 0, 1, 2, 3, …
 *
 * A record is valid if and only if
 *     1. it has the magic and the version, and no incompatible flag that the reader does not know,
 *     2. the header's size is DELTA_HEADER_BYTES, or up to DELTA_HEADER_BYTES_MAX if there are
 *        compatible flags, and at least DELTA_DATED_HEADER_BYTES if one of them is DELTA_DATED,
 *     3. the record is as long as header, operations and checksum together, and the checksum fits,
 *     4. the type is known, from-generation < to-generation <= GENERATION_MAX, and a base of
 *        generation 0 is empty,
 *     5. a time is from 1 to DELTA_TIME_MS_MAX, base and result are at most IMAGE_BYTES_MAX long,
 *        and the operations at most DELTA_OPERATIONS_EXCESS_MAX longer than the result,
 *     6. every number is in as few bytes as it can be, and in at most DELTA_NUMBER_BYTES_MAX,
 *     7. no operation has the length 0, no INSERT follows an INSERT, and no COPY with distance 0
 *        follows a COPY: they would be one operation,
 *     8. every COPY is inside the base, and the operations make as many bytes as the result has.
 *
 * It applies to an image if and only if that has its type, from-generation, base length and base
 * digest; and the outcome is the result if and only if that has its digest.
 *
 * Digests are not cut. A record is small enough with them (an NV_Write of 8 bytes makes one of
 * 125), and the digest that a session reports for an image is then the one that its records carry.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "image_digest.h"
#include "pages.h"

enum {
    DELTA_VERSION = 2,
    DELTA_VERSION_FIRST = 1, /* its digests are the SHA-256 of whole images; journals have it */
    DELTA_HEADER_BYTES = 104,
    DELTA_DATED_HEADER_BYTES = 112,
    DELTA_HEADER_BYTES_MAX = 512, /* room for what later versions add compatibly */
    DELTA_CHECKSUM_BYTES = 4,
    DELTA_NUMBER_BYTES_MAX = 3,      /* twice the length of two images still fits */
    DELTA_OPERATIONS_EXCESS_MAX = 3, /* the largest image in one INSERT */
    DELTA_RECORD_BYTES_MAX = DELTA_HEADER_BYTES_MAX + IMAGE_BYTES_MAX +
                             DELTA_OPERATIONS_EXCESS_MAX + DELTA_CHECKSUM_BYTES,
};

#define DELTA_MAGIC 0x56545044U
#define DELTA_TIME_MS_MAX UINT64_C(253402300799999) /* the end of the year 9999 */

/* The compatible flags. */
enum {
    DELTA_DATED = 1, /* the header has a time */
};

/* Why a record was refused. */
enum delta_refusal {
    DELTA_SHORT = 1,     /* it ends before its header does */
    DELTA_NO_RECORD = 2, /* the magic is another */
    DELTA_VERSION_UNKNOWN = 3,
    DELTA_FLAG_UNKNOWN = 4, /* an incompatible flag */
    DELTA_HEADER_WRONG = 5, /* rule 2 */
    DELTA_LENGTH_WRONG = 6,
    DELTA_CHECKSUM_WRONG = 7,
    DELTA_LIMIT_BROKEN = 8,     /* rules 4 and 5 */
    DELTA_OTHER_TYPE = 9,       /* it is for an image of another type, */
    DELTA_OTHER_BASE = 10,      /* generation or length, */
    DELTA_BASE_DIFFERS = 11,    /* or content */
    DELTA_OPERATION_WRONG = 12, /* rules 6 to 8 */
    DELTA_RESULT_DIFFERS = 13,  /* what it makes has another digest */
};

/* A record's header, as numbers. */
struct delta_header {
    uint16_t header_bytes;
    uint16_t compatible_flags;
    uint16_t incompatible_flags;
    uint8_t type;
    uint64_t from_generation;
    uint64_t to_generation;
    uint32_t base_bytes;
    uint32_t result_bytes;
    uint32_t operations_bytes;
    uint64_t time_ms; /* of a dated record, else 0 */
    uint8_t base_digest[DIGEST_BYTES];
    uint8_t result_digest[DIGEST_BYTES];
};

/* How many bytes two images have in common at their beginning, and how many after these at their
 * end. */
struct delta_common {
    size_t prefix, suffix;
};

/* An image that the caller has. `digest` may be NULL, and is then computed; a digest that is given
 * is taken as the image's. So is what it has in common with the image before it. A result may have
 * the time at which it was made, in milliseconds since 1970: 0 is none. */
struct delta_image {
    const uint8_t *bytes;
    size_t n_bytes;
    uint64_t generation;
    const struct image_digest *digest;
    const struct delta_common *common;
    uint64_t time_ms;
};

/* Find out what two images have in common. */
struct delta_common delta_compare(const uint8_t *base, size_t base_bytes, const uint8_t *next,
                                  size_t next_bytes);

/* Write the record that turns `base` into `next` to `record`, of DELTA_RECORD_BYTES_MAX bytes. The
 * images are within their limits and `next` is of a later generation. The record is dated if `next`
 * has a time up to DELTA_TIME_MS_MAX. An empty base of generation
 * 0 makes a record of the whole image. Takes time in proportion to the images, whatever is in them.
 * Returns 0 or -ENOMEM. */
int delta_encode(unsigned type, const struct delta_image *base, const struct delta_image *next,
                 uint8_t *record, size_t *record_bytes);

/* Check rules 1 to 5 and read the header. Returns 0 or an enum delta_refusal. */
int delta_inspect(const uint8_t *record, size_t record_bytes, struct delta_header *header);

/* The same, of a record of DELTA_VERSION_FIRST. */
int delta_inspect_first(const uint8_t *record, size_t record_bytes, struct delta_header *header);

/* Apply a record to `base`: into `result`, of as many bytes as the record says that it makes, or of
 * IMAGE_BYTES_MAX. Returns 0, and `*header` says what was made, of which `*digest` is the digest;
 * or an enum delta_refusal or -ENOMEM, and then nothing is in `result`. */
int delta_apply(unsigned type, const struct delta_image *base, const uint8_t *record,
                size_t record_bytes, uint8_t *result, struct delta_header *header,
                struct image_digest *digest);

/* The middle of delta_apply(), for a caller that applies many records in a row: `header` is what
 * delta_inspect() has read of the record, and that it is for this base, and makes what its digest
 * is of, is for the caller to check. Returns 0, DELTA_OTHER_BASE for a base of another length, or
 * DELTA_OPERATION_WRONG; what is in `result` is of no use then. */
int delta_make(const struct delta_image *base, const uint8_t *record,
               const struct delta_header *header, uint8_t *result);
