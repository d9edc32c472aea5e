#include "holder.h"

#include <ctype.h>
#include <errno.h>
#include <stdalign.h>
#include <stdio.h>
#include <string.h>

#include "check.h"
#include "error.h"

#define MAGIC "vtpmlock1\n"
#define HELD "held"
#define FREE "free"

static const uint8_t no_machine[] = "--------------------------------";

static struct io_posix *kept; /* NULL: there is no record */
static uint8_t own[HOLDER_BYTES];
static bool has_lock;
static char other[160];

/* As io.h wants them where the device is read by itself: what another host has written is not in
 * this one's memory. */
static alignas(IO_DIRECT_ALIGNMENT) uint8_t sector[HOLDER_BYTES];

static bool is_alike(const uint8_t *record, const uint8_t *mine, size_t at, size_t n_bytes)
{
    return memcmp(record + at, mine + at, n_bytes) == 0;
}

static bool is_state(const uint8_t *record, const char *state)
{
    return memcmp(record + HOLDER_AT_STATE, state, HOLDER_STATE_BYTES) == 0;
}

enum holder_found holder_find(const uint8_t *record, const uint8_t *mine)
{
    static const uint8_t nothing[HOLDER_BYTES];

    if (memcmp(record, nothing, HOLDER_BYTES) == 0)
        return HOLDER_NOTHING;
    if (memcmp(record, MAGIC, sizeof(MAGIC) - 1) != 0 || record[HOLDER_BYTES - 1] != '\n')
        return HOLDER_DAMAGED;
    if (is_state(record, FREE))
        return HOLDER_FREE;
    if (!is_state(record, HELD))
        return HOLDER_DAMAGED;
    if (is_alike(record, mine, HOLDER_AT_BOOT, HOLDER_BOOT_BYTES))
        return is_alike(record, mine, HOLDER_AT_NAMESPACE, HOLDER_NAMESPACE_BYTES)
                   ? HOLDER_HERE
                   : HOLDER_ELSEWHERE;
    /* It was started again since. */
    if (memcmp(record + HOLDER_AT_MACHINE, no_machine, HOLDER_MACHINE_BYTES) != 0 &&
        is_alike(record, mine, HOLDER_AT_MACHINE, HOLDER_MACHINE_BYTES) &&
        is_alike(record, mine, HOLDER_AT_HOST, HOLDER_HOST_BYTES))
        return HOLDER_HERE;
    return HOLDER_ELSEWHERE;
}

static void append(const char *before, size_t at, size_t n_bytes)
{
    size_t n = strlen(other);

    n += (size_t)snprintf(other + n, sizeof(other) - n, "%s", before);
    while (n_bytes > 0 && sector[at + n_bytes - 1] == ' ')
        n_bytes--;
    for (size_t i = 0; i < n_bytes && n + 1 < sizeof(other); i++)
        other[n++] = isprint(sector[at + i]) ? (char)sector[at + i] : '?';
    other[n] = 0;
}

/* Who it is, as vtpmd says it, too. */
static void describe(enum holder_found found)
{
    other[0] = 0;
    if (found == HOLDER_DAMAGED) {
        append("one whose record in .lock cannot be read", 0, 0);
        return;
    }
    size_t n_zeros = 0;

    while (n_zeros + 1 < HOLDER_PROCESS_BYTES && sector[HOLDER_AT_PROCESS + n_zeros] == '0')
        n_zeros++;
    append("host ", HOLDER_AT_HOST, HOLDER_HOST_BYTES);
    append(", process ", HOLDER_AT_PROCESS + n_zeros, HOLDER_PROCESS_BYTES - n_zeros);
    append(", since ", HOLDER_AT_SINCE, HOLDER_SINCE_BYTES);
}

static int write_state(const char *state)
{
    struct io *io = &kept->io;

    memcpy(sector, own, HOLDER_BYTES);
    memcpy(sector + HOLDER_AT_STATE, state, HOLDER_STATE_BYTES);
    int r = io->write_at(io, kept->lock_fd, sector, HOLDER_BYTES, 0);
    return r < 0 ? r : io->sync_data(io, kept->lock_fd);
}

/* With the lock. Returns 0 or a negative errno. */
static int take(void)
{
    struct io *io = &kept->io;
    int r = io->read_at(io, kept->lock_fd, sector, HOLDER_BYTES, 0);

    if (r < 0 || memcmp(sector, own, HOLDER_BYTES) == 0)
        return r;
    enum holder_found found = holder_find(sector, own);
    if (found == HOLDER_ELSEWHERE || found == HOLDER_DAMAGED) {
        describe(found);
        return -EBUSY;
    }
    return write_state(HELD);
}

static int lock_with_record(struct io *io, bool is_so)
{
    other[0] = 0;
    if (!is_so) {
        int r = has_lock ? write_state(FREE) : 0;
        if (r < 0)
            return r;
        has_lock = false;
        return io_posix_functions.lock(io, false);
    }
    int r = io_posix_functions.lock(io, true);
    if (r < 0)
        return r;
    r = take();
    if (r >= 0)
        has_lock = true;
    else if (!has_lock)
        io_posix_functions.lock(io, false);
    return r;
}

void holder_keep(struct io_posix *files, const uint8_t *mine, bool is_held)
{
    check(!kept);
    kept = files;
    memcpy(own, mine, HOLDER_BYTES);
    has_lock = is_held;
    files->io.lock = lock_with_record;
    files->io.set_direct(&files->io, files->lock_fd);
}

const char *holder_other(void)
{
    return other[0] ? other : NULL;
}

void holder_end(void)
{
    int r = kept && has_lock && take() == 0 ? write_state(FREE) : 0;

    if (r < 0)
        error_report("cannot write that the vTPM's directory is in use no more: %s; another host "
                     "has to be told: vtpmd owner DIR --claim",
                     strerror(-r));
    kept = NULL;
}
