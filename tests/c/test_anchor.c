/* The anchor says what was said last, or at least what was acknowledged, after a loss of power at
 * any step. What it is worth is for tests/unit/test_anchor.py and tests/system/test_anchor.py. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "anchor.h"
#include "bytes.h"
#include "crc32c.h"
#include "io_memory.h"

static const char name[] = "anchor";
static const uint8_t digest[DIGEST_BYTES] = "what the state is the SHA-256 of";

/* Make an anchor as vtpmd does: of zeros, and durable. */
static struct anchor make(struct io_memory *io)
{
    static const uint8_t zeros[ANCHOR_BYTES];
    struct anchor anchor = {.identity = "sixteen bytes id"};

    io_memory_init(io);
    anchor.fd = io->io.create(&io->io, name);
    assert_true(anchor.fd >= 0);
    assert_int_equal(io->io.write_at(&io->io, anchor.fd, zeros, sizeof(zeros), 0), 0);
    assert_int_equal(io->io.sync(&io->io, anchor.fd), 0);
    assert_int_equal(io->io.sync_directory(&io->io), 0);
    return anchor;
}

/* Returns the generation of the newer slot that is whole, or 0. */
static uint64_t said(const struct io_memory *io)
{
    const uint8_t *bytes;
    size_t n_bytes;
    uint64_t serial = 0, generation = 0;

    assert_true(io_memory_read(io, name, &bytes, &n_bytes));
    assert_int_equal(n_bytes, ANCHOR_BYTES);
    for (size_t at = 0; at < n_bytes; at += ANCHOR_SLOT_STRIDE) {
        const uint8_t *slot = bytes + at;
        if (crc32c(slot, 508) != get_be32(slot + 508) || get_be64(slot) != ANCHOR_MAGIC)
            continue;
        assert_memory_equal(slot + 16, "sixteen bytes id", 16);
        assert_int_equal(get_be64(slot + 32) % 2 * ANCHOR_SLOT_STRIDE, at);
        if (get_be64(slot + 32) > serial) {
            serial = get_be64(slot + 32);
            generation = get_be64(slot + 40);
        }
    }
    return generation;
}

/* Lose power at every call of five writes. Returns false if what was acknowledged was lost. */
static bool survives_every_power_loss(int skip_sync)
{
    static struct io_choices choices;
    bool survived = true;

    for (int step = 1;; step++) {
        struct io_memory io;
        struct anchor anchor = make(&io);
        uint64_t acknowledged = 0;
        io.syncs = io.calls = 0;
        io.skip_sync = skip_sync;
        io.fail_from = step;
        while (acknowledged < 5 && anchor_write(&io.io, &anchor, 10 + acknowledged, digest) == 0)
            acknowledged++;
        io_choices_init(&choices);
        do {
            struct io_memory after;
            io_memory_init(&after);
            io_memory_lose_power(&io, &choices, &after);
            uint64_t generation = said(&after);
            survived &= generation == (acknowledged ? 9 + acknowledged : 0) ||
                        generation == 10 + acknowledged;
            io_memory_deinit(&after);
        } while (io_choices_next(&choices));
        io_memory_deinit(&io);
        if (acknowledged == 5)
            return survived;
    }
}

static void every_power_loss_leaves_what_was_acknowledged(void **state)
{
    (void)state;
    assert_true(survives_every_power_loss(0));
}

static void canary_a_skipped_sync_is_caught(void **state)
{
    (void)state;
    for (int sync = 1; sync <= 5; sync++)
        assert_false(survives_every_power_loss(sync));
}

/* Returns whether a slot says that a state is there, or may be. */
static bool admits(const struct io_memory *io, const uint8_t *state_digest)
{
    const uint8_t *bytes, *newest = NULL;
    size_t n_bytes;

    assert_true(io_memory_read(io, name, &bytes, &n_bytes));
    for (size_t at = 0; at < n_bytes; at += ANCHOR_SLOT_STRIDE) {
        const uint8_t *slot = bytes + at;
        if (crc32c(slot, 508) == get_be32(slot + 508) &&
            (!newest || get_be64(slot + 32) > get_be64(newest + 32)))
            newest = slot;
    }
    return newest && (memcmp(newest + 48, state_digest, DIGEST_BYTES) == 0 ||
                      memcmp(newest + 80, state_digest, DIGEST_BYTES) == 0);
}

/* A file that takes another's place: whichever is there after a loss of power, the anchor knows it;
 * once the change was acknowledged, only that. */
static void what_is_expected_may_be_there(void **state)
{
    static const uint8_t next[DIGEST_BYTES] = "what takes the state's place";
    struct io_memory io;

    (void)state;
    struct anchor anchor = make(&io);
    assert_int_equal(anchor_write(&io.io, &anchor, 1, digest), 0);
    assert_true(admits(&io, digest));
    assert_false(admits(&io, next));
    assert_int_equal(anchor_expect(&io.io, &anchor, next), 0);
    assert_true(admits(&io, digest));
    assert_true(admits(&io, next));
    assert_int_equal(anchor_expect(&io.io, &anchor, next), 0);
    assert_true(admits(&io, digest));
    assert_int_equal(anchor_write(&io.io, &anchor, 2, next), 0);
    assert_false(admits(&io, digest));
    assert_true(admits(&io, next));
    io_memory_deinit(&io);
}

static void a_failed_write_may_be_repeated(void **state)
{
    struct io_memory io;

    (void)state;
    struct anchor anchor = make(&io);
    assert_int_equal(anchor_write(&io.io, &anchor, 1, digest), 0);
    io.calls = 0;
    io.fail_from = 1;
    io.fail_error = ENOSPC;
    assert_int_equal(anchor_write(&io.io, &anchor, 2, digest), -ENOSPC);
    assert_int_equal(said(&io), 1);
    io.fail_from = 0;
    assert_int_equal(anchor_write(&io.io, &anchor, 3, digest), 0);
    assert_int_equal(said(&io), 3);
    io_memory_deinit(&io);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_power_loss_leaves_what_was_acknowledged),
        cmocka_unit_test(canary_a_skipped_sync_is_caught),
        cmocka_unit_test(what_is_expected_may_be_there),
        cmocka_unit_test(a_failed_write_may_be_repeated),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
