/* Who has the lock on a state directory that hosts share, by a record in the file that is locked.
 *
 * Where a file system keeps locks on each host by itself, two of them may have the lock at once.
 * What the file says, both can read. docs/state-format.md has its bytes, and the table of what
 * becomes of whom.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "io.h"

enum {
    HOLDER_BYTES = 512, /* a disk writes a sector whole */
    HOLDER_AT_STATE = 10,
    HOLDER_STATE_BYTES = 4,
    HOLDER_AT_BOOT = 15,
    HOLDER_BOOT_BYTES = 36,
    HOLDER_AT_MACHINE = 52,
    HOLDER_MACHINE_BYTES = 32,
    HOLDER_AT_NAMESPACE = 85,
    HOLDER_NAMESPACE_BYTES = 20,
    HOLDER_AT_PROCESS = 106,
    HOLDER_PROCESS_BYTES = 10,
    HOLDER_AT_STARTED = 117,
    HOLDER_STARTED_BYTES = 20,
    HOLDER_AT_SINCE = 138,
    HOLDER_SINCE_BYTES = 20,
    HOLDER_AT_HOST = 159,
    HOLDER_HOST_BYTES = 64,
};

/* What a record says. */
enum holder_found {
    HOLDER_NOTHING,   /* the file is empty, as swtpm's is */
    HOLDER_FREE,      /* given back */
    HOLDER_HERE,      /* this host's: of a process that has ended, as its kernel gives the lock */
    HOLDER_ELSEWHERE, /* another host's, or another container's */
    HOLDER_DAMAGED,   /* not readable */
};

/* `record` and `mine`, which is this process's, have HOLDER_BYTES. */
enum holder_found holder_find(const uint8_t *record, const uint8_t *mine);

/* From now on who has the lock by these files, which have to stay, says so in it; `mine`, of
 * HOLDER_BYTES, is copied. If it `is_held` this does already. */
void holder_keep(struct io_posix *files, const uint8_t *mine, bool is_held);

/* Whose it is, if a lock that was got last was another's by its record; or NULL. */
const char *holder_other(void);

/* This process ends: say that it has the lock no more, if it has. */
void holder_end(void);
