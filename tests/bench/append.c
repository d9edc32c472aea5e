/* What a durable commit cannot cost less than: an append of one sector, and a sync.
 *
 *     append FILE
 *
 * Stands in an emulator's place on the data socket that is its standard input. For each command it
 * writes the next sector of a file that has been written once before, so that its metadata does not
 * change, waits until that is on the device, and answers that the command succeeded. Exit status: 0
 * the other end hung up, 1 a call failed, 2 usage.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum {
    COMMAND_BYTES_MAX = 4096,
    SECTOR_BYTES = 512,
    PAGE_BYTES = 4096,
    FILE_BYTES = 1 << 20,
};

static const uint8_t success[] = {0x80, 0x01, 0, 0, 0, 10, 0, 0, 0, 0};

static int fail(const char *what)
{
    perror(what);
    return 1;
}

/* Page by page: in a file that was written with one call the kernel may dirty more than a page. */
static int allocate(int fd)
{
    static const uint8_t zeros[PAGE_BYTES];

    for (off_t offset = 0; offset < FILE_BYTES; offset += PAGE_BYTES)
        if (pwrite(fd, zeros, sizeof(zeros), offset) != sizeof(zeros))
            return -1;
    return fsync(fd);
}

int main(int argc, char **argv)
{
    uint8_t command[COMMAND_BYTES_MAX], sector[SECTOR_BYTES];
    unsigned number = 0;

    if (argc != 2) {
        fprintf(stderr, "usage: append FILE\n");
        return 2;
    }
    int fd = open(argv[1], O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0 || allocate(fd) < 0)
        return fail(argv[1]);
    while (read(STDIN_FILENO, command, sizeof(command)) > 0) {
        off_t offset = (off_t)number * SECTOR_BYTES % FILE_BYTES;

        memset(sector, (int)(++number % UINT8_MAX), sizeof(sector));
        if (pwrite(fd, sector, sizeof(sector), offset) != sizeof(sector) || fdatasync(fd) < 0)
            return fail(argv[1]);
        if (write(STDIN_FILENO, success, sizeof(success)) != sizeof(success))
            return fail("answer");
    }
    return 0;
}
