/* The journal's bytes: tpm2-00.journal, what was committed since the checkpoint.
 *
 * docs/journal-format.md is the description for other programs. All numbers are big-endian. The
 * file has a fixed length, a multiple of JOURNAL_PAGE_BYTES. Sector 0 is the header:
 *
 *     Offset  Size  Field
 *     0       8     magic, "VTPMJRNL"
 *     8       2     version, 2
 *     10      2     header size, 128
 *     12      2     compatible flags
 *     14      2     incompatible flags; 1: sealed
 *     16      16    identity of the vTPM
 *     32      32    salt: random, another in every file
 *     64      8     base generation
 *     72      4     base length
 *     76      4     file length
 *     80      32    base digest: of the checkpoint's image that the file continues
 *     112     16    header seal: AES-256-GCM tag over bytes 0 to 111; unsealed: zeros
 *     128     380   zeros
 *     508     4     checksum: CRC-32C of everything before it
 *
 * Each other sector is empty, which is all zeros, or a part of a record:
 *
 *     Offset  Size  Field
 *     0       4     checksum: CRC-32C of everything after it
 *     4       2     index of this sector in its record
 *     6       2     sectors of the record
 *     8       8     sequence number of the record: 1, 2, …
 *     16      496   a part of the record's content
 *
 * The parts of a record's content make:
 *
 *     Offset  Size  Field
 *     0       4     delta length
 *     4       32    link: unsealed, SHA-256 of the link before it, the delta length and the delta;
 *                   sealed, the AES-256-GCM tag over the same, and 16 zeros
 *     36      …     delta record (delta.h), encrypted if the file is sealed
 *     …       …     zeros, up to the end of the sector
 *
 * The link before the first record's is the SHA-256 of sector 0.
 *
 * A record begins at the next sector after the record before it. One of up to JOURNAL_PAGE_SECTORS
 * sectors that would cross the end of a page begins at the next page instead, and leaves the
 * sectors in between empty: a commit then writes one page.
 *
 * What makes this safe against loss of power:
 *
 *     1. A disk writes a sector of 512 bytes whole or not at all, and leaves its neighbours alone.
 *     2. The file has its name only once header and zeros are on the disk.
 *     3. A sector is written once. What was acknowledged is never written again.
 *     4. A record is on the disk before the next one is written.
 *     5. A file is written by one process, in one pass, until a write or a sync fails. It is never
 *        continued: after a crash it is read, folded into a checkpoint and removed.
 *
 * By 1 to 4 only the last record can be incomplete, and then some of its sectors are empty. By 5,
 * and as a file's key comes of its salt and a record's nonce is its sequence number, no nonce is
 * used twice with a key.
 */
#pragma once

#include <stdint.h>

#include "delta.h"

#define JOURNAL_MAGIC UINT64_C(0x5654504d4a524e4c) /* "VTPMJRNL" */

enum {
    JOURNAL_VERSION = 2,
    JOURNAL_VERSION_FIRST = 1, /* its records are of DELTA_VERSION_FIRST; read, never written */
    JOURNAL_SEALED = 1,        /* an incompatible flag */
    JOURNAL_BYTES = 1 << 20,   /* 12 checkpoints of 85 KB, and some 1700 small commits */
    JOURNAL_BYTES_MAX = JOURNAL_BYTES,
    JOURNAL_SECTOR_BYTES = 512, /* the smallest unit that disks write whole */
    JOURNAL_PAGE_BYTES = 4096,  /* the smallest unit that Linux writes back */
    JOURNAL_PAGE_SECTORS = JOURNAL_PAGE_BYTES / JOURNAL_SECTOR_BYTES,
    JOURNAL_HEADER_BYTES = 128,
    JOURNAL_IDENTITY_BYTES = 16,
    JOURNAL_SALT_BYTES = 32,
    JOURNAL_SECRET_BYTES = 32,
    JOURNAL_LINK_BYTES = 32,
    JOURNAL_FRAME_BYTES = 16,
    JOURNAL_PART_BYTES = JOURNAL_SECTOR_BYTES - JOURNAL_FRAME_BYTES,
    JOURNAL_RECORD_HEADER_BYTES = 36,
    JOURNAL_RECORD_SECTORS_MAX =
        (JOURNAL_RECORD_HEADER_BYTES + DELTA_RECORD_BYTES_MAX + JOURNAL_PART_BYTES - 1) /
        JOURNAL_PART_BYTES,
    JOURNAL_RECORDS_MAX = JOURNAL_BYTES_MAX / JOURNAL_SECTOR_BYTES - 1,
    JOURNAL_IMAGE_TYPE = 1, /* permanent */
};

_Static_assert((1 + JOURNAL_RECORD_SECTORS_MAX) * JOURNAL_SECTOR_BYTES <= JOURNAL_BYTES,
               "an empty journal has room for any record");

/* Where the fields of the header are, and of a sector and of a record's content. */
enum {
    JOURNAL_AT_VERSION = 8,
    JOURNAL_AT_HEADER_BYTES = 10,
    JOURNAL_AT_COMPATIBLE = 12,
    JOURNAL_AT_INCOMPATIBLE = 14,
    JOURNAL_AT_IDENTITY = 16,
    JOURNAL_AT_SALT = 32,
    JOURNAL_AT_BASE_GENERATION = 64,
    JOURNAL_AT_BASE_BYTES = 72,
    JOURNAL_AT_FILE_BYTES = 76,
    JOURNAL_AT_BASE_DIGEST = 80,
    JOURNAL_AT_HEADER_SEAL = 112,
    JOURNAL_AT_HEADER_CHECKSUM = 508,

    JOURNAL_AT_INDEX = 4,
    JOURNAL_AT_SECTORS = 6,
    JOURNAL_AT_SEQUENCE = 8,

    JOURNAL_AT_LINK = 4,
};

struct aead;

/* Where a record of so many sectors begins, when `sector` is the first that is free. */
uint32_t journal_place(uint32_t sector, uint32_t n_sectors);

/* How many sectors a delta of so many bytes takes, with its record's header. */
uint32_t journal_sectors_of(uint32_t delta_bytes);

/* Derive the key of the file with this header. Returns 0 or -ENOMEM. */
int journal_key(const uint8_t secret[JOURNAL_SECRET_BYTES], const uint8_t *header,
                struct aead **aead);

/* Work out the link before the first record's. Returns 0 or -ENOMEM. */
int journal_first_link(const uint8_t *header_sector, uint8_t link[JOURNAL_LINK_BYTES]);

/* Work out the link of an unsealed record after the one before it. Returns 0 or -ENOMEM. */
int journal_next_link(const uint8_t before[JOURNAL_LINK_BYTES], const uint8_t *content,
                      uint32_t delta_bytes, uint8_t link[JOURNAL_LINK_BYTES]);
