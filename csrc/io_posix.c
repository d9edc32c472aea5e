/* File access on a real directory, by descriptor only: no path is ever looked up. */
#include "io.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "vectors.h"

static mode_t mode_of(struct io *io)
{
    mode_t mode = ((struct io_posix *)io)->mode;

    return mode ? mode : IO_POSIX_MODE;
}

static int directory_of(struct io *io)
{
    return ((struct io_posix *)io)->directory_fd;
}

/* sandbox: unlinkat(arg0 == LINK_FD_DIRECTORY, arg2 == 0) fchmod close
 *          openat(arg0 == LINK_FD_DIRECTORY,
 *                 arg2 == O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC) */
static int posix_create(struct io *io, const char *name)
{
    mode_t mode = mode_of(io);

    /* A link or a foreign file in this place is removed, never written through. */
    if (unlinkat(directory_of(io), name, 0) < 0 && errno != ENOENT)
        return -errno;
    int fd =
        openat(directory_of(io), name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, mode);
    if (fd < 0)
        return -errno;
    /* The mode holds whatever the umask is. */
    if (fchmod(fd, mode) < 0) {
        int error = errno;
        close(fd);
        return -error;
    }
    return fd;
}

/* One after the other, by a call that is allowed already.
 * sandbox: write */
static int posix_write(struct io *io, int fd, struct iovec *vectors, int n_vectors)
{
    size_t n_left = (size_t)n_vectors;

    (void)io;
    while (n_left > 0) {
        ssize_t written = write(fd, vectors->iov_base, vectors->iov_len);
        if (written < 0 && errno == EINTR)
            continue;
        if (written < 0)
            return -errno;
        vectors_advance(&vectors, &n_left, (size_t)written);
    }
    return 0;
}

/* Returns false if it was not set.
 * sandbox: fcntl(arg1 == F_GETFL or F_SETFL) */
static bool leave_direct(int fd)
{
    int flags = fcntl(fd, F_GETFL);

    return flags >= 0 && flags & O_DIRECT && fcntl(fd, F_SETFL, flags & ~O_DIRECT) == 0;
}

/* sandbox: fcntl(arg1 == F_GETFL or F_SETFL) */
static void posix_set_direct(struct io *io, int fd)
{
    int flags = fcntl(fd, F_GETFL);

    (void)io;
    if (flags >= 0)
        fcntl(fd, F_SETFL, flags | O_DIRECT); /* a file system that cannot refuses */
}

/* sandbox: pwrite64 */
static int posix_write_at(struct io *io, int fd, const uint8_t *bytes, size_t n_bytes, off_t offset)
{
    (void)io;
    while (n_bytes > 0) {
        ssize_t written = pwrite(fd, bytes, n_bytes, offset);
        if (written < 0 && errno == EINTR)
            continue;
        /* The device's sectors may be larger. */
        if (written < 0 && errno == EINVAL && leave_direct(fd))
            continue;
        if (written < 0)
            return -errno;
        bytes += written;
        n_bytes -= (size_t)written;
        offset += written;
    }
    return 0;
}

/* sandbox: pread64 */
static int posix_read_at(struct io *io, int fd, uint8_t *bytes, size_t n_bytes, off_t offset)
{
    size_t n_read = 0;

    (void)io;
    while (n_read < n_bytes) {
        ssize_t n = pread(fd, bytes + n_read, n_bytes - n_read, offset + (off_t)n_read);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EINVAL && leave_direct(fd))
            continue;
        if (n < 0)
            return -errno;
        if (n == 0)
            break;
        n_read += (size_t)n;
    }
    memset(bytes + n_read, 0, n_bytes - n_read);
    return 0;
}

/* sandbox: fsync */
static int posix_sync(struct io *io, int fd)
{
    (void)io;
    return fsync(fd) < 0 ? -errno : 0;
}

/* sandbox: fdatasync */
static int posix_sync_data(struct io *io, int fd)
{
    (void)io;
    return fdatasync(fd) < 0 ? -errno : 0;
}

/* sandbox: close */
static void posix_close(struct io *io, int fd)
{
    (void)io;
    close(fd);
}

/* sandbox: renameat|renameat2(arg0 == LINK_FD_DIRECTORY, arg2 == LINK_FD_DIRECTORY) */
static int posix_rename(struct io *io, const char *from, const char *to)
{
    return renameat(directory_of(io), from, directory_of(io), to) < 0 ? -errno : 0;
}

/* sandbox: unlinkat(arg0 == LINK_FD_DIRECTORY, arg2 == 0) */
static int posix_unlink(struct io *io, const char *name)
{
    return unlinkat(directory_of(io), name, 0) < 0 ? -errno : 0;
}

/* By a system call that is allowed already, and changes nothing: rename(2). */
static int posix_find(struct io *io, const char *name)
{
    return posix_rename(io, name, name);
}

/* sandbox: fsync */
static int posix_sync_directory(struct io *io)
{
    return fsync(directory_of(io)) < 0 ? -errno : 0;
}

/* A name is looked up each time. */
static void posix_look_again(struct io *io)
{
    (void)io;
}

/* The kernel has it, on which a file system of another host is asked. fcntl(2).
 * sandbox: fcntl(arg0 == LINK_FD_LOCK, arg1 == F_OFD_SETLK) */
static int posix_lock(struct io *io, bool is_so)
{
    struct flock wanted = {.l_type = is_so ? F_WRLCK : F_UNLCK, .l_whence = SEEK_SET};

    return fcntl(((struct io_posix *)io)->lock_fd, F_OFD_SETLK, &wanted) < 0 ? -errno : 0;
}

const struct io io_posix_functions = {
    .create = posix_create,
    .write = posix_write,
    .write_at = posix_write_at,
    .read_at = posix_read_at,
    .set_direct = posix_set_direct,
    .sync = posix_sync,
    .sync_data = posix_sync_data,
    .close = posix_close,
    .rename = posix_rename,
    .unlink = posix_unlink,
    .find = posix_find,
    .sync_directory = posix_sync_directory,
    .look_again = posix_look_again,
    .lock = posix_lock,
};
