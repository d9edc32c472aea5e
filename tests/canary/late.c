/* A canary: an engine that answers a command before the change is in the file.
 *
 * In place of pwrite(), by which a journal gets its records: each call is done at the next one.
 * What was acknowledged last is lost when the engine is killed.
 */
#include <string.h>
#include <unistd.h>

enum {
    WRITE_BYTES_MAX = 1 << 20,
    ALIGNMENT = 4096, /* as direct writes need it */
};

ssize_t __real_pwrite(int fd, const void *bytes, size_t n_bytes, off_t offset);
ssize_t __wrap_pwrite(int fd, const void *bytes, size_t n_bytes, off_t offset);

ssize_t __wrap_pwrite(int fd, const void *bytes, size_t n_bytes, off_t offset)
{
    static _Alignas(ALIGNMENT) char held[WRITE_BYTES_MAX];
    static size_t held_bytes;
    static off_t held_offset;
    static int held_fd;

    /* If that file is closed, it is another one's turn, and nothing is lost by this. */
    if (held_bytes > 0)
        (void)!__real_pwrite(held_fd, held, held_bytes, held_offset);
    if (n_bytes > sizeof(held))
        return __real_pwrite(fd, bytes, n_bytes, offset);
    memcpy(held, bytes, n_bytes);
    held_bytes = n_bytes;
    held_offset = offset;
    held_fd = fd;
    return (ssize_t)n_bytes;
}
