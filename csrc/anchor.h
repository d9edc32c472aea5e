/* The anchor: a small file in a second place, which says how far a vTPM's permanent state has come.
 *
 * A state directory that was put back as a whole cannot be told from the inside. What is written
 * here after each commit, and before its response, tells it at the next start.
 *
 * Two slots, at 0 and ANCHOR_SLOT_STRIDE, take turns, so that a write that was cut leaves the
 * other:
 *
 *     Offset  Size  Field
 *     0       8     magic, "VTPMANCH"
 *     8       2     version, 1
 *     10      2     incompatible flags, 0
 *     12      4     zeros
 *     16      16    identity of the vTPM
 *     32      8     serial: 1, 2, … for each write
 *     40      8     generation of the permanent state
 *     48      32    its SHA-256; zeros: there is none yet
 *     80      32    SHA-256 of what may be there instead, as it is being written; or zeros
 *     112     396   zeros
 *     508     4     checksum: CRC-32C of everything before it
 *
 * Numbers are big-endian. vtpmd/store/anchor.py opens, checks and begins the file.
 */
#pragma once

#include <stdint.h>

#include "digest.h"
#include "io.h"

#define ANCHOR_MAGIC UINT64_C(0x5654504d414e4348) /* "VTPMANCH" */

enum {
    ANCHOR_VERSION = 1,
    ANCHOR_IDENTITY_BYTES = 16,
    ANCHOR_SLOT_BYTES = 512,   /* a sector, which disks write whole */
    ANCHOR_SLOT_STRIDE = 4096, /* so that no write touches the other slot's page */
    ANCHOR_SLOTS = 2,
    ANCHOR_BYTES = ANCHOR_SLOTS * ANCHOR_SLOT_STRIDE,
};

struct anchor {
    int fd;          /* -1: there is no anchor */
    uint64_t serial; /* of the last write */
    uint64_t generation;
    uint8_t identity[ANCHOR_IDENTITY_BYTES];
    uint8_t digest[DIGEST_BYTES];
};

/* Say that a state of this digest may take the present one's place. That is for one that leaves no
 * trace of which came later, as a journal does. Returns 0 once it is durable, or a negative errno;
 * what was said before is still there. */
int anchor_expect(struct io *io, struct anchor *anchor, const uint8_t digest[DIGEST_BYTES]);

/* Say that the permanent state is now this one, and no other. Returns as anchor_expect() does. */
int anchor_write(struct io *io, struct anchor *anchor, uint64_t generation,
                 const uint8_t digest[DIGEST_BYTES]);
