#include "room.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "bytes.h"
#include "check.h"
#include "clock.h"
#include "digest.h"
#include "version.h"

static const uint8_t magic[] = "VTPMDAR1";

/* The one writer of its state. */
static void set(struct room *room, enum room_state state)
{
    room->state = state;
    room->due_ms = clock_ms() + room->delay_ms;
}

void room_want(struct room *room, int64_t delay_ms)
{
    check(room->state == ROOM_NONE);
    room->delay_ms = delay_ms;
    set(room, ROOM_WANTED);
}

void room_discard(struct room *room)
{
    if (room->state == ROOM_FILLED)
        set(room, ROOM_UNWANTED);
}

void room_drop(struct room *room)
{
    if (room->state == ROOM_WANTED)
        set(room, ROOM_NONE);
    if (room->state == ROOM_MAKING || room->state == ROOM_MADE)
        set(room, ROOM_UNWANTED);
    room_discard(room);
}

void room_hurry(struct room *room)
{
    if (room->state == ROOM_UNWANTED)
        room->due_ms = 0;
}

bool room_is_waiting(const struct room *room)
{
    return room->state == ROOM_WANTED || room->state == ROOM_UNWANTED;
}

bool room_has_work(const struct room *room)
{
    return room_is_waiting(room) && clock_ms() >= room->due_ms;
}

/* All of it at once: the file system has to find the blocks for it now. Returns 0 or a negative
 * errno. */
static int write_nothing(struct io *io, int fd)
{
    uint8_t *bytes = calloc(1, ROOM_BYTES);

    if (!bytes)
        return -ENOMEM;
    memcpy(bytes, magic, ROOM_AT_LENGTH);
    int r = io->write_at(io, fd, bytes, ROOM_BYTES, 0);
    free(bytes);
    return r < 0 ? r : io->sync(io, fd);
}

static int publish(struct io *io)
{
    int r = io->rename(io, version_now()->arrived_temporary_name, version_now()->arrived_name);
    if (r < 0) {
        io->unlink(io, version_now()->arrived_temporary_name);
        return r;
    }
    r = io->sync_directory(io);
    if (r < 0)
        io->unlink(io, version_now()->arrived_name);
    return r;
}

/* Returns a descriptor, or a negative errno: then there is no file. */
static int make_file(struct io *io)
{
    int fd = io->create(io, version_now()->arrived_temporary_name);

    if (fd < 0)
        return fd;
    int r = write_nothing(io, fd);
    if (r >= 0)
        r = publish(io);
    else
        io->unlink(io, version_now()->arrived_temporary_name);
    if (r >= 0)
        return fd;
    io->close(io, fd);
    return r;
}

static void remove_file(struct room *room, struct io *io)
{
    io->close(io, room->fd);
    io->unlink(io, version_now()->arrived_name);
    io->sync_directory(io); /* if it fails, it is as after a crash: a start looks at it */
}

static void make(struct room *room, struct io *io, pthread_mutex_t *lock)
{
    set(room, ROOM_MAKING);
    pthread_mutex_unlock(lock);
    int fd = make_file(io);
    pthread_mutex_lock(lock);
    room->fd = fd;
    if (fd < 0)
        set(room, ROOM_NONE);
    else if (room->state == ROOM_MAKING)
        set(room, ROOM_MADE);
}

void room_work(struct room *room, struct io *io, pthread_mutex_t *lock)
{
    check(room_has_work(room));
    if (room->state == ROOM_WANTED) {
        make(room, io, lock);
        return;
    }
    pthread_mutex_unlock(lock);
    remove_file(room, io);
    pthread_mutex_lock(lock);
    set(room, ROOM_NONE);
}

static void join(uint8_t *out, const struct iovec *pieces)
{
    for (int i = 0; i < SWTPM_PIECES; i++) {
        memcpy(out, pieces[i].iov_base, pieces[i].iov_len);
        out += pieces[i].iov_len;
    }
}

static int write_filled(struct room *room, struct io *io, uint8_t *bytes, size_t file_bytes)
{
    memcpy(bytes, magic, ROOM_AT_LENGTH);
    put_be64(bytes + ROOM_AT_LENGTH, file_bytes);
    int r = digest_compute(bytes + ROOM_AT_FILE, file_bytes, bytes + ROOM_AT_DIGEST);
    if (r >= 0)
        r = io->write_at(io, room->fd, bytes, ROOM_AT_FILE + file_bytes, 0);
    return r < 0 ? r : io->sync_data(io, room->fd);
}

int room_fill(struct room *room, struct io *io, struct swtpm_wrapped *file)
{
    struct iovec pieces[SWTPM_PIECES];

    swtpm_wrapped_pieces(file, pieces);
    size_t file_bytes = get_be32(file->before + SWTPM_AT_TOTAL_BYTES);
    if (file_bytes > ROOM_BYTES - ROOM_AT_FILE)
        return -ENOSPC;
    uint8_t *bytes = calloc(1, ROOM_AT_FILE + file_bytes);
    if (!bytes)
        return -ENOMEM;
    join(bytes + ROOM_AT_FILE, pieces);
    int r = write_filled(room, io, bytes, file_bytes);
    explicit_bzero(bytes, ROOM_AT_FILE + file_bytes);
    free(bytes);
    return r;
}

void room_was_filled(struct room *room, int r)
{
    if (room->state == ROOM_MADE)
        set(room, r < 0 ? ROOM_UNWANTED : ROOM_FILLED);
}

bool room_keep(struct room *room)
{
    if (room->state != ROOM_FILLED)
        return false;
    set(room, ROOM_KEPT);
    return true;
}

bool room_keeps(const struct room *room)
{
    return room->state == ROOM_KEPT || room->state == ROOM_LEFT;
}

void room_fail(struct room *room)
{
    check(room_keeps(room));
    set(room, ROOM_LEFT);
}

void room_release(struct room *room)
{
    if (room_keeps(room))
        set(room, ROOM_UNWANTED);
}

void room_leave(struct room *room, struct io *io)
{
    if (!room_keeps(room))
        return;
    io->close(io, room->fd);
    set(room, ROOM_NONE);
}
