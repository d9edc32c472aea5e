/* The sealed tail: what one side seals the other opens; whatever else there is, is refused. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "bytes.h"
#include "delta.h"
#include "lane.h"
#include "link_types.h"
#include "pages.h"
#include "tail.h"
#include "tail_apart.h"

enum { STATE_BYTES = 3000 };

static const struct lane_keying a_keying = {
    .session = "a session of 16",
    .key = "a key of 32 bytes, which is sent",
    .uuid = "uuid of a guest",
    .lineage = "a lineage of 16",
};

struct sealed {
    uint8_t *bytes;
    size_t n_bytes;
};

static struct tail_cipher *source, *destination;
static uint8_t record[2]
                     [DELTA_RECORD_BYTES_MAX]; /* the permanent state's, and the volatile one's */
static size_t record_bytes[2];

static struct tail_cipher *make(const struct lane_keying *keying)
{
    struct tail_cipher *cipher;

    assert_int_equal(tail_cipher_new(&cipher, keying), 0);
    return cipher;
}

static void encode(int which, uint64_t from, uint64_t to)
{
    uint8_t before[STATE_BYTES], after[STATE_BYTES];
    struct delta_image base = {.bytes = before, .n_bytes = STATE_BYTES, .generation = from};
    struct delta_image next = {.bytes = after, .n_bytes = STATE_BYTES, .generation = to};

    memset(before, (int)from, sizeof(before));
    memset(after, (int)to, sizeof(after));
    unsigned type = which ? LINK_STATE_VOLATILE : LINK_STATE_PERMANENT;
    assert_int_equal(delta_encode(type, &base, &next, record[which], &record_bytes[which]), 0);
}

static int begin(void **state)
{
    (void)state;
    source = make(&a_keying);
    destination = make(&a_keying);
    encode(0, 7, 9);
    encode(1, 70, 71);
    return 0;
}

static int end(void **state)
{
    (void)state;
    tail_cipher_free(source);
    tail_cipher_free(destination);
    tail_cipher_free(NULL);
    return 0;
}

/* Of a guest that did something: permanent 7 to 9, volatile 70 to 71. */
static struct tail a_tail(void)
{
    return (struct tail){
        .permanent_from = 7,
        .permanent_to = 9,
        .volatile_from = 70,
        .volatile_to = 71,
        .power = LINK_SHUTDOWN_STATE,
        .records = {record[0], record_bytes[0], record[1], record_bytes[1]},
    };
}

static struct sealed seal(const struct tail *tail)
{
    struct sealed sealed;

    assert_int_equal(tail_seal(source, tail, &sealed.bytes, &sealed.n_bytes), 0);
    return sealed;
}

/* Open a copy of exactly that size, so that a read past its end is seen. Returns what tail_open()
 * does; the caller ends what was opened. */
static int open_with(struct tail_cipher *cipher, const uint8_t *bytes, size_t n_bytes,
                     struct tail *tail)
{
    static const struct tail nothing;
    uint8_t *copy = malloc(n_bytes ? n_bytes : 1);

    assert_non_null(copy);
    memcpy(copy, bytes, n_bytes);
    memset(tail, 0xff, sizeof(*tail)); /* it is taken as it comes */
    int r = tail_open(cipher, copy, n_bytes, tail);
    assert_memory_equal(copy, bytes, n_bytes);
    free(copy);
    if (r != 0)
        assert_memory_equal(tail, &nothing, sizeof(nothing));
    return r;
}

static void is_refused(const uint8_t *bytes, size_t n_bytes, enum link_tail refusal)
{
    struct tail tail;

    assert_int_equal(open_with(destination, bytes, n_bytes, &tail), refusal);
}

static void are_equal(const struct tail *opened, const struct tail *tail)
{
    const struct staged_records *got = &opened->records, *wanted = &tail->records;

    assert_int_equal(opened->permanent_from, tail->permanent_from);
    assert_int_equal(opened->permanent_to, tail->permanent_to);
    assert_int_equal(opened->volatile_from, tail->volatile_from);
    assert_int_equal(opened->volatile_to, tail->volatile_to);
    assert_int_equal(opened->power, tail->power);
    assert_int_equal(got->permanent_bytes, wanted->permanent_bytes);
    assert_int_equal(got->following_bytes, wanted->following_bytes);
    if (wanted->permanent_bytes > 0)
        assert_memory_equal(got->permanent, wanted->permanent, wanted->permanent_bytes);
    if (wanted->following_bytes > 0)
        assert_memory_equal(got->following, wanted->following, wanted->following_bytes);
}

static void what_is_sealed_is_opened(void **state)
{
    const struct tail whole = a_tail();

    (void)state;
    for (int which = 0; which < 4; which++) {
        for (uint8_t power = LINK_SHUTDOWN_NONE; power <= LINK_SHUTDOWN_STATE; power++) {
            cleanup(tail_deinit) struct tail opened = {0};
            struct tail tail = whole;
            if (which & 1)
                tail.records.permanent = NULL, tail.records.permanent_bytes = 0;
            if (which & 2)
                tail.records.following = NULL, tail.records.following_bytes = 0;
            tail.power = power;
            struct sealed sealed = seal(&tail);
            assert_true(tail_is(sealed.bytes, sealed.n_bytes));
            assert_int_equal(open_with(destination, sealed.bytes, sealed.n_bytes, &opened), 0);
            are_equal(&opened, &tail);
            free(sealed.bytes);
        }
    }
}

/* A nonce is used twice with one content only: with another, whatever differs, it is another. */
static void the_same_tail_is_the_same_bytes_and_no_other_has_its_nonce(void **state)
{
    struct tail tails[8];
    struct sealed sealed[8];

    (void)state;
    for (size_t i = 0; i < 8; i++)
        tails[i] = a_tail();
    tails[1].permanent_from--;
    tails[2].permanent_to++;
    tails[3].volatile_from--;
    tails[4].volatile_to++;
    tails[5].power = LINK_SHUTDOWN_NONE;
    tails[6].records.permanent_bytes--;
    tails[7].records.following_bytes--;
    for (size_t i = 0; i < 8; i++) {
        sealed[i] = seal(&tails[i]);
        struct sealed again = seal(&tails[i]), there;
        assert_int_equal(tail_seal(destination, &tails[i], &there.bytes, &there.n_bytes), 0);
        assert_int_equal(again.n_bytes, sealed[i].n_bytes);
        assert_memory_equal(again.bytes, sealed[i].bytes, again.n_bytes);
        assert_int_equal(there.n_bytes, sealed[i].n_bytes);
        assert_memory_equal(there.bytes, sealed[i].bytes, there.n_bytes);
        free(again.bytes);
        free(there.bytes);
        for (size_t j = 0; j < i; j++)
            assert_memory_not_equal(sealed[i].bytes + 60, sealed[j].bytes + 60, 12);
    }
    for (size_t i = 0; i < 8; i++)
        free(sealed[i].bytes);
}

static void nothing_of_the_records_is_seen(void **state)
{
    const struct tail tail = a_tail();
    struct sealed sealed = seal(&tail);

    (void)state;
    for (int which = 0; which < 2; which++)
        assert_null(memmem(sealed.bytes, sealed.n_bytes, record[which], 16));
    free(sealed.bytes);
}

static void no_altered_bit_opens(void **state)
{
    const struct tail tail = a_tail();
    struct sealed sealed = seal(&tail);

    (void)state;
    for (size_t bit = 0; bit < 8 * sealed.n_bytes; bit++) {
        sealed.bytes[bit / 8] ^= (uint8_t)(1 << bit % 8);
        is_refused(sealed.bytes, sealed.n_bytes,
                   bit / 8 < 12   ? LINK_TAIL_FORMAT
                   : bit / 8 < 28 ? LINK_TAIL_OTHER_SESSION
                                  : LINK_TAIL_FORGED);
        sealed.bytes[bit / 8] ^= (uint8_t)(1 << bit % 8);
    }
    free(sealed.bytes);
}

static void no_part_of_a_tail_is_one(void **state)
{
    const struct tail tail = a_tail();
    struct sealed sealed = seal(&tail);
    uint8_t *longer = calloc(1, sealed.n_bytes + 1);

    (void)state;
    assert_non_null(longer);
    memcpy(longer, sealed.bytes, sealed.n_bytes);
    is_refused(longer, sealed.n_bytes + 1, LINK_TAIL_FORGED);
    for (size_t n = 0; n < sealed.n_bytes; n++)
        is_refused(sealed.bytes, n, n < 72 + 9 + 16 ? LINK_TAIL_CUT : LINK_TAIL_FORGED);
    free(longer);
    free(sealed.bytes);
}

static void a_tail_of_anyone_else_does_not_open(void **state)
{
    const struct tail tail = a_tail();
    struct sealed sealed = seal(&tail);
    const struct {
        size_t at;
        enum link_tail refusal;
    } others[] = {
        {offsetof(struct lane_keying, session), LINK_TAIL_OTHER_SESSION},
        {offsetof(struct lane_keying, key), LINK_TAIL_FORGED},
        {offsetof(struct lane_keying, uuid) + LANE_UUID_BYTES - 1, LINK_TAIL_FORGED},
        {offsetof(struct lane_keying, lineage) + LANE_LINEAGE_BYTES - 1, LINK_TAIL_FORGED},
    };

    (void)state;
    for (size_t i = 0; i < sizeof(others) / sizeof(*others); i++) {
        struct lane_keying keying = a_keying;
        struct tail opened;
        ((uint8_t *)&keying)[others[i].at]++;
        struct tail_cipher *other = make(&keying);
        assert_int_equal(open_with(other, sealed.bytes, sealed.n_bytes, &opened),
                         others[i].refusal);
        tail_cipher_free(other);
    }
    free(sealed.bytes);
}

static void another_session_s_name_on_a_tail_does_not_help(void **state)
{
    struct lane_keying keying = a_keying;
    const struct tail tail = a_tail();
    struct sealed sealed = seal(&tail);
    struct tail opened;

    (void)state;
    keying.session[0]++;
    struct tail_cipher *other = make(&keying);
    sealed.bytes[12]++;
    assert_int_equal(open_with(other, sealed.bytes, sealed.n_bytes, &opened), LINK_TAIL_FORGED);
    tail_cipher_free(other);
    free(sealed.bytes);
}

/* Contents that no source makes, under its seal. */
static void what_the_source_seals_is_a_tail_or_refused(void **state)
{
    static const struct {
        const char *content;
        size_t content_bytes;
    } cases[] = {
        {"\0\0\0\0\0\0\0\0\0\0", 10},           /* more than two records */
        {"\3\0\0\0\0\0\0\0\0", 9},              /* another power */
        {"\xff\0\0\0\0\0\0\0\0", 9},            /* likewise */
        {"\0\0\0\0\1\0\0\0\0", 9},              /* the second has no length any more */
        {"\0\0\0\0\5\0\0\0\0", 9},              /* the first is longer than all */
        {"\0\0\0\0\0\0\0\0\1", 9},              /* the second is */
        {"\0\xff\xff\xff\xff\0\0\0\0", 9},      /* by the most that can be */
        {"\0\0\0\0\0\xff\xff\xff\xff", 9},      /* likewise */
        {"\0\xff\xff\xff\xfb\0\0\0\0\0\0", 11}, /* back to the beginning, with 32 bits */
        {"\0\0\0\0\1a\0\0\0\1", 10},            /* the second is cut */
    };
    const struct tail tail = a_tail();
    struct sealed right = seal(&tail);

    (void)state;
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        size_t n = cases[i].content_bytes;
        uint8_t *sealed =
            tail_seal_apart(&a_keying, right.bytes, (const uint8_t *)cases[i].content, n);
        is_refused(sealed, TAIL_HEADER_BYTES + n + 16, LINK_TAIL_IMPOSSIBLE);
        free(sealed);
    }
    for (size_t n = 0; n < 9; n++) {
        static const uint8_t zeros[9];
        uint8_t *sealed = tail_seal_apart(&a_keying, right.bytes, zeros, n);
        is_refused(sealed, TAIL_HEADER_BYTES + n + 16, LINK_TAIL_CUT);
        free(sealed);
    }
    free(right.bytes);
}

static void a_tail_is_what_the_document_says(void **state)
{
    const struct tail tail = a_tail();
    struct sealed sealed = seal(&tail);
    uint8_t header[60] = "VTPMTAIL\0\3", *content = calloc(1, sealed.n_bytes), *at = content;

    (void)state;
    assert_non_null(content);
    memcpy(header + 12, a_keying.session, 16);
    put_be64(header + 28, 7);
    put_be64(header + 36, 9);
    put_be64(header + 44, 70);
    put_be64(header + 52, 71);
    *at++ = LINK_SHUTDOWN_STATE;
    for (int which = 0; which < 2; which++) {
        put_be32(at, (uint32_t)record_bytes[which]);
        at = mempcpy(at + 4, record[which], record_bytes[which]);
    }
    uint8_t *apart = tail_seal_apart(&a_keying, header, content, (size_t)(at - content));
    assert_int_equal(sealed.n_bytes, 72 + (at - content) + 16);
    assert_memory_equal(apart, sealed.bytes, sealed.n_bytes);
    free(apart);
    free(content);
    free(sealed.bytes);
}

static void limits_are_those_of_what_qemu_brings(void **state)
{
    uint8_t *bytes = calloc(1, TAIL_BYTES_MAX + 1);
    struct tail tail = {.permanent_to = 1, .volatile_to = 1};
    struct sealed sealed;
    struct tail opened;

    (void)state;
    assert_non_null(bytes);
    tail.records.permanent = tail.records.following = bytes;
    tail.records.permanent_bytes = DELTA_RECORD_BYTES_MAX;
    tail.records.following_bytes =
        TAIL_BYTES_MAX - DELTA_RECORD_BYTES_MAX - TAIL_HEADER_BYTES - 9 - 16;
    sealed = seal(&tail);
    assert_int_equal(sealed.n_bytes, TAIL_BYTES_MAX);
    assert_int_equal(open_with(destination, sealed.bytes, sealed.n_bytes, &opened), 0);
    are_equal(&opened, &tail);
    tail_deinit(&opened);
    memcpy(bytes, sealed.bytes, sealed.n_bytes);
    is_refused(bytes, TAIL_BYTES_MAX + 1, LINK_TAIL_CUT);
    free(sealed.bytes);
    tail.records.following_bytes++;
    sealed = (struct sealed){0};
    assert_int_equal(tail_seal(source, &tail, &sealed.bytes, &sealed.n_bytes), -EMSGSIZE);
    assert_null(sealed.bytes);
    free(bytes);
}

static void invariant_10_a_tail_uses_up_no_generations(void **state)
{
    static const uint64_t generations[] = {GENERATION_GIVEN_MAX, GENERATION_GIVEN_MAX + 1,
                                           GENERATION_MAX, UINT64_MAX};

    (void)state;
    for (size_t i = 0; i < 2 * sizeof(generations) / sizeof(*generations); i++) {
        cleanup(tail_deinit) struct tail opened = {0};
        struct tail tail = a_tail();
        *(i % 2 ? &tail.permanent_to : &tail.volatile_to) = generations[i / 2];
        struct sealed sealed = seal(&tail);
        int wanted = generations[i / 2] == GENERATION_GIVEN_MAX ? 0 : LINK_TAIL_IMPOSSIBLE;
        assert_int_equal(open_with(destination, sealed.bytes, sealed.n_bytes, &opened), wanted);
        free(sealed.bytes);
    }
}

static void what_was_refused_does_not_end_the_cipher(void **state)
{
    cleanup(tail_deinit) struct tail opened = {0};
    const struct tail tail = a_tail();
    struct sealed sealed = seal(&tail);

    (void)state;
    sealed.bytes[sealed.n_bytes - 1]++;
    is_refused(sealed.bytes, sealed.n_bytes, LINK_TAIL_FORGED);
    sealed.bytes[sealed.n_bytes - 1]--;
    assert_int_equal(open_with(destination, sealed.bytes, sealed.n_bytes, &opened), 0);
    are_equal(&opened, &tail);
    free(sealed.bytes);
}

static void a_tail_begins_with_its_magic(void **state)
{
    (void)state;
    assert_true(tail_is((const uint8_t *)"VTPMTAIL", 8));
    assert_false(tail_is((const uint8_t *)"VTPMTAIL", 7));
    assert_false(tail_is((const uint8_t *)"VTPMTAIM", 8));
    assert_false(tail_is(NULL, 0));
}

static void a_tail_is_consistent_if_its_records_lead_where_it_says(void **state)
{
    const struct tail tail = a_tail();
    struct tail other;

    (void)state;
    assert_true(tail_is_consistent(&tail));
#define IS_NOT(...) (other = tail, __VA_ARGS__, assert_false(tail_is_consistent(&other)))
    IS_NOT(other.permanent_from--);
    IS_NOT(other.permanent_to++);
    IS_NOT(other.volatile_from--);
    IS_NOT(other.volatile_to++);
    IS_NOT(other.records.permanent_bytes--);
    IS_NOT(other.records.permanent_bytes = 0);
    IS_NOT(other.records.following_bytes = 0);
    IS_NOT(other.records.permanent = record[1], other.records.permanent_bytes = record_bytes[1]);
    IS_NOT(record[1][record_bytes[1] / 2] ^= 1);
    record[1][record_bytes[1] / 2] ^= 1;
#undef IS_NOT
    other = (struct tail){.permanent_from = 9, .permanent_to = 9};
    assert_true(tail_is_consistent(&other));
    other.volatile_to = 1; /* of nothing nothing is made */
    assert_false(tail_is_consistent(&other));
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, begin, end)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(what_is_sealed_is_opened),
        TEST(the_same_tail_is_the_same_bytes_and_no_other_has_its_nonce),
        TEST(nothing_of_the_records_is_seen),
        TEST(no_altered_bit_opens),
        TEST(no_part_of_a_tail_is_one),
        TEST(a_tail_of_anyone_else_does_not_open),
        TEST(another_session_s_name_on_a_tail_does_not_help),
        TEST(a_tail_is_what_the_document_says),
        TEST(what_the_source_seals_is_a_tail_or_refused),
        TEST(limits_are_those_of_what_qemu_brings),
        TEST(invariant_10_a_tail_uses_up_no_generations),
        TEST(what_was_refused_does_not_end_the_cipher),
        TEST(a_tail_begins_with_its_magic),
        TEST(a_tail_is_consistent_if_its_records_lead_where_it_says),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
