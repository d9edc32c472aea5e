/* swtpm's linear format: the states of one TPM in one file or block device, and nothing beside it.
 *
 *     header, and then the sections, which do not overlap
 *
 * Numbers are little-endian:
 *
 *     Offset  Size  Field of the header
 *     0       8     magic, 0x737774706d6c696e
 *     8       1     version, 1
 *     9       1     zero
 *     10      2     size of the header, 192
 *     12      180   fifteen slots: permall, volatilestate, savestate; swtpm uses no other
 *
 *     Offset  Size  Field of a slot
 *     0       4     offset of its section; 0: there is none
 *     4       4     length of the data, which is a state file (swtpm_format.h)
 *     8       4     length of the section, which begins with the data
 *
 * swtpm moves sections: it takes each to begin where the one before it ends, whatever is before the
 * first, and would mix up what lies apart. So lengths are written that leave no gap.
 *
 * Source: swtpm's swtpm_nvstore_linear.c and .h; docs/state-format.md.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define LINEAR_MAGIC UINT64_C(0x737774706d6c696e)

enum {
    LINEAR_VERSION = 1,
    LINEAR_HEADER_BYTES = 192, /* in the first sector, which a disk writes whole */
    LINEAR_SLOTS = 15,
    LINEAR_STATES = 3,                 /* the slots that are used */
    LINEAR_DATA_BYTES_MAX = 512 << 10, /* no state file is larger */
    LINEAR_UNIT_BYTES = 4096,          /* what is in different ones, no disk writes together */

    LINEAR_AT_VERSION = 8,
    LINEAR_AT_HEADER_BYTES = 10,
    LINEAR_AT_SLOTS = 12,
    LINEAR_SLOT_BYTES = 12,
    LINEAR_AT_DATA_BYTES = 4,
    LINEAR_AT_SECTION_BYTES = 8,
};

/* Where the data of a state is; of no bytes: there is none. */
struct linear_extent {
    uint32_t offset;
    uint32_t n_bytes;
};

struct linear_header {
    struct linear_extent states[LINEAR_STATES];
};

/* What is wrong with a header. */
enum linear_fault {
    LINEAR_NOTHING = 0,
    LINEAR_FAULT_MAGIC,   /* it is none */
    LINEAR_FAULT_VERSION, /* nor of this version, or of its size */
    LINEAR_FAULT_SLOTS,   /* it has states that are no TPM's first */
    LINEAR_FAULT_SECTION, /* one is not in the file, or shorter than its data */
    LINEAR_FAULT_OVERLAP, /* two have bytes in common */
};

/* Read the header of a file that has `file_bytes`, and of which `bytes` are the first. */
enum linear_fault linear_decode(const uint8_t *bytes, size_t n_bytes, uint64_t file_bytes,
                                struct linear_header *header);

/* Write a header, for a file that has `file_bytes`. */
void linear_encode(const struct linear_header *header, uint64_t file_bytes,
                   uint8_t bytes[LINEAR_HEADER_BYTES]);

/* Find the first room for `n_bytes` that shares no unit with the header and what is in `taken`,
 * of which some may be of no bytes. Return its offset; it is at the end of them all, if nowhere
 * else. */
uint64_t linear_find_room(const struct linear_extent *taken, size_t n_taken, uint32_t n_bytes);
