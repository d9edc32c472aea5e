/* Fuzz the lane: arbitrary content under a right seal, and a network between two sides that lies.
 *
 *   build/sanitize/fuzz_lane -max_total_time=600 tests/fuzz/corpus/lane
 *
 * Input: a letter that says what the rest is
 *
 *   c    u8 a number, then the content of the frame that has it, sealed by code apart from the lane
 *   n    pairs of bytes: what happens (see enum step; the top bit says to which side), and how
 *
 * The oracle:
 *   - content is taken if and only if a validator with a table of its own takes it, and what is
 *     taken is sealed again as the same bytes,
 *   - over a network that lies, a side takes what the other has sealed, in order, each once and
 *     unaltered; the first thing that is anything else is forged, and ends that side both ways.
 */
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <stdlib.h>
#include <string.h>

#include "bytes.h"
#include "check.h"
#include "lane.h"

enum step {
    SEAL = 0,    /* a frame of kind how % 6 */
    DELIVER = 1, /* the frame sealed `how` before the last one, as it is */
    ALTER = 2,   /* the frame that is due, with one bit, and one of the tag's, flipped */
    REFLECT = 3, /* a frame of its own */
};

enum { STEPS = 4, KINDS = 6, OTHER_SIDE = 0x80 };

static const struct lane_keying keying = {
    .session = "a session of 16",
    .key = "a key of 32 bytes, which is sent",
    .uuid = "uuid of a guest",
    .lineage = "a lineage of 16",
};

static void derive(const char *info, uint8_t key[32])
{
    uint8_t extracted[32], text[64];
    size_t n = strlen(info);

    check(HMAC(EVP_sha256(), keying.session, 16, keying.key, 32, extracted, NULL));
    memcpy(text, info, n);
    text[n] = 1;
    check(HMAC(EVP_sha256(), extracted, 32, text, n + 1, key, NULL));
}

/* Seal as the document says, apart from the code under test. */
static void seal_apart(const uint8_t content[80], uint64_t number, uint8_t bytes[96])
{
    uint8_t key[32], nonce[12] = {0};
    int n;

    derive("vtpmd lane 1 from source", key);
    put_be64(nonce + 4, number);
    EVP_CIPHER_CTX *context = EVP_CIPHER_CTX_new();
    check(EVP_EncryptInit_ex(context, EVP_aes_256_gcm(), NULL, key, nonce) == 1);
    check(EVP_EncryptUpdate(context, NULL, &n, keying.session, 16) == 1);
    check(EVP_EncryptUpdate(context, NULL, &n, keying.uuid, 16) == 1);
    check(EVP_EncryptUpdate(context, NULL, &n, keying.lineage, 16) == 1);
    check(EVP_EncryptUpdate(context, bytes, &n, content, 80) == 1);
    check(EVP_EncryptFinal_ex(context, bytes + n, &n) == 1);
    check(EVP_CIPHER_CTX_ctrl(context, EVP_CTRL_AEAD_GET_TAG, 16, bytes + 80) == 1);
    EVP_CIPHER_CTX_free(context);
}

/* Not derived from the code under test: which bytes of its content a kind may set. */
static bool is_right(const uint8_t content[80], uint64_t number)
{
    static const struct {
        size_t from, to;
    } free_bytes[] = {[2] = {8, 80}, [3] = {1, 1}, [4] = {4, 8}, [5] = {1, 1}};
    uint8_t kind = content[0];

    if (number == 0 ? kind != 1 : kind < 2 || kind > 5)
        return false;
    size_t from = number == 0 ? 1 : free_bytes[kind].from,
           to = number == 0 ? 1 : free_bytes[kind].to;
    for (size_t i = 1; i < 80; i++)
        if (content[i] != 0 && (i < from || i >= to))
            return false;
    return kind != 4 || get_be32(content + 4) != 0;
}

static struct lane *make(bool is_source)
{
    struct lane *lane;

    check(lane_new(&lane, &keying, is_source) == 0);
    return lane;
}

/* Bring a side to where the frame with that number is due. */
static void pass(struct lane *from, struct lane *to, uint64_t number)
{
    uint8_t bytes[LANE_FRAME_BYTES];
    struct lane_frame frame;

    for (uint64_t i = 0; i < number; i++) {
        frame = (struct lane_frame){.kind = i == 0 ? LANE_HELLO : LANE_GRANT};
        check(lane_seal(from, &frame, bytes) == 0);
        check(lane_open(to, bytes, &frame) == 0);
    }
}

static void fuzz_content(const uint8_t *data, size_t n_data)
{
    uint8_t content[80] = {0}, sealed[96], again[96];
    struct lane *source = make(true), *destination = make(false);
    struct lane_frame frame;

    if (n_data == 0)
        n_data = 1, data = content;
    uint64_t number = data[0] % LANE_FRAMES_MAX;
    memcpy(content, data + 1, n_data - 1 < 80 ? n_data - 1 : 80);
    pass(source, destination, number);
    seal_apart(content, number, sealed);
    int r = lane_open(destination, sealed, &frame);
    check(r == (is_right(content, number) ? 0 : LANE_IMPOSSIBLE));
    if (r == 0) {
        check(lane_seal(source, &frame, again) == 0);
        check(memcmp(sealed, again, sizeof(sealed)) == 0);
    } else {
        static const struct lane_frame nothing;
        check(memcmp(&frame, &nothing, sizeof(frame)) == 0);
        check(lane_open(destination, sealed, &frame) == LANE_ENDED);
    }
    lane_free(source);
    lane_free(destination);
}

/* What one side has sealed, how much of it the other has taken, and whether that side has ended. */
struct side {
    struct lane *lane;
    struct lane_frame frames[LANE_FRAMES_MAX];
    uint8_t bytes[LANE_FRAMES_MAX][LANE_FRAME_BYTES];
    size_t n_sealed, n_taken;
    bool has_ended;
};

static void seal(struct side *side, uint8_t how)
{
    struct lane_frame frame = {.kind = how % KINDS};
    uint8_t bytes[LANE_FRAME_BYTES];

    if (frame.kind == LANE_REFUSE)
        frame.reason = how;
    if (frame.kind == LANE_TAKE)
        frame.start_us = how;
    bool is_next = side->n_sealed == 0 ? frame.kind == LANE_HELLO : frame.kind > LANE_HELLO;
    int r = lane_seal(side->lane, &frame, bytes);
    if (side->has_ended || side->n_sealed == LANE_FRAMES_MAX) {
        check(r == LANE_ENDED);
        return;
    }
    check(r == (is_next ? 0 : LANE_IMPOSSIBLE));
    if (r == 0) {
        memcpy(side->bytes[side->n_sealed], bytes, sizeof(bytes));
        side->frames[side->n_sealed++] = frame;
    }
}

static void deliver(struct side *to, struct side *from, const uint8_t bytes[LANE_FRAME_BYTES])
{
    struct lane_frame frame;
    uint8_t *copy = malloc(LANE_FRAME_BYTES);

    check(copy);
    memcpy(copy, bytes, LANE_FRAME_BYTES);
    int r = lane_open(to->lane, copy, &frame);
    free(copy);
    if (to->has_ended || from->n_taken == LANE_FRAMES_MAX) {
        check(r == LANE_ENDED);
        return;
    }
    bool is_due = from->n_taken < from->n_sealed &&
                  memcmp(bytes, from->bytes[from->n_taken], LANE_FRAME_BYTES) == 0;
    check(r == (is_due ? 0 : LANE_FORGED));
    check(!is_due || memcmp(&frame, &from->frames[from->n_taken], sizeof(frame)) == 0);
    from->n_taken += is_due;
    to->has_ended = !is_due;
}

static void step(struct side *to, struct side *from, uint8_t what, uint8_t how)
{
    uint8_t bytes[LANE_FRAME_BYTES] = {0};

    switch (what % STEPS) {
    case SEAL:
        seal(from, how);
        return;
    case DELIVER:
        if (how < from->n_sealed)
            memcpy(bytes, from->bytes[from->n_sealed - 1 - how], sizeof(bytes));
        break;
    case ALTER:
        if (from->n_taken < from->n_sealed)
            memcpy(bytes, from->bytes[from->n_taken], sizeof(bytes));
        bytes[how % LANE_CONTENT_BYTES] ^= (uint8_t)(1 << how % 8);
        bytes[LANE_CONTENT_BYTES + how % 16] ^= (uint8_t)(1 << how / 16 % 8);
        break;
    case REFLECT:
        if (how < to->n_sealed)
            memcpy(bytes, to->bytes[how], sizeof(bytes));
        break;
    }
    deliver(to, from, bytes);
}

static void fuzz_network(const uint8_t *data, size_t n_data)
{
    static struct side sides[2];

    for (int i = 0; i < 2; i++) {
        memset(&sides[i], 0, sizeof(sides[i]));
        sides[i].lane = make(i == 0);
    }
    for (size_t i = 0; i + 1 < n_data; i += 2) {
        bool from = data[i] & OTHER_SIDE;
        step(&sides[!from], &sides[from], data[i] & ~OTHER_SIDE, data[i + 1]);
    }
    for (int i = 0; i < 2; i++)
        lane_free(sides[i].lane);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_data)
{
    if (n_data == 0)
        return 0;
    if (data[0] == 'c')
        fuzz_content(data + 1, n_data - 1);
    else if (data[0] == 'n')
        fuzz_network(data + 1, n_data - 1);
    return 0;
}
