/* Delta records of what libtpms really does to its state, and the checksum under them.
 *
 * Invariant 5: applying a record gives the image bit by bit. What a record costs is held against
 * the sizes that a migration counts on. Malformed records: tests/unit/test_delta.py, fuzz_delta.c.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <libtpms/tpm_error.h>

#include "bytes.h"
#include "crc32c.h"
#include "delta.h"
#include "io_memory.h"
#include "tpm.h"

enum {
    INDICES = 40,
    INDEX_BYTES = 2048,
    COMMAND_BYTES_MAX = 2048, /* of those here */
    CHUNK_BYTES = 1024,       /* one NV_Write moves no more */
    FIRST_INDEX = 0x1500000,  /* the counter is behind the last */
    COUNTER = FIRST_INDEX + INDICES,
    LAST_PCR_OF_LOCALITY_0 = 16,
    OWNER = 0x40000001,
    NV_ORDINARY = 0x02060006, /* owner and authorisation may write and read, no lockout */
    NV_COUNTER = NV_ORDINARY | 0x10,
};

static struct io_memory io;
static struct tpm *tpm;
static struct tpm_response response;

/* A TPM command under construction. */
struct command {
    uint8_t bytes[COMMAND_BYTES_MAX];
    size_t n_bytes;
};

static void add16(struct command *command, uint16_t value)
{
    put_be16(command->bytes + command->n_bytes, value);
    command->n_bytes += 2;
}

static void add32(struct command *command, uint32_t value)
{
    put_be32(command->bytes + command->n_bytes, value);
    command->n_bytes += 4;
}

static void add_bytes(struct command *command, const uint8_t *bytes, size_t n_bytes)
{
    memcpy(command->bytes + command->n_bytes, bytes, n_bytes);
    command->n_bytes += n_bytes;
}

static void begin(struct command *command, uint32_t code, uint32_t handle)
{
    command->n_bytes = 0;
    add16(command, 0x8002);
    add32(command, 0);
    add32(command, code);
    add32(command, handle);
}

static void add_empty_password(struct command *command)
{
    add32(command, 9);
    add32(command, 0x40000009);
    add32(command, 0);
    command->bytes[command->n_bytes++] = 0;
}

static void execute(struct command *command)
{
    put_be32(command->bytes + 2, (uint32_t)command->n_bytes);
    tpm_execute(tpm, command->bytes, command->n_bytes, &response);
    assert_true(response.n_bytes >= TPM_HEADER_BYTES);
    assert_int_equal(get_be32(response.bytes + 6), 0);
}

static void define_index(uint32_t index, uint32_t attributes, uint16_t n_bytes)
{
    struct command command;

    begin(&command, 0x12a, OWNER);
    add_empty_password(&command);
    add16(&command, 0);
    add16(&command, 14);
    add32(&command, index);
    add16(&command, 0x000b);
    add32(&command, attributes);
    add16(&command, 0);
    add16(&command, n_bytes);
    execute(&command);
}

static void undefine_index(uint32_t index)
{
    struct command command;

    begin(&command, 0x122, OWNER);
    add32(&command, index);
    add_empty_password(&command);
    execute(&command);
}

static void write_index(uint32_t index, const uint8_t *bytes, uint16_t n_bytes, uint16_t offset)
{
    struct command command;

    begin(&command, 0x137, index);
    add32(&command, index);
    add_empty_password(&command);
    add16(&command, n_bytes);
    add_bytes(&command, bytes, n_bytes);
    add16(&command, offset);
    execute(&command);
}

static void increment_counter(void)
{
    struct command command;

    begin(&command, 0x134, COUNTER);
    add32(&command, COUNTER);
    add_empty_password(&command);
    execute(&command);
}

static void extend_pcr(uint32_t pcr, const uint8_t digest[DIGEST_BYTES])
{
    struct command command;

    begin(&command, 0x182, pcr);
    add_empty_password(&command);
    add32(&command, 1);
    add16(&command, 0x000b);
    add_bytes(&command, digest, DIGEST_BYTES);
    execute(&command);
}

/* Bytes that nothing can compress or confuse, but the same in each run. */
static void fill(uint8_t *bytes, size_t n_bytes)
{
    static uint64_t random = 88172645463325252;

    for (size_t i = 0; i < n_bytes; i++) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        bytes[i] = (uint8_t)random;
    }
}

static void set_up_tpm(bool with_content)
{
    static uint8_t startup[] = {0x80, 1, 0, 0, 0, 12, 0, 0, 1, 0x44, 0, 0};
    uint8_t bytes[CHUNK_BYTES] = {0};

    io_memory_init(&io);
    tpm = tpm_new(&io.io);
    tpm_response_init(&response);
    assert_int_equal(tpm_init(tpm, false), TPM_SUCCESS);
    tpm_execute(tpm, startup, sizeof(startup), &response);
    for (uint32_t index = FIRST_INDEX; index < FIRST_INDEX + INDICES; index++) {
        define_index(index, NV_ORDINARY, INDEX_BYTES);
        for (uint16_t offset = 0; offset < INDEX_BYTES; offset += CHUNK_BYTES) {
            if (with_content)
                fill(bytes, sizeof(bytes));
            write_index(index, bytes, sizeof(bytes), offset);
        }
    }
    define_index(COUNTER, NV_COUNTER, 8);
    increment_counter();
}

static int set_up(void **state)
{
    (void)state;
    set_up_tpm(true);
    return 0;
}

static int set_up_blank(void **state)
{
    (void)state;
    set_up_tpm(false);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    tpm_response_deinit(&response);
    tpm_free(tpm);
    io_memory_deinit(&io);
    return 0;
}

struct taken {
    uint8_t *bytes;
    size_t n_bytes;
};

static struct taken take(enum link_state_type type)
{
    struct taken taken;

    assert_int_equal(tpm_get_state(tpm, type, &taken.bytes, &taken.n_bytes), TPM_SUCCESS);
    return taken;
}

/* Encode what happened since `before`, with at most `bytes_max`, and apply it. */
static void check_record(enum link_state_type type, struct taken before, size_t bytes_max)
{
    static uint8_t record[DELTA_RECORD_BYTES_MAX], result[IMAGE_BYTES_MAX];
    struct taken after = take(type);
    struct delta_image base = {before.bytes, before.n_bytes, 1, NULL};
    struct delta_image next = {after.bytes, after.n_bytes, 2, NULL};
    struct delta_header header;
    struct image_digest digest;
    size_t record_bytes;

    assert_int_equal(delta_encode(type, &base, &next, record, &record_bytes), 0);
    assert_true(record_bytes > 0 && record_bytes <= bytes_max);
    assert_int_equal(delta_apply(type, &base, record, record_bytes, result, &header, &digest), 0);
    assert_int_equal(header.result_bytes, after.n_bytes);
    assert_memory_equal(result, after.bytes, after.n_bytes);
    free(before.bytes);
    free(after.bytes);
}

static void an_nv_write_of_8_bytes_takes_at_most_200(void **state)
{
    uint8_t bytes[8];

    (void)state;
    for (uint32_t index = FIRST_INDEX; index < FIRST_INDEX + INDICES; index++) {
        struct taken before = take(LINK_STATE_PERMANENT);
        assert_true(before.n_bytes > INDICES * INDEX_BYTES);
        fill(bytes, sizeof(bytes));
        write_index(index, bytes, sizeof(bytes), (uint16_t)(index % INDICES * 50));
        check_record(LINK_STATE_PERMANENT, before, 200);
    }
}

static void an_nv_increment_takes_at_most_160(void **state)
{
    (void)state;
    for (int i = 0; i < 300; i++) {
        struct taken before = take(LINK_STATE_PERMANENT);
        increment_counter();
        check_record(LINK_STATE_PERMANENT, before, 160);
    }
}

static void a_pcr_extend_takes_at_most_400(void **state)
{
    uint8_t digest[DIGEST_BYTES];

    (void)state;
    for (uint32_t pcr = 0; pcr <= LAST_PCR_OF_LOCALITY_0; pcr++) {
        struct taken before = take(LINK_STATE_VOLATILE);
        fill(digest, sizeof(digest));
        extend_pcr(pcr, digest);
        check_record(LINK_STATE_VOLATILE, before, 400);
    }
}

static void a_removed_index_takes_at_most_2_percent_of_the_blob(void **state)
{
    (void)state;
    for (uint32_t index = FIRST_INDEX; index < FIRST_INDEX + INDICES / 2; index++) {
        struct taken before = take(LINK_STATE_PERMANENT);
        undefine_index(index);
        check_record(LINK_STATE_PERMANENT, before, before.n_bytes / 50);
    }
}

static void what_moved_is_copied_whatever_changed_around_it(void **state)
{
    uint8_t bytes[8] = "changed";

    (void)state;
    struct taken before = take(LINK_STATE_PERMANENT);
    write_index(FIRST_INDEX, bytes, sizeof(bytes), 1000);
    undefine_index(FIRST_INDEX + 3);
    write_index(FIRST_INDEX + 5, bytes, sizeof(bytes), 1000);
    undefine_index(FIRST_INDEX + 20);
    write_index(FIRST_INDEX + INDICES - 1, bytes, sizeof(bytes), INDEX_BYTES - sizeof(bytes));
    increment_counter();
    check_record(LINK_STATE_PERMANENT, before, before.n_bytes / 50);
}

/* A time that can be one is written; any other is left out, and makes no record fail. */
static void a_record_has_the_time_of_its_result(void **state)
{
    const uint64_t times[][2] = {
        {0, 0},
        {1, 1},
        {UINT64_C(1795959040125), UINT64_C(1795959040125)},
        {DELTA_TIME_MS_MAX, DELTA_TIME_MS_MAX},
        {DELTA_TIME_MS_MAX + 1, 0},
        {UINT64_MAX, 0},
    };
    static uint8_t record[DELTA_RECORD_BYTES_MAX], result[IMAGE_BYTES_MAX];
    const uint8_t bytes[] = "an image";
    struct delta_image base = {bytes, 2, 1, NULL};
    struct image_digest digest;
    struct delta_header header;
    size_t record_bytes;

    (void)state;
    for (size_t i = 0; i < sizeof(times) / sizeof(*times); i++) {
        struct delta_image next = {bytes, sizeof(bytes), 2, .time_ms = times[i][0]};
        assert_int_equal(delta_encode(LINK_STATE_PERMANENT, &base, &next, record, &record_bytes),
                         0);
        assert_int_equal(delta_apply(LINK_STATE_PERMANENT, &base, record, record_bytes, result,
                                     &header, &digest),
                         0);
        assert_memory_equal(result, bytes, sizeof(bytes));
        assert_true(header.time_ms == times[i][1]);
        assert_int_equal(header.header_bytes,
                         times[i][1] ? DELTA_DATED_HEADER_BYTES : DELTA_HEADER_BYTES);
    }
}

static void crc32c_is_that_of_the_standard(void **state)
{
    uint8_t bytes[48];

    (void)state;
    assert_int_equal(crc32c((const uint8_t *)"123456789", 9), 0xe3069283);
    assert_int_equal(crc32c(bytes, 0), 0);
    /* RFC 3720, B.4, the numbers in the order of the register. */
    memset(bytes, 0, 32);
    assert_int_equal(crc32c(bytes, 32), 0x8a9136aa);
    memset(bytes, 0xff, 32);
    assert_int_equal(crc32c(bytes, 32), 0x62a8ab43);
    for (uint8_t i = 0; i < 32; i++)
        bytes[i] = i;
    assert_int_equal(crc32c(bytes, 32), 0x46dd794e);
}

static void crc32c_is_the_same_on_any_processor(void **state)
{
    uint8_t bytes[300];

    (void)state;
    fill(bytes, sizeof(bytes));
    for (size_t start = 0; start < 9; start++)
        for (size_t n_bytes = 0; start + n_bytes <= sizeof(bytes); n_bytes++)
            assert_int_equal(crc32c(bytes + start, n_bytes),
                             crc32c_portable(bytes + start, n_bytes));
    assert_int_equal(crc32c_portable((const uint8_t *)"123456789", 9), 0xe3069283);
}

#define tpm_test(name, set_up) cmocka_unit_test_setup_teardown(name, set_up, tear_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_record_has_the_time_of_its_result),
        cmocka_unit_test(crc32c_is_that_of_the_standard),
        cmocka_unit_test(crc32c_is_the_same_on_any_processor),
        tpm_test(an_nv_write_of_8_bytes_takes_at_most_200, set_up),
        tpm_test(an_nv_increment_takes_at_most_160, set_up),
        tpm_test(a_pcr_extend_takes_at_most_400, set_up),
        tpm_test(a_removed_index_takes_at_most_2_percent_of_the_blob, set_up),
        tpm_test(a_removed_index_takes_at_most_2_percent_of_the_blob, set_up_blank),
        tpm_test(what_moved_is_copied_whatever_changed_around_it, set_up),
        tpm_test(what_moved_is_copied_whatever_changed_around_it, set_up_blank),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
