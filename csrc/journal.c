#include "journal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "aead.h"
#include "bytes.h"
#include "check.h"
#include "checkpoint.h"
#include "crc32c.h"
#include "version.h"

struct journal {
    struct io *io;
    int fd;
    struct aead *aead; /* NULL: not sealed */
    bool broken;
    bool is_published;  /* under its own name */
    bool unsynced;      /* the last record */
    uint32_t n_sectors; /* of the file */
    uint32_t sector;    /* the first that is free */
    uint64_t sequence;  /* of the next record */
    uint64_t generation;
    uint8_t link[JOURNAL_LINK_BYTES]; /* of the last record */
    /* A record's content, and its sectors. Of the larger part no page is ever touched. */
    uint8_t content[JOURNAL_RECORD_SECTORS_MAX * JOURNAL_PART_BYTES];
    _Alignas(
        IO_DIRECT_ALIGNMENT) uint8_t sectors[JOURNAL_RECORD_SECTORS_MAX * JOURNAL_SECTOR_BYTES];
};

_Static_assert((int)JOURNAL_SECTOR_BYTES == (int)IO_DIRECT_SECTOR_BYTES, "for direct writes");

static int write_header(struct journal *journal, const struct journal_settings *settings,
                        const uint8_t salt[JOURNAL_SALT_BYTES], const struct delta_image *base,
                        uint8_t header[JOURNAL_SECTOR_BYTES])
{
    int r = 0;

    memset(header, 0, JOURNAL_SECTOR_BYTES);
    put_be64(header, JOURNAL_MAGIC);
    put_be16(header + JOURNAL_AT_VERSION, JOURNAL_VERSION);
    put_be16(header + JOURNAL_AT_HEADER_BYTES, JOURNAL_HEADER_BYTES);
    put_be16(header + JOURNAL_AT_INCOMPATIBLE, settings->sealed ? JOURNAL_SEALED : 0);
    memcpy(header + JOURNAL_AT_IDENTITY, settings->identity, JOURNAL_IDENTITY_BYTES);
    memcpy(header + JOURNAL_AT_SALT, salt, JOURNAL_SALT_BYTES);
    put_be64(header + JOURNAL_AT_BASE_GENERATION, base->generation);
    put_be32(header + JOURNAL_AT_BASE_BYTES, (uint32_t)base->n_bytes);
    put_be32(header + JOURNAL_AT_FILE_BYTES, settings->file_bytes);
    memcpy(header + JOURNAL_AT_BASE_DIGEST, base->digest->whole, DIGEST_BYTES);
    if (settings->sealed)
        r = journal_key(settings->secret, header, &journal->aead);
    if (r >= 0 && settings->sealed)
        r = aead_seal(journal->aead, 0, header, JOURNAL_AT_HEADER_SEAL,
                      header + JOURNAL_AT_HEADER_SEAL, 0, header + JOURNAL_AT_HEADER_SEAL);
    put_be32(header + JOURNAL_AT_HEADER_CHECKSUM, crc32c(header, JOURNAL_AT_HEADER_CHECKSUM));
    return r < 0 ? r : journal_first_link(header, journal->link);
}

/* Zeros that are written, not merely reserved: a sync of what replaces them writes no metadata.
 * Page by page, as Linux may keep what is written at once as one piece, and write it back as that.
 */
static int write_file(struct journal *journal, const uint8_t header[JOURNAL_SECTOR_BYTES])
{
    uint8_t page[JOURNAL_PAGE_BYTES] = {0};
    struct io *io = journal->io;
    int r = 0;

    memcpy(page, header, JOURNAL_SECTOR_BYTES);
    for (uint32_t n = 0; r >= 0 && n < journal->n_sectors / JOURNAL_PAGE_SECTORS; n++) {
        struct iovec vector = {page, sizeof(page)};

        r = io->write(io, journal->fd, &vector, 1);
        memset(page, 0, JOURNAL_SECTOR_BYTES);
    }
    if (r >= 0)
        r = io->sync(io, journal->fd);
    io->set_direct(io, journal->fd);
    return r;
}

/* Pages of its own, from the kernel and back to it: an allocator may touch what it gives or takes.
 */
static struct journal *journal_new(struct io *io)
{
    struct journal *journal =
        mmap(NULL, sizeof(*journal), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (journal == MAP_FAILED)
        return NULL;
    journal->io = io;
    journal->fd = -1;
    return journal;
}

int journal_create(struct io *io, const struct journal_settings *settings,
                   const uint8_t salt[JOURNAL_SALT_BYTES], const struct delta_image *base,
                   struct journal **out)
{
    uint8_t header[JOURNAL_SECTOR_BYTES];

    check(settings->file_bytes >= JOURNAL_PAGE_BYTES && settings->file_bytes <= JOURNAL_BYTES_MAX);
    check(settings->file_bytes % JOURNAL_PAGE_BYTES == 0);
    check(base->n_bytes <= IMAGE_BYTES_MAX && base->digest);
    struct journal *journal = journal_new(io);
    if (!journal)
        return -ENOMEM;
    journal->n_sectors = settings->file_bytes / JOURNAL_SECTOR_BYTES;
    journal->sector = journal->sequence = 1;
    journal->generation = base->generation;
    int r = write_header(journal, settings, salt, base, header);
    if (r >= 0)
        r = journal->fd = io->create(io, version_now()->journal_temporary_name);
    if (r >= 0)
        r = write_file(journal, header);
    if (r < 0) {
        journal_free(journal);
        journal_remove_temporary(io);
        return r;
    }
    *out = journal;
    return 0;
}

/* Make content and link of the record whose delta is in place. */
static int seal(struct journal *journal, uint32_t delta_bytes, uint8_t link[JOURNAL_LINK_BYTES])
{
    uint8_t associated[JOURNAL_LINK_BYTES + JOURNAL_AT_LINK];
    uint8_t *delta = journal->content + JOURNAL_RECORD_HEADER_BYTES;

    put_be32(journal->content, delta_bytes);
    if (!journal->aead)
        return journal_next_link(journal->link, journal->content, delta_bytes, link);
    memcpy(associated, journal->link, JOURNAL_LINK_BYTES);
    memcpy(associated + JOURNAL_LINK_BYTES, journal->content, JOURNAL_AT_LINK);
    memset(link, 0, JOURNAL_LINK_BYTES);
    return aead_seal(journal->aead, journal->sequence, associated, sizeof(associated), delta,
                     delta_bytes, link);
}

static void frame(struct journal *journal, uint32_t n_sectors)
{
    for (uint32_t i = 0; i < n_sectors; i++) {
        uint8_t *sector = journal->sectors + i * JOURNAL_SECTOR_BYTES;
        put_be16(sector + JOURNAL_AT_INDEX, (uint16_t)i);
        put_be16(sector + JOURNAL_AT_SECTORS, (uint16_t)n_sectors);
        put_be64(sector + JOURNAL_AT_SEQUENCE, journal->sequence);
        memcpy(sector + JOURNAL_FRAME_BYTES, journal->content + i * JOURNAL_PART_BYTES,
               JOURNAL_PART_BYTES);
        put_be32(sector,
                 crc32c(sector + JOURNAL_AT_INDEX, JOURNAL_SECTOR_BYTES - JOURNAL_AT_INDEX));
    }
}

static int write_record(struct journal *journal, uint32_t delta_bytes)
{
    uint32_t n_sectors = journal_sectors_of(delta_bytes);
    uint32_t start = journal_place(journal->sector, n_sectors);
    uint8_t link[JOURNAL_LINK_BYTES];

    if (start + n_sectors > journal->n_sectors)
        return JOURNAL_FULL;
    /* From here on the nonce counts as used. */
    journal->broken = true;
    int r = seal(journal, delta_bytes, link);
    if (r < 0)
        return r;
    memcpy(journal->content + JOURNAL_AT_LINK, link, JOURNAL_LINK_BYTES);
    frame(journal, n_sectors);
    r = journal->io->write_at(journal->io, journal->fd, journal->sectors,
                              n_sectors * JOURNAL_SECTOR_BYTES,
                              (off_t)start * JOURNAL_SECTOR_BYTES);
    if (r < 0)
        return r;
    memcpy(journal->link, link, JOURNAL_LINK_BYTES);
    journal->sector = start + n_sectors;
    journal->sequence++;
    journal->broken = false;
    journal->unsynced = true;
    return 0;
}

int journal_write(struct journal *journal, const struct delta_image *base,
                  const struct delta_image *next)
{
    size_t delta_bytes;

    if (journal->broken)
        return -EIO;
    check(!journal->unsynced);
    check(base->generation == journal->generation && base->digest && next->digest);
    int r = delta_encode(JOURNAL_IMAGE_TYPE, base, next,
                         journal->content + JOURNAL_RECORD_HEADER_BYTES, &delta_bytes);
    if (r < 0)
        return r;
    r = write_record(journal, (uint32_t)delta_bytes);
    if (r == 0)
        journal->generation = next->generation;
    uint32_t n_sectors = journal_sectors_of((uint32_t)delta_bytes);
    explicit_bzero(journal->content, n_sectors * JOURNAL_PART_BYTES);
    explicit_bzero(journal->sectors, n_sectors * JOURNAL_SECTOR_BYTES);
    return r;
}

int journal_sync(struct journal *journal)
{
    if (journal->broken)
        return -EIO;
    if (!journal->unsynced)
        return 0;
    int r = journal->io->sync_data(journal->io, journal->fd);
    /* Nobody finds what is in a file that somebody has removed. */
    if (r == 0 && journal->is_published)
        r = journal->io->find(journal->io, version_now()->journal_name);
    journal->unsynced = false;
    journal->broken = r < 0;
    return r;
}

int journal_append(struct journal *journal, const struct delta_image *base,
                   const struct delta_image *next)
{
    int r = journal_write(journal, base, next);

    return r == 0 ? journal_sync(journal) : r;
}

int journal_publish(struct journal *journal)
{
    struct io *io = journal->io;

    int r = io->rename(io, version_now()->journal_temporary_name, version_now()->journal_name);
    journal->is_published = r >= 0;
    return r < 0 ? r : io->sync_directory(io);
}

bool journal_is_worn(const struct journal *journal)
{
    return journal->sector >= journal->n_sectors / 4 * 3;
}

bool journal_is_broken(const struct journal *journal)
{
    return journal->broken;
}

void journal_free(struct journal *journal)
{
    if (!journal)
        return;
    if (journal->fd >= 0)
        journal->io->close(journal->io, journal->fd);
    aead_free(journal->aead);
    munmap(journal, sizeof(*journal));
}

int journal_remove(struct io *io)
{
    int r = io->unlink(io, version_now()->journal_name);
    if (r < 0 && r != -ENOENT)
        return r;
    return io->sync_directory(io); /* a removal before may not have been synced */
}

void journal_remove_temporary(struct io *io)
{
    io->unlink(io, version_now()->journal_temporary_name);
}
