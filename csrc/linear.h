/* A linear file or block device (linear_format.h) in place of a state directory.
 *
 * It is put under the core's file seam (io.h) as a directory that has room for the files of the
 * three states, and for nothing else: what makes state files (checkpoint.h) does not know. A file
 * that is made is data in room that no state has; to give it its name, or to remove it, is to write
 * the header, which is in one sector.
 *
 * What makes this safe against loss of power:
 *
 *     1. A disk writes a sector of 512 bytes whole or not at all, and no more than a unit of
 *        LINEAR_UNIT_BYTES with it.
 *     2. Room is taken only while the header is known to be on the disk, as it is here: so no
 *        header that a loss of power may bring back has data there.
 *     3. Data is on the disk before a header names it.
 *
 * By 1 and 2 nothing that is named is ever written to; by 3 what is named is whole. The price is a
 * second sync for each change, and room for two of a state. A header that could not be written, or
 * synced, may be on the disk or not: it is written again, as names are here, before more room is
 * taken. So is the first one of an empty file, and that of a process which may not have synced it.
 *
 * The header also tells of another writer, where no lock does, as on a device that two hosts have:
 * before room is taken, and before the header is written, it is read, past the page cache, and has
 * to be what was written or read here last. Otherwise nothing is written: the change fails. Only a
 * state that QEMU brings takes the place of whatever is there (look_again).
 *
 * A block device has the length that it has; a file grows where there is no room in it.
 */
#pragma once

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "io.h"
#include "linear_format.h"

/* A file that is made, until it has its name. */
struct linear_made {
    bool is_made;
    struct linear_extent extent; /* of no bytes until it is written */
};

struct linear {
    struct io io; /* first: its functions get this */
    struct io *under;
    int fd; /* of `under` */
    bool is_fixed;
    pthread_mutex_t lock; /* over what follows */
    uint64_t file_bytes;
    struct linear_header header;
    bool is_synced;   /* the header is on the disk */
    bool is_outdated; /* it is to be read again */
    bool is_in_doubt; /* it may be another: to sync is not enough */
    uint8_t *unit;    /* the first, as it was written or read last; aligned, as the next two are */
    uint8_t *attempt; /* the same, as it was to be written; it may be there if that is in doubt */
    uint8_t *found;   /* for what is there */
    struct linear_made made[LINEAR_STATES];
};

/* Serve what is in a file of `under`, which stays the caller's, as the descriptor does. It has
 * `file_bytes`, and cannot grow if it `is_fixed`; where its first unit is all zeros, or there is
 * none, there is nothing in it yet. Nothing is written. Returns 0, an enum linear_fault, or a
 * negative errno; only with 0 there is something to deinit. */
int linear_init(struct linear *linear, struct io *under, int fd, uint64_t file_bytes,
                bool is_fixed);

/* Return true if the header is this one. */
bool linear_has_header(const struct linear *linear, const uint8_t bytes[LINEAR_HEADER_BYTES]);

void linear_deinit(struct linear *linear);
