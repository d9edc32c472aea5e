#include "checkpoint.h"

#include <errno.h>
#include <stdio.h>

#include "bytes.h"
#include "check.h"

static void format_name(char *out, const char *prefix, const char *name)
{
    int length = snprintf(out, CHECKPOINT_NAME_BYTES_MAX, "%s2-00.%s", prefix, name);
    check(length > 0 && length < CHECKPOINT_NAME_BYTES_MAX);
}

static void format_header(uint8_t *out, size_t state_bytes)
{
    check(state_bytes <= UINT32_MAX - CHECKPOINT_HEADER_BYTES);
    out[0] = 2;
    out[1] = 1;
    put_be16(out + 2, 10);
    put_be16(out + 4, 0);
    put_be32(out + 6, (uint32_t)(CHECKPOINT_HEADER_BYTES + state_bytes));
    put_be16(out + 10, 1);
    put_be32(out + 12, (uint32_t)state_bytes);
}

static int write_temporary(struct io *io, const char *name, const uint8_t *state,
                           size_t state_bytes)
{
    uint8_t header[CHECKPOINT_HEADER_BYTES];
    struct iovec vectors[2] = {
        {.iov_base = header, .iov_len = sizeof(header)},
        {.iov_base = (void *)state, .iov_len = state_bytes},
    };

    int fd = io->create(io, name, CHECKPOINT_MODE);
    if (fd < 0)
        return fd;
    format_header(header, state_bytes);
    int r = io->write(io, fd, vectors, 2);
    if (r >= 0)
        r = io->sync(io, fd);
    io->close(io, fd);
    return r;
}

int checkpoint_write(struct io *io, const char *name, const uint8_t *state, size_t state_bytes)
{
    char temporary[CHECKPOINT_NAME_BYTES_MAX], final[CHECKPOINT_NAME_BYTES_MAX];

    format_name(temporary, "TMP", name);
    format_name(final, "tpm", name);
    int r = write_temporary(io, temporary, state, state_bytes);
    if (r >= 0)
        r = io->rename(io, temporary, final);
    if (r < 0) {
        io->unlink(io, temporary);
        return r;
    }
    return io->sync_directory(io);
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
