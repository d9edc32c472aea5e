/* What a state directory holds after a crash. The first row that fits decides:
 *
 *        checkpoint  journal  header   identity  key     records  chain    verdict
 *     A  none        none                                                  start: a new TPM
 *     B  plain       none                                                  start: the checkpoint
 *     C  continued   none                                                  refuse: no journal
 *     D  none        there                                                 refuse: no checkpoint
 *     E  there       there    wrong                                        refuse: damaged
 *     F  there       there    unknown                                      refuse: later version
 *     G  there       there    right    foreign                             refuse: another vTPM's
 *     H  there       there    right    ours      needed                    refuse: sealed
 *     I  there       there    right    ours      unused                    refuse: not sealed
 *     J  there       there    right    ours      wrong                     refuse: another key's
 *     K  there       there    right    ours      right   damaged           refuse: damaged
 *     L  there       there    right    ours      right   any      apart    refuse: old checkpoint
 *     M  there       there    right    ours      right   any      differs  refuse: damaged
 *     N  there       there    right    ours      right   torn     joined   start: tail dropped
 *     O  there       there    right    ours      right   whole    joined   start
 *
 * header     wrong: length, magic, checksum or a number in it; unknown: version or flag
 * key        needed: sealed, and no key; unused: a key, and not sealed; wrong: the header's seal;
 *            right: also no key and not sealed
 * records    torn: of the last record some sectors are written and some empty, and nothing but
 *            empty sectors follows: it was under way when the power went, and never acknowledged.
 *            Everything else that is not as journal_format.h has it is damaged, as a disk that
 *            writes sectors whole cannot leave it so
 * chain      joined: the checkpoint's digest is the header's or the result of a record, from which
 *            the rest goes on; apart: it is neither; differs: what the records make does not have
 *            the digest of the last one
 *
 * A checkpoint in the middle of the chain is what a crash in folding leaves. A last record whose
 * every sector is zero cannot be told from one that was never written: that is for the anchor.
 */
#include "journal_recover.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "aead.h"
#include "bytes.h"
#include "check.h"
#include "crc32c.h"
#include "image_digest.h"

/* What functions below return beside 0 and a negative errno. */
enum outcome {
    DECIDED = 1, /* the verdict is in the recovery */
};

struct reader {
    const struct journal_evidence *evidence;
    struct journal_recovery *recovery;
    struct journal_history *history; /* NULL: nobody asks for it */
    uint32_t n_sectors;
    uint32_t sector;   /* where the next record may begin */
    uint64_t sequence; /* that it must have */
    uint64_t generation;
    uint8_t digest[DIGEST_BYTES]; /* of the image that the last record makes */
    uint8_t link[JOURNAL_LINK_BYTES];
    struct aead *aead; /* NULL: not sealed */
    bool is_first_version;
    /* The checkpoint's image, or what was made of it, once the chain has reached it. */
    uint8_t checkpoint_digest[DIGEST_BYTES];
    bool joined;
    uint8_t *current, *spare;
    size_t current_bytes, largest_bytes;
    uint8_t *content; /* of a record */
    size_t content_bytes;
};

/* Where a record is. */
struct extent {
    uint32_t start, n_sectors;
};

static int decide(struct reader *reader, enum journal_verdict verdict, enum journal_fault fault,
                  uint32_t offset)
{
    reader->recovery->verdict = (uint8_t)verdict;
    reader->recovery->fault = (uint8_t)fault;
    reader->recovery->offset = offset;
    return DECIDED;
}

static int damaged(struct reader *reader, enum journal_fault fault, uint32_t sector)
{
    return decide(reader, JOURNAL_K_DAMAGED, fault, sector * JOURNAL_SECTOR_BYTES);
}

bool journal_may_start(const struct journal_recovery *recovery)
{
    switch ((enum journal_verdict)recovery->verdict) {
    case JOURNAL_A_NOTHING:
    case JOURNAL_B_CHECKPOINT:
    case JOURNAL_N_TAIL_DROPPED:
    case JOURNAL_O_WHOLE:
        return true;
    default:
        return false;
    }
}

/* Rows A to D. */
static int check_presence(struct reader *reader)
{
    const struct journal_evidence *evidence = reader->evidence;

    if (evidence->journal && evidence->checkpoint)
        return 0;
    if (evidence->journal)
        return decide(reader, JOURNAL_D_NO_CHECKPOINT, JOURNAL_FAULT_NONE, 0);
    if (!evidence->checkpoint)
        return decide(reader, JOURNAL_A_NOTHING, JOURNAL_FAULT_NONE, 0);
    return decide(reader, evidence->continued ? JOURNAL_C_MISSING : JOURNAL_B_CHECKPOINT,
                  JOURNAL_FAULT_NONE, 0);
}

/* Rows E and F. */
static int check_header(struct reader *reader)
{
    const uint8_t *header = reader->evidence->journal;
    size_t file_bytes = reader->evidence->journal_bytes;

    if (file_bytes < JOURNAL_PAGE_BYTES || file_bytes > JOURNAL_BYTES_MAX ||
        file_bytes % JOURNAL_PAGE_BYTES != 0)
        return decide(reader, JOURNAL_E_HEADER_WRONG, JOURNAL_FAULT_LENGTH, 0);
    if (get_be64(header) != JOURNAL_MAGIC)
        return decide(reader, JOURNAL_E_HEADER_WRONG, JOURNAL_FAULT_MAGIC, 0);
    if (crc32c(header, JOURNAL_AT_HEADER_CHECKSUM) != get_be32(header + JOURNAL_AT_HEADER_CHECKSUM))
        return decide(reader, JOURNAL_E_HEADER_WRONG, JOURNAL_FAULT_CHECKSUM, 0);
    uint16_t version = get_be16(header + JOURNAL_AT_VERSION);
    reader->is_first_version = version == JOURNAL_VERSION_FIRST;
    if (version != JOURNAL_VERSION && !reader->is_first_version)
        return decide(reader, JOURNAL_F_UNKNOWN, JOURNAL_FAULT_VERSION, JOURNAL_AT_VERSION);
    if (get_be16(header + JOURNAL_AT_INCOMPATIBLE) & ~JOURNAL_SEALED)
        return decide(reader, JOURNAL_F_UNKNOWN, JOURNAL_FAULT_FLAG, JOURNAL_AT_INCOMPATIBLE);
    if (get_be32(header + JOURNAL_AT_FILE_BYTES) != file_bytes)
        return decide(reader, JOURNAL_E_HEADER_WRONG, JOURNAL_FAULT_LENGTH, JOURNAL_AT_FILE_BYTES);
    size_t header_bytes = get_be16(header + JOURNAL_AT_HEADER_BYTES);
    bool extended = get_be16(header + JOURNAL_AT_COMPATIBLE) != 0;
    if (header_bytes < JOURNAL_HEADER_BYTES ||
        header_bytes > (extended ? JOURNAL_AT_HEADER_CHECKSUM : JOURNAL_HEADER_BYTES) ||
        get_be32(header + JOURNAL_AT_BASE_BYTES) > IMAGE_BYTES_MAX ||
        get_be64(header + JOURNAL_AT_BASE_GENERATION) > GENERATION_MAX)
        return decide(reader, JOURNAL_E_HEADER_WRONG, JOURNAL_FAULT_HEADER, 0);
    reader->n_sectors = (uint32_t)file_bytes / JOURNAL_SECTOR_BYTES;
    return 0;
}

/* Row J. The header's seal is over nothing but what it vouches for. */
static int open_header(struct reader *reader)
{
    const uint8_t *header = reader->evidence->journal;
    uint8_t nothing;

    int r = journal_key(reader->evidence->secret, header, &reader->aead);
    if (r < 0)
        return r;
    r = aead_open(reader->aead, 0, header, JOURNAL_AT_HEADER_SEAL, &nothing, 0,
                  header + JOURNAL_AT_HEADER_SEAL);
    if (r == AEAD_FORGED)
        return decide(reader, JOURNAL_J_KEY_WRONG, JOURNAL_FAULT_NONE, JOURNAL_AT_HEADER_SEAL);
    return r;
}

/* Rows G to J. */
static int check_owner(struct reader *reader)
{
    const struct journal_evidence *evidence = reader->evidence;
    const uint8_t *header = evidence->journal;
    struct journal_recovery *recovery = reader->recovery;

    recovery->is_sealed = get_be16(header + JOURNAL_AT_INCOMPATIBLE) & JOURNAL_SEALED;
    memcpy(recovery->identity, header + JOURNAL_AT_IDENTITY, JOURNAL_IDENTITY_BYTES);
    if (evidence->identity &&
        memcmp(recovery->identity, evidence->identity, JOURNAL_IDENTITY_BYTES) != 0)
        return decide(reader, JOURNAL_G_FOREIGN, JOURNAL_FAULT_NONE, JOURNAL_AT_IDENTITY);
    if (recovery->is_sealed && !evidence->secret)
        return decide(reader, JOURNAL_H_KEY_NEEDED, JOURNAL_FAULT_NONE, JOURNAL_AT_INCOMPATIBLE);
    if (!recovery->is_sealed && evidence->secret)
        return decide(reader, JOURNAL_I_NOT_SEALED, JOURNAL_FAULT_NONE, JOURNAL_AT_INCOMPATIBLE);
    return recovery->is_sealed ? open_header(reader) : 0;
}

static size_t larger(size_t a, size_t b)
{
    return a > b ? a : b;
}

static void set_current_bytes(struct reader *reader, size_t n_bytes)
{
    reader->current_bytes = n_bytes;
    reader->largest_bytes = larger(reader->largest_bytes, n_bytes);
}

static int compute_digest(const struct reader *reader, const uint8_t *image, size_t image_bytes,
                          uint8_t digest[DIGEST_BYTES])
{
    struct delta_image made = {.bytes = image, .n_bytes = image_bytes};
    struct image_digest both;

    if (reader->is_first_version)
        return digest_compute(image, image_bytes, digest);
    int r = image_digest_compute(&made, NULL, &both);
    if (r == 0)
        memcpy(digest, both.whole, DIGEST_BYTES);
    return r;
}

/* The chain has reached the checkpoint if this is its digest. */
static void join(struct reader *reader, const uint8_t digest[DIGEST_BYTES])
{
    const struct journal_evidence *evidence = reader->evidence;

    memcpy(reader->digest, digest, DIGEST_BYTES);
    if (reader->joined || memcmp(digest, reader->checkpoint_digest, DIGEST_BYTES) != 0)
        return;
    memcpy(reader->current, evidence->checkpoint, evidence->checkpoint_bytes);
    set_current_bytes(reader, evidence->checkpoint_bytes);
    reader->joined = true;
}

enum {
    CONTENT_BYTES_MAX = JOURNAL_RECORD_SECTORS_MAX * JOURNAL_PART_BYTES,
};

static int begin_chain(struct reader *reader)
{
    const struct journal_evidence *evidence = reader->evidence;

    reader->current = malloc(IMAGE_BYTES_MAX);
    reader->spare = malloc(IMAGE_BYTES_MAX);
    reader->content = malloc(CONTENT_BYTES_MAX);
    if (!reader->current || !reader->spare || !reader->content)
        return -ENOMEM;
    reader->generation = get_be64(evidence->journal + JOURNAL_AT_BASE_GENERATION);
    reader->sector = 1;
    reader->sequence = 1;
    int r = journal_first_link(evidence->journal, reader->link);
    if (r < 0 || evidence->checkpoint_bytes > IMAGE_BYTES_MAX)
        return r;
    r = compute_digest(reader, evidence->checkpoint, evidence->checkpoint_bytes,
                       reader->checkpoint_digest);
    if (r >= 0)
        join(reader, evidence->journal + JOURNAL_AT_BASE_DIGEST);
    return r;
}

static const uint8_t *sector_at(const struct reader *reader, uint32_t sector)
{
    return reader->evidence->journal + (size_t)sector * JOURNAL_SECTOR_BYTES;
}

static bool is_empty(const struct reader *reader, uint32_t sector)
{
    static const uint8_t zeros[JOURNAL_SECTOR_BYTES];

    return memcmp(sector_at(reader, sector), zeros, sizeof(zeros)) == 0;
}

/* Returns n_sectors if there is none. */
static uint32_t first_written(const struct reader *reader, uint32_t sector)
{
    while (sector < reader->n_sectors && is_empty(reader, sector))
        sector++;
    return sector;
}

static uint32_t used_bytes(const struct reader *reader)
{
    uint32_t n = reader->n_sectors;

    while (n > 0 && is_empty(reader, n - 1))
        n--;
    return n * JOURNAL_SECTOR_BYTES;
}

static bool has_checksum(const struct reader *reader, uint32_t sector)
{
    const uint8_t *bytes = sector_at(reader, sector);

    return get_be32(bytes) ==
           crc32c(bytes + JOURNAL_AT_INDEX, JOURNAL_SECTOR_BYTES - JOURNAL_AT_INDEX);
}

static bool is_part(const struct reader *reader, const struct extent *extent, uint32_t sector)
{
    const uint8_t *bytes = sector_at(reader, sector);

    return get_be16(bytes + JOURNAL_AT_INDEX) == sector - extent->start &&
           get_be16(bytes + JOURNAL_AT_SECTORS) == extent->n_sectors &&
           get_be64(bytes + JOURNAL_AT_SEQUENCE) == reader->sequence;
}

/* Find the next record by the first of its sectors that is written, which is the one at `sector`.
 */
static int find_extent(struct reader *reader, uint32_t sector, struct extent *extent)
{
    if (!has_checksum(reader, sector))
        return damaged(reader, JOURNAL_FAULT_SECTOR, sector);
    extent->n_sectors = get_be16(sector_at(reader, sector) + JOURNAL_AT_SECTORS);
    extent->start = journal_place(reader->sector, extent->n_sectors);
    if (extent->n_sectors < 1 || extent->n_sectors > JOURNAL_RECORD_SECTORS_MAX ||
        extent->start > sector || sector - extent->start >= extent->n_sectors ||
        extent->n_sectors > reader->n_sectors - extent->start)
        return damaged(reader, JOURNAL_FAULT_ORDER, sector);
    return 0;
}

/* Returns 0 for a whole record. */
static int check_extent(struct reader *reader, const struct extent *extent)
{
    uint32_t end = extent->start + extent->n_sectors, first_empty = end;

    for (uint32_t sector = extent->start; sector < end; sector++) {
        if (is_empty(reader, sector))
            first_empty = sector < first_empty ? sector : first_empty;
        else if (!has_checksum(reader, sector))
            return damaged(reader, JOURNAL_FAULT_SECTOR, sector);
        else if (!is_part(reader, extent, sector))
            return damaged(reader, JOURNAL_FAULT_ORDER, sector);
    }
    if (first_empty == end)
        return 0;
    if (first_written(reader, end) < reader->n_sectors)
        return damaged(reader, JOURNAL_FAULT_GAP, first_empty);
    return decide(reader, JOURNAL_N_TAIL_DROPPED, JOURNAL_FAULT_NONE,
                  extent->start * JOURNAL_SECTOR_BYTES);
}

/* Put a record's parts together. Returns false unless they are as many as its length needs, with
 * zeros behind it. */
static bool read_content(struct reader *reader, const struct extent *extent, uint32_t *delta_bytes)
{
    uint32_t n_bytes = extent->n_sectors * JOURNAL_PART_BYTES;

    reader->content_bytes = larger(reader->content_bytes, n_bytes);
    for (uint32_t i = 0; i < extent->n_sectors; i++)
        memcpy(reader->content + i * JOURNAL_PART_BYTES,
               sector_at(reader, extent->start + i) + JOURNAL_FRAME_BYTES, JOURNAL_PART_BYTES);
    *delta_bytes = get_be32(reader->content);
    if (*delta_bytes > DELTA_RECORD_BYTES_MAX ||
        journal_sectors_of(*delta_bytes) != extent->n_sectors)
        return false;
    for (uint32_t i = JOURNAL_RECORD_HEADER_BYTES + *delta_bytes; i < n_bytes; i++)
        if (reader->content[i] != 0)
            return false;
    return true;
}

/* Check a record's link and decrypt it. Returns 0, AEAD_FORGED or a negative errno. */
static int open_content(struct reader *reader, uint32_t delta_bytes)
{
    static const uint8_t zeros[JOURNAL_LINK_BYTES - AEAD_TAG_BYTES];
    uint8_t associated[JOURNAL_LINK_BYTES + JOURNAL_AT_LINK], link[JOURNAL_LINK_BYTES];
    uint8_t *found = reader->content + JOURNAL_AT_LINK;
    int r;

    if (reader->aead) {
        memcpy(associated, reader->link, JOURNAL_LINK_BYTES);
        memcpy(associated + JOURNAL_LINK_BYTES, reader->content, JOURNAL_AT_LINK);
        r = aead_open(reader->aead, reader->sequence, associated, sizeof(associated),
                      reader->content + JOURNAL_RECORD_HEADER_BYTES, delta_bytes, found);
        if (r == 0 && memcmp(found + AEAD_TAG_BYTES, zeros, sizeof(zeros)) != 0)
            r = AEAD_FORGED;
    } else {
        r = journal_next_link(reader->link, reader->content, delta_bytes, link);
        if (r == 0 && memcmp(found, link, JOURNAL_LINK_BYTES) != 0)
            r = AEAD_FORGED;
    }
    memcpy(reader->link, found, JOURNAL_LINK_BYTES);
    return r;
}

/* Make the image that a record leads to. Returns false if it cannot. */
static bool apply(struct reader *reader, const uint8_t *delta, const struct delta_header *header)
{
    struct delta_image base = {.bytes = reader->current, .n_bytes = reader->current_bytes};

    if (!reader->joined)
        return true;
    reader->largest_bytes = larger(reader->largest_bytes, header->result_bytes);
    if (delta_make(&base, delta, header, reader->spare) != 0)
        return false;
    uint8_t *made = reader->spare;
    reader->spare = reader->current;
    reader->current = made;
    set_current_bytes(reader, header->result_bytes);
    reader->recovery->n_applied++;
    return true;
}

/* Keep a record that was taken. Those of a file take less room together than the file. */
static void keep_step(struct reader *reader, const struct extent *extent, const uint8_t *delta,
                      uint32_t delta_bytes, const struct delta_header *header, bool is_applied)
{
    struct journal_history *history = reader->history;

    if (!history)
        return;
    check(history->n_steps < JOURNAL_RECORDS_MAX);
    check(delta_bytes <= sizeof(history->deltas) - history->deltas_bytes);
    memcpy(history->deltas + history->deltas_bytes, delta, delta_bytes);
    history->steps[history->n_steps++] = (struct journal_step){
        .offset = extent->start * JOURNAL_SECTOR_BYTES,
        .n_sectors = extent->n_sectors,
        .delta_offset = (uint32_t)history->deltas_bytes,
        .delta_bytes = delta_bytes,
        .is_applied = is_applied,
        .header = *header,
    };
    history->deltas_bytes += delta_bytes;
}

static int take_record(struct reader *reader, const struct extent *extent)
{
    const uint8_t *delta = reader->content + JOURNAL_RECORD_HEADER_BYTES;
    struct delta_header header;
    uint32_t delta_bytes;

    if (!read_content(reader, extent, &delta_bytes))
        return damaged(reader, JOURNAL_FAULT_RECORD, extent->start);
    int r = open_content(reader, delta_bytes);
    if (r < 0)
        return r;
    if (r == AEAD_FORGED)
        return damaged(reader, JOURNAL_FAULT_LINK, extent->start);
    r = reader->is_first_version ? delta_inspect_first(delta, delta_bytes, &header)
                                 : delta_inspect(delta, delta_bytes, &header);
    if (r != 0)
        return damaged(reader, JOURNAL_FAULT_DELTA, extent->start);
    if (header.type != JOURNAL_IMAGE_TYPE || header.from_generation != reader->generation ||
        memcmp(header.base_digest, reader->digest, DIGEST_BYTES) != 0)
        return damaged(reader, JOURNAL_FAULT_OTHER_BASE, extent->start);
    bool is_applied = reader->joined;
    if (!apply(reader, delta, &header))
        return damaged(reader, JOURNAL_FAULT_DELTA, extent->start);
    keep_step(reader, extent, delta, delta_bytes, &header, is_applied);
    reader->generation = header.to_generation;
    join(reader, header.result_digest);
    reader->recovery->n_records++;
    reader->sector = extent->start + extent->n_sectors;
    reader->sequence++;
    return 0;
}

/* Row K, or what N and O have in common. */
static int take_records(struct reader *reader)
{
    int r;

    do {
        struct extent extent;
        uint32_t sector = first_written(reader, reader->sector);
        if (sector == reader->n_sectors)
            return decide(reader, JOURNAL_O_WHOLE, JOURNAL_FAULT_NONE, used_bytes(reader));
        r = find_extent(reader, sector, &extent);
        if (r == 0)
            r = check_extent(reader, &extent);
        if (r == 0)
            r = take_record(reader, &extent);
    } while (r == 0);
    return r;
}

/* Rows L and M, and the image. */
static int finish_chain(struct reader *reader, uint8_t *image)
{
    struct journal_recovery *recovery = reader->recovery;
    bool is_damaged = recovery->verdict == JOURNAL_K_DAMAGED;
    uint8_t digest[DIGEST_BYTES];

    if (!reader->joined) {
        if (!is_damaged)
            decide(reader, JOURNAL_L_OTHER_CHECKPOINT, JOURNAL_FAULT_NONE, JOURNAL_AT_BASE_DIGEST);
        return DECIDED;
    }
    int r = compute_digest(reader, reader->current, reader->current_bytes, digest);
    if (r < 0)
        return r;
    if (memcmp(digest, reader->digest, DIGEST_BYTES) != 0) {
        if (!is_damaged)
            decide(reader, JOURNAL_M_RESULT_DIFFERS, JOURNAL_FAULT_NONE, recovery->offset);
        return DECIDED;
    }
    memcpy(image, reader->current, reader->current_bytes);
    recovery->image_bytes = reader->current_bytes;
    recovery->generation = reader->generation;
    recovery->has_image = true;
    return DECIDED;
}

static int recover(struct reader *reader, uint8_t *image)
{
    int r = check_presence(reader);

    if (r == 0)
        r = check_header(reader);
    if (r != 0)
        return r;
    reader->recovery->used_bytes = used_bytes(reader);
    r = check_owner(reader);
    if (r == 0)
        r = begin_chain(reader);
    if (r == 0)
        r = take_records(reader);
    if (r == DECIDED && reader->recovery->verdict >= JOURNAL_K_DAMAGED)
        r = finish_chain(reader, image);
    return r;
}

static void wipe_and_free(uint8_t *bytes, size_t n_bytes)
{
    if (bytes)
        explicit_bzero(bytes, n_bytes);
    free(bytes);
}

int journal_recover(const struct journal_evidence *evidence, uint8_t *image,
                    struct journal_recovery *recovery)
{
    return journal_recover_history(evidence, image, recovery, NULL);
}

int journal_recover_history(const struct journal_evidence *evidence, uint8_t *image,
                            struct journal_recovery *recovery, struct journal_history *history)
{
    struct reader reader = {.evidence = evidence, .recovery = recovery, .history = history};

    *recovery = (struct journal_recovery){0};
    if (history)
        history->n_steps = history->deltas_bytes = 0;
    int r = recover(&reader, image);
    aead_free(reader.aead);
    wipe_and_free(reader.current, reader.largest_bytes);
    wipe_and_free(reader.spare, reader.largest_bytes);
    wipe_and_free(reader.content, reader.content_bytes);
    return r < 0 ? r : 0;
}
