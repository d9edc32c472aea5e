/* A canary: an engine that leaves out every other sync of a file. */
#include <stdatomic.h>

static atomic_uint calls;

int __real_fsync(int fd);
int __real_fdatasync(int fd);
int __wrap_fsync(int fd);
int __wrap_fdatasync(int fd);

int __wrap_fsync(int fd)
{
    return atomic_fetch_add(&calls, 1) % 2 ? 0 : __real_fsync(fd);
}

int __wrap_fdatasync(int fd)
{
    return atomic_fetch_add(&calls, 1) % 2 ? 0 : __real_fdatasync(fd);
}
