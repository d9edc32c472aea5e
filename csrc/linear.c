#include "linear.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "error.h"
#include "hold.h"

/* The names that checkpoint.c gives, after what tells a TPM's version. */
static const char *const state_names[LINEAR_STATES] = {"permall", "volatilestate", "savestate"};
static const char temporary_prefix[] = "TMP";

enum {
    NO_STATE = -1,
};

#define locked(linear) hold_mutex(&(linear)->lock)

static struct linear *linear_of(struct io *io)
{
    return (struct linear *)io;
}

static int state_of(const char *name)
{
    const char *dot = strchr(name, '.');

    for (int i = 0; dot && i < LINEAR_STATES; i++)
        if (strcmp(dot + 1, state_names[i]) == 0)
            return i;
    return NO_STATE;
}

static bool is_temporary(const char *name)
{
    return strncmp(name, temporary_prefix, sizeof(temporary_prefix) - 1) == 0;
}

static bool is_zero(const uint8_t *bytes, size_t n_bytes)
{
    for (size_t i = 0; i < n_bytes; i++)
        if (bytes[i])
            return false;
    return true;
}

static size_t first_unit_bytes(const struct linear *linear)
{
    return linear->is_fixed && linear->file_bytes < LINEAR_UNIT_BYTES ? linear->file_bytes
                                                                      : LINEAR_UNIT_BYTES;
}

/* Go on from the header that was found. What was made is of no use: somebody may have had its room.
 */
static int adopt(struct linear *linear)
{
    uint64_t file_bytes =
        linear->is_fixed ? linear->file_bytes : UINT32_MAX; /* it may have grown */

    if (linear_decode(linear->found, LINEAR_UNIT_BYTES, file_bytes, &linear->header) !=
        LINEAR_NOTHING)
        return -EIO;
    for (int i = 0; i < LINEAR_STATES; i++) {
        const struct linear_extent *data = &linear->header.states[i];
        uint64_t end = (uint64_t)data->offset + data->n_bytes;
        linear->file_bytes = end > linear->file_bytes ? end : linear->file_bytes;
        linear->made[i].extent = (struct linear_extent){0};
    }
    memcpy(linear->unit, linear->found, LINEAR_UNIT_BYTES);
    linear->is_synced = linear->is_in_doubt = linear->is_outdated = false;
    return 0;
}

/* Returns 0 if the header is what this process knows, -EBUSY if somebody else has written it. */
static int look(struct linear *linear)
{
    size_t n_bytes = first_unit_bytes(linear);

    int r = linear->under->read_at(linear->under, linear->fd, linear->found, n_bytes, 0);
    if (r >= 0 && linear->is_outdated && !is_zero(linear->found, LINEAR_UNIT_BYTES))
        r = adopt(linear);
    if (r < 0 || memcmp(linear->found, linear->unit, LINEAR_HEADER_BYTES) == 0)
        return r;
    if (linear->is_in_doubt && memcmp(linear->found, linear->attempt, LINEAR_HEADER_BYTES) == 0)
        return 0;
    error_report("another process has written to the file that the vTPM's state is in: nothing is "
                 "overwritten; have one of the two alone use it");
    return -EBUSY;
}

static int write_header(struct linear *linear, const struct linear_header *header)
{
    size_t n_bytes = first_unit_bytes(linear);

    int r = look(linear);
    if (r < 0)
        return r;
    memcpy(linear->attempt, linear->unit, LINEAR_UNIT_BYTES);
    linear_encode(header, linear->file_bytes, linear->attempt);
    linear->is_synced = false;
    r = linear->under->write_at(linear->under, linear->fd, linear->attempt, n_bytes, 0);
    if (r < 0) {
        linear->is_in_doubt = true;
        return r;
    }
    memcpy(linear->unit, linear->attempt, LINEAR_UNIT_BYTES);
    if (linear->file_bytes < n_bytes)
        linear->file_bytes = n_bytes;
    return 0;
}

/* Have the header on the disk as it is here. */
static int settle(struct linear *linear)
{
    if (linear->is_synced)
        return 0;
    int r = linear->is_in_doubt ? write_header(linear, &linear->header) : 0;
    if (r >= 0)
        r = linear->under->sync_data(linear->under, linear->fd);
    linear->is_synced = r >= 0;
    linear->is_in_doubt = r < 0;
    return r;
}

/* Have the header say this from now on. Should the disk have one before, that is whole, too. */
static int change(struct linear *linear, const struct linear_header *next)
{
    int r = write_header(linear, next);

    if (r >= 0)
        linear->header = *next;
    return r;
}

static int linear_create(struct io *io, const char *name)
{
    struct linear *linear = linear_of(io);
    int state = state_of(name);

    locked(linear);
    if (state == NO_STATE || !is_temporary(name))
        return -EROFS;
    linear->made[state] = (struct linear_made){.is_made = true};
    return state;
}

static int take_room(struct linear *linear, int state, uint32_t n_bytes)
{
    struct linear_extent taken[2 * LINEAR_STATES];

    locked(linear);
    int r = look(linear);
    if (r >= 0)
        r = settle(linear);
    if (r < 0)
        return r;
    for (int i = 0; i < LINEAR_STATES; i++) {
        taken[i] = linear->header.states[i];
        taken[LINEAR_STATES + i] = linear->made[i].extent;
    }
    uint64_t offset = linear_find_room(taken, 2 * LINEAR_STATES, n_bytes);
    if (linear->is_fixed && offset + n_bytes > linear->file_bytes)
        return -ENOSPC;
    if (offset + n_bytes > UINT32_MAX - LINEAR_UNIT_BYTES)
        return -EFBIG;
    linear->made[state].extent = (struct linear_extent){(uint32_t)offset, n_bytes};
    return 0;
}

/* Copy the vectors to aligned memory, with zeros up to the end of the unit. Returns NULL without
 * memory; free() overwrites what it frees. */
static uint8_t *gather(const struct iovec *vectors, int n_vectors, size_t n_bytes)
{
    uint8_t *bytes = NULL, *at;

    if (posix_memalign((void **)&bytes, IO_DIRECT_ALIGNMENT, n_bytes) != 0)
        return NULL;
    at = bytes;
    for (int i = 0; i < n_vectors; i++) {
        memcpy(at, vectors[i].iov_base, vectors[i].iov_len);
        at += vectors[i].iov_len;
    }
    memset(at, 0, n_bytes - (size_t)(at - bytes));
    return bytes;
}

/* Whole units, but for the last of a device. */
static size_t units_at(const struct linear *linear, const struct linear_extent *extent)
{
    size_t n_units = (extent->n_bytes + LINEAR_UNIT_BYTES - 1) / LINEAR_UNIT_BYTES;
    uint64_t n_left = linear->file_bytes - extent->offset;

    if (linear->is_fixed && n_units * LINEAR_UNIT_BYTES > n_left)
        return n_left;
    return n_units * LINEAR_UNIT_BYTES;
}

static void note_length(struct linear *linear, uint64_t file_bytes)
{
    locked(linear);
    if (linear->file_bytes < file_bytes)
        linear->file_bytes = file_bytes;
}

/* All of a file at once, without the lock: nobody else has its room. */
static int linear_write(struct io *io, int fd, struct iovec *vectors, int n_vectors)
{
    struct linear *linear = linear_of(io);
    struct linear_extent *extent = &linear->made[fd].extent;
    size_t n_bytes = 0;

    for (int i = 0; i < n_vectors; i++)
        n_bytes += vectors[i].iov_len;
    check(linear->made[fd].is_made && extent->n_bytes == 0);
    if (n_bytes == 0 || n_bytes > LINEAR_DATA_BYTES_MAX)
        return -EFBIG;
    int r = take_room(linear, fd, (uint32_t)n_bytes);
    if (r < 0)
        return r;
    n_bytes = units_at(linear, extent);
    uint8_t *bytes = gather(vectors, n_vectors, n_bytes);
    if (!bytes)
        return -ENOMEM;
    r = linear->under->write_at(linear->under, linear->fd, bytes, n_bytes, extent->offset);
    if (r >= 0)
        note_length(linear, extent->offset + (uint64_t)n_bytes);
    free(bytes);
    return r;
}

static int linear_write_at(struct io *io, int fd, const uint8_t *bytes, size_t n_bytes,
                           off_t offset)
{
    (void)io, (void)fd, (void)bytes, (void)n_bytes, (void)offset;
    return -EROFS; /* what is written so is not written whole */
}

static int linear_read_at(struct io *io, int fd, uint8_t *bytes, size_t n_bytes, off_t offset)
{
    (void)io, (void)fd, (void)bytes, (void)n_bytes, (void)offset;
    return -EINVAL;
}

static void linear_set_direct(struct io *io, int fd)
{
    (void)io, (void)fd;
}

static int linear_sync(struct io *io, int fd)
{
    struct linear *linear = linear_of(io);

    (void)fd;
    return linear->under->sync_data(linear->under, linear->fd);
}

static void linear_close(struct io *io, int fd)
{
    (void)io, (void)fd;
}

static int linear_rename(struct io *io, const char *from, const char *to)
{
    struct linear *linear = linear_of(io);
    int state = state_of(from);

    locked(linear);
    check(is_temporary(from) && !is_temporary(to) && state_of(to) == state);
    if (state == NO_STATE || linear->made[state].extent.n_bytes == 0)
        return -ENOENT;
    struct linear_header next = linear->header;
    next.states[state] = linear->made[state].extent;
    int r = change(linear, &next);
    if (r >= 0)
        linear->made[state] = (struct linear_made){0};
    return r;
}

static int remove_made(struct linear_made *made)
{
    int r = made->is_made ? 0 : -ENOENT;

    *made = (struct linear_made){0};
    return r;
}

static int linear_unlink(struct io *io, const char *name)
{
    struct linear *linear = linear_of(io);
    int state = state_of(name);

    locked(linear);
    if (state == NO_STATE)
        return -ENOENT;
    if (is_temporary(name))
        return remove_made(&linear->made[state]);
    if (linear->header.states[state].n_bytes == 0)
        return -ENOENT;
    struct linear_header next = linear->header;
    next.states[state] = (struct linear_extent){0};
    return change(linear, &next);
}

static int linear_find(struct io *io, const char *name)
{
    struct linear *linear = linear_of(io);
    int state = state_of(name);

    locked(linear);
    return state != NO_STATE && linear->header.states[state].n_bytes > 0 ? 0 : -ENOENT;
}

static int linear_sync_directory(struct io *io)
{
    struct linear *linear = linear_of(io);

    locked(linear);
    return settle(linear);
}

static void linear_look_again(struct io *io)
{
    struct linear *linear = linear_of(io);

    locked(linear);
    linear->is_outdated = true;
}

static int linear_lock(struct io *io, bool is_so)
{
    struct linear *linear = linear_of(io);

    return linear->under->lock(linear->under, is_so);
}

static const struct io functions = {
    .create = linear_create,
    .write = linear_write,
    .write_at = linear_write_at,
    .read_at = linear_read_at,
    .set_direct = linear_set_direct,
    .sync = linear_sync,
    .sync_data = linear_sync,
    .close = linear_close,
    .rename = linear_rename,
    .unlink = linear_unlink,
    .find = linear_find,
    .sync_directory = linear_sync_directory,
    .look_again = linear_look_again,
    .lock = linear_lock,
};

static int read_first_unit(struct linear *linear)
{
    uint8_t *units = NULL;

    if (posix_memalign((void **)&units, IO_DIRECT_ALIGNMENT, 3 * LINEAR_UNIT_BYTES) != 0)
        return -ENOMEM;
    memset(units, 0, 3 * LINEAR_UNIT_BYTES);
    linear->unit = units;
    linear->attempt = units + LINEAR_UNIT_BYTES;
    linear->found = units + 2 * LINEAR_UNIT_BYTES;
    linear->under->set_direct(linear->under, linear->fd);
    return linear->under->read_at(linear->under, linear->fd, linear->unit, first_unit_bytes(linear),
                                  0);
}

int linear_init(struct linear *linear, struct io *under, int fd, uint64_t file_bytes, bool is_fixed)
{
    *linear = (struct linear){
        .io = functions,
        .under = under,
        .fd = fd,
        .file_bytes = file_bytes,
        .is_fixed = is_fixed,
    };
    check(pthread_mutex_init(&linear->lock, NULL) == 0);
    int r = read_first_unit(linear);
    if (r >= 0)
        linear->is_in_doubt = is_zero(linear->unit, LINEAR_UNIT_BYTES);
    if (r >= 0 && !linear->is_in_doubt)
        r = (int)linear_decode(linear->unit, LINEAR_UNIT_BYTES, file_bytes, &linear->header);
    if (r != 0)
        linear_deinit(linear);
    return r;
}

bool linear_has_header(const struct linear *linear, const uint8_t bytes[LINEAR_HEADER_BYTES])
{
    return memcmp(linear->unit, bytes, LINEAR_HEADER_BYTES) == 0;
}

void linear_deinit(struct linear *linear)
{
    free(linear->unit);
    linear->unit = NULL;
    pthread_mutex_destroy(&linear->lock);
}
