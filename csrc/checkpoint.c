#include "checkpoint.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "bytes.h"
#include "check.h"

static void format_name(char *out, const char *prefix, const char *name)
{
    int length = snprintf(out, CHECKPOINT_NAME_BYTES_MAX, "%s2-00.%s", prefix, name);
    check(length > 0 && length < CHECKPOINT_NAME_BYTES_MAX);
}

enum {
    HEADER_BYTES = 10,
    VERSION = 2,
    MINIMUM_VERSION = 1,
    MINIMUM_VERSION_CONTINUED = 255,
    TAG_DATA = 1,
    TAG_LINEAGE = 0x5654,
    TLV_BYTES = 6,
};

/* What is around the state in a file. */
struct wrap {
    uint8_t before[CHECKPOINT_HEADER_BYTES];
    uint8_t after[CHECKPOINT_LINEAGE_BYTES];
    size_t after_bytes;
};

static void format_tlv(uint8_t *out, uint16_t tag, size_t n_bytes)
{
    put_be16(out, tag);
    put_be32(out + 2, (uint32_t)n_bytes);
}

static void format_lineage(uint8_t *out, const struct checkpoint_lineage *lineage)
{
    format_tlv(out, TAG_LINEAGE, CHECKPOINT_LINEAGE_BYTES - TLV_BYTES);
    memcpy(out + TLV_BYTES, lineage->identity, CHECKPOINT_IDENTITY_BYTES);
    put_be64(out + TLV_BYTES + CHECKPOINT_IDENTITY_BYTES, lineage->generation);
}

static void format_wrap(struct wrap *wrap, size_t state_bytes,
                        const struct checkpoint_lineage *lineage)
{
    uint8_t *header = wrap->before;

    check(state_bytes <= UINT32_MAX - sizeof(*wrap));
    wrap->after_bytes = lineage ? CHECKPOINT_LINEAGE_BYTES : 0;
    header[0] = VERSION;
    header[1] = lineage && lineage->continued ? MINIMUM_VERSION_CONTINUED : MINIMUM_VERSION;
    put_be16(header + 2, HEADER_BYTES);
    put_be16(header + 4, 0);
    put_be32(header + 6, (uint32_t)(CHECKPOINT_HEADER_BYTES + state_bytes + wrap->after_bytes));
    format_tlv(header + HEADER_BYTES, TAG_DATA, state_bytes);
    if (lineage)
        format_lineage(wrap->after, lineage);
}

static int write_content(struct io *io, int fd, const uint8_t *state, size_t state_bytes,
                         const struct checkpoint_lineage *lineage)
{
    struct wrap wrap;
    struct iovec vectors[3] = {
        {wrap.before, sizeof(wrap.before)},
        {(void *)state, state_bytes},
        {wrap.after, 0},
    };

    format_wrap(&wrap, state_bytes, lineage);
    vectors[2].iov_len = wrap.after_bytes;
    int r = io->write(io, fd, vectors, 3);
    return r < 0 ? r : io->sync(io, fd);
}

int checkpoint_prepare(struct io *io, const char *name, const uint8_t *state, size_t state_bytes,
                       const struct checkpoint_lineage *lineage)
{
    char temporary[CHECKPOINT_NAME_BYTES_MAX];

    format_name(temporary, "TMP", name);
    int fd = io->create(io, temporary, CHECKPOINT_MODE);
    if (fd < 0)
        return fd;
    int r = write_content(io, fd, state, state_bytes, lineage);
    io->close(io, fd);
    if (r < 0)
        io->unlink(io, temporary);
    return r;
}

int checkpoint_publish(struct io *io, const char *name)
{
    char temporary[CHECKPOINT_NAME_BYTES_MAX], final[CHECKPOINT_NAME_BYTES_MAX];

    format_name(temporary, "TMP", name);
    format_name(final, "tpm", name);
    int r = io->rename(io, temporary, final);
    if (r < 0) {
        io->unlink(io, temporary);
        return r;
    }
    return io->sync_directory(io);
}

int checkpoint_write(struct io *io, const char *name, const uint8_t *state, size_t state_bytes,
                     const struct checkpoint_lineage *lineage)
{
    int r = checkpoint_prepare(io, name, state, state_bytes, lineage);

    return r < 0 ? r : checkpoint_publish(io, name);
}

int checkpoint_remove(struct io *io, const char *name)
{
    char final[CHECKPOINT_NAME_BYTES_MAX];

    format_name(final, "tpm", name);
    int r = io->unlink(io, final);
    if (r == -ENOENT)
        return 0;
    return r < 0 ? r : io->sync_directory(io);
}
