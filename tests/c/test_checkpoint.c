/* Invariant 2: after a loss of power at any step, the state file is the last durable one or the
 * next, whole; and once a write was acknowledged, it is that one. In the clear, and encrypted. */
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>

#include "bytes.h"
#include "checkpoint.h"
#include "io_memory.h"

static const uint8_t old_state[] = "the state as it was", new_state[] = "what the guest wrote";

enum outcome { ABSENT, TORN, OLD, NEW };

/* What the tests of one run write with; NULL: in the clear. */
static const struct cipher_key *key;

static const struct cipher_key key_128 = {16, "a key of 16 byte"},
                               key_256 = {32, "a key of 32 bytes, twice as long"};

/* Return what a TLV at the beginning of *bytes holds, and go past it. */
static const uint8_t *take_tlv(const uint8_t **bytes, const uint8_t *end, unsigned tag,
                               size_t *n_bytes)
{
    if (end - *bytes < 6 || get_be16(*bytes) != tag || get_be32(*bytes + 2) > end - *bytes - 6)
        return NULL;
    const uint8_t *data = *bytes + 6;
    *n_bytes = get_be32(*bytes + 2);
    *bytes = data + *n_bytes;
    return data;
}

/* Decrypt a file's TLVs apart from the code under test; the padding is left at the end. */
static bool decrypt(const uint8_t *bytes, const uint8_t *end, uint8_t *out, size_t *n_bytes)
{
    uint8_t authenticated[1024], mac[32];
    const EVP_CIPHER *cipher = key->n_bytes == 16 ? EVP_aes_128_cbc() : EVP_aes_256_cbc();
    size_t mac_bytes, iv_bytes;
    int n = 0;

    const uint8_t *ciphertext = take_tlv(&bytes, end, 2, n_bytes);
    const uint8_t *found = ciphertext ? take_tlv(&bytes, end, 3, &mac_bytes) : NULL;
    const uint8_t *iv = found ? take_tlv(&bytes, end, 6, &iv_bytes) : NULL;
    if (!iv || bytes != end || mac_bytes != sizeof(mac) || iv_bytes != key->n_bytes)
        return false;
    assert_true(*n_bytes + iv_bytes <= sizeof(authenticated));
    memcpy(authenticated, ciphertext, *n_bytes);
    memcpy(authenticated + *n_bytes, iv, iv_bytes);
    HMAC(EVP_sha256(), key->bytes, (int)key->n_bytes, authenticated, *n_bytes + iv_bytes, mac,
         NULL);
    if (memcmp(mac, found, sizeof(mac)) != 0)
        return false;
    EVP_CIPHER_CTX *context = EVP_CIPHER_CTX_new();
    assert_int_equal(EVP_DecryptInit_ex(context, cipher, NULL, key->bytes, iv), 1);
    assert_int_equal(EVP_CIPHER_CTX_set_padding(context, 0), 1);
    assert_int_equal(EVP_DecryptUpdate(context, out, &n, ciphertext, (int)*n_bytes), 1);
    EVP_CIPHER_CTX_free(context);
    return (size_t)n == *n_bytes;
}

static bool holds(const uint8_t *bytes, size_t n_bytes, const uint8_t *state, size_t state_bytes)
{
    uint8_t plain[1024];
    size_t plain_bytes;

    if (!key)
        return n_bytes == CHECKPOINT_HEADER_BYTES + state_bytes && get_be16(bytes + 4) == 0 &&
               memcmp(bytes + CHECKPOINT_HEADER_BYTES, state, state_bytes) == 0;
    if (n_bytes < 10 || get_be32(bytes + 6) != n_bytes ||
        get_be16(bytes + 4) != (key->n_bytes == 16 ? 0x01 : 0x09))
        return false;
    if (!decrypt(bytes + 10, bytes + n_bytes, plain, &plain_bytes))
        return false;
    uint8_t padding = plain[plain_bytes - 1];
    if (padding == 0 || padding > key->n_bytes || plain_bytes % key->n_bytes != 0)
        return false;
    for (size_t i = plain_bytes - padding; i < plain_bytes; i++)
        if (plain[i] != padding)
            return false;
    return plain_bytes - padding == state_bytes && memcmp(plain, state, state_bytes) == 0;
}

static enum outcome state_file(const struct io_memory *io)
{
    const uint8_t *bytes;
    size_t n_bytes;

    if (!io_memory_read(io, "tpm2-00.permall", &bytes, &n_bytes))
        return ABSENT;
    if (holds(bytes, n_bytes, old_state, sizeof(old_state)))
        return OLD;
    return holds(bytes, n_bytes, new_state, sizeof(new_state)) ? NEW : TORN;
}

/* Returns the outcomes, as bits, of all losses of power that are possible now. */
static unsigned after_power_loss(const struct io_memory *io)
{
    static struct io_choices choices;
    unsigned outcomes = 0;

    io_choices_init(&choices);
    do {
        struct io_memory after;
        io_memory_init(&after);
        io_memory_lose_power(io, &choices, &after);
        outcomes |= 1U << state_file(&after);
        io_memory_deinit(&after);
    } while (io_choices_next(&choices));
    return outcomes;
}

/* Lose power at every call of a write. Returns false if a state was lost at any of them. */
static bool survives_every_power_loss(int skip_sync)
{
    bool survived = true;

    for (int step = 1;; step++) {
        struct io_memory io;
        io_memory_init(&io);
        assert_int_equal(
            checkpoint_write(&io.io, key, "permall", old_state, sizeof(old_state), NULL), 0);
        io.syncs = io.calls = 0;
        io.skip_sync = skip_sync;
        io.fail_from = step;
        bool acknowledged =
            checkpoint_write(&io.io, key, "permall", new_state, sizeof(new_state), NULL) == 0;
        unsigned allowed = acknowledged ? 1U << NEW : 1U << OLD | 1U << NEW;
        survived &= (after_power_loss(&io) & ~allowed) == 0;
        io_memory_deinit(&io);
        if (acknowledged)
            return survived;
        assert_true(step < 20);
    }
}

static void invariant_2_every_power_loss_leaves_a_whole_state(void **state)
{
    (void)state;
    assert_true(survives_every_power_loss(0));
}

static void canary_either_sync_is_missed(void **state)
{
    (void)state;
    assert_false(survives_every_power_loss(1));
    assert_false(survives_every_power_loss(2));
    assert_true(survives_every_power_loss(3)); /* there is no third */
}

static void a_failed_write_keeps_the_old_state_and_leaves_no_temporary_file(void **state)
{
    (void)state;
    for (int step = 1; step <= 4; step++) {
        struct io_memory io;
        const uint8_t *bytes;
        size_t n_bytes;
        io_memory_init(&io);
        assert_int_equal(
            checkpoint_write(&io.io, key, "permall", old_state, sizeof(old_state), NULL), 0);
        io.calls = 0;
        io.fail_from = step;
        io.fail_error = ENOSPC;
        assert_int_equal(
            checkpoint_write(&io.io, key, "permall", new_state, sizeof(new_state), NULL), -ENOSPC);
        assert_true(io_memory_read(&io, "tpm2-00.permall", &bytes, &n_bytes));
        assert_true(holds(bytes, n_bytes, old_state, sizeof(old_state)));
        io.fail_from = 0;
        assert_int_equal(
            checkpoint_write(&io.io, key, "permall", new_state, sizeof(new_state), NULL), 0);
        assert_false(io_memory_read(&io, "TMP2-00.permall", &bytes, &n_bytes));
        io_memory_deinit(&io);
    }
}

static void removal_is_durable_and_may_be_repeated(void **state)
{
    struct io_memory io;

    (void)state;
    io_memory_init(&io);
    assert_int_equal(checkpoint_write(&io.io, key, "permall", old_state, sizeof(old_state), NULL),
                     0);
    assert_int_equal(checkpoint_remove(&io.io, "permall"), 0);
    assert_int_equal(after_power_loss(&io), 1U << ABSENT);
    assert_int_equal(checkpoint_remove(&io.io, "permall"), 0);
    io_memory_deinit(&io);
}

static void a_link_in_the_temporary_files_place_is_not_written_through(void **state)
{
    char path[] = "/tmp/test_checkpoint.XXXXXX", victim[64], content[16] = "";
    struct stat status;

    (void)state;
    assert_non_null(mkdtemp(path));
    int directory = open(path, O_RDONLY | O_DIRECTORY);
    snprintf(victim, sizeof(victim), "%s/victim", path);
    int fd = open(victim, O_RDWR | O_CREAT, 0600);
    assert_int_equal(write(fd, "mine", 4), 4);
    assert_int_equal(symlinkat("victim", directory, "TMP2-00.permall"), 0);

    struct io_posix io = {.io = io_posix_functions, .directory_fd = directory};
    assert_int_equal(checkpoint_write(&io.io, key, "permall", new_state, sizeof(new_state), NULL),
                     0);

    assert_int_equal(pread(fd, content, sizeof(content), 0), 4);
    assert_string_equal(content, "mine");
    assert_int_equal(fstatat(directory, "tpm2-00.permall", &status, AT_SYMLINK_NOFOLLOW), 0);
    assert_true(S_ISREG(status.st_mode));
    assert_int_equal(status.st_mode & 07777, IO_POSIX_MODE);
    unlinkat(directory, "victim", 0);
    unlinkat(directory, "tpm2-00.permall", 0);
    close(fd);
    close(directory);
    rmdir(path);
}

/* Every length up to two blocks, so that each padding there is occurs. */
static void states_of_all_lengths_are_held(void **state)
{
    uint8_t bytes[64];

    (void)state;
    memset(bytes, 0x5a, sizeof(bytes));
    for (size_t length = 1; length <= sizeof(bytes); length++) {
        struct io_memory io;
        const uint8_t *file;
        size_t file_bytes;
        io_memory_init(&io);
        assert_int_equal(checkpoint_write(&io.io, key, "permall", bytes, length, NULL), 0);
        assert_true(io_memory_read(&io, "tpm2-00.permall", &file, &file_bytes));
        assert_true(holds(file, file_bytes, bytes, length));
        io_memory_deinit(&io);
    }
}

static void no_two_writes_have_a_block_in_common(void **state)
{
    const struct cipher_key *keys[] = {&key_128, &key_256};
    static uint8_t zeros[256];

    (void)state;
    for (size_t i = 0; i < 2; i++) {
        struct cipher_output first, second;
        assert_int_equal(cipher_encrypt(keys[i], zeros, sizeof(zeros), &first), 0);
        assert_int_equal(cipher_encrypt(keys[i], zeros, sizeof(zeros), &second), 0);
        for (size_t at = 0; at < first.n_bytes; at += 16)
            for (size_t other = 0; other < second.n_bytes; other += 16)
                assert_memory_not_equal(first.ciphertext + at, second.ciphertext + other, 16);
        cipher_output_deinit(&first);
        cipher_output_deinit(&second);
    }
}

int main(void)
{
    const struct cipher_key *keys[] = {NULL, &key_128, &key_256};
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(invariant_2_every_power_loss_leaves_a_whole_state),
        cmocka_unit_test(canary_either_sync_is_missed),
        cmocka_unit_test(a_failed_write_keeps_the_old_state_and_leaves_no_temporary_file),
        cmocka_unit_test(removal_is_durable_and_may_be_repeated),
        cmocka_unit_test(a_link_in_the_temporary_files_place_is_not_written_through),
        cmocka_unit_test(states_of_all_lengths_are_held),
        cmocka_unit_test(no_two_writes_have_a_block_in_common),
    };
    int failed = 0;

    for (size_t i = 0; i < sizeof(keys) / sizeof(*keys); i++) {
        key = keys[i];
        failed += cmocka_run_group_tests(tests, NULL, NULL);
    }
    return failed;
}
