/* Fuzz the sealed tail: arbitrary bytes, and arbitrary content under a right seal.
 *
 *   build/sanitize/fuzz_tail -max_total_time=600 -close_fd_mask=2 tests/fuzz/corpus/tail
 *
 * (The mask is for libtpms, which says what it refuses, and that is all of it.)
 *
 * Input: a letter that says what the rest is
 *
 *   b    what QEMU brings
 *   c    u8 what has come before (enum rounds; the top bit: the checksums of the records are made
 *        right), the four generations of the header as u8, and the content, which is sealed by code
 *        apart from the tail's
 *
 * The oracle:
 *   - what is not sealed does not open, and says why as a decoder of its own does,
 *   - content opens if and only if that decoder takes it; sealed again it is the same bytes,
 *   - what the destination has then is what the records make of what was there, or of what was
 *     there before the last round, if both apply; else it is what it was, to the last byte.
 */
#include <libtpms/tpm_error.h>
#include <stdlib.h>
#include <string.h>

#include "bytes.h"
#include "check.h"
#include "crc32c.h"
#include "incoming.h"
#include "io_memory.h"
#include "lane.h"
#include "link_types.h"
#include "tail.h"
#include "tail_apart.h"
#include "tpm.h"

/* What has come: a bit for each record. */
enum rounds {
    FIRST_PERMANENT = 1,
    FIRST_VOLATILE = 2,
    SECOND_PERMANENT = 4,
    SECOND_VOLATILE = 8,
    CHECKSUMS = 0x80,
};

enum {
    HEADER_BYTES = 72,
    TAG_BYTES = 16,
    CONTENT_BYTES_MIN = 9,
    ROUNDS_AND_GENERATIONS_BYTES = 5,
    STATE_BYTES = 300,
    CHECKSUM_BYTES = 4,
    RECORD_BYTES_MIN = 108, /* a header and a checksum */
};

static const struct lane_keying keying = {
    .session = "a session of 16",
    .key = "a key of 32 bytes, which is sent",
    .uuid = "uuid of a guest",
    .lineage = "a lineage of 16",
};

static struct tpm *tpm;
static struct tail_cipher *cipher;

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    static struct io_memory io;

    (void)argc, (void)argv;
    io_memory_init(&io);
    tpm = tpm_new(&io.io);
    check(tail_cipher_new(&cipher, &keying) == 0);
    return 0;
}

/* Not derived from the code under test. */

static enum link_tail refusal_of(const uint8_t *bytes, size_t n_bytes)
{
    static const uint8_t begins[12] = "VTPMTAIL\0\3\0";

    if (n_bytes < HEADER_BYTES + CONTENT_BYTES_MIN + TAG_BYTES || n_bytes > 512 << 10)
        return LINK_TAIL_CUT;
    if (memcmp(bytes, begins, sizeof(begins)) != 0)
        return LINK_TAIL_FORMAT;
    return memcmp(bytes + 12, keying.session, 16) != 0 ? LINK_TAIL_OTHER_SESSION : LINK_TAIL_FORGED;
}

struct content {
    bool is_one;
    uint64_t from[2], to[2];
    const uint8_t *record[2];
    size_t record_bytes[2];
};

static struct content decode(const uint8_t *content, size_t n_content)
{
    struct content said = {0};
    size_t first_bytes, second_bytes;

    if (n_content < CONTENT_BYTES_MIN || content[0] > 2)
        return said;
    first_bytes = get_be32(content + 1);
    if (first_bytes > n_content - CONTENT_BYTES_MIN)
        return said;
    second_bytes = get_be32(content + 5 + first_bytes);
    said.is_one = second_bytes == n_content - CONTENT_BYTES_MIN - first_bytes;
    said.record[0] = content + 5, said.record_bytes[0] = first_bytes;
    said.record[1] = content + 9 + first_bytes, said.record_bytes[1] = second_bytes;
    return said;
}

static void check_opened(const struct tail *tail, const struct content *said, uint8_t power)
{
    const struct staged_records *records = &tail->records;

    check(tail->permanent_from == said->from[0] && tail->permanent_to == said->to[0]);
    check(tail->volatile_from == said->from[1] && tail->volatile_to == said->to[1]);
    check(tail->power == power);
    check(records->permanent_bytes == said->record_bytes[0]);
    check(records->following_bytes == said->record_bytes[1]);
    check(memcmp(records->permanent, said->record[0], said->record_bytes[0]) == 0);
    check(memcmp(records->following, said->record[1], said->record_bytes[1]) == 0);
}

/* A state of which there may be none, of what its generation says. */
struct state {
    bool exists;
    uint64_t generation;
    size_t n_bytes;
    uint8_t bytes[IMAGE_BYTES_MAX];
};

/* What the destination has. */
struct had {
    struct state now[2], before[2];
};

static unsigned type_of(int which)
{
    return which ? LINK_STATE_VOLATILE : LINK_STATE_PERMANENT;
}

/* What the source had at a generation: as tests/fuzz/corpus/tail has it. */
static void fill(int which, uint64_t generation, struct state *state)
{
    state->exists = true;
    state->generation = generation;
    state->n_bytes = STATE_BYTES;
    for (size_t i = 0; i < STATE_BYTES; i++)
        state->bytes[i] = (uint8_t)(i * generation * 7 + (size_t)which);
}

static size_t encode(int which, uint64_t to, uint8_t record[DELTA_RECORD_BYTES_MAX])
{
    static struct state base, next;
    size_t record_bytes;

    fill(which, to - 1, &base);
    fill(which, to, &next);
    struct delta_image from = {base.bytes, to > 1 ? base.n_bytes : 0, to - 1, NULL};
    struct delta_image then = {next.bytes, next.n_bytes, to, NULL};
    check(delta_encode(type_of(which), &from, &then, record, &record_bytes) == 0);
    return record_bytes;
}

/* A round, of one record or of both. */
static void stage(struct staged *staged, uint64_t to, bool permanent, bool following)
{
    static uint8_t record[2][DELTA_RECORD_BYTES_MAX];
    struct staged_records records = {.permanent = record[0], .following = record[1]};

    if (permanent)
        records.permanent_bytes = encode(0, to, record[0]);
    if (following)
        records.following_bytes = encode(1, to, record[1]);
    check(staged_take(staged, &records) == 0);
}

static void stage_rounds(struct staged *staged, uint8_t rounds)
{
    bool permanent = rounds & FIRST_PERMANENT, following = rounds & FIRST_VOLATILE;

    stage(staged, 1, permanent, following);
    permanent = permanent && rounds & SECOND_PERMANENT;
    following = following && rounds & SECOND_VOLATILE;
    if (permanent || following)
        stage(staged, 2, permanent, following);
}

static void look_at(const struct image *image, struct state *state)
{
    state->exists = image->exists;
    if (!image->exists)
        return;
    check(image->is_numbered && image->n_bytes <= sizeof(state->bytes));
    state->generation = image->generation;
    state->n_bytes = image->n_bytes;
    memcpy(state->bytes, image->bytes, image->n_bytes);
}

static void look(const struct staged *staged, struct had *had)
{
    look_at(&staged->permanent, &had->now[0]);
    look_at(&staged->permanent_before, &had->before[0]);
    look_at(&staged->following, &had->now[1]);
    look_at(&staged->following_before, &had->before[1]);
}

static bool is_same(const struct state *one, const struct state *other)
{
    if (!one->exists || !other->exists)
        return one->exists == other->exists;
    return one->generation == other->generation && one->n_bytes == other->n_bytes &&
           memcmp(one->bytes, other->bytes, one->n_bytes) == 0;
}

static bool is_at(const struct state *state, uint64_t generation)
{
    return state->exists && state->generation == generation;
}

/* What a record makes of a state. Returns false if it does not apply, or leads elsewhere. */
static bool make(int which, const struct state *base, const struct content *said,
                 struct state *made)
{
    const uint8_t *record = said->record[which];
    size_t record_bytes = said->record_bytes[which];
    struct delta_image from = {base->bytes, base->n_bytes, base->generation, NULL};
    struct image_digest digest;
    struct delta_header header;

    *made = *base;
    if (record_bytes == 0)
        return said->from[which] == said->to[which];
    if (delta_apply(type_of(which), &from, record, record_bytes, made->bytes, &header, &digest))
        return false;
    made->n_bytes = header.result_bytes;
    made->generation = header.to_generation;
    return header.to_generation == said->to[which];
}

/* What the destination should have after a tail, beside what it had. */
static bool expect(const struct had *had, const struct content *said, struct state made[2])
{
    const struct state *base[2] = {&had->now[0], &had->now[1]};

    if (is_at(base[0], said->to[0]) && is_at(base[1], said->to[1]))
        return false; /* it is there */
    if (!is_at(base[0], said->from[0]) || !is_at(base[1], said->from[1])) {
        for (int which = 0; which < 2; which++) {
            if (base[which]->exists && said->to[which] < base[which]->generation)
                return false; /* behind what has come */
            if (had->before[which].exists)
                base[which] = &had->before[which];
        }
    }
    for (int which = 0; which < 2; which++)
        if (!is_at(base[which], said->from[which]) || !make(which, base[which], said, &made[which]))
            return false;
    return true;
}

static void check_followed(const struct tail *tail, const struct content *said, uint8_t rounds)
{
    static struct had before, after;
    static struct state made[2];
    struct incoming incoming = {0};

    stage_rounds(&incoming.staged, rounds);
    look(&incoming.staged, &before);
    bool is_used = expect(&before, said, made);
    bool is_followed = incoming_follow(&incoming, tpm, tail) == TPM_SUCCESS;
    if (is_followed) /* libtpms takes none of these */
        check(incoming_start(&incoming, tpm) != TPM_SUCCESS);
    look(&incoming.staged, &after);
    for (int which = 0; which < 2; which++) {
        check(is_same(&after.now[which], is_used ? &made[which] : &before.now[which]));
        if (!is_used)
            check(is_same(&after.before[which], &before.before[which]));
    }
    bool is_there = is_at(&after.now[0], said->to[0]) && is_at(&after.now[1], said->to[1]);
    check(is_used ? is_followed : !is_followed || is_there);
    check(!incoming.is_held);
    incoming_deinit(&incoming);
}

static void seal_again(const struct tail *tail, const uint8_t *sealed, size_t n_sealed)
{
    uint8_t *again;
    size_t n_again;

    check(tail_seal(cipher, tail, &again, &n_again) == 0);
    check(n_again == n_sealed && memcmp(again, sealed, n_sealed) == 0);
    free(again);
}

static void make_checksums_right(const struct content *said)
{
    for (int which = 0; which < 2; which++) {
        if (said->record_bytes[which] < RECORD_BYTES_MIN)
            continue;
        size_t checked = said->record_bytes[which] - CHECKSUM_BYTES;
        put_be32((uint8_t *)said->record[which] + checked, crc32c(said->record[which], checked));
    }
}

static void put_generations(const uint8_t *data, uint8_t header[60], struct content *said)
{
    memcpy(header, "VTPMTAIL\0\3", 10);
    memcpy(header + 12, keying.session, 16);
    for (int which = 0; which < 2; which++) {
        said->from[which] = data[2 * which];
        said->to[which] = data[2 * which + 1];
        put_be64(header + 28 + 16 * which, said->from[which]);
        put_be64(header + 36 + 16 * which, said->to[which]);
    }
}

static void fuzz_content(const uint8_t *data, size_t n_data)
{
    uint8_t header[60] = {0};
    struct tail tail;

    if (n_data < ROUNDS_AND_GENERATIONS_BYTES)
        return;
    size_t n_content = n_data - ROUNDS_AND_GENERATIONS_BYTES;
    size_t n_sealed = HEADER_BYTES + n_content + TAG_BYTES;
    uint8_t *content = malloc(n_content ? n_content : 1);
    check(content);
    memcpy(content, data + ROUNDS_AND_GENERATIONS_BYTES, n_content);
    struct content said = decode(content, n_content);
    put_generations(data + 1, header, &said);
    if (said.is_one && data[0] & CHECKSUMS)
        make_checksums_right(&said);
    uint8_t *sealed = tail_seal_apart(&keying, header, content, n_content);
    int r = tail_open(cipher, sealed, n_sealed, &tail);
    check(r == (said.is_one                     ? 0
                : n_content < CONTENT_BYTES_MIN ? LINK_TAIL_CUT
                                                : LINK_TAIL_IMPOSSIBLE));
    if (r == 0) {
        check_opened(&tail, &said, content[0]);
        seal_again(&tail, sealed, n_sealed);
        check_followed(&tail, &said, data[0]);
    }
    tail_deinit(&tail);
    free(sealed);
    free(content);
}

static void fuzz_bytes(const uint8_t *data, size_t n_data)
{
    static const struct tail nothing;
    struct tail tail;
    uint8_t *copy = malloc(n_data ? n_data : 1);

    check(copy);
    memcpy(copy, data, n_data);
    check(tail_open(cipher, copy, n_data, &tail) == (int)refusal_of(data, n_data));
    check(memcmp(&tail, &nothing, sizeof(tail)) == 0);
    check(memcmp(copy, data, n_data) == 0);
    check(tail_is(copy, n_data) == (n_data >= 8 && memcmp(data, "VTPMTAIL", 8) == 0));
    free(copy);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_data)
{
    if (n_data == 0)
        return 0;
    if (data[0] == 'b')
        fuzz_bytes(data + 1, n_data - 1);
    else if (data[0] == 'c')
        fuzz_content(data + 1, n_data - 1);
    return 0;
}
