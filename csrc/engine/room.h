/* Room for a state that is to come: a file that is there, at its full size, before QEMU brings it.
 *
 * A guest waits for the INIT of what QEMU has brought, and that for the disk. A new file is a
 * change of the file system's, and so is its name; what is written in place of other bytes is one
 * write. So where a QEMU waits for a guest, the room is made; the state that comes is written into
 * it while QEMU brings the rest; and INIT has to wait for nothing more. From then on a start takes
 * it up (vtpmd/store/arrived.py), until the worker has put it into its own file:
 *
 *     none ─want─► wanted ─work─► making ─work─► made ─fill─► filled ─keep─► kept ─fail─► left
 *
 *     making ─it fails─► none        wanted ─drop─► none
 *     kept, left ─release─► unwanted        making, made, filled ─drop─► unwanted ─work─► none
 *
 * In kept and left nothing else on the disk has the state. A loss of power before that leaves what
 * came, but was not started, and is taken up all the same: it came of this vTPM, or of one that
 * this host had nothing of, and is later than what this host had.
 *
 *     Offset  Size  Content of tpm2-00.arrived
 *     0       8     magic, "VTPMDAR1"
 *     8       8     length of the state file; 0: none has come
 *     16      32    SHA-256 of the state file
 *     512     …     the state file, as its own would be (checkpoint.h)
 *
 * All of this is under the lock of who owns it, which only room_work() gives up. Numbers are
 * big-endian.
 */
#pragma once

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "io.h"
#include "swtpm_format.h"

enum {
    ROOM_AT_LENGTH = 8,
    ROOM_AT_DIGEST = 16,
    ROOM_AT_FILE = 512,
    ROOM_BYTES = 192 << 10, /* less than the 256 KiB that some give a daemon's files */
    ROOM_DELAY_MS = 50,     /* a QEMU that starts its guest by itself says so in less than one */
};

enum room_state {
    ROOM_NONE,
    ROOM_WANTED,
    ROOM_MAKING,   /* its file is being made */
    ROOM_MADE,     /* there is a file, and nothing in it */
    ROOM_FILLED,   /* it has a state that is not the vTPM's yet */
    ROOM_KEPT,     /* it alone has the vTPM's state */
    ROOM_LEFT,     /* so it has, and the worker could not put it into its own file */
    ROOM_UNWANTED, /* it is to be removed, or is being removed */
};

struct room {
    _Atomic enum room_state state; /* who would only drop it looks at it without the lock */
    int fd;                        /* but in none and wanted */
    int64_t due_ms; /* by clock_ms(): in wanted and unwanted nothing is done before */
    int64_t delay_ms;
};

/* In none: have room, `delay_ms` from now; and remove it that long after it is unwanted, as other
 * writes may have to be quick then. */
void room_want(struct room *room, int64_t delay_ms);

/* What it was filled with is of no use. */
void room_discard(struct room *room);

/* There is nothing to be put into it any more; what it keeps, it keeps. */
void room_drop(struct room *room);

/* What is unwanted is to be removed now. */
void room_hurry(struct room *room);

/* Return true if something is to be done now, beside what it keeps. */
bool room_has_work(const struct room *room);

/* Return true if something is to be done, now or from `due_ms` on. */
bool room_is_waiting(const struct room *room);

/* For the worker, with the lock: make the file, or remove it. */
void room_work(struct room *room, struct io *io, pthread_mutex_t *lock);

/* In made, without the lock: write a state file, durably. Returns 0 or a negative errno, and
 * -ENOSPC where it is too long: then it is not there after a loss of power. */
int room_fill(struct room *room, struct io *io, struct swtpm_wrapped *file);

/* After that, with the lock: unless it was dropped meanwhile, it is filled, or of no use. */
void room_was_filled(struct room *room, int r);

/* What fills it is the vTPM's state now. Returns false if nothing does. */
bool room_keep(struct room *room);

/* Return true if it alone has the vTPM's state. */
bool room_keeps(const struct room *room);

/* What it keeps could not be put into its own file. */
void room_fail(struct room *room);

/* It is in its own file. */
void room_release(struct room *room);

/* At the end: what it keeps stays on the disk. */
void room_leave(struct room *room, struct io *io);
