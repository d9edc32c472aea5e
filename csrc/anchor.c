#include "anchor.h"

#include <string.h>

#include "bytes.h"
#include "crc32c.h"

enum {
    AT_VERSION = 8,
    AT_IDENTITY = 16,
    AT_SERIAL = 32,
    AT_GENERATION = 40,
    AT_DIGEST = 48,
    AT_EXPECTED = 80,
    AT_CHECKSUM = 508,
};

static int write_slot(struct io *io, struct anchor *anchor, uint64_t generation,
                      const uint8_t *digest, const uint8_t *expected)
{
    uint8_t slot[ANCHOR_SLOT_BYTES] = {0};

    put_be64(slot, ANCHOR_MAGIC);
    put_be16(slot + AT_VERSION, ANCHOR_VERSION);
    memcpy(slot + AT_IDENTITY, anchor->identity, sizeof(anchor->identity));
    put_be64(slot + AT_SERIAL, anchor->serial + 1);
    put_be64(slot + AT_GENERATION, generation);
    memcpy(slot + AT_DIGEST, digest, DIGEST_BYTES);
    if (expected)
        memcpy(slot + AT_EXPECTED, expected, DIGEST_BYTES);
    put_be32(slot + AT_CHECKSUM, crc32c(slot, AT_CHECKSUM));
    off_t offset = (off_t)((anchor->serial + 1) % ANCHOR_SLOTS) * ANCHOR_SLOT_STRIDE;
    int r = io->write_at(io, anchor->fd, slot, sizeof(slot), offset);
    if (r >= 0)
        r = io->sync_data(io, anchor->fd);
    if (r >= 0)
        anchor->serial++;
    return r;
}

int anchor_expect(struct io *io, struct anchor *anchor, const uint8_t digest[DIGEST_BYTES])
{
    return write_slot(io, anchor, anchor->generation, anchor->digest, digest);
}

int anchor_write(struct io *io, struct anchor *anchor, uint64_t generation,
                 const uint8_t digest[DIGEST_BYTES])
{
    int r = write_slot(io, anchor, generation, digest, NULL);
    if (r < 0)
        return r;
    anchor->generation = generation;
    memcpy(anchor->digest, digest, DIGEST_BYTES);
    return 0;
}
