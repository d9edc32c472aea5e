/* What swtpm leaves out: preloaded into it, its renames are durable.
 *
 * swtpm has fsync() of the new file before the rename and of the directory after it in its source
 * (swtpm_nvstore_dir.c), but compiled out, as guests timed out. This puts both back.
 */
#include <fcntl.h>
#include <libgen.h>
#include <limits.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <unistd.h>

static int sync_path(const char *path)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);

    if (fd < 0)
        return -1;
    int r = fsync(fd);
    close(fd);
    return r;
}

int rename(const char *from, const char *to)
{
    char directory[PATH_MAX];

    snprintf(directory, sizeof(directory), "%s", to);
    if (sync_path(from) < 0 || syscall(SYS_rename, from, to) < 0)
        return -1;
    return sync_path(dirname(directory));
}
