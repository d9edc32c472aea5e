/* Fuzz the journal's recovery.
 *
 *   build/sanitize/fuzz_journal -max_total_time=60 tests/fuzz/corpus/journal
 *
 * An input is 'p' or 's' (plain, sealed), how many commits there are, how much each changes, and
 * then what is done to the file that the writer made of them, four bytes each; or 'P' or 'S' and
 * the file itself, but for its checksums. The oracle:
 *   - what is told of its records makes of the checkpoint what is recovered,
 *   - what is recovered, or shown of what is refused, is an image that was committed, with its
 *     generation: a prefix of the history, never a mixture and never one that was not written,
 *   - a file that was not altered gives the last image; one with a byte other than it was, and no
 *     checksum made to fit, is refused.
 */
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "bytes.h"
#include "check.h"
#include "crc32c.h"
#include "io_memory.h"
#include "journal.h"
#include "journal_recover.h"

enum {
    FILE_BYTES = 4 * JOURNAL_PAGE_BYTES,
    FILE_SECTORS = FILE_BYTES / JOURNAL_SECTOR_BYTES,
    COMMITS_MAX = 7,
    IMAGE_BYTES = 2048,
    BASE_GENERATION = 100,
    OPERATION_BYTES = 4,
    KEEP_CHECKSUM = 0x80, /* in an operation: do not make it right */
};

static uint8_t image_bytes[1 + COMMITS_MAX][IMAGE_BYTES];
static struct image_digest digests[1 + COMMITS_MAX];
static struct delta_image images[1 + COMMITS_MAX];
static uint8_t file[FILE_BYTES], original[FILE_BYTES], other[FILE_BYTES];
static struct journal_settings settings = {
    .identity = "an identity",
    .secret = "a secret",
    .file_bytes = FILE_BYTES,
};

static void make_images(const uint8_t *sizes, size_t n_commits)
{
    for (size_t i = 0; i <= n_commits; i++) {
        size_t n = i == 0 ? IMAGE_BYTES : 1 + sizes[i - 1] * 4U;
        if (i > 0)
            memcpy(image_bytes[i], image_bytes[i - 1], IMAGE_BYTES);
        for (size_t k = 0; k < n; k++)
            image_bytes[i][(i + k * 2) % IMAGE_BYTES] += (uint8_t)(k * k + i + 1);
        check(image_digest_compute(
                  &(struct delta_image){.bytes = image_bytes[i], .n_bytes = IMAGE_BYTES}, NULL,
                  &digests[i]) == 0);
        images[i] =
            (struct delta_image){image_bytes[i], IMAGE_BYTES, BASE_GENERATION + i, &digests[i]};
    }
}

/* Returns how many commits fitted. */
static size_t write_file(const uint8_t salt[JOURNAL_SALT_BYTES], size_t n_commits, uint8_t *out)
{
    struct journal *journal;
    struct io_memory io;
    const uint8_t *bytes;
    size_t n_bytes, n = 0;

    io_memory_init(&io);
    check(journal_create(&io.io, &settings, salt, &images[0], &journal) == 0);
    while (n < n_commits && journal_append(journal, &images[n], &images[n + 1]) == 0)
        n++;
    journal_free(journal);
    check(io_memory_read(&io, JOURNAL_TEMPORARY_NAME, &bytes, &n_bytes) && n_bytes == FILE_BYTES);
    memcpy(out, bytes, FILE_BYTES);
    io_memory_deinit(&io);
    return n;
}

static void put_checksum(uint32_t number)
{
    uint8_t *sector = file + number * JOURNAL_SECTOR_BYTES;

    if (number == 0)
        put_be32(sector + JOURNAL_AT_HEADER_CHECKSUM, crc32c(sector, JOURNAL_AT_HEADER_CHECKSUM));
    else
        put_be32(sector,
                 crc32c(sector + JOURNAL_AT_INDEX, JOURNAL_SECTOR_BYTES - JOURNAL_AT_INDEX));
}

/* Which image the checkpoint has, and how long the file is. */
struct evidence {
    size_t checkpoint;
    size_t n_bytes;
};

static void swap_sectors(uint8_t *a, uint8_t *b)
{
    uint8_t kept[JOURNAL_SECTOR_BYTES];

    memcpy(kept, a, sizeof(kept));
    memmove(a, b, sizeof(kept));
    memcpy(b, kept, sizeof(kept));
}

static void alter(const uint8_t operation[OPERATION_BYTES], size_t n_images, struct evidence *found)
{
    uint32_t offset = get_be16(operation + 1) % FILE_BYTES;
    uint32_t from = operation[1] % FILE_SECTORS, to = operation[2] % FILE_SECTORS;
    uint8_t *at = file + to * JOURNAL_SECTOR_BYTES;

    switch (operation[0] % 8) {
    case 0:
        file[offset] ^= operation[3];
        to = offset / JOURNAL_SECTOR_BYTES;
        break;
    case 1:
        file[offset] = operation[3];
        to = offset / JOURNAL_SECTOR_BYTES;
        break;
    case 2:
        memset(at, 0, JOURNAL_SECTOR_BYTES);
        return;
    case 3:
        memmove(at, file + from * JOURNAL_SECTOR_BYTES, JOURNAL_SECTOR_BYTES);
        return;
    case 4:
        swap_sectors(at, file + from * JOURNAL_SECTOR_BYTES);
        return;
    case 5:
        memcpy(at, other + from * JOURNAL_SECTOR_BYTES, JOURNAL_SECTOR_BYTES);
        return;
    case 6:
        found->n_bytes = offset;
        return;
    default:
        found->checkpoint = operation[1] % n_images;
        return;
    }
    if (!(operation[0] & KEEP_CHECKSUM))
        put_checksum(to);
}

static struct journal_history history;

/* What was told of the records makes of the checkpoint what was recovered. */
static void check_history(const uint8_t *checkpoint, const uint8_t *image,
                          const struct journal_recovery *recovery)
{
    static uint8_t made[2][IMAGE_BYTES_MAX];
    struct delta_image current = {.bytes = checkpoint, .n_bytes = IMAGE_BYTES};
    size_t n_applied = 0;

    check(history.n_steps == recovery->n_records);
    for (size_t i = 0; i < history.n_steps; i++) {
        const struct journal_step *step = &history.steps[i];
        if (!step->is_applied)
            continue;
        uint8_t *next = made[n_applied++ % 2];
        check(delta_make(&current, history.deltas + step->delta_offset, &step->header, next) == 0);
        current = (struct delta_image){.bytes = next, .n_bytes = step->header.result_bytes};
    }
    check(n_applied == recovery->n_applied);
    if (recovery->has_image && n_applied > 0)
        check(current.n_bytes == recovery->image_bytes &&
              memcmp(current.bytes, image, current.n_bytes) == 0);
}

/* Recover, from copies of that size, so that a read past their end is seen. */
static void recover(const struct evidence *found, uint8_t *image, struct journal_recovery *recovery)
{
    uint8_t *copy = malloc(found->n_bytes + 1), *checkpoint = malloc(IMAGE_BYTES);

    check(copy && checkpoint);
    memcpy(copy, file, found->n_bytes);
    memcpy(checkpoint, image_bytes[found->checkpoint], IMAGE_BYTES);
    struct journal_evidence evidence = {
        .checkpoint = checkpoint,
        .checkpoint_bytes = IMAGE_BYTES,
        .journal = copy,
        .journal_bytes = found->n_bytes,
        .identity = settings.identity,
        .secret = settings.sealed ? settings.secret : NULL,
    };
    check(journal_recover_history(&evidence, image, recovery, &history) == 0);
    check_history(checkpoint, image, recovery);
    free(checkpoint);
    free(copy);
}

static void check_image(const uint8_t *image, const struct journal_recovery *recovery,
                        size_t n_images)
{
    size_t number = recovery->generation - BASE_GENERATION;

    check(recovery->image_bytes == IMAGE_BYTES);
    /* Nothing vouches for the numbers of a header that is not sealed and has no records. */
    if (!settings.sealed && recovery->n_records == 0 && number >= n_images)
        number = 0;
    check(number < n_images);
    check(memcmp(image, image_bytes[number], IMAGE_BYTES) == 0);
}

static void check_recovery(const struct evidence *found, size_t n_images)
{
    static uint8_t image[IMAGE_BYTES_MAX];
    struct journal_recovery recovery;

    recover(found, image, &recovery);
    bool may_start = journal_may_start(&recovery);
    check(!may_start || recovery.has_image);
    if (recovery.has_image)
        check_image(image, &recovery, n_images);
    if (found->n_bytes != FILE_BYTES)
        check(!may_start);
    else if (memcmp(file, original, FILE_BYTES) == 0)
        check(may_start && recovery.generation == BASE_GENERATION + n_images - 1);
}

/* Without a checksum made to fit, one byte that is wrong is enough. */
static void check_one_byte(size_t offset, uint8_t difference)
{
    static uint8_t image[IMAGE_BYTES_MAX];
    struct evidence whole = {.n_bytes = FILE_BYTES};
    struct journal_recovery recovery;

    memcpy(file, original, FILE_BYTES);
    file[offset % FILE_BYTES] ^= difference ? difference : 1;
    recover(&whole, image, &recovery);
    check(!journal_may_start(&recovery));
}

static void fuzz_history(const uint8_t *data, size_t n_data)
{
    static const uint8_t salt[JOURNAL_SALT_BYTES] = "a", other_salt[JOURNAL_SALT_BYTES] = "b";
    struct evidence found = {.n_bytes = FILE_BYTES};

    if (n_data < 1 || n_data < 1U + data[0] % (1 + COMMITS_MAX))
        return;
    size_t n_commits = data[0] % (1 + COMMITS_MAX);
    make_images(data + 1, n_commits);
    data += 1 + n_commits, n_data -= 1 + n_commits;
    size_t n_images = 1 + write_file(salt, n_commits, original);
    write_file(other_salt, n_commits, other);
    memcpy(file, original, FILE_BYTES);
    for (; n_data >= OPERATION_BYTES; data += OPERATION_BYTES, n_data -= OPERATION_BYTES)
        alter(data, n_images, &found);
    check_recovery(&found, n_images);
    if (n_data >= 3)
        check_one_byte(get_be16(data), data[2]);
}

/* The corpus has files of a history of no commit. */
static void fuzz_file(const uint8_t *data, size_t n_data)
{
    static const uint8_t salt[JOURNAL_SALT_BYTES] = "a";
    struct evidence found = {.n_bytes = FILE_BYTES};

    if (n_data > FILE_BYTES)
        return;
    make_images(NULL, 0);
    write_file(salt, 0, original);
    memcpy(file, original, FILE_BYTES);
    memcpy(file, data, n_data);
    for (uint32_t sector = 0; sector * JOURNAL_SECTOR_BYTES < n_data; sector++)
        put_checksum(sector);
    check_recovery(&found, 1);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_data)
{
    if (n_data == 0)
        return 0;
    settings.sealed = data[0] == 's' || data[0] == 'S';
    if (data[0] == 's' || data[0] == 'p')
        fuzz_history(data + 1, n_data - 1);
    else if (data[0] == 'S' || data[0] == 'P')
        fuzz_file(data + 1, n_data - 1);
    return 0;
}
