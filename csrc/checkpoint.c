#include "checkpoint.h"

#include <errno.h>
#include <stdio.h>

#include "bytes.h"
#include "check.h"
#include "version.h"

static void format_name(char *out, const char *prefix, const char *name)
{
    int length = snprintf(out, CHECKPOINT_NAME_BYTES_MAX, "%s.%s", prefix, name);
    check(length > 0 && length < CHECKPOINT_NAME_BYTES_MAX);
}

static int write_content(struct io *io, int fd, struct swtpm_wrapped *file)
{
    struct iovec pieces[SWTPM_PIECES];

    swtpm_wrapped_pieces(file, pieces);
    int r = io->write(io, fd, pieces, SWTPM_PIECES);
    return r < 0 ? r : io->sync(io, fd);
}

static int write_temporary(struct io *io, const char *name, struct swtpm_wrapped *file)
{
    char temporary[CHECKPOINT_NAME_BYTES_MAX];

    format_name(temporary, version_now()->temporary_prefix, name);
    int fd = io->create(io, temporary);
    if (fd < 0)
        return fd;
    int r = write_content(io, fd, file);
    io->close(io, fd);
    if (r < 0)
        io->unlink(io, temporary);
    return r;
}

int checkpoint_prepare(struct io *io, const struct cipher_key *key, const char *name,
                       const uint8_t *state, size_t state_bytes,
                       const struct checkpoint_lineage *lineage)
{
    cleanup(swtpm_wrapped_deinit) struct swtpm_wrapped file;

    int r = swtpm_wrap(SWTPM_FILE, key, state, state_bytes, lineage, &file);
    return r < 0 ? r : write_temporary(io, name, &file);
}

int checkpoint_publish(struct io *io, const char *name)
{
    char temporary[CHECKPOINT_NAME_BYTES_MAX], final[CHECKPOINT_NAME_BYTES_MAX];

    format_name(temporary, version_now()->temporary_prefix, name);
    format_name(final, version_now()->prefix, name);
    int r = io->rename(io, temporary, final);
    if (r < 0) {
        io->unlink(io, temporary);
        return r;
    }
    return io->sync_directory(io);
}

int checkpoint_find(struct io *io, const char *name)
{
    char final[CHECKPOINT_NAME_BYTES_MAX];

    format_name(final, version_now()->prefix, name);
    return io->find(io, final);
}

void checkpoint_discard(struct io *io, const char *name)
{
    char temporary[CHECKPOINT_NAME_BYTES_MAX];

    format_name(temporary, version_now()->temporary_prefix, name);
    io->unlink(io, temporary); /* what is left is as after a crash: a start removes it */
}

int checkpoint_write(struct io *io, const struct cipher_key *key, const char *name,
                     const uint8_t *state, size_t state_bytes,
                     const struct checkpoint_lineage *lineage)
{
    int r = checkpoint_prepare(io, key, name, state, state_bytes, lineage);

    return r < 0 ? r : checkpoint_publish(io, name);
}

int checkpoint_remove(struct io *io, const char *name)
{
    char final[CHECKPOINT_NAME_BYTES_MAX];

    format_name(final, version_now()->prefix, name);
    int r = io->unlink(io, final);
    if (r < 0 && r != -ENOENT)
        return r;
    return io->sync_directory(io); /* a removal before may not have been synced */
}
