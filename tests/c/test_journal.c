/* The journal, written on a file system that loses power and read by its recovery.
 *
 * Invariant 1: a commit that was acknowledged is there after a loss of power at any later call.
 * Invariant 2: what is recovered is a generation that was committed, at least the last one that was
 * acknowledged; a file that was altered is refused, whatever was altered.
 *
 * Losses of power are enumerated exhaustively here, for short histories. Long ones, with folding:
 * test_durable.c.
 */
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "bytes.h"
#include "checkpoint.h"
#include "crc32c.h"
#include "io_memory.h"
#include "journal.h"
#include "journal_recover.h"

enum {
    FILE_BYTES = 2 * JOURNAL_PAGE_BYTES, /* small, so that everything in it can be tried */
    FILE_SECTORS = FILE_BYTES / JOURNAL_SECTOR_BYTES,
    BASE_GENERATION = 10,
    IMAGES_MAX = 8,
    IMAGE_BYTES = 3000,
};

/* The images of a history, one a generation. */
static uint8_t image_bytes[IMAGES_MAX][IMAGE_BYTES];
static struct image_digest image_digests[IMAGES_MAX];
static struct delta_image images[IMAGES_MAX];

static const struct journal_settings plain_settings = {
    .identity = "this vTPM's own.",
    .file_bytes = FILE_BYTES,
};
static const struct journal_settings sealed_settings = {
    .identity = "this vTPM's own.",
    .secret = "a secret of thirty-two bytes....",
    .sealed = true,
    .file_bytes = FILE_BYTES,
};
static const uint8_t salt[JOURNAL_SALT_BYTES] = "salt", other_salt[JOURNAL_SALT_BYTES] = "other";

/* `changes[i]` is how many bytes image i + 1 differs by from image i. */
static void make_images(const size_t *changes, size_t n_changes)
{
    assert_true(n_changes < IMAGES_MAX);
    for (size_t i = 0; i <= n_changes; i++) {
        if (i > 0)
            memcpy(image_bytes[i], image_bytes[i - 1], IMAGE_BYTES);
        for (size_t k = 0; k < (i == 0 ? IMAGE_BYTES : changes[i - 1]); k++)
            image_bytes[i][k * 2 % IMAGE_BYTES] = (uint8_t)(k * k + i * 31 + k / 256 + 1);
        assert_int_equal(image_digest_compute(
                             &(struct delta_image){.bytes = image_bytes[i], .n_bytes = IMAGE_BYTES},
                             NULL, &image_digests[i]),
                         0);
        images[i] = (struct delta_image){image_bytes[i], IMAGE_BYTES, BASE_GENERATION + i,
                                         &image_digests[i]};
    }
}

/* Write image 0 into the checkpoint, make a journal and append the others. Returns how many images
 * were acknowledged, all 1 + n_appends unless a call fails. */
static size_t write_history(struct io_memory *io, const struct journal_settings *settings,
                            size_t n_appends)
{
    struct journal *journal;
    size_t n = 0;

    if (checkpoint_write(&io->io, NULL, "permall", image_bytes[0], IMAGE_BYTES, NULL) < 0)
        return n;
    n++;
    if (journal_create(&io->io, settings, salt, &images[0], &journal) < 0)
        return n;
    int r = journal_publish(journal);
    while (r == 0 && n <= n_appends) {
        r = journal_append(journal, &images[n - 1], &images[n]);
        assert_int_not_equal(r, JOURNAL_FULL);
        n += r == 0;
    }
    journal_free(journal);
    return n;
}

static const uint8_t *secret_of(const struct journal_settings *settings)
{
    return settings->sealed ? settings->secret : NULL;
}

/* Read the two files as a start does. */
static void recover(const struct io_memory *io, const struct journal_settings *settings,
                    uint8_t *image, struct journal_recovery *recovery)
{
    struct journal_evidence evidence = {
        .identity = settings->identity,
        .secret = secret_of(settings),
    };

    if (io_memory_read(io, "tpm2-00.permall", &evidence.checkpoint, &evidence.checkpoint_bytes)) {
        if (evidence.checkpoint_bytes < CHECKPOINT_HEADER_BYTES) {
            *recovery = (struct journal_recovery){.verdict = JOURNAL_E_HEADER_WRONG};
            return;
        }
        evidence.checkpoint += CHECKPOINT_HEADER_BYTES;
        evidence.checkpoint_bytes -= CHECKPOINT_HEADER_BYTES;
    }
    io_memory_read(io, JOURNAL_NAME, &evidence.journal, &evidence.journal_bytes);
    assert_int_equal(journal_recover(&evidence, image, recovery), 0);
    if (recovery->verdict == JOURNAL_B_CHECKPOINT) {
        memcpy(image, evidence.checkpoint, evidence.checkpoint_bytes);
        recovery->image_bytes = evidence.checkpoint_bytes;
    }
}

/* The oracle. Returns the number of the image that was recovered, plus one; 0 for none. */
static size_t recovered_image(const struct io_memory *io, const struct journal_settings *settings)
{
    static uint8_t image[IMAGE_BYTES_MAX];
    struct journal_recovery recovery;

    recover(io, settings, image, &recovery);
    if (!journal_may_start(&recovery))
        return 0;
    for (size_t i = 0; i < IMAGES_MAX; i++)
        if (recovery.image_bytes == IMAGE_BYTES && memcmp(image, image_bytes[i], IMAGE_BYTES) == 0)
            return recovery.verdict == JOURNAL_B_CHECKPOINT ||
                           recovery.generation == BASE_GENERATION + i
                       ? i + 1
                       : 0;
    return 0;
}

/* Lose power at every call of a history, in every way. Before the checkpoint is there nothing can
 * be lost. Returns false at the first generation that was lost. */
static bool survives_every_power_loss(const struct journal_settings *settings, size_t n_appends,
                                      int skip_sync)
{
    static struct io_choices choices;
    size_t acknowledged = 0;
    bool survived = true;

    for (int step = 1; acknowledged <= n_appends && survived; step++) {
        struct io_memory io, after;
        io_memory_init(&io);
        io_memory_init(&after);
        io.fail_from = step;
        io.skip_sync = skip_sync;
        acknowledged = write_history(&io, settings, n_appends);
        io_choices_init(&choices);
        do {
            io_memory_lose_power(&io, &choices, &after);
            size_t found = recovered_image(&after, settings);
            survived = acknowledged == 0 || (found >= acknowledged && found <= acknowledged + 1);
        } while (survived && io_choices_next(&choices));
        io_memory_deinit(&io);
        io_memory_deinit(&after);
    }
    return survived;
}

/* Records of one sector, of many, and one that is moved to the next page. */
static const size_t short_history[] = {8, 400, 20, 700, 8};
enum {
    SHORT_APPENDS = sizeof(short_history) / sizeof(*short_history),
    SHORT_SYNCS = 4 + SHORT_APPENDS, /* checkpoint and journal with their directory; records */
};

static void invariant_1_every_power_loss_leaves_what_was_acknowledged(void **state)
{
    (void)state;
    make_images(short_history, SHORT_APPENDS);
    assert_true(survives_every_power_loss(&plain_settings, SHORT_APPENDS, 0));
    assert_true(survives_every_power_loss(&sealed_settings, SHORT_APPENDS, 0));
}

static void canary_every_sync_that_is_left_out_is_missed(void **state)
{
    (void)state;
    make_images(short_history, SHORT_APPENDS);
    for (int sync = 1; sync <= SHORT_SYNCS; sync++)
        assert_false(survives_every_power_loss(&plain_settings, SHORT_APPENDS, sync));
    assert_true(survives_every_power_loss(&plain_settings, SHORT_APPENDS, SHORT_SYNCS + 1));
}

/* A journal as bytes, to be altered. */
struct file {
    uint8_t bytes[FILE_BYTES];
};

/* Images 0 to 3: a record in sector 1, one in sector 2, one in sectors 3 to 5. */
static const size_t sample_changes[] = {8, 20, 500};
enum {
    SAMPLE_APPENDS = sizeof(sample_changes) / sizeof(*sample_changes),
    FIRST_RECORD = 1,
    SECOND_RECORD = 2,
    LAST_RECORD = 3,
    LAST_RECORD_SECTORS = 3,
    FIRST_FREE_SECTOR = LAST_RECORD + LAST_RECORD_SECTORS,
};

/* `bases` and `written` are the same, unless the writer is to lie. */
static void write_file(const struct journal_settings *settings, const uint8_t *file_salt,
                       const struct delta_image *bases, const struct delta_image *written,
                       size_t n_images, struct file *file)
{
    struct journal *journal;
    struct io_memory io;
    const uint8_t *bytes;
    size_t n_bytes;

    io_memory_init(&io);
    assert_int_equal(journal_create(&io.io, settings, file_salt, &written[0], &journal), 0);
    assert_int_equal(journal_publish(journal), 0);
    for (size_t i = 1; i < n_images; i++)
        assert_int_equal(journal_append(journal, &bases[i - 1], &written[i]), 0);
    journal_free(journal);
    assert_true(io_memory_read(&io, JOURNAL_NAME, &bytes, &n_bytes));
    assert_int_equal(n_bytes, FILE_BYTES);
    memcpy(file->bytes, bytes, n_bytes);
    io_memory_deinit(&io);
}

static void make_sample(const struct journal_settings *settings, struct file *file)
{
    make_images(sample_changes, SAMPLE_APPENDS);
    write_file(settings, salt, images, images, 1 + SAMPLE_APPENDS, file);
}

static uint8_t *sector_of(struct file *file, uint32_t sector)
{
    return file->bytes + (size_t)sector * JOURNAL_SECTOR_BYTES;
}

static void empty_sector(struct file *file, uint32_t sector)
{
    memset(sector_of(file, sector), 0, JOURNAL_SECTOR_BYTES);
}

/* Make a sector's own checksum right again: what is left to notice it is the chain. */
static void put_sector_checksum(struct file *file, uint32_t sector)
{
    uint8_t *bytes = sector_of(file, sector);

    put_be32(bytes, crc32c(bytes + JOURNAL_AT_INDEX, JOURNAL_SECTOR_BYTES - JOURNAL_AT_INDEX));
}

static void put_header_checksum(struct file *file)
{
    put_be32(file->bytes + JOURNAL_AT_HEADER_CHECKSUM,
             crc32c(file->bytes, JOURNAL_AT_HEADER_CHECKSUM));
}

/* Every combination of what the table in journal_recover.c tells apart. */

enum checkpoint { CHECKPOINT_NONE, CHECKPOINT_PLAIN, CHECKPOINT_CONTINUED, N_CHECKPOINTS };
enum header {
    NO_JOURNAL,
    HEADER_RIGHT,
    HEADER_SHORT_FILE,
    HEADER_CUT_FILE,
    HEADER_MAGIC,
    HEADER_CHECKSUM,
    HEADER_NUMBER,
    HEADER_VERSION,
    HEADER_FLAG,
    N_HEADERS
};
enum owner { OWNER_UNKNOWN, OWNER_OURS, OWNER_FOREIGN, N_OWNERS };
enum key { KEY_NOT_SEALED, KEY_RIGHT, KEY_NEEDED, KEY_UNUSED, KEY_WRONG, N_KEYS };
enum records {
    RECORDS_NONE,
    RECORDS_WHOLE,
    RECORDS_TORN_FIRST,
    RECORDS_TORN_MIDDLE,
    RECORDS_TORN_LAST,
    RECORDS_ALTERED,
    RECORDS_ALTERED_EMPTY,
    RECORDS_MISSING,
    RECORDS_SWAPPED,
    RECORDS_MOVED,
    RECORDS_GAP,
    RECORDS_LENGTH,
    RECORDS_PADDING,
    RECORDS_RELINKED,
    RECORDS_OTHER_FILE,
    RECORDS_OTHER_BASE,
    RECORDS_OTHER_GENERATION, /* this one and the next: not sealed, as they are made by hand */
    RECORDS_OTHER_TYPE,
    RECORDS_DELTA,
    N_RECORDS
};
enum image { IMAGE_BASE, IMAGE_MIDDLE, IMAGE_LAST, IMAGE_OLDER, N_IMAGES };
enum result { RESULT_RIGHT, RESULT_DIFFERS, N_RESULTS };

struct scene {
    enum checkpoint checkpoint;
    enum header header;
    enum owner owner;
    enum key key;
    enum records records;
    enum image image;
    enum result result;
};

#define BIT(value) (1U << (value))
#define ANY (~0U)
#define SOME_CHECKPOINT (BIT(CHECKPOINT_PLAIN) | BIT(CHECKPOINT_CONTINUED))
#define SOME_JOURNAL (~BIT(NO_JOURNAL))
#define RIGHT BIT(HEADER_RIGHT)
#define UNKNOWN (BIT(HEADER_VERSION) | BIT(HEADER_FLAG))
#define OURS (BIT(OWNER_UNKNOWN) | BIT(OWNER_OURS))
#define KEY (BIT(KEY_NOT_SEALED) | BIT(KEY_RIGHT))
#define TORN (BIT(RECORDS_TORN_FIRST) | BIT(RECORDS_TORN_MIDDLE) | BIT(RECORDS_TORN_LAST))
#define WHOLE (BIT(RECORDS_NONE) | BIT(RECORDS_WHOLE))
#define JOINED (~BIT(IMAGE_OLDER))

/* The table. What a column allows is a set. */
static const struct row {
    enum journal_verdict verdict;
    unsigned checkpoint, header, owner, key, records, image, result;
} rows[] = {
    {'A', BIT(CHECKPOINT_NONE), BIT(NO_JOURNAL), ANY, ANY, ANY, ANY, ANY},
    {'B', BIT(CHECKPOINT_PLAIN), BIT(NO_JOURNAL), ANY, ANY, ANY, ANY, ANY},
    {'C', BIT(CHECKPOINT_CONTINUED), BIT(NO_JOURNAL), ANY, ANY, ANY, ANY, ANY},
    {'D', BIT(CHECKPOINT_NONE), SOME_JOURNAL, ANY, ANY, ANY, ANY, ANY},
    {'E', SOME_CHECKPOINT, SOME_JOURNAL & ~RIGHT & ~UNKNOWN, ANY, ANY, ANY, ANY, ANY},
    {'F', SOME_CHECKPOINT, UNKNOWN, ANY, ANY, ANY, ANY, ANY},
    {'G', SOME_CHECKPOINT, RIGHT, ~OURS, ANY, ANY, ANY, ANY},
    {'H', SOME_CHECKPOINT, RIGHT, OURS, BIT(KEY_NEEDED), ANY, ANY, ANY},
    {'I', SOME_CHECKPOINT, RIGHT, OURS, BIT(KEY_UNUSED), ANY, ANY, ANY},
    {'J', SOME_CHECKPOINT, RIGHT, OURS, BIT(KEY_WRONG), ANY, ANY, ANY},
    {'K', SOME_CHECKPOINT, RIGHT, OURS, KEY, ~WHOLE & ~TORN, ANY, ANY},
    {'L', SOME_CHECKPOINT, RIGHT, OURS, KEY, WHOLE | TORN, ~JOINED, ANY},
    {'M', SOME_CHECKPOINT, RIGHT, OURS, KEY, WHOLE | TORN, JOINED, BIT(RESULT_DIFFERS)},
    {'N', SOME_CHECKPOINT, RIGHT, OURS, KEY, TORN, JOINED, BIT(RESULT_RIGHT)},
    {'O', SOME_CHECKPOINT, RIGHT, OURS, KEY, WHOLE, JOINED, BIT(RESULT_RIGHT)},
};

static bool fits(const struct row *row, const struct scene *scene)
{
    return row->checkpoint & BIT(scene->checkpoint) && row->header & BIT(scene->header) &&
           row->owner & BIT(scene->owner) && row->key & BIT(scene->key) &&
           row->records & BIT(scene->records) && row->image & BIT(scene->image) &&
           row->result & BIT(scene->result);
}

/* The one row that fits. */
static enum journal_verdict expected_verdict(const struct scene *scene)
{
    enum journal_verdict verdict = 0;

    for (size_t i = 0; i < sizeof(rows) / sizeof(*rows); i++)
        if (fits(&rows[i], scene)) {
            assert_int_equal(verdict, 0);
            verdict = rows[i].verdict;
        }
    assert_int_not_equal(verdict, 0);
    return verdict;
}

/* How many images the journal of a scene has: the torn ones have a last record, to be torn. */
static size_t images_in(enum records records)
{
    return records == RECORDS_NONE ? 1 : 1 + SAMPLE_APPENDS;
}

static size_t images_left(enum records records)
{
    return images_in(records) - (BIT(records) & TORN ? 1 : 0);
}

/* What is found, if the records are damaged. */
static const enum journal_fault faults[] = {
    [RECORDS_ALTERED] = JOURNAL_FAULT_SECTOR,
    [RECORDS_ALTERED_EMPTY] = JOURNAL_FAULT_SECTOR,
    [RECORDS_MISSING] = JOURNAL_FAULT_ORDER,
    [RECORDS_SWAPPED] = JOURNAL_FAULT_ORDER,
    [RECORDS_MOVED] = JOURNAL_FAULT_ORDER,
    [RECORDS_GAP] = JOURNAL_FAULT_GAP,
    [RECORDS_LENGTH] = JOURNAL_FAULT_RECORD,
    [RECORDS_PADDING] = JOURNAL_FAULT_RECORD,
    [RECORDS_RELINKED] = JOURNAL_FAULT_LINK,
    [RECORDS_OTHER_FILE] = JOURNAL_FAULT_LINK,
    [RECORDS_OTHER_BASE] = JOURNAL_FAULT_OTHER_BASE,
    [RECORDS_OTHER_GENERATION] = JOURNAL_FAULT_OTHER_BASE,
    [RECORDS_OTHER_TYPE] = JOURNAL_FAULT_OTHER_BASE,
    [RECORDS_DELTA] = JOURNAL_FAULT_DELTA,
};

/* Put a byte into the delta of the first record, and make all that vouches for it right again, but
 * for the delta's own checksum if that is to stay. */
static void forge_delta(struct file *file, size_t offset, uint8_t value, bool put_delta_checksum)
{
    uint8_t link[JOURNAL_LINK_BYTES];
    uint8_t *content = sector_of(file, FIRST_RECORD) + JOURNAL_FRAME_BYTES;
    uint8_t *delta = content + JOURNAL_RECORD_HEADER_BYTES;
    uint32_t delta_bytes = get_be32(content), checked_bytes = delta_bytes - DELTA_CHECKSUM_BYTES;

    delta[offset] = value;
    if (put_delta_checksum)
        put_be32(delta + checked_bytes, crc32c(delta, checked_bytes));
    assert_int_equal(journal_first_link(file->bytes, link), 0);
    assert_int_equal(journal_next_link(link, content, delta_bytes, content + JOURNAL_AT_LINK), 0);
    put_sector_checksum(file, FIRST_RECORD);
}

/* The record in the last sectors begins with its delta's length and its link. */
static void alter_record(const struct journal_settings *settings, enum records records,
                         struct file *file)
{
    uint8_t *first = sector_of(file, FIRST_RECORD), *second = sector_of(file, SECOND_RECORD);
    uint8_t *content = second + JOURNAL_FRAME_BYTES, swapped[JOURNAL_SECTOR_BYTES];
    struct file other;

    switch (records) {
    case RECORDS_ALTERED:
        second[100] ^= 1;
        break;
    case RECORDS_ALTERED_EMPTY:
        sector_of(file, FIRST_FREE_SECTOR + 1)[511] = 1;
        break;
    case RECORDS_MISSING:
        empty_sector(file, SECOND_RECORD);
        break;
    case RECORDS_SWAPPED:
        memcpy(swapped, first, sizeof(swapped));
        memcpy(first, second, sizeof(swapped));
        memcpy(second, swapped, sizeof(swapped));
        break;
    case RECORDS_MOVED:
        memmove(sector_of(file, LAST_RECORD + 1), sector_of(file, LAST_RECORD),
                LAST_RECORD_SECTORS * JOURNAL_SECTOR_BYTES);
        empty_sector(file, LAST_RECORD);
        break;
    case RECORDS_OTHER_GENERATION:
        forge_delta(file, 23, BASE_GENERATION - 1, true);
        break;
    case RECORDS_OTHER_TYPE:
        forge_delta(file, 5, JOURNAL_IMAGE_TYPE + 1, true);
        break;
    case RECORDS_DELTA:
        forge_delta(file, 100, 0, false);
        break;
    case RECORDS_GAP:
        empty_sector(file, LAST_RECORD);
        memcpy(sector_of(file, FIRST_FREE_SECTOR + 1), first, JOURNAL_SECTOR_BYTES);
        break;
    case RECORDS_LENGTH:
        put_be32(content, get_be32(content) + JOURNAL_PART_BYTES);
        put_sector_checksum(file, SECOND_RECORD);
        break;
    case RECORDS_PADDING:
        second[JOURNAL_SECTOR_BYTES - 1] = 1;
        put_sector_checksum(file, SECOND_RECORD);
        break;
    case RECORDS_RELINKED:
        content[JOURNAL_AT_LINK + JOURNAL_LINK_BYTES - 1] ^= 1;
        put_sector_checksum(file, SECOND_RECORD);
        break;
    case RECORDS_OTHER_FILE:
        write_file(settings, other_salt, images, images, 1 + SAMPLE_APPENDS, &other);
        memcpy(second, sector_of(&other, SECOND_RECORD), JOURNAL_SECTOR_BYTES);
        break;
    default:
        break;
    }
}

static void alter_header(enum header header, struct file *file)
{
    switch (header) {
    case HEADER_MAGIC:
        file->bytes[7] ^= 1;
        break;
    case HEADER_CHECKSUM:
        file->bytes[JOURNAL_AT_BASE_DIGEST] ^= 1;
        return;
    case HEADER_NUMBER:
        put_be32(file->bytes + JOURNAL_AT_BASE_BYTES, IMAGE_BYTES_MAX + 1);
        break;
    case HEADER_VERSION:
        put_be16(file->bytes + JOURNAL_AT_VERSION, JOURNAL_VERSION + 1);
        break;
    case HEADER_FLAG:
        file->bytes[JOURNAL_AT_INCOMPATIBLE] = 1;
        break;
    default:
        return;
    }
    put_header_checksum(file);
}

/* Make the records of a scene. Wrong digests are put in by a writer that believes in them. */
static void make_records(const struct scene *scene, const struct journal_settings *settings,
                         struct file *file)
{
    static const struct image_digest wrong_digest = {.whole = "wrong"};
    size_t n_images = images_in(scene->records);
    struct delta_image bases[IMAGES_MAX], written[IMAGES_MAX];

    memcpy(written, images, sizeof(images));
    if (scene->result == RESULT_DIFFERS)
        written[images_left(scene->records) - 1].digest = &wrong_digest;
    memcpy(bases, written, sizeof(written));
    if (scene->records == RECORDS_OTHER_BASE)
        bases[1].digest = &wrong_digest;
    write_file(settings, salt, bases, written, n_images, file);
    for (uint32_t i = 0; i < LAST_RECORD_SECTORS; i++)
        if (scene->records == RECORDS_TORN_FIRST + i)
            empty_sector(file, LAST_RECORD + i);
    alter_record(settings, scene->records, file);
}

/* Scenes differ in their records, result and seal less often than in the rest. */
static void make_file(const struct scene *scene, struct file *file)
{
    static struct file made[2][N_RECORDS][N_RESULTS];
    static bool is_made[2][N_RECORDS][N_RESULTS];
    bool is_sealed = scene->key != KEY_NOT_SEALED && scene->key != KEY_UNUSED;
    struct file *records = &made[is_sealed][scene->records][scene->result];

    if (!is_made[is_sealed][scene->records][scene->result])
        make_records(scene, is_sealed ? &sealed_settings : &plain_settings, records);
    is_made[is_sealed][scene->records][scene->result] = true;
    *file = *records;
    alter_header(scene->header, file);
}

static void check_scene(const struct scene *scene)
{
    static uint8_t image[IMAGE_BYTES_MAX], older[IMAGE_BYTES];
    const uint8_t *checkpoints[] = {image_bytes[0], image_bytes[1],
                                    image_bytes[images_left(scene->records) - 1], older};
    struct journal_recovery recovery;
    struct file file;

    make_file(scene, &file);
    struct journal_evidence evidence = {
        .checkpoint =
            scene->checkpoint == CHECKPOINT_NONE ? NULL : checkpoints[scene->image % N_IMAGES],
        .checkpoint_bytes = IMAGE_BYTES,
        .continued = scene->checkpoint == CHECKPOINT_CONTINUED,
        .journal = scene->header == NO_JOURNAL ? NULL : file.bytes,
        .journal_bytes = scene->header == HEADER_SHORT_FILE ? JOURNAL_PAGE_BYTES - 1
                         : scene->header == HEADER_CUT_FILE ? JOURNAL_PAGE_BYTES
                                                            : FILE_BYTES,
        .identity = scene->owner == OWNER_UNKNOWN ? NULL
                    : scene->owner == OWNER_OURS  ? plain_settings.identity
                                                  : other_salt,
        .secret = scene->key == KEY_RIGHT || scene->key == KEY_UNUSED ? sealed_settings.secret
                  : scene->key == KEY_WRONG                           ? other_salt
                                                                      : NULL,
    };
    assert_int_equal(journal_recover(&evidence, image, &recovery), 0);
    enum journal_verdict expected = expected_verdict(scene);
    if (recovery.verdict != expected)
        fail_msg("%c instead of %c: checkpoint %d header %d owner %d key %d records %d image %d "
                 "result %d",
                 recovery.verdict, expected, scene->checkpoint, scene->header, scene->owner,
                 scene->key, scene->records, scene->image, scene->result);
    if (expected == JOURNAL_N_TAIL_DROPPED || expected == JOURNAL_O_WHOLE) {
        size_t last = images_left(scene->records) - 1;
        assert_true(recovery.has_image);
        assert_int_equal(recovery.generation, BASE_GENERATION + last);
        assert_int_equal(recovery.image_bytes, IMAGE_BYTES);
        assert_memory_equal(image, image_bytes[last], IMAGE_BYTES);
    }
    if (expected == JOURNAL_K_DAMAGED)
        assert_int_equal(recovery.fault, faults[scene->records]);
    /* What is refused may still show what was right before the fault, and nothing else. */
    if (recovery.has_image && !journal_may_start(&recovery)) {
        size_t last = recovery.generation - BASE_GENERATION;
        assert_int_equal(expected, JOURNAL_K_DAMAGED);
        assert_true(last <= SAMPLE_APPENDS);
        assert_memory_equal(image, image_bytes[last], IMAGE_BYTES);
    }
}

/* Some columns cannot vary with some records: without one there is no middle, and no result. */
static bool is_possible(const struct scene *scene)
{
    if (scene->records == RECORDS_NONE)
        return scene->image != IMAGE_MIDDLE && scene->result == RESULT_RIGHT;
    if (scene->records >= RECORDS_OTHER_GENERATION && scene->key != KEY_NOT_SEALED)
        return false;
    /* A checkpoint of the last image does not have the digest that is wrong. */
    return scene->result == RESULT_RIGHT || scene->image != IMAGE_LAST;
}

static void the_table_decides_every_combination(void **state)
{
    size_t counts[256] = {0}, n_scenes = 1;
    static const size_t limits[] = {N_CHECKPOINTS, N_HEADERS, N_OWNERS, N_KEYS,
                                    N_RECORDS,     N_IMAGES,  N_RESULTS};

    (void)state;
    make_images(sample_changes, SAMPLE_APPENDS);
    for (size_t i = 0; i < sizeof(limits) / sizeof(*limits); i++)
        n_scenes *= limits[i];
    for (size_t number = 0; number < n_scenes; number++) {
        size_t values[7], rest = number;
        for (size_t i = 0; i < 7; rest /= limits[i], i++)
            values[i] = rest % limits[i];
        struct scene scene = {values[0], values[1], values[2], values[3],
                              values[4], values[5], values[6]};
        if (!is_possible(&scene))
            continue;
        counts[expected_verdict(&scene)]++;
        check_scene(&scene);
    }
    for (size_t i = 0; i < sizeof(rows) / sizeof(*rows); i++)
        assert_true(counts[rows[i].verdict] > 0);
}

/* Refused, or nothing of it was used: never another image than those that were committed. */
static void check_is_refused(const struct journal_settings *settings, const struct file *file)
{
    static uint8_t image[IMAGE_BYTES_MAX];
    struct journal_recovery recovery;
    struct journal_evidence evidence = {
        .checkpoint = image_bytes[0],
        .checkpoint_bytes = IMAGE_BYTES,
        .journal = file->bytes,
        .journal_bytes = FILE_BYTES,
        .identity = settings->identity,
        .secret = secret_of(settings),
    };

    assert_int_equal(journal_recover(&evidence, image, &recovery), 0);
    assert_false(journal_may_start(&recovery));
    if (recovery.has_image)
        assert_memory_equal(image, image_bytes[recovery.generation - BASE_GENERATION], IMAGE_BYTES);
}

static void check_every_byte_counts(const struct journal_settings *settings)
{
    struct file file;

    make_sample(settings, &file);
    for (size_t i = 0; i < FILE_BYTES; i++) {
        uint8_t bit = (uint8_t)(1U << i % 8);
        file.bytes[i] ^= bit;
        check_is_refused(settings, &file);
        file.bytes[i] ^= bit;
    }
}

static void an_altered_byte_anywhere_is_refused(void **state)
{
    (void)state;
    check_every_byte_counts(&plain_settings);
    check_every_byte_counts(&sealed_settings);
}

/* With the key's own checksums made right: only who has the key can make what is accepted. */
static void a_sealed_record_cannot_be_altered_without_the_key(void **state)
{
    struct file file;

    (void)state;
    make_sample(&sealed_settings, &file);
    for (uint32_t sector = 1; sector < FIRST_FREE_SECTOR; sector++)
        for (size_t i = JOURNAL_AT_INDEX; i < JOURNAL_SECTOR_BYTES; i++) {
            sector_of(&file, sector)[i] ^= 0x40;
            put_sector_checksum(&file, sector);
            check_is_refused(&sealed_settings, &file);
            sector_of(&file, sector)[i] ^= 0x40;
            put_sector_checksum(&file, sector);
        }
    for (size_t i = 0; i < JOURNAL_AT_HEADER_CHECKSUM; i++) {
        file.bytes[i] ^= 0x40;
        put_header_checksum(&file);
        check_is_refused(&sealed_settings, &file);
        file.bytes[i] ^= 0x40;
    }
}

static void a_sealed_journal_shows_nothing_of_the_state(void **state)
{
    struct file file;
    size_t found[2] = {0};

    (void)state;
    for (int sealed = 0; sealed <= 1; sealed++) {
        make_sample(sealed ? &sealed_settings : &plain_settings, &file);
        for (size_t i = 0; i + 8 <= FILE_BYTES; i++)
            for (size_t k = 0; k + 8 <= IMAGE_BYTES; k++)
                found[sealed] += memcmp(file.bytes + i, image_bytes[SAMPLE_APPENDS] + k, 8) == 0;
    }
    assert_true(found[false] > 0);
    assert_int_equal(found[true], 0);
}

static void no_nonce_is_used_twice(void **state)
{
    struct io_memory io;
    struct journal *journal;
    struct file first, second;
    const uint8_t *bytes;
    size_t n_bytes;

    (void)state;
    /* The same records in two files have different keys. */
    make_sample(&sealed_settings, &first);
    write_file(&sealed_settings, other_salt, images, images, 1 + SAMPLE_APPENDS, &second);
    for (uint32_t sector = 1; sector < FIRST_FREE_SECTOR; sector++)
        assert_memory_not_equal(sector_of(&first, sector) + JOURNAL_FRAME_BYTES,
                                sector_of(&second, sector) + JOURNAL_FRAME_BYTES,
                                JOURNAL_PART_BYTES);
    /* After a write or a sync that failed, nothing more is written with that sequence number. */
    for (int failing = 1; failing <= 2; failing++) {
        io_memory_init(&io);
        assert_int_equal(journal_create(&io.io, &sealed_settings, salt, &images[0], &journal), 0);
        io.calls = 0;
        io.fail_from = failing;
        io.fail_to = failing + 1;
        assert_int_equal(journal_append(journal, &images[0], &images[1]), -EIO);
        assert_true(journal_is_broken(journal));
        int calls = io.calls;
        assert_int_equal(journal_append(journal, &images[0], &images[2]), -EIO);
        assert_int_equal(io.calls, calls);
        journal_free(journal);
        assert_true(io_memory_read(&io, JOURNAL_TEMPORARY_NAME, &bytes, &n_bytes));
        io_memory_deinit(&io);
    }
}

static void nothing_is_appended_to_a_file_that_was_removed(void **state)
{
    struct io_memory io;
    struct journal *journal;

    (void)state;
    io_memory_init(&io);
    assert_int_equal(journal_create(&io.io, &sealed_settings, salt, &images[0], &journal), 0);
    assert_int_equal(journal_publish(journal), 0);
    assert_int_equal(journal_remove(&io.io), 0);
    assert_int_equal(journal_append(journal, &images[0], &images[1]), -ENOENT);
    assert_true(journal_is_broken(journal));
    journal_free(journal);
    io_memory_deinit(&io);
}

static void a_full_journal_takes_no_more_and_keeps_what_it_has(void **state)
{
    struct delta_image base = images[0], next = images[1];
    struct journal_recovery recovery;
    static uint8_t image[IMAGE_BYTES_MAX];
    struct journal *journal;
    struct io_memory io;
    uint64_t n = 0;

    (void)state;
    io_memory_init(&io);
    make_images(sample_changes, SAMPLE_APPENDS);
    assert_int_equal(checkpoint_write(&io.io, NULL, "permall", base.bytes, base.n_bytes, NULL), 0);
    assert_int_equal(journal_create(&io.io, &sealed_settings, salt, &base, &journal), 0);
    assert_int_equal(journal_publish(journal), 0);
    for (;; n++) {
        next.generation = base.generation + 1;
        int r = journal_append(journal, &base, &next);
        if (r == JOURNAL_FULL)
            break;
        assert_int_equal(r, 0);
        assert_int_equal(journal_is_worn(journal), n + 2 >= FILE_SECTORS / 4 * 3);
        struct delta_image before = base;
        base = next;
        next = before;
    }
    assert_int_equal(n, FILE_SECTORS - 1);
    assert_false(journal_is_broken(journal));
    journal_free(journal);
    recover(&io, &sealed_settings, image, &recovery);
    assert_int_equal(recovery.verdict, JOURNAL_O_WHOLE);
    assert_int_equal(recovery.generation, base.generation);
    assert_memory_equal(image, base.bytes, base.n_bytes);
    io_memory_deinit(&io);
}

/* A new journal has room for any record. */
static void the_largest_record_fits(void **state)
{
    static uint8_t before[IMAGE_BYTES_MAX], after[IMAGE_BYTES_MAX], image[IMAGE_BYTES_MAX];
    struct image_digest digests[2];
    struct journal_settings settings = plain_settings;
    struct journal_recovery recovery;
    struct journal *journal;
    struct io_memory io;

    (void)state;
    for (size_t i = 0; i < sizeof(after); i++)
        after[i] = (uint8_t)(i * i + i / 251 + 1);
    assert_int_equal(
        image_digest_compute(&(struct delta_image){.bytes = before, .n_bytes = sizeof(before)},
                             NULL, &digests[0]),
        0);
    assert_int_equal(
        image_digest_compute(&(struct delta_image){.bytes = after, .n_bytes = sizeof(after)}, NULL,
                             &digests[1]),
        0);
    struct delta_image base = {before, sizeof(before), 1, &digests[0]};
    struct delta_image next = {after, sizeof(after), 2, &digests[1]};
    settings.file_bytes = JOURNAL_BYTES;
    io_memory_init(&io);
    assert_int_equal(journal_create(&io.io, &settings, salt, &base, &journal), 0);
    assert_int_equal(journal_publish(journal), 0);
    assert_int_equal(journal_append(journal, &base, &next), 0);
    journal_free(journal);
    assert_int_equal(checkpoint_write(&io.io, NULL, "permall", before, sizeof(before), NULL), 0);
    recover(&io, &settings, image, &recovery);
    assert_int_equal(recovery.verdict, JOURNAL_O_WHOLE);
    assert_memory_equal(image, after, sizeof(after));
    io_memory_deinit(&io);
}

/* A commit of up to a page writes one page, wherever it falls. */
static void a_record_crosses_no_page_that_it_fits_into(void **state)
{
    (void)state;
    for (uint32_t sector = 1; sector < 64; sector++)
        for (uint32_t n = 1; n <= 2 * JOURNAL_PAGE_SECTORS; n++) {
            uint32_t start = journal_place(sector, n), last = start + n - 1;
            assert_true(start >= sector && start < sector + JOURNAL_PAGE_SECTORS);
            if (n <= JOURNAL_PAGE_SECTORS)
                assert_int_equal(start / JOURNAL_PAGE_SECTORS, last / JOURNAL_PAGE_SECTORS);
            else
                assert_int_equal(start, sector);
        }
}

static void a_journal_that_cannot_be_made_leaves_no_file(void **state)
{
    struct journal *journal;
    const uint8_t *bytes;
    size_t n_bytes;

    (void)state;
    for (int step = 1; step <= 3; step++) {
        struct io_memory io;
        io_memory_init(&io);
        io.fail_from = step;
        io.fail_to = step + 1;
        io.fail_error = ENOSPC;
        io.fail_half = true;
        int r = journal_create(&io.io, &plain_settings, salt, &images[0], &journal);
        assert_int_equal(r, -ENOSPC);
        assert_false(io_memory_read(&io, JOURNAL_TEMPORARY_NAME, &bytes, &n_bytes));
        io_memory_deinit(&io);
    }
}

static void a_removal_that_was_not_synced_is_synced_when_repeated(void **state)
{
    struct journal *journal;
    struct io_memory io;
    const uint8_t *bytes;
    size_t n_bytes;

    (void)state;
    make_images(sample_changes, SAMPLE_APPENDS);
    io_memory_init(&io);
    assert_int_equal(journal_create(&io.io, &plain_settings, salt, &images[0], &journal), 0);
    assert_int_equal(journal_publish(journal), 0);
    journal_free(journal);
    io.fail_from = io.calls + 2;
    assert_int_equal(journal_remove(&io.io), -EIO);
    assert_true(io_memory_read_durable(&io, JOURNAL_NAME, &bytes, &n_bytes));
    io.fail_from = 0;
    assert_int_equal(journal_remove(&io.io), 0);
    assert_false(io_memory_read_durable(&io, JOURNAL_NAME, &bytes, &n_bytes));
    io_memory_deinit(&io);
}

/* As on a disk with larger sectors, or a file system that has no such writes. */
static void what_cannot_go_to_the_device_by_itself_is_written_all_the_same(void **state)
{
    char path[] = "/tmp/test_journal.XXXXXX";
    uint8_t bytes[2 * JOURNAL_SECTOR_BYTES], again[JOURNAL_SECTOR_BYTES];

    (void)state;
    assert_non_null(mkdtemp(path));
    struct io_posix io = {
        .io = io_posix_functions,
        .directory_fd = open(path, O_RDONLY | O_DIRECTORY),
    };
    int fd = io.io.create(&io.io, "file");
    assert_true(fd >= 0);
    io.io.set_direct(&io.io, fd);
    memset(bytes, 'x', sizeof(bytes));
    for (size_t offset = 0; offset <= 1; offset++)
        assert_int_equal(io.io.write_at(&io.io, fd, bytes + 1, JOURNAL_SECTOR_BYTES, (off_t)offset),
                         0);
    assert_int_equal(io.io.sync_data(&io.io, fd), 0);
    int reader = openat(io.directory_fd, "file", O_RDONLY);
    assert_int_equal(pread(reader, again, sizeof(again), 1), sizeof(again));
    assert_memory_equal(again, bytes, sizeof(again));
    close(reader);
    io.io.close(&io.io, fd);
    unlinkat(io.directory_fd, "file", 0);
    close(io.directory_fd);
    rmdir(path);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(invariant_1_every_power_loss_leaves_what_was_acknowledged),
        cmocka_unit_test(canary_every_sync_that_is_left_out_is_missed),
        cmocka_unit_test(the_table_decides_every_combination),
        cmocka_unit_test(an_altered_byte_anywhere_is_refused),
        cmocka_unit_test(a_sealed_record_cannot_be_altered_without_the_key),
        cmocka_unit_test(a_sealed_journal_shows_nothing_of_the_state),
        cmocka_unit_test(no_nonce_is_used_twice),
        cmocka_unit_test(a_full_journal_takes_no_more_and_keeps_what_it_has),
        cmocka_unit_test(the_largest_record_fits),
        cmocka_unit_test(a_record_crosses_no_page_that_it_fits_into),
        cmocka_unit_test(nothing_is_appended_to_a_file_that_was_removed),
        cmocka_unit_test(a_journal_that_cannot_be_made_leaves_no_file),
        cmocka_unit_test(what_cannot_go_to_the_device_by_itself_is_written_all_the_same),
        cmocka_unit_test(a_removal_that_was_not_synced_is_synced_when_repeated),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
