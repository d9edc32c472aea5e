/* The one seam for all file access of the core.
 *
 * Everything that makes state durable calls these, so that a test can put a file system of its own
 * under it: one that is full, fails, or loses power at the n-th call. io_posix.c is the real one.
 *
 * All names are relative to the state directory's descriptor. Every function returns 0 or more on
 * success and a negative errno on failure.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

enum {
    IO_DIRECT_ALIGNMENT = 4096,
    IO_DIRECT_SECTOR_BYTES = 512,
    IO_POSIX_MODE = 0640, /* swtpm's default */
};

struct io {
    /* Create a file for writing, in place of one of that name. Returns its descriptor. */
    int (*create)(struct io *io, const char *name);
    /* Write all of the vectors, which it may change. */
    int (*write)(struct io *io, int fd, struct iovec *vectors, int n_vectors);
    /* Write all of the bytes at an offset. */
    int (*write_at)(struct io *io, int fd, const uint8_t *bytes, size_t n_bytes, off_t offset);
    /* Read bytes at an offset; what is behind the end is zeros. */
    int (*read_at)(struct io *io, int fd, uint8_t *bytes, size_t n_bytes, off_t offset);
    /* Let write_at() and read_at() go to the device by itself from now on, if they can: a sector
     * that is written is then not kept, and written back with its page. Memory, offsets and lengths
     * must be aligned to IO_DIRECT_ALIGNMENT, IO_DIRECT_SECTOR_BYTES and again that. */
    void (*set_direct)(struct io *io, int fd);
    /* Return once the file's content is on the device. */
    int (*sync)(struct io *io, int fd);
    /* The same for content that took the place of other: nothing but that need be written. */
    int (*sync_data)(struct io *io, int fd);
    void (*close)(struct io *io, int fd);
    int (*rename)(struct io *io, const char *from, const char *to);
    int (*unlink)(struct io *io, const char *name);
    /* Return 0 if there is a file of that name. */
    int (*find)(struct io *io, const char *name);
    /* Return once renames and removals in the directory are on the device. */
    int (*sync_directory)(struct io *io);
    /* What is written from now on takes the place of what is there then, whoever has written it. */
    void (*look_again)(struct io *io);
    /* Have the lock on all of it, or, unless that `is_so`, none. Does not wait: it fails with
     * -EAGAIN or -EACCES while another process has it. */
    int (*lock)(struct io *io, bool is_so);
};

struct io_posix {
    struct io io;
    int directory_fd;
    int lock_fd; /* which others may share: the lock is of its description */
    mode_t mode; /* of files that are made; 0: IO_POSIX_MODE */
};

extern const struct io io_posix_functions;
